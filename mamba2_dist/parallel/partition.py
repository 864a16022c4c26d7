"""Who owns what under tensor parallelism: the one description of every packed parameter's rows.

A rank's copy of a parameter is a few *parts* packed along one axis, each a slice of a tensor of the whole model: of
in_proj the rows z|x|B|C|dt, of conv1d the channels x|B|C. With fewer groups than ranks a group's B and C stand on every
rank that holds heads of the group; their gradients are sums over those ranks.
"""

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A slice of one tensor of the whole model, as one rank holds it."""

    name: str
    """What the whole tensor is called after the parameter's own name; "" when the parameter is that tensor."""
    size: int
    """Length of the whole tensor along the split axis."""
    start: int
    """Where this rank's slice begins."""
    length: int
    """Length of this rank's slice."""
    replicas: int = 1
    """How many tp ranks hold this very slice."""


@dataclass(frozen=True)
class Partition:
    """The parts of a parameter, packed in this order along `dim`."""

    parts: tuple[Part, ...]
    dim: int = 0

    @property
    def length(self) -> int:
        """Length of this rank's copy along `dim`."""
        return sum(part.length for part in self.parts)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part begins in this rank's copy."""
        return tuple(accumulate((part.length for part in self.parts), initial=0))[:-1]

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        """(start, length) in this rank's copy of the parts that other ranks hold too."""
        pairs = zip(self.offsets, self.parts, strict=True)
        return tuple((offset, part.length) for offset, part in pairs if part.replicas > 1)

    def pack(self, whole: dict[str, Tensor]) -> list[Tensor]:
        """This rank's slices of the whole tensors, in packing order."""
        return [whole[part.name].narrow(self.dim, part.start, part.length) for part in self.parts]


def split(name: str, what: str, size: int, tp: int, rank: int) -> Part:
    """`size` rows in `tp` equal slices. Raises ValueError, speaking of `what`, when tp does not divide them."""
    check_split(what, size, tp)
    return Part(name, size, rank * (size // tp), size // tp)


def check_split(what: str, size: int, tp: int) -> None:
    """Raise ValueError unless `tp` ranks can share `size` evenly."""
    if size % tp != 0:
        raise ValueError(f"{what} ({size}) must be divisible by tp ({tp})")


def replicated(size: int, tp: int, dim: int = 0) -> Partition:
    """Every rank holds the whole tensor."""
    return Partition((Part("", size, 0, size, replicas=tp),), dim)


def split_or_share(name: str, what: str, count: int, width: int, tp: int, rank: int) -> Part:
    """`count` groups of `width` rows: several groups a rank, or one group on several neighbouring ranks."""
    if count % tp == 0:
        return Part(name, count * width, rank * (count // tp) * width, (count // tp) * width)
    if tp % count == 0:
        return Part(name, count * width, rank * count // tp * width, width, replicas=tp // count)
    raise ValueError(f"{what} ({count}) must divide tp ({tp}) or be divisible by it")


@dataclass(frozen=True)
class Mamba2Partition:
    """One tp rank's share of a Mamba-2 mixer."""

    in_proj: Partition
    conv1d: Partition
    heads: Partition  # A_log, dt_bias, D per head
    channels: Partition  # norm weight, D per channel
    out_proj: Partition
    d_inner_local: int
    nheads_local: int
    ngroups_local: int
    group_ranks: int
    """Neighbouring ranks that share one group's B, C and norm."""


def mamba2_partition(*, d_inner: int, nheads: int, ngroups: int, d_state: int, tp: int, rank: int) -> Mamba2Partition:
    """Rank `rank`'s share of `tp`. Raises ValueError when heads or groups do not fit."""
    check_split("nheads", nheads, tp)
    z, x = (split(name, "d_inner", d_inner, tp, rank) for name in "zx")
    B, C = (split_or_share(name, "ngroups", ngroups, d_state, tp, rank) for name in "BC")
    heads, channels = split("", "nheads", nheads, tp, rank), split("", "d_inner", d_inner, tp, rank)
    return Mamba2Partition(
        in_proj=Partition((z, x, B, C, split("dt", "nheads", nheads, tp, rank))),
        conv1d=Partition((x, B, C)),
        heads=Partition((heads,)),
        channels=Partition((channels,)),
        out_proj=Partition((channels,), dim=1),
        d_inner_local=channels.length,
        nheads_local=heads.length,
        ngroups_local=B.length // d_state,
        group_ranks=B.replicas,
    )


@dataclass(frozen=True)
class AttentionPartition:
    """One tp rank's share of an attention layer."""

    qkv: Partition
    out_proj: Partition
    nheads_local: int
    nheads_kv_local: int
    group_ranks: int
    """Neighbouring ranks that share one key/value head."""


def attention_partition(*, nheads: int, nheads_kv: int, head_dim: int, tp: int, rank: int) -> AttentionPartition:
    """Rank `rank`'s share of `tp`. Raises ValueError when heads do not fit."""
    check_split("attention.nheads", nheads, tp)
    q = split("q", "q", nheads * head_dim, tp, rank)
    k, v = (split_or_share(name, "attention.nheads_kv", nheads_kv, head_dim, tp, rank) for name in "kv")
    return AttentionPartition(
        qkv=Partition((q, k, v)),
        out_proj=Partition((split("", "q", nheads * head_dim, tp, rank),), dim=1),
        nheads_local=nheads // tp,
        nheads_kv_local=k.length // head_dim,
        group_ranks=k.replicas,
    )
