"""A run killed at any moment goes on as if nothing had happened; a finished one says so."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mamba2_dist.train.metrics import read_history

from .corpus import small_run

ROOT = Path(__file__).parents[2]
STEPS = 40


def _configure(folder: Path) -> list[str]:
    config = asdict(small_run(folder, cp=2, dp=1, steps=STEPS, save_every=10, validate_every=20, sample_tokens=5))
    config.pop("preset")
    plain = json.loads(json.dumps(config).replace("Infinity", "1e400"))
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    return [sys.executable, "-m", "mamba2_dist", "train", str(folder / "run.yaml")]


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(command: list[str]) -> str:
    process = _start(command)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def _losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_history(folder / "run") if "loss" in row}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    command = _configure(folder)
    return folder, command, _finish(command)


def test_an_unbroken_run_leaves_everything(unbroken):
    folder, command, output = unbroken
    run = folder / "run"
    assert len(_losses(folder)) == STEPS
    assert (run / "loss.png").stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000030", "step-00000040"]
    assert output.rstrip().splitlines()[-1].startswith("def ")
    again = _finish(command)
    assert "finished: 40 updates" in again
    assert "to train on, run the same command with steps=80" in again
    shorter = _finish([*command, "steps=20"])
    assert "finished: 40 updates" in shorter


@pytest.mark.parametrize("victim", ["launcher", "first rank", "second rank"])
def test_killed_and_run_again(tmp_path, unbroken, victim):
    command = _configure(tmp_path)
    process = _start(command)
    deadline = time.monotonic() + 100
    while len(_losses(tmp_path)) < STEPS // 2 + 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks = _children(process.pid)
    assert len(ranks) == 2
    os.kill({"launcher": process.pid, "first rank": ranks[0], "second rank": ranks[1]}[victim], signal.SIGKILL)
    process.communicate(timeout=60)
    broken = _losses(tmp_path)
    assert len(broken) < STEPS
    output = _finish(command)
    assert "going on from update" in output
    assert _losses(tmp_path) == _losses(unbroken[0])


def _children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children if "mamba2_dist" in Path(f"/proc/{child}/cmdline").read_text())
