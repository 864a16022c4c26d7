"""The kernels compile for GPUs that are not here, and fit them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# bytes of shared memory that a program may have
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448}


def compiled(capability, dtype, headdim, d_state):
    """What each kernel needs, by its name; in a process of its own, as the interpreter may be on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [capability, dtype, headdim, d_state]
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return {needs["kernel"]: needs for needs in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize(
    ("capability", "dtype", "headdim", "d_state"),
    [
        (80, "bfloat16", 64, 128),
        (80, "bfloat16", 128, 256),
        (86, "bfloat16", 64, 128),
        (90, "bfloat16", 128, 256),
        (90, "float16", 16, 16),
        (90, "float32", 64, 128),
        (100, "bfloat16", 64, 128),
        (100, "bfloat16", 64, 256),
    ],
)
def test_fits(capability, dtype, headdim, d_state):
    for name, needs in compiled(capability, dtype, headdim, d_state).items():
        assert needs["shared"] <= SHARED[capability], (name, needs)
        # registers that spill: few where tiles were chosen with care
        assert needs["stack"] <= (1536 if dtype == "float32" else 1024 if d_state > 128 else 256), (name, needs)


def test_hopper_is_used_well():
    kernels = compiled(90, "bfloat16", 64, 128)
    for name, needs in kernels.items():
        # a register that spills costs more than it saves
        assert needs["stack"] <= 96, (name, needs)
    for name in ("sweep", "scan", "pairs", "dx", "outside"):
        assert kernels[name]["wgmma"] > 0
        assert kernels[name]["tma"] > 0
    # two programs on each multiprocessor
    for name in ("sweep", "scan", "pairs", "dx"):
        assert kernels[name]["shared"] <= 115_712
