"""Whole models trained on one GPU on real text: tokens/s and MFU of the 1.3B examples with the profile of an update,
and loss curves of a 20M hybrid for every `recompute`, compiled and not.

    python benchmarks/pretrain.py [--steps 50] [--only mamba2_1_3b hybrid_1_3b curves] [--folder FOLDER]
        [--curve-steps 50] [--keys micro_batch=4]

Prints results and writes benchmarks/results/pretrain-<device>.json, into $OUT where it is set. FOLDER holds a 16 GB
checkpoint while a 1.3B model runs.
"""

import argparse
import gc
import itertools
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from ssd import GIB, ROOT, origin, profile, write

from mamba2_dist.cli import parse
from mamba2_dist.train.config import TrainConfig
from mamba2_dist.train.metrics import read_history
from mamba2_dist.train.runtime import process_group
from mamba2_dist.train.trainer import Trainer

MODELS = ("mamba2_1_3b", "hybrid_1_3b")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch wants it of deterministic algorithms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--curve-steps", type=int, default=50, help="updates of each loss curve")
    parser.add_argument("--only", nargs="+", choices=[*MODELS, "curves"], default=[*MODELS, "curves"])
    parser.add_argument("--folder", help="where runs are kept while they last; a temporary one unless it is given")
    parser.add_argument("--keys", nargs="*", default=[], help="further key=value for every run")
    options = parser.parse_args()
    results = origin() | {"keys": options.keys, "rows": [], "profile": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, process_group("cuda") as device:
        for name in options.only:
            if name == "curves":
                results["rows"] += compare_curves(options, Path(folder), device)
            else:
                row, kernels = pretrain(name, options, Path(folder), device)
                results["rows"].append(row)
                results["profile"] += kernels
            write(results, "pretrain")
    for row in results["rows"]:
        print({key: value for key, value in row.items() if key != "losses"})
    print(f"wrote {write(results, 'pretrain')}")


def run(
    example: str, steps: int, folder: Path, device: torch.device, options, *keys: str
) -> tuple[Trainer, list[dict]]:
    """A finished run of an example, and its history."""
    out = folder / "-".join([example, *keys]).replace("=", "-")
    fixed = [f"out={out}", f"data.cache={folder / 'data'}", f"steps={steps}", "sample_tokens=0"]
    file = str(ROOT / "examples" / f"{example}.yaml")
    config = parse(TrainConfig, "train", [file, *fixed, *keys, *options.keys], with_file=True)
    trainer = Trainer(config, out, device)
    trainer.run()
    history = read_history(out)
    shutil.rmtree(out)
    return trainer, history


def pretrain(example: str, options, folder: Path, device: torch.device) -> tuple[dict, list[dict]]:
    """Speed over the second half of the updates, memory, and where the time of one goes."""
    torch.cuda.reset_peak_memory_stats()
    trainer, history = run(example, options.steps, folder, device, options)
    updates = [row for row in history if "loss" in row]
    late = updates[len(updates) // 2 :]
    row = {
        "what": "tokens/s", "case": f"{example}, {trainer.config.data.seqlen} tokens a sequence",
        "ours": statistics.median(row["tokens_per_s"] for row in late), "peer": None, "peer_name": None, "ratio": None,
        "unit": "tokens/s", "mfu": statistics.median(row["mfu"] for row in late),
        "parameters": trainer.parameters, "tokens_per_update": trainer.config.global_batch * trainer.config.data.seqlen,
        "peak_GiB": torch.cuda.max_memory_allocated() / GIB, "losses": [row["loss"] for row in updates],
    }  # fmt: skip
    kernels = [kernel | {"of": example} for kernel in profile(trainer._update)[:40]]
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return row, kernels


def compare_curves(options, folder: Path, device: torch.device) -> list[dict]:
    """Losses of the 20M hybrid beside those of the run that recomputes and compiles nothing, itself run twice."""
    rows: list[dict] = []
    # the backward pass of flash attention adds in any order otherwise
    torch.use_deterministic_algorithms(True)
    for compiled, recompute in [("false", "none"), *itertools.product(("false", "true"), ("none", "conv", "inner"))]:
        rarely = ["save_every=1000", f"validate_every={options.curve_steps}"]
        keys = [f"recompute={recompute}", f"compile={compiled}", *rarely]
        _, history = run("hybrid_20m", options.curve_steps, folder, device, options, *keys)
        losses = [row["loss"] for row in history if "loss" in row]
        first = rows[0]["losses"] if rows else losses
        rows.append({
            "what": "loss after training", "case": f"hybrid_20m, recompute {recompute}, compile {compiled}",
            "ours": losses[-1], "peer": first[-1] if rows else None,
            "peer_name": "recompute none, compile false" if rows else None, "ratio": None, "unit": "nats per token",
            "largest_difference": max(abs(a - b) / b for a, b in zip(losses, first, strict=True)), "losses": losses,
        })  # fmt: skip
    torch.use_deterministic_algorithms(False)
    return rows


if __name__ == "__main__":
    main()
