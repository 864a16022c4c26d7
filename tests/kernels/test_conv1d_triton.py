"""The convolution's kernels against float64: interpreted in float32 without a GPU, compiled in every dtype with one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.conv1d import ConvSpan, causal_conv1d, causal_conv1d_split

from ..tolerances import KERNELS, assert_close

launcher, operators, ops = (
    pytest.importorskip(f"mamba2_dist.kernels.{name}")
    for name in ("common.launcher", "common.operators", "conv1d.gpu.ops")
)

PLACES = [
    pytest.param(
        ("cpu", torch.float32), id="interpreted",
        marks=pytest.mark.skipif(not launcher.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
    ),
    *[pytest.param(("cuda", dtype), id=str(dtype), marks=pytest.mark.gpu)
      for dtype in (torch.bfloat16, torch.float16, torch.float32)],
]  # fmt: skip
FP32 = PLACES[0].values[0]


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Documents and rows are cut by blocks of tokens."""
    monkeypatch.setattr(ops, "TOKENS", 16)


def draw(place, batch, seqlen, channels, width, owners, *, wider=0, first=0):
    """x lies inside a wider tensor, from channel `first` on."""
    device, dtype = place
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    x = make(batch, seqlen, channels + wider)[..., first : first + channels]
    return x, make(channels, width).float(), make(channels).float(), make(owners, width - 1, channels)


def outcome(function, tensors, **options):
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    x, weight, bias, state = leaves
    y, final = function(x, weight, bias, initial_state=state, **options)
    generator = torch.Generator().manual_seed(1)
    ends = [torch.randn(end.shape, generator=generator).bfloat16().to(end) for end in (y, final)]
    kept = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad([y, final], kept, ends, allow_unused=True, materialize_grads=True)
    return dict(zip(["y", "final", *[name for name, leaf in zip(("x", "weight", "bias", "state"), leaves, strict=True)
                                     if leaf is not None]], [y, final, *gradients], strict=True))  # fmt: skip


def on_triton(*tensors, **options):
    return causal_conv1d(*tensors, return_final_state=True, backend="triton", **options)


def check(tensors, **options):
    wide = [None if tensor is None else tensor.double().cpu() for tensor in tensors]
    expected = outcome(
        lambda *a, **k: causal_conv1d(*a, return_final_state=True, backend="torch", **k), wide, **options
    )
    for name, result in outcome(on_triton, tensors, **options).items():
        assert_close(result, expected[name], KERNELS[result.dtype], name)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("seqlen", "channels"), [(1, 3), (15, 8), (33, 40)])
def test_rows(place, width, seqlen, channels):
    check(draw(place, 2, seqlen, channels, width, 2), activation="silu")


@pytest.mark.parametrize("channels", [1, 7, 96, 513])
def test_any_channels_inside_a_wider_tensor(place, channels):
    check(draw(place, 2, 20, channels, 4, 2, wider=5, first=3))


@pytest.mark.parametrize("missing", [{2}, {3}, {2, 3}])
def test_without_bias_or_state(place, missing):
    tensors = [None if i in missing else t for i, t in enumerate(draw(place, 1, 40, 8, 4, 1))]
    check(tensors, activation="silu")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(2, 8))
@pytest.mark.skipif(not launcher.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")
def test_documents_cut_anywhere(cuts, width):
    offsets = torch.tensor([0, *sorted(cuts), 40])
    check(draw(FP32, 1, 40, 5, width, len(offsets) - 1), cu_seqlens=offsets, activation="silu")


@pytest.mark.parametrize("width", [4, 8])
def test_documents(place, width):
    offsets = torch.tensor([0, 0, 1, 3, 15, 16, 17, 17, 40, 90, 100, 100])
    check(draw(place, 1, 100, 24, width, len(offsets) - 1), cu_seqlens=offsets, activation="silu")


def test_documents_by_index(place):
    index = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 5] + [6] * 20, [1] * 29])
    check(draw(place, 2, 29, 8, 4, 2), seq_idx=index.to(place[0]))


def test_parts_are_the_whole(place):
    """And the other channels pass, their gradients beside those of the parts."""
    sizes, (x, weight, bias, _) = [16, 5, 3], draw(place, 2, 40, 24, 4, 2)
    rest = torch.randn(2, 40, 6).to(x)
    wider = torch.cat([x, rest], -1).requires_grad_()
    *parts, passed = causal_conv1d_split(wider, weight, bias, sizes, activation="silu", backend="triton")
    assert torch.equal(passed, rest)
    x.requires_grad_()
    whole = causal_conv1d(x, weight, bias, activation="silu", backend="triton")
    assert torch.equal(torch.cat(parts, -1), whole)
    dy, d_rest = torch.randn_like(whole), torch.randn_like(rest)
    torch.autograd.backward([*parts, passed], [*dy.split(sizes, -1), d_rest])
    whole.backward(dy)
    assert torch.equal(wider.grad, torch.cat([x.grad, d_rest], -1))


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("enters", [[], [1, 2, 4, 6, 8]])
def test_steps_have_the_bits_of_the_whole(place, enters, width):
    """Whatever stood before the documents `enters` when the outputs were made."""
    sizes, documents = [16, 8], Documents([0, 0, 1, 3, 15, 16, 17, 17, 40, 50])
    x, weight, bias, state = draw(place, 1, 50, 24, width, len(documents))
    x = torch.cat([x, x[..., :6]], -1)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, state)]
    options = {"activation": "silu", "backend": "triton"}
    whole = causal_conv1d_split(*leaves[:3], sizes, initial_state=leaves[3], cu_seqlens=documents, **options)
    dy = [torch.randn_like(part) for part in whole]
    *gradients, d_state = torch.autograd.grad(whole, leaves, dy)
    entered = torch.tensor([number in enters for number in range(len(documents))], device=x.device)[:, None, None]

    span = ConvSpan(x, weight, bias, sizes, documents, enters, **options)
    *parts, rest = span.outputs(torch.where(entered, float("nan"), state))
    span.enter(parts, state)
    d_entered = span.initial_gradient(dy[:2], state)
    assert all(map(torch.equal, [*parts, rest], whole))
    assert torch.equal(d_entered, torch.where(entered, d_state, 0.0))
    assert all(map(torch.equal, span.gradients(dy[:2], dy[2], state), gradients))


def test_a_neighbouring_document_does_not_leak(place):
    x, weight, bias, _ = draw(place, 1, 40, 8, 4, 1)
    offsets = torch.tensor([0, 21, 40])
    clean = outcome(on_triton, (x, weight, bias, None), cu_seqlens=offsets)
    x[:, :21] = float("inf")
    spoilt = outcome(on_triton, (x, weight, bias, None), cu_seqlens=offsets)
    for name in ("y", "x"):
        assert torch.equal(spoilt[name][:, 21:], clean[name][:, 21:])


def test_bits_wherever_a_document_begins(place):
    x, weight, bias, _ = draw(place, 1, 64, 40, 4, 1)
    dy, results = torch.randn_like(x), []
    for before in range(4):
        offsets = torch.tensor([0, before, before + 64])
        leaf = F.pad(x, (0, 0, before, 0)).requires_grad_()
        y = causal_conv1d(leaf, weight, bias, cu_seqlens=offsets, activation="silu", backend="triton")[:, before:]
        results.append(torch.cat([y.detach(), torch.autograd.grad(y, leaf, dy)[0][:, before:]]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_operator(place):
    x, weight, bias, state = (tensor.requires_grad_() for tensor in draw(place, 1, 20, 8, 4, 1))
    arguments = (x, weight, bias, state, None, None, None, [4, 2], 1, True)
    x, weight, bias, state = x[..., :8], weight[:6], bias[:6], state[..., :6]
    arguments = (
        x.detach().requires_grad_(),
        *[t.detach().requires_grad_() for t in (weight, bias, state)],
        *arguments[4:],
    )
    torch.library.opcheck(
        torch.ops.mamba2_dist.causal_conv1d, arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_compiled(place):
    """Without graph breaks, documents included."""
    x, weight, bias, _ = draw(place, 1, 40, 8, 4, 1)
    documents = Documents([0, 3, 21, 40])
    function = lambda *t: causal_conv1d(*t, cu_seqlens=documents, activation="silu", backend="triton")  # noqa: E731
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        y = call(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
class TestOnGPU:
    @pytest.fixture(autouse=True)
    def whole_blocks(self, monkeypatch, small_blocks):
        monkeypatch.undo()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_sizes_of_a_mixer(self, dtype):
        tensors = draw(("cuda", dtype), 2, 700, 5376, 4, 2, wider=80)
        check(tensors, activation="silu")

    def test_the_same_bits_every_time(self):
        tensors = draw(("cuda", torch.bfloat16), 2, 3000, 640, 4, 2)
        first = outcome(on_triton, tensors, activation="silu")
        for _ in range(5):
            for name, result in outcome(on_triton, tensors, activation="silu").items():
                assert torch.equal(result, first[name]), name

    def test_more_elements_than_32_bits_address(self):
        tokens, channels, tail = 2**31 // 4096 + 5000, 4096, 3000
        x = torch.randn(1, tokens, channels + 8, device="cuda", dtype=torch.bfloat16)[..., :channels].requires_grad_()
        weight, dy = torch.randn(channels, 4, device="cuda"), torch.randn(1, tail, channels, device="cuda").bfloat16()
        y = causal_conv1d(x, weight, activation="silu")
        last = x.detach()[:, -tail:].requires_grad_()
        expected = causal_conv1d(
            last, weight, initial_state=x.detach()[:, -tail - 3 : -tail].contiguous(), activation="silu"
        )
        assert torch.equal(y[:, -tail:], expected)
        whole = torch.zeros_like(y)
        whole[:, -tail:] = dy
        (dx,) = torch.autograd.grad(y, x, whole)
        (d_last,) = torch.autograd.grad(expected, last, dy)
        assert torch.equal(dx[:, -tail:], d_last)
        assert not dx[:, : -tail - 3].any()

    def test_captured(self):
        tensors = draw(("cuda", torch.bfloat16), 2, 300, 640, 4, 2)
        expected = outcome(on_triton, tensors, activation="silu")
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            x, weight, bias, state = tensors
            y = on_triton(x, weight, bias, initial_state=state, activation="silu")[0]
        graph.replay()
        assert torch.equal(y, expected["y"])
