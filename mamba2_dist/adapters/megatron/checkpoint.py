"""Parameters in Megatron's distributed checkpoints, under the keys of its own mixer: one for each whole tensor."""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor, nn

from mamba2_dist.modules.base import whole_name
from mamba2_dist.parallel.partition import Part, Partition

Offsets = Iterable[tuple[int, int, int]]


def sharded_parameter(
    key: str, parameter: nn.Parameter, partition: Partition, tp_rank: int, data_rank: int, offsets: Offsets
) -> ShardedTensor | ShardedTensorFactory:
    """What a rank holds of a parameter and of its optimizer's state, which is cut in the same way.

    key: of the parameter; where it packs several tensors each is stored by itself, as "in_proj.weight.z".
    data_rank: among ranks with the same parameters; offsets: axes that modules above have put before it.
    """

    def stored(part: Part, name: str, data: Tensor, replica_id: ReplicaId) -> ShardedTensor:
        before = tuple(offsets)
        axis = (len(before) + partition.dim, part.start // part.length, part.size // part.length)
        return ShardedTensor.from_rank_offsets(
            name, data, *before, axis, replica_id=replica_id, prepend_axis_num=len(before)
        )

    if len(partition.parts) == 1:
        (part,) = partition.parts
        replica = 0, tp_rank % part.replicas, data_rank
        return stored(part, whole_name(key, part.name), parameter, replica)

    @torch.no_grad()
    def split(key: str, packed: Tensor, replica_id: ReplicaId, flattened_range: Any = None) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise ValueError(
                f"{key} packs several tensors and cannot be stored as a flat range; choose a checkpoint format of the "
                "distributed optimizer that stores whole parameters (fully_reshardable or dp_reshardable)"
            )
        slices = packed.split([part.length for part in partition.parts], dim=partition.dim)
        pairs = zip(partition.parts, slices, strict=True)
        return [stored(part, whole_name(key, part.name), data, replica_id) for part, data in pairs]

    @torch.no_grad()
    def join(slices: list[Tensor]) -> Tensor:
        return torch.cat(slices, dim=partition.dim)

    (replicas,) = {part.replicas for part in partition.parts}
    return ShardedTensorFactory(key, parameter, split, join, (0, tp_rank % replicas, data_rank))
