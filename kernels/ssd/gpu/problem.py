"""What a call is about: its tensors in a layout that the kernels take, and what calls of its kind have in common."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.launcher import Launcher, device_limits
from ...common.transfer import Kept, Made
from .config import Config, choose
from .table import Table, content, lay_out


@dataclass(frozen=True)
class Plan:
    """Shared by calls whose tensors, documents and options are of one kind: where work is cut, and what was made."""

    config: Config
    table: Table
    memory: Tensor  # the table's
    precision: str
    whole: bool  # documents are not cut, and sums over heads do not depend on how many tokens there are
    made: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """The tensors that all passes read.

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
    plan: Plan

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def table(self) -> Table:
        return self.plan.table

    @property
    def scaled(self) -> bool:
        """Whether the backward pass keeps states in float16, each times a power of two; otherwise in the dtype of x."""
        return self.x.dtype != torch.float32

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

    def run(self, kernel: Any, variant: tuple, describe: Callable[[], dict[str, Any]], **tensors: Tensor) -> None:
        """Launches a kernel on `tensors`. describe: its grid and everything else it takes, called once for all calls of
        this kind and of one `variant`, which names what may differ between them."""
        key = (id(kernel), variant)
        self.once(key, lambda: Launcher(kernel, device=self.x.device, **describe()))(**tensors)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for all calls of this kind."""
        if key not in self.plan.made:
            self.plan.made[key] = make()
        return self.plan.made[key]


_plans = Kept(capacity=256)


def make_problem(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    dt_limit: tuple[float, float], offsets: Tensor | None, enters: Tensor | None, leaves: Tensor | None,
    whole: bool = False,
) -> Problem:  # fmt: skip
    """offsets, enters, leaves: as in `table.lay_out`, offsets None: every row is a document. whole: as in `Plan`."""
    x, B = aligned(x), aligned(B.to(x.dtype))
    C = None if C is None else aligned(C.to(x.dtype))
    # float32 products as `torch.set_float32_matmul_precision` asks of every other one
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    key = (
        x.shape, x.stride(), x.dtype, x.device, dt.stride(), B.shape, B.stride(), None if C is None else C.stride(),
        dt_bias is None, dt_softplus, dt_limit, content(offsets), content(enters), content(leaves), precision,
        whole,
    )  # fmt: skip
    plan = _plans.get(key, lambda: _make_plan(x, B, offsets, enters, leaves, precision, whole))
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    return Problem(x, dt, A.contiguous(), B, C, dt_bias, dt_softplus, dt_limit, plan)


def _make_plan(x, B, offsets, enters, leaves, precision, whole) -> Plan:
    capability, processors = device_limits(x.device)
    config = choose(x.shape[3], B.shape[3], x.dtype, capability)
    chunk_sizes = tuple(sorted({config.scan_chunk, config.chunk}))
    if offsets is None:
        offsets = torch.arange(x.shape[0] + 1, device="cpu") * x.shape[1]
    table = lay_out(
        offsets, enters, leaves, x.shape[1], x.shape[2] * config.P_tiles, chunk_sizes, x.device,
        0 if whole else 2 * processors,
    )  # fmt: skip
    return Plan(config, table, table.memory, precision, whole)


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


def new_states(problem: Problem, count: int) -> Tensor:
    return problem.x.new_empty(count, problem.nheads, *problem.config.state_shape, dtype=torch.float32)


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


def strides(name: str, tensor: Tensor | None, axis: str = "head") -> dict[str, int]:
    """Arguments of a kernel that say where rows, tokens and heads (or groups) of a tensor are."""
    prefix = f"{name}_" if name else ""
    row, token, inner = (0, 0, 0) if tensor is None else tensor.stride()[:3]
    return {f"{prefix}row_stride": row, f"{prefix}token_stride": token, f"{prefix}{axis}_stride": inner}
