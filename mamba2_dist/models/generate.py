"""Sampling tokens one at a time from a model that steps."""

import torch
from torch import Tensor

from mamba2_dist.modules.embedding import gather_vocabulary

from .hybrid_model import HybridModel


@torch.no_grad()
def generate(
    model: HybridModel,
    prompt: list[int],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    stop: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Up to `tokens` tokens after `prompt`; every tp rank gives the same.

    temperature: 0 takes the likeliest token; top_k: sample among so many; stop: a token that ends the text.
    Raises ValueError for an empty prompt or options out of range.
    """
    if not prompt:
        raise ValueError("prompt must hold at least one token")
    if temperature < 0 or top_k < 1:
        raise ValueError(f"temperature must not be below 0 and top_k not below 1, got {temperature} and {top_k}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    cache: list = model.new_cache(1)
    produced: list[int] = []
    for token in prompt:
        logits = model.step(torch.tensor([[token]], device=device), cache)
    for _ in range(tokens):
        token = _choose(gather_vocabulary(logits[0, 0], model.groups.tp), temperature, top_k, generator)
        if token == stop:
            break
        produced.append(token)
        logits = model.step(torch.tensor([[token]], device=device), cache)
    return produced


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, candidates = logits.float().cpu().topk(min(top_k, len(logits)))
    return int(candidates[torch.multinomial(torch.softmax(values / temperature, 0), 1, generator=generator)])
