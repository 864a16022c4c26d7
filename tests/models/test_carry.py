"""Batches that go on where the last one stopped equal the uncut rows: losses, and gradients with states detached."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mamba2_dist import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Mamba2Config,
    Mamba2Mixer,
    ParallelConfig,
    ParallelGroups,
    SegmentTable,
)
from mamba2_dist.modules.mixer import Mamba2Cache
from mamba2_dist.parallel.carry import Carry
from mamba2_dist.parallel.conv import conv1d_over_segments
from mamba2_dist.parallel.ledger import record_collectives
from mamba2_dist.parallel.segments import rows_between
from mamba2_dist.parallel.ssd import SSDOverSegments

from ..distributed import run_ranks
from ..splits import assert_same_gradients, groups_of
from ..strategies import documents, recomputes, scans, segments
from ..tolerances import EXACT, RELATIVE, assert_close

SEQLEN = 24
# a document over all batches, one that ends where a batch does, empty ones, lengths 1 and 2
DOCUMENTS = [[0, 24], [0, 0, 3, 3, 9, 10, 24], [0, 8, 11, 11, 13, 20, 20, 24, 24]]
# batches of 9, 2, 1, 8 and 4 tokens, two of them shorter than the convolution's reach
CUTS = [0, 9, 11, 12, 20, 24]


def _config(pattern: str = "M-M", **options) -> HybridConfig:
    mamba = Mamba2Config(d_state=6, headdim=4, ngroups=2, chunk_size=5, dt_init_range=(0.1, 1.0))
    attention = AttentionConfig(head_dim=4, nheads_kv=2, rope_theta=1e4)
    return HybridConfig(pattern=pattern, d_model=16, vocab_size=32, mamba=mamba, attention=attention, **options)


def _cut(layout: str, seqlen: int, cp: int, **options) -> SegmentTable:
    """A table by name; "uneven" has ranks without tokens first and last."""
    if layout != "uneven":
        return getattr(SegmentTable, layout)(seqlen, cp, **options)
    few = min(2, seqlen)
    return SegmentTable.uneven({1: [seqlen], 2: [0, seqlen], 4: [0, few, seqlen - few, 0]}[cp], **options)


def _by_steps(step, new_cache, rows, documents, cuts):
    """What `step` gives for every token of every row, each document from an empty cache, detached at the cuts."""
    found = []
    for row, offsets in enumerate(documents):
        parts = []
        for start, end in itertools.pairwise(offsets):
            cache = new_cache()
            for token in range(start, end):
                for memory in filter(None, cache if token in cuts else []):
                    memory.conv, memory.ssm = memory.conv.detach(), memory.ssm.detach()
                parts.append(step(rows[row : row + 1, token : token + 1], cache))
        found.append(torch.cat(parts, dim=1))
    return torch.cat(found)


def _uncut_losses(model, tokens, labels, documents, cuts):
    logits = _by_steps(model.step, lambda: model.new_cache(1), tokens, documents, cuts)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def _model(tp, cp, layouts, recompute, sequence_parallel):
    groups, config, float64 = groups_of(tp, cp), _config(), {"dtype": torch.float64}
    parallel = ParallelConfig(tp=tp, cp=cp, sequence_parallel=sequence_parallel)
    model = HybridModel(config, groups, parallel, recompute=recompute, **float64)
    whole = HybridModel(config, ParallelGroups.alone(), **float64)
    tokens, labels = torch.randint(0, 32, (2, len(DOCUMENTS), SEQLEN))
    cuts = [0, 8, 16, 24] if sequence_parallel else CUTS
    expected = _uncut_losses(whole, tokens, labels, DOCUMENTS, cuts)
    uncut = whole(tokens, labels, SegmentTable.contiguous(SEQLEN, 1, documents=DOCUMENTS))
    assert_close(uncut, expected, EXACT, "the reference")
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    memory = model.new_memory(len(DOCUMENTS))
    for (start, end), layout in zip(itertools.pairwise(cuts), itertools.cycle(layouts), strict=False):
        table = _cut(layout, end - start, cp, **rows_between(DOCUMENTS, start, end))
        mine = [table.shard(whole[:, start:end], groups.cp.rank) for whole in (tokens, labels, expected, weight)]
        losses = model(*mine[:2], table, memory)
        assert_close(losses, mine[2], EXACT, f"losses of tokens {start} to {end}")
        (losses * mine[3]).sum().backward()
    assert_same_gradients(model, whole, groups)


LAYOUTS = [["contiguous"], ["zigzag"], ["uneven"], ["zigzag", "uneven", "contiguous"]]


@pytest.mark.parametrize(
    ("tp", "cp", "layouts"),
    [(*split, layouts) for split in [(1, 2), (1, 4), (2, 2)] for layouts in LAYOUTS]
    + [(*split, LAYOUTS[-1]) for split in [(1, 1), (2, 1), (4, 1)]],
    ids=str,
)
def test_batches_in_a_row_are_the_uncut_rows(tp, cp, layouts):
    run_ranks(tp * cp, _model, tp, cp, layouts, "none", False)


@pytest.mark.parametrize("recompute", ["conv", "inner"])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 2)])
def test_recompute(tp, cp, recompute):
    for layout in ("contiguous", "zigzag"):
        run_ranks(tp * cp, _model, tp, cp, [layout], recompute, False)


def test_sequence_parallel():
    run_ranks(4, _model, 2, 2, ["zigzag"], "none", True)


def _fuzzed(ranks, documents, cuts, segments, scan, recompute):
    groups, config = groups_of(1, ranks), Mamba2Config(d_state=3, headdim=4, chunk_size=3, dt_init_range=(0.1, 1.0))
    mixer = Mamba2Mixer(config, 8, groups, state_scan=scan, recompute=recompute, dtype=torch.float64)
    whole = Mamba2Mixer(config, 8, ParallelGroups.alone(), dtype=torch.float64)
    u = torch.randn(len(documents), cuts[-1], 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(u)
    step = lambda token, cache: whole.step(token, cache[0])  # noqa: E731
    expected = _by_steps(step, lambda: [whole.new_cache(1)], u, documents, cuts)
    (expected * weight).sum().backward()
    memory = mixer.new_cache(len(documents))
    for (start, end), cut in zip(itertools.pairwise(cuts), segments, strict=True):
        table = SegmentTable(cut, ranks=ranks, **rows_between(documents, start, end))
        mine = [table.shard(whole[:, start:end], groups.cp.rank) for whole in (u, expected, weight, u.grad)]
        shard = mine[0].detach().requires_grad_()
        y = mixer(shard, table, memory)
        assert_close(y, mine[1], EXACT, f"tokens {start} to {end}")
        (y * mine[2]).sum().backward()
        assert_close(shard.grad, mine[3], EXACT, f"input gradient of tokens {start} to {end}")
    assert_same_gradients(mixer, whole, groups)


# a failure ends the ranks, so looking for a smaller one would take minutes
@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(documents(18), st.sets(st.integers(1, 17), max_size=3), scans, recomputes, st.data())
def test_fuzzed_documents_batches_and_cuts(documents, cuts, scan, recompute, data):
    edges = [0, *sorted(cuts), 18]
    cut = [data.draw(segments(end - start, 3)) for start, end in itertools.pairwise(edges)]
    run_ranks(3, _fuzzed, 3, documents, edges, cut, scan, recompute)


def _triton(ranks, layout):
    group, documents, cuts = groups_of(1, ranks).states, [[0, 40], [0, 7, 29, 29, 40]], [0, 18, 20, 40]
    A, D, weight = -torch.rand(2), torch.randn(2), torch.randn(16, 4)
    inputs = torch.randn(2, 40, 2, 16), torch.rand(2, 40, 2), torch.randn(2, 40, 1, 16), torch.randn(2, 40, 1, 16)
    conv, ssm = torch.zeros(2, 3, 16), torch.zeros(2, 2, 16, 16)
    for start, end in itertools.pairwise(cuts):
        part = rows_between(documents, start, end)
        table, alone = _cut(layout, end - start, ranks, **part), _cut("contiguous", end - start, 1, **part)
        results = []
        for cut, over, backend in ((table, group, "triton"), (alone, ParallelGroups.alone().states, "torch")):
            carry = Carry(conv, ssm, cut, over)
            shards = [cut.shard(tensor[:, start:end], over.rank).detach().requires_grad_() for tensor in inputs]
            x, dt, B, C = shards
            conv1d_over_segments(B.flatten(2), weight, None, [16], cut, over, carry=carry)
            y = SSDOverSegments(x, dt, A, B, C, 64, cut, over, D=D, backend=backend, carry=carry).outputs()[0]
            grads = torch.autograd.grad(y.square().sum(), shards)
            results.append(([y, *grads], carry.left()))
        (local, left), (whole, (conv, ssm)) = results
        for mine, expected in zip(local, whole, strict=True):
            assert_close(mine, table.shard(expected, group.rank), RELATIVE[torch.float32])
        for mine, expected in zip(left, (conv, ssm), strict=True):
            assert_close(mine, expected, RELATIVE[torch.float32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks hold CPU tensors, which only the interpreter takes")
@pytest.mark.parametrize(("ranks", "layout"), [(1, "contiguous"), (1, "zigzag"), (2, "contiguous"), (4, "uneven")])
def test_triton_carries_states(ranks, layout):
    run_ranks(ranks, _triton, ranks, layout)


def _hybrid(cp, layout):
    groups, tokens = groups_of(1, cp), torch.randint(0, 32, (len(DOCUMENTS), SEQLEN))
    models = [HybridModel(_config("M*M"), g, dtype=torch.float64) for g in (groups, ParallelGroups.alone())]
    memories = [model.new_memory(len(DOCUMENTS)) for model in models]
    for start, end in ((0, 10), (10, 24)):
        part = rows_between(DOCUMENTS, start, end)
        table, alone = _cut(layout, end - start, cp, **part), _cut("contiguous", end - start, 1, **part)
        logits = models[0](table.shard(tokens[:, start:end], groups.cp.rank), None, table, memories[0])
        expected = models[1](tokens[:, start:end], None, alone, memories[1])
        assert_close(logits, table.shard(expected, groups.cp.rank), EXACT)
        for (name, _, mine), (_, _, other) in zip(
            models[0].named_memory(memories[0]), models[1].named_memory(memories[1]), strict=True
        ):
            assert_close(mine, other, EXACT, name)
            assert not mine.requires_grad


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
def test_a_hybrid_split_over_ranks(layout):
    run_ranks(2, _hybrid, 2, layout)


def _counted():
    groups = groups_of(1, 2)
    model, memory = HybridModel(_config("M"), groups), None
    table = SegmentTable.contiguous(8, 2)
    calls = []
    for memory in (None, model.new_memory(1)):
        with record_collectives() as ledger:
            model(torch.zeros(1, 4, dtype=torch.long), None, table, memory)
        calls.append((dict(ledger.calls), dict(ledger.bytes)))
    (plain, _), (carrying, received) = calls
    assert carrying == {**plain, ("broadcast", "states"): 1}
    state, inputs = 8 * 4 * 6, 3 * (32 + 2 * 12)
    assert received["broadcast", "states"] == (4 * (state + inputs) if groups.cp.rank == 0 else 0)


def test_one_broadcast_a_layer():
    run_ranks(2, _counted)


def test_a_memory_is_a_cache_to_step_from():
    model, tokens = HybridModel(_config(), dtype=torch.float64), torch.randint(0, 32, (2, 14))
    cache = model.new_memory(2)
    model(tokens[:, :9], None, None, cache)
    steps = torch.cat([model.step(token, cache) for token in tokens[:, 9:].split(1, dim=1)], dim=1)
    assert_close(steps, model(tokens)[:, 9:], EXACT)


def test_steps_under_autocast_leave_a_memory():
    mixer, u = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16), torch.randn(1, 1, 16)
    cache = mixer.new_cache(1)
    with torch.autocast("cpu", torch.bfloat16):
        mixer.step(u, cache)
    assert {cache.conv.dtype, cache.ssm.dtype} == {torch.float32}
    mixer(u, None, cache)


@pytest.mark.parametrize("scan", ["auto", "serial_exact"])
def test_what_was_carried_may_be_overwritten(scan):
    """Before the backward pass, by whoever has one buffer for all batches."""
    mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16, state_scan=scan)
    table, u = SegmentTable.contiguous(8, 1, batch=2, carried=[True, True]), torch.randn(2, 8, 16)
    gradients = []
    for factor in (1, 2):
        memory = mixer.new_cache(2)
        conv = memory.conv.requires_grad_()
        y = mixer(u, table, memory)
        with torch.no_grad():
            conv.mul_(factor).add_(factor - 1)
        gradients.append(torch.autograd.grad(y.sum(), conv)[0])
    assert torch.equal(*gradients)


def test_what_was_not_carried_is_not_read():
    """Also where it is not finite."""
    model, tokens = HybridModel(_config(), dtype=torch.float64), torch.randint(0, 32, (2, 9))
    memory = model.new_memory(2)
    for _, _, tensor in model.named_memory(memory):
        tensor[1] = float("nan")
    logits = model(
        tokens, None, SegmentTable.contiguous(9, 1, documents=[[0, 4, 9]] * 2, carried=[True, False]), memory
    )
    assert_close(logits[1:], model(tokens[1:], None, SegmentTable.contiguous(9, 1, documents=[[0, 4, 9]])), EXACT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, u: m(u, SegmentTable.contiguous(6, 1, carried=[True])),
            "memory must be given when rows of segments",
        ),
        (lambda m, u: m(u, None, m.new_cache(2)), r"memory\.conv must have shape"),
        (
            lambda m, u: m(u, None, Mamba2Cache(m.new_cache(1).conv, m.new_cache(1).ssm.long())),
            r"memory\.ssm must be torch\.float32, that of new_cache\(batch\), or wider, got torch\.int64",
        ),
        (lambda m, u: m(u, None, Mamba2Cache(m.new_cache(1).conv.half(), m.new_cache(1).ssm)), r"memory\.conv must be"),
        (lambda m, u: checkpoint(lambda u: m(u, None, m.new_cache(1)), u, use_reentrant=False), "memory must not be"),
        (
            lambda m, u: checkpoint(lambda u: m(u, None, m.new_cache(1)), u, use_reentrant=True).sum().backward(),
            "memory must not be",
        ),
        (lambda m, u: SegmentTable.contiguous(6, 1, carried=[True, False]), "carried must say of each of 1 rows"),
        (
            lambda m, u: SegmentTable.contiguous(6, 1, documents=[[0, 0, 6]], carried=[True]),
            r"row 0 is carried and must begin with a document that has tokens, got offsets \[0, 0, 6\]",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(Mamba2Mixer(Mamba2Config(d_state=6, headdim=4), 16), torch.randn(1, 6, 16, requires_grad=True))
