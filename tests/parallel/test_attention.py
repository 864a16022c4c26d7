"""Attention over any cut, by every method, equals each document's own; what it keeps and what it sends."""

import dataclasses
import itertools
import shutil
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from mamba2_dist import SegmentTable
from mamba2_dist.parallel import gathered_again
from mamba2_dist.parallel.attention import _flex, _pairs, _route, attention_over_segments, check_attention
from mamba2_dist.parallel.attention_mask import (
    Sight,
    SightOnDevice,
    _block_size,
    _key_parts,
    _query_parts,
    make_block_mask,
)
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.ledger import record_collectives

from ..distributed import run_ranks
from ..splits import groups_of, make_table
from ..strategies import documents, segments
from ..tolerances import EXACT, RELATIVE, assert_close

CPU = torch.device("cpu")
HEAD_DIM = 4
_nodes: dict[tuple[int, int], Group] = {}


def _group(ranks: int, nodes: int) -> Group:
    """All ranks, as if they lay on `nodes` nodes; made once in each."""
    if (ranks, nodes) not in _nodes:
        group = groups_of(1, ranks).cp
        if nodes > 1:
            places = torch.arange(ranks).view(nodes, -1)
            node, rail = (
                Group.of(f"cp {name}", dist.new_subgroups_by_enumeration(rows.tolist())[0])
                for name, rows in (("node", places), ("rail", places.T))
            )
            group = dataclasses.replace(group, node=node, rail=rail, nodes=nodes)
        _nodes[ranks, nodes] = group
    return _nodes[ranks, nodes]


def _definition(q: Tensor, k: Tensor, v: Tensor, documents) -> Tensor:
    """Document by document, every score written out."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    y = []
    for row, offsets in enumerate(documents):
        for start, end in itertools.pairwise(offsets):
            one, two, three = (t[row, start:end] for t in (q, k, v))
            scores = torch.einsum("qhd,khd->hqk", one, two) / HEAD_DIM**0.5
            later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            y.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), three))
    return torch.cat(y).view_as(q)


def _inputs(table: SegmentTable, heads: tuple[int, int]) -> list[Tensor]:
    nheads, nheads_kv = heads
    return [
        torch.randn(table.batch, table.seqlen, n, HEAD_DIM, dtype=torch.float64) for n in (nheads, nheads_kv, nheads_kv)
    ]


def _check(table: SegmentTable, nodes: int, heads: tuple[int, int], options: list[dict]):
    """Outputs and gradients of every method against the definition."""
    group = _group(table.ranks, nodes)
    leaves = [tensor.requires_grad_() for tensor in _inputs(table, heads)]
    expected = _definition(*leaves, table.documents)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, weight)
    mine = lambda tensor: table.shard(tensor.detach(), group.rank)  # noqa: E731
    for option in options:
        shards = [mine(leaf).requires_grad_() for leaf in leaves]
        y = attention_over_segments(*shards, table, group, **option)
        assert_close(y, mine(expected), EXACT, f"output of {option}")
        for name, actual, grad in zip("qkv", torch.autograd.grad(y, shards, mine(weight)), grads, strict=True):
            assert_close(actual, mine(grad), EXACT, f"gradient of {name} of {option}")


ONE_HEAD = {"method": "all_gather", "gathered_bytes": 1}
METHODS = [{"method": "all_gather"}, ONE_HEAD, {"method": "ulysses"}, {"method": "ulysses", "gathered_bytes": 1}, {}]
SEQLEN = 40


# a failure ends the ranks, so looking for a smaller one would take minutes
fuzzed = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 1), (4, 2), (4, 4)])
def test_every_method(ranks, nodes, layout):
    @fuzzed
    @given(documents(SEQLEN), st.sampled_from([(4, 4), (8, 4)]))
    def check(rows, heads):
        run_ranks(ranks, _check, make_table(layout, SEQLEN, ranks, rows), nodes, heads, METHODS)

    check()


@pytest.mark.parametrize("lengths", [[SEQLEN, 0, 0, 0], [0, 0, 3, SEQLEN - 3]])
@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_and_nodes_without_tokens(nodes, lengths):
    table = SegmentTable.uneven(lengths, documents=[[0, 7, 7, SEQLEN]])
    run_ranks(4, _check, table, nodes, (8, 4), METHODS)


def test_whole_rows_in_order():
    """Which need no mask but the causal one, once each rank has all tokens of its heads."""
    run_ranks(2, _check, SegmentTable.contiguous(SEQLEN, 2, batch=2), 1, (4, 2), METHODS)


def test_heads_that_do_not_divide():
    run_ranks(2, _check, SegmentTable.zigzag(SEQLEN, 2), 1, (6, 3), [{}, ONE_HEAD, {"gathered_bytes": 4000}])


def _kept():
    """What autograd saves is as long as the rank's own tokens, and the K and V among it are there once."""
    table, group = SegmentTable.zigzag(SEQLEN, 4), _group(4, 1)
    q, k, v = (table.shard(tensor, group.rank).requires_grad_() for tensor in _inputs(table, (4, 2)))
    for option in METHODS[:2]:
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = attention_over_segments(q, k, v, table, group, **option)
        # one mask for all layers, of float64 on a CPU
        masks = 10 * SEQLEN * 8 * (1 if option == METHODS[0] else 2)
        logsumexp = 10 * 4 * 8
        expected = sum(t.numel() * t.element_size() for t in (q, k, v, y)) + logsumexp + masks
        assert sum(kept.values()) == expected


def test_only_local_keys_are_kept():
    run_ranks(4, _kept)


def _sent(nodes, method, heads_at_once, expected):
    table, group = SegmentTable.contiguous(SEQLEN, 4), _group(4, nodes)
    q, k, v = (table.shard(tensor, group.rank).requires_grad_() for tensor in _inputs(table, (8, 4)))
    gathered_bytes = heads_at_once * SEQLEN * 2 * HEAD_DIM * 8
    with record_collectives() as ledger:
        y = attention_over_segments(q, k, v, table, group, method=method, gathered_bytes=gathered_bytes)
        forward = dict(ledger.calls), ledger.bytes.total()
        ledger.clear()
        y.sum().backward()
        backward = dict(ledger.calls), ledger.bytes.total()
    assert (forward, backward) == expected


TOKEN = SEQLEN // 4 * HEAD_DIM * 8  # bytes of a head of a rank's tokens


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_what_all_gather_sends(heads):
    parts, kv = 4 // heads, 8 * TOKEN
    forward = {("all_gather", "cp"): parts}, 3 * kv
    backward = {("all_gather", "cp"): parts, ("reduce_scatter", "cp"): parts}, 3 * kv + 3 * kv
    run_ranks(4, _sent, 1, "all_gather", heads, (forward, backward))


def test_what_ulysses_sends():
    both = {("all_to_all", "cp"): 2}, (8 + 4 + 4 + 8) * TOKEN * 3 // 4
    run_ranks(4, _sent, 1, "ulysses", 1, (both, both))


def test_what_ulysses_sends_between_nodes():
    """Half of the heads of twice the tokens."""
    shared, kv = (8 + 4 + 4 + 8) * TOKEN // 2, 8 * TOKEN
    forward = {("all_to_all", "cp node"): 2, ("all_gather", "cp rail"): 2}, shared + kv
    calls = {("all_to_all", "cp node"): 2, ("all_gather", "cp rail"): 2, ("reduce_scatter", "cp rail"): 2}
    run_ranks(4, _sent, 2, "ulysses", 1, (forward, (calls, shared + 2 * kv)))


@pytest.mark.parametrize(
    ("layout", "seqlen", "heads", "shares"),
    [
        ("zigzag", 2**15, (4, 4), True),  # a quarter of the heads is less than three quarters of the keys
        ("zigzag", 2**9, (4, 4), False),  # fewer launches
        ("zigzag", 2**17, (64, 4), False),  # queries would be most of it
        ("contiguous", 2**17, (64, 4), True),  # long rows, whose last rank would have most to do
        ("zigzag", 2**15, (4, 2), False),  # which four ranks cannot share
    ],
)
def test_what_auto_chooses(layout, seqlen, heads, shares):
    table, group = getattr(SegmentTable, layout)(seqlen, 4), Group("cp", (0, 1, 2, 3))
    q, k = (torch.empty(1, seqlen // 4, n, 128, device="meta", dtype=torch.bfloat16) for n in heads)
    route = _route("auto", q, k, table, group)
    assert (route.heads if shares else route.keys) is group


def test_what_auto_chose_is_logged_once_a_group(caplog):
    caplog.set_level("INFO", logger="mamba2_dist")
    table = SegmentTable.zigzag(2**15, 4)
    for rank in (0, 1):
        group = Group("cp", (0, 1, 2, 3), rank)
        for nheads_kv in (4, 4, 2, 4):
            q, k = (torch.empty(1, 2**13, n, 128, device="meta", dtype=torch.bfloat16) for n in (4, nheads_kv))
            _route("auto", q, k, table, group)
            _route("all_gather", q, k, table, group)
    said = [f"attention auto: {method}, for 4 ranks on 1 nodes of H200" for method in ("ulysses", "all_gather")]
    assert caplog.messages == said


def test_heads_that_ulysses_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"needs nheads_kv / tp \(2\) divisible by the cp ranks of a node \(4\); set"):
        check_attention("ulysses", 2, Group("cp", (0, 1, 2, 3)))
    check_attention("ulysses", 2, Group("cp", (0, 1, 2, 3), node=Group("node", (0, 1)), nodes=2))
    with pytest.raises(ValueError, match="attention must be one of 'auto', 'all_gather', 'ulysses', got 'ring'"):
        check_attention("ring", 2, Group("cp"))


def _twice():
    """Inside a checkpoint, with a graph kept for a second backward pass."""
    table, group = SegmentTable.zigzag(SEQLEN, 2), _group(2, 1)
    shards = [table.shard(tensor, group.rank).requires_grad_() for tensor in _inputs(table, (4, 2))]
    run = lambda *qkv: attention_over_segments(*qkv, table, group, **ONE_HEAD).sin()  # noqa: E731
    expected = torch.autograd.grad(run(*shards).sum(), shards)
    total = checkpoint(run, *shards, use_reentrant=False).sum()
    for actual in (torch.autograd.grad(total, shards), torch.autograd.grad(run(*shards).sum(), shards)):
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
    total = run(*shards).sum()
    for keep in (True, False):
        assert all(map(torch.equal, torch.autograd.grad(total, shards, retain_graph=keep), expected))


def test_checkpointed_and_twice_backward():
    run_ranks(2, _twice)


HOLDERS = [((0,), (1,), (2,), (3,)), ((0, 1), (2, 3)), ((0, 1, 2, 3),)]


def _listed(number: Tensor, indices: Tensor, columns: int) -> Tensor:
    """(batch, rows, columns) which blocks stand among the first `number`."""
    batch, _, rows, _ = indices.shape
    listed = torch.zeros(batch, rows, columns, dtype=torch.bool)
    for b, r in itertools.product(range(batch), range(rows)):
        listed[b, r, indices[b, 0, r, : number[b, 0, r]].long()] = True
    return listed


@settings(max_examples=150, deadline=None)
@given(documents(SEQLEN), segments(SEQLEN, 4), st.sampled_from(HOLDERS), st.sampled_from([4, 8, 64]))
def test_blocks_are_those_of_the_dense_mask(rows, cut, holders, block):
    table = SegmentTable(cut, ranks=4, documents=rows)
    for mine in range(len(holders)):
        sight = Sight.of(table, holders, mine)
        if len(sight.query) == 0:
            continue
        actual = make_block_mask(sight, SightOnDevice.of(sight, CPU), block)
        dense = sight.dense(CPU)
        sees = lambda b, h, q, k, dense=dense: dense[b, 0, q, k]  # noqa: E731
        expected = create_block_mask(sees, table.batch, None, *dense.shape[2:], device="cpu", BLOCK_SIZE=block)
        assert actual.shape == (table.batch, 1, *dense.shape[2:])
        for name in ("kv", "full_kv", "q", "full_q"):
            pairs = [(getattr(m, f"{name}_num_blocks"), getattr(m, f"{name}_indices")) for m in (actual, expected)]
            assert pairs[0][1].is_contiguous()
            assert pairs[0][1].shape == pairs[1][1].shape
            columns = pairs[0][1].shape[-1]
            assert torch.equal(_listed(*pairs[0], columns), _listed(*pairs[1], columns)), name
        place = torch.meshgrid(*map(torch.arange, dense.shape[2:]), indexing="ij")
        assert torch.equal(actual.mask_mod(0, 0, *place), dense[0, 0])


def test_blocks_are_larger_where_they_would_be_too_many():
    assert _block_size(1, 2**17, 2**20) == 128
    assert _block_size(1, 2**20, 2**20) == 256
    assert _block_size(8, 2**20, 2**20) == 1024


def test_padding_is_one_part_of_its_block():
    sight = Sight.of(SegmentTable.uneven([1000, 10]), ((0,), (1,)), 1)
    assert len(sight.key) == 2000
    assert _key_parts(sight, 128).shape == (1, 2, 16)
    assert _query_parts(sight, 128).shape == (2, 4, 1, 1)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_flex_attention_skips_what_nobody_sees():
    """Its compiled form, which reads the lists of blocks; on a CPU it has no backward pass."""
    table = SegmentTable.zigzag(700, 3, documents=[[0, 1, 130, 300, 700, 700], [0, 700]])
    sight = Sight.of(table, ((0,), (1,), (2,)), 1)
    q, kv = torch.randn(2, 4, len(sight.query), 32), torch.randn(2, 2, len(sight.key), 64)
    k, v = kv.chunk(2, dim=-1)
    with torch.no_grad():
        blocks = make_block_mask(sight, SightOnDevice.of(sight, CPU))
        y = torch.compile(flex_attention)(q, k, v, block_mask=blocks, enable_gqa=True)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.dense(CPU), enable_gqa=True)
    assert_close(y, expected, RELATIVE[torch.float32])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_flex_attention_is_compiled_for_every_shape():
    # of which dynamo would allow 8
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True), torch.no_grad():
        for seqlen in (200, 216):
            sight = Sight.of(SegmentTable.zigzag(2 * seqlen, 2), ((0,), (1,)), 1)
            q, k, v = (torch.randn(1, 2, len(tokens), 16) for tokens in (sight.query, sight.key, sight.key))
            y = _flex(q, k, v, make_block_mask(sight, SightOnDevice.of(sight, CPU)), False)
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.dense(CPU))
            assert_close(y, expected, RELATIVE[torch.float32])


@pytest.fixture
def _one_of_many(monkeypatch):
    """Collectives of a group whose other ranks hold the same."""
    monkeypatch.setattr(gathered_again, "all_gather", lambda x, group, dim: torch.cat([x] * group.size, dim))
    monkeypatch.setattr(gathered_again, "gather_over", lambda x, group: torch.stack([x.detach()] * group.size))


@pytest.mark.usefixtures("_one_of_many")
def test_queries_changed_before_backward_are_noticed():
    table = SegmentTable.zigzag(SEQLEN, 2)
    q, k, v = (table.shard(tensor, 0).requires_grad_() for tensor in _inputs(table, (4, 2)))
    y = attention_over_segments(q, k, v, table, Group("cp", (0, 1)), method="all_gather")
    with torch.no_grad():
        q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("_one_of_many", "_no_garbage_collection")
def test_without_backward_nothing_is_kept():
    table = SegmentTable.zigzag(SEQLEN, 2)
    q, k, v = (table.shard(tensor, 0).requires_grad_() for tensor in _inputs(table, (4, 2)))
    attention_over_segments(q, k, v, table, Group("cp", (0, 1)), method="all_gather")
    kept = weakref.ref(q)
    del q
    assert kept() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
@pytest.mark.usefixtures("_one_of_many")
def test_on_a_gpu_against_float64(layout, dtype):
    """FlexAttention with its lists of blocks in both directions, keys in the order they are gathered."""
    seqlen = 1500
    table = make_table(layout, seqlen, 4, [[0, 1, 130, 700, 702, seqlen], [0, seqlen]])
    for rank in (0, 3):
        group = Group("cp", (0, 1, 2, 3), rank)
        draw = lambda heads, rank=rank: torch.randn(2, table.local(rank).length, heads, 64)  # noqa: E731
        inputs = [draw(heads).to(dtype) for heads in (8, 4, 4, 8)]
        results = []
        for device, wide in (("cuda", dtype), ("cpu", torch.float64)):
            q, k, v, weight = (tensor.to(device, wide).requires_grad_() for tensor in inputs)
            y = attention_over_segments(q, k, v, table, group, method="all_gather", gathered_bytes=2**20)
            results.append([y, *torch.autograd.grad(y, (q, k, v), weight)])
        for name, actual, expected in zip(("y", "dq", "dk", "dv"), *results, strict=True):
            assert_close(actual, expected, RELATIVE[dtype], f"{name} of rank {rank}")


@pytest.mark.gpu
@pytest.mark.usefixtures("_one_of_many")
def test_nothing_waits_for_the_device_and_little_is_kept():
    tokens, ranks, heads, heads_kv, dim = 2**14, 8, 8, 4, 128
    group = Group("cp", tuple(range(ranks)), 3)
    draw = lambda n: torch.randn(1, tokens, n, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()  # noqa: E731
    q, k, v = draw(heads), draw(heads_kv), draw(heads_kv)
    run = lambda table: attention_over_segments(  # noqa: E731
        q, k, v, table, group, method="all_gather", gathered_bytes=ranks * tokens * dim * 4
    )
    for offsets in ([0, 5000, 2**17], [0, 1, 70000, 2**17]):  # compiled for the first
        table = SegmentTable.zigzag(2**17, ranks, documents=[offsets])
        torch.cuda.set_sync_debug_mode("default" if offsets[1] == 5000 else "error")
        try:
            run(table).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = run(table)
    kept = torch.cuda.memory_allocated() - before
    assert y.requires_grad
    # k and v, each part's result and all of them together, and sums of exponentials
    size = tokens * dim * 2
    assert kept <= size * (2 * heads_kv + 2 * heads) * 1.1


@given(documents(SEQLEN), segments(SEQLEN, 4))
def test_pairs_by_counting(rows, cut):
    """What `auto` weighs: each query sees its document up to itself."""
    table = SegmentTable(cut, ranks=4, documents=rows)
    ahead = np.arange(SEQLEN) - table.document_starts + 1
    assert _pairs(table).tolist() == [ahead[:, table.positions(rank)].sum() for rank in range(4)]
