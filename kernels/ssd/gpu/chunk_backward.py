"""Gradients of a chunk, given the state that enters it and the gradient of the state that leaves it.

Programs own a chunk and loop over the heads of a group, so that B and C are read once, and what a group's heads share,
the gradients of B and C, is summed in registers in a fixed order: no atomics, the same bits every time.

With G_ij = C_i^T B_j, E_ij = dt_j 2^(cum_i - cum_j) for j <= i, and dS_ij = dy_i . x_j,
    d(x_j) = sum_i G_ij E_ij dy_i + weight_j dh B_j + D dy_j
    d(B_j) = sum_i Q_ij C_i + sum_heads weight_j dh^T x_j         Q_ij = sum_heads dS_ij E_ij
    d(C_i) = sum_j Q_ij B_j + sum_heads 2^(cum_i) h^T dy_i
and the decays' gradients need T_ij = dS_ij E_ij G_ij for j < i: its sum over the pairs around each token, and over the
targets of each source.
"""

import triton
import triton.language as tl

from .steps import STEEP
from .tiles import (
    first_token,
    head_tokens,
    load_tokens,
    place,
    read_once,
    rows_in_half,
    skip_weights,
    span_tokens,
    store_tokens,
)

SIZES = ["nchunks", "first_head", "wheads", "heads_per_program", "nheads", "ngroups", "headdim", "d_state"]


@triton.jit
def _place_of_program(wheads, heads_per_program, BLOCKS: tl.constexpr):
    """Which part of the heads, block of a chunk and chunk a program works on, the first running fastest."""
    parts = wheads // heads_per_program
    pid = tl.program_id(0)
    return pid % parts, pid // parts % BLOCKS, pid // parts // BLOCKS


@triton.jit
def _weights(cum_j, log_dt, cum_i, offs, DIAGONAL: tl.constexpr):
    """E for source tokens j, in rows, and target tokens i, in columns; DIAGONAL: they are the same tokens, otherwise
    all targets come after all sources and E is a product of two factors that are at most dt and 1."""
    if DIAGONAL:
        exponent = cum_i[None, :] - cum_j[:, None] + log_dt[:, None]
        return tl.exp2(tl.where(offs[None, :] >= offs[:, None], exponent, -float("inf")))
    else:
        between = tl.min(cum_j, 0)  # at the last source, as sums of log decays never rise
        return tl.exp2(between - cum_j + log_dt)[:, None] * tl.exp2(cum_i - between)[None, :]


@triton.jit
def _from_each(T, triangle, PRECISION: tl.constexpr):
    """T's sums over targets from each token on, sources in rows; triangle: ones at and below its diagonal, in bfloat16
    (T is then split in two, so that nothing is lost that matters) or float32."""
    if triangle.dtype == tl.float32:
        return tl.dot(T, triangle, input_precision=PRECISION)
    else:
        high = T.to(tl.bfloat16)
        low = (T - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, triangle, tl.dot(high, triangle))


@triton.jit
def _pairs_of_heads(
    xs, dys, B_ptr, C_ptr, B_token_stride, C_token_stride, length, d_state, cum_ptr, log_dt_ptr, steepest_ptr, Q_ptr,
    S_ptr, sums_ptr, chunk, nchunks, part, head0, group, slots, plane, heads_per_program, headdim,
    J, I, L: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr,
    DIAGONAL: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sources J to J + K, targets I to I + K."""
    B = read_once(B_ptr, J, length, B_token_stride, d_state, K, N)
    C = read_once(C_ptr, I, length, C_token_stride, d_state, K, N)
    G = tl.dot(B, tl.trans(C), input_precision=PRECISION)
    offs = tl.arange(0, K)
    if DIAGONAL:
        own = tl.sum(tl.where(offs[None, :] == offs[:, None], G, 0.0), 1)
        # every part of a group writes the same
        tl.store(S_ptr + group.to(tl.int64) * slots + chunk * L + J + offs, own)
        exact = tl.float32 if Q_ptr.dtype.element_ty == tl.float32 else tl.bfloat16
        triangle = tl.where(offs[:, None] >= offs[None, :], 1.0, 0.0).to(exact)
    Q = tl.zeros([K, K], tl.float32)
    for i in tl.range(0, heads_per_program * PT, num_stages=STAGES):
        head = head0 + i // PT
        p_tile = i % PT
        v = part * heads_per_program * PT + i
        x = load_tokens(xs, J, head, p_tile * P, headdim, K, P, FLAT)
        dy = load_tokens(dys, I, head, p_tile * P, headdim, K, P, FLAT)
        slot = head * slots + chunk * L
        cum_j = tl.load(cum_ptr + slot + J + offs)
        log_dt = tl.load(log_dt_ptr + slot + J + offs)
        cum_i = tl.load(cum_ptr + slot + I + offs)
        dS = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        q = dS * _weights(cum_j, log_dt, cum_i, offs, DIAGONAL)
        Q += q
        T = q * G
        out = sums_ptr + v * slots + chunk * L + offs
        if DIAGONAL:
            same = offs[None, :] == offs[:, None]
            own = tl.sum(tl.where(same, dS, 0.0), 1)
            T = tl.where(same, 0.0, T)
            tl.store(out + J, tl.sum(T, 0))
            tl.store(out + plane + J, tl.sum(T, 1))
            tl.store(out + 3 * plane + J, own)
            if tl.load(steepest_ptr + head.to(tl.int64) * nchunks + chunk) < STEEP:
                around = tl.where(offs[:, None] < offs[None, :], _from_each(T, triangle, PRECISION), 0.0)
                tl.store(out + J, tl.sum(around, 0))
        else:
            tl.store(out + 2 * plane + I, tl.sum(T, 0))
            tl.store(out + 2 * plane + J, tl.sum(T, 1))
    # sources in rows
    at = (J + offs)[:, None] * L + I + offs[None, :]
    tl.store(Q_ptr + at, Q.to(Q_ptr.dtype.element_ty))
    if not DIAGONAL:
        # no target comes before its source
        across = (I + offs)[:, None] * L + J + offs[None, :]
        tl.store(Q_ptr + across, tl.zeros([K, K], Q_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def pairs_kernel(
    x_ptr, dy_ptr, cum_ptr, log_dt_ptr, steepest_ptr, B_ptr, C_ptr, Q_ptr, S_ptr, sums_ptr, chunks_ptr, nchunks,
    x_row_stride, x_token_stride, x_head_stride, dy_row_stride, dy_token_stride, dy_head_stride,
    B_row_stride, B_token_stride, B_group_stride, C_row_stride, C_token_stride, C_group_stride,
    first_head, wheads, heads_per_program, nheads, ngroups, headdim, d_state,
    L: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Q and the sums of T of a block of K by K pairs of a chunk of L = K or 2 K tokens: on its diagonal, or beside it,
    from sources in its first half to targets in its second.

    sums: six planes of (wheads * PT, nchunks * L). From the diagonal: T over sources, at the target, or in a STEEP
    chunk over the block's pairs around a token; T over targets, at the source. Third, from beside it, T over sources at
    the targets and over targets at the sources. Fourth dS_jj. The last two are `outside_kernel`'s. S: G_jj.
    """
    BLOCKS: tl.constexpr = 2 * (L // K) - 1
    part, block, chunk = _place_of_program(wheads, heads_per_program, BLOCKS)
    head0 = first_head + part * heads_per_program
    group = head0 // (nheads // ngroups)
    row, start, length = place(chunks_ptr, nchunks, chunk)
    xs = span_tokens(
        x_ptr, row, start, length, x_row_stride, x_token_stride, nheads, x_head_stride, headdim, K, P, FLAT
    )
    dys = span_tokens(
        dy_ptr, row, start, length, dy_row_stride, dy_token_stride, nheads, dy_head_stride, headdim, K, P, FLAT
    )
    B_ptr = first_token(B_ptr, row, start, B_row_stride, B_token_stride, group, B_group_stride)
    C_ptr = first_token(C_ptr, row, start, C_row_stride, C_token_stride, group, C_group_stride)
    slots = nchunks.to(tl.int64) * L
    plane = wheads * PT * slots
    Q_ptr += (part.to(tl.int64) * nchunks + chunk) * L * L
    # the blocks of a chunk are neighbours in the launch: they read the same tokens at the same time
    if block < L // K:
        _pairs_of_heads(
            xs, dys, B_ptr, C_ptr, B_token_stride, C_token_stride, length, d_state, cum_ptr, log_dt_ptr, steepest_ptr,
            Q_ptr, S_ptr, sums_ptr, chunk, nchunks, part, head0, group, slots, plane, heads_per_program, headdim,
            block * K, block * K, L, K, P, N, PT, True, FLAT, PRECISION, STAGES,
        )  # fmt: skip
    elif L > K:
        _pairs_of_heads(
            xs, dys, B_ptr, C_ptr, B_token_stride, C_token_stride, length, d_state, cum_ptr, log_dt_ptr, steepest_ptr,
            Q_ptr, S_ptr, sums_ptr, chunk, nchunks, part, head0, group, slots, plane, heads_per_program, headdim,
            0, K, L, K, P, N, PT, False, FLAT, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _dx_of_heads(
    dys, Bs, Cs, dhs, dxs, cum_ptr, log_dt_ptr, weight_ptr, scales_ptr, D_ptr, D_head_stride, D_channel_stride, chunk,
    part, head0, slots, wheads, heads_per_program, headdim,
    J: tl.constexpr, L: tl.constexpr, K: tl.constexpr, P: tl.constexpr, PT: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_D: tl.constexpr, SCALED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sources J to J + K."""
    SECOND: tl.constexpr = J + K < L
    B = Bs.load([J, 0])
    dtype = B.dtype
    offs = tl.arange(0, K)
    if HAS_DY:
        G = tl.dot(B, tl.trans(Cs.load([J, 0])), input_precision=PRECISION)
        if SECOND:
            G2 = tl.dot(B, tl.trans(Cs.load([J + K, 0])), input_precision=PRECISION)
    if SCALED:
        B, B_down = rows_in_half(B)
    for i in tl.range(0, heads_per_program * PT, num_stages=STAGES):
        head = head0 + i // PT
        p_tile = i % PT
        v = part * heads_per_program * PT + i
        slot = head * slots + chunk * L + J
        dh = dhs.load([v * P, 0])
        weight = tl.load(weight_ptr + slot + offs)
        if SCALED:
            weight *= B_down * tl.load(scales_ptr + chunk.to(tl.int64) * (wheads * PT) + v)
        dx = tl.dot(B, tl.trans(dh), input_precision=PRECISION) * weight[:, None]
        if HAS_DY:
            dy = load_tokens(dys, J, head, p_tile * P, headdim, K, P, FLAT)
            cum = tl.load(cum_ptr + slot + offs)
            log_dt = tl.load(log_dt_ptr + slot + offs)
            dx = tl.dot((G * _weights(cum, log_dt, cum, offs, True)).to(dtype), dy, dx, input_precision=PRECISION)
            if SECOND:
                dy2 = load_tokens(dys, J + K, head, p_tile * P, headdim, K, P, FLAT)
                cum2 = tl.load(cum_ptr + slot + K + offs)
                dx = tl.dot(
                    (G2 * _weights(cum, log_dt, cum2, offs, False)).to(dtype), dy2, dx, input_precision=PRECISION
                )
            if HAS_D:
                D = skip_weights(D_ptr, head, p_tile, D_head_stride, D_channel_stride, headdim, P)
                dx += dy.to(tl.float32) * D[None, :]
        store_tokens(dxs, J, head, p_tile * P, headdim, dx.to(dtype), K, P, FLAT)


@triton.jit(do_not_specialize=SIZES)
def dx_kernel(
    dy_ptr, cum_ptr, log_dt_ptr, weight_ptr, B_ptr, C_ptr, D_ptr, dh_ptr, scales_ptr, dx_ptr, chunks_ptr, nchunks,
    dy_row_stride, dy_token_stride, dy_head_stride, B_row_stride, B_token_stride, B_group_stride,
    C_row_stride, C_token_stride, C_group_stride, dx_row_stride, dx_token_stride, dx_head_stride,
    D_head_stride, D_channel_stride, first_head, wheads, heads_per_program, nheads, ngroups, headdim, d_state,
    L: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_D: tl.constexpr, SCALED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of L tokens, or of one of its halves of K = L / 2."""
    part, half, chunk = _place_of_program(wheads, heads_per_program, L // K)
    head0 = first_head + part * heads_per_program
    group = head0 // (nheads // ngroups)
    row, start, length = place(chunks_ptr, nchunks, chunk)
    dxs = span_tokens(
        dx_ptr, row, start, length, dx_row_stride, dx_token_stride, nheads, dx_head_stride, headdim, K, P, FLAT
    )
    dys = span_tokens(
        dy_ptr, row, start, length, dy_row_stride, dy_token_stride, nheads, dy_head_stride, headdim, K, P, FLAT
    )
    dhs = tl.make_tensor_descriptor(
        dh_ptr + chunk.to(tl.int64) * (wheads * PT * P * N), [wheads * PT * P, N], [N, 1], [P, N]
    )
    Bs = head_tokens(B_ptr, row, start, length, B_row_stride, B_token_stride, group, B_group_stride, d_state, K, N)
    Cs = head_tokens(C_ptr, row, start, length, C_row_stride, C_token_stride, group, C_group_stride, d_state, K, N)
    slots = nchunks.to(tl.int64) * L
    # the halves of a chunk are neighbours in the launch: they read the same dh and dy at the same time
    if half == 0:
        _dx_of_heads(
            dys, Bs, Cs, dhs, dxs, cum_ptr, log_dt_ptr, weight_ptr, scales_ptr, D_ptr, D_head_stride, D_channel_stride,
            chunk, part, head0, slots, wheads, heads_per_program, headdim, 0, L, K, P, PT, HAS_DY, HAS_D, SCALED, FLAT,
            PRECISION, STAGES,
        )  # fmt: skip
    elif L > K:
        _dx_of_heads(
            dys, Bs, Cs, dhs, dxs, cum_ptr, log_dt_ptr, weight_ptr, scales_ptr, D_ptr, D_head_stride, D_channel_stride,
            chunk, part, head0, slots, wheads, heads_per_program, headdim, K, L, K, P, PT, HAS_DY, HAS_D, SCALED, FLAT,
            PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _times_state(rows, state, PRECISION: tl.constexpr):
    """rows state; a float16 state meets bfloat16 rows in two parts, as those would need scaling to become float16."""
    if rows.dtype == tl.bfloat16 and state.dtype == tl.float16:
        wide = state.to(tl.float32)
        high = wide.to(tl.bfloat16)
        low = (wide - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(rows, low, tl.dot(rows, high))
    else:
        return tl.dot(rows, state, input_precision=PRECISION)


@triton.jit
def _outside_of_heads(
    rows, cols, others, Qs, states, opposites, outs, cum_ptr, weight_ptr, scales_ptr, opposite_scales_ptr, sums_ptr,
    W_ptr, chunk, nchunks, part, head0, wheads, heads_per_program, headdim,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr, SOURCE: tl.constexpr, HAS_DY: tl.constexpr,
    ADD: tl.constexpr, SCALED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of C, from rows dy and states h, or if SOURCE of B, from x, dh and, for the decays, h."""
    offs_l = tl.arange(0, L)
    if ADD:
        total = outs.load([0, 0]).to(tl.float32)
    else:
        total = tl.zeros([L, N], tl.float32)
    if HAS_DY:
        Q = Qs.load([0, 0])
        if not SOURCE:
            Q = tl.trans(Q)
        total = tl.dot(Q, others.load([0, 0]), total, input_precision=PRECISION)
    col = cols.load([0, 0])
    slots = nchunks.to(tl.int64) * L
    for i in tl.range(0, heads_per_program * PT, num_stages=STAGES):
        head = head0 + i // PT
        p_tile = i % PT
        v = part * heads_per_program * PT + i
        r = load_tokens(rows, 0, head, p_tile * P, headdim, L, P, FLAT)
        state = states.load([v * P, 0])
        slot = head * slots + chunk * L
        if SOURCE:
            weight = tl.load(weight_ptr + slot + offs_l)
        else:
            weight = tl.exp2(tl.load(cum_ptr + slot + offs_l))
        if SCALED:
            scale = chunk.to(tl.int64) * (wheads * PT) + v
            down = tl.load(scales_ptr + scale)
            weight *= down
        if SOURCE:
            # trace(dh h^T), of every channel: its sum would have all warps wait
            W = tl.sum(state.to(tl.float32) * opposites.load([v * P, 0]).to(tl.float32), 1)
            if SCALED:
                W *= down * tl.load(opposite_scales_ptr + scale)
            tl.store(W_ptr + (v.to(tl.int64) * nchunks + chunk) * P + tl.arange(0, P), W)
        product = _times_state(r, state, PRECISION)
        total += product * weight[:, None]
        at = sums_ptr + v * slots + chunk * L + offs_l
        tl.store(at, tl.sum(product * col.to(tl.float32), 1) * weight)
    outs.store([0, 0], total.to(outs.dtype))


@triton.jit(do_not_specialize=SIZES)
def outside_kernel(
    x_ptr, dy_ptr, cum_ptr, weight_ptr, B_ptr, C_ptr, h_ptr, h_scales_ptr, dh_ptr, dh_scales_ptr, Q_ptr, dB_ptr, dC_ptr,
    sums_ptr, W_ptr, chunks_ptr, nchunks,
    x_row_stride, x_token_stride, x_head_stride, dy_row_stride, dy_token_stride, dy_head_stride,
    B_row_stride, B_token_stride, B_group_stride, C_row_stride, C_token_stride, C_group_stride,
    out_part_stride, out_row_stride, out_token_stride, out_group_stride,
    first_head, wheads, heads_per_program, nheads, ngroups, headdim, d_state,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr, HAS_DY: tl.constexpr, ADD: tl.constexpr,
    SCALED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of B and of C of a chunk, each the work of one program.

    They begin with the pairs inside the chunk, Q, already summed over heads; ADD continues an earlier launch's sums.
    sums: the chunk's pairs with sources before it, and with targets after it; W: those around it, by channel.
    """
    # the two of a chunk are neighbours in the launch: they read the same h at the same time
    part, side, chunk = _place_of_program(wheads, heads_per_program, 1 + HAS_DY)
    head0 = first_head + part * heads_per_program
    group = head0 // (nheads // ngroups)
    row, start, length = place(chunks_ptr, nchunks, chunk)
    offset = chunk.to(tl.int64) * (wheads * PT * P * N)
    hs = tl.make_tensor_descriptor(h_ptr + offset, [wheads * PT * P, N], [N, 1], [P, N])
    dhs = tl.make_tensor_descriptor(dh_ptr + offset, [wheads * PT * P, N], [N, 1], [P, N])
    Bs = head_tokens(B_ptr, row, start, length, B_row_stride, B_token_stride, group, B_group_stride, d_state, L, N)
    Cs = head_tokens(C_ptr, row, start, length, C_row_stride, C_token_stride, group, C_group_stride, d_state, L, N)
    Qs = tl.make_tensor_descriptor(Q_ptr + (part.to(tl.int64) * nchunks + chunk) * L * L, [L, L], [L, 1], [L, L])
    # programs of one group that run at once write to different shares
    share = (head0 % tl.minimum(wheads, nheads // ngroups)) // heads_per_program
    share = share.to(tl.int64) * out_part_stride
    plane = wheads * PT * (nchunks.to(tl.int64) * L)
    if side == 0:
        xs = span_tokens(
            x_ptr, row, start, length, x_row_stride, x_token_stride, nheads, x_head_stride, headdim, L, P, FLAT
        )
        dBs = head_tokens(
            dB_ptr + share, row, start, length, out_row_stride, out_token_stride, group, out_group_stride, d_state,
            L, N,
        )  # fmt: skip
        _outside_of_heads(
            xs, Bs, Cs, Qs, dhs, hs, dBs, cum_ptr, weight_ptr, dh_scales_ptr, h_scales_ptr, sums_ptr + 5 * plane, W_ptr,
            chunk, nchunks, part, head0, wheads, heads_per_program, headdim, L, P, N, PT, True, HAS_DY, ADD, SCALED,
            FLAT, PRECISION, STAGES,
        )  # fmt: skip
    elif HAS_DY:
        dys = span_tokens(
            dy_ptr, row, start, length, dy_row_stride, dy_token_stride, nheads, dy_head_stride, headdim, L, P, FLAT
        )
        dCs = head_tokens(
            dC_ptr + share, row, start, length, out_row_stride, out_token_stride, group, out_group_stride, d_state,
            L, N,
        )  # fmt: skip
        _outside_of_heads(
            dys, Cs, Bs, Qs, hs, dhs, dCs, cum_ptr, weight_ptr, h_scales_ptr, dh_scales_ptr, sums_ptr + 4 * plane,
            W_ptr, chunk, nchunks, part, head0, wheads, heads_per_program, headdim, L, P, N, PT, False, HAS_DY, ADD,
            SCALED, FLAT, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["nchunks", "nheads", "headdim"])
def skip_kernel(
    x_ptr, dy_ptr, shares_ptr, chunks_ptr, nchunks, x_row_stride, x_token_stride, x_head_stride,
    dy_row_stride, dy_token_stride, dy_head_stride, nheads, headdim,
    L: tl.constexpr, P: tl.constexpr, PT: tl.constexpr,
):  # fmt: skip
    """A chunk's share of the gradient of a D with channels, sum of dy x over tokens: (nchunks, nheads, PT * P)."""
    chunk = tl.program_id(0)
    v = tl.program_id(1)
    head = v // PT
    row, start, length = place(chunks_ptr, nchunks, chunk)
    xs = head_tokens(x_ptr, row, start, length, x_row_stride, x_token_stride, head, x_head_stride, headdim, L, P)
    dys = head_tokens(dy_ptr, row, start, length, dy_row_stride, dy_token_stride, head, dy_head_stride, headdim, L, P)
    column = v % PT * P
    product = xs.load([0, column]).to(tl.float32) * dys.load([0, column]).to(tl.float32)
    tl.store(shares_ptr + (chunk.to(tl.int64) * nheads * PT + v) * P + tl.arange(0, P), tl.sum(product, 0))
