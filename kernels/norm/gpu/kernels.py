"""The gated group RMS norm and its gradient: programs walk over tokens, a group's channels in registers.

A group of channels is TILES tiles of BLOCK, so that few lanes are idle whatever its size.
"""

import triton
import triton.language as tl

from ...common.functions import sigmoid


@triton.jit
def _rows(ptr, tokens, stride, group, group_size):
    """Pointers to where a group's channels of tokens begin."""
    return ptr + tokens.to(tl.int64)[:, None] * stride + group * group_size


@triton.jit
def _tiles(rows, known, group_size, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """A group's channels of tokens, in the dtype they are stored in."""
    tiles = ()
    for i in tl.static_range(TILES):
        column = i * BLOCK + tl.arange(0, BLOCK)
        mask = known[:, None] & (column < group_size)[None, :]
        tiles = tiles + (tl.load(rows + column[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def _weights(weight_ptr, group, group_size, BLOCK: tl.constexpr, TILES: tl.constexpr):
    weights = ()
    for i in tl.static_range(TILES):
        column = i * BLOCK + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + group * group_size + column, mask=column < group_size, other=0.0)
        weights = weights + (weight.to(tl.float32)[None, :],)
    return weights


@triton.jit
def norm_kernel(
    x_ptr, z_ptr, weight_ptr, y_ptr, added_ptr, sum_ptr, squares_ptr, scale_ptr, ntokens, x_stride, z_stride,
    added_stride, group_size, ngroups, eps, per_channel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, HAS_Z: tl.constexpr, BEFORE: tl.constexpr,
    HAS_ADDED: tl.constexpr, SQUARES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = weight v scale with v = x silu(z), or weight x scale silu(z) if BEFORE; y is (ntokens, channels).

    SQUARES "here": scale = 1 / sqrt(per_channel * sum of v^2 + eps), kept, (ntokens, ngroups). "only": the sums of v^2
    are all that is wanted, "given": they are taken from squares_ptr. HAS_ADDED: x is first added to, and that kept.
    """
    group = tl.program_id(0) % ngroups
    worker = tl.program_id(0) // ngroups
    workers = tl.num_programs(0) // ngroups
    channels = ngroups * group_size
    if SQUARES != "only":
        weights = _weights(weight_ptr, group, group_size, BLOCK, TILES)
    for first in tl.range(worker * ROWS, ntokens, workers * ROWS, num_stages=STAGES):
        tokens = first + tl.arange(0, ROWS)
        known = tokens < ntokens
        xs = _tiles(_rows(x_ptr, tokens, x_stride, group, group_size), known, group_size, BLOCK, TILES)
        if HAS_Z:
            zs = _tiles(_rows(z_ptr, tokens, z_stride, group, group_size), known, group_size, BLOCK, TILES)
        if HAS_ADDED:
            more = _tiles(_rows(added_ptr, tokens, added_stride, group, group_size), known, group_size, BLOCK, TILES)
        values = ()
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in tl.static_range(TILES):
            value = xs[i].to(tl.float32)
            if HAS_ADDED:
                # what is kept is what is normalised
                value = (value + more[i].to(tl.float32)).to(sum_ptr.dtype.element_ty).to(tl.float32)
            if HAS_Z and not BEFORE:
                z = zs[i].to(tl.float32)
                value = value * z * sigmoid(z)
            total += value * value
            values = values + (value,)
        at = tokens.to(tl.int64) * ngroups + group
        if SQUARES == "given":
            squares = tl.load(squares_ptr + at, mask=known, other=0.0)
        else:
            squares = tl.sum(total, 1)
        if SQUARES == "only":
            tl.store(squares_ptr + at, squares, mask=known)
        else:
            scale = 1 / tl.sqrt(squares * per_channel + eps)
            tl.store(scale_ptr + at, scale, mask=known)
            ys = _rows(y_ptr, tokens, channels, group, group_size)
            sums = _rows(sum_ptr, tokens, channels, group, group_size)
            for i in tl.static_range(TILES):
                column = i * BLOCK + tl.arange(0, BLOCK)
                mask = known[:, None] & (column < group_size)[None, :]
                if HAS_ADDED:
                    tl.store(sums + column[None, :], values[i].to(sum_ptr.dtype.element_ty), mask=mask)
                y = values[i] * scale[:, None] * weights[i]
                if HAS_Z and BEFORE:
                    z = zs[i].to(tl.float32)
                    y = y * z * sigmoid(z)
                tl.store(ys + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    dy_ptr, x_ptr, z_ptr, weight_ptr, scale_ptr, products_ptr, carried_ptr, dx_ptr, dz_ptr, d_added_ptr, shares_ptr,
    ntokens, x_stride, z_stride, group_size, ngroups, per_channel,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, HAS_Z: tl.constexpr, BEFORE: tl.constexpr,
    HAS_CARRIED: tl.constexpr, HAS_ADDED: tl.constexpr, PRODUCTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx, dz and each program's share of the gradient of the weight, (workers, channels), which it sums in one order.

    With t = weight dy (times silu(z) if BEFORE) and n = v scale: dv = scale (t - n mean(t n)), the mean over the group.
    PRODUCTS "here": the sums of t n are made here; "only": they are all that is wanted, "given": they are taken from
    products_ptr, (ntokens, ngroups). HAS_CARRIED: dx is added to, HAS_ADDED: and written a second time.
    """
    group = tl.program_id(0) % ngroups
    worker = tl.program_id(0) // ngroups
    workers = tl.num_programs(0) // ngroups
    channels = ngroups * group_size
    weights = _weights(weight_ptr, group, group_size, BLOCK, TILES)
    d_weights = ()
    for _ in tl.static_range(TILES):
        d_weights = d_weights + (tl.zeros([ROWS, BLOCK], tl.float32),)
    for first in tl.range(worker * ROWS, ntokens, workers * ROWS, num_stages=STAGES):
        tokens = first + tl.arange(0, ROWS)
        known = tokens < ntokens
        dys = _tiles(_rows(dy_ptr, tokens, channels, group, group_size), known, group_size, BLOCK, TILES)
        xs = _tiles(_rows(x_ptr, tokens, x_stride, group, group_size), known, group_size, BLOCK, TILES)
        if HAS_Z:
            zs = _tiles(_rows(z_ptr, tokens, z_stride, group, group_size), known, group_size, BLOCK, TILES)
        if HAS_CARRIED:
            carried = _tiles(_rows(carried_ptr, tokens, channels, group, group_size), known, group_size, BLOCK, TILES)
        at = tokens.to(tl.int64) * ngroups + group
        scale = tl.load(scale_ptr + at, mask=known, other=0.0)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in tl.static_range(TILES):
            product = dys[i].to(tl.float32) * xs[i].to(tl.float32)
            if HAS_Z:
                z = zs[i].to(tl.float32)
                product = product * z * sigmoid(z)
            total += product * weights[i]
        if PRODUCTS == "given":
            products = tl.load(products_ptr + at, mask=known, other=0.0)
        else:
            products = tl.sum(total, 1) * scale
        if PRODUCTS == "only":
            tl.store(products_ptr + at, products, mask=known)
        else:
            mean = products * per_channel
            dxs = _rows(dx_ptr, tokens, channels, group, group_size)
            dzs = _rows(dz_ptr, tokens, channels, group, group_size)
            d_adds = _rows(d_added_ptr, tokens, channels, group, group_size)
            summed = ()
            for i in tl.static_range(TILES):
                column = i * BLOCK + tl.arange(0, BLOCK)
                mask = known[:, None] & (column < group_size)[None, :]
                dy = dys[i].to(tl.float32)
                x = xs[i].to(tl.float32)
                if HAS_Z:
                    z = zs[i].to(tl.float32)
                    s = sigmoid(z)
                    gate = z * s
                    d_gate = s * (1 + z * (1 - s))
                if HAS_Z and not BEFORE:
                    n = x * gate * scale[:, None]
                    summed = summed + (d_weights[i] + dy * n,)
                    dv = scale[:, None] * (weights[i] * dy - n * mean[:, None])
                    dx = dv * gate
                    tl.store(dzs + column[None, :], (dv * x * d_gate).to(dz_ptr.dtype.element_ty), mask=mask)
                else:
                    n = x * scale[:, None]
                    t = dy
                    if HAS_Z:
                        t = dy * gate
                        dz = dy * n * weights[i] * d_gate
                        tl.store(dzs + column[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
                    summed = summed + (d_weights[i] + t * n,)
                    dx = scale[:, None] * (weights[i] * t - n * mean[:, None])
                if HAS_CARRIED:
                    dx += carried[i].to(tl.float32)
                if HAS_ADDED:
                    tl.store(d_adds + column[None, :], dx.to(d_added_ptr.dtype.element_ty), mask=mask)
                tl.store(dxs + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
            d_weights = summed
    if PRODUCTS != "only":
        for i in tl.static_range(TILES):
            column = i * BLOCK + tl.arange(0, BLOCK)
            share = shares_ptr + worker.to(tl.int64) * channels + group * group_size + column
            tl.store(share, tl.sum(d_weights[i], 0), mask=column < group_size)
