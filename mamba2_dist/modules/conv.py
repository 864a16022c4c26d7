"""The depthwise causal convolution with its parameters."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from mamba2_dist.kernels.conv1d import causal_conv1d
from mamba2_dist.parallel.carry import Carry
from mamba2_dist.parallel.collectives import replicate_rows
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import Partition
from mamba2_dist.parallel.segments import SegmentTable
from mamba2_dist.parallel.ssd import operators
from mamba2_dist.parallel.state_scan import StateScan

from . import init
from .base import PartitionedModule


class CausalConv1d(PartitionedModule):
    """silu(depthwise causal convolution) over a sequence cut across `cp`; the weight is (channels, 1, width).

    shared_by: the group that holds the shared channels too. scan: how states travel after it, which may ask for the
    bits of one device.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, partition: Partition, width: int, cp: Group, *, shared_by: Group, scan: StateScan = "auto", **factory
    ):
        super().__init__()
        self.cp, self.shared_by, self.width = cp, shared_by, width
        self.convolve, _ = operators(scan)
        draw = init.uniform(1 / math.sqrt(width))
        self.add_parameter("weight", partition, draw, (1, width), **factory)
        self.add_parameter("bias", partition, draw, **factory)

    def _parameters_to_use(self) -> tuple[Tensor, Tensor]:
        rows = self.records["weight"].partition.shared
        weight, bias = (replicate_rows(p, rows, self.shared_by) for p in (self.weight, self.bias))
        return weight.squeeze(1), bias

    def forward(
        self, x: Tensor, table: SegmentTable, carry: Carry | None = None
    ) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
        """(batch, seqlen/cp, at least channels) -> the parts of its first channels and the other channels as they are;
        and what gives all of that again without communicating."""
        weight, bias = self._parameters_to_use()
        sizes = [part.length for part in self.records["weight"].partition.parts]
        return self.convolve(x, weight, bias, sizes, table, self.cp, activation="silu", carry=carry)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token, (batch, 1, channels), after the inputs in `state`, (batch, width - 1, channels)."""
        weight, bias = self._parameters_to_use()
        y, final = causal_conv1d(x, weight, bias, initial_state=state, activation="silu", return_final_state=True)
        return y, final
