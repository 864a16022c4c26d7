"""A run split any way is the same run: losses, gradient norms, and what a checkpoint brings back."""

import json
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout

from mamba2_dist import SegmentTable
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.state_scan import chosen
from mamba2_dist.train import data
from mamba2_dist.train.metrics import read_history
from mamba2_dist.train.trainer import Trainer

from ..distributed import run_ranks
from .corpus import small_run

# float32 sums in another order, through a few optimizer steps
SAME_LOSS = 2e-5
# and roundings of other states
SAME_LOSS_BF16 = 1e-3


def _train(folder: Path, options: dict) -> dict:
    """Run to the end; the losses by step, and the next batch."""
    config = small_run(folder, **options)
    trainer = Trainer(config, Path(config.out), torch.device("cpu"))
    first = trainer.progress.step
    batch = [window.tokens.tolist() for window in trainer._training_windows(trainer.progress.samples)]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, batch)
    trainer.run()
    dist.barrier()
    rows = read_history(Path(config.out))
    return {
        "first": first,
        "next batch": [window for rank in range(len(every)) if rank in _dp_firsts(trainer) for window in every[rank]],
        "loss": {row["step"]: row["loss"] for row in rows if "loss" in row},
        "norm": {row["step"]: row["norm"] for row in rows if "norm" in row},
        "validation": {row["step"]: row["validation"] for row in rows if "validation" in row},
    }


def _dp_firsts(trainer) -> list[int]:
    """The first rank of each replica, in the order of the data."""
    size = trainer.groups.tp.size * trainer.groups.cp.size
    return [replica * size for replica in range(trainer.groups.dp.size)]


def _run(folder: Path, **options) -> dict:
    small_run(folder)  # the texts are written once, not by every rank
    ranks = options.get("tp", 1) * options.get("cp", 1) * (options.get("dp") or 1)
    return run_ranks(ranks, _train, folder, options)[0]


def _assert_same(run: dict, reference: dict) -> None:
    for name in ("loss", "norm", "validation"):
        assert run[name].keys() == reference[name].keys()
        for step, value in reference[name].items():
            assert run[name][step] == pytest.approx(value, rel=SAME_LOSS), f"{name} of update {step}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One rank's run, which every split is compared with."""
    return _run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2},
        {"cp": 2},
        {"dp": 2},
        {"dp": 2, "sharding": "ddp"},
        {"cp": 2, "sharding": "ddp"},
        {"cp": 2, "dp": 2},
        {"tp": 2, "cp": 2},
        {"tp": 4},
        {"tp": 2, "dp": 2},
        {"dp": 2, "micro_batch": 1},
        {"dp": 2, "micro_batch": 1, "sharding": "ddp"},
        {"micro_batch": 2},
    ],
    ids=str,
)
def test_any_split_trains_the_same(tmp_path, whole, options):
    run = _run(tmp_path, **options)
    _assert_same(run, whole)
    assert run["next batch"] == whole["next batch"]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_layouts_and_sequence_parallel_train_the_same(tmp_path, whole, layout):
    parallel = {"tp": 2, "cp": 2}
    config = small_run(tmp_path, **parallel).parallel
    split = replace(config, layout=layout, sequence_parallel=True, state_scan="ring")
    _assert_same(_run(tmp_path, **parallel, parallel=split), whole)


@pytest.mark.parametrize(
    "options", [{"cp": 2}, {"tp": 4}, {"dp": 2}, {"cp": 2, "dp": 2, "sharding": "ddp"}, {}], ids=str
)
def test_a_checkpoint_loads_under_another_split(tmp_path, options):
    before = _run(tmp_path, tp=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
    shutil.rmtree(checkpoints / "step-00000006")
    after = _run(tmp_path, **options)
    assert after["first"] == 4
    _assert_same(after, before)
    # the next batch is the fifth, whoever reads it
    windows = _run(tmp_path / "fresh", tp=2, steps=4)["next batch"]
    assert after["next batch"] != windows


def test_the_next_batch_does_not_depend_on_the_split(tmp_path):
    batches = []
    for options in ({"tp": 2}, {"cp": 2}, {"dp": 2}, {"tp": 4}):
        run = tmp_path / str(len(batches))
        _run(run, tp=2, steps=4)
        batches.append(_run(run, **options, steps=6)["next batch"])
    assert all(batch == batches[0] for batch in batches)


@pytest.mark.parametrize("options", [{}, {"cp": 3}, {"cp": 3, "sharding": "ddp"}, {"tp": 2, "dp": 2}], ids=str)
def test_resuming_changes_no_digit(tmp_path, options):
    options = {"steps": 8, "save_every": 4, **options}
    whole = _run(tmp_path / "whole", **options)
    _run(tmp_path / "broken", **options)
    checkpoints = tmp_path / "broken" / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000008")
    resumed = _run(tmp_path / "broken", **options)
    assert resumed["first"] == 4
    assert resumed["loss"] == whole["loss"]
    assert resumed["norm"] == whole["norm"]


CARRY = {"steps": 5, "save_every": 3, "validate_every": 5}


def _carry(folder: Path, **options) -> dict:
    data = replace(small_run(folder).data, carry="documents")
    return _run(folder, **{**CARRY, "data": data, **options})


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """One rank's run whose rows go on where they stopped."""
    return _carry(tmp_path_factory.mktemp("carried"))


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2},
        {"cp": 2},
        {"cp": 2, "sharding": "ddp"},
        {"dp": 2, "micro_batch": 1},
        {"cp": 2, "dp": 2, "recompute": "inner"},
        {"tp": 4},
        {"micro_batch": 1},
    ],
    ids=str,
)
def test_any_split_carries_the_same(tmp_path, carried, options):
    run = _carry(tmp_path, **options)
    _assert_same(run, carried)
    assert run["next batch"] == carried["next batch"]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_layouts_carry_the_same(tmp_path, carried, layout):
    split = replace(small_run(tmp_path, tp=2, cp=2).parallel, layout=layout, sequence_parallel=True)
    _assert_same(_carry(tmp_path, tp=2, cp=2, parallel=split), carried)


@pytest.mark.parametrize(
    "options", [{}, {"cp": 3}, {"tp": 2, "dp": 2, "micro_batch": 1}, {"cp": 2, "precision": "bf16"}], ids=str
)
def test_resuming_what_is_carried_changes_no_digit(tmp_path, options):
    whole = _carry(tmp_path, **options)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")
    resumed = _carry(tmp_path, **options)
    assert resumed["first"] == 3
    assert (resumed["loss"], resumed["norm"]) == (whole["loss"], whole["norm"])


@pytest.mark.parametrize("options", [{}, {"cp": 4}, {"dp": 2, "micro_batch": 1}, {"tp": 4}], ids=str)
def test_what_is_carried_loads_under_another_split(tmp_path, carried, options):
    _carry(tmp_path, tp=2, cp=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")
    after = _carry(tmp_path, **options)
    assert after["first"] == 3
    _assert_same(after, carried)


def test_what_is_carried_is_not_dropped_silently(tmp_path):
    _run(tmp_path, steps=3)
    with pytest.raises(AssertionError, match=r"data\.carry is 'nothing' there and 'documents' here"):
        _carry(tmp_path)
    (tmp_path / "other").mkdir()
    _carry(tmp_path / "other")
    with pytest.raises(AssertionError, match=r"data\.carry is 'documents' there and 'nothing' here"):
        _run(tmp_path / "other", steps=9)
    with pytest.raises(AssertionError, match=r"data\.global_batch is 4 there and 2 here"):
        _carry(tmp_path / "other", global_batch=2)


def _without_attention(folder: Path, **options) -> dict:
    config = small_run(folder)
    return _run(folder, **{"model": replace(config.model, pattern="M-M"), **CARRY, **options})


@pytest.fixture(scope="module")
def in_one(tmp_path_factory):
    """One rank's runs of whole windows, by what is carried."""
    folders = {carry: tmp_path_factory.mktemp(carry) for carry in ("nothing", "documents")}
    return {
        carry: _without_attention(folder, data=replace(small_run(folder).data, carry=carry))
        for carry, folder in folders.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cp": 2},
        {"cp": 2, "sharding": "ddp"},
        {"dp": 2, "micro_batch": 1},
        {"dp": 2, "micro_batch": 1, "sharding": "ddp"},
        {"tp": 2, "cp": 2, "recompute": "inner"},
    ],
    ids=str,
)
@pytest.mark.parametrize("carry", ["nothing", "documents"])
def test_parts_train_the_same(tmp_path, in_one, options, carry):
    data = replace(small_run(tmp_path).data, carry=carry)
    _assert_same(_without_attention(tmp_path, data=data, parts=3, **options), in_one[carry])


def test_parts_in_bf16_train_the_same(tmp_path):
    one, three = (_without_attention(tmp_path / str(parts), precision="bf16", parts=parts) for parts in (1, 3))
    assert list(three["loss"].values()) == pytest.approx(list(one["loss"].values()), rel=SAME_LOSS_BF16)


def _losses_of_long_rows(folder: Path, rows: int, updates: int) -> tuple[list[float], list[float]]:
    """The losses of a run that learns nothing, and those of the same tokens in rows as long as the run."""
    settings = small_run(folder)
    config = replace(
        settings,
        model=replace(settings.model, pattern="M-M"),
        data=replace(settings.data, carry="documents"),
        optimizer=replace(settings.optimizer, lr=1e-30),
        global_batch=rows,
        steps=updates,
    )
    trainer = Trainer(config, Path(config.out), torch.device("cpu"))
    trainer.run()
    split, length = trainer.corpus.train, config.data.seqlen * updates
    losses = torch.zeros(updates)
    counted = torch.zeros(updates)
    for row in range(rows):
        start = row * split.windows // rows * config.data.seqlen
        tokens = torch.from_numpy(split.tokens[start : start + length + 1].astype("int64"))[None]
        inside = [end - start for end in split.ends.tolist() if start < end <= start + length]
        labels = tokens[:, 1:].clone()
        labels[0, [end - 1 for end in inside]] = -100
        documents = [[0, *(end for end in inside if end < length), length]]
        with torch.no_grad():
            found = trainer.bare(tokens[:, :-1], labels, SegmentTable.contiguous(length, 1, documents=documents))
        losses += found.view(updates, -1).sum(1)
        counted += (labels >= 0).view(updates, -1).sum(1)
    rows_of_run = read_history(Path(config.out))
    return [row["loss"] for row in rows_of_run if "loss" in row], (losses / counted).tolist()


def test_rows_go_on_where_they_stopped(tmp_path):
    small_run(tmp_path)
    (run, whole), *_ = run_ranks(1, _losses_of_long_rows, tmp_path, 3, 5)
    assert run == pytest.approx(whole, rel=1e-6)


def _facts(folder: Path) -> tuple[str, list[str]]:
    config = small_run(folder, cp=2)
    trainer = Trainer(config, Path(config.out), torch.device("cpu"))
    return trainer.config.parallel.layout, trainer._facts()


def test_a_run_says_what_auto_chose(tmp_path):
    small_run(tmp_path)
    layout, facts = run_ranks(2, _facts, tmp_path)[0]
    assert layout != "auto"
    state_bytes = 4 * 4 * 8 * 8 * 8  # float32, batch, nheads, headdim, d_state
    backend = chosen(Group("states", (0, 1)), {"contiguous": 1, "zigzag": 2}[layout], state_bytes)
    assert f" cp 2 ({layout}, states by {backend}) " in facts[1]


def _prepare_slowly(folder: Path) -> None:
    config, prepare = small_run(folder), data.prepare

    def slowly(*arguments):
        if not Path(config.data.cache).exists():
            time.sleep(2)
        return prepare(*arguments)

    try:
        data.prepare = slowly
        _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        Trainer(config, Path(config.out), torch.device("cpu"))
    finally:
        data.prepare = prepare
        _set_pg_timeout(default_pg_timeout, dist.group.WORLD)


def test_a_large_corpus_may_take_longer_than_a_collective(tmp_path):
    small_run(tmp_path)
    run_ranks(2, _prepare_slowly, tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    optimizer = replace(small_run(tmp_path).optimizer, lr=1e30)
    with pytest.raises(AssertionError, match=r"the gradient's norm is \w+ at update \d; nothing was changed"):
        _run(tmp_path, optimizer=optimizer, steps=9, save_every=9)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_another_run_is_not_continued(tmp_path):
    _run(tmp_path, steps=2, schedule=small_run(tmp_path).schedule.__class__(warmup_steps=1))
    model = replace(small_run(tmp_path).model, norm_eps=1e-6)
    with pytest.raises(AssertionError, match=r"model\.norm_eps is 1e-05 there and 1e-06 here"):
        _run(tmp_path, model=model)
    with pytest.raises(AssertionError, match=r"data\.seed is 0 there and 1 here"):
        _run(tmp_path, seed=1)


def test_damaged_checkpoints_are_named(tmp_path):
    _run(tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    (newest / "progress.json").write_text("{")
    with pytest.raises(AssertionError, match=r"step-00000006/progress\.json cannot be read"):
        _run(tmp_path, steps=8)
    (newest / "progress.json").write_text(json.dumps({"step": 6, "samples": 24, "processes": "1 cpu"}))
    (newest / ".metadata").write_bytes(b"")
    with pytest.raises(AssertionError, match="step-00000006 cannot be read"):
        _run(tmp_path, steps=8)


def test_bf16_learns(tmp_path):
    run = _run(tmp_path, steps=30, precision="bf16", validate_every=30)
    assert run["validation"][30] < 0.8 * run["validation"][0]
