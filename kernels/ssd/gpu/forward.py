"""The kernels in order, forward: outputs and final states; the sweeps of the spans, in both directions."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...common.launcher import INTERPRETED
from .config import Launch
from .problem import Problem, aligned, empty_aligned, new_states, pad_states, strides, unpad_states
from .scan import scan_kernel
from .steps import discretize_kernel
from .sweep import pass_kernel, sweep_kernel

HEADS_PER_STEP_PROGRAM = 16


@dataclass(frozen=True)
class Steps:
    """Discretized steps for one chunk size; see `steps.py`."""

    cum: Tensor
    log_dt: Tensor
    weight: Tensor
    steepest: Tensor


def compiler_options(launch: Launch) -> dict[str, Any]:
    registers = None if INTERPRETED else launch.registers
    return {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": registers}


def discretize(problem: Problem, size: int) -> Steps:
    chunks, nheads = problem.table.by_chunk[size], problem.nheads
    slots = nheads * chunks.count * size
    made = problem.x.new_empty(3 * slots + nheads * chunks.count, dtype=torch.float32)
    cum, log_dt, weight, steepest = made.split((slots, slots, slots, nheads * chunks.count))
    dt, bias = problem.dt, problem.dt_bias
    problem.run(
        discretize_kernel, (size,),
        lambda: dict(
            grid=(chunks.count, triton.cdiv(nheads, HEADS_PER_STEP_PROGRAM)), nchunks=chunks.count,
            **strides("", dt), nheads=nheads, low=float(problem.dt_limit[0]), high=float(problem.dt_limit[1]),
            L=size, H=HEADS_PER_STEP_PROGRAM, HAS_BIAS=bias is not None, SOFTPLUS=problem.dt_softplus, num_warps=4,
        ),
        dt_ptr=dt, dt_bias_ptr=problem.A if bias is None else bias, A_ptr=problem.A, cum_ptr=cum, log_dt_ptr=log_dt,
        weight_ptr=weight, steepest_ptr=steepest, chunks_ptr=chunks.chunks,
    )  # fmt: skip
    return Steps(cum, log_dt, weight, steepest)


@dataclass(frozen=True)
class Way:
    """A sweep of the spans in one direction: rows (x or dy) and columns (B or C), if any, what enters and what leaves
    each span and where that lies, and room for the state of each chunk, if they are kept."""

    rows: Tensor | None
    cols: Tensor | None
    enter: Tensor | None
    enter_index: Tensor
    leave: Tensor
    leave_index: Tensor
    states: Tensor | None = None
    scales: Tensor | None = None


def sweep(
    problem: Problem, steps: Steps, size: int, ahead: Way | None = None, back: Way | None = None,
    first_head: int = 0, wheads: int | None = None,
) -> Tensor:  # fmt: skip
    """Runs `sweep_kernel` in one direction or in both; returns the total log2 decay of every span, (nspans, nheads),
    where no states are kept."""
    config, chunks, nspans = problem.config, problem.table.by_chunk[size], problem.table.nspans
    heads = problem.nheads if wheads is None else wheads
    # the kernel's arguments for a direction that is not asked for repeat the other's
    first = ahead or back
    second = back or ahead
    assert first is not None
    assert second is not None
    rows = first.rows, second.rows
    store = first.states is not None
    decay = problem.x.new_empty(0 if store else nspans, problem.nheads, dtype=torch.float32)

    def describe() -> dict[str, Any]:
        N_tiles = config.N // config.sweep_N
        programs = nspans * heads * config.P_tiles * N_tiles
        return dict(
            grid=(programs * (2 if ahead and back else 1),), programs=programs if ahead else 0, nspans=nspans,
            nchunks=chunks.count, **strides("x", rows[0]), **strides("B", first.cols, "group"),
            **strides("dy", rows[1]), **strides("C", second.cols, "group"), first_head=first_head, wheads=heads,
            **problem.sizes, L=size, P=config.P, N=config.sweep_N, PT=config.P_tiles, NT=N_tiles,
            HAS_ROWS=rows[0] is not None, STORE=store, SCALED=store and problem.scaled, PREFETCH=not INTERPRETED,
            PRECISION=problem.plan.precision, **compiler_options(config.sweep),
        )  # fmt: skip

    variant = [None if r is None else r.stride() for r in rows]
    problem.run(
        sweep_kernel, (size, ahead is None, back is None, *variant, store, first_head, heads), describe,
        **_pointers(first, problem.x, "x", "B", "", "h"), **_pointers(second, problem.x, "dy", "C", "d_", "dh"),
        cum_ptr=steps.cum, weight_ptr=steps.weight, decay_ptr=decay, spans_ptr=chunks.spans,
    )  # fmt: skip
    return decay


def _pointers(way: Way, some: Tensor, rows: str, cols: str, prefix: str, states: str) -> dict[str, Tensor]:
    """A way's arguments by name; others stand for pointers that are not read."""
    return {
        f"{rows}_ptr": some if way.rows is None else way.rows,
        f"{cols}_ptr": some if way.cols is None else way.cols,
        f"{prefix}enter_ptr": way.leave if way.enter is None else way.enter,
        f"{prefix}enter_index_ptr": way.enter_index,
        f"{prefix}leave_ptr": way.leave,
        f"{prefix}leave_index_ptr": way.leave_index,
        f"{states}_ptr": some if way.states is None else way.states,
        f"{states}_scales_ptr": way.leave if way.scales is None else way.scales,
    }


def _pass(
    problem: Problem, left: Tensor, decay: Tensor, initial: Tensor | None, initial_index: Tensor, *,
    final: tuple[Tensor, Tensor] | None = None, final_index: Tensor | None = None, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """Runs `pass_kernel`: fills `final`, states and total log decays, or returns the state entering every span."""
    table = problem.table
    entering = torch.empty_like(left) if final is None else left
    size = left.shape[-1] * left.shape[-2]
    block = min(size, 1024)
    problem.run(
        pass_kernel, (reverse, final is None),
        lambda: dict(
            grid=(table.ndocuments * problem.nheads, size // block), ndocuments=table.ndocuments,
            nheads=problem.nheads, SIZE=size, BLOCK=block, REVERSE=reverse, STORE=final is None, num_warps=4,
        ),
        left_ptr=left, decay_ptr=decay, initial_ptr=left if initial is None else initial,
        initial_index_ptr=initial_index, entering_ptr=entering, final_ptr=left if final is None else final[0],
        final_decay_ptr=decay if final is None else final[1],
        final_index_ptr=table.no_document if final_index is None else final_index, documents_ptr=table.documents,
    )  # fmt: skip
    return entering


@dataclass(frozen=True)
class Swept:
    """What every span leaves when nothing enters, and its total log2 decay, (nspans, nheads); in reverse, the gradient
    of the state that enters it when nothing follows."""

    steps: Steps
    left: Tensor
    decay: Tensor
    reverse: bool


def sweep_spans(
    problem: Problem, rows: Tensor | None, cols: Tensor | None, index: Tensor, *, steps: Steps | None = None,
    reverse: bool = False,
) -> Swept:  # fmt: skip
    """index: (nspans,) the spans wanted. steps: those of `config.chunk`, where they are made already."""
    size = problem.config.chunk
    steps = steps or discretize(problem, size)
    left = new_states(problem, problem.table.nspans)
    way = Way(rows, cols, None, problem.table.no_span, left, index)
    decay = sweep(problem, steps, size, *(None, way) if reverse else (way, None))
    return Swept(steps, left, decay, reverse)


def entering_spans(problem: Problem, swept: Swept, initial: Tensor | None) -> Tensor:
    """What enters every span of cut documents: states, or in reverse the gradients of those that leave."""
    table = problem.table
    documents = table.document_final if swept.reverse else table.document_initial
    index = documents if initial is not None else table.no_document
    return _pass(problem, swept.left, swept.decay, initial, index, reverse=swept.reverse)


def leaving_documents(problem: Problem, swept: Swept, count: int) -> tuple[Tensor, Tensor]:
    """What each of `count` documents leaves when nothing enters, and the logarithm of its total decay,
    (count, nheads); in reverse, the gradient of what enters it when nothing follows."""
    table = problem.table
    final = new_states(problem, count), problem.x.new_empty(count, problem.nheads, dtype=torch.float32)
    _pass(
        problem, swept.left, swept.decay, None, table.no_document, final=final, reverse=swept.reverse,
        final_index=table.document_initial if swept.reverse else table.document_final,
    )  # fmt: skip
    return unpad_states(problem, final[0]), final[1]


def forward(
    problem: Problem, D: Tensor | None, z: Tensor | None, initial: Tensor | None, count: int, keep: bool,
    swept: Swept | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, final states and, to `keep` for the backward pass, y before the gate and what enters the spans of cut
    documents. count: 0 where no final states are asked for; swept: where the spans have been swept already."""
    config, table = problem.config, problem.table
    x, B, C = problem.x, problem.B, problem.C
    assert C is not None
    initial = pad_states(initial, config)
    final = final_states(problem, initial, count)
    entering, index = initial, table.span_initial if initial is not None else table.no_span
    steps = discretize(problem, config.scan_chunk)
    if table.cut:
        if swept is None:
            same = steps if config.chunk == config.scan_chunk else None
            swept = sweep_spans(problem, x, B, table.precedes, steps=same)
        entering, index = entering_spans(problem, swept, initial), table.span_itself
    chunks = table.by_chunk[config.scan_chunk]
    y = empty_aligned(x)
    ungated = empty_aligned(x) if keep and z is not None else None
    z = None if z is None else aligned(z.to(x.dtype))
    problem.run(
        scan_kernel, (None if z is None else z.stride(), None if D is None else D.stride(), ungated is None),
        lambda: dict(
            grid=(table.nspans * problem.nheads * config.P_tiles,), nspans=table.nspans, nchunks=chunks.count,
            **strides("x", x), **strides("z", z), **strides("B", B, "group"), **strides("C", C, "group"),
            **strides("y", y), **skip_strides(D), **problem.sizes,
            L=config.scan_chunk, P=config.P, N=config.N, PT=config.P_tiles, HAS_D=D is not None, HAS_Z=z is not None,
            KEEP_UNGATED=ungated is not None, PREFETCH=not INTERPRETED,
            PRECISION=problem.plan.precision, **compiler_options(config.scan),
        ),
        x_ptr=x, z_ptr=x if z is None else z, cum_ptr=steps.cum, log_dt_ptr=steps.log_dt, weight_ptr=steps.weight,
        B_ptr=B, C_ptr=C, D_ptr=steps.cum if D is None else D,
        enter_ptr=final if entering is None else entering, enter_index_ptr=index,
        leave_ptr=final, leave_index_ptr=table.last_final if count else table.no_span, y_ptr=y,
        ungated_ptr=y if ungated is None else ungated,
        spans_ptr=chunks.spans,
    )  # fmt: skip
    return y, unpad_states(problem, final), ungated, entering if keep and table.cut else None


def skip_strides(D: Tensor | None) -> dict[str, int]:
    head, channel = (*(() if D is None else D.stride()), 0, 0)[:2]
    return {"D_head_stride": head, "D_channel_stride": channel}


def final_states(problem: Problem, initial: Tensor | None, count: int) -> Tensor:
    """Room for `count` final states; a document without tokens leaves the state that enters it."""
    final, table = new_states(problem, count), problem.table
    if count and len(table.empty):
        final.index_fill_(0, table.empty.long(), 0.0)
        if initial is not None:
            final[table.through[1]] = initial[table.through[0]]
    return final
