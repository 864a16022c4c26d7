"""How a sequence is cut: causal segments, who holds them, and where documents begin. All of it lives on the host."""

import bisect
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mamba2_dist.kernels.common.checks import check_integer, check_positive
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.common.transfer import Kept, Made, to_device


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of every row, held by `rank` as its `slot`-th segment."""

    start: int
    end: int
    rank: int
    slot: int


class SegmentTable:
    """The cut of a batch of sequences over the ranks of a context-parallel group, made once a batch.

    segments: in causal order, covering [0, seqlen) without gap; a segment may be empty.
    documents: for each row of the batch the ascending offsets of its documents, [0, ..., seqlen]; empty ones are
        allowed. None: each of `batch` rows (1) is one document.
    carried: for each row whether its first document goes on from the same row of the batch before; None: none does.
    Raises ValueError for segments or documents that do not cover the sequence, and carried rows without a first token.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        ranks: int,
        batch: int | None = None,
        documents: Sequence[Sequence[int]] | None = None,
        carried: Sequence[bool] | None = None,
    ):
        check_integer("ranks", ranks)
        check_positive("ranks", ranks)
        if batch is not None:
            check_integer("batch", batch)
        self.segments = tuple(segments)
        self.ranks = ranks
        check_positive("the number of segments", len(self.segments))
        end = 0
        for segment in self.segments:
            if segment.start != end or segment.end < segment.start:
                raise ValueError(f"segments must follow each other without gap; {segment} does not follow token {end}")
            if not 0 <= segment.rank < ranks:
                raise ValueError(f"segment rank ({segment.rank}) must lie in [0, {ranks})")
            end = segment.end
        self.held: list[list[Segment]] = [[] for _ in range(ranks)]  # by rank and slot
        for segment in self.segments:
            self.held[segment.rank].append(segment)
        for rank, held in enumerate(self.held):
            held.sort(key=lambda segment: segment.slot)
            slots = [segment.slot for segment in held]
            if slots != list(range(len(slots))):
                raise ValueError(f"rank {rank}'s slots must count from 0 without gap, got {slots}")
        self.seqlen = end
        if documents is None:
            documents = [(0, self.seqlen)] * (1 if batch is None else batch)
        self.documents = _rows(documents)
        self.batch = len(self.documents)
        check_positive("batch", self.batch)
        if batch not in (None, self.batch):
            raise ValueError(
                f"batch ({batch}) must be the number of rows of documents ({self.batch}); give one of them"
            )
        for row, offsets in enumerate(self.documents):
            if offsets[-1] != self.seqlen:
                raise ValueError(f"documents of row {row} must end at seqlen ({self.seqlen}), got {offsets[-1]}")
        self.carried = np.asarray([False] * self.batch if carried is None else carried)
        if self.carried.shape != (self.batch,) or self.carried.dtype != bool:
            raise ValueError(f"carried must say of each of {self.batch} rows whether it goes on, got {carried}")
        for row in np.flatnonzero(self.carried).tolist():
            if not any(self.documents[row][:2]):
                raise ValueError(
                    f"row {row} is carried and must begin with a document that has tokens, got offsets "
                    f"{list(self.documents[row][:8])}; leave empty documents out or set carried[{row}] to False"
                )
        self._local: dict[int, LocalSegments] = {}

    @classmethod
    def uneven(cls, lengths: Sequence[int], **options) -> "SegmentTable":
        """Rank r holds the r-th of consecutive runs of the given lengths; options: `batch` or `documents`,
        and `carried`."""
        for rank, length in enumerate(lengths):
            _check_length(f"lengths[{rank}]", length)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        segments = [Segment(offsets[rank], offsets[rank + 1], rank, 0) for rank in range(len(lengths))]
        return cls(segments, ranks=len(lengths), **options)

    @classmethod
    def contiguous(cls, seqlen: int, ranks: int, **options) -> "SegmentTable":
        """Rank r holds the r-th of `ranks` consecutive runs, as even as can be; options: `batch` or `documents`,
        and `carried`."""
        return cls.uneven(_even(seqlen, ranks), **options)

    @classmethod
    def zigzag(cls, seqlen: int, ranks: int, **options) -> "SegmentTable":
        """Of 2 * `ranks` consecutive runs rank r holds the r-th and the r-th from the end, which balances causal
        attention; options: `batch` or `documents`, and `carried`."""
        lengths = _even(seqlen, ranks, 2)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        owners = [*((rank, 0) for rank in range(ranks)), *((rank, 1) for rank in reversed(range(ranks)))]
        segments = [Segment(offsets[i], offsets[i + 1], rank, slot) for i, (rank, slot) in enumerate(owners)]
        return cls(segments, ranks=ranks, **options)

    @cached_property
    def position(self) -> dict[Segment, int]:
        """Where each segment stands in causal order."""
        return {segment: position for position, segment in enumerate(self.segments)}

    @cached_property
    def continued(self) -> np.ndarray:
        """(segments, batch): whether a segment's first token, if it has one, continues a document."""
        starts, ends = (np.array([getattr(s, edge) for s in self.segments]) for edge in ("start", "end"))
        return np.stack([(starts < ends) & ~np.isin(starts, begins) for begins in self.begins], axis=1)

    @cached_property
    def begins(self) -> list[np.ndarray]:
        """For each row the tokens before which a document begins."""
        rows = zip(self.documents, self.carried, strict=True)
        return [np.unique(offsets[1:] if carried else offsets) for offsets, carried in rows]

    @cached_property
    def closing(self) -> Segment:
        """The last segment that has tokens, or the last."""
        return next((segment for segment in self.segments[::-1] if segment.start < segment.end), self.segments[-1])

    @cached_property
    def backwards(self) -> "SegmentTable":
        """The table of the same rows from their last token to their first, in the same slots."""
        segments = [Segment(self.seqlen - s.end, self.seqlen - s.start, s.rank, s.slot) for s in self.segments[::-1]]
        documents = [[self.seqlen - offset for offset in offsets[::-1]] for offsets in self.documents]
        return SegmentTable(segments, ranks=self.ranks, documents=documents)

    def document_start(self, row: int, token: int) -> int:
        """The first token, of this batch, of the document that a token of a row belongs to."""
        return self.documents[row][bisect.bisect_right(self.documents[row], token) - 1]

    def segment_of(self, token: int) -> Segment:
        """The segment that a token belongs to."""
        return self.segments[bisect.bisect_right(self.segments, token, key=lambda segment: segment.end)]

    @cached_property
    def holders(self) -> np.ndarray:
        """The rank of every segment in causal order."""
        return np.array([segment.rank for segment in self.segments])

    @cached_property
    def slots(self) -> np.ndarray:
        """The slot of every segment in causal order."""
        return np.array([segment.slot for segment in self.segments])

    @cached_property
    def slots_per_rank(self) -> int:
        """The most segments a rank holds."""
        return int(self.slots.max()) + 1

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of every rank, of one row."""
        return [sum(segment.end - segment.start for segment in held) for held in self.held]

    def positions(self, rank: int) -> np.ndarray:
        """(length,) the place in the whole row of each of `rank`'s tokens."""
        held = self.held[rank]
        return np.concatenate([np.arange(segment.start, segment.end) for segment in held] or [np.empty(0, np.int64)])

    def local(self, rank: int) -> "LocalSegments":
        """What `rank` holds; kept for the next layer."""
        if rank not in self._local:
            self._local[rank] = LocalSegments(self, rank)
        return self._local[rank]

    def check(self, name: str, tensor: Tensor, rank: int, ranks: int) -> None:
        """Raise ValueError unless the table is made for `ranks` and `tensor` is (batch, `rank`'s tokens, ...)."""
        if self.ranks != ranks:
            raise ValueError(f"the segment table is made for {self.ranks} ranks, cp is {ranks}")
        expected = (self.batch, self.local(rank).length)
        if tuple(tensor.shape[:2]) != expected:
            raise ValueError(
                f"{name} must have shape (batch, this rank's tokens) = {expected} by the segment table, got "
                f"{tuple(tensor.shape[:2])}"
            )

    def shard(self, tensor: Tensor, rank: int, dim: int = 1) -> Tensor:
        """`rank`'s tokens of a whole (batch, seqlen, ...) tensor, its segments in slot order."""
        if tensor.shape[dim] != self.seqlen:
            raise ValueError(f"axis {dim} must hold the whole sequence ({self.seqlen}), got {tensor.shape[dim]}")
        none = tensor.narrow(dim, 0, 0)  # a rank may hold no segment
        return torch.cat(
            [none, *(tensor.narrow(dim, s.start, s.end - s.start) for s in self.local(rank).segments)], dim
        )

    @cached_property
    def document_starts(self) -> np.ndarray:
        """(batch, seqlen): the first token of the document each token belongs to."""
        starts = np.zeros((self.batch, self.seqlen), np.int64)
        for row, offsets in enumerate(self.documents):
            starts[row, [offset for offset in offsets if offset < self.seqlen]] = [
                o for o in offsets if o < self.seqlen
            ]
        return np.maximum.accumulate(starts, axis=1)


def rows_between(documents: Sequence[Sequence[int]], start: int, end: int) -> dict:
    """`documents` and `carried` of a table of tokens [start, end) of rows of documents.

    At 0 every row begins a document: set `carried` yourself where that goes on from a batch before. Raises ValueError
    for tokens that a row does not have.
    """
    rows = _rows(documents)
    for row, offsets in enumerate(rows):
        if not 0 <= start <= end <= offsets[-1]:
            raise ValueError(f"[start, end) must lie in [0, {offsets[-1]}), row {row}'s tokens, got [{start}, {end})")
    return {
        "documents": [[0, *(o - start for o in offsets if start < o < end), end - start] for offsets in rows],
        "carried": [start not in offsets for offsets in rows],
    }


class LocalSegments:
    """One rank's tokens: (batch, length), rows of segments in slot order, cut into pieces of documents.

    A piece is the part of one document inside one segment of one row. `documents` describes the pieces packed end to
    end, in the order (row, slot, document).
    """

    def __init__(self, table: SegmentTable, rank: int):
        if not 0 <= rank < table.ranks:
            raise ValueError(f"rank ({rank}) must lie in [0, {table.ranks}), the ranks of the segment table")
        self.table, self.rank = table, rank
        self.segments = tuple(table.held[rank])
        self.starts = np.cumsum([0, *(s.end - s.start for s in self.segments)]).tolist()  # of each slot, and the end
        self.length = self.starts[-1]
        offsets = [0]
        first, last, continues = (np.zeros((len(self.segments), table.batch), np.int64) for _ in range(3))
        for row, starts in enumerate(table.begins):
            for slot, segment in enumerate(self.segments):
                cuts = starts[(starts > segment.start) & (starts < segment.end)].tolist()
                first[slot, row] = len(offsets) - 1
                for start, end in zip([segment.start, *cuts], [*cuts, segment.end], strict=True):
                    offsets.append(offsets[-1] + end - start)
                last[slot, row] = len(offsets) - 2
                # an empty segment passes on what enters it
                continues[slot, row] = segment.start == segment.end or segment.start not in starts
        self.documents = Documents(offsets)
        self.first, self.last, self.carried = first, last, table.carried
        self.continues, self.passes = continues.astype(bool), continues.astype(bool) & (first == last)
        self._kept = Kept()

    @cached_property
    def positions(self) -> np.ndarray:
        """(length,) the place in the whole row of each local token."""
        return self.table.positions(self.rank)

    @cached_property
    def rows(self) -> Documents:
        """The pieces of a rank's only segment in rows: states enter each row's first and leave its last."""
        assert len(self.segments) == 1, "states enter rows where one segment holds them"
        return self.documents.in_rows(self.first[0].tolist(), self.last[0].tolist())

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One of `first`, `last`, `continues`, `passes`, `carried` or `positions` on `device`; kept for the next
        layer."""
        return self.kept((name, device), lambda: to_device(getattr(self, name), device))

    def kept(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for this batch and kept for the next layer."""
        return self._kept.get(key, make)


def _even(seqlen: int, ranks: int, pieces: int = 1) -> list[int]:
    """The lengths of so many runs a rank."""
    _check_length("seqlen", seqlen)
    check_integer("ranks", ranks)
    check_positive("ranks", ranks)
    parts = pieces * ranks
    return [seqlen // parts + (part < seqlen % parts) for part in range(parts)]


def _rows(documents: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The offsets of each row as integers of Python."""
    try:
        rows = tuple(tuple(map(operator.index, offsets)) for offsets in documents)
    except TypeError:
        raise ValueError(
            f"documents must list for each row the integer offsets of its documents, as in [[0, 5, 8]], got {documents}"
        ) from None
    for row, offsets in enumerate(rows):
        if offsets[:1] != (0,) or any(b < a for a, b in itertools.pairwise(offsets)):
            raise ValueError(
                f"documents of row {row} must be offsets that begin at 0 and do not descend, got {list(offsets[:8])}"
                f"{'...' if len(offsets) > 8 else ''}"
            )
    return rows


def _check_length(name: str, tokens: int) -> None:
    check_integer(name, tokens)
    if tokens < 0:
        raise ValueError(f"{name} must not be below 0, got {tokens}")
