"""Process groups of a run, made once from a device mesh and passed as arguments."""

import logging
import os
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mamba2_dist.kernels.common.checks import check_choice, check_integer, check_positive

from .cost_model import EXCHANGE_PROCESSORS, H200, Machine

logger = logging.getLogger(__name__)
AXES = ("tp", "cp", "pp", "dp")


@dataclass(frozen=True)
class Group:
    """One communicator as this rank sees it; a group of one needs no process group.

    Where it spans nodes, as many ranks of each, `node` is its part on this rank's node and `rail` what stands at the
    same place on every node; both are None where it lies on one node, or unevenly on several.
    """

    name: str
    ranks: tuple[int, ...] = (0,)  # global ranks, in the order of the group
    rank: int = 0  # this process's place among them
    handle: dist.ProcessGroup | None = None
    node: "Group | None" = None
    rail: "Group | None" = None
    nodes: int = 1  # that it lies on
    machine: Machine = H200  # what joins them
    max_processors: int = 0  # of a GPU that its kernels run on; 0: no limit

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __deepcopy__(self, memo: dict) -> "Group":
        """Itself: a copy of a module speaks through the same communicator."""
        return self

    @cached_property
    def buffers(self) -> dict[Hashable, Any]:
        """Memory that the group's ranks share."""
        return {}

    @cached_property
    def _logged(self) -> set[tuple]:
        return set()

    def log_choice(self, message: str, *values: object) -> None:
        """Log what "auto" stands for over the group: on its first rank, and the same only once."""
        if self.rank == 0 and (message, values) not in self._logged:
            self._logged.add((message, values))
            place = self.size, self.nodes, self.machine.name
            logger.info(message + ", for %d ranks on %d nodes of %s", *values, *place)

    @classmethod
    def of(cls, name: str, handle: dist.ProcessGroup) -> "Group":
        return cls(name, tuple(dist.get_process_group_ranks(handle)), dist.get_rank(handle), handle)


class ParallelGroups:
    """Tensor (tp), context (cp), pipeline (pp) and data (dp) parallel groups; tp innermost, then cp, dp, pp.

    Ranks stand in the mesh (pp, dp, cp, tp) in row-major order, so that a tp group and then a cp group share a node.
    `data` joins dp and cp: parameters are the same on all of it and gradients are summed over it. `states` is cp again,
    with communicators of its own where it has several ranks: states travel while others are at work. Where it spans
    nodes evenly, NCCL's kernels for them run on at most `cost_model.EXCHANGE_PROCESSORS` processors of a GPU.

    tp, cp, pp: sizes; dp: size, or None for whatever the world leaves.
    node_size: processes of a node, which are neighbours; None: as torchrun says, or all.
    machine: the links by which it is chosen how states and heads travel over cp, as `mamba2-dist calibrate` measures
        them; that of rank 0, as all must choose the same.
    device_type: "cpu" or "cuda"; None: "cuda" where there is one and the processes do not speak gloo alone.
    Without `torch.distributed` every size must be 1. Raises ValueError for sizes below 1 or that do not fill the world,
    and, with cp above 1, for nodes of different sizes.
    """

    tp: Group
    cp: Group
    pp: Group
    dp: Group
    data: Group
    states: Group
    data_mesh: DeviceMesh | None
    """The data group as a mesh, for FSDP."""
    _tp_parts: dict[int, Group]

    def __init__(
        self,
        tp: int = 1,
        cp: int = 1,
        pp: int = 1,
        dp: int | None = None,
        *,
        device_type: str | None = None,
        node_size: int | None = None,
        machine: Machine = H200,
    ):
        sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": 1 if dp is None else dp}
        for name, size in (sizes | ({} if node_size is None else {"node_size": node_size})).items():
            check_integer(name, size)
            check_positive(name, size)
        check_choice("device_type", device_type, (None, "cpu", "cuda"))
        world = dist.get_world_size() if dist.is_initialized() else 1
        if dp is None:
            dp = max(world // (tp * cp * pp), 1)
        if tp * cp * pp * dp != world:
            raise ValueError(
                f"tp * cp * pp * dp must equal the number of processes ({world}), got {tp} * {cp} * {pp} * {dp} = "
                f"{tp * cp * pp * dp}; start {tp * cp * pp * dp} processes or change a size"
            )
        self._set_alone()
        if not dist.is_initialized():
            return
        if device_type is None:
            device_type = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
        mesh = init_device_mesh(device_type, (pp, dp, cp, tp), mesh_dim_names=("pp", "dp", "cp", "tp"))
        self.tp, self.cp, self.pp, self.dp = (Group.of(name, mesh.get_group(name)) for name in AXES)
        if cp > 1:
            # along cp, all such groups of the world
            rows = torch.arange(world).view(pp, dp, cp, tp).movedim(2, 3).reshape(-1, cp)
            if node_size is None:
                node_size = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            node_size, machine = _agreed(node_size, machine)
            self._join_cp(rows, node_size, machine, device_type)
        joined = init_device_mesh(device_type, (pp, dp * cp, tp), mesh_dim_names=("pp", "data", "tp"))
        self.data_mesh = joined["data"]
        self.data = Group.of("data", joined.get_group("data"))

    @classmethod
    def alone(cls) -> "ParallelGroups":
        """Groups of one rank, also inside a larger world: a whole model on one process."""
        groups = cls.__new__(cls)
        groups._set_alone()
        return groups

    @classmethod
    def over(
        cls,
        tp: dist.ProcessGroup,
        cp: dist.ProcessGroup,
        *,
        node_size: int | None = None,
        machine: Machine = H200,
    ) -> "ParallelGroups":
        """The tp and cp of a layer over communicators that a framework has made; pp and dp stay with the framework.

        The other communicators of cp are made here by its ranks alone: all of them must come here, in the same order
        where they come several times. node_size, machine: as above, those of cp's first rank.
        """
        groups = cls.alone()
        groups.tp, groups.cp = Group.of("tp", tp), Group.of("cp", cp)
        if groups.cp.size > 1:
            speaks_gloo = dist.get_backend(cp) == "gloo"
            device_type = "cuda" if torch.cuda.is_available() and not speaks_gloo else "cpu"
            if node_size is None:
                node_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
            node_size, machine = _agreed(node_size, machine, cp)
            groups._join_cp(torch.tensor([groups.cp.ranks]), node_size, machine, device_type, cp)
        return groups

    def _set_alone(self) -> None:
        self.tp, self.cp, self.pp, self.dp, self.data, self.states = (Group(name) for name in (*AXES, "data", "states"))
        self.data_mesh = None
        self._tp_parts = {}

    def _join_cp(
        self,
        rows: torch.Tensor,
        node_size: int,
        machine: Machine,
        device_type: str,
        among: dist.ProcessGroup | None = None,
    ) -> None:
        """What cp is made of by node, and `states`."""
        self.cp = _with_nodes(replace(self.cp, machine=machine), rows, node_size, among)
        # on one node an exchange is short, and may as well follow what is computed
        limit = EXCHANGE_PROCESSORS if self.cp.node is not None and _speaks_nccl(device_type) else 0
        states = replace(Group.of("states", _along(rows, among, limit)), machine=machine, max_processors=limit)
        self.states = _with_nodes(states, rows, node_size, among)
        _meet(self.states, device_type)

    def __deepcopy__(self, memo: dict) -> "ParallelGroups":
        """Itself, as each of its groups."""
        return self

    def tp_part(self, size: int) -> Group:
        """The `size` neighbouring tp ranks that this rank stands among, as a group of their own.

        The first call for a size makes a communicator: all of them must make the same calls.
        """
        if size == self.tp.size:
            return self.tp
        if size == 1:
            return Group("tp part", (self.tp.ranks[self.tp.rank],))
        if self.tp.handle is None:
            # groups that only describe a split have no processes behind them
            first = self.tp.rank // size * size
            return Group("tp part", self.tp.ranks[first : first + size], self.tp.rank % size)
        if size not in self._tp_parts:
            handle = _along(torch.tensor(self.tp.ranks).view(-1, size), self.tp.handle)
            self._tp_parts[size] = Group.of("tp part", handle)
        return self._tp_parts[size]


def _agreed(node_size: int, machine: Machine, among: dist.ProcessGroup | None = None) -> tuple[int, Machine]:
    """The node size of all and the machine of the first. Raises ValueError on every rank unless node sizes are equal.

    among: those who are asked; None: the world.
    """
    told: list[Any] = [None] * dist.get_world_size(among)
    dist.all_gather_object(told, (node_size, machine), group=among)
    sizes = sorted({size for size, _ in told})
    if len(sizes) > 1:
        raise ValueError(
            f"node_size must be the same on every rank, got {' and '.join(map(str, sizes))}; start as many processes "
            "on every node, or give node_size"
        )
    return node_size, told[0][1]


def _meet(group: Group, device_type: str) -> None:
    """Make the communicators now: NCCL would at a first use, in which a message between two waits for all ranks."""
    for part in (group, group.node, group.rail):
        if part is not None and part.size > 1 and device_type == "cuda":
            dist.all_reduce(torch.zeros(1, device="cuda"), group=part.handle)


def _speaks_nccl(device_type: str) -> bool:
    cuda = device_type == "cuda" and torch.version.cuda is not None
    return cuda and "cuda:nccl" in dist.get_backend_config()


def _along(rows: torch.Tensor, among: dist.ProcessGroup | None = None, max_processors: int = 0) -> dist.ProcessGroup:
    """This rank's row of `rows` as a new communicator.

    among: who come here, the ranks of `rows`; None: the world. max_processors: of a GPU that NCCL's kernels run on; 0:
    as many as it likes.
    """
    options = timeout = None
    world = dist.group.WORLD
    assert world is not None
    if max_processors:
        options = dist.ProcessGroupNCCL.Options()
        # a block at a time: clusters would need free processors that are neighbours
        options.config.max_ctas, options.config.cga_cluster_size = max_processors, 1
        timeout = options._timeout = world._get_backend(torch.device("cuda")).options._timeout
    if among is None:
        return dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout, pg_options=options)[0]
    _make_as_many(among)
    (row,) = (row for row in rows.tolist() if dist.get_rank() in row)
    # a world that is bound to its devices would be split, for which all of it must come
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        return dist.new_group(row, timeout=timeout, pg_options=options, use_local_synchronization=True)
    finally:
        world.bound_device_id = bound


def _make_as_many(among: dist.ProcessGroup) -> None:
    """Let the ranks of `among` have made as many groups each: a group that some make by themselves is known to them by
    its ranks and how many each has made, and they would look for each other for ever."""
    made: list[Any] = [None] * dist.get_world_size(among)
    dist.all_gather_object(made, len(dist.distributed_c10d._world.pg_names), group=among)
    for _ in range(max(made) - made[dist.get_rank(among)]):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def _with_nodes(group: Group, rows: torch.Tensor, node_size: int, among: dist.ProcessGroup | None = None) -> Group:
    """The group with its parts by node, if its ranks lie evenly on several; `rows` are all such groups of `among`."""
    on_node = rows // node_size
    nodes = max(len(row.unique()) for row in on_node)
    if nodes == 1:
        return group
    size = group.size // nodes
    if group.size % nodes or (on_node.view(len(rows), nodes, size) != on_node[:, ::size, None]).any():
        return replace(group, nodes=nodes)
    parts = rows.view(-1, nodes, size)
    limit = group.max_processors
    node = Group.of(f"{group.name} node", _along(parts.flatten(0, 1), among, limit))
    rail = Group.of(f"{group.name} rail", _along(parts.transpose(1, 2).flatten(0, 1), among, limit))
    node, rail = (replace(part, max_processors=limit) for part in (node, rail))
    return replace(group, node=node, rail=rail, nodes=nodes)
