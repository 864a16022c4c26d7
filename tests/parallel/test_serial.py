"""Serial states: exact for any cut, and with the bits of one rank where cuts fall on chunks."""

import functools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.segments import Segment
from mamba2_dist.parallel.serial import SerialSSD
from mamba2_dist.parallel.serial_conv import serial_conv1d

from ..distributed import run_ranks
from ..splits import groups_of, make_table
from ..tolerances import EXACT, RELATIVE, assert_close

SHAPE = {"x": (4, 16), "dt": (4,), "B": (2, 16), "C": (2, 16)}
SHARED = {"A": (4,), "D": (4,), "dt_bias": (4,)}


def _inputs(batch: int, seqlen: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = {name: torch.randn(batch, seqlen, *shape, dtype=dtype) for name, shape in SHAPE.items()}
    inputs |= {name: torch.randn(shape, dtype=dtype) for name, shape in SHARED.items()}
    inputs["A"] = -inputs["A"].exp()
    return inputs


def _run(table: SegmentTable, group, inputs, weight, backend) -> dict[str, torch.Tensor]:
    """y and gradients, of this rank's tokens."""
    rank = group.rank
    mine = {name: table.shard(t, rank) if name in SHAPE else t for name, t in inputs.items()}
    mine = {name: t.detach().requires_grad_() for name, t in mine.items()}
    order = [mine[name] for name in ("x", "dt", "A", "B", "C")]
    options = {"D": mine["D"], "dt_bias": mine["dt_bias"], "dt_softplus": True, "backend": backend}
    y = SerialSSD(*order, 16, table, group, **options).outputs()
    (y * table.shard(weight, rank)).sum().backward()
    return {"y": y.detach()} | {f"d{name}": tensor.grad for name, tensor in mine.items()}


def _compare(table: SegmentTable, dtype: torch.dtype, backend: str, bitwise: bool):
    group = groups_of(1, table.ranks).states
    inputs = _inputs(table.batch, table.seqlen, dtype)
    weight = torch.randn_like(inputs["x"])
    whole = SegmentTable.contiguous(table.seqlen, 1, documents=table.documents)
    expected = _run(whole, groups_of(1, 1).states if table.ranks == 1 else _alone(), inputs, weight, backend)
    actual = _run(table, group, inputs, weight, backend)
    bound = EXACT if dtype == torch.float64 else RELATIVE[dtype]
    for name, tensor in expected.items():
        if name.removeprefix("d") in SHARED:
            torch.distributed.all_reduce(actual[name])
            assert_close(actual[name], tensor, bound, name)
        elif bitwise:
            assert torch.equal(actual[name], table.shard(tensor, group.rank)), name
        else:
            assert_close(actual[name], table.shard(tensor, group.rank), bound, name)


@functools.cache
def _alone():
    from mamba2_dist import ParallelGroups

    return ParallelGroups.alone().states


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_cut(ranks, layout):
    table = make_table(layout, 40, ranks, [[0, 1, 21, 40], [0, 40]])
    run_ranks(ranks, _compare, table, torch.float64, "torch", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks hold CPU tensors, which only the interpreter takes")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_bits_of_one_rank(layout):
    table = getattr(SegmentTable, layout)(512, 2, documents=[[0, 512], [0, 128, 512]])
    run_ranks(2, _compare, table, torch.float32, "triton", True)


def _convolve(table: SegmentTable, group, x, weight, bias, dy, backend) -> dict[str, torch.Tensor]:
    """Parts and gradients, of this rank's tokens; the last two channels are not convolved."""
    leaves = [t.detach().requires_grad_() for t in (table.shard(x, group.rank), weight, bias)]
    parts, again = serial_conv1d(*leaves, [5, 3], table, group, activation="silu", backend=backend)
    y = torch.cat(parts, -1)
    assert torch.equal(y, torch.cat(again(), -1))
    (y * table.shard(dy, group.rank)).sum().backward()
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *(leaf.grad for leaf in leaves)), strict=True))


def _compare_conv(table: SegmentTable, dtype: torch.dtype, backend: str, bitwise: bool):
    group = groups_of(1, table.ranks).states
    x, dy = (torch.randn(table.batch, table.seqlen, 10, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(8, 4, dtype=dtype), torch.randn(8, dtype=dtype)
    whole = SegmentTable.contiguous(table.seqlen, 1, documents=table.documents)
    expected = _convolve(whole, _alone(), x, weight, bias, dy, backend)
    actual = _convolve(table, group, x, weight, bias, dy, backend)
    for name in ("dweight", "dbias"):
        torch.distributed.all_reduce(actual[name])
        assert_close(actual[name], expected[name], EXACT if dtype == torch.float64 else RELATIVE[dtype], name)
    for name in ("y", "dx"):
        mine = table.shard(expected[name], group.rank)
        if bitwise:
            assert torch.equal(actual[name], mine), name
        else:
            assert_close(actual[name], mine, EXACT, name)


rows = st.lists(st.lists(st.integers(0, 21), max_size=5).map(sorted), min_size=1, max_size=3)
cuts = st.lists(st.integers(0, 21), min_size=2, max_size=5).map(sorted)


# a failure ends the ranks, so looking for a smaller one would take minutes
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(rows, cuts, st.data())
def test_convolution_with_any_cuts_and_documents(documents, cuts, data):
    edges = [0, *cuts, 21]
    owners = [data.draw(st.integers(0, 2)) for _ in edges[1:]]
    slots = [owners[:i].count(owner) for i, owner in enumerate(owners)]
    segments = [Segment(edges[i], edges[i + 1], owners[i], slots[i]) for i in range(len(owners))]
    table = SegmentTable(segments, ranks=3, documents=[[0, *row, 21] for row in documents])
    run_ranks(3, _compare_conv, table, torch.float64, "torch", False)
    run_ranks(3, _compare, table, torch.float64, "torch", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks hold CPU tensors, which only the interpreter takes")
@pytest.mark.parametrize("lengths", [[20, 12], [1, 31], [16, 0, 16], [30, 2]])
def test_convolutions_bits_of_one_rank(lengths):
    table = SegmentTable.uneven(lengths, documents=[[0, 32], [0, 15, 19, 31, 32]])
    run_ranks(len(lengths), _compare_conv, table, torch.float32, "triton", True)
