"""Processors that products leave to what travels beside them."""

import json
from dataclasses import replace

import pytest
import torch

from mamba2_dist import Mamba2Config, Mamba2Mixer, ParallelGroups, SegmentTable
from mamba2_dist.modules import linear
from mamba2_dist.parallel.cost_model import EXCHANGE_PROCESSORS, H200, SLOWER, exchange_time
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.processors import processors_left
from mamba2_dist.parallel.state_scan import processors

from ..distributed import run_ranks
from ..tolerances import RELATIVE, assert_close

STATE = 4 * 80 * 64 * 128


def _many(limit: int) -> Group:
    """1024 ranks on 128 nodes."""
    ranks = tuple(range(1024))
    return Group("states", ranks, node=Group("node", ranks[:8]), nodes=128, processors=limit)


def test_where_exchanges_want_processors_of_their_own():
    """Where three products that are slower cost less than one exchange that follows a product."""
    exchange_s = exchange_time("hierarchical", 1024, 128, 1, STATE, H200)
    worth = H200.matmul_flops * exchange_s / (3 * (SLOWER - 1))
    for backend in ("auto", "hierarchical"):
        assert processors(_many(EXCHANGE_PROCESSORS), backend, 1, STATE, 0.99 * worth) == EXCHANGE_PROCESSORS
        assert processors(_many(EXCHANGE_PROCESSORS), backend, 1, STATE, 1.01 * worth) == 0
        assert processors(_many(0), backend, 1, STATE, 0.99 * worth) == 0


def _asked_for(scan: str, recompute: str) -> list[tuple[int, str]]:
    groups = ParallelGroups(cp=2, node_size=1)
    assert groups.states.processors == 0  # these processes have no GPU
    groups.states = replace(groups.states, processors=3)
    mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, groups, state_scan=scan, recompute=recompute)
    asked, original = [], linear.processors_left
    linear.processors_left = lambda count, device: asked.append((count, device.type)) or original(count, device)
    try:
        y = mixer(torch.randn(1, 4, 16, requires_grad=True), SegmentTable.contiguous(8, 2))
        y.sum().backward()
    finally:
        linear.processors_left = original
    return asked


@pytest.mark.parametrize("recompute", ["none", "inner"])
def test_products_of_z_leave_them_in_both_passes(recompute):
    for asked in run_ranks(2, _asked_for, "auto", recompute):
        assert asked == [(3, "cpu")] * 2


def test_states_that_are_handed_on_have_nothing_beside_them():
    for asked in run_ranks(2, _asked_for, "serial_exact", "none"):
        assert asked == [(0, "cpu")] * 2


def _product(u, weight, left, path) -> tuple[torch.Tensor, int]:
    """u W^T, and how many processors its kernel runs on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with processors_left(left, u.device):
            y = u @ weight.T
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    kernels = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "kernel"]
    x, y_blocks, z = max(kernels, key=lambda kernel: kernel["dur"])["args"]["grid"]
    return y, x * y_blocks * z


@pytest.mark.gpu
def test_a_product_leaves_processors(tmp_path):
    """To others for as long as it runs; the next has all again."""
    u, weight = (torch.randn(rows, 2560, device="cuda", dtype=torch.bfloat16) for rows in (32768, 5120))
    u @ weight.T
    all_of_them = torch.cuda.get_device_properties("cuda").multi_processor_count
    before, used_before = _product(u, weight, 0, tmp_path / "before")
    left, used = _product(u, weight, EXCHANGE_PROCESSORS, tmp_path / "left")
    _, used_after = _product(u, weight, 0, tmp_path / "after")
    if used_before > all_of_them:
        pytest.skip("this cuBLAS gives up processors between tiles")
    assert used <= all_of_them - EXCHANGE_PROCESSORS < used_before == used_after
    assert_close(left, before, RELATIVE[torch.bfloat16])
