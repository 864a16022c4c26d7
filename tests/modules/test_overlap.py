"""What a mixer computes while its states travel."""

import pytest
import torch

from mamba2_dist import Mamba2Config, Mamba2Mixer, SegmentTable
from mamba2_dist.modules import linear
from mamba2_dist.parallel import state_scan

from ..calls import noted_calls
from ..distributed import run_ranks
from ..splits import groups_of

STATES = (state_scan, "begin"), (state_scan.Pending, "wait")
# in_proj is two products: of x, B, C and dt, then of z
Z, OTHERS = linear._FirstRows, linear._LastRows


def _order(recompute):
    mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, groups_of(1, 2), recompute=recompute)
    u = torch.randn(1, 4, 16, requires_grad=True)
    with noted_calls(*STATES, (Z, "forward"), (OTHERS, "forward")) as forward:
        y = mixer(u, SegmentTable.contiguous(8, 2))
    with noted_calls(*STATES, (Z, "backward"), (OTHERS, "backward")) as backward:
        y.sum().backward()
    return forward, backward


@pytest.mark.parametrize("recompute", ["none", "conv", "inner"])
def test_z_is_computed_while_states_travel(recompute):
    """And while their gradients do, those of z, of its weights, and what z adds to the gradient of u."""
    for forward, backward in run_ranks(2, _order, recompute):
        assert forward == ["_LastRows.forward", "state_scan.begin", "_FirstRows.forward", "Pending.wait"]
        assert backward == ["state_scan.begin", "_FirstRows.backward", "Pending.wait", "_LastRows.backward"]
