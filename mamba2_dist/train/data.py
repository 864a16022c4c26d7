"""Token files and the windows cut from them; every rank can name any window of any update."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from .config import DataConfig
from .corpus import find_files, fingerprint, read_documents
from .progress import progress

END = "<|end|>"
BATCH = 256  # documents tokenized at a time


@dataclass(frozen=True)
class Window:
    """`tokens` and their successors, (seqlen,) each, and the offsets of the documents in it.

    A label is -100 where the next token belongs to another document.
    """

    tokens: np.ndarray
    labels: np.ndarray
    documents: list[int]


class TokenFile:
    """One split of a corpus: documents end to end, each closed by the end token, cut into windows of `seqlen`."""

    def __init__(self, folder: Path, split: str, seqlen: int):
        file, dtype = folder / f"{split}.bin", json.loads((folder / "meta.json").read_text())["dtype"]
        # an empty file cannot be mapped
        self.tokens = np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)
        self.ends = np.load(folder / f"{split}.ends.npy", mmap_mode="r")  # one past each document's end token
        self.seqlen = seqlen
        self.windows = max((len(self.tokens) - 1) // seqlen, 0)
        if self.windows == 0:
            raise ValueError(
                f"the {split} split has {len(self.tokens)} tokens, one window needs data.seqlen + 1 ({seqlen + 1}); "
                "give more text, a shorter data.seqlen or another data.validation_fraction"
            )

    def window(self, index: int) -> Window:
        """The `index`-th window, in file order."""
        start = index * self.seqlen
        tokens = self.tokens[start : start + self.seqlen + 1].astype(np.int64)
        first, last = np.searchsorted(self.ends, [start, start + self.seqlen], side="right")
        inside = (self.ends[first : last + 1] - start).tolist()
        labels = tokens[1:].copy()
        labels[[end - 1 for end in inside if end <= self.seqlen]] = -100
        documents = [0, *(end for end in inside if end < self.seqlen), self.seqlen]
        return Window(tokens[:-1], labels, documents)

    def ordered(self, sample: int, seed: int) -> Window:
        """The `sample`-th window that training reads: every pass in an order of its own."""
        turn, place = divmod(sample, self.windows)
        if getattr(self, "_order", (None,))[0] != (turn, seed):
            self._order = ((turn, seed), np.random.default_rng([seed, turn]).permutation(self.windows))
        return self.window(int(self._order[1][place]))


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and the two splits it was applied to."""

    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    token_bytes: np.ndarray
    """Bytes of text each token stands for."""
    digest: str
    """Changes with any token of the training split."""

    def text_bytes(self, tokens: Iterable[int]) -> bytes:
        """The text of tokens, end tokens left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).encode()


def stack(windows: list[Window]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Tokens and labels, (batch, seqlen), and each row's document offsets."""
    tokens = torch.from_numpy(np.stack([window.tokens for window in windows]))
    labels = torch.from_numpy(np.stack([window.labels for window in windows]))
    return tokens, labels, [window.documents for window in windows]


def prepare(config: DataConfig, vocab_size: int) -> Path:
    """Tokenize a source unless that was done before; the folder with tokenizer.json and the token files.

    The folder appears only when it is complete. Raises ValueError for sources that cannot be read.
    """
    files = find_files(config.source)
    key = [fingerprint(files), vocab_size, config.validation_fraction]
    if config.tokenizer is not None:
        key.append(fingerprint([_existing(config.tokenizer)]))
    name = Path(config.source).name.split(".")[0] or "data"
    folder = Path(config.cache) / f"{name}-{hashlib.blake2b(repr(key).encode(), digest_size=6).hexdigest()}"
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = _tokenizer(config, vocab_size, files)
    tokenizer.save(str(partial / "tokenizer.json"))
    _tokenize(files, tokenizer, config, partial)
    os.replace(partial, folder)
    return folder


def load(folder: Path, seqlen: int) -> Corpus:
    """What `prepare` left in a folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    train, validation = (TokenFile(folder, split, seqlen) for split in ("train", "validation"))
    return Corpus(tokenizer, train, validation, np.asarray(meta["token_bytes"]), meta["digest"])


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"data.tokenizer ({path}) does not exist; give a tokenizer.json or leave it empty")
    return Path(path)


def _tokenizer(config: DataConfig, vocab_size: int, files: list[Path]):
    if config.tokenizer is not None:
        try:
            tokenizer = Tokenizer.from_file(config.tokenizer)
        except Exception as error:  # the library raises its base class
            raise ValueError(f"data.tokenizer ({config.tokenizer}) is not a tokenizer.json: {error}") from None
        if tokenizer.get_vocab_size() > vocab_size:
            raise ValueError(
                f"model.vocab_size ({vocab_size}) must be at least the tokenizer's ({tokenizer.get_vocab_size()})"
            )
        if tokenizer.token_to_id(END) is None:
            raise ValueError(f"data.tokenizer ({config.tokenizer}) must have the token {END!r} that ends a document")
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for _, text in progress(read_documents(files), "training the tokenizer", unit="documents"))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokenize(files: list[Path], tokenizer, config: DataConfig, folder: Path) -> None:
    end, dtype = tokenizer.token_to_id(END), np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    ends: dict[str, list[int]] = {"train": [], "validation": []}
    digest = hashlib.blake2b(digest_size=8)
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        outputs = {"train": train, "validation": validation}
        documents = iter(progress(read_documents(files), "tokenizing", unit="documents"))
        while batch := list(itertools.islice(documents, BATCH)):
            encoded = tokenizer.encode_batch([text for _, text in batch], add_special_tokens=False)
            for (name, _), document in zip(batch, encoded, strict=True):
                split = "validation" if _fraction(name) < config.validation_fraction else "train"
                tokens = np.asarray([*document.ids, end], dtype=dtype).tobytes()
                outputs[split].write(tokens)
                if split == "train":
                    digest.update(tokens)
                ends[split].append((ends[split] or [0])[-1] + len(document.ids) + 1)
    for split, offsets in ends.items():
        np.save(folder / f"{split}.ends.npy", np.asarray(offsets, dtype=np.int64))
    meta = {"dtype": np.dtype(dtype).name, "token_bytes": _token_bytes(tokenizer), "digest": digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on a document's name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") / 2**48


def _token_bytes(tokenizer) -> list[int]:
    """Bytes each token of a byte-level vocabulary stands for; 0 for special tokens."""
    special = {index for index, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    pieces = (tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size()))
    return [0 if index in special or piece is None else len(piece) for index, piece in enumerate(pieces)]
