"""Products in a lower dtype than their weights': casts are made once where asked, weight gradients are not rounded."""

import torch

from mamba2_dist import ParallelGroups
from mamba2_dist.modules import init, linear
from mamba2_dist.modules.linear import ColumnParallelLinear, cast_once
from mamba2_dist.modules.norm import RMSNorm
from mamba2_dist.parallel.partition import replicated

from ..tolerances import RELATIVE, assert_close


def _layer():
    groups = ParallelGroups.alone()
    layer = ColumnParallelLinear(8, replicated(12, 1), groups.tp, init.projection(8), shared_by=groups.tp)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 8))
    return layer


def test_in_two_is_the_whole():
    layer, u = _layer(), torch.randn(2, 5, 8, requires_grad=True)
    dy = torch.randn(2, 5, 12)
    expected = torch.autograd.grad(layer(u), [u, layer.weight], dy)
    last, first = layer.in_two(u, 7)
    y = torch.cat([first(), last], -1)
    assert_close(y, layer(u), RELATIVE[torch.float32])
    for result, reference in zip(torch.autograd.grad(y, [u, layer.weight], dy), expected, strict=True):
        assert_close(result, reference, RELATIVE[torch.float32])


def test_weight_gradients_are_not_rounded():
    layer, u = _layer(), torch.randn(1, 100, 8).bfloat16()
    dy = torch.randn(1, 100, 12).bfloat16()
    exact = torch.einsum("btn,btk->nk", dy.double(), u.double())
    with torch.autocast("cpu", torch.bfloat16):
        whole = layer(u)
        last, first = layer.in_two(u, 7)
        two = torch.cat([first(), last], -1)
    for y in (whole, two):
        (gradient,) = torch.autograd.grad(y, layer.weight, dy)
        assert y.dtype == torch.bfloat16
        assert gradient.dtype == torch.float32
        assert_close(gradient, exact, RELATIVE[torch.float32])


def test_a_weight_is_cast_once(monkeypatch):
    layer, u = _layer(), torch.randn(1, 3, 8)
    with torch.autocast("cpu", torch.bfloat16), cast_once():
        casts = {linear._cast(layer.weight, torch.bfloat16).data_ptr() for _ in range(3)}
        layer(u), layer.in_two(u, 7)
        assert casts == {linear._cast(layer.weight, torch.bfloat16).data_ptr()}
    with torch.no_grad():
        layer.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16), cast_once():
        assert not layer(u).any()


def test_autocast_leaves_float64_alone():
    layer = _layer().double()
    norm = RMSNorm(8, 1e-5, ParallelGroups.alone().tp, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.fill_(2.0)
    u = torch.randn(1, 3, 8, dtype=torch.float64)
    expected = layer(norm(u)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(norm(u)[0]), expected)
