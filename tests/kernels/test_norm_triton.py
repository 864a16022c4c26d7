"""The norms' kernels against float64: interpreted in float32 without a GPU, compiled in every dtype with one."""

import functools

import pytest
import torch
from mamba2_dist.kernels.norm import add_rmsnorm, gated_rmsnorm, gated_rmsnorm_reference
from torch.utils.checkpoint import checkpoint

from ..tolerances import KERNELS, assert_close
from .test_conv1d_triton import PLACES
from .test_norm import in_halves

ops = pytest.importorskip("mamba2_dist.kernels.norm.gpu.ops")
norm = functools.partial(gated_rmsnorm, eps=1e-5, backend="triton")
# tokens, channels, group size: one tile, ragged ones, several a token
SHAPES = [(5, 24, 24), (3, 24, 8), (70, 64, 64), (2, 1280, 1280), (3, 2000, 2000), (4, 600, 200), (1, 7, 7), (9, 6, 3)]


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


def draw(place, tokens, channels, *, wider=0):
    device, dtype = place
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    z = make(2, tokens, channels + wider)[..., wider // 2 : wider // 2 + channels]
    return make(2, tokens, channels), make(channels).float(), z


def outcome(function, tensors, **options):
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)]


def check(tensors, **options):
    wide = [None if tensor is None else tensor.double().cpu() for tensor in tensors]
    expected = outcome(gated_rmsnorm_reference, wide, **options)
    for result, reference in zip(outcome(norm, tensors, **options), expected, strict=True):
        assert_close(result, reference, KERNELS[result.dtype])


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated(place, shape, norm_before_gate):
    tokens, channels, group_size = shape
    check(draw(place, tokens, channels, wider=6), group_size=group_size, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_gate(place, shape):
    tokens, channels, group_size = shape
    check((*draw(place, tokens, channels)[:2], None), group_size=group_size)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gradient_in_the_place_of_x(place, norm_before_gate):
    options = {"group_size": 40, "norm_before_gate": norm_before_gate}
    tensors = draw(place, 9, 320)
    expected = outcome(norm, tensors, **options)
    results = outcome(functools.partial(norm, overwrite_x=True), tensors, **options)
    assert all(map(torch.equal, results, expected))
    assert results[1].data_ptr() == tensors[0].data_ptr()


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_halves_of_a_group(place, norm_before_gate, gated):
    x, weight, z = draw(place, 9, 320)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(x)
    z = z if gated else None
    y, gradients = in_halves(x, weight, z, dy, norm_before_gate=norm_before_gate, backend="triton")
    wide = [None if tensor is None else tensor.double().cpu() for tensor in (x, weight, z)]
    expected = outcome(gated_rmsnorm_reference, wide, norm_before_gate=norm_before_gate)
    for result, reference in zip([y, *gradients], expected, strict=True):
        assert_close(result, reference, KERNELS[result.dtype])


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("channels", [40, 1280])
@pytest.mark.parametrize("unused", ["none", "sum", "norm"])
def test_of_a_sum(place, channels, mixed, unused):
    device, dtype = place
    # the interpreter rounds to bfloat16 towards zero
    added_dtype = dtype if not mixed else torch.bfloat16 if device == "cuda" else torch.float16
    x, weight, added = draw(place, 11, channels)
    inputs = [x, added.to(added_dtype), weight]
    y, total = add_rmsnorm(*(t.requires_grad_() for t in inputs), eps=1e-5, dtype=added_dtype, backend="triton")
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    wide_total = wide[0] + wide[1]
    results, expected = [y, total], [gated_rmsnorm_reference(wide_total, wide[2]), wide_total]
    assert (y.dtype, total.dtype) == (added_dtype, dtype)
    for result, reference in zip(results, expected, strict=True):
        assert_close(result, reference, KERNELS[result.dtype])
    used = [0, 1] if unused == "none" else [0] if unused == "sum" else [1]
    ends = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i in used]
    grads = torch.autograd.grad(
        [results[i] for i in used], inputs, [end.to(results[i]) for i, end in zip(used, ends, strict=True)],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    wide_grads = torch.autograd.grad(
        [expected[i] for i in used], wide, [end.double() for end in ends], allow_unused=True, materialize_grads=True
    )
    for result, reference in zip(grads, wide_grads, strict=True):
        # what is normalised is the sum as it was rounded
        assert_close(result, reference, max(KERNELS[result.dtype], KERNELS[dtype]))


def test_checkpointed(place):
    """Activation checkpointing allows what is saved to be read once."""
    x, weight, z = (tensor.requires_grad_() for tensor in draw(place, 5, 24))
    total = lambda x, z, weight: sum(add_rmsnorm(x, z, weight, eps=1e-5, backend="triton"))  # noqa: E731
    for function, inputs in ((norm, (x, weight, z)), (total, (x, z, weight))):
        expected = torch.autograd.grad(function(*inputs).sum(), inputs)
        actual = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False).sum(), inputs)
        assert all(map(torch.equal, actual, expected))


def test_operators(place):
    x, weight, z = (tensor.contiguous().requires_grad_() for tensor in draw(place, 5, 24))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (x, weight, z, 1e-5, 8, False, x.dtype)
    torch.library.opcheck(torch.ops.mamba2_dist.gated_rmsnorm, arguments, test_utils=tests)
    arguments = (x, z, weight, 1e-5, torch.float32)
    torch.library.opcheck(torch.ops.mamba2_dist.add_rmsnorm, arguments, test_utils=tests)


def test_compiled(place):
    """Without graph breaks."""
    x, weight, z = draw(place, 5, 24)

    def function(x, weight, z):
        y, total = add_rmsnorm(x, norm(x, weight, z), weight, eps=1e-5, backend="triton")
        return y * total

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, z)]
        y = call(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
class TestOnGPU:
    @pytest.mark.parametrize("group_size", [64, 1024, 1536, 5120, 8192, 10240, 16384])
    @pytest.mark.parametrize("norm_before_gate", [False, True])
    def test_the_sizes_of_a_mixer(self, group_size, norm_before_gate):
        tensors = draw(("cuda", torch.bfloat16), 300, group_size * max(1, 4096 // group_size), wider=16)
        check(tensors, group_size=group_size, norm_before_gate=norm_before_gate)

    def test_the_same_bits_every_time(self):
        tensors = draw(("cuda", torch.bfloat16), 3000, 5120)
        first = outcome(norm, tensors)
        for _ in range(5):
            assert all(map(torch.equal, outcome(norm, tensors), first))

    def test_more_elements_than_32_bits_address(self):
        tokens, channels, tail = 2**31 // 4096 + 3000, 4096, 2000
        x, z = (torch.randn(tokens, channels + 8, device="cuda", dtype=torch.bfloat16)[:, :channels] for _ in range(2))
        weight = torch.randn(channels, device="cuda")
        whole, last = [x.requires_grad_(), z.requires_grad_()], [t.detach()[-tail:].requires_grad_() for t in (x, z)]
        y, expected = norm(whole[0], weight, whole[1]), norm(last[0], weight, last[1])
        assert torch.equal(y[-tail:], expected)
        dy = torch.zeros_like(y)
        dy[-tail:] = torch.randn_like(expected)
        gradients = torch.autograd.grad(y, whole, dy)
        for gradient, reference in zip(gradients, torch.autograd.grad(expected, last, dy[-tail:]), strict=True):
            assert torch.equal(gradient[-tail:], reference)
            assert not gradient[:-tail].any()
