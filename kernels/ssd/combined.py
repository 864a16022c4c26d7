"""The SSD operator as one function of whole sequences."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.backend import Backend, takes_triton
from ..common.checks import check_device, check_divisible, check_ndim, check_positive, check_shape
from ..common.documents import Documents
from .chunked import ChunkedSpan
from .reference import discretize, skip


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: "Documents | Tensor | None" = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t (arXiv 2405.21060), times silu(z) if given.

    x: (batch, seqlen, nheads, headdim)
    dt: (batch, seqlen, nheads); becomes clamp(softplus(dt + dt_bias), *dt_limit)
    A: (nheads,), negative
    B, C: (batch, seqlen, ngroups, d_state); ngroups divides nheads
    D: (nheads,) or (nheads, headdim)
    z: (batch, seqlen, nheads, headdim)
    chunk_size: tokens of a chunk for PyTorch's backend; the Triton kernels choose theirs
    dt_bias: (nheads,)
    initial_states: (batch, nheads, headdim, d_state), the state before each row's first token, whatever its index in
        `seq_idx`; with `cu_seqlens` (documents, nheads, headdim, d_state); None: zeros
    seq_idx: (batch, seqlen) integers; a new document starts wherever it changes. Read on the host: on a device this
        waits for it, `cu_seqlens` held on the host does not
    cu_seqlens: (documents + 1,) ascending offsets of documents packed in a batch of one; documents may be empty

    Returns y like x and, with `return_final_states`, the states after each row's last token (with `cu_seqlens`, each
    document's), float32 or wider. States, decays and cumulative sums are float32, float64 when x is.
    Raises ValueError for shapes that do not fit, naming the argument.
    """
    check(x, dt, A, B, C, chunk_size, D, z, dt_bias, seq_idx, cu_seqlens, dt_limit)
    triton = takes_triton(backend, x, lambda: check_sizes(x, B))
    documents = _documents(x, seq_idx, cu_seqlens)
    if documents is None and not triton:
        documents = Documents.rows(*x.shape[:2])
    if initial_states is not None:
        check_device("initial_states", initial_states, x.device)
        count = x.shape[0] if documents is None else documents.nrows
        axes = "(batch or documents, nheads, headdim, d_state)"
        check_shape("initial_states", initial_states, (count, *x.shape[2:], B.shape[-1]), axes)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    if triton:
        y, final = _in_triton(*tensors, documents, (dt_softplus, *map(float, dt_limit)), return_final_states)
    else:
        y, final = _in_torch(*tensors, documents, chunk_size, dt_softplus, dt_limit)
    return (y, final) if return_final_states else y


def _documents(x: Tensor, seq_idx: Tensor | None, cu_seqlens: "Documents | Tensor | None") -> Documents | None:
    """None for rows, which are described by nothing that a compiler could not trace."""
    if cu_seqlens is not None:
        return Documents.of(cu_seqlens, x.shape[0] * x.shape[1])
    return None if seq_idx is None else Documents.from_seq_idx(seq_idx)


def _in_triton(x, dt, A, B, C, D, z, dt_bias, initial_states, documents, steps, final_states) -> tuple[Tensor, Tensor]:
    from .gpu import ops

    offsets, enters, leaves, count = None, None, None, x.shape[0]
    if documents is not None:
        offsets, (enters, leaves), count = documents.on_host, documents.edges_on_host, documents.nrows
    if not final_states:
        leaves, count = torch.empty(0, dtype=torch.int64, device="cpu"), 0
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    compiling = torch.compiler.is_compiling()
    y, final, _, _ = ops.call(ops.ssd_scan, *tensors, offsets, enters, leaves, count, *steps, keep, not compiling)
    return y, final


def _in_torch(
    x, dt, A, B, C, D, z, dt_bias, initial_states, documents, chunk_size, dt_softplus, dt_limit
) -> tuple[Tensor, Tensor]:
    if initial_states is not None:
        initial_states = documents.enter(initial_states)
    with torch.autocast(x.device.type, enabled=False):
        dt = discretize(dt, dt_bias, dt_softplus, dt_limit)
        flat = [tensor.flatten(0, 1) for tensor in (x, dt, B, C)]
        y, final = ChunkedSpan(flat[0], flat[1], A, flat[2], flat[3], chunk_size, documents).scan(initial_states)
        y = y.view(x.shape)
        if D is not None:
            y = y + skip(x, D)
        if z is not None:
            y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), documents.leave(final)


def check_sizes(x: Tensor, B: Tensor) -> None:
    """Raise ValueError for heads and states that no kernel takes."""
    from .gpu import config

    config.check(x.shape[3], B.shape[3])


def check(x, dt, A, B, C, chunk_size, D, z, dt_bias, seq_idx, cu_seqlens, dt_limit) -> None:
    """Raise ValueError for arguments of `mamba_chunk_scan_combined` that do not fit."""
    check_positive("chunk_size", chunk_size)
    check_ndim("x", x, "(batch, seqlen, nheads, headdim)")
    check_ndim("B", B, "(batch, seqlen, ngroups, d_state)")
    batch, seqlen, nheads, headdim = x.shape
    tensors = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    for name, tensor in tensors.items():
        if tensor is not None:
            check_device(name, tensor, x.device)
    check_divisible("nheads", nheads, "ngroups", B.shape[2])
    check_shape("dt", dt, (batch, seqlen, nheads), "(batch, seqlen, nheads)")
    check_shape("A", A, (nheads,), "(nheads,)")
    check_shape("B", B, (batch, seqlen, *B.shape[2:]), "(batch, seqlen, ngroups, d_state)")
    check_shape("C", C, B.shape, "(batch, seqlen, ngroups, d_state)")
    if D is not None and tuple(D.shape) not in ((nheads,), (nheads, headdim)):
        raise ValueError(f"D must have shape ({nheads},) or ({nheads}, {headdim}), got {tuple(D.shape)}")
    if z is not None:
        check_shape("z", z, x.shape, "(batch, seqlen, nheads, headdim)")
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (nheads,), "(nheads,)")
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")
    if seq_idx is not None:
        check_shape("seq_idx", seq_idx, (batch, seqlen), "(batch, seqlen)")
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens both describe documents; give one of them")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seqlens packs documents in a batch of one, got batch {batch}; flatten the batch first")
