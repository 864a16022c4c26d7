"""The kernels in order, backward: gradients of everything that `forward.py` takes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...common.launcher import device_limits
from .chunk_backward import dx_kernel, outside_kernel, pairs_kernel, skip_kernel
from .config import Config, Launch
from .forward import (
    Steps,
    Swept,
    Way,
    compiler_options,
    discretize,
    entering_spans,
    final_states,
    skip_strides,
    sweep,
    sweep_spans,
)
from .gate import gate_backward_kernel
from .problem import (
    Problem,
    aligned,
    aligned_size,
    aligned_view,
    empty_aligned,
    new_states,
    pad_states,
    strides,
    unpad_states,
)
from .steps import discretize_backward_kernel, sum_chunks_kernel

HEADS_PER_PROGRAM = 8  # of `discretize_backward`
GATED_TILE = 4096  # elements of a program of `gate_backward`
MIN_WORKSPACE = 1 << 28  # bytes of states that the backward pass may always hold


@dataclass(frozen=True)
class Gradients:
    """dx and dz in the dtype of x, ddt in that of dt, the others in float32, dB and dC where they had to be summed."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor | None
    ddt_bias: Tensor
    dD: Tensor
    dz: Tensor | None
    d_initial: Tensor | None


def backward(
    problem: Problem, D: Tensor | None, initial: Tensor | None, entering: Tensor | None, dy: Tensor | None,
    d_final: Tensor | None, gate: tuple[Tensor, Tensor] | None = None, d_swept: Swept | None = None,
    wants_d_initial: bool = True,
) -> Gradients:  # fmt: skip
    """Gradients from those of y (None: not used) and of the final states (None: not used). entering: as `forward` kept
    it, None: not kept; gate: y before the gate, and z; d_swept: where the spans have been swept back already."""
    config, table = problem.config, problem.table
    x, B, C = problem.x, problem.B, problem.C
    size = config.chunk
    dz = skip = None
    if gate is not None and dy is not None:
        dy, dz, skip = _gate_gradients(problem, D, dy, *gate)
    dy = None if dy is None else aligned(dy.to(x.dtype))
    initial, d_final = pad_states(initial, config), pad_states(d_final, config)
    steps = d_swept.steps if d_swept is not None else discretize(problem, size)
    none = table.no_span

    d_initial = None
    if initial is not None and wants_d_initial:
        d_initial = torch.zeros_like(initial)
        if d_final is not None and table.through.shape[1]:
            d_initial[table.through[0]] = d_final[table.through[1]]

    state, state_index = initial, table.span_initial if initial is not None else none
    d_state, d_index = d_final, table.span_final if d_final is not None else none
    if table.cut:
        if entering is None:
            entering = entering_spans(problem, sweep_spans(problem, x, B, table.precedes, steps=steps), initial)
        state = entering
        if d_swept is None:
            d_swept = sweep_spans(problem, dy, C, table.follows, steps=steps, reverse=True)
        d_state = entering_spans(problem, d_swept, d_final)
        state_index = d_index = table.span_itself

    heads, heads_per_program = problem.once("waves", lambda: _waves(problem))
    made = _room(problem, dy is not None, heads, heads_per_program)
    for first_head in range(0, problem.nheads, heads):
        wave = Wave(first_head, heads, heads_per_program)
        # the state entering each chunk and the gradient of the one leaving it
        ahead = Way(x, B, state, state_index, made.unread, none, made.h, made.h_scales)
        d_leave = (made.unread, none) if d_initial is None else (d_initial, table.first_initial)
        back = Way(dy, C, d_state, d_index, *d_leave, made.dh, made.dh_scales)
        for ways in [(ahead, back)] if dy is not None else [(ahead, None), (None, back)]:
            sweep(problem, steps, size, *ways, first_head, heads)
        _from_states(problem, steps, dy, D, made, wave)
    if D is not None and D.ndim == 2 and skip is None:
        skip = _skip_gradient(problem, dy)
    return _gradients(problem, D, made, skip, dz, d_initial)


def _from_states(
    problem: Problem, steps: Steps, dy: Tensor | None, D: Tensor | None, made: "_Room", wave: "Wave"
) -> None:
    """The gradients of a wave of heads, whose states and their gradients are known for every chunk."""
    if dy is not None:
        _pairs(problem, steps, dy, made, wave)
    _outside(problem, steps, dy, made, wave)
    # afterwards: dx may lie where h was
    _dx(problem, steps, dy, D, made, wave)
    _discretize_backward(problem, steps, made, wave)


def _gradients(
    problem: Problem, D: Tensor | None, made: "_Room", skip: Tensor | None, dz: Tensor | None, d_initial: Tensor | None
) -> Gradients:
    """What the waves made, summed over programs and chunks. skip: the gradient of a D with channels."""
    dB = _sum_shares(made.dB)
    dC = None if made.dC is None else _sum_shares(made.dC)
    dA, ddt_bias, dD = _sum_chunks(problem, made.shares)
    if D is not None and skip is not None:
        dD = skip.contiguous() if D.ndim == 2 else skip.sum(1)
    return Gradients(
        made.dx, made.ddt, dA, dB, dC, ddt_bias, dD, dz, None if d_initial is None else unpad_states(problem, d_initial)
    )


class WholeBackward:
    """The backward pass of documents that are not cut, in three parts between which states come and go: the states as
    this pass has them, from the first token on; their gradients, from the last back; the other gradients."""

    def __init__(self, problem: Problem, D: Tensor | None, dy: Tensor):
        self.problem, self.D, self.dy = problem, D, aligned(dy.to(problem.x.dtype))
        self.steps = discretize(problem, problem.config.chunk)
        heads, per_program = _waves(problem)
        self.wave = Wave(0, heads, per_program)
        self.made = _room(problem, True, heads, per_program)

    def ahead(self, initial: Tensor, count: int) -> Tensor:
        """The states left by `count` documents, from those that enter."""
        problem, made, table = self.problem, self.made, self.problem.table
        entering = pad_states(initial, problem.config)
        left = final_states(problem, entering, count)
        way = Way(problem.x, problem.B, entering, table.span_initial, left, table.last_final, made.h, made.h_scales)
        sweep(problem, self.steps, problem.config.chunk, way, None, 0, problem.nheads)
        return unpad_states(problem, left)

    def back(self, d_final: Tensor, count: int) -> Tensor:
        """The gradients of `count` states that enter, from those of the states left."""
        problem, made, table = self.problem, self.made, self.problem.table
        d_left = pad_states(d_final, problem.config)
        assert d_left is not None
        d_initial = new_states(problem, count).zero_()
        if table.through.shape[1]:
            d_initial[table.through[0]] = d_left[table.through[1]]
        way = Way(self.dy, problem.C, d_left, table.span_final, d_initial, table.first_initial, made.dh, made.dh_scales)
        sweep(problem, self.steps, problem.config.chunk, None, way, 0, problem.nheads)
        return unpad_states(problem, d_initial)

    def gradients(self) -> Gradients:
        """All others."""
        _from_states(self.problem, self.steps, self.dy, self.D, self.made, self.wave)
        skip = _skip_gradient(self.problem, self.dy) if self.D is not None and self.D.ndim == 2 else None
        return _gradients(self.problem, self.D, self.made, skip, None, None)


def _gate_gradients(
    problem: Problem, D: Tensor | None, dy: Tensor, ungated: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of y before the gate and of z, both (batch, seqlen, nheads, headdim), and of a D with channels,
    (nheads, headdim), if there is a D."""
    d_ungated, dz = torch.empty_like(ungated), torch.empty_like(ungated)
    dy, z = dy if dy.stride(-1) == 1 else dy.contiguous(), z if z.stride(-1) == 1 else z.contiguous()
    x = problem.x
    batch, seqlen, nheads, headdim = x.shape
    channels = problem.config.state_shape[0]
    size = GATED_TILE // channels
    blocks = triton.cdiv(batch * seqlen, size)
    shares = x.new_empty(0 if D is None else blocks, 1, nheads, channels, dtype=torch.float32)
    problem.run(
        gate_backward_kernel, (dy.stride(), ungated.stride(), z.stride(), D is None),
        lambda: dict(
            grid=(blocks * nheads,), **strides("dy", dy), **strides("y", ungated), **strides("z", z), **strides("x", x),
            ntokens=batch * seqlen, seqlen=seqlen, nheads=nheads, headdim=headdim, T=size, P=channels,
            HAS_D=D is not None, num_warps=4,
        ),
        dy_ptr=dy, ungated_ptr=ungated, z_ptr=z, x_ptr=x, d_ungated_ptr=d_ungated, dz_ptr=dz, shares_ptr=shares,
    )  # fmt: skip
    return d_ungated, dz, None if D is None else _sum_chunks(problem, shares)[0][:, :headdim]


def _sum_shares(shares: Tensor) -> Tensor:
    """The sum over programs that shared a group's heads."""
    return shares[0] if len(shares) == 1 else shares.sum(0)


def _sum_chunks(problem: Problem, shares: Tensor) -> list[Tensor]:
    """The sums of (nchunks, up to 3, ...) over chunks, in memory of their own."""
    totals = [torch.empty(shares.shape[2:], dtype=torch.float32, device=shares.device) for _ in range(shares.shape[1])]
    columns = totals[0].numel()
    problem.run(
        sum_chunks_kernel, shares.shape,
        lambda: dict(
            grid=(triton.cdiv(columns, 16), len(totals)), nchunks=len(shares), columns=columns, ROWS=128, COLUMNS=16,
            num_warps=4,
        ),
        shares_ptr=shares, first_ptr=totals[0], second_ptr=totals[len(totals) // 2], third_ptr=totals[-1],
    )  # fmt: skip
    return totals


def _skip_gradient(problem: Problem, dy: Tensor | None) -> Tensor:
    """Sum of dy x over tokens, (nheads, headdim)."""
    config, x = problem.config, problem.x
    if dy is None:
        return x.new_zeros(x.shape[2:], dtype=torch.float32)
    chunks = problem.table.by_chunk[config.chunk]
    shares = x.new_empty(chunks.count, problem.nheads, config.state_shape[0], dtype=torch.float32)
    problem.run(
        skip_kernel, (dy.stride(),),
        lambda: dict(
            grid=(chunks.count, problem.nheads * config.P_tiles), nchunks=chunks.count, **strides("x", x),
            **strides("dy", dy), nheads=problem.nheads, headdim=x.shape[3], L=config.chunk, P=config.P,
            PT=config.P_tiles, num_warps=4,
        ),
        x_ptr=x, dy_ptr=dy, shares_ptr=shares, chunks_ptr=chunks.chunks,
    )  # fmt: skip
    return _sum_chunks(problem, shares[:, None])[0][:, : x.shape[3]]


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
    h_scales: Tensor  # (nchunks, wheads * PT), what h is to be multiplied by
    dh_scales: Tensor
    Q: Tensor
    S: Tensor
    sums: Tensor
    W: Tensor
    unread: Tensor


class Wave(NamedTuple):
    """Heads that run at once, `per_program` of them in one program."""

    first: int
    heads: int
    per_program: int


def _waves(problem: Problem) -> tuple[int, int]:
    """Heads of a wave and heads of a program.

    A wave's gradients of states take no more room than x, or MIN_WORKSPACE; its states lie where dx will, or take as
    much again.
    """
    heads_per_group = problem.nheads // problem.ngroups
    if problem.plan.whole:
        return problem.nheads, heads_per_group
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


def _room(problem: Problem, has_dy: bool, wheads: int, heads_per_program: int) -> _Room:
    config, x, B = problem.config, problem.x, problem.B
    nchunks = problem.table.by_chunk[config.chunk].count
    slots = nchunks * config.chunk
    heads_per_group = problem.nheads // problem.ngroups
    shares = min(wheads, heads_per_group) // heads_per_program
    whole = shares == 1 and wheads >= heads_per_group
    states = wheads * config.state_shape[0] * config.state_shape[1] * nchunks
    if wheads == problem.nheads and states <= 2 * aligned_size(x):
        # every h is read before any dx is written: they share their memory, which dx then keeps
        h = x.new_empty(max(states, aligned_size(x)))
        dx = aligned_view(h, x)
    else:
        h, dx = x.new_empty(states), empty_aligned(x)
    dtype = torch.float16 if problem.scaled else x.dtype
    new = lambda *shape: x.new_empty(*shape, dtype=torch.float32)  # noqa: E731
    fill = new if has_dy else lambda *shape: x.new_zeros(*shape, dtype=torch.float32)
    grads = lambda: empty_aligned(B.expand(shares, *B.shape), x.dtype if whole else torch.float32)  # noqa: E731
    return _Room(
        dx=dx,
        ddt=torch.empty(problem.dt.shape, dtype=problem.dt.dtype, device=x.device),
        dB=grads(),
        dC=grads() if has_dy else None,
        shares=new(nchunks, 3, problem.nheads),
        h=h.view(dtype),
        dh=x.new_empty(states, dtype=dtype),
        h_scales=new(nchunks, wheads * config.P_tiles),
        dh_scales=new(nchunks, wheads * config.P_tiles),
        Q=x.new_empty(wheads // heads_per_program if has_dy else 0, nchunks, config.chunk, config.chunk),
        # without dy no pairs are written
        S=fill(problem.ngroups, slots),
        sums=fill(6, wheads * config.P_tiles, slots),
        W=new(wheads * config.P_tiles, nchunks, config.P),
        unread=new(1),
    )


def _options(launch: Launch) -> dict[str, Any]:
    return {"STAGES": launch.stages, **compiler_options(launch)}


def _of_wave(problem: Problem, wave: Wave) -> dict[str, Any]:
    """What all kernels take that loop over the heads of a program."""
    config = problem.config
    return {
        "nchunks": problem.table.by_chunk[config.chunk].count, "first_head": wave.first, "wheads": wave.heads,
        "heads_per_program": wave.per_program, **problem.sizes, "L": config.chunk, "P": config.P, "N": config.N,
        "PT": config.P_tiles, "PRECISION": problem.plan.precision,
    }  # fmt: skip


def _grid(problem: Problem, wave: Wave, blocks: int) -> tuple[int]:
    """One axis, as the others end at 65535."""
    return (wave.heads // wave.per_program * blocks * problem.table.by_chunk[problem.config.chunk].count,)


def _flat(config: Config, *tensors: Tensor) -> bool:
    """Whether heads lie side by side, each of whole channel tiles."""
    channels, _ = config.state_shape
    return all(tensor.stride(2) == tensor.shape[3] == channels for tensor in tensors)


def _pairs(problem: Problem, steps: Steps, dy: Tensor, made: _Room, wave: Wave) -> None:
    """Q and the decays' share of the pairs inside chunks."""
    config, x, B, C = problem.config, problem.x, problem.B, problem.C
    assert C is not None
    chunks = problem.table.by_chunk[config.chunk]
    problem.run(
        pairs_kernel, (wave, dy.stride()),
        lambda: dict(
            grid=_grid(problem, wave, 2 * (config.chunk // config.block) - 1),
            **_of_wave(problem, wave), **strides("x", x), **strides("dy", dy), **strides("B", B, "group"),
            **strides("C", C, "group"), K=config.block, FLAT=_flat(config, x, dy), **_options(config.pairs),
        ),
        x_ptr=x, dy_ptr=dy, cum_ptr=steps.cum, log_dt_ptr=steps.log_dt, steepest_ptr=steps.steepest, B_ptr=B, C_ptr=C,
        Q_ptr=made.Q, S_ptr=made.S, sums_ptr=made.sums, chunks_ptr=chunks.chunks,
    )  # fmt: skip


def _outside(problem: Problem, steps: Steps, dy: Tensor | None, made: _Room, wave: Wave) -> None:
    """dB and dC: the pairs inside chunks and the states around them."""
    config, chunks = problem.config, problem.table.by_chunk[problem.config.chunk]
    x, B, dB = problem.x, problem.B, made.dB
    # where there is no dy, nor C, these stand for pointers that are not read
    some = x if dy is None else dy
    C = B if problem.C is None else problem.C
    dC = dB if made.dC is None else made.dC
    problem.run(
        outside_kernel, (wave, None if dy is None else dy.stride(), dB.stride()),
        lambda: dict(
            grid=_grid(problem, wave, 1 if dy is None else 2), **_of_wave(problem, wave), **strides("x", x),
            **strides("dy", some), **strides("B", B, "group"), **strides("C", C, "group"),
            out_part_stride=dB.stride(0), **strides("out", dB[0], "group"), HAS_DY=dy is not None,
            SCALED=problem.scaled, FLAT=_flat(config, x, some),
            # a wave that is part of a group adds to those before it
            ADD=wave.first % (problem.nheads // problem.ngroups) > 0, **_options(config.outside),
        ),
        x_ptr=x, dy_ptr=some, cum_ptr=steps.cum, weight_ptr=steps.weight, B_ptr=B, C_ptr=C, h_ptr=made.h,
        h_scales_ptr=made.h_scales, dh_ptr=made.dh, dh_scales_ptr=made.dh_scales, Q_ptr=made.Q, dB_ptr=dB, dC_ptr=dC,
        sums_ptr=made.sums, W_ptr=made.W, chunks_ptr=chunks.chunks,
    )  # fmt: skip


def _dx(problem: Problem, steps: Steps, dy: Tensor | None, D: Tensor | None, made: _Room, wave: Wave) -> None:
    config, B, dx = problem.config, problem.B, made.dx
    chunks = problem.table.by_chunk[config.chunk]
    # where there is no dy, nor C, these stand for pointers that are not read
    some = problem.x if dy is None else dy
    C = B if problem.C is None else problem.C
    problem.run(
        dx_kernel, (wave, None if dy is None else dy.stride(), None if D is None else D.stride(), dx.stride()),
        lambda: dict(
            grid=_grid(problem, wave, config.chunk // config.block),
            **_of_wave(problem, wave), **strides("dy", some), **strides("B", B, "group"), **strides("C", C, "group"),
            **strides("dx", dx), **skip_strides(D), K=config.block, HAS_DY=dy is not None,
            HAS_D=D is not None and dy is not None, SCALED=problem.scaled, FLAT=_flat(config, some, dx),
            **_options(config.dx),
        ),
        dy_ptr=some, cum_ptr=steps.cum, log_dt_ptr=steps.log_dt, weight_ptr=steps.weight, B_ptr=B, C_ptr=C,
        D_ptr=steps.cum if D is None else D, dh_ptr=made.dh, scales_ptr=made.dh_scales, dx_ptr=dx,
        chunks_ptr=chunks.chunks,
    )  # fmt: skip


def _discretize_backward(problem: Problem, steps: Steps, made: _Room, wave: Wave) -> None:
    """ddt and the shares of dA, ddt_bias and dD."""
    config, dt, bias, ddt = problem.config, problem.dt, problem.dt_bias, made.ddt
    chunks = problem.table.by_chunk[config.chunk]
    problem.run(
        discretize_backward_kernel, (wave,),
        lambda: dict(
            grid=(chunks.count, triton.cdiv(wave.heads, HEADS_PER_PROGRAM)), nchunks=chunks.count,
            **strides("", dt), d_row_stride=ddt.stride(0), d_token_stride=ddt.stride(1), first_head=wave.first,
            wheads=wave.heads, nheads=problem.nheads, ngroups=problem.ngroups, low=float(problem.dt_limit[0]),
            high=float(problem.dt_limit[1]), L=config.chunk, K=config.block, H=HEADS_PER_PROGRAM,
            P=config.P, PT=config.P_tiles, HAS_BIAS=bias is not None, SOFTPLUS=problem.dt_softplus,
            num_warps=4,
        ),
        dt_ptr=dt, dt_bias_ptr=problem.A if bias is None else bias, A_ptr=problem.A, cum_ptr=steps.cum,
        steepest_ptr=steps.steepest, sums_ptr=made.sums, W_ptr=made.W, S_ptr=made.S, ddt_ptr=ddt,
        shares_ptr=made.shares, chunks_ptr=chunks.chunks,
    )  # fmt: skip
