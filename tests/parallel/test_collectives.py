"""Every collective against what it means on one process, and against its adjoint."""

import pytest
import torch

from mamba2_dist.parallel import collectives
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.ledger import enter, record_collectives

from ..distributed import run_ranks
from ..splits import groups_of
from ..tolerances import EXACT, assert_close


def _group() -> Group:
    return groups_of(torch.distributed.get_world_size(), 1).tp


def _everyone(group: Group, *shape: int) -> torch.Tensor:
    """(ranks, *shape), the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(group.size, *shape, generator=generator, dtype=torch.float64)


def _forward_and_adjoint(name: str, dim: int):
    group = _group()
    shape = (2 * group.size, 3 * group.size)
    inputs = _everyone(group, *shape)
    function = getattr(collectives, name)
    options = {"dim": dim} if name in ("all_gather", "reduce_scatter") else {}
    x = inputs[group.rank].clone().requires_grad_()
    y = function(x, group, **options)
    expected = {
        "replicate": lambda: inputs[group.rank],
        "reduce": lambda: inputs.sum(0),
        "all_reduce": lambda: inputs.sum(0),
        "all_gather": lambda: torch.cat(list(inputs), dim),
        "reduce_scatter": lambda: inputs.sum(0).chunk(group.size, dim)[group.rank],
    }[name]()
    assert_close(y, expected, EXACT, "forward")
    # <cotangents, outputs> summed over ranks, differentiated by this rank's input
    cotangents = _everyone(group, *y.shape).flip(0)
    y.backward(cotangents[group.rank])
    offset = [0, 0]
    if name == "all_gather":
        offset[dim] = group.rank * shape[dim]
    expected = {
        "replicate": lambda: cotangents.sum(0),
        "reduce": lambda: cotangents[group.rank],
        "all_reduce": lambda: cotangents.sum(0),
        "all_gather": lambda: cotangents.sum(0).narrow(dim, offset[dim], shape[dim]),
        "reduce_scatter": lambda: torch.cat(list(cotangents), dim),
    }[name]()
    assert_close(x.grad, expected, EXACT, "adjoint")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["replicate", "reduce", "all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_forward_and_adjoint(ranks, name, dim):
    run_ranks(ranks, _forward_and_adjoint, name, dim)


def _all_to_all():
    group = _group()
    rows = [[(sender + receiver) % 3 for receiver in range(group.size)] for sender in range(group.size)]
    label = lambda sender, receiver, i: 100.0 * sender + 10.0 * receiver + i  # noqa: E731
    sent = rows[group.rank]
    received = [row[group.rank] for row in rows]
    x = torch.tensor([[label(group.rank, r, i)] for r in range(group.size) for i in range(sent[r])])
    x = x.view(-1, 1).double().requires_grad_()
    y = collectives.all_to_all(x, group, sent, received)
    expected = [[label(s, group.rank, i)] for s in range(group.size) for i in range(received[s])]
    assert torch.equal(y, torch.tensor(expected, dtype=torch.float64).view(-1, 1))
    (y.square().sum() / 2).backward()
    assert torch.equal(x.grad, x.detach())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_to_all(ranks):
    run_ranks(ranks, _all_to_all)


def _replicate_rows():
    group = _group()
    x = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    cotangents = _everyone(group, 6, 2)
    collectives.replicate_rows(x, ((1, 2), (4, 1)), group).backward(cotangents[group.rank])
    expected = cotangents[group.rank].clone()
    expected[[1, 2, 4]] = cotangents.sum(0)[[1, 2, 4]]
    assert_close(x.grad, expected, EXACT)


@pytest.mark.parametrize("ranks", [1, 2])
def test_replicate_rows(ranks):
    run_ranks(ranks, _replicate_rows)


def _second_derivatives():
    group = _group()
    x, halves = torch.randn(2, 2, requires_grad=True), [1, 1]
    for function in (
        collectives.replicate, collectives.reduce, collectives.all_reduce,
        lambda x, group: collectives.replicate_rows(x, ((0, 1),), group),
        lambda x, group: collectives.all_gather(x, group, 0),
        lambda x, group: collectives.reduce_scatter(x, group, 0),
        lambda x, group: collectives.all_to_all(x, group, halves, halves),
    ):  # fmt: skip
        (grad,) = torch.autograd.grad(function(x, group).pow(3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_second_derivatives_are_refused():
    run_ranks(2, _second_derivatives)


def _ledger():
    group = _group()
    with record_collectives() as ledger:
        collectives.all_gather(torch.zeros(3, 2, requires_grad=True), group, 0).sum().backward()
    assert ledger.calls == {("all_gather", "tp"): 1, ("reduce_scatter", "tp"): 1}
    assert ledger.bytes["all_gather", "tp"] == 24
    collectives.all_gather(torch.zeros(3, 2), group, 0)
    assert ledger.calls.total() == 2


def test_ledger():
    run_ranks(2, _ledger)


def test_ledgers_inside_one_another():
    with record_collectives() as outer:
        with record_collectives():
            pass
        enter("all_gather", Group("tp", (0, 1)), 1, 8)
    assert outer.calls.total() == 1


def test_uneven_scatter_is_refused():
    group = Group("tp", (0, 1))
    with pytest.raises(ValueError, match="must be divisible by the tp group's size"):
        collectives.reduce_scatter(torch.zeros(3, 2), group, 0)
