"""Processors (SMs) of a GPU that matrix products leave to communication.

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
    library.cublasGetSmCountTarget.argtypes = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    return library


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS did not take a number of processors, status {status}")


@contextmanager
def processors_left(count: int, device: torch.device) -> Iterator[None]:
    """Inside, cuBLAS leaves `count` processors of a CUDA device free in products of this thread; on other devices, and
    in products of cuBLASLt, nothing changes."""
    if not count or device.type != "cuda" or torch.version.cuda is None:
        yield
        return
    others = torch.cuda.get_device_properties(device).multi_processor_count - count
    with torch.cuda.device(device):
        handle, before = torch.cuda.current_blas_handle(), ctypes.c_int()
        _check(_cublas().cublasGetSmCountTarget(handle, before))
        _check(_cublas().cublasSetSmCountTarget(handle, others))
        try:
            yield
        finally:
            _check(_cublas().cublasSetSmCountTarget(handle, before))
