"""The gated RMS norm where a group of channels spans tensor-parallel ranks."""

from torch import Tensor

from mamba2_dist.kernels.norm import gated_rmsnorm, square_sums

from .collectives import all_reduce
from .groups import Group


def gated_rmsnorm_over_ranks(
    x: Tensor, weight: Tensor, z: Tensor, group: Group, *, eps: float, group_size: int, norm_before_gate: bool = False
) -> Tensor:
    """`gated_rmsnorm` whose groups have `group_size` channels in all, spread over `group`; sums squares over it.

    x, z: (..., channels/tp); with a group of one rank the channels hold whole groups.
    """
    local_size = group_size // group.size
    square_sum = None
    if group.size > 1:
        square_sum = square_sums(x, z, group_size=local_size, norm_before_gate=norm_before_gate)
        square_sum = all_reduce(square_sum, group)
    return gated_rmsnorm(
        x, weight, z, eps=eps, group_size=local_size, norm_before_gate=norm_before_gate,
        square_sum=square_sum, square_count=group_size,
    )  # fmt: skip
