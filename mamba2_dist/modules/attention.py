"""Causal attention with grouped queries, heads split over tensor-parallel ranks and the sequence over others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_dist.config import AttentionConfig
from mamba2_dist.parallel.attention import AttentionMethod, attention_over_segments, check_attention, rotary
from mamba2_dist.parallel.groups import ParallelGroups
from mamba2_dist.parallel.partition import attention_partition
from mamba2_dist.parallel.segments import SegmentTable

from . import init
from .base import PartitionedModule, check_step
from .linear import ColumnParallelLinear, RowParallelLinear


@dataclass
class AttentionCache:
    """Keys and values so far, (batch, tokens, nheads_kv/tp, head_dim) each."""

    k: Tensor
    v: Tensor


class Attention(PartitionedModule):
    """Self-attention inside documents; `in_proj` packs q|k|v.

    method: how keys, values or heads travel over cp; see `attention_over_segments`.
    Raises ValueError when heads do not fit tp, or cp where they travel.
    """

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        groups: ParallelGroups,
        *,
        sequence_parallel: bool = False,
        method: AttentionMethod = "auto",
        residual_layers: int = 1,
        **factory,
    ):
        super().__init__()
        nheads, nheads_kv = config.heads(d_model)
        self.config, self.cp, self.method = config, groups.cp, method
        self.share = share = attention_partition(
            nheads=nheads, nheads_kv=nheads_kv, head_dim=config.head_dim, tp=groups.tp.size, rank=groups.tp.rank
        )
        check_attention(method, share.nheads_kv_local, groups.cp)
        self.in_proj = ColumnParallelLinear(
            d_model, share.qkv, groups.tp, init.projection(d_model),
            shared_by=groups.tp_part(share.group_ranks), sequence_parallel=sequence_parallel, **factory,
        )  # fmt: skip
        self.out_proj = RowParallelLinear(
            d_model, share.out_proj, groups.tp, init.projection(nheads * config.head_dim, residual_layers),
            sequence_parallel=sequence_parallel, **factory,
        )  # fmt: skip

    def forward(self, u: Tensor, segments: SegmentTable) -> Tensor:
        """(batch, seqlen/cp, d_model) -> the same; with sequence_parallel (batch, seqlen/cp/tp, d_model).

        Carried rows see the tokens of this batch only; positions count from its start, as only differences matter.
        """
        positions = segments.local(self.cp.rank).tensor("positions", u.device)
        q, k, v = self._project(u, positions)
        y = attention_over_segments(q, k, v, segments, self.cp, method=self.method)
        return self.out_proj(y.flatten(-2))

    def new_cache(self, batch: int) -> AttentionCache:
        """The memory before the first token."""
        weight = self.in_proj.weight
        empty = weight.new_empty(batch, 0, self.share.nheads_kv_local, self.config.head_dim)
        return AttentionCache(empty, empty)

    def step(self, u: Tensor, cache: AttentionCache) -> Tensor:
        """One token, (batch, 1, d_model) -> the same, after those in `cache`, which is brought up to date."""
        check_step("u", u, "(batch, 1, d_model)", self.cp, self.in_proj.sequence_parallel)
        position = torch.tensor([cache.k.shape[1]], device=u.device)
        q, k, v = self._project(u, position)
        cache.k, cache.v = torch.cat([cache.k, k], dim=1), torch.cat([cache.v, v], dim=1)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, cache.k, cache.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def _project(self, u: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lengths = [part.length for part in self.share.qkv.parts]
        q, k, v = (t.unflatten(-1, (-1, self.config.head_dim)) for t in self.in_proj(u).split(lengths, dim=-1))
        theta = self.config.rope_theta
        return (q, k, v) if theta is None else (rotary(q, positions, theta), rotary(k, positions, theta), v)
