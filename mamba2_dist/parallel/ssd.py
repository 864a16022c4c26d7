"""The convolution and the SSD operator over a sequence cut across ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mamba2_dist.kernels.common.backend import Backend
from mamba2_dist.kernels.conv1d import causal_conv1d_split
from mamba2_dist.kernels.ssd import SSDSpan

from .groups import Group
from .halo import conv_halo
from .segments import LocalSegments, SegmentTable
from .state_scan import StateScan, state_scan


def conv1d_over_segments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    table: SegmentTable,
    group: Group,
    *,
    activation: Literal["silu"] | None = None,
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """`causal_conv1d_split` of a sequence cut over `group`; communicates the rows before each segment.

    x: (batch, seqlen/cp, at least sum(sizes)), of which the first channels are convolved; weight: (sum(sizes), width).
    Returns the parts and what follows them, and what gives all of that again without communicating.
    """
    halo = conv_halo(x[..., : sum(sizes)], weight.shape[1], table, group)
    pieces = table.local(group.rank).documents

    def convolve() -> list[Tensor]:
        parts = causal_conv1d_split(
            x.flatten(0, 1)[None], weight, bias, sizes, initial_state=halo, cu_seqlens=pieces, activation=activation
        )
        return [part.view(*x.shape[:2], part.shape[2]) for part in parts]

    return convolve(), convolve


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
) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """`mamba_chunk_scan_combined` of a sequence cut over `group`: local states first, then the states of the ranks
    before, then the outputs.

    x: (batch, seqlen/cp, nheads/tp, headdim), dt: (batch, seqlen/cp, nheads/tp),
    B, C: (batch, seqlen/cp, ngroups/tp, d_state). Returns y like x, and what gives the same y of the same x, B and C
    again without communicating.
    """
    # what is returned must not hold x, B or C themselves
    local, shape = table.local(group.rank), x.shape

    def span_of(x: Tensor, B: Tensor, C: Tensor) -> SSDSpan:
        flat = [tensor.flatten(0, 1)[None] for tensor in (x, dt, B, C)]
        return SSDSpan(
            flat[0], flat[1], A, flat[2], flat[3], chunk_size,
            D=D, dt_bias=dt_bias, cu_seqlens=local.documents, dt_softplus=dt_softplus, dt_limit=dt_limit,
            backend=backend,
        )  # fmt: skip

    span, entering, into = span_of(x, B, C), None, None
    if len(table.chain) > 1:
        entering, into = _entering(span, local, table, group, scan), local.first.flatten()

    def outputs(span: SSDSpan) -> Tensor:
        return span.scan(entering, into=into, final_states=False)[0].view(shape)

    return outputs(span), lambda x, B, C: outputs(span_of(x, B, C))


def _entering(span: SSDSpan, local: LocalSegments, table: SegmentTable, group: Group, scan: StateScan) -> Tensor:
    """The states that enter the first piece of each segment of each row."""
    state, decay = _segment_elements(span, local)
    entering = state_scan(state, decay[..., None, None], table, group, scan)
    # a segment's entering state goes to its first piece if that continues a document
    continues = local.tensor("continues", entering.device)[..., None, None, None]
    return torch.where(continues, entering, 0.0).flatten(0, 1)


def _segment_elements(span: SSDSpan, local: LocalSegments) -> tuple[Tensor, Tensor]:
    """(segments, batch, nheads, headdim, d_state) and (segments, batch, nheads): what each segment leaves.

    The state is its last document's; the decay is zero where a document starts inside.
    """
    state, decay = (element.unflatten(0, local.last.shape) for element in span.leaving(local.last.flatten()))
    passes = local.tensor("passes", state.device)
    return state, torch.where(passes[..., None], decay, 0.0)
