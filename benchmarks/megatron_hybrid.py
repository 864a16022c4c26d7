"""This library's Mamba-2 mixer against Megatron-core's own, in the same model, trainer and process.

    mamba2-dist preprocess out=runs/stdlib
    torchrun --nproc-per-node 1 benchmarks/megatron_hybrid.py --data runs/stdlib

Trains two copies of a hybrid of 1.3B's width from the same weights on the same text, an update of one and then of the
other: examples/megatron/pretrain.py with two specs, which differ in the mixer alone. Needs megatron-core 0.18 or newer,
mamba_ssm and causal_conv1d. Prints a table and writes benchmarks/results/megatron-<device>.json, into $OUT where it is
set; rows of cases that --only leaves out stay there if commit, machine and versions are the same. Rates are of whole
updates, optimizer included; medians.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ssd import import_peer, origin, results_path, write

EXAMPLE = Path(__file__).parents[1] / "examples" / "megatron"
PATTERN = "MMMMMMM*MMMMMMMM"
SIZES = {"hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 8, "mamba_num_groups": 8}
WARMUP = 3  # updates that compile and tune
# tokens of a sequence: sequences of a microbatch, and microbatches of an update: as many as the time for its updates
# allows, where examples/megatron/sizes/1_3b.yaml has a million tokens
CASES = {8192: (4, 4), 32768: (1, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `mamba2-dist preprocess` wrote")
    parser.add_argument("--pattern", default=PATTERN)
    parser.add_argument("--steps", type=int, default=100, help="updates of the first case, whose losses are compared")
    parser.add_argument("--rounds", type=int, default=12, help="updates of the others")
    parser.add_argument("--only", type=int, nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    if import_peer() is None:
        parser.error("the stock mixer needs mamba_ssm and causal_conv1d")
    sys.path.insert(0, str(EXAMPLE))
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    import megatron.core
    import pretrain

    results = origin() | {"megatron_core": megatron.core.__version__}
    results["rows"] = rows_of_others(results, options.only)
    for seqlen in options.only:
        compared = seqlen == next(iter(CASES))
        sequences, microbatches = CASES[seqlen]
        steps = options.steps if compared else options.rounds + WARMUP
        with tempfile.TemporaryDirectory() as out:
            config = pretrain.Config(
                data=options.data, out=out, pattern=options.pattern, seqlen=seqlen, micro_batch=sequences,
                global_batch=sequences * microbatches, steps=steps, warmup_steps=20, **SIZES,
            )  # fmt: skip
            for row in measure(pretrain, config, compared):
                results["rows"].append(row)
                ratio = "" if row["ratio"] is None else f"{row['ratio']:8.3f}"
                print(f"{row['what']:28} {row['case']:44} {row['ours']:12.4f} {row['peer']:12.4f}{ratio}", flush=True)
        write(results, "megatron")
    dist.destroy_process_group()


def rows_of_others(results: dict, seqlens: list[int]) -> list[dict]:
    """Those that stay in the file: measured by the same code on the same machine, at other lengths."""
    path = results_path("megatron", results["device"])
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(name) == value for name, value in results.items())
    return [row for row in before["rows"] if row["seqlen"] not in seqlens] if same else []


def measure(pretrain, config, compared: bool) -> list[dict]:
    """Rows of a case."""
    import mamba_ssm
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        pretrain.initialize(config)
    sides = {"ours": pretrain.Trainer(config), "peer": pretrain.Trainer(config, stock_mixer())}
    same_weights(*sides.values())
    times, losses, memory = ({name: [] for name in sides} for _ in range(3))
    for _ in range(config.steps):
        for name, trainer in sides.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            loss, _ = trainer.train_step()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            losses[name].append(loss.item())
            memory[name].append((torch.cuda.max_memory_allocated() - before) / 2**30)
    del sides, trainer, loss
    gc.collect()
    torch.cuda.empty_cache()
    microbatches = config.global_batch // config.micro_batch
    case = f"{config.pattern}, d 2048, {microbatches} x {config.micro_batch} sequences"
    peer_name = f"Megatron's mixer, mamba_ssm {mamba_ssm.__version__}"

    def row(what: str, ours: float, peer: float, unit: str, ratio: float | None) -> dict:
        names = {"what": what, "case": case, "seqlen": config.seqlen, "peer_name": peer_name, "unit": unit}
        return names | {"ours": ours, "peer": peer, "ratio": ratio}

    tokens = config.global_batch * config.seqlen
    rates = {name: tokens / statistics.median(seconds[WARMUP:]) for name, seconds in times.items()}
    peaks = {name: statistics.median(each) for name, each in memory.items()}
    rows = [
        row(f"tokens/s {config.seqlen}", **rates, unit="tokens/s", ratio=rates["ours"] / rates["peer"]),
        row(f"memory of an update {config.seqlen}", **peaks, unit="GiB", ratio=peaks["peer"] / peaks["ours"]),
    ]
    if compared:
        ours, peer = (torch.tensor(each, dtype=torch.float64) for each in losses.values())
        at = [*range(0, config.steps, 10), config.steps - 1]
        rows += [
            row(f"loss before update {step + 1}", losses["ours"][step], losses["peer"][step], "nats", None)
            for step in at
        ]
        distance = ((ours - peer).norm() / peer.norm()).item()
        rows.append(row("distance of the loss curves", distance, 0.0, "relative", None))
    return rows


def stock_mixer():
    """The stack with Megatron's own mixer, its projections by Megatron as well; all else is the same."""
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    from mamba2_dist.adapters.megatron import hybrid_stack

    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    spec = hybrid_stack()
    layer = spec.submodules.mamba_layer
    layer = dataclasses.replace(
        layer,
        submodules=dataclasses.replace(layer.submodules, mixer=ModuleSpec(module=MambaMixer, submodules=projections)),
    )
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, mamba_layer=layer))


@torch.no_grad()
def same_weights(ours, peer) -> None:
    """Give the peer our weights, tensor for tensor by their names in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    found = []
    for trainer in (ours, peer):
        state = trainer._unwrapped().sharded_state_dict()
        apply_factories(state)
        found.append({each.key: each.data for each in nested_values(state) if isinstance(each, ShardedTensor)})
    assert found[0].keys() == found[1].keys(), found[0].keys() ^ found[1].keys()
    for key, weight in found[0].items():
        found[1][key].copy_(weight)
    peer.optimizer.reload_model_params()


if __name__ == "__main__":
    main()
