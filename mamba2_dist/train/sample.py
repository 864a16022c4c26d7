"""Text from a run's newest checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mamba2_dist.config import AttentionConfig, HybridConfig, Mamba2Config, MLPConfig, check_positive_fields, require
from mamba2_dist.models.generate import generate
from mamba2_dist.models.hybrid_model import HybridModel
from mamba2_dist.parallel.groups import ParallelGroups

from .checkpoint import load_model, newest, read_json


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
        check_positive_fields(self, "tokens", "top_k")
        require(self.temperature >= 0, f"temperature must not be below 0, got {self.temperature}")
        require(len(self.prompt) > 0, "prompt must not be empty; give it some text")


def sample(config: SampleConfig) -> str:
    """The prompt and what the model adds. Raises ValueError when the run has no checkpoint."""
    folder = Path(config.run)
    path = newest(folder / "checkpoints")
    if path is None:
        raise ValueError(f"run ({folder}) has no checkpoint; train it first with `mamba2-dist train`")
    model = HybridModel(model_config(read_json(path / "identity.json")["model"]), ParallelGroups.alone())
    load_model(model, path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = read_json(folder / "config.json")["data"]["end_token"]
    prompt = tokenizer.encode(config.prompt, add_special_tokens=False).ids
    produced = generate(
        model, prompt, config.tokens,
        temperature=config.temperature, top_k=config.top_k, stop=tokenizer.token_to_id(end), seed=config.seed,
    )  # fmt: skip
    return tokenizer.decode([*prompt, *produced])


def model_config(saved: dict) -> HybridConfig:
    """The configuration that a checkpoint holds as JSON."""
    parts = {"mamba": Mamba2Config, "attention": AttentionConfig, "mlp": MLPConfig}
    tuples = lambda options: {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}  # noqa: E731
    return HybridConfig(**{k: parts[k](**tuples(v)) if k in parts else v for k, v in saved.items()})
