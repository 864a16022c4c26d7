"""What all ranks must agree in, where each is told for itself."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from mamba2_dist import ParallelGroups
from mamba2_dist.parallel.cost_model import H200

from ..distributed import run_ranks


def _different_nodes():
    with pytest.raises(ValueError, match="node_size must be the same on every rank, got 1 and 2; start as many"):
        ParallelGroups(cp=2, node_size=1 + dist.get_rank())


def test_nodes_of_different_sizes_are_refused():
    run_ranks(2, _different_nodes)


def _machines() -> list[str]:
    groups = ParallelGroups(cp=2, machine=replace(H200, name=f"of rank {dist.get_rank()}"))
    return [groups.cp.machine.name, groups.states.machine.name]


def test_all_choose_by_the_machine_of_rank_0():
    assert run_ranks(2, _machines) == [["of rank 0"] * 2] * 2
