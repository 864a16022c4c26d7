"""Megatron's communicators as the groups of a layer."""

import functools
from typing import Any

from torch import distributed as dist

from mamba2_dist.parallel.cost_model import Machine
from mamba2_dist.parallel.groups import ParallelGroups


def parallel_groups(pg_collection: Any, machine: Machine) -> ParallelGroups:
    """The groups of a layer over `pg_collection.tp` and `.cp`; those of one model share what else is made for them."""
    return _over(pg_collection.tp, pg_collection.cp, machine)


@functools.lru_cache(maxsize=8)
def _over(tp: dist.ProcessGroup, cp: dist.ProcessGroup, machine: Machine) -> ParallelGroups:
    return ParallelGroups.over(tp, cp, machine=machine)
