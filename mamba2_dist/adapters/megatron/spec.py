"""What Megatron's model builder is given: the stack of layers, as a `ModuleSpec`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from mamba2_dist.modules.recompute import Recompute
from mamba2_dist.parallel.attention import AttentionMethod
from mamba2_dist.parallel.cost_model import H200, Machine
from mamba2_dist.parallel.state_scan import StateScan

from .attention import CoreAttention
from .layout import Layout
from .mixer import MegatronMamba2Mixer
from .norm import Norm
from .stack import Stack
from .versions import HAVE_TE, stock_stack_spec


def hybrid_stack(
    *,
    state_scan: StateScan = "auto",
    recompute: Recompute = "conv",
    layout: Layout = "megatron",
    attention: AttentionMethod = "auto",
    machine: Machine = H200,
    use_te: bool = HAVE_TE,
    **mixer: Any,
) -> ModuleSpec:
    """Megatron's hybrid stack with this library's Mamba-2 mixer; every other layer stays as it is.

    Without TransformerEngine (use_te) attention and MLP layers are Megatron's with its plain projections, with this
    library's attention and norms. Checkpoints have the same keys either way.
    recompute: "conv", as Megatron's own mixer does, "none" or "inner"; see `Mamba2Mixer`. attention: how keys travel
    over cp, without TransformerEngine. mixer: further arguments of `MegatronMamba2Mixer`, such as dt_limit.
    """
    shared: dict[str, Any] = {"layout": layout, "machine": machine}
    params = {"state_scan": state_scan, "recompute": recompute, **shared, **mixer}
    layers = {} if use_te else _plain_layers(partial(CoreAttention, method=attention, **shared))
    submodules = replace(stock_stack_spec.submodules, mamba_layer=_mamba_layer(params), **layers)
    return ModuleSpec(module=Stack, params={"layout": layout, "use_te": use_te}, submodules=submodules)


def _mamba_layer(params: dict[str, Any]) -> ModuleSpec:
    stock = stock_stack_spec.submodules.mamba_layer
    submodules = MambaLayerSubmodules(
        norm=Norm,
        mixer=ModuleSpec(module=MegatronMamba2Mixer, params=params),
        mamba_bda=stock.submodules.mamba_bda,
        # stored where TransformerEngine's projection, which has a norm inside, stores it
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    return replace(stock, submodules=submodules)


def _plain_layers(core_attention: Callable[..., Any]) -> dict[str, ModuleSpec]:
    """Attention, MLP and MoE layers without TransformerEngine."""
    stock = stock_stack_spec.submodules
    attention = stock.attention_layer.submodules
    projections = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=core_attention, linear_proj=RowParallelLinear
    )
    attention = replace(
        attention,
        input_layernorm=Norm,
        self_attention=replace(attention.self_attention, submodules=projections),
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp = stock.mlp_layer.submodules
    mlp = replace(
        mlp,
        pre_mlp_layernorm=Norm,
        mlp=_with_submodules(mlp.mlp, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    experts = get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False)
    moe = replace(stock.moe_layer.submodules, pre_mlp_layernorm=Norm, mlp=experts)
    layers = {"attention_layer": attention, "mlp_layer": mlp, "moe_layer": moe}
    return {name: replace(getattr(stock, name), submodules=submodules) for name, submodules in layers.items()}


def _with_submodules(spec: Any, submodules: Any) -> Any:
    """The same with other submodules; from 0.18 on it is a function that builds."""
    if isinstance(spec, ModuleSpec):
        return replace(spec, submodules=submodules)
    return partial(spec.func, *spec.args, **{**spec.keywords, "submodules": submodules})


hybrid_stack_spec = hybrid_stack()
"""For `--spec mamba2_dist.adapters.megatron hybrid_stack_spec`."""
