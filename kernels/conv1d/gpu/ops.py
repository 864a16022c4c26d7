"""The convolution as PyTorch operators: mamba2_dist::causal_conv1d and its gradient, the same bits every time."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...common.launcher import launch
from ...common.operators import call, fake, gradients_of, operator, without_gradients
from .kernels import conv_backward_kernel, conv_kernel
from .table import Table, lay_out

TOKENS = 256  # of a program
PARTS = 3  # that channels may be split into


@dataclass(frozen=True)
class Launch:
    """Channels of a program, its warps, how many tokens it reads at once, and stages of its software pipeline."""

    channels: int
    warps: int
    unroll: int
    stages: int


FORWARD, BACKWARD = Launch(256, 2, 4, 4), Launch(256, 2, 4, 4)


@operator
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, offsets: Tensor | None,
    enters: Tensor | None, leaves: Tensor | None, sizes: list[int], final_count: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The first sum(sizes) channels of x convolved, in up to three parts, the other channels, and `final_count` final
    states.

    offsets, enters and leaves are on the host; see `table.lay_out`. weight: (channels, width).
    """
    problem = make_problem(x, weight, bias, offsets, enters, leaves, sizes, final_count)
    (y0, y1, y2), state = new_parts(x, sizes), None if initial_state is None else initial_state.contiguous()
    convolve(problem, state, silu, [y0, y1, y2])
    return y0, y1, y2, copy_rest(x, sizes), _final_states(problem, state, final_count)


@fake(causal_conv1d)
def _(x, weight, bias, initial_state, offsets, enters, leaves, sizes, final_count, silu):
    rest = x.new_empty(*x.shape[:2], x.shape[2] - sum(sizes))
    return *new_parts(x, sizes), rest, x.new_empty(final_count, weight.shape[1] - 1, sum(sizes))


@operator
def causal_conv1d_backward(
    d_parts: list[Tensor], d_rest: Tensor, d_final: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, offsets: Tensor | None, enters: Tensor | None, leaves: Tensor | None,
    sizes: list[int], silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and initial_state; empty for those that are None."""
    problem = make_problem(x, weight, bias, offsets, enters, leaves, sizes, d_final.shape[0])
    state = None if initial_state is None else initial_state.contiguous()
    dx, d_state = torch.empty_like(x, memory_format=torch.contiguous_format), new_state_gradient(state, x)
    shares = convolve_back(problem, state, silu, d_parts, dx, d_state)
    dx[..., sum(sizes) :].copy_(d_rest)
    _add_final_gradients(problem, dx, d_state, d_final)
    d_weight, d_bias = add_shares(problem, shares)
    return (
        dx,
        d_weight,
        x.new_empty(0) if d_bias is None else d_bias,
        x.new_empty(0) if initial_state is None else d_state.to(initial_state.dtype),
    )


@fake(causal_conv1d_backward)
def _(d_parts, d_rest, d_final, x, weight, bias, initial_state, offsets, enters, leaves, sizes, silu):
    like = lambda tensor: x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)  # noqa: E731
    return like(x), like(weight), like(bias), like(initial_state)


@gradients_of(causal_conv1d)
class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        x, weight, bias, initial_state, offsets, enters, leaves, sizes, _, silu = inputs
        ctx.save_for_backward(x, weight, bias, initial_state, offsets, enters, leaves)
        ctx.options = (sizes, silu)
        return without_gradients(causal_conv1d, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        sizes, silu = ctx.options
        tensors = ctx.saved_tensors
        *d_parts, d_rest, d_final = gradients
        made = call(causal_conv1d_backward, d_parts[: len(sizes)], d_rest, d_final, *tensors, sizes, silu)
        kept = [gradient if tensor is not None else None for gradient, tensor in zip(made, tensors[:4], strict=True)]
        return *kept, *[None] * 6


@dataclass(frozen=True)
class Problem:
    """x with channels side by side, (batch, seqlen, at least sum(sizes)), and where its work is cut."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    table: Table

    @property
    def variant(self) -> tuple:
        """What may differ between launches."""
        x, table = self.x, self.table
        counts = *self.weight.shape, *self.sizes, table.blocks.shape[1], table.spans.shape[1]
        return x.shape, x.stride(), x.dtype, self.bias is None, counts

    def describe(self, how: Launch, state: Tensor | None, silu: bool) -> dict:
        sizes = [*self.sizes, *[0] * (PARTS - len(self.sizes))]
        blocks = [triton.cdiv(size, how.channels) for size in sizes]
        nblocks, nspans = self.table.blocks.shape[1], self.table.spans.shape[1]
        return {
            "grid": (nblocks, sum(blocks)), "nblocks": nblocks, "nspans": nspans,
            "row_stride": self.x.stride(0), "token_stride": self.x.stride(1),
            "size0": sizes[0], "size1": sizes[1], "size2": sizes[2], "blocks0": blocks[0], "blocks1": blocks[1],
            "WIDTH": self.weight.shape[1], "BLOCK": how.channels, "UNROLL": how.unroll, "STAGES": how.stages,
            "HAS_BIAS": self.bias is not None, "HAS_STATE": state is not None, "SILU": silu, "num_warps": how.warps,
        }  # fmt: skip


def make_problem(x, weight, bias, offsets, enters, leaves, sizes, final_count) -> Problem:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, seqlen, _ = x.shape
    table = lay_out(offsets, enters, leaves, batch, seqlen, weight.shape[1], TOKENS, final_count, x.device)
    bias = None if bias is None else bias.contiguous()
    return Problem(x, weight.contiguous(), bias, sizes, table)


def new_parts(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Memory for as many parts as the operator returns."""
    return [x.new_empty(*x.shape[:2], size) for size in [*sizes, *[0] * (PARTS - len(sizes))]]


def copy_rest(x: Tensor, sizes: list[int]) -> Tensor:
    """The channels that are not convolved."""
    return x[..., sum(sizes) :].clone(memory_format=torch.contiguous_format)


def new_state_gradient(state: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros(0 if state is None else state.shape, dtype=torch.float32, device=x.device)


def convolve(problem: Problem, state: Tensor | None, silu: bool, parts: list[Tensor]) -> None:
    """Write the outputs of the tokens in the problem's table."""
    table, parts = problem.table, parts + parts[:1] * (PARTS - len(parts))
    launch(
        conv_kernel, (*problem.variant, state is None, silu), lambda: problem.describe(FORWARD, state, silu),
        x_ptr=problem.x, weight_ptr=problem.weight, bias_ptr=problem.weight if problem.bias is None else problem.bias,
        state_ptr=problem.x if state is None else state, y0_ptr=parts[0], y1_ptr=parts[1], y2_ptr=parts[2],
        blocks_ptr=table.blocks, spans_ptr=table.spans,
    )  # fmt: skip


def convolve_back(
    problem: Problem, state: Tensor | None, silu: bool, d_parts: list[Tensor], dx: Tensor, d_state: Tensor
) -> Tensor:
    """Write dx of the tokens in the problem's table and the gradients of the states before them; what each block of
    tokens adds to those of the weights and the bias, (blocks, width + 1, channels)."""
    table, (channels, width) = problem.table, problem.weight.shape
    shares = problem.x.new_empty(table.blocks.shape[1], width + 1, channels, dtype=torch.float32)
    d_parts = [part.to(problem.x.dtype).contiguous() for part in d_parts]
    d_parts += d_parts[:1] * (PARTS - len(d_parts))
    launch(
        conv_backward_kernel, (*problem.variant, state is None, silu),
        lambda: dict(dx_stride=problem.x.shape[2], **problem.describe(BACKWARD, state, silu)),
        dy0_ptr=d_parts[0], dy1_ptr=d_parts[1], dy2_ptr=d_parts[2], x_ptr=problem.x, weight_ptr=problem.weight,
        bias_ptr=problem.weight if problem.bias is None else problem.bias,
        state_ptr=problem.x if state is None else state, dx_ptr=dx, d_state_ptr=d_state, shares_ptr=shares,
        blocks_ptr=table.blocks, spans_ptr=table.spans,
    )  # fmt: skip
    return shares


def add_shares(problem: Problem, shares: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of the weights and the bias."""
    totals, width, bias = shares.sum(0), problem.weight.shape[1], problem.bias
    d_weight = totals[:width].T.to(problem.weight.dtype).contiguous()
    return d_weight, None if bias is None else totals[width].to(bias.dtype)


def _final_states(problem: Problem, state: Tensor | None, count: int) -> Tensor:
    """The last width - 1 inputs of documents, older ones from the initial state or zero."""
    x, before, channels = problem.x, problem.weight.shape[1] - 1, sum(problem.sizes)
    final = x.new_zeros(count * before, channels)
    if count:
        place, row, token = problem.table.from_tokens
        final[place] = x[row, token, :channels]
        if state is not None:
            place, source = problem.table.from_states
            final[place] = state.flatten(0, 1)[source].to(x.dtype)
    return final.view(count, before, channels)


def _add_final_gradients(problem: Problem, dx: Tensor, d_state: Tensor, d_final: Tensor) -> None:
    if not d_final.shape[0]:
        return
    channels, d_final = sum(problem.sizes), d_final.flatten(0, 1)
    place, row, token = problem.table.from_tokens
    dx[row, token, :channels] += d_final[place].to(dx.dtype)
    if d_state.numel():
        place, target = problem.table.from_states
        d_state.flatten(0, 1)[target] += d_final[place]
