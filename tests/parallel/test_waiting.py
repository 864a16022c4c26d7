"""Nothing inside a layer waits for a device to learn a number."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mamba2_dist import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Mamba2Config,
    ParallelConfig,
    ParallelGroups,
    SegmentTable,
)

from ..distributed import run_ranks
from ..splits import SCANS, groups_of

CONFIG = HybridConfig(
    pattern="M*M-", d_model=32, vocab_size=64, mamba=Mamba2Config(d_state=16, headdim=16, chunk_size=16),
    attention=AttentionConfig(head_dim=16),
)  # fmt: skip
DOCUMENTS = [[0, 5, 5, 41, 64], [0, 64]]


def _pass(model: HybridModel, layout: str, ranks: int, device: str) -> None:
    """Every layer forward and back, for a batch that it has not seen before."""
    table = getattr(SegmentTable, layout)(64, ranks, documents=DOCUMENTS, carried=[True, False])
    x = torch.randn(2, 64 // ranks, 32, device=device, requires_grad=True)
    for layer, memory in zip(model.backbone.blocks(), model.new_memory(2), strict=True):
        sum(layer(x, None, table, memory)).sum().backward()


@pytest.fixture
def without_numbers(monkeypatch):
    """Tensors on the device "meta", which has none to give, and ranks that send nothing."""
    # that device knows no autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    def start(ranks: int, rank: int) -> None:
        dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("rank", [0, 2])
def test_no_layer_needs_a_number(rank, layout, scan, without_numbers):
    without_numbers(4, rank)
    groups = ParallelGroups(cp=4, device_type="cpu", node_size=2)
    _pass(HybridModel(CONFIG, groups, ParallelConfig(cp=4, state_scan=scan), device="meta"), layout, 4, "meta")


WAITS = {
    "item": lambda t: t.sum().item(),
    "tolist": lambda t: t.tolist(),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: bool(t.any()),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "numpy": lambda t: t.numpy(),
    "nonzero": lambda t: t.nonzero(),
    "where": lambda t: torch.where(t > 0),
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: t.masked_select(t > 0),
    "equal": lambda t: torch.equal(t, t + 1),
    "unique": lambda t: t.unique(),
    "unique_consecutive": lambda t: t.unique_consecutive(),
    "repeat_interleave": lambda t: t.repeat_interleave(t),
    "bincount": lambda t: t.bincount(),
    "split": lambda t: torch.tensor_split(t, t),
    "slice": lambda t: t[: t[0]],
    "iteration": lambda t: list(range(t[0])),
    "copy": lambda t: torch.empty(4, dtype=torch.int64).copy_(t),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_is_seen(wait):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match=r"meta|Meta|data"):
        WAITS[wait](torch.empty(4, dtype=torch.int64, device="meta"))


def _pass_without_waiting(model: HybridModel, layout: str, ranks: int) -> None:
    try:
        for mode in ("default", "error"):  # once to compile, and to meet
            torch.cuda.set_sync_debug_mode(mode)
            _pass(model, layout, ranks, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_no_layer_waits_for_a_gpu(layout):
    _pass_without_waiting(HybridModel(CONFIG, device="cuda"), layout, 1)


def _cut_over_gpus(layout: str, scan: str) -> None:
    model = HybridModel(CONFIG, groups_of(1, 2), ParallelConfig(cp=2, state_scan=scan), device="cuda")
    _pass_without_waiting(model, layout, 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scan", ["all_gather", "sliced", "log_step", "ring", "symmetric_memory", "serial_exact"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_no_layer_waits_for_gpus(layout, scan):
    run_ranks(2, _cut_over_gpus, layout, scan, device="cuda")
