"""Which functions are called, in what order."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def noted_calls(*functions: tuple[Any, str]) -> Iterator[list[str]]:
    """The names of functions, each of a module or class, in the order in which they are called inside."""
    calls: list[str] = []

    def noting(owner, name):
        function, called = getattr(owner, name), f"{owner.__name__.rpartition('.')[2]}.{name}"

        def note(*args, **kwargs):
            calls.append(called)
            return function(*args, **kwargs)

        return mock.patch.object(owner, name, note)

    with contextlib.ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(noting(owner, name))
        yield calls
