"""Which keys each query sees, where both stand in any order; worked out on the host from segments and documents."""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mamba2_dist.kernels.common.transfer import to_device

from .segments import LocalSegments, SegmentTable

BLOCK = 128
"""Tokens of the smallest block, which is FlexAttention's own."""
MOST_BLOCKS = 2**24
"""Pairs of blocks in a mask; FlexAttention keeps 16 bytes for each."""


@dataclass(frozen=True)
class Sight:
    """A query sees the keys from its document's first token up to itself."""

    query: np.ndarray  # (queries,) place in the row of each
    first: np.ndarray  # (batch, queries) first token of its document
    key: np.ndarray  # (keys,) place in the row of each, seqlen where there is none
    seqlen: int
    plain: bool  # each row one document, queries and keys in order

    @classmethod
    def of(cls, table: SegmentTable, holders: Sequence[Sequence[int]], mine: int) -> "Sight":
        """Queries of the ranks `holders[mine]`, and keys of all `holders`, padded to those that hold most."""
        runs = [np.concatenate([table.positions(rank) for rank in ranks]) for ranks in holders]
        longest = max(map(len, runs))
        key = np.concatenate([np.pad(run, (0, longest - len(run)), constant_values=table.seqlen) for run in runs])
        query, row = runs[mine], np.arange(table.seqlen)
        whole = all(len(set(offsets)) <= 2 for offsets in table.documents)
        plain = whole and np.array_equal(query, row) and np.array_equal(key, row)
        return cls(query, table.document_starts[:, query], key, table.seqlen, plain)

    def dense(self, device: torch.device) -> Tensor:
        """(batch, 1, queries, keys)"""
        seen = (self.key >= self.first[..., None]) & (self.key <= self.query[:, None])
        return to_device(seen[:, None], device)


@dataclass(frozen=True)
class SightOnDevice:
    """The same as int32 tensors."""

    query: Tensor
    first: Tensor
    key: Tensor

    @classmethod
    def of(cls, sight: Sight, device: torch.device) -> "SightOnDevice":
        return cls(*(to_device(a.astype(np.int32), device) for a in (sight.query, sight.first, sight.key)))


def block_mask(sight: Sight, local: LocalSegments, key: Hashable, device: torch.device) -> BlockMask:
    """`sight` for FlexAttention, kept in `local` by `key`."""
    tensors = local.kept(("sight", key, device), lambda: SightOnDevice.of(sight, device))
    return local.kept(("blocks", key, device), lambda: make_block_mask(sight, tensors))


def make_block_mask(sight: Sight, tensors: SightOnDevice, block: int | None = None) -> BlockMask:
    """The block-sparse form of `sight` on the device of `tensors`, which nobody waits for; `block`: tokens of one.

    Blocks of queries and of keys are compared by the ends of their runs of neighbouring tokens: no token is compared
    with another.
    """
    (batch, queries), keys = sight.first.shape, len(sight.key)
    block = block or _block_size(batch, queries, keys)
    device = tensors.query.device
    shape = batch, -(-queries // block), -(-keys // block)
    seen = torch.zeros(shape, dtype=torch.bool, device=device)
    full = torch.ones_like(seen)
    # the parts of a block are as many as cuts in it, and mostly one
    of_queries, of_keys = (to_device(parts(sight, block), device) for parts in (_query_parts, _key_parts))
    for (earliest, latest, lowest, highest), (start, end) in itertools.product(of_queries, of_keys):
        seen |= (start <= latest[..., None]) & (end >= lowest[..., None])
        full &= (end <= earliest[..., None]) & (start >= highest[..., None])

    query, first, key = tensors.query, tensors.first, tensors.key

    def sees(batch, head, q, k):
        return (key[k] >= first[batch, q]) & (key[k] <= query[q])

    partial = seen & ~full
    kv_num_blocks, kv_indices = _ordered(partial)
    full_kv_num_blocks, full_kv_indices = _ordered(full)
    # the same by keys, for the backward pass
    q_num_blocks, q_indices = _ordered(partial.mT)
    full_q_num_blocks, full_q_indices = _ordered(full.mT)
    return BlockMask(
        seq_lengths=(queries, keys),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(block, block),
        mask_mod=sees,
    )


def _block_size(batch: int, queries: int, keys: int) -> int:
    block = BLOCK
    while batch * -(-queries // block) * -(-keys // block) > MOST_BLOCKS:
        block *= 2
    return block


def _query_parts(sight: Sight, block: int) -> np.ndarray:
    """(parts of a block, 4, batch, blocks): its first and last query and their documents' first tokens.

    Padding sees nothing; a part that is not there sees nothing and hinders nothing.
    """
    batch, queries = sight.first.shape
    padding = -queries % block
    query = np.pad(sight.query, (0, padding), constant_values=-1)
    first = np.pad(sight.first, ((0, 0), (0, padding)))
    starts, ends, slot = _parts(query, block)
    parts = np.empty((slot[0].max(initial=0) + 1, 4, batch, len(query) // block), np.int32)
    parts[:] = np.array([sight.seqlen, -1, sight.seqlen, -1])[:, None, None]
    for name, values in enumerate((query[None, starts], query[None, ends], first[:, starts], first[:, ends])):
        parts[slot[0], name, :, slot[1]] = values.T
    return parts


def _key_parts(sight: Sight, block: int) -> np.ndarray:
    """(parts of a block, 2, blocks): its first and last key. Padding is beyond the sequence, and is seen by none."""
    key = np.pad(sight.key, (0, -len(sight.key) % block), constant_values=sight.seqlen)
    starts, ends, slot = _parts(key, block)
    parts = np.empty((slot[0].max(initial=0) + 1, 2, len(key) // block), np.int32)
    parts[:] = np.array([sight.seqlen, -1])[:, None]
    parts[slot[0], 0, slot[1]], parts[slot[0], 1, slot[1]] = key[starts], key[ends]
    return parts


def _parts(places: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Runs of neighbouring or equal places, cut at blocks: index of each one's first and last, and (part, block)."""
    step = np.diff(places, prepend=-2)
    starts = np.flatnonzero(((step != 1) & (step != 0)) | (np.arange(len(places)) % block == 0))
    ends = np.append(starts[1:], len(places)) - 1
    blocks = starts // block
    return starts, ends, (np.arange(len(starts)) - np.searchsorted(blocks, blocks), blocks)


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, rows, columns) -> how many of each row, (batch, 1, rows), and which: those first, in order."""
    order = wanted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    order = order.to(torch.int32, memory_format=torch.contiguous_format)
    return wanted.sum(-1, dtype=torch.int32)[:, None], order[:, None]
