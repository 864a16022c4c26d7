"""Text from a run's newest checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mamba2_dist.config import AttentionConfig, HybridConfig, Mamba2Config, MLPConfig, _positive, _require
from mamba2_dist.models.generate import generate
from mamba2_dist.models.hybrid_model import HybridModel
from mamba2_dist.parallel.groups import ParallelGroups

from .checkpoint import Checkpoints, load_model, read_json
from .data import END


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text from a run's newest checkpoint."""

    run: str
    """Folder of the run."""
    prompt: str = "def "
    """What the text starts with."""
    tokens: int = 200
    """Tokens at most."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 50
    """Sample among so many of the likeliest tokens."""
    seed: int = 0
    """Another seed, another text."""

    def __post_init__(self):
        _positive(self, "tokens", "top_k")
        _require(self.temperature >= 0, f"temperature must not be below 0, got {self.temperature}")
        _require(len(self.prompt) > 0, "prompt must not be empty; give it some text")


def sample(config: SampleConfig) -> str:
    """The prompt and what the model adds. Raises ValueError when the run has no checkpoint."""
    folder = Path(config.run)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"run ({folder}) has no checkpoint; train it first with `mamba2-dist train`")
    path = checkpoints.path(steps[-1])
    model = HybridModel(model_config(read_json(path / "identity.json")["model"]), ParallelGroups.alone())
    load_model(model, path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(config.prompt, add_special_tokens=False).ids
    produced = generate(
        model, prompt, config.tokens,
        temperature=config.temperature, top_k=config.top_k, stop=tokenizer.token_to_id(END), seed=config.seed,
    )  # fmt: skip
    return tokenizer.decode([*prompt, *produced])


def model_config(saved: dict) -> HybridConfig:
    """The configuration that a checkpoint holds as JSON."""
    parts = {"mamba": Mamba2Config, "attention": AttentionConfig, "mlp": MLPConfig}
    tuples = lambda options: {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}  # noqa: E731
    return HybridConfig(**{k: parts[k](**tuples(v)) if k in parts else v for k, v in saved.items()})
