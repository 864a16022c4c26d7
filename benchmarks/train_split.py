"""The same 20M hybrid trained on one GPU, split by tp=2 and split by cp=2: do the loss curves agree?

    python benchmarks/train_split.py [--steps 50] [--device cuda|cpu]
    python benchmarks/train_split.py --plot benchmarks/results/train-split-h200.json

Prints a table and writes benchmarks/results/train-split-<device>.json; with --plot draws docs/train-split.png from it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mamba2_dist.train.metrics import read_history

ROOT = Path(__file__).parents[1]
SPLITS = {
    "one GPU": [],
    "tp=2": ["parallel.tp=2"],
    "cp=2": ["parallel.cp=2"],
    "cp=2 zigzag": ["parallel.cp=2", "parallel.layout=zigzag"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--keys", nargs="*", default=[], help="further key=value for every run")
    parser.add_argument("--plot", metavar="RESULTS", help="only draw the curves of a results file")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(Path(options.plot).read_text()))
        return
    with tempfile.TemporaryDirectory() as folder:
        curves = {split: run(Path(folder), split, keys, options) for split, keys in SPLITS.items()}
    rows = [compare(split, curve, curves["one GPU"]) for split, curve in curves.items()]
    heads = ("split", "first loss", "last loss", "validation", "largest difference", "tokens/s")
    print("{:12} {:>10} {:>10} {:>10} {:>18} {:>10}".format(*heads))
    for row in rows:
        print(
            f"{row['case']:12} {row['first']:10.4f} {row['ours']:10.4f} {row['validation']:10.4f} "
            f"{row['largest_difference']:18.3%} {row['tokens_per_s']:10,.0f}"
        )
    write(rows, options.device)
    worst = max(row["largest_difference"] for row in rows)
    print(f"curves {'agree' if worst <= 0.01 else 'DO NOT AGREE'} within 1%")
    raise SystemExit(0 if worst <= 0.01 else 1)


def run(folder: Path, split: str, keys: list[str], options: argparse.Namespace) -> list[dict]:
    """Train with one split; the rows of its history."""
    out = folder / split.replace(" ", "-")
    fixed = [
        f"out={out}", f"data.cache={folder / 'data'}", f"device={options.device}", f"steps={options.steps}",
        f"validate_every={options.steps}", f"save_every={options.steps}", "sample_tokens=0",
    ]  # fmt: skip
    config = str(ROOT / "examples" / "hybrid_20m.yaml")
    print(f"== {split}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "mamba2_dist", "train", config, *fixed, *keys, *options.keys], cwd=ROOT, check=True
    )
    return read_history(out)


def compare(split: str, curve: list[dict], reference: list[dict]) -> dict:
    """One row of the results: losses against one GPU's, update by update."""
    losses = [row["loss"] for row in curve if "loss" in row]
    expected = [row["loss"] for row in reference if "loss" in row]
    speeds = sorted(row["tokens_per_s"] for row in curve if "tokens_per_s" in row)
    return {
        "what": "loss after training",
        "case": split,
        "ours": losses[-1],
        "peer": expected[-1] if split != "one GPU" else None,
        "peer_name": "the same run on one GPU" if split != "one GPU" else None,
        "ratio": None,
        "unit": "nats per token",
        "first": losses[0],
        "validation": next(row["validation"] for row in reversed(curve) if "validation" in row),
        "largest_difference": max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)),
        "updates": len(losses),
        "tokens_per_s": speeds[len(speeds) // 2],
        "losses": losses,
    }


def write(rows: list[dict], device: str) -> None:
    name = torch.cuda.get_device_name().replace("NVIDIA ", "") if device == "cuda" else "cpu"
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    results = {"device": f"{torch.cuda.device_count()} x {name}" if device == "cuda" else name, "commit": commit,
               "torch": torch.__version__, "triton": triton, "rows": rows}  # fmt: skip
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"train-split-{name.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")


def plot(results: dict) -> None:
    """The curves, and below them how far each is from one GPU's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
    reference = results["rows"][0]["losses"]
    for row, style in zip(results["rows"], ("-", "--", "-.", ":"), strict=True):
        updates = range(1, len(row["losses"]) + 1)
        above.plot(updates, row["losses"], style, label=row["case"])
        below.semilogy(
            updates, [max(abs(a - b) / b, 1e-9) for a, b in zip(row["losses"], reference, strict=True)], style
        )
    below.axhline(0.01, color="grey", lw=0.8)
    above.set(ylabel="nats per token", title=f"{results['device']}, torch {results['torch']}, bf16")
    below.set(ylabel="relative difference", xlabel="update", ylim=(1e-8, 2e-2))
    above.legend()
    figure.savefig(ROOT / "docs" / "train-split.png", dpi=120)


if __name__ == "__main__":
    main()
