"""Ranks for tests: started once for each world size and device and used by every test, since a start costs seconds."""

import atexit
import ctypes
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120
# process groups of gloo stay until their process ends, and each has threads that wake a hundred times a second
MANY_THREADS = 200
# that wait for their next task; of more, the threads take from the processors what a start costs
MANY_RANKS = 4


def poison_memory(patch: Callable[[object, str, object], None]) -> None:
    """An element that is never written shows up as nan. patch: `setattr`, or one that will be undone."""

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            # what a compiler traces with, or PyTorch itself makes for its graphs, is left alone
            ours = type(tensor) is torch.Tensor and not tensor.requires_grad
            return tensor.fill_(float("nan")) if ours and tensor.is_floating_point() else tensor

        return call

    # not torch.empty, which default devices know by identity
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch(owner, name, poisoned(getattr(owner, name)))


def _sleeps(device: str) -> bool:
    """Whether ranks are stopped between tasks: gloo's threads wake all the time, and take the cores from others."""
    return device == "cpu" and sys.platform == "linux"


def _may_sleep() -> None:
    """A stopped process ends with its parent, and its parent's processes do not with it: a process group that loses its
    shell while some of it is stopped is hung up."""
    os.setsid()
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(rank: int, world_size: int, device: str, store: str, pipe) -> None:
    if _sleeps(device):
        _may_sleep()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    poison_memory(setattr)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        task = pipe.recv()
        if task is None:
            break
        module, name, args = task
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(importlib.import_module(module), name)(*args)))
        except BaseException:  # the traceback is the answer
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class _Ranks:
    def __init__(self, world_size: int, device: str):
        context = mp.get_context("spawn")
        self.sleeps = _sleeps(device)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            args = (rank, world_size, device, f"{self.folder.name}/store", there)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, task) -> list:
        self._signal(signal.SIGCONT)
        try:
            return self._run(task)
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in self.processes if self.sleeps else ():
            if process.is_alive():
                os.kill(process.pid, number)

    def _run(self, task) -> list:
        for pipe in self.pipes:
            pipe.send(task)
        results: dict[int, object] = {}
        failures: list[str] = []
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        while waiting:
            # once a rank has failed, the others may be waiting for it for ever
            ready = wait(list(waiting), timeout=3 if failures else TIMEOUT_S)
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} did not answer")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                good, results[rank] = pipe.recv()
                if not good:
                    failures.append(f"rank {rank}:\n{results[rank]}")
        if failures:
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(len(self.pipes))]

    def threads(self) -> int:
        """Of the rank that has most; 0 where nobody counts them."""
        folders = [Path(f"/proc/{process.pid}/task") for process in self.processes]
        return max(len(list(folder.iterdir())) if folder.exists() else 0 for folder in folders)

    def stop(self, gently: bool) -> None:
        self._signal(signal.SIGCONT)
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if gently:
                pipe.send(None)
                process.join(5)
            process.kill()
        self.folder.cleanup()


_running: dict[tuple[int, str], _Ranks] = {}


def run_ranks(world_size: int, function, *args, device: str = "cpu") -> list:
    """`function(*args)` on every rank of a world that speaks gloo, or with device "cuda" NCCL, a GPU each; the ranks'
    results. A rank's failure fails the caller."""
    world = world_size, device
    for other in [other for other in _running if other != world and other[0] > MANY_RANKS]:
        _stop(other)
    if world not in _running:
        _running[world] = _Ranks(*world)
    try:
        results = _running[world].run((function.__module__, function.__qualname__, args))
        if _running[world].threads() > MANY_THREADS:
            _stop(world)
        return results
    except AssertionError:
        _running.pop(world).stop(gently=False)
        raise


def _stop(world: tuple[int, str]) -> None:
    # a process takes half a second to end, and has something to leave in order on a GPU only
    _running.pop(world).stop(gently=world[1] == "cuda")


@atexit.register
def _stop_all() -> None:
    for world in list(_running):
        _stop(world)
