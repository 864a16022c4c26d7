"""Packed documents: where each begins in a flat row of tokens, known on the host.

Everything that depends on document lengths is worked out here in plain Python, once, and kept; the operators only
index with the tensors this class hands out. One object made per batch and passed to every layer costs one
host-to-device copy per tensor and no synchronisation.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .transfer import Kept, to_device


@dataclass(frozen=True)
class ChunkLayout:
    """Tokens laid out in chunks that never span two documents; short chunks are padded at their end.

    Chunks stand in document order. `order` lists them step-major instead: first every document's first chunk, then
    every document's second, longest documents first, so that one step of the recurrence over chunks is a slice.
    """

    nchunks: int
    slots: Tensor | None  # (tokens,) where each token stands in the padded layout; None: the layout is the tokens
    order: Tensor  # (nchunks,) chunk at each place of the step-major order
    inverse: Tensor  # (nchunks,) place of each chunk in the step-major order
    steps: tuple[int, ...]  # number of documents still running at each step
    ranking: Tensor  # (documents,) documents by descending number of chunks
    unranking: Tensor  # (documents,) the inverse of `ranking`


@dataclass(frozen=True)
class Openings:
    """The first tokens of some documents, packed."""

    document: Tensor  # (openings,)
    token: Tensor  # (tokens of the openings,)
    documents: "Documents"  # the openings


class Documents:
    """Documents packed end to end in one flat row of tokens; a document may be empty.

    cu_seqlens: ascending offsets, `[0, len_0, len_0 + len_1, ..., tokens]`. Raises ValueError when they are not.
    """

    def __init__(self, cu_seqlens: Sequence[int]):
        offsets = tuple(int(offset) for offset in cu_seqlens)
        if not offsets or offsets[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {list(offsets[:8])}")
        if any(b < a for a, b in itertools.pairwise(offsets)):
            raise ValueError(f"cu_seqlens must not descend, got {list(offsets[:8])}{'...' if len(offsets) > 8 else ''}")
        self.offsets = offsets
        with torch.inference_mode(False):  # or training could not use it
            self.on_host = torch.tensor(offsets, dtype=torch.int64, device="cpu")
        # the first and the last document of each row, where rows hold several
        self.row_edges: tuple[list[int], list[int]] | None = None
        # the same as tensors; None: row d of initial and of final states belongs to document d
        self.edges_on_host: tuple[Tensor | None, Tensor | None] = None, None
        self._kept = Kept()

    @classmethod
    def rows(cls, batch: int, seqlen: int) -> "Documents":
        """Every row of a (batch, seqlen) tensor is one document."""
        return cls([row * seqlen for row in range(batch + 1)])

    @classmethod
    def of(cls, cu_seqlens: "Documents | Tensor | Sequence[int]", tokens: int) -> "Documents":
        """Documents from offsets that must cover `tokens`; a tensor on a device is copied to the host."""
        if isinstance(cu_seqlens, Tensor):
            cu_seqlens = cu_seqlens.tolist()
        documents = cu_seqlens if isinstance(cu_seqlens, Documents) else cls(cu_seqlens)
        if documents.tokens != tokens:
            raise ValueError(f"cu_seqlens must end at the number of tokens ({tokens}), got {documents.tokens}")
        return documents

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> "Documents":
        """Documents from a (batch, seqlen) document index; a new one starts wherever the index changes."""
        batch, seqlen = seq_idx.shape
        if seqlen == 0:
            return cls.rows(batch, 0)
        index = seq_idx.cpu()
        starts = torch.ones(batch, seqlen, dtype=torch.bool, device="cpu")
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        documents = cls([*starts.flatten().nonzero().flatten().tolist(), batch * seqlen])
        last = (starts.sum(1).cumsum(0) - 1).tolist()
        return documents.in_rows([0, *(document + 1 for document in last[:-1])], last)

    def in_rows(self, first: list[int], last: list[int]) -> "Documents":
        """The same documents in rows, each from its first to its last: states enter the first and leave the last."""
        documents = Documents(self.offsets)
        documents.row_edges = first, last
        with torch.inference_mode(False):
            documents.edges_on_host = torch.tensor(first, device="cpu"), torch.tensor(last, device="cpu")
        return documents

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(np.asarray(self.offsets, dtype=np.int64))

    @cached_property
    def starts(self) -> np.ndarray:
        return np.asarray(self.offsets[:-1], dtype=np.int64)

    @property
    def nrows(self) -> int:
        """How many states may enter: one a row, or one a document where documents are the rows."""
        return len(self) if self.row_edges is None else len(self.row_edges[0])

    def enter(self, states: Tensor) -> Tensor:
        """States of rows -> states of documents: a row's state enters its first document, zeros the others."""
        if self.row_edges is None:
            return states
        edges = self.row_edges[0]
        first = self._index("first", states.device, lambda: edges)
        return states.new_zeros(len(self), *states.shape[1:]).index_copy(0, first, states)

    def leave(self, states: Tensor) -> Tensor:
        """States of documents -> states of rows: a row leaves the state of its last document."""
        if self.row_edges is None:
            return states
        edges = self.row_edges[1]
        return states[self._index("last", states.device, lambda: edges)]

    def position(self, device: torch.device) -> Tensor:
        """(tokens,) each token's place in its document, counted from 0."""
        return self._index("position", device, lambda: np.arange(self.tokens) - np.repeat(self.starts, self.lengths))

    def heads(self, count: int, device: torch.device) -> Tensor:
        """(3, heads): document, token and place in the document of the first `count` tokens of every document."""

        def build():
            lengths = np.minimum(self.lengths, count)
            document = np.repeat(np.arange(len(self)), lengths)
            place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            return np.stack([document, self.starts[document] + place, place])

        return self._index(("heads", count), device, build)

    def tails(self, count: int, device: torch.device) -> Tensor:
        """(documents, count): the last `count` tokens of every document; those before its start index what precedes
        it, (documents, count) entries that follow the tokens."""

        def build():
            token = (self.starts + self.lengths)[:, None] + np.arange(-count, 0)
            before = token - self.starts[:, None]
            document = np.arange(len(self))[:, None]
            return np.where(before >= 0, token, self.tokens + document * count + before + count)

        return self._index(("tails", count), device, build)

    def openings(self, numbers: np.ndarray, count: int, device: torch.device) -> Openings:
        """The first `count` tokens of documents, or all that they have."""
        key = "openings", numbers.tobytes(), count, device
        return self._kept.get(key, lambda: self._open(numbers, count, device))

    def _open(self, numbers: np.ndarray, count: int, device: torch.device) -> Openings:
        lengths = np.minimum(self.lengths[numbers], count)
        ends = np.cumsum(lengths)
        token = np.arange(lengths.sum()) + np.repeat(self.starts[numbers] - ends + lengths, lengths)
        return Openings(to_device(numbers, device), to_device(token, device), Documents([0, *ends.tolist()]))

    def chunks(self, chunk_size: int, device: torch.device) -> ChunkLayout:
        """The layout of these documents in chunks of `chunk_size` tokens."""
        return self._kept.get(("chunks", chunk_size, device), lambda: self._lay_out(chunk_size, device))

    def _lay_out(self, chunk_size: int, device: torch.device) -> ChunkLayout:
        per_document = -(-self.lengths // chunk_size)
        first_chunk = np.concatenate([[0], np.cumsum(per_document)])
        nchunks = int(first_chunk[-1])
        ranking = np.argsort(-per_document, kind="stable")
        steps = tuple(int((per_document > step).sum()) for step in range(int(per_document.max(initial=0))))
        order = np.concatenate(
            [first_chunk[ranking[:running]] + step for step, running in enumerate(steps)] or [np.empty(0)]
        ).astype(np.int64)
        slots = None
        if nchunks * chunk_size != self.tokens:
            padded_start = first_chunk[:-1] * chunk_size
            slots = np.arange(self.tokens) + np.repeat(padded_start - self.starts, self.lengths)
        move = lambda array: to_device(array, device)  # noqa: E731
        return ChunkLayout(
            nchunks=nchunks,
            slots=None if slots is None else move(slots),
            order=move(order),
            inverse=move(np.argsort(order, kind="stable")),
            steps=steps,
            ranking=move(ranking),
            unranking=move(np.argsort(ranking, kind="stable")),
        )

    def _index(self, name: Hashable, device: torch.device, build: Callable[[], Any]) -> Tensor:
        """An int64 tensor made once for this batch and kept for the next layer."""
        return self._kept.get((name, device), lambda: to_device(np.asarray(build(), dtype=np.int64), device))


def check_numbers(name: str, numbers: Sequence[int] | np.ndarray, ndocuments: int) -> None:
    """Raise ValueError unless `numbers` are those of documents, each at most once."""
    if len(numbers) == 0:
        return
    ordered = np.sort(numbers)
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError(f"{name} must name each document at most once, got {list(numbers)[:8]}")
    if ordered[0] < 0 or ordered[-1] >= ndocuments:
        raise ValueError(f"{name} must name documents from 0 to {ndocuments - 1}, got {ordered[0]} to {ordered[-1]}")


def rows_of_states(documents: Tensor | None, ndocuments: int) -> np.ndarray:
    """(ndocuments,) the row of states that belongs to each document, -1 where none does; None: its own number."""
    if documents is None:
        return np.arange(ndocuments)
    rows = np.full(ndocuments, -1)
    rows[documents.numpy()] = np.arange(len(documents))
    return rows
