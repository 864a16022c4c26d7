"""The gated norm equals its definition, whole or from partial sums of squares."""

import pytest
import torch
from mamba2_dist.kernels.norm import PartOfGroups, gated_rmsnorm, gated_rmsnorm_reference, square_sums

from ..tolerances import RELATIVE, assert_close


def in_halves(x, weight, z, dy, **options):
    """The norm of groups of all channels, and its gradients, in two halves that only exchange sums."""
    halves = [
        [None if tensor is None else half.detach().requires_grad_() for half in pair]
        for tensor, pair in ((t, (None, None) if t is None else t.chunk(2, -1)) for t in (x, weight, z))
    ]
    squares = sum(square_sums(x, z, **options) for x, _, z in zip(*halves, strict=True))
    sums = []

    def run(half: int, complete):
        part = PartOfGroups(squares, x.shape[-1], complete)
        leaves = [pair[half] for pair in halves]
        y = gated_rmsnorm(*leaves, eps=1e-5, part=part, **options)
        leaves = [leaf for leaf in leaves if leaf is not None]
        return y, torch.autograd.grad(y, leaves, dy.chunk(2, -1)[half])

    for half in (0, 1):
        run(half, lambda mine: sums.append(mine.clone()) or mine)
    results = [run(half, lambda _: sums[0] + sums[1]) for half in (0, 1)]
    gradients = [torch.cat(pair, -1) for pair in zip(*(gradients for _, gradients in results), strict=True)]
    return torch.cat([y for y, _ in results], -1), gradients


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
@pytest.mark.parametrize("gated", [False, True])
def test_halves_of_a_group(norm_before_gate, gated):
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (8,), (3, 8))]
    x, weight, z = inputs if gated else (*inputs[:2], None)
    dy, options = torch.randn(3, 8, dtype=torch.float64), {"norm_before_gate": norm_before_gate}
    whole = gated_rmsnorm(x, weight, z, eps=1e-5, **options)
    expected = torch.autograd.grad(whole, inputs, dy, allow_unused=True)
    y, gradients = in_halves(x, weight, z, dy, **options)
    assert_close(y, whole, RELATIVE[torch.float64])
    for result, reference in zip(gradients, expected, strict=False):
        assert_close(result, reference, RELATIVE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, device):
    x, z, weight = (torch.randn(*shape).to(device, dtype) for shape in ((7, 96), (7, 96), (96,)))
    y = gated_rmsnorm(x, weight, z, eps=1e-5, group_size=32)
    wide = gated_rmsnorm_reference(*(t.cpu().double() for t in (x, weight, z)), group_size=32)
    assert y.dtype == dtype
    assert_close(y, wide, RELATIVE[dtype])
