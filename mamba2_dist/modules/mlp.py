"""The perceptron between mixers."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_dist.config import MLPConfig
from mamba2_dist.parallel.groups import ParallelGroups
from mamba2_dist.parallel.partition import Partition, split
from mamba2_dist.parallel.segments import SegmentTable

from . import init
from .base import PartitionedModule
from .linear import ColumnParallelLinear, RowParallelLinear


def _swiglu(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def _relu2(inner: Tensor) -> Tensor:
    return F.relu(inner).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": _swiglu, "relu2": _relu2, "gelu": F.gelu}


@functools.cache
def _compiled(activation: str) -> Callable[[Tensor], Tensor]:
    """One for all layers, so that it is compiled once a shape."""
    return torch.compile(ACTIVATIONS[activation])


class MLP(PartitionedModule):
    """fc2(act(fc1 u)), or fc2(silu(gate) up) with gate|up = fc1 u. Raises ValueError when tp does not divide d_ff.

    compiled: what is between the two products, by torch.compile.
    """

    def __init__(
        self,
        config: MLPConfig,
        d_model: int,
        groups: ParallelGroups,
        *,
        sequence_parallel: bool = False,
        residual_layers: int = 1,
        compiled: bool = False,
        **factory,
    ):
        super().__init__()
        tp, d_ff = groups.tp, config.width(d_model)
        self.activate = _compiled(config.activation) if compiled else ACTIVATIONS[config.activation]
        inner = split("", "d_ff", d_ff, tp.size, tp.rank)
        names = ("gate", "up") if config.activation == "swiglu" else ("",)
        parts = tuple(split(name, "d_ff", d_ff, tp.size, tp.rank) for name in names)
        self.fc1 = ColumnParallelLinear(
            d_model, Partition(parts), tp, init.projection(d_model),
            shared_by=groups.tp_part(1), sequence_parallel=sequence_parallel, **factory,
        )  # fmt: skip
        self.fc2 = RowParallelLinear(
            d_model, Partition((inner,), dim=1), tp, init.projection(d_ff, residual_layers),
            sequence_parallel=sequence_parallel, **factory,
        )  # fmt: skip

    def forward(self, u: Tensor, segments: SegmentTable | None = None) -> Tensor:
        """(batch, seqlen/cp, d_model) -> the same; with sequence_parallel (batch, seqlen/cp/tp, d_model)."""
        return self.fc2(self.activate(self.fc1(u)))

    def new_cache(self, batch: int) -> None:
        """A perceptron remembers nothing."""

    def step(self, u: Tensor, cache: None) -> Tensor:
        """One token, (batch, 1, d_model) -> the same."""
        return self.forward(u)
