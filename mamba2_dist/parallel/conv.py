"""The convolution over a sequence cut across ranks, at work while the inputs before segments travel."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.conv1d import ConvSpan, causal_conv1d_split

from .carry import Carry
from .groups import Group
from .halo import Halo
from .segments import SegmentTable


def conv1d_over_segments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    table: SegmentTable,
    group: Group,
    *,
    activation: Literal["silu"] | None = None,
    carry: Carry | None = None,
    function: "type[Convolution] | None" = None,
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """`causal_conv1d_split` of a sequence cut over `group`; communicates the rows before each segment.

    x: (batch, seqlen/cp, at least sum(sizes)), of which the first channels are convolved; weight: (sum(sizes), width).
    carry: what enters from the batch before, and takes what leaves to the next; needed where rows are carried.
    function: whose gradients; None: those of `Convolution`.
    Returns the parts and what follows them, and what gives all of that again without communicating.
    """
    assert carry is not None or not table.carried.any()
    cut = _Cut(x, weight, sizes, table, group, activation, carry)
    if carry is None and not cut.halo.plan.needed:

        def convolve() -> list[Tensor]:
            rows = x.flatten(0, 1)[None]
            return cut.in_rows(
                causal_conv1d_split(rows, weight, bias, sizes, cu_seqlens=cut.pieces, activation=activation)
            )

        return convolve(), convolve
    earlier = None if carry is None else carry.conv
    *parts, halo, last_inputs = (function or Convolution).apply(x, weight, bias, earlier, cut)
    if carry is not None:
        carry.last_inputs = last_inputs
    # the first outputs once more by themselves: their last bits may differ among all others
    return parts, lambda: cut.convolve(x, weight, bias, halo, lambda: None)


class _Cut:
    """How a convolution is cut over ranks; nothing here is a tensor of the batch."""

    def __init__(self, x, weight, sizes, table, group, activation, carry):
        self.shape, self.sizes = x.shape, sizes
        self.channels, self.width = weight.shape
        self.table, self.group, self.activation = table, group, activation
        self.pieces = table.local(group.rank).documents
        self.halo = Halo(table, group, self.width, x.device)
        self.last = None if carry is None else carry.find_last_inputs(x.device)
        self.earlier = (carry.conv.shape, carry.conv.dtype) if carry is not None and carry.differentiable else None
        """What gradients of the last inputs of the batch before are like, where they have them."""

    def in_rows(self, packed: Sequence[Tensor]) -> list[Tensor]:
        """(1, batch * seqlen/cp, ...) -> (batch, seqlen/cp, ...)."""
        return [tensor.view(*self.shape[:2], tensor.shape[2]) for tensor in packed]

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor, arrive: Callable[[], None]
    ) -> list[Tensor]:
        """The parts and what follows them; `arrive` waits for the rows of the halo that come from other ranks."""
        span = self.span(x, weight, bias)
        *parts, rest = span.outputs(halo)
        arrive()
        if len(self.halo.plan.target):
            span.enter(parts, halo)
        return self.in_rows([*parts, rest])

    def span(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> ConvSpan:
        return ConvSpan(
            x.flatten(0, 1)[None], weight, bias, self.sizes, self.pieces, self.halo.plan.entered,
            activation=self.activation,
        )  # fmt: skip

    def exchange_gradients(self, d_halo: Tensor, d_last: Tensor) -> Callable[[Tensor], Tensor | None]:
        """Sends the gradients of the halo on their way back. What adds, in place, to those of the inputs, (tokens,
        channels), all that comes from elsewhere, and gives that of the last inputs of the batch before.

        d_last: of the last inputs of this one, where those have gradients.
        """
        last = None if self.earlier is None else self.last
        if last is not None:
            d_halo = last.add_to_halo(d_last, d_halo)
        arrive = self.halo.give_back(d_halo)

        def receive(d_inputs: Tensor) -> Tensor | None:
            arrive(d_inputs)
            if last is not None:
                last.add_to_inputs(d_last, d_inputs)
            return None if self.earlier is None else self.halo.earlier_gradient(d_halo, *self.earlier)

        return receive


class Convolution(torch.autograd.Function):
    """The parts, what follows them, the halo, and the last inputs of each row where this rank has them.

    The halo travels beside the convolution, whose first outputs are made again when it has come; its gradient needs
    those of the first outputs alone, and travels beside the gradients of the rest.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, earlier, cut):
        inputs = x.flatten(0, 1)[:, : cut.channels]
        halo, arrive = cut.halo.fetch(inputs, earlier)
        outputs = cut.convolve(x, weight, bias, halo, arrive)
        ctx.save_for_backward(x, weight, bias, halo)
        ctx.cut = cut
        ctx.mark_non_differentiable(halo)
        last_inputs = x.new_empty(0) if cut.last is None else cut.last.take(inputs, halo.flatten(0, 1))
        return *outputs, halo, last_inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        cut, (x, weight, bias, halo) = ctx.cut, ctx.saved_tensors
        *d_parts, d_rest, _, d_last = gradients
        d_parts, d_rest = [part.flatten(0, 1)[None].contiguous() for part in d_parts], d_rest.flatten(0, 1)[None]
        span = cut.span(x, weight, bias)
        d_halo = span.initial_gradient(d_parts, halo)
        receive = cut.exchange_gradients(d_halo, d_last)
        dx, d_weight, d_bias = span.gradients(d_parts, d_rest, halo)
        d_earlier = receive(dx[0, :, : cut.channels])
        return dx.view(x.shape), d_weight, d_bias, d_earlier, None
