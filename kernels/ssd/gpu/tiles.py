"""Tiles that every SSD kernel reads and writes: tokens of one span, and states.

Tensor descriptors start at a span's first token and end at its last, so that the hardware reads zeros beyond it and
drops what is written there: no loop masks rows. Offsets of rows, heads and states are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def place(table_ptr, count, index):
    """Row, first token and length of a span or chunk of the table."""
    row = tl.load(table_ptr + index)
    start = tl.load(table_ptr + count + index)
    length = tl.load(table_ptr + 2 * count + index)
    return row, start, length


@triton.jit
def first_token(ptr, row, start, row_stride, token_stride, head, head_stride):
    """Where one head's (or group's) tokens of a span begin."""
    return ptr + row.to(tl.int64) * row_stride + start.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride


@triton.jit
def head_tokens(
    ptr, row, start, length, row_stride, token_stride, head, head_stride, width, L: tl.constexpr, W: tl.constexpr
):
    """Descriptor of (length, width): one head's (or group's) tokens of a span."""
    base = first_token(ptr, row, start, row_stride, token_stride, head, head_stride)
    return tl.make_tensor_descriptor(base, [length, width], [token_stride, 1], [L, W])


@triton.jit
def read_once(base, token, length, token_stride, width, L: tl.constexpr, W: tl.constexpr):
    """The tile (L, W) from `token` on without a descriptor, which takes longer to make than this to read."""
    tokens = token + tl.arange(0, L)
    columns = tl.arange(0, W)
    pointers = base + tokens[:, None].to(tl.int64) * token_stride + columns[None, :]
    return tl.load(pointers, mask=(tokens[:, None] < length) & (columns[None, :] < width), other=0.0)


@triton.jit
def span_tokens(
    ptr,
    row,
    start,
    length,
    row_stride,
    token_stride,
    heads,
    head_stride,
    width,
    L: tl.constexpr,
    W: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Descriptor of all heads' tokens of a span. FLAT: heads lie side by side, each of whole tiles."""
    base = ptr + row.to(tl.int64) * row_stride + start.to(tl.int64) * token_stride
    if FLAT:
        return tl.make_tensor_descriptor(base, [length, heads * width], [token_stride, 1], [L, W])
    else:
        return tl.make_tensor_descriptor(base, [length, heads, width], [token_stride, head_stride, 1], [L, 1, W])


@triton.jit
def load_tokens(descriptor, token, head, column, width, L: tl.constexpr, W: tl.constexpr, FLAT: tl.constexpr):
    if FLAT:
        return descriptor.load([token, head * width + column])
    else:
        return descriptor.load([token, head, column]).reshape(L, W)


@triton.jit
def store_tokens(descriptor, token, head, column, width, tile, L: tl.constexpr, W: tl.constexpr, FLAT: tl.constexpr):
    if FLAT:
        descriptor.store([token, head * width + column], tile)
    else:
        descriptor.store([token, head, column], tile.reshape(L, 1, W))


@triton.jit
def state_pointers(ptr, index, p_tile, n_tile, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr, NT: tl.constexpr):
    """Pointers to tile (p_tile, n_tile) of the state at `index` of a (..., PT * P, NT * N) tensor."""
    base = ptr + index * (PT * P * NT * N) + p_tile * (P * NT * N) + n_tile * N
    return base + tl.arange(0, P)[:, None] * (NT * N) + tl.arange(0, N)[None, :]


@triton.jit
def scale_for(x):
    """The power of two that takes numbers up to `x` to 2^15 at most, so that they keep float16's digits, and its
    inverse."""
    exponent = tl.floor(tl.log2(tl.maximum(x, 1e-30, propagate_nan=tl.PropagateNan.ALL)))
    return tl.exp2(14.0 - exponent), tl.exp2(exponent - 14.0)


@triton.jit
def rows_in_half(tile):
    """A tile in float16, each row times a power of two, and what undoes it, one number a row: nothing is lost of
    bfloat16 but what is 2^-29 of its row's largest."""
    wide = tile.to(tl.float32)
    up, down = scale_for(tl.max(tl.abs(wide), 1))
    return (wide * up[:, None]).to(tl.float16), down


@triton.jit
def skip_weights(ptr, head, p_tile, head_stride, channel_stride, headdim, P: tl.constexpr):
    """D of a head's channels, float32; its channels are 0 apart where they share one."""
    channel = p_tile * P + tl.arange(0, P)
    ptr += head * head_stride
    D = tl.load(ptr + channel * channel_stride, mask=channel < headdim, other=0.0)
    return D.to(tl.float32)


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines behind `pointers`, so that a later copy finds them in L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
