"""Cross entropy over a vocabulary split across ranks."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import max_over, sum_over
from .groups import Group

IGNORED = -100


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        first = group.rank * logits.shape[-1]
        here = (labels >= first) & (labels < first + logits.shape[-1])
        index = torch.where(here, labels - first, 0)[..., None]
        highest = max_over(wide.amax(-1), group)
        weights = (wide - highest[..., None]).exp()
        target = torch.where(here, wide.gather(-1, index)[..., 0] - highest, 0.0)
        total, target = sum_over(torch.stack([weights.sum(-1), target]), group)
        counted = labels != IGNORED
        ctx.save_for_backward(weights.div_(total[..., None]), index, here, counted)
        ctx.dtype = logits.dtype
        return torch.where(counted, total.log() - target, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        probabilities, index, here, counted = ctx.saved_tensors
        d_logits = probabilities.scatter_add(-1, index, -here[..., None].to(probabilities.dtype))
        return (d_logits * torch.where(counted, grad, 0.0)[..., None]).to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Group) -> Tensor:
    """-log softmax(logits)[label] per token, 0 where the label is -100; two all-reduces over `group`.

    logits: (..., vocab_size/tp), labels: (...) in the whole vocabulary; the result is float32 or wider.
    """
    return _CrossEntropy.apply(logits, labels, group)
