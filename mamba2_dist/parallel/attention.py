"""Causal attention inside documents, over a sequence cut across ranks."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mamba2_dist.kernels.common.transfer import to_device

from .collectives import all_gather
from .groups import Group
from .segments import SegmentTable


def attention_over_segments(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, group: Group) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the tokens of the same document up to the query.

    q: (batch, seqlen/cp, nheads/tp, head_dim); k, v: (batch, seqlen/cp, nheads_kv/tp, head_dim); returns like q.
    Keys and values of all ranks are gathered over `group`, one all-gather of both; gradients come back the same way.
    """
    kv = _gather_rows(torch.cat([k, v], dim=-1), table, group)
    k, v = kv.split([k.shape[-1], v.shape[-1]], dim=-1)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] == 0:
        # no queries here, but the keys' gradients are still collected from every rank
        return (q + 0.0 * kv.sum()).transpose(1, 2)
    plain = len(table.segments) == 1 and all(len(set(row)) <= 2 for row in table.documents)
    if plain:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif q.is_cuda and q.dtype != torch.float64:
        blocks = table.local(group.rank).kept(("blocks", q.device), lambda: _block_mask(table, group.rank, q.device))
        y = _compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=grouped)
    else:
        mask = table.local(group.rank).kept(("mask", q.device), lambda: to_device(_mask(table, group.rank), q.device))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), the two halves of each head as pairs.

    x: (batch, seqlen, nheads, head_dim), positions: (seqlen,); computed in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, device=x.device, dtype=wide) / half)
    angle = (positions.to(wide)[:, None] * frequency)[:, None]  # (s, 1, half)
    first, second = x.to(wide).chunk(2, dim=-1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(turned, dim=-1).to(x.dtype)


def _gather_rows(local: Tensor, table: SegmentTable, group: Group) -> Tensor:
    """(batch, seqlen, ...) in causal order from every rank's (batch, seqlen/cp, ...)."""
    if len(table.segments) == 1:
        return local
    longest = max(table.local(rank).length for rank in range(table.ranks))
    padding = longest - local.shape[1]
    if padding:
        local = F.pad(local, (0, 0) * (local.ndim - 2) + (0, padding))
    gathered = all_gather(local, group, dim=1)
    order = table.local(group.rank).kept(("order", local.device), lambda: to_device(_causal_order(table), local.device))
    return gathered.index_select(1, order)


def _causal_order(table: SegmentTable) -> Tensor:
    """(seqlen,) where each token stands among the gathered ones."""
    holder, place = table.owner
    longest = max(table.local(other).length for other in range(table.ranks))
    return torch.from_numpy(holder * longest + place)


def _mask(table: SegmentTable, rank: int) -> Tensor:
    """(batch, 1, seqlen/cp, seqlen): which keys each local query sees."""
    query = torch.from_numpy(table.local(rank).positions)
    first = torch.from_numpy(table.document_starts)[:, query, None]
    key = torch.arange(table.seqlen)
    return ((key >= first) & (key <= query[:, None]))[:, None]


def _block_mask(table: SegmentTable, rank: int, device: torch.device) -> BlockMask:
    """The same for FlexAttention, which skips blocks that nobody sees."""
    query = table.local(rank).tensor("positions", device)
    first = to_device(table.document_starts, device)[:, query]

    def sees(batch, head, q, k):
        return (k >= first[batch, q]) & (k <= query[q])

    return create_block_mask(sees, table.batch, None, len(query), table.seqlen, device=device)


@functools.cache
def _compiled_flex():
    # uncompiled, FlexAttention writes out the whole matrix of scores
    return torch.compile(flex_attention, dynamic=False)
