"""The Triton operator against float64: interpreted in float32 without a GPU, compiled in every dtype with one."""

import functools
import itertools
import math
import sys
import types

import pytest
import torch
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.ssd import SSDSpan
from torch.utils.checkpoint import checkpoint

from ..tolerances import RELATIVE, SSD, SSD_DECAY, SSD_INTERPRETED, SSD_LOOSER, assert_close, relative_error
from .ssd_cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    REGIMES,
    as_views,
    by_definition,
    check,
    check_identical,
    check_scan,
    cotangent,
    draw,
    on_torch,
    on_triton,
    outcome,
    wide,
    without,
)

backward, config, launcher, ops, problem, table = (
    pytest.importorskip(f"mamba2_dist.kernels.{name}")
    for name in (
        "ssd.gpu.backward",
        "ssd.gpu.config",
        "common.launcher",
        "ssd.gpu.ops",
        "ssd.gpu.problem",
        "ssd.gpu.table",
    )
)


OFFSETS = [0, 0, 63, 64, 65, 128, 129, 129, 150, 150]

interpreted = pytest.mark.skipif(not launcher.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")
# batch, seqlen, nheads, headdim, d_state, ngroups
SHAPES = [
    (1, 1, 16, 64, 128, 1), (3, 63, 5, 64, 128, 1), (1, 65, 8, 32, 16, 2), (2, 257, 8, 64, 64, 8),
    (1, 1000, 80, 64, 128, 8), (1, 4103, 8, 128, 128, 1), (1, 300, 4, 128, 256, 1), (2, 129, 4, 16, 16, 4),
    (1, 200, 4, 24, 20, 2), (1, 8192, 2, 64, 128, 1), (1, 1, 4, 18, 20, 1), (1, 300, 4, 96, 64, 2),
]  # fmt: skip
MEDIUM = (1, 300, 4, 64, 128, 2)
PLACES = [
    pytest.param("cpu", (1, 150, 2, 16, 16, 1), FP32, marks=interpreted, id="interpreted"),
    pytest.param("cuda", MEDIUM, BF16, marks=pytest.mark.gpu, id="bfloat16"),
    pytest.param("cuda", MEDIUM, FP32, marks=pytest.mark.gpu, id="float32"),
]


@pytest.fixture(autouse=True)
def forgetful():
    """No test sees where another has cut its work."""
    problem._plans.values.clear()
    table._kept.values.clear()


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds nan, however it is asked for."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def tables(monkeypatch):
    """The tables that the operator works by."""
    made, lay_out = [], problem.lay_out
    monkeypatch.setattr(problem, "lay_out", lambda *args: made.append(lay_out(*args)) or made[-1])
    return made


def half_precision_tiles(headdim, d_state, *_):
    return config.choose(headdim, d_state, BF16, 90)


def check_spans(inputs, bounds, chosen):
    """All four steps: states enter chosen documents, and are taken from the same."""
    tensors = {name: tensor for name, tensor in inputs.items() if name not in ("z", "initial_states")}
    seqlen = inputs["x"].shape[1]

    def steps(backend, x, **arguments):
        def span():
            documents = Documents([*OFFSETS[:-2], seqlen, seqlen])
            options = {"dt_softplus": True, "backend": backend}
            return SSDSpan(x, **arguments, **options, chunk_size=32, documents=documents, enters=chosen, leaves=chosen)

        states = inputs["initial_states"][: len(chosen)].to(torch.promote_types(x.dtype, FP32))
        dy, d_leaving = cotangent(x.shape, x.device), cotangent(states.shape, x.device)
        ahead, back = span(), span()
        left, decay = ahead.leaving()
        y, kept = ahead.outputs(states)
        found = {"y": y, "final_states": torch.cat([left.flatten(2), decay[..., None]], -1)}
        found["dinitial_states"] = back.entering_gradient(dy.to(y.dtype))
        names = ("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias")
        gradients = back.gradients(dy.to(y.dtype), states, d_leaving, kept)
        return found | dict(zip(names, gradients, strict=True))

    check(steps("triton", **tensors), steps("torch", **wide(tensors)), bounds)


@interpreted
@pytest.mark.usefixtures("poisoned")
class TestInterpreted:
    @pytest.mark.parametrize(
        ("seqlen", "nheads", "ngroups"), [(1, 4, 2), (31, 4, 4), (64, 2, 1), (65, 4, 2), (130, 2, 2)]
    )
    def test_rows(self, seqlen, nheads, ngroups):
        check_scan(draw((2, seqlen, nheads, 16, 16, ngroups), FP32))

    @pytest.mark.parametrize("dt_softplus", [True, False])
    @pytest.mark.parametrize("absent", [(), ("D", "initial_states"), ("dt_bias", "z")])
    def test_arguments(self, absent, dt_softplus):
        inputs = without(draw((1, 40, 2, 18, 20, 1), FP32, gate=True, D_has_hdim=dt_softplus), *absent)
        check_scan(inputs, dt_softplus=dt_softplus, dt_limit=(0.004, 0.05))

    @pytest.mark.parametrize("loss", [("y",), ("final_states",)])
    def test_one_loss(self, loss):
        check_scan(draw((2, 35, 2, 16, 16, 1), FP32, gate=True), loss=loss)

    @pytest.mark.parametrize("headdim", [1, 48, 96, 128])
    def test_headdims(self, headdim):
        """With tiles of 32 channels."""
        check_scan(draw((1, 40, 2, headdim, 16, 1), FP32, D_has_hdim=True))

    def test_a_gate_in_blocks(self, monkeypatch):
        monkeypatch.setattr(backward, "GATED_TILE", 256)
        check_scan(draw((2, 35, 2, 16, 16, 1), FP32, gate=True))

    @pytest.mark.parametrize("loss", [("y", "final_states"), ("final_states",)])
    def test_documents(self, loss):
        inputs = draw((1, 150, 2, 24, 20, 2), FP32, owners=len(OFFSETS) - 1)
        check_scan(inputs, loss=loss, cu_seqlens=torch.tensor(OFFSETS))

    def test_documents_by_index(self):
        seq_idx = torch.tensor([[3] * 31 + [4] + [0] * 38, [2] * 70])
        check_scan(draw((2, 70, 2, 16, 16, 1), FP32), seq_idx=seq_idx)

    @pytest.mark.parametrize("seqlen", [150, 600])
    @pytest.mark.parametrize("chosen", [[*range(9)], [7, 2, 0], []], ids=str)
    def test_spans(self, chosen, seqlen, tables):
        check_spans(draw((1, seqlen, 1, 24, 20, 1), FP32, owners=len(chosen)), SSD_INTERPRETED, chosen)
        assert tables[0].cut == (seqlen > 150)

    @pytest.mark.parametrize("ngroups", [1, 2])
    def test_tiles(self, ngroups, monkeypatch):
        monkeypatch.setattr(problem, "choose", half_precision_tiles)
        check_scan(draw((1, 200, 2, 64, 32, ngroups), FP32))

    @pytest.mark.parametrize("scale", [1, 1e-2, 30])
    def test_half_precision(self, scale):
        """Also where states or their gradients are far from one."""
        inputs = draw((1, 150, 2, 24, 20, 1), FP16, "slow")
        inputs["B"], inputs["C"] = inputs["B"] * scale, inputs["C"] / scale
        inputs["initial_states"] *= scale
        check_scan(inputs, SSD[FP16])

    def test_steep_decays(self, monkeypatch):
        """There is little around a token that forgets, and much between two of them, which must not hide it."""
        monkeypatch.setattr(problem, "choose", half_precision_tiles)
        inputs = draw((1, 128, 2, 16, 16, 1), FP32, "alternating")
        inputs["A"].fill_(-2.0)
        check_scan(inputs, SSD[FP32])

    def test_a_cut_sequence(self, tables, monkeypatch):
        """Compiled, the backward pass works out again what entered the pieces."""
        monkeypatch.setattr(launcher, "INTERPRETED_AS", (90, 2))
        inputs = draw((1, 600, 1, 16, 16, 1), FP32)
        check_scan(inputs)
        assert all(table.cut for table in tables)
        compiled = torch.compile(lambda **kwargs: on_triton(**kwargs), fullgraph=True, backend="aot_eager")
        check_identical(outcome(compiled, inputs), outcome(on_triton, inputs))

    @pytest.mark.parametrize(("ngroups", "processors"), [(1, 1), (1, 4), (2, 4), (4, 1)])
    def test_heads_in_waves(self, ngroups, processors, monkeypatch):
        seen, waves = [], backward._waves
        monkeypatch.setattr(backward, "MIN_WORKSPACE", 0)
        monkeypatch.setattr(launcher, "INTERPRETED_AS", (90, processors))
        monkeypatch.setattr(backward, "_waves", lambda problem: seen.append(waves(problem)) or seen[-1])
        check_scan(draw((1, 64, 4, 16, 64, ngroups), FP32))
        assert seen[0][0] < 4

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize(
        ("numbers", "message"), [([1, 1], "at most once"), ([0, 2], "from 0 to 1, got 0 to 2"), ([-1], "from 0 to 1")]
    )
    def test_numbers_of_no_document(self, numbers, message, backend):
        tensors = list(draw((1, 9, 2, 16, 16, 1), FP32).values())[:5]
        for edges in ((numbers, []), ([], numbers)):
            with pytest.raises(ValueError, match=message):
                SSDSpan(*tensors, 32, Documents([0, 4, 9]), *edges, backend=backend)

    @pytest.mark.parametrize("function", [on_triton, on_torch])
    def test_training_after_inference(self, function):
        """What the first call keeps serves the second."""
        inputs = draw((1, 9, 2, 16, 16, 1), FP32, owners=2)
        with torch.inference_mode():
            documents = Documents([0, 4, 9])
            function(**inputs, cu_seqlens=documents)
        expected = outcome(by_definition, wide(inputs), cu_seqlens=documents.on_host)
        check(outcome(function, inputs, cu_seqlens=documents), expected, SSD_INTERPRETED)

    @pytest.mark.parametrize("function", [on_triton, on_torch])
    @pytest.mark.parametrize("loss", [("y", "final_states"), ("final_states",)])
    def test_other_defaults(self, function, loss):
        inputs = draw((1, 9, 2, 16, 16, 1), FP32, owners=2)
        documents = {"cu_seqlens": [0, 4, 9], "loss": loss}
        expected = outcome(function, inputs, **documents)
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(BF16)
            with torch.device("meta"):
                check_identical(outcome(function, inputs, **documents), expected)
        finally:
            torch.set_default_dtype(default)

    @pytest.mark.parametrize(("headdim", "dtype"), [(256, FP32), (16, FP64)])
    def test_what_no_kernel_takes(self, headdim, dtype):
        with pytest.raises(ValueError, match="use 'torch'"):
            on_triton(**draw((1, 2, 1, headdim, 16, 1), dtype))

    @pytest.mark.parametrize("name", ["ssd_scan", "ssd_scan_backward"])
    def test_operators(self, name):
        differentiable = not name.endswith("backward")
        inputs = draw((1, 5, 2, 16, 16, 1), FP32, gate=True)
        for key in ("C", "z"):  # by head
            inputs[key] = inputs[key].transpose(1, 2).contiguous().transpose(1, 2)
        x, dt, A, B, C, D, z, dt_bias, states = (t.requires_grad_(differentiable) for t in inputs.values())
        offsets, enters, steps = torch.tensor([0, 2, 5]), torch.tensor([1]), (True, 0.0, math.inf)
        final, empty = torch.randn(2, 2, 16, 16), torch.empty(0)
        arguments = {
            "ssd_scan": (x, dt, A, B, C, D, z, dt_bias, states, offsets, enters, None, 2, *steps, True, True),
            "ssd_scan_backward": (
                None, final, empty, empty, x, dt, A, B, C, D, z, dt_bias, states, offsets, enters, None, *steps
            ),
        }[name]  # fmt: skip
        tests = ("test_schema", "test_faketensor", *["test_autograd_registration"] * differentiable)
        torch.library.opcheck(getattr(torch.ops.mamba2_dist, name), arguments, test_utils=tests)


def _zero(name, plane=slice(None)):
    return lambda arguments: arguments[name][plane].zero_()


def _shorten(name):
    """The last token of every chunk or span is forgotten."""
    return lambda a: a.update({name: a[name] - (torch.arange(len(a[name]))[:, None] == 2).int()})


# kernel, whether the fault follows it, fault
FAULTS = {
    **{f"no sum {plane}": ("discretize_backward_kernel", False, _zero("sums_ptr", plane)) for plane in range(6)},
    "no states around": ("discretize_backward_kernel", False, _zero("W_ptr")),
    "no diagonal": ("discretize_backward_kernel", False, _zero("S_ptr")),
    "no pairs": ("outside_kernel", False, _zero("Q_ptr")),
    "no skip": ("dx_kernel", False, lambda a: a.update(D_ptr=torch.zeros_like(a["D_ptr"]))),
    "no decay": ("discretize_kernel", True, lambda a: a["weight_ptr"].copy_(a["log_dt_ptr"].exp2())),
    "no states": ("sweep_kernel", True, _zero("h_ptr")),
    "no gradients of states": ("sweep_kernel", True, _zero("dh_ptr")),
    "short steps": ("discretize_kernel", False, _shorten("chunks_ptr")),
    "short chunks": ("outside_kernel", False, _shorten("chunks_ptr")),
    "short spans": ("scan_kernel", False, _shorten("spans_ptr")),
}


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees(fault, monkeypatch):
    (name, after, spoil), run = FAULTS[fault], launcher.Launcher.__call__

    def faulty(self, **tensors):
        this, arguments = self.kernel.fn.__name__ == name, self.arguments | tensors
        if this and not after:
            spoil(arguments)
        run(self, **{name: arguments[name] for name in tensors})
        if this and after:
            spoil(arguments)

    inputs = draw((1, 200, 1, 16, 16, 1), FP32)
    inputs["A"] /= 16  # something is left of a state after a chunk
    monkeypatch.setattr(problem, "choose", half_precision_tiles)
    monkeypatch.setattr(launcher.Launcher, "__call__", faulty)
    actual, expected = outcome(on_triton, inputs), outcome(on_torch, wide(inputs))
    assert any(relative_error(actual[name], expected[name]) > 2 * SSD[BF16][name] for name in expected)


@pytest.mark.parametrize(("device", "shape", "dtype"), PLACES)
class TestEverywhere:
    @pytest.mark.parametrize("regime", REGIMES)
    def test_regimes(self, regime, device, shape, dtype, poisoned):
        bounds = SSD[dtype] | SSD_LOOSER.get((regime, dtype), {})
        check_scan(draw(shape, dtype, regime, device), bounds, on_torch, dt_softplus=regime != "still")

    @pytest.mark.parametrize("aligned", [True, False])
    def test_views(self, aligned, device, shape, dtype):
        inputs = draw(shape, dtype, device=device)
        actual = outcome(on_triton, as_views(inputs, aligned))
        check_identical(actual, outcome(on_triton, inputs))
        check(actual, outcome(on_torch, wide(inputs)), SSD[dtype])

    def test_packed_documents_equal_separate_ones(self, device, shape, dtype):
        offsets = torch.tensor([*OFFSETS[:-2], shape[1], shape[1]])

        def separately(initial_states, **arguments):
            calls = []
            for document, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
                part = {name: t[:, start:end] if t.ndim > 2 else t for name, t in arguments.items()}
                calls.append(on_triton(**part, initial_states=initial_states[document : document + 1]))
            return tuple(torch.cat([call[n] for call in calls], 1 - n) for n in range(2))

        inputs = draw(shape, dtype, device=device, owners=len(OFFSETS) - 1)
        expected = outcome(on_torch, wide(inputs), cu_seqlens=offsets)
        check(outcome(on_triton, inputs, cu_seqlens=offsets), expected, SSD[dtype])
        check(outcome(separately, inputs), expected, SSD[dtype])

    @pytest.mark.parametrize("way", ["autocast", "checkpointed", "compiled"])
    def test_the_same_when(self, way, device, shape, dtype):
        backend = "inductor" if device == "cuda" else "aot_eager"
        function = {
            "autocast": on_triton,
            "checkpointed": functools.partial(checkpoint, on_triton, use_reentrant=False),
            "compiled": torch.compile(lambda **kwargs: on_triton(**kwargs), fullgraph=True, backend=backend),
        }[way]
        inputs = draw(shape, dtype, device=device, D_has_hdim=True)
        expected = outcome(on_triton, inputs)
        with torch.autocast(device, BF16, enabled=way == "autocast"):
            check_identical(outcome(function, inputs), expected)

    def test_compiled_with_documents(self, device, shape, dtype):
        inputs, documents = draw(shape, dtype, device=device, owners=3), Documents([0, 0, 70, shape[1]])
        function = torch.compile(
            lambda **kwargs: on_triton(**kwargs, cu_seqlens=documents),
            fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager",
        )  # fmt: skip
        check_identical(outcome(function, inputs), outcome(on_triton, inputs, cu_seqlens=documents))

    def test_nan_is_not_hidden(self, device, shape, dtype):
        inputs = draw(shape, dtype, device=device)
        inputs["dt"][0, 5, 1] = math.nan
        actual = outcome(on_triton, inputs)
        assert actual["y"][0, 5:, 1].isnan().all()
        assert actual["ddt"][0, 5, 1].isnan()
        assert not actual["y"][:, :, 0].isnan().any()

    def test_a_graph_kept_for_a_second_backward_pass(self, device, shape, dtype):
        inputs = {name: tensor.requires_grad_() for name, tensor in draw(shape, dtype, device=device).items()}
        loss = sum(result.float().square().sum() for result in on_triton(**inputs))
        first, second = (torch.autograd.grad(loss, list(inputs.values()), retain_graph=keep) for keep in (True, False))
        assert all(map(torch.equal, first, second))


@pytest.mark.gpu
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [BF16, FP32])
    @pytest.mark.parametrize("loss", [("y",), ("final_states",)])
    def test_one_loss(self, loss, dtype, poisoned):
        check_scan(draw(MEDIUM, dtype, device="cuda"), SSD[dtype], on_torch, loss=loss)

    @pytest.mark.parametrize("dtype", [BF16, FP32])
    @pytest.mark.parametrize("shape", [MEDIUM, (1, 8192, 2, 64, 128, 1)], ids=str)
    @pytest.mark.parametrize("chosen", [[*range(9)], [7, 2, 0]], ids=str)
    def test_spans(self, chosen, shape, dtype, poisoned):
        check_spans(draw(shape, dtype, device="cuda", owners=len(chosen)), SSD[dtype], chosen)

    @pytest.mark.parametrize(
        ("dtype", "shape"),
        [*((BF16, shape) for shape in SHAPES), (FP16, SHAPES[1]), *((FP32, SHAPES[n]) for n in (0, 1, 4, 8, 9, 11))],
        ids=str,
    )
    def test_shapes(self, dtype, shape, poisoned):
        check_scan(draw(shape, dtype, device="cuda"), SSD[dtype], on_torch)

    @pytest.mark.parametrize("processors", [1, 16, 1024])
    def test_a_cut_sequence(self, processors, tables, monkeypatch):
        capability, _ = launcher.device_limits(torch.device("cuda"))
        monkeypatch.setattr(launcher, "_properties", lambda device: (capability, processors))
        check_scan(draw((1, 4103, 4, 64, 128, 2), BF16, device="cuda"), SSD[BF16], on_torch)
        assert tables[0].cut == (processors > 1)

    def test_the_same_bits_every_time(self):
        """Twenty times on another stream, beside other work."""
        inputs = draw((1, 1000, 80, 64, 128, 8), BF16, device="cuda")
        expected, square = outcome(on_triton, inputs), torch.ones(4096, 4096, device="cuda")
        torch.cuda.synchronize()
        busy, stream = torch.cuda.Stream(), torch.cuda.Stream()
        for _ in range(20):
            with torch.cuda.stream(busy):
                torch.mm(square, square)
            with torch.cuda.stream(stream):
                check_identical(outcome(on_triton, inputs), expected)

    @pytest.mark.parametrize("offsets", [None, [0, 0, 70, 4103]])
    def test_captured(self, offsets):
        """Also with documents, one of them long enough to be cut."""
        inputs, graph = (
            draw((1, 4103, 4, 64, 128, 2), BF16, device="cuda", owners=3 if offsets else None),
            torch.cuda.CUDAGraph(),
        )
        expected = outcome(on_triton, inputs, cu_seqlens=offsets)
        with torch.cuda.graph(graph):
            captured = outcome(on_triton, inputs, cu_seqlens=offsets)
        for tensor in captured.values():
            tensor.detach().zero_()
        graph.replay()
        check_identical(captured, expected)

    def test_no_worse_than_mamba_ssm(self, monkeypatch):
        # imported with it, and not used here
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
        theirs = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        theirs = functools.partial(theirs, chunk_size=256, dt_softplus=True, return_final_states=True)
        # in one test, as tuning theirs takes a minute
        for regime in ("typical", "slow", "fast", "alternating", "gated"):
            gated = regime == "gated"
            inputs = draw((2, 1024, 24, 64, 128, 1), BF16, "typical" if gated else regime, "cuda")
            inputs = inputs if gated else without(inputs, "z", "initial_states")
            actual, expected, other = (
                outcome(on_triton, inputs),
                outcome(on_torch, wide(inputs)),
                outcome(theirs, inputs),
            )
            for name in expected:
                bound = 1.2 * relative_error(other[name], expected[name]) + 1e-4
                assert_close(actual[name], expected[name], bound, f"{name}, {regime}")

    @pytest.mark.parametrize("d_state", [128, 256])
    def test_rounded_states_do_not_round_the_gradient_of_A(self, d_state):
        # not gated: a gate rounds the gradient of y
        inputs = without(draw((2, 1024, 80, 64, d_state, 1), BF16, device="cuda"), "z", "initial_states")
        actual, expected = outcome(on_triton, inputs), outcome(on_torch, wide(inputs))
        assert_close(actual["dA"], expected["dA"], SSD_DECAY, "dA")

    @pytest.mark.parametrize("channels", [False, True])
    def test_a_gate_does_not_round_the_gradient_of_D(self, channels):
        inputs = draw(MEDIUM, BF16, device="cuda")
        if channels:
            inputs["D"] = torch.randn(inputs["x"].shape[2:], device="cuda")
        actual, expected = outcome(on_triton, inputs), outcome(on_torch, wide(inputs))
        assert_close(actual["dD"], expected["dD"], RELATIVE[FP32], "dD")

    def test_many_documents(self):
        inputs = draw((1, 30000, 1, 16, 16, 1), BF16, device="cuda", owners=30000)
        check_scan(inputs, SSD[BF16], on_torch, cu_seqlens=torch.arange(30001))

    def test_another_device(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        inputs = draw(MEDIUM, BF16, device="cuda:1")
        assert torch.cuda.current_device() == 0
        check_scan(inputs, SSD[BF16], on_torch)

    def test_offsets_beyond_31_bits(self):
        if torch.cuda.mem_get_info()[0] < 60 << 30:
            pytest.skip("needs 60 GiB of free memory")
        inputs = draw((1, 1, 80, 64, 128, 1), BF16, device="cuda")
        weights = {"A": inputs["A"], "D": inputs["D"], "dt_bias": inputs["dt_bias"] - 4}
        shapes = {name: inputs[name].shape[2:] for name in ("z", "x", "B", "C", "dt")}
        parent = torch.randn(1, 1 << 18, 10576, device="cuda", dtype=BF16)
        assert parent.numel() > 1 << 31
        parts = parent.split([shape.numel() for shape in shapes.values()], -1)
        views = {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        dy = torch.randn(views["x"].shape, device="cuda", dtype=BF16)

        def last_tokens(leaves, dy):
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
            y = on_triton(**leaves, **weights, return_final_states=False)
            return [t[:, -4096:].clone() for t in (y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy))]

        # what came before these has been forgotten by the last 4096; both sides round
        near = last_tokens({name: view[:, -20480:].contiguous() for name, view in views.items()}, dy[:, -20480:])
        for actual, expected in zip(last_tokens(views, dy), near, strict=True):
            assert_close(actual, expected, 2 * SSD[BF16]["y"])
