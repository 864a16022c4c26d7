"""The names that moved between megatron-core 0.16 and 0.19."""

import megatron.core
from megatron.core.extensions import transformer_engine

version: str = megatron.core.__version__
HAVE_TE: bool = transformer_engine.HAVE_TE

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stock_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # before 0.18
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as stock_stack_spec
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack

__all__ = ["HAVE_TE", "HybridModel", "HybridStack", "stock_stack_spec", "version"]
