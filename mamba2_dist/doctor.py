"""What this machine has, and whether a model split over processes equals the whole one on it."""

import importlib.metadata
import platform
import time

import torch
import torch.distributed as dist

from mamba2_dist.config import AttentionConfig, HybridConfig, Mamba2Config, ParallelConfig
from mamba2_dist.launch import launch
from mamba2_dist.models.hybrid_model import HybridModel
from mamba2_dist.modules.base import named_records
from mamba2_dist.parallel.collectives import sum_over
from mamba2_dist.parallel.groups import ParallelGroups
from mamba2_dist.parallel.segments import SegmentTable
from mamba2_dist.train.runtime import process_group
from mamba2_dist.train.whole import slices

PACKAGES = (
    "triton",
    "numpy",
    "tokenizers",
    "jsonargparse",
    "tensorboard",
    "megatron-core",
    "deepspeed",
    "transformers",
)
BOUND = 1e-9
SEQLEN, DOCUMENTS = 24, [[0, 5, 24], [0, 24]]


def doctor() -> bool:
    """Print versions and devices, then check every two-process split; whether all is well."""
    print(f"python {platform.python_version()}, torch {torch.__version__}")
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} not installed")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print(f"no CUDA device; {torch.get_num_threads()} CPU threads")
    print("checking that split models equal the whole one (float64, two processes):", flush=True)
    started = time.perf_counter()
    well = launch(2, ["-m", "mamba2_dist.doctor"]) == 0
    print(f"{'all equal' if well else 'NOT EQUAL'} after {time.perf_counter() - started:.0f} s")
    return well


def _check_splits() -> bool:
    """On each process: the largest relative error of losses and gradients for tp = 2 and cp = 2."""
    config = HybridConfig(
        pattern="M*-M",
        d_model=32,
        vocab_size=64,
        mamba=Mamba2Config(d_state=8, headdim=8, chunk_size=8),
        attention=AttentionConfig(head_dim=8, nheads_kv=2),
    )
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 64, (len(DOCUMENTS), SEQLEN), generator=generator) for _ in range(2))
    whole = HybridModel(config, ParallelGroups.alone(), dtype=torch.float64)
    reference = whole(tokens, labels, SegmentTable.contiguous(SEQLEN, 1, documents=DOCUMENTS))
    reference.sum().backward()
    expected = _gradients(whole)
    well = True
    for sizes in ({"tp": 2}, {"cp": 2}):
        groups = ParallelGroups(**sizes, device_type="cpu")
        table = SegmentTable.zigzag(SEQLEN, groups.cp.size, documents=DOCUMENTS)
        model = HybridModel(config, groups, ParallelConfig(**sizes), dtype=torch.float64)
        losses = model(table.shard(tokens, groups.cp.rank), table.shard(labels, groups.cp.rank), table)
        losses.sum().backward()
        error = _error(losses, table.shard(reference, groups.cp.rank))
        for parameter in model.parameters():
            parameter.grad = sum_over(parameter.grad, groups.data)
        for name, record in named_records(model):
            for piece in slices(name, record, model.get_parameter(name).grad):
                box = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.tensor.shape, strict=True))
                error = max(error, _error(piece.tensor, expected[piece.name][box]))
        # nan is not below the bound either
        well &= error <= BOUND
        if dist.get_rank() == 0:
            (split,) = sizes
            print(f"  {split} 2: largest relative error {error:.1e}", flush=True)
    return well


def _gradients(model: HybridModel) -> dict[str, torch.Tensor]:
    pieces = (
        piece for name, record in named_records(model) for piece in slices(name, record, model.get_parameter(name).grad)
    )
    return {piece.name: piece.tensor for piece in pieces}


def _error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result - reference).norm() / reference.norm().clamp(min=1e-6)).item()


if __name__ == "__main__":
    with process_group("cpu"):
        raise SystemExit(0 if _check_splits() else 1)
