"""A split module against the whole one: what every exactness test does on every rank."""

import torch
from torch import nn

from mamba2_dist import ParallelGroups, SegmentTable
from mamba2_dist.modules.base import named_records
from mamba2_dist.parallel.collectives import sum_over

from .tolerances import EXACT, assert_close

SCANS = ("all_gather", "sliced", "hierarchical", "log_step", "ring", "serial_exact")
"""How states travel over gloo; "auto" is one of these."""

_groups: dict[tuple, ParallelGroups] = {}


def groups_of(tp: int, cp: int, dp: int = 1, node_size: int | None = None) -> ParallelGroups:
    """Groups for these sizes, made once in each rank."""
    key = tp, cp, dp, node_size
    if key not in _groups:
        _groups[key] = ParallelGroups(tp, cp, 1, dp, node_size=node_size)
    return _groups[key]


def make_table(layout: str, seqlen: int, cp: int, documents) -> SegmentTable:
    """A table by name: "contiguous", "zigzag" or "uneven" (with a shard shorter than a convolution's reach)."""
    if layout == "uneven":
        few = {1: [], 2: [seqlen - 2], 3: [2, 7], 4: [2, 0, 7], 8: [2, 0, 7, 1, 0, 2, 5]}[cp]
        return SegmentTable.uneven([seqlen - sum(few), *few], documents=documents)
    return getattr(SegmentTable, layout)(seqlen, cp, documents=documents)


def assert_same_gradients(model: nn.Module, whole: nn.Module, groups: ParallelGroups, bound: float = EXACT) -> None:
    """Every parameter's gradient, summed over the data group, equals this rank's slice of the whole one's."""
    records = dict(named_records(whole))
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    actual = dict(model.named_parameters())
    assert set(actual) == set(expected) == set(records)
    for name, record in named_records(model):
        grad = actual[name].grad
        grad = torch.zeros_like(actual[name]) if grad is None else grad
        grad = sum_over(grad.clone(), groups.data)
        dim = record.partition.dim
        names = [part.name for part in records[name].partition.parts]
        whole_parts = dict(zip(names, _parts(expected[name], records[name]), strict=True))
        for part, mine in zip(record.partition.parts, _parts(grad, record), strict=True):
            reference = whole_parts[part.name].narrow(dim, part.start, part.length)
            assert_close(mine, reference, bound, f"gradient of {name} {part.name}")


def _parts(tensor, record):
    partition = record.partition
    return [
        tensor.narrow(partition.dim, offset, part.length)
        for offset, part in zip(partition.offsets, partition.parts, strict=True)
    ]
