"""AdamW over split parameters: which decay, the true gradient norm, the learning rate of each step."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mamba2_dist.parallel.collectives import sum_over
from mamba2_dist.parallel.groups import ParallelGroups

from .config import OptimizerConfig, ScheduleConfig
from .whole import local_rows, model_slices, slices


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; vectors (A_log, dt_bias, D, norms, biases) do not decay, matrices and convolutions do."""
    found = [parameter for parameter, _, _ in model_slices(model)]
    groups = [
        {"params": [p for p in found if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in found if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def prepare_state(optimizer: torch.optim.AdamW) -> None:
    """Make the moments and step counts that the first update would make, so that a checkpoint has where to go."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def learning_rate(step: int, steps: int, peak: float, config: ScheduleConfig) -> float:
    """The learning rate of update `step` (from 0) of `steps`: linear warm-up, then "cosine" or "wsd" (hold, and fall
    linearly over the last `decay_fraction`) down to `final_fraction` of the peak."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.shape == "cosine":
        done = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
        fall = 0.5 * (1 - math.cos(math.pi * min(done, 1.0)))
    else:
        begin = steps - max(round(steps * config.decay_fraction), 1)
        fall = min(max((step + 1 - begin) / (steps - begin), 0.0), 1.0)
    return peak * (1 - fall * (1 - config.final_fraction))


def gradient_norm(model: nn.Module, groups: ParallelGroups, *, sharded: bool) -> Tensor:
    """The L2 norm of the whole model's gradient, every element counted once; the same on every rank.

    sharded: whether the data group holds different rows of each gradient (FSDP) or all the same (DDP).
    """
    by_replicas: dict[int, list[Tensor]] = {}
    for piece, replicas in _gradients(model):
        by_replicas.setdefault(replicas, []).append(piece)
    total = torch.zeros(1, device=next(model.parameters()).device)
    for replicas, pieces in by_replicas.items():
        total = total + nn.utils.get_total_norm(pieces).square().float() / replicas
    total = sum_over(total, groups.tp)
    return (sum_over(total, groups.data) if sharded else total).sqrt()[0]


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale every gradient by limit / norm where the norm is above the limit."""
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local_rows(p.grad)[0] for p in model.parameters() if p.grad is not None], scale)


def _gradients(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    for parameter, name, record in model_slices(model):
        if parameter.grad is not None:
            for piece in slices(name, record, parameter.grad):
                yield piece.tensor.float(), piece.replicas
