"""Text as Megatron's datasets."""

import json

import numpy as np
import pytest

from mamba2_dist.cli import main
from mamba2_dist.train.config import DataConfig
from mamba2_dist.train.data import load, prepare
from mamba2_dist.train.indexed import write_indexed


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for place in range(40):
        (folder / f"{place}.txt").write_text(f"document {place} " * (place + 3))
    return folder


def test_megatron_reads_what_is_written(tmp_path, texts, capsys):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core")
    cache, out = tmp_path / "cache", tmp_path / "out"
    main(["preprocess", f"out={out}", f"source={texts}", "vocab_size=300", f"cache={cache}", "validation_fraction=0.2"])
    assert str(out) in capsys.readouterr().out
    data = DataConfig(source=str(texts), cache=str(cache), validation_fraction=0.2)
    corpus = load(prepare(data, 300), 8)
    for split, expected in (("train", corpus.train), ("validation", corpus.validation)):
        dataset = indexed.IndexedDataset(str(out / split))
        documents = np.split(np.asarray(expected.tokens), np.asarray(expected.ends)[:-1])
        assert len(dataset) == len(documents) == len(dataset.document_indices) - 1
        for found, document in zip(dataset, documents, strict=True):
            assert found.tolist() == document.tolist()
    meta = json.loads((out / "meta.json").read_text())
    assert meta["end_token"] == corpus.tokenizer.token_to_id(data.end_token)
    assert meta["vocab_size"] <= 300
    assert (out / "tokenizer.json").exists()


def test_wide_tokens_are_written_as_int32(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core")
    tokens = np.array([70000, 3, 0, 99999, 0], np.uint32)
    write_indexed(tmp_path / "wide", tokens, np.array([3, 5]))
    dataset = indexed.IndexedDataset(str(tmp_path / "wide"))
    assert [document.tolist() for document in dataset] == [[70000, 3, 0], [99999, 0]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("out=texts", "out (texts) exists; remove it or name another folder"),
        ("out=", "out must name a folder"),
        ("out=new source=nowhere", "data.source (nowhere) does not exist"),
        ("out=new source=one.txt vocab_size=300", "the validation split has no documents; give more text"),
        ("out=new vocab_size=0", "vocab_size must be above 0, got 0"),
        ("source=texts", "out"),
    ],
)
def test_mistakes(tmp_path, texts, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a document")
    with pytest.raises(SystemExit):
        main(["preprocess", *arguments.split()])
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
