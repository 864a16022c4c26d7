"""From the host to a device without waiting for it, and what is kept there."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Made = TypeVar("Made")


def to_device(values: np.ndarray | Tensor | list, device: torch.device) -> Tensor:
    """A tensor of host values on `device`; the copy to a GPU runs behind the caller's back, from pinned memory.

    Raises RuntimeError while a CUDA graph is captured: every replay would copy from memory that is no longer there.
    """
    tensor = torch.as_tensor(values, device="cpu")
    if device.type != "cuda":
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "host values cannot be copied to a GPU while a CUDA graph is captured; "
            "make the same call, with the same documents, once before capturing"
        )
    return tensor.pin_memory().to(device, non_blocking=True)


class Kept:
    """Values made once for a key and kept. Tensors in them are made on one stream and may be read from any.

    capacity: the least recently used go beyond it, but for those that a CUDA graph reads.
    """

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.values: OrderedDict[Hashable, tuple[Any, _Shared]] = OrderedDict()
        self.captured: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        if key in self.values:
            self.values.move_to_end(key)
        else:
            # a value made in inference mode could not be used in training
            with torch.inference_mode(False):
                value = make()
            self.values[key] = value, _Shared(_tensors(value))
            if self.capacity is not None and len(self.values) > self.capacity:
                self.values.popitem(last=False)
        value, shared = self.values[key]
        if shared.tensors:
            shared.wait()
            if torch.cuda.is_current_stream_capturing():
                self.captured[key] = value
        return value


class _Shared:
    """Tensors made on the current stream; others wait for that once."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = [tensor for tensor in tensors if tensor.is_cuda]
        self.streams: set[int] = set()
        # what is put together while a graph is captured was made before
        self.made = None
        if self.tensors and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.tensors[0].device)
            self.made = stream.record_event()
            self.streams.add(stream.cuda_stream)

    def wait(self) -> None:
        stream = torch.cuda.current_stream(self.tensors[0].device)
        if stream.cuda_stream in self.streams:
            return
        # a capture begins when all else is done, and may not wait for what is outside it
        if self.made is not None and not torch.cuda.is_current_stream_capturing():
            stream.wait_event(self.made)
        for tensor in self.tensors:
            tensor.record_stream(stream)  # its memory is not used again before this stream has read it
        self.streams.add(stream.cuda_stream)


def _tensors(value: Any) -> list[Tensor]:
    """A tensor, or those that an object has."""
    parts = [value] if isinstance(value, Tensor) else getattr(value, "__dict__", {}).values()
    return [part for part in parts if isinstance(part, Tensor)]
