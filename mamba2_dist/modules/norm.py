"""RMS norms with their weights."""

from collections.abc import Callable

from torch import Tensor, nn

from mamba2_dist.kernels.norm import add_rmsnorm, gated_rmsnorm
from mamba2_dist.parallel.collectives import replicate
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.norm import gated_rmsnorm_over_ranks
from mamba2_dist.parallel.partition import Partition, replicated

from . import init
from .base import PartitionedModule
from .linear import autocast_dtype


class RMSNorm(PartitionedModule):
    """x / sqrt(mean(x^2) + eps) * weight; under sequence parallelism every tp rank norms its own tokens."""

    weight: nn.Parameter

    def __init__(self, width: int, eps: float, tp: Group, *, sequence_parallel: bool = False, **factory):
        super().__init__()
        self.eps, self.tp, self.sequence_parallel = eps, tp, sequence_parallel
        self.add_parameter("weight", replicated(width, tp.size), init.ones, **factory)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(..., width) -> the norm of x + added, in the dtype of autocast where that is on, and the sum."""
        weight = replicate(self.weight, self.tp) if self.sequence_parallel else self.weight
        dtype = autocast_dtype(x)
        if added is None:
            return gated_rmsnorm(x, weight, eps=self.eps, dtype=dtype), x
        return add_rmsnorm(x, added, weight, eps=self.eps, dtype=dtype)


class GatedRMSNorm(PartitionedModule):
    """The gated norm of Mamba-2: one norm per group of channels, which may span ranks.

    group_size: channels of a whole group; group: the ranks that share one.
    """

    weight: nn.Parameter

    def __init__(
        self, partition: Partition, group: Group, *, eps: float, group_size: int, norm_before_gate: bool, **factory
    ):
        super().__init__()
        self.group, self.eps = group, eps
        self.group_size, self.norm_before_gate = group_size, norm_before_gate
        self.add_parameter("weight", partition, init.ones, **factory)

    def forward(self, x: Tensor, z: Tensor, *, overwrite_x: bool = False) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """x, z: (batch, seqlen/cp, d_inner/tp) -> the same; and what gives that of x again without communicating.

        overwrite_x: as in `gated_rmsnorm`.
        """
        return gated_rmsnorm_over_ranks(
            x, self.weight, z, self.group,
            eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate, overwrite_x=overwrite_x,
        )  # fmt: skip
