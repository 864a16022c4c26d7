"""RMS norms: the gated group norm of Mamba-2, and that of a residual sum."""

from .gated_rmsnorm import PartOfGroups, add_rmsnorm, gated_rmsnorm, square_sums
from .reference import gated_rmsnorm_reference

__all__ = ["PartOfGroups", "add_rmsnorm", "gated_rmsnorm", "gated_rmsnorm_reference", "square_sums"]
