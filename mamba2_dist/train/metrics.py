"""Floating-point work of a model, the peak of a device, and the record of a run."""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mamba2_dist.config import HybridConfig

# dense bf16 matrix products, FLOP/s, from the vendors' data sheets
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}

CHUNK = 256  # tokens, as published


def weight_flops(config: HybridConfig, letter: str) -> float:
    """Forward FLOPs per token of a layer's products with its weights: 2 per multiply-add."""
    d, mamba = config.d_model, config.mamba
    if letter == "M":
        d_inner, nheads = mamba.d_inner(d), mamba.nheads(d)
        return 2.0 * d * (2 * d_inner + 2 * mamba.ngroups * mamba.d_state + nheads) + 2.0 * d_inner * d
    if letter == "*":
        nheads, nheads_kv = config.attention.heads(d)
        return 2.0 * d * config.attention.head_dim * (2 * nheads + 2 * nheads_kv)
    return 2.0 * d * config.mlp.width(d) * (3 if config.mlp.activation == "swiglu" else 2)


def flops_per_token(config: HybridConfig) -> float:
    """Forward FLOPs per token outside the attention scores: 2 per multiply-add of every matrix product, and of the SSD
    operator in chunks of 256, the causal half of their scores, whatever chunks it is computed in."""
    d, mamba = config.d_model, config.mamba
    total = 2.0 * d * config.vocab_size + sum(weight_flops(config, letter) for letter in config.pattern)
    if "M" in config.pattern:
        d_inner, groups = mamba.d_inner(d), mamba.ngroups * mamba.d_state
        # the convolution; C B^T and its product with x, half of each chunk; into the state and out of it
        inner = 2 * mamba.d_conv * (d_inner + 2 * groups) + CHUNK * (groups + d_inner) + 4 * d_inner * mamba.d_state
        total += config.pattern.count("M") * inner
    return total


def attention_flops(config: HybridConfig, documents: Sequence[Sequence[int]]) -> float:
    """Forward FLOPs of scores and their product with v, for rows of documents given by their offsets."""
    layers = config.pattern.count("*")
    if layers == 0:
        return 0.0
    pairs = sum((b - a) * (b - a + 1) / 2 for row in documents for a, b in itertools.pairwise(row))
    return 4.0 * layers * config.attention.heads(config.d_model)[0] * config.attention.head_dim * pairs


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


class History:
    """The numbers of every update, a JSON object a line, in `folder`/metrics.jsonl; rows after `step` are dropped."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_history(folder) if row["step"] <= step] if step else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)

    def add(self, **row) -> None:
        """Append one row."""
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def read_history(folder: Path) -> list[dict]:
    """The rows written so far; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_loss(folder: Path) -> Path:
    """Draw loss.png from the history."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_history(folder)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("loss", {"alpha": 0.8, "lw": 1}), ("validation", {"marker": "o", "ms": 4})):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label={"loss": "training"}.get(name, name), **style)
    axes.set(xlabel="update", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    partial = folder / ".loss.partial.png"
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    os.replace(partial, path)
    return path
