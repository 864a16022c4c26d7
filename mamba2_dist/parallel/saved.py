"""What autograd keeps in the place of a tensor that it saves for the backward pass: calls that give the tensor."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Recipe:
    """Makes its tensors at the first call of a backward pass and lets go of them at the last, or as one is overwritten.

    overwritten: whether autograd's functions may write over what they get.
    """

    def __init__(self, make: Callable[[], Sequence[Tensor]], overwritten: bool = False):
        self.make, self.overwritten, self.readers, self.left = make, overwritten, 0, 0
        self.made: Sequence[Tensor] = ()

    def take(self, index: int, may_write: bool) -> Tensor:
        if not self.made:
            with torch.no_grad():
                self.made, self.left = self.make(), self.readers
        tensor = self.made[index]
        self.left -= 1
        if self.left == 0 or (may_write and self.overwritten):
            self.made = ()
        return tensor


class Again:
    """Stands for a tensor, or a view of it, that will be made again.

    may_write: whether it is autograd that reads it.
    """

    def __init__(self, recipe: Recipe, index: int, like: Tensor, may_write: bool = True):
        self.recipe, self.index, self.may_write = recipe, index, may_write
        self.view = (like.shape, like.stride(), like.storage_offset())
        recipe.readers += 1

    def __call__(self) -> Tensor:
        return self.recipe.take(self.index, self.may_write).as_strided(*self.view)


class Saved:
    """A tensor as autograd keeps it where there are no hooks: without its graph, and it must not change meanwhile."""

    def __init__(self, tensor: Tensor):
        # a result with the graph that this is kept in would keep both until a garbage collection
        self.tensor, self.version = tensor.detach(), tensor._version

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was modified by an inplace "
                f"operation: it is at version {self.tensor._version}, expected {self.version}"
            )
        return self.tensor
