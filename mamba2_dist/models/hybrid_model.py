"""The language model: embedding, hybrid stack, norm, head."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from mamba2_dist.config import HybridConfig, ParallelConfig
from mamba2_dist.kernels.common.checks import check_ndim
from mamba2_dist.modules.base import check_step, initialize
from mamba2_dist.modules.block import Block, hybrid_layers
from mamba2_dist.modules.embedding import VocabParallelEmbedding, VocabParallelHead, vocab_parallel_logits
from mamba2_dist.modules.mixer import Mamba2Cache, Mamba2Mixer
from mamba2_dist.modules.norm import RMSNorm
from mamba2_dist.modules.recompute import Recompute, check_recompute
from mamba2_dist.parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from mamba2_dist.parallel.groups import Group, ParallelGroups
from mamba2_dist.parallel.partition import Partition
from mamba2_dist.parallel.segments import SegmentTable

Memory = list[Mamba2Cache | None]
"""By layer, what rows carry from batch to batch."""


def check_split(config: HybridConfig, parallel: ParallelConfig, nodes: int = 1) -> None:
    """Raise ValueError unless the model can be split like this, with cp on so many nodes, as many ranks on each."""
    ranks = tuple(range(parallel.cp))
    part = Group("node", ranks[: parallel.cp // nodes]) if nodes > 1 else None
    groups = ParallelGroups.alone()
    groups.tp, groups.dp = Group("tp", tuple(range(parallel.tp))), Group("dp", tuple(range(parallel.dp or 1)))
    groups.cp, groups.states = (Group(name, ranks, node=part, nodes=nodes) for name in ("cp", "states"))
    HybridModel(config, groups, parallel, device="meta")


def _check_range(name: str, values: Tensor, not_below: Tensor, vocab_size: int) -> None:
    right, rule = not_below & (values < vocab_size), f"{name} must lie in [0, vocab_size = {vocab_size})"
    if values.device.type != "cpu":
        torch._assert_async(right.all(), rule)  # raised by the device, for which nothing waits
    elif not right.all():
        raise ValueError(f"{rule}, got {int(values[~right][0])}")


class Backbone(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(
        self,
        config: HybridConfig,
        groups: ParallelGroups,
        parallel: ParallelConfig,
        *,
        recompute: Recompute,
        compiled: bool,
        **factory,
    ):
        super().__init__()
        split = {"sequence_parallel": parallel.sequence_parallel, **factory}
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.d_model, groups.tp, **split)
        self.layers = hybrid_layers(
            config, groups, state_scan=parallel.state_scan, attention=parallel.attention,
            recompute=recompute, compiled=compiled, **split,
        )  # fmt: skip
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, groups.tp, **split)

    def blocks(self) -> Iterator[Block]:
        """The layers with their type."""
        return cast("Iterator[Block]", iter(self.layers))

    def forward(self, tokens: Tensor, segments: SegmentTable, memory: Memory | None = None) -> Tensor:
        """(batch, seqlen/cp) -> (batch, seqlen/cp, d_model)."""
        x, update = self.embedding(tokens), None
        remembered = [None] * len(self.layers) if memory is None else memory
        for layer, state in zip(self.blocks(), remembered, strict=True):
            x, update = layer(x, update, segments, state)
        return self.norm_f(x, update)[0]


class HybridModel(nn.Module):
    """A language model of Mamba-2, attention and MLP layers, split over `groups`.

    parallel: how it is split; its sizes must be those of `groups`. Its layout and sharding are for the trainer: here
    `segments` say how a sequence is cut, and who wraps the model how parameters are shared. recompute: what Mamba-2
    layers make again in the backward pass; see `Mamba2Mixer`. compiled: activations of MLPs and the loss by
    torch.compile. seed: parameters are drawn from it, the same model whatever the split. Raises ValueError when the
    model does not fit the split.
    """

    def __init__(
        self,
        config: HybridConfig,
        groups: ParallelGroups | None = None,
        parallel: ParallelConfig | None = None,
        *,
        recompute: Recompute = "none",
        compiled: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        groups = groups or ParallelGroups()
        parallel = parallel or ParallelConfig(tp=groups.tp.size, cp=groups.cp.size)
        for name, size in (("tp", groups.tp.size), ("cp", groups.cp.size), ("dp", groups.dp.size)):
            if getattr(parallel, name) not in (size, None):
                raise ValueError(f"parallel.{name} ({getattr(parallel, name)}) must equal the groups' {name} ({size})")
        if groups.pp.size > 1:
            raise ValueError(f"pp must be 1, got {groups.pp.size}; pipelines need a pipeline engine")
        check_recompute(recompute, config.pattern)
        self.config, self.groups, self.parallel, self.compiled = config, groups, parallel, compiled
        factory = {"device": device, "dtype": dtype}
        self.backbone = Backbone(config, groups, parallel, recompute=recompute, compiled=compiled, **factory)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = VocabParallelHead(
                config.vocab_size, config.d_model, groups.tp, sequence_parallel=parallel.sequence_parallel, **factory
            )
        if torch.device(device or "cpu").type != "meta":
            initialize(self, seed)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        segments: SegmentTable | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Logits, (batch, seqlen/cp, vocab_size/tp), or with `labels` the loss of each token, (batch, seqlen/cp).

        tokens: (batch, seqlen/cp); labels: the same, each token's successor, -100 where none is asked for.
        segments: how the sequence is cut over cp; None: rows of one document each, cp must be 1.
        memory: from `new_memory`; Mamba-2 layers' states at the end of the batch before, which enter the rows that
            segments say are carried. Brought up to date, with a gradient where what entered requires one. Attention
            sees the batch's tokens only.
        """
        if segments is None:
            if self.groups.cp.size > 1:
                raise ValueError(f"segments must be given when cp ({self.groups.cp.size}) is above 1")
            segments = SegmentTable.contiguous(tokens.shape[1], 1, batch=tokens.shape[0])
        self._check(tokens, labels, segments)
        if "*" in self.config.pattern and any(cache and cache.ssm.requires_grad for cache in memory or []):
            raise ValueError(
                f"memory must not require gradients when the pattern ({self.config.pattern}) has attention, which sees "
                "a batch's tokens only; detach it, or give all tokens in one batch"
            )
        logits = self._logits(self.backbone(tokens, segments, memory))
        if labels is None:
            return logits
        return vocab_parallel_cross_entropy(logits, labels, self.groups.tp, compiled=self.compiled)

    def new_memory(self, batch: int) -> Memory:
        """What every layer carries to the next batch, before the first."""
        return [layer.new_memory(batch) for layer in self.backbone.blocks()]

    def named_memory(self, memory: Memory) -> Iterator[tuple[str, Partition, Tensor]]:
        """(name, who owns what, tensor) of everything in a memory; axis 0 is the batch."""
        for index, (layer, state) in enumerate(zip(self.backbone.blocks(), memory, strict=True)):
            if isinstance(layer.mixer, Mamba2Mixer):
                for name, partition in layer.mixer.cache_partitions().items():
                    yield f"backbone.layers.{index}.mixer.{name}", partition, getattr(state, name)

    def new_cache(self, batch: int) -> list:
        """Every layer's memory before the first token."""
        return [layer.mixer.new_cache(batch) for layer in self.backbone.blocks()]

    def step(self, tokens: Tensor, cache: list) -> Tensor:
        """Logits after one more token, (batch, 1) -> (batch, 1, vocab_size/tp); `cache` is brought up to date."""
        check_step("tokens", tokens, "(batch, 1)", self.groups.cp, self.parallel.sequence_parallel)
        x = self.backbone.embedding(tokens)
        for layer, memory in zip(self.backbone.blocks(), cache, strict=True):
            x = layer.step(x, memory)
        return self._logits(self.backbone.norm_f(x)[0])

    def _logits(self, x: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(x)
        weight, tp = self.backbone.embedding.weight, self.groups.tp
        return vocab_parallel_logits(x, weight, tp, sequence_parallel=self.parallel.sequence_parallel)

    def _check(self, tokens: Tensor, labels: Tensor | None, segments: SegmentTable) -> None:
        cp, tp, vocab_size = self.groups.cp, self.groups.tp, self.config.vocab_size
        check_ndim("tokens", tokens, "(batch, seqlen/cp)")
        segments.check("tokens", tokens, cp.rank, cp.size)
        if labels is not None and labels.shape != tokens.shape:
            raise ValueError(f"labels must have the shape of tokens {tuple(tokens.shape)}, got {tuple(labels.shape)}")
        _check_range("tokens", tokens, tokens >= 0, vocab_size)
        if labels is not None:
            _check_range("labels", labels, (labels >= 0) | (labels == IGNORED), vocab_size)
        if self.parallel.sequence_parallel and tokens.shape[1] % tp.size != 0:
            raise ValueError(
                f"tokens of a cp rank ({tokens.shape[1]}) must be divisible by tp ({tp.size}) for sequence_parallel"
            )
