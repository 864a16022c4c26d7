"""The gate's gradient; the gate itself is the end of `scan.py`."""

import triton
import triton.language as tl


@triton.jit
def _head(ptr, row, place, row_stride, token_stride, head, head_stride, channel):
    """Pointers to one head's channels of tokens."""
    tokens = row.to(tl.int64) * row_stride + place.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return ptr + tokens[:, None] + channel[None, :]


@triton.jit(do_not_specialize=["ntokens", "seqlen", "nheads"])
def gate_backward_kernel(
    dy_ptr, ungated_ptr, z_ptr, x_ptr, d_ungated_ptr, dz_ptr, shares_ptr,
    dy_row_stride, dy_token_stride, dy_head_stride, y_row_stride, y_token_stride, y_head_stride,
    z_row_stride, z_token_stride, z_head_stride, x_row_stride, x_token_stride, x_head_stride,
    ntokens, seqlen, nheads, headdim, T: tl.constexpr, P: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """y = u silu(z) -> du and dz, laid out like u, of a head of T tokens, counted over all rows.

    With HAS_D also their share of the gradient of D, the sum of du x, (blocks of tokens, nheads, P): here, where du is
    not yet rounded.
    """
    head = tl.program_id(0) % nheads
    block = tl.program_id(0) // nheads
    token = block * T + tl.arange(0, T)
    row = token // seqlen
    place = token % seqlen
    channel = tl.arange(0, P)
    mask = (token[:, None] < ntokens) & (channel[None, :] < headdim)
    dys = _head(dy_ptr, row, place, dy_row_stride, dy_token_stride, head, dy_head_stride, channel)
    us = _head(ungated_ptr, row, place, y_row_stride, y_token_stride, head, y_head_stride, channel)
    zs = _head(z_ptr, row, place, z_row_stride, z_token_stride, head, z_head_stride, channel)
    dy = tl.load(dys, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(us, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(zs, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(z)
    du = dy * z * sigmoid
    dz = dy * u * sigmoid * (1 + z * (1 - sigmoid))
    outs = _head(d_ungated_ptr, row, place, y_row_stride, y_token_stride, head, y_head_stride, channel)
    tl.store(outs, du.to(d_ungated_ptr.dtype.element_ty), mask=mask)
    outs = _head(dz_ptr, row, place, y_row_stride, y_token_stride, head, y_head_stride, channel)
    tl.store(outs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if HAS_D:
        xs = _head(x_ptr, row, place, x_row_stride, x_token_stride, head, x_head_stride, channel)
        x = tl.load(xs, mask=mask, other=0.0).to(tl.float32)
        tl.store(shares_ptr + tl.program_id(0).to(tl.int64) * P + channel, tl.sum(du * x, 0))
