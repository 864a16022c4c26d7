"""How far the SSD operator in bfloat16 is from float64, beside mamba_ssm, for every result and every kind of decay, and
with a gate and initial states.

    python benchmarks/ssd_accuracy.py [--seqlen 512 4096] [--seeds 3]

Prints a table of relative L2 errors over all seeds and writes benchmarks/results/ssd-accuracy-<device>.json, into $OUT
where it is set.
"""

import argparse
import functools
import math
from collections.abc import Callable

import torch
from ssd import find_sides, make_inputs, origin, scan, write
from torch import Tensor

BATCH, NHEADS, HEADDIM, D_STATE, NGROUPS = 2, 80, 64, 128, 1
# ranges of -A and of dt
CASES = {
    "typical": (1, 16, 1e-3, 0.1),
    "slow": (1e-6, 1e-6, 1e-3, 0.1),
    "fast": (16, 16, 0.05, 0.1),
    "huge": (16, 16, 0.5, 5),
    "vanishing": (1e3, 1e3, 1e-3, 0.1),
    "alternating": (1, 16, 1e-3, 1e-3),
    "gated": (1, 16, 1e-3, 0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="leave mamba_ssm out")
    options = parser.parse_args()
    sides, peer_name = find_sides(options)
    results = origin() | {"rows": []}
    print("{:12} {:>6} {:16} {:>9} {:>9} {:>6}".format("case", "tokens", "what", "ours", "peer", "ratio"))
    for case in CASES:
        for seqlen in options.seqlen:
            for row in compare(sides, case, seqlen, options.seeds):
                results["rows"].append(row | {"peer_name": peer_name})
                print(show(row), flush=True)
    worst = max(results["rows"], key=lambda row: 1 / (row["ratio"] or math.inf))
    print("largest error beside the other side's:", show(worst), f"wrote {write(results, 'ssd-accuracy')}", sep="\n")


def compare(sides: dict, case: str, seqlen: int, seeds: int) -> list[dict]:
    """Relative errors of everything that the operator returns."""
    squares: dict[str, dict[str, float]] = {side: {} for side in ("reference", *sides)}
    for seed in range(seeds):
        tensors, dy, d_final = draw(case, seqlen, seed)
        truth = outcome(
            functools.partial(scan, backend="torch"),
            {name: tensor.double() for name, tensor in tensors.items()},
            dy,
            d_final,
        )
        add(squares["reference"], truth)
        for side, function in sides.items():
            made = outcome(function, tensors, dy, d_final)
            add(squares[side], {name: made[name].double() - tensor for name, tensor in truth.items()})
    rows = []
    for name, square in squares["reference"].items():
        errors = {side: math.sqrt(squares[side][name] / square) for side in sides}
        ours, peer = errors["ours"], errors.get("peer")
        rows.append({
            "what": f"ssd error {name}", "case": f"{case}, {BATCH}x{seqlen}", "ours": ours, "peer": peer,
            "ratio": peer / ours if peer is not None else None, "unit": "relative L2 against float64",
        })  # fmt: skip
    return rows


def draw(case: str, seqlen: int, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Arguments, and the gradients of y and of the final states."""
    slowest, fastest, shortest, longest = CASES[case]
    tensors, dy = make_inputs(
        (BATCH, seqlen, NHEADS, HEADDIM, D_STATE, NGROUPS), (slowest, fastest), (shortest, longest), seed
    )
    if case == "alternating":
        tensors["dt"] = tensors["dt"].detach().clone()
        tensors["dt"][:, ::2] = 5.0
    if case == "gated":
        tensors["z"] = torch.randn_like(tensors["x"])
        tensors["initial_states"] = torch.randn(BATCH, NHEADS, HEADDIM, D_STATE, device="cuda")
    return tensors, dy, torch.randn(BATCH, NHEADS, HEADDIM, D_STATE, device="cuda")


def outcome(function: Callable, tensors: dict[str, Tensor], dy: Tensor, d_final: Tensor) -> dict[str, Tensor]:
    """y, the final states and every gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y, final = function(**leaves, return_final_states=True)
    loss = [dy.to(y.dtype), d_final.to(final.dtype)]
    gradients = torch.autograd.grad([y, final], list(leaves.values()), loss)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "final_states": final.detach(), **named}


def add(squares: dict[str, float], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        squares[name] = squares.get(name, 0.0) + tensor.double().square().sum().item()


def show(row: dict) -> str:
    case, tokens = row["case"].split(", ")
    peer, ratio = (
        "-" if row[name] is None else format(row[name], form) for name, form in (("peer", ".1e"), ("ratio", ".2f"))
    )
    return f"{case:12} {tokens:>6} {row['what'][10:]:16} {row['ours']:9.1e} {peer:>9} {ratio:>6}"


if __name__ == "__main__":
    main()
