"""Functions on tensors as PyTorch operators: shapes for tracing, gradients, nothing that a compiler cannot follow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_library = torch.library.Library("mamba2_dist", "DEF")


_functions: dict[Any, Callable] = {}
_differentiable: dict[Any, type[torch.autograd.Function]] = {}


def operator(function: Callable) -> Any:
    """Defines mamba2_dist::<name of the function>. Unlike `torch.library.custom_op`, a call costs the host little: what
    that checks at every call, the tests check once."""
    name = function.__name__
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    made = getattr(torch.ops.mamba2_dist, name).default
    _functions[made] = function
    return made


def gradients_of(of: Any) -> Callable:
    """Decorates the autograd function of an operator."""

    def register(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        _library.impl(of, function.apply, "Autograd")
        _differentiable[of] = function
        return function

    return register


def call(made: Any, *inputs: Any) -> Any:
    """The operator's results, past PyTorch's dispatcher where nothing there listens: that takes the host as long as
    launching the kernels."""
    if _is_heard(inputs):
        return made(*inputs)
    if torch.is_grad_enabled() and made in _differentiable:
        return _differentiable[made].apply(*inputs)
    return _below_autograd(_functions[made], inputs)


def _below_autograd(function: Callable, inputs: tuple) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return function(*inputs)


def without_gradients(made: Any, inputs: tuple) -> Any:
    """What an operator's autograd function calls."""
    return _below_autograd(made if _is_heard(inputs) else _functions[made], inputs)


def _is_heard(inputs: tuple) -> bool:
    """Whether a compiler, a mode, a transform, a profiler or a kind of tensor may want to know of the call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or any(isinstance(value, Tensor) and type(value) not in (Tensor, Parameter) for value in inputs)
    )


def fake(of: Any) -> Callable:
    """Decorates what gives the shapes of an operator's results."""
    return torch.library.register_fake(of.name().removesuffix(".default"), lib=_library)
