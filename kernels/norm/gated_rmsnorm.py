"""RMS norms of groups of channels: gated, as after the SSD operator, and of a sum, as before a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.backend import Backend, takes_triton
from ..common.checks import check_device, check_divisible, check_shape


@dataclass(frozen=True)
class PartOfGroups:
    """What a norm must know of groups of channels that are not all here.

    squares: (..., groups) float32 or wider, the sums of squares over whole groups of what is normalised; see
    `square_sums`. size: channels of a whole group. complete: takes sums over the channels here to sums over whole
    groups, and is called in the backward pass.
    """

    squares: Tensor
    size: int
    complete: Callable[[Tensor], Tensor]


def gated_rmsnorm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    part: PartOfGroups | None = None,
    overwrite_x: bool = False,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """weight rmsnorm(x silu(z)), or weight rmsnorm(x) silu(z) with `norm_before_gate`.

    x, z: (..., channels); weight: (channels,); `group_size` consecutive channels share one norm (None: all of them),
    with `part` as many of each group as are here.
    overwrite_x: the backward pass may write over the x that autograd gives it. For callers whose saved-tensor hooks
    give one that is nobody else's.
    dtype: of the result; None: that of x. Computed in float32 or wider.
    Raises ValueError for shapes that do not fit.
    """
    group_size = _check(x, weight, z, group_size)
    dtype = dtype or x.dtype
    if part is not None:
        axes = "(..., channels / group_size)"
        check_shape("part.squares", part.squares, (*x.shape[:-1], x.shape[-1] // group_size), axes)
        check_device("part.squares", part.squares, x.device)
    if part is not None or overwrite_x:
        return _NormBySteps.apply(x, weight, z, part, overwrite_x, eps, group_size, norm_before_gate, dtype, backend)
    if takes_triton(backend, x):
        from .gpu import ops

        return ops.call(ops.gated_rmsnorm, x, weight, z, eps, group_size, norm_before_gate, dtype)[0]
    value = _gated(x, None if norm_before_gate else z).unflatten(-1, (-1, group_size))
    return _scaled(value, value.square().sum(-1), group_size, weight, z if norm_before_gate else None, eps).to(dtype)


def add_rmsnorm(
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """weight rmsnorm(x + added), and the sum in the dtype of x.

    x, added: (..., channels), of any two dtypes; weight: (channels,). dtype: of the norm; None: that of x.
    Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, None, None)
    check_shape("added", added, x.shape, "(..., channels)")
    check_device("added", added, x.device)
    dtype = dtype or x.dtype
    if takes_triton(backend, x):
        from .gpu import ops

        y, total, _ = ops.call(ops.add_rmsnorm, x, added, weight, eps, dtype)
        return y, total
    total = (x + added).to(x.dtype)
    return gated_rmsnorm(total, weight, eps=eps, dtype=dtype, backend=backend), total


def square_sums(
    x: Tensor,
    z: Tensor | None = None,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Sums of squares of what `gated_rmsnorm` normalises, (..., channels / group_size), float32 or wider.

    For `PartOfGroups`, whose norm has their gradient: they have none here.
    """
    group_size = _check(x, None, z, group_size)
    if takes_triton(backend, x):
        from .gpu import ops

        return ops.square_sums(ops.make_problem(x, z, x, group_size, norm_before_gate)).view(
            *x.shape[:-1], x.shape[-1] // group_size
        )
    value = _gated(x.detach(), None if norm_before_gate or z is None else z.detach())
    return _squares(value, group_size)


class _NormBySteps(torch.autograd.Function):
    """The norm whose sums are completed elsewhere, or whose input may be overwritten."""

    @staticmethod
    def forward(ctx, x, weight, z, part, overwrite_x, eps, group_size, norm_before_gate, dtype, backend):
        squares = None if part is None else part.squares
        size = group_size if part is None else part.size
        ctx.complete = None if part is None else part.complete
        ctx.overwrite_x, ctx.eps, ctx.size, ctx.options = overwrite_x, eps, size, (group_size, norm_before_gate)
        ctx.triton = takes_triton(backend, x)
        if ctx.triton:
            from .gpu import ops

            problem = ops.make_problem(x, z, weight, group_size, norm_before_gate, size)
            y, scale, _ = ops.normalize(problem, eps, dtype, squares)
        else:
            if squares is None:
                squares = square_sums(x, z, group_size=group_size, norm_before_gate=norm_before_gate, backend="torch")
            y = _with_squares(x, weight, z, squares, size, eps, group_size, norm_before_gate).to(dtype)
            scale = squares
        ctx.save_for_backward(x, weight, z, scale)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, z, scale = ctx.saved_tensors
        complete = ctx.complete
        if not ctx.triton:
            return *_gradients(x, weight, z, scale, complete, dy, ctx.size, ctx.eps, *ctx.options), *[None] * 7
        from .gpu import ops

        problem = ops.make_problem(x, z, weight, *ctx.options, ctx.size)
        products = None if complete is None else complete(ops.product_sums(problem, dy, scale))
        into = problem.x if ctx.overwrite_x else None
        dx, dweight, dz, _ = ops.normalize_backward(problem, dy, scale, products, into=into)
        return dx.view(x.shape), dweight, None if dz is None else dz.view(x.shape), *[None] * 7


def _gradients(x, weight, z, squares, complete, dy, size, eps, group_size, norm_before_gate) -> list[Tensor | None]:
    """Of x, weight and z: where groups are elsewhere too, as if the sums of squares were given, and through these."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, z) if tensor is not None]
        x, weight, z = (*leaves, None)[:3]
        if complete is None:
            options = {"group_size": group_size, "norm_before_gate": norm_before_gate, "dtype": dy.dtype}
            y = gated_rmsnorm(x, weight, z, eps=eps, backend="torch", **options)
            gradients = list(torch.autograd.grad(y, leaves, dy))
        else:
            squares = squares.detach().requires_grad_()
            y = _with_squares(x, weight, z, squares, size, eps, group_size, norm_before_gate)
            *direct, d_squares = torch.autograd.grad(y, [*leaves, squares], dy.to(y.dtype))
            here = _squares(_gated(x, None if norm_before_gate else z), group_size)
            unused = {"allow_unused": True, "materialize_grads": True}
            through = torch.autograd.grad(here, leaves, complete(d_squares), **unused)
            gradients = [a + b for a, b in zip(direct, through, strict=True)]
    return [*gradients, *[None] * (3 - len(leaves))]


def _with_squares(x, weight, z, squares, size, eps, group_size, norm_before_gate) -> Tensor:
    value = _gated(x, None if norm_before_gate else z).unflatten(-1, (-1, group_size))
    return _scaled(value, squares, size, weight, z if norm_before_gate else None, eps)


def _squares(value: Tensor, group_size: int) -> Tensor:
    return value.square().unflatten(-1, (-1, group_size)).sum(-1)


def _scaled(value: Tensor, squares: Tensor, size: int, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    y = (value * torch.rsqrt(squares / size + eps)[..., None]).flatten(-2) * weight
    return y if gate is None else y * F.silu(gate.to(y.dtype))


def _gated(x: Tensor, z: Tensor | None) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if z is None else x * F.silu(z.to(x.dtype))


def _check(x: Tensor, weight: Tensor | None, z: Tensor | None, group_size: int | None) -> int:
    channels = x.shape[-1]
    group_size = channels if group_size is None else group_size
    check_divisible("channels", channels, "group_size", group_size)
    if weight is not None:
        check_shape("weight", weight, (channels,), "(channels,)")
        check_device("weight", weight, x.device)
    if z is not None:
        check_shape("z", z, x.shape, "(..., channels)")
        check_device("z", z, x.device)
    return group_size
