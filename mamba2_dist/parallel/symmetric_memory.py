"""Collectives of GPUs of one node that read each other's memory, by PyTorch's symmetric memory; no multicast."""

import torch
from torch import Tensor

from . import ledger
from .groups import Group
from .messages import AllGather, AllToAll, ProcessGroups, Request


class SymmetricMemory(ProcessGroups):
    """Carries collectives by copies from the other ranks' memory, after one barrier on the current stream.

    group: of several ranks on one node. Raises ValueError where they are not on GPUs.
    """

    def __init__(self, group: Group, device: torch.device):
        super().__init__(group)
        if device.type != "cuda":
            raise ValueError(
                f"state_scan 'symmetric_memory' needs all ranks on GPUs of one node, got {device.type}; choose "
                "'sliced', 'hierarchical' or 'auto'"
            )
        self.device = device

    def carry(self, request: Request):
        """What a request brings."""
        if not isinstance(request, AllGather | AllToAll):
            return super().carry(request)
        tensor, group = request.tensor.contiguous(), self.group
        gathers = isinstance(request, AllGather)
        ledger.enter_collective("all_gather" if gathers else "all_to_all", group, tensor)
        buffers = shared_buffers(group, tensor.nbytes, self.device)
        peers = buffers.next(tensor.numel(), tensor.dtype)
        # a graph may be replayed whenever others still read, and others may write whenever it does
        if torch.cuda.is_current_stream_capturing():
            buffers.barrier()
        peers[group.rank].copy_(tensor.view(-1))
        buffers.barrier()
        brought = tensor.new_empty(group.size, tensor.numel() if gathers else tensor.numel() // group.size)
        for rank, peer in enumerate(peers):
            brought[rank].copy_(peer if gathers else peer.view(group.size, -1)[group.rank])
        if torch.cuda.is_current_stream_capturing():
            buffers.barrier()
        return brought.view(group.size, *tensor.shape[0 if gathers else 1 :])


class _Buffers:
    """Two buffers that take turns: who writes into one has passed a barrier since anybody last read it."""

    def __init__(self, group: Group, nbytes: int, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric

        assert group.handle is not None, "a group of one exchanges nothing"
        self.memory = [symmetric.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.handles = [symmetric.rendezvous(memory, group.handle) for memory in self.memory]
        self.ranks, self.turn = range(group.size), 0

    def next(self, numel: int, dtype: torch.dtype) -> list[Tensor]:
        """Every rank's buffer, (numel,)."""
        self.turn = 1 - self.turn
        return [self.handles[self.turn].get_buffer(rank, (numel,), dtype) for rank in self.ranks]

    def barrier(self) -> None:
        """Wait on the current stream until all ranks are here."""
        self.handles[self.turn].barrier()


def shared_buffers(group: Group, nbytes: int, device: torch.device) -> _Buffers:
    """Buffers of at least so many bytes, which live as long as the group; their sizes are powers of two, so that there
    are few however sizes change, and none that a CUDA graph may read is let go."""
    key = 1 << (nbytes - 1).bit_length(), device
    if key not in group.buffers:
        group.buffers[key] = _Buffers(group, key[0], device)
    return group.buffers[key]
