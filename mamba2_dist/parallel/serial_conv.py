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
    # through the halo pass only gradients of what is carried
    passed = carry is not None and carry.differentiable
    with torch.set_grad_enabled(passed):
        opened, halo = conv_halo(x, sum(sizes), weight.shape[1], table, group, carry)
    x = opened if passed else x
    pieces = table.local(group.rank).documents

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None) -> list[Tensor]:
        parts = causal_conv1d_split(
            x.flatten(0, 1)[None], weight, bias, sizes, initial_state=halo, cu_seqlens=pieces, activation=activation
        )
        return [part.view(*x.shape[:2], part.shape[2]) for part in parts]

    parts = _SerialConv.apply(x, weight, bias, halo, convolve, activation, table, group)
    return list(parts), lambda: convolve(x, weight, bias, halo)


class _SerialConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, halo, convolve, activation, table, group):
        ctx.save_for_backward(x, weight, bias, halo)
        ctx.convolve, ctx.activation, ctx.table, ctx.group = convolve, activation, table, group
        return tuple(convolve(x, weight, bias, halo))

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_parts):
        tensors = ctx.saved_tensors
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        wanted = [leaf for leaf in leaves if leaf is not None]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.convolve(*leaves), wanted, d_parts))
        dx, d_weight, d_bias, d_halo = (None if leaf is None else next(found) for leaf in leaves)
        if ctx.table.backwards.continued.any():
            d_inputs, d_halo = _gradients(ctx, *tensors, d_parts[:-1])
            dx = torch.cat([d_inputs, d_parts[-1]], dim=-1)
        return dx, d_weight, d_bias, d_halo, None, None, None, None


@dataclass(frozen=True)
class _Longer:
    """A rank's tokens with up to `reach` behind each segment of each row; worked out on the host."""

    backwards: Tensor  # (tokens,) places in a row, each segment from its last token to its first
    order: Tensor  # what stands where: the rank's tokens, packed, or from their number on those behind
    own: Tensor  # where the rank's tokens stand
    documents: Documents  # the pieces, each segment's last one longer
    opening: Tensor  # (pieces, 1, 1) whether only the batch before precedes a piece


def _gradients(ctx, x, weight, bias, halo, d_parts) -> tuple[Tensor, Tensor]:
    """Of the inputs that are convolved and of those of the batch before, by all outputs that they reach, (batch,
    seqlen/cp, channels) and like halo."""
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
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs, halo)]
    with torch.enable_grad():
        y = causal_conv1d(
            leaves[0], weight, bias, initial_state=leaves[1], cu_seqlens=longer.documents, activation=ctx.activation
        )
    d_inputs, d_halo = torch.autograd.grad(y, leaves, dy)
    d_inputs = d_inputs[0].index_select(0, longer.own).view(*x.shape[:2], channels)
    return d_inputs, torch.where(longer.opening, d_halo, 0.0)


def _lengthen(local: LocalSegments, reach: int, device: torch.device) -> _Longer:
    pieces = local.documents
    backwards = [np.arange(start, end)[::-1] for start, end in itertools.pairwise(local.starts)]
    last = local.last.T.ravel()  # in the order of tokens
    ends = np.asarray(pieces.offsets)[last + 1]
    behind = pieces.tokens + np.arange(len(last) * reach)
    order = np.insert(np.arange(pieces.tokens), np.repeat(ends, reach), behind)
    lengths = pieces.lengths.copy()
    lengths[last] += reach
    opening = np.zeros(len(pieces), bool)
    for first, segment in zip(local.first, local.segments, strict=True):
        opening[first] = segment.start == 0 < segment.end
    return _Longer(
        backwards=to_device(np.concatenate([np.empty(0, np.int64), *backwards]), device),
        order=to_device(order, device),
        own=to_device(np.flatnonzero(order < pieces.tokens), device),
        documents=Documents([0, *np.cumsum(lengths).tolist()]),
        opening=to_device(opening[:, None, None], device),
    )
