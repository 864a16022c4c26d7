"""A count of what was communicated, for tests, `doctor` and cost models."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from .groups import Group


@dataclass(eq=False)  # one that is closed is found among others that counted the same
class Ledger:
    """By (collective, group name), on this rank: launches, messages that others send to it, and their bytes; those of a
    collective as the algorithm that moves least has them."""

    calls: Counter = field(default_factory=Counter)
    messages: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)

    def enter(self, collective: str, group: Group, messages: int, nbytes: int) -> None:
        """Note one launch."""
        self.calls[collective, group.name] += 1
        self.messages[collective, group.name] += messages
        self.bytes[collective, group.name] += nbytes

    def enter_collective(self, collective: str, group: Group, tensor: Tensor) -> None:
        """Note one launch of a collective among equals, of which `tensor` is this rank's."""
        others = group.size - 1
        # what a rank receives, in units of its tensor over the ranks
        shares = {
            "all_reduce": 2 * others, "all_gather": others * group.size, "reduce_scatter": others, "all_to_all": others
        }  # fmt: skip
        rounds = 2 if collective == "all_reduce" else 1
        self.enter(collective, group, rounds * others, tensor.nbytes * shares[collective] // group.size)

    def clear(self) -> None:
        self.calls.clear()
        self.messages.clear()
        self.bytes.clear()

    def __str__(self) -> str:
        lines = [f"{'collective':16}{'group':14}{'launches':>10}{'messages':>10}{'MB':>12}"]
        for key in sorted(self.calls):
            numbers = f"{self.calls[key]:10}{self.messages[key]:10}{self.bytes[key] / 1e6:12.3f}"
            lines.append(f"{key[0]:16}{key[1]:14}{numbers}")
        return "\n".join(lines)


# not a context variable: backward runs in autograd's own threads
_open: list[Ledger] = []


@contextmanager
def record_collectives() -> Iterator[Ledger]:
    """Count what this process communicates inside the block, backward passes included."""
    ledger = Ledger()
    _open.append(ledger)
    try:
        yield ledger
    finally:
        _open.remove(ledger)


def is_open() -> bool:
    """Whether anybody counts."""
    return bool(_open)


def enter(collective: str, group: Group, messages: int, nbytes: int) -> None:
    """`Ledger.enter` of every open ledger."""
    for ledger in _open:
        ledger.enter(collective, group, messages, nbytes)


def enter_collective(collective: str, group: Group, tensor: Tensor) -> None:
    """`Ledger.enter_collective` of every open ledger."""
    for ledger in _open:
        ledger.enter_collective(collective, group, tensor)
