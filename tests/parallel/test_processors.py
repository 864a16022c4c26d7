"""Processors that products leave to what travels beside them."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mamba2_dist import Mamba2Config, Mamba2Mixer, ParallelGroups, SegmentTable
from mamba2_dist.modules import init, linear
from mamba2_dist.modules.linear import ColumnParallelLinear
from mamba2_dist.parallel import state_scan
from mamba2_dist.parallel.cost_model import EXCHANGE_PROCESSORS, H200, SLOWER, exchange_time
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import replicated

from ..distributed import run_ranks
from ..tolerances import RELATIVE, assert_close

STATE = 4 * 80 * 64 * 128


def _many(limit: int) -> Group:
    """1024 ranks on 128 nodes."""
    ranks = tuple(range(1024))
    return Group("states", ranks, node=Group("node", ranks[:8]), nodes=128, max_processors=limit)


@pytest.mark.parametrize("backend", ["auto", "hierarchical"])
@pytest.mark.parametrize(("limit", "share", "wanted"), [(4, 0.99, 4), (4, 1.01, 0), (0, 0.99, 0)])
def test_where_exchanges_want_processors(backend, limit, share, wanted):
    """Where three products that are slower cost less than one exchange that follows a product."""
    exchange_s = exchange_time("hierarchical", 1024, 128, 1, STATE, H200)
    flops = share * H200.matmul_flops * exchange_s / (3 * (SLOWER - 1))
    assert state_scan.processors_wanted(_many(limit), backend, 1, STATE, flops) == wanted


def _asked_for(scan: str, layout: str, recompute: str) -> tuple[list, list]:
    """What is asked of the model by a mixer of 24 channels in two heads, and what its products leave."""
    groups = ParallelGroups(tp=2, cp=2, node_size=2)
    assert groups.states.max_processors == 0  # these processes have no GPU
    groups.states = replace(groups.states, max_processors=3)
    mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=12), 12, groups, state_scan=scan, recompute=recompute)
    asked, left, wanted, original = [], [], state_scan.processors_wanted, linear.processors_left
    state_scan.processors_wanted = lambda group, *rest: asked.append(rest) or wanted(group, *rest)
    linear.processors_left = lambda count, device: left.append(count) or original(count, device)
    try:
        y = mixer(torch.randn(5, 4, 12, requires_grad=True), getattr(SegmentTable, layout)(8, 2, batch=5))
        y.sum().backward()
    finally:
        state_scan.processors_wanted, linear.processors_left = wanted, original
    return asked, left


@pytest.mark.parametrize(("layout", "segments"), [("contiguous", 1), ("zigzag", 2)])
@pytest.mark.parametrize("recompute", ["none", "inner"])
def test_products_of_z_leave_them_in_both_passes(layout, segments, recompute):
    """Of a rank's share of tokens and heads."""
    for asked, left in run_ranks(4, _asked_for, "log_step", layout, recompute):
        assert asked == [("log_step", segments, 4 * 5 * 12 * 6, 2 * 5 * 4 * 12 * 12)]
        assert left == [3, 3]


def test_states_that_are_handed_on_have_nothing_beside_them():
    for asked, left in run_ranks(4, _asked_for, "serial_exact", "contiguous", "none"):
        assert (asked, left) == ([], [0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["weights bf16", "weights fp32"])
def test_three_products_leave_processors(dtype, tmp_path):
    """Those of the channels computed second, of the gradient too; the others have all processors."""
    alone = ParallelGroups.alone().tp
    layer = ColumnParallelLinear(
        2560, replicated(10240, 1), alone, init.projection(2560), shared_by=alone, device="cuda", dtype=dtype
    )
    u, dy = (torch.randn(1, 32768, size, device="cuda", dtype=torch.bfloat16) for size in (2560, 5120))

    def step(left: int) -> list[torch.Tensor]:
        layer.weight.grad = None
        leaf = u.detach().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            last, first = layer.in_two(leaf, 5120)
            z = first(left)
        torch.autograd.backward([z, last], [dy, dy])
        return [z.detach(), leaf.grad, layer.weight.grad]

    with torch.no_grad():
        layer.weight.normal_()
    expected = step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results = step(EXCHANGE_PROCESSORS)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace"))
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    products = [event for event in events if event.get("cat") == "kernel" and event["dur"] > 500]
    used = [math.prod(event["args"]["grid"]) for event in sorted(products, key=lambda event: event["ts"])]
    count = torch.cuda.get_device_properties("cuda").multi_processor_count
    if used[0] > count:
        pytest.skip("here products give up processors before they end")
    # forward of both, backward of the second and of the first: of u and of the weight
    assert [blocks <= count - EXCHANGE_PROCESSORS for blocks in used] == [False, True, True, True, False, False], used
    for result, reference in zip(results, expected, strict=True):
        assert_close(result, reference, RELATIVE[torch.bfloat16])
