"""A mixer over two GPUs against one: side streams, NCCL and shared memory, of which gloo knows nothing."""

import pytest
import torch

from mamba2_dist import Mamba2Config, Mamba2Mixer, ParallelGroups, SegmentTable
from mamba2_dist.parallel.cost_model import EXCHANGE_PROCESSORS

from ..distributed import run_ranks
from ..splits import SCANS, assert_same_gradients, groups_of
from ..tolerances import MODEL, assert_close

DOCUMENTS = [[0, 5, 5, 300, 1024], [0, 1024]]


def _against_one(layout: str, scan: str) -> None:
    """More than once, in buffers that take turns, and without a pause between layers that share them."""
    # each GPU as a node, or states would travel as slices
    groups = groups_of(1, 2, node_size=1 if scan == "hierarchical" else None)
    if scan == "hierarchical":
        for group in (groups.states, groups.states.rail):
            config = group.handle._get_backend(torch.device("cuda")).options.config
            assert (config.max_ctas, config.cga_cluster_size) == (EXCHANGE_PROCESSORS, 1)
    rank = torch.distributed.get_rank()
    table = getattr(SegmentTable, layout)(1024, 2, documents=DOCUMENTS)
    alone = SegmentTable.contiguous(1024, 1, documents=DOCUMENTS)
    whole, cut = (
        [Mamba2Mixer(Mamba2Config(), 128, split, state_scan=scan, device="cuda") for _ in range(3)]
        for split in (ParallelGroups.alone(), groups)
    )
    for _ in range(2):
        u, dy = torch.randn(2, 2, 1024, 128).cuda()
        results = []
        for layers, cuts, place in ((whole, alone, 0), (cut, table, rank)):
            leaf = cuts.shard(u, place).requires_grad_()
            y = leaf
            for layer in layers:
                y = layer(y, cuts)
            y.backward(cuts.shard(dy, place))
            results.append((y.detach(), leaf.grad))
        for name, expected, actual in zip(("y", "du"), *results, strict=True):
            assert_close(actual, table.shard(expected, rank), MODEL[torch.float32], name)
    for one, other in zip(cut, whole, strict=True):
        assert_same_gradients(one, other, groups, MODEL[torch.float32])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scan", [*SCANS, "symmetric_memory"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_mixer_over_gpus(layout, scan):
    run_ranks(2, _against_one, layout, scan, device="cuda")
