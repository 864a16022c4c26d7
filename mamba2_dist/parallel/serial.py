"""State scan "serial_exact": states handed from segment to segment, each of which begins when the one before has ended.

Slow, and for tests: where sequences are cut at chunks of their documents, what it computes of activations has the same
bits on any number of ranks, gradients included.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.backend import Backend
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.ssd import SerialSpan

from .carry import Carry
from .groups import Group
from .messages import Messages, ProcessGroups
from .segments import SegmentTable


class _Part(NamedTuple):
    """The pieces of one segment of each row."""

    documents: Documents
    first: np.ndarray  # (batch,) the piece that a state enters
    last: np.ndarray  # (batch,) the piece whose state leaves


class SerialSSD:
    """As `SSDOverSegments`, with all work in `outputs`."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        table: SegmentTable,
        group: Group,
        *,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        backend: Backend = "auto",
        carry: Carry | None = None,
    ):
        self.table, self.group, self.carry, self.chunk_size = table, group, carry, chunk_size
        self.local = table.local(group.rank)
        self.options: dict[str, Any] = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "backend": backend}
        self.tensors: tuple | None = (x, dt, A, B, C, D, dt_bias)
        self.parameters = dt, A, D, dt_bias
        wide = torch.promote_types(x.dtype, torch.float32)
        self.nothing = x.new_zeros(table.batch, *x.shape[2:], B.shape[3], dtype=wide)

    def outputs(self) -> Tensor:
        """y like x."""
        tensors, self.tensors = self.tensors, None
        assert tensors is not None, "outputs are asked for once"
        return _Serial.apply(self, *tensors)

    def again(self, x: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The same y of the same x, B and C, without communicating."""
        dt, A, D, dt_bias = self.parameters
        tensors = x, dt, A, B, C, D, dt_bias
        parts = [self.span(slot, tensors).forward(self.entering[slot])[0] for slot in range(len(self.local.segments))]
        return self.join(parts, x)

    def part(self, slot: int) -> _Part:
        """What is known of a segment on the host; kept for the next layer."""
        return self.local.kept(("serial", slot), lambda: self._make_part(slot))

    def _make_part(self, slot: int) -> _Part:
        first, last = self.local.first[slot], self.local.last[slot]
        lengths = [self.local.documents.lengths[a : b + 1] for a, b in zip(first, last, strict=True)]
        counts = np.array([len(each) for each in lengths])
        ends = np.cumsum(counts)
        return _Part(Documents([0, *np.cumsum(np.concatenate(lengths)).tolist()]), ends - counts, ends - 1)

    def tokens(self, tensor: Tensor, slot: int) -> Tensor:
        """A segment's tokens of all rows, packed, (1, batch * tokens, ...)."""
        start, end = self.local.starts[slot : slot + 2]
        return tensor[:, start:end].flatten(0, 1)[None]

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Packed tokens of every slot -> like (batch, seqlen/cp, ...)."""
        rows = [part.unflatten(1, (self.table.batch, -1))[0] for part in parts if part.shape[1]]
        return torch.cat(rows, dim=1).view(like.shape) if rows else torch.zeros_like(like)

    def span(self, slot: int, tensors: Sequence[Any]) -> SerialSpan:
        x, dt, A, B, C, D, dt_bias = tensors
        x, dt, B, C = (self.tokens(tensor, slot) for tensor in (x, dt, B, C))
        documents, first, last = self.part(slot)
        return SerialSpan(x, dt, A, B, C, self.chunk_size, documents, first, last, D=D, dt_bias=dt_bias, **self.options)

    def where_continued(self, slot: int, state: Tensor) -> Tensor:
        """(batch, nheads, headdim, d_state), zeros in rows whose segment starts a document."""
        continues = self.local.tensor("continues", state.device)[slot]
        return torch.where(continues[:, None, None, None], state, 0.0)

    def enter(self, slot: int, arrived: Tensor) -> Tensor:
        """What enters a segment, from what the one before left."""
        carry = self.carry
        if carry is not None and slot == carry.opening and carry.initial_states is not None:
            return carry.initial_states
        return self.where_continued(slot, arrived)

    def hand_on(self, step: Callable[[int, Tensor], Tensor], *, reverse: bool = False) -> None:
        """`step(slot, arrived)` gives what goes on to the next segment, in causal order or from the last back."""
        direction = -1 if reverse else 1
        holders, slots = (numbers[::direction].tolist() for numbers in (self.table.holders, self.table.places))
        carrier, me, state = ProcessGroups(self.group), self.group.rank, self.nothing
        for position, holder in enumerate(holders):
            if holder != me:
                continue
            previous = holders[position - 1] if position else None
            if previous is None:
                state = self.nothing
            elif previous != me:
                request = Messages({}, {previous: self.nothing.numel()}, self.nothing)
                state = carrier.carry(request)[previous].view_as(self.nothing)
            state = step(slots[position], state)
            if position + 1 < len(holders) and holders[position + 1] != me:
                carrier.carry(Messages({holders[position + 1]: state.flatten()}, {}, self.nothing))


class _Serial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, over, *tensors):
        slots = len(over.local.segments)
        ys, over.entering = [None] * slots, [None] * slots

        def step(slot: int, arrived: Tensor) -> Tensor:
            over.entering[slot] = over.enter(slot, arrived)
            ys[slot], left = over.span(slot, tensors).forward(over.entering[slot])
            if over.carry is not None and slot == over.carry.closing:
                over.final = left
            return left

        over.hand_on(step)
        if over.carry is not None:
            over.carry.leave_states(over.__dict__.pop("final", None))
        ctx.save_for_backward(*tensors)
        ctx.over = over
        return over.join(ys, tensors[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        over, tensors = ctx.over, ctx.saved_tensors
        spans = [over.span(slot, tensors) for slot in range(len(over.local.segments))]

        def ahead(slot: int, arrived: Tensor) -> Tensor:
            return spans[slot].left_again(over.tokens(dy, slot), over.enter(slot, arrived))

        def back(slot: int, arrived: Tensor) -> Tensor:
            return over.where_continued(slot, spans[slot].back(arrived))

        over.hand_on(ahead)
        over.hand_on(back, reverse=True)
        # a rank may hold no segment
        found = zip(*(span.gradients() for span in spans), strict=True) if spans else [()] * len(tensors)
        # x, dt, B and C have tokens; all share A, D and dt_bias
        gradients = []
        for tensor, parts, has_tokens in zip(tensors, found, (1, 1, 0, 1, 1, 0, 0), strict=True):
            if tensor is None:
                gradients.append(None)
            else:
                gradients.append(over.join(parts, tensor) if has_tokens else sum(parts, torch.zeros_like(tensor)))
        return None, *gradients
