"""The kernels as PyTorch operators: shapes for tracing, gradients, and nothing that a compiler cannot see through.

mamba2_dist::ssd_scan and mamba2_dist::ssd_state, with their gradients ssd_scan_backward and ssd_state_backward. All
are deterministic: no sum is taken in an order that may change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from .backward import backward
from .forward import entering_gradient, forward, leaving
from .problem import make_problem

_library = torch.library.Library("mamba2_dist", "DEF")


_functions: dict[Any, Callable] = {}
_differentiable: dict[Any, type[torch.autograd.Function]] = {}


def _operator(function: Callable) -> Any:
    """Defines mamba2_dist::<name of the function>. Unlike `torch.library.custom_op`, a call costs the host little: what
    that checks at every call, the tests check once."""
    name = function.__name__
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.mamba2_dist, name).default
    _functions[operator] = function
    return operator


def _gradients_of(operator: Any) -> Callable:
    """Decorates the autograd function of an operator."""

    def register(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        _library.impl(operator, function.apply, "Autograd")
        _differentiable[operator] = function
        return function

    return register


def call(operator: Any, *inputs: Any) -> Any:
    """The operator's results, past PyTorch's dispatcher where nothing there listens: that takes the host as long as
    launching the kernels."""
    if _is_heard(inputs):
        return operator(*inputs)
    if torch.is_grad_enabled() and operator in _differentiable:
        return _differentiable[operator].apply(*inputs)
    return _below_autograd(_functions[operator], inputs)


def _below_autograd(function: Callable, inputs: tuple) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return function(*inputs)


def _without_gradients(operator: Any, inputs: tuple) -> Any:
    """What an operator's autograd function calls."""
    return _below_autograd(operator if _is_heard(inputs) else _functions[operator], inputs)


def _is_heard(inputs: tuple) -> bool:
    """Whether a compiler, a mode, a transform, a profiler or a kind of tensor may want to know of the call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or any(isinstance(value, Tensor) and type(value) not in (Tensor, Parameter) for value in inputs)
    )


def _fake(operator: Any) -> Callable:
    """Decorates what gives the shapes of an operator's results."""
    return torch.library.register_fake(operator.name().removesuffix(".default"), lib=_library)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _states(x: Tensor, B: Tensor, count: int) -> Tensor:
    return x.new_empty(count, *x.shape[2:], B.shape[3], dtype=torch.float32)


@_operator
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


@_fake(ssd_scan)
def _(
    x, dt, A, B, C, D, z, dt_bias, initial_states, offsets, enters, leaves, final_count, dt_softplus, dt_min, dt_max,
    keep, keep_entering,
):  # fmt: skip
    ungated = _contiguous(x) if keep and z is not None else x.new_empty(0)
    return _contiguous(x), _states(x, B, final_count), ungated, A.new_empty(0)


@_operator
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


@_fake(ssd_scan_backward)
def _(
    dy, d_final, ungated, entering, x, dt, A, B, C, D, z, dt_bias, initial_states, offsets, enters, leaves,
    dt_softplus, dt_min, dt_max,
):  # fmt: skip
    optional = lambda like: x.new_empty(0) if like is None else _contiguous(like)  # noqa: E731
    d_initial = x.new_empty(0) if initial_states is None else _contiguous(initial_states).float()
    gradients = (_contiguous(tensor) for tensor in (x, dt, A, B, C))
    return *gradients, optional(D), optional(z), optional(dt_bias), d_initial


@_gradients_of(ssd_scan)
class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, _, dt_softplus, dt_min, dt_max, _, _ = inputs
        y, final, ungated, entering = _without_gradients(ssd_scan, inputs)
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


@_operator
def ssd_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, offsets: Tensor | None, leaves: Tensor | None,
    final_count: int, dt_softplus: bool, dt_min: float, dt_max: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states that documents leave when nothing enters, (final_count, nheads, headdim, d_state), and the logarithms
    of their total decays, (final_count, nheads)."""
    limits = (dt_min, dt_max)
    problem = make_problem(x, dt, A, B, None, dt_bias, dt_softplus, limits, offsets, None, leaves)
    return leaving(problem, final_count)


@_fake(ssd_state)
def _(x, dt, A, B, dt_bias, offsets, leaves, final_count, dt_softplus, dt_min, dt_max):
    return _states(x, B, final_count), x.new_empty(final_count, x.shape[2], dtype=torch.float32)


@_operator
def ssd_state_backward(
    d_final: Tensor, d_decay: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None,
    offsets: Tensor | None, leaves: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B and dt_bias (empty where that is None)."""
    limits = (dt_min, dt_max)
    problem = make_problem(x, dt, A, B, None, dt_bias, dt_softplus, limits, offsets, None, leaves)
    made = backward(problem, None, None, None, None, d_final, d_decay.contiguous())
    ddt_bias = x.new_empty(0) if dt_bias is None else made.ddt_bias.to(dt_bias.dtype)
    return made.dx.contiguous(), made.ddt, made.dA.to(A.dtype), made.dB.to(B.dtype).contiguous(), ddt_bias


@_fake(ssd_state_backward)
def _(d_final, d_decay, x, dt, A, B, dt_bias, offsets, leaves, dt_softplus, dt_min, dt_max):
    gradients = (_contiguous(tensor) for tensor in (x, dt, A, B))
    return *gradients, x.new_empty(0) if dt_bias is None else _contiguous(dt_bias)


@_gradients_of(ssd_state)
class _State(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, _, dt_softplus, dt_min, dt_max = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = (dt_softplus, dt_min, dt_max)
        return _without_gradients(ssd_state, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_final, d_decay):
        tensors = ctx.saved_tensors
        *gradients, ddt_bias = call(ssd_state_backward, d_final, d_decay, *tensors, *ctx.options)
        return *gradients, None if tensors[4] is None else ddt_bias, *[None] * 6


@_operator
def ssd_state_gradient(
    dy: Tensor, C: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor | None, offsets: Tensor | None, enters: Tensor | None,
    initial_count: int, dt_softplus: bool, dt_min: float, dt_max: float,
) -> Tensor:  # fmt: skip
    """The adjoint sweep: the gradient of the states entering documents, (initial_count, nheads, headdim, d_state), when
    nothing follows them."""
    limits = (dt_min, dt_max)
    problem = make_problem(dy, dt, A, C, C, dt_bias, dt_softplus, limits, offsets, enters, None)
    return entering_gradient(problem, initial_count)


@_fake(ssd_state_gradient)
def _(dy, C, dt, A, dt_bias, offsets, enters, initial_count, dt_softplus, dt_min, dt_max):
    return _states(dy, C, initial_count)


@_gradients_of(ssd_state_gradient)
class _StateGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        return _without_gradients(ssd_state_gradient, inputs)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("ssd_state_gradient is a gradient and has none of its own")
