"""The kernels as PyTorch operators: shapes for tracing, gradients, and nothing that a compiler cannot see through.

mamba2_dist::ssd_scan and its gradient, ssd_scan_backward. Both are deterministic: no sum is taken in an order that may
change.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...common.operators import call, fake, gradients_of, operator, without_gradients
from .backward import backward
from .forward import forward
from .problem import make_problem


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _states(x: Tensor, B: Tensor, count: int) -> Tensor:
    return x.new_empty(count, *x.shape[2:], B.shape[3], dtype=torch.float32)


@operator
def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, offsets: Tensor | None, enters: Tensor | None, leaves: Tensor | None,
    final_count: int, dt_softplus: bool, dt_min: float, dt_max: float, keep: bool, keep_entering: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, `final_count` final states and, to `keep` for the backward pass, y before the gate and the states entering the
    spans of cut documents, float32, or nothing: where there are none, and without `keep_entering`, which tracing must
    leave out as it does not know their number; the backward pass then computes them again.

    offsets, enters and leaves are on the host; see `make_problem`.
    """
    limits = (dt_min, dt_max)
    problem = make_problem(x, dt, A, B, C, dt_bias, dt_softplus, limits, offsets, enters, leaves)
    y, final, ungated, entering = forward(problem, D, z, initial_states, final_count, keep)
    if entering is None or not keep_entering:
        entering = A.new_empty(0)
    return y.contiguous(), final, x.new_empty(0) if ungated is None else ungated.contiguous(), entering


@fake(ssd_scan)
def _(
    x, dt, A, B, C, D, z, dt_bias, initial_states, offsets, enters, leaves, final_count, dt_softplus, dt_min, dt_max,
    keep, keep_entering,
):  # fmt: skip
    ungated = _contiguous(x) if keep and z is not None else x.new_empty(0)
    return _contiguous(x), _states(x, B, final_count), ungated, A.new_empty(0)


@operator
def ssd_scan_backward(
    dy: Tensor | None, d_final: Tensor | None, ungated: Tensor, entering: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, offsets: Tensor | None, enters: Tensor | None, leaves: Tensor | None,
    dt_softplus: bool, dt_min: float, dt_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states; empty for those that are None."""
    none = lambda: x.new_empty(0)  # noqa: E731
    limits = (dt_min, dt_max)
    problem = make_problem(x, dt, A, B, C, dt_bias, dt_softplus, limits, offsets, enters, leaves)
    gate = None if z is None else (ungated, z)
    made = backward(problem, D, initial_states, entering if entering.numel() else None, dy, d_final, gate=gate)
    return (
        made.dx.contiguous(),
        made.ddt,
        made.dA.to(A.dtype),
        made.dB.to(B.dtype).contiguous(),
        _contiguous(C).zero_() if made.dC is None else made.dC.to(C.dtype).contiguous(),
        none() if D is None else made.dD.to(D.dtype),
        none() if z is None else _contiguous(z).zero_() if made.dz is None else made.dz.to(z.dtype).contiguous(),
        none() if dt_bias is None else made.ddt_bias.to(dt_bias.dtype),
        none() if made.d_initial is None else made.d_initial,
    )


@fake(ssd_scan_backward)
def _(
    dy, d_final, ungated, entering, x, dt, A, B, C, D, z, dt_bias, initial_states, offsets, enters, leaves,
    dt_softplus, dt_min, dt_max,
):  # fmt: skip
    optional = lambda like: x.new_empty(0) if like is None else _contiguous(like)  # noqa: E731
    d_initial = x.new_empty(0) if initial_states is None else _contiguous(initial_states).float()
    gradients = (_contiguous(tensor) for tensor in (x, dt, A, B, C))
    return *gradients, optional(D), optional(z), optional(dt_bias), d_initial


@gradients_of(ssd_scan)
class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, _, dt_softplus, dt_min, dt_max, _, _ = inputs
        y, final, ungated, entering = without_gradients(ssd_scan, inputs)
        ctx.mark_non_differentiable(ungated, entering)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ungated, entering, *tensors)
        ctx.options = (dt_softplus, dt_min, dt_max)
        return y, final, ungated, entering

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final, *_):
        ungated, entering, *tensors = ctx.saved_tensors
        if dy is None and d_final is None:
            return (None,) * 18
        made = call(ssd_scan_backward, dy, d_final, ungated, entering, *tensors, *ctx.options)
        gradients = [
            gradient if tensor is not None else None for gradient, tensor in zip(made, tensors[:9], strict=True)
        ]
        if gradients[8] is not None:
            gradients[8] = gradients[8].to(tensors[8].dtype)
        return *gradients, *[None] * 9
