"""Attention inside Megatron's layers where TransformerEngine is missing: over cp, and inside packed documents."""

import math
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from mamba2_dist.config import require
from mamba2_dist.parallel.attention import AttentionMethod, attention_over_segments, check_attention
from mamba2_dist.parallel.cost_model import H200, Machine

from .layout import Layout, check_layout, segment_table
from .process_groups import parallel_groups

COMMUNICATIONS: dict[str | None, AttentionMethod] = {
    None: "auto",
    "p2p": "auto",  # what Megatron's command line gives where nothing is said
    "all_gather": "all_gather",
    "a2a": "ulysses",
}


class CoreAttention(nn.Module):
    """What stands between the projections of Megatron's `SelfAttention`: `attention_over_segments`.

    method: how keys, values or heads travel over cp; "auto": as cp_comm_type says, where p2p leaves the choice to the
        cost model. layout, machine: as in `MegatronMamba2Mixer`.
    Raises ValueError for what config asks for and it cannot do.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        method: AttentionMethod = "auto",
        layout: Layout = "megatron",
        machine: Machine = H200,
    ):
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        require(
            dropout == 0, f"attention_dropout ({dropout}) needs TransformerEngine; set it to 0, as pretraining does"
        )
        require(
            attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal) and attention_type == "self",
            f"attention ({attention_type}, {attn_mask_type}) needs TransformerEngine; causal self-attention does not",
        )
        for field in ("window_size", "qk_clip", "log_max_attention_logit", "qk_layernorm"):
            value = getattr(config, field, None)
            require(not value, f"{field} ({value}) needs TransformerEngine; leave it off")
        softmax = getattr(config, "softmax_type", "vanilla")
        require(softmax == "vanilla", f"softmax_type ({softmax}) needs TransformerEngine; leave it at 'vanilla'")
        require(
            cp_comm_type in COMMUNICATIONS,
            f"cp_comm_type ({cp_comm_type}) needs TransformerEngine; choose one of p2p, all_gather and a2a",
        )
        method = COMMUNICATIONS[cp_comm_type] if method == "auto" else method
        check_layout(layout)
        self.groups = parallel_groups(pg_collection, machine)
        check_attention(method, max(config.num_query_groups // self.groups.tp.size, 1), self.groups.cp)
        self.method, self.layout, self.softmax_scale = method, layout, softmax_scale
        self.cp = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """(seqlen/cp, batch, heads/tp, head_dim), or (tokens/cp, heads/tp, head_dim) of packed documents, ->
        (seqlen/cp, batch, channels/tp).

        Causal, whatever attention_mask says, as TransformerEngine with such a mask type. Fewer queries than keys are
        the last tokens, as in inference.
        """
        require(attention_bias is None, "attention_bias needs TransformerEngine; leave it out")
        if query.ndim == 3:
            query, key, value = (tensor[:, None] for tensor in (query, key, value))
        if self.softmax_scale is not None:
            query = query * (self.softmax_scale * math.sqrt(query.shape[-1]))
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        if q.shape[1] == k.shape[1]:
            table = segment_table(q.shape[1], q.shape[0], self.cp, packed_seq_params, self.layout)
            y = attention_over_segments(q, k, v, table, self.groups.cp, method=self.method)
        else:
            y = _after_others(q, k, v)
        return y.transpose(0, 1).flatten(2)


def _after_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
