"""The same 20M hybrid trained on one GPU, split by tp=2 and split by cp=2: do the loss curves agree?

    python benchmarks/train_split.py [--splits "cp=2 zigzag"] [--seeds 0 1 2] [--steps 200] [--device cuda|cpu]
    python benchmarks/train_split.py --plot benchmarks/results/train-split-h200.json

The noise of bfloat16 is how far curves of one GPU are from its curve in float32, over all seeds and three ways to
round: as it is, compiled, and in micro-batches. No split should be farther from float32 than twice that. Prints a table
and writes benchmarks/results/train-split-<device>.json; with --plot draws docs/train-split.png from it.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from mamba2_dist.cli import parse
from mamba2_dist.train import data
from mamba2_dist.train.config import TrainConfig
from mamba2_dist.train.metrics import read_history

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "examples" / "hybrid_20m.yaml")
WHOLE, EXACT = "one GPU", "one GPU, float32"
ALONE = {
    WHOLE: [],
    EXACT: ["precision=fp32"],
    "one GPU, compiled": ["compile=true"],
    "one GPU, micro-batches": ["micro_batch=2"],
}
SPLITS = {
    "tp=2": ["parallel.tp=2"],
    "cp=2": ["parallel.cp=2", "parallel.layout=contiguous"],
    "cp=2 zigzag": ["parallel.cp=2", "parallel.layout=zigzag"],
}
MUCH = 2.0  # times the noise; root of the mean square over updates and seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--keys", nargs="*", default=[], help="further key=value for every run")
    parser.add_argument("--together", type=int, default=3, help="runs at a time on every GPU")
    parser.add_argument("--plot", metavar="RESULTS", help="only draw the curves of a results file")
    options = parser.parse_args()
    if any(key.startswith("precision=") for key in options.keys):
        parser.error("precision is what is compared; leave it out of --keys")
    if options.plot:
        plot(json.loads(Path(options.plot).read_text()))
        return
    with tempfile.TemporaryDirectory() as folder:
        curves = run_all(Path(folder), options)
    rows = [
        compare(split, seed, curve, curves[WHOLE, seed], curves[EXACT, seed]) for (split, seed), curve in curves.items()
    ]
    heads = ("split", "seed", "first loss", "last loss", "validation", "difference", "largest", "to float32")
    print("{:22} {:>4} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}".format(*heads))
    for row in rows:
        print(
            f"{row['case']:22} {row['seed']:4} {row['first']:10.4f} {row['ours']:10.4f} {row['validation']:10.4f} "
            f"{row['difference']:10.2e} {row['largest_difference']:10.2e} {row['to_float32']:10.2e}"
        )
    write(rows, options.device)
    rounded = [case for case in ALONE if case != EXACT]
    noise = pooled(rows, rounded)
    spread = {case: pooled(rows, [case]) for case in (*rounded, *options.splits)}
    for case, each in spread.items():
        print(f"{case}: {each:.2e} from float32, {each / noise:.2f} times the noise")
    raise SystemExit(0 if all(spread[split] <= MUCH * noise for split in options.splits) else 1)


def pooled(rows: list[dict], cases: list[str]) -> float:
    """How far the curves of these are from one GPU's in float32, as the root of the mean square over all seeds."""
    return root_mean_square([row["to_float32"] for row in rows if row["case"] in cases])


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(each**2 for each in values) / len(values))


def run_all(folder: Path, options: argparse.Namespace) -> dict[tuple[str, int], list[dict]]:
    """Histories by split and seed; a few runs at a time, those on one GPU spread over all."""
    gpus = max(torch.cuda.device_count() if options.device == "cuda" else 1, 1)
    config = parse(TrainConfig, "train", [CONFIG, f"data.cache={folder / 'data'}", *options.keys], with_file=True)
    data.prepare(config.data, config.architecture.vocab_size)  # once
    places = itertools.count()
    with ThreadPoolExecutor(gpus * options.together) as alone, ThreadPoolExecutor(options.together) as together:
        jobs = {}
        for seed in options.seeds:
            for split, keys in ALONE.items():
                place = next(places) % gpus
                jobs[split, seed] = alone.submit(run, folder, split, seed, [*options.keys, *keys], options, place)
        wait(jobs.values())
        for seed in options.seeds:
            for split in options.splits:
                keys = [*options.keys, *SPLITS[split]]
                jobs[split, seed] = together.submit(run, folder, split, seed, keys, options)
        return {place: job.result() for place, job in jobs.items()}


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


def compare(split: str, seed: int, *curves: list[dict]) -> dict:
    """One row of the results: losses against one GPU's, update by update, and against one GPU's in float32."""
    losses, expected, exact = ([row["loss"] for row in curve if "loss" in row] for curve in curves)
    differences = relative(losses, expected)
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
        "validation": next(row["validation"] for row in reversed(curves[0]) if "validation" in row),
        "difference": root_mean_square(differences),
        "largest_difference": max(differences),
        "to_float32": root_mean_square(relative(losses, exact)),
        "updates": len(losses),
        "losses": losses,
    }


def relative(losses: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]


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
    """The curves of the first seed; below, how far those of all seeds are from one GPU's in float32, in runs of ten."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained")
    curves = {(row["case"], row["seed"]): row["losses"] for row in results["rows"]}
    seeds = sorted({seed for _, seed in curves})
    for case in dict.fromkeys(case for case, _ in curves):
        above.plot(range(1, len(curves[case, seeds[0]]) + 1), curves[case, seeds[0]], label=case, lw=1)
        distances = [relative(curves[case, seed], curves[EXACT, seed]) for seed in seeds]
        begins = range(0, len(distances[0]), 10)
        pooled = [root_mean_square([each for row in distances for each in row[i : i + 10]]) for i in begins]
        below.semilogy([i + 5.5 for i in begins], [each or math.nan for each in pooled], marker="o", ms=3, lw=1)
    above.set(ylabel="nats per token", title=f"{results['device']}, torch {results['torch']}, bf16")
    below.set(ylabel="relative distance\nto float32", xlabel="update")
    below.grid(alpha=0.3)
    above.legend()
    figure.savefig(ROOT / "docs" / "train-split.png", dpi=120)


if __name__ == "__main__":
    main()
