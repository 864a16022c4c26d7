"""The norms as PyTorch operators: mamba2_dist::gated_rmsnorm, mamba2_dist::add_rmsnorm and their gradients, the same
bits every time; and their halves, for groups of channels that span devices."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...common.launcher import device_limits, launch
from ...common.operators import call, fake, gradients_of, operator, without_gradients
from .kernels import norm_backward_kernel, norm_kernel

TILE = 5120  # channels of a program at a time, about
SHARED = 96 * 1024  # bytes of a program that every GPU has


@dataclass(frozen=True)
class Tiles:
    """Tokens and channels of a tile, tiles of a group, warps of a program, stages of its software pipeline, and
    programs of a processor."""

    rows: int
    block: int
    count: int
    warps: int
    stages: int
    programs: int


def tiles_for(group_size: int, ahead: int = 0) -> Tiles:
    """Tiles that cover a group with few idle lanes. ahead: bytes of a channel in the backward pass, where a program of
    8 warps takes a processor's registers and therefore reads ahead; 0 in the forward pass, where programs are many.

    Measured on an H100 at 2560 and 5120 channels (docs/layer.md).
    """
    block = min(triton.next_power_of_2(group_size), 1024)
    while block > 128 and -(-group_size // block) * block > group_size + group_size // 16:
        block //= 2
    count = -(-group_size // block)
    rows = 1 << (max(TILE // (block * count), 1).bit_length() - 1)
    held = rows * block * count
    warps = 4 if held <= 2560 else 8 if held <= 8192 else 16
    if not ahead or warps == 4:
        return Tiles(rows, block, count, warps, stages=1, programs=8)
    return Tiles(rows, block, count, warps, stages=1 + min(2, SHARED // (held * ahead)), programs=1)


@dataclass(frozen=True)
class Problem:
    """x, z, and what is added as (tokens, channels) in whatever rows; groups of channels, and options."""

    x: Tensor
    z: Tensor | None
    weight: Tensor
    group_size: int
    before: bool
    count: int  # channels of a whole group, wherever they are

    @property
    def ngroups(self) -> int:
        return self.x.shape[1] // self.group_size

    def new_sums(self) -> Tensor:
        return self.x.new_empty(len(self.x), self.ngroups, dtype=torch.float32)

    def workers(self, tiles: Tiles) -> int:
        """Programs of a group."""
        slots = device_limits(self.x.device)[1] * tiles.programs
        return max(1, min(-(-len(self.x) // tiles.rows), slots // self.ngroups))

    def backward_tiles(self, dy: Tensor, carried: Tensor | None = None) -> Tiles:
        tensors = (dy, self.x, self.z, carried)
        return tiles_for(self.group_size, sum(t.element_size() for t in tensors if t is not None))

    def describe(self, tiles: Tiles) -> dict[str, Any]:
        return {
            "grid": (self.workers(tiles) * self.ngroups,), "ntokens": len(self.x), "x_stride": self.x.stride(0),
            "z_stride": 0 if self.z is None else self.z.stride(0), "group_size": self.group_size,
            "ngroups": self.ngroups, "per_channel": 1 / self.count, "ROWS": tiles.rows, "BLOCK": tiles.block,
            "TILES": tiles.count, "STAGES": tiles.stages, "HAS_Z": self.z is not None, "BEFORE": self.before,
            "num_warps": tiles.warps,
        }  # fmt: skip

    @property
    def variant(self) -> tuple:
        z = None if self.z is None else (self.z.stride(0), self.z.dtype)
        return self.x.shape, self.x.stride(0), self.x.dtype, z, self.group_size, self.before, self.count


def make_problem(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, before: bool, count: int | None = None
) -> Problem:
    z = None if z is None else as_rows(z)
    return Problem(as_rows(x), z, weight.contiguous(), group_size, before, count or group_size)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., channels) -> (tokens, channels), channels side by side; a copy only where there is no such view."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def normalize(
    problem: Problem, eps: float, dtype: torch.dtype, squares: Tensor | None = None, added: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y in `dtype`, the scales and, where something is `added` to x first, the sums. squares: (tokens, ngroups), of
    whole groups; None: made here."""
    x, z = problem.x, problem.z
    tiles = tiles_for(problem.group_size)
    y, scale = x.new_empty(x.shape, dtype=dtype), problem.new_sums()
    total = x.new_empty(x.shape if added is not None else 0)
    launch(
        norm_kernel,
        (problem.variant, eps, squares is None, None if added is None else added.stride(0)),
        lambda: dict(
            **problem.describe(tiles), eps=eps, added_stride=0 if added is None else added.stride(0),
            HAS_ADDED=added is not None, SQUARES="here" if squares is None else "given",
        ),
        x_ptr=x, z_ptr=x if z is None else z, weight_ptr=problem.weight, y_ptr=y,
        added_ptr=x if added is None else added, sum_ptr=total,
        squares_ptr=scale if squares is None else squares.contiguous(), scale_ptr=scale,
    )  # fmt: skip
    return y, scale, total


def square_sums(problem: Problem) -> Tensor:
    """(tokens, ngroups): the sums of squares of what is normalised."""
    x, z, sums = problem.x, problem.z, problem.new_sums()
    launch(
        norm_kernel, (problem.variant, "only"),
        lambda: dict(
            **problem.describe(tiles_for(problem.group_size)), eps=0.0, added_stride=0, HAS_ADDED=False,
            SQUARES="only",
        ),
        x_ptr=x, z_ptr=x if z is None else z, weight_ptr=x, y_ptr=x, added_ptr=x, sum_ptr=x, squares_ptr=sums,
        scale_ptr=sums,
    )  # fmt: skip
    return sums


def normalize_backward(
    problem: Problem, dy: Tensor, scale: Tensor, products: Tensor | None = None, carried: Tensor | None = None,
    added_dtype: torch.dtype | None = None, into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """dx, with `carried` added, dweight, dz and, in `added_dtype`, dx again. products: (tokens, ngroups), of whole
    groups; None: made here. into: where dx goes, contiguous; it may be x."""
    x, z = problem.x, problem.z
    dy = as_rows(dy).contiguous()
    tiles = problem.backward_tiles(dy, carried)
    dx = x.new_empty(x.shape) if into is None or not into.is_contiguous() else into
    dz = None if z is None else z.new_empty(z.shape)
    d_added = x.new_empty(0 if added_dtype is None else x.shape, dtype=added_dtype)
    shares = x.new_empty(problem.workers(tiles), x.shape[1], dtype=torch.float32)
    launch(
        norm_backward_kernel,
        (problem.variant, dy.dtype, products is None, None if carried is None else carried.dtype, added_dtype),
        lambda: dict(
            **problem.describe(tiles), HAS_CARRIED=carried is not None, HAS_ADDED=added_dtype is not None,
            PRODUCTS="here" if products is None else "given",
        ),
        dy_ptr=dy, x_ptr=x, z_ptr=x if z is None else z, weight_ptr=problem.weight, scale_ptr=scale,
        products_ptr=scale if products is None else products.contiguous(),
        carried_ptr=x if carried is None else as_rows(carried).contiguous(), dx_ptr=dx, dz_ptr=dx if dz is None else dz,
        d_added_ptr=d_added, shares_ptr=shares,
    )  # fmt: skip
    return dx, shares.sum(0).to(problem.weight.dtype), dz, d_added


def product_sums(problem: Problem, dy: Tensor, scale: Tensor) -> Tensor:
    """(tokens, ngroups): the sums over channels of what is normalised times its gradient."""
    x, z, sums = problem.x, problem.z, problem.new_sums()
    dy = as_rows(dy).contiguous()
    launch(
        norm_backward_kernel, (problem.variant, dy.dtype, "only"),
        lambda: dict(
            **problem.describe(problem.backward_tiles(dy)), HAS_CARRIED=False, HAS_ADDED=False, PRODUCTS="only",
        ),
        dy_ptr=dy, x_ptr=x, z_ptr=x if z is None else z, weight_ptr=problem.weight, scale_ptr=scale,
        products_ptr=sums, carried_ptr=x, dx_ptr=x, dz_ptr=x, d_added_ptr=x, shares_ptr=scale,
    )  # fmt: skip
    return sums


@operator
def gated_rmsnorm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y in `dtype` and, for the backward pass, the scales, (tokens, ngroups)."""
    y, scale, _ = normalize(make_problem(x, z, weight, group_size, norm_before_gate), eps, dtype)
    return y.view(x.shape), scale


@fake(gated_rmsnorm)
def _(x, weight, z, eps, group_size, norm_before_gate, dtype):
    tokens = x.numel() // x.shape[-1]
    scale = x.new_empty(tokens, x.shape[-1] // group_size, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


@operator
def gated_rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, scale: Tensor, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and z (empty where that is None)."""
    problem = make_problem(x, z, weight, group_size, norm_before_gate)
    dx, dweight, dz, _ = normalize_backward(problem, dy, scale)
    return dx.view(x.shape), dweight, x.new_empty(0) if z is None or dz is None else dz.view(z.shape)


@fake(gated_rmsnorm_backward)
def _(dy, x, weight, z, scale, group_size, norm_before_gate):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(0) if z is None else z.new_empty(z.shape)


@gradients_of(gated_rmsnorm)
class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        x, weight, z, _, group_size, norm_before_gate, _ = inputs
        y, scale = without_gradients(gated_rmsnorm, inputs)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, z, scale)
        ctx.options = (group_size, norm_before_gate)
        return y, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, weight, z, scale = ctx.saved_tensors
        dx, dweight, dz = call(gated_rmsnorm_backward, dy, x, weight, z, scale, *ctx.options)
        return dx, dweight, None if z is None else dz, None, None, None, None


@operator
def add_rmsnorm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + added in `dtype`, the sum in the dtype of x, and the scales."""
    problem = make_problem(x, None, weight, x.shape[-1], False)
    y, scale, total = normalize(problem, eps, dtype, added=as_rows(added))
    return y.view(x.shape), total.view(x.shape), scale


@fake(add_rmsnorm)
def _(x, added, weight, eps, dtype):
    scale = x.new_empty(x.numel() // x.shape[-1], 1, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape), scale


@operator
def add_rmsnorm_backward(
    dy: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, added_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of what was added (empty where it is the same) and of weight."""
    again = None if added_dtype == total.dtype else added_dtype
    problem = make_problem(total, None, weight, total.shape[-1], False)
    dx, dweight, _, d_added = normalize_backward(problem, dy, scale, carried=d_total, added_dtype=again)
    return dx.view(total.shape), d_added if again is None else d_added.view(total.shape), dweight


@fake(add_rmsnorm_backward)
def _(dy, d_total, total, weight, scale, added_dtype):
    d_added = total.new_empty(0 if added_dtype == total.dtype else total.shape, dtype=added_dtype)
    return total.new_empty(total.shape), d_added, weight.new_empty(weight.shape)


@gradients_of(add_rmsnorm)
class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _, added, weight, _, _ = inputs
        y, total, scale = without_gradients(add_rmsnorm, inputs)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, scale)
        ctx.added_dtype = added.dtype
        return y, total, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_total, _):
        total, weight, scale = ctx.saved_tensors
        if dy is None:
            return d_total, None if d_total is None else d_total.to(ctx.added_dtype), None, None, None
        dx, d_added, dweight = call(add_rmsnorm_backward, dy, d_total, total, weight, scale, ctx.added_dtype)
        return dx, d_added if d_added.numel() else dx, dweight, None, None
