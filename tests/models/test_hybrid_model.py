"""The whole model: stepping, documents, and what it refuses."""

import copy
import operator

import pytest
import torch

from mamba2_dist import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Mamba2Config,
    ParallelConfig,
    ParallelGroups,
    SegmentTable,
)
from mamba2_dist.models.generate import generate
from mamba2_dist.models.hybrid_model import check_split
from mamba2_dist.modules.block import hybrid_layers

from ..distributed import run_ranks
from ..splits import groups_of
from ..tolerances import EXACT, assert_close

CONFIG = HybridConfig(
    pattern="M*-M",
    d_model=16,
    vocab_size=40,
    mamba=Mamba2Config(d_state=6, headdim=4, chunk_size=5),
    attention=AttentionConfig(head_dim=4, nheads_kv=2, rope_theta=1e4),
)


@pytest.mark.parametrize("tied", [True, False])
def test_step_equals_forward(tied):
    config = HybridConfig(**{**vars(CONFIG), "tie_embeddings": tied})
    model, tokens = HybridModel(config, dtype=torch.float64), torch.randint(0, 40, (2, 14))
    cache = model.new_cache(2)
    steps = torch.cat([model.step(token, cache) for token in tokens.split(1, dim=1)], dim=1)
    assert_close(steps, model(tokens), EXACT)


def test_documents_do_not_see_each_other():
    model, tokens = HybridModel(CONFIG, dtype=torch.float64), torch.randint(0, 40, (1, 20))
    packed = model(tokens, None, SegmentTable.contiguous(20, 1, documents=[[0, 7, 8, 20]]))
    alone = torch.cat([model(tokens[:, start:end]) for start, end in ((0, 7), (7, 8), (8, 20))], dim=1)
    # positions differ, attention sees only their differences
    assert_close(packed, alone, EXACT)


def test_generation_is_repeatable_and_stops():
    model = HybridModel(CONFIG)
    first = generate(model, [1, 2, 3], 20, seed=4)
    assert first == generate(model, [1, 2, 3], 20, seed=4)
    assert first != generate(model, [1, 2, 3], 20, seed=5)
    greedy = generate(model, [1, 2, 3], 5, temperature=0)
    assert generate(model, [1, 2, 3], 5, temperature=0, stop=greedy[2]) == greedy[: greedy.index(greedy[2])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 8, dtype=torch.long), None, SegmentTable.contiguous(8, 2)), "made for 2 ranks"),
        (
            lambda m: m(torch.zeros(1, 7, dtype=torch.long), None, SegmentTable.contiguous(8, 1)),
            "tokens must have shape",
        ),
        (lambda m: m(torch.full((1, 8), 40)), r"tokens must lie in \[0, vocab_size = 40\), got 40"),
        (lambda m: m(torch.full((1, 8), -100)), r"tokens must lie in \[0, vocab_size = 40\), got -100"),
        (lambda m: m(torch.zeros(1, 8, dtype=torch.long), torch.full((1, 8), 99)), "labels must lie in"),
        (lambda m: m(torch.zeros(2, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)), "shape of tokens"),
        (lambda m: m(torch.zeros(1, 8, 1, dtype=torch.long)), "tokens must have 2 axes"),
        (lambda m: m.step(torch.zeros(1, 6, dtype=torch.long), m.new_cache(1)), r"shape \(batch, 1\), got \(1, 6\)"),
        (lambda m: generate(m, [], 3), "prompt must hold"),
        (lambda m: generate(m, [1], 3, top_k=0), "top_k not below 1"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(HybridModel(CONFIG))


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_step_by_one_whole_token(layer):
    for sequence_parallel, tokens in ((False, 2), (True, 1)):
        mixer = hybrid_layers(CONFIG, ParallelGroups.alone(), sequence_parallel=sequence_parallel)[layer].mixer
        with pytest.raises(ValueError, match="step takes one token at a time"):
            mixer.step(torch.zeros(1, tokens, 16), mixer.new_cache(1))


def _copied():
    groups = groups_of(1, 2)
    model, table = HybridModel(CONFIG, groups), SegmentTable.contiguous(8, 2)
    twin, tokens = copy.deepcopy(model), torch.randint(0, 40, (1, 4))
    assert torch.equal(twin(tokens, None, table), model(tokens, None, table))
    assert not any(map(operator.is_, twin.parameters(), model.parameters()))


def test_a_split_model_can_be_copied():
    """As for averages of its weights."""
    run_ranks(2, _copied)


@pytest.mark.parametrize(("ngroups", "tp"), [(1, 2), (2, 4), (4, 2)])
def test_a_split_is_judged_without_processes(ngroups, tp):
    mamba = Mamba2Config(d_state=6, headdim=4, ngroups=ngroups)
    check_split(HybridConfig(**{**vars(CONFIG), "mamba": mamba}), ParallelConfig(tp=tp))


@pytest.mark.parametrize("name", ["tp", "cp", "dp"])
def test_sizes_must_agree(name):
    with pytest.raises(ValueError, match=rf"parallel\.{name} \(2\) must equal the groups' {name} \(1\)"):
        HybridModel(CONFIG, parallel=ParallelConfig(**{name: 2}))
