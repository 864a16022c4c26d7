"""The scan over ranks against the recurrence on one process: every backend, kind of decay and layout, and gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.cost_model import traffic
from mamba2_dist.parallel.exchange import exchange
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.ledger import Ledger
from mamba2_dist.parallel.segments import Segment
from mamba2_dist.parallel.state_scan import STATE_SCANS, check_state_scan, chosen, state_scan

from ..distributed import run_ranks
from ..loopback import loopback
from ..splits import groups_of, make_table
from ..tolerances import EXACT, assert_close

EXCHANGES = [backend for backend in STATE_SCANS if backend != "serial_exact"]
ON_CPU = [backend for backend in EXCHANGES if backend != "symmetric_memory"]
PLAYED = [backend for backend in EXCHANGES if backend != "auto"]  # "auto" stands for one of them
TWO_NODES = Group("states", (0, 1, 2, 3), node=Group("node", (0, 1)), rail=Group("rail", (0, 2)), nodes=2)
STATE = (2, 3, 4, 5)  # batch, nheads, headdim, d_state


def _elements(kind: str, segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = STATE if kind == "elementwise" else (*STATE[:2], 1, 1)
    decay = torch.rand(segments, *shape, dtype=torch.float64)
    if kind == "signed":
        decay = 2 * decay - 1
    starts = torch.rand(segments, 1, 1, 1, 1) > 0.2  # some segments start a document
    return torch.randn(segments, *STATE, dtype=torch.float64), decay * starts


def _recurrence(states: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
    """What enters each position of a chain."""
    entering, state = [], torch.zeros_like(states[0])
    for link in range(len(states)):
        entering.append(state)
        state = decays[link] * state + states[link]
    return torch.stack(entering)


def _positions(table: SegmentTable, rank: int) -> list[int]:
    """Of a rank's segments in the chain, in slot order."""
    return [table.position[segment] for segment in table.held[rank]]


def _scan(table: SegmentTable, kind: str, backend: str, node_size: int | None = None):
    group = groups_of(1, table.ranks, node_size=node_size).states
    states, decays = (t.requires_grad_() for t in _elements(kind, len(table.segments)))
    weights = torch.randn_like(states)
    expected = _recurrence(states, decays)
    (expected * weights).sum().backward()

    mine = _positions(table, group.rank)
    state, decay = (t.detach()[mine].requires_grad_() for t in (states, decays))
    result = state_scan(state, decay, table, group, backend)
    (result * weights[mine]).sum().backward()
    assert_close(result, expected[mine], EXACT, "entering states")
    assert_close(state.grad, states.grad[mine], EXACT, "state gradient")
    assert_close(decay.grad, decays.grad[mine], EXACT, "decay gradient")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("kind", ["scalar", "signed", "elementwise"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_decay_and_layout(ranks, layout, kind, backend):
    run_ranks(ranks, _scan, make_table(layout, 24, ranks, [[0, 24]]), kind, backend)


@pytest.mark.parametrize("node_size", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
def test_nodes(layout, node_size):
    run_ranks(4, _scan, make_table(layout, 24, 4, [[0, 24]]), "scalar", "hierarchical", node_size)


def _uneven_nodes():
    with pytest.raises(ValueError, match=r"as many ranks of states \(4\) on each of its nodes \(2\)"):
        _scan(SegmentTable.contiguous(8, 4), "scalar", "hierarchical", 3)


def test_uneven_nodes_are_refused():
    run_ranks(4, _uneven_nodes)


# a failure ends the ranks, so looking for a smaller one would take minutes
@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.permutations([0, 0, 1, 1, 2]), st.sampled_from(ON_CPU))
@example([1, 1, 0, 2, 0], "ring")
@example([0, 1, 1, 0, 1], "sliced")
@example([0, 1, 1, 0, 1], "hierarchical")
def test_segments_in_any_order(owners, backend):
    slots = [owners[:i].count(owner) for i, owner in enumerate(owners)]
    segments = [Segment(i, i + 1, owner, slot) for i, (owner, slot) in enumerate(zip(owners, slots, strict=True))]
    run_ranks(3, _scan, SegmentTable(segments, ranks=3), "scalar", backend)


def _play(table: SegmentTable, backend: str, node_size: int, reverse: bool):
    states, decays = (t[:, :1, :1, :1, :3] for t in _elements("scalar", len(table.segments)))
    order = torch.arange(len(states)).flip(0) if reverse else torch.arange(len(states))
    expected = torch.empty_like(states)
    expected[order] = _recurrence(states[order], decays[order])
    positions = [_positions(table, rank) for rank in range(table.ranks)]
    exchanges = [
        exchange(states[mine], decays[mine], table, rank, backend, node_size=node_size, reverse=reverse)
        for rank, mine in enumerate(positions)
    ]
    for mine, result in zip(positions, loopback(exchanges, node_size), strict=True):
        assert_close(result, expected[mine], EXACT, "entering states")


@pytest.mark.parametrize("backend", PLAYED)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("ranks", "node_size"), [(7, 7), (64, 8), (96, 8), (64, 1)])
def test_many_ranks_in_one_process(ranks, node_size, layout, reverse, backend):
    _play(getattr(SegmentTable, layout)(2 * ranks, ranks), backend, node_size, reverse)


# with symmetric memory the steps are those of slices
@pytest.mark.parametrize("backend", [backend for backend in PLAYED if backend != "symmetric_memory"])
@pytest.mark.parametrize(("layout", "reverse"), [("contiguous", True), ("zigzag", False)])
def test_4096_ranks(layout, reverse, backend):
    _play(getattr(SegmentTable, layout)(8192, 4096), backend, 8, reverse)


class _Written(TorchDispatchMode):
    """Counts the numbers that operators write."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += sum(tensor.numel() for tensor in tree_leaves(result))
        return result


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_all_gather_writes_few_times_what_it_gathers(layout):
    table = getattr(SegmentTable, layout)(128, 64)
    states, decays = _elements("scalar", len(table.segments))
    last = table.segments[-1].rank
    work = exchange(states[: table.slots_per_rank], decays[: table.slots_per_rank], table, last, "all_gather")
    everyone = torch.stack([next(work).tensor] * table.ranks)
    with _Written() as written, pytest.raises(StopIteration):
        work.send(everyone)
    assert written.count <= 3 * states.numel()


def _float32():
    table = SegmentTable.contiguous(8, 2)
    state = torch.ones(1, 1, 1, 2, 2)
    result = state_scan(state, torch.ones(1, 1, 1, 1, 1), table, groups_of(1, 2).states, "ring")
    assert result.dtype == torch.float32


def test_states_stay_float32():
    run_ranks(2, _float32)


def _no_peers_memory():
    with pytest.raises(ValueError, match="'symmetric_memory' needs all ranks on GPUs of one node, got cpu"):
        _scan(SegmentTable.contiguous(8, 2), "scalar", "symmetric_memory")


def test_memory_of_no_gpu_is_refused():
    run_ranks(2, _no_peers_memory)


def test_memory_of_other_nodes_is_refused():
    with pytest.raises(ValueError, match=r"needs all ranks of states \(4\) on one node, got 2 nodes; choose 'sliced'"):
        check_state_scan("symmetric_memory", TWO_NODES)


@pytest.mark.parametrize("backend", EXCHANGES)
def test_one_rank_needs_no_other(backend):
    run_ranks(1, _scan, SegmentTable.zigzag(8, 1), "scalar", backend)


def test_unknown_backend_is_refused():
    table = SegmentTable.contiguous(4, 1)
    with pytest.raises(ValueError, match="state_scan must be one of"):
        state_scan(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), table, groups_of(1, 1).states, "gossip")


@pytest.mark.parametrize(
    ("state", "decay", "message"),
    [
        (torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), r"with this rank's 1 segments, got shape \(2, 1, 1\)"),
        (torch.zeros(1, 1), torch.zeros(1, 1), r"state must be \(segments, batch, nheads, ...\)"),
        (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).double(), "decay must have the dtype of state"),
        (torch.zeros(1, 1, 4), torch.zeros(1, 1, 2), r"of size 1 where it is shared, got shape \(1, 1, 2\)"),
        (torch.zeros(1, 1, 4), torch.zeros(1, 1), "decay must have the axes of state"),
    ],
)
def test_elements_that_do_not_fit_are_refused(state, decay, message):
    with pytest.raises(ValueError, match=message):
        state_scan(state, decay, SegmentTable.contiguous(4, 1), groups_of(1, 1).states, "ring")


def test_serial_states_are_no_exchange():
    table = SegmentTable.contiguous(4, 1)
    with pytest.raises(ValueError, match="'serial_exact' cannot exchange given states"):
        state_scan(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), table, groups_of(1, 1).states, "serial_exact")


@pytest.mark.parametrize("group", [TWO_NODES, replace(TWO_NODES, node=None)], ids=["even", "uneven"])
def test_what_auto_chose_is_logged_once_a_group(caplog, group):
    caplog.set_level("INFO", logger="mamba2_dist")
    for same in (replace(group), replace(group, rank=1), replace(group)):
        backends = {chosen(same, 1, 2_500_000) for _ in range(2)}
    said = f"state_scan auto: {backends.pop()}, of 1 states a rank of 2.500 MB, for 4 ranks on 2 nodes of H200"
    assert caplog.messages == [said] * 2
    assert not backends


@pytest.mark.parametrize("backend", PLAYED)
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(("ranks", "node_size"), [(6, 6), (16, 4), (48, 8)])
def test_ledger_equals_the_formula(ranks, node_size, segments, backend):
    """What the busiest of more ranks than processes starts and receives."""
    if backend == "symmetric_memory" and node_size < ranks:
        pytest.skip("its ranks share a node")
    table = getattr(SegmentTable, ["contiguous", "zigzag"][segments - 1])(2 * ranks, ranks)
    states = torch.randn(len(table.segments), 1, 3, 4, 12, dtype=torch.float64)
    decays = torch.rand(len(states), 1, 3, 1, 1, dtype=torch.float64)
    exchanges = [
        exchange(states[mine], decays[mine], table, rank, backend, node_size=node_size)
        for rank, mine in enumerate(_positions(table, rank) for rank in range(ranks))
    ]
    ledgers = [Ledger() for _ in range(ranks)]
    loopback(exchanges, node_size, ledgers)
    expected = traffic(backend, ranks, ranks // node_size, segments, 3 * 48 * 8, 0 if backend == "ring" else 3 * 8)
    actual = tuple(max(getattr(ledger, name).total() for ledger in ledgers) for name in ("calls", "messages", "bytes"))
    assert actual == (expected.launches, expected.messages, expected.bytes)
