"""The SSD operator on one GPU in bfloat16: time and memory against mamba_ssm, our torch backend and the copy floor.

    python benchmarks/ssd.py [--only 0 3] [--rounds 3] [--rep 50] [--no-peer] [--no-lengths] [--fresh-cache]
    python benchmarks/ssd.py --plot-only benchmarks/results/ssd-h100.json

Prints a table and writes benchmarks/results/ssd-<device>.json and docs/ssd-lengths.png, both into $OUT where it is set.
mamba_ssm is compared where it can be imported; its CUDA extension is not needed.
"""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mamba2_dist.kernels.ssd import mamba_chunk_scan_combined
from torch import Tensor

ROOT = Path(__file__).parents[1]
SHAPES = [  # batch, seqlen, nheads, headdim, d_state, ngroups
    (8, 4096, 80, 64, 128, 1),
    (2, 8192, 128, 64, 128, 8),
    (1, 131072, 80, 64, 128, 1),
    (1, 65536, 10, 64, 128, 1),
]
LENGTHS = [2048 * 4**k for k in range(5)]
LONGEST_ATTENTION = 131072
LARGEST_TORCH = 2**28  # elements of x
RUNS = 20
GIB = 2**30
Call = Callable[[], object]

scan = functools.partial(mamba_chunk_scan_combined, chunk_size=256, dt_softplus=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = range(len(SHAPES))
    parser.add_argument("--only", type=int, nargs="+", choices=shapes, default=list(shapes), help="numbers of shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=50, help="ms of calls in one round")
    parser.add_argument("--no-peer", action="store_true", help="leave mamba_ssm out")
    parser.add_argument("--no-lengths", action="store_true", help="leave out the sweep over sequence lengths")
    parser.add_argument("--fresh-cache", action="store_true", help="time the first call, with an empty Triton cache")
    parser.add_argument("--plot-only", metavar="RESULTS", help="only draw the lengths of a results file")
    parser.add_argument("--child", choices=["first-call", "long"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plot_only:
        plot(json.loads(Path(options.plot_only).read_text()))
        return
    if options.child:
        print(json.dumps(first_call(options.only[0]) if options.child == "first-call" else long_peer(options)))
        return
    benchmark(options)


def benchmark(options: argparse.Namespace) -> None:
    results = origin() | {
        "copy_TB_per_s": None, "bf16_matmul_TFLOP_per_s": None, "rows": [], "profile": [], "lengths": [], "notes": []
    }  # fmt: skip
    rows, notes = results["rows"], results["notes"]
    sides, peer_name = find_sides(options)
    keep = lambda *made: rows.extend(row | {"peer_name": peer_name} for row in made)  # noqa: E731
    if options.fresh_cache:
        with tempfile.TemporaryDirectory() as cache:
            made = run_child("first-call", options, timeout=300, TRITON_CACHE_DIR=cache)
        keep(make_row("ssd first call", SHAPES[options.only[0]], made.get("s"), None, "s") | {"note": made.get("note")})
    results["copy_TB_per_s"], results["bf16_matmul_TFLOP_per_s"] = ceilings()
    print("{device}: copy {copy_TB_per_s:.2f} TB/s, matmul {bf16_matmul_TFLOP_per_s:.0f} TFLOP/s".format(**results))
    for index in options.only:
        tensors, dy = make_inputs(SHAPES[index])
        if index == options.only[0]:
            keep(deterministic(SHAPES[index], sides, tensors, dy))
            results["profile"] = profile(forward_backward(sides["ours"], tensors, dy))
        keep(*measure(SHAPES[index], sides, tensors, dy, results["copy_TB_per_s"], options, notes))
        print(table_row(rows[-2]), flush=True)
        write(results)
        del tensors, dy
        torch.cuda.empty_cache()
    if not options.no_lengths:
        for seqlen in LENGTHS:
            results["lengths"].append(measure_length(seqlen, sides, options, notes))
            print(json.dumps(results["lengths"][-1]), flush=True)
            write(results)
    heads = ("what", "case", "timing", "ours", "peer", "ratio", "floor", "of it", "torch")
    print("{:17} {:46} {:6} {:>9} {:>9} {:>6} {:>8} {:>6} {:>9}".format(*heads))
    print(*map(table_row, rows), *notes, f"wrote {write(results)}", sep="\n")
    if results["lengths"]:
        plot(results)


def find_sides(options: argparse.Namespace) -> tuple[dict[str, Callable], str | None]:
    """The functions compared, which take the same arguments, and the name of the other one."""
    sides: dict[str, Callable] = {"ours": functools.partial(scan, backend="triton")}
    if options.no_peer:
        return sides, None
    mamba_ssm = import_peer()
    if mamba_ssm is None:
        return sides, None
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as theirs

    sides["peer"] = functools.partial(theirs, chunk_size=256, dt_softplus=True)
    return sides, f"mamba_ssm {mamba_ssm.__version__}"


def import_peer() -> types.ModuleType | None:
    """mamba_ssm, None where it cannot be imported."""
    # the package imports its selective scan, which nothing here calls
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    try:
        import mamba_ssm
    except ImportError as error:
        print(f"without mamba_ssm: {error}", file=sys.stderr)
        return None
    return mamba_ssm


def make_inputs(
    shape: tuple[int, ...], A: tuple[float, float] = (1, 16), dt: tuple[float, float] = (1e-3, 1e-1), seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Random arguments and the gradient of y; -A is uniform and dt log-uniform in its range, as in training."""
    batch, seqlen, nheads, headdim, d_state, ngroups = shape
    torch.manual_seed(seed)
    random = {"device": "cuda", "dtype": torch.bfloat16}
    dt_bias = 0.1 * torch.randn(nheads, device="cuda")
    step = torch.empty(batch, seqlen, nheads, device="cuda").uniform_(*map(math.log, dt)).exp_()
    tensors = {
        "x": torch.randn(batch, seqlen, nheads, headdim, **random),
        # what softplus(dt + dt_bias) makes the step
        "dt": (step + torch.log(-torch.expm1(-step)) - dt_bias).bfloat16(),
        "A": -torch.empty(nheads, device="cuda").uniform_(*A),
        "B": torch.randn(batch, seqlen, ngroups, d_state, **random) * d_state**-0.5,
        "C": torch.randn(batch, seqlen, ngroups, d_state, **random),
        "D": torch.randn(nheads, device="cuda"),
        "dt_bias": dt_bias,
    }
    for tensor in tensors.values():
        tensor.requires_grad_()
    return tensors, torch.randn(batch, seqlen, nheads, headdim, **random)


def forward(function: Callable, tensors: dict[str, Tensor], dy: Tensor) -> Call:
    without_gradients = torch.no_grad()(function)
    return lambda: without_gradients(**tensors)


def forward_backward(function: Callable, tensors: dict[str, Tensor], dy: Tensor) -> Call:
    def call() -> Tensor:
        for tensor in tensors.values():
            tensor.grad = None
        y = function(**tensors)
        y.backward(dy)
        return y.detach()

    return call


def measure(shape, sides, tensors, dy, copy_TB_per_s, options, notes) -> list[dict]:
    """The rows of one shape: forward, forward with backward, and the memory of the latter."""
    read = sum(tensors[name].nbytes for name in ("x", "dt", "B", "C"))
    once = {"ssd fwd": read + dy.nbytes, "ssd fwd+bwd": 3 * read + 2 * dy.nbytes}
    torch_backend = functools.partial(scan, backend="torch") if dy.numel() <= LARGEST_TORCH else None
    rows = []
    for what, wrap in (("ssd fwd", forward), ("ssd fwd+bwd", forward_backward)):
        floor = once[what] / copy_TB_per_s * 1e-9
        calls = {side: wrap(function, tensors, dy) for side, function in sides.items()}
        times = interleave(calls, options)
        slow = attempt(lambda wrap=wrap: milliseconds(wrap(torch_backend, tensors, dy), options.rep), torch_backend)
        rows.append(make_row(what, shape, times["ours"], times.get("peer"), "ms", "eager", floor, slow))
        name = f"{what}, {case(shape)}"
        times = interleave({side: capture(call, f"{name}, {side}", notes) for side, call in calls.items()}, options)
        rows.append(make_row(what, shape, times["ours"], times.get("peer"), "ms", "graph", floor))
        torch.cuda.empty_cache()
    peaks = {side: peak(function, tensors, dy) for side, function in sides.items()}
    slow = attempt(lambda: peak(torch_backend, tensors, dy), torch_backend)
    rows.append(make_row("ssd peak memory", shape, peaks["ours"], peaks.get("peer"), "GiB", torch_backend=slow))
    return rows


def milliseconds(call: Call, rep: int, warmup: int = 25) -> float:
    """Median of calls, each after the L2 cache was flushed; rep and warmup in ms."""
    from triton.testing import do_bench

    return do_bench(call, warmup=warmup, rep=rep, return_mode="median")


def interleave(calls: dict[str, Call | None], options: argparse.Namespace, warmup: int = 25) -> dict[str, float | None]:
    """Median over rounds of each side's medians in ms, the sides taking turns."""
    times = {side: [] for side in calls}
    for _ in range(options.rounds):
        for side, call in calls.items():
            if call is not None:
                times[side].append(milliseconds(call, options.rep, warmup))
    return {side: statistics.median(each) if each else None for side, each in times.items()}


def capture(call: Call, name: str, notes: list[str]) -> Call | None:
    """Replays the call as a CUDA graph, without the host; None, with a note, where it cannot be captured."""
    stream, side_stream = torch.cuda.current_stream(), torch.cuda.Stream()
    try:
        side_stream.wait_stream(stream)
        with torch.cuda.stream(side_stream):
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        # a capture that fails leaves its own stream as the current one
        torch.cuda.set_stream(stream)
        notes.append(f"not captured: {name}: {str(error).splitlines()[0]}")
        return None
    return graph.replay


def attempt(call: Callable, function: Callable | None) -> float | None:
    """What the call returns; None without a function or where memory is too small."""
    try:
        return call() if function else None
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def peak(function: Callable, tensors: dict[str, Tensor], dy: Tensor) -> float:
    """GiB that forward and backward hold at most, beyond the inputs: y, the gradients and what is kept between."""
    call = forward_backward(function, tensors, dy)
    call()
    for tensor in tensors.values():
        tensor.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def deterministic(shape, sides, tensors, dy) -> dict:
    """How many of all runs gave bit for bit what the first gave, y and every gradient."""
    equal = {}
    for side, function in sides.items():
        call = forward_backward(function, tensors, dy)
        made = lambda call=call: [call(), *(tensor.grad for tensor in tensors.values())]  # noqa: E731
        call()  # what is tuned at first use is tuned here
        first = made()
        equal[side] = 1 + sum(all(map(torch.equal, made(), first)) for _ in range(RUNS - 1))
    row = make_row("ssd deterministic", shape, equal["ours"], equal.get("peer"), f"of {RUNS} runs bitwise equal")
    return row | {"ratio": None, "note": "ours has no other mode, so that this costs nothing"}


def profile(call: Call) -> list[dict]:
    """The kernels of one call, longest first."""
    from torch.autograd import DeviceType

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [{"kernel": e.key[:100], "calls": e.count, "ms": e.self_device_time_total / 1e3} for e in kernels]


def ceilings() -> tuple[float, float]:
    """TB/s of a copy, reads and writes counted, and TFLOP/s of a bf16 product of 8192^3."""
    source, target = torch.randn(2, GIB // 2, device="cuda", dtype=torch.bfloat16)
    matrix = source[: 2**26].view(8192, 8192)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source), 100) * 1e-9
    return copy, 2 * 8192**3 / milliseconds(lambda: matrix @ matrix, 100) * 1e-9


def measure_length(seqlen: int, sides: dict[str, Callable], options: argparse.Namespace, notes: list[str]) -> dict:
    """Forward with backward at batch 1, 80 heads of 64: ms by CUDA graph, eager where that fails."""
    point = {"seqlen": seqlen, "ours": None, "peer": None, "attention": None, "unit": "ms", "eager": []}
    shape = (1, seqlen, 80, 64, 128, 1)
    for side, function in [*sides.items(), ("attention", attention)]:
        if side == "attention" and seqlen > LONGEST_ATTENTION:
            continue
        if side == "peer" and math.prod(shape[:4]) >= 2**31:
            point[side] = run_long_peer(options, notes)
            continue
        try:
            inputs = make_attention(seqlen) if side == "attention" else make_inputs(shape)
            call = forward_backward(function, *inputs)
            call()
            replay = capture(call, f"{seqlen} tokens, {side}", notes)
            point["eager"] += [] if replay else [side]
            point[side] = milliseconds(replay or call, options.rep)
        except torch.cuda.OutOfMemoryError:
            notes.append(f"out of memory: {seqlen} tokens, {side}")
        inputs = call = replay = None
        torch.cuda.empty_cache()
    return point


def make_attention(seqlen: int) -> tuple[dict[str, Tensor], Tensor]:
    """Query, key and value of 40 heads of 128, as wide as 80 heads of 64."""
    make = lambda: torch.randn(1, 40, seqlen, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return {name: make().requires_grad_() for name in ("query", "key", "value")}, make()


def attention(**tensors: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(**tensors, is_causal=True)


def first_call(shape: int) -> dict:
    """Seconds of our first forward with backward."""
    tensors, dy = make_inputs(SHAPES[shape])
    torch.cuda.synchronize()
    start = time.perf_counter()
    forward_backward(functools.partial(scan, backend="triton"), tensors, dy)()
    torch.cuda.synchronize()
    return {"s": time.perf_counter() - start}


def long_peer(options: argparse.Namespace) -> dict:
    """ms of the other side at the longest sequence, and how far its last outputs are from those of the last 8192 tokens
    alone: what came before has decayed."""
    function = find_sides(options)[0]["peer"]
    tensors, dy = make_inputs((1, LENGTHS[-1], 80, 64, 128, 1))
    per_token = ("x", "dt", "B", "C")
    last = {name: tensor[:, -8192:] if name in per_token else tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        expected = function(**last)[:, -256:].float()
        error = (function(**tensors)[:, -256:].float() - expected).norm() / expected.norm()
    return {"ms": milliseconds(forward_backward(function, tensors, dy), options.rep), "error": error.item()}


def run_long_peer(options: argparse.Namespace, notes: list[str]) -> float | None:
    """In a process of its own: 32-bit offsets end at 2^31 elements, and a fault would end this one."""
    torch.cuda.empty_cache()
    made = run_child("long", options, timeout=150)
    if made.get("error", math.inf) < 0.05:
        return made["ms"]
    reason = made.get("note") or f"wrong outputs, relative error {made['error']:.2g}"
    notes.append(f"{LENGTHS[-1]} tokens, peer: {reason}")
    return None


def run_child(what: str, options: argparse.Namespace, timeout: int, **environment: str) -> dict:
    """What this script prints as a child of itself; a note where it fails."""
    command = [sys.executable, __file__, "--child", what, "--only", str(options.only[0]), "--rep", str(options.rep)]
    command += ["--no-peer"] if options.no_peer else []
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=timeout, env=os.environ | environment
        )
    except subprocess.TimeoutExpired:
        return {"note": f"stopped after {timeout} s"}
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "Error" in line]
        return {"note": lines[-1][:200] if lines else f"exit status {error.returncode}"}
    return json.loads(ran.stdout.splitlines()[-1])


def case(shape: tuple[int, ...]) -> str:
    batch, seqlen, nheads, headdim, d_state, ngroups = shape
    groups = f"{ngroups} group{'s' if ngroups > 1 else ''}"
    return f"{batch}x{seqlen}, {nheads} heads of {headdim}, d_state {d_state}, {groups}"


def make_row(what, shape, ours, peer, unit, timing=None, floor=None, torch_backend=None) -> dict:
    return {
        "what": what, "case": case(shape), "ours": ours, "peer": peer, "peer_name": None,
        "ratio": peer / ours if ours and peer else None, "unit": unit, "timing": timing, "floor": floor,
        "fraction_of_floor": floor / ours if floor and ours else None, "torch_backend": torch_backend,
    }  # fmt: skip


def table_row(row: dict) -> str:
    show = lambda name, form: "-" if row[name] is None else format(row[name], form)  # noqa: E731
    return (
        f"{row['what']:17} {row['case']:46} {row['timing'] or '':6} {show('ours', '.3f'):>9} {show('peer', '.3f'):>9} "
        f"{show('ratio', '.2f'):>6} {show('floor', '.3f'):>8} {show('fraction_of_floor', '.0%'):>6} "
        f"{show('torch_backend', '.2f'):>9} {row['unit']}"
    )


def origin() -> dict:
    """What was measured, and on what."""
    import triton

    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = os.environ.get("COMMIT") or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name().replace("NVIDIA ", ""), "commit": commit, "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(),
    }  # fmt: skip


def write(results: dict, name: str = "ssd") -> Path:
    path = results_path(name, results["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, path)
    return path


def results_path(name: str, device: str, folder: Path | None = None) -> Path:
    folder = folder or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return folder / f"{name}-{device.split()[0].lower()}.json"


def plot(results: dict) -> None:
    """Time per token over the length of the sequence."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib here; draw later with --plot-only")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peer = next((row["peer_name"] for row in results["rows"] if row["peer_name"]), "mamba_ssm")
    names = {"ours": "mamba2_dist", "peer": peer, "attention": "torch causal flash attention, 40 heads of 128"}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (side, name), style in zip(names.items(), ("o-", "s--", "^:"), strict=True):
        points = [(point["seqlen"], point[side]) for point in results["lengths"] if point[side] is not None]
        if points:
            axes.loglog(
                [seqlen for seqlen, _ in points], [ms * 1e6 / seqlen for seqlen, ms in points], style, label=name
            )
    axes.set_xticks(LENGTHS, [f"{seqlen // 1024}k" for seqlen in LENGTHS])
    axes.minorticks_off()
    axes.set(xlabel="seqlen, batch 1", ylabel="ns per token, forward and backward")
    axes.set_title(f"80 heads of 64, d_state 128, bf16; {results['device']}, torch {results['torch']}", fontsize=10)
    axes.legend()
    path = Path(os.environ.get("OUT") or ROOT / "docs") / "ssd-lengths.png"
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
