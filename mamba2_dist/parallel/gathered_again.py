"""What was gathered for the forward pass is gathered again for the backward pass, and not kept between the two."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .collectives import all_gather, gather_over
from .groups import Group

Hook = Callable[[Any], Any]


class _Rows:
    """Gathers again at the first call of a backward pass, lets go at the last."""

    def __init__(self, local: Any, give: Hook, group: Group):
        self.local, self.give, self.group = local, give, group
        self.readers = self.left = 0
        self.whole: Tensor | None = None

    def take(self) -> Tensor:
        whole = self.whole
        if whole is None:
            whole, self.left = gather_over(self.give(self.local), self.group).flatten(0, 1), self.readers
        self.left -= 1
        self.whole = whole if self.left else None
        return whole


class _View:
    """Stands for a view of gathered rows."""

    def __init__(self, rows: _Rows, like: Tensor):
        self.rows, self.view = rows, (like.shape, like.stride(), like.storage_offset())
        rows.readers += 1

    def __call__(self) -> Tensor:
        return self.rows.take().as_strided(*self.view)


def all_gather_again(local: Tensor, group: Group) -> tuple[Tensor, torch.autograd.graph.saved_tensors_hooks]:
    """Every rank's equal `local` joined along axis 0, and a context in which autograd keeps `local` in the place of
    what it saves of that.

    The backward pass then makes one all-gather more; every rank of `group` must save some of it, or none. Whatever
    else is saved goes to the hooks for saved tensors around this one.
    """
    gathered = all_gather(local, group, dim=0)
    keep_around, give_around = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_same, _same)
    address = gathered.untyped_storage().data_ptr()
    rows: _Rows | None = None

    def keep(tensor: Tensor) -> Any:
        nonlocal rows
        # what a compiler traces with has no memory
        if type(tensor) is not Tensor or tensor.untyped_storage().data_ptr() != address or not tensor.numel():
            return keep_around(tensor)
        rows = rows or _Rows(keep_around(local.detach()), give_around, group)
        return _View(rows, tensor)

    def give(kept: Any) -> Tensor:
        return kept() if isinstance(kept, _View) else give_around(kept)

    return gathered, torch.autograd.graph.saved_tensors_hooks(keep, give)


def _same(tensor: Tensor) -> Tensor:
    return tensor
