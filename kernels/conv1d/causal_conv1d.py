"""Depthwise causal convolution over packed documents as a few shifted products."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import check_choice, check_ndim, check_shape
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
    check_ndim("x", x, "(batch, seqlen, channels)")
    check_ndim("weight", weight, "(channels, width)")
    batch, seqlen, channels = x.shape
    check_shape("weight", weight, (channels, weight.shape[1]), "(channels, width)")
    if bias is not None:
        check_shape("bias", bias, (channels,), "(channels,)")
    check_choice("activation", activation, (None, "silu"))
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens both describe documents; give one of them")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(
                f"cu_seqlens packs documents in a batch of one, got batch {batch}; flatten the batch first"
            )
        documents = Documents.of(cu_seqlens, seqlen)
    elif seq_idx is not None:
        check_shape("seq_idx", seq_idx, (batch, seqlen), "(batch, seqlen)")
        documents = Documents.from_seq_idx(seq_idx)
    else:
        documents = Documents.rows(batch, seqlen)
    before = weight.shape[1] - 1
    if initial_state is not None:
        axes = "(batch or documents, width - 1, channels)"
        check_shape("initial_state", initial_state, (documents.nrows, before, channels), axes)
        initial_state = documents.enter(initial_state)

    # sums in float32 or wider, also their gradients
    wide = torch.promote_types(x.dtype, torch.float32)
    flat, weight = x.flatten(0, 1).to(wide), weight.to(wide)
    initial_state = None if initial_state is None else initial_state.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        y = _inside(flat, weight, documents)
        if initial_state is not None:
            y = _add_initial(y, initial_state, weight, documents)
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = F.silu(y)
    y = y.to(x.dtype).view(x.shape)
    if not return_final_state:
        return y
    return y, documents.leave(_final_state(flat, initial_state, before, documents)).to(x.dtype)


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
