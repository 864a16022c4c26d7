"""The inputs just before a segment that its convolution needs, fetched from whoever holds them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.transfer import to_device

from .carry import Carry
from .collectives import rows_over
from .groups import Group
from .segments import Segment, SegmentTable


@dataclass(frozen=True)
class HaloPlan:
    """Which of this rank's tokens go to which rank, and where the received ones belong; worked out on the host."""

    sent: tuple[int, ...]  # rows to each rank
    received: tuple[int, ...]  # rows from each rank
    source: Tensor  # (sum of sent,) local token of each row sent
    target: Tensor  # (sum of received,) piece * (width - 1) + place of each row received
    remembered: Tensor  # row * (width - 1) + place of each row of the batch before that belongs here
    places: Tensor  # where it does, as in `target`
    pieces: tuple[int, int]  # pieces of this rank, and width - 1
    needed: bool  # whether any rank of the group fetches anything


def conv_halo(
    x: Tensor, channels: int, width: int, table: SegmentTable, group: Group, carry: Carry | None = None
) -> tuple[Tensor, Tensor | None]:
    """x for a convolution of `width` and what precedes each piece in its document, (pieces, width - 1, channels), zeros
    where nothing does; None where nothing precedes any piece of any rank.

    x: (batch, seqlen/cp, at least channels), of which the first are convolved. One all-to-all over `group` of exactly
    the rows needed, from as many segments back as it takes. The convolution must be all that reads the x returned: its
    gradient is the memory to which those of the rows are added. carry: has the last inputs of the batch before, and
    takes those of this one; needed where rows are carried.
    """
    plan = _plan(table, group.rank, width - 1, x.device)
    if carry is None:
        assert not table.carried.any()
        return _Halo.apply(x, channels, plan, group, None, None)[:2] if plan.needed else (x, None)
    x, halo, carry.last_inputs = _Halo.apply(x, channels, plan, group, carry, carry.conv)
    return x, halo


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, channels, plan, group, carry, earlier):
        inputs = x.flatten(0, 1)[:, :channels]
        halo = x.new_zeros(math.prod(plan.pieces), channels)
        if plan.needed:
            rows = inputs.index_select(0, plan.source)
            halo.index_copy_(0, plan.target, rows_over(rows, group, plan.sent, plan.received))
        if len(plan.remembered):
            rows = earlier.flatten(0, 1).index_select(0, plan.remembered)
            halo.index_copy_(0, plan.places, rows.to(halo.dtype))
        last = None if carry is None else carry.find_last_inputs(x.device)
        last_inputs = x.new_empty(0) if last is None else last.take(inputs, halo)
        ctx.channels, ctx.plan, ctx.group = channels, plan, group
        ctx.last = last if carry is not None and carry.differentiable else None
        ctx.earlier = None if earlier is None else (earlier.shape, earlier.dtype)
        return x.view_as(x), halo.unflatten(0, plan.pieces) if plan.needed else None, last_inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, d_halo, d_last_inputs):
        plan, dx = ctx.plan, dx.contiguous()
        d_inputs = dx.flatten(0, 1)[:, : ctx.channels]
        d_halo = dx.new_zeros(math.prod(plan.pieces), ctx.channels) if d_halo is None else d_halo.flatten(0, 1)
        if ctx.last is not None:
            d_halo = ctx.last.give_back(d_last_inputs, d_inputs, d_halo)
        if plan.needed:
            rows = rows_over(d_halo.index_select(0, plan.target), ctx.group, plan.received, plan.sent)
            d_inputs.index_add_(0, plan.source, rows)
        d_earlier = None
        if ctx.needs_input_grad[5]:
            shape, dtype = ctx.earlier
            d_earlier = d_halo.new_zeros(shape, dtype=dtype)
            d_earlier.flatten(0, 1).index_add_(0, plan.remembered, d_halo.index_select(0, plan.places).to(dtype))
        return dx, None, None, None, None, d_earlier


def _plan(table: SegmentTable, rank: int, before: int, device: torch.device) -> HaloPlan:
    return table.local(rank).kept(("halo", before, device), lambda: _make_plan(table, rank, before, device))


def _make_plan(table: SegmentTable, rank: int, before: int, device: torch.device) -> HaloPlan:
    local = table.local(rank)
    sent: list[list[int]] = [[] for _ in range(table.ranks)]
    received: list[list[int]] = [[] for _ in range(table.ranks)]
    remembered: list[int] = []
    places: list[int] = []
    for segment in local.segments:
        for row, token in _fetched(table, segment, before):
            target = int(local.first[segment.slot, row]) * before + token - segment.start + before
            received[table.segment_of(token).rank].append(target)
        for row, token in _remembered(table, segment, before):
            remembered.append(row * before + token + before)
            places.append(int(local.first[segment.slot, row]) * before + token - segment.start + before)
    for receiver in _followers(table, rank, before):
        for row, token in _fetched(table, receiver, before):
            holder = table.segment_of(token)
            if holder.rank == rank:
                place = local.starts[holder.slot] + token - holder.start
                sent[receiver.rank].append(row * local.length + place)
    flat = lambda lists: to_device(np.array([i for part in lists for i in part], np.int64), device)  # noqa: E731
    needed = before > 0 and bool(table.continued.any())  # all ranks must agree
    return HaloPlan(
        tuple(map(len, sent)), tuple(map(len, received)),
        flat(sent), flat(received), flat([remembered]), flat([places]), (len(local.documents), before), needed,
    )  # fmt: skip


def _fetched(table: SegmentTable, segment: Segment, before: int) -> Iterator[tuple[int, int]]:
    """(row, token) of up to `before` tokens of the same document before a segment of each row."""
    for row in np.flatnonzero(table.continued[table.position[segment]]).tolist():
        start = max(segment.start - before, table.document_start(row, segment.start))
        yield from ((row, token) for token in range(start, segment.start))


def _remembered(table: SegmentTable, segment: Segment, before: int) -> Iterator[tuple[int, int]]:
    """(row, token) of tokens of the same document before a segment that the batch before had, its last being -1."""
    for row in np.flatnonzero(table.carried & table.continued[table.position[segment]]).tolist():
        if table.document_start(row, segment.start) == 0:
            yield from ((row, token) for token in range(segment.start - before, 0))


def _followers(table: SegmentTable, rank: int, reach: int) -> list[Segment]:
    """Segments that begin up to `reach` tokens after one of `rank`'s, in the order in which their ranks ask."""
    found = set()
    for segment in table.held[rank]:
        for follower in table.segments[table.position[segment] + 1 :]:
            if follower.start - reach >= segment.end:
                break
            found.add(follower)
    return sorted(found, key=lambda follower: (follower.rank, follower.slot))
