"""Parameters and optimizer state as slices of the whole model's tensors, whatever the split.

A rank's parameter is packed from parts (tensor parallelism), and of that copy it may keep a run of rows (FSDP). Each
slice that is left is one box inside one tensor of the whole model. Gradient norms and checkpoints are written in these.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from mamba2_dist.models.hybrid_model import HybridModel, Memory
from mamba2_dist.modules.base import ParameterRecord, named_records, whole_name


@dataclass(frozen=True)
class Slice:
    """A box of one whole tensor, and the rank's own memory that holds it."""

    name: str
    whole_shape: tuple[int, ...]
    start: tuple[int, ...]
    tensor: Tensor
    replicas: int
    """How many tp ranks hold this box."""


def slices(parameter_name: str, record: ParameterRecord, tensor: Tensor) -> Iterator[Slice]:
    """The slices in a tensor laid out like a parameter: the parameter, its gradient, an optimizer moment."""
    local, first_row = local_rows(tensor)
    partition = record.partition
    for offset, part in zip(partition.offsets, partition.parts, strict=True):
        shape, start = list(record.shape), [0] * len(record.shape)
        shape[partition.dim] = part.size
        start[partition.dim] = part.start
        box = local
        if partition.dim == 0:
            low = max(offset, first_row)
            high = min(offset + part.length, first_row + local.shape[0])
            box = local[max(low - first_row, 0) : max(high - first_row, 0)] if high > low else local[:0]
            start[0] += low - offset
        else:
            box = local.narrow(partition.dim, offset, part.length)
            start[0] += first_row
        if box.numel() > 0:
            yield Slice(whole_name(parameter_name, part.name), tuple(shape), tuple(start), box, part.replicas)


def model_slices(model: nn.Module) -> Iterator[tuple[nn.Parameter, str, ParameterRecord]]:
    """(parameter, name, record) of every parameter of a model, wrapped for data parallelism or not."""
    module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    parameters = dict(module.named_parameters())
    for name, record in named_records(module):
        yield parameters[name], name, record


def memory_slices(model: HybridModel, memory: Memory, first_row: int, rows: int) -> Iterator[Slice]:
    """The slices in what a micro-batch carries, its rows beginning at `first_row` of the `rows` of the global batch."""
    for name, partition, tensor in model.named_memory(memory):
        for offset, part in zip(partition.offsets, partition.parts, strict=True):
            shape, start = [rows, *tensor.shape[1:]], [first_row] + [0] * (tensor.ndim - 1)
            shape[partition.dim], start[partition.dim] = part.size, part.start
            box = tensor.narrow(partition.dim, offset, part.length)
            yield Slice(whole_name(name, part.name), tuple(shape), tuple(start), box, part.replicas)


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows in this rank's memory and the number of the first one."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    local, ranks = tensor.to_local().detach(), tensor.device_mesh.size()
    # FSDP2 gives rank r the r-th of equal runs, rounded up; the last ones may be short or empty
    run = -(-tensor.shape[0] // ranks)
    first = min(run * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    assert local.shape[0] == min(run, tensor.shape[0] - first)
    return local, first


class WholeTensor(Tensor):
    """A tensor of the whole model of which this process holds some boxes; torch's distributed checkpoint reads and
    writes them through the three methods it looks for. It has a shape and a dtype but no arithmetic."""

    boxes: dict[tuple[int, ...], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype):
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        tensor.boxes = {}
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} on a WholeTensor: this process holds only boxes of it")

    def __repr__(self, *, tensor_contents=None):
        return f"WholeTensor({tuple(self.shape)}, boxes at {list(self.boxes)})"

    def _chunk(self, start: tuple[int, ...]) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(start), self.boxes[start].shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(start) for start in self.boxes]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, start),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(self._chunk(start), properties, self.shape),
            )
            for start in self.boxes
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.boxes[tuple(index.offset or (0,) * self.ndim)]


def gather_slices(found: Iterable[Slice], prefix: str) -> dict[str, WholeTensor]:
    """Whole tensors by name from the slices this process holds."""
    wholes: dict[str, WholeTensor] = {}
    for piece in found:
        name = prefix + piece.name
        whole = wholes.setdefault(name, WholeTensor(piece.whole_shape, piece.tensor.dtype))
        whole.boxes[piece.start] = piece.tensor
    return wholes
