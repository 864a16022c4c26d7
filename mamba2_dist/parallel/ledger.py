"""A count of the collectives that were issued, for tests, `doctor` and cost models."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Ledger:
    """Calls and bytes handed to each collective, keyed by (collective, group name), on this rank."""

    calls: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


# not a context variable: backward runs in autograd's own threads
_open: list[Ledger] = []


@contextmanager
def record_collectives() -> Iterator[Ledger]:
    """Count the collectives this process issues inside the block, backward passes included."""
    ledger = Ledger()
    _open.append(ledger)
    try:
        yield ledger
    finally:
        _open.remove(ledger)


def enter(collective: str, group: str, tensor: Tensor) -> None:
    """Note one call in every open ledger."""
    for ledger in _open:
        ledger.calls[collective, group] += 1
        ledger.bytes[collective, group] += tensor.numel() * tensor.element_size()
