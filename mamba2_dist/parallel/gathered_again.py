"""What was gathered for the forward pass is gathered again for the backward pass, and not kept between the two."""

from typing import Any

import torch
from torch import Tensor

from .collectives import all_gather, gather_over
from .groups import Group
from .saved import Again, Recipe, Saved


def all_gather_again(local: Tensor, group: Group) -> tuple[Tensor, torch.autograd.graph.saved_tensors_hooks]:
    """Every rank's equal `local` joined along axis 0, and a context in which autograd keeps `local` in the place of
    what it saves of that.

    The backward pass then makes one all-gather more; every rank of `group` must save some of it, or none. Whatever
    else is saved goes to the hooks for saved tensors around this one.
    """
    gathered = all_gather(local, group, dim=0)
    keep_around, give_around = torch._C._autograd._top_saved_tensors_default_hooks(False) or (Saved, Saved.__call__)
    address = gathered.untyped_storage().data_ptr()
    recipe: Recipe | None = None

    def keep(tensor: Tensor) -> Any:
        nonlocal recipe
        # what a compiler traces with has no memory
        if type(tensor) is not Tensor or tensor.untyped_storage().data_ptr() != address or not tensor.numel():
            return keep_around(tensor)
        if recipe is None:
            kept = keep_around(local.detach())
            recipe = Recipe(lambda: [gather_over(give_around(kept), group).flatten(0, 1)])
        return Again(recipe, 0, tensor)

    def give(kept: Any) -> Tensor:
        return kept() if isinstance(kept, Again) else give_around(kept)

    return gathered, torch.autograd.graph.saved_tensors_hooks(keep, give)
