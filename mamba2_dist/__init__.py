"""Tensor- and sequence-parallel Mamba-2 blocks and hybrid language models."""

from .config import AttentionConfig, HybridConfig, Mamba2Config, MLPConfig, ParallelConfig
from .models import presets
from .models.hybrid_model import HybridModel
from .models.parts import backward_in_parts
from .modules.mixer import Mamba2Mixer
from .parallel.groups import ParallelGroups
from .parallel.segments import SegmentTable, rows_between

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "HybridConfig",
    "HybridModel",
    "MLPConfig",
    "Mamba2Config",
    "Mamba2Mixer",
    "ParallelConfig",
    "ParallelGroups",
    "SegmentTable",
    "backward_in_parts",
    "presets",
    "rows_between",
]
