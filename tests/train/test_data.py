"""Windows hold every token once, labels are shifted before any cut, and no label crosses a document."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mamba2_dist.train import data
from mamba2_dist.train.config import DataConfig
from mamba2_dist.train.corpus import find_files, read_documents

from .corpus import write_texts


@pytest.fixture
def corpus(tmp_path):
    config = DataConfig(source=str(write_texts(tmp_path / "texts")), cache=str(tmp_path / "cache"), seqlen=16)
    return data.load(data.prepare(config, 300), 16)


def test_windows_and_labels(corpus):
    split = corpus.train
    end = corpus.tokenizer.token_to_id("<|end|>")
    tokens = np.concatenate([split.window(i).tokens for i in range(split.windows)])
    assert (tokens == split.tokens[: len(tokens)]).all()
    for index in range(split.windows):
        window = split.window(index)
        following = split.tokens[index * 16 + 1 : (index + 1) * 16 + 1]
        # an end token is predicted; what follows it is not
        ignored = window.labels == -100
        assert (ignored == (window.tokens == end)).all()
        assert (window.labels[~ignored] == following[~ignored]).all()
        starts = [place + 1 for place in np.flatnonzero(window.tokens == end).tolist() if place + 1 < 16]
        assert window.documents == [0, *starts, 16]


def test_every_pass_reads_every_window_in_its_own_order(corpus):
    split = corpus.train
    passes = [
        [split.ordered(turn * split.windows + i, seed=3).tokens.tobytes() for i in range(split.windows)]
        for turn in range(2)
    ]
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]


def test_rows_read_on_where_they_stopped(corpus):
    split, rows = corpus.train, 3
    starts = {0, *split.ends.tolist()}
    turns = split.windows + 2
    for row in range(rows):
        first = row * split.windows // rows
        for turn in range(turns):
            window, index = split.consecutive(turn * rows + row, rows), (first + turn) % split.windows
            assert (window.tokens == split.window(index).tokens).all()
            assert window.continues == (turn > 0 and index * split.seqlen not in starts)
    whole_document = data.TokenFile(Path(split.tokens.filename).parent, "train", int(split.ends[0]))
    assert not whole_document.consecutive(1, 1).continues


def test_bytes_of_tokens(corpus):
    text = b"state space model"
    ids = corpus.tokenizer.encode(text.decode(), add_special_tokens=False).ids
    assert corpus.token_bytes[ids].sum() == len(text)
    assert corpus.token_bytes[corpus.tokenizer.token_to_id("<|end|>")] == 0
    assert corpus.text_bytes([*ids, corpus.tokenizer.token_to_id("<|end|>")]) == text


def test_prepared_once(tmp_path):
    config = DataConfig(source=str(write_texts(tmp_path / "texts")), cache=str(tmp_path / "cache"), seqlen=16)
    folder = data.prepare(config, 300)
    stamp = (folder / "train.bin").stat().st_mtime_ns
    assert data.prepare(config, 300) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    (tmp_path / "texts" / "new.txt").write_text("one more")
    assert data.prepare(config, 300) != folder


def test_a_given_tokenizer_neither_cuts_nor_pads(tmp_path):
    config = DataConfig(source=str(write_texts(tmp_path / "texts")), cache=str(tmp_path / "cache"), seqlen=16)
    own = data.prepare(config, 300)
    tokenizer = data.load(own, 16).tokenizer
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "cutting.json"))
    given = data.prepare(replace(config, tokenizer=str(tmp_path / "cutting.json")), 300)
    assert given != own
    assert (given / "train.bin").read_bytes() == (own / "train.bin").read_bytes()


def test_two_runs_may_prepare_at_once(tmp_path):
    config = DataConfig(source=str(write_texts(tmp_path / "texts")), cache=str(tmp_path / "cache"), seqlen=16)
    with ThreadPoolExecutor() as pool:
        folders = set(pool.map(lambda _: data.prepare(config, 300), range(3)))
    assert len(folders) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folders.pop().name]


def test_jsonl_and_gzip(tmp_path):
    lines = "".join(json.dumps({"text": f"document {i}", "id": i}) + "\n" for i in range(3)) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.txt").write_text("whole file\nin one document")
    (tmp_path / "ignored.csv").write_text("1,2")
    documents = [text for _, text in read_documents(find_files(str(tmp_path)))]
    assert documents == [f"document {i}" for i in range(3)] * 2 + ["whole file\nin one document"]


def test_the_library_of_this_python():
    files = find_files("stdlib")
    assert len(files) > 300
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)
