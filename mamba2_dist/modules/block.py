"""The pre-norm residual block around any mixer, and the stack that a pattern describes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mamba2_dist.config import HybridConfig
from mamba2_dist.parallel.attention import AttentionMethod
from mamba2_dist.parallel.groups import ParallelGroups
from mamba2_dist.parallel.segments import SegmentTable
from mamba2_dist.parallel.state_scan import StateScan

from .attention import Attention
from .mixer import Mamba2Cache, Mamba2Mixer
from .mlp import MLP
from .norm import RMSNorm
from .recompute import Recompute


class Block(nn.Module):
    """x + mixer(norm(x)), its sum left to the next norm, which reads x in any case."""

    mixer: Mamba2Mixer | Attention | MLP

    def __init__(self, norm: RMSNorm, mixer: Mamba2Mixer | Attention | MLP):
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(
        self, x: Tensor, update: Tensor | None, segments: SegmentTable, memory: Mamba2Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and what is to be added to it, (batch, seqlen/cp, d_model) each -> their sum and its own update."""
        normed, x = self.norm(x, update)
        return x, self.mixer(normed, segments) if memory is None else self.mixer(normed, segments, memory)

    def new_memory(self, batch: int) -> Mamba2Cache | None:
        """What rows carry to the next batch, before the first; None: a mixer without state carries nothing."""
        return self.mixer.new_cache(batch) if isinstance(self.mixer, Mamba2Mixer) else None

    def step(self, x: Tensor, cache: Any) -> Tensor:
        """One token, (batch, 1, d_model) -> the same; `cache` is the mixer's."""
        return x + self.mixer.step(self.norm(x)[0], cache)


def hybrid_layers(
    config: HybridConfig,
    groups: ParallelGroups,
    *,
    sequence_parallel: bool = False,
    state_scan: StateScan = "auto",
    attention: AttentionMethod = "auto",
    recompute: Recompute = "none",
    compiled: bool = False,
    **factory,
) -> nn.ModuleList:
    """The blocks of `config.pattern`, parameters allocated but not drawn."""
    shared = {"sequence_parallel": sequence_parallel, "residual_layers": len(config.pattern), **factory}
    makers: dict[str, Callable[[], Mamba2Mixer | Attention | MLP]] = {
        "M": lambda: Mamba2Mixer(
            config.mamba,
            config.d_model,
            groups,
            state_scan=state_scan,
            recompute=recompute,
            norm_eps=config.norm_eps,
            seed=None,
            **shared,
        ),
        "*": lambda: Attention(config.attention, config.d_model, groups, method=attention, **shared),
        "-": lambda: MLP(config.mlp, config.d_model, groups, compiled=compiled, **shared),
    }
    return nn.ModuleList(
        Block(
            RMSNorm(config.d_model, config.norm_eps, groups.tp, sequence_parallel=sequence_parallel, **factory),
            makers[letter](),
        )
        for letter in config.pattern
    )
