"""Parameters that know which tensors of the whole model they hold, and how those are first drawn."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import Partition

Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class ParameterRecord:
    """What a parameter is: its shape on this rank, its parts, and how the whole tensors are drawn."""

    shape: tuple[int, ...]
    partition: Partition
    initializer: Initializer


class PartitionedModule(nn.Module):
    """A module whose parameters are described by partitions; parameters are allocated, not drawn."""

    def __init__(self):
        super().__init__()
        self.records: dict[str, ParameterRecord] = {}

    def add_parameter(
        self, name: str, partition: Partition, initializer: Initializer, other_axes: Sequence[int] = (), **factory
    ) -> None:
        """Allocate a parameter of `partition.length` along `partition.dim` and `other_axes` in the other axes."""
        shape = [*other_axes]
        shape.insert(partition.dim, partition.length)
        self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
        self.records[name] = ParameterRecord(tuple(shape), partition, initializer)


def check_step(name: str, tokens: Tensor, axes: str, cp: Group, sequence_parallel: bool) -> None:
    """Raise ValueError unless `tokens`, (batch, 1, ...) as `axes` says, can follow those before on every rank."""
    if sequence_parallel or cp.size > 1:
        raise ValueError("step takes one token at a time: cp must be 1 and sequence_parallel off")
    if tokens.ndim != axes.count(",") + 1 or tokens.shape[1] != 1:
        raise ValueError(f"step takes one token at a time: {name} must have shape {axes}, got {tuple(tokens.shape)}")


def named_records(model: nn.Module) -> Iterator[tuple[str, ParameterRecord]]:
    """(full name, record) of every parameter; names are those of `named_parameters`."""
    for prefix, module in model.named_modules():
        if isinstance(module, PartitionedModule):
            for name, record in module.records.items():
                yield f"{prefix}.{name}".lstrip("."), record


def whole_name(parameter: str, part: str) -> str:
    """The name of a whole tensor, as checkpoints store it: "mixer.in_proj.weight.z", "mixer.A_log"."""
    return f"{parameter}.{part}" if part else parameter


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Draw every parameter; a tensor depends on `seed` and its own name only, never on how it is split."""
    parameters = dict(model.named_parameters())
    for name, record in named_records(model):
        partition, parameter = record.partition, parameters[name]
        for offset, part in zip(partition.offsets, partition.parts, strict=True):
            shape = list(record.shape)
            shape[partition.dim] = part.size
            digest = hashlib.blake2b(f"{seed}/{whole_name(name, part.name)}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            with torch.device("cpu"):  # a default device would not suit the generator
                whole = record.initializer(tuple(shape), generator)
            mine = whole.narrow(partition.dim, part.start, part.length)
            parameter.narrow(partition.dim, offset, part.length).copy_(mine)
