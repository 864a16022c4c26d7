"""The norms before and behind layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2_dist.config import require
from mamba2_dist.kernels.norm import gated_rmsnorm

from .refusals import device_of


class Norm(nn.Module):
    """RMSNorm or LayerNorm by `config.normalization`, of whole tokens, also where each rank of tp has its own.

    eps: None: that of config, which the stack of megatron-core 0.16 does not hand on.
    Raises ValueError for other norms.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float | None = None):
        super().__init__()
        kind = config.normalization
        require(
            kind in ("RMSNorm", "LayerNorm"), f"normalization ({kind}) must be RMSNorm or LayerNorm before these layers"
        )
        self.eps = config.layernorm_epsilon if eps is None else eps
        self.added = 1.0 if config.layernorm_zero_centered_gamma else 0.0  # to the weight
        factory = {"device": device_of(config), "dtype": config.params_dtype}
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - self.added, **factory))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **factory)) if kind == "LayerNorm" else None
        for parameter in self.parameters():
            # gradients of ranks that see different tokens are added up
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010  unknown to Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(seqlen, batch, hidden_size) -> the same."""
        weight = self.weight + self.added if self.added else self.weight
        if self.bias is None:
            return gated_rmsnorm(x, weight, eps=self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)
