"""Training on a sequence in parts, one after the other, with the activations of one."""

import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mamba2_dist.kernels.common.checks import check_integer, check_positive
from mamba2_dist.modules.mixer import Mamba2Cache

from .hybrid_model import Memory


def backward_in_parts(loss: Callable[[int, Memory], Tensor], parts: int, memory: Memory) -> Tensor:
    """Gradients of the sum of the losses of a sequence's parts, each of which begins with the states that the one
    before left; returns this rank's share of the sum.

    The gradients are those of the whole sequence. Activations are those of one part: a first pass keeps only the states
    between parts, then each part is run again and differentiated, from the last back. That is one more forward pass of
    all parts but the last.

    loss: gives part `index`'s loss, a scalar, from what its rows carry, which it hands to the model, as in
        `model(tokens, labels, table, memory).sum()` with a table of `rows_between`. It is called without gradients for
        all parts but the last, then with, from the last part to part 0, and must give the same both times. DDP should
        sum gradients over ranks with part 0 only; FSDP with every part, or it keeps the whole model's.
    memory: before the first part, as from `HybridModel.new_memory`; its caches are replaced, without gradient.
    Raises ValueError without parts, for a loss that is no scalar, when one leaves its memory as it was, and under
    `torch.no_grad`.
    """
    check_integer("parts", parts)
    check_positive("parts", parts)
    if not isinstance(memory, list):
        raise ValueError(f"memory must be a list, as HybridModel.new_memory gives, got {type(memory).__name__}")
    if not torch.is_grad_enabled():
        raise ValueError("backward_in_parts makes gradients, which are switched off; call it outside torch.no_grad")
    entering = [_leaves(memory)]
    with torch.no_grad():
        for index in range(parts - 1):
            left = _leaves(entering[-1])
            _check_scalar(loss(index, left), index)
            entering.append(_leaves(left))
    total, d_left = None, None
    for index in reversed(range(parts)):
        leaves = entering.pop()
        left = [None if cache is None else Mamba2Cache(cache.conv, cache.ssm) for cache in leaves]
        value = loss(index, left)
        _check_scalar(value, index)
        if all(map(operator.is_, _tensors(left), _tensors(leaves))):
            raise ValueError(
                f"the loss of part {index} left its memory as it was; hand it to a model with Mamba-2 layers"
            )
        if d_left is None:
            memory[:] = _apart(left)
            value.backward()
        else:
            ends = [(tensor, grad) for tensor, grad in zip(_tensors(left), d_left, strict=True) if grad is not None]
            torch.autograd.backward([value, *(tensor for tensor, _ in ends)], [None, *(grad for _, grad in ends)])
        d_left = [tensor.grad for tensor in _tensors(leaves)]
        total = value.detach() if total is None else total + value.detach()
    assert total is not None
    return total


def _check_scalar(loss: Tensor, index: int) -> None:
    if loss.ndim:
        raise ValueError(f"the loss of part {index} must be a scalar, got shape {tuple(loss.shape)}; sum it")


def _apart(memory: Memory) -> Memory:
    """The same tensors without their graph, in caches of their own."""
    return [None if cache is None else Mamba2Cache(cache.conv.detach(), cache.ssm.detach()) for cache in memory]


def _leaves(memory: Memory) -> Memory:
    """The same, where a graph may begin."""
    leaves = _apart(memory)
    for tensor in _tensors(leaves):
        tensor.requires_grad_()
    return leaves


def _tensors(memory: Memory) -> Iterator[Tensor]:
    for cache in memory:
        if cache is not None:
            yield from (cache.conv, cache.ssm)
