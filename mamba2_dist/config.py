"""Every choice of a model and of how it is split; wrong values are refused here."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from mamba2_dist.kernels.common.checks import check_choice, check_positive
from mamba2_dist.parallel.attention import AttentionMethod
from mamba2_dist.parallel.state_scan import StateScan

Activation = Literal["swiglu", "relu2", "gelu"]


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless it holds."""
    if not holds:
        raise ValueError(message)


def check_positive_fields(config: object, *names: str) -> None:
    """Raise ValueError unless every named field is above 0 and finite, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            check_positive(name, value)


def check_choice_fields(config: Any, *names: str) -> None:
    """Raise ValueError unless every named field is one of those that its `Literal` lists."""
    types = {item.name: item.type for item in fields(config)}
    for name in names:
        check_choice(name, getattr(config, name), get_args(types[name]))


def check_range(name: str, bounds: tuple[float, float]) -> None:
    """Raise ValueError unless bounds are (low, high), above 0 and finite."""
    low, high = bounds
    require(0 < low <= high < math.inf, f"{name} must be (low, high) with 0 < low <= high and finite, got {bounds}")


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """A Mamba-2 mixer (arXiv 2405.21060, section 7)."""

    d_state: int = 128
    """Size of the state per channel."""
    headdim: int = 64
    """Channels per head."""
    expand: float = 2.0
    """Inner channels as a multiple of d_model."""
    ngroups: int = 1
    """Groups of heads that share B and C; the gated norm has as many groups."""
    d_conv: int = 4
    """Width of the causal convolution."""
    chunk_size: int = 256
    """Tokens per chunk of the scan where PyTorch computes it; kernels have their own. Changes speed and rounding, not
    the result."""
    norm_before_gate: bool = False
    """Normalise before the gate silu(z) rather than after it."""
    D_has_hdim: bool = False
    """One skip weight per channel rather than per head."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Bounds the step size is clamped to."""
    A_init_range: tuple[float, float] = (1.0, 16.0)
    """-A is drawn uniformly from this range."""
    dt_init_range: tuple[float, float] = (1e-3, 1e-1)
    """The step size at dt = 0 is drawn log-uniformly from this range."""
    dt_init_floor: float = 1e-4
    """Lowest initial step size."""

    def __post_init__(self):
        check_positive_fields(self, "d_state", "headdim", "expand", "ngroups", "d_conv", "chunk_size", "dt_init_floor")
        require(2 <= self.d_conv <= 8, f"d_conv must lie in 2..8, got {self.d_conv}")
        check_range("A_init_range", self.A_init_range)
        check_range("dt_init_range", self.dt_init_range)
        low, high = self.dt_limit
        require(0 <= low <= high, f"dt_limit must be (low, high) with 0 <= low <= high, got {self.dt_limit}")

    def d_inner(self, d_model: int) -> int:
        """Inner channels of a mixer of width `d_model`; raises ValueError when they do not fill heads and groups."""
        d_inner = round(self.expand * d_model)
        require(
            abs(d_inner - self.expand * d_model) < 1e-6,
            f"expand ({self.expand}) * d_model ({d_model}) must be a whole number of channels",
        )
        require(d_inner % self.headdim == 0, f"d_inner ({d_inner}) must be divisible by headdim ({self.headdim})")
        nheads = d_inner // self.headdim
        require(nheads % self.ngroups == 0, f"nheads ({nheads}) must be divisible by ngroups ({self.ngroups})")
        return d_inner

    def nheads(self, d_model: int) -> int:
        """Heads of a mixer of width `d_model`."""
        return self.d_inner(d_model) // self.headdim


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal attention with grouped queries."""

    nheads: int | None = None
    """Query heads; None: d_model / head_dim."""
    head_dim: int = 64
    """Channels per head."""
    nheads_kv: int | None = None
    """Key and value heads; None: as many as query heads."""
    rope_theta: float | None = None
    """Base of rotary position embeddings; None: none, as published for Mamba-2 hybrids."""

    def __post_init__(self):
        check_positive_fields(self, "nheads", "head_dim", "nheads_kv", "rope_theta")
        require(
            self.rope_theta is None or self.head_dim % 2 == 0,
            f"head_dim ({self.head_dim}) must be even for rotary embeddings; change it or leave rope_theta empty",
        )

    def heads(self, d_model: int) -> tuple[int, int]:
        """Query heads and key/value heads at width `d_model`; raises ValueError when they do not fit."""
        nheads = self.nheads
        if nheads is None:
            require(
                d_model % self.head_dim == 0,
                f"d_model ({d_model}) must be divisible by head_dim ({self.head_dim}), or set attention.nheads",
            )
            nheads = d_model // self.head_dim
        nheads_kv = self.nheads_kv or nheads
        require(nheads % nheads_kv == 0, f"attention.nheads ({nheads}) must be divisible by nheads_kv ({nheads_kv})")
        return nheads, nheads_kv


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A two-layer perceptron, gated for "swiglu"."""

    d_ff: int | None = None
    """Inner channels; None: 4 * d_model, or 8/3 * d_model rounded up to a multiple of 64 when gated."""
    activation: Activation = "swiglu"
    """"swiglu" (gated), "relu2" (squared ReLU) or "gelu"."""

    def __post_init__(self):
        check_positive_fields(self, "d_ff")
        check_choice_fields(self, "activation")

    def width(self, d_model: int) -> int:
        """Inner channels at width `d_model`."""
        if self.d_ff is not None:
            return self.d_ff
        return 64 * math.ceil(d_model * 8 / 3 / 64) if self.activation == "swiglu" else 4 * d_model


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """A language model of Mamba-2, attention and MLP layers in the order a pattern gives."""

    pattern: str = "M-M-M*-M-"
    """One letter a layer: M Mamba-2, * attention, - MLP."""
    d_model: int = 512
    """Width of the residual stream."""
    vocab_size: int = 50288
    """Tokens of the vocabulary, padding included; must be divisible by tp."""
    tie_embeddings: bool = True
    """Use the embedding as the output head."""
    norm_eps: float = 1e-5
    """Added to mean squares under the root."""
    mamba: Mamba2Config = field(default_factory=Mamba2Config)
    """The M layers."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """The * layers."""
    mlp: MLPConfig = field(default_factory=MLPConfig)
    """The - layers."""

    def __post_init__(self):
        check_positive_fields(self, "d_model", "vocab_size", "norm_eps")
        require(len(self.pattern) > 0, "pattern must name at least one layer, as in 'M-M*'")
        require("|" not in self.pattern, f"pattern {self.pattern!r}: '|' (pipeline cut) needs a pipeline engine")
        require("E" not in self.pattern, f"pattern {self.pattern!r}: 'E' (mixture of experts) is not supported")
        wrong = sorted(set(self.pattern) - set("M*-"))
        require(not wrong, f"pattern {self.pattern!r} has {', '.join(map(repr, wrong))}; layers are M (Mamba-2), *, -")
        if "M" in self.pattern:
            self.mamba.d_inner(self.d_model)
        if "*" in self.pattern:
            self.attention.heads(self.d_model)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model and its sequences are split over processes."""

    tp: int = 1
    """Tensor parallel: ranks that share every layer."""
    cp: int = 1
    """Context parallel: ranks that share every sequence."""
    dp: int | None = None
    """Data parallel: replicas that read different sequences; None: whatever the processes leave."""
    sequence_parallel: bool = False
    """Keep the residual stream split over tp between layers; needs tp above 1."""
    layout: Literal["auto", "contiguous", "zigzag"] = "auto"
    """How a sequence is cut over cp; "zigzag" balances attention; "auto" takes the cheaper by the cost model."""
    state_scan: StateScan = "auto"
    """How states travel over cp: see docs/parallel.md; "auto" takes the cheapest by the cost model. "serial_exact" is
    slow, one rank after the other, for the bits of one GPU."""
    attention: AttentionMethod = "auto"
    """How attention's keys, values or heads travel over cp; "ulysses" needs nheads_kv / tp divisible by the cp ranks of
    a node."""
    sharding: Literal["fsdp", "ddp"] = "fsdp"
    """Over dp x cp: shard parameters (FSDP2) or keep whole replicas (DDP)."""

    def __post_init__(self):
        check_positive_fields(self, "tp", "cp", "dp")
        check_choice_fields(self, "layout", "state_scan", "attention", "sharding")
        require(
            not (self.sequence_parallel and self.tp == 1),
            "sequence_parallel splits over tp and needs tp above 1; set tp or leave it off",
        )

    @property
    def processes(self) -> int:
        """The fewest processes that fit."""
        return self.tp * self.cp * (self.dp or 1)
