"""Linear layers split over tensor-parallel ranks."""

import torch.nn.functional as F
from torch import Tensor, nn

from mamba2_dist.parallel.collectives import all_gather, reduce, reduce_scatter, replicate, replicate_rows
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import Partition

from .base import Initializer, PartitionedModule


class ColumnParallelLinear(PartitionedModule):
    """y = u W^T with the rows of W split over `tp`.

    partition: the rows this rank holds; shared_by: the group that holds its shared parts too.
    """

    weight: nn.Parameter

    def __init__(
        self,
        d_in: int,
        partition: Partition,
        tp: Group,
        initializer: Initializer,
        *,
        shared_by: Group,
        sequence_parallel: bool = False,
        **factory,
    ):
        super().__init__()
        self.tp, self.shared_by, self.sequence_parallel = tp, shared_by, sequence_parallel
        self.add_parameter("weight", partition, initializer, (d_in,), **factory)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, seqlen/cp, d_in) -> (batch, seqlen/cp, d_out/tp); with sequence_parallel the input is
        (batch, seqlen/cp/tp, d_in), its shards gathered over tp."""
        d_in = self.weight.shape[1]
        if u.ndim != 3 or u.shape[2] != d_in:
            raise ValueError(f"u must have shape (batch, seqlen, {d_in}), got {tuple(u.shape)}")
        u = all_gather(u, self.tp, dim=1) if self.sequence_parallel else replicate(u, self.tp)
        weight = replicate_rows(self.weight, self.records["weight"].partition.shared, self.shared_by)
        return F.linear(u, weight)


class RowParallelLinear(PartitionedModule):
    """y = u W^T with the columns of W split over `tp`; the partial products are summed over it."""

    weight: nn.Parameter

    def __init__(
        self,
        d_out: int,
        partition: Partition,
        tp: Group,
        initializer: Initializer,
        *,
        sequence_parallel: bool = False,
        **factory,
    ):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.add_parameter("weight", partition, initializer, (d_out,), **factory)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, seqlen/cp, d_in/tp) -> (batch, seqlen/cp, d_out); with sequence_parallel the result is
        (batch, seqlen/cp/tp, d_out)."""
        partial = F.linear(u, self.weight)
        return reduce_scatter(partial, self.tp, dim=1) if self.sequence_parallel else reduce(partial, self.tp)
