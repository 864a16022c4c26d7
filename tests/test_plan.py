"""`mamba2-dist plan`, its rows, table and plot; `mamba2-dist calibrate`, what it fits and writes."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from mamba2_dist import calibrate as calibration
from mamba2_dist.calibrate import fit
from mamba2_dist.cli import main, parse
from mamba2_dist.parallel.cost_model import H200, Link
from mamba2_dist.plan import PlanConfig, rows_of
from mamba2_dist.train.machine import load_machine, save_machine

SMALL = ["preset=mamba2_130m", "data.seqlen=8192", "global_batch=2", "precision=bf16"]


def _plan(*arguments: str) -> PlanConfig:
    return parse(PlanConfig, "plan", [*SMALL, *arguments], with_file=True)


def test_sequences_grow_with_cp():
    """Tokens of a GPU stay what the configuration gives it, unless the sequence is given."""
    weak, strong = _plan("parallel.cp=2", "parallel.tp=2"), _plan("seqlen=1048576")
    for gpus in (8, 64):
        grown = weak.on_gpus(gpus)
        assert (grown.parallel.cp, grown.data.seqlen) == (gpus // 2, 4096 * gpus // 2)
        assert rows_of(weak, gpus, H200)[0].step.tokens == 2 * 4096
        assert rows_of(strong, gpus, H200)[0].step.tokens == 2 * 1048576 // gpus
    batch = _plan("parallel.dp=2", "global_batch=4", "micro_batch=1").on_gpus(16)
    assert (batch.parallel.dp, batch.parallel.cp) == (2, 8)


def test_rows():
    config = _plan()
    backends = lambda gpus: {row.backend for row in rows_of(config, gpus, H200)}  # noqa: E731
    everywhere = {"all_gather", "sliced", "log_step", "ring"}
    assert backends(1) == {"-"}
    assert backends(8) == everywhere | {"symmetric_memory"}
    assert backends(64) == everywhere | {"hierarchical"}
    rows = {row.backend: row for row in rows_of(config, 1024, H200)}
    assert [name for name, row in rows.items() if row.chosen] == ["hierarchical"]
    assert rows["hierarchical"].step.efficiency > rows["all_gather"].step.efficiency
    assert all(0 < row.step.efficiency <= 1 for row in rows.values())


def test_what_was_chosen_is_starred(tmp_path, capsys):
    """Also where a plan would not have chosen among it: in one node hierarchical is sliced."""
    for backend in ("all_gather", "hierarchical", "symmetric_memory"):
        config = _plan(f"parallel.state_scan={backend}")
        assert [row.backend for row in rows_of(config, 8, H200) if row.chosen] == [backend]
    rows = {row.backend: row.step for row in rows_of(_plan("parallel.state_scan=hierarchical"), 8, H200)}
    assert rows["hierarchical"] == rows["sliced"]
    with pytest.raises(ValueError, match="reads peers' memory, which a laptop cannot; choose another"):
        rows_of(config, 8, replace(H200, name="a laptop", peer_memory=None))
    main(["plan", *SMALL, "parallel.state_scan=ring", "gpus=8", f"out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "ring *" in printed
    assert "* is what the run takes" in printed


@pytest.mark.parametrize("gpus", [["gpus=1,8,64"], ["--gpus", "1,8,64"], ["--gpus=1,8,64"], ["gpus=[1,8,64]"]])
def test_command(tmp_path, capsys, monkeypatch, gpus):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    main(["plan", *SMALL, *gpus, f"out={tmp_path}/new"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.strip()[:1].isdigit()]
    assert len(rows) == 1 + 5 + 5
    for row in rows:
        assert ("modelled" in row) == (row.split()[0] == "64"), row
        assert ("network assumed" in row) == (row.split()[0] == "64"), row
    assert "assumed, not measured: node_size, rail, node_step_s, rail_step_s, rail_message_s" in lines
    assert (tmp_path / "new" / "plan.png").stat().st_size > 1000


def test_fit():
    sizes = np.array([2**15, 2**20, 2**24])
    link = fit(sizes, 10e-6 + sizes / 200e9)
    assert (link.latency_s, link.bytes_per_s) == (pytest.approx(10e-6), pytest.approx(200e9))
    # noise counts as a share: that of large messages does not drown the small ones
    sizes = 2.0 ** np.arange(15, 25)
    noisy = (10e-6 + sizes / 200e9) * (1 + 0.1 * (-1) ** np.arange(10))
    assert fit(sizes, noisy).latency_s == pytest.approx(10e-6, rel=0.05)
    flat = fit(sizes[:3], np.array([3e-6, 2e-6, 1e-6]))
    assert flat.latency_s == pytest.approx(2e-6)


def test_a_machine_file_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "machine.json"
    save_machine(H200, path)
    assert load_machine(path) == H200
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        save_machine(replace(H200, name="other"), path)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("no json", "is not JSON"), ("[1]", "must hold an object, got list"), ('{"name": "x"}', "node_size is missing")],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "machine.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_machine(tmp_path / "machine.json")


@pytest.mark.skipif(calibration.torch.cuda.is_available(), reason="measures GPUs where there are some")
def test_calibrate(tmp_path, capfd):
    """Two processes over gloo; what they cannot measure is assumed and said to be."""
    out = tmp_path / "folder" / "machine.json"
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", f"out={out}"])
    assert stopped.value.code == 0
    machine = load_machine(out)
    assert (machine.name, machine.node_size, machine.peer_memory) == ("CPU", 2, None)
    links = {"node", "all_gather", "all_to_all"}
    assert set(machine.measured) == links | {"node_size", "matmul_flops", "memory_bytes_per_s", "memory_bytes"}
    assert machine.rail == H200.rail
    for link in (machine.node, machine.all_gather, machine.all_to_all):
        assert isinstance(link, Link)
        assert 1e7 < link.bytes_per_s < 1e12
    assert "all_to_all: 2 processes" in capfd.readouterr().out
    assert json.loads(out.read_text())["note"].endswith("nothing here has measured them")
    main(["plan", *SMALL, "gpus=2,4", f"machine={out}", f"out={tmp_path}"])
    printed = capfd.readouterr().out
    assert "2 GPUs a node" in printed
    assert "assumed, not measured: barrier_s, rail, node_step_s, rail_step_s, rail_message_s\n" in printed
