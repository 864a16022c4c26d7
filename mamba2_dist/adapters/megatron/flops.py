"""Floating-point work of a hybrid in Megatron's terms."""

from typing import Any

from mamba2_dist.config import AttentionConfig, HybridConfig, Mamba2Config, MLPConfig, require
from mamba2_dist.train.metrics import attention_flops, flops_per_token


def training_flops(config: Any, pattern: str, vocab_size: int, seqlen: int) -> float:
    """FLOPs of forward and backward for one sequence of one document: 2 per multiply-add, backward twice forward.

    Counts every product with weights, the SSD operator in chunks of 256 tokens, causal scores, the head, and of MoE
    layers the experts that a token goes to. Raises ValueError for layers other than M, *, - and E.
    """
    letters = pattern.replace("|", "")
    wrong = sorted(set(letters) - set("M*-E"))
    require(not wrong, f"FLOPs of layers {', '.join(wrong)} are not known; count M, *, - and E")
    dense = letters.replace("E", "")
    require(len(dense) > 0, f"pattern ({pattern}) must have layers beside E")
    d, heads = config.hidden_size, config.mamba_num_heads
    expand = 2.0 if heads is None else heads * config.mamba_head_dim / d
    gated = config.gated_linear_unit
    model = HybridConfig(
        pattern=dense,
        d_model=d,
        vocab_size=vocab_size,
        mamba=Mamba2Config(
            d_state=config.mamba_state_dim,
            headdim=config.mamba_head_dim,
            ngroups=config.mamba_num_groups,
            expand=expand,
        ),
        attention=AttentionConfig(
            nheads=config.num_attention_heads, head_dim=config.kv_channels, nheads_kv=config.num_query_groups
        ),
        mlp=MLPConfig(d_ff=config.ffn_hidden_size, activation="swiglu" if gated else "gelu"),
    )
    forward = seqlen * flops_per_token(model) + attention_flops(model, [[0, seqlen]])
    if "E" in letters:
        width = config.moe_router_topk * config.moe_ffn_hidden_size + (config.moe_shared_expert_intermediate_size or 0)
        layer = 2.0 * d * width * (3 if gated else 2) + 2.0 * d * config.num_moe_experts
        forward += seqlen * letters.count("E") * layer
    return 3 * forward
