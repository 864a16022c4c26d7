"""What hypothesis draws: documents in rows, cuts of a sequence over ranks, how states travel and what is kept."""

import itertools

from hypothesis import strategies as st

from mamba2_dist.parallel.segments import Segment

from .splits import SCANS

scans = st.sampled_from(SCANS)
recomputes = st.sampled_from(["none", "conv", "inner"])


def documents(seqlen: int) -> st.SearchStrategy[list[list[int]]]:
    """Of one to three rows the offsets of documents, of 0 to 5 tokens among longer ones."""
    lengths = st.lists(st.one_of(st.integers(0, 5), st.integers(6, seqlen)), min_size=1, max_size=6)
    row = lengths.map(lambda lengths: [0, *(min(end, seqlen) for end in itertools.accumulate(lengths)), seqlen])
    return st.lists(row, min_size=1, max_size=3)


@st.composite
def segments(draw, seqlen: int, ranks: int) -> list[Segment]:
    """Any cuts, empty segments and ranks without any among them; slots in causal order."""
    edges = [0, *sorted(draw(st.lists(st.integers(0, seqlen), max_size=5))), seqlen]
    owners = [draw(st.integers(0, ranks - 1)) for _ in edges[1:]]
    return [Segment(edges[i], edges[i + 1], owner, owners[:i].count(owner)) for i, owner in enumerate(owners)]
