"""The state space duality (SSD) operator of Mamba-2."""

from .combined import mamba_chunk_scan_combined
from .reference import discretize, ssd_matrix, ssd_recurrence
from .span import SerialSpan, SSDSpan

__all__ = ["SSDSpan", "SerialSpan", "discretize", "mamba_chunk_scan_combined", "ssd_matrix", "ssd_recurrence"]
