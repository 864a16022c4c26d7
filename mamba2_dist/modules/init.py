"""How parameters are first drawn, as published for Mamba-2; every function draws a tensor of the whole model."""

import math

import torch
from torch import Tensor

from .base import Initializer


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones: norms and D."""
    return torch.ones(shape)


def normal(std: float) -> Initializer:
    """N(0, std^2): embeddings."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def uniform(bound: float) -> Initializer:
    """U(-bound, bound): projections and convolutions, with bound 1 / sqrt(fan in)."""
    return lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound


def log_uniform_range(low: float, high: float) -> Initializer:
    """log a with a ~ U(low, high): A_log."""
    return lambda shape, generator: torch.log(low + torch.rand(shape, generator=generator) * (high - low))


def step_bias(low: float, high: float, floor: float) -> Initializer:
    """softplus^-1(dt) with log dt ~ U(log low, log high), at least `floor`: dt_bias."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        spread = math.log(high) - math.log(low)
        dt = torch.exp(torch.rand(shape, generator=generator, dtype=torch.float64) * spread + math.log(low))
        dt = dt.clamp(min=floor)
        return (dt + torch.log(-torch.expm1(-dt))).float()

    return draw


def projection(fan_in: int, residual_layers: int = 1) -> Initializer:
    """U(-1, 1) / sqrt(fan in); a projection back to the residual stream is divided by sqrt(number of layers)."""
    return uniform(1 / math.sqrt(fan_in * residual_layers))
