"""Step sizes: from raw dt to the decays that the kernels read, and back.

Within a chunk of L tokens, in units of log2: cum_l is the sum of A dt up to and including token l, log_dt_l is
log2(dt_l), and weight_l = dt_l 2^(cum_end - cum_l) is what token l's x B^T weighs in the chunk's final state. All
float32, (nheads, nchunks * L); the rest of a short chunk holds dt = TINY, which neither decays a state nor adds to it.
"""

import triton
import triton.language as tl

from .tiles import place

# the smallest step: its logarithm and its quotients are finite, and its effect is below every rounding
TINY = tl.constexpr(1e-30)
LOG2E = tl.constexpr(1.4426950408889634)
# a token's log2 decay below which the pairs around it are few beside those on either side
STEEP = tl.constexpr(-6.0)


@triton.jit
def _softplus(x):
    """log(1 + e^x), accurate in both tails: x + log1p(e^-x) above 0, log1p(e^x) below."""
    small = tl.exp(-tl.abs(x))
    whole = 1.0 + small
    # log1p by way of the rounding of 1 + u (Kahan)
    log1p = tl.where(whole == 1.0, small, tl.log(whole) * (small / tl.where(whole == 1.0, 1.0, whole - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _clamp(dt, low, high):
    """dt in [low, high] and above 0; nan stays nan."""
    dt = tl.minimum(tl.maximum(dt, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(dt, TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _raw(
    dt_ptr,
    dt_bias_ptr,
    row,
    start,
    length,
    row_stride,
    token_stride,
    head_stride,
    offs_l,
    offs_h,
    nheads,
    HAS_BIAS: tl.constexpr,
):
    base = dt_ptr + row.to(tl.int64) * row_stride + start.to(tl.int64) * token_stride
    mask = (offs_l[:, None] < length) & (offs_h[None, :] < nheads)
    at = offs_l[:, None].to(tl.int64) * token_stride + offs_h[None, :].to(tl.int64) * head_stride
    raw = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias_ptr + offs_h, mask=offs_h < nheads, other=0.0).to(tl.float32)[None, :]
    return raw


@triton.jit(do_not_specialize=["nchunks", "nheads", "low", "high"])
def discretize_kernel(
    dt_ptr, dt_bias_ptr, A_ptr, cum_ptr, log_dt_ptr, weight_ptr, steepest_ptr, chunks_ptr, nchunks,
    row_stride, token_stride, head_stride, nheads, low, high,
    L: tl.constexpr, H: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """dt = clamp(softplus(raw + bias)) of one chunk and H heads -> cum, log_dt, weight, and the steepest decay of a
    token, (nheads, nchunks)."""
    chunk = tl.program_id(0)
    row, start, length = place(chunks_ptr, nchunks, chunk)
    offs_l = tl.arange(0, L)
    offs_h = tl.program_id(1) * H + tl.arange(0, H)
    dt = _raw(
        dt_ptr, dt_bias_ptr, row, start, length, row_stride, token_stride, head_stride, offs_l, offs_h, nheads, HAS_BIAS
    )
    if SOFTPLUS:
        dt = _softplus(dt)
    dt = _clamp(dt, low, high)
    inside = offs_l[:, None] < length
    dt = tl.where(inside, dt, TINY)
    A = tl.load(A_ptr + offs_h, mask=offs_h < nheads, other=0.0).to(tl.float32)
    log_decay = tl.where(inside, dt * (A * LOG2E)[None, :], 0.0)
    cum = tl.cumsum(log_decay, 0)
    end = tl.sum(tl.where(offs_l[:, None] == L - 1, cum, 0.0), 0)
    out = offs_h[None, :].to(tl.int64) * (nchunks * L) + chunk * L + offs_l[:, None]
    mask = offs_h[None, :] < nheads
    tl.store(cum_ptr + out, cum, mask=mask)
    tl.store(log_dt_ptr + out, tl.log2(dt), mask=mask)
    tl.store(weight_ptr + out, dt * tl.exp2(end[None, :] - cum), mask=mask)
    tl.store(steepest_ptr + offs_h.to(tl.int64) * nchunks + chunk, tl.min(log_decay, 0), mask=offs_h < nheads)


@triton.jit(do_not_specialize=["nchunks", "first_head", "wheads", "nheads", "ngroups", "low", "high"])
def discretize_backward_kernel(
    dt_ptr, dt_bias_ptr, A_ptr, cum_ptr, steepest_ptr, sums_ptr, W_ptr, S_ptr, ddt_ptr, shares_ptr, chunks_ptr,
    nchunks,
    row_stride, token_stride, head_stride, d_row_stride, d_token_stride, first_head, wheads, nheads, ngroups, low, high,
    L: tl.constexpr, K: tl.constexpr, H: tl.constexpr, P: tl.constexpr, PT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The gradients of raw dt, and each chunk's shares, (nchunks, 3, nheads), of those of A, dt_bias and D, from sums
    over pairs of tokens.

    The gradient of token k's log decay is the sum over pairs of source j and target i with j < k <= i: both in a block
    of the chunk's diagonal, both in the chunk but in different halves, source before the chunk, target after it, both
    outside. The first is summed from the last token back, adding what begins at a token and taking away what ends
    there; unless a token decays so steeply that little but rounding would be beginning.
    """
    chunk = tl.program_id(0)
    row, start, length = place(chunks_ptr, nchunks, chunk)
    offs_l = tl.arange(0, L)
    offs_w = tl.program_id(1) * H + tl.arange(0, H)
    offs_h = first_head + offs_w
    known = offs_w < wheads
    inside = (offs_l[:, None] < length) & known[None, :]
    slots = nchunks.to(tl.int64) * L
    plane = wheads * PT * slots
    ending = tl.zeros([L, H], tl.float32)
    beginning = tl.zeros([L, H], tl.float32)
    beside = tl.zeros([L, H], tl.float32)
    diagonal = tl.zeros([L, H], tl.float32)
    before = tl.zeros([L, H], tl.float32)
    after = tl.zeros([L, H], tl.float32)
    # those that precede a token are read from the one before it: taking it from a sum that contains it would cancel
    earlier = tl.zeros([L, H], tl.float32)
    earlier_beside = tl.zeros([L, H], tl.float32)
    through = tl.zeros([H], tl.float32)
    second = offs_l[:, None] >= K
    for p in range(PT):
        v = offs_w * PT + p
        at = sums_ptr + v[None, :].to(tl.int64) * slots + chunk * L + offs_l[:, None]
        ending += tl.load(at, mask=inside, other=0.0)
        beginning += tl.load(at + plane, mask=inside, other=0.0)
        if L > K:
            # sources in the first half, targets in the second
            beside += tl.load(at + 2 * plane, mask=inside, other=0.0)
            earlier_beside += tl.load(at + 2 * plane - 1, mask=inside & (offs_l[:, None] > 0), other=0.0)
        diagonal += tl.load(at + 3 * plane, mask=inside, other=0.0)
        before += tl.load(at + 4 * plane, mask=inside, other=0.0)
        after += tl.load(at + 5 * plane, mask=inside, other=0.0)
        earlier += tl.load(at + 5 * plane - 1, mask=inside & (offs_l[:, None] > 0), other=0.0)
        Ws = W_ptr + (v[:, None].to(tl.int64) * nchunks + chunk) * P + tl.arange(0, P)[None, :]
        through += tl.sum(tl.load(Ws, mask=known[:, None], other=0.0), 1)
    cum_end = tl.load(cum_ptr + offs_h.to(tl.int64) * slots + chunk * L + L - 1, mask=known, other=0.0)
    steepest = tl.load(steepest_ptr + offs_h.to(tl.int64) * nchunks + chunk, mask=known, other=0.0)
    steep = (steepest < STEEP)[None, :]
    # in a steep chunk `ending` is already the sum over the pairs around each token
    d_log_decay = tl.cumsum(before + tl.where(steep, 0.0, ending - beginning), 0, reverse=True)
    d_log_decay += tl.where(steep, ending, 0.0) + tl.cumsum(earlier, 0)
    if L > K:
        beginning += tl.where(second, 0.0, beside)
        from_here = tl.cumsum(tl.where(second, beside, 0.0), 0, reverse=True)
        d_log_decay += tl.where(second, from_here, tl.cumsum(earlier_beside, 0))
    d_log_decay += (through * tl.exp2(cum_end))[None, :]

    raw = _raw(
        dt_ptr, dt_bias_ptr, row, start, length, row_stride, token_stride, head_stride, offs_l, offs_h, nheads, HAS_BIAS
    )
    dt = raw
    if SOFTPLUS:
        dt = _softplus(raw)
    stopped = (dt < low) | (dt > high)
    dt = _clamp(dt, low, high)
    A = tl.load(A_ptr + offs_h, mask=known, other=0.0).to(tl.float32)
    groups = offs_h // (nheads // ngroups)
    S = tl.load(S_ptr + groups[None, :].to(tl.int64) * slots + chunk * L + offs_l[:, None], mask=inside, other=0.0)
    ddt = A[None, :] * d_log_decay + (beginning + after) / dt + diagonal * S
    ddt = tl.where(inside & ~stopped, ddt, 0.0)
    if SOFTPLUS:
        ddt = ddt * tl.sigmoid(raw)
    out = (
        ddt_ptr
        + row.to(tl.int64) * d_row_stride
        + (start + offs_l)[:, None].to(tl.int64) * d_token_stride
        + offs_h[None, :]
    )
    tl.store(out, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
    share = shares_ptr + chunk.to(tl.int64) * 3 * nheads + offs_h
    tl.store(share, tl.sum(tl.where(inside, d_log_decay * dt, 0.0), 0), mask=known)
    tl.store(share + nheads, tl.sum(ddt, 0), mask=known)
    tl.store(share + 2 * nheads, tl.sum(diagonal, 0), mask=known)


@triton.jit(do_not_specialize=["nchunks", "columns"])
def sum_chunks_kernel(
    shares_ptr, first_ptr, second_ptr, third_ptr, nchunks, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sums over chunks of (nchunks, up to 3, columns), to a tensor each, always in the same order."""
    total_ptr = first_ptr
    if tl.program_id(1) == 1:
        total_ptr = second_ptr
    if tl.program_id(1) == 2:
        total_ptr = third_ptr
    shares_ptr += tl.program_id(1) * columns
    row = tl.num_programs(1) * columns
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, nchunks, ROWS):
        chunk = first + rows
        mask = (chunk[:, None] < nchunks) & (at[None, :] < columns)
        total += tl.load(shares_ptr + chunk[:, None].to(tl.int64) * row + at[None, :], mask=mask, other=0.0)
    tl.store(total_ptr + at, tl.sum(total, 0), mask=at < columns)
