"""Which implementation takes a call: Triton kernels on a GPU, plain PyTorch elsewhere."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice

Backend = Literal["auto", "triton", "torch"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes_triton(backend: Backend, x: Tensor, check: Callable[[], None] | None = None) -> bool:
    """Whether the Triton kernels take a call on `x`: "auto" says so for tensors on a GPU in a dtype they know.

    check: raises ValueError for what they cannot take besides. Raises ValueError where "triton" was asked for and
    cannot be.
    """
    check_choice("backend", backend, ("auto", "triton", "torch"))
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return False
    try:
        from . import launcher
    except ImportError:
        if backend == "triton":
            raise ValueError("backend 'triton' needs the package triton; install it or use 'torch'") from None
        return False
    try:
        if x.device.type != "cuda" and not launcher.INTERPRETED:
            raise ValueError(f"backend 'triton' needs tensors on a GPU, got them on {x.device.type!r}; use 'torch'")
        if x.dtype not in DTYPES:
            raise ValueError(f"x must be bfloat16, float16 or float32 for backend 'triton', got {x.dtype}; use 'torch'")
        capability = launcher.device_limits(x.device)[0]
        if capability < 80:
            raise ValueError(
                f"backend 'triton' needs compute capability 8.0 or later, got {capability / 10}; use 'torch'"
            )
        if check is not None:
            check()
    except ValueError:
        if backend == "triton":
            raise
        return False
    return True
