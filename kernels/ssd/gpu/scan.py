"""Outputs of a span, given the state that enters it: a single pass over its chunks with the state in registers."""

import triton
import triton.language as tl

from .tiles import head_tokens, place, prefetch, skip_weights, state_pointers


@triton.jit(do_not_specialize=["nspans", "nchunks", "nheads", "ngroups", "headdim", "d_state"])
def scan_kernel(
    x_ptr, z_ptr, cum_ptr, log_dt_ptr, weight_ptr, B_ptr, C_ptr, D_ptr, enter_ptr, enter_index_ptr, leave_ptr,
    leave_index_ptr,
    y_ptr, ungated_ptr, spans_ptr, nspans, nchunks,
    x_row_stride, x_token_stride, x_head_stride, z_row_stride, z_token_stride, z_head_stride,
    B_row_stride, B_token_stride, B_group_stride, C_row_stride, C_token_stride, C_group_stride,
    y_row_stride, y_token_stride, y_head_stride, D_head_stride, D_channel_stride, nheads, ngroups, headdim, d_state,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, KEEP_UNGATED: tl.constexpr, PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y_i = 2^(cum_i) h C_i + sum_{j <= i} C_i^T B_j dt_j 2^(cum_i - cum_j) x_j + D x_i, and h at the span's end.

    One program a (span, head, P of its channels). Everything is transposed, channels by tokens, so that the state
    feeds the matrix units from registers.
    """
    pid = tl.program_id(0)
    v = pid % (nheads * PT)
    span = pid // (nheads * PT)
    head = v // PT
    p_tile = v % PT
    group = head // (nheads // ngroups)
    row, start, length = place(spans_ptr, nspans, span)
    first = tl.load(spans_ptr + 3 * nspans + span)
    count = tl.load(spans_ptr + 4 * nspans + span)
    xs = head_tokens(x_ptr, row, start, length, x_row_stride, x_token_stride, head, x_head_stride, headdim, L, P)
    ys = head_tokens(y_ptr, row, start, length, y_row_stride, y_token_stride, head, y_head_stride, headdim, L, P)
    Bs = head_tokens(B_ptr, row, start, length, B_row_stride, B_token_stride, group, B_group_stride, d_state, L, N)
    Cs = head_tokens(C_ptr, row, start, length, C_row_stride, C_token_stride, group, C_group_stride, d_state, L, N)
    if HAS_Z:
        zs = head_tokens(z_ptr, row, start, length, z_row_stride, z_token_stride, head, z_head_stride, headdim, L, P)
        if KEEP_UNGATED:
            ungated = head_tokens(
                ungated_ptr, row, start, length, y_row_stride, y_token_stride, head, y_head_stride, headdim, L, P
            )
    steps = (head.to(tl.int64) * nchunks + first) * L
    cum_ptr += steps
    log_dt_ptr += steps
    weight_ptr += steps
    dtype = x_ptr.dtype.element_ty
    offs_l = tl.arange(0, L)
    enter = tl.load(enter_index_ptr + span)
    state = tl.zeros([P, N], tl.float32)
    if enter >= 0:
        state = tl.load(state_pointers(enter_ptr, enter.to(tl.int64) * nheads + head, p_tile, 0, P, N, PT, 1))
    if HAS_D:
        D = skip_weights(D_ptr, head, p_tile, D_head_stride, D_channel_stride, headdim, P)
    for chunk in tl.range(0, count):
        t = chunk * L
        C = Cs.load([t, 0])
        B = Bs.load([t, 0])
        x = xs.load([t, p_tile * P])
        if PREFETCH:
            ahead = tl.minimum(t + L + offs_l, length - 1)
            prefetch(
                x_ptr
                + row.to(tl.int64) * x_row_stride
                + head.to(tl.int64) * x_head_stride
                + (start + ahead).to(tl.int64) * x_token_stride
            )
            lines = tl.minimum(t + L, (count - 1) * L) + tl.arange(0, 2) * (L // 2)
            prefetch(cum_ptr + lines)
            prefetch(log_dt_ptr + lines)
            prefetch(weight_ptr + lines)
        cum = tl.load(cum_ptr + t + offs_l)
        log_dt = tl.load(log_dt_ptr + t + offs_l)
        weight = tl.load(weight_ptr + t + offs_l)
        end = tl.load(cum_ptr + t + L - 1)
        # rows: channels, or source tokens j; columns: target tokens i
        y = tl.dot(state.to(dtype), tl.trans(C), input_precision=PRECISION) * tl.exp2(cum)[None, :]
        CB = tl.dot(B, tl.trans(C), input_precision=PRECISION)
        exponent = tl.where(
            offs_l[None, :] >= offs_l[:, None], cum[None, :] - cum[:, None] + log_dt[:, None], -float("inf")
        )
        y = tl.dot(tl.trans(x), (CB * tl.exp2(exponent)).to(dtype), y, input_precision=PRECISION)
        if HAS_D:
            y += tl.trans(x).to(tl.float32) * D[:, None]
        if HAS_Z:
            if KEEP_UNGATED:
                ungated.store([t, p_tile * P], tl.trans(y.to(dtype)))
            z = tl.trans(zs.load([t, p_tile * P])).to(tl.float32)
            y *= z * tl.sigmoid(z)
        ys.store([t, p_tile * P], tl.trans(y.to(dtype)))
        weighted = (x.to(tl.float32) * weight[:, None]).to(dtype)
        state = tl.dot(tl.trans(weighted), B, state * tl.exp2(end), input_precision=PRECISION)
    leave = tl.load(leave_index_ptr + span)
    if leave >= 0:
        tl.store(state_pointers(leave_ptr, leave.to(tl.int64) * nheads + head, p_tile, 0, P, N, PT, 1), state)
