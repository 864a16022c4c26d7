"""Measure this machine's links, products and copies, for the cost model."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from mamba2_dist.config import require
from mamba2_dist.launch import launch
from mamba2_dist.parallel.collectives import all_to_all, gather_over
from mamba2_dist.parallel.cost_model import H200, Link, Machine
from mamba2_dist.parallel.groups import Group
from mamba2_dist.train.machine import save_machine
from mamba2_dist.train.runtime import process_group

SIZES = [2**power for power in range(15, 25)]  # 32 KiB to 16 MiB
SECONDS = 0.1  # for the calls of one size
ROUNDS = 5
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Measures links between this machine's GPUs (or two processes on CPUs), products and copies, in two minutes."""

    out: str = "machine.json"
    """Where the machine is written, for `mamba2-dist plan machine=...`."""

    def __post_init__(self):
        path = Path(self.out)
        require(path.suffix == ".json", f"out ({self.out}) must be a file that ends in .json")
        require(not path.is_dir(), f"out ({self.out}) is a folder; give a file in it")


def calibrate(config: CalibrateConfig) -> int:
    """Measure in a process for every GPU, or in two on CPUs; the exit status."""
    _check_writable(Path(config.out))
    processes = torch.cuda.device_count() or 2
    return launch(processes, ["-m", "mamba2_dist.calibrate", config.out])


def _check_writable(path: Path) -> None:
    """Raise ValueError unless a file can be made beside `path`, whose folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"out ({path}) cannot be written ({error.strerror}); choose another folder") from None


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The latency and bandwidth with the least sum of squared relative errors, neither below what can be."""
    size, measured = np.asarray(sizes, float), np.asarray(seconds, float)
    (latency, per_byte), *_ = np.linalg.lstsq(np.stack([1 / measured, size / measured], 1), np.ones(len(size)))
    if per_byte <= 0:
        # the sizes make no difference
        return Link(float(np.median(measured)), float((size / measured).max()))
    return Link(max(float(latency), 1e-7), 1 / float(per_byte))


def measure(device: torch.device) -> Machine:
    """On every process: the machine, what cannot be measured as it is assumed for H200s."""
    ranks = dist.get_world_size()
    machine = H200
    links: dict[str, Link] = {}
    if ranks > 1:
        for name, operation in {"all_gather": _all_gather, "all_to_all": _all_to_all, "node": _send}.items():
            _say(f"{name}: {ranks} processes, {SIZES[0] // 1024} KiB to {SIZES[-1] // 2**20} MiB")
            points = [_timed(*operation(size, device), device) for size in SIZES]
            links[name] = fit(*zip(*points, strict=True))
        # of the ring's steps the machine's latency counts one
        ring = links["all_gather"].latency_s - (ranks - 2) * machine.node_step_s
        links["all_gather"] = replace(links["all_gather"], latency_s=max(ring, 1e-7))
        for name, link in links.items():
            _say(f"{name}: {link.latency_s * 1e6:.1f} us and {link.bytes_per_s / 1e9:.1f} GB/s")
    on_gpu = device.type == "cuda"
    flops, copied = _matmul(device), _copy(device)
    _say(f"products {flops / 1e12:.2f} TFLOP/s, copy {copied / 1e9:.0f} GB/s")
    measured = [*links, *["node_size"] * (ranks > 1), "matmul_flops", "memory_bytes_per_s", "memory_bytes"]
    return replace(
        replace(machine, **cast("dict", links)),
        name=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        node_size=ranks if ranks > 1 else machine.node_size,
        peer_memory=machine.peer_memory if on_gpu else None,
        matmul_flops=flops,
        memory_bytes_per_s=copied,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else _host_memory() // ranks,
        measured=tuple(measured),
    )


def _all_gather(size: int, device: torch.device) -> tuple[int, Call]:
    """Bytes received, and what gathers `size` bytes from every rank."""
    world, mine = _world(), torch.zeros(size // 4, device=device)
    return (world.size - 1) * size, lambda: gather_over(mine, world)


def _all_to_all(size: int, device: torch.device) -> tuple[int, Call]:
    """Bytes received, and what exchanges equal parts of `size` bytes."""
    world = _world()
    part = max(size // 4 // world.size, 1)
    sent, parts = torch.zeros(world.size * part, device=device), [part] * world.size
    return (world.size - 1) * part * 4, lambda: all_to_all(sent, world, parts, parts)


def _send(size: int, device: torch.device) -> tuple[int, Call]:
    """Bytes received, and what sends to the next rank while it receives from the one before, as rounds of a scan do."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sent, received = (torch.zeros(size // 4, device=device) for _ in range(2))

    def call() -> None:
        send = dist.P2POp(dist.isend, sent, (rank + 1) % ranks)
        receive = dist.P2POp(dist.irecv, received, (rank - 1) % ranks)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    return size, call


def _timed(size: int, call: Call, device: torch.device) -> tuple[int, float]:
    """(size, seconds of one call on the slowest rank): the median of rounds."""
    for _ in range(3):
        call()
    repeats = torch.tensor([max(min(int(SECONDS / ROUNDS / _seconds(call, 3, device)), 200), 2)], device=device)
    dist.all_reduce(repeats, dist.ReduceOp.MIN)
    rounds = []
    for _ in range(ROUNDS):
        dist.all_reduce(repeats, dist.ReduceOp.MIN)  # all begin together
        rounds.append(_seconds(call, int(repeats), device))
    seconds = torch.tensor([statistics.median(rounds)], device=device, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return size, float(seconds)


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Of one call on average. A GPU is given other work first, so that the host runs ahead, as it does in training."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    busy = torch.zeros(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(1 + repeats // 10):
        busy @ busy
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / repeats


def _matmul(device: torch.device) -> float:
    """FLOP/s of bf16 products of 8192 x 8192 (on a CPU 512 x 512) once they have warmed the GPU."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _warm(lambda: a @ b, device)


def _copy(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB (on a CPU 64 MiB)."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = (torch.zeros(size, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * size / _warm(lambda: target.copy_(source), device)


def _warm(call: Call, device: torch.device) -> float:
    """Seconds of a call after about a second of them."""
    deadline = time.perf_counter() + 1
    while time.perf_counter() < deadline:
        _seconds(call, 10, device)
    return statistics.median(_seconds(call, 10, device) for _ in range(ROUNDS))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _world() -> Group:
    return Group.of("world", cast("dist.ProcessGroup", dist.group.WORLD))


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _main(out: Path) -> None:
    with process_group("auto") as device:
        machine = measure(device)
        if dist.get_rank() == 0:
            save_machine(machine, out)
            print(f"wrote {out}; the network between nodes is assumed", flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
