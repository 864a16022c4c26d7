"""Products in a lower dtype than their weights': casts are made once where asked, weight gradients are not rounded."""

import pytest
import torch

from mamba2_dist import ParallelGroups
from mamba2_dist.modules import init, linear
from mamba2_dist.modules.linear import ColumnParallelLinear, RowParallelLinear, cast_once
from mamba2_dist.modules.norm import RMSNorm
from mamba2_dist.parallel.partition import replicated

from ..tolerances import EXACT, RELATIVE, assert_close


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


@pytest.mark.parametrize("inside", [False, True], ids=["after autocast", "inside"])
def test_weight_gradients_are_not_rounded(inside):
    layer, u = _layer(), torch.randn(1, 100, 8).bfloat16()
    dy = torch.randn(1, 100, 12).bfloat16()
    exact = torch.einsum("btn,btk->nk", dy.double(), u.double())
    with torch.autocast("cpu", torch.bfloat16):
        whole = layer(u)
        last, first = layer.in_two(u, 7)
        two = torch.cat([first(), last], -1)
    for y in (whole, two):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            (gradient,) = torch.autograd.grad(y, layer.weight, dy)
        assert y.dtype == torch.bfloat16
        assert gradient.dtype == torch.float32
        assert_close(gradient, exact, RELATIVE[torch.float32])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_gradients_are_added_to_main_grad(dtypes, device):
    """As Megatron's `DistributedDataParallel` keeps them; neither a product nor a sum is rounded to bfloat16."""
    dtype, summed = dtypes
    tp = ParallelGroups.alone().tp
    layer, row = _layer().to(device, dtype), RowParallelLinear(12, replicated(8, 1, dim=1), tp, init.projection(8))
    row.to(device, dtype)
    with torch.no_grad():
        row.weight.copy_(layer.weight)
    exact, before = torch.zeros(12, 8, dtype=torch.float64), torch.ones(12, 8, device=device, dtype=summed)
    for each in (layer, row):
        each.weight.main_grad, each.weight.grad_added_to_main_grad = before.clone(), False
    for _ in range(3):
        u, dy = (torch.randn(1, 100, width, device=device).to(dtype) for width in (8, 12))
        exact += torch.einsum("btn,btk->nk", dy.double(), u.double()).cpu()
        u.requires_grad_()
        last, first = layer.in_two(u, 7)
        in_two, whole = torch.cat([first(), last], -1), row(u)
        assert_close(in_two, whole, RELATIVE[dtype])
        torch.autograd.backward([in_two, whole], [dy, dy])
    for each in (layer, row):
        assert each.weight.grad_added_to_main_grad
        assert_close(each.weight.main_grad.cpu(), 1 + exact, RELATIVE[torch.float32])


def test_gradients_of_narrow_weights_are_rounded_once():
    layer, u = _layer().bfloat16(), torch.randn(1, 100, 8)
    y = linear.linear(u, layer.weight)
    dy = torch.randn(y.shape)
    (gradient,) = torch.autograd.grad(y, layer.weight, dy)
    exact = torch.einsum("btn,btk->nk", dy.double(), u.double())
    assert_close(gradient, exact.bfloat16(), EXACT)


def test_casts_are_not_kept_for_backward():
    """A sharded weight is let go of after the forward pass; a cast of it would stay."""
    layer, u, kept = _layer(), torch.randn(1, 3, 8).bfloat16(), []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        _, first = layer.in_two(u, 7)
        layer(u), first()
    memory = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert memory == {tensor.untyped_storage().data_ptr() for tensor in (u, layer.weight)}


def test_anomalies_are_not_seen_in_what_is_not_written(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: torch.full_like(*args, torch.nan, **options))
    layer, u = _layer(), torch.randn(1, 3, 8)
    with torch.autograd.detect_anomaly(check_nan=True):
        last, first = layer.in_two(u, 7)
        (first().sum() + last.sum()).backward()


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
