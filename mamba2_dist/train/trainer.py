"""A training run from a configuration: made, resumed, finished."""

import gzip
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mamba2_dist.kernels.common.transfer import to_device
from mamba2_dist.models.hybrid_model import HybridModel, Memory, check_split
from mamba2_dist.models.parts import backward_in_parts
from mamba2_dist.modules.linear import cast_once
from mamba2_dist.parallel.collectives import sum_over
from mamba2_dist.parallel.cost_model import H200
from mamba2_dist.parallel.groups import ParallelGroups
from mamba2_dist.parallel.segments import SegmentTable, rows_between
from mamba2_dist.parallel.state_scan import chosen

from . import data
from .checkpoint import Checkpoints, Progress, check_identity, newest
from .config import TrainConfig
from .machine import load_machine
from .metrics import attention_flops, flops_per_token, peak_flops
from .optimizer import clip_gradients, gradient_norm, learning_rate, make_optimizer
from .report import Report
from .runtime import exclusive, process_group, use_gpus
from .step_model import choose_layout
from .whole import Slice, memory_slices


def train(config: TrainConfig) -> Path:
    """Train until `config.steps`, from the newest checkpoint if there is one; gives the run's folder.

    Every process of the run calls it. Raises ValueError for what the user can mend.
    """
    folder = Path(config.out)
    with process_group(config.device) as device, exclusive(folder) if dist.get_rank() == 0 else nullcontext():
        Trainer(config, folder, device).run()
    return folder


def check(config: TrainConfig) -> None:
    """Raise ValueError for what can be refused before any process starts: the split, the data, the checkpoint.

    Prepares the data on the way, so that the processes find it ready.
    """
    parallel, model = config.parallel, config.architecture
    config.share(parallel.dp or 1)
    on_gpu = use_gpus(config.device, parallel.processes)
    if parallel.state_scan == "symmetric_memory" and parallel.cp > 1 and not on_gpu:
        raise ValueError("parallel.state_scan (symmetric_memory) needs GPUs; set it to auto, or use device=cuda")
    check_split(model, parallel)
    if config.machine is not None:
        load_machine(Path(config.machine))
    folder = data.prepare(config.data, model.vocab_size)
    identity = _identity(config, data.load(folder, config.data.seqlen))
    checkpoint = newest(Path(config.out) / "checkpoints")
    if checkpoint is not None:
        check_identity(checkpoint, identity)


def _identity(config: TrainConfig, corpus: data.Corpus) -> dict:
    """What a checkpoint must share with a run: the model, and what the order of the data depends on."""
    order = {"tokens": corpus.digest, "seqlen": config.data.seqlen, "seed": config.seed, "carry": config.data.carry}
    if config.data.carry != "nothing":
        order["global_batch"] = config.global_batch  # rows read on where they stopped
    return {"model": asdict(config.architecture), "data": order}


Part = tuple[Tensor, Tensor, SegmentTable]
"""Tokens, labels and their cut; a micro-batch is trained in one or several."""


@dataclass(frozen=True)
class Batch:
    """What one update reads on this rank: the parts of each micro-batch, and how many labels of its dp rank count."""

    micro_batches: list[list[Part]]
    counted: int


class Trainer:
    """The parts of a run on this process."""

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device):
        parallel = config.parallel
        machine = H200 if config.machine is None else load_machine(Path(config.machine))
        self.groups = ParallelGroups(
            parallel.tp, parallel.cp, 1, parallel.dp, device_type=device.type, machine=machine
        )  # fmt: skip
        self.config = choose_layout(config.on(self.groups.dp.size), self.groups.cp.machine)
        parallel, self.folder, self.device = self.config.parallel, folder, device
        self.first = dist.get_rank() == 0
        self.share, self.micro = self.config.share(self.groups.dp.size)
        self.corpus_folder = self._prepare_data()
        self.corpus = data.load(self.corpus_folder, config.data.seqlen)
        model = HybridModel(
            config.architecture, self.groups, parallel,
            recompute=config.recompute, compiled=config.compile, seed=config.seed, device=device,
        )  # fmt: skip
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.carries = config.data.carry == "documents"
        # by micro-batch: each has rows of its own
        count = self.share // self.micro
        self.memory = [model.new_memory(self.micro) if self.carries else None for _ in range(count)]
        self.bare, self.model = model, self._wrap(model)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep, device)
        self.identity = _identity(config, self.corpus)
        self.progress = self.checkpoints.load(self.model, self.optimizer, self.identity, self._memory_slices())
        self.upcoming: Batch | None = None
        self.report = Report(config, folder, speaks=self.first)

    def run(self) -> None:
        """Update until the last step, with validations and checkpoints on the way."""
        config, report = self.config, self.report
        if self.progress.step >= config.steps:
            report.already_finished(self.progress.step, self.checkpoints.path(self.progress.step))
            return
        if self.first:
            self._describe_run()
        validation = self._validation_batches()
        gzip_bits = self._gzip_bits() if self.first else 0.0
        report.begin(self._facts(), self.progress)
        if self.progress.step == 0:
            row = {"step": 0, **self._validate(validation)}
            report.updated(row)
            report.validated(row, gzip_bits)
        while self.progress.step < config.steps:
            row = self._update()
            step, done = self.progress.step, self.progress.step == config.steps
            if step % config.validate_every == 0 or done:
                row |= self._validate(validation)
            report.updated(row)
            if "validation" in row:
                report.validated(row, gzip_bits)
            if step % config.save_every == 0 or done:
                self.checkpoints.save(self.model, self.optimizer, self.progress, self.identity, self._memory_slices())
        report.end(self.checkpoints.path(self.progress.step))

    def _describe_run(self) -> None:
        """Keep beside the checkpoints what `sample` needs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "tokenizer.json": (self.corpus_folder / "tokenizer.json").read_text(),
            "config.json": json.dumps(asdict(self.config), indent=1),
        }
        for name, content in contents.items():
            partial = self.folder / f"{name}.partial"
            partial.write_text(content)
            os.replace(partial, self.folder / name)

    def _facts(self) -> list[str]:
        parallel, train = self.config.parallel, self.corpus.train
        return [
            f"model {self.config.architecture.pattern}, {self.parameters / 1e6:.2f}M parameters on this rank",
            f"split tp {parallel.tp} cp {parallel.cp} ({self._travel()}) dp {parallel.dp} on {self.device.type}, "
            f"{self.config.precision}, recompute {self.config.recompute}{', compiled' * self.config.compile}",
            f"data {self.config.data.source}: {len(train.tokens):,} tokens in {len(train.ends):,} documents, "
            f"{train.windows:,} windows of {train.seqlen}{', states carried' * self.carries}",
        ]

    def _travel(self) -> str:
        """The layout, and what "auto" stands for."""
        parallel, model = self.config.parallel, self.config.architecture
        if parallel.cp == 1 or "M" not in model.pattern or parallel.state_scan != "auto":
            return parallel.layout
        nheads = model.mamba.nheads(model.d_model) // parallel.tp
        state_bytes = 4 * self.micro * nheads * model.mamba.headdim * model.mamba.d_state
        backend = chosen(self.groups.states, 2 if parallel.layout == "zigzag" else 1, state_bytes)
        return f"{parallel.layout}, states by {backend}"

    def _prepare_data(self) -> Path:
        """The folder of tokens, written by the first process and read by all."""
        vocab_size = self.config.architecture.vocab_size
        waiting = dist.new_group(backend="gloo", timeout=timedelta(days=30))  # a large corpus takes hours
        if self.first:
            data.prepare(self.config.data, vocab_size)
        dist.barrier(waiting)
        dist.destroy_process_group(waiting)
        return data.prepare(self.config.data, vocab_size)

    def _wrap(self, model: HybridModel) -> nn.Module:
        """Share parameters and gradients over the data group."""
        self.sharded = False
        if self.groups.data.size == 1:
            return model
        if self.config.parallel.sharding == "ddp":
            # without the search DDP regroups its buckets after the first backward, and a resumed run would sum the
            # gradients of its first update in another order than the unbroken one
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            return DistributedDataParallel(model, process_group=self.groups.data.handle, find_unused_parameters=True)
        self.sharded = True
        for layer in model.backbone.layers:
            fully_shard(layer, mesh=self.groups.data_mesh)
        fully_shard(model, mesh=self.groups.data_mesh)
        return model

    def _update(self) -> dict:
        """One optimizer step on the next global batch; the numbers of the step."""
        started, config = time.perf_counter(), self.config
        step = self.progress.step
        batch, self.upcoming = self.upcoming or self._batch(self.progress.samples), None
        counted = sum_over(torch.tensor([batch.counted], device=self.device), self.groups.dp)
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        # under FSDP weights come and go between uses
        with nullcontext() if self.sharded else cast_once():
            for index, parts in enumerate(batch.micro_batches):
                last = index + 1 == len(batch.micro_batches)
                # the data group averages gradients where their sum is meant
                total += self._backward(parts, self.memory[index], self.groups.data.size / counted[0], last)
        if step + 1 < config.steps:
            # made while the device is at work
            self.upcoming = self._batch(self.progress.samples + config.global_batch)
        norm = gradient_norm(self.model, self.groups, sharded=self.sharded)
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient's norm is {float(norm)} at update {step + 1}; nothing was changed, the last checkpoint "
                "stands: lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data"
            )
        clip_gradients(self.model, norm, config.optimizer.clip)
        lr = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum_over(total, self.groups.data).item() / self.groups.data.size
        self.progress = Progress(step + 1, self.progress.samples + config.global_batch)
        return {"step": step + 1, "loss": loss, "norm": norm.item(), "lr": lr, **self._speed(started, batch)}

    def _backward(self, parts: list[Part], memory: Memory | None, scale: Tensor, last: bool) -> Tensor:
        """Add the gradients of a micro-batch, over ranks too if it is the last; its loss, times `scale`."""

        def loss(index: int, memory: Memory | None) -> Tensor:
            # the first part's gradients come last; FSDP keeps those of the whole model until it has summed them
            with self._gradient_sync((last and index == 0) or (self.sharded and len(parts) > 1)):
                return self._losses(*parts[index], memory).sum() * scale

        if len(parts) > 1:
            return backward_in_parts(loss, len(parts), memory or self.bare.new_memory(self.micro))
        value = loss(0, memory)
        value.backward()
        return value.detach()

    def _training_windows(self, samples: int) -> list[data.Window]:
        """This dp rank's windows of the global batch after `samples` windows."""
        first, train = samples + self.groups.dp.rank * self.share, self.corpus.train
        if self.carries:
            return [train.consecutive(first + i, self.config.global_batch) for i in range(self.share)]
        return [train.ordered(first + i, self.config.seed) for i in range(self.share)]

    def _memory_slices(self) -> Iterator[Slice]:
        """What this rank holds of what the rows of the global batch carry."""
        first = self.groups.dp.rank * self.share
        for index, memory in enumerate(self.memory):
            if memory is not None:
                row = first + index * self.micro
                yield from memory_slices(self.bare, memory, row, self.config.global_batch)

    def _batch(self, samples: int) -> Batch:
        """This rank's part of the global batch after `samples` windows."""
        windows = self._training_windows(samples)
        begins = range(0, self.share, self.micro)
        return Batch(
            [self._local(windows[begin : begin + self.micro]) for begin in begins],
            sum(int((window.labels >= 0).sum()) for window in windows),
        )

    def _local(self, windows: list[data.Window]) -> list[Part]:
        """This rank's share of the parts of whole windows."""
        tokens, labels, documents = data.stack(windows)
        cut = getattr(SegmentTable, self.config.parallel.layout)
        continues, cp = [window.continues for window in windows], self.groups.cp
        edges = [tokens.shape[1] * part // self.config.parts for part in range(self.config.parts + 1)]
        parts = []
        for start, end in itertools.pairwise(edges):
            within = rows_between(documents, start, end)
            if start == 0:
                within["carried"] = continues
            table = cut(end - start, cp.size, **within)
            mine = (table.shard(tensor[:, start:end], cp.rank) for tensor in (tokens, labels))
            parts.append((*(to_device(tensor, self.device) for tensor in mine), table))
        return parts

    def _losses(self, tokens: Tensor, labels: Tensor, table: SegmentTable, memory: Memory | None = None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(tokens, labels, table, memory)

    @contextmanager
    def _gradient_sync(self, now: bool):
        """Sum gradients over the data group with the last micro-batch only."""
        if isinstance(self.model, DistributedDataParallel):
            with nullcontext() if now else self.model.no_sync():
                yield
            return
        if self.sharded:
            cast(FSDPModule, self.model).set_requires_gradient_sync(now)
        yield

    def _speed(self, started: float, batch: Batch) -> dict:
        """Tokens per second of the whole run and, where the device's peak is known, the share of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        tokens = self.config.global_batch * self.config.data.seqlen
        speed = {"tokens_per_s": tokens / seconds}
        peak = peak_flops(self.device)
        if peak is not None:
            model = self.config.architecture
            # this replica's documents stand for all; backward costs twice forward
            documents = [row for parts in batch.micro_batches for _, _, table in parts for row in table.documents]
            share = attention_flops(model, documents) * self.groups.dp.size
            work = 3 * (tokens * flops_per_token(model) + share)
            speed["mfu"] = work / seconds / (peak * dist.get_world_size())
        return speed

    def _validation_windows(self) -> list[data.Window]:
        """Windows from all over the validation split."""
        split = self.corpus.validation
        count = min(self.config.validation_windows, split.windows)
        return [split.window(i * split.windows // count) for i in range(count)]

    def _validation_batches(self) -> list[list[data.Window]]:
        """This dp rank's validation windows, as many batches on every rank; missing ones count nothing."""
        dp, windows = self.groups.dp, self._validation_windows()
        round_size = dp.size * self.micro
        missing = -len(windows) % round_size
        blank = data.Window(windows[0].tokens, windows[0].labels * 0 - 100, windows[0].documents)
        windows += [blank] * missing
        begins = range(dp.rank * self.micro, len(windows), round_size)
        return [windows[begin : begin + self.micro] for begin in begins]

    @torch.no_grad()
    def _validate(self, batches: list[list[data.Window]]) -> dict:
        """Nats per token and bits per byte over the validation windows."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for windows in batches:
            parts = self._local(windows)
            memory = self.bare.new_memory(self.micro) if len(parts) > 1 else None
            for part in parts:
                sums[0] += self._losses(*part, memory).sum()
            if self.groups.cp.rank == 0:
                for window in windows:
                    labels = window.labels[window.labels >= 0]
                    sums[1] += len(labels)
                    sums[2] += int(self.corpus.token_bytes[labels].sum())
        if self.sharded:
            cast(FSDPModule, self.model).reshard()  # without a backward the root's parameters would stay whole
        nats, tokens, size = sum_over(sums, self.groups.data).tolist()
        return {"validation": nats / tokens, "bits_per_byte": nats / math.log(2) / size}

    def _gzip_bits(self) -> float:
        """Bits per byte that gzip needs for the text of the validation windows."""
        windows = self._validation_windows()
        text = b"".join(self.corpus.text_bytes(window.labels[window.labels >= 0]) for window in windows)
        return 8 * len(gzip.compress(text, 9)) / max(len(text), 1)
