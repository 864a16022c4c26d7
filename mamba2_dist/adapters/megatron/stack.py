"""Megatron's stack of layers, also without TransformerEngine and with full recomputation in every version."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from mamba2_dist.config import require

from .layout import Layout
from .norm import Norm
from .refusals import check_config
from .versions import HAVE_TE, HybridStack, version

RECOMPUTES = importlib.util.find_spec("megatron.core.recompute") is not None
"""Whether the stack itself heeds recompute_granularity 'full'; before 0.18 it ignores it."""


class Stack(HybridStack):  # type: ignore[misc, valid-type]
    """megatron-core's own stack but for the last norm, where TransformerEngine is missing, and full recomputation."""

    def __init__(
        self,
        config: Any,
        submodules: Any,
        *args: Any,
        post_layer_norm: bool = True,
        layout: Layout = "megatron",
        use_te: bool = HAVE_TE,
        **kwargs: Any,
    ):
        check_config(config)  # before any layer is built, and on stages without Mamba-2 layers too
        super().__init__(config, submodules, *args, post_layer_norm=post_layer_norm and use_te, **kwargs)
        if post_layer_norm and not use_te:
            self.post_layer_norm = True
            if self.post_process:
                self.final_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        if config.recompute_granularity == "full" and not RECOMPUTES:
            for layer in self.layers[: _recomputed_layers(config, len(self.layers))]:
                layer.forward = _Recomputed(layer, layer.forward)
        require(
            use_te or "E" not in self.layer_type_list or RECOMPUTES,
            f"MoE layers of megatron-core {version} need TransformerEngine; install it, or take 0.18 or newer",
        )
        require(
            use_te or not getattr(config, "moe_grouped_gemm", False),
            "moe_grouped_gemm (True) needs TransformerEngine; leave it off",
        )
        self.own_layout = layout != "megatron" and config.context_parallel_size > 1
        foreign = {layer for layer in self.layer_type_list if layer not in ("M-E" if use_te else "M*-E")}
        require(
            not self.own_layout or not (foreign or getattr(config, "mtp_num_layers", None)),
            f"layout ({layout}) is not the one that layers {' '.join(sorted(foreign)) or 'for several tokens'} of "
            "Megatron's work with over cp; leave it at 'megatron', or for attention give use_te=False to hybrid_stack",
        )

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """As Megatron's. Raises ValueError for rotary embeddings, which come cut in its own layout, with another."""
        require(
            rotary_pos_emb is None or not self.own_layout,
            "rotary embeddings come as Megatron cuts sequences over cp; leave layout at 'megatron', or set "
            "position_embedding_type to 'none'",
        )
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


def _recomputed_layers(config: Any, layers: int) -> int:
    """How many of a stage's layers are recomputed, each by itself."""
    each = config.recompute_num_layers
    if config.recompute_method == "block":
        return each
    require(
        each == 1,
        f"recompute_num_layers ({each}) with recompute_method 'uniform' must be 1 in megatron-core {version}; "
        "take 0.18 or newer for more",
    )
    return layers


class _Recomputed:
    """A layer's forward that keeps its input alone, and is run again in the backward pass."""

    def __init__(self, layer: Any, forward: Callable[..., Any]):
        self.layer, self.forward = layer, forward

    def __call__(self, hidden_states: Tensor, **others: Any) -> Any:
        def run(hidden_states: Tensor) -> Any:
            return self.forward(hidden_states=hidden_states, **others)

        if not (self.layer.training and torch.is_grad_enabled()):
            return run(hidden_states)
        return tensor_parallel.checkpoint(run, self.layer.config.distribute_saved_activations, hidden_states)
