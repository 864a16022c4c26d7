"""The gated RMS norm where a group of channels spans tensor-parallel ranks."""

from collections.abc import Callable

from torch import Tensor

from mamba2_dist.kernels.norm import PartOfGroups, gated_rmsnorm, square_sums

from .collectives import sum_over
from .groups import Group


def gated_rmsnorm_over_ranks(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    group: Group,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    overwrite_x: bool = False,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`gated_rmsnorm` whose groups have `group_size` channels in all, spread over `group`; sums squares over it.

    x, z: (..., channels/tp); with a group of one rank the channels hold whole groups. overwrite_x: as in
    `gated_rmsnorm`. Also returns what gives the same result of the same x again without communicating.
    """
    size = group_size // group.size
    part = None
    if group.size > 1:
        squares = square_sums(x, z, group_size=size, norm_before_gate=norm_before_gate)
        part = PartOfGroups(sum_over(squares, group), group_size, lambda sums: sum_over(sums, group))

    def norm(x: Tensor) -> Tensor:
        return gated_rmsnorm(
            x, weight, z,
            eps=eps, group_size=size, norm_before_gate=norm_before_gate, part=part, overwrite_x=overwrite_x,
        )  # fmt: skip

    return norm(x), norm
