"""The convolution for "serial_exact": the gradient of an input before a cut has the bits that one rank would give it.

Such a gradient sums over tokens on both sides of the cut, in their order. So the rank that holds the input fetches the
tokens behind the cut and their gradients, and convolves the few around it once more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.backend import Backend
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.common.transfer import to_device
from mamba2_dist.kernels.conv1d import causal_conv1d, causal_conv1d_split

from .carry import Carry
from .collectives import rows_over
from .groups import Group
from .halo import conv_halo
from .segments import Segment, SegmentTable


@dataclass(frozen=True)
class _Cuts:
    """The tokens around each cut behind one of this rank's segments, in each row whose document goes on; worked out on
    the host. A cut's tokens are up to width - 1 before it, its tail, and as many behind it."""

    sent: tuple[int, ...]  # tokens to each rank
    received: tuple[int, ...]  # tokens from each rank
    source: Tensor  # (sum of sent,) local token of each one sent
    tails: Tensor  # local token of each one in a tail
    places: Tensor  # where each of those is among the tokens of all cuts
    order: Tensor  # the tokens of all cuts, among the tails and what is received
    before: Tensor  # (cuts * (width - 1),) what precedes each tail, among local tokens, their halo, and a zero
    documents: Documents  # one a cut
    any: bool  # whether any rank has any


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
    backend: Backend = "auto",
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """As `conv1d_over_segments`."""
    earlier = None if carry is None else carry.conv
    with torch.no_grad():
        _, halo = conv_halo(x, sum(sizes), weight.shape[1], table, group, earlier)
    if carry is not None:
        carry.leave_conv(x[..., : sum(sizes)], halo)
    options = {"activation": activation, "backend": backend}
    pieces = table.local(group.rank).documents

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        packed = x.flatten(0, 1)[None]
        parts = causal_conv1d_split(packed, weight, bias, sizes, initial_state=halo, cu_seqlens=pieces, **options)
        return [part.view(*x.shape[:2], part.shape[2]) for part in parts]

    parts = _SerialConv.apply(x, weight, bias, halo, convolve, options, table, group)
    return list(parts), lambda: convolve(x, weight, bias)


class _SerialConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, halo, convolve, options, table, group):
        ctx.save_for_backward(x, weight, bias, halo)
        ctx.convolve, ctx.options, ctx.table, ctx.group = convolve, options, table, group
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
        x, weight, bias = tensors
        reach = weight.shape[1] - 1
        local = ctx.table.local(ctx.group.rank)
        cuts = local.kept(("cuts", reach, x.device), lambda: _find_cuts(ctx.table, ctx.group.rank, reach, x.device))
        if reach and cuts.any:
            dx = dx.contiguous()
            dy = torch.cat([part.flatten(0, 1) for part in d_parts[:-1]], dim=-1)
            tails = _tail_gradients(x.flatten(0, 1)[:, : len(weight)], dy, weight, bias, halo, cuts, ctx)
            dx.flatten(0, 1)[:, : len(weight)].index_copy_(0, cuts.tails, tails)
        return dx, d_weight, d_bias, None, None, None, None, None


def _tail_gradients(x, dy, weight, bias, halo, cuts: _Cuts, ctx) -> Tensor:
    """The gradients of the inputs of all tails; x, dy: (tokens, channels)."""
    received = [rows_over(t.index_select(0, cuts.source), ctx.group, cuts.sent, cuts.received) for t in (x, dy)]
    around = [
        torch.cat([t.index_select(0, cuts.tails), rows]).index_select(0, cuts.order)
        for t, rows in zip((x, dy), received, strict=True)
    ]
    if not len(cuts.tails):
        return x[:0]
    preceding = torch.cat([x, halo.flatten(0, 1), x.new_zeros(1, x.shape[1])]).index_select(0, cuts.before)
    leaf = around[0][None].detach().requires_grad_()
    with torch.enable_grad():
        y = causal_conv1d(
            leaf, weight.detach(), None if bias is None else bias.detach(),
            initial_state=preceding.unflatten(0, (len(cuts.documents), -1)), cu_seqlens=cuts.documents, **ctx.options,
        )  # fmt: skip
    return torch.autograd.grad(y, leaf, around[1][None])[0][0].index_select(0, cuts.places)


def _find_cuts(table: SegmentTable, rank: int, reach: int, device: torch.device) -> _Cuts:
    local = table.local(rank)
    tokens = table.batch * local.length
    sent: list[list[int]] = [[] for _ in range(table.ranks)]
    received: list[list[tuple[int, int]]] = [[] for _ in range(table.ranks)]
    tails: list[int] = []
    before: list[int] = []
    around: list[list[int]] = []  # of each cut: indices of its tail, then -1 for each token behind it
    for segment in local.segments:
        for row, behind in _behind(table, segment, reach):
            piece = int(local.last[segment.slot, row])
            start, end = local.documents.offsets[piece : piece + 2]
            tail = range(max(start, end - reach), end)
            for token in range(tail.start - reach, tail.start):
                # the halo has zeros where nothing precedes
                before.append(token if token >= start else tokens + piece * reach + token - start + reach)
            for place, token in enumerate(behind, len(tail)):
                received[table.segment_of(token).rank].append((len(around), place))
            around.append([*range(len(tails), len(tails) + len(tail)), *[-1] * len(behind)])
            tails += tail
    for segment in _preceding(table, rank, reach):
        for row, behind in _behind(table, segment, reach):
            for token in behind:
                holder = table.segment_of(token)
                if holder.rank == rank:
                    sent[segment.rank].append(row * local.length + local.starts[holder.slot] + token - holder.start)
    for index, (cut, place) in enumerate(each for part in received for each in part):
        around[cut][place] = len(tails) + index
    order = [index for cut in around for index in cut]
    flat = lambda numbers: to_device(np.array(numbers, np.int64), device)  # noqa: E731
    return _Cuts(
        sent=tuple(map(len, sent)),
        received=tuple(map(len, received)),
        source=flat([token for part in sent for token in part]),
        tails=flat(tails),
        places=flat([place for place, index in enumerate(order) if index < len(tails)]),
        order=flat(order),
        before=flat(before),
        documents=Documents([0, *np.cumsum([len(cut) for cut in around]).tolist()]),
        any=bool(table.continued.any()),
    )


def _behind(table: SegmentTable, segment: Segment, reach: int) -> Iterator[tuple[int, range]]:
    """(row, tokens) of up to `reach` tokens behind a segment that continue its last document of each row."""
    if segment.start == segment.end:
        return
    for row, begins in enumerate(table.begins):
        following = begins[np.searchsorted(begins, segment.end) :]
        end = int(following[0]) if len(following) else table.seqlen
        tokens = range(segment.end, min(segment.end + reach, end, table.seqlen))
        if tokens:
            yield row, tokens


def _preceding(table: SegmentTable, rank: int, reach: int) -> list[Segment]:
    """Segments that end up to `reach` tokens before one of `rank`'s tokens, in the order in which their ranks ask."""
    found = set()
    for segment in table.held[rank]:
        for earlier in reversed(table.segments[: table.position[segment]]):
            if earlier.end + reach <= segment.start:
                break
            found.add(earlier)
    return sorted(found, key=lambda earlier: (earlier.rank, earlier.slot))
