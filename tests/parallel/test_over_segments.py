"""Convolution, scan and attention over any cut equal the same on whole sequences; documents fuzzed."""

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mamba2_dist.kernels.conv1d import causal_conv1d
from mamba2_dist.kernels.ssd import mamba_chunk_scan_combined

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.attention import attention_over_segments
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.ssd import SSDOverSegments, conv1d_over_segments

from ..distributed import run_ranks
from ..splits import groups_of
from ..tolerances import EXACT, RELATIVE, assert_close

FLOAT64 = {"dtype": torch.float64}


def _compare(table: SegmentTable, inputs, split, whole, bound=EXACT):
    """`split(*shards)` on every rank against `whole(*inputs)`, outputs and input gradients."""
    group = groups_of(1, table.ranks).cp
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = whole(*leaves)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    shards = [table.shard(tensor, group.rank).detach().requires_grad_() for tensor in inputs]
    result = split(*shards, group)
    (result * table.shard(weight, group.rank)).sum().backward()
    assert_close(result, table.shard(expected, group.rank), bound, "output")
    for shard, leaf in zip(shards, leaves, strict=True):
        assert_close(shard.grad, table.shard(leaf.grad, group.rank), bound, "input gradient")


def _by_document(function, documents, *tensors):
    """`function` on every document alone."""
    rows = []
    for row, offsets in enumerate(documents):
        parts = [
            function(*(tensor[row : row + 1, start:end] for tensor in tensors))
            for start, end in itertools.pairwise(offsets)
            if end > start
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def _convolved_in_part(x, weight, bias):
    """The last channel as it is."""
    return torch.cat([causal_conv1d(x[..., :5], weight[:5], bias[:5], activation="silu"), x[..., 5:]], -1)


def _check(segments, ranks, documents):
    table = SegmentTable(segments, ranks=ranks, documents=documents)
    batch, seqlen = len(documents), table.seqlen
    weight, bias = torch.randn(6, 4, **FLOAT64), torch.randn(6, **FLOAT64)
    _compare(
        table,
        [torch.randn(batch, seqlen, 6, **FLOAT64)],
        lambda x, group: torch.cat(
            conv1d_over_segments(x, weight[:5], bias[:5], [3, 2], table, group, activation="silu")[0], -1
        ),
        lambda x: _by_document(lambda part: _convolved_in_part(part, weight, bias), documents, x),
    )
    A, D = -torch.rand(2, **FLOAT64), torch.randn(2, **FLOAT64)
    scan_inputs = [
        torch.randn(batch, seqlen, 2, 3, **FLOAT64),
        torch.rand(batch, seqlen, 2, **FLOAT64),
        torch.randn(batch, seqlen, 1, 4, **FLOAT64),
        torch.randn(batch, seqlen, 1, 4, **FLOAT64),
    ]
    _compare(
        table,
        scan_inputs,
        lambda x, dt, B, C, group: SSDOverSegments(x, dt, A, B, C, 4, table, group, D=D).outputs()[0],
        lambda *t: _by_document(lambda x, dt, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, 4, D=D), documents, *t),
    )
    alone = Group("cp")
    _compare(
        table,
        [torch.randn(batch, seqlen, heads, 4, **FLOAT64) for heads in (4, 2, 2)],
        lambda q, k, v, group: attention_over_segments(q, k, v, table, group),
        lambda *t: _by_document(
            lambda q, k, v: attention_over_segments(q, k, v, SegmentTable.contiguous(q.shape[1], 1), alone),
            documents,
            *t,
        ),
    )


rows = st.lists(st.lists(st.integers(0, 21), max_size=5).map(sorted), min_size=1, max_size=3)
cuts = st.lists(st.integers(0, 21), min_size=2, max_size=5).map(sorted)


# a failure ends the ranks, so looking for a smaller one would take minutes
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(rows, cuts, st.data())
def test_fuzzed_cuts_and_documents(documents, cuts, data):
    from mamba2_dist.parallel.segments import Segment

    edges = [0, *cuts, 21]
    owners = [data.draw(st.integers(0, 2)) for _ in edges[1:]]
    slots = [owners[:i].count(owner) for i, owner in enumerate(owners)]
    segments = [Segment(edges[i], edges[i + 1], owners[i], slots[i]) for i in range(len(owners))]
    run_ranks(3, _check, segments, 3, [[0, *row, 21] for row in documents])


def test_shard_shorter_than_the_convolution():
    table = SegmentTable.uneven([4, 1, 1, 1], documents=[[0, 7], [0, 2, 7]])
    run_ranks(4, _check, table.segments, 4, table.documents)


@pytest.mark.parametrize("ranks", [1, 2])
def test_zigzag_of_documents_on_one_and_two_ranks(ranks):
    table = SegmentTable.zigzag(21, ranks)
    run_ranks(ranks, _check, table.segments, ranks, [[0, 1, 11, 21], [0, 21]])


def _check_triton(segments, ranks, documents):
    table = SegmentTable(segments, ranks=ranks, documents=documents)
    draw = lambda *shape: torch.randn(len(documents), table.seqlen, *shape)  # noqa: E731
    A, D = -torch.rand(2), torch.randn(2)
    _compare(
        table,
        [draw(2, 16), draw(2).abs(), draw(1, 16), draw(1, 16)],
        lambda x, dt, B, C, group: SSDOverSegments(x, dt, A, B, C, 64, table, group, D=D, backend="triton").outputs()[
            0
        ],
        lambda *t: _by_document(
            lambda x, dt, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, 64, D=D, backend="torch"), documents, *t
        ),
        bound=RELATIVE[torch.float32],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks hold CPU tensors, which only the interpreter takes")
@pytest.mark.parametrize("lengths", [[30, 0, 10], [0, 40, 0]])
def test_triton_takes_and_gives_states(lengths):
    """Also through segments without tokens and ranks without any."""
    table = SegmentTable.uneven(lengths, documents=[[0, 40], [0, 7, 29, 29, 40]])
    run_ranks(3, _check_triton, table.segments, 3, table.documents)
