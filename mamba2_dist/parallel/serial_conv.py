"""The convolution of a cut sequence whose inputs' gradients have the bits of one device.

The gradient of a segment's last inputs is a sum over outputs of other ranks too. `Convolution` adds what those ranks
have summed and rounded; here the outputs' gradients come instead, and the sum runs over them as everywhere else.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.common.transfer import to_device
from mamba2_dist.kernels.conv1d import causal_conv1d

from .conv import Convolution, conv1d_over_segments
from .halo import Halo
from .segments import LocalSegments


class SerialConvolution(Convolution):
    """`Convolution` with those gradients."""

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        cut, (x, weight, bias, halo) = ctx.cut, ctx.saved_tensors
        *d_parts, d_rest, _, d_last = gradients
        packed = [part.flatten(0, 1)[None].contiguous() for part in d_parts]
        span, d_earlier = cut.span(x, weight, bias), None
        dx, d_weight, d_bias = span.gradients(packed, d_rest.flatten(0, 1)[None], halo)
        d_inputs = dx[0, :, : cut.channels]
        if cut.table.backwards.continued.any():
            d_all, d_halo = _gradients(cut, x, weight, bias, halo, d_parts)
            d_inputs.copy_(d_all)
        else:
            d_halo = span.initial_gradient(packed, halo)
        if cut.earlier is not None:
            # through the halo pass only gradients of what is carried
            d_earlier = cut.exchange_gradients(d_halo, d_last)(d_inputs)
        return dx.view(x.shape), d_weight, d_bias, d_earlier, None


serial_conv1d = functools.partial(conv1d_over_segments, function=SerialConvolution)


@dataclass(frozen=True)
class _Longer:
    """A rank's tokens with up to `reach` behind each segment of each row; worked out on the host."""

    backwards: Tensor  # (tokens,) places in a row, each segment from its last token to its first
    order: Tensor  # what stands where: the rank's tokens, packed, or from their number on those behind
    own: Tensor  # where the rank's tokens stand
    documents: Documents  # the pieces, each segment's last one longer
    opening: Tensor  # (pieces, 1, 1) whether only the batch before precedes a piece


def _gradients(cut, x, weight, bias, halo, d_parts) -> tuple[Tensor, Tensor]:
    """Of the inputs that are convolved and of those of the batch before, by all outputs that they reach, (tokens,
    channels) and like halo."""
    channels, reach, table = cut.channels, cut.width - 1, cut.table
    local, back = table.local(cut.group.rank), table.backwards.local(cut.group.rank)
    longer = local.kept(("longer", reach, x.device), lambda: _lengthen(local, reach, x.device))
    rows = torch.cat([x[..., :channels], *d_parts], dim=-1)
    # what precedes a segment as time runs back
    ahead = Halo(table.backwards, cut.group, cut.width, x.device)
    behind, arrive = ahead.fetch(rows[:, longer.backwards].flatten(0, 1))
    arrive()
    behind = behind[back.tensor("first", x.device).T].flip(2)
    rows = torch.cat([rows.flatten(0, 1), behind.flatten(0, 2)]).index_select(0, longer.order)
    inputs, dy = rows[None].split(channels, dim=-1)
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs, halo)]
    with torch.enable_grad():
        y = causal_conv1d(
            leaves[0], weight, bias, initial_state=leaves[1], cu_seqlens=longer.documents, activation=cut.activation
        )
    d_inputs, d_halo = torch.autograd.grad(y, leaves, dy)
    return d_inputs[0].index_select(0, longer.own), torch.where(longer.opening, d_halo, 0.0)


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
