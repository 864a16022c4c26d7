"""The links of a machine as a file, which `mamba2-dist calibrate` writes."""

import json
import os
from pathlib import Path

from mamba2_dist.config import require
from mamba2_dist.parallel.cost_model import Machine


def save_machine(machine: Machine, path: Path) -> None:
    """Write the whole file, or leave the old one."""
    assumed = "fields that `measured` does not name are assumed: nothing here has measured them"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"note": assumed} | machine.to_dict(), indent=1) + "\n")
    os.replace(partial, path)


def load_machine(path: Path) -> Machine:
    """What `save_machine` wrote. Raises ValueError for a file that is none of its."""
    require(path.is_file(), f"machine ({path}) does not exist; write it with `mamba2-dist calibrate out={path}`")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"machine ({path}) is not JSON: {error}") from None
    require(isinstance(content, dict), f"machine ({path}) must hold an object, got {type(content).__name__}")
    content.pop("note", None)
    try:
        return Machine.from_dict(content)
    except ValueError as error:
        raise ValueError(f"machine ({path}): {error}") from None
