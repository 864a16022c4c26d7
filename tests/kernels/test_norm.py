"""The gated norm equals its definition, whole or from partial sums of squares."""

import pytest
import torch
from mamba2_dist.kernels.norm import gated_rmsnorm, gated_rmsnorm_reference, square_sums

from ..tolerances import RELATIVE, assert_close


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 4, 12])
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_definition(group_size, norm_before_gate, gated):
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 24), (24,), (2, 5, 24))]
    results = []
    for function in (gated_rmsnorm, gated_rmsnorm_reference):
        x, weight, z = (tensor.clone().requires_grad_() for tensor in inputs)
        y = function(
            x, weight, z if gated else None, eps=1e-5, group_size=group_size, norm_before_gate=norm_before_gate
        )
        y.square().mul(torch.arange(24)).sum().backward()
        results.append([y, x.grad, weight.grad, *([z.grad] if gated else [])])
    for result, reference in zip(*results, strict=True):
        assert_close(result, reference, RELATIVE[torch.float64])


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_halves_of_a_group_with_shared_sums(norm_before_gate):
    x, z, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (3, 8), (8,)))
    options = {"norm_before_gate": norm_before_gate}
    whole = gated_rmsnorm(x, weight, z, eps=1e-5, **options)
    halves = [slice(0, 4), slice(4, 8)]
    total = sum(square_sums(x[:, half], z[:, half], **options) for half in halves)
    for half in halves:
        part = gated_rmsnorm(
            x[:, half], weight[half], z[:, half], eps=1e-5, square_sum=total, square_count=8, **options
        )
        assert_close(part, whole[:, half], RELATIVE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, device):
    x, z, weight = (torch.randn(*shape).to(device, dtype) for shape in ((7, 96), (7, 96), (96,)))
    y = gated_rmsnorm(x, weight, z, eps=1e-5, group_size=32)
    wide = gated_rmsnorm_reference(*(t.cpu().double() for t in (x, weight, z)), group_size=32)
    assert y.dtype == dtype
    assert_close(y, wide, RELATIVE[dtype])
