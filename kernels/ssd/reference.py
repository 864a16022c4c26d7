"""The definition of the SSD operator, one token at a time and as a matrix. Slow, plain, right in float64.

Per head (arXiv 2405.21060, equations 1 and 2 with the discretisation of section 4.5):

    h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

and the same map as a masked matrix product (its section 3): y = M x, M_ts = C_t^T B_s dt_s exp(sum_{s<u<=t} A dt_u).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def discretize(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float] = (0.0, math.inf)
) -> Tensor:
    """The step size clamp(softplus(dt + dt_bias)), in float32 or wider.

    dt: (..., nheads), dt_bias: (nheads,). Above 40 softplus is the identity to rounding.
    """
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt, threshold=40)
    return dt if dt_limit == (0.0, math.inf) and dt_softplus else dt.clamp(*dt_limit)


def expand_groups(tensor: Tensor, nheads: int) -> Tensor:
    """(..., ngroups, d_state) -> (..., nheads, d_state): every head of a group reads the group's B or C."""
    return tensor.repeat_interleave(nheads // tensor.shape[-2], dim=-2)


def skip(x: Tensor, D: Tensor) -> Tensor:
    """D x; x: (..., nheads, headdim), D: (nheads,) or (nheads, headdim)."""
    return x * (D if D.ndim == 2 else D[:, None])


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: outputs and the state after the last token.

    Arguments and results as in `mamba_chunk_scan_combined`; the states are always returned.
    """
    if cu_seqlens is not None:
        outputs, finals = [], []
        offsets = cu_seqlens.tolist()
        for document, (start, end) in enumerate(itertools.pairwise(offsets)):
            part = slice(start, end)
            y, state = ssd_recurrence(
                x[:, part], dt[:, part], A, B[:, part], C[:, part],
                z=None if z is None else z[:, part],
                D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
                initial_states=None if initial_states is None else initial_states[document : document + 1],
            )  # fmt: skip
            outputs.append(y)
            finals.append(state)
        return torch.cat(outputs, dim=1), torch.cat(finals)

    batch, seqlen, nheads, headdim = x.shape
    dt = discretize(dt, dt_bias, dt_softplus, dt_limit)
    B, C = expand_groups(B, nheads), expand_groups(C, nheads)
    start = dt.new_zeros(batch, nheads, headdim, B.shape[-1])
    state = start if initial_states is None else initial_states
    outputs = []
    for t in range(seqlen):
        if seq_idx is not None and t > 0:
            continues = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(continues[:, None, None, None], state, 0.0)
        decay = torch.exp(A * dt[:, t])  # (b, h)
        inflow = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t].to(dt.dtype), B[:, t].to(dt.dtype))
        state = decay[..., None, None] * state + inflow
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t].to(dt.dtype)))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x, dtype=dt.dtype)
    if D is not None:
        y = y + skip(x, D)
    if z is not None:
        y = y * F.silu(z)
    return y.to(x.dtype), state


def segsum(log_decay: Tensor) -> Tensor:
    """(..., t) -> (..., t, s): the sum of `log_decay` over s < u <= t, and -inf where s > t."""
    total = log_decay.cumsum(-1)
    sums = total[..., :, None] - total[..., None, :]
    causal = torch.ones(sums.shape[-2:], dtype=torch.bool, device=sums.device).tril()
    return sums.masked_fill(~causal, -math.inf)


def ssd_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """The dense token-mixing matrix M of the dual form, (batch, nheads, seqlen, seqlen); y = M x + D x.

    dt: (batch, seqlen, nheads), already discretized; B and C: (batch, seqlen, ngroups, d_state);
    seq_idx: (batch, seqlen), tokens of different documents do not see each other.
    """
    nheads = dt.shape[-1]
    B, C = expand_groups(B, nheads), expand_groups(C, nheads)
    sums = segsum((A * dt).transpose(1, 2))
    if seq_idx is not None:
        same = seq_idx[:, None, :, None] == seq_idx[:, None, None, :]
        sums = sums.masked_fill(~same, -math.inf)
    return torch.einsum("bthn,bshn->bhts", C, B) * sums.exp() * dt.transpose(1, 2)[:, :, None, :]
