"""A Mamba-2 layer and its parts on one GPU in bfloat16: time and memory against its projections alone and mamba_ssm.

    python benchmarks/layer.py [--only 0 2] [--rounds 3] [--rep 200] [--no-peer]
    python benchmarks/layer.py --plot-only benchmarks/results/layer-h100.json

Prints a table and writes benchmarks/results/layer-<device>.json and docs/layer.png, both into $OUT where it is set.
mamba_ssm's layer takes its fused path where causal_conv1d can be imported.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mamba2_dist.kernels.conv1d import causal_conv1d
from mamba2_dist.kernels.norm import add_rmsnorm, gated_rmsnorm
from ssd import GIB, ROOT, Call, capture, ceilings, import_peer, interleave, origin, profile, write
from torch import Tensor, nn

from mamba2_dist import Mamba2Config, Mamba2Mixer

SHAPES = [(8, 4096, 2560, 1), (2, 8192, 4096, 8), (1, 65536, 2560, 1)]  # batch, seqlen, d_model, ngroups
MODES = ("none", "conv", "inner")
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = range(len(SHAPES))
    parser.add_argument("--only", type=int, nargs="+", choices=shapes, default=list(shapes), help="numbers of shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=200, help="ms of calls in one round")
    parser.add_argument("--no-peer", action="store_true", help="leave mamba_ssm out")
    parser.add_argument("--plot-only", metavar="RESULTS", help="only draw a results file")
    options = parser.parse_args()
    if options.plot_only:
        plot(json.loads(Path(options.plot_only).read_text()))
        return
    benchmark(options)


def benchmark(options: argparse.Namespace) -> None:
    results = origin() | {"copy_TB_per_s": None, "bf16_matmul_TFLOP_per_s": None, "rows": [], "profile": []}
    results["copy_TB_per_s"], results["bf16_matmul_TFLOP_per_s"] = ceilings()
    print("{device}: copy {copy_TB_per_s:.2f} TB/s, matmul {bf16_matmul_TFLOP_per_s:.0f} TFLOP/s".format(**results))
    print(f"{'':77}" + "".join(f"{name:>9}" for name in ("ours", "peer", "ratio", "floor", "torch", "proj.", "over")))
    peer = None if options.no_peer else import_peer()
    rows = results["rows"]
    for measure in (measure_conv, measure_gated_norm, measure_residual_norm, measure_in_proj):
        rows.append(measure(peer, results["copy_TB_per_s"], options))
        print(table_row(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    for index in options.only:
        made, kernels = measure_layer(SHAPES[index], peer, options, want_profile=index == options.only[0])
        rows.extend(made)
        results["profile"] += kernels
        print(*map(table_row, made), sep="\n", flush=True)
        write(results, "layer")
    print(f"wrote {write(results, 'layer')}")
    plot(results)


def has_fused_conv() -> bool:
    try:
        import causal_conv1d  # noqa: F401
    except ImportError:
        return False
    return True


def forward_backward(function: Callable, inputs: list[Tensor], parameters: list[Tensor], dy: Tensor) -> Call:
    leaves = [*inputs, *parameters]

    def call() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = function(*inputs)
        y.backward(dy)
        return y.detach()

    return call


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, **BF16, requires_grad=True)


def operator_row(what, case, calls, floor_bytes, copy_TB_per_s, peer_name, options) -> dict:
    """By CUDA graph, and launched from Python."""
    eager = interleave(calls, options)
    notes: list[str] = []
    graphs = {side: capture(call, side, notes) for side, call in calls.items()}
    times = {side: time or eager[side] for side, time in interleave(graphs, options).items()}
    return make_row(what, case, times["ours"], times.get("peer"), peer_name, "ms") | {
        "floor": floor_bytes and floor_bytes / copy_TB_per_s * 1e-9,
        "TB_per_s": floor_bytes and floor_bytes / times["ours"] * 1e-9,
        "torch": times.get("torch"), "eager": eager, "notes": notes,
    }  # fmt: skip


def measure_conv(peer, copy_TB_per_s, options) -> dict:
    """Forward reads and writes once; backward reads the input and the gradient and writes a gradient."""
    x, weight, bias, dy = leaf(8, 4096, 5376), leaf(5376, 4), leaf(5376), torch.randn(8, 4096, 5376, **BF16)
    ours = functools.partial(causal_conv1d, activation="silu")
    calls = {"ours": forward_backward(ours, [x, weight, bias], [], dy)}
    name = None
    if peer and has_fused_conv():
        import causal_conv1d as package

        name, function = f"causal_conv1d {package.__version__}", package.causal_conv1d_fn
        theirs = lambda x, w, b: function(x.transpose(1, 2), w, b, activation="silu").transpose(1, 2)  # noqa: E731
        calls["peer"] = forward_backward(theirs, [x, weight, bias], [], dy)
    return operator_row("conv1d fwd+bwd", "8x4096, 5376 channels", calls, 5 * x.nbytes, copy_TB_per_s, name, options)


def measure_gated_norm(peer, copy_TB_per_s, options) -> dict:
    x, z, weight, dy = leaf(32768, 5120), leaf(32768, 5120), leaf(5120), torch.randn(32768, 5120, **BF16)
    calls = {"ours": forward_backward(lambda x, w, z: gated_rmsnorm(x, w, z, eps=1e-5), [x, weight, z], [], dy)}
    name = None
    if peer:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        name = f"mamba_ssm {peer.__version__}"
        theirs = lambda x, w, z: rmsnorm_fn(x, w, None, z=z, eps=1e-5, norm_before_gate=False)  # noqa: E731
        calls["peer"] = forward_backward(theirs, [x, weight, z], [], dy)
    return operator_row("norm fwd+bwd", "32768 x 5120, gated", calls, 8 * x.nbytes, copy_TB_per_s, name, options)


def measure_residual_norm(peer, copy_TB_per_s, options) -> dict:
    """x in float32, what is added and the norm in bfloat16; against torch, as it is and compiled."""
    x = torch.randn(32768, 2560, device="cuda", requires_grad=True)
    added, weight = leaf(32768, 2560), torch.ones(2560, device="cuda", requires_grad=True)
    dy, dtotal = torch.randn(32768, 2560, **BF16), torch.randn_like(x)

    def in_torch(x, added, weight):
        total = x + added
        return F.rms_norm(total, (2560,), weight, 1e-5).bfloat16(), total

    def call(function: Callable) -> Call:
        def run() -> None:
            x.grad = added.grad = weight.grad = None
            torch.autograd.backward(function(x, added, weight), [dy, dtotal])

        return run

    ours = functools.partial(add_rmsnorm, eps=1e-5, dtype=torch.bfloat16)
    calls = {"ours": call(ours), "peer": call(torch.compile(in_torch)), "torch": call(in_torch)}
    case, name = "32768 x 2560, float32 + bfloat16", f"torch {torch.__version__}, compiled"
    # forward 4 + 2 bytes read and as many written, backward 2 + 4 + 4 and 4 + 2
    return operator_row("residual norm fwd+bwd", case, calls, 7 * x.nbytes, copy_TB_per_s, name, options)


def measure_in_proj(peer, copy_TB_per_s, options) -> dict:
    """In two products, the second the first to know its gradient, against one."""
    u, layer = leaf(8, 4096, 2560), Mamba2Mixer(Mamba2Config(), 2560, **BF16).in_proj
    d_inner, rows = 5120, layer.weight.shape[0]
    dz, dlast, dy = (torch.randn(8, 4096, size, **BF16) for size in (d_inner, rows - d_inner, rows))

    def in_two() -> None:
        u.grad = layer.weight.grad = None
        last, first = layer.in_two(u, d_inner)
        torch.autograd.backward([first(), last], [dz, dlast])

    calls = {"ours": in_two, "peer": forward_backward(layer, [u], [layer.weight], dy)}
    case = f"32768 x 2560 to {rows}, in two products"
    return operator_row("in_proj fwd+bwd", case, calls, None, copy_TB_per_s, "in one product", options)


def measure_layer(shape, peer, options, *, want_profile: bool) -> tuple[list[dict], list[dict]]:
    """Rows for each choice of `recompute`: time beside that of the projections alone, and memory."""
    batch, seqlen, d_model, ngroups = shape
    torch.manual_seed(0)
    config = Mamba2Config(ngroups=ngroups)
    u, dy = leaf(batch, seqlen, d_model), torch.randn(batch, seqlen, d_model, **BF16)
    layers: dict[str, nn.Module] = {
        mode: Mamba2Mixer(config, d_model, recompute=mode, norm_eps=1e-5, **BF16) for mode in MODES
    }
    name = None
    if peer:
        from mamba_ssm.modules.mamba2 import Mamba2

        fused = has_fused_conv()
        name = f"mamba_ssm {peer.__version__} Mamba2, {'fused' if fused else 'without causal_conv1d'}"
        layers["peer"] = Mamba2(
            d_model, headdim=64, d_state=128, ngroups=ngroups, use_mem_eff_path=fused, **BF16
        )  # fmt: skip
    calls = {side: forward_backward(layer, [u], list(layer.parameters()), dy) for side, layer in layers.items()}
    calls["projections"] = projections(layers["none"], u, dy)
    # matrix products draw so much power that clocks fall for a while; a training run is past that
    times = interleave(calls, options, warmup=500)
    calls.pop("projections")
    torch.cuda.empty_cache()
    peaks = {side: peak(call, [u, *layers[side].parameters()]) for side, call in calls.items()}
    case = f"{batch}x{seqlen}, d_model {d_model}, {ngroups} group{'s' if ngroups > 1 else ''}"
    rows = []
    for mode in MODES:
        row = make_row("layer fwd+bwd", f"{case}, recompute {mode}", times[mode], times.get("peer"), name, "ms")
        rows.append(row | {"projections": times["projections"], "over_projections": times[mode] / times["projections"]})
    for mode in MODES:
        rows.append(
            make_row("layer peak memory", f"{case}, recompute {mode}", peaks[mode], peaks.get("peer"), name, "GiB")
        )
    return rows, profile(calls["none"]) if want_profile else []


def projections(layer: nn.Module, u: Tensor, dy: Tensor) -> Call:
    """in_proj and out_proj of a layer, forward and backward: their six products and nothing else."""
    first, second = layer.in_proj.weight, layer.out_proj.weight
    inner, d_inner = leaf(*u.shape[:2], second.shape[1]), torch.randn(*u.shape[:2], first.shape[0], **BF16)

    def call() -> None:
        for tensor in (u, inner, first, second):
            tensor.grad = None
        torch.autograd.backward([F.linear(u, first), F.linear(inner, second)], [d_inner, dy])

    return call


def peak(call: Call, leaves: list[Tensor]) -> float:
    """GiB that forward and backward hold at most, beyond input, output's gradient and parameters: activations, y, and
    all gradients."""
    call()
    for tensor in leaves:
        tensor.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def make_row(what, case, ours, peer, peer_name, unit) -> dict:
    return {
        "what": what, "case": case, "ours": ours, "peer": peer, "peer_name": peer_name,
        "ratio": peer / ours if peer else None, "unit": unit,
    }  # fmt: skip


def table_row(row: dict) -> str:
    show = lambda name, form: "-" if row.get(name) is None else format(row[name], form)  # noqa: E731
    columns = ("ours", "peer", "ratio", "floor", "torch", "projections", "over_projections")
    return f"{row['what']:22} {row['case']:50} {row['unit']:4}" + "".join(f"{show(name, '.3f'):>9}" for name in columns)


def plot(results: dict) -> None:
    """Time over the projections', and memory, of the layer."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib here; draw later with --plot-only")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, what in ((left, "layer fwd+bwd"), (right, "layer peak memory")):
        rows = [row for row in results["rows"] if row["what"] == what]
        cases = list(dict.fromkeys(row["case"].rpartition(", recompute")[0] for row in rows))
        sides = {f"recompute {mode}": [row["ours"] for row in rows if row["case"].endswith(mode)] for mode in MODES}
        peers = [row for row in rows if row["case"].endswith("none")]
        if all(row["peer"] for row in peers):
            sides[peers[0]["peer_name"]] = [row["peer"] for row in peers]
        scale = [row["projections"] for row in peers] if axes is left else [1] * len(peers)
        for place, (label, values) in enumerate(sides.items()):
            offsets = [index + 0.2 * (place - 1.5) for index in range(len(cases))]
            axes.bar(offsets, [value / unit for value, unit in zip(values, scale, strict=True)], 0.2, label=label)
        axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=8)
    left.axhline(1, color="grey", lw=0.8)
    left.set(ylabel="time over its projections alone")
    right.set(ylabel="peak GiB, activations and gradients")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"forward and backward, bf16; {results['device']}, torch {results['torch']}", fontsize=10)
    path = Path(os.environ.get("OUT") or ROOT / "docs") / "layer.png"
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
