"""The definition of the depthwise causal convolution, one output at a time."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_w weight_w x_{t - width + 1 + w} inside t's document, and the last width - 1 inputs.

    Arguments and results as in `causal_conv1d`; the final state is always returned.
    """
    batch, seqlen, channels = x.shape
    width = weight.shape[-1]
    before = width - 1
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        results = [
            causal_conv1d_reference(
                x[:, start:end], weight, bias,
                None if initial_state is None else initial_state[document : document + 1],
                activation=activation,
            )
            for document, (start, end) in enumerate(itertools.pairwise(offsets))
        ]  # fmt: skip
        return torch.cat([y for y, _ in results], dim=1), torch.cat([state for _, state in results])
    state = x.new_zeros(batch, before, channels) if initial_state is None else initial_state.to(x.dtype)
    outputs = []
    for t in range(seqlen):
        if seq_idx is not None and t > 0:
            continues = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(continues[:, None, None], state, 0.0)
        window = torch.cat([state, x[:, t : t + 1]], dim=1)
        y = torch.einsum("bwc,cw->bc", window, weight.to(x.dtype))
        outputs.append(y if bias is None else y + bias)
        state = window[:, 1:]
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return (F.silu(y) if activation == "silu" else y), state
