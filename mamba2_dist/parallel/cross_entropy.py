"""Cross entropy over a vocabulary split across ranks."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import max_over, sum_over
from .groups import Group

IGNORED = -100
ROWS = 4096  # of logits at a time where wider copies of them are made


def _sum_of_weights(logits: Tensor, highest: Tensor) -> Tensor:
    """sum exp(logits - highest) of each row."""
    return (logits - highest[:, None]).exp().sum(-1)


def _gradient(logits: Tensor, log_total: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """(softmax(logits) - onehot(index)) grad, in the dtype of logits; an index that is negative is none's."""
    columns = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = (logits - log_total[:, None]).exp()
    return ((probabilities - (columns == index[:, None]).to(grad.dtype)) * grad[:, None]).to(logits.dtype)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _by_rows(function: Callable[..., Tensor], compiled: bool, logits: Tensor, *others: Tensor) -> Tensor:
    """function(logits, *others), a bounded number of rows at a time unless it is compiled and makes no copies."""
    if compiled:
        return _compiled(function)(logits, *others)
    runs = zip(*(tensor.split(ROWS) for tensor in (logits, *others)), strict=True)
    return torch.cat([function(*run) for run in runs])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, compiled):
        wide = torch.promote_types(logits.dtype, torch.float32)
        first = group.rank * logits.shape[-1]
        here = (labels >= first) & (labels < first + logits.shape[-1])
        index = torch.where(here, labels - first, -1)
        highest = max_over(logits.amax(-1).to(wide), group)
        target = logits.gather(-1, index.clamp(min=0)[:, None])[:, 0].to(wide) - highest
        total = _by_rows(_sum_of_weights, compiled, logits, highest)
        total, target = sum_over(torch.stack([total, torch.where(here, target, 0.0)]), group)
        log_total = total.log()
        counted = labels != IGNORED
        ctx.save_for_backward(logits, highest + log_total, index, counted)
        ctx.compiled = compiled
        return torch.where(counted, log_total - target, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, log_total, index, counted = ctx.saved_tensors
        d_logits = _by_rows(_gradient, ctx.compiled, logits, log_total, index, torch.where(counted, grad, 0.0))
        return d_logits, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Group, *, compiled: bool = False) -> Tensor:
    """-log softmax(logits)[label] per token, 0 where the label is -100; two all-reduces over `group`.

    logits: (..., vocab_size/tp), labels: (...) in the whole vocabulary; the result is float32 or wider. compiled: by
    torch.compile, which reads the logits twice and writes their gradient once.
    """
    return _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), group, compiled).view(labels.shape)
