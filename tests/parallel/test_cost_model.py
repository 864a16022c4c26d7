"""Traffic against counting by hand and by schedule, time against published measurements."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.cost_model import (
    H200,
    RING_BLOCKS,
    SIMPLEST_FIRST,
    Link,
    Machine,
    Operation,
    Traffic,
    all_reduce_time,
    choose,
    exchange_time,
    nodes_of,
    ring_time,
    traffic,
)

STATE, DECAY = 1000, 10
STATE_27B, STATE_8B = 4 * 80 * 64 * 128, 4 * 128 * 64 * 128
WITHOUT_PEER_MEMORY = replace(H200, peer_memory=None)


@pytest.mark.parametrize(
    ("backend", "place", "expected"),
    [  # ranks, nodes, segments; launches, messages, bytes
        ("all_gather", (4, 1, 1), Traffic(1, 3, 3 * 1010)),
        ("all_gather", (4, 2, 2), Traffic(1, 3, 3 * 2020)),
        ("sliced", (4, 1, 1), Traffic(2, 6, 3 * 260 + 3 * 250)),
        ("sliced", (4, 1, 2), Traffic(2, 6, 6 * 260 + 6 * 250)),
        ("hierarchical", (4, 1, 2), Traffic(2, 6, 6 * 260 + 6 * 250)),  # one node: no rounds
        ("hierarchical", (4, 2, 1), Traffic(3, 3, 510 + 510 + 500)),  # two runs: one round
        # runs of nodes 0, 1, 0: one round, in which node 0 and node 1 each receive once
        ("hierarchical", (4, 2, 2), Traffic(3, 3, 1020 + 510 + 1000)),
        ("hierarchical", (4, 4, 1), Traffic(2, 2, 2 * 1010)),  # a node is a rank: log_step
        ("log_step", (4, 1, 1), Traffic(2, 2, 2 * 1010)),
        ("log_step", (5, 1, 1), Traffic(3, 3, 3 * 1010)),
        ("log_step", (4, 1, 2), Traffic(3, 5, 5 * 1010)),  # 4 apart, ranks receive once
        ("ring", (4, 1, 2), Traffic(4 * RING_BLOCKS, 2 * RING_BLOCKS, 2000)),
        ("symmetric_memory", (2, 1, 2), Traffic(1, 1, 2020)),
        ("symmetric_memory", (4, 1, 1), Traffic(2, 6, 3 * 260 + 3 * 250)),
    ],
)
def test_traffic_by_hand(backend, place, expected):
    assert traffic(backend, *place, STATE, DECAY) == expected


@pytest.mark.parametrize("backend", ["all_gather", "sliced", "hierarchical", "log_step", "ring", "symmetric_memory"])
def test_a_rank_alone_has_no_traffic(backend):
    assert traffic(backend, 1, 1, 2, STATE, DECAY) == Traffic(0, 0, 0)
    assert exchange_time(backend, 1, 1, 2, STATE, H200) == 0


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 13])
def test_log_step_against_its_schedule(ranks, layout):
    """Doubling distances along the chain of a real table."""
    table = getattr(SegmentTable, layout)(4 * ranks, ranks)
    holders = table.holders.tolist()
    distance, launches, messages = 1, 0, [0] * ranks
    while distance < len(holders):
        for link in range(distance, len(holders)):
            messages[holders[link]] += holders[link - distance] != holders[link]
        distance, launches = 2 * distance, launches + 1
    expected = Traffic(launches, max(messages), max(messages) * 1010)
    assert traffic("log_step", ranks, 1, table.slots_per_rank, STATE, DECAY) == expected


def test_times_by_hand():
    machine = replace(
        H200, node=Link(1e-6, 1e9), all_gather=Link(2e-6, 2e9), all_to_all=Link(3e-6, 3e9), rail=Link(10e-6, 1e8),
        peer_memory=Link(1e-6, 4e9), barrier_s=5e-6, node_step_s=1e-7, rail_step_s=2e-7, rail_message_s=5e-7,
    )  # fmt: skip
    time = lambda *place: exchange_time(*place, machine, decay_bytes=DECAY)  # noqa: E731
    assert time("all_gather", 2, 1, 1, STATE) == pytest.approx(2e-6 + 1010 / 2e9)
    assert time("all_gather", 4, 1, 1, STATE) == pytest.approx(2e-6 + 2e-7 + 3030 / 2e9)
    # two rails a node are slower than its links; two steps in the nodes beyond the first, one between them
    assert time("all_gather", 4, 2, 1, STATE) == pytest.approx(2e-6 + 1e-7 + 10e-6 + 2e-7 + 3030 / 2e8)
    assert time("sliced", 2, 1, 1, STATE) == pytest.approx(6e-6 + 1010 / 3e9)
    # of three other ranks two are on the other node
    assert time("sliced", 4, 2, 1, STATE) == pytest.approx(2 * (10e-6 + 5e-7) + 2 / 3 * 1530 / 1e8)
    assert time("hierarchical", 4, 2, 1, STATE) == pytest.approx(6e-6 + 1010 / 3e9 + 10e-6 + 510 / 1e8)
    assert time("log_step", 4, 1, 1, STATE) == pytest.approx(2 * (1e-6 + 1010 / 1e9))
    assert time("log_step", 4, 2, 2, STATE) == pytest.approx(3 * 10e-6 + 5 * 1010 / 1e8 + 2 * 5e-7)
    assert time("symmetric_memory", 2, 1, 1, STATE) == pytest.approx(6e-6 + 1010 / 4e9)
    assert time("ring", 2, 1, 1, STATE) == pytest.approx(1e-6 + 250 / 1e9 + 3 * (1e-7 + 250 / 1e9))


def test_blocks_of_the_ring_by_hand():
    # h hops of (latency + s/K b), K - 1 blocks after the first, of (step + s/K b)
    hops, link, size = 63, H200.node, STATE_8B / RING_BLOCKS
    by_hand = hops * link.time(size) + (RING_BLOCKS - 1) * (H200.node_step_s + size / link.bytes_per_s)
    assert exchange_time("ring", 64, 1, 1, STATE_8B, H200) == pytest.approx(by_hand)


def test_all_reduce_by_hand():
    machine = replace(H200, all_gather=Link(2e-6, 2e9), rail=Link(1e-5, 5e8), node_step_s=1e-7, rail_step_s=2e-7)
    assert all_reduce_time(800, 1, 1, machine) == 0
    assert all_reduce_time(800, 4, 1, machine) == pytest.approx(2e-6 + 4e-7 + 1.5 * 800 / 2e9)
    assert all_reduce_time(800, 4, 2, machine) == pytest.approx(2e-6 + 4e-7 + 1.5 * 800 / 1e9)


@pytest.mark.parametrize("segments", [1, 2])
def test_what_grows_with_ranks(segments):
    def time(backend: str, ranks: int) -> float:
        return exchange_time(backend, ranks, ranks // 8, segments, STATE_8B, H200)

    for backend in ("all_gather", "ring"):
        assert time(backend, 4096) / time(backend, 1024) == pytest.approx(4, rel=0.1)
    # a round for every doubling
    step = time("hierarchical", 128) - time("hierarchical", 64)
    assert time("hierarchical", 4096) - time("hierarchical", 2048) == pytest.approx(step)
    assert step == pytest.approx(H200.rail.time(segments * STATE_8B / 8) + (segments - 1) * H200.rail_message_s)


def test_choice():
    assert choose(2, 1, 1, STATE_27B, H200) == "all_gather"
    fast = replace(H200, peer_memory=Link(3e-6, 370e9))
    assert choose(2, 1, 1, STATE_27B, fast, among=SIMPLEST_FIRST) == "symmetric_memory"
    assert choose(1, 1, 1, STATE_27B, H200) == "all_gather"  # nothing travels: the simplest
    for ranks in (16, 64, 1024):
        assert choose(ranks, ranks // 8, 1, STATE_8B, H200) == "hierarchical"
    assert choose(64, 8, 1, STATE_8B, H200, among=("all_gather", "log_step")) == "log_step"
    # one rank on each node: rounds, unless messages are few enough to send slices
    assert choose(64, 64, 1, STATE_8B, H200) == "sliced"
    assert choose(1024, 1024, 1, STATE_8B, H200) == "log_step"


def test_of_two_as_cheap_the_simple_one():
    message = replace(WITHOUT_PEER_MEMORY, all_gather=Link(26e-6, 264e9))
    by_message = replace(message, node=Link(25e-6, 264e9))
    assert exchange_time("log_step", 2, 1, 1, STATE, by_message) < exchange_time(
        "all_gather", 2, 1, 1, STATE, by_message
    )
    assert choose(2, 1, 1, STATE, by_message) == "all_gather"
    assert choose(2, 1, 1, STATE, replace(message, node=Link(20e-6, 264e9))) == "log_step"


def test_nodes_of_groups():
    assert [nodes_of(ranks, 1, H200) for ranks in (1, 8, 16, 1024)] == [1, 1, 2, 128]
    assert nodes_of(4, 2, H200) == 1
    assert nodes_of(16, 4, H200) == 8
    assert nodes_of(16, 8, H200) == nodes_of(16, 16, H200) == 16
    with pytest.raises(ValueError, match="must fill whole nodes of 8 GPUs or lie on one"):
        nodes_of(12, 1, H200)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: traffic("gossip", 2, 1, 1, STATE), "backend must be one of 'all_gather', .* got 'gossip'"),
        (lambda: traffic("sliced", 6, 4, 1, STATE), r"ranks \(6\) must be divisible by nodes \(4\)"),
        (lambda: traffic("sliced", 0, 1, 1, STATE), "ranks must be above 0, got 0"),
        (lambda: traffic("symmetric_memory", 16, 2, 1, STATE), "needs all ranks on one node, got 2 nodes"),
        (lambda: exchange_time("symmetric_memory", 4, 1, 1, STATE, WITHOUT_PEER_MEMORY), "H200 cannot"),
        (lambda: choose(16, 2, 1, STATE, H200, among=("symmetric_memory",)), "must name a backend for 2 nodes"),
        (lambda: Link(0, 1e9), "latency_s must be above 0, got 0"),
        (lambda: Link("fast", 1e9), "latency_s must be a number, got 'fast'"),
        (lambda: Link(True, 1e9), "latency_s must be a number, got True"),
        (lambda: replace(H200, node_size=2.5), "node_size must be an integer, got 2.5"),
        (lambda: replace(H200, node_size=True), "node_size must be a number, got True"),
        (lambda: replace(H200, name=3), "name must be a string, got 3"),
        (lambda: replace(H200, measured="node"), "measured must be a list of names of fields, got 'node'"),
        (lambda: replace(H200, measured=[3]), r"measured must be a list of names of fields, got \[3\]"),
        (lambda: replace(H200, node_size=0), "node_size must be above 0, got 0"),
        (lambda: replace(H200, rail=3), "rail must be a link, got 3"),
        (lambda: replace(H200, matmul_flops="fast"), "matmul_flops must be a number, got 'fast'"),
        (lambda: replace(H200, measured=("speed",)), "measured must name fields of a machine, got speed"),
        (lambda: Machine.from_dict({"name": "x"}), "rail is missing"),
        (lambda: Machine.from_dict(H200.to_dict() | {"speed": 1}), "speed is unknown"),
        (lambda: Machine.from_dict(H200.to_dict() | {"rail": {"latency": 1}}), "rail must be {latency_s, bytes_per_s}"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_machine_survives_a_file():
    for machine in (H200, WITHOUT_PEER_MEMORY):
        assert Machine.from_dict(machine.to_dict()) == machine


# ms, arXiv 2507.01004, table 2: H100s, 8 a node, 32 heads with states of 128 x 128
ZECO_RANKS = (8, 16, 32, 64, 128, 256)
ZECO_ALL_GATHER = dict(zip(ZECO_RANKS, (0.375, 0.658, 1.616, 2.543, 4.350, 8.514), strict=True))
ZECO_ALL_SCAN = dict(zip(ZECO_RANKS, (0.226, 0.297, 0.448, 0.739, 1.272, 2.165), strict=True))
ZECO_STATE = 4 * 32 * 128 * 128
FITTED = (8, 16, 32, 64)


def _zeco_machine(latency_s: float, bytes_per_s: float, gather_latency_s: float = 1e-6) -> Machine:
    """One kind of link, whose latency between nodes is that inside them; steps of a ring cost nothing of their own."""
    link = Link(latency_s, bytes_per_s)
    return replace(
        H200, node=link, rail=link, all_gather=Link(gather_latency_s, bytes_per_s), node_step_s=1e-12, rail_step_s=1e-6
    )


def _slope(times: dict[int, float]) -> float:
    return np.polyfit(list(times), list(times.values()), 1)[0]


def test_published_all_gather_beyond_the_ranks_it_is_fitted_to():
    """A latency and a bandwidth from 8 to 64 ranks; 128 and 256 ranks, and the slope, within a quarter."""

    def gather(ranks: int, latency_s: float, bytes_per_s: float) -> float:
        machine = _zeco_machine(1e-6, bytes_per_s, latency_s)
        return 1e3 * exchange_time("all_gather", ranks, 1, 1, ZECO_STATE, machine)

    per_byte = [gather(ranks, 1e-12, 1.0) for ranks in FITTED]
    measured = [ZECO_ALL_GATHER[ranks] for ranks in FITTED]
    (latency, inverse), *_ = np.linalg.lstsq(np.stack([np.ones(4), per_byte], 1), measured)
    predicted = {ranks: gather(ranks, latency * 1e-3, 1 / inverse) for ranks in ZECO_RANKS}
    for ranks in (128, 256):
        assert predicted[ranks] == pytest.approx(ZECO_ALL_GATHER[ranks], rel=0.25)
    assert _slope(predicted) == pytest.approx(_slope(ZECO_ALL_GATHER), rel=0.25)
    assert _slope(ZECO_ALL_GATHER) == pytest.approx(0.032, rel=0.03)


def test_published_all_scan_beyond_the_ranks_it_is_fitted_to():
    """The all-gather's bandwidth at 8 to 64 ranks, and a hand-over's latency and what is done once from the same ranks:
    128 and 256 ranks, and the slope, within a quarter."""
    rate = ZECO_STATE / (_slope({ranks: ZECO_ALL_GATHER[ranks] for ranks in FITTED}) * 1e-3)

    def scan(ranks: int, latency_s: float) -> float:
        machine, place = _zeco_machine(latency_s, rate), (ranks, math.ceil(ranks / 8), 1, ZECO_STATE)
        # in the best number of blocks
        return 1e3 * min(ring_time(*place, machine, blocks) for blocks in np.geomspace(1, 2000, 60))

    def once(latency_s: float) -> np.ndarray:
        return np.array([ZECO_ALL_SCAN[ranks] - scan(ranks, latency_s) for ranks in FITTED])

    latency = min(np.geomspace(1e-6, 1e-4, 400), key=lambda latency_s: once(latency_s).std())
    predicted = {ranks: scan(ranks, latency) + once(latency).mean() for ranks in ZECO_RANKS}
    for ranks in (128, 256):
        assert predicted[ranks] == pytest.approx(ZECO_ALL_SCAN[ranks], rel=0.25)
    assert _slope(predicted) == pytest.approx(_slope(ZECO_ALL_SCAN), rel=0.25)
    assert _slope(ZECO_ALL_SCAN) == pytest.approx(0.0078, rel=0.03)


# ms forward and backward of a layer behind its projection, on four B200s (Megatron-LM, pull request 6808): activations
# by all-to-alls, states handed on. Its shape is not given; assumed is that of an 8B hybrid.
MEGATRON = {4096: (5.89, 4.61), 32768: (6.512, 4.357), 131072: (23.975, 13.293)}


@pytest.mark.parametrize("tokens", MEGATRON)
def test_published_ratios_of_all_to_alls(tokens):
    """All-to-alls of z, x, B, C and dt, and of y back, in both passes, added to the time with states."""
    by_activations, by_states = MEGATRON[tokens]
    channels = [8192, 8192, 8 * 128, 8 * 128, 128, 8192]
    received = [3 / 4 * tokens / 4 * 2 * each for each in channels]
    trips = 2 * sum(Operation("all_to_all", 4, 1, 3, size).time(H200) for size in received)
    assert (by_states + 1e3 * trips) / by_states == pytest.approx(by_activations / by_states, rel=0.25)
