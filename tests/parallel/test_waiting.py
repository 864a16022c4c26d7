"""Nothing inside a layer waits for a device to learn a number."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mamba2_dist import AttentionConfig, HybridConfig, HybridModel, Mamba2Config, ParallelConfig, SegmentTable

from ..distributed import run_ranks
from ..splits import groups_of

CONFIG = HybridConfig(
    pattern="M*M-", d_model=32, vocab_size=64, mamba=Mamba2Config(d_state=16, headdim=16, chunk_size=16),
    attention=AttentionConfig(head_dim=16),
)  # fmt: skip
DOCUMENTS = [[0, 5, 5, 41, 64], [0, 64]]
# what a device would have to answer
ANSWERED = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}


class _Asked(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


def _run(layout: str, scan: str):
    table = getattr(SegmentTable, layout)(64, 2, documents=DOCUMENTS, carried=[True, False])
    model = HybridModel(CONFIG, groups_of(1, 2), ParallelConfig(cp=2, state_scan=scan))
    x = torch.randn(2, 32, 32, requires_grad=True)
    with _Asked() as asked:
        for layer in model.backbone.blocks():
            sum(layer(x, None, table, layer.new_memory(2))).sum().backward()
    assert "mm" in asked.names
    assert not asked.names & ANSWERED


@pytest.mark.parametrize("scan", ["all_gather", "sliced", "log_step", "ring", "serial_exact"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_no_layer_waits(layout, scan):
    run_ranks(2, _run, layout, scan)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_no_layer_waits_for_a_gpu(layout):
    table = getattr(SegmentTable, layout)(64, 1, documents=DOCUMENTS, carried=[True, False])
    model = HybridModel(CONFIG, device="cuda")
    x = torch.randn(2, 64, 32, device="cuda", requires_grad=True)
    for mode in ("default", "error"):  # once to compile
        try:
            torch.cuda.set_sync_debug_mode(mode)
            for layer, memory in zip(model.backbone.blocks(), model.new_memory(2), strict=True):
                sum(layer(x, None, table, memory)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
