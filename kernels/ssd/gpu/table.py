"""Spans of a batch of packed documents: what one program walks over, worked out on the host and kept.

A document is one span, or several consecutive ones where there are too few documents and heads to fill the device.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...common.transfer import to_device

ALIGNMENT = 128  # spans of one document are cut at multiples of this, a multiple of every chunk size


@dataclass(frozen=True)
class Chunks:
    """The chunks of all spans, for one chunk size, in span order."""

    count: int
    chunks: Tensor  # (4, count) int32: row, first token, length, row of the document's final state
    spans: Tensor  # (5, nspans) int32: row, first token, length, first chunk, number of chunks


@dataclass(frozen=True)
class Table:
    """Spans and which state enters and leaves each; -1 where none does. Indices of states are rows of the tensors
    that callers hold, int32 on the device."""

    nspans: int
    ndocuments: int
    cut: bool  # whether any document is several spans
    by_chunk: dict[int, Chunks]
    documents: Tensor  # (2, ndocuments): first span, number of spans
    document_initial: Tensor  # (ndocuments,) row of the initial states
    document_final: Tensor  # (ndocuments,) row of the final states
    span_initial: Tensor  # (nspans,) as document_initial, where documents are one span
    span_final: Tensor
    last_final: Tensor  # (nspans,) row of the final states at a document's last span
    no_span: Tensor  # (nspans,) -1
    no_document: Tensor  # (ndocuments,) -1
    span_itself: Tensor  # (nspans,) 0, 1, 2, ...
    precedes: Tensor  # (nspans,) itself where another span of its document follows
    follows: Tensor  # (nspans,) itself where another span of its document comes before
    wanted: Tensor  # (nspans,) itself where the document's final state is wanted
    first_initial: Tensor  # (nspans,) row of the initial states at a document's first span
    empty: tuple[Tensor, Tensor] | None  # rows of the initial and of the final states of documents without tokens


_kept: OrderedDict[tuple, Table] = OrderedDict()
_CAPACITY = 64


def lay_out(
    offsets: Tensor, enters: Tensor | None, leaves: Tensor | None, seqlen: int, programs_per_span: int,
    chunk_sizes: tuple[int, ...], device: torch.device, slots: int,
) -> Table:  # fmt: skip
    """The table of documents between `offsets` of a flattened batch whose rows are `seqlen` tokens.

    offsets, enters and leaves are on the host: (documents + 1,), and the documents that rows of initial and final
    states belong to, None: row d to document d. slots: how many programs the device holds at once.
    """
    key = (
        _content(offsets), _content(enters), _content(leaves), seqlen, programs_per_span, chunk_sizes, device, slots
    )  # fmt: skip
    if key in _kept:
        _kept.move_to_end(key)
    else:
        _kept[key] = _build(offsets, enters, leaves, seqlen, programs_per_span, chunk_sizes, device, slots)
        if len(_kept) > _CAPACITY:
            _kept.popitem(last=False)
    return _kept[key]


def _content(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.numpy().tobytes()


def _build(offsets, enters, leaves, seqlen, programs_per_span, chunk_sizes, device, slots) -> Table:
    offsets = offsets.numpy()
    lengths = np.diff(offsets)
    ndocuments = len(lengths)
    initial, final = _rows(enters, ndocuments), _rows(leaves, ndocuments)
    pieces = -(-lengths // _span_length(lengths, programs_per_span, slots))
    document = np.repeat(np.arange(ndocuments), pieces)
    first = np.cumsum(pieces) - pieces
    place = np.arange(len(document)) - first[document]
    # even spans, rounded up to whole chunks
    size = -(-lengths // np.maximum(pieces, 1))
    size = -(-size // ALIGNMENT) * ALIGNMENT
    begin = np.minimum(place * size[document], lengths[document])
    length = np.minimum(size[document], lengths[document] - begin)
    token = offsets[:-1][document] + begin
    row, start = (token // seqlen, token % seqlen) if seqlen else (token, token)
    move = lambda array: to_device(np.ascontiguousarray(array, dtype=np.int32), device)  # noqa: E731
    itself = np.arange(len(document))
    empty = np.flatnonzero((lengths == 0) & (final >= 0))
    return Table(
        nspans=len(document),
        ndocuments=ndocuments,
        cut=bool((pieces > 1).any()),
        by_chunk={size: _chunks(row, start, length, final[document], size, move) for size in chunk_sizes},
        documents=move(np.stack([first, pieces])),
        document_initial=move(initial),
        document_final=move(final),
        span_initial=move(initial[document]),
        span_final=move(final[document]),
        last_final=move(np.where(place + 1 == pieces[document], final[document], -1)),
        no_span=move(np.full(len(document), -1)),
        no_document=move(np.full(ndocuments, -1)),
        span_itself=move(itself),
        precedes=move(np.where(place + 1 < pieces[document], itself, -1)),
        follows=move(np.where(place > 0, itself, -1)),
        wanted=move(np.where(final[document] >= 0, itself, -1)),
        first_initial=move(np.where(place == 0, initial[document], -1)),
        empty=(to_device(initial[empty].astype(np.int64), device), to_device(final[empty].astype(np.int64), device))
        if len(empty)
        else None,
    )


def _rows(documents: Tensor | None, ndocuments: int) -> np.ndarray:
    """(ndocuments,) the row of states that belongs to each document."""
    if documents is None:
        return np.arange(ndocuments)
    rows = np.full(ndocuments, -1)
    rows[documents.numpy()] = np.arange(len(documents))
    return rows


def _chunks(row, start, length, final, size, move) -> Chunks:
    per_span = -(-length // size)
    span = np.repeat(np.arange(len(length)), per_span)
    first = np.cumsum(per_span) - per_span
    begin = (np.arange(len(span)) - first[span]) * size
    return Chunks(
        count=len(span),
        chunks=move(np.stack([row[span], start[span] + begin, np.minimum(length[span] - begin, size), final[span]])),
        spans=move(np.stack([row, start, length, first, per_span])),
    )


def _span_length(lengths: np.ndarray, programs_per_span: int, slots: int) -> int:
    """The longest span allowed: the one that finishes first by a model of the device.

    Time is in tokens of one program. Programs run in waves of `slots`, and every span but a document's last costs a
    sweep for the state it leaves, measured at a third of the scan.
    """
    longest, total = int(lengths.max(initial=0)), int(lengths.sum())
    best, best_time = max(longest, 1), math.inf
    for pieces in range(1, 65):
        span = max(ALIGNMENT, -(-longest // (pieces * ALIGNMENT)) * ALIGNMENT)
        counts = -(-lengths // span)
        programs = int(counts.sum()) * programs_per_span
        waves = programs / slots
        length = min(span, longest)
        # few waves come whole; of many, only the last is ragged
        each = total / max(int(counts.sum()), 1)
        scan = max(math.ceil(waves) * length if waves <= 2 else (waves + 0.4) * each, length) + ALIGNMENT * waves
        swept = int((lengths - np.maximum(lengths - (counts - 1) * span, 0))[counts > 1].clip(0).sum())
        time = scan + swept * programs_per_span / slots / 3
        if time < 0.97 * best_time:
            best, best_time = span, time
        if span == ALIGNMENT:
            break
    return best
