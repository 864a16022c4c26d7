"""Imports go one way: kernels <- parallel <- modules <- models <- train <- adapters."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("kernels", "parallel", "modules", "models", "train", "adapters")
FOREIGN = {"megatron", "deepspeed", "apex", "transformers", "transformer_engine", "mamba_ssm"}
# what else a room may not touch, by the first name of an import
FORBIDDEN = {
    "kernels": {"torch.distributed"},
    "modules": {"torch.distributed", "triton"},
    "models": {"torch.distributed", "triton", "mamba2_dist.parallel.collectives"},
}


def _folder(room: str) -> Path:
    return ROOT / "kernels" if room == "kernels" else ROOT / "mamba2_dist" / room


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level or None] if node.level else ()
            if package[:1] == ("kernels",):
                package = ("mamba2_dist", *package)
            module = ".".join([*package, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("room", ORDER)
def test_room_imports_only_rooms_below(room):
    above = set(ORDER[ORDER.index(room) + 1 :])
    files = list(_folder(room).rglob("*.py"))
    assert files
    for path in files:
        for name in _imports(path):
            top, *rest = name.split(".")
            assert top != "kernels", f"{path}: import mamba2_dist.kernels, not kernels"
            assert room == "adapters" or top not in FOREIGN, f"{path} imports {name}"
            if top == "mamba2_dist" and rest:
                assert rest[0] not in above, f"{path} imports {name} from above"
            for forbidden in FORBIDDEN.get(room, ()):
                assert not f"{name}.".startswith(f"{forbidden}."), f"{path} imports {name}"


def test_nothing_imports_an_adapter():
    for path in (ROOT / "mamba2_dist").rglob("*.py"):
        if "adapters" not in path.parts:
            assert not any(name.startswith("mamba2_dist.adapters") for name in _imports(path)), path


def test_kernels_read_no_configuration():
    for room in ("kernels", "parallel"):
        for path in _folder(room).rglob("*.py"):
            assert not any(name.startswith("mamba2_dist.config") for name in _imports(path)), path
