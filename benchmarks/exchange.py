"""The exchange of states on the GPUs of one node: backends alone, a mixer over ranks, Megatron-core's beside it, and a
model trained on sequences longer than memory.

    torchrun --nproc-per-node 2 benchmarks/exchange.py [--only backends mixer delays peer long] [--tokens 32768]
        [--rounds 5] [--steps 10]
    python benchmarks/exchange.py --plot benchmarks/results/exchange-h200.json

Prints a table and writes benchmarks/results/exchange-<device>.json, into $OUT where it is set; rows of earlier runs
stay until they are measured again. Megatron-core's mixer is compared where megatron-core, mamba_ssm and causal_conv1d
can be imported. Every side is timed in one process, in turn. With --plot draws docs/exchange.png.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from kernel_spans import communication_ms, differences, kernel_spans
from layer import make_row
from mamba2_dist.kernels.conv1d import causal_conv1d
from mamba2_dist.kernels.norm import gated_rmsnorm
from mamba2_dist.kernels.ssd import mamba_chunk_scan_combined
from ssd import GIB, ROOT, Call, capture, import_peer, origin, results_path, write
from torch import Tensor, nn

from mamba2_dist import Mamba2Config, Mamba2Mixer, ParallelGroups, SegmentTable
from mamba2_dist.cli import parse
from mamba2_dist.parallel import state_scan
from mamba2_dist.parallel.collectives import sum_over
from mamba2_dist.parallel.cost_model import H200, exchange_time
from mamba2_dist.parallel.groups import Group
from mamba2_dist.parallel.heads import to_heads, to_tokens
from mamba2_dist.parallel.messages import ProcessGroups
from mamba2_dist.train.config import TrainConfig
from mamba2_dist.train.corpus import find_files
from mamba2_dist.train.trainer import Trainer

SHAPES = [(2560, 1), (4096, 8)]  # d_model, ngroups
PEER_SHAPES = [(2560, 8), (4096, 8)]
# of one node; "hierarchical" is "sliced" there
BACKENDS = ("all_gather", "sliced", "log_step", "ring", "symmetric_memory")
DELAYED_RANKS = (64, 1024, 4096)
LONG = {2**20: "none", 2**21: "inner"}  # recompute, by tokens of a sequence
PARTS = ("backends", "mixer", "delays", "peer", "long")
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=32768, help="of one rank at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print which kernels of the mixer cost more when cut")
    parser.add_argument("--calls", type=int, default=8, help="in one round")
    parser.add_argument("--long-tokens", nargs="+", type=int, choices=LONG, default=list(LONG))
    parser.add_argument("--steps", type=int, default=10, help="updates on long sequences")
    parser.add_argument("--plot", metavar="RESULTS", help="only draw what a results file holds")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(Path(options.plot).read_text()))
        return
    dist.init_process_group("cpu:gloo,cuda:nccl")
    torch.cuda.set_device(dist.get_rank())
    groups = ParallelGroups(cp=dist.get_world_size())
    results = origin() | {"rows": []}
    measured = {
        "ranks": groups.cp.size, "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        **{name: results[name] for name in ("commit", "torch", "triton")},
    }  # fmt: skip
    rows = rows_so_far(results["device"])
    for part in options.only:
        for row in globals()[f"measure_{part}"](groups, options):
            rows[row["what"], row["case"]] = row | measured
            results["rows"] = list(rows.values())
            say(table_row(row))
            if dist.get_rank() == 0:
                write(results, "exchange")
    dist.destroy_process_group()


def rows_so_far(device: str) -> dict[tuple[str, str], dict]:
    """By what and case, those of the file that is written to, or else of the last one that was kept."""
    for folder in (os.environ.get("OUT"), ROOT / "benchmarks" / "results"):
        path = folder and results_path("exchange", device, Path(folder))
        if path and path.exists():
            return {(row["what"], row["case"]): row for row in json.loads(path.read_text())["rows"]}
    return {}


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def most(value: float, group: Group) -> float:
    """Of any rank."""
    values = torch.tensor([value], device="cuda")
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group.handle)
    return values.item()


def in_turn(calls: dict[str, Call], group: Group, options: argparse.Namespace, warmup: int = 3) -> dict[str, float]:
    """Median over rounds of each side's ms a call, on the slowest rank; the sides take turns."""
    times: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    for _ in range(options.rounds):
        for side, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()
            torch.cuda.synchronize()
            dist.barrier()
            start.record()
            for _ in range(options.calls):
                call()
            end.record()
            torch.cuda.synchronize()
            times[side].append(most(start.elapsed_time(end) / options.calls, group))
    return {side: statistics.median(each) for side, each in times.items()}


def measure_backends(groups: ParallelGroups, options: argparse.Namespace):
    """Each backend alone, hidden by nothing: launched from Python, and as a CUDA graph, without the host."""
    table = SegmentTable.contiguous(groups.cp.size, groups.cp.size)
    for nheads in (80, 128):
        state = torch.randn(1, 1, nheads, 64, 128, device="cuda")
        decay = torch.rand(1, 1, nheads, 1, 1, device="cuda")

        def call(backend: str, state=state, decay=decay) -> Call:
            return lambda: state_scan.begin(state, decay, table, groups.states, backend).wait()

        many = argparse.Namespace(rounds=options.rounds, calls=100)
        times = in_turn({backend: call(backend) for backend in BACKENDS}, groups.cp, many)
        notes: list[str] = []
        graphs = {name: capture(call(name), name, notes) for name in BACKENDS}
        alone = in_turn({name: graph for name, graph in graphs.items() if graph}, groups.cp, many)
        for backend, time in times.items():
            case = f"{nheads} heads, {state.nbytes / 2**20:.1f} MiB"
            row = make_row(f"backend {backend}", case, time * 1e3, None, None, "us")
            yield row | {"graph": alone[backend] * 1e3 if backend in alone else None, "notes": notes}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, **BF16, requires_grad=True)


def forward_backward(mixer: nn.Module, u: Tensor, dy: Tensor, *arguments) -> Call:
    def call() -> None:
        u.grad = None
        for parameter in mixer.parameters():
            parameter.grad = None
        y = mixer(u, *arguments)
        (y[0] if isinstance(y, tuple) else y).backward(dy)

    return call


def whole_and_cut(d_model: int, ngroups: int, groups: ParallelGroups, options: argparse.Namespace, **mixer_options):
    """A mixer on a whole sequence on one rank, and the same over all of them."""
    config, cp = Mamba2Config(ngroups=ngroups), groups.cp
    seqlen = options.tokens * cp.size
    torch.manual_seed(0)
    u, dy = leaf(1, seqlen, d_model), torch.randn(1, seqlen, d_model, **BF16)
    table = SegmentTable.contiguous(seqlen, cp.size)
    local_u = table.shard(u, cp.rank).detach().requires_grad_()
    local_dy = table.shard(dy, cp.rank)
    whole = Mamba2Mixer(config, d_model, ParallelGroups.alone(), **BF16)
    cut = Mamba2Mixer(config, d_model, groups, **mixer_options, **BF16)
    return (whole, u, dy), (cut, local_u, local_dy), table


def measure_mixer(groups: ParallelGroups, options: argparse.Namespace):
    """A step over ranks against its share of the step on one; errors of one against the other; what is not hidden."""
    for d_model, ngroups in SHAPES:
        (whole, u, dy), (cut, local_u, local_dy), table = whole_and_cut(d_model, ngroups, groups, options)
        check(whole, u, dy, cut, local_u, local_dy, table, groups)
        calls = {"whole": forward_backward(whole, u, dy), "cut": forward_backward(cut, local_u, local_dy, table)}
        times = in_turn(calls, groups.cp, options)
        share = times["whole"] / groups.cp.size
        case = f"d_model {d_model}, {ngroups} groups, {options.tokens} tokens a rank"
        name = f"1/{groups.cp.size} of the step on one GPU"
        row = make_row("mixer cp2 vs half cp1", case, times["cut"], share, name, "ms")
        yield row | {"over": times["cut"] / share}
        kernels = {side: kernel_spans(call) for side, call in calls.items()}
        exposed, wire = (most(ms, groups.cp) for ms in communication_ms(kernels["cut"]))
        row = make_row("mixer exposed communication", case, exposed, None, None, "ms")
        yield row | {"over": exposed / times["cut"], "communication": wire}
        if options.profile:
            say(differences(kernels["whole"], kernels["cut"], groups.cp.size))
        del whole, cut, u, dy, local_u, local_dy, calls
        torch.cuda.empty_cache()


def check(whole, u, dy, cut, local_u, local_dy, table, groups) -> None:
    """Both give the same outputs and gradients, to what bfloat16 holds."""
    forward_backward(whole, u, dy)()
    forward_backward(cut, local_u, local_dy, table)()
    with torch.no_grad():
        errors = {"y": distance(cut(local_u, table), table.shard(whole(u), groups.cp.rank))}
    errors["du"] = distance(local_u.grad, table.shard(u.grad, groups.cp.rank))
    for name, parameter in whole.named_parameters():
        mine = sum_over(cut.get_parameter(name).grad.float(), groups.cp)
        errors[name] = distance(mine, parameter.grad)
    worst = max(errors, key=errors.__getitem__)
    say(f"cut against whole: {worst} {errors[worst]:.1e}, y {errors['y']:.1e}, du {errors['du']:.1e}")
    if not errors[worst] < 2e-2:
        raise SystemExit(f"the cut mixer is wrong: {errors}")


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


class Delayed(ProcessGroups):
    """An exchange that takes a given time longer, on its own stream."""

    seconds = 0.0
    cycles_per_s = 0.0

    def run(self, exchange):
        if self.seconds:
            torch.cuda._sleep(int(self.seconds * self.cycles_per_s))
        return super().run(exchange)


def clock() -> float:
    """Cycles per second of `torch.cuda._sleep`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 20_000_000
    for _ in range(2):
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return cycles / start.elapsed_time(end) * 1e3


@contextmanager
def delays():
    """Inside, exchanges are carried by `Delayed`."""
    original, Delayed.cycles_per_s = state_scan.ProcessGroups, clock()
    state_scan.ProcessGroups = Delayed
    try:
        yield
    finally:
        state_scan.ProcessGroups, Delayed.seconds = original, 0.0


def measure_delays(groups: ParallelGroups, options: argparse.Namespace):
    """The step with exchanges that take as long as the model says for many ranks, beside the step with none added."""
    for d_model, ngroups in SHAPES:
        (whole, u, dy), (cut, local_u, local_dy), table = whole_and_cut(d_model, ngroups, groups, options)
        state_bytes = 4 * 2 * d_model * 128
        seconds = {
            f"{backend}, P = {ranks}": exchange_time(backend, ranks, ranks // 8, 1, state_bytes, H200)
            for ranks in DELAYED_RANKS
            for backend in ("hierarchical", "log_step")
        }
        call = forward_backward(cut, local_u, local_dy, table)

        def after(delay: float, call=call) -> Call:
            def delayed() -> None:
                Delayed.seconds = delay
                call()

            return delayed

        with delays():
            calls = {"whole": forward_backward(whole, u, dy), "none": after(0.0)}
            times = in_turn(calls | {name: after(delay) for name, delay in seconds.items()}, groups.cp, options)
        share = times["whole"] / groups.cp.size
        for name, delay in seconds.items():
            case = f"d_model {d_model}, {ngroups} groups, {options.tokens} tokens a rank, {name}"
            row = make_row("mixer with a modelled exchange", case, times[name], share, "its share of one GPU", "ms")
            yield row | {"over": times[name] / share, "modelled_us": delay * 1e6, "undelayed": times["none"]}
        del whole, cut, u, dy, local_u, local_dy, calls, call
        torch.cuda.empty_cache()


class AllToAllMixer(Mamba2Mixer):
    """Our kernels under Megatron-core's scheme: heads of whole sequences, by five all-to-alls and one back.

    Parameters and weights' gradients are whole, as there.
    """

    def forward(self, u: Tensor, segments: SegmentTable | None = None) -> Tensor:
        cp, share, config = self.cp, self.share, self.config
        lengths = [u.shape[1]] * cp.size
        sizes = [share.d_inner_local, *(part.length for part in share.conv1d.parts), share.nheads_local]
        parts = self.in_proj(u).split(sizes, dim=-1)
        z, x, B, C, dt = (to_heads(part.unflatten(-1, (-1, 1)), lengths, cp).flatten(-2) for part in parts)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mine = lambda t: t.chunk(cp.size)[cp.rank]  # noqa: E731
        taps = zip((x, B, C), weight.split(sizes[1:4]), bias.split(sizes[1:4]), strict=True)
        x, B, C = (causal_conv1d(part, mine(w), mine(b), activation="silu") for part, w, b in taps)
        y = mamba_chunk_scan_combined(
            x.unflatten(-1, (-1, config.headdim)), dt, mine(self._A()), B.unflatten(-1, (-1, config.d_state)),
            C.unflatten(-1, (-1, config.d_state)), config.chunk_size, D=mine(self.D), z=z.unflatten(-1, (-1, 64)),
            dt_bias=mine(self.dt_bias), dt_softplus=True,
        )  # fmt: skip
        y = to_tokens(y.flatten(2)[..., None], lengths, cp).flatten(-2)
        group_size = share.d_inner_local // config.ngroups
        return self.out_proj(gated_rmsnorm(y, self.norm.weight, eps=1e-5, group_size=group_size))


def measure_peer(groups: ParallelGroups, options: argparse.Namespace):
    """Our mixer over ranks against Megatron-core's, and against our kernels under its scheme."""
    for d_model, ngroups in PEER_SHAPES:
        _, (cut, local_u, local_dy), table = whole_and_cut(d_model, ngroups, groups, options)
        calls = {"ours": forward_backward(cut, local_u, local_dy, table)}
        scheme = AllToAllMixer(Mamba2Config(ngroups=ngroups), d_model, groups, **BF16)
        calls["scheme"] = forward_backward(scheme, local_u, local_dy, table)
        names = {"scheme": "our kernels, five all-to-alls"}
        try:
            mixer, names["megatron"] = megatron_mixer(d_model, ngroups, groups)
            their_u = local_u.detach().transpose(0, 1).contiguous().requires_grad_()
            calls["megatron"] = forward_backward(mixer, their_u, local_dy.transpose(0, 1).contiguous())
            calls["megatron"]()
        except ImportError as error:
            say(f"without megatron-core: {error}")
        times = in_turn(calls, groups.cp, options)
        case = f"d_model {d_model}, {ngroups} groups, {options.tokens} tokens a rank"
        for side, name in names.items():
            if side in times:
                what = "mixer cp2 vs megatron a2a" if side == "megatron" else "mixer cp2 vs our kernels a2a"
                yield make_row(what, case, times["ours"], times[side], name, "ms")
        del cut, scheme, local_u, local_dy, calls
        torch.cuda.empty_cache()


def megatron_mixer(d_model: int, ngroups: int, groups: ParallelGroups) -> tuple[nn.Module, str]:
    """Megatron-core's stock mixer over context-parallel ranks, and its name."""
    mamba_ssm = import_peer()
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        model_parallel_cuda_manual_seed,
    )
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1, context_parallel_size=groups.cp.size)
        model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=d_model, num_attention_heads=d_model // 128, context_parallel_size=groups.cp.size,
        bf16=True, params_dtype=torch.bfloat16, mamba_state_dim=128, mamba_head_dim=64, mamba_num_groups=ngroups,
    )  # fmt: skip
    mixer = MambaMixer(
        config, MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear), d_model,
        layer_number=1, pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"]),
    )  # fmt: skip
    return mixer.cuda(), f"megatron-core {megatron.core.__version__}, mamba_ssm {mamba_ssm.__version__}"


def measure_long(groups: ParallelGroups, options: argparse.Namespace):
    """The 1.3B Mamba-2 on sequences of millions of tokens of real text, each trained in parts over all ranks."""
    device = torch.device("cuda", dist.get_rank())
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)  # the first rank's
        if dist.get_rank() == 0:
            write_texts(Path(folder) / "texts")
        dist.barrier()
        for seqlen in options.long_tokens:
            parts, recompute = seqlen // (options.tokens * groups.cp.size), LONG[seqlen]
            keys = [
                f"data.seqlen={seqlen}", f"parts={parts}", f"recompute={recompute}", f"parallel.cp={groups.cp.size}",
                f"out={shared[0]}/run", f"data.cache={shared[0]}/data", f"data.source={shared[0]}/texts",
            ]  # fmt: skip
            file = str(ROOT / "examples" / "mamba2_1_3b_long.yaml")
            config = parse(TrainConfig, "train", [file, *keys], with_file=True)
            torch.cuda.reset_peak_memory_stats()
            trainer, updates = Trainer(config, Path(config.out), device), []
            for _ in range(options.steps):
                updates.append(trainer._update())
                say(f"update {len(updates)}: {updates[-1]}")
            late = updates[1:] or updates
            speed = statistics.median(update["tokens_per_s"] for update in late)
            how = f"{parts} parts, recompute {recompute}, {config.parallel.sharding}"
            case = f"Mamba-2 1.3B, {seqlen:,} tokens a sequence in {how}"
            yield make_row("long context", case, speed, None, None, "tokens/s") | {
                "peak_GiB": most(torch.cuda.max_memory_allocated() / GIB, groups.cp),
                "mfu": statistics.median(update["mfu"] for update in late),
                "losses": [update["loss"] for update in updates],
            }
            del trainer
            gc.collect()
            torch.cuda.empty_cache()


def write_texts(folder: Path, characters: int = 12_000_000) -> None:
    """The Python sources of the standard library and of PyTorch, as a few long documents."""
    folder.mkdir()
    sources = [*find_files("stdlib"), *sorted(Path(torch.__file__).parent.rglob("*.py"))]
    text = "".join(source.read_text(errors="ignore") for source in sources)
    for index, start in enumerate(range(0, len(text), characters)):
        (folder / f"{index}.txt").write_text(text[start : start + characters])


def table_row(row: dict) -> str:
    show = lambda name, form: "-" if row.get(name) is None else format(row[name], form)  # noqa: E731
    columns = "".join(f"{show(name, '.3f'):>9}" for name in ("ours", "peer", "ratio", "over", "graph", "peak_GiB"))
    return f"{row['what']:32} {row['case']:64} {row['unit']:3}{columns}"


def plot(results: dict) -> None:
    """A mixer over two GPUs by who splits it, and with exchanges as long as the model says for more GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def of(what: str) -> list[dict]:
        return [row for row in results["rows"] if row["what"] == what]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    peers, schemes = of("mixer cp2 vs megatron a2a"), of("mixer cp2 vs our kernels a2a")
    bars = {
        "states exchanged": [row["ours"] for row in peers],
        "our kernels, all-to-alls": [row["peer"] for row in schemes],
        "Megatron-core": [row["peer"] for row in peers],
    }
    for index, (name, values) in enumerate(bars.items()):
        places = [place + 0.26 * (index - 1) for place in range(len(values))]
        left.bar_label(left.bar(places, values, 0.24, label=name), fmt="%.1f", fontsize=8)
    left.set_xticks(range(len(peers)), [row["case"].rsplit(",", 1)[0] for row in peers])
    left.set(ylabel="ms, forward and backward", title="a mixer, cp=2, 32768 tokens a GPU")
    left.legend(fontsize=8)
    for row in of("mixer with a modelled exchange"):
        row["shape"], row["by"], row["ranks"] = row["case"].split(",")[0], *row["case"].rsplit(", ", 2)[1:]
    delayed = of("mixer with a modelled exchange")
    for shape, by in dict.fromkeys((row["shape"], row["by"]) for row in delayed):
        mine = [row for row in delayed if (row["shape"], row["by"]) == (shape, by)]
        ranks = [int(row["ranks"].removeprefix("P = ")) for row in mine]
        right.plot(ranks, [row["over"] for row in mine], marker="o", ms=4, label=f"{shape}, {by}")
    right.set_xscale("log", base=2)
    right.set_xticks([64, 1024, 4096], ["64", "1024", "4096"])
    right.set(xlabel="GPUs the exchange is modelled for", title="over half a step on one GPU", ylim=(1.0, None))
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "exchange.png", dpi=120)


if __name__ == "__main__":
    main()
