"""Megatron's distributed optimizer: checkpoints made right where those of megatron-core 0.16 to 0.19 are not, and
torch's AdamW made fast."""

from typing import Any

import torch
from torch import Tensor


def prepare_optimizer(optimizer: Any) -> None:
    """Let Megatron's distributed optimizer load what it has saved as "fully_reshardable". Call it on a new optimizer.

    Two things go wrong otherwise. Buckets of gradients end at multiples of 128 elements, and what follows such a gap
    is saved from the wrong place: Mamba-2 layers have parameters of 64 elements, and large models several buckets. And
    torch's AdamW, which stands in for a fused one without TransformerEngine and apex, counts steps for every tensor:
    those counts are read before there are any, looked for among the tensors of the checkpoint, where they are not, and
    left one for all tensors, each of which counts on in it. That AdamW is told to run fused, too. Changes nothing for
    other optimizers.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not hasattr(part, "sharded_param_state_fully_reshardable"):
            continue
        part.sharded_param_state_fully_reshardable = _WithGaps(part)
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
                for tensor in group["params"]:
                    part.optimizer.state[tensor] = part.optimizer.state[tensor] or _first_state(tensor)
            part._set_main_param_and_optimizer_states = _WithSteps(part)


class _WithGaps:
    """Gathers the optimizer's state as the buffers of gradients lie, with the gaps behind their buckets."""

    def __init__(self, optimizer: Any):
        self.optimizer, self.store = optimizer, optimizer.sharded_param_state_fully_reshardable
        self.gather = optimizer.get_parameter_state_dp_zero

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.optimizer.get_parameter_state_dp_zero = self._gather
        try:
            return self.store(*arguments, **options)
        finally:
            self.optimizer.get_parameter_state_dp_zero = self.gather

    def _gather(self, *arguments: Any, **options: Any) -> dict | None:
        state = self.gather(*arguments, **options)
        if state is not None:
            for place, buffer in enumerate(self.optimizer.buffers):
                for tensors in state[place].values():
                    tensors |= {name: _spread(t, buffer) for name, t in tensors.items() if isinstance(t, Tensor)}
        return state


def _spread(tensor: Tensor, buffer: Any) -> Tensor:
    """Buckets end to end -> buckets where they lie in the buffer."""
    pieces = tensor.split([bucket.numel_unpadded for bucket in buffer.buckets])
    spread = tensor.new_zeros(buffer.numel)
    for bucket, piece in zip(buffer.buckets, pieces, strict=True):
        spread[bucket.offset : bucket.offset + len(piece)] = piece
    return spread


def _first_state(tensor: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), device=tensor.device)  # where a fused optimizer counts
    return {"step": step, "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}


class _WithSteps:
    """Loads a parameter's state with the count of steps that was loaded before, for all ranks in common."""

    def __init__(self, optimizer: Any):
        self.optimizer, self.load = optimizer, optimizer._set_main_param_and_optimizer_states

    def __call__(self, model_param: Any, tensors: dict) -> None:
        group, place = self.optimizer.model_param_group_index_map[model_param]
        inner = self.optimizer.optimizer
        state = inner.state[inner.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        self.load(model_param, tensors | {"step": state["step"]})
