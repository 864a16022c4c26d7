"""Processors of a GPU that matrix products leave to communication.

On Hopper GPUs a large product of cuBLAS runs on every processor from its first tile to its last, and what is to travel
beside it begins when it ends. With a few processors left out it takes longer by their share, and messages pass.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def _cublas() -> ctypes.CDLL:
    # PyTorch has it in memory; its name is enough
    library = ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).split('.')[0]}")
    library.cublasSetSmCountTarget.argtypes = ctypes.c_void_p, ctypes.c_int
    return library


def _use(count: int) -> None:
    """Let products that this thread launches use so many processors; 0: all."""
    status = _cublas().cublasSetSmCountTarget(torch.cuda.current_blas_handle(), count)
    if status:
        raise RuntimeError(f"cublasSetSmCountTarget({count}) failed with status {status}")


@contextmanager
def processors_left(count: int, device: torch.device) -> Iterator[None]:
    """Inside, products of this thread on the current GPU leave `count` processors free; elsewhere nothing changes."""
    if not count or device.type != "cuda" or torch.version.cuda is None:
        yield
        return
    _use(torch.cuda.get_device_properties(device).multi_processor_count - count)
    try:
        yield
    finally:
        _use(0)
