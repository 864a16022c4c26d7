"""Training on a sequence in parts, one after the other, in the memory of one."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mamba2_dist.kernels.common.checks import check_positive
from mamba2_dist.modules.mixer import Mamba2Cache

from .hybrid_model import Memory


def backward_in_parts(loss: Callable[[int, Memory], Tensor], parts: int, memory: Memory) -> Tensor:
    """Gradients of the sum of the losses of a sequence's parts, each of which begins with the states that the one
    before left; returns the sum.

    The gradients are those of the whole sequence. Activations are those of one part: a first pass keeps only the states
    between parts, then each part is run again and differentiated, from the last back. That is one more forward pass of
    all parts but the last.

    loss: gives part `index`'s loss, a scalar, from what its rows carry, which it brings up to date, as in
        `model(tokens, labels, table, memory).sum()`; called first without gradients, then with.
    memory: before the first part, as from `HybridModel.new_memory`; brought up to date, without gradient.
    The model must have no attention, which would see a part's own tokens only.
    Raises ValueError without parts.
    """
    check_positive("parts", parts)
    entering = [_copy(memory)]
    with torch.no_grad():
        for index in range(parts - 1):
            entering.append(_copy(entering[-1]))
            loss(index, entering[-1])
    total, d_left = None, None
    for index in reversed(range(parts)):
        leaves = entering.pop()
        for tensor in _tensors(leaves):
            tensor.requires_grad_()
        left = [None if cache is None else Mamba2Cache(cache.conv, cache.ssm) for cache in leaves]
        value = loss(index, left)
        if d_left is None:
            memory[:] = _copy(left)
            value.backward()
        else:
            ends = [(tensor, grad) for tensor, grad in zip(_tensors(left), d_left, strict=True) if grad is not None]
            torch.autograd.backward([value, *(tensor for tensor, _ in ends)], [None, *(grad for _, grad in ends)])
        d_left = [tensor.grad for tensor in _tensors(leaves)]
        total = value.detach() if total is None else total + value.detach()
    assert total is not None
    return total


def _copy(memory: Memory) -> Memory:
    """The same tensors without their graph, in a memory of its own."""
    return [None if cache is None else Mamba2Cache(cache.conv.detach(), cache.ssm.detach()) for cache in memory]


def _tensors(memory: Memory) -> Iterator[Tensor]:
    for cache in memory:
        if cache is not None:
            yield from (cache.conv, cache.ssm)
