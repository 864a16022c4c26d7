"""The shifted products equal the definition, documents, states and gradients included."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.conv1d import ConvSpan, causal_conv1d, causal_conv1d_reference, causal_conv1d_split

from ..tolerances import RELATIVE, assert_close

FLOAT64 = {"dtype": torch.float64}


def _gradients(function, tensors, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    x, weight, bias, state = leaves
    y, final = function(x, weight, bias, initial_state=state, activation="silu", **options)
    (y.square().sum() + (final * 3).sin().sum()).backward()
    return [y, final, *(leaf.grad for leaf in leaves)]


def _check(batch, seqlen, width, owners, **options):
    tensors = (
        torch.randn(batch, seqlen, 5, **FLOAT64),
        torch.randn(5, width, **FLOAT64),
        torch.randn(5, **FLOAT64),
        torch.randn(owners, width - 1, 5, **FLOAT64),
    )
    expected = _gradients(causal_conv1d_reference, tensors, **options)
    actual = _gradients(lambda *a, **k: causal_conv1d(*a, return_final_state=True, **k), tensors, **options)
    for result, reference in zip(actual, expected, strict=True):
        assert_close(result, reference, RELATIVE[torch.float64])


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("seqlen", [1, 3, 20])
def test_rows(seqlen, width):
    _check(2, seqlen, width, 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 16), max_size=6), st.integers(2, 6))
def test_documents_cut_anywhere(cuts, width):
    torch.manual_seed(0)
    offsets = torch.tensor([0, *sorted(cuts), 16])
    _check(1, 16, width, len(offsets) - 1, cu_seqlens=offsets)


def test_documents_by_index():
    _check(2, 9, 4, 2, seq_idx=torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2, 5], [1] * 9]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 16), max_size=6), st.integers(1, 6), st.data())
def test_steps_are_the_whole(cuts, width, data):
    """Whatever stood before the documents `enters` when the outputs were made."""
    torch.manual_seed(0)
    documents, sizes = Documents([0, *sorted(cuts), 16]), [2, 3]
    enters = data.draw(st.sets(st.integers(0, len(documents) - 1)).map(sorted))
    x, weight, bias = torch.randn(1, 16, 7, **FLOAT64), torch.randn(5, width, **FLOAT64), torch.randn(5, **FLOAT64)
    state = torch.randn(len(documents), width - 1, 5, **FLOAT64)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, state)]
    *whole, rest = causal_conv1d_split(
        *leaves[:3], sizes, initial_state=leaves[3], cu_seqlens=documents, activation="silu"
    )
    d_parts = [torch.randn_like(part) for part in [*whole, rest]]
    *expected, d_state = torch.autograd.grad([*whole, rest], leaves, d_parts)
    entered = torch.zeros(len(documents), 1, 1).index_fill(0, torch.tensor(enters, dtype=torch.int64), 1.0)

    span = ConvSpan(x, weight, bias, sizes, documents, enters, activation="silu")
    *parts, passed = span.outputs(torch.where(entered > 0, torch.randn_like(state), state))
    span.enter(parts, state)
    for mine, other in zip([*parts, passed], [*whole, rest], strict=True):
        assert_close(mine, other, RELATIVE[torch.float64])
    assert_close(span.initial_gradient(d_parts[:2], state), d_state * entered, RELATIVE[torch.float64])
    for mine, other in zip(span.gradients(d_parts[:2], d_parts[2], state), expected, strict=True):
        assert_close(mine, other, RELATIVE[torch.float64])


def test_what_a_span_refuses():
    x, weight, documents = torch.randn(1, 9, 5), torch.randn(5, 4), Documents([0, 4, 9])
    for enters, message in (([0, 0], "at most once"), ([2], "from 0 to 1"), ([-1], "from 0 to 1")):
        with pytest.raises(ValueError, match=message):
            ConvSpan(x, weight, None, [5], documents, enters)
    with pytest.raises(ValueError, match="initial_state"):
        ConvSpan(x, weight, None, [5], documents, [0]).outputs(torch.randn(1, 3, 5))


def test_equals_torch():
    x, weight = torch.randn(2, 30, 6, **FLOAT64), torch.randn(6, 4, **FLOAT64)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], groups=6).transpose(1, 2)
    assert_close(causal_conv1d(x, weight), expected, RELATIVE[torch.float64])


def test_a_neighbouring_document_does_not_leak():
    x, weight = torch.randn(1, 8, 3), torch.randn(3, 4)
    clean = causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 5, 8]))
    x[:, :5] = float("inf")
    assert torch.equal(causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 5, 8]))[:, 5:], clean[:, 5:])


def test_bf16_rounds_once(device):
    x, weight = torch.randn(1, 200, 16).to(device, torch.bfloat16), torch.randn(16, 4).to(device)
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = causal_conv1d(x, weight, activation="silu")
    wide = weight.detach().double().requires_grad_()
    expected, _ = causal_conv1d_reference(x.double(), wide, activation="silu")
    cotangent = torch.randn(y.shape).to(device, torch.bfloat16)
    y.backward(cotangent)
    expected.backward(cotangent.double())
    assert y.dtype == torch.bfloat16
    # half a unit in the last place, on average less
    assert_close(y, expected, 2e-3)
    assert_close(weight.grad, wide.grad, RELATIVE[torch.float32])
