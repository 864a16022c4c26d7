"""Spans of a batch of packed documents: what one program walks over, worked out on the host and kept.

A document is one span, or several consecutive ones where there are too few documents and heads to fill the device.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...common.documents import rows_of_states
from ...common.transfer import Kept, to_device

ALIGNMENT = 128  # spans of one document are cut at multiples of this, a multiple of every chunk size
UNIT = 4  # numbers that each part of a table is padded to, 16 bytes


@dataclass(frozen=True)
class Chunks:
    """The chunks of all spans, for one chunk size, in span order."""

    count: int
    chunks: Tensor  # (3, count) int32: row, first token, length
    spans: Tensor  # (5, nspans) int32: row, first token, length, first chunk, number of chunks


@dataclass(frozen=True)
class Table:
    """Spans and which state enters and leaves each; -1 where none does. Indices of states are rows of the tensors
    that callers hold, int32 on the device."""

    memory: Tensor  # of all the others
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
    leads: Tensor  # (nspans,) itself where another follows or the document's final state is wanted
    trails: Tensor  # (nspans,) itself where another comes before or the document's initial state has a gradient
    first_initial: Tensor  # (nspans,) row of the initial states at a document's first span
    empty: Tensor  # (n,) rows of the final states of documents without tokens
    through: Tensor  # (2, m) of those into which a state may come: its row, and that of the final state


_kept = Kept(capacity=64)


def lay_out(
    offsets: Tensor, enters: Tensor | None, leaves: Tensor | None, seqlen: int, programs_per_span: int,
    chunk_sizes: tuple[int, ...], device: torch.device, slots: int,
) -> Table:  # fmt: skip
    """The table of documents between `offsets` of a flattened batch whose rows are `seqlen` tokens.

    offsets, enters and leaves are on the host: (documents + 1,), and the documents that rows of initial and final
    states belong to, None: row d to document d. slots: how many programs the device holds at once; 0: no document is
    cut to fill them.
    """
    key = (
        content(offsets), content(enters), content(leaves), seqlen, programs_per_span, chunk_sizes, device, slots
    )  # fmt: skip
    return _kept.get(
        key, lambda: _build(offsets, enters, leaves, seqlen, programs_per_span, chunk_sizes, device, slots)
    )


def content(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.numpy().tobytes()


def _build(offsets, enters, leaves, seqlen, programs_per_span, chunk_sizes, device, slots) -> Table:
    offsets = offsets.numpy()
    lengths = np.diff(offsets)
    ndocuments = len(lengths)
    initial, final = rows_of_states(enters, ndocuments), rows_of_states(leaves, ndocuments)
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
    itself = np.arange(len(document))
    empty = (lengths == 0) & (final >= 0)
    through = empty & (initial >= 0)
    arrays = {
        "documents": np.stack([first, pieces]),
        "document_initial": initial,
        "document_final": final,
        "span_initial": initial[document],
        "span_final": final[document],
        "last_final": np.where(place + 1 == pieces[document], final[document], -1),
        "no_span": np.full(len(document), -1),
        "no_document": np.full(ndocuments, -1),
        "span_itself": itself,
        "precedes": np.where(place + 1 < pieces[document], itself, -1),
        "follows": np.where(place > 0, itself, -1),
        "leads": np.where((place + 1 < pieces[document]) | (final[document] >= 0), itself, -1),
        "trails": np.where((place > 0) | (initial[document] >= 0), itself, -1),
        "first_initial": np.where(place == 0, initial[document], -1),
        "empty": final[empty],
        "through": np.stack([initial[through], final[through]]),
    }
    for size in chunk_sizes:
        arrays |= _chunks(row, start, length, size)
    memory, parts = _move(arrays, device)
    chunks = {size: (parts.pop(f"chunks {size}"), parts.pop(f"spans {size}")) for size in chunk_sizes}
    return Table(
        memory=memory,
        nspans=len(document),
        ndocuments=ndocuments,
        cut=bool((pieces > 1).any()),
        by_chunk={size: Chunks(both[0].shape[1], *both) for size, both in chunks.items()},
        **parts,
    )


def _move(arrays: dict[str, np.ndarray], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Arrays in one int32 tensor on the device, and each as a part of it."""
    sizes = [-(-array.size // UNIT) * UNIT for array in arrays.values()]
    flat = np.zeros(sum(sizes), np.int32)
    for array, end, size in zip(arrays.values(), np.cumsum(sizes), sizes, strict=True):
        flat[end - size : end - size + array.size] = array.reshape(-1)
    memory = to_device(flat, device)
    parts = zip(arrays.items(), memory.split(sizes), strict=True)
    return memory, {name: part[: array.size].view(array.shape) for (name, array), part in parts}


def _chunks(row, start, length, size) -> dict[str, np.ndarray]:
    """The chunks of all spans, and where those of each span are."""
    per_span = -(-length // size)
    span = np.repeat(np.arange(len(length)), per_span)
    first = np.cumsum(per_span) - per_span
    begin = (np.arange(len(span)) - first[span]) * size
    chunks = [row[span], start[span] + begin, np.minimum(length[span] - begin, size)]
    return {f"chunks {size}": np.stack(chunks), f"spans {size}": np.stack([row, start, length, first, per_span])}


def _span_length(lengths: np.ndarray, programs_per_span: int, slots: int) -> int:
    """The longest span allowed: the one that finishes first by a model of the device.

    Time is in tokens of one program. Programs run in waves of `slots`, and every span but a document's last costs a
    sweep for the state it leaves, measured at a third of the scan.
    """
    longest, total = int(lengths.max(initial=0)), int(lengths.sum())
    if slots == 0:
        return max(longest, 1)
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
