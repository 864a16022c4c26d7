"""State scan "serial_exact": states handed from segment to segment, each of which begins when the one before has ended.

Slow, and for tests: where sequences are cut at chunks of their documents, what the kernels compute of activations has
the same bits on any number of ranks, gradients included.
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
        self.entering: list[Any] = []  # of each slot, once it is known

    def processors_wanted(self, flops: float) -> int:
        """None: nothing travels before `outputs`."""
        return 0

    def outputs(self) -> tuple[Tensor, Callable[..., Tensor]]:
        """y like x, and what gives it again of the same (x, dt, A, B, C, D, dt_bias) without communicating."""
        tensors, self.tensors = self.tensors, None
        assert tensors is not None, "outputs are asked for once"
        carry = self.carry
        y, final_states = _Serial.apply(self, None if carry is None else carry.initial_states, *tensors)
        if carry is not None:
            carry.final_states = final_states
        entering, self.entering, self.carry = self.entering, [], None
        return y, lambda *tensors: self.join(
            [self.span(slot, tensors).forward(state)[0] for slot, state in enumerate(entering)], tensors[0]
        )

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

    def nothing(self, tensors: Sequence[Any]) -> Tensor:
        """No state, (batch, nheads, headdim, d_state)."""
        x, _, _, B, *_ = tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(self.table.batch, *x.shape[2:], B.shape[3], dtype=wide)

    def hand_on(self, step: Callable[[int, Tensor], Tensor], state: Tensor, *, reverse: bool = False) -> None:
        """`step(slot, arrived)` gives what goes on to the next segment, in causal order or from the last back; at the
        first `state` arrives."""
        direction = -1 if reverse else 1
        holders, slots = (numbers[::direction].tolist() for numbers in (self.table.holders, self.table.slots))
        carrier, me, like = ProcessGroups(self.group), self.group.rank, state
        for slot, holder, previous, following in zip(slots, holders, [me, *holders], [*holders[1:], me], strict=False):
            if holder != me:
                continue
            if previous != me:
                state = carrier.carry(Messages({}, {previous: like.numel()}, like))[previous].view_as(like)
            state = step(slot, state)
            if following != me:
                carrier.carry(Messages({following: state.flatten()}, {}, like))


class _Serial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, over, initial_states, *tensors):
        slots, carry = len(over.local.segments), over.carry
        ys, over.entering = [None] * slots, [None] * slots
        final_states = tensors[0].new_empty(0)

        def step(slot: int, arrived: Tensor) -> Tensor:
            nonlocal final_states
            over.entering[slot] = over.where_continued(slot, arrived)
            ys[slot], left = over.span(slot, tensors).forward(over.entering[slot])
            if carry is not None and slot == carry.closing:
                final_states = left
            return left

        over.hand_on(step, over.nothing(tensors) if initial_states is None else initial_states)
        ctx.opening = ctx.closing = None
        if carry is not None:
            carry.leave(final_states)
            ctx.opening, ctx.closing = carry.opening, carry.closing
        ctx.save_for_backward(*tensors, initial_states)
        ctx.over = over
        return over.join(ys, tensors[0]), final_states

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        over, (*tensors, initial_states) = ctx.over, ctx.saved_tensors
        nothing = d_initial = over.nothing(tensors)
        spans = [over.span(slot, tensors) for slot in range(len(over.local.segments))]

        def ahead(slot: int, arrived: Tensor) -> Tensor:
            return spans[slot].left_again(over.tokens(dy, slot), over.where_continued(slot, arrived))

        def back(slot: int, arrived: Tensor) -> Tensor:
            nonlocal d_initial
            state = over.where_continued(slot, spans[slot].back(arrived + d_final if slot == ctx.closing else arrived))
            if slot == ctx.opening:
                d_initial = state
            return state

        over.hand_on(ahead, nothing if initial_states is None else initial_states)
        over.hand_on(back, nothing, reverse=True)
        # a rank may hold no segment
        found = zip(*(span.gradients() for span in spans), strict=True) if spans else [()] * len(tensors)
        gradients = []
        # x, dt, B and C have tokens; all share A, D and dt_bias
        for tensor, parts, has_tokens in zip(tensors, found, (1, 1, 0, 1, 1, 0, 0), strict=True):
            if tensor is None:
                gradients.append(None)
            else:
                gradients.append(over.join(parts, tensor) if has_tokens else sum(parts, torch.zeros_like(tensor)))
        return None, d_initial if ctx.needs_input_grad[1] else None, *gradients
