"""Time and memory of forward and backward of one micro-batch on one rank, from sizes alone: nothing is run.

Products count at the speed of products, everything else by the bytes it reads and writes. Every row of the batch is one
document, for which attention has the most work. Compute is in bfloat16.
"""

import functools
from dataclasses import dataclass, replace

from mamba2_dist.config import HybridConfig
from mamba2_dist.models.hybrid_model import HybridModel
from mamba2_dist.parallel.attention import GATHERED_BYTES
from mamba2_dist.parallel.cost_model import (
    AUTO,
    SCORES_SHARE,
    SLOWER,
    Machine,
    all_reduce_time,
    attention_exchange_time,
    choose,
    exchange_time,
    gather_time,
    nodes_of,
    worth_processors,
)
from mamba2_dist.parallel.groups import Group, ParallelGroups

from .config import ParallelConfig, TrainConfig
from .metrics import attention_flops, weight_flops

INNER_PASSES = {"none": 55, "conv": 59, "inner": 68}
"""Times that a Mamba-2 layer reads or writes d_inner channels between its projections, by `recompute`, forward and
backward: what the layers of docs/layer.md take on an H200 beyond their projections (51 and 60 without recompute), at
the speed of a copy."""

NORM_BYTES = 28
"""Read and written per channel by the residual sum and its norm: float32 and bfloat16, forward and backward."""

ACTIVATION_PASSES = {
    ("swiglu", True): 8, ("swiglu", False): 18, ("relu2", True): 5, ("relu2", False): 10,
    ("gelu", True): 5, ("gelu", False): 5,
}  # fmt: skip
"""Times that an MLP reads or writes d_ff channels between its products; compiled or not."""

ACTIVATION_KEPT = {
    ("swiglu", True): 3, ("swiglu", False): 4, ("relu2", True): 2, ("relu2", False): 3,
    ("gelu", True): 2, ("gelu", False): 2,
}  # fmt: skip
"""Times d_ff channels that an MLP keeps for the backward pass."""

LOSS_PASSES = {True: 6, False: 30}
"""Times that the loss reads or writes the logits, compiled or not."""

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Step:
    """One micro-batch on one rank, in seconds and bytes."""

    tokens: int
    compute_s: float
    exchange_s: float
    """All exchanges of states, hidden or not."""
    exposed: dict[str, float]
    """What is waited for: states, halo, keys, imbalance, tensor, parameters."""
    memory_bytes: float

    @property
    def exposed_s(self) -> float:
        return sum(self.exposed.values())

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def efficiency(self) -> float:
        """The share of the step that is compute."""
        return self.compute_s / self.seconds


@dataclass(frozen=True)
class Sizes:
    """What the formulas share: a run's model, its split and one rank's part."""

    config: TrainConfig
    machine: Machine

    @property
    def model(self) -> HybridConfig:
        return self.config.architecture

    @property
    def split(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def dp(self) -> int:
        return self.split.dp or 1

    @property
    def data(self) -> int:
        """Ranks that share parameters and gradients."""
        return self.dp * self.split.cp

    @property
    def batch(self) -> int:
        return self.config.share(self.dp)[1]

    @property
    def accumulated(self) -> int:
        """Backward passes before gradients are summed over ranks: under FSDP each part's are."""
        parts = self.config.parts
        if parts > 1 and self.split.sharding == "fsdp":
            return 1
        return self.config.share(self.dp)[0] // self.batch * parts

    @property
    def tokens(self) -> int:
        """Of one rank, in one part."""
        return -(-self.batch * self.config.data.seqlen // (self.split.cp * self.config.parts))

    @property
    def segments(self) -> int:
        return 2 if self.split.layout == "zigzag" and self.split.cp > 1 else 1

    @property
    def d_inner(self) -> float:
        """Of one rank."""
        return self.model.mamba.d_inner(self.model.d_model) / self.split.tp

    @property
    def groups(self) -> float:
        """Channels of B, as many as of C, on one rank; a group is on every rank that has heads of it."""
        return max(self.model.mamba.ngroups / self.split.tp, 1) * self.model.mamba.d_state

    @property
    def kv(self) -> float:
        """Channels of keys and values of one rank."""
        nheads_kv = self.model.attention.heads(self.model.d_model)[1]
        return 2 * max(nheads_kv / self.split.tp, 1) * self.model.attention.head_dim

    @property
    def queries(self) -> float:
        """Channels of queries of one rank."""
        return self.model.attention.heads(self.model.d_model)[0] * self.model.attention.head_dim / self.split.tp

    @property
    def element_bytes(self) -> tuple[float, float]:
        """Of a segment's state and of its decay, float32."""
        state = FP32 * self.batch * self.d_inner * self.model.mamba.d_state
        return state, state / (self.model.mamba.d_state * self.model.mamba.headdim)

    @property
    def cp_nodes(self) -> int:
        return nodes_of(self.split.cp, self.split.tp, self.machine)

    @property
    def data_nodes(self) -> int:
        return nodes_of(self.data, self.split.tp, self.machine)

    @property
    def tp_nodes(self) -> int:
        return nodes_of(self.split.tp, 1, self.machine)

    def count(self, letter: str) -> int:
        """Layers of a kind."""
        return self.model.pattern.count(letter)

    def products(self, flops_per_token: float) -> float:
        """Seconds of products that tp ranks share."""
        return self.tokens * flops_per_token / self.split.tp / self.machine.matmul_flops

    def passes(self, bytes_per_token: float) -> float:
        """Seconds to read and write as much."""
        return self.tokens * bytes_per_token / self.machine.memory_bytes_per_s


def model_step(config: TrainConfig, backend: str, machine: Machine) -> Step:
    """Model one micro-batch of `config`, whose `parallel` gives every size, with states travelling by `backend`.

    Raises ValueError for a split that does not fit the model or the machine.
    """
    sizes = Sizes(config, machine)
    compute, scores = _compute(sizes), _scores(sizes)
    exchange, states = _states(sizes, backend)
    keys, imbalance = _keys(sizes, scores)
    exposed = {
        "states": states,
        "halo": _halo(sizes),
        "keys": keys,
        "imbalance": imbalance,
        "tensor": _tensor(sizes),
        "parameters": _parameters(sizes, compute + scores),
    }
    # all parts but the last run forward twice: a third of the products, half of what travels
    parts = config.parts
    computed, travelled = parts + (parts - 1) / 3, parts + (parts - 1) / 2
    exposed = {name: travelled * seconds for name, seconds in exposed.items()}
    return Step(
        parts * sizes.tokens, computed * (compute + scores), travelled * exchange, exposed, _memory(sizes, backend)
    )


def choose_layout(config: TrainConfig, machine: Machine, backend: str | None = None) -> TrainConfig:
    """`config` with the cheaper layout where it is "auto": contiguous without attention; with it zigzag balances the
    work and doubles the states. backend: how states travel, None: as is cheapest."""
    split = config.parallel
    if split.layout != "auto":
        return config
    contiguous, zigzag = (replace(config, parallel=replace(split, layout=name)) for name in ("contiguous", "zigzag"))
    pieces = 2 * split.cp * (split.tp if split.sequence_parallel else 1)
    fits = config.data.seqlen % pieces == 0 if split.sequence_parallel else config.data.seqlen >= pieces
    if "*" not in config.architecture.pattern or split.cp == 1 or not fits:
        return contiguous
    try:
        nodes_of(split.cp, split.tp, machine)
    except ValueError:
        return zigzag  # nodes that are filled in part have no cost model
    if split.state_scan == "serial_exact":
        return zigzag  # nor have states that are handed on

    def differing(option: TrainConfig) -> float:
        """Seconds of what depends on the layout."""
        sizes = Sizes(option, machine)
        by = backend or (choose_backend(sizes) if sizes.count("M") else "all_gather")
        return _states(sizes, by)[1] + sum(_keys(sizes, _scores(sizes)))

    return min(contiguous, zigzag, key=differing)


def choose_backend(sizes: Sizes) -> str:
    """How states travel: as the run says, or what `state_scan` "auto" takes."""
    if sizes.split.state_scan != "auto":
        return sizes.split.state_scan
    return choose(sizes.split.cp, sizes.cp_nodes, sizes.segments, sizes.element_bytes[0], sizes.machine, among=AUTO)


def _compute(sizes: Sizes) -> float:
    """All but attention's scores; backward has twice the products of forward."""
    model, mlp = sizes.model, sizes.model.mlp
    products = sum(weight_flops(model, letter) for letter in model.pattern) + 2.0 * model.d_model * model.vocab_size
    compiled = sizes.config.compile
    channels = (
        sizes.count("M") * INNER_PASSES[sizes.config.recompute] * sizes.d_inner
        + sizes.count("-") * ACTIVATION_PASSES[mlp.activation, compiled] * mlp.width(model.d_model) / sizes.split.tp
        + LOSS_PASSES[compiled] * model.vocab_size / sizes.split.tp
    )
    norms = float(NORM_BYTES) * model.d_model * (len(model.pattern) + 1)
    if sizes.split.sequence_parallel:
        norms /= sizes.split.tp
    return sizes.products(3 * products) + sizes.passes(BF16 * channels + norms)


def _scores(sizes: Sizes) -> float:
    """Attention's scores and their product with v, as if they were shared evenly."""
    split, seqlen = sizes.split, sizes.config.data.seqlen
    flops = sizes.batch * attention_flops(sizes.model, [[0, seqlen]]) / (split.cp * split.tp)
    return 3 * flops / (SCORES_SHARE * sizes.machine.matmul_flops)


def _states(sizes: Sizes, backend: str) -> tuple[float, float]:
    """Seconds that states travel, and that the step is longer for it: forward they are beside z's projection, backward
    beside the two products of its gradient. These leave processors to the exchange, or it begins when the first ends.
    """
    if sizes.split.cp == 1 or not sizes.count("M"):
        return 0.0, 0.0
    state, decay = sizes.element_bytes
    window = sizes.products(2.0 * sizes.model.d_model * sizes.d_inner * sizes.split.tp)
    place = (sizes.split.cp, sizes.cp_nodes, sizes.segments, state, sizes.machine)
    forward = exchange_time(backend, *place, decay_bytes=decay)
    backward = exchange_time(backend, *place)
    exposed = forward + max(backward - window, 0.0)
    if sizes.cp_nodes > 1 and worth_processors(backward, window):
        slower = SLOWER * window
        exposed = 3 * (slower - window) + max(forward - slower, 0.0) + max(backward - 2 * slower, 0.0)
    return sizes.count("M") * (forward + backward), sizes.count("M") * exposed


def _halo(sizes: Sizes) -> float:
    """Seconds that the rows before each segment, and their gradients, are not hidden behind the convolution: forward it
    reads its inputs and writes its outputs, backward it reads both and writes one."""
    if sizes.split.cp == 1:
        return 0.0
    channels = sizes.d_inner + 2 * sizes.groups
    size = sizes.segments * sizes.batch * (sizes.model.mamba.d_conv - 1) * channels * BF16
    link = sizes.machine.node if sizes.cp_nodes == 1 else sizes.machine.rail
    exposed = (max(link.time(size) - sizes.passes(count * BF16 * channels), 0.0) for count in (2, 3))
    return sizes.count("M") * sum(exposed)


def _keys(sizes: Sizes, scores: float) -> tuple[float, float]:
    """Seconds that attention's keys or heads travel, and that the busiest rank computes beyond the mean.

    Keys and values of all ranks are gathered in both passes and their gradients scattered; or ranks of a node share
    heads, of keys of other nodes too: whichever is cheaper, or the one that is asked for.
    """
    cp, nodes, machine = sizes.split.cp, sizes.cp_nodes, sizes.machine
    if cp == 1 or not sizes.count("*"):
        return 0.0, 0.0
    both = sizes.tokens * sizes.queries * BF16, sizes.tokens * sizes.kv * BF16
    in_node = cp // nodes

    def imbalance(ranks: int) -> float:
        # the last of contiguous ranks sees nearly all keys, twice the mean; all wait for it
        return scores * (ranks - 1) / ranks if sizes.split.layout == "contiguous" else 0.0

    def travel(sharing: int, gathering: int) -> float:
        return sizes.count("*") * attention_exchange_time(sharing, gathering, nodes, *both, machine)

    gathered = travel(1, cp), imbalance(cp)
    if sizes.kv / 2 / sizes.model.attention.head_dim % in_node or sizes.split.attention == "all_gather":
        return gathered
    shared = travel(in_node, nodes), imbalance(nodes)
    return shared if sizes.split.attention == "ulysses" else min(shared, gathered, key=sum)


def _tensor(sizes: Sizes) -> float:
    """An all-reduce a block and pass, and one of the embedding's and of the head's."""
    size = sizes.tokens * sizes.model.d_model * BF16
    one = all_reduce_time(size, sizes.split.tp, sizes.tp_nodes, sizes.machine)
    return 2 * (len(sizes.model.pattern) + 1) * one


def _parameters(sizes: Sizes, compute_s: float) -> float:
    """What parameters and gradients need beyond the compute they hide behind, a third of it forward."""
    if sizes.data == 1:
        return 0.0
    counts = parameter_counts(sizes.model, sizes.split.tp)
    place = (sizes.data, sizes.data_nodes, sizes.machine)
    if sizes.split.sharding == "ddp":
        reduce_s = all_reduce_time(FP32 * sum(counts), *place) / sizes.accumulated
        return max(reduce_s - compute_s * 2 / 3, 0.0)
    # a layer at a time; gathered forward and backward, and what comes first is hidden by nothing
    gathers = [gather_time(FP32 * count * (sizes.data - 1) / sizes.data, *place) for count in counts]
    root, layers = gathers[-1], sum(gathers)
    forward = root + max(layers - root - compute_s / 3, 0.0)
    backward = layers - root + layers / sizes.accumulated
    return forward + max(backward - compute_s * 2 / 3, 0.0)


@functools.cache
def parameter_counts(model: HybridConfig, tp: int) -> list[int]:
    """Parameters on one tp rank: of every layer, then of what is outside. Raises ValueError when tp does not fit."""
    groups = ParallelGroups.alone()
    groups.tp = Group("tp", tuple(range(tp)))
    made = HybridModel(model, groups, ParallelConfig(tp=tp), device="meta")
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in made.backbone.layers]
    return [*layers, sum(parameter.numel() for parameter in made.parameters()) - sum(layers)]


def _memory(sizes: Sizes, backend: str) -> float:
    """Bytes at the end of forward, when most is held."""
    kept = {letter: _kept(sizes, letter) for letter in set(sizes.model.pattern)}
    activations = sum(kept[letter] for letter in sizes.model.pattern)
    # the logits and their gradient; what the busiest layer makes and drops, half of what it keeps as measured
    passing = 2 * BF16 * sizes.tokens * sizes.model.vocab_size / sizes.split.tp + max(kept.values()) / 2
    between = (sizes.config.parts - 1) * sizes.count("M") * sizes.element_bytes[0]
    return _parameter_memory(sizes) + activations + passing + _gathered(sizes, backend) + between


def _parameter_memory(sizes: Sizes) -> float:
    """Parameters, gradients and two moments in float32, sharded under FSDP but for the layers at work."""
    counts = parameter_counts(sizes.model, sizes.split.tp)
    whole = sum(counts)
    if sizes.data == 1:
        return (4 * FP32 + BF16) * whole  # a cast of each is kept
    if sizes.split.sharding == "ddp":
        return (5 * FP32 + BF16) * whole  # DDP sums gradients in buckets of its own
    unsharded = 2 * FP32 * (counts[-1] + max(counts[:-1])) + BF16 * max(counts)
    if sizes.accumulated > 1:
        unsharded += FP32 * whole  # gradients are summed before they are sharded
    return 4 * FP32 * whole / sizes.data + unsharded


def _kept(sizes: Sizes, letter: str) -> float:
    """Bytes that a block keeps for the backward pass: the residual sum in float32, its norm, and the layer's own."""
    model, tp, tokens = sizes.model, sizes.split.tp, sizes.tokens
    d = model.d_model
    stream = (FP32 + BF16) * d / (tp if sizes.split.sequence_parallel else 1)
    if letter == "M":
        mamba, d_inner, groups = model.mamba, sizes.d_inner, sizes.groups
        # z and what in_proj wrote, then x B C convolved, then y and the norm's result
        channels = 2 * d_inner + 2 * groups + d_inner / mamba.headdim
        channels += 0 if sizes.config.recompute != "none" else d_inner + 2 * groups
        channels += 0 if sizes.config.recompute == "inner" else 2 * d_inner
        return tokens * (stream + BF16 * channels)
    if letter == "*":
        return tokens * (stream + BF16 * (2 * sizes.queries + sizes.kv))
    inner = ACTIVATION_KEPT[model.mlp.activation, sizes.config.compile] * model.mlp.width(d) / tp
    return tokens * (stream + BF16 * inner)


def _gathered(sizes: Sizes, backend: str) -> float:
    """States kept a layer, and what one exchange holds at a time; keys and values gathered at once."""
    if sizes.split.cp == 1:
        return 0.0
    keys = 0.0
    if sizes.count("*"):
        everyone = sizes.split.cp * sizes.tokens * BF16
        head = everyone * 2 * sizes.model.attention.head_dim
        keys = 3 * max(head, min(GATHERED_BYTES, everyone * sizes.kv))
    if not sizes.count("M"):
        return keys
    state = sizes.segments * sizes.element_bytes[0]
    return keys + state * (sizes.count("M") + (sizes.split.cp if backend == "all_gather" else 3))
