"""The depthwise convolution and its gradient: programs walk over tokens with a window of inputs in registers.

A span is a run of tokens of one document inside one block of tokens; no kernel masks one document from another. What a
span's first tokens see of the tokens before it is read again by its program, and so is what its last ones are seen by.
"""

import triton
import triton.language as tl

from ...common.functions import sigmoid


@triton.jit
def _of_channels(pid, blocks0, blocks1, size0, size1, size2, BLOCK: tl.constexpr):
    """Which of three parts a block of channels lies in: its first channel there and here, and the part's size."""
    first, offset, size = pid, 0 * size0, size0
    if pid >= blocks0:
        first, offset, size = pid - blocks0, size0, size1
    if pid >= blocks0 + blocks1:
        first, offset, size = pid - blocks0 - blocks1, size0 + size1, size2
    return first * BLOCK, offset, size


@triton.jit
def _of_span(spans_ptr, nspans, span):
    """Flat token, row, place in the row, length, tokens of its document before and after, row of its state."""
    spans_ptr += span
    token = tl.load(spans_ptr)
    row = tl.load(spans_ptr + nspans)
    start = tl.load(spans_ptr + 2 * nspans)
    length = tl.load(spans_ptr + 3 * nspans)
    before = tl.load(spans_ptr + 4 * nspans)
    after = tl.load(spans_ptr + 5 * nspans)
    state = tl.load(spans_ptr + 6 * nspans)
    return token, row, start, length, before, after, state


@triton.jit
def _if_less(known, a, b, BLOCK: tl.constexpr):
    """The mask `known` where a < b, as vectors: interpreters do not spread a truth value over a mask."""
    return known & (a + tl.zeros([BLOCK], tl.int32) < b)


@triton.jit
def _taps(weight_ptr, channel, known, WIDTH: tl.constexpr):
    """The weights of channels, float32, the oldest input's first."""
    taps = ()
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + channel.to(tl.int64) * WIDTH + k, mask=known, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _window(
    xs, token_stride, states, channels, known, before, state,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The inputs before a span, oldest first: of its document, or before that of its state, else zeros."""
    window = ()
    for k in tl.static_range(WIDTH - 1):
        back = WIDTH - 1 - k
        inside = _if_less(known, back - 1, before, BLOCK)
        x = tl.load(xs - back * token_stride, mask=inside, other=0.0).to(tl.float32)
        if HAS_STATE:
            at = states + (state.to(tl.int64) * (WIDTH - 1) + k + before) * channels
            mask = _if_less(_if_less(known, before, back, BLOCK), -1, state, BLOCK)
            x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        window = window + (x,)
    return window


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y0_ptr, y1_ptr, y2_ptr, blocks_ptr, spans_ptr, nblocks, nspans,
    row_stride, token_stride, size0, size1, size2, blocks0, blocks1,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of one block of tokens and BLOCK channels, to the part, (tokens, size), that these channels lie in."""
    first, offset, size = _of_channels(tl.program_id(1), blocks0, blocks1, size0, size1, size2, BLOCK)
    y_ptr = y0_ptr
    if tl.program_id(1) >= blocks0:
        y_ptr = y1_ptr
    if tl.program_id(1) >= blocks0 + blocks1:
        y_ptr = y2_ptr
    column = first + tl.arange(0, BLOCK)
    known = column < size
    channel = offset + column
    channels = size0 + size1 + size2
    taps = _taps(weight_ptr, channel, known, WIDTH)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    span = tl.load(blocks_ptr + tl.program_id(0))
    end = span + tl.load(blocks_ptr + nblocks + tl.program_id(0))
    while span < end:
        token, row, start, length, before, _, state = _of_span(spans_ptr, nspans, span)
        xs = x_ptr + row.to(tl.int64) * row_stride + start.to(tl.int64) * token_stride + channel
        ys = y_ptr + token.to(tl.int64) * size + column
        window = _window(xs, token_stride, state_ptr + channel, channels, known, before, state, WIDTH, BLOCK, HAS_STATE)
        for i in tl.range(0, length, UNROLL, num_stages=STAGES):
            new = ()
            for u in tl.static_range(UNROLL):
                inside = _if_less(known, i + u, length, BLOCK)
                new = new + (tl.load(xs + u * token_stride, mask=inside, other=0.0),)
            for u in tl.static_range(UNROLL):
                x = new[u].to(tl.float32)
                y = bias + taps[WIDTH - 1] * x
                for k in tl.static_range(WIDTH - 1):
                    y += taps[k] * window[k]
                window = (window + (x,))[1:]
                if SILU:
                    y = y * sigmoid(y)
                tl.store(ys + u * size, y.to(y0_ptr.dtype.element_ty), mask=_if_less(known, i + u, length, BLOCK))
            xs += UNROLL * token_stride
            ys += UNROLL * size
        span += 1


@triton.jit
def conv_backward_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr, dx_ptr, d_state_ptr, shares_ptr, blocks_ptr,
    spans_ptr, nblocks, nspans, row_stride, token_stride, dx_stride, size0, size1, size2, blocks0, blocks1,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of one block of tokens and BLOCK channels, (tokens, dx_stride), the gradients of states that begin here, and
    the block's share of those of the weights and the bias, (nblocks, WIDTH + 1, channels).

    dx_t = sum_k w_k g_(t + WIDTH - 1 - k), with g the gradient before the activation; each token's g is added to the
    sums of the WIDTH tokens that it reaches, and the oldest of these is then complete. A span therefore goes on for
    WIDTH - 1 tokens after its last. In its first WIDTH - 1 steps it completes the sums of the state before a document.
    """
    first, offset, size = _of_channels(tl.program_id(1), blocks0, blocks1, size0, size1, size2, BLOCK)
    dy_ptr = dy0_ptr
    if tl.program_id(1) >= blocks0:
        dy_ptr = dy1_ptr
    if tl.program_id(1) >= blocks0 + blocks1:
        dy_ptr = dy2_ptr
    column = first + tl.arange(0, BLOCK)
    known = column < size
    channel = offset + column
    channels = size0 + size1 + size2
    taps = _taps(weight_ptr, channel, known, WIDTH)
    zero = tl.zeros([BLOCK], tl.float32)
    bias = zero
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    d_bias = zero
    d_taps = ()
    for _ in tl.static_range(WIDTH):
        d_taps = d_taps + (zero,)
    span = tl.load(blocks_ptr + tl.program_id(0))
    end = span + tl.load(blocks_ptr + nblocks + tl.program_id(0))
    while span < end:
        token, row, start, length, before, after, state = _of_span(spans_ptr, nspans, span)
        xs = x_ptr + row.to(tl.int64) * row_stride + start.to(tl.int64) * token_stride + channel
        dys = dy_ptr + token.to(tl.int64) * size + column
        # where the sum that is complete after the first token belongs
        dxs = dx_ptr + (token.to(tl.int64) - (WIDTH - 1)) * dx_stride + channel
        window = _window(xs, token_stride, state_ptr + channel, channels, known, before, state, WIDTH, BLOCK, HAS_STATE)
        sums = ()
        for _ in tl.static_range(WIDTH - 1):
            sums = sums + (zero,)
        for i in tl.range(0, length + WIDTH - 1, UNROLL, num_stages=STAGES):
            new = ()
            dnew = ()
            for u in tl.static_range(UNROLL):
                inside = _if_less(known, i + u, length + after, BLOCK)
                new = new + (tl.load(xs + u * token_stride, mask=inside, other=0.0),)
                dnew = dnew + (tl.load(dys + u * size, mask=inside, other=0.0),)
            for u in tl.static_range(UNROLL):
                x = new[u].to(tl.float32)
                g = dnew[u].to(tl.float32)
                window = window + (x,)
                if SILU:
                    y = bias
                    for k in tl.static_range(WIDTH):
                        y += taps[k] * window[k]
                    s = sigmoid(y)
                    g = g * s * (1 + y * (1 - s))
                mine = tl.where(i + u < length, g, 0.0)
                d_bias += mine
                more = ()
                for k in tl.static_range(WIDTH):
                    more = more + (d_taps[k] + mine * window[k],)
                d_taps = more
                window = window[1:]
                reached = ()
                for k in tl.static_range(WIDTH - 1):
                    # said to be fused: else whichever product comes first is rounded, by a token's place in the loop
                    reached = reached + (tl.fma(taps[k], g, sums[k]),)
                sums = reached + (taps[WIDTH - 1] * g,)
                complete = sums[0].to(dx_ptr.dtype.element_ty)
                mask = _if_less(_if_less(known, WIDTH - 2, i + u, BLOCK), i + u, length + WIDTH - 1, BLOCK)
                tl.store(dxs + u * dx_stride, complete, mask=mask)
                if HAS_STATE:
                    at = d_state_ptr + (state.to(tl.int64) * (WIDTH - 1) + i + u) * channels + channel
                    mask = _if_less(
                        _if_less(_if_less(known, before, 1, BLOCK), -1, state, BLOCK), i + u, WIDTH - 1, BLOCK
                    )
                    tl.store(at, sums[0], mask=mask)
                sums = sums[1:]
            xs += UNROLL * token_stride
            dys += UNROLL * size
            dxs += UNROLL * dx_stride
        span += 1
    shares = shares_ptr + tl.program_id(0).to(tl.int64) * (WIDTH + 1) * channels + channel
    for k in tl.static_range(WIDTH):
        tl.store(shares + k * channels, d_taps[k], mask=known)
    tl.store(shares + WIDTH * channels, d_bias, mask=known)
