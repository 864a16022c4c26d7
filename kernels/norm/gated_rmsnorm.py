"""The gated group RMS norm after the SSD operator, and its two halves for groups that span several devices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import check_divisible, check_shape


def square_sums(x: Tensor, z: Tensor | None = None, *, group_size: int | None = None, norm_before_gate: bool = False):
    """Sums of squares of what `gated_rmsnorm` normalises, (..., channels / group_size), float32 or wider."""
    value = _gated(x, None if norm_before_gate else z)
    return value.square().unflatten(-1, (-1, group_size or x.shape[-1])).sum(-1)


def gated_rmsnorm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    square_sum: Tensor | None = None,
    square_count: int | None = None,
) -> Tensor:
    """weight rmsnorm(x silu(z)), or weight rmsnorm(x) silu(z) with `norm_before_gate`.

    x, z: (..., channels); weight: (channels,); `group_size` consecutive channels share one norm (None: all of them).
    square_sum: (..., channels / group_size), the sums of squares where a group has channels elsewhere, and
    square_count, how many channels a whole group has. None: taken from x.
    Computed in float32 or wider and returned like x. Raises ValueError for shapes that do not fit.
    """
    channels = x.shape[-1]
    group_size = channels if group_size is None else group_size
    check_divisible("channels", channels, "group_size", group_size)
    check_shape("weight", weight, (channels,), "(channels,)")
    if z is not None:
        check_shape("z", z, x.shape, "(..., channels)")
    if square_sum is not None:
        check_shape("square_sum", square_sum, (*x.shape[:-1], channels // group_size), "(..., channels / group_size)")
    value = _gated(x, None if norm_before_gate else z).unflatten(-1, (-1, group_size))
    if square_sum is None:
        square_sum = value.square().sum(-1)
    scale = torch.rsqrt(square_sum / (square_count or group_size) + eps)
    y = (value * scale[..., None]).flatten(-2) * weight
    if norm_before_gate and z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def _gated(x: Tensor, z: Tensor | None) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if z is None else x * F.silu(z.to(x.dtype))
