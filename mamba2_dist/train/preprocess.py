"""A corpus as Megatron's datasets, with the tokenizer it was read by."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mamba2_dist.config import check_positive_fields, require

from .config import DataConfig
from .data import prepare, vocabulary_size
from .indexed import write_indexed


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Text as tokens for Megatron: train.bin, train.idx, the same of validation, tokenizer.json and meta.json."""

    out: str
    """Folder to write; it must not exist."""
    source: str = "stdlib"
    """"stdlib" (this Python's own library sources) or a file or folder of .txt, .jsonl or .jsonl.gz."""
    vocab_size: int = 32000
    """Tokens of the vocabulary; a given tokenizer may have fewer."""
    tokenizer: str | None = None
    """A tokenizer.json to use; None: a byte-level BPE of vocab_size tokens is trained on the source."""
    end_token: str = "<|end|>"
    """The token that ends a document; a given tokenizer must have it."""
    validation_fraction: float = 0.05
    """Share of the documents set aside for validation."""
    cache: str = "runs/data"
    """Where tokenized text is kept between runs."""

    def __post_init__(self):
        check_positive_fields(self, "vocab_size")
        require(len(self.out) > 0, "out must name a folder")


def preprocess(config: PreprocessConfig) -> Path:
    """Write the folder, which appears only when it is complete. Raises ValueError for sources that cannot be read, for
    a split without documents, and where the folder exists."""
    out = Path(config.out)
    require(not out.exists(), f"out ({out}) exists; remove it or name another folder")
    data = DataConfig(
        source=config.source, tokenizer=config.tokenizer, end_token=config.end_token, cache=config.cache,
        validation_fraction=config.validation_fraction,
    )  # fmt: skip
    folder = prepare(data, config.vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial-") as scratch:
        partial = Path(scratch) / out.name
        partial.mkdir()
        dtype = json.loads((folder / "meta.json").read_text())["dtype"]
        for split in ("train", "validation"):
            ends = np.load(folder / f"{split}.ends.npy")
            require(
                len(ends) > 0,
                f"the {split} split has no documents; give more text or another validation_fraction "
                f"({config.validation_fraction})",
            )
            write_indexed(partial / split, np.memmap(folder / f"{split}.bin", dtype, "r"), ends)
        shutil.copy(folder / "tokenizer.json", partial)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        meta = {"vocab_size": vocabulary_size(tokenizer), "end_token": tokenizer.token_to_id(config.end_token)}
        (partial / "meta.json").write_text(json.dumps(meta))
        os.rename(partial, out)
    return out
