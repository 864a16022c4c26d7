"""A model or mixer split any way equals the whole one: output, loss, input gradient, every parameter gradient."""

import pytest
import torch

from mamba2_dist import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Mamba2Config,
    Mamba2Mixer,
    ParallelConfig,
    ParallelGroups,
)
from mamba2_dist.config import MLPConfig

from ..distributed import run_ranks
from ..splits import SCANS, assert_same_gradients, groups_of, make_table
from ..tolerances import EXACT, assert_close

SEQLEN = 24
# a document over three ranks, empty neighbours, length 1, starts on and beside cuts, and a row with one document
DOCUMENTS = [[0, 0, 3, 3, 4, 19, 19, 24], [0, 6, 7, 8, 12, 13, 18, 24, 24], [0, 24]]
SPLITS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2)]


def _mamba(ngroups: int) -> Mamba2Config:
    return Mamba2Config(d_state=6, headdim=4, ngroups=ngroups, chunk_size=5, dt_init_range=(0.1, 1.0))


def _table(layout, cp, packed):
    return make_table(layout, SEQLEN, cp, DOCUMENTS if packed else [[0, SEQLEN]] * len(DOCUMENTS))


def _mixer(tp, cp, ngroups, layout, packed, scan, sequence_parallel):
    # two nodes, or three of a rank each
    node_size = max(tp * cp // 2, 1) if scan == "hierarchical" else None
    groups, table = groups_of(tp, cp, node_size=node_size), _table(layout, cp, packed)
    options = {"dtype": torch.float64}
    mixer = Mamba2Mixer(_mamba(ngroups), 16, groups, state_scan=scan, sequence_parallel=sequence_parallel, **options)
    whole = Mamba2Mixer(_mamba(ngroups), 16, ParallelGroups.alone(), **options)
    u = torch.randn(len(DOCUMENTS), SEQLEN, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(u)

    def mine(tensor):
        local = table.shard(tensor, groups.cp.rank)
        return local.chunk(tp, dim=1)[groups.tp.rank] if sequence_parallel else local

    expected = whole(u, _table("contiguous", 1, packed))
    (expected * weight).sum().backward()
    local = mine(u).detach().requires_grad_()
    output = mixer(local, table)
    (output * mine(weight)).sum().backward()
    assert_close(output, mine(expected), EXACT, "output")
    assert_close(local.grad, mine(u.grad), EXACT, "input gradient")
    assert_same_gradients(mixer, whole, groups)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize(
    ("tp", "cp", "scan"),
    [(*split, scan) for split in SPLITS for scan in (SCANS if split[1] > 1 else ["auto"])],
)
def test_mixer(tp, cp, scan, ngroups, layout):
    for packed in (False, True):
        run_ranks(tp * cp, _mixer, tp, cp, ngroups, layout, packed, scan, False)


def _mixer_by_every_scan(layout):
    for scan in SCANS:
        _mixer(1, 8, 2, layout, True, scan, False)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
def test_mixer_on_eight_ranks(layout):
    run_ranks(8, _mixer_by_every_scan, layout)


@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (4, 1), (2, 2)])
def test_mixer_sequence_parallel(tp, cp, ngroups):
    run_ranks(tp * cp, _mixer, tp, cp, ngroups, "contiguous", True, "auto", True)


def _without_segments():
    groups, config = groups_of(2, 1), _mamba(1)
    mixer = Mamba2Mixer(config, 16, groups, sequence_parallel=True, dtype=torch.float64)
    whole = Mamba2Mixer(config, 16, ParallelGroups.alone(), dtype=torch.float64)
    u = torch.randn(2, 8, 16, dtype=torch.float64)
    mine = lambda tensor: tensor.chunk(2, dim=1)[groups.tp.rank]  # noqa: E731
    assert_close(mixer(mine(u)), mine(whole(u)), EXACT)
    assert_close(mixer.matrix(mine(u)), whole.matrix(u).chunk(2, dim=1)[groups.tp.rank], EXACT)


def test_sequence_parallel_rows_of_one_document():
    run_ranks(2, _without_segments)


def _model(tp, cp, ngroups, layout, packed, options):
    groups, table = groups_of(tp, cp), _table(layout, cp, packed)
    config = HybridConfig(
        pattern="M*-M",
        d_model=16,
        vocab_size=32,
        tie_embeddings=options["tied"],
        mamba=_mamba(ngroups),
        attention=AttentionConfig(head_dim=4, nheads_kv=options["nheads_kv"], rope_theta=options["theta"]),
        mlp=MLPConfig(d_ff=24, activation=options["activation"]),
    )
    parallel = ParallelConfig(
        tp=tp, cp=cp, sequence_parallel=options["sequence_parallel"], attention=options.get("attention", "auto")
    )
    model = HybridModel(config, groups, parallel, dtype=torch.float64)
    whole = HybridModel(config, ParallelGroups.alone(), dtype=torch.float64)
    tokens = torch.randint(0, 32, (len(DOCUMENTS), SEQLEN))
    labels = torch.randint(0, 32, tokens.shape)
    labels[0, 5], labels[1, :3] = -100, -100

    expected = whole(tokens, labels, _table("contiguous", 1, packed))
    expected.sum().backward()
    local = table.shard(tokens, groups.cp.rank), table.shard(labels, groups.cp.rank)
    losses = model(*local, table)
    losses.sum().backward()
    assert_close(losses, table.shard(expected, groups.cp.rank), EXACT, "loss")
    with torch.no_grad():
        logits = table.shard(whole(tokens, None, _table("contiguous", 1, packed)), groups.cp.rank)
        assert_close(model(local[0], None, table), logits.chunk(tp, dim=-1)[groups.tp.rank], EXACT, "logits")
    assert_same_gradients(model, whole, groups)


PLAIN = {"tied": True, "nheads_kv": 2, "theta": None, "activation": "swiglu", "sequence_parallel": False}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize(("tp", "cp"), SPLITS, ids=lambda n: str(n))
def test_hybrid_model(tp, cp, ngroups, layout):
    for packed in (False, True):
        run_ranks(tp * cp, _model, tp, cp, ngroups, layout, packed, PLAIN)


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": False, "theta": 1e4},
        {"nheads_kv": 1, "activation": "relu2"},
        {"nheads_kv": 4, "activation": "gelu", "theta": 1e4},
        {"sequence_parallel": True, "tied": False},
        {"sequence_parallel": True, "nheads_kv": 1},
        {"attention": "ulysses", "nheads_kv": 4, "theta": 1e4},
        {"attention": "all_gather", "nheads_kv": 4, "theta": 1e4},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (4, 1), (2, 2)])
def test_hybrid_model_options(tp, cp, changes):
    run_ranks(tp * cp, _model, tp, cp, 1, "contiguous", True, {**PLAIN, **changes})
