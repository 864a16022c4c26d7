"""The scan over ranks against the recurrence on one process, for every kind of decay, and its gradients."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.state_scan import state_scan

from ..distributed import run_ranks
from ..splits import groups_of, make_table
from ..tolerances import EXACT, assert_close

STATE = (2, 3, 4, 5)  # batch, nheads, headdim, d_state


def _decays(kind: str, segments: int) -> torch.Tensor:
    shape = STATE if kind == "elementwise" else (*STATE[:2], 1, 1)
    decay = torch.rand(segments, *shape, dtype=torch.float64)
    if kind == "signed":
        decay = 2 * decay - 1
    return decay * (torch.rand(segments, 1, 1, 1, 1) > 0.2)  # some segments start a document


def _scan(table: SegmentTable, kind: str, backend: str):
    group = groups_of(1, table.ranks).cp
    order = [[link for link, owner in enumerate(table.chain) if owner[0] == rank] for rank in range(table.ranks)]
    order = [sorted(links, key=lambda link: table.chain[link][1]) for links in order]
    states = torch.randn(len(table.chain), *STATE, dtype=torch.float64, requires_grad=True)
    decays = _decays(kind, len(table.chain)).requires_grad_()
    weights = torch.randn_like(states)

    entering, state = [], torch.zeros(STATE, dtype=torch.float64)
    for link in range(len(table.chain)):
        entering.append(state)
        state = decays[link] * state + states[link]
    expected = torch.stack(entering)
    (expected * weights).sum().backward()

    mine = order[group.rank]
    state, decay = (t.detach()[mine].requires_grad_() for t in (states, decays))
    result = state_scan(state, decay, table, group, backend)
    (result * weights[mine]).sum().backward()
    assert_close(result, expected[mine], EXACT, "entering states")
    assert_close(state.grad, states.grad[mine], EXACT, "state gradient")
    assert_close(decay.grad, decays.grad[mine], EXACT, "decay gradient")


@pytest.mark.parametrize("backend", ["all_gather", "ring"])
@pytest.mark.parametrize("kind", ["scalar", "signed", "elementwise"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_decay_and_layout(ranks, layout, kind, backend):
    run_ranks(ranks, _scan, make_table(layout, 24, ranks, [[0, 24]]), kind, backend)


# a failure ends the ranks, so looking for a smaller one would take minutes
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.permutations([0, 0, 1, 1, 2]), st.sampled_from(["all_gather", "ring"]))
def test_segments_in_any_order(owners, backend):
    from mamba2_dist.parallel.segments import Segment

    slots = [owners[:i].count(owner) for i, owner in enumerate(owners)]
    segments = [Segment(i, i + 1, owner, slot) for i, (owner, slot) in enumerate(zip(owners, slots, strict=True))]
    run_ranks(3, _scan, SegmentTable(segments, ranks=3), "scalar", backend)


def _float32():
    table = SegmentTable.contiguous(8, 2)
    state = torch.ones(1, 1, 1, 2, 2)
    result = state_scan(state, torch.ones(1, 1, 1, 1, 1), table, groups_of(1, 2).cp, "ring")
    assert result.dtype == torch.float32


def test_states_stay_float32():
    run_ranks(2, _float32)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        state_scan(torch.zeros(1), torch.zeros(1), SegmentTable.contiguous(4, 1), groups_of(1, 1).cp, "gossip")
