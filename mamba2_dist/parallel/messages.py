"""What an exchange asks for, step by step, and who carries it.

An exchange is a generator: it yields requests and is sent what they bring. Process groups carry them between processes;
tests answer those of thousands of ranks in one.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor

from . import ledger
from .collectives import all_to_all_over, gather_over
from .groups import Group


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
