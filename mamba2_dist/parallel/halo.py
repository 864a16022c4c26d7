"""The inputs just before a segment that its convolution needs, fetched from whoever holds them."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mamba2_dist.kernels.common.transfer import to_device

from .collectives import Arriving, begin_rows
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
    entered: np.ndarray  # the pieces that any of these precede
    shape: tuple[int, int]  # pieces of this rank, and width - 1
    needed: bool  # whether any rank of the group fetches anything


class Halo:
    """What precedes each piece of this rank in its document, (pieces, width - 1, channels), zeros where nothing does.

    Each way one all-to-all over `group` of exactly the rows needed, from as many segments back as it takes. Nothing
    here is recorded by autograd.
    """

    def __init__(self, table: SegmentTable, group: Group, width: int, device: torch.device):
        self.plan, self.group = _plan(table, group.rank, width - 1, device), group

    def fetch(self, inputs: Tensor, earlier: Tensor | None = None) -> tuple[Tensor, Callable[[], None]]:
        """The halo, and what waits for the rows that now set out and writes them into it.

        inputs: (tokens, channels), this rank's of all rows, packed. earlier: (batch, width - 1, channels), the last
        inputs of the batch before.
        """
        plan = self.plan
        halo = inputs.new_zeros(math.prod(plan.shape), inputs.shape[1])
        if earlier is not None and len(plan.remembered):
            rows = earlier.flatten(0, 1).index_select(0, plan.remembered)
            halo.index_copy_(0, plan.places, rows.to(halo.dtype))
        arriving = self._begin(inputs, plan.source, plan.sent, plan.received)

        def arrive() -> None:
            if arriving is not None:
                halo.index_copy_(0, plan.target, arriving.wait())

        return halo.unflatten(0, plan.shape), arrive

    def give_back(self, d_halo: Tensor) -> Callable[[Tensor], None]:
        """Sends the gradients of fetched rows back; what waits for those of this rank's tokens and adds them, in place,
        to (tokens, channels)."""
        plan = self.plan
        arriving = self._begin(d_halo.flatten(0, 1), plan.target, plan.received, plan.sent)

        def add(d_inputs: Tensor) -> None:
            if arriving is not None:
                d_inputs.index_add_(0, plan.source, arriving.wait())

        return add

    def earlier_gradient(self, d_halo: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """That of the last inputs of the batch before, of `shape` and `dtype`."""
        d_earlier, rows = d_halo.new_zeros(shape, dtype=dtype), d_halo.flatten(0, 1).index_select(0, self.plan.places)
        d_earlier.flatten(0, 1).index_add_(0, self.plan.remembered, rows.to(dtype))
        return d_earlier

    def _begin(self, rows: Tensor, index: Tensor, sent, received) -> Arriving | None:
        if not self.plan.needed:
            return None
        return begin_rows(rows.index_select(0, index), self.group, sent, received)


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
    entered = {place // before for place in itertools.chain(places, *received)}
    needed = before > 0 and bool(table.continued.any())  # all ranks must agree
    return HaloPlan(
        tuple(map(len, sent)), tuple(map(len, received)), flat(sent), flat(received), flat([remembered]),
        flat([places]), np.array(sorted(entered), np.int64), (len(local.documents), before), needed,
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
