"""Arguments for the SSD operator in every kind of decay, and its results and gradients beside a reference's."""

import functools
import math

import torch
from mamba2_dist.kernels.ssd import mamba_chunk_scan_combined, ssd_recurrence

from ..tolerances import SSD_INTERPRETED, assert_close
from .test_ssd import make_inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# ranges of -A and of dt
REGIMES = {
    "typical": (1, 16, 1e-3, 0.1), "slow": (1e-6, 1e-6, 1e-3, 0.1), "fast": (16, 16, 0.05, 0.1),
    "huge": (16, 16, 0.5, 5), "vanishing": (1e3, 1e3, 1e-3, 0.1), "alternating": (1, 16, 1e-3, 1e-3),
    "faint": (1, 16, math.exp(-30), math.exp(-15)), "still": (1, 16, 1e-3, 0.1), "outliers": (1, 16, 1e-3, 0.1),
    "silent": (1, 16, 1e-3, 0.1),
}  # fmt: skip

on_triton = functools.partial(
    mamba_chunk_scan_combined, chunk_size=64, dt_softplus=True, return_final_states=True, backend="triton"
)
on_torch = functools.partial(on_triton, backend="torch")
by_definition = functools.partial(ssd_recurrence, dt_softplus=True)


def draw(shape, dtype, regime="typical", device="cpu", gate=False, **options):
    """Random arguments, activations in `dtype`, gated on a GPU.

    shape: batch, seqlen, nheads, headdim, d_state, ngroups.
    """
    batch, seqlen, nheads, headdim, d_state, ngroups = shape
    inputs = make_inputs(batch, seqlen, nheads, headdim, ngroups, d_state, device=device, dtype=FP32, **options)
    slowest, fastest, shortest, longest = REGIMES[regime]
    inputs["A"] = -torch.empty_like(inputs["A"]).uniform_(slowest, fastest)
    dt = torch.empty_like(inputs["dt"]).uniform_(math.log(shortest), math.log(longest)).exp()
    if regime == "alternating":
        dt[:, ::2] = 5.0
    inputs["dt"] = dt + torch.log(-torch.expm1(-dt)) - inputs["dt_bias"]
    for name in {"still": ("dt", "dt_bias"), "silent": ("x",), "faint": ("D", "initial_states")}.get(regime, ()):
        inputs[name].zero_()
    if regime == "outliers":
        inputs["x"] *= torch.where(torch.rand_like(inputs["x"]) < 1e-3, 1e4, 1.0)
    if regime == "faint":
        inputs["x"] *= 1e6
    if not gate and device == "cpu":  # slow to interpret
        del inputs["z"]
    return {name: t.to(dtype) if name in ("x", "dt", "B", "C", "z") else t for name, t in inputs.items()}


def wide(inputs):
    return {name: tensor.double() for name, tensor in inputs.items()}


def without(inputs, *names):
    return {name: tensor for name, tensor in inputs.items() if name not in names}


def as_views(inputs, aligned):
    """The same values, activations as views of one tensor, whose rows begin at multiples of 16 bytes if `aligned`."""
    flat = [(name, inputs[name].flatten(2)) for name in ("z", "x", "B", "C", "dt") if name in inputs]
    widths = [tensor.shape[-1] for _, tensor in flat]
    widths.append((1 - aligned - sum(widths)) % 8)
    parent = torch.cat([*(tensor for _, tensor in flat), inputs["x"].new_zeros(*inputs["x"].shape[:2], widths[-1])], -1)
    views = zip(flat, parent.split(widths, -1), strict=False)
    return inputs | {name: view.unflatten(-1, inputs[name].shape[2:]) for (name, _), view in views}


@functools.lru_cache(maxsize=8)
def cotangent(shape, device):
    """A fixed random gradient that every dtype holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)


def outcome(function, inputs, loss=("y", "final_states"), **options):
    """Two results, and the gradients of a random functional of those in `loss`."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    results = dict(zip(("y", "final_states"), function(**leaves, **options), strict=True))
    ends = [results[name] for name in loss]
    weights = [cotangent(end.shape, end.device).to(end.dtype) for end in ends]
    gradients = torch.autograd.grad(ends, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def check(actual, expected, bounds):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, bounds[name], name)


def check_identical(actual, expected):
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def check_scan(inputs, bounds=SSD_INTERPRETED, reference=by_definition, **options):
    check(outcome(on_triton, inputs, **options), outcome(reference, wide(inputs), **options), bounds)
