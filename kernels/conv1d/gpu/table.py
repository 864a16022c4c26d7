"""Where the convolution's work is cut: blocks of tokens, and in each the runs of tokens of one document."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...common.documents import rows_of_states
from ...common.transfer import Kept, to_device


@dataclass(frozen=True)
class Table:
    """blocks: (2, nblocks): first span, number of spans. spans: (7, nspans): flat token, row, place in the row, length,
    tokens of its document before and after, up to width - 1, and the row of the initial states that precedes its
    document, or -1. Both int32.

    The last width - 1 inputs of documents, int64: from_tokens (3, n): place among the final states' rows, row, place in
    the row; from_states (2, m): place, row of the flattened initial states.
    """

    blocks: Tensor
    spans: Tensor
    from_tokens: Tensor
    from_states: Tensor


_kept = Kept(capacity=64)


def lay_out(
    offsets: Tensor | None, enters: Tensor | None, leaves: Tensor | None, batch: int, seqlen: int, width: int,
    block: int, final_count: int, device: torch.device,
) -> Table:  # fmt: skip
    """The table of documents between `offsets` of a flattened (batch, seqlen), None: rows.

    enters, leaves: on the host, the documents that rows of initial and of `final_count` final states belong to, None:
    row d to document d.
    """
    content = [None if tensor is None else tensor.numpy().tobytes() for tensor in (offsets, enters, leaves)]
    key = (*content, batch, seqlen, width, block, final_count, device)
    return _kept.get(key, lambda: _build(offsets, enters, leaves, batch, seqlen, width, block, final_count, device))


def _build(offsets, enters, leaves, batch, seqlen, width, block, final_count, device) -> Table:
    ends = np.arange(batch + 1) * seqlen if offsets is None else offsets.numpy()
    initial = rows_of_states(enters, len(ends) - 1)
    # spans end where a document or a block does
    tokens = int(ends[-1])
    starts = np.union1d(ends[:-1][np.diff(ends) > 0], np.arange(0, tokens, block))
    lengths = np.diff(np.append(starts, tokens))
    document = np.searchsorted(ends, starts, side="right") - 1
    before = np.minimum(starts - ends[document], width - 1)
    after = np.minimum(ends[document + 1] - starts - lengths, width - 1)
    row, place = np.divmod(starts, max(seqlen, 1))
    spans = np.stack([starts, row, place, lengths, before, after, initial[document]])
    first = np.searchsorted(starts, np.arange(0, tokens, block))
    blocks = np.stack([first, np.diff(np.append(first, len(starts)))])
    from_tokens, from_states = _tails(ends, initial, rows_of_states(leaves, len(ends) - 1), seqlen, width, final_count)
    return Table(
        to_device(blocks.astype(np.int32), device), to_device(spans.astype(np.int32), device),
        to_device(from_tokens, device), to_device(from_states, device),
    )  # fmt: skip


def lay_out_openings(offsets: Tensor, documents: np.ndarray, width: int, device: torch.device) -> Table:
    """The table of the first width - 1 tokens of some of the documents packed in one row, each with a row of initial
    states."""
    key = ("openings", offsets.numpy().tobytes(), documents.tobytes(), width, device)
    return _kept.get(key, lambda: _build_openings(offsets.numpy(), documents, width, device))


def _build_openings(ends: np.ndarray, documents: np.ndarray, width: int, device: torch.device) -> Table:
    lengths = np.diff(ends)[documents]
    documents, lengths = documents[lengths > 0], lengths[lengths > 0]
    starts, first, none = ends[documents], np.minimum(lengths, width - 1), np.zeros_like(documents)
    spans = np.stack([starts, none, starts, first, none, np.minimum(lengths - first, width - 1), documents])
    blocks = np.stack([np.arange(len(documents)), np.ones_like(documents)])
    no_tails = (torch.empty(count, 0, dtype=torch.int64, device=device) for count in (3, 2))
    return Table(to_device(blocks.astype(np.int32), device), to_device(spans.astype(np.int32), device), *no_tails)


def _tails(ends, initial, final, seqlen, width, final_count) -> tuple[np.ndarray, np.ndarray]:
    document = np.flatnonzero(final >= 0) if final_count else np.empty(0, np.int64)
    place = final[document][:, None] * (width - 1) + np.arange(width - 1)
    token = ends[document + 1][:, None] + np.arange(1 - width, 0)
    behind = token - ends[document][:, None]
    inside = behind >= 0
    row, at = np.divmod(token, max(seqlen, 1))
    known = ~inside & (initial[document] >= 0)[:, None]
    state = initial[document][:, None] * (width - 1) + behind + width - 1
    return np.stack([place[inside], row[inside], at[inside]]), np.stack([place[known], state[known]])
