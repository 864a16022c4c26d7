"""The definition of the gated group RMS norm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rmsnorm_reference(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """rmsnorm(x silu(z)) weight, or rmsnorm(x) weight silu(z) with `norm_before_gate`, written out group by group."""
    width = x.shape[-1]
    group_size = width if group_size is None else group_size
    gate = torch.ones_like(x) if z is None else F.silu(z)
    value = x if norm_before_gate else x * gate
    groups = [
        group / torch.sqrt(group.square().mean(-1, keepdim=True) + eps) for group in value.split(group_size, dim=-1)
    ]
    y = torch.cat(groups, dim=-1) * weight
    return y * gate if norm_before_gate else y
