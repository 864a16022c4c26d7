"""Every choice of a training run; wrong values are refused here."""

from dataclasses import dataclass, field, replace
from typing import Literal

from mamba2_dist.config import HybridConfig, ParallelConfig, check_choice_fields, check_positive_fields, require
from mamba2_dist.models.presets import PRESETS
from mamba2_dist.modules.recompute import Recompute, check_recompute


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text a model is trained on."""

    source: str = "stdlib"
    """"stdlib" (this Python's own library sources) or a file or folder of .txt, .jsonl or .jsonl.gz."""
    tokenizer: str | None = None
    """A tokenizer.json to use; None: a byte-level BPE of model.vocab_size tokens is trained on the source, once."""
    end_token: str = "<|end|>"
    """The token that ends a document; a given tokenizer must have it."""
    cache: str = "runs/data"
    """Where tokenizers and token files are kept between runs."""
    seqlen: int = 1024
    """Tokens in a training window."""
    validation_fraction: float = 0.05
    """Share of the documents set aside for validation."""
    carry: Literal["nothing", "documents"] = "nothing"
    """"documents": every row reads on where it stopped, and Mamba-2 states of a cut document enter without gradient."""

    def __post_init__(self):
        check_choice_fields(self, "carry")
        check_positive_fields(self, "seqlen")
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 3e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors never decay."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    def __post_init__(self):
        check_positive_fields(self, "lr", "eps", "clip")
        require(self.weight_decay >= 0, f"weight_decay must not be below 0, got {self.weight_decay}")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run."""

    shape: Literal["cosine", "wsd"] = "cosine"
    """"cosine", or "wsd": hold the peak and fall at the end."""
    warmup_steps: int = 20
    """Updates of linear warm-up."""
    decay_fraction: float = 0.2
    """For "wsd": the share of the run over which the rate falls."""
    final_fraction: float = 0.1
    """The last rate as a share of the peak."""

    def __post_init__(self):
        check_choice_fields(self, "shape")
        require(self.warmup_steps >= 0, f"warmup_steps must not be below 0, got {self.warmup_steps}")
        require(0 < self.decay_fraction <= 1, f"decay_fraction must lie in (0, 1], got {self.decay_fraction}")
        require(0 <= self.final_fraction <= 1, f"final_fraction must lie in [0, 1], got {self.final_fraction}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    out: str = "runs/hybrid"
    """Folder of this run: checkpoints, logs, loss.png. Running again with the same folder goes on from there."""
    preset: str | None = None
    """A published model by name instead of `model`."""
    model: HybridConfig = field(default_factory=HybridConfig)
    """The model, unless a preset names it."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is split."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it reads."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it is updated."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How fast."""
    steps: int = 200
    """Updates in all."""
    global_batch: int = 8
    """Windows per update, over all ranks."""
    micro_batch: int | None = None
    """Windows at a time on one dp rank; None: all of its share. Less means gradient accumulation."""
    parts: int = 1
    """Runs of a window's tokens that are trained one after the other, with the activations of one: states go on from
    part to part and their gradients back, for one more forward pass. Above 1 the pattern must have no attention."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16": matrix products in bfloat16, parameters, states and sums in float32."""
    recompute: Recompute = "none"
    """What Mamba-2 layers make again in the backward pass rather than keep: nothing, the convolution's results
    ("conv"), or all between their projections ("inner", the least memory)."""
    compile: bool = False
    """Run the activations of MLPs and the loss through torch.compile; Mamba-2 layers have kernels of their own."""
    machine: str | None = None
    """What `mamba2-dist calibrate` wrote, by which "auto" chooses how states and heads travel; None: nodes of H200s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": cuda where every process has a GPU of its own, else cpu."""
    seed: int = 0
    """Of the parameters and of the order of the data."""
    save_every: int = 50
    """Updates between checkpoints; one is always written at the end."""
    keep: int = 2
    """Checkpoints kept, newest first."""
    validate_every: int = 50
    """Updates between validations; one is always made first and last."""
    validation_windows: int = 32
    """Windows read in a validation."""
    log_every: int = 10
    """Updates between printed lines where there is no terminal for a progress bar."""
    prompt: str = "def "
    """What the sample at the end starts with."""
    sample_tokens: int = 80
    """Tokens sampled at the end; 0: none."""

    def __post_init__(self):
        check_positive_fields(
            self, "steps", "global_batch", "micro_batch", "parts", "save_every", "keep", "validate_every",
            "validation_windows", "log_every",
        )  # fmt: skip
        require(self.seed >= 0, f"seed must not be below 0, got {self.seed}")
        require(len(self.prompt) > 0, "prompt must not be empty; give it some text")
        require(self.sample_tokens >= 0, f"sample_tokens must not be below 0, got {self.sample_tokens}")
        check_choice_fields(self, "precision", "device")
        require(
            self.preset is None or self.preset in PRESETS,
            f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}",
        )
        require(
            self.preset is None or self.model == HybridConfig(),
            f"preset ({self.preset}) and model were both given; remove one",
        )
        require(
            self.architecture.vocab_size > 256,
            f"model.vocab_size must be above 256 (all bytes and an end mark), got {self.architecture.vocab_size}",
        )
        check_recompute(self.recompute, self.architecture.pattern)
        require(
            self.data.carry == "nothing" or "M" in self.architecture.pattern,
            f"data.carry ({self.data.carry}) is for Mamba-2 layers, and the pattern has none; leave it at nothing",
        )
        require(
            self.schedule.warmup_steps < self.steps,
            f"schedule.warmup_steps ({self.schedule.warmup_steps}) must be below steps ({self.steps})",
        )
        require(
            self.parts == 1 or "*" not in self.architecture.pattern,
            f"parts ({self.parts}) above 1 are for patterns without attention, whose keys would have to be kept; "
            "set it to 1, and cp or recompute to save memory",
        )
        segments = self.parts * self.parallel.cp * (2 if self.parallel.layout == "zigzag" else 1)  # "auto": what fits
        require(
            self.data.seqlen >= segments,
            f"data.seqlen ({self.data.seqlen}) must be at least the number of segments it is cut into ({segments})",
        )
        if self.parallel.sequence_parallel:
            pieces = segments * self.parallel.tp
            require(
                self.data.seqlen % pieces == 0,
                f"data.seqlen ({self.data.seqlen}) must be divisible by segments * tp ({pieces}) for sequence_parallel",
            )
        if self.parallel.dp is not None:
            self.share(self.parallel.dp)

    @property
    def architecture(self) -> HybridConfig:
        """The model, from the preset or as given."""
        return self.model if self.preset is None else PRESETS[self.preset]()

    def share(self, dp: int) -> tuple[int, int]:
        """(windows of one dp rank per update, windows at a time). Raises ValueError when they do not divide."""
        require(self.global_batch % dp == 0, f"global_batch ({self.global_batch}) must be divisible by dp ({dp})")
        share = self.global_batch // dp
        micro = self.micro_batch or share
        require(
            share % micro == 0,
            f"global_batch / dp ({share}) must be divisible by micro_batch ({micro})",
        )
        return share, micro

    def on(self, dp: int) -> "TrainConfig":
        """This run with dp settled; raises ValueError when batches do not divide."""
        self.share(dp)
        return replace(self, parallel=replace(self.parallel, dp=dp))
