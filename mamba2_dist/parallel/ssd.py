"""The convolution and the SSD operator over a sequence cut across ranks."""

import math
from typing import cast

import torch
from torch import Tensor

from mamba2_dist.kernels.conv1d import causal_conv1d
from mamba2_dist.kernels.ssd import SSDSpan
from mamba2_dist.kernels.ssd.combined import Backend

from .groups import Group
from .halo import conv_halo
from .segments import LocalSegments, SegmentTable
from .state_scan import StateScan, state_scan


def conv1d_over_segments(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: SegmentTable, group: Group, *, activation=None
) -> Tensor:
    """`causal_conv1d` of a sequence cut over `group`; communicates the rows before each segment.

    x: (batch, seqlen/cp, channels); weight: (channels, width); returns like x.
    """
    halo = conv_halo(x, weight.shape[1], table, group)
    pieces = table.local(group.rank).documents
    y = causal_conv1d(x.flatten(0, 1)[None], weight, bias, initial_state=halo, cu_seqlens=pieces, activation=activation)
    return cast(Tensor, y).view(x.shape)


def ssd_over_segments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    table: SegmentTable,
    group: Group,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: Backend = "auto",
    scan: StateScan = "all_gather",
) -> Tensor:
    """`mamba_chunk_scan_combined` of a sequence cut over `group`: local states first, then the states of the ranks
    before, then the outputs.

    x: (batch, seqlen/cp, nheads/tp, headdim), dt: (batch, seqlen/cp, nheads/tp),
    B, C: (batch, seqlen/cp, ngroups/tp, d_state); returns like x.
    """
    local = table.local(group.rank)
    flat = [tensor.flatten(0, 1)[None] for tensor in (x, dt, B, C)]
    span = SSDSpan(
        flat[0], flat[1], A, flat[2], flat[3], chunk_size,
        D=D, dt_bias=dt_bias, cu_seqlens=local.documents, dt_softplus=dt_softplus, dt_limit=dt_limit, backend=backend,
    )  # fmt: skip
    if len(table.chain) == 1:
        y, _ = span.scan(final_states=False)
        return y.view(x.shape)
    state, decay = _segment_elements(span, local)
    entering = state_scan(state, decay[..., None, None], table, group, scan)
    # a segment's entering state goes to its first piece if that continues a document
    continues = local.tensor("continues", entering.device)[..., None, None, None]
    entering = torch.where(continues, entering, 0.0).flatten(0, 1)
    y, _ = span.scan(entering, into=local.first.flatten(), final_states=False)
    return y.view(x.shape)


def _segment_elements(span: SSDSpan, local: LocalSegments) -> tuple[Tensor, Tensor]:
    """(segments, batch, nheads, headdim, d_state) and (segments, batch, nheads): what each segment leaves.

    The state is its last document's; the decay is zero where a document starts inside.
    """
    state, decay = (element.unflatten(0, local.last.shape) for element in span.leaving(local.last.flatten()))
    passes = local.tensor("passes", state.device)
    return state, torch.where(passes[..., None], decay, 0.0)
