"""A few updates of a small hybrid under megatron-core, split in any way, from weights that do not depend on it."""

import hashlib
import importlib.util
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .megatron_on_cpu import initialize, megatron_on_cpu, parameters_come_late, writers_are_processes

VOCABULARY, SEQLEN, ROWS = 64, 32, 4
HAVE_EXPERTS = importlib.util.find_spec("megatron") is not None and (
    importlib.util.find_spec("megatron.core.recompute") is not None
)
"""Without TransformerEngine they work from 0.18 on."""


@dataclass(frozen=True)
class Run:
    """What is trained, how it is split, and where it is kept."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    """Ranks of dp that share the experts."""
    vp: int | None = None
    """Virtual stages of a rank of pp."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    bucket_size: int | None = None
    """Of gradients, which are then reduced, and parameters gathered, while others are computed."""
    pattern: str = "M*-M"
    ngroups: int = 2
    documents: tuple[int, ...] | None = None
    """Offsets in a row, which is then packed and alone in its batch."""
    steps: int = 5
    clip: float = 0.5
    config: dict = field(default_factory=dict)
    spec: dict = field(default_factory=dict)
    load: str | None = None
    save: str | None = None
    optimizer_state: bool = True
    """Whether checkpoints have it."""


def losses(run: Run) -> list[float]:
    """The mean loss over all tokens before each update."""
    with megatron_on_cpu(), parameters_come_late():
        return _Training(run).losses()


class _Training:
    def __init__(self, run: Run):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.enums import ModelType

        from mamba2_dist.adapters.megatron import prepare_optimizer

        self.run = run
        initialize(run.tp, run.pp, run.cp, run.ep, run.vp)
        self.config = small_config(run)
        buckets = DistributedDataParallelConfig(
            use_distributed_optimizer=run.distributed_optimizer,
            overlap_grad_reduce=run.bucket_size is not None,
            overlap_param_gather=run.bucket_size is not None,
            bucket_size=run.bucket_size,
        )
        models = parts(run, self.config)
        for model in models:
            draw(model)
        self.models = [DistributedDataParallel(self.config, buckets, model) for model in models]
        for model in self.models:
            model.model_type = ModelType.encoder_or_decoder
        self.model = self.models[0]
        options = {"lr": 0.006, "weight_decay": 0.1, "clip_grad": run.clip, "optimizer": "adam"}
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                **options,
                use_distributed_optimizer=run.distributed_optimizer,
                overlap_param_gather=run.bucket_size is not None,
            ),
            self.models,
        )
        prepare_optimizer(self.optimizer)
        if run.load:
            self._load(run.load)

    def losses(self) -> list[float]:
        found = [self._step() for _ in range(self.run.steps)]
        if self.run.save:
            self._save(self.run.save)
        return found

    def _step(self) -> float:
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        rows = 1 if self.run.documents else 2
        batches = list(range(0, ROWS, rows))[dp_rank::dp]
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.config.finalize_model_grads_func = finalize_model_grads
        found = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[iter(batches) for _ in self.models],
            model=self.models,
            num_microbatches=len(batches),
            seq_length=SEQLEN,
            micro_batch_size=rows,
            forward_only=False,
        )
        self.optimizer.step()
        total = torch.tensor([[each["sum"], each["tokens"]] for each in found]).sum(0) if found else torch.zeros(2)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        last = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())[-1]
        dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
        return (total[0] / total[1]).item()

    def _forward(self, batches, model):
        from megatron.core import parallel_state

        first = next(batches)
        run, rank = self.run, parallel_state.get_context_parallel_rank()
        rows = 1 if run.documents else 2
        whole = torch.randint(VOCABULARY, (ROWS, SEQLEN + 1), generator=torch.Generator().manual_seed(3))
        whole = whole[first : first + rows]
        device = next(model.parameters()).device
        mine = positions(run, rank)
        tokens, labels = whole[:, :-1][:, mine], whole[:, 1:][:, mine]
        packed = packed_params(run, device)
        tokens, labels, places = (part.to(device) for part in (tokens, labels, mine[None].expand(rows, -1)))
        output = model(tokens, places, None, labels=labels, packed_seq_params=packed)

        def loss(losses):
            total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int, device=device)
            return total, count, {"sum": total.detach().item(), "tokens": float(count)}

        return output, loss

    def _state(self, loading: bool) -> dict:
        model = self.model.module.sharded_state_dict()
        if not self.run.optimizer_state:
            # nor what TransformerEngine adds
            return {"model": {key: part for key, part in model.items() if not key.endswith("_extra_state")}}
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def _save(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        Path(folder).mkdir(exist_ok=True)
        dist.barrier()
        with writers_are_processes():
            dist_checkpointing.save(self._state(loading=False), folder)

    def _load(self, folder: str) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.validation import StrictHandling

        strict = StrictHandling.ASSUME_OK_UNEXPECTED if self.run.optimizer_state else StrictHandling.RAISE_ALL
        state = dist_checkpointing.load(self._state(loading=True), folder, strict=strict)
        lacking, unknown = self.model.module.load_state_dict(state["model"], strict=False)
        assert not unknown
        assert all(name.endswith("_extra_state") for name in lacking)
        if self.run.optimizer_state:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer.reload_model_params()


def small_config(run: Run) -> Any:
    """A `TransformerConfig` with every size small."""
    from megatron.core.transformer import TransformerConfig

    sizes = {
        "num_layers": len(run.pattern), "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
        "ffn_hidden_size": 48, "mamba_state_dim": 16, "mamba_head_dim": 16, "mamba_num_groups": run.ngroups,
    }  # fmt: skip
    options = {
        "normalization": "RMSNorm", "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "use_cpu_initialization": not torch.cuda.is_available(), "tensor_model_parallel_size": run.tp,
        "pipeline_model_parallel_size": run.pp, "context_parallel_size": run.cp, "pipeline_dtype": torch.float32,
        "sequence_parallel": run.sequence_parallel, "expert_model_parallel_size": run.ep,
        "virtual_pipeline_model_parallel_size": run.vp,
    }  # fmt: skip
    return TransformerConfig(**(sizes | options | run.config))


def parts(run: Run, config: Any) -> list:
    """This rank's stage of a model, or its virtual stages."""
    from megatron.core import parallel_state

    if run.vp is None:
        return [build(run, config)]
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    stages = []
    for stage in range(run.vp):
        ends = {"pre_process": first and stage == 0, "post_process": last and stage == run.vp - 1}
        stages.append(build(run, config, vp_stage=stage, **ends))
    return stages


def build(run: Run, config: Any, **stage: Any) -> Any:
    """The model of whichever version of megatron-core there is."""
    from mamba2_dist.adapters.megatron import hybrid_model, hybrid_stack

    # Megatron's rotary embeddings come in its own layout
    positions = "none" if "layout" in run.spec else "rope"
    options = {"vocab_size": VOCABULARY, "max_sequence_length": SEQLEN, "position_embedding_type": positions}
    return hybrid_model(config, run.pattern, spec=hybrid_stack(**run.spec), **options, **stage)


@torch.no_grad()
def draw(model: Any) -> None:
    """Every tensor by its key in a checkpoint alone, whatever part of it is here."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    for shard in nested_values(state):
        if not isinstance(shard, ShardedTensor):
            continue
        first, layer = shard.global_offset[shard.prepend_axis_num :], shard.global_offset[: shard.prepend_axis_num]
        place = (*layer, *(slice(o, o + n) for o, n in zip(first, shard.local_shape, strict=True)))
        shard.data.copy_(drawn(shard.key, shard.global_shape)[place])


def drawn(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The whole tensor that a checkpoint calls `key`."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")
    whole = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    if "norm" in key or key.endswith((".D", "A_log")):
        return whole + 1.0
    return whole if "conv1d" in key or key.endswith("dt_bias") else 0.3 * whole


def stock_shapes() -> dict[str, tuple[int, ...]]:
    """The keys of Megatron's own hybrid "M*-M" with TransformerEngine, and the whole shapes of `small_config`."""
    width, heads, channels, groups, vector = 64, 8, 128, 2 * 16, (64,)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCABULARY, width),
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": vector,
        "decoder.layers.1.self_attention.linear_qkv.weight": (64 + 2 * 32, width),
        "decoder.layers.1.self_attention.linear_proj.weight": (width, 64),
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight": vector,
        "decoder.layers.2.mlp.linear_fc1.weight": (48, width),
        "decoder.layers.2.mlp.linear_fc2.weight": (width, 48),
        "decoder.final_norm.weight": vector,
        "output_layer.weight": (VOCABULARY, width),
    }
    rows = {"z": channels, "x": channels, "B": groups, "C": groups, "dt": heads}
    for layer in (0, 3):
        mixer = f"decoder.layers.{layer}.mixer"
        shapes |= {f"{mixer}.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}
        shapes |= {f"{mixer}.in_proj.layer_norm_weight": vector, f"{mixer}.norm.weight": (channels,)}
        shapes |= {f"{mixer}.out_proj.weight": (width, channels)}
        shapes |= {f"{mixer}.in_proj.weight.{part}": (count, width) for part, count in rows.items()}
        for part in ("x", "B", "C"):
            shapes[f"{mixer}.conv1d.weight.{part}"] = (rows[part], 1, 4)
            shapes[f"{mixer}.conv1d.bias.{part}"] = (rows[part],)
    return shapes


def stock_keys(run: Run) -> list[str]:
    """What our checkpoint of `run` has that Megatron's own has not, or with another shape, or the other way round."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    with megatron_on_cpu():
        state = _Training(run).model.module.sharded_state_dict()
        apply_factories(state)
    found = {each.key: each.global_shape for each in nested_values(state) if isinstance(each, ShardedTensor)}
    return sorted(f"{key} {shape}" for key, shape in found.items() ^ stock_shapes().items())


def written_by_stock(folder: str) -> None:
    """A checkpoint with the keys of Megatron's own mixer, without any of our code."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    Path(folder).mkdir()
    state = {key: ShardedTensor.from_rank_offsets(key, drawn(key, shape)) for key, shape in stock_shapes().items()}
    with megatron_on_cpu(), writers_are_processes():
        dist_checkpointing.save(state, folder)


def positions(run: Run, rank: int) -> torch.Tensor:
    """The tokens of a rank of cp as Megatron cuts: of every row, or of every packed document, two runs."""
    layout = run.spec.get("layout", "megatron")
    if run.cp == 1 or layout == "contiguous":
        return torch.arange(SEQLEN).chunk(run.cp)[rank]
    documents = run.documents if layout == "megatron" and run.documents else (0, SEQLEN)
    runs = []
    for start, end in itertools.pairwise(documents):
        parts = torch.arange(start, end).chunk(2 * run.cp)
        runs += [parts[rank], parts[-1 - rank]]
    return torch.cat(runs)


def packed_params(run: Run, device: torch.device | str = "cpu") -> Any:
    """The documents as Megatron describes them, or None."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if run.documents is None:
        return None
    offsets = torch.tensor(run.documents, dtype=torch.int32, device=device)
    longest = int(offsets.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=longest, max_seqlen_kv=longest
    )
