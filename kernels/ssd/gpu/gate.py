"""The gate's gradient; the gate itself is the end of `scan.py`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ntokens", "seqlen", "nheads", "headdim"])
def gate_backward_kernel(
    dy_ptr, ungated_ptr, z_ptr, x_ptr, d_ungated_ptr, dz_ptr, shares_ptr,
    dy_row_stride, dy_token_stride, dy_head_stride, y_row_stride, y_token_stride, y_head_stride,
    z_row_stride, z_token_stride, z_head_stride, x_row_stride, x_token_stride, x_head_stride,
    ntokens, seqlen, nheads, headdim, TOKENS: tl.constexpr, ELEMENTS: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """y = u silu(z) -> du and dz, laid out like u, of ELEMENTS channels of TOKENS tokens, counted over all rows.

    With HAS_D also these tokens' shares, (blocks of tokens, nheads * headdim), of the gradient of D, the sum of du x:
    here, where du is not yet rounded.
    """
    at = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    head = (at // headdim).to(tl.int64)
    channel = at % headdim
    dD = tl.zeros([ELEMENTS], tl.float32)
    for i in range(TOKENS):
        token = tl.program_id(0) * TOKENS + i
        row = (token // seqlen).to(tl.int64)
        place = (token % seqlen).to(tl.int64)
        mask = (head < nheads) & (token < ntokens)
        y_at = row * y_row_stride + place * y_token_stride + head * y_head_stride + channel
        dy_at = row * dy_row_stride + place * dy_token_stride + head * dy_head_stride + channel
        z_at = row * z_row_stride + place * z_token_stride + head * z_head_stride + channel
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(ungated_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        du = dy * z * sigmoid
        tl.store(d_ungated_ptr + y_at, du.to(d_ungated_ptr.dtype.element_ty), mask=mask)
        dz = dy * u * sigmoid * (1 + z * (1 - sigmoid))
        tl.store(dz_ptr + y_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if HAS_D:
            x_at = row * x_row_stride + place * x_token_stride + head * x_head_stride + channel
            dD += du * tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_D:
        tl.store(shares_ptr + tl.program_id(0).to(tl.int64) * (nheads * headdim) + at, dD, mask=head < nheads)
