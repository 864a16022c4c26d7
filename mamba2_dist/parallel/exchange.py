"""The steps by which ranks learn the state that enters each of their segments: an exclusive scan over ranks.

A segment is an element (decay a, state S); two neighbours combine as (a1, S1) o (a2, S2) = (a1 a2, a2 S1 + S2). The
decay may be a scalar per head, a signed scalar, or one value per element of the state.

A backend makes requests (`messages.py`) and knows neither who carries them nor on which stream; what each of them costs
stands in `cost_model.py`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_dist.kernels.common.transfer import to_device

from .cost_model import RING_BLOCKS, Backend
from .messages import AllGather, AllToAll, Exchange, Messages, Steps
from .segments import SegmentTable

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
        self.slots_per_rank = chain.slots_per_rank
        starts = [0, *chain.mine[:-1]]
        # for each of this rank's positions, what is passed on the way to it from the one before
        self.passed = [
            (int(chain.slots[end]), chain.index(np.arange(start, end)))
            for start, end in zip(starts, chain.mine, strict=False)
        ]

    def run(self, elements: Elements) -> Exchange:
        padded = _padded(elements, self.slots_per_rank)
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
        self.slots = chain.slots[chain.mine].tolist()

    def run(self, elements: Elements) -> Exchange:
        before = yield from _log_step([elements.at(slot) for slot in self.slots], self.rounds, "group", elements.states)
        entering = torch.zeros_like(elements.states)
        for slot, enters in zip(self.slots, before, strict=True):
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
        sent = {peer: torch.cat([t.flatten() for i in places for t in seen[i]]) for peer, places in outgoing.items()}
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
        self.slots_per_rank, self.node_size = chain.slots_per_rank, node_size
        self.within: Literal["group", "node"] = "group" if node_size >= chain.ranks else "node"

    def run(self, elements: Elements) -> Exchange:
        held = yield from _to_slices(_padded(elements, self.slots_per_rank), self.node_size, self.within)
        inside = [_inclusive(Elements(*(t[run] for t in held))) for run in self.runs]
        entering = yield from _log_step([run.at(-1) for run in inside], self.rounds, "rail", elements.states)
        back = torch.empty_like(held.states)  # where nothing is held, nobody reads it
        for places, run, enters in zip(self.runs, inside, entering, strict=True):
            back[places] = _entering(run, enters)
        mine = yield from _from_slices(back, self.node_size, self.within)
        return mine[: len(elements.states), :, : elements.states.shape[2]]


def _sliced(chain: _Chain, node_size: int) -> _Hierarchical:
    """The same with all ranks as one node: two collectives, whatever their number."""
    return _Hierarchical(chain, chain.ranks)


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
        self.blocks = RING_BLOCKS if _is_passed_whole(chain.holders) else 1

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


def _is_passed_whole(holders: np.ndarray) -> bool:
    """Whether a rank that is handed states a second time has handed on all of the first by then: somebody between holds
    neighbouring segments, and so has them all before the first leaves. Otherwise blocks could wait for one another."""
    starts = np.flatnonzero(np.diff(holders, prepend=-1))
    runs = holders[starts]
    several = np.cumsum(np.diff(starts, append=len(holders)) > 1)  # runs of several segments up to each
    order = np.argsort(runs, kind="stable")
    first, again = order[:-1], order[1:]
    return bool((several[again - 1] > several[first])[runs[first] == runs[again]].all())


def _in_peers_memory(chain: _Chain, node_size: int) -> _AllGather | _Hierarchical:
    """Of two ranks each reads the other's state; of more, slices."""
    return (_AllGather if chain.ranks <= 2 else _sliced)(chain, node_size)


_BACKENDS: dict[str, Callable[[_Chain, int], Any]] = {
    "all_gather": _AllGather,
    "sliced": _sliced,
    "hierarchical": _Hierarchical,
    "log_step": _LogStep,
    "ring": _Ring,
    "symmetric_memory": _in_peers_memory,
}


def exchange(
    state: Tensor, decay: Tensor, table: SegmentTable, rank: int, backend: Backend, *,
    node_size: int | None = None, reverse: bool = False,
) -> Exchange:  # fmt: skip
    """The steps by which `rank` learns what enters its segments, for `messages` to carry.

    state, decay: as in `state_scan`. node_size: ranks of a node, None: all. reverse: from the last segment back.
    """
    node_size = node_size or table.ranks

    def make():
        step = -1 if reverse else 1
        order = table.holders[::step], table.slots[::step]
        chain = _Chain(*order, rank, table.slots_per_rank, table.ranks, state.device)
        return _BACKENDS[backend](chain, node_size)

    kept = table.local(rank).kept(("state_scan", backend, node_size, reverse, state.device), make)
    entering = yield from kept.run(_elements(state, decay))
    return entering.reshape(state.shape)
