"""The chunked operator, the recurrence and the dual form are one and the same map."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.ssd import SSDSpan, discretize, mamba_chunk_scan_combined, ssd_matrix, ssd_recurrence
from mamba2_dist.kernels.ssd.reference import skip
from mamba2_dist.kernels.ssd.state_passing import state_passing

from ..tolerances import RELATIVE, assert_close

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def make_inputs(batch, seqlen, nheads=4, headdim=3, ngroups=2, d_state=5, *, owners=None, D_has_hdim=False, **factory):
    """Random arguments by name; `owners` is how many states enter."""
    factory = {"dtype": torch.float64, **factory}
    draw = lambda *shape: torch.randn(*shape, **factory)  # noqa: E731
    return {
        "x": draw(batch, seqlen, nheads, headdim),
        "dt": draw(batch, seqlen, nheads),
        "A": -torch.exp(draw(nheads)),
        "B": draw(batch, seqlen, ngroups, d_state),
        "C": draw(batch, seqlen, ngroups, d_state),
        "D": draw(nheads, headdim) if D_has_hdim else draw(nheads),
        "z": draw(batch, seqlen, nheads, headdim),
        "dt_bias": draw(nheads),
        "initial_states": draw(owners or batch, nheads, headdim, d_state),
    }


def results_and_gradients(function, inputs, **options):
    """Outputs, final states, and the gradients of a random functional of both."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, final = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, final)]
    sum((t * w).sum() for t, w in zip((y, final), weights, strict=True)).backward()
    return {"y": y, "final_states": final, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def chunked(chunk_size):
    return lambda **arguments: mamba_chunk_scan_combined(
        chunk_size=chunk_size, return_final_states=True, backend="torch", **arguments
    )


def check_same(inputs, chunk_size, bound=RELATIVE[torch.float64], **options):
    expected = results_and_gradients(ssd_recurrence, inputs, **options)
    actual = results_and_gradients(chunked(chunk_size), inputs, **options)
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, bound, name)


@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("ngroups", [1, 2, 4])
@pytest.mark.parametrize("seqlen", [1, 7, 16, 33])
def test_equals_the_recurrence(seqlen, ngroups, dt_softplus):
    inputs = make_inputs(2, seqlen, ngroups=ngroups, D_has_hdim=ngroups == 2)
    check_same(inputs, 8, dt_softplus=dt_softplus, dt_limit=(0.05, 1.5))


def test_equals_the_dual_form():
    inputs = make_inputs(2, 19)
    seq_idx = torch.tensor([[0] * 5 + [1] * 14, [3] * 18 + [4]])
    dt = discretize(inputs["dt"], inputs["dt_bias"], True)
    matrix = ssd_matrix(dt, inputs["A"], inputs["B"], inputs["C"], seq_idx)
    y = torch.einsum("bhts,bshp->bthp", matrix, inputs["x"]) + skip(inputs["x"], inputs["D"])
    arguments = {**inputs, "z": None, "initial_states": None, "dt_softplus": True, "seq_idx": seq_idx}
    assert_close(y, ssd_recurrence(**arguments)[0], RELATIVE[torch.float64])
    assert_close(y, mamba_chunk_scan_combined(chunk_size=4, **arguments), RELATIVE[torch.float64])


offsets = st.lists(st.integers(0, 40), max_size=6).map(lambda cuts: [0, *sorted(cuts), 40])


@settings(max_examples=25, deadline=None)
@given(offsets, st.integers(1, 12))
def test_documents_cut_anywhere(offsets, chunk_size):
    torch.manual_seed(0)
    inputs = make_inputs(1, 40, owners=len(offsets) - 1)
    check_same(inputs, chunk_size, dt_softplus=True, cu_seqlens=torch.tensor(offsets))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=40, max_size=40), st.integers(1, 12))
def test_documents_by_index(changes, chunk_size):
    torch.manual_seed(0)
    seq_idx = torch.tensor(changes).clamp(max=1).view(2, 20).cumsum(1)
    check_same(make_inputs(2, 20), chunk_size, dt_softplus=True, seq_idx=seq_idx)


def test_packed_documents_equal_separate_ones():
    inputs = make_inputs(1, 20, owners=3)
    packed = chunked(4)(**inputs, cu_seqlens=torch.tensor([0, 6, 7, 20]))
    for document, (start, end) in enumerate([(0, 6), (6, 7), (7, 20)]):
        part = {
            name: tensor[:, start:end] if name in ("x", "dt", "B", "C", "z") else tensor
            for name, tensor in inputs.items()
        }
        part["initial_states"] = inputs["initial_states"][document : document + 1]
        y, final = chunked(4)(**part)
        assert_close(packed[0][:, start:end], y, RELATIVE[torch.float64])
        assert_close(packed[1][document : document + 1], final, RELATIVE[torch.float64])


def test_a_cut_sequence_passes_its_state_on():
    inputs = make_inputs(2, 30)
    whole = chunked(8)(**inputs)
    state, outputs = inputs["initial_states"], []
    for start, end in ((0, 11), (11, 12), (12, 30)):
        part = {
            name: tensor[:, start:end] if name in ("x", "dt", "B", "C", "z") else tensor
            for name, tensor in inputs.items()
        }
        y, state = chunked(8)(**{**part, "initial_states": state})
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole[0], RELATIVE[torch.float64])
    assert_close(state, whole[1], RELATIVE[torch.float64])


def test_leaving_state_and_decay():
    inputs = make_inputs(1, 20)
    arguments = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    cu_seqlens = [0, 0, 9, 20]
    span = SSDSpan(**arguments, chunk_size=4, documents=Documents(cu_seqlens), enters=range(3), leaves=range(3))
    state, decay = span.leaving()
    entering = torch.randn(3, *inputs["initial_states"].shape[1:], dtype=torch.float64)
    y, final = chunked(4)(**arguments, initial_states=entering, cu_seqlens=cu_seqlens)
    assert_close(decay[..., None, None] * entering + state, final, RELATIVE[torch.float64])
    assert_close(span.outputs(entering)[0], y, RELATIVE[torch.float64])


def test_state_passing_gradients():
    layout = Documents([0, 7, 7, 9, 20]).chunks(4, torch.device("cpu"))
    for shape in ((3, 1, 1), (3, 2, 2)):  # shared by the state's elements, and one each
        arguments = [
            torch.randn(layout.nchunks, 3, 2, 2, dtype=torch.float64, requires_grad=True),
            torch.randn(layout.nchunks, *shape, dtype=torch.float64, requires_grad=True),
            torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True),
        ]
        assert torch.autograd.gradcheck(lambda *tensors: state_passing(*tensors, layout), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, device):
    inputs = {name: tensor.to(device, dtype) for name, tensor in make_inputs(2, 70, headdim=8, d_state=16).items()}
    wide = {name: tensor.cpu().double() for name, tensor in inputs.items()}
    y, final = chunked(16)(**inputs, dt_softplus=True)
    y_wide, final_wide = ssd_recurrence(**wide, dt_softplus=True)
    assert y.dtype == dtype
    assert final.dtype == torch.float32
    assert_close(y, y_wide, RELATIVE[dtype], "y")
    assert_close(final, final_wide, RELATIVE[torch.float32], "final states")


@pytest.mark.parametrize("raw", [-30.0, -17.0, -10.0, 0.0, 19.0, 20.5, 25.0, 60.0])
def test_softplus_keeps_its_tails(raw):
    dt = torch.full((1, 1, 1), raw)
    expected = torch.tensor(raw).double().exp().log1p().view(1, 1, 1)
    assert_close(discretize(dt, None, True), expected, 1e-6)
    assert_close(discretize(dt.double(), None, True), expected, RELATIVE[torch.float64])


@pytest.mark.parametrize(
    ("A", "dt"), [(-1e3, 5.0), (-16.0, 50.0), (-1e-6, 1e-3), (-16.0, 0.0)], ids=["vanishing", "large", "slow", "still"]
)
def test_extreme_decay_stays_finite_and_right(A, dt):
    inputs = make_inputs(1, 40)
    inputs |= {"A": torch.full_like(inputs["A"], A), "dt": torch.full_like(inputs["dt"], dt)}
    inputs["dt_bias"].zero_()
    check_same(inputs, 16, bound=1e-9)


def test_a_neighbouring_document_does_not_leak():
    inputs = make_inputs(1, 12, owners=2)
    clean = chunked(4)(**inputs, cu_seqlens=torch.tensor([0, 5, 12]))[0]
    inputs["x"][:, :5] = math.inf
    spoiled = chunked(4)(**inputs, cu_seqlens=torch.tensor([0, 5, 12]))[0]
    assert torch.equal(clean[:, 5:], spoiled[:, 5:])


def test_autocast_leaves_the_scan_alone():
    inputs = {name: tensor.float() for name, tensor in make_inputs(1, 20).items()}
    plain = chunked(8)(**inputs)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunked(8)(**inputs)[1], plain)
