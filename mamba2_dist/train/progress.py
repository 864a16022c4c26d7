"""Progress on a terminal; lines elsewhere are the caller's."""

import sys
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """The same items, counted on a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=f" {unit}", total=total, disable=not sys.stderr.isatty(), leave=False)
