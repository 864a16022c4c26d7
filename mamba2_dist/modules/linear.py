"""Linear layers split over tensor-parallel ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamba2_dist.parallel.collectives import all_gather, reduce, reduce_scatter, replicate, replicate_rows
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import Partition
from mamba2_dist.parallel.processors import processors_left

from .base import Initializer, PartitionedModule

_casts: ContextVar[dict[tuple, tuple[Tensor, Tensor]] | None] = ContextVar("casts", default=None)


@contextmanager
def cast_once() -> Iterator[None]:
    """Inside, a weight is cast for autocast once and not once a use; weights must not change meanwhile.

    For gradient accumulation. Not where weights come and go, as with FSDP.
    """
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, outside autograd."""
    weight, kept = weight.detach(), _casts.get()
    if weight.dtype == dtype or kept is None:
        return weight.to(dtype)
    key = (weight.data_ptr(), weight.shape, weight._version, dtype)
    if key not in kept:
        with torch.inference_mode(False):  # or training could not use it
            kept[key] = weight, weight.to(dtype)
    return kept[key][1]


def _to_keep(weight: Tensor, cast: Tensor) -> Tensor:
    """What is saved for backward: the cast only where it is kept anyway, as FSDP lets go of weights meanwhile."""
    return weight if _casts.get() is None else cast


def autocast_dtype(u: Tensor) -> torch.dtype:
    """What is computed from `u` and weights: that of autocast, where it is on and takes such a u."""
    device = u.device.type
    cast = torch.is_autocast_enabled(device) and u.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else u.dtype


def _adds(weight: Any) -> Any:
    """The weight, if it is a parameter whose gradients Megatron's `DistributedDataParallel` sums over microbatches in
    `main_grad`, and lets others add to."""
    marks = ("main_grad", "grad_added_to_main_grad")
    # its FSDP has them too, but the memory comes and goes
    return weight if all(hasattr(weight, mark) for mark in marks) and not hasattr(weight, "__fsdp_param__") else None


def _weight_gradient(dy: Tensor, u: Tensor, rows: slice, d_weight: Tensor, parameter: Any) -> None:
    """dy^T u into these rows of d_weight, or added to those of the parameter's `main_grad` where one is given, of
    whatever dtype: nothing is rounded on the way."""
    out, beta = d_weight[rows], 0
    if parameter is not None:
        out, beta = parameter.main_grad[rows], 1
        parameter.grad_added_to_main_grad = True
    dy, u = dy.flatten(0, -2), u.flatten(0, -2)
    if out.dtype == u.dtype:
        torch.addmm(out, dy.T, u, beta=beta, out=out)
    elif u.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, dy.T, u, beta=beta, out_dtype=torch.float32, out=out)
    else:
        wide = torch.promote_types(out.dtype, u.dtype)
        with torch.autocast(u.device.type, enabled=False):
            product = dy.T.to(wide) @ u.to(wide)
            out.copy_(product + out if beta else product)


class _FirstRows(torch.autograd.Function):
    """u W^T of the rows of W before `first`, with W also in the dtype of u; the gradient of W is in its own, what there
    is of other rows is not written. left: processors that these products leave free; parameter: W, where its gradient
    goes to `main_grad` and the one here is not written at all."""

    @staticmethod
    def forward(ctx, u, weight, cast, first, left, parameter):
        ctx.save_for_backward(u, _to_keep(weight, cast))
        ctx.first, ctx.weight_dtype, ctx.left, ctx.parameter = first, weight.dtype, left, parameter
        with processors_left(left, u.device):
            return F.linear(u, cast[:first])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, weight = ctx.saved_tensors
        du = d_weight = None
        with processors_left(ctx.left, u.device):
            if ctx.needs_input_grad[0]:
                du = dy @ weight[: ctx.first].to(u.dtype)
            if ctx.needs_input_grad[1]:
                d_weight = torch.empty_like(weight, dtype=ctx.weight_dtype)
                if torch.is_anomaly_enabled():
                    d_weight.zero_()  # or what is not written would be taken for a result
                _weight_gradient(dy, u, slice(None, ctx.first), d_weight, ctx.parameter)
        return du, d_weight, None, None, None, None


def linear(u: Tensor, weight: Tensor, parameter: Tensor | None = None) -> Tensor:
    """u W^T, (batch, seqlen, d_in) -> (batch, seqlen, d_out), in the dtype of autocast where that is on.

    parameter: W, where its gradient is to be added to its `main_grad`.
    """
    u = u.to(autocast_dtype(u))
    if u.dtype == weight.dtype and parameter is None:
        return F.linear(u, weight)
    return _FirstRows.apply(u, weight, _cast(weight, u.dtype), len(weight), 0, parameter)


class _LastRows(torch.autograd.Function):
    """u W^T of the rows of W from `first` on, and u and W for `_FirstRows`, whose part of their gradients it adds to.

    One gradient of u and one of W are written, though the two products are apart in the graph.
    """

    @staticmethod
    def forward(ctx, u, weight, cast, first, parameter):
        ctx.save_for_backward(u, _to_keep(weight, cast))
        ctx.first, ctx.parameter = first, parameter
        return F.linear(u, cast[first:]), u.view_as(u), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, du, d_weight):
        u, weight = ctx.saved_tensors
        # these two are `_FirstRows`'s alone, and come to nobody else
        if ctx.needs_input_grad[0]:
            du.view(-1, u.shape[-1]).addmm_(dy.flatten(0, -2), weight[ctx.first :].to(u.dtype))
        if ctx.needs_input_grad[1]:
            _weight_gradient(dy, u, slice(ctx.first, None), d_weight, ctx.parameter)
        return du, d_weight, None, None, None


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

    def forward(self, u: Tensor, first: int | None = None) -> Any:
        """(batch, seqlen/cp, d_in) -> (batch, seqlen/cp, d_out/tp); with sequence_parallel the input is
        (batch, seqlen/cp/tp, d_in), its shards gathered over tp. first: as in `in_two`, whose results it then gives."""
        # both ways lead through the module's call: there wrappers wait for weights that are on their way
        if first is not None:
            return self.in_two(u, first)
        u, weight = self._factors(u)
        return linear(u, weight, _adds(weight))

    def in_two(self, u: Tensor, first: int) -> tuple[Tensor, Callable[..., Tensor]]:
        """The channels from `first` on, and what computes those before; each has memory of its own.

        What is computed second is the first to free its gradient, as it has become part of those of u and W by then.
        It may be called with a number of processors that its product and those of its gradient leave free.
        """
        u, weight = self._factors(u)
        u = u.to(autocast_dtype(u))
        cast, parameter = _cast(weight, u.dtype), _adds(weight)
        last, u, weight = _LastRows.apply(u, weight, cast, first, parameter)
        return last, lambda left=0: _FirstRows.apply(u, weight, cast, first, left, parameter)

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
        weight = self.weight
        partial = linear(u, weight, _adds(weight))
        return reduce_scatter(partial, self.tp, dim=1) if self.sequence_parallel else reduce(partial, self.tp)
