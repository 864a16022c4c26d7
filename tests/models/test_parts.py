"""A sequence trained in parts has the loss and the gradients of the whole, and so has memory with gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mamba2_dist import (
    HybridModel,
    Mamba2Config,
    Mamba2Mixer,
    ParallelConfig,
    ParallelGroups,
    SegmentTable,
    backward_in_parts,
)
from mamba2_dist.modules.mixer import Mamba2Cache
from mamba2_dist.parallel.segments import rows_between

from ..distributed import run_ranks
from ..splits import assert_same_gradients, groups_of
from ..strategies import documents, recomputes, scans, segments
from ..tolerances import EXACT, RELATIVE, assert_close
from .test_carry import CUTS, DOCUMENTS, LAYOUTS, SEQLEN, _config, _cut


def _model(tp, cp, layouts, recompute, ngroups=2):
    groups, float64, config = groups_of(tp, cp), {"dtype": torch.float64}, _config()
    config = replace(config, mamba=replace(config.mamba, ngroups=ngroups))
    model = HybridModel(config, groups, ParallelConfig(tp=tp, cp=cp), recompute=recompute, **float64)
    whole = HybridModel(config, ParallelGroups.alone(), **float64)
    tokens, labels = torch.randint(0, 32, (2, len(DOCUMENTS), SEQLEN))
    expected = whole(tokens, labels, SegmentTable.contiguous(SEQLEN, 1, documents=DOCUMENTS))
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    edges, calls = list(itertools.pairwise(CUTS)), []

    def loss(index, memory):
        calls.append((index, torch.is_grad_enabled()))
        start, end = edges[index]
        within = rows_between(DOCUMENTS, start, end)
        table = _cut(layouts[index % len(layouts)], end - start, cp, **within)
        mine = [table.shard(tensor[:, start:end], groups.cp.rank) for tensor in (tokens, labels, weight)]
        return (model(*mine[:2], table, memory) * mine[2]).sum()

    memory = model.new_memory(len(DOCUMENTS))
    total = backward_in_parts(loss, len(edges), memory)
    torch.distributed.all_reduce(total, group=groups.cp.handle)
    assert_close(total, (expected * weight).sum(), EXACT)
    assert_same_gradients(model, whole, groups)
    last = len(edges) - 1
    assert calls == [*((i, False) for i in range(last)), *((i, True) for i in range(last, -1, -1))]
    left = whole.new_memory(len(DOCUMENTS))
    with torch.no_grad():
        whole(tokens, labels, SegmentTable.contiguous(SEQLEN, 1, documents=DOCUMENTS), left)
    for cache, other in zip(memory[::2], left[::2], strict=True):
        assert not cache.ssm.requires_grad
        if tp == 1:
            assert_close(cache.ssm, other.ssm, EXACT)
            assert_close(cache.conv, other.conv, EXACT)


@pytest.mark.parametrize("layouts", [LAYOUTS[0], LAYOUTS[-1]], ids="-".join)
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2)])
def test_parts_are_the_whole(tp, cp, layouts):
    run_ranks(tp * cp, _model, tp, cp, layouts, "none")


@pytest.mark.parametrize("recompute", ["conv", "inner"])
@pytest.mark.parametrize("cp", [1, 2])
def test_recompute(cp, recompute):
    run_ranks(cp, _model, 1, cp, ["zigzag"], recompute)


def test_fewer_groups_than_ranks():
    run_ranks(4, _model, 2, 2, ["zigzag"], "none", 1)


def test_a_memory_that_was_left_may_be_written_to():
    mixer = Mamba2Mixer(Mamba2Config(d_state=4, headdim=4), 8)
    cache = _memory(mixer, 1)
    mixer(torch.randn(1, 5, 8), SegmentTable.contiguous(5, 1, carried=[True]), cache)
    whole = torch.autograd.grad(cache.ssm.sum(), mixer.A_log, retain_graph=True)[0]
    cache.ssm.mul_(0.5)
    assert_close(torch.autograd.grad(cache.ssm.sum(), mixer.A_log)[0], whole / 2, RELATIVE[torch.float32])


@pytest.mark.parametrize(
    ("pattern", "given", "message"),
    [
        ("M*", True, r"memory must not require gradients when the pattern \(M\*\) has attention"),
        ("M", False, "the loss of part 1 left its memory as it was"),
    ],
)
def test_mistakes(pattern, given, message):
    model, tokens = HybridModel(_config(pattern)), torch.zeros(1, 4, dtype=torch.long)

    def loss(index, memory):
        table = SegmentTable.contiguous(4, 1, **rows_between([[0, 8]], 4 * index, 4 * index + 4))
        return model(tokens, tokens, table if given else None, memory if given else None).sum()

    with pytest.raises(ValueError, match=message):
        backward_in_parts(loss, 2, model.new_memory(1))


@pytest.mark.parametrize(
    ("parts", "memory", "message"),
    [
        (2.5, [], "parts must be an integer, got 2.5"),
        (0, [], "parts must be above 0"),
        (2, (), "memory must be a list, as HybridModel.new_memory gives, got tuple"),
        (1, [], r"the loss of part 0 must be a scalar, got shape \(2,\); sum it"),
    ],
)
def test_what_is_refused(parts, memory, message):
    with pytest.raises(ValueError, match=message):
        backward_in_parts(lambda *_: torch.zeros(2), parts, memory)


def test_gradients_must_be_on():
    with torch.no_grad(), pytest.raises(ValueError, match="gradients, which are switched off"):
        backward_in_parts(lambda *_: torch.zeros(()), 1, [])


def _memory(mixer, rows: int) -> Mamba2Cache:
    cache = mixer.new_cache(rows)
    return Mamba2Cache(*(torch.randn_like(tensor).requires_grad_() for tensor in (cache.conv, cache.ssm)))


def _weighted(y, memory, weights) -> torch.Tensor:
    return sum((tensor * weight).sum() for tensor, weight in zip((y, memory.conv, memory.ssm), weights, strict=True))


def _chained(ranks, documents, carried, cuts, segments, scan, recompute):
    """Batches in a row whose graph is not cut, against one batch, against single steps."""
    groups, config = groups_of(1, ranks), Mamba2Config(d_state=3, headdim=4, chunk_size=3, dt_init_range=(0.1, 1.0))
    mixer = Mamba2Mixer(config, 8, groups, state_scan=scan, recompute=recompute, dtype=torch.float64)
    whole = Mamba2Mixer(config, 8, ParallelGroups.alone(), dtype=torch.float64)
    rows = len(documents)
    u, entering = torch.randn(rows, cuts[-1], 8, dtype=torch.float64), _memory(mixer, rows)
    weights = [torch.randn_like(tensor) for tensor in (u, entering.conv, entering.ssm)]
    # the whole, then cut
    leaves = [tensor.detach().requires_grad_() for tensor in (u, entering.conv, entering.ssm)]
    memory = Mamba2Cache(*leaves[1:])
    y = whole(leaves[0], SegmentTable.contiguous(cuts[-1], 1, documents=documents, carried=carried), memory)
    _weighted(y, memory, weights).backward()
    _check_steps(whole, documents, carried, leaves, weights)
    mine, memory, total = [], Mamba2Cache(entering.conv, entering.ssm), 0.0
    for (start, end), cut in zip(itertools.pairwise(cuts), segments, strict=True):
        within = rows_between(documents, start, end)
        if start == 0:
            within["carried"] = carried
        table = SegmentTable(cut, ranks=ranks, **within)
        shards = [table.shard(tensor[:, start:end], groups.cp.rank).detach() for tensor in (u, weights[0])]
        mine.append((shards[0].requires_grad_(), table.shard(leaves[0].grad[:, start:end], groups.cp.rank)))
        y = mixer(shards[0], table, memory)
        total = total + (y * shards[1]).sum()
    _weighted(total, memory, [1.0, *weights[1:]]).backward()
    for shard, expected in mine:
        assert_close(shard.grad, expected, EXACT, "gradient of u")
    for name, tensor, leaf in (("conv", entering.conv, leaves[1]), ("ssm", entering.ssm, leaves[2])):
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (tensor, leaf)]
        assert_close(*grads, EXACT, f"gradient of memory.{name}")
    assert_same_gradients(mixer, whole, groups)


def _check_steps(mixer, documents, carried, leaves, weights) -> None:
    """The gradients of `leaves` are those of single steps."""
    again = [leaf.detach().requires_grad_() for leaf in leaves]
    total = 0.0
    for row, offsets in enumerate(documents):
        for start, end in itertools.pairwise(offsets):
            cache = mixer.new_cache(1)
            if start == 0 and carried[row]:
                cache = Mamba2Cache(again[1][row : row + 1], again[2][row : row + 1])
            for token in range(start, end):
                y = mixer.step(again[0][row : row + 1, token : token + 1], cache)
                total = total + (y * weights[0][row, token]).sum()
        total = _weighted(total, cache, [1.0, *(weight[row] for weight in weights[1:])])
    grads = torch.autograd.grad(total, again, materialize_grads=True)
    for name, leaf, grad in zip(("u", "conv", "ssm"), leaves, grads, strict=True):
        assert_close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, grad, EXACT, f"{name} by steps")


# a failure ends the ranks, so looking for a smaller one would take minutes
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(documents(18), st.sets(st.integers(1, 17), max_size=3), scans, recomputes, st.data())
def test_gradients_through_memory(documents, cuts, scan, recompute, data):
    documents = [sorted(set(row)) for row in documents]  # a row that is carried begins with tokens
    carried = [data.draw(st.booleans()) for _ in documents]
    edges = [0, *sorted(cuts), 18]
    cut = [data.draw(segments(end - start, 3)) for start, end in itertools.pairwise(edges)]
    run_ranks(3, _chained, 3, documents, carried, edges, cut, scan, recompute)
