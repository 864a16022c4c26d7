"""Which tiles, warps and stages each kernel runs with: a table, the same on every rank, chosen without timing.

Measured on an H100 for headdim 64 and d_state 128 in bfloat16 (docs/kernels.md). The other rows are right and fit, as
tests/kernels/test_compile.py asserts for each architecture; nobody has made them fast.
"""

from dataclasses import dataclass

import torch

MAX_HEADDIM, MAX_D_STATE = 128, 256


@dataclass(frozen=True)
class Launch:
    """Warps of a program, stages of its software pipeline, and the most registers of a thread, if limited."""

    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Config:
    """Tile sizes, in tokens, channels and state dimensions.

    scan_chunk: tokens of a chunk in the forward pass; chunk: in the backward pass; block: source tokens of a program
    there, chunk or chunk / 2; P and N: tile of a state, P_tiles and sweep_N: how many channel tiles a head has and the
    state dimensions of a tile in the sweeps, all of them in half precision, as their states are scaled whole.
    """

    scan_chunk: int
    chunk: int
    block: int
    P: int
    P_tiles: int
    N: int
    sweep_N: int
    scan: Launch
    sweep: Launch
    pairs: Launch
    dx: Launch
    outside: Launch

    @property
    def state_shape(self) -> tuple[int, int]:
        """Headdim and d_state of a state in memory, padded to whole tiles."""
        return self.P * self.P_tiles, self.N


def check(headdim: int, d_state: int) -> None:
    """Raises ValueError for shapes that no configuration fits."""
    if headdim > MAX_HEADDIM or d_state > MAX_D_STATE:
        raise ValueError(
            f"headdim ({headdim}) must be at most {MAX_HEADDIM} and d_state ({d_state}) at most {MAX_D_STATE} "
            "for backend 'triton'; use 'torch'"
        )


def choose(headdim: int, d_state: int, dtype: torch.dtype, capability: int) -> Config:
    """The configuration for a shape, a dtype and a GPU's compute capability (90 for an H100), if one fits."""
    check(headdim, d_state)
    channels, N = _tile(headdim), _tile(d_state)
    large = capability in (90, 100, 103)  # 227 KiB of shared memory
    # Triton 3.6 fails to pipeline the sweep for tensor memory
    sweep = Launch(4, 1 if capability // 10 in (10, 11) else 2)
    if dtype == torch.float32:
        P = min(channels, 32)
        small = 16 if N == 256 else 32
        return Config(
            16, small, small, P, channels // P, N, min(N, 128),
            Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1),
        )  # fmt: skip
    P = min(channels, 64)
    if N == 256:
        return Config(
            32, 32, 32, P, channels // P, N, N,
            Launch(8, 1), Launch(8, sweep.stages), Launch(4, 1), Launch(4, 1), Launch(8, 1),
        )  # fmt: skip
    if large:
        return Config(
            64, 128, 64, P, channels // P, N, N,
            Launch(4, 2), sweep, Launch(4, 3), Launch(4, 2), Launch(8, 3),
        )  # fmt: skip
    return Config(
        64, 64, 64, P, channels // P, N, N,
        Launch(8, 2), sweep, Launch(4, 2), Launch(8, 1), Launch(8, 2),
    )  # fmt: skip


def _tile(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
