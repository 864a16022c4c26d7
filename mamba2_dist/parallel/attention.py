"""Causal attention inside documents, over a sequence cut across ranks."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mamba2_dist.kernels.common.checks import check_choice, check_positive

from .attention_mask import Sight, block_mask
from .cost_model import SCORES_SHARE, attention_exchange_time
from .gathered_again import all_gather_again
from .groups import Group
from .heads import to_heads, to_tokens
from .segments import SegmentTable

AttentionMethod = Literal["auto", "all_gather", "ulysses"]

GATHERED_BYTES = 2**30
MOST_SHAPES = 2**16
"""That FlexAttention may be compiled for in a process: more than anybody waits for."""


def attention_over_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: SegmentTable,
    group: Group,
    *,
    method: AttentionMethod = "auto",
    gathered_bytes: int = GATHERED_BYTES,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the tokens of the same document up to the query.

    q: (batch, seqlen/cp, nheads/tp, head_dim); k, v: (batch, seqlen/cp, nheads_kv/tp, head_dim); returns like q.
    method: how they travel over `group`. "all_gather": keys and values of all ranks come to each, and again in the
        backward pass, which keeps none of them. "ulysses": each rank of a node takes some heads of all the node's
        tokens, by one all-to-all of q, k and v and one of the result; keys and values of other nodes are gathered.
        "auto": whichever costs less by the table.
    gathered_bytes: keys and values gathered at once, as few as one head of both; the backward pass holds three times
        as many, gradients included.
    Raises ValueError when "ulysses" cannot divide the heads.
    """
    check_positive("gathered_bytes", gathered_bytes)
    sizes = q.shape[2:], k.shape[2], q.element_size()
    route, lengths = table.local(group.rank).kept(
        ("route", method, group, sizes), lambda: _route_with_lengths(method, q, k, table, group)
    )
    nheads, nheads_kv = (t.shape[2] // route.heads.size for t in (q, k))
    if route.heads.size > 1:
        shares = [t.unflatten(2, (route.heads.size, -1)) for t in (q, k, v)]
        qkv = to_heads(torch.cat(shares, dim=3).flatten(2, 3), lengths, route.heads)
        q, k, v = qkv.split([nheads, nheads_kv, nheads_kv], dim=2)
    if route.keys.size == 1:
        y = _attend(q, k, v, route, table, group.rank)
    else:
        y = _over_gathered_keys(q, k, v, route, table, group.rank, gathered_bytes)
    return to_tokens(y, lengths, route.heads)


def check_attention(method: str, nheads_kv_local: int, group: Group) -> None:
    """Raise ValueError unless `nheads_kv_local` heads of keys can travel over `group` like this."""
    check_choice("attention", method, get_args(AttentionMethod))
    ranks = (group.node or group).size
    if method == "ulysses" and nheads_kv_local % ranks:
        raise ValueError(
            f"attention (ulysses) needs nheads_kv / tp ({nheads_kv_local}) divisible by the cp ranks of a node "
            f"({ranks}); set it to auto or all_gather, or change nheads_kv, tp or cp"
        )


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


@dataclass(frozen=True)
class _Route:
    """Ranks of `heads` share out the heads of their tokens, ranks of `keys` then gather keys and values."""

    heads: Group
    keys: Group
    holders: tuple[tuple[int, ...], ...]  # by rank of `keys`, the ranks of the table whose tokens it then has


def _route(method: AttentionMethod, q: Tensor, k: Tensor, table: SegmentTable, group: Group) -> _Route:
    check_attention(method, k.shape[2], group)
    alone, ranks = Group("alone"), range(group.size)
    gathering = _Route(alone, group, tuple((rank,) for rank in ranks))
    if group.node is None or group.rail is None:
        sharing = _Route(group, alone, (tuple(ranks),))
    else:
        size = group.node.size
        sharing = _Route(group.node, group.rail, tuple(tuple(ranks[i : i + size]) for i in ranks[::size]))
    if method != "auto" or group.size == 1:
        return sharing if method == "ulysses" else gathering
    shares = k.shape[2] % sharing.heads.size == 0
    if shares:
        # by nothing that ranks differ in: all must choose the same
        costs = [_cost(route, q, k, table, group) for route in (sharing, gathering)]
        shares = costs[0] <= costs[1]
    group.log_choice("attention auto: %s", "ulysses" if shares else "all_gather")
    return sharing if shares else gathering


def _route_with_lengths(
    method: AttentionMethod, q: Tensor, k: Tensor, table: SegmentTable, group: Group
) -> tuple[_Route, list[int]]:
    """The route, and the tokens of each rank with which this one shares heads; kept for the next layer."""
    route = _route(method, q, k, table, group)
    return route, [table.lengths[rank] for rank in route.holders[route.keys.rank]]


def _cost(route: _Route, q: Tensor, k: Tensor, table: SegmentTable, group: Group) -> float:
    """Seconds of forward and backward by the cost model: products of the busiest rank, and what travels."""
    nheads, nheads_kv, head_dim = q.shape[2], k.shape[2], q.shape[3]
    pairs = table.local(0).kept("pairs", lambda: _pairs(table))
    busiest = max(pairs[list(ranks)].sum() for ranks in route.holders) / route.heads.size
    machine = group.machine
    # two products forward, five backward, of two FLOPs for each channel
    products = 14 * busiest * nheads * head_dim / (SCORES_SHARE * machine.matmul_flops)
    tokens = max(table.lengths) * table.batch
    head_bytes = tokens * head_dim * q.element_size()
    nodes = group.nodes if route.keys.size == group.size else route.keys.size
    sizes = nheads * head_bytes, 2 * nheads_kv * head_bytes
    return products + attention_exchange_time(route.heads.size, route.keys.size, nodes, *sizes, machine)


def _pairs(table: SegmentTable) -> np.ndarray:
    """(ranks,) how many keys the queries of each rank see together."""
    starts, ends = (np.array([getattr(segment, edge) for segment in table.segments]) for edge in ("start", "end"))
    counts = np.zeros(table.ranks)
    for offsets in map(np.array, table.documents):
        seen = _seen_before(ends, offsets) - _seen_before(starts, offsets)
        counts += np.bincount(table.holders, seen, table.ranks)
    return counts


def _seen_before(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """How many keys all queries before each of `tokens` see, in a row of documents."""
    lengths = np.diff(offsets)
    whole = np.cumsum([0, *(lengths * (lengths + 1) // 2)])
    document = np.searchsorted(offsets[1:], tokens)
    inside = tokens - offsets[document]
    return whole[document] + inside * (inside + 1) // 2


def _over_gathered_keys(
    q: Tensor, k: Tensor, v: Tensor, route: _Route, table: SegmentTable, rank: int, gathered_bytes: int
) -> Tensor:
    """`_attend` to keys and values of all ranks of `route.keys`, of some heads after others."""
    tokens = max(sum(table.lengths[rank] for rank in ranks) for ranks in route.holders)
    kv = torch.cat([k, v], dim=-1).transpose(0, 1)
    kv = F.pad(kv, (0, 0) * 3 + (0, tokens - len(kv)))
    head_bytes = route.keys.size * kv[:, :, :1].numel() * kv.element_size()
    heads = _heads_at_once(k.shape[2], head_bytes, gathered_bytes)

    def attend(q: Tensor, kv: Tensor) -> Tensor:
        gathered, local_is_kept = all_gather_again(kv.contiguous(), route.keys)
        k, v = gathered.transpose(0, 1).chunk(2, dim=-1)
        with local_is_kept:
            return _attend(q, k, v, route, table, rank)

    parts = zip(q.split(q.shape[2] // k.shape[2] * heads, dim=2), kv.split(heads, dim=2), strict=True)
    return torch.cat([attend(*part) for part in parts], dim=2)


def _heads_at_once(nheads_kv: int, head_bytes: int, gathered_bytes: int) -> int:
    """The most heads within the bytes that divide all, so that every part has the same shape; at least one."""
    fit = max(gathered_bytes // max(head_bytes, 1), 1)
    return max(heads for heads in range(1, nheads_kv + 1) if nheads_kv % heads == 0 and heads <= fit)


def _attend(q: Tensor, k: Tensor, v: Tensor, route: _Route, table: SegmentTable, rank: int) -> Tensor:
    """(batch, queries, nheads, head_dim), (batch, keys, nheads_kv, head_dim) -> like q; keys as `route` has them."""
    if q.shape[1] == 0:
        return _NoQueries.apply(q, k, v)
    mine, local = route.keys.rank, table.local(rank)
    sight = local.kept(("sight", route.holders), lambda: Sight.of(table, route.holders, mine))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if sight.plain:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif q.is_cuda and q.dtype != torch.float64:
        blocks = block_mask(sight, local, route.holders, q.device)
        y = _flex(q, k, v, blocks, grouped)
    else:
        mask = local.kept(("mask", route.holders, q.device), lambda: sight.dense(q.device))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


class _NoQueries(torch.autograd.Function):
    """A rank without tokens saves keys and values as the others do, and so takes part whenever they are gathered."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        k, v = ctx.saved_tensors
        return grad, torch.zeros_like(k), torch.zeros_like(v)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, grouped: bool) -> Tensor:
    # compiled once a shape; by its own limit dynamo would leave it uncompiled from the ninth on and not say so
    with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=MOST_SHAPES):
        return _compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=grouped)


@functools.cache
def _compiled_flex():
    # uncompiled, FlexAttention writes out the whole matrix of scores; a full graph is compiled or an error
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
