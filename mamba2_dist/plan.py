"""What a run would take on more GPUs than there are: a model of one step for every way that states can travel."""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from mamba2_dist.config import check_positive_fields, require
from mamba2_dist.models.hybrid_model import check_split
from mamba2_dist.parallel.cost_model import H200, SIMPLEST_FIRST, Machine, nodes_of, possible
from mamba2_dist.train.config import TrainConfig
from mamba2_dist.train.machine import load_machine
from mamba2_dist.train.step_model import Sizes, Step, choose_backend, choose_layout, model_step


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A training run, and the GPUs to plan it for. `out` is the folder of plan.png."""

    gpus: tuple[int, ...] = (8, 64, 512)
    """GPUs in all; context parallelism (cp) takes what tp and dp leave."""
    seqlen: int | None = None
    """Tokens of a sequence, whatever the GPUs; None: they grow with cp, so that every GPU keeps the tokens that
    data.seqlen and parallel.cp give it."""

    def __post_init__(self):
        super().__post_init__()
        check_positive_fields(self, "seqlen")
        require(
            self.parallel.state_scan != "serial_exact",
            "parallel.state_scan (serial_exact) has no cost model; plan with auto or another",
        )
        require(len(self.gpus) > 0, "gpus must name at least one number, as in gpus=8,64")
        fixed = self.parallel.tp * (self.parallel.dp or 1)
        for count in self.gpus:
            require(
                count > 0 and count % fixed == 0,
                f"gpus ({count}) must be above 0 and divisible by parallel.tp * parallel.dp ({fixed})",
            )

    def on_gpus(self, gpus: int) -> "PlanConfig":
        """This run with cp grown to fill so many GPUs."""
        split = self.parallel
        cp = gpus // (split.tp * (split.dp or 1))
        seqlen = self.seqlen or max(self.data.seqlen // split.cp, 1) * cp
        require(
            seqlen >= cp,
            f"seqlen ({seqlen}) must be at least a token for each of {cp} cp ranks; raise it or lower gpus",
        )
        parallel = replace(split, cp=cp, dp=split.dp or 1)
        return replace(self, parallel=parallel, data=replace(self.data, seqlen=seqlen))


@dataclass(frozen=True)
class Row:
    """One way for states to travel between so many GPUs."""

    gpus: int
    cp: int
    nodes: int
    """Under cp."""
    backend: str
    layout: str
    chosen: bool
    """Whether the run takes it."""
    step: Step


def plan(config: PlanConfig) -> Path | None:
    """Print the table and draw plan.png in `config.out`; gives its path, None without matplotlib."""
    machine = H200 if config.machine is None else load_machine(Path(config.machine))
    rows = [row for gpus in config.gpus for row in rows_of(config, gpus, machine)]
    print(*_heading(config, machine), "", *_table(rows, machine, torch.cuda.device_count()), sep="\n")
    path = plot(rows, machine, Path(config.out))
    print("\nno matplotlib here, so no plot" if path is None else f"\nwrote {path}")
    return path


def rows_of(config: PlanConfig, gpus: int, machine: Machine) -> list[Row]:
    """A row for every possible backend; one where no states travel. Raises ValueError for a split that does not fit."""
    grown = config.on_gpus(gpus)
    cp = grown.parallel.cp
    nodes = nodes_of(cp, grown.parallel.tp, machine)
    check_split(grown.architecture, grown.parallel, nodes)
    run = choose_layout(grown, machine)
    if cp == 1 or "M" not in grown.architecture.pattern:
        step = model_step(run, "all_gather", machine)
        return [Row(gpus, cp, nodes, "-", run.parallel.layout, True, step)]
    taken = choose_backend(Sizes(run, machine))
    rows = []
    for backend in SIMPLEST_FIRST:
        if backend != taken and not possible(backend, nodes, machine):
            continue
        laid = run if backend == taken else choose_layout(grown, machine, backend)
        step = model_step(laid, backend, machine)
        rows.append(Row(gpus, cp, nodes, backend, laid.parallel.layout, backend == taken, step))
    return rows


def _heading(config: PlanConfig, machine: Machine) -> list[str]:
    """What is planned, for what machine, and what is known of it."""
    grows = "sequences grow with cp" if config.seqlen is None else f"sequences of {config.seqlen} tokens"
    split = config.parallel
    in_parts = f" in {config.parts} parts" if config.parts > 1 else ""
    lines = [
        f"{config.preset or config.architecture.pattern}: tp {split.tp}, dp {split.dp or 1}, cp the rest; {grows}; "
        f"{split.sharding}, recompute {config.recompute}",
        f"one micro-batch{in_parts}, forward and backward, on {machine.name}, {machine.node_size} GPUs a node; in ms",
    ]
    lines.append(f"assumed, not measured: {', '.join(_assumed(machine)) or 'nothing'}")
    if config.precision != "bf16":
        lines.append(f"precision is {config.precision}, planned as bf16")
    return lines


def _assumed(machine: Machine) -> list[str]:
    """The numbers of a machine that nobody has measured on it."""
    numbers = [item.name for item in fields(machine) if item.name not in ("name", "measured")]
    return [name for name in numbers if name not in machine.measured and getattr(machine, name) is not None]


def _table(rows: list[Row], machine: Machine, present: int) -> list[str]:
    """One line a row; * marks what the run takes."""
    heads = (
        "gpus",
        "nodes",
        "states by",
        "layout",
        "tokens/GPU",
        "compute",
        "exchange",
        "exposed",
        "",
        "GiB",
        "eff.",
        "",
    )
    form = "{:>6} {:>5}  {:18} {:10} {:>10} {:>9} {:>9} {:>9}  {:14} {:>7} {:>6}  {}"
    lines = [form.format(*heads).rstrip()]
    for row in rows:
        step = row.step
        most = max(step.exposed, key=lambda name: step.exposed[name])
        full = " over" if step.memory_bytes > machine.memory_bytes else ""
        values = (
            row.gpus, row.nodes, row.backend + " *" * row.chosen, row.layout, step.tokens,
            _number(step.compute_s * 1e3), _number(step.exchange_s * 1e3), _number(step.exposed_s * 1e3),
            most if step.exposed[most] > 0 else "", _number(step.memory_bytes / 2**30), f"{step.efficiency:.0%}",
            _label(row, machine, present) + full,
        )  # fmt: skip
        lines.append(form.format(*values).rstrip())
    return [*lines, "* is what the run takes; beside exposed: what most of it is; over: does not fit the GPU"]


def _label(row: Row, machine: Machine, present: int) -> str:
    label = "modelled" if row.gpus > present else "can be run here"
    return f"{label}, network assumed" if row.nodes > 1 and "rail" not in machine.measured else label


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def plot(rows: list[Row], machine: Machine, folder: Path) -> Path | None:
    """Draw the share of compute in a step over the GPUs, a line a backend."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for backend in dict.fromkeys(row.backend for row in rows):
        points = [(row.gpus, row.step.efficiency) for row in rows if row.backend == backend]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.2, label=backend)
    counts = sorted({row.gpus for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="GPUs", ylabel="compute / step", ylim=(0, 1.02), title=f"modelled for {machine.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".plan.partial.png"
    figure.savefig(partial, dpi=120)
    plt.close(figure)
    path = folder / "plan.png"
    os.replace(partial, path)
    return path
