"""Serial states have the bits of one rank where cuts fall on chunks."""

import contextlib
import importlib
import itertools
from unittest import mock

import pytest
import torch
from mamba2_dist.kernels.common.documents import Documents
from mamba2_dist.kernels.ssd import SerialSpan

from mamba2_dist import Mamba2Config, Mamba2Mixer, ParallelGroups, SegmentTable
from mamba2_dist.parallel.serial import SerialSSD
from mamba2_dist.parallel.serial_conv import serial_conv1d

from ..distributed import run_ranks
from ..splits import assert_same_gradients, groups_of
from ..tolerances import RELATIVE, assert_close

SHAPE = {"x": (2, 16), "dt": (2,), "B": (1, 16), "C": (1, 16)}
SHARED = {"A": (2,), "D": (2,), "dt_bias": (2,)}
WITH_KERNELS = ("ssd.span", "conv1d.causal_conv1d", "norm.gated_rmsnorm")
THAT_FILL_A_DEVICE = ("ssd.gpu.problem", "ssd.gpu.backward")

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the ranks hold CPU tensors, which only the interpreter takes"
)


@contextlib.contextmanager
def _kernels():
    """Also on a CPU, as a device of many processors would have them."""

    def patch(modules, function: str, value):
        for name in modules:
            module = importlib.import_module(f"mamba2_dist.kernels.{name}")
            stack.enter_context(mock.patch.object(module, function, return_value=value))

    with contextlib.ExitStack() as stack:
        patch(WITH_KERNELS, "takes_triton", True)
        patch(THAT_FILL_A_DEVICE, "device_limits", (90, 132))
        yield


def _alone(table: SegmentTable) -> SegmentTable:
    return SegmentTable.contiguous(table.seqlen, 1, documents=table.documents)


def _compare(table: SegmentTable, run, shared):
    """What `run` gives of all ranks and of one: the same bits, but for gradients of what tokens share."""
    group = groups_of(1, table.ranks).states
    with _kernels():
        expected, actual = run(_alone(table), ParallelGroups.alone().states), run(table, group)
    for name, tensor in expected.items():
        if name in shared:
            torch.distributed.all_reduce(actual[name])
            assert_close(actual[name], tensor, RELATIVE[torch.float32], name)
        else:
            assert torch.equal(actual[name], table.shard(tensor, group.rank)), name


def _ssd(table: SegmentTable):
    inputs = {name: torch.randn(table.batch, table.seqlen, *shape) for name, shape in SHAPE.items()}
    inputs |= {name: torch.randn(shape) for name, shape in SHARED.items()}
    inputs["A"] = -inputs["A"].exp()
    weight = torch.randn_like(inputs["x"])

    def run(table, group):
        mine = {name: table.shard(t, group.rank) if name in SHAPE else t for name, t in inputs.items()}
        mine = {name: t.detach().requires_grad_() for name, t in mine.items()}
        order = [mine[name] for name in ("x", "dt", "A", "B", "C")]
        options = {"D": mine["D"], "dt_bias": mine["dt_bias"]}
        y, again = SerialSSD(*order, 16, table, group, dt_softplus=True, **options).outputs()
        assert torch.equal(y, again(*order, *options.values()))
        (y * table.shard(weight, group.rank)).sum().backward()
        return {"y": y.detach()} | {f"d{name}": tensor.grad for name, tensor in mine.items()}

    _compare(table, run, [f"d{name}" for name in SHARED])


def _conv(table: SegmentTable):
    """Of ten channels two are not convolved."""
    x, dy = (torch.randn(table.batch, table.seqlen, 10) for _ in range(2))
    weight, bias = torch.randn(8, 4), torch.randn(8)

    def run(table, group):
        leaves = [t.detach().requires_grad_() for t in (table.shard(x, group.rank), weight, bias)]
        parts, again = serial_conv1d(*leaves, [5, 3], table, group, activation="silu")
        y = torch.cat(parts, -1)
        assert torch.equal(y, torch.cat(again(), -1))
        (y * table.shard(dy, group.rank)).sum().backward()
        return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *(leaf.grad for leaf in leaves)), strict=True))

    _compare(table, run, ["dweight", "dbias"])


@interpreted
@pytest.mark.parametrize("lengths", [[14, 2], [1, 0, 15]])
def test_bits_of_a_convolution(lengths):
    table = SegmentTable.uneven(lengths, documents=[[0, 16], [0, 8, 11, 15, 16]])
    run_ranks(len(lengths), _conv, table)


@interpreted
def test_bits_of_the_operator():
    run_ranks(2, _ssd, SegmentTable.zigzag(512, 2, documents=[[0, 128, 512]]))


def _mixer(table: SegmentTable, recompute: str, config: Mamba2Config, d_model: int, options: dict):
    """A mixer of this rank and u's gradient against one that is alone with all tokens, both serial, bit by bit."""
    groups, rank = groups_of(1, table.ranks), torch.distributed.get_rank()
    options = {"state_scan": "serial_exact", **options}
    mixer = Mamba2Mixer(config, d_model, groups, recompute=recompute, **options)
    whole = Mamba2Mixer(config, d_model, ParallelGroups.alone(), **options)
    u, dy = torch.randn(2, table.batch, table.seqlen, d_model).to(whole.D)
    results = []
    for layer, cut, place in ((whole, _alone(table), 0), (mixer, table, rank)):
        leaf = cut.shard(u, place).requires_grad_()
        y = layer(leaf, cut)
        y.backward(cut.shard(dy, place))
        results.append((y.detach(), leaf.grad))
    for name, expected, actual in zip(("y", "du"), *results, strict=True):
        assert torch.equal(actual, table.shard(expected, rank)), name
    return mixer, whole, groups


def _interpreted_mixer(table, recompute):
    config = Mamba2Config(d_state=16, headdim=16)
    with _kernels():
        assert_same_gradients(*_mixer(table, recompute, config, 16, {}), RELATIVE[torch.float32])


@interpreted
def test_bits_of_a_mixer():
    run_ranks(2, _interpreted_mixer, SegmentTable.uneven([128, 24]), "inner")


def _steps(tensors, edges: list[int], dy):
    """y and gradients of x, dt, B and C of a document in runs between `edges`, which hand states on."""
    runs = list(itertools.pairwise(edges))
    x, dt, A, B, C = tensors

    def span(start, end):
        cut = [tensor[:, start:end] for tensor in (x, dt, B, C)]
        return SerialSpan(*cut[:2], A, *cut[2:], 256, Documents([0, end - start]), [0], [0], dt_softplus=True)

    nothing = torch.zeros(1, *x.shape[2:], B.shape[3], device=x.device)
    state, again, gradient, ys, spans = nothing, nothing, nothing, [], [span(*run) for run in runs]
    for run, backward in zip(runs, spans, strict=True):
        y, state = span(*run).forward(state)
        ys.append(y)
        again = backward.left_again(dy[:, slice(*run)], again)
    for backward in reversed(spans):
        gradient = backward.back(gradient)
    found = [backward.gradients() for backward in spans]
    return [torch.cat(ys, 1), *(torch.cat([each[index] for each in found], 1) for index in (0, 1, 3, 4))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_of_a_document_in_runs_on_a_gpu(dtype):
    """Long enough to be cut by kernels that fill the device."""
    shapes = (24, 64), (24,), (2, 128), (2, 128)
    x, dt, B, C, dy = (torch.randn(1, 8192, *shape, device="cuda", dtype=dtype) for shape in (*shapes, shapes[0]))
    tensors = x, dt, -torch.rand(24, device="cuda"), B, C
    whole = _steps(tensors, [0, 8192], dy)
    for edges in ([0, 4096, 8192], [0, 128, 1280, 8064, 8192]):
        for name, expected, actual in zip(
            ["y", "dx", "ddt", "dB", "dC"], whole, _steps(tensors, edges, dy), strict=True
        ):
            assert torch.equal(actual, expected), (name, edges)


def _mixer_on_a_gpu(layout, recompute, d_model):
    # documents that are cut begin at multiples of 128 tokens
    table = getattr(SegmentTable, layout)(4096, 2, documents=[[0, 300, 640, 4096], [0, 1024, 1100, 2048, 4096]])
    options = {"device": torch.device("cuda", torch.cuda.current_device()), "dtype": torch.bfloat16}
    torch.use_deterministic_algorithms(True)
    try:
        _mixer(table, recompute, Mamba2Config(), d_model, options)
    finally:
        torch.use_deterministic_algorithms(False)  # these processes run other tests too


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recompute", ["none", "inner"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("d_model", [512, 2560])
def test_bits_of_a_mixer_on_gpus(d_model, layout, recompute):
    run_ranks(2, _mixer_on_a_gpu, layout, recompute, d_model, device="cuda")
