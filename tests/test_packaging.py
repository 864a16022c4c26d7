"""One import name for the operators everywhere, and none of another project's."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = "from mamba2_dist.kernels.ssd import mamba_chunk_scan_combined as f; print(f.__module__)"


def _python(code: str, folder: Path, *paths: Path) -> str:
    environment = {"PYTHONPATH": ":".join(map(str, paths)), "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_checkout_imports_without_installation():
    assert _python(OURS, ROOT) == "mamba2_dist.kernels.ssd.combined"


def test_wheel_holds_the_operators_and_no_top_level_kernels(tmp_path):
    source = tmp_path / "source"  # building leaves files behind
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kernels", "mamba2_dist"):
        shutil.copytree(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(site)
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mamba2_dist"}
    assert _python(OURS, tmp_path, site) == "mamba2_dist.kernels.ssd.combined"


def test_another_kernels_package_is_not_shadowed(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'theirs'")
    assert _python("import kernels; print(kernels.name)", ROOT, ROOT, tmp_path) == "theirs"
    # and ours does not pick up theirs when both are installed side by side
    assert _python(OURS, tmp_path, tmp_path, ROOT) == "mamba2_dist.kernels.ssd.combined"
