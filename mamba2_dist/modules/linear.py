"""Linear layers split over tensor-parallel ranks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamba2_dist.parallel.collectives import all_gather, reduce, reduce_scatter, replicate, replicate_rows
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import Partition

from .base import Initializer, PartitionedModule


class _SplitLinear(torch.autograd.Function):
    """u W^T in parts of their own memory, each freed when its reader is done; one gradient of u, one of W."""

    @staticmethod
    def forward(ctx, u, weight, sizes):
        ctx.save_for_backward(u, weight)
        ctx.sizes = sizes
        return tuple(F.linear(u, rows) for rows in weight.split(sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        u, weight = ctx.saved_tensors
        du = d_weight = None
        flat = [gradient.flatten(0, 1) for gradient in gradients]
        if ctx.needs_input_grad[0]:
            first, *others = zip(flat, weight.split(ctx.sizes), strict=True)
            du = torch.mm(*first)
            for gradient, rows in others:
                du.addmm_(gradient, rows)
            du = du.view(u.shape)
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
            for gradient, rows in zip(flat, d_weight.split(ctx.sizes), strict=True):
                torch.mm(gradient.T, u.flatten(0, 1), out=rows)
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

    def split(self, u: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """The same in parts, (batch, seqlen/cp, size) each, that share no memory."""
        u, weight = self._factors(u)
        device = u.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            u, weight = u.to(dtype), weight.to(dtype)
        return _SplitLinear.apply(u, weight, list(sizes))

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
