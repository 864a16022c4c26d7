"""Token embedding and output head over a vocabulary split across ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2_dist.parallel.collectives import all_gather, gather_over, reduce, reduce_scatter, replicate
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.partition import Partition, split

from . import init
from .base import PartitionedModule
from .linear import linear


class VocabParallelEmbedding(PartitionedModule):
    """Each tp rank holds a run of the vocabulary. Raises ValueError when tp does not divide it."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, d_model: int, tp: Group, *, sequence_parallel: bool = False, **factory):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        rows = split("", "vocab_size", vocab_size, tp.size, tp.rank)
        self.first, self.count = rows.start, rows.length
        self.add_parameter("weight", Partition((rows,)), init.normal(0.02), (d_model,), **factory)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, seqlen/cp) -> (batch, seqlen/cp, d_model); with sequence_parallel (batch, seqlen/cp/tp, d_model)."""
        here = (tokens >= self.first) & (tokens < self.first + self.count)
        embedded = F.embedding(torch.where(here, tokens - self.first, 0), self.weight)
        partial = torch.where(here[..., None], embedded, 0.0)
        return reduce_scatter(partial, self.tp, dim=1) if self.sequence_parallel else reduce(partial, self.tp)


class VocabParallelHead(PartitionedModule):
    """Logits of this rank's run of the vocabulary."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, d_model: int, tp: Group, *, sequence_parallel: bool = False, **factory):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        rows = Partition((split("", "vocab_size", vocab_size, tp.size, tp.rank),))
        self.add_parameter("weight", rows, init.normal(0.02), (d_model,), **factory)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, seqlen/cp, d_model) -> (batch, seqlen/cp, vocab_size/tp)."""
        return vocab_parallel_logits(u, self.weight, self.tp, sequence_parallel=self.sequence_parallel)


def vocab_parallel_logits(u: Tensor, weight: Tensor, tp: Group, *, sequence_parallel: bool) -> Tensor:
    """u W^T with W's rows split over `tp`; with sequence_parallel u's tokens are gathered over it first."""
    u = all_gather(u, tp, dim=1) if sequence_parallel else replicate(u, tp)
    return linear(u, weight)


def gather_vocabulary(logits: Tensor, tp: Group) -> Tensor:
    """(vocab_size/tp,) -> (vocab_size,), outside autograd."""
    return gather_over(logits, tp).flatten()
