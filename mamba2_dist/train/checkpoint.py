"""Checkpoints in tensors of the whole model: complete or absent, loaded under any split."""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from .optimizer import prepare_state
from .whole import Slice, gather_slices, model_slices, slices

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Updates made."""
    samples: int = 0
    """Windows read over all ranks: the place in the data, whatever the split."""


def newest(folder: Path) -> Path | None:
    """The last complete checkpoint in a folder."""
    return max((path for path in folder.glob("step-????????") if path.is_dir()), default=None)


class Checkpoints:
    """The checkpoints of a run, `folder`/step-00000100 and so on; every rank makes the same calls.

    A checkpoint is written beside its place and moved there when all of it is on disk.
    """

    def __init__(self, folder: Path, keep: int, device: torch.device):
        self.folder, self.keep, self.device = folder, keep, device

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-????????") if path.is_dir())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        progress: Progress,
        identity: dict,
        memory: Iterable[Slice] = (),
    ) -> None:
        """Write the checkpoint of `progress.step` and remove the oldest beyond `keep`.

        identity: {"model": ..., "data": ...}, what a run must share with it to go on from it.
        memory: what rows carry to the next update.
        """
        final = self.path(progress.step)
        partial = self.folder / f"{final.name}.partial"
        if dist.get_rank() == 0:
            for left in [*self.folder.glob("*.partial"), *self.folder.glob("*.removed")]:
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        prepare_state(optimizer)
        state = _training_state(model, optimizer, memory)
        dcp.save({**state, **_random_state(self.device)}, checkpoint_id=partial)
        if dist.get_rank() == 0:
            _write(partial / "progress.json", {**asdict(progress), "processes": self._processes()})
            _write(partial / "identity.json", identity)
            _sync(partial)
            if final.exists():
                self._remove(final)
            os.replace(partial, final)
            _sync(self.folder)
            for step in self.steps()[: -self.keep]:
                self._remove(self.path(step))
        dist.barrier()

    def _processes(self) -> str:
        """Random states are those of so many processes on such devices."""
        return f"{dist.get_world_size()} {self.device.type}"

    def _remove(self, path: Path) -> None:
        # out of sight first, so that a kill halfway leaves no damaged checkpoint
        doomed = path.with_name(f"{path.name}.removed")
        os.replace(path, doomed)
        shutil.rmtree(doomed)

    def load(
        self, model: nn.Module, optimizer: torch.optim.AdamW, identity: dict, memory: Iterable[Slice] = ()
    ) -> Progress:
        """Load the newest checkpoint, if there is one, into model, optimizer, memory and random states.

        Raises ValueError when it is damaged, of another model or of other data.
        """
        path = newest(self.folder)
        if path is None:
            return Progress()
        check_identity(path, identity)
        saved = read_json(path / "progress.json")
        prepare_state(optimizer)
        state = _training_state(model, optimizer, memory)
        if saved["processes"] == self._processes():
            state.update(_random_state(self.device))
        _read(state, path)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["step"].fill_(saved["step"])
        for name in [name for name in state if name.startswith("random.")]:
            _set_random_state(name, state[name])
        return Progress(saved["step"], saved["samples"])


def load_model(model: nn.Module, path: Path) -> None:
    """Load the weights alone, under any split; every process reads what it holds and waits for no other."""
    _read(_model_state(model), path, alone=True)


def check_identity(path: Path, identity: dict) -> None:
    """Raise ValueError unless the checkpoint at `path` is of this model and data, naming the fields that differ."""
    saved, wanted = _flat(read_json(path / "identity.json")), _flat(json.loads(json.dumps(identity)))
    saved.setdefault("data.carry", "nothing")  # checkpoints from before there was a choice
    wanted.setdefault("data.carry", "nothing")
    # the chunk size changes speed, not the model
    differing = [
        f"{name} is {saved.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name) and name != "model.mamba.chunk_size"
    ]
    if differing:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differing)}; change that back or choose another out folder"
        )


def read_json(path: Path) -> dict:
    """A JSON file of a checkpoint. Raises ValueError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint file {path} cannot be read ({error}); move {path.parent} away to use an older one"
        ) from None


def _model_state(model: nn.Module) -> dict:
    return gather_slices(_of(model, lambda parameter: parameter), "model.")


def _training_state(model: nn.Module, optimizer: torch.optim.AdamW, memory: Iterable[Slice]) -> dict:
    state = {**_model_state(model), **gather_slices(memory, "memory.")}
    for moment in MOMENTS:
        state.update(gather_slices(_of(model, lambda p, m=moment: optimizer.state[p][m]), f"{moment}."))
    return state


def _of(model: nn.Module, tensor_of) -> Iterator[Slice]:
    for parameter, name, record in model_slices(model):
        yield from slices(name, record, tensor_of(parameter))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    rank = dist.get_rank()
    state = {f"random.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(name: str, state: Tensor) -> None:
    (torch.cuda.set_rng_state if ".cuda." in name else torch.set_rng_state)(state)


def _read(state: dict, path: Path, *, alone: bool = False) -> None:
    try:
        with warnings.catch_warnings():
            # a process that loads alone means to
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=path, no_dist=alone)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"checkpoint {path} cannot be read: {reason}; move it away to use an older one") from error


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def _write(path: Path, content: dict) -> None:
    with open(path, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
