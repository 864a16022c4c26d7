"""Argument checks that name the argument, what was expected and what came."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], axes: str) -> None:
    """Raise ValueError unless `tensor` has `shape`; `axes` names its axes, as in "(batch, seqlen)"."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {axes} = {tuple(shape)}, got {tuple(tensor.shape)}")


def check_ndim(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless `tensor` has as many axes as `axes` names."""
    expected = axes.count(",") + 1
    if tensor.ndim != expected:
        raise ValueError(f"{name} must have {expected} axes {axes}, got shape {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is on `device`, where x is."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of x ({device}), got {tensor.device}")


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError unless `divisor` divides `value`."""
    if divisor <= 0 or value % divisor != 0:
        raise ValueError(f"{name} ({value}) must be divisible by {divisor_name} ({divisor})")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is above zero and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0{' and finite' if value > 0 else ''}, got {value}")


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_integer(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is of an integer type, of Python, NumPy or PyTorch."""
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
