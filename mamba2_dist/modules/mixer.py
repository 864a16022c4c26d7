"""The Mamba-2 mixer: in_proj, conv1d, SSD, gated norm, out_proj (arXiv 2405.21060, section 7)."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mamba2_dist.config import Mamba2Config
from mamba2_dist.kernels.common.checks import check_device, check_positive, check_shape
from mamba2_dist.kernels.ssd import discretize, mamba_chunk_scan_combined, ssd_matrix
from mamba2_dist.parallel.carry import Carry
from mamba2_dist.parallel.groups import ParallelGroups
from mamba2_dist.parallel.partition import Partition, mamba2_partition
from mamba2_dist.parallel.segments import SegmentTable
from mamba2_dist.parallel.ssd import operators
from mamba2_dist.parallel.state_scan import StateScan, check_state_scan

from . import init
from .base import PartitionedModule, check_step, initialize
from .conv import CausalConv1d
from .linear import ColumnParallelLinear, RowParallelLinear
from .norm import GatedRMSNorm
from .recompute import Forgetful, Recompute, check_recompute, check_runs_once


def _whole_rows(x: Tensor) -> SegmentTable:
    return SegmentTable.contiguous(x.shape[1], 1, batch=x.shape[0])


class Mamba2Cache:
    """What a mixer remembers of the tokens before: conv, (batch, d_conv - 1, channels/tp), and ssm,
    (batch, nheads/tp, headdim, d_state)."""

    # a dataclass would reach a module as FSDP's copy, and what the module stores in it would be lost

    def __init__(self, conv: Tensor, ssm: Tensor):
        self.conv, self.ssm = conv, ssm


class Mamba2Mixer(PartitionedModule):
    """One Mamba-2 layer, heads split over `groups.tp` and the sequence over `groups.cp`.

    Communicates one all-reduce over tp (with sequence_parallel one all-gather and one reduce-scatter), one of squared
    sums where a norm group spans ranks, and over cp one halo, one state exchange (with state_scan "serial_exact" more:
    docs/parallel.md) and, where state is carried from batch to batch, one broadcast of it.

    groups: None: the whole layer on this process.
    recompute: what the backward pass makes again rather than keeping it: nothing, the convolution's results ("conv"),
        or all between in_proj and out_proj ("inner"). The numbers are the same, and nothing is communicated twice.
    residual_layers: layers that add to the residual stream, for the scale of out_proj.
    seed: parameters are drawn from it, the same for any split; None: left for `initialize`.
    Raises ValueError when heads or groups do not fit tp, and for sizes that are not above zero.
    """

    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        config: Mamba2Config,
        d_model: int,
        groups: ParallelGroups | None = None,
        *,
        sequence_parallel: bool = False,
        state_scan: StateScan = "auto",
        recompute: Recompute = "none",
        norm_eps: float = 1e-5,
        residual_layers: int = 1,
        seed: int | None = 0,
        **factory,
    ):
        super().__init__()
        groups = groups or ParallelGroups.alone()
        for name, value in (("d_model", d_model), ("norm_eps", norm_eps), ("residual_layers", residual_layers)):
            check_positive(name, value)
        d_inner, nheads = config.d_inner(d_model), config.nheads(d_model)
        check_recompute(recompute, "M")
        check_state_scan(state_scan, groups.states)
        if (groups.states.size, groups.states.rank) != (groups.cp.size, groups.cp.rank):
            raise ValueError(
                f"groups.states ({groups.states.size} ranks) must be the ranks of groups.cp ({groups.cp.size}); "
                "make both with ParallelGroups"
            )
        self.config, self.cp, self.states, self.recompute = config, groups.cp, groups.states, recompute
        _, self.scan = operators(state_scan)
        self.share = share = mamba2_partition(
            d_inner=d_inner, nheads=nheads, ngroups=config.ngroups, d_state=config.d_state,
            tp=groups.tp.size, rank=groups.tp.rank,
        )  # fmt: skip
        shared_by = groups.tp_part(share.group_ranks)
        self.in_proj = ColumnParallelLinear(
            d_model, share.in_proj, groups.tp, init.projection(d_model),
            shared_by=shared_by, sequence_parallel=sequence_parallel, **factory,
        )  # fmt: skip
        self.conv1d = CausalConv1d(
            share.conv1d, config.d_conv, groups.cp, shared_by=shared_by, scan=state_scan, **factory
        )
        self.add_parameter(
            "dt_bias", share.heads, init.step_bias(*config.dt_init_range, config.dt_init_floor), **factory
        )
        self.add_parameter("A_log", share.heads, init.log_uniform_range(*config.A_init_range), **factory)
        self.add_parameter("D", share.channels if config.D_has_hdim else share.heads, init.ones, **factory)
        self.norm = GatedRMSNorm(
            share.channels, shared_by,
            eps=norm_eps, group_size=d_inner // config.ngroups, norm_before_gate=config.norm_before_gate, **factory,
        )  # fmt: skip
        self.out_proj = RowParallelLinear(
            d_model, share.out_proj, groups.tp, init.projection(d_inner, residual_layers),
            sequence_parallel=sequence_parallel, **factory,
        )  # fmt: skip
        if seed is not None:
            initialize(self, seed)

    def forward(self, u: Tensor, segments: SegmentTable | None = None, memory: Mamba2Cache | None = None) -> Tensor:
        """(batch, seqlen/cp, d_model) -> the same; with sequence_parallel (batch, seqlen/cp/tp, d_model).

        segments: how the sequence is cut over cp; None: rows of one document each, cp must be 1.
        memory: what the rows of the batch before left, which enters those that are carried; brought up to date on every
            rank of cp. What is left has a gradient where what entered requires one. With tp above ngroups the gradient
            of conv's B and C is what this rank of tp adds to it.
        """
        if segments is None and self.cp.size > 1:
            raise ValueError(f"segments must be given when cp ({self.cp.size}) is above 1")
        # which gathers the shards of u, so that what follows has all of its tokens
        xBCdt, z = self._project(u)
        if segments is None:
            segments = _whole_rows(xBCdt)
        segments.check("u", xBCdt, self.cp.rank, self.cp.size)
        if memory is None:
            if segments.carried.any():
                raise ValueError("memory must be given when rows of segments are carried")
            return self._mix(xBCdt, z, segments)
        check_runs_once("memory")
        self._check_memory(memory, segments.batch)
        carry = Carry(memory.conv, memory.ssm, segments, self.states)
        y = self._mix(xBCdt, z, segments, carry)
        memory.conv, memory.ssm = carry.left()
        return y

    def _mix(
        self, xBCdt: Tensor, z: Callable[..., Tensor], segments: SegmentTable, carry: Carry | None = None
    ) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            (x, B, C, dt), _ = self.conv1d(xBCdt, segments, carry)
            y, gate, _ = self._scan(x, B, C, dt, z, segments, carry)
            return self.out_proj(self.norm(y, gate)[0])
        with Forgetful() as saved:
            (x, B, C, dt), convolve = self.conv1d(xBCdt, segments, carry)
            saved.forget([x, B, C], convolve)
            y, gate, scan = self._scan(x, B, C, dt, z, segments, carry)
            if self.recompute == "conv":
                return self.out_proj(self.norm(y, gate)[0])
            convolved = [saved.again(part) for part in (x, B, C)]
            saved.forget([y], lambda: [scan(*(again() for again in convolved))], overwritten=True)
            normed, norm = self.norm(y, gate, overwrite_x=True)
            scanned = saved.again(y)
            saved.forget([normed], lambda: [norm(scanned())])
            return self.out_proj(normed)

    def new_cache(self, batch: int) -> Mamba2Cache:
        """The memory before the first token."""
        # parameters may be sharded, this is not
        return Mamba2Cache(
            *(torch.zeros(shape, dtype=dtype, device=self.A_log.device) for shape, dtype in self._cache_like(batch))
        )

    def _cache_like(self, batch: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of conv and of ssm."""
        share, config, dtype = self.share, self.config, self.A_log.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return [
            ((batch, config.d_conv - 1, share.conv1d.length), dtype),
            ((batch, share.nheads_local, config.headdim, config.d_state), wide),
        ]

    def cache_partitions(self) -> dict[str, Partition]:
        """Who owns what of a cache's tensors, by their names."""
        return {"conv": replace(self.share.conv1d, dim=2), "ssm": replace(self.share.heads, dim=1)}

    def _check_memory(self, memory: Mamba2Cache, batch: int) -> None:
        for name, (shape, dtype) in zip(("conv", "ssm"), self._cache_like(batch), strict=True):
            tensor = getattr(memory, name)
            check_shape(f"memory.{name}", tensor, shape, "that of new_cache(batch)")
            check_device(f"memory.{name}", tensor, self.A_log.device)
            # FSDP may run the layer with narrower parameters than it had when the memory was made
            if torch.promote_types(tensor.dtype, dtype) != tensor.dtype:
                raise ValueError(
                    f"memory.{name} must be {dtype}, that of new_cache(batch), or wider, got {tensor.dtype}"
                )

    def step(self, u: Tensor, cache: Mamba2Cache) -> Tensor:
        """One token, (batch, 1, d_model) -> the same, after those in `cache`, which is brought up to date."""
        check_step("u", u, "(batch, 1, d_model)", self.cp, self.in_proj.sequence_parallel)
        xBCdt, z = self._project(u)
        xBC, dt = xBCdt.split([self.share.conv1d.length, self.share.nheads_local], dim=-1)
        xBC, conv = self.conv1d.step(xBC, cache.conv)
        cache.conv = conv.to(cache.conv.dtype)  # autocast has made it narrower
        x, B, C = self._heads(*xBC.split([part.length for part in self.share.conv1d.parts], dim=-1))
        y, cache.ssm = mamba_chunk_scan_combined(
            x, dt, self._A(), B, C, 1, initial_states=cache.ssm, return_final_states=True, **self._scan_options()
        )
        return self.out_proj(self.norm(y.flatten(-2), z())[0])

    def matrix(self, u: Tensor) -> Tensor:
        """The dense token-mixing matrix of every head, (batch, nheads/tp, t, s), for short whole sequences."""
        if self.cp.size > 1:
            raise ValueError(f"matrix needs whole sequences, cp must be 1, got {self.cp.size}")
        xBCdt, _ = self._project(u)
        (x, B, C, dt), _ = self.conv1d(xBCdt, _whole_rows(xBCdt))
        _, B, C = self._heads(x, B, C)
        return ssd_matrix(discretize(dt, self.dt_bias, True, self.config.dt_limit), self._A(), B, C)

    def _project(self, u: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        """x, B, C and dt side by side, and what computes z, which is needed last and whose gradient comes first: beside
        it states travel between ranks, on processors that it may be asked to leave free."""
        return self.in_proj(u, self.share.d_inner_local)

    def _heads(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            x.unflatten(-1, (self.share.nheads_local, -1)),
            B.unflatten(-1, (self.share.ngroups_local, -1)),
            C.unflatten(-1, (self.share.ngroups_local, -1)),
        )

    def _scan(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        dt: Tensor,
        z: Callable[..., Tensor],
        segments: SegmentTable,
        carry: Carry | None,
    ) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """y, z, and what gives y of the same x, B and C again without communicating."""
        A, options = self._A(), self._scan_options()
        x, B, C = self._heads(x, B, C)
        over = self.scan(x, dt, A, B, C, self.config.chunk_size, segments, self.states, carry=carry, **options)
        del x, B, C
        tokens, d_model = dt.shape[0] * dt.shape[1], self.in_proj.weight.shape[1]
        gate = z(over.processors_wanted(2.0 * tokens * d_model * self.share.d_inner_local))
        y, scan = over.outputs()

        def again(x: Tensor, B: Tensor, C: Tensor) -> Tensor:
            x, B, C = self._heads(x, B, C)
            return scan(x, dt, A, B, C, options["D"], options["dt_bias"]).flatten(-2)

        return y.flatten(-2), gate, again

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _scan_options(self) -> dict:
        D = self.D.view(self.share.nheads_local, -1) if self.config.D_has_hdim else self.D
        return {"D": D, "dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.config.dt_limit}
