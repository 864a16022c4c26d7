"""What all tests share: a fixed seed, NaN in fresh memory, and what happens where a GPU is missing."""

import gc
import os

import pytest
import torch

from .distributed import poison_memory

if not torch.cuda.is_available():
    # before anything imports them, the Triton kernels choose to run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the files that run side by side share the cores; more threads than cores wait for one another
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    poison_memory(monkeypatch.setattr)


@pytest.fixture
def _no_garbage_collection():
    """What is freed is freed with its last reference."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)
