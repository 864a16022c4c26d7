"""Rows that several ranks of tp hold, kept as parameters of their own.

Megatron's norm of the gradient and its count of parameters go by whole parameters: what is on several ranks is counted
on one of them if the others' parameter says `shared`.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mamba2_dist.parallel.partition import Partition


def set_apart(module: nn.Module, name: str, partition: Partition) -> dict[str, Partition]:
    """Make the parameter `name` of `module` one or two, by what this rank holds alone; their names and partitions."""
    alone, shared = (
        Partition(tuple(part for part in partition.parts if (part.replicas > 1) == several), partition.dim)
        for several in (False, True)
    )
    if not (alone.parts and shared.parts):
        return {name: partition}
    parametrize.register_parametrization(module, name, _Joined(partition))
    prefix = f"parametrizations.{name}.original"
    return {f"{prefix}0": alone, f"{prefix}1": shared}


class _Joined(nn.Module):
    """The packed parameter of its parts that are on this rank alone and those that are not."""

    def __init__(self, partition: Partition):
        super().__init__()
        self.lengths = [part.length for part in partition.parts]
        self.places = {
            several: [i for i, part in enumerate(partition.parts) if (part.replicas > 1) == several]
            for several in (False, True)
        }
        self.dim = partition.dim

    def forward(self, alone: Tensor, shared: Tensor) -> Tensor:
        parts: dict[int, Tensor] = {}
        for several, tensor in ((False, alone), (True, shared)):
            places = self.places[several]
            parts |= zip(places, tensor.split([self.lengths[i] for i in places], self.dim), strict=True)
        return torch.cat([parts[i] for i in range(len(self.lengths))], self.dim)

    def right_inverse(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        parts = packed.split(self.lengths, self.dim)
        alone, shared = (torch.cat([parts[i] for i in self.places[several]], self.dim) for several in (False, True))
        return alone, shared
