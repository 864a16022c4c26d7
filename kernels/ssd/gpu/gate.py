"""The gate's gradient; the gate itself is the end of `scan.py`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["seqlen", "nheads", "headdim"])
def gate_backward_kernel(
    dy_ptr, ungated_ptr, z_ptr, d_ungated_ptr, dz_ptr,
    dy_row_stride, dy_token_stride, dy_head_stride, y_row_stride, y_token_stride, y_head_stride,
    z_row_stride, z_token_stride, z_head_stride, seqlen, nheads, headdim, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """y = u silu(z) -> du and dz, of one token of a row; both laid out like u."""
    token = tl.program_id(0)
    row = token // seqlen
    place = token % seqlen
    at = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    head = (at // headdim).to(tl.int64)
    channel = at % headdim
    mask = head < nheads
    y_at = row.to(tl.int64) * y_row_stride + place.to(tl.int64) * y_token_stride + head * y_head_stride + channel
    dy_at = row.to(tl.int64) * dy_row_stride + place.to(tl.int64) * dy_token_stride + head * dy_head_stride + channel
    z_at = row.to(tl.int64) * z_row_stride + place.to(tl.int64) * z_token_stride + head * z_head_stride + channel
    dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(ungated_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(z)
    tl.store(d_ungated_ptr + y_at, (dy * z * sigmoid).to(d_ungated_ptr.dtype.element_ty), mask=mask)
    dz = dy * u * sigmoid * (1 + z * (1 - sigmoid))
    tl.store(dz_ptr + y_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
