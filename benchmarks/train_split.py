"""The same 20M hybrid trained on one GPU, split by tp=2 and split by cp=2: do the loss curves agree?

    python benchmarks/train_split.py [--splits "cp=2 zigzag"] [--seeds 0 1 2] [--steps 200] [--device cuda|cpu]
    python benchmarks/train_split.py --plot benchmarks/results/train-split-h200.json

One GPU with `compile=true` rounds differently in bfloat16 and computes the same: how far that takes a curve from one
GPU's is the noise, and no split should take it much further. Prints a table and writes
benchmarks/results/train-split-<device>.json; with --plot draws docs/train-split.png from it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mamba2_dist.cli import parse
from mamba2_dist.train import data
from mamba2_dist.train.config import TrainConfig
from mamba2_dist.train.metrics import read_history

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "examples" / "hybrid_20m.yaml")
WHOLE, NOISE = "one GPU", "one GPU, compiled"
SPLITS = {
    "tp=2": ["parallel.tp=2"],
    "cp=2": ["parallel.cp=2", "parallel.layout=contiguous"],
    "cp=2 zigzag": ["parallel.cp=2", "parallel.layout=zigzag"],
}
MUCH = 1.5  # times the noise, root of the mean square over updates and seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--keys", nargs="*", default=[], help="further key=value for every run")
    parser.add_argument("--plot", metavar="RESULTS", help="only draw the curves of a results file")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(Path(options.plot).read_text()))
        return
    with tempfile.TemporaryDirectory() as folder:
        curves = run_all(Path(folder), options)
    rows = [compare(split, seed, curve, curves[WHOLE, seed]) for (split, seed), curve in curves.items()]
    heads = ("split", "seed", "first loss", "last loss", "validation", "difference", "largest", "tokens/s")
    print("{:18} {:>4} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}".format(*heads))
    for row in rows:
        print(
            f"{row['case']:18} {row['seed']:4} {row['first']:10.4f} {row['ours']:10.4f} {row['validation']:10.4f} "
            f"{row['difference']:10.2e} {row['largest_difference']:10.2e} {row['tokens_per_s']:10,.0f}"
        )
    write(rows, options.device)
    spread = {split: pooled(rows, split) for split in (NOISE, *options.splits)}
    for split in options.splits:
        print(f"{split}: {spread[split] / spread[NOISE]:.2f} times the noise ({spread[NOISE]:.2e})")
    raise SystemExit(0 if all(each <= MUCH * spread[NOISE] for each in spread.values()) else 1)


def pooled(rows: list[dict], split: str) -> float:
    """The relative difference of all seeds' curves from one GPU's, as the root of the mean square."""
    mine = [row["difference"] for row in rows if row["case"] == split]
    return math.sqrt(sum(each**2 for each in mine) / len(mine))


def run_all(folder: Path, options: argparse.Namespace) -> dict[tuple[str, int], list[dict]]:
    """Histories by split and seed; runs on one GPU go side by side, one on each."""
    gpus = max(torch.cuda.device_count() if options.device == "cuda" else 1, 1)
    alone = [(split, seed) for seed in options.seeds for split in (WHOLE, NOISE)]
    config = parse(TrainConfig, "train", [CONFIG, f"data.cache={folder / 'data'}", *options.keys], with_file=True)
    data.prepare(config.data, config.architecture.vocab_size)  # once
    with ThreadPoolExecutor(gpus) as pool:
        jobs = {}
        for index, (split, seed) in enumerate(alone):
            keys = [*options.keys, *["compile=true"] * (split == NOISE)]
            jobs[split, seed] = pool.submit(run, folder, split, seed, keys, options, index % gpus)
        curves = {place: job.result() for place, job in jobs.items()}
    for split in options.splits:
        for seed in options.seeds:
            curves[split, seed] = run(folder, split, seed, [*options.keys, *SPLITS[split]], options)
    return curves


def run(
    folder: Path, split: str, seed: int, keys: list[str], options: argparse.Namespace, gpu: int | None = None
) -> list[dict]:
    """Train once, on one GPU if that is given; the rows of its history."""
    out = folder / f"{split}-{seed}".replace(" ", "-").replace(",", "")
    fixed = [
        f"out={out}", f"data.cache={folder / 'data'}", f"device={options.device}", f"steps={options.steps}",
        f"validate_every={options.steps}", f"save_every={options.steps}", "sample_tokens=0", f"seed={seed}",
    ]  # fmt: skip
    print(f"== {split}, seed {seed}", flush=True)
    environment = os.environ if gpu is None else os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
    command = [sys.executable, "-m", "mamba2_dist", "train", CONFIG, *fixed, *keys]
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return read_history(out)


def compare(split: str, seed: int, curve: list[dict], reference: list[dict]) -> dict:
    """One row of the results: losses against one GPU's, update by update."""
    losses = [row["loss"] for row in curve if "loss" in row]
    expected = [row["loss"] for row in reference if "loss" in row]
    differences = [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]
    speeds = sorted(row["tokens_per_s"] for row in curve if "tokens_per_s" in row)
    return {
        "what": "loss after training",
        "case": split,
        "seed": seed,
        "ours": losses[-1],
        "peer": expected[-1] if split != WHOLE else None,
        "peer_name": "the same run on one GPU" if split != WHOLE else None,
        "ratio": None,
        "unit": "nats per token",
        "first": losses[0],
        "validation": next(row["validation"] for row in reversed(curve) if "validation" in row),
        "difference": math.sqrt(sum(each**2 for each in differences) / len(differences)),
        "largest_difference": max(differences),
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
    """The curves of the first seed, and below them how far each of all seeds is from one GPU's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
    references = {row["seed"]: row["losses"] for row in results["rows"] if row["case"] == WHOLE}
    colors = dict(zip(dict.fromkeys(row["case"] for row in results["rows"]), plt.cm.tab10.colors, strict=False))
    for row in results["rows"]:
        updates, first = range(1, len(row["losses"]) + 1), row["seed"] == min(references)
        if first:
            above.plot(updates, row["losses"], label=row["case"], color=colors[row["case"]], lw=1)
        if row["case"] != WHOLE:
            pairs = zip(row["losses"], references[row["seed"]], strict=True)
            below.semilogy(updates, [max(abs(a - b) / b, 1e-9) for a, b in pairs], color=colors[row["case"]], lw=0.6)
    above.set(ylabel="nats per token", title=f"{results['device']}, torch {results['torch']}, bf16")
    below.set(ylabel="relative difference", xlabel="update", ylim=(1e-8, 2e-2))
    above.legend()
    figure.savefig(ROOT / "docs" / "train-split.png", dpi=120)


if __name__ == "__main__":
    main()
