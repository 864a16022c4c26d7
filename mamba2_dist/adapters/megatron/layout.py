"""Which tokens Megatron gives to each rank of cp, as a segment table."""

import functools
import itertools
from typing import Any, Literal, get_args

from torch import distributed as dist

from mamba2_dist.kernels.common.checks import check_choice
from mamba2_dist.parallel.segments import Segment, SegmentTable

Layout = Literal["megatron", "zigzag", "contiguous"]


def check_layout(layout: str) -> None:
    """Raise ValueError unless `layout` is one."""
    check_choice("layout", layout, get_args(Layout))


def segment_table(
    tokens: int, batch: int, cp: dist.ProcessGroup, packed_seq_params: Any = None, layout: Layout = "megatron"
) -> SegmentTable:
    """The cut of a batch whose rows have `tokens` tokens on every rank of `cp`.

    packed_seq_params: Megatron's; documents are read from `cu_seqlens_q_padded`, or `cu_seqlens_q` where there is none,
        once a batch, which waits for the GPU if they are there. Tokens behind the last are a document of their own.
    layout: "megatron": of 2 cp equal runs rank r holds the r-th and the r-th from the end, of every document where
        rows are packed ("thd") and of every row otherwise; "zigzag": of every row, also where it is packed;
        "contiguous": rank r holds the r-th of cp runs of every row.
    Raises ValueError for what does not fit, and for ranks that change with the batch.
    """
    size = dist.get_world_size(cp)
    cu_seqlens = _cu_seqlens(packed_seq_params)
    if cu_seqlens is None:
        return _rows(tokens * size, size, batch, layout)
    _check_packed(packed_seq_params, batch, cp, size)
    # every layer of the batch is given the same object, which may come again with other offsets
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    key = tokens, size, layout, version
    known, of, table = getattr(packed_seq_params, "_segment_table", (None, None, None))
    if version is None or of is not cu_seqlens or key != known:
        table = _packed(cu_seqlens.tolist(), tokens * size, size, layout)
        packed_seq_params._segment_table = key, cu_seqlens, table
    assert table is not None
    return table


def _cu_seqlens(packed_seq_params: Any):
    if packed_seq_params is None:
        return None
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def _check_packed(params: Any, batch: int, cp: dist.ProcessGroup, size: int) -> None:
    if params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format must be 'thd' where there are cu_seqlens, got {params.qkv_format!r}"
        )
    if batch != 1:
        raise ValueError(f"packed documents must come in one row, (tokens, 1, hidden_size), got a batch of {batch}")
    told = params.local_cp_size, params.cp_group
    if told[0] not in (None, size) or told[1] not in (None, cp):
        raise ValueError(
            f"packed_seq_params asks for a cp of its own ({told[0]} ranks), the layer's cp has {size}; "
            "leave dynamic context parallelism off"
        )


@functools.lru_cache(maxsize=16)  # a few shapes are in use at a time, and each keeps tensors on the device
def _rows(seqlen: int, cp: int, batch: int, layout: Layout) -> SegmentTable:
    if layout == "contiguous" or cp == 1:
        return SegmentTable.contiguous(seqlen, cp, batch=batch)
    _check_halves("a sequence", seqlen, cp)
    return SegmentTable.zigzag(seqlen, cp, batch=batch)


def _packed(offsets: list[int], seqlen: int, cp: int, layout: Layout) -> SegmentTable:
    if offsets[-1] > seqlen:
        raise ValueError(f"cu_seqlens end at token {offsets[-1]}, the ranks of cp hold {seqlen}")
    if offsets[-1] < seqlen:
        offsets = [*offsets, seqlen]
    if layout == "contiguous" or cp == 1:
        return SegmentTable.contiguous(seqlen, cp, documents=[offsets])
    if layout == "zigzag":
        _check_halves("a row", seqlen, cp)
        return SegmentTable.zigzag(seqlen, cp, documents=[offsets])
    segments = []
    # empty ones are padding of cu_seqlens
    documents = [(start, end) for start, end in itertools.pairwise(offsets) if start != end]
    for place, (start, end) in enumerate(documents):
        _check_halves(f"the document at token {start}", end - start, cp)
        length = (end - start) // (2 * cp)
        for run in range(2 * cp):
            rank, half = (run, 0) if run < cp else (2 * cp - 1 - run, 1)
            first = start + run * length
            segments.append(Segment(first, first + length, rank, 2 * place + half))
    return SegmentTable(segments, ranks=cp, documents=[offsets])


def _check_halves(what: str, tokens: int, cp: int) -> None:
    if tokens % (2 * cp):
        raise ValueError(
            f"{what} has {tokens} tokens, which must be divisible by 2 cp ({2 * cp}) to be cut in zigzag; pad it, or "
            "give layout='contiguous' and cut rows so"
        )
