"""A small corpus and a small run, for tests."""

import random
from pathlib import Path

from mamba2_dist.config import AttentionConfig, HybridConfig, Mamba2Config, ParallelConfig
from mamba2_dist.train.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig

WORDS = [
    "state",
    "space",
    "model",
    "scan",
    "chunk",
    "rank",
    "head",
    "group",
    "token",
    "decay",
    "gate",
    "norm",
    "mix",
    "halo",
    "send",
    "ring",
]


def write_texts(folder: Path, files: int = 40) -> Path:
    """Text files of random sentences with some order to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(files):
        words = [WORDS[(number + i * draw.randint(1, 2)) % len(WORDS)] for i in range(draw.randint(5, 120))]
        (folder / f"{number:03d}.txt").write_text(" ".join(words) + ".\n")
    return folder


def small_run(
    folder: Path, *, tp: int = 1, cp: int = 1, dp: int | None = None, sharding="fsdp", **options
) -> TrainConfig:
    """A run of a few thousand parameters on that corpus, in `folder`."""
    texts = folder / "texts"
    if not texts.exists():
        write_texts(texts)
    settings = {
        "out": str(folder / "run"),
        "model": HybridConfig(
            pattern="M*-M",
            d_model=32,
            vocab_size=320,
            mamba=Mamba2Config(d_state=8, headdim=8, chunk_size=8),
            attention=AttentionConfig(head_dim=8, nheads_kv=2),
        ),
        "parallel": ParallelConfig(tp=tp, cp=cp, dp=dp, sharding=sharding),
        "data": DataConfig(source=str(texts), cache=str(folder / "cache"), seqlen=32, validation_fraction=0.2),
        "optimizer": OptimizerConfig(lr=1e-2, clip=0.5),
        "schedule": ScheduleConfig(warmup_steps=2),
        "steps": 6,
        "global_batch": 4,
        "save_every": 2,
        "validate_every": 3,
        "validation_windows": 5,
        "sample_tokens": 0,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **options})
