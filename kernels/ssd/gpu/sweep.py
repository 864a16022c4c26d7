"""The state carried along a span, forward, and its gradient carried back: one matrix product a chunk."""

import triton
import triton.language as tl

from .tiles import head_tokens, place, prefetch, scale_for, state_pointers

LN2 = tl.constexpr(0.6931471805599453)
SIZES = ["nspans", "nchunks", "programs", "first_head", "wheads", "nheads", "ngroups", "headdim", "d_state"]


@triton.jit
def _either(second, a, b):
    """b if `second`, else a: strides, whatever types their values have got."""
    return tl.where(second, tl.cast(b, tl.int64), tl.cast(a, tl.int64))


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    x_ptr, B_ptr, enter_ptr, enter_index_ptr, leave_ptr, leave_index_ptr, h_ptr, h_scales_ptr,
    dy_ptr, C_ptr, d_enter_ptr, d_enter_index_ptr, d_leave_ptr, d_leave_index_ptr, dh_ptr, dh_scales_ptr,
    cum_ptr, weight_ptr, decay_ptr, spans_ptr, nspans, nchunks, programs,
    x_row_stride, x_token_stride, x_head_stride, B_row_stride, B_token_stride, B_group_stride,
    dy_row_stride, dy_token_stride, dy_head_stride, C_row_stride, C_token_stride, C_group_stride,
    first_head, wheads, nheads, ngroups, headdim, d_state,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr, NT: tl.constexpr,
    HAS_ROWS: tl.constexpr, STORE: tl.constexpr, SCALED: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h <- 2^(cum_end) h + sum_l weight_l x_l B_l^T over the chunks of a span, and from its last chunk to its first
    dh <- 2^(cum_end) dh + sum_l 2^(cum_l) dy_l C_l^T. One program a (span, head, tile of the state): the first
    `programs` do the former, the others the latter, so that one fills the machine while the other ends.

    STORE keeps the state that enters each chunk and the gradient of the one that leaves it, in the dtype of x, or
    SCALED, in float16 times a power of two that scales undo. Otherwise spans whose result nobody reads are skipped.
    """
    pid = tl.program_id(0)
    reverse = pid >= programs
    row_stride = _either(reverse, x_row_stride, dy_row_stride)
    token_stride = _either(reverse, x_token_stride, dy_token_stride)
    head_stride = _either(reverse, x_head_stride, dy_head_stride)
    col_row_stride = _either(reverse, B_row_stride, C_row_stride)
    col_token_stride = _either(reverse, B_token_stride, C_token_stride)
    group_stride = _either(reverse, B_group_stride, C_group_stride)
    if reverse:
        # from here on these are what the other direction reads and writes
        pid -= programs
        x_ptr, B_ptr, h_ptr, h_scales_ptr, weight_ptr = dy_ptr, C_ptr, dh_ptr, dh_scales_ptr, cum_ptr
        enter_ptr, enter_index_ptr, leave_ptr, leave_index_ptr = (
            d_enter_ptr, d_enter_index_ptr, d_leave_ptr, d_leave_index_ptr,
        )  # fmt: skip
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
    if not STORE:
        count = tl.where(leave >= 0, count, 0)
    if HAS_ROWS:
        rows = head_tokens(x_ptr, row, start, length, row_stride, token_stride, head, head_stride, headdim, L, P)
        cols = head_tokens(
            B_ptr, row, start, length, col_row_stride, col_token_stride, group, group_stride, d_state, L, N
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
        dtype = h_ptr.dtype.element_ty
        kept = tl.make_tensor_descriptor(
            h_ptr + first.to(tl.int64) * (wheads * PT * P * NT * N),
            [count * wheads * PT * P, NT * N],
            [NT * N, 1],
            [P, N],
        )
    total = 0.0
    for step in tl.range(0, count):
        chunk = tl.where(reverse, count - 1 - step, step)
        t = chunk * L
        end = tl.load(cum_ptr + t + L - 1)
        if STORE:
            if SCALED:
                up, down = scale_for(tl.max(tl.abs(state)))
                kept.store([(chunk * wheads * PT + v) * P, n_tile * N], (state * up).to(dtype))
                tl.store(h_scales_ptr + (first + chunk).to(tl.int64) * (wheads * PT) + v, down)
            else:
                kept.store([(chunk * wheads * PT + v) * P, n_tile * N], state.to(dtype))
        state *= tl.exp2(end)
        if HAS_ROWS:
            r = rows.load([t, p_tile * P])
            k = cols.load([t, n_tile * N])
            weight = tl.load(weight_ptr + t + offs_l)
            weight = tl.where(reverse, tl.exp2(weight), weight)
            if PREFETCH:
                later = tl.where(reverse, tl.maximum(t - L, 0), tl.minimum(t + L, (count - 1) * L))
                token = start + tl.minimum(later + offs_l, length - 1)
                base = x_ptr + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
                prefetch(base + token.to(tl.int64) * token_stride)
            weighted = r.to(tl.float32) * weight[:, None]
            high = weighted.to(r.dtype)
            state = tl.dot(tl.trans(high), k, state, input_precision=PRECISION)
            if SCALED:
                # what rounding took away: in every chunk, it would be most of the error of the gradient of A
                low = (weighted - high.to(tl.float32)).to(r.dtype)
                state = tl.dot(tl.trans(low), k, state)
        total += end
    if leave >= 0:
        tl.store(state_pointers(leave_ptr, leave.to(tl.int64) * nheads + head, p_tile, n_tile, P, N, PT, NT), state)
    if not STORE and (p_tile == 0) & (n_tile == 0):
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
