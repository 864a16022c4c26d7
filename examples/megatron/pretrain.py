"""Pretraining of a hybrid Mamba-2 model by megatron-core.

    mamba2-dist preprocess out=runs/stdlib
    torchrun --nproc-per-node 8 examples/megatron/pretrain.py --config examples/megatron/sizes/1_3b.yaml \
        --data runs/stdlib --out runs/megatron --tp 2 --cp 2

Run it again and it goes on from the last checkpoint, also with another tp, pp, cp or number of GPUs.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec

from mamba2_dist.adapters.megatron import (
    hybrid_model,
    hybrid_stack,
    prepare_optimizer,
    segment_table,
    training_flops,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, on what, and how it is split."""

    data: str
    """Folder that `mamba2-dist preprocess` wrote."""
    out: str
    """Folder for checkpoints; on a file system that all nodes share."""

    pattern: str
    """M Mamba-2, * attention, - MLP, E MoE; `|` between pipeline stages, or none for stages of one length."""
    hidden_size: int
    ffn_hidden_size: int | None = None
    """None: 4 hidden_size."""
    num_attention_heads: int = 16
    num_query_groups: int = 8
    mamba_head_dim: int = 64
    mamba_state_dim: int = 128
    mamba_num_groups: int = 8
    """May be below tp."""
    num_moe_experts: int | None = None
    moe_router_topk: int = 2

    seqlen: int = 4096
    micro_batch: int = 1
    global_batch: int = 8
    """Sequences an update."""
    steps: int = 1000
    lr: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 1234

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    """Split the residual stream over tp."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    recompute: Literal["none", "conv", "inner", "full"] = "conv"
    """What the backward pass computes again: nothing, parts of Mamba-2 layers, or every layer."""

    log_interval: int = 10
    eval_interval: int = 100
    eval_batches: int = 8
    """Global batches an evaluation."""
    save_interval: int = 100
    minutes: float | None = None
    """End with a checkpoint after so long, for jobs with a limit; None: at the last step."""


class Trainer:
    """A run: its model, optimizer and data, and where it stands. `initialize` comes first."""

    def __init__(self, config: Config, spec: ModuleSpec | None = None):
        """spec: the stack of layers; None: Megatron's with this library's Mamba-2 mixer."""
        self.config, self.step = config, 0
        dp = parallel_state.get_data_parallel_world_size()
        if config.global_batch % (config.micro_batch * dp):
            raise ValueError(
                f"global_batch ({config.global_batch}) must be divisible by micro_batch ({config.micro_batch}) * "
                f"dp ({dp})"
            )
        self.microbatches = config.global_batch // (config.micro_batch * dp)
        torch.manual_seed(config.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
        self.meta = json.loads((Path(config.data) / "meta.json").read_text())
        self.megatron = megatron_config(config)
        # a vocabulary that ranks of tp can share, in rows that suit a GPU
        self.vocab_size = -(-self.meta["vocab_size"] // (128 * config.tp)) * 128 * config.tp
        spec = spec or hybrid_stack(recompute="none" if config.recompute == "full" else config.recompute)
        model = hybrid_model(
            self.megatron, config.pattern, spec=spec, vocab_size=self.vocab_size, max_sequence_length=config.seqlen
        )
        model = model.to(torch.cuda.current_device())
        model = Float16Module(self.megatron, model) if config.dtype == "bf16" else model
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True
        )
        self.model = DistributedDataParallel(self.megatron, options, model)
        self.model.model_type = ModelType.encoder_or_decoder
        self.megatron.no_sync_func, self.megatron.finalize_model_grads_func = self.model.no_sync, finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=config.lr, min_lr=0.1 * config.lr, weight_decay=config.weight_decay,
                adam_beta2=0.95, clip_grad=1.0, bf16=config.dtype == "bf16", params_dtype=self.megatron.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )  # fmt: skip
        prepare_optimizer(self.optimizer)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=config.lr, min_lr=0.1 * config.lr,
            lr_warmup_steps=config.warmup_steps, lr_decay_steps=max(config.steps, config.warmup_steps + 1),
            lr_decay_style="cosine", start_wd=config.weight_decay, end_wd=config.weight_decay, wd_incr_steps=1,
            wd_incr_style="constant",
        )  # fmt: skip
        self.train_data, self.validation_data = self._datasets()
        self._load()

    def train_step(self) -> tuple[torch.Tensor, float]:
        """One update: the mean loss of its tokens before it, and the norm of the gradient."""
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        first = self.step * self.config.global_batch
        losses = self._pass(self._batches(self.train_data, first), self.microbatches, forward_only=False)
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        self.step += 1
        return self._mean(losses), norm

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """The mean loss of the first sequences of the validation split."""
        self.model.eval()
        batches = self.config.eval_batches * self.microbatches
        return self._mean(self._pass(self._batches(self.validation_data, 0), batches, forward_only=True))

    def _pass(self, batches: Iterator[dict], count: int, forward_only: bool) -> list[dict]:
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=count,
            seq_length=self.config.seqlen,
            micro_batch_size=self.config.micro_batch,
            forward_only=forward_only,
        )

    def _forward(self, batches: Iterator[dict], model: torch.nn.Module):
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
            mask = batch["loss_mask"].to(losses.dtype)
            total, count = (losses.float() * mask).sum(), mask.sum()
            return total, count.int(), {"loss": torch.stack([total.detach(), count.float()])}

        return output, loss

    def _mean(self, losses: list[dict]) -> torch.Tensor:
        """Over the tokens of all ranks."""
        device = torch.cuda.current_device()
        total = sum((each["loss"] for each in losses), torch.zeros(2, device=device))
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        stages = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(total, dist.get_process_group_ranks(stages)[-1], group=stages)
        return total[0] / total[1]

    def _datasets(self) -> tuple[GPTDataset, GPTDataset]:
        config, folder = self.config, Path(self.config.data)
        validation = config.eval_batches * config.global_batch
        builder = BlendedMegatronDatasetBuilder(
            GPTDataset,
            [config.steps * config.global_batch, validation, None],
            lambda: True,
            GPTDatasetConfig(
                random_seed=config.seed,
                sequence_length=config.seqlen,
                blend_per_split=[([str(folder / "train")], None), ([str(folder / "validation")], None), None],
                path_to_cache=str(folder / "cache"),
                tokenizer=_Tokenizer(self.vocab_size, self.meta["end_token"]),
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            ),
        )
        train, valid, _ = builder.build()
        return train, valid

    def _batches(self, data: GPTDataset, first: int) -> Iterator[dict]:
        """This rank's microbatches from the `first` sequence on, its tokens of each."""
        rank, dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        rows, cp = self.config.micro_batch, parallel_state.get_context_parallel_group()
        table = segment_table(self.config.seqlen // self.config.cp, rows, cp)
        while True:
            samples = [data[first + rank * rows + row] for row in range(rows)]
            first += dp * rows
            yield {
                name: _on_gpu(table.shard(torch.stack([sample[name] for sample in samples]), cp.rank()))
                for name in ("tokens", "labels", "loss_mask", "position_ids")
            }

    def save(self) -> None:
        """Write a checkpoint; the one before goes when this is complete."""
        folder = Path(self.config.out) / f"step-{self.step:08d}"
        partial = folder.with_suffix(".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with _signals_held():
            dist_checkpointing.save(self._state(is_loading=False), str(partial))
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in _checkpoints(self.config.out)[:-1]:
                shutil.rmtree(old)
        dist.barrier()

    def _load(self) -> None:
        folders = _checkpoints(self.config.out)
        if not folders:
            return
        if self.config.num_moe_experts:
            self._check_ep(folders[-1])
        state = dist_checkpointing.load(self._state(is_loading=True), str(folders[-1]))
        self._unwrapped().load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    def _check_ep(self, folder: Path) -> None:
        """Raise ValueError where the checkpoint keeps the optimizer of experts apart and this run does not, or the
        other way round."""
        ep = dist_checkpointing.load_common_state_dict(str(folder))["ep"]
        if (ep > 1) != (self.config.ep > 1):
            raise ValueError(
                f"ep ({self.config.ep}) cannot go on from {folder}, of ep {ep}: where ep is above 1, Megatron's "
                f"optimizer of the experts is another; set ep to {'2 or more' if ep > 1 else 1}"
            )

    def _state(self, is_loading: bool) -> dict:
        model = self._unwrapped().sharded_state_dict()
        # whole parameters on disk, so that any other split can load them
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        rest = {"scheduler": self.scheduler.state_dict(), "step": self.step, "ep": self.config.ep}
        return {"model": model, "optimizer": optimizer, **rest}

    def _unwrapped(self) -> torch.nn.Module:
        module = self.model.module
        return module.module if isinstance(module, Float16Module) else module


@dataclass
class _Tokenizer:
    """What Megatron's datasets ask a tokenizer."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict:
        return dataclasses.asdict(self)


def megatron_config(config: Config) -> TransformerConfig:
    """The model and its split in Megatron's terms."""
    layers = len(config.pattern.replace("|", ""))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    experts = {
        "num_moe_experts": config.num_moe_experts, "moe_router_topk": config.moe_router_topk,
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2, "moe_grouped_gemm": False,
    }  # fmt: skip
    return TransformerConfig(
        num_layers=layers, hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups, ffn_hidden_size=config.ffn_hidden_size,
        mamba_head_dim=config.mamba_head_dim, mamba_state_dim=config.mamba_state_dim,
        mamba_num_groups=config.mamba_num_groups, normalization="RMSNorm", add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, gated_linear_unit=False, init_method_std=0.02,
        tensor_model_parallel_size=config.tp, pipeline_model_parallel_size=config.pp,
        context_parallel_size=config.cp, expert_model_parallel_size=config.ep,
        sequence_parallel=config.sequence_parallel, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=config.dtype == "bf16", use_cpu_initialization=not torch.cuda.is_available(),
        **(full if config.recompute == "full" else {}), **(experts if config.num_moe_experts else {}),
    )  # fmt: skip


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """Without waiting for the GPU: from ordinary memory, a copy begins when all before it has ended."""
    pinned = tensor.pin_memory() if torch.cuda.is_available() else tensor
    return pinned.to(torch.cuda.current_device(), non_blocking=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Deliver SIGTERM and SIGINT afterwards, and to no process that begins meanwhile: torchrun sends them to all that
    belong to a rank, and those that write its checkpoints would end before the last."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _checkpoints(out: str) -> list[Path]:
    """Complete ones, the newest last."""
    return sorted(path for path in Path(out).glob("step-*") if path.suffix != ".partial")


def initialize(config: Config) -> None:
    """Make Megatron's process groups."""
    parallel_state.initialize_model_parallel(
        config.tp, config.pp, context_parallel_size=config.cp, expert_model_parallel_size=config.ep
    )


def train(config: Config) -> None:
    """Train to the last step, for `config.minutes`, or until SIGTERM or SIGINT; each ends with a checkpoint, after a
    signal if that is written within the 30 seconds that torchrun gives."""
    begun = time.monotonic()
    initialize(config)
    trainer = Trainer(config)
    stop = torch.zeros((), device=torch.cuda.current_device())
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.fill_(1))
    work = training_flops(trainer.megatron, config.pattern, trainer.vocab_size, config.seqlen)
    gpus, since, start = dist.get_world_size(), trainer.step, time.perf_counter()
    while trainer.step < config.steps:
        loss, norm = trainer.train_step()
        step = trainer.step
        if step % config.log_interval == 0 or step == config.steps:
            loss = loss.item()
            seconds, start = time.perf_counter() - start, time.perf_counter()
            sequences, since = (step - since) * config.global_batch, step
            tokens, flops = sequences * config.seqlen / seconds, sequences * work / seconds / gpus
            _say(
                f"step {step:6d} of {config.steps}  loss {loss:.4f}  gradient {norm:.3f}  "
                f"{tokens:,.0f} tokens/s  {flops / 1e12:.1f} TFLOP/s a GPU"
            )
        if step % config.eval_interval == 0 or step == config.steps:
            _say(f"step {step:6d}  validation loss {trainer.evaluate().item():.4f}")
            start = time.perf_counter()
        if config.minutes is not None and time.monotonic() - begun > 60 * config.minutes:
            stop.fill_(1)
        dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        stopped = bool(stop.item())
        if step % config.save_interval == 0 or step == config.steps or stopped:
            trainer.save()
            start = time.perf_counter()
        if stopped and step < config.steps:
            _say(f"stopped at step {step}; run the same command to go on")
            return
    _say(f"finished {config.steps} steps; checkpoint in {config.out}")


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Read the command line, and train with the processes that torchrun started."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    options = parser.instantiate(parser.parse_args()).as_dict()
    options.pop("config", None)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's order of kernels
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        train(Config(**options))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
