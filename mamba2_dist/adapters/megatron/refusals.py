"""What Megatron can be asked for and these layers cannot do, refused where the model is built."""

from typing import Any

import torch

from mamba2_dist.config import require


def device_of(config: Any) -> torch.device:
    """Where Megatron wants a module's parameters."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.device(torch.cuda.current_device())


def check_config(config: Any) -> None:
    """Raise ValueError for what a `TransformerConfig` asks of a Mamba-2 layer that it does not do."""

    def off(field: str, remedy: str, *allowed: Any) -> None:
        value = getattr(config, field, None)  # versions differ in their fields
        ok = not value or value in allowed
        require(ok, f"{field} ({value}) is not supported by this Mamba-2 mixer; {remedy}")

    stock = "leave it off, or keep Megatron's own mixer"
    for field in ("fp8", "fp4"):
        off(field, f"its projections compute in bf16, fp16 or fp32: {stock}")
    off("tp_comm_overlap", f"its collectives follow the projections: {stock}")
    off("delay_wgrad_compute", stock)
    off("cpu_offloading", "set cpu_offloading_num_layers to 0 and give recompute='inner' to hybrid_stack")
    off("fine_grained_activation_offloading", "leave it off and give recompute='inner' to hybrid_stack")
    off("init_model_with_meta_device", "leave it off, its parameters are drawn when they are made")
    off("mamba_training_ssm_states_dtype", "leave it empty: states are float32", torch.float32, "float32")
    off("gtp_weight_remat_size", "leave it at 1", 1)
    off("hybrid_context_parallel", "leave it off: its ranks of cp do not change")
    off("dynamic_context_parallel", "leave it off: its ranks of cp do not change")
    require(
        config.use_mamba_mem_eff_path,
        "use_mamba_mem_eff_path (False) is not supported by this Mamba-2 mixer, which has one path; leave it on",
    )
    _check_graphs(config)
    require(
        config.recompute_granularity != "full"
        or not config.distribute_saved_activations
        or not config.sequence_parallel,
        "distribute_saved_activations needs sequence_parallel off; leave it off, as inputs are split already",
    )


def _check_graphs(config: Any) -> None:
    kind = getattr(config, "cuda_graph_impl", "none")
    modules = getattr(config, "cuda_graph_modules", None)
    if modules is None:
        modules = getattr(config, "cuda_graph_scope", None) or []
    names = [getattr(module, "name", str(module)) for module in modules]
    captured = kind != "none" and (not names or {"mamba", "full_iteration"} & set(names))
    flags = [flag for flag in ("enable_cuda_graph", "external_cuda_graph") if getattr(config, flag, False)]
    require(
        not captured and (not flags or kind != "none"),
        f"cuda_graph_impl ({kind}) with modules {names} would capture Mamba-2 layers, whose documents change with the "
        "batch; choose modules without mamba, such as attn",
    )


def check_mixer(*, rmsnorm: bool, dt_init: str, dt_scale: float, bias: bool, conv_bias: bool, unknown: dict) -> None:
    """Raise ValueError for arguments of Megatron's mixer that this one does not have."""
    require(rmsnorm, "rmsnorm (False) is not supported by this Mamba-2 mixer; leave it on")
    require(dt_init == "random", f"dt_init ({dt_init}) must be 'random'")
    require(dt_scale == 1.0, f"dt_scale ({dt_scale}) has no effect in Megatron's mixer; leave it at 1.0")
    require(not bias, "bias (True) is not supported by this Mamba-2 mixer; leave it off")
    require(conv_bias, "conv_bias (False) is not supported by this Mamba-2 mixer; leave it on")
    given = sorted(name for name, value in unknown.items() if value is not None)
    require(not given, f"this Mamba-2 mixer does not know {', '.join(given)}; leave them out of the spec's params")
