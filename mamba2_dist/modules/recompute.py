"""Tensors that the backward pass makes again instead of keeping them.

Autograd keeps what it saves for the backward pass; here it keeps recipes. A recipe calls local operators on tensors
that are kept, and never communicates: what came from other ranks is among those that are kept.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from mamba2_dist.kernels.common.checks import check_choice
from mamba2_dist.parallel.saved import Again, Recipe, Saved

Recompute = Literal["none", "conv", "inner"]


def check_recompute(recompute: str, pattern: str) -> None:
    """Raise ValueError unless layers of `pattern` can do it."""
    check_choice("recompute", recompute, get_args(Recompute))
    if recompute != "none" and "M" not in pattern:
        raise ValueError(f"recompute ({recompute}) is for Mamba-2 layers, and the pattern has none; leave it at none")


def check_runs_once(what: str) -> None:
    """Raise ValueError where a layer may be run again, with what is true once only: inside hooks for saved tensors, and
    in a backward pass, as a reentrant checkpoint does."""
    if _inside_hooks() or torch._C._current_graph_task_id() != -1:
        raise ValueError(
            f"{what} must not be given inside torch.utils.checkpoint and other hooks for saved tensors; use recompute"
        )


def _inside_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Forgetful(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context autograd saves recipes in the place of the tensors that have one.

    Raises ValueError inside other hooks for saved tensors, which would have no effect.
    """

    def __init__(self):
        super().__init__(self._keep, lambda kept: kept())
        self.known: dict[int, tuple[Recipe, int]] = {}

    def __enter__(self) -> "Forgetful":  # type: ignore[override]
        if _inside_hooks():
            raise ValueError(
                "recompute must be 'none' inside torch.utils.checkpoint, save_on_cpu and other hooks for saved tensors"
            )
        super().__enter__()
        return self

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        # the hooks refer to this object and it to them: what else it holds must not wait for a garbage collection
        self.known.clear()

    def forget(
        self, tensors: Sequence[Tensor], make: Callable[[], Sequence[Tensor]], *, overwritten: bool = False
    ) -> None:
        """Autograd shall not save these tensors, each of which has memory of its own: `make` gives them again.

        overwritten: who gets one in the backward pass may write over it.
        """
        recipe = Recipe(make, overwritten)
        for index, tensor in enumerate(tensors):
            if tensor.numel():
                self.known[_memory(tensor)] = recipe, index

    def again(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What gives a forgotten tensor to another recipe."""
        return self._find(tensor, may_write=False) or (lambda: tensor)

    def _keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        return self._find(tensor, may_write=True) or Saved(tensor)

    def _find(self, tensor: Tensor, may_write: bool) -> Again | None:
        recipe, index = self.known.get(_memory(tensor), (None, 0)) if tensor.numel() else (None, 0)
        return None if recipe is None else Again(recipe, index, tensor, may_write)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
