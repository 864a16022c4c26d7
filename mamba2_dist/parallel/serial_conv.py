"""The convolution of a cut sequence whose inputs' gradients have the bits of one device.

The gradient of a segment's last inputs is a sum over outputs of other ranks too. `conv1d_over_segments` adds what those
ranks have summed and rounded; here the outputs' gradients come instead, and the sum runs over them as everywhere else.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.common.transfer import to_device
from mamba2_dist.kernels.conv1d import causal_conv1d, causal_conv1d_split

from .carry import Carry
from .groups import Group
from .halo import conv_halo
from .segments import LocalSegments, SegmentTable


def serial_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    table: SegmentTable,
    group: Group,
    *,
    activation: Literal["silu"] | None = None,
    carry: Carry | None = None,
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """As `conv1d_over_segments`; the backward pass convolves again."""
    earlier = None if carry is None else carry.conv
    with torch.no_grad():
        _, halo = conv_halo(x, sum(sizes), weight.shape[1], table, group, earlier)
    if carry is not None:
        carry.leave_conv(x[..., : sum(sizes)], halo)
    pieces = table.local(group.rank).documents

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        parts = causal_conv1d_split(
            x.flatten(0, 1)[None], weight, bias, sizes, initial_state=halo, cu_seqlens=pieces, activation=activation
        )
        return [part.view(*x.shape[:2], part.shape[2]) for part in parts]

    parts = _SerialConv.apply(x, weight, bias, halo, convolve, activation, table, group)
    return list(parts), lambda: convolve(x, weight, bias)


class _SerialConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, halo, convolve, activation, table, group):
        ctx.save_for_backward(x, weight, bias, halo)
        ctx.convolve, ctx.activation, ctx.table, ctx.group = convolve, activation, table, group
        return tuple(convolve(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_parts):
        *tensors, halo = ctx.saved_tensors
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        wanted = [leaf for leaf in leaves if leaf is not None]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.convolve(*leaves), wanted, d_parts))
        dx, d_weight, d_bias = (None if leaf is None else next(found) for leaf in leaves)
        if halo is not None and ctx.table.backwards.continued.any():
            convolved = _gradient(ctx, *tensors, halo, d_parts[:-1])
            dx = torch.cat([convolved, d_parts[-1]], dim=-1)
        return dx, d_weight, d_bias, None, None, None, None, None


@dataclass(frozen=True)
class _Longer:
    """A rank's tokens with up to `reach` behind each segment of each row; worked out on the host."""

    backwards: Tensor  # (tokens,) places in a row, each segment from its last token to its first
    order: Tensor  # what stands where: the rank's tokens, packed, or from their number on those behind
    own: Tensor  # where the rank's tokens stand
    documents: Documents  # the pieces, each segment's last one longer


def _gradient(ctx, x, weight, bias, halo, d_parts) -> Tensor:
    """Of the inputs that are convolved, by all outputs that they reach, (batch, seqlen/cp, channels)."""
    channels, reach = weight.shape[0], weight.shape[1] - 1
    local, back = ctx.table.local(ctx.group.rank), ctx.table.backwards.local(ctx.group.rank)
    longer = local.kept(("longer", reach, x.device), lambda: _lengthen(local, reach, x.device))
    rows = torch.cat([x[..., :channels], *d_parts], dim=-1)
    # what precedes a segment as time runs back
    _, behind = conv_halo(rows[:, longer.backwards], 2 * channels, reach + 1, ctx.table.backwards, ctx.group)
    assert behind is not None, "some segment is followed"
    behind = behind[back.tensor("first", x.device).T].flip(2)
    rows = torch.cat([rows.flatten(0, 1), behind.flatten(0, 2)]).index_select(0, longer.order)
    inputs, dy = rows[None].split(channels, dim=-1)
    leaf = inputs.detach().requires_grad_()
    with torch.enable_grad():
        y = causal_conv1d(
            leaf, weight, bias, initial_state=halo, cu_seqlens=longer.documents, activation=ctx.activation
        )
    (d_inputs,) = torch.autograd.grad(y, leaf, dy)
    return d_inputs[0].index_select(0, longer.own).view(*x.shape[:2], channels)


def _lengthen(local: LocalSegments, reach: int, device: torch.device) -> _Longer:
    pieces = local.documents
    backwards = [np.arange(start, end)[::-1] for start, end in itertools.pairwise(local.starts)]
    last = local.last.T.ravel()  # in the order of tokens
    ends = np.asarray(pieces.offsets)[last + 1]
    behind = pieces.tokens + np.arange(len(last) * reach)
    order = np.insert(np.arange(pieces.tokens), np.repeat(ends, reach), behind)
    lengths = pieces.lengths.copy()
    lengths[last] += reach
    return _Longer(
        backwards=to_device(np.concatenate([np.empty(0, np.int64), *backwards]), device),
        order=to_device(order, device),
        own=to_device(np.flatnonzero(order < pieces.tokens), device),
        documents=Documents([0, *np.cumsum(lengths).tolist()]),
    )
