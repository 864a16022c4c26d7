"""Mamba-2 layers for megatron-core 0.16 to 0.19: `--spec mamba2_dist.adapters.megatron hybrid_stack_spec`."""

from .flops import training_flops
from .layout import Layout, segment_table
from .mixer import MegatronMamba2Mixer
from .model import hybrid_model
from .optimizer import prepare_optimizer
from .spec import hybrid_stack, hybrid_stack_spec

mamba_stack_spec = hybrid_stack_spec
"""The name before 0.18."""

__all__ = [
    "Layout",
    "MegatronMamba2Mixer",
    "hybrid_model",
    "hybrid_stack",
    "hybrid_stack_spec",
    "mamba_stack_spec",
    "prepare_optimizer",
    "segment_table",
    "training_flops",
]
