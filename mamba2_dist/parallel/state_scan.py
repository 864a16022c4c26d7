"""The state entering each segment, from what every segment before it leaves: an exclusive scan over ranks.

A segment is an element (decay a, state S); two neighbours combine as (a1, S1) o (a2, S2) = (a1 a2, a2 S1 + S2). The
decay may be a scalar per head, a signed scalar, or one value per element of the state. With D_i the gradient of the
state leaving segment i and U_i that of the state entering it,

    H_{i+1} = a_i H_i + S_i        D_{i-1} = a_i D_i + U_i        da_i = <D_i, H_i>

so backward is the same scan of (a, U) in reverse order.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.checks import check_choice
from mamba2_dist.kernels.common.transfer import to_device

from .cost_model import RING_BLOCKS, Backend, choose
from .groups import Group
from .messages import AllGather, AllToAll, Exchange, Messages, ProcessGroups, Steps
from .segments import SegmentTable
from .symmetric_memory import SymmetricMemory

StateScan = Literal["auto", Backend, "serial_exact"]
STATE_SCANS = get_args(StateScan)


# elements


class Elements(NamedTuple):
    """n elements: states (n, rows, width) and decays (n, rows, 1 or width). A row is a head of a sequence."""

    states: Tensor
    decays: Tensor

    def at(self, index) -> "Elements":
        return Elements(self.states[index], self.decays[index])


def _elements(state: Tensor, decay: Tensor) -> Elements:
    """(segments, batch, nheads, ...) as rows of heads; a decay that differs within a head has the state's shape."""
    segments, batch, nheads = state.shape[:3]
    if any(size > 1 for size in decay.shape[3:]):
        decay = decay.expand(state.shape)
    elif decay.shape[:3] != state.shape[:3]:
        decay = decay.expand(segments, batch, nheads, *decay.shape[3:])
    return Elements(*(t.reshape(segments, batch * nheads, math.prod(t.shape[3:])) for t in (state, decay)))


def _then(first: Elements, second: Elements) -> Elements:
    """(a1, S1) o (a2, S2)."""
    return Elements(torch.addcmul(second.states, second.decays, first.states), first.decays * second.decays)


def _inclusive(elements: Elements) -> Elements:
    """e_0 o ... o e_i for each i, in ceil(log2 n) steps."""
    distance = 1
    while distance < len(elements.states):
        joined = _then(elements.at(slice(None, -distance)), elements.at(slice(distance, None)))
        elements = Elements(*(torch.cat([e[:distance], j]) for e, j in zip(elements, joined, strict=True)))
        distance *= 2
    return elements


def _pack(elements: Elements) -> Tensor:
    """(..., rows, width) of one element or several -> (..., numbers of one)."""
    return torch.cat([part.flatten(-2) for part in elements], dim=-1)


def _unpack(packed: Tensor, states: torch.Size, decays: torch.Size) -> Elements:
    """The inverse of `_pack`, for an element's shapes."""
    first, second = packed.tensor_split([math.prod(states)], dim=-1)
    return Elements(first.unflatten(-1, states), second.unflatten(-1, decays))


def _padded(elements: Elements, slots: int) -> Elements:
    """As many elements as any rank has."""
    missing = slots - len(elements.states)
    return Elements(*(F.pad(t, (0, 0, 0, 0, 0, missing)) for t in elements)) if missing else elements


# who holds what: worked out once a table, on the host


@dataclass(frozen=True)
class _Chain:
    """The segments in the order the scan passes them, as `rank` sees them."""

    holders: np.ndarray
    slots: np.ndarray
    rank: int
    slots_per_rank: int
    ranks: int  # of the group; some may hold nothing
    device: torch.device

    @functools.cached_property
    def mine(self) -> np.ndarray:
        """Positions that this rank holds."""
        return np.flatnonzero(self.holders == self.rank)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where the elements at all positions lie among those of all ranks, `slots_per_rank` each."""
        return self.holders * self.slots_per_rank + self.slots

    def index(self, positions: np.ndarray, first_rank: int = 0) -> "slice | Tensor":
        """The places of these from those of `first_rank` on; a slice where they follow each other: that takes no
        kernel."""
        numbers = self.places[positions] - first_rank * self.slots_per_rank
        if (np.diff(numbers) == 1).all():
            first = int(numbers[0]) if len(numbers) else 0
            return slice(first, first + len(numbers))
        return to_device(numbers, self.device)


class _Round(NamedTuple):
    """A round of `_log_step`: places among this rank's positions, by the rank that they go to or come from, and those
    that stay, as (from, to)."""

    outgoing: dict[int, list[int]]
    incoming: dict[int, list[int]]
    staying: list[tuple[int, int]]


def _rounds(owners: np.ndarray, rank: int) -> list[_Round]:
    mine = np.flatnonzero(owners == rank).tolist()
    place = {position: index for index, position in enumerate(mine)}
    found, distance = [], 1
    while distance < len(owners):
        made = _Round({}, {}, [])
        for position in mine:
            ahead, behind = position + distance, position - distance
            if ahead < len(owners) and owners[ahead] == rank:
                made.staying.append((place[position], place[ahead]))
            elif ahead < len(owners):
                made.outgoing.setdefault(int(owners[ahead]), []).append(place[position])
            if behind >= 0 and owners[behind] != rank:
                made.incoming.setdefault(int(owners[behind]), []).append(place[position])
        found.append(made)
        distance *= 2
    return found


# the backends


class _AllGather:
    """Every rank gets every element and passes on what those before its own leave."""

    def __init__(self, chain: _Chain, node_size: int):
        self.slots = chain.slots_per_rank
        starts = [0, *chain.mine[:-1]]
        # for each of this rank's positions, what is passed on the way to it from the one before
        self.passed = [
            (int(chain.slots[end]), chain.index(np.arange(start, end)))
            for start, end in zip(starts, chain.mine, strict=False)
        ]

    def run(self, elements: Elements) -> Exchange:
        padded = _padded(elements, self.slots)
        gathered = yield AllGather(_pack(padded))
        everyone = _unpack(gathered.flatten(0, 1), padded.states.shape[1:], padded.decays.shape[1:])
        entering = torch.empty_like(elements.states)
        known = None
        for slot, passed in self.passed:
            known = _pass(known, everyone.at(passed))
            if known is None:
                entering[slot].zero_()  # nothing enters the first
            else:
                entering[slot].copy_(known)
        return entering


def _pass(known: Tensor | None, elements: Elements) -> Tensor | None:
    """The state behind elements that follow each other, `known` before them; None: nothing."""
    states, decays = elements
    if len(states) < 2:
        if len(states) and known is not None:
            return torch.addcmul(states[0], decays[0], known)
        return states[0] if len(states) else known
    onwards = decays.flip(0).cumprod(0).flip(0)  # the share that passes each and all behind it
    left = (onwards[1:] * states[:-1]).sum(0) + states[-1]
    return left if known is None else torch.addcmul(left, onwards[0], known)


class _LogStep:
    """Positions 1, 2, 4, ... apart combine, over all ranks at once (Kogge and Stone)."""

    def __init__(self, chain: _Chain, node_size: int):
        self.rounds = _rounds(chain.holders, chain.rank)
        self.mine = chain.slots[chain.mine].tolist()

    def run(self, elements: Elements) -> Exchange:
        before = yield from _log_step([elements.at(slot) for slot in self.mine], self.rounds, "group", elements.states)
        entering = torch.zeros_like(elements.states)
        for slot, enters in zip(self.mine, before, strict=True):
            if enters is not None:
                entering[slot] = enters
        return entering


def _log_step(
    own: list[Elements], rounds: list[_Round], within: Literal["group", "rail"], like: Tensor
) -> Steps[list[Tensor | None]]:
    """The states that enter this rank's positions, None where nothing does.

    After a round of distance d each position knows the combination of up to 2 d - 1 before it; what it excludes is kept
    apart from what it hands on.
    """
    before: list[Elements | None] = [None] * len(own)
    for outgoing, incoming, staying in rounds:
        seen = [e if b is None else _then(b, e) for e, b in zip(own, before, strict=True)]
        size = own[0].states.numel() + own[0].decays.numel() if own else 0
        sent = {peer: torch.cat([_pack(seen[i]) for i in places]) for peer, places in outgoing.items()}
        got = yield Messages(sent, {peer: size * len(places) for peer, places in incoming.items()}, like, within)
        arrived = {to: seen[place] for place, to in staying}
        for peer, places in incoming.items():
            parts = _unpack(got[peer].view(len(places), size), own[0].states.shape, own[0].decays.shape)
            arrived |= {place: parts.at(index) for index, place in enumerate(places)}
        for place, element in arrived.items():
            known = before[place]
            before[place] = element if known is None else _then(element, known)
    return [None if element is None else element.states for element in before]


class _Hierarchical:
    """In a node each rank gets a slice of every state of the node; the nodes' ranks of one place combine slices in a
    logarithmic number of rounds; slices go back.

    Neighbours of the chain that lie on one node are a run, which counts as one element between nodes.
    """

    def __init__(self, chain: _Chain, node_size: int):
        nodes = chain.holders // node_size
        node = chain.rank // node_size
        starts = np.flatnonzero(np.diff(nodes, prepend=-1))
        ends = np.append(starts[1:], len(nodes))
        owners = nodes[starts]
        runs = [np.arange(starts[run], ends[run]) for run in np.flatnonzero(owners == node)]
        self.runs = [chain.index(run, node * node_size) for run in runs]
        self.rounds = _rounds(owners, node)
        self.slots, self.node_size = chain.slots_per_rank, node_size
        self.within: Literal["group", "node"] = "group" if node_size >= chain.ranks else "node"

    def run(self, elements: Elements) -> Exchange:
        held = yield from _to_slices(_padded(elements, self.slots), self.node_size, self.within)
        inside = [_inclusive(Elements(*(t[run] for t in held))) for run in self.runs]
        entering = yield from _log_step([run.at(-1) for run in inside], self.rounds, "rail", elements.states)
        back = torch.empty_like(held.states)  # where nothing is held, nobody reads it
        for places, run, enters in zip(self.runs, inside, entering, strict=True):
            back[places] = _entering(run, enters)
        mine = yield from _from_slices(back, self.node_size, self.within)
        return mine[: len(elements.states), :, : elements.states.shape[2]]


class _Sliced(_Hierarchical):
    """The same with all ranks as one node: two collectives, whatever their number."""

    def __init__(self, chain: _Chain, node_size: int):
        super().__init__(chain, chain.ranks)


def _entering(run: Elements, enters: Tensor | None) -> Tensor:
    """What enters each element of a run that `enters` enters, from what each leaves; (n, rows, width)."""
    states, decays = run.at(slice(None, -1))
    if enters is None:
        return F.pad(states, (0, 0, 0, 0, 1, 0))
    return torch.cat([enters[None], torch.addcmul(states, decays, enters)])


def _to_slices(elements: Elements, parts: int, within: Literal["group", "node"]) -> Steps[Elements]:
    """(parts x slots, rows, width / parts): this rank's slice of every state of every rank, and the decays."""
    states, decays = elements
    slices = _cut(states, parts)
    shares = decays.expand(parts, *decays.shape) if decays.shape[2] == 1 else _cut(decays, parts)
    received = yield AllToAll(torch.cat([slices.flatten(1), shares.flatten(1)], dim=1), within)
    return Elements(*(t.flatten(0, 1) for t in _unpack(received, slices.shape[1:], shares.shape[1:])))


def _cut(tensor: Tensor, parts: int) -> Tensor:
    """(slots, rows, width) -> (parts, slots, rows, width / parts)."""
    missing = -tensor.shape[2] % parts
    padded = F.pad(tensor, (0, missing)) if missing else tensor
    return padded.unflatten(2, (parts, -1)).movedim(2, 0)


def _from_slices(states: Tensor, parts: int, within: Literal["group", "node"]) -> Exchange:
    """A slice of each rank's states, (parts x slots, rows, width / parts) -> this rank's, (slots, rows, width)."""
    received = yield AllToAll(states.unflatten(0, (parts, -1)), within)
    return received.movedim(0, 2).flatten(2)


class _Ring:
    """States are handed along the chain, in blocks, so that a rank hands on one while the next is on its way."""

    def __init__(self, chain: _Chain, node_size: int):
        holders = [None, *chain.holders.tolist(), None]
        self.rank = chain.rank
        self.hops = [(int(chain.slots[p]), holders[p], holders[p + 2]) for p in chain.mine.tolist()]
        self.blocks = RING_BLOCKS if _is_passed_whole(chain.holders.tolist()) else 1

    def run(self, elements: Elements) -> Exchange:
        entering = torch.zeros_like(elements.states)
        length = max(1, -(-elements.states.shape[2] // self.blocks))
        leaving: list[Tensor] = []
        for slot, previous, following in self.hops:
            arrived, leaving = leaving, []
            places = entering[slot].split(length, dim=1)
            states, decays = elements.at(slot)
            shares = decays.split(length, dim=1) if decays.shape[1] > 1 else [decays] * len(places)
            for index, (place, state, decay) in enumerate(zip(places, states.split(length, 1), shares, strict=True)):
                if previous == self.rank:
                    place.copy_(arrived[index])
                elif previous is not None:
                    got = yield Messages({}, {previous: place.numel()}, place)
                    place.copy_(got[previous].view(place.shape))
                leaving.append(torch.addcmul(state, decay, place))
                if following not in (None, self.rank):
                    yield Messages({following: leaving[-1].flatten()}, {}, place)
        return entering


def _is_passed_whole(holders: Sequence[int]) -> bool:
    """Whether a rank that is handed states a second time has handed on all of the first by then: somebody between holds
    neighbouring segments, and so has them all before the first leaves. Otherwise blocks could wait for one another."""
    runs = [(holder, len(list(run))) for holder, run in itertools.groupby(holders)]
    last: dict[int, int] = {}
    for index, (holder, _) in enumerate(runs):
        if holder in last and all(length == 1 for _, length in runs[last[holder] + 1 : index]):
            return False
        last[holder] = index
    return True


def _in_peers_memory(chain: _Chain, node_size: int) -> _AllGather | _Sliced:
    """Of two ranks each reads the other's state; of more, slices."""
    return (_AllGather if chain.ranks <= 2 else _Sliced)(chain, node_size)


_BACKENDS: dict[str, Callable[[_Chain, int], Any]] = {
    "all_gather": _AllGather,
    "sliced": _Sliced,
    "hierarchical": _Hierarchical,
    "log_step": _LogStep,
    "ring": _Ring,
    "symmetric_memory": _in_peers_memory,
}


def exchange(
    state: Tensor, decay: Tensor, table: SegmentTable, rank: int, backend: StateScan, *,
    node_size: int | None = None, reverse: bool = False,
) -> Exchange:  # fmt: skip
    """The steps by which `rank` learns what enters its segments, for `messages` to carry.

    state, decay: as in `state_scan`. node_size: ranks of a node, None: all. reverse: from the last segment back.
    """
    node_size = node_size or table.ranks

    def make():
        step = -1 if reverse else 1
        chain = _Chain(table.holders[::step], table.places[::step], rank, table.slots, table.ranks, state.device)
        return _BACKENDS[backend](chain, node_size)

    kept = table.local(rank).kept(("state_scan", backend, node_size, reverse, state.device), make)
    entering = yield from kept.run(_elements(state, decay))
    return entering.reshape(state.shape)


def check_state_scan(backend: str, group: Group) -> None:
    """Raise ValueError unless states can travel like this over `group`."""
    check_choice("state_scan", backend, STATE_SCANS)
    if backend == "hierarchical" and group.nodes > 1 and group.node is None:
        raise ValueError(
            f"state_scan 'hierarchical' needs as many ranks of {group.name} ({group.size}) on each of its nodes "
            f"({group.nodes}); choose a cp that fills whole nodes, or 'log_step'"
        )
    if backend == "symmetric_memory" and group.nodes > 1:
        raise ValueError(
            f"state_scan 'symmetric_memory' needs all ranks of {group.name} ({group.size}) on one node, got "
            f"{group.nodes} nodes; choose 'sliced', 'hierarchical' or 'auto'"
        )


class Pending:
    """An exchange under way; on a GPU it runs beside the current stream, and must be waited for."""

    def __init__(self, entering: Tensor, done: torch.cuda.Event | None = None, sent: tuple[Tensor, ...] = ()):
        # what is sent is in memory of the current stream, which must not have it back before it has been read
        self.entering, self.done, self.sent = entering, done, sent

    def wait(self) -> Tensor:
        """The states that enter this rank's segments, like those that leave them. The host does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.entering.device)
            stream.wait_event(self.done)
            if not torch.cuda.is_current_stream_capturing():
                self.entering.record_stream(stream)  # it is in memory of the side stream
        self.sent = ()
        return self.entering


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def begin(
    state: Tensor, decay: Tensor, table: SegmentTable, group: Group, backend: StateScan, *, reverse: bool = False
) -> Pending:
    """Start an exchange over `group`, outside autograd; arguments and errors as in `state_scan`. reverse: from the last
    segment back."""
    check_state_scan(backend, group)
    if backend == "serial_exact":
        raise ValueError(
            "state_scan 'serial_exact' cannot exchange given states, as it hands on those that the SSD operator makes; "
            "ask for it in Mamba2Mixer, ParallelConfig or parallel.ssd.operators, or choose 'ring'"
        )
    if table.ranks != group.size:
        raise ValueError(f"the segment table is made for {table.ranks} ranks, {group.name} has {group.size}")
    if len(table.segments) == 1:
        return Pending(torch.zeros_like(state))
    if backend == "auto":
        backend = chosen(group, table.slots, math.prod(state.shape[1:]) * state.element_size())
    node_size = None if group.node is None else group.node.size
    work = exchange(state, decay, table, group.rank, backend, node_size=node_size, reverse=reverse)
    if not state.is_cuda:
        return Pending(_carrier(backend, group, state.device).run(work))
    stream = _side_stream(state.device)
    stream.wait_stream(torch.cuda.current_stream(state.device))
    with torch.cuda.stream(stream):
        entering = _carrier(backend, group, state.device).run(work)
        return Pending(entering, stream.record_event(), (state, decay))


def _carrier(backend: StateScan, group: Group, device: torch.device) -> ProcessGroups:
    # a rank alone has nobody's memory to read
    reads = backend == "symmetric_memory" and group.size > 1
    return SymmetricMemory(group, device) if reads else ProcessGroups(group)


_choose = functools.cache(choose)  # asked for every exchange


def chosen(group: Group, segments: int, state_bytes: int) -> StateScan:
    """What "auto" stands for: the cheapest by the cost model, for `segments` a rank with states of so many bytes.

    Never "symmetric_memory", which not every machine can do.
    """
    if group.nodes > 1 and group.node is None:
        backend = "log_step"  # whatever the nodes hold
    else:
        backend = _choose(group.size, group.nodes, segments, state_bytes, group.machine)
    group.log_choice("state_scan auto: %s, of %d states a rank of %.3f MB", backend, segments, state_bytes / 1e6)
    return cast(StateScan, backend)


def state_scan(state: Tensor, decay: Tensor, table: SegmentTable, group: Group, backend: StateScan) -> Tensor:
    """The state that enters each of this rank's segments; communicates over `group`.

    state: (segments, batch, nheads, ...), what each segment leaves when nothing enters it, in slot order; float32 or
    wider. decay: the same number of axes, of size 1 where it is shared: the share of an entering state that each
    segment leaves. Returns (segments, batch, nheads, ...) like `state`; zeros enter the first segment.

    What each of P ranks receives, in M nodes of g, of states of s bytes, k of them a rank:

    | backend        | bytes                                       | launches             |
    |----------------|---------------------------------------------|----------------------|
    | `all_gather`   | (P - 1) k s: every state                    | 1                    |
    | `sliced`       | 2 k s: a slice of every state, then its own | 2                    |
    | `hierarchical` | 2 k s in its node, log2(k M) k s / g beyond | 2 + log2(k M)        |
    | `log_step`     | log2(k P) k s                               | log2(k P)            |
    | `ring`         | k s, one rank after the other               | 2 k a block, of few  |

    `symmetric_memory` is `all_gather` of two ranks and `sliced` of more, on GPUs of one node that read each other's
    memory. `auto` takes the cheapest of the others by the cost model.

    Raises ValueError for an unknown backend, a table of another number of ranks, `hierarchical` over nodes that hold
    unlike numbers of ranks, `symmetric_memory` where ranks cannot read each other's memory, and `serial_exact`, which
    is not an exchange but a way to run the operator (`parallel/serial.py`).
    """
    return _StateScan.apply(state, decay, table, group, backend)


class _StateScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, decay, table, group, backend):
        entering = begin(state, decay, table, group, backend).wait()
        ctx.save_for_backward(decay, entering)
        ctx.options = table, group, backend
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx, d_entering):
        decay, entering = ctx.saved_tensors
        d_leaving = begin(d_entering, decay, *ctx.options, reverse=True).wait()
        return d_leaving, (d_leaving * entering).sum_to_size(decay.shape), None, None, None
