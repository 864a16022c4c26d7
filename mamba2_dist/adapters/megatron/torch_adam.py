"""Checkpoints of Megatron's distributed optimizer where torch's AdamW stands in for a fused one."""

from typing import Any

import torch


def prepare_torch_adam(optimizer: Any) -> None:
    """Let the distributed optimizer load checkpoints with torch's AdamW, which counts steps for every tensor.

    megatron-core 0.16 to 0.19 reads those counts before the first step, when there are none, looks for them among the
    tensors of the checkpoint, where they are not, and lets all tensors count in one. Call this on a new optimizer; it
    changes nothing with TransformerEngine's or apex' FusedAdam.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, torch.optim.Adam) and hasattr(part, "_set_main_param_and_optimizer_states"):
            for group in inner.param_groups:
                for tensor in group["params"]:
                    inner.state[tensor] = inner.state[tensor] or _first_state(tensor)
            part._set_main_param_and_optimizer_states = _WithStep(part)


def _first_state(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}


class _WithStep:
    def __init__(self, optimizer: Any):
        self.optimizer, self.load = optimizer, optimizer._set_main_param_and_optimizer_states

    def __call__(self, model_param: Any, tensors: dict) -> None:
        group, place = self.optimizer.model_param_group_index_map[model_param]
        inner = self.optimizer.optimizer
        state = inner.state[inner.param_groups[group]["params"][place]]
        # Megatron has given all the same tensor, and each would count on in it
        state["step"] = state["step"].clone()
        self.load(model_param, tensors | {"step": state["step"]})
