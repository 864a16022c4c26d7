"""What this machine has, and whether a model split over processes equals the whole one on it."""

import importlib.metadata
import platform
import sys
import textwrap
import time

import torch
import torch.distributed as dist

from mamba2_dist.config import AttentionConfig, HybridConfig, Mamba2Config, ParallelConfig
from mamba2_dist.launch import launch
from mamba2_dist.models.hybrid_model import HybridModel
from mamba2_dist.modules.base import named_records
from mamba2_dist.parallel.collectives import sum_over
from mamba2_dist.parallel.groups import Group, ParallelGroups
from mamba2_dist.parallel.ledger import record_collectives
from mamba2_dist.parallel.segments import SegmentTable
from mamba2_dist.train.runtime import process_group
from mamba2_dist.train.whole import Slice, slices

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


def doctor(*, ledger: bool = False) -> bool:
    """Print versions and devices, then check splits over two CPU processes; whether all is well.

    ledger: print what the first of them communicates, forward and backward, too.
    """
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
    well = launch(2, ["-m", "mamba2_dist.doctor", *["--ledger"] * ledger]) == 0
    print(f"{'all equal' if well else 'NOT EQUAL'} after {time.perf_counter() - started:.0f} s")
    return well


def _check_splits(ledger: bool) -> bool:
    """On each process: compare losses and gradients for tp = 2 and for cp = 2 with the whole model's."""
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
    expected = {piece.name: piece.tensor for piece in _gradients(whole, Group("data"))}
    well = True
    for split in (ParallelConfig(tp=2), ParallelConfig(cp=2)):
        groups = ParallelGroups(split.tp, split.cp, device_type="cpu")
        table = SegmentTable.zigzag(SEQLEN, groups.cp.size, documents=DOCUMENTS)
        model = HybridModel(config, groups, split, dtype=torch.float64)
        with record_collectives() as communicated:
            losses = model(table.shard(tokens, groups.cp.rank), table.shard(labels, groups.cp.rank), table)
            losses.sum().backward()
        errors = [_error(losses, table.shard(reference, groups.cp.rank))]
        for piece in _gradients(model, groups.data):
            box = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.tensor.shape, strict=True))
            errors.append(_error(piece.tensor, expected[piece.name][box]))
        # asked of each, as nan hides in a maximum
        well &= all(error <= BOUND for error in errors)
        if dist.get_rank() == 0:
            print(f"  tp {split.tp} cp {split.cp}: largest relative error {max(errors):.1e}", flush=True)
            if ledger:
                print(textwrap.indent(str(communicated), "    "), flush=True)
    return well


def _gradients(model: HybridModel, data: Group) -> list[Slice]:
    """The slices of every parameter's gradient, summed over the data group."""
    found: list[Slice] = []
    for name, record in named_records(model):
        grad = model.get_parameter(name).grad
        assert grad is not None, f"{name} has no gradient"
        found += slices(name, record, sum_over(grad, data))
    return found


def _error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result - reference).norm() / reference.norm().clamp(min=1e-6)).item()


if __name__ == "__main__":
    with process_group("cpu"):
        raise SystemExit(0 if _check_splits("--ledger" in sys.argv) else 1)
