"""The Mamba-2 mixer as megatron-core's `MambaLayer` builds and calls it."""

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mamba2_dist.config import Mamba2Config, require
from mamba2_dist.modules import init
from mamba2_dist.modules.base import Initializer, PartitionedModule, initialize
from mamba2_dist.modules.mixer import Mamba2Cache, Mamba2Mixer
from mamba2_dist.modules.recompute import Recompute
from mamba2_dist.parallel.cost_model import H200, Machine
from mamba2_dist.parallel.partition import Partition
from mamba2_dist.parallel.segments import SegmentTable
from mamba2_dist.parallel.state_scan import StateScan

from .checkpoint import Offsets, sharded_parameter
from .layout import Layout, check_layout, segment_table
from .process_groups import parallel_groups
from .refusals import check_config, check_mixer, device_of
from .shared_rows import set_apart


class MegatronMamba2Mixer(Mamba2Mixer):
    """`Mamba2Mixer` with the arguments of megatron-core's `MambaMixer`, versions 0.16 to 0.19, and its parameters.

    Sizes come from config (`mamba_state_dim`, `mamba_head_dim`, `mamba_num_groups`, `mamba_num_heads`), projections
    are drawn by its `init_method` and `output_layer_init_method`: every tensor from the seed of torch, the layer's
    number and its own name, the same for any tp and cp. Groups may be fewer than tp, heads fewer than tp cp.
    Of its own:

    state_scan, recompute: as in `Mamba2Mixer`. dt_limit: bounds of the step size.
    layout: how Megatron cuts sequences over cp, see `segment_table`. machine: the links by which "auto" chooses.
    Raises ValueError for what config asks for and it cannot do.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        d_model: int = 0,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 128,
        layer_number: int = 1,
        *,
        pg_collection: Any = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
        state_scan: StateScan = "auto",
        recompute: Recompute = "conv",
        dt_limit: tuple[float, float] = (0.0, math.inf),
        layout: Layout = "megatron",
        machine: Machine = H200,
        **unknown: Any,
    ):
        check_config(config)
        check_mixer(
            rmsnorm=rmsnorm, dt_init=dt_init, dt_scale=dt_scale, bias=bias, conv_bias=conv_bias, unknown=unknown
        )
        check_layout(layout)
        require(
            submodules is None,
            "submodules must be left out: the mixer has projections of its own, split for its overlap",
        )
        require(pg_collection is not None, "pg_collection must be given: the mixer has no groups of its own")
        heads, headdim = config.mamba_num_heads, config.mamba_head_dim
        super().__init__(
            Mamba2Config(
                d_state=config.mamba_state_dim, headdim=headdim, ngroups=config.mamba_num_groups, d_conv=d_conv,
                expand=expand if heads is None else heads * headdim / d_model,
                chunk_size=chunk_size, norm_before_gate=norm_before_gate, D_has_hdim=D_has_hdim, dt_limit=dt_limit,
                A_init_range=A_init_range, dt_init_range=(dt_min, dt_max), dt_init_floor=dt_init_floor,
            ),
            d_model,
            parallel_groups(pg_collection, machine),
            sequence_parallel=config.sequence_parallel,
            state_scan=state_scan,
            recompute=recompute,
            seed=None,
            device=device_of(config),
            dtype=config.params_dtype,
        )  # fmt: skip
        self.layer_number, self.pp_layer_offset, self.layout = layer_number, pp_layer_offset, layout
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self._draw(config, conv_init, name or "")
        self._describe()

    def _draw(self, config: Any, conv_init: float | None, name: str) -> None:
        for linear, method in (
            (self.in_proj, config.init_method),
            (self.out_proj, config.output_layer_init_method),
        ):
            draw = _drawn_by(method) if config.perform_initialization else _not_drawn
            linear.records["weight"] = replace(linear.records["weight"], initializer=draw)
        if conv_init is not None:
            record = self.conv1d.records["weight"]
            self.conv1d.records["weight"] = replace(record, initializer=init.uniform(conv_init))
        seed = torch.initial_seed()
        if self.in_proj.tp.size > 1:
            seeds: list[Any] = [None] * self.in_proj.tp.size
            dist.all_gather_object(seeds, seed, group=self.tp_group)
            require(
                len(set(seeds)) == 1,
                f"ranks of tp must have the same seed, got {seeds}; call torch.manual_seed with one on all of them",
            )
        # layers that predict further tokens count from 1 again
        place = name if name.startswith("mtp") else self.layer_number
        digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=7).digest()
        initialize(self, int.from_bytes(digest, "big"))

    def _describe(self) -> None:
        """Say of every parameter what Megatron's optimizers and checkpoints ask."""
        # by a parameter's name: what a checkpoint calls it, and its parts
        self.stored: dict[str, tuple[str, Partition]] = {}
        for prefix, module in list(self.named_modules()):
            if not isinstance(module, PartitionedModule):
                continue
            for name, record in module.records.items():
                for own_name, partition in set_apart(module, name, record.partition).items():
                    full, stored = (f"{prefix}.{end}".lstrip(".") for end in (own_name, name))
                    self.stored[full] = stored, partition
                    _mark(self.get_parameter(full), partition, self.in_proj.tp.rank)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, None]:
        """(seqlen/cp, batch, d_model) -> the same and no bias; with sequence_parallel (seqlen/cp/tp, batch, d_model).

        Raises ValueError for inference over cp, with sequence_parallel, or with dynamic batching.
        """
        # a packed parameter of two is put together once
        whole = parametrize.cached() if self.share.group_ranks > 1 else nullcontext()
        context = inference_params if inference_context is None else inference_context
        u = hidden_states.transpose(0, 1).contiguous()
        with whole:
            if context is not None:
                y = self._generate(u, context)
            else:
                y = super().forward(u, self._table(u, packed_seq_params))
        return y.transpose(0, 1).contiguous(), None

    def _table(self, u: Tensor, packed_seq_params: Any) -> SegmentTable:
        tokens = u.shape[1] * (self.in_proj.tp.size if self.in_proj.sequence_parallel else 1)
        return segment_table(tokens, u.shape[0], self.pg_collection.cp, packed_seq_params, self.layout)

    def _generate(self, u: Tensor, context: Any) -> Tensor:
        """The tokens after those that `context` remembers of this layer; many of them only where there are none."""
        require(self.cp.size == 1, f"inference needs cp 1, got {self.cp.size}; load the checkpoint with cp 1")
        require(not self.in_proj.sequence_parallel, "inference needs sequence_parallel off")
        require(
            context.is_static_batching(),
            "inference with dynamic batching is not supported by this Mamba-2 mixer; give a static context, or load "
            "the checkpoint into Megatron's own mixer",
        )
        caches: dict[int, Mamba2Cache] = context.key_value_memory_dict
        if context.sequence_len_offset == 0:
            caches[self.layer_number] = self.new_cache(u.shape[0])
            return super().forward(u, memory=caches[self.layer_number])
        return self.step(u, caches[self.layer_number])

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what a sequence leaves behind: of the convolution, (channels/tp, d_conv), and the state."""
        channels = self.share.conv1d.length
        return (channels, self.config.d_conv), (self.share.nheads_local, self.config.headdim, self.config.d_state)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict | None = None) -> dict:
        """Every parameter under the keys of Megatron's own mixer, as `dist_checkpointing` stores it."""
        data_rank = dist.get_rank(ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"])
        place = self.in_proj.tp.rank, data_rank, tuple(sharded_offsets)
        return {
            f"{prefix}{name}": sharded_parameter(f"{prefix}{stored}", self.get_parameter(name), partition, *place)
            for name, (stored, partition) in self.stored.items()
        }


def _drawn_by(method: Callable[[Tensor], Any]) -> Initializer:
    """What draws a whole tensor with one of Megatron's methods, which draw in place from torch's own generator."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())  # and no GPU's
            whole = torch.empty(shape)
            method(whole)
            return whole

    return draw


def _not_drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """For weights that a checkpoint will bring, as `perform_initialization` off says."""
    return torch.zeros(shape)


def _mark(parameter: nn.Parameter, partition: Partition, tp_rank: int) -> None:
    replicas = partition.parts[0].replicas
    marks: dict[str, Any] = {
        "tensor_model_parallel": True,
        "partition_dim": partition.dim,
        "partition_stride": 1,
        "shared": tp_rank % replicas != 0,  # counted by the first rank that holds it
    }
    if len(partition.parts) > 1:
        # its parts are matrices and convolutions of their own
        marks |= {"partition_sizes": [part.length for part in partition.parts], "use_muon": False}
    for name, value in marks.items():
        setattr(parameter, name, value)
