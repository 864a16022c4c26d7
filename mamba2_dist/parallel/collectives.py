"""Collectives on tensors, each with its adjoint; on a group of one they return their input.

What stands behind the adjoints: a tensor is either *replicated* over a group (all ranks hold it and compute the same
from it), or *partial* (the sum over ranks is meant), or *sharded*.

| function       | forward        | backward            | takes           | gives           |
|----------------|----------------|---------------------|-----------------|-----------------|
| replicate      | nothing        | all-reduce          | replicated      | used apart      |
| replicate_rows | nothing        | all-reduce, of rows | partly the same | used apart      |
| reduce         | all-reduce     | nothing             | partial         | replicated      |
| all_reduce     | all-reduce     | all-reduce          | partial         | used apart      |
| all_gather     | all-gather     | reduce-scatter      | sharded         | used apart      |
| reduce_scatter | reduce-scatter | all-gather          | partial         | sharded         |
| all_to_all     | all-to-all     | all-to-all          | sharded         | sharded         |

A result is "used apart" when every rank goes on with it in its own way, so that gradients differ and their sum counts.
Second derivatives are refused: an adjoint is no function of autograd.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ledger
from .groups import Group

# torch 2.13 renames these two
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the group, outside autograd; works in place where it can."""
    return _all_reduce(tensor.detach(), group, dist.ReduceOp.SUM)


def max_over(tensor: Tensor, group: Group) -> Tensor:
    """The maximum over the group, outside autograd; works in place where it can."""
    return _all_reduce(tensor.detach(), group, dist.ReduceOp.MAX)


def gather_over(tensor: Tensor, group: Group) -> Tensor:
    """(group size, *shape): every rank's tensor, outside autograd."""
    return _all_gather(tensor.detach()[None], group, 0)


class Arriving:
    """A tensor on its way."""

    def __init__(self, tensor: Tensor, work: dist.Work | None = None):
        self.tensor, self.work = tensor, work

    def wait(self) -> Tensor:
        """The host does not wait for a GPU."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def begin_broadcast(tensor: Tensor, group: Group, source: int) -> Arriving:
    """Sends `source`'s tensor to every rank, outside autograd, into theirs."""
    if group.size == 1:
        return Arriving(tensor)
    ledger.enter("broadcast", group, *((0, 0) if group.rank == source else (1, tensor.nbytes)))
    return Arriving(tensor, dist.broadcast(tensor, group.ranks[source], group=group.handle, async_op=True))


def all_to_all_over(tensor: Tensor, group: Group) -> Tensor:
    """(group size, ...) -> the same, outside autograd: row r goes to rank r, and comes from it."""
    if group.size == 1:
        return tensor
    ledger.enter_collective("all_to_all", group, tensor)
    output = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(output, tensor.contiguous(), group=group.handle)
    return output


def begin_rows(tensor: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]) -> Arriving:
    """`all_to_all` outside autograd, beside what follows."""
    if group.size == 1:
        return Arriving(tensor)
    output = tensor.new_empty(sum(received), *tensor.shape[1:])
    if ledger.is_open():
        theirs = [rows for rank, rows in enumerate(received) if rank != group.rank]
        row = tensor.element_size() * math.prod(tensor.shape[1:])
        ledger.enter("all_to_all", group, sum(rows > 0 for rows in theirs), sum(theirs) * row)
    work = dist.all_to_all_single(
        output, tensor.contiguous(), list(received), list(sent), group=group.handle, async_op=True
    )
    return Arriving(output, work)


def _all_reduce(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType) -> Tensor:
    if group.size == 1:
        return tensor
    ledger.enter_collective("all_reduce", group, tensor)
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, op, group=group.handle)
    return tensor


def _all_gather(tensor: Tensor, group: Group, dim: int) -> Tensor:
    if group.size == 1:
        return tensor
    ledger.enter_collective("all_gather", group, tensor)
    gathered = tensor.new_empty(group.size * tensor.shape[0], *tensor.shape[1:])
    _gather_single(gathered, tensor.contiguous(), group=group.handle)
    if dim == 0:
        return gathered
    return gathered.unflatten(0, (group.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(tensor: Tensor, group: Group, dim: int) -> Tensor:
    if group.size == 1:
        return tensor
    if dim != 0:
        tensor = tensor.unflatten(dim, (group.size, -1)).movedim(dim, 0).flatten(0, 1)
    ledger.enter_collective("reduce_scatter", group, tensor)
    scattered = tensor.new_empty(tensor.shape[0] // group.size, *tensor.shape[1:])
    _scatter_single(scattered, tensor.contiguous(), group=group.handle)
    return scattered


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _all_reduce(grad.clone(), ctx.group, dist.ReduceOp.SUM), None


class _ReplicateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, rows, group):
        ctx.rows, ctx.group = rows, group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone()
        runs = [grad.narrow(0, start, length) for start, length in ctx.rows]
        summed = _all_reduce(torch.cat(runs), ctx.group, dist.ReduceOp.SUM)
        for run, total in zip(runs, summed.split([length for _, length in ctx.rows]), strict=True):
            run.copy_(total)
        return grad, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        return _all_reduce(tensor.clone(), group, dist.ReduceOp.SUM)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _all_reduce(tensor.clone(), group, dist.ReduceOp.SUM)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _all_reduce(grad.clone(), ctx.group, dist.ReduceOp.SUM), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, dim):
        ctx.group, ctx.dim = group, dim
        return _all_gather(tensor, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, dim):
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(tensor, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _all_gather(grad, ctx.group, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, sent, received):
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return begin_rows(tensor, group, sent, received).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return begin_rows(grad, ctx.group, ctx.received, ctx.sent).wait(), None, None, None


def replicate(tensor: Tensor, group: Group) -> Tensor:
    """The tensor itself; its gradient is summed over the group."""
    return tensor if group.size == 1 else _Replicate.apply(tensor, group)


def replicate_rows(tensor: Tensor, rows: Sequence[tuple[int, int]], group: Group) -> Tensor:
    """The tensor itself; gradients of the given (start, length) runs of rows are summed over the group."""
    return tensor if group.size == 1 or not rows else _ReplicateRows.apply(tensor, tuple(rows), group)


def reduce(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the group; every rank goes on with the same sum, so its gradient passes as it is."""
    return tensor if group.size == 1 else _Reduce.apply(tensor, group)


def all_reduce(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the group; ranks use it differently, so its gradients are summed too."""
    return tensor if group.size == 1 else _AllReduce.apply(tensor, group)


def all_gather(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """Every rank's equal shard joined along `dim`; gradients are summed and scattered."""
    return tensor if group.size == 1 else _AllGather.apply(tensor, group, dim)


def reduce_scatter(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's shard along `dim` of the sum over the group; gradients are gathered.

    Raises ValueError when the group's size does not divide the axis.
    """
    if tensor.shape[dim] % group.size != 0:
        raise ValueError(
            f"axis {dim} of {tuple(tensor.shape)} must be divisible by the {group.name} group's size ({group.size})"
        )
    return tensor if group.size == 1 else _ReduceScatter.apply(tensor, group, dim)


def all_to_all(tensor: Tensor, group: Group, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows for every rank out, rows from every rank in; `sent[r]` rows go to rank r, `received[r]` come from it."""
    return tensor if group.size == 1 else _AllToAll.apply(tensor, group, tuple(sent), tuple(received))
