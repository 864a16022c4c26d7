"""The kernels in order: forward, the state that leaves, backward. Plain functions of tensors; `ops.py` makes them
operators that PyTorch knows.
"""

import contextvars
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .backward import dx_kernel, outside_kernel, pairs_kernel, skip_kernel
from .config import Config, Launch, choose
from .gate import gate_backward_kernel
from .scan import scan_kernel
from .steps import discretize_backward_kernel, discretize_kernel, sum_chunks_kernel
from .sweep import pass_kernel, sweep_kernel
from .table import Table, lay_out

# under the interpreter there is no device to ask: what it runs as
INTERPRETED = not isinstance(scan_kernel, triton.runtime.JITFunction)
INTERPRETED_AS = (90, 1)
HEADS_PER_STEP_PROGRAM = 16
MIN_WORKSPACE = 1 << 28  # bytes of states that the backward pass may always hold


@dataclass(frozen=True)
class Problem:
    """What every launch needs to know: the tensors that all passes read, in a layout that the kernels take.

    x: (batch, seqlen, nheads, headdim), dt: (batch, seqlen, nheads), raw; A, dt_bias: (nheads,);
    B, C: (batch, seqlen, ngroups, d_state) in the dtype of x; C is None where only states are wanted.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    config: Config
    table: Table
    precision: str

    @property
    def nheads(self) -> int:
        return self.x.shape[2]

    @property
    def ngroups(self) -> int:
        return self.B.shape[2]

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "nheads": self.nheads, "ngroups": self.ngroups, "headdim": self.x.shape[3], "d_state": self.B.shape[3]
        }  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Discretized steps for one chunk size; see `steps.py`."""

    cum: Tensor
    log_dt: Tensor
    weight: Tensor
    steepest: Tensor


def device_limits(device: torch.device) -> tuple[int, int]:
    """Compute capability, as 90 for 9.0, and number of multiprocessors."""
    if INTERPRETED:
        return INTERPRETED_AS
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def make_problem(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    dt_limit: tuple[float, float], offsets: Tensor, enters: Tensor | None, leaves: Tensor | None,
) -> Problem:  # fmt: skip
    capability, processors = device_limits(x.device)
    config = choose(x.shape[3], B.shape[3], x.dtype, capability)
    x, B = aligned(x), aligned(B.to(x.dtype))
    C = None if C is None else aligned(C.to(x.dtype))
    chunk_sizes = tuple(sorted({config.scan_chunk, config.chunk}))
    table = lay_out(
        offsets, enters, leaves, x.shape[1], x.shape[2] * config.P_tiles, chunk_sizes, x.device, 2 * processors
    )  # fmt: skip
    # float32 products as `torch.set_float32_matmul_precision` asks of every other one
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return Problem(x, dt, A, B, C, dt_bias, dt_softplus, dt_limit, config, table, precision)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it, that tensor descriptors can address: 16-byte aligned, innermost axis contiguous."""
    unit = 16 // tensor.element_size()
    if (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(
            stride > 0 and stride % unit == 0
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            if size > 1
        )
    ):
        return tensor
    return empty_aligned(tensor).copy_(tensor)


def empty_aligned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh memory of the shape of `like` whose innermost axis is padded to 16 bytes."""
    dtype = dtype or like.dtype
    return aligned_view(like.new_empty(aligned_size(like, dtype), dtype=dtype), like)


def aligned_size(like: Tensor, dtype: torch.dtype | None = None) -> int:
    unit = 16 // (dtype or like.dtype).itemsize
    return math.prod(like.shape[:-1]) * (-(-like.shape[-1] // unit) * unit)


def aligned_view(memory: Tensor, like: Tensor) -> Tensor:
    """The beginning of `memory` in the shape of `like`, its innermost axis padded to 16 bytes."""
    padded = aligned_size(like, memory.dtype)
    rows = math.prod(like.shape[:-1])
    return memory[:padded].view(*like.shape[:-1], padded // rows if rows else like.shape[-1])[..., : like.shape[-1]]


def _strides(name: str, tensor: Tensor | None, axis: str = "head") -> dict[str, int]:
    prefix = f"{name}_" if name else ""
    strides = (0, 0, 0) if tensor is None else tensor.stride()
    return {
        f"{prefix}row_stride": strides[0],
        f"{prefix}token_stride": strides[1],
        f"{prefix}{axis}_stride": strides[2],
    }


def _options(launch: Launch) -> dict[str, int]:
    return {"STAGES": launch.stages, **_compiler_options(launch)}


def _compiler_options(launch: Launch) -> dict[str, int]:
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return options | ({"maxnreg": launch.registers} if launch.registers and not INTERPRETED else {})


# kernels by what they were compiled for: the compiler's own look-up takes the host longer than a launch
_compiled: dict[tuple, Any] = {}


def _launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    if 0 in grid:
        return
    if INTERPRETED:
        kernel[grid](**arguments)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    key = (kernel, device.index, *map(_specialization, arguments, arguments.values()))
    compiled = _compiled.get(key)

    def run() -> Any:
        # descriptors made on the device live in memory of this launch
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        if compiled is None:
            return kernel[grid](**arguments)
        return compiled[(*grid, 1, 1)[:3]](*(arguments[name] for name in kernel.arg_names))

    if device.index == torch.cuda.current_device():
        made = contextvars.copy_context().run(run)
    else:
        with torch.cuda.device(device):
            made = contextvars.copy_context().run(run)
    if compiled is None:
        _compiled[key] = made


def _specialization(name: str, value: Any) -> Any:
    """All that the compiler may know of an argument; of a number at run time, a little more than it does."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int and value > 16 and not name.isupper() and name != "maxnreg":
        return value % 16 == 0, value < 1 << 31
    return value


def discretize(problem: Problem, size: int) -> Steps:
    chunks = problem.table.by_chunk[size]
    made = problem.x.new_empty(3, problem.nheads, chunks.count * size, dtype=torch.float32)
    steepest = problem.x.new_empty(problem.nheads, chunks.count, dtype=torch.float32)
    dt = problem.dt
    _launch(
        discretize_kernel, (chunks.count, triton.cdiv(problem.nheads, HEADS_PER_STEP_PROGRAM)),
        dt_ptr=dt, dt_bias_ptr=problem.dt_bias if problem.dt_bias is not None else problem.A, A_ptr=problem.A,
        cum_ptr=made[0], log_dt_ptr=made[1], weight_ptr=made[2], steepest_ptr=steepest, chunks_ptr=chunks.chunks, nchunks=chunks.count,
        row_stride=dt.stride(0), token_stride=dt.stride(1), head_stride=dt.stride(2), nheads=problem.nheads,
        low=float(problem.dt_limit[0]), high=float(problem.dt_limit[1]),
        L=size, H=HEADS_PER_STEP_PROGRAM, HAS_BIAS=problem.dt_bias is not None, SOFTPLUS=problem.dt_softplus,
        num_warps=4,
    )  # fmt: skip
    return Steps(*made, steepest)


def _new_states(problem: Problem, count: int, fill: bool = False) -> Tensor:
    make = torch.zeros if fill else torch.empty
    return make(count, problem.nheads, *problem.config.state_shape, dtype=torch.float32, device=problem.x.device)


def pad_states(states: Tensor | None, config: Config) -> Tensor | None:
    """States as callers hold them -> float32, whole tiles."""
    if states is None:
        return None
    height, width = config.state_shape
    states = states.float()
    if states.shape[-2:] != (height, width):
        states = F.pad(states, (0, width - states.shape[-1], 0, height - states.shape[-2]))
    return states.contiguous()


def unpad_states(problem: Problem, states: Tensor) -> Tensor:
    return states[..., : problem.x.shape[3], : problem.B.shape[3]].contiguous()


def _sweep(
    problem: Problem, steps: Steps, size: int, *, rows: Tensor | None, cols: Tensor | None, reverse: bool,
    enter: Tensor | None, enter_index: Tensor, leave: Tensor, leave_index: Tensor, states: Tensor | None = None,
    first_head: int = 0, wheads: int | None = None,
) -> Tensor:  # fmt: skip
    """Runs `sweep_kernel`; returns the total log2 decay of every span, (nspans, nheads)."""
    config, chunks = problem.config, problem.table.by_chunk[size]
    nspans, nheads = problem.table.nspans, problem.nheads
    wheads = nheads if wheads is None else wheads
    N_tiles = config.N // config.sweep_N
    decay = problem.x.new_empty(nspans, nheads, dtype=torch.float32)
    some = problem.x  # stands for a pointer that is not read
    _launch(
        sweep_kernel, (nspans * wheads * config.P_tiles * N_tiles,),
        rows_ptr=some if rows is None else rows, cols_ptr=some if cols is None else cols,
        cum_ptr=steps.cum, weight_ptr=steps.weight, enter_ptr=leave if enter is None else enter,
        enter_index_ptr=enter_index, leave_ptr=leave, leave_index_ptr=leave_index, decay_ptr=decay,
        states_ptr=some if states is None else states, spans_ptr=chunks.spans, nspans=nspans, nchunks=chunks.count,
        **_strides("", rows), **_strides("col", cols), first_head=first_head, wheads=wheads, **problem.sizes,
        L=size, P=config.P, N=config.sweep_N, PT=config.P_tiles, NT=N_tiles, REVERSE=reverse, HAS_ROWS=rows is not None,
        STORE=states is not None, ONLY_LEAVING=states is None, PREFETCH=not INTERPRETED, PRECISION=problem.precision,
        **_compiler_options(config.sweep),
    )  # fmt: skip
    return decay


def _pass(
    problem: Problem, left: Tensor, decay: Tensor, initial: Tensor | None, initial_index: Tensor, *,
    final: tuple[Tensor, Tensor] | None = None, final_index: Tensor | None = None, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """Runs `pass_kernel`: fills `final`, states and total log decays, or returns the state entering every span."""
    table = problem.table
    entering = torch.empty_like(left) if final is None else left
    size = left.shape[-1] * left.shape[-2]
    block = min(size, 1024)
    _launch(
        pass_kernel, (table.ndocuments * problem.nheads, size // block),
        left_ptr=left, decay_ptr=decay, initial_ptr=left if initial is None else initial,
        initial_index_ptr=initial_index, entering_ptr=entering, final_ptr=left if final is None else final[0],
        final_decay_ptr=decay if final is None else final[1],
        final_index_ptr=table.no_document if final_index is None else final_index,
        documents_ptr=table.documents, ndocuments=table.ndocuments, nheads=problem.nheads,
        SIZE=size, BLOCK=block, REVERSE=reverse, STORE=final is None, num_warps=4,
    )  # fmt: skip
    return entering


def _final_states(problem: Problem, initial: Tensor | None, count: int) -> Tensor:
    """Room for `count` final states; a document without tokens leaves the state that enters it."""
    final = _new_states(problem, count)
    if problem.table.empty is not None:
        before, after = problem.table.empty
        if initial is None:
            final[after] = 0.0
        else:
            final[after] = torch.where((before >= 0)[:, None, None, None], initial[before.clamp(min=0)], 0.0)
    return final


def leaving(problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    """What each of `count` documents leaves when nothing enters, and the logarithm of its total decay,
    (count, nheads)."""
    table, size = problem.table, problem.config.chunk
    none = table.no_span
    left = _new_states(problem, table.nspans)
    decay = _sweep(
        problem, discretize(problem, size), size, rows=problem.x, cols=problem.B, reverse=False,
        enter=None, enter_index=none, leave=left, leave_index=table.wanted,
    )  # fmt: skip
    final = _new_states(problem, count), problem.x.new_empty(count, problem.nheads, dtype=torch.float32)
    index = table.no_document
    _pass(problem, left, decay, None, index, final=final, final_index=table.document_final)
    return unpad_states(problem, final[0]), final[1]


def entering_gradient(problem: Problem, count: int) -> Tensor:
    """The gradient of each of `count` rows of initial states when nothing follows; dy stands in the place of x."""
    table, size = problem.table, problem.config.chunk
    steps = discretize(problem, size)
    d_initial = _new_states(problem, count, fill=True)
    none = table.no_span
    gradient = None if not table.cut else _entering(problem, steps, None, True, problem.x, problem.C)
    _sweep(
        problem, steps, size, rows=problem.x, cols=problem.C, reverse=True, enter=gradient,
        enter_index=table.span_itself if table.cut else none, leave=d_initial, leave_index=table.first_initial,
    )  # fmt: skip
    return unpad_states(problem, d_initial)


def forward(
    problem: Problem, D: Tensor | None, z: Tensor | None, initial: Tensor | None, count: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, final states and, to `keep` for the backward pass, y before the gate and what enters the spans of cut
    documents."""
    config, table = problem.config, problem.table
    x, B, C = problem.x, problem.B, problem.C
    assert C is not None
    initial = pad_states(initial, config)
    final = _final_states(problem, initial, count)
    entering, index = initial, table.span_initial if initial is not None else table.no_span
    if table.cut:
        entering = _entering(problem, discretize(problem, config.chunk), initial, False, x, B)
        index = table.span_itself
    steps = discretize(problem, config.scan_chunk)
    chunks = table.by_chunk[config.scan_chunk]
    y = empty_aligned(x)
    ungated = torch.empty_like(y) if keep and z is not None else None
    z = None if z is None else aligned(z.to(x.dtype))
    _launch(
        scan_kernel, (table.nspans * problem.nheads * config.P_tiles,),
        x_ptr=x, z_ptr=x if z is None else z, cum_ptr=steps.cum, log_dt_ptr=steps.log_dt, weight_ptr=steps.weight,
        B_ptr=B, C_ptr=C, D_ptr=steps.cum if D is None else skip_weights(problem, D),
        enter_ptr=final if entering is None else entering, enter_index_ptr=index,
        leave_ptr=final, leave_index_ptr=table.last_final, y_ptr=y, ungated_ptr=y if ungated is None else ungated,
        spans_ptr=chunks.spans, nspans=table.nspans, nchunks=chunks.count,
        **_strides("x", x), **_strides("z", z), **_strides("B", B, "group"), **_strides("C", C, "group"),
        **_strides("y", y), **problem.sizes, L=config.scan_chunk, P=config.P, N=config.N, PT=config.P_tiles,
        HAS_D=D is not None, HAS_Z=z is not None, KEEP_UNGATED=ungated is not None, PREFETCH=not INTERPRETED,
        PRECISION=problem.precision, **_compiler_options(config.scan),
    )  # fmt: skip
    return y, unpad_states(problem, final), ungated, entering if keep and table.cut else None


def skip_weights(problem: Problem, D: Tensor) -> Tensor:
    """D as (nheads, headdim padded to whole tiles), float32."""
    D = D.float()
    if D.ndim == 1:
        D = D[:, None].expand(-1, problem.x.shape[3])
    return F.pad(D, (0, problem.config.state_shape[0] - problem.x.shape[3])).contiguous()


@dataclass(frozen=True)
class Gradients:
    """dx and ddt in the dtypes of x and dt, the others in float32, dB and dC where they had to be summed."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor | None
    ddt_bias: Tensor
    dD: Tensor
    d_initial: Tensor | None


def backward(
    problem: Problem, D: Tensor | None, initial: Tensor | None, entering: Tensor | None, dy: Tensor | None,
    d_final: Tensor | None, d_decay: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients from those of y (None: only states were wanted), of the final states (None: not used) and of the
    documents' total log decays, (rows of final states, nheads). entering: as `forward` kept it, None: not kept."""
    config, table = problem.config, problem.table
    x, B, C = problem.x, problem.B, problem.C
    size = config.chunk
    dy = None if dy is None else aligned(dy.to(x.dtype))
    initial, d_final = pad_states(initial, config), pad_states(d_final, config)
    steps = discretize(problem, size)
    none = table.no_span

    d_initial = None
    if initial is not None:
        d_initial = torch.zeros_like(initial)
        if table.empty is not None and d_final is not None:
            before, after = table.empty
            d_initial[before[before >= 0]] = d_final[after[before >= 0]]

    state, state_index = initial, table.span_initial if initial is not None else none
    d_state, d_index = d_final, table.span_final if d_final is not None else none
    if table.cut:
        state = _entering(problem, steps, initial, False, x, B) if entering is None else entering
        d_state = _entering(problem, steps, d_final, True, dy, C)
        state_index = d_index = table.span_itself

    wheads, heads_per_program = _waves(problem)
    made = _room(problem, D, dy is not None, wheads, heads_per_program)
    for first_head in range(0, problem.nheads, wheads):
        # the state entering each chunk and the gradient of the one leaving it
        _sweep(
            problem, steps, size, rows=x, cols=B, reverse=False, enter=state, enter_index=state_index,
            leave=made.unread, leave_index=none, states=made.h, first_head=first_head, wheads=wheads,
        )  # fmt: skip
        _sweep(
            problem, steps, size, rows=dy, cols=C, reverse=True, enter=d_state, enter_index=d_index,
            leave=made.unread if d_initial is None else d_initial,
            leave_index=none if d_initial is None else table.first_initial,
            states=made.dh, first_head=first_head, wheads=wheads,
        )  # fmt: skip
        _chunk_gradients(problem, steps, dy, d_decay, made, first_head, wheads, heads_per_program)
    dB = _sum_shares(made.dB)
    dC = None if made.dC is None else _sum_shares(made.dC)
    dA, ddt_bias, dD = (total.clone() for total in _sum_chunks(made.shares))
    if D is not None and D.ndim == 2:
        dD = _skip_gradient(problem, dy)
    return Gradients(
        made.dx, made.ddt, dA, dB, dC, ddt_bias, dD, None if d_initial is None else unpad_states(problem, d_initial)
    )


def gate_gradients(dy: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y before the gate and of z, all (batch, seqlen, nheads, headdim)."""
    d_ungated, dz = torch.empty_like(ungated), torch.empty_like(ungated)
    dy, z = dy if dy.stride(-1) == 1 else dy.contiguous(), z if z.stride(-1) == 1 else z.contiguous()
    batch, seqlen, nheads, headdim = z.shape
    _launch(
        gate_backward_kernel, (batch * seqlen, triton.cdiv(nheads * headdim, 1024)),
        dy_ptr=dy, ungated_ptr=ungated, z_ptr=z, d_ungated_ptr=d_ungated, dz_ptr=dz, **_strides("dy", dy),
        **_strides("y", ungated), **_strides("z", z), seqlen=seqlen, nheads=nheads, headdim=headdim, ELEMENTS=1024,
        num_warps=4,
    )  # fmt: skip
    return d_ungated, dz.to(z.dtype)


def _sum_shares(shares: Tensor) -> Tensor:
    """The sum over programs that shared a group's heads."""
    return shares[0] if len(shares) == 1 else shares.sum(0)


def _sum_chunks(shares: Tensor) -> Tensor:
    """The sum of (nchunks, ...) over chunks."""
    total = torch.empty(shares.shape[1:], dtype=torch.float32, device=shares.device)
    _launch(
        sum_chunks_kernel, (triton.cdiv(total.numel(), 16),), shares_ptr=shares, total_ptr=total,
        nchunks=shares.shape[0], columns=total.numel(), ROWS=128, COLUMNS=16, num_warps=4,
    )  # fmt: skip
    return total


def _skip_gradient(problem: Problem, dy: Tensor | None) -> Tensor:
    """Sum of dy x over tokens, (nheads, headdim)."""
    config, x = problem.config, problem.x
    if dy is None:
        return x.new_zeros(x.shape[2:], dtype=torch.float32)
    chunks = problem.table.by_chunk[config.chunk]
    shares = x.new_empty(chunks.count, problem.nheads, config.state_shape[0], dtype=torch.float32)
    _launch(
        skip_kernel, (chunks.count, problem.nheads * config.P_tiles), x_ptr=x, dy_ptr=dy, shares_ptr=shares,
        chunks_ptr=chunks.chunks, nchunks=chunks.count, **_strides("x", x), **_strides("dy", dy),
        nheads=problem.nheads, headdim=x.shape[3], L=config.chunk, P=config.P, PT=config.P_tiles, num_warps=4,
    )  # fmt: skip
    return _sum_chunks(shares)[:, : x.shape[3]].contiguous()


def _entering(
    problem: Problem, steps: Steps, initial: Tensor | None, reverse: bool, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """What enters every span of cut documents: states, or in reverse the gradients of those that leave."""
    table = problem.table
    left = _new_states(problem, table.nspans)
    decay = _sweep(
        problem, steps, problem.config.chunk, rows=rows, cols=cols, reverse=reverse, enter=None,
        enter_index=table.no_span, leave=left, leave_index=table.follows if reverse else table.precedes,
    )  # fmt: skip
    documents = table.document_final if reverse else table.document_initial
    index = documents if initial is not None else table.no_document
    return _pass(problem, left, decay, initial, index, reverse=reverse)


@dataclass(frozen=True)
class _Room:
    """Memory of the backward pass: results, and what one wave of heads needs."""

    dx: Tensor
    ddt: Tensor
    dB: Tensor  # (shares, batch, seqlen, ngroups, d_state)
    dC: Tensor | None
    shares: Tensor  # (nchunks, 3, nheads): each chunk's part of the gradients of A, dt_bias and D
    h: Tensor
    dh: Tensor
    Q: Tensor
    S: Tensor
    sums: Tensor
    W: Tensor
    D: Tensor | None
    unread: Tensor


def _waves(problem: Problem) -> tuple[int, int]:
    """Heads of a wave and heads of a program.

    A wave's gradients of states take no more room than x, or MIN_WORKSPACE; its states lie where dx will, or take as
    much again.
    """
    heads_per_group = problem.nheads // problem.ngroups
    nchunks = problem.table.by_chunk[problem.config.chunk].count
    height, width = problem.config.state_shape
    room = max(problem.x.numel(), MIN_WORKSPACE // problem.x.element_size())
    fits = max(1, room // max(1, nchunks * height * width))
    sizes = _divisors(heads_per_group) + [heads_per_group * n for n in _divisors(problem.ngroups)]
    wheads = max(n for n in sizes if n <= fits)
    # enough programs for about two a processor
    _, processors = device_limits(problem.x.device)
    enough = [n for n in _divisors(min(wheads, heads_per_group)) if nchunks * (wheads // n) >= 1.8 * processors]
    return wheads, max(enough, default=1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _room(problem: Problem, D: Tensor | None, has_dy: bool, wheads: int, heads_per_program: int) -> _Room:
    config, x, B = problem.config, problem.x, problem.B
    nchunks = problem.table.by_chunk[config.chunk].count
    slots = nchunks * config.chunk
    heads_per_group = problem.nheads // problem.ngroups
    shares = min(wheads, heads_per_group) // heads_per_program
    whole = shares == 1 and wheads >= heads_per_group
    states = wheads * config.state_shape[0] * config.state_shape[1] * nchunks
    if wheads == problem.nheads:
        # every h is read before any dx is written: they share their memory
        h = x.new_empty(max(states, aligned_size(x)))
        dx = aligned_view(h, x)
    else:
        h, dx = x.new_empty(states), empty_aligned(x)
    new = lambda *shape: x.new_empty(*shape, dtype=torch.float32)  # noqa: E731
    grads = lambda: empty_aligned(B.expand(shares, *B.shape), x.dtype if whole else torch.float32)  # noqa: E731
    return _Room(
        dx=dx,
        ddt=torch.empty(problem.dt.shape, dtype=problem.dt.dtype, device=x.device),
        dB=grads(),
        dC=grads() if has_dy else None,
        shares=new(nchunks, 3, problem.nheads),
        h=h,
        dh=x.new_empty(states),
        Q=x.new_zeros(wheads // heads_per_program if has_dy else 0, nchunks, config.chunk, config.chunk),
        S=new(problem.ngroups, slots) if has_dy else torch.zeros(problem.ngroups, slots, device=x.device),
        # without dy no pairs are written
        sums=(torch.empty if has_dy else torch.zeros)(6, wheads * config.P_tiles, slots, device=x.device),
        W=new(wheads * config.P_tiles, nchunks),
        D=skip_weights(problem, D) if D is not None else None,
        unread=new(1),
    )


def _chunk_gradients(
    problem: Problem, steps: Steps, dy: Tensor | None, d_decay: Tensor | None, made: _Room,
    first_head: int, wheads: int, heads_per_program: int,
) -> None:  # fmt: skip
    """One wave of heads, their states known: the pairs inside chunks, then dB and dC, then dx, then ddt."""
    config, x, B, C, nheads = problem.config, problem.x, problem.B, problem.C, problem.nheads
    size = config.chunk
    chunks = problem.table.by_chunk[size]
    grid = (wheads // heads_per_program, chunks.count)
    heads = {"first_head": first_head, "wheads": wheads}
    shared = {
        **heads, "heads_per_program": heads_per_program, "cum_ptr": steps.cum, "weight_ptr": steps.weight,
        "chunks_ptr": chunks.chunks, "nchunks": chunks.count, "sums_ptr": made.sums, "Q_ptr": made.Q, **problem.sizes,
        "L": size, "P": config.P, "N": config.N, "PT": config.P_tiles, "PRECISION": problem.precision,
    }  # fmt: skip
    flat = all(_flat(tensor, config.P) for tensor in (x, made.dx, dy) if tensor is not None)
    inputs = {
        "log_dt_ptr": steps.log_dt, "B_ptr": B, "C_ptr": B if C is None else C,
        **_strides("dy", x if dy is None else dy), **_strides("B", B, "group"),
        **_strides("C", B if C is None else C, "group"), "K": config.block, "FLAT": flat,
    }  # fmt: skip
    halves = size // config.block
    if dy is not None:
        pairs = {name: value for name, value in shared.items() if name != "weight_ptr"}
        _launch(
            pairs_kernel, (grid[0], grid[1] * (2 * halves - 1)), **pairs, **inputs, x_ptr=x, dy_ptr=dy, S_ptr=made.S,
            steepest_ptr=steps.steepest, **_strides("x", x), **_options(config.pairs),
        )  # fmt: skip
    # a wave that is part of a group adds to those before it
    add = first_head % (nheads // problem.ngroups) > 0
    outside = {**shared, "ADD": add, "FLAT": flat, "HAS_Q": dy is not None, **_options(config.outside)}
    sides: list[tuple[bool, Any, Any, Any, Any, Tensor, Tensor]] = [(True, x, B, C, made.dB, made.dh, made.h)]
    if dy is not None:
        sides.append((False, dy, C, B, made.dC, made.h, made.dh))
    for source, rows, cols, others, out, states, opposite in sides:
        _launch(
            outside_kernel, grid, **outside, rows_ptr=rows, cols_ptr=cols,
            others_ptr=cols if others is None else others,
            states_ptr=states, opposite_ptr=opposite, out_ptr=out, W_ptr=made.W, **_strides("", rows),
            **_strides("col", cols, "group"), **_strides("other", others, "group"), out_part_stride=out.stride(0),
            **_strides("out", out[0], "group"), SOURCE=source,
        )  # fmt: skip
    # last: dx may lie where h was
    unread = ("sums_ptr", "Q_ptr")
    _launch(
        dx_kernel, (grid[0], grid[1] * halves), **{name: value for name, value in shared.items() if name not in unread},
        **inputs, dy_ptr=x if dy is None else dy, D_ptr=steps.cum if made.D is None else made.D, dh_ptr=made.dh,
        dx_ptr=made.dx, **_strides("dx", made.dx), HAS_DY=dy is not None, HAS_D=made.D is not None and dy is not None,
        **_options(config.dx),
    )  # fmt: skip
    dt = problem.dt
    _launch(
        discretize_backward_kernel, (chunks.count, triton.cdiv(wheads, HEADS_PER_STEP_PROGRAM)),
        dt_ptr=dt, dt_bias_ptr=problem.A if problem.dt_bias is None else problem.dt_bias, A_ptr=problem.A,
        cum_ptr=steps.cum, steepest_ptr=steps.steepest, sums_ptr=made.sums, W_ptr=made.W, S_ptr=made.S, ddt_ptr=made.ddt,
        shares_ptr=made.shares, d_decay_ptr=made.W if d_decay is None else d_decay, chunks_ptr=chunks.chunks,
        nchunks=chunks.count, **_strides("", dt), d_row_stride=made.ddt.stride(0), d_token_stride=made.ddt.stride(1),
        **heads, nheads=nheads, ngroups=problem.ngroups, low=float(problem.dt_limit[0]),
        high=float(problem.dt_limit[1]), L=size, K=config.block, H=HEADS_PER_STEP_PROGRAM, PT=config.P_tiles,
        HAS_BIAS=problem.dt_bias is not None, SOFTPLUS=problem.dt_softplus, HAS_D_DECAY=d_decay is not None,
        num_warps=8,
    )  # fmt: skip


def _flat(tensor: Tensor, P: int) -> bool:
    """Whether heads lie side by side and channel tiles divide them."""
    return tensor.stride(2) == tensor.shape[3] and tensor.shape[3] % P == 0
