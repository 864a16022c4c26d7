"""Depthwise causal convolution over packed documents; in PyTorch as a few shifted products."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.backend import Backend, takes_triton
from ..common.checks import check_choice, check_device, check_ndim, check_positive, check_shape
from ..common.documents import Documents


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: "Documents | Tensor | None" = None,
    activation: Literal["silu"] | None = None,
    return_final_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = activation(bias + sum_w weight_w x_{t - width + 1 + w}), where no window reaches over a document's start.

    x: (batch, seqlen, channels); weight: (channels, width); bias: (channels,)
    initial_state: (batch, width - 1, channels), the inputs before each row's first token; with `cu_seqlens`
        (documents, width - 1, channels); None: zeros
    seq_idx: (batch, seqlen) integers; a new document starts wherever it changes; read on the host
    cu_seqlens: (documents + 1,) ascending offsets of documents packed in a batch of one; documents may be empty

    Returns y like x and, with `return_final_state`, the last width - 1 inputs of each row (with `cu_seqlens`, of each
    document), shaped like `initial_state`. Sums are float32, float64 when x is.
    Raises ValueError for shapes that do not fit, naming the argument.
    """
    parts, final = _convolve(
        x, weight, bias, x.shape[-1:], initial_state, seq_idx, cu_seqlens, activation, return_final_state, backend
    )
    return (parts[0], final) if return_final_state else parts[0]  # type: ignore[return-value]


def causal_conv1d_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: "Documents | Tensor | None" = None,
    activation: Literal["silu"] | None = None,
    backend: Backend = "auto",
) -> list[Tensor]:
    """`causal_conv1d` of the first sum(sizes) channels of x in parts of these sizes, up to three, then the rest of x.

    Parts are written where they are wanted and their gradients read from there: nothing is joined or copied but the
    rest. weight: (sum(sizes), width); initial_state: (rows, width - 1, sum(sizes)).
    """
    return _convolve(x, weight, bias, sizes, initial_state, None, cu_seqlens, activation, False, backend)[0]


def _convolve(
    x, weight, bias, sizes, initial_state, seq_idx, cu_seqlens, activation, return_final_state, backend
) -> tuple[list[Tensor], Tensor | None]:
    check(x, weight, bias, sizes, initial_state, seq_idx, cu_seqlens, activation)
    channels = sum(sizes)
    batch, seqlen, _ = x.shape
    triton = takes_triton(backend, x)
    documents: Documents | None
    if cu_seqlens is not None:
        documents = Documents.of(cu_seqlens, seqlen)
    elif seq_idx is not None:
        documents = Documents.from_seq_idx(seq_idx)
    else:
        # rows alone are described by nothing that a compiler could not trace
        documents = None if triton else Documents.rows(batch, seqlen)
    nrows, before = batch if documents is None else documents.nrows, weight.shape[1] - 1
    if initial_state is not None:
        axes = "(batch or documents, width - 1, channels)"
        check_shape("initial_state", initial_state, (nrows, before, channels), axes)
    if triton:
        from .gpu import ops

        offsets = None if documents is None else documents.on_host
        enters, leaves = (None, None) if documents is None else documents.edges_on_host
        *parts, rest, final = ops.call(
            ops.causal_conv1d, x, weight, bias, initial_state, offsets, enters, leaves, list(sizes),
            nrows if return_final_state else 0, activation == "silu",
        )  # fmt: skip
        return [*parts[: len(sizes)], rest], final if return_final_state else None
    assert documents is not None
    mine, rest = x.split([channels, x.shape[-1] - channels], dim=-1)
    y, final = _convolve_in_torch(mine, weight, bias, initial_state, documents, activation)
    return [*y.split(list(sizes), dim=-1), rest], final


def _convolve_in_torch(x, weight, bias, initial_state, documents, activation) -> tuple[Tensor, Tensor]:
    before = weight.shape[1] - 1
    # sums in float32 or wider, also their gradients
    wide = torch.promote_types(x.dtype, torch.float32)
    flat, weight = x.flatten(0, 1).to(wide), weight.to(wide)
    initial_state = None if initial_state is None else documents.enter(initial_state).to(wide)
    with torch.autocast(x.device.type, enabled=False):
        y = _inside(flat, weight, documents)
        if initial_state is not None:
            y = _add_initial(y, initial_state, weight, documents)
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = F.silu(y)
    final = documents.leave(_final_state(flat, initial_state, before, documents))
    return y.to(x.dtype).view(x.shape), final.to(x.dtype)


def check(x, weight, bias, sizes, initial_state, seq_idx, cu_seqlens, activation) -> None:
    check_ndim("x", x, "(batch, seqlen, channels)")
    channels = sum(sizes)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 0 or channels > x.shape[-1]:
        raise ValueError(
            f"sizes must be one to three numbers of channels, together at most those of x ({x.shape[-1]}), "
            f"got {list(sizes)}"
        )
    check_ndim("weight", weight, "(channels, width)")
    check_shape("weight", weight, (channels, weight.shape[1]), "(channels, width)")
    check_positive("width", weight.shape[1])
    for name, tensor in {"weight": weight, "bias": bias, "initial_state": initial_state}.items():
        if tensor is not None:
            check_device(name, tensor, x.device)
    if bias is not None:
        check_shape("bias", bias, (channels,), "(channels,)")
    check_choice("activation", activation, (None, "silu"))
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens both describe documents; give one of them")
    if seq_idx is not None:
        check_shape("seq_idx", seq_idx, x.shape[:2], "(batch, seqlen)")
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens packs documents in a batch of one, got batch {x.shape[0]}; flatten the batch first"
        )


def _inside(x: Tensor, weight: Tensor, documents: Documents) -> Tensor:
    """The products whose input lies in the same document; x: (tokens, channels)."""
    width = weight.shape[1]
    y = x * weight[:, -1]
    position = documents.position(x.device)[:, None]
    for shift in range(1, min(width, len(x))):
        # masked, not multiplied by 0: a neighbour's inf must not leak as nan
        earlier = torch.where(position[shift:] >= shift, x[:-shift], 0.0)
        y = y + F.pad(earlier * weight[:, -1 - shift], (0, 0, shift, 0))
    return y


def _add_initial(y: Tensor, state: Tensor, weight: Tensor, documents: Documents) -> Tensor:
    """Add the products of each document's first tokens with the inputs before it."""
    before = state.shape[1]
    document, token, place = documents.heads(before, y.device)
    window = F.pad(state, (0, 0, 0, before))[document]  # (heads, 2 before, channels): what precedes, then zeros
    taps = place[:, None] + torch.arange(before, device=y.device)  # the window of `place` starts at input `place`
    window = window.gather(1, taps[..., None].expand(-1, -1, window.shape[-1]))
    return y.index_add(0, token, (window * weight[:, :-1].T).sum(1))


def _final_state(x: Tensor, initial: Tensor | None, before: int, documents: Documents) -> Tensor:
    """The last `before` inputs of each document, older ones from `initial` or zero."""
    if initial is None:
        initial = x.new_zeros(len(documents), before, x.shape[-1])
    return torch.cat([x, initial.flatten(0, 1)])[documents.tails(before, x.device)]
