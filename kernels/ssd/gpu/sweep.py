"""The state carried along a span, forward, and its gradient carried back: one matrix product a chunk."""

import triton
import triton.language as tl

from .tiles import head_tokens, place, power_above, prefetch, state_pointers

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["nspans", "nchunks", "first_head", "wheads", "nheads", "ngroups", "headdim", "d_state"])
def sweep_kernel(
    rows_ptr, cols_ptr, cum_ptr, weight_ptr, enter_ptr, enter_index_ptr, leave_ptr, leave_index_ptr, decay_ptr,
    states_ptr, scales_ptr, spans_ptr, nspans, nchunks,
    row_stride, token_stride, head_stride, col_row_stride, col_token_stride, col_head_stride,
    first_head, wheads, nheads, ngroups, headdim, d_state,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr, NT: tl.constexpr,
    REVERSE: tl.constexpr, HAS_ROWS: tl.constexpr, STORE: tl.constexpr, SCALED: tl.constexpr,
    ONLY_LEAVING: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h <- 2^(cum_end) h + sum_l weight_l x_l B_l^T over the chunks of a span; in REVERSE, with the rows dy and the
    columns C, dh <- 2^(cum_end) dh + sum_l 2^(cum_l) dy_l C_l^T from its last chunk to its first.

    STORE keeps the state that enters each chunk, in REVERSE the gradient of the one that leaves it: in the dtype of x,
    or SCALED, in float16 times a power of two that scales undoes.
    ONLY_LEAVING skips spans whose result nobody reads. One program a (span, head, tile of the state).
    """
    pid = tl.program_id(0)
    n_tile = pid % NT
    v = (pid // NT) % (wheads * PT)
    span = pid // (NT * wheads * PT)
    head = first_head + v // PT
    p_tile = v % PT
    group = head // (nheads // ngroups)
    row, start, length = place(spans_ptr, nspans, span)
    first = tl.load(spans_ptr + 3 * nspans + span)
    count = tl.load(spans_ptr + 4 * nspans + span)
    leave = tl.load(leave_index_ptr + span)
    if ONLY_LEAVING:
        count = tl.where(leave >= 0, count, 0)
    if HAS_ROWS:
        rows = head_tokens(rows_ptr, row, start, length, row_stride, token_stride, head, head_stride, headdim, L, P)
        cols = head_tokens(
            cols_ptr, row, start, length, col_row_stride, col_token_stride, group, col_head_stride, d_state, L, N
        )
    steps = (head.to(tl.int64) * nchunks + first) * L
    cum_ptr += steps
    weight_ptr += steps
    offs_l = tl.arange(0, L)
    enter = tl.load(enter_index_ptr + span)
    state = tl.zeros([P, N], tl.float32)
    if enter >= 0:
        state = tl.load(state_pointers(enter_ptr, enter.to(tl.int64) * nheads + head, p_tile, n_tile, P, N, PT, NT))
    if STORE:
        dtype = states_ptr.dtype.element_ty
        kept = tl.make_tensor_descriptor(
            states_ptr + first.to(tl.int64) * (wheads * PT * P * NT * N),
            [count * wheads * PT * P, NT * N],
            [NT * N, 1],
            [P, N],
        )
    total = 0.0
    for step in tl.range(0, count):
        chunk = step
        if REVERSE:
            chunk = count - 1 - step
        t = chunk * L
        end = tl.load(cum_ptr + t + L - 1)
        if STORE:
            if SCALED:
                up, down = power_above(tl.max(tl.max(tl.abs(state), 1), 0))
                kept.store([(chunk * wheads * PT + v) * P, n_tile * N], (state * up).to(dtype))
                tl.store(scales_ptr + (first + chunk).to(tl.int64) * (wheads * PT) + v, down)
            else:
                kept.store([(chunk * wheads * PT + v) * P, n_tile * N], state.to(dtype))
        state *= tl.exp2(end)
        if HAS_ROWS:
            r = rows.load([t, p_tile * P])
            k = cols.load([t, n_tile * N])
            if REVERSE:
                weight = tl.exp2(tl.load(cum_ptr + t + offs_l))
            else:
                weight = tl.load(weight_ptr + t + offs_l)
            if PREFETCH:
                if REVERSE:
                    later = tl.maximum(t - L, 0)
                else:
                    later = tl.minimum(t + L, (count - 1) * L)
                token = start + tl.minimum(later + offs_l, length - 1)
                base = rows_ptr + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
                prefetch(base + token.to(tl.int64) * token_stride)
            weighted = r.to(tl.float32) * weight[:, None]
            high = weighted.to(r.dtype)
            state = tl.dot(tl.trans(high), k, state, input_precision=PRECISION)
            if r.dtype != tl.float32:
                # what rounding took away: the gradient of A is a sum over all of it
                low = (weighted - high.to(tl.float32)).to(r.dtype)
                state = tl.dot(tl.trans(low), k, state)
        total += end
    if leave >= 0:
        tl.store(state_pointers(leave_ptr, leave.to(tl.int64) * nheads + head, p_tile, n_tile, P, N, PT, NT), state)
    if (p_tile == 0) & (n_tile == 0):
        tl.store(decay_ptr + span.to(tl.int64) * nheads + head, total)


@triton.jit(do_not_specialize=["ndocuments", "nheads"])
def pass_kernel(
    left_ptr, decay_ptr, initial_ptr, initial_index_ptr, entering_ptr, final_ptr, final_decay_ptr, final_index_ptr,
    documents_ptr, ndocuments, nheads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The recurrence over the spans of each document: with STORE which state enters each span, and which state and
    total decay, a natural logarithm, leave the document.

    left: what each span leaves when nothing enters. In REVERSE the last span comes first. One program a
    (document, head, BLOCK elements of the SIZE of a state).
    """
    document = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(documents_ptr + document)
    count = tl.load(documents_ptr + ndocuments + document)
    state = tl.zeros([BLOCK], tl.float32)
    total = 0.0
    initial = tl.load(initial_index_ptr + document)
    if initial >= 0:
        state = tl.load(initial_ptr + (initial.to(tl.int64) * nheads + head) * SIZE + at)
    for step in range(0, count):
        span = first + step
        if REVERSE:
            span = first + count - 1 - step
        index = span.to(tl.int64) * nheads + head
        if STORE:
            tl.store(entering_ptr + index * SIZE + at, state)
        decay = tl.load(decay_ptr + index)
        state = state * tl.exp2(decay) + tl.load(left_ptr + index * SIZE + at)
        total += decay
    final = tl.load(final_index_ptr + document)
    if final >= 0:
        tl.store(final_ptr + (final.to(tl.int64) * nheads + head) * SIZE + at, state)
        if tl.program_id(1) == 0:
            tl.store(final_decay_ptr + final.to(tl.int64) * nheads + head, total * LN2)
