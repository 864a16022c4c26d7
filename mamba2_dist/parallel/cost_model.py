"""What an exchange of states costs: messages and bytes exactly, time by a latency and a bandwidth for every link.

With k segments a rank, P ranks on M nodes of g ranks, states of s bytes and decays of a bytes, a rank receives in one
pass

| backend          | bytes                                     | one after the other                  |
|------------------|-------------------------------------------|--------------------------------------|
| all_gather       | (P-1) k (s + a)                           | 1 collective, P-1 steps of its ring  |
| sliced           | (P-1) k (2 s/P + a)                       | 2 all-to-alls                        |
| hierarchical     | (g-1) k (2 s/g + a) + rounds k (s/g + a)  | the same, and log2(k M) rounds       |
| log_step         | rounds k (s + a)                          | log2(k P) rounds                     |
| ring             | k s                                       | k (P-1) hand-overs, in K blocks      |
| symmetric_memory | k (s + a) for P = 2, else as sliced       | 1 or 2 barriers                      |

at most: ranks at an end of the chain receive less, and neighbours on one node are combined before rounds.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from mamba2_dist.kernels.common.checks import check_choice, check_divisible, check_integer, check_number, check_positive

Backend = Literal["all_gather", "sliced", "hierarchical", "log_step", "ring", "symmetric_memory"]
BACKENDS = get_args(Backend)
SIMPLEST_FIRST = ("all_gather", "symmetric_memory", "sliced", "log_step", "ring", "hierarchical")
AUTO = ("all_gather", "sliced", "log_step", "ring", "hierarchical")
"""What `state_scan` "auto" chooses among; not every machine's GPUs read each other's memory."""
RING_BLOCKS = 4
"""Into how many blocks a state is cut that is handed along a chain."""
NEARLY = 1.1  # as cheap
SCORES_SHARE = 0.5
"""Speed of attention's products as a share of that of others; assumed."""
EXCHANGE_PROCESSORS = 4
"""Processors of a GPU, of 132, on which states travel between nodes; assumed to be enough for the links."""
SLOWER = 132 / (132 - EXCHANGE_PROCESSORS)
"""How many times as long a product takes on the others."""


@dataclass(frozen=True)
class Link:
    """A latency in seconds and a bandwidth in bytes per second, one way."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self):
        for name, value in (("latency_s", self.latency_s), ("bytes_per_s", self.bytes_per_s)):
            check_number(name, value)
            check_positive(name, value)

    def time(self, size: float) -> float:
        """Seconds for `size` bytes."""
        return self.latency_s + size / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of GPUs and what joins them. Bandwidths count the bytes that one GPU receives."""

    name: str
    node_size: int
    """GPUs of a node."""
    node: Link
    """One message between two GPUs of a node, while another goes the other way."""
    all_gather: Link
    """An all-gather between two GPUs of a node."""
    all_to_all: Link
    """An all-to-all in a node."""
    peer_memory: Link | None
    """An exchange through another GPU's memory but for its barriers: copies into shared memory, between and from it;
    None: it cannot be done."""
    barrier_s: float
    """A barrier of GPUs that read each other's memory."""
    rail: Link
    """One message between two nodes, over one GPU's share of the network."""
    node_step_s: float
    """A further step of a ring in a node."""
    rail_step_s: float
    """A step of a ring from node to node."""
    rail_message_s: float
    """A further message to another node in the same operation."""
    matmul_flops: float
    """FLOP/s of bf16 products as layers have them."""
    memory_bytes_per_s: float
    """Bytes a copy reads and writes per second."""
    memory_bytes: int
    """Of one GPU."""
    measured: tuple[str, ...] = ()
    """The fields that were measured; the others are assumed."""

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a string, got {self.name!r}")
        if not isinstance(self.measured, list | tuple) or not all(isinstance(name, str) for name in self.measured):
            raise ValueError(f"measured must be a list of names of fields, got {self.measured!r}")
        object.__setattr__(self, "measured", tuple(self.measured))
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in (int, float):
                check_number(item.name, value)
                if item.type is int:
                    check_integer(item.name, value)
                check_positive(item.name, value)
            elif item.type in (Link, Link | None) and not isinstance(value, item.type):
                raise ValueError(f"{item.name} must be a link, got {value!r}")
        unknown = sorted(set(self.measured) - {item.name for item in fields(self)})
        if unknown:
            raise ValueError(f"measured must name fields of a machine, got {', '.join(unknown)}")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Machine":
        """What `to_dict` gave. Raises ValueError with the field that is missing, unknown or wrong."""
        known = {item.name: item.type for item in fields(cls)}
        missing, unknown = sorted(set(known) - set(content)), sorted(set(content) - set(known))
        if missing or unknown:
            wrong = [*(f"{name} is missing" for name in missing), *(f"{name} is unknown" for name in unknown)]
            raise ValueError(f"a machine has the fields {', '.join(known)}; {', '.join(wrong)}")
        values = dict(content)
        for name, kind in known.items():
            if kind in (Link, Link | None) and content[name] is not None:
                try:
                    values[name] = Link(**content[name])
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name} must be {{latency_s, bytes_per_s}}: {error}") from None
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        return asdict(self) | {"measured": list(self.measured)}


# Measured on two H200s of one host, NCCL 2.28: lines through 16 and 256 MiB, where bytes count for more than launches
# from the host; a message both ways takes as long as an all-to-all of the same bytes (16 MiB: 84 us). Peers' memory: a
# line through rows of benchmarks/exchange.py, copies to and from the shared buffer included. The network is assumed:
# 400 Gb/s a GPU, and a latency a little above that of a message inside a node.
H200 = Machine(
    name="H200",
    node_size=8,
    node=Link(26e-6, 299e9),
    all_gather=Link(26e-6, 264e9),
    all_to_all=Link(26e-6, 299e9),
    peer_memory=Link(26.8e-6, 231e9),
    barrier_s=5.6e-6,
    rail=Link(30e-6, 45e9),
    node_step_s=2.5e-6,
    rail_step_s=6e-6,
    rail_message_s=1e-6,
    matmul_flops=666e12,
    memory_bytes_per_s=4.2e12,
    memory_bytes=141 * 10**9,
    measured=(
        "node", "all_gather", "all_to_all", "peer_memory", "barrier_s",
        "matmul_flops", "memory_bytes_per_s", "memory_bytes",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """Of the busiest rank, one layer, one pass: operations started, messages and bytes received."""

    launches: int
    messages: int
    bytes: float


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of `ranks` ranks on `nodes` nodes; every rank waits for it before the next. messages, bytes:
    received; of each rank where they differ."""

    kind: Literal["all_gather", "all_to_all", "message", "read"]
    ranks: int
    nodes: int
    messages: int | np.ndarray
    bytes: float | np.ndarray

    def time(self, machine: Machine) -> float:
        """Seconds until the slowest rank has received everything."""
        messages, size = int(np.max(self.messages)), float(np.max(self.bytes))
        if self.kind == "all_gather":
            return gather_time(size, self.ranks, self.nodes, machine)
        if self.kind == "read":
            assert machine.peer_memory is not None, "refused before"
            return machine.barrier_s + machine.peer_memory.time(size)
        near = machine.node if self.kind == "message" else machine.all_to_all
        if self.nodes == 1:
            return near.time(size)
        # a rank whose messages cross to other nodes; those of its own node come at the same time, over other links
        share = self._crossing()
        crossing = max(round(messages * share), 1)
        return machine.rail.time(size * share) + (crossing - 1) * machine.rail_message_s

    def _crossing(self) -> float:
        """The share of its messages that the slowest rank receives from other nodes."""
        if self.kind == "message":
            return 1.0
        return (self.ranks - self.ranks // self.nodes) / (self.ranks - 1)


def operations(
    backend: str, ranks: int, nodes: int, segments: int, state_bytes: float, decay_bytes: float = 0.0
) -> list[Operation]:
    """What every rank does, one after the other, for any backend but "ring"."""
    if ranks == 1:
        return []
    both = state_bytes + decay_bytes
    if backend == "all_gather":
        return [Operation("all_gather", ranks, nodes, ranks - 1, (ranks - 1) * segments * both)]
    if backend == "log_step":
        return _rounds(_chain(ranks, segments), ranks, nodes, both)
    if backend == "symmetric_memory" and ranks == 2:
        return [Operation("read", ranks, nodes, 1, segments * both)]
    if backend == "symmetric_memory":
        return _transposes("read", ranks, nodes, segments, state_bytes, decay_bytes)
    if backend == "sliced":
        return _transposes("all_to_all", ranks, nodes, segments, state_bytes, decay_bytes)
    assert backend == "hierarchical", backend
    in_node = ranks // nodes
    chain = _chain(nodes, segments)
    runs = chain[np.diff(chain, prepend=-1) != 0]  # neighbours on one node are one element
    between = _rounds(runs, nodes, nodes, state_bytes / in_node + decay_bytes)
    if in_node == 1:
        return between
    there, back = _transposes("all_to_all", in_node, 1, segments, state_bytes, decay_bytes)
    return [there, *between, back]


def _transposes(
    kind: Literal["all_to_all", "read"], ranks: int, nodes: int, segments: int, state_bytes: float, decay_bytes: float
) -> list[Operation]:
    """Slices of all ranks' states to the rank that runs the recurrence on them, and what it found back."""
    others, slice_bytes = ranks - 1, state_bytes / ranks
    there, back = others * segments * (slice_bytes + decay_bytes), others * segments * slice_bytes
    return [Operation(kind, ranks, nodes, others, there), Operation(kind, ranks, nodes, others, back)]


def _chain(holders: int, segments: int) -> np.ndarray:
    """Who holds the segments of a sequence: forth, and back again for a second one, as in zigzag."""
    forth = np.arange(holders)
    return np.concatenate([forth if turn % 2 == 0 else forth[::-1] for turn in range(segments)])


def _rounds(chain: np.ndarray, ranks: int, nodes: int, size: float) -> list[Operation]:
    """An exclusive scan of the chain's elements by doubling distances (Kogge and Stone)."""
    found, distance = [], 1
    while distance < len(chain):
        receivers = chain[distance:][chain[distance:] != chain[:-distance]]
        if len(receivers):
            messages = np.bincount(receivers, minlength=chain.max() + 1)
            found.append(Operation("message", ranks, nodes, messages, messages * size))
        distance *= 2
    return found


def traffic(
    backend: str,
    ranks: int,
    nodes: int,
    segments: int,
    state_bytes: float,
    decay_bytes: float = 0.0,
) -> Traffic:
    """What the busiest rank starts and receives in one pass of one layer.

    ranks, nodes: of the group, as many ranks on every node; segments: of one rank; state_bytes, decay_bytes: of one
    segment's element (float32: 4 batch nheads/tp headdim d_state, and 4 batch nheads/tp). Raises ValueError for a group
    that cannot be.
    """
    _check(backend, ranks, nodes, segments)
    if backend == "ring":
        count = RING_BLOCKS * segments * (ranks > 1)
        # a block is received and sent on
        return Traffic(2 * count, count, segments * state_bytes * (ranks > 1))
    steps = operations(backend, ranks, nodes, segments, state_bytes, decay_bytes)
    # the rank to which most comes in one round need not be that of another
    messages, size = (np.max(sum(each)) for each in ([s.messages for s in steps], [s.bytes for s in steps]))
    return Traffic(len(steps), int(messages), float(size))


def exchange_time(
    backend: str,
    ranks: int,
    nodes: int,
    segments: int,
    state_bytes: float,
    machine: Machine,
    *,
    decay_bytes: float = 0.0,
) -> float:
    """Seconds from the last rank's element to the last rank's entering state, local arithmetic left out.

    Raises ValueError for "symmetric_memory" where it cannot be.
    """
    _check(backend, ranks, nodes, segments)
    if backend == "symmetric_memory" and machine.peer_memory is None:
        raise ValueError(f"backend 'symmetric_memory' reads peers' memory, which {machine.name} cannot; choose another")
    if ranks == 1:
        return 0.0
    if backend == "ring":
        return ring_time(ranks, nodes, segments, state_bytes, machine)
    steps = operations(backend, ranks, nodes, segments, state_bytes, decay_bytes)
    return sum(step.time(machine) for step in steps)


def ring_time(
    ranks: int, nodes: int, segments: int, state_bytes: float, machine: Machine, blocks: int = RING_BLOCKS
) -> float:
    """Seconds to hand a state along the chain: its first block goes all the way, the others follow over the slowest
    link."""
    size = state_bytes / blocks
    crossing, inside = segments * (nodes - 1), segments * (ranks - nodes)
    slowest = machine.rail_step_s + size / machine.rail.bytes_per_s
    if nodes == 1:
        slowest = machine.node_step_s + size / machine.node.bytes_per_s
    return crossing * machine.rail.time(size) + inside * machine.node.time(size) + (blocks - 1) * slowest


def gather_time(received_bytes: float, ranks: int, nodes: int, machine: Machine) -> float:
    """Seconds of a ring all-gather, or of the reduce-scatter that is its reverse. Every GPU of a node brings its rail;
    the ring's latency grows with the ranks."""
    if ranks == 1:
        return 0.0
    latency = machine.all_gather.latency_s + max(ranks - nodes - 1, 0) * machine.node_step_s
    if nodes == 1:
        return latency + received_bytes / machine.all_gather.bytes_per_s
    latency += machine.rail.latency_s + (nodes - 1) * machine.rail_step_s
    return latency + received_bytes / min(machine.all_gather.bytes_per_s, ranks // nodes * machine.rail.bytes_per_s)


def all_reduce_time(size: float, ranks: int, nodes: int, machine: Machine) -> float:
    """Seconds to sum `size` bytes: a ring in a node, a tree between nodes, there and back."""
    if ranks == 1:
        return 0.0
    in_node = ranks // nodes
    steps = 2 * max(in_node - 2, 0) * machine.node_step_s + 2 * math.ceil(math.log2(nodes)) * machine.rail_step_s
    bytes_per_s = machine.all_gather.bytes_per_s
    if nodes > 1:
        bytes_per_s = min(bytes_per_s, in_node * machine.rail.bytes_per_s)
    return machine.all_gather.latency_s + steps + 2 * (ranks - 1) / ranks * size / bytes_per_s


def attention_exchange_time(
    sharing: int, gathering: int, nodes: int, query_bytes: float, kv_bytes: float, machine: Machine
) -> float:
    """Seconds that heads and keys travel in both passes: heads between `sharing` ranks of a node, of queries, keys and
    values there and of results back; then keys and values between `gathering` ranks on `nodes` nodes, gathered in both
    passes and their gradients scattered. query_bytes, kv_bytes: of one rank's tokens."""
    trips, share = 0.0, (sharing - 1) / sharing
    if sharing > 1:
        there, back = (machine.all_to_all.time(size * share) for size in (query_bytes + kv_bytes, query_bytes))
        trips = 2 * (there + back)
    return trips + 3 * gather_time((gathering - 1) * kv_bytes, gathering, nodes, machine)


def choose(
    ranks: int,
    nodes: int,
    segments: int,
    state_bytes: float,
    machine: Machine,
    *,
    among: Sequence[str] = AUTO,
) -> str:
    """The cheapest backend of `among`; on one node the first that comes within a tenth of it, simple ones first."""
    options = [backend for backend in among if possible(backend, nodes, machine)]
    if not options:
        raise ValueError(f"among ({', '.join(among)}) must name a backend for {nodes} nodes of {machine.name}")
    times = {backend: exchange_time(backend, ranks, nodes, segments, state_bytes, machine) for backend in options}
    best = min(times, key=lambda backend: times[backend])
    if nodes > 1:
        return best
    return next(backend for backend in options if times[backend] <= NEARLY * times[best])


def worth_processors(exchange_s: float, product_s: float) -> bool:
    """Whether the products beside exchanges, one forward and two backward, should leave processors to them. Or else the
    exchange of the forward pass follows its product, and that of the backward pass the first of two."""
    return exchange_s > 3 * (SLOWER - 1) * product_s


def possible(backend: str, nodes: int, machine: Machine) -> bool:
    """Whether a backend is one to choose on so many nodes."""
    if backend == "symmetric_memory":
        return nodes == 1 and machine.peer_memory is not None
    # in one node it is "sliced"
    return backend != "hierarchical" or nodes > 1


def _check(backend: str, ranks: int, nodes: int, segments: int) -> None:
    check_choice("backend", backend, BACKENDS)
    check_positive("segments", segments)
    check_positive("ranks", ranks)
    check_divisible("ranks", ranks, "nodes", nodes)
    if backend == "symmetric_memory" and nodes > 1:
        raise ValueError(f"backend 'symmetric_memory' needs all ranks on one node, got {nodes} nodes; choose another")


def nodes_of(ranks: int, stride: int, machine: Machine) -> int:
    """Nodes under a group of every `stride`-th GPU. Raises ValueError when it fills some of them in part."""
    if stride >= machine.node_size:
        return ranks
    if ranks * stride <= machine.node_size:
        return 1
    if ranks * stride % machine.node_size or machine.node_size % stride:
        raise ValueError(
            f"ranks * stride ({ranks} * {stride}) must fill whole nodes of {machine.node_size} GPUs or lie on one; "
            f"choose another number of GPUs, or change node_size of the machine"
        )
    return ranks * stride // machine.node_size
