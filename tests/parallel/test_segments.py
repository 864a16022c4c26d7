"""Cuts are described once, on the host, and describe every token exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.segments import Segment, rows_between

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda parts: sum(parts) > 0)


@given(lengths, st.lists(st.integers(0, 45), max_size=5))
def test_pieces_cover_every_token_once(parts, cuts):
    seqlen = sum(parts)
    documents = [[0, *sorted(min(cut, seqlen) for cut in cuts), seqlen], [0, seqlen]]
    table = SegmentTable.uneven(parts, documents=documents)
    seen = np.zeros((2, seqlen), int)
    for rank in range(len(parts)):
        local = table.local(rank)
        assert local.documents.tokens == 2 * local.length
        for row in range(2):
            seen[row, local.positions] += 1
        for slot in range(len(local.segments)):
            for row in range(2):
                # a segment's state passes on only if no document starts in it
                segment = local.segments[slot]
                starts_inside = any(segment.start <= start < segment.end for start in documents[row][:-1])
                starts_inside &= segment.end > segment.start
                nonempty = {a for a, b in zip(documents[row], documents[row][1:], strict=False) if b > a}
                assert local.passes[slot, row] == (
                    not (starts_inside and nonempty & set(range(segment.start, segment.end)))
                )
    assert (seen == 1).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seqlen", [8, 13, 24])
def test_zigzag_balances_causal_work(seqlen, ranks):
    table = SegmentTable.zigzag(seqlen, ranks)
    work = [int((table.local(rank).positions + 1).sum()) for rank in range(ranks)]
    assert max(work) - min(work) <= 2 * seqlen
    assert table.holders.tolist() == [*range(ranks), *reversed(range(ranks))]


def test_shards_rejoin():
    table = SegmentTable.zigzag(11, 3)
    whole = torch.arange(22).view(2, 11)
    joined = torch.empty_like(whole)
    for rank in range(3):
        joined[:, table.local(rank).positions] = table.shard(whole, rank)
    assert torch.equal(joined, whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentTable([Segment(0, 4, 0, 0), Segment(5, 8, 1, 0)], ranks=2), "without gap"),
        (lambda: SegmentTable([Segment(0, 4, 2, 0)], ranks=2), "must lie in"),
        (lambda: SegmentTable([Segment(0, 4, 0, 1)], ranks=1), "count from 0"),
        (lambda: SegmentTable.contiguous(8, 2, documents=[[0, 7]]), "must end at seqlen"),
        (
            lambda: SegmentTable.contiguous(8, 2, documents=[[0, 5, 3, 8]]),
            "offsets that begin at 0 and do not descend",
        ),
        (lambda: SegmentTable.contiguous(8, 2, documents=[[0, 8], [1, 8]]), r"of row 1 .* got \[1, 8\]"),
        (lambda: SegmentTable.contiguous(8, 2, documents=[0, 5, 8]), r"as in \[\[0, 5, 8\]\], got \[0, 5, 8\]"),
        (lambda: SegmentTable.contiguous(8, 2, documents=[[0, 3.7, 8]]), "must list for each row the integer offsets"),
        (lambda: SegmentTable.contiguous(8, 2, carried=["False"]), r"carried must say .* got \['False'\]"),
        (lambda: rows_between([[0, 8]], 4, 12), r"\[0, 8\), row 0's tokens, got \[4, 12\)"),
        (lambda: rows_between([[0, 8]], 6, 4), r"got \[6, 4\)"),
        (lambda: rows_between([0, 8], 0, 4), "must list for each row"),
        (lambda: SegmentTable.contiguous(8, 2, batch=2, documents=[[0, 8]]), "give one of them"),
        (lambda: SegmentTable.contiguous(8, 2, documents=[]), "batch must be above 0"),
        (lambda: SegmentTable.contiguous(8, 0), "ranks must be above 0"),
        (lambda: SegmentTable.contiguous(8, 2.0), "ranks must be an integer, got 2.0"),
        (lambda: SegmentTable([Segment(0, 4, 0, 0)], ranks=1.0), "ranks must be an integer, got 1.0"),
        (lambda: SegmentTable.contiguous(8, 2, batch=1.5), "batch must be an integer, got 1.5"),
        (lambda: SegmentTable.contiguous(8.5, 2), "seqlen must be an integer, got 8.5"),
        (lambda: SegmentTable.contiguous(-4, 2), "seqlen must not be below 0, got -4"),
        (lambda: SegmentTable.zigzag("8", 2), "seqlen must be an integer, got '8'"),
        (lambda: SegmentTable.uneven([4, 1.5]), r"lengths\[1\] must be an integer, got 1.5"),
        (lambda: SegmentTable.uneven([4, -1]), r"lengths\[1\] must not be below 0, got -1"),
        (lambda: SegmentTable.contiguous(8, 2).local(2), "must lie in"),
        (lambda: SegmentTable.contiguous(8, 2).shard(torch.zeros(1, 7), 0), "whole sequence"),
    ],
)
def test_wrong_cuts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
