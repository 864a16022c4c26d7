"""What a mixer computes while its halo and its states travel."""

import pytest
import torch
from mamba2_dist.kernels.conv1d import ConvSpan

from mamba2_dist import Mamba2Config, Mamba2Mixer, SegmentTable
from mamba2_dist.modules import linear
from mamba2_dist.parallel import collectives, halo, state_scan

from ..calls import noted_calls
from ..distributed import run_ranks
from ..splits import groups_of

STATES = (state_scan, "begin"), (state_scan.Pending, "wait")
# in_proj is two products: of x, B, C and dt, then of z
PRODUCTS = linear._LastRows, linear._FirstRows
HALO = (halo, "begin_rows"), (collectives.Arriving, "wait")
STEPS = [(ConvSpan, name) for name in ("outputs", "enter", "initial_gradient", "gradients")]


def _order(recompute, forward_functions, backward_functions):
    mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, groups_of(1, 2), recompute=recompute)
    u = torch.randn(1, 4, 16, requires_grad=True)
    with noted_calls(*forward_functions) as forward:
        y = mixer(u, SegmentTable.contiguous(8, 2))
    with noted_calls(*backward_functions) as backward:
        y.sum().backward()
    return forward, backward


def _order_of_states(recompute):
    return _order(
        recompute, *([*STATES, *((product, name) for product in PRODUCTS)] for name in ("forward", "backward"))
    )


def _order_of_halo():
    return _order("none", [*HALO, *STEPS], [*HALO, *STEPS])


@pytest.mark.parametrize("recompute", ["none", "conv", "inner"])
def test_z_is_computed_while_states_travel(recompute):
    """And while their gradients do, those of z, of its weights, and what z adds to the gradient of u."""
    for forward, backward in run_ranks(2, _order_of_states, recompute):
        assert forward == ["_LastRows.forward", "state_scan.begin", "_FirstRows.forward", "Pending.wait"]
        assert backward == ["state_scan.begin", "_FirstRows.backward", "Pending.wait", "_LastRows.backward"]


def test_the_halo_travels_while_the_rest_is_convolved():
    """And so does its gradient; the first rank receives nothing, and has nothing to make again."""
    for (forward, backward), enters in zip(run_ranks(2, _order_of_halo), ([], ["ConvSpan.enter"]), strict=True):
        assert forward == ["halo.begin_rows", "ConvSpan.outputs", "Arriving.wait", *enters]
        assert backward == ["ConvSpan.initial_gradient", "halo.begin_rows", "ConvSpan.gradients", "Arriving.wait"]
