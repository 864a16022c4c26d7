"""The mixer's other faces, its first parameters, and how much it communicates."""

import itertools

import pytest
import torch
from mamba2_dist.kernels.conv1d import causal_conv1d
from mamba2_dist.kernels.norm import gated_rmsnorm_reference
from mamba2_dist.kernels.ssd import ssd_recurrence
from torch.distributed.distributed_c10d import get_pg_count

from mamba2_dist import Mamba2Config, Mamba2Mixer, ParallelGroups, SegmentTable
from mamba2_dist.modules.base import named_records
from mamba2_dist.parallel.cost_model import traffic
from mamba2_dist.parallel.ledger import Ledger, record_collectives

from ..distributed import run_ranks
from ..splits import SCANS, groups_of
from ..tolerances import EXACT, assert_close

CONFIG = Mamba2Config(d_state=6, headdim=4, ngroups=2, chunk_size=5, D_has_hdim=True, dt_limit=(0.01, 0.5))


def _mixer(config: Mamba2Config = CONFIG, **options) -> Mamba2Mixer:
    return Mamba2Mixer(config, 16, **{"dtype": torch.float64, **options})


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_equals_its_definition(norm_before_gate):
    config = Mamba2Config(d_state=6, headdim=4, ngroups=2, chunk_size=5, norm_before_gate=norm_before_gate)
    mixer, u = _mixer(config), torch.randn(2, 13, 16, dtype=torch.float64)
    z, x, B, C, dt = (u @ mixer.in_proj.weight.T).split([32, 32, 12, 12, 8], dim=-1)
    xBC = causal_conv1d(torch.cat([x, B, C], -1), mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activation="silu")
    x, B, C = xBC.split([32, 12, 12], dim=-1)
    y, _ = ssd_recurrence(
        x.unflatten(-1, (8, 4)), dt, -mixer.A_log.exp(), B.unflatten(-1, (2, 6)), C.unflatten(-1, (2, 6)),
        D=mixer.D, dt_bias=mixer.dt_bias, dt_softplus=True,
    )  # fmt: skip
    y = gated_rmsnorm_reference(y.flatten(-2), mixer.norm.weight, z, 1e-5, 16, norm_before_gate)
    assert_close(mixer(u), y @ mixer.out_proj.weight.T, EXACT)


def test_a_table_of_another_batch_is_refused():
    u = torch.randn(4, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"u must have shape \(batch, this rank's tokens\) = \(2, 8\)"):
        _mixer()(u, SegmentTable.contiguous(8, 1, batch=2))
    with pytest.raises(ValueError, match="made for 2 ranks, cp is 1"):
        _mixer()(u, SegmentTable.contiguous(4, 2, batch=4))


def test_step_equals_forward():
    mixer, u = _mixer(), torch.randn(2, 11, 16, dtype=torch.float64)
    cache = mixer.new_cache(2)
    assert_close(torch.cat([mixer.step(token, cache) for token in u.split(1, dim=1)], dim=1), mixer(u), EXACT)


def test_matrix_mixes_tokens_as_the_scan_does():
    mixer, u = _mixer(), torch.randn(2, 9, 16, dtype=torch.float64)
    xBCdt, z = mixer.in_proj.in_two(u, 32)
    x = mixer.conv1d(xBCdt, SegmentTable.contiguous(9, 1, batch=2))[0][0].unflatten(-1, (8, 4))
    y = torch.einsum("bhts,bshp->bthp", mixer.matrix(u), x) + x * mixer.D.view(8, 4)
    assert_close(mixer.out_proj(mixer.norm(y.flatten(-2), z())[0]), mixer(u), EXACT)


def test_published_initialisation():
    mixer = Mamba2Mixer(Mamba2Config(d_state=16, headdim=4), 512)
    A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    assert 1e-3 <= dt.min() < 1.3e-3
    assert 0.08 < dt.max() <= 0.1 + 1e-6
    assert dt.log().mean().item() == pytest.approx(-4.6, abs=0.3)
    assert (mixer.D == 1).all()
    assert mixer.in_proj.weight.abs().max() <= 512**-0.5
    deep = Mamba2Mixer(Mamba2Config(d_state=16, headdim=4), 512, residual_layers=4)
    assert torch.equal(deep.out_proj.weight, mixer.out_proj.weight / 2)


def _same_parameters(tp: int, ngroups: int):
    config = Mamba2Config(d_state=6, headdim=4, ngroups=ngroups)
    mixer = _mixer(config, groups=groups_of(tp, 1), seed=5)
    whole = dict(_mixer(config, groups=ParallelGroups.alone(), seed=5).named_parameters())
    whole_records = dict(named_records(_mixer(config, groups=ParallelGroups.alone())))
    for name, record in named_records(mixer):
        partition, parameter = record.partition, dict(mixer.named_parameters())[name]
        parts = whole_records[name].partition
        for part, at, whole_at in zip(partition.parts, partition.offsets, parts.offsets, strict=True):
            mine = parameter.narrow(partition.dim, at, part.length)
            assert torch.equal(mine, whole[name].narrow(partition.dim, whole_at + part.start, part.length)), name


@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_same_model_whatever_the_tp(tp, ngroups):
    run_ranks(tp, _same_parameters, tp, ngroups)


def _count(tp: int, cp: int, ngroups: int, sequence_parallel: bool) -> dict:
    groups = groups_of(tp, cp)
    mixer = Mamba2Mixer(
        Mamba2Config(d_state=6, headdim=4, ngroups=ngroups), 16, groups, sequence_parallel=sequence_parallel
    )
    table = SegmentTable.contiguous(16, cp)
    u = torch.randn(1, 16 // cp // (tp if sequence_parallel else 1), 16, requires_grad=True)
    with record_collectives() as forward:
        y = mixer(u, table)
    with record_collectives() as backward:
        y.sum().backward()
    return {"forward": dict(forward.calls), "backward": dict(backward.calls)}


REDUCE, GATHER, SCATTER = ("all_reduce", "tp"), ("all_gather", "tp"), ("reduce_scatter", "tp")
HALO, STATES = ("all_to_all", "cp"), ("all_gather", "states")


@pytest.mark.parametrize(
    ("split", "forward", "backward"),
    [
        ({"tp": 1, "cp": 1, "ngroups": 1}, {}, {}),
        ({"tp": 2, "cp": 1, "ngroups": 2}, {REDUCE: 1}, {REDUCE: 1}),
        ({"tp": 2, "cp": 1, "ngroups": 2, "sp": True}, {GATHER: 1, SCATTER: 1}, {GATHER: 1, SCATTER: 1}),
        # one group on two ranks: squared sums of the norm, and B's and C's rows of in_proj, conv weight and conv bias
        ({"tp": 2, "cp": 1, "ngroups": 1}, {REDUCE: 2}, {REDUCE: 5}),
        # two groups on four ranks: the same among the two that share a group
        ({"tp": 4, "cp": 1, "ngroups": 2}, {REDUCE: 1, ("all_reduce", "tp part"): 1},
         {REDUCE: 1, ("all_reduce", "tp part"): 4}),
        # the halo, then the states with their decays; backward the same way round
        ({"tp": 1, "cp": 2, "ngroups": 1}, {HALO: 1, STATES: 1}, {HALO: 1, STATES: 1}),
        ({"tp": 2, "cp": 2, "ngroups": 2}, {REDUCE: 1, HALO: 1, STATES: 1}, {REDUCE: 1, HALO: 1, STATES: 1}),
    ],
    ids=str,
)  # fmt: skip
def test_collectives_of_a_block(split, forward, backward):
    ranks = split["tp"] * split["cp"]
    for counts in run_ranks(ranks, _count, split["tp"], split["cp"], split["ngroups"], split.get("sp", False)):
        assert counts == {"forward": forward, "backward": backward}


def _states_traffic(ranks: int, node_size: int) -> dict:
    """By backend and layout, of states: launches, messages and bytes of the forward pass and of the backward."""
    groups, found = groups_of(1, ranks, node_size=node_size), {}
    for backend, layout in itertools.product(EXCHANGES, LAYOUTS):
        mixer = Mamba2Mixer(Mamba2Config(d_state=6, headdim=8), 16, groups, state_scan=backend)
        with record_collectives() as forward:
            y = mixer(torch.randn(1, 2, 16, requires_grad=True), getattr(SegmentTable, layout)(2 * ranks, ranks))
        with record_collectives() as backward:
            y.sum().backward()
        found[backend, layout] = [_of_states(forward), _of_states(backward)]
    return found


def _of_states(ledger: Ledger) -> tuple:
    counters = ledger.calls, ledger.messages, ledger.bytes
    return tuple(sum(each[key] for key in each if key[1].startswith("states")) for each in counters)


EXCHANGES = [scan for scan in SCANS if scan != "serial_exact"]
LAYOUTS = {"contiguous": 1, "zigzag": 2}  # segments of a rank


@pytest.mark.parametrize(("ranks", "node_size"), [(3, 1), (4, 1), (4, 2), (8, 4)])
def test_the_busiest_ranks_ledger_equals_the_formula(ranks, node_size):
    found, state, decay = run_ranks(ranks, _states_traffic, ranks, node_size), 4 * 4 * 8 * 6, 4 * 4
    for case in itertools.product(EXCHANGES, LAYOUTS):
        place = ranks, ranks // node_size, LAYOUTS[case[1]]
        expected = traffic(case[0], *place, state, 0 if case[0] == "ring" else decay)
        for direction in zip(*(ledgers[case] for ledgers in found), strict=True):
            assert tuple(map(max, *direction)) == (expected.launches, expected.messages, expected.bytes), case
    if ranks == 8:
        moved = {backend: max(ledgers[backend, "contiguous"][0][2] for ledgers in found) for backend in EXCHANGES}
        assert moved["sliced"] <= 2.1 * state
        assert moved["all_gather"] == 7 * (state + decay)


def test_groups_that_do_not_fit_are_refused():
    groups = ParallelGroups.alone()
    groups.cp = groups.cp.__class__("cp", (0, 1))
    with pytest.raises(ValueError, match=r"groups.states \(1 ranks\) must be the ranks of groups.cp \(2\)"):
        Mamba2Mixer(CONFIG, 16, groups)
    with pytest.raises(ValueError, match="state_scan must be one of"):
        Mamba2Mixer(CONFIG, 16, ParallelGroups.alone(), state_scan="gossip")


def _without_groups() -> int:
    before = get_pg_count()
    _mixer()
    return get_pg_count() - before


def test_a_mixer_without_groups_makes_none():
    assert run_ranks(2, _without_groups) == [0, 0]


def test_segments_are_asked_for():
    groups = ParallelGroups.alone()
    groups.cp = groups.states = groups.cp.__class__("cp", (0, 1))
    with pytest.raises(ValueError, match=r"segments must be given when cp \(2\)"):
        Mamba2Mixer(CONFIG, 16, groups)(torch.zeros(1, 4, 16))
