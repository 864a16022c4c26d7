"""Launching a kernel at little cost to the host: what calls of one kind have in common is worked out once."""

import contextvars
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor

from .transfer import Kept


@triton.jit
def _nothing():
    pass


# under the interpreter there is no device to ask: what it runs as
INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)
INTERPRETED_AS = (90, 1)


def device_limits(device: torch.device) -> tuple[int, int]:
    """Compute capability, as 90 for 9.0, and number of multiprocessors."""
    return INTERPRETED_AS if INTERPRETED else _properties(device)


def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


class Launcher:
    """A kernel with its grid, its numbers and constants, and options of the compiler: all but its tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any):
        self.kernel, self.grid, self.device = kernel, (*grid, 1, 1)[:3], device
        self.arguments = {name: value for name, value in arguments.items() if value is not None}
        self.values = [self.arguments.get(name) for name in kernel.arg_names]
        self.kind = (id(kernel), device, *(_kind(name, value) for name, value in self.arguments.items()))
        self.ready: dict[tuple, Callable] = {}

    def __call__(self, **tensors: Tensor) -> None:
        if 0 in self.grid:
            return
        if INTERPRETED:
            self.kernel[self.grid](**tensors, **self.arguments)
        elif self.device.index == torch.cuda.current_device():
            self._launch(tensors)
        else:
            with torch.cuda.device(self.device):
                self._launch(tensors)

    def _launch(self, tensors: dict[str, Tensor]) -> None:
        # a launch takes longer with tensors, each of which the driver looks up
        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        # all that the compiler may know of tensors
        kind = (
            *[tensor.dtype for tensor in tensors.values()],
            *[address % 16 == 0 for address in addresses],
        )
        run = self.ready.get(kind)
        if run is None:
            key = (self.kind, *tensors, *kind)
            if key not in _compiled:
                compile_and_run = functools.partial(self.kernel[self.grid], **tensors, **self.arguments)
                _compiled[key] = _with_allocator(self.device, compile_and_run)
                return
            run = self.ready[kind] = self._runner(_compiled[key], tensors)
        run(addresses)

    def _runner(self, compiled: Any, names: Iterable[str]) -> Callable:
        # callers name a kernel's tensors in one order
        places = [self.kernel.arg_names.index(name) for name in names]
        run = compiled[self.grid]
        if compiled.metadata.global_scratch_size:
            run = functools.partial(_with_allocator, self.device, run)

        def run_at(addresses: list[int]) -> None:
            values = self.values.copy()
            for place, address in zip(places, addresses, strict=True):
                values[place] = address
            run(*values)

        return run_at


_launchers = Kept(capacity=1024)


def launch(kernel: Any, variant: tuple, describe: Callable[[], dict[str, Any]], **tensors: Tensor) -> None:
    """Launches a kernel on `tensors`. describe: its grid and everything else it takes, called once for all calls with
    one `variant`, which names what may differ between calls, and tensors on one device."""
    device = next(iter(tensors.values())).device
    make = lambda: Launcher(kernel, device=device, **describe())  # noqa: E731
    _launchers.get((id(kernel), device, variant), make)(**tensors)


# kernels by what they were compiled for: the compiler's own look-up takes the host longer than a launch
_compiled: dict[tuple, Any] = {}


def _kind(name: str, value: Any) -> Any:
    """All that the compiler may know of a number or constant; of a number at run time, a little more than it does."""
    if type(value) is int and value > 16 and not name.isupper() and name != "maxnreg":
        return name, value % 16 == 0, value < 1 << 31
    return name, value


def _with_allocator(device: torch.device, run: Callable, *values: Any) -> Any:
    """Runs where descriptors made on the device find memory, without a trace on the caller's own allocator."""
    return contextvars.copy_context().run(_allocate_and_run, device, run, values)


def _allocate_and_run(device: torch.device, run: Callable, values: tuple) -> Any:
    triton.set_allocator(_allocator(device))
    return run(*values)


@functools.cache
def _allocator(device: torch.device) -> Callable[[int, int, int | None], Tensor]:
    return lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
