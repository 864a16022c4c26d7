"""The gated group RMS norm of Mamba-2."""

from .gated_rmsnorm import gated_rmsnorm, square_sums
from .reference import gated_rmsnorm_reference

__all__ = ["gated_rmsnorm", "gated_rmsnorm_reference", "square_sums"]
