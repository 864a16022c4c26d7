"""This process: its device, its place among the others, the folder it may write to."""

import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


@contextmanager
def process_group(device_choice: str) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, or stand alone; gives this process's device.

    Raises ValueError when "cuda" is asked for and the processes of this machine outnumber its GPUs.
    """
    on_gpu = use_gpus(device_choice, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "RANK" in os.environ:
        _die_with_parent()
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()
        # gloo's threads let go of the last collective's tensors under Python's lock; one that comes to that while the
        # interpreter ends aborts the process (https://github.com/pytorch/pytorch/issues/190489)
        time.sleep(0.1)


def use_gpus(device_choice: str, processes: int) -> bool:
    """Whether this machine's processes run on GPUs: "auto" says so when each has one of its own.

    Raises ValueError when "cuda" is asked for and there are too few.
    """
    gpus = torch.cuda.device_count()
    if device_choice == "cuda" and gpus < processes:
        raise ValueError(
            f"device=cuda needs a GPU for each of the {processes} processes of this machine, torch finds {gpus}; "
            "lower parallel.tp, parallel.cp or parallel.dp, or use device=cpu"
        )
    return device_choice == "cuda" or (device_choice == "auto" and gpus >= processes)


def _die_with_parent() -> None:
    """A worker whose launcher was killed must not go on writing to the run's folder."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@contextmanager
def exclusive(folder: Path, wait_s: float = 20) -> Iterator[None]:
    """Keep other runs out of a folder; a run that is just dying is waited for. Raises ValueError when one stays."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"out ({folder}) is in use by another run; stop it or choose another folder"
                    ) from None
                time.sleep(0.5)
        yield
