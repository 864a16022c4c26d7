"""What is made again equals what was not kept, and costs no collective."""

import importlib
import shutil
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mamba2_dist import HybridConfig, HybridModel, Mamba2Config, Mamba2Mixer, SegmentTable
from mamba2_dist.modules.recompute import Forgetful
from mamba2_dist.parallel.ledger import record_collectives

from ..distributed import run_ranks
from ..splits import SCANS, groups_of, make_table
from ..tolerances import RELATIVE, assert_close


def _outcome(groups, table, ngroups, scan, recompute):
    config = Mamba2Config(d_state=6, headdim=4, ngroups=ngroups, chunk_size=5)
    mixer = Mamba2Mixer(config, 16, groups, state_scan=scan, recompute=recompute, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2, table.seqlen, 16, dtype=torch.float64, generator=generator)
    u = table.shard(u, groups.cp.rank).requires_grad_()
    dy = torch.randn(u.shape, dtype=torch.float64, generator=generator)
    with record_collectives() as ledger:
        y = mixer(u, table)
        leaves = [u, *mixer.parameters()]
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, dy)
    return [y.detach(), *first, *again], dict(ledger.calls)


def _compare(tp, cp, ngroups, layout, scan):
    groups = groups_of(tp, cp)
    table = make_table(layout, 21, cp, [[0, 1, 11, 21], [0, 21]])
    expected, calls = _outcome(groups, table, ngroups, scan, "none")
    for recompute in ("conv", "inner"):
        results, others = _outcome(groups, table, ngroups, scan, recompute)
        assert others == calls
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize(
    ("tp", "cp", "ngroups", "layout"),
    [(1, 1, 1, "contiguous"), (1, 2, 1, "zigzag"), (2, 1, 1, "contiguous"), (2, 2, 2, "contiguous"),
     (1, 4, 1, "uneven")],
)  # fmt: skip
@pytest.mark.parametrize("scan", SCANS)
def test_the_same_numbers_and_collectives(tp, cp, ngroups, layout, scan):
    run_ranks(tp * cp, _compare, tp, cp, ngroups, layout, scan)


def test_what_was_overwritten_is_made_again(monkeypatch):
    """The norm's kernel writes its gradient over what was made for it; a frozen product does not read the norm."""
    norms = importlib.import_module("mamba2_dist.kernels.norm.gated_rmsnorm")
    monkeypatch.setattr(norms, "takes_triton", lambda *_: True)
    mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, recompute="inner")
    mixer.out_proj.weight.requires_grad_(False)
    u = torch.randn(2, 9, 16, requires_grad=True)
    y = mixer(u)
    first, second = (torch.autograd.grad(y.sum(), u, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("recompute", ["none", "conv", "inner"])
def test_backward_frees_what_was_saved(recompute):
    mixer, kept = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, recompute=recompute), []
    mixer.conv1d.register_forward_pre_hook(lambda _, inputs: kept.append(weakref.ref(inputs[0])))
    y = mixer(torch.randn(2, 9, 16, requires_grad=True))
    loss = y.sum()
    del y
    loss.backward()
    assert kept[0]() is None


@pytest.mark.usefixtures("_no_garbage_collection")
@pytest.mark.parametrize("recompute", ["none", "conv", "inner"])
def test_without_backward_it_is_freed_too(recompute):
    mixer, kept = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, recompute=recompute), []
    mixer.conv1d.register_forward_pre_hook(lambda _, inputs: kept.append(weakref.ref(inputs[0])))
    mixer(torch.randn(1, 8, 16, requires_grad=True), SegmentTable.zigzag(8, 1))
    assert kept[0]() is None


@pytest.mark.parametrize("recompute", ["none", "conv", "inner"])
def test_a_weight_changed_before_backward_is_noticed(recompute):
    mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, recompute=recompute)
    for parameter in (mixer.out_proj.weight, mixer.conv1d.weight):
        loss = mixer(torch.randn(2, 9, 16, requires_grad=True)).sum()
        with torch.no_grad():
            parameter.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_other_hooks_are_not_ignored():
    plain, recomputing = (
        Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, recompute=recompute) for recompute in ("none", "conv")
    )
    u = torch.randn(2, 9, 16, requires_grad=True)
    checkpoint(plain, u, use_reentrant=False).sum().backward()
    assert u.grad is not None
    with pytest.raises(ValueError, match="recompute must be 'none'"):
        checkpoint(recomputing, u, use_reentrant=False)


def test_what_is_forgotten_is_freed():
    made, a = [], torch.randn(50, requires_grad=True)
    with Forgetful() as saved:
        b = a.sin()
        saved.forget([b], lambda: made.append(1) or [a.sin()])
        c = b[:25].exp() * b[25:]
        last = weakref.ref(b)
    expected = torch.autograd.grad((a.sin()[:25].exp() * a.sin()[25:]).sum(), a)[0]
    del b
    assert last() is None
    assert torch.equal(torch.autograd.grad(c.sum(), a)[0], expected)
    assert len(made) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_the_same():
    config = HybridConfig(pattern="-", d_model=16, vocab_size=40)
    tokens, labels = torch.randint(0, 40, (2, 2, 9))
    labels[0, 3] = -100
    results = []
    for compiled in (False, True):
        model = HybridModel(config, compiled=compiled)
        losses = model(tokens, labels)
        losses.sum().backward()
        results.append([losses, *(parameter.grad for parameter in model.parameters())])
    for result, reference in zip(*results, strict=True):
        assert_close(result, reference, RELATIVE[torch.float32])
