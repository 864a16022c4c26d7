"""What an exchange asks for, step by step, and who carries it.

An exchange is a generator: it yields requests and is sent what they bring. Process groups carry them between processes;
`loopback` plays all ranks of a group in one process, for thousands of ranks.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import ledger
from .collectives import all_to_all_over, gather_over
from .groups import Group
from .ledger import Ledger


@dataclass(frozen=True)
class AllGather:
    """(...) -> (ranks, ...), every rank's tensor."""

    tensor: Tensor
    within: Literal["group"] = "group"


@dataclass(frozen=True)
class AllToAll:
    """(ranks, ...) -> the same: row r goes to rank r, and comes from it."""

    tensor: Tensor
    within: Literal["group", "node"] = "group"


@dataclass(frozen=True)
class Messages:
    """One-dimensional tensors to some ranks; from some ranks, by rank, those of a given length."""

    sent: dict[int, Tensor]
    received: dict[int, int]
    like: Tensor
    within: Literal["group", "rail"] = "group"


Result = TypeVar("Result")
Request = AllGather | AllToAll | Messages
Steps = Generator[Request, Any, Result]
Exchange = Steps[Tensor]


class ProcessGroups:
    """Carries the requests of this process over `group`, its node and its rail."""

    def __init__(self, group: Group):
        self.group = group

    def part(self, within: str) -> Group:
        if within == "group":
            return self.group
        part = self.group.node if within == "node" else self.group.rail
        assert part is not None, f"{self.group.name} has no {within}"
        return part

    def run(self, exchange: Exchange) -> Tensor:
        """The result of an exchange that every rank of the group runs."""
        try:
            request = next(exchange)
            while True:
                request = exchange.send(self.carry(request))
        except StopIteration as end:
            return end.value

    def carry(self, request: Request) -> Tensor | dict[int, Tensor]:
        """What a request brings."""
        group = self.part(request.within)
        if isinstance(request, AllGather):
            return gather_over(request.tensor, group)
        if isinstance(request, AllToAll):
            return all_to_all_over(request.tensor, group)
        return _send_and_receive(request, group)


def _send_and_receive(request: Messages, group: Group) -> dict[int, Tensor]:
    if not request.sent and not request.received:
        return {}
    received = {rank: request.like.new_empty(length) for rank, length in request.received.items()}
    ledger.enter("send_recv", group, len(received), sum(tensor.nbytes for tensor in received.values()))
    operations = [
        dist.P2POp(dist.isend, tensor.contiguous(), group.ranks[rank], group=group.handle)
        for rank, tensor in request.sent.items()
    ] + [dist.P2POp(dist.irecv, tensor, group.ranks[rank], group=group.handle) for rank, tensor in received.items()]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


class _Player:
    """One rank of a loopback: its exchange, the request it waits for, what has been sent to it, and its result."""

    def __init__(self, rank: int, exchange: Exchange):
        self.rank, self.exchange = rank, exchange
        self.request: Request | None = None
        self.mail: dict[int, deque[Tensor]] = {}
        self.result: Tensor | None = None

    def advance(self, brought: Any) -> None:
        """Go on to the next request."""
        try:
            self.request = self.exchange.send(brought)
        except StopIteration as end:
            self.request, self.result = None, end.value


def loopback(
    exchanges: Sequence[Exchange], node_size: int | None = None, ledgers: Sequence[Ledger] = ()
) -> list[Tensor]:
    """The results of all ranks' exchanges, played in this process; `node_size` ranks form a node.

    ledgers: one for each rank, which counts its requests.
    """
    players = [_Player(rank, exchange) for rank, exchange in enumerate(exchanges)]
    node_size = node_size or len(players)

    def part(player: _Player, within: str) -> list[_Player]:
        node, place = divmod(player.rank, node_size)
        return {
            "group": players,
            "node": players[node * node_size : (node + 1) * node_size],
            "rail": players[place::node_size],
        }[within]

    ready = deque(players)
    for player in players:
        player.advance(None)
        _post(player, part)
    while ready:
        player = ready.popleft()
        request = player.request
        if request is None:
            continue
        peers = part(player, request.within)
        if isinstance(request, Messages):
            if all(player.mail.get(peers[sender].rank) for sender in request.received):
                brought = {sender: player.mail[peers[sender].rank].popleft() for sender in request.received}
                if ledgers and (request.sent or brought):
                    size = sum(tensor.nbytes for tensor in brought.values())
                    ledgers[player.rank].enter("send_recv", _group(peers, request.within), len(brought), size)
                player.advance(brought)
                ready.extend([player, *_post(player, part)])
        elif all(type(peer.request) is type(request) and peer.request.within == request.within for peer in peers):
            _carry_collective(peers, request.within, ledgers)
            for peer in peers:
                ready.extend([peer, *_post(peer, part)])
    waiting = [player.rank for player in players if player.request is not None]
    if waiting:
        raise RuntimeError(f"ranks {waiting[:8]} wait for what nobody sends")
    return [player.result for player in players if player.result is not None]


def _post(player: _Player, part: Callable[[_Player, str], list[_Player]]) -> list[_Player]:
    """Deliver what a player sends; those who get it."""
    if not isinstance(player.request, Messages):
        return []
    peers = part(player, player.request.within)
    for rank, tensor in player.request.sent.items():
        peers[rank].mail.setdefault(player.rank, deque()).append(tensor)
    return [peers[rank] for rank in player.request.sent]


def _group(players: list[_Player], within: str) -> Group:
    return Group(within, tuple(player.rank for player in players))


def _carry_collective(players: list[_Player], within: str, ledgers: Sequence[Ledger]) -> None:
    tensors = [player.request.tensor for player in players if isinstance(player.request, AllGather | AllToAll)]
    gathers = isinstance(players[0].request, AllGather)
    together = torch.stack(tensors)
    for place, player in enumerate(players):
        if ledgers:
            name = "all_gather" if gathers else "all_to_all"
            ledgers[player.rank].enter_collective(name, _group(players, within), tensors[place])
        player.advance(together if gathers else together[:, place])
