"""The SSD operator: one function for a whole sequence, and the same cut in two where the state passes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.backend import Backend, takes_triton
from ..common.checks import check_device, check_divisible, check_ndim, check_positive, check_shape
from ..common.documents import Documents
from ..common.transfer import to_device
from .chunked import ChunkedSpan
from .reference import discretize, skip

Numbers = Sequence[int] | np.ndarray


class SSDSpan:
    """A span of tokens seen from its state: what it leaves when nothing enters, and its outputs once that is known.

    Arguments as in `mamba_chunk_scan_combined`. On PyTorch's backend `leaving` and `scan` share their work.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: "Documents | Tensor | None" = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        *,
        backend: Backend = "auto",
    ):
        _check(x, dt, A, B, C, chunk_size, D, z, dt_bias, seq_idx, cu_seqlens, dt_limit)
        batch, seqlen = x.shape[:2]
        self.x, self.D, self.z = x, D, z
        self.state_shape = (*x.shape[2:], B.shape[-1])
        self.triton = takes_triton(backend, x, lambda: _check_sizes(x, B))
        self.edges: tuple[Tensor | None, Tensor | None] = None, None
        self.offsets: Tensor | None
        if cu_seqlens is None and seq_idx is None and self.triton:
            # rows alone are described by nothing that a compiler could not trace
            self.nrows = self.ndocuments = batch
            self.offsets = None
        else:
            if cu_seqlens is not None:
                self.documents = Documents.of(cu_seqlens, batch * seqlen)
            elif seq_idx is not None:
                self.documents = Documents.from_seq_idx(seq_idx)
            else:
                self.documents = Documents.rows(batch, seqlen)
            self.nrows, self.ndocuments = self.documents.nrows, len(self.documents)
            self.offsets = self.documents.on_host
            self.edges = self.documents.edges_on_host
        if self.triton:
            self.arguments = (x, dt, A, B, C, dt_bias)
            self.steps = (dt_softplus, float(dt_limit[0]), float(dt_limit[1]))
            return
        with torch.autocast(x.device.type, enabled=False):
            dt = discretize(dt, dt_bias, dt_softplus, dt_limit)
            flat = [tensor.flatten(0, 1) for tensor in (x, dt, B, C)]
            self.span = ChunkedSpan(flat[0], flat[1], A, flat[2], flat[3], chunk_size, self.documents)

    def leaving(self, of: Numbers | None = None) -> tuple[Tensor, Tensor]:
        """Each document's final state if nothing enters, (documents, nheads, headdim, d_state), and the share of an
        entering state that it leaves, (documents, nheads); float32 or wider. Documents are those of `cu_seqlens`, or of
        them those whose numbers are in `of`, each at most once."""
        _check_numbers("of", of, self.ndocuments)
        if self.triton:
            from .gpu import ops

            x, dt, A, B, _, dt_bias = self.arguments
            count = self.ndocuments if of is None else len(of)
            leaves = None if of is None else _on_host(of)
            state, log_decay = ops.call(ops.ssd_state, x, dt, A, B, dt_bias, self.offsets, leaves, count, *self.steps)
            return state, torch.exp(log_decay)
        with torch.autocast(self.x.device.type, enabled=False):
            state, decay = self.span.leaving()
        if of is not None:
            chosen = to_device(_on_host(of), state.device)
            state, decay = state[chosen], decay[chosen]
        return state, decay

    def scan(
        self, initial_states: Tensor | None = None, *, into: Numbers | None = None, final_states: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs and final states, given the states that enter; shapes as in `mamba_chunk_scan_combined`.

        into: the numbers of the documents that the states enter, each at most once; nothing enters the others. Without
        `final_states` they are not kept.
        """
        _check_numbers("into", into, self.ndocuments)
        if initial_states is not None:
            check_device("initial_states", initial_states, self.x.device)
            axes = "(batch or documents, nheads, headdim, d_state)"
            count = self.nrows if into is None else len(into)
            check_shape("initial_states", initial_states, (count, *self.state_shape), axes)
        if self.triton:
            return self._scan_triton(initial_states, into, final_states)
        if initial_states is not None:
            if into is None:
                initial_states = self.documents.enter(initial_states)
            else:
                chosen = to_device(_on_host(into), initial_states.device)
                nothing = initial_states.new_zeros(len(self.documents), *self.state_shape)
                initial_states = nothing.index_copy(0, chosen, initial_states)
        with torch.autocast(self.x.device.type, enabled=False):
            y, final = self.span.scan(initial_states)
            y = y.view(self.x.shape)
            if self.D is not None:
                y = y + skip(self.x, self.D)
            if self.z is not None:
                y = y * F.silu(self.z.to(y.dtype))
        return y.to(self.x.dtype), self.documents.leave(final) if final_states else None

    def _scan_triton(self, initial_states, into, final_states):
        from .gpu import ops

        x, dt, A, B, C, dt_bias = self.arguments
        enters, leaves = self.edges
        if into is not None:
            enters = _on_host(into)
        if not final_states:
            leaves = _on_host([])
        tensors = (x, dt, A, B, C, self.D, self.z, dt_bias, initial_states)
        keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        y, final, _, _ = ops.call(
            ops.ssd_scan, *tensors, self.offsets, enters, leaves,
            self.nrows if final_states else 0, *self.steps, keep, not torch.compiler.is_compiling(),
        )  # fmt: skip
        return y, final if final_states else None


def _on_host(numbers: Numbers) -> Tensor:
    """Numbers of documents as a tensor on the host."""
    return torch.as_tensor(numbers, dtype=torch.int64, device="cpu")


def _check_numbers(name: str, numbers: Numbers | None, ndocuments: int) -> None:
    if numbers is None or len(numbers) == 0:
        return
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} must name each document at most once, got {list(numbers)[:8]}")
    if min(numbers) < 0 or max(numbers) >= ndocuments:
        raise ValueError(f"{name} must name documents from 0 to {ndocuments - 1}, got {min(numbers)} to {max(numbers)}")


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
    span = SSDSpan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, seq_idx, cu_seqlens, dt_softplus, dt_limit, backend=backend
    )
    y, final = span.scan(initial_states, final_states=return_final_states)
    return (y, final) if return_final_states else y  # type: ignore[return-value]


def _check_sizes(x: Tensor, B: Tensor) -> None:
    from .gpu import config

    config.check(x.shape[3], B.shape[3])


def _check(x, dt, A, B, C, chunk_size, D, z, dt_bias, seq_idx, cu_seqlens, dt_limit) -> None:
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
