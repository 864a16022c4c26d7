"""Buffers that ranks share, without a GPU: what is allocated, and until when. `test_waiting` uses them on GPUs."""

import gc
import weakref

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric

from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.symmetric_memory import shared_buffers

CPU = torch.device("cpu")


class _Memory:
    """Every rank's buffer is this rank's."""

    def __init__(self, memory: torch.Tensor):
        self.memory = memory

    def get_buffer(self, rank, sizes, dtype):
        return self.memory.view(dtype)[: sizes[0]]


@pytest.fixture
def allocated(monkeypatch):
    found = []

    def empty(*args, **kwargs):
        memory = torch.empty(*args, **kwargs)
        found.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(symmetric, "empty", empty)
    monkeypatch.setattr(symmetric, "rendezvous", lambda memory, handle: _Memory(memory))
    return found


def test_many_sizes_share_few_buffers(allocated):
    group = Group("states", (0, 1), handle=object())
    for numel in range(1, 1000):
        mine, theirs = shared_buffers(group, 4 * numel, CPU).next(numel, torch.float32)
        assert mine.shape == theirs.shape == (numel,)
    assert len(allocated) == 2 * 11  # 4 to 4096 bytes
    assert sum(memory().numel() for memory in allocated) < 4 * 4096


def test_buffers_take_turns(allocated):
    buffers = shared_buffers(Group("states", (0, 1), handle=object()), 8, CPU)
    first, second, third = (buffers.next(2, torch.float32)[0].data_ptr() for _ in range(3))
    assert first == third != second


def test_buffers_end_with_their_group(allocated):
    group = Group("states", (0, 1), handle=object())
    same = hash(group)
    shared_buffers(group, 8, CPU)
    assert hash(group) == same
    del group
    gc.collect()
    assert [memory() for memory in allocated] == [None, None]
