"""The SSD operator over a sequence cut across ranks."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.backend import Backend
from mamba2_dist.kernels.ssd import SSDSpan, mamba_chunk_scan_combined

from . import state_scan
from .carry import Carry, added_at
from .conv import conv1d_over_segments
from .groups import Group
from .segments import SegmentTable
from .serial import SerialSSD
from .serial_conv import serial_conv1d
from .state_scan import Pending, StateScan


def operators(scan: StateScan) -> tuple[Callable[..., Any], Callable[..., "SSDOverSegments | SerialSSD"]]:
    """`conv1d_over_segments` and `SSDOverSegments` for states that travel by `scan`, or what takes their place."""
    if scan == "serial_exact":
        return serial_conv1d, SerialSSD
    return conv1d_over_segments, functools.partial(SSDOverSegments, scan=scan)


class SSDOverSegments:
    """`mamba_chunk_scan_combined` of a sequence cut over `group`. When it is made, the states that this rank's segments
    leave set out; `outputs` waits for those that enter.

    What is computed in between has the exchange beside it. So it is in the backward pass: the gradients of those states
    travel while the gradients of what was computed in between are.

    x: (batch, seqlen/cp, nheads/tp, headdim), dt: (batch, seqlen/cp, nheads/tp),
    B, C: (batch, seqlen/cp, ngroups/tp, d_state). carry: as in `conv1d_over_segments`.
    """

    # what one function of the graph leaves for the next, there between the two
    forward_span: SSDSpan
    decay: Tensor
    pending: Pending
    shapes: list[torch.Size | None]
    returning: "_Returning"

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
        scan: StateScan = "auto",
        carry: Carry | None = None,
    ):
        self.table, self.group, self.scan, self.carry = table, group, scan, carry
        self.local, self.shape, self.d_state = table.local(group.rank), x.shape, B.shape[3]
        self.chunk_size = chunk_size
        self.options: dict[str, Any] = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "backend": backend}
        self.tensors: tuple | None = (x, dt, A, B, C, D, dt_bias)
        self.entering: Tensor | None = None
        self.alone = len(table.segments) == table.ranks == 1
        initial = None if carry is None else carry.initial_states
        self.opened = None if self.alone else _Leave.apply(self, initial, *self.tensors)

    def processors_wanted(self, flops: float) -> int:
        """By the exchange, of a product of so many operations that is computed beside it."""
        if self.alone:
            return 0
        batch, _, nheads, headdim = self.shape
        state_bytes = 4 * batch * nheads * headdim * self.d_state
        return state_scan.processors_wanted(self.group, self.scan, self.table.slots_per_rank, state_bytes, flops)

    def outputs(self) -> tuple[Tensor, Callable[..., Tensor]]:
        """y like x, and what gives it again of the same (x, dt, A, B, C, D, dt_bias) without communicating."""
        tensors, opened = self.tensors, self.opened
        # the graph keeps this object, which must keep no tensor that the graph does not
        self.tensors = self.opened = None
        assert tensors is not None, "outputs are asked for once"
        if opened is None:
            y, final_states = self._whole(*tensors)
            if self.carry is not None:
                assert final_states is not None
                self.carry.leave(final_states)
            return y, lambda *tensors: self._whole(*tensors)[0]
        y, final_states = _Enter.apply(self, opened, *tensors)
        if self.carry is not None:
            self.carry.final_states = final_states
        entering, self.entering, self.carry = self.entering, None, None
        assert entering is not None
        return y, lambda *tensors: self.span(*tensors).outputs(entering)[0].view(self.shape)

    def _whole(self, x, dt, A, B, C, D, dt_bias) -> tuple[Tensor, Tensor | None]:
        x, dt, B, C = _packed(x, dt, B, C)
        call: Callable[..., Any] = functools.partial(
            mamba_chunk_scan_combined, x, dt, A, B, C, self.chunk_size, D=D, dt_bias=dt_bias, **self.options
        )
        if self.carry is None:
            return call(cu_seqlens=self.local.documents).view(self.shape), None
        y, final = call(initial_states=self.carry.initial_states, cu_seqlens=self.local.rows, return_final_states=True)
        return y.view(self.shape), final

    def span(self, x, dt, A, B, C, D, dt_bias) -> SSDSpan:
        """This rank's tokens: states enter the first piece of each segment of each row, and leave the last."""
        x, dt, B, C = _packed(x, dt, B, C)
        return SSDSpan(
            x, dt, A, B, C, self.chunk_size, self.local.documents, self.local.first.ravel(), self.local.last.ravel(),
            D=D, dt_bias=dt_bias, **self.options,
        )  # fmt: skip

    def begin(self, state: Tensor, decay: Tensor, *, reverse: bool = False) -> None:
        """Send out what the segments leave, or in reverse the gradients of what enters them: (segments x batch, nheads,
        headdim, d_state) and (segments, batch, nheads, 1, 1)."""
        state = state.unflatten(0, self.local.last.shape)
        self.pending = state_scan.begin(state, decay, self.table, self.group, self.scan, reverse=reverse)

    def wait(self) -> Tensor:
        """What has come for the segments, (segments x batch, nheads, headdim, d_state)."""
        arrived = self.pending.wait().flatten(0, 1)
        del self.pending
        return arrived

    def where(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, (segments, batch, ...), with zeros where `name` is not true of a segment of a row; see
        `LocalSegments`."""
        if getattr(self.local, name).all():
            return tensor
        return torch.where(self.local.tensor(name, tensor.device)[..., None, None, None], tensor, 0.0)


def _packed(*tensors: Tensor) -> list[Tensor]:
    """(batch, seqlen, ...) -> (1, batch * seqlen, ...)."""
    return [tensor.flatten(0, 1)[None] for tensor in tensors]


class _Returning(NamedTuple):
    """What the gradients of the outputs leave for those of the states, which are on their way."""

    span: SSDSpan
    dy: Tensor
    entering: Tensor
    kept: Tensor
    decay: Tensor
    d_entering: Tensor
    closing: int | None  # the slot that leaves what is carried, where gradients come to that
    d_final: Tensor | None


class _Leave(torch.autograd.Function):
    """The states that segments leave, sent on their way; stands for the outputs in the graph until those are known."""

    @staticmethod
    def forward(ctx, over, initial_states, x, *others):
        over.forward_span = over.span(x, *others)
        state, decay = over.forward_span.leaving()
        decay = decay.unflatten(0, over.local.last.shape)[..., None, None]
        # nothing passes a segment in which a document starts
        over.decay = over.where("passes", decay)
        if over.carry is not None:
            state = over.carry.through_opening(state, over.decay)
        over.begin(state, over.decay)
        ctx.over, ctx.opening = over, None if initial_states is None else over.carry.opening
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        over = ctx.over
        span, dy, entering, kept, decay, d_entering, closing, d_final = over.returning
        del over.returning
        d_leaving = over.wait().unflatten(0, over.local.last.shape)
        d_initial = None
        if ctx.needs_input_grad[1]:
            d_initial = d_leaving.new_zeros(d_leaving.shape[1:])
            if ctx.opening is not None:
                d_initial = decay[ctx.opening] * d_leaving[ctx.opening] + d_entering[ctx.opening]
        d_leaving = added_at(d_leaving, closing, d_final)
        gradients = span.gradients(dy, entering, d_leaving.flatten(0, 1), kept)
        found = zip(gradients, over.shapes, strict=True)
        return None, d_initial, *(None if gradient is None else gradient.view(shape) for gradient, shape in found)


class _Enter(torch.autograd.Function):
    """The outputs, once the states that enter are known, and what leaves the last segment where that is carried;
    backward sends the gradients of what entered on their way."""

    @staticmethod
    def forward(ctx, over, opened, *tensors):
        arrived = over.wait().unflatten(0, over.local.last.shape)
        # a segment's entering state goes to its first piece if that continues a document
        entering, final_states, ctx.closing = over.where("continues", arrived), None, None
        if over.carry is not None:
            entering, final_states = over.carry.enter(entering, over.decay)
            ctx.closing = over.carry.closing if over.carry.differentiable else None
        over.entering = entering.flatten(0, 1)
        y, kept = over.forward_span.outputs(over.entering)
        del over.forward_span
        ctx.save_for_backward(*tensors, over.entering, over.decay, kept)
        del over.decay
        ctx.over = over
        over.shapes = [None if tensor is None else tensor.shape for tensor in tensors]
        return y.view(over.shape), final_states

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        over = ctx.over
        *tensors, entering, decay, kept = ctx.saved_tensors
        span = over.span(*tensors)
        packed = dy.flatten(0, 1)[None]
        d_entering = span.entering_gradient(packed).unflatten(0, over.local.last.shape)
        d_entering = over.where("continues", d_entering)
        if ctx.closing is not None:
            d_entering = added_at(d_entering, ctx.closing, decay[ctx.closing] * d_final)
        over.begin(d_entering.flatten(0, 1), decay, reverse=True)
        over.returning = _Returning(span, packed, entering, kept, decay, d_entering, ctx.closing, d_final)
        return None, dy, *[None] * len(tensors)
