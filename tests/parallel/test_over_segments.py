"""Convolution, scan and attention over any cut equal the same on whole sequences; documents fuzzed."""

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from mamba2_dist.kernels.conv1d import causal_conv1d
from mamba2_dist.kernels.ssd import mamba_chunk_scan_combined

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.attention import attention_over_segments
from mamba2_dist.parallel.collectives import sum_over
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.ssd import SSDOverSegments, operators

from ..distributed import run_ranks
from ..splits import groups_of
from ..strategies import documents, segments
from ..tolerances import EXACT, RELATIVE, assert_close

FLOAT64 = {"dtype": torch.float64}
# how states travel, and the ranks of a node
SCANS = [
    ("all_gather", None), ("sliced", None), ("hierarchical", 1), ("hierarchical", 2), ("log_step", None),
    ("ring", None), ("serial_exact", None),
]  # fmt: skip


def _compare(table: SegmentTable, inputs, shared, splits, whole, bound=EXACT):
    """Each of `splits`, called with shards, what ranks share, and their group, against `whole(*inputs, *shared)`:
    outputs and all gradients. splits: (function, group)."""
    leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, *shared)]
    expected = whole(*leaves)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    for split, group in splits:
        shards = [table.shard(tensor, group.rank) for tensor in inputs]
        mine = [tensor.detach().clone().requires_grad_() for tensor in (*shards, *shared)]
        result = split(*mine, group)
        (result * table.shard(weight, group.rank)).sum().backward()
        assert_close(result, table.shard(expected, group.rank), bound, "output")
        for index, (tensor, leaf) in enumerate(zip(mine, leaves, strict=True)):
            if index < len(inputs):
                assert_close(tensor.grad, table.shard(leaf.grad, group.rank), bound, f"gradient of input {index}")
            else:
                assert_close(sum_over(tensor.grad, group), leaf.grad, bound, f"gradient of input {index}")


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
    return torch.cat([causal_conv1d(x[..., :5], weight, bias, activation="silu"), x[..., 5:]], -1)


def _convolved_over(convolve, table):
    def split(x, weight, bias, group):
        parts, again = convolve(x, weight, bias, [3, 2], table, group, activation="silu")
        assert all(map(torch.equal, again(), parts))
        return torch.cat(parts, -1)

    return split


def _scanned_over(operator, table):
    def split(x, dt, B, C, A, D, dt_bias, group):
        y, again = operator(x, dt, A, B, C, 4, table, group, D=D, dt_bias=dt_bias, dt_softplus=True).outputs()
        assert torch.equal(again(x, dt, A, B, C, D, dt_bias), y)
        return y

    return split


def _check(segments, ranks, documents):
    table = SegmentTable(segments, ranks=ranks, documents=documents)
    draw = lambda *shape: torch.randn(len(documents), table.seqlen, *shape, **FLOAT64)  # noqa: E731
    _compare(
        table,
        [draw(6)],
        [torch.randn(5, 4, **FLOAT64), torch.randn(5, **FLOAT64)],
        [(_convolved_over(operators(scan)[0], table), groups_of(1, ranks).cp) for scan in ("auto", "serial_exact")],
        lambda x, weight, bias: _by_document(lambda part: _convolved_in_part(part, weight, bias), documents, x),
    )
    _compare(
        table,
        [draw(2, 3), draw(2), draw(1, 4), draw(1, 4)],
        [-torch.rand(2, **FLOAT64), torch.randn(2, **FLOAT64), torch.randn(2, **FLOAT64)],
        [
            (_scanned_over(operators(scan)[1], table), groups_of(1, ranks, node_size=node_size).states)
            for scan, node_size in SCANS
        ],
        lambda x, dt, B, C, A, D, dt_bias: _by_document(
            lambda x, dt, B, C: mamba_chunk_scan_combined(
                x, dt, A, B, C, 4, D=D, dt_bias=dt_bias, dt_softplus=True
            ),
            documents, x, dt, B, C,
        ),
    )  # fmt: skip
    alone = Group("cp")
    _compare(
        table,
        [draw(heads, 4) for heads in (4, 2, 2)],
        [],
        [(lambda q, k, v, group: attention_over_segments(q, k, v, table, group), groups_of(1, ranks).cp)],
        lambda *t: _by_document(
            lambda q, k, v: attention_over_segments(q, k, v, SegmentTable.contiguous(q.shape[1], 1), alone),
            documents,
            *t,
        ),
    )


# a failure ends the ranks, so looking for a smaller one would take minutes
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(segments(40, 4), documents(40))
def test_fuzzed_cuts_and_documents(segments, documents):
    run_ranks(4, _check, segments, 4, documents)


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

    def split(x, dt, B, C, group):
        return SSDOverSegments(x, dt, A, B, C, 64, table, group, D=D, backend="triton").outputs()[0]

    _compare(
        table,
        [draw(2, 16), draw(2).abs(), draw(1, 16), draw(1, 16)],
        [],
        [(split, groups_of(1, ranks).states)],
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
