"""How far a result may be from its reference: ||result - reference|| / ||reference||, by what is compared."""

import torch

EXACT = 1e-9
"""float64 over any split of the work."""

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""One device, one operator, against its float64 definition, forward and gradients."""


KERNELS = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 3e-6}
"""Kernels that read their inputs once, against float64: results and gradients are rounded once, to this dtype."""


def _ssd(*errors: float) -> dict[str, float]:
    """For results, gradients of activations, of steps and of what all tokens share."""
    names = ("y final_states", "dx dB dC dz dinitial_states", "ddt", "dA ddt_bias dD")
    return {name: error for error, group in zip(errors, names, strict=True) for name in group.split()}


_SSD_HALF = _ssd(3e-3, 5e-3, 1e-2, 2e-2)

SSD = {torch.bfloat16: _SSD_HALF, torch.float16: _SSD_HALF, torch.float32: _ssd(1e-5, 2e-5, 1e-4, 1e-4)}
"""The SSD kernels against float64, by dtype and quantity."""

SSD_INTERPRETED = _ssd(*[RELATIVE[torch.float32]] * 4)
"""The same in float32 by Triton's interpreter."""

SSD_LOOSER = {
    ("slow", torch.bfloat16): {"dA": 7e-2},
    ("outliers", torch.bfloat16): {"dB": 1e-2, "dC": 1e-2},  # the roundings of a few large terms
    ("alternating", torch.float32): _ssd(*[1e-4] * 4),  # float32 holds log decays of 1e3 to 1e-4
}
"""What replaces them for a kind of decay."""

SSD_DECAY = 5e-4
"""The gradient of A in bfloat16 where dt and A are as in training: 2e-4 measured, 1.6e-3 with states in bfloat16."""

MODEL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""A whole model on a GPU against float64: its losses, and its gradient as one vector. In bf16 the rounding of
activations alone makes 1.1e-2 of the gradient (measured with autocast on a CPU)."""

LOGITS_FP32 = 1e-4
"""Logits of a whole float32 model against another implementation."""


MEGATRON = {"training": 1e-5, "checkpoint": 1e-6}
"""Losses under megatron-core in float32: over five updates of one split and of another, and of the same weights."""


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The L2 distance over the reference's norm, or over 1e-6 where that is smaller, as tests draw values of order one
    and a reference of rounding noise has no digits to share; nan counts as infinite."""
    result, reference = result.detach().double().cpu(), reference.detach().double().cpu()
    if result.shape != reference.shape:
        return float("inf")
    difference, scale = (result - reference).norm().item(), reference.norm().item()
    error = difference / max(scale, 1e-6)
    return error if error == error else float("inf")


def assert_close(result: torch.Tensor, reference: torch.Tensor, bound: float, what: str = "result") -> None:
    """Fail unless `result` is within `bound` of `reference`."""
    error = relative_error(result, reference)
    assert error <= bound, f"{what}: relative error {error:.3e} above {bound:.1e}"
