"""How far a result may be from its reference: ||result - reference|| / ||reference||, by what is compared."""

import torch

EXACT = 1e-9
"""float64 over any split of the work."""

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""One device, one operator, against its float64 definition, forward and gradients."""

MODEL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""A whole model on a GPU against float64: its losses, and its gradient as one vector. In bf16 the rounding of
activations alone makes 1.1e-2 of the gradient (measured with autocast on a CPU)."""

LOGITS_FP32 = 1e-4
"""Logits of a whole float32 model against another implementation."""


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
