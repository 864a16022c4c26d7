"""All ranks of an exchange played in one process, for thousands of ranks."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.ledger import Ledger
from mamba2_dist.parallel.messages import AllGather, AllToAll, Exchange, Messages, Request


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
