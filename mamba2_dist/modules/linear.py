"""Linear layers split over tensor-parallel ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamba2_dist.parallel.collectives import all_gather, reduce, reduce_scatter, replicate, replicate_rows
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import Partition

from .base import Initializer, PartitionedModule


class _LastRows(torch.autograd.Function):
    """u W^T of the rows of W from `first` on, and u and W for `_FirstRows`, whose part of their gradients it adds to.

    One gradient of u and one of W are written, though the two products are apart in the graph.
    """

    @staticmethod
    def forward(ctx, u, weight, first):
        ctx.save_for_backward(u, weight)
        ctx.first = first
        return F.linear(u, weight[first:]), u.view_as(u), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, du, d_weight):
        u, weight = ctx.saved_tensors
        # these two are `_FirstRows`'s alone, and come to nobody else
        du.flatten(0, 1).addmm_(dy.flatten(0, 1), weight[ctx.first :])
        torch.mm(dy.flatten(0, 1).T, u.flatten(0, 1), out=d_weight[ctx.first :])
        return du, d_weight, None


class _FirstRows(torch.autograd.Function):
    """u W^T of the rows of W before `first`."""

    @staticmethod
    def forward(ctx, u, weight, first):
        ctx.save_for_backward(u, weight)
        ctx.first = first
        return F.linear(u, weight[:first])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, weight = ctx.saved_tensors
        du, d_weight = torch.empty_like(u), torch.empty_like(weight)
        torch.mm(dy.flatten(0, 1), weight[: ctx.first], out=du.view(-1, u.shape[-1]))
        torch.mm(dy.flatten(0, 1).T, u.flatten(0, 1), out=d_weight[: ctx.first])
        return du, d_weight, None


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
        return F.linear(*self._factors(u))

    def in_two(self, u: Tensor, first: int) -> tuple[Tensor, Callable[[], Tensor]]:
        """The channels from `first` on, and what computes those before; each has memory of its own.

        What is computed second is the first to free its gradient, as it has become part of those of u and W by then.
        """
        u, weight = self._factors(u)
        device = u.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            u, weight = u.to(dtype), weight.to(dtype)
        last, u, weight = _LastRows.apply(u, weight, first)
        return last, lambda: _FirstRows.apply(u, weight, first)

    def _factors(self, u: Tensor) -> tuple[Tensor, Tensor]:
        d_in = self.weight.shape[1]
        if u.ndim != 3 or u.shape[2] != d_in:
            raise ValueError(f"u must have shape (batch, seqlen, {d_in}), got {tuple(u.shape)}")
        u = all_gather(u, self.tp, dim=1) if self.sequence_parallel else replicate(u, self.tp)
        return u, replicate_rows(self.weight, self.records["weight"].partition.shared, self.shared_by)


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
