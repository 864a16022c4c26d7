"""The state that enters each segment: who carries it, on which stream, and with which gradient.

With D_i the gradient of the state leaving segment i and U_i that of the state entering it,

    H_{i+1} = a_i H_i + S_i        D_{i-1} = a_i D_i + U_i        da_i = <D_i, H_i>

so backward is the same scan (`exchange.py`) of (a, U) in reverse order.
"""

import functools
import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.checks import check_choice

from .cost_model import Backend, choose, exchange_time, worth_processors
from .exchange import exchange
from .groups import Group
from .messages import ProcessGroups
from .segments import SegmentTable
from .symmetric_memory import SymmetricMemory

StateScan = Literal["auto", Backend, "serial_exact"]
STATE_SCANS = get_args(StateScan)


def check_state_scan(backend: str, group: Group) -> None:
    """Raise ValueError unless states can travel like this over `group`."""
    check_choice("state_scan", backend, STATE_SCANS)
    if backend == "hierarchical" and group.nodes > 1 and group.node is None:
        raise ValueError(
            f"state_scan 'hierarchical' needs as many ranks of {group.name} ({group.size}) on each of its nodes "
            f"({group.nodes}); choose a cp that fills whole nodes, or 'log_step'"
        )
    if backend == "symmetric_memory" and group.nodes > 1:
        raise ValueError(
            f"state_scan 'symmetric_memory' needs all ranks of {group.name} ({group.size}) on one node, got "
            f"{group.nodes} nodes; choose 'sliced', 'hierarchical' or 'auto'"
        )


class Pending:
    """An exchange under way; on a GPU it runs beside the current stream, and must be waited for."""

    def __init__(self, entering: Tensor, done: torch.cuda.Event | None = None, sent: tuple[Tensor, ...] = ()):
        # what is sent is in memory of the current stream, which must not have it back before it has been read
        self.entering, self.done, self.sent = entering, done, sent

    def wait(self) -> Tensor:
        """The states that enter this rank's segments, like those that leave them. The host does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.entering.device)
            stream.wait_event(self.done)
            if not torch.cuda.is_current_stream_capturing():
                self.entering.record_stream(stream)  # it is in memory of the side stream
        self.sent = ()
        return self.entering


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def begin(
    state: Tensor, decay: Tensor, table: SegmentTable, group: Group, backend: StateScan, *, reverse: bool = False
) -> Pending:
    """Start an exchange over `group`, outside autograd; arguments and errors as in `state_scan`. reverse: from the last
    segment back."""
    check_state_scan(backend, group)
    if backend == "serial_exact":
        raise ValueError(
            "state_scan 'serial_exact' cannot exchange given states, as it hands on those that the SSD operator makes; "
            "ask for it in Mamba2Mixer, ParallelConfig or parallel.ssd.operators, or choose 'ring'"
        )
    if table.ranks != group.size:
        raise ValueError(f"the segment table is made for {table.ranks} ranks, {group.name} has {group.size}")
    _check_elements(state, decay, len(table.held[group.rank]))
    if len(table.segments) == 1:
        return Pending(torch.zeros_like(state))
    if backend == "auto":
        backend = chosen(group, table.slots_per_rank, math.prod(state.shape[1:]) * state.element_size())
    node_size = None if group.node is None else group.node.size
    work = exchange(state, decay, table, group.rank, backend, node_size=node_size, reverse=reverse)
    if not state.is_cuda:
        return Pending(_carrier(backend, group, state.device).run(work))
    stream = _side_stream(state.device)
    stream.wait_stream(torch.cuda.current_stream(state.device))
    with torch.cuda.stream(stream):
        entering = _carrier(backend, group, state.device).run(work)
        return Pending(entering, stream.record_event(), (state, decay))


def _check_elements(state: Tensor, decay: Tensor, segments: int) -> None:
    if state.ndim < 3 or state.shape[0] != segments:
        raise ValueError(
            f"state must be (segments, batch, nheads, ...) with this rank's {segments} segments, got shape "
            f"{tuple(state.shape)}"
        )
    if decay.dtype != state.dtype:
        raise ValueError(f"decay must have the dtype of state ({state.dtype}), got {decay.dtype}")
    shares = zip(decay.shape, state.shape, strict=False)
    if decay.ndim != state.ndim or any(size not in (1, whole) for size, whole in shares):
        raise ValueError(
            f"decay must have the axes of state {tuple(state.shape)}, of size 1 where it is shared, got shape "
            f"{tuple(decay.shape)}"
        )


def _carrier(backend: StateScan, group: Group, device: torch.device) -> ProcessGroups:
    # a rank alone has nobody's memory to read
    reads = backend == "symmetric_memory" and group.size > 1
    return SymmetricMemory(group, device) if reads else ProcessGroups(group)


_choose = functools.cache(choose)  # asked for every exchange


def chosen(group: Group, segments: int, state_bytes: int) -> Backend:
    """What "auto" stands for: the cheapest by the cost model, for `segments` a rank with states of so many bytes.

    Never "symmetric_memory", which not every machine can do.
    """
    if group.nodes > 1 and group.node is None:
        backend = "log_step"  # whatever the nodes hold
    else:
        backend = _choose(group.size, group.nodes, segments, state_bytes, group.machine)
    group.log_choice("state_scan auto: %s, of %d states a rank of %.3f MB", backend, segments, state_bytes / 1e6)
    return cast(Backend, backend)


_exchange_time = functools.cache(exchange_time)


def processors_wanted(group: Group, backend: StateScan, segments: int, state_bytes: int, flops: float) -> int:
    """How many processors of its GPU a product of `flops` operations should leave to an exchange over `group` beside
    it: none where that may as well follow."""
    if group.max_processors == 0:
        return 0
    if backend == "auto":
        backend = chosen(group, segments, state_bytes)
    exchange_s = _exchange_time(backend, group.size, group.nodes, segments, state_bytes, group.machine)
    return group.max_processors if worth_processors(exchange_s, flops / group.machine.matmul_flops) else 0


def state_scan(state: Tensor, decay: Tensor, table: SegmentTable, group: Group, backend: StateScan) -> Tensor:
    """The state that enters each of this rank's segments; communicates over `group`.

    state: (segments, batch, nheads, ...), what each segment leaves when nothing enters it, in slot order; float32 or
    wider. decay: the same number of axes, of size 1 where it is shared: the share of an entering state that each
    segment leaves. Returns (segments, batch, nheads, ...) like `state`; zeros enter the first segment.

    backend: one of those in `cost_model.py`, which says what comes by each; `symmetric_memory` is for GPUs of one node
    that read each other's memory. `auto` takes the cheapest of the others by the cost model.

    Raises ValueError for an unknown backend, a table of another number of ranks, other shapes or dtypes, `hierarchical`
    over nodes that hold unlike numbers of ranks, `symmetric_memory` where ranks cannot read each other's memory, and
    `serial_exact`, which is not an exchange but a way to run the operator (`parallel/serial.py`).
    """
    return _StateScan.apply(state, decay, table, group, backend)


class _StateScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, decay, table, group, backend):
        entering = begin(state, decay, table, group, backend).wait()
        ctx.save_for_backward(decay, entering)
        ctx.options = table, group, backend
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx, d_entering):
        decay, entering = ctx.saved_tensors
        d_leaving = begin(d_entering, decay, *ctx.options, reverse=True).wait()
        return d_leaving, (d_leaving * entering).sum_to_size(decay.shape), None, None, None
