"""Token files and the windows cut from them; every rank can name any window of any update."""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from .config import DataConfig
from .corpus import find_files, fingerprint, read_documents
from .progress import progress

BATCH = 256  # documents tokenized at a time


@dataclass(frozen=True)
class Window:
    """`tokens` and their successors, (seqlen,) each, and the offsets of the documents in it.

    A label is -100 where the next token belongs to another document. continues: whether the first token goes on with
    the document that its row read last.
    """

    tokens: np.ndarray
    labels: np.ndarray
    documents: list[int]
    continues: bool = False


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

    def consecutive(self, sample: int, rows: int) -> Window:
        """The `sample`-th window that training reads when each of `rows` rows of a batch reads on where it stopped; the
        rows begin at equal distances, and again at the front after the end."""
        turn, row = divmod(sample, rows)
        index = (row * self.windows // rows + turn) % self.windows
        first = index * self.seqlen
        begins = first == 0 or self.ends[np.searchsorted(self.ends, first)] == first
        return replace(self.window(index), continues=turn > 0 and not bool(begins))

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
    key = [fingerprint(files), vocab_size, config.validation_fraction, config.end_token]
    if config.tokenizer is not None:
        key.append(fingerprint([_existing(config.tokenizer)]))
    name = Path(config.source).name.split(".")[0] or "data"
    folder = Path(config.cache) / f"{name}-{hashlib.blake2b(repr(key).encode(), digest_size=6).hexdigest()}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: another run may be preparing the same
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.partial-") as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        tokenizer = _tokenizer(config, vocab_size, files)
        tokenizer.save(str(partial / "tokenizer.json"))
        _tokenize(files, tokenizer, config, partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # or another run was first, with the same tokens
                raise
    return folder


def load(folder: Path, seqlen: int) -> Corpus:
    """What `prepare` left in a folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    train, validation = (TokenFile(folder, split, seqlen) for split in ("train", "validation"))
    return Corpus(tokenizer, train, validation, np.asarray(meta["token_bytes"]), meta["digest"])


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"data.tokenizer ({path}) does not exist; give a tokenizer.json, or null to train one")
    return Path(path)


def _tokenizer(config: DataConfig, vocab_size: int, files: list[Path]):
    if config.tokenizer is not None:
        return _given_tokenizer(config.tokenizer, config.end_token, vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[config.end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for _, text in progress(read_documents(files), "training the tokenizer", unit="documents"))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _given_tokenizer(path: str, end_token: str, vocab_size: int) -> Tokenizer:
    """A user's tokenizer.json. Raises ValueError when it cannot serve."""
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises its base class
        raise ValueError(f"data.tokenizer ({path}) is not a tokenizer.json: {error}") from None
    if vocabulary_size(tokenizer) > vocab_size:
        raise ValueError(
            f"model.vocab_size ({vocab_size}) must be at least the tokenizer's ({vocabulary_size(tokenizer)})"
        )
    if tokenizer.token_to_id(end_token) is None:
        raise ValueError(
            f"data.tokenizer ({path}) has no token {end_token!r}; set data.end_token to the one that ends a document"
        )
    decoder = (json.loads(tokenizer.to_str()).get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        raise ValueError(
            f"data.tokenizer ({path}) must be byte-level, its decoder is {decoder}; bits per byte need bytes per token"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest token id; a vocabulary may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _tokenize(files: list[Path], tokenizer, config: DataConfig, folder: Path) -> None:
    end = tokenizer.token_to_id(config.end_token)
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
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


def _token_bytes(tokenizer: Tokenizer) -> list[int]:
    """Bytes each token of a byte-level vocabulary stands for; 0 for special tokens."""
    added = tokenizer.get_added_tokens_decoder()
    sizes = [0] * vocabulary_size(tokenizer)
    for piece, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index not in added:
            sizes[index] = len(piece)  # one character a byte
        elif not added[index].special:
            sizes[index] = len(piece.encode())
    return sizes
