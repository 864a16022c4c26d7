"""One GPU plays a rank of many: a mixer's step whose messages take as long as the cost model says.

    python benchmarks/one_of_many.py [--ranks 64 1024] [--tokens 32768] [--rounds 9]

Every message is a kernel that does nothing for that long, as large as NCCL's. Three sides take turns: messages that
take no time; exchanges that follow z's products; exchanges beside products that leave them processors, where that is
worth it. Prints a table and writes benchmarks/results/one-of-many-<device>.json, into $OUT where it is set. Other ranks
are never late here.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from exchange import SHAPES, forward_backward, in_turn, leaf
from kernel_spans import communication_ms, kernel_spans
from layer import make_row
from ssd import Call, origin, write
from torch.testing._internal.distributed.fake_pg import FakeStore

from mamba2_dist import Mamba2Config, Mamba2Mixer, ParallelGroups, SegmentTable
from mamba2_dist.parallel import halo, state_scan
from mamba2_dist.parallel.collectives import Arriving, begin_rows
from mamba2_dist.parallel.cost_model import EXCHANGE_PROCESSORS, H200, operations
from mamba2_dist.parallel.messages import Messages, ProcessGroups

NODE = 8
# threads, registers and shared memory of NCCL's kernels, which leave no room for them beside a product's
THREADS, SHARED = 640, 84 * 1024
SOURCE = """
extern "C" __global__ void __launch_bounds__(THREADS, 1) nccl_stand_in(int ns, float* some) {
    extern __shared__ float shared[];
    float kept[64];
    for (int i = 0; i < 64; i++) kept[i] = some[i];
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        #pragma unroll
        for (int i = 0; i < 64; i++) kept[i] = kept[i] * 1.0001f + (float)(now & 1);
    } while (now - start < ns);
    float sum = 0;
    for (int i = 0; i < 64; i++) sum += kept[i];
    shared[threadIdx.x] = sum;
    if (sum == 12345.678f) some[threadIdx.x] = shared[0];
}
"""


class Wire:
    """What messages take, and the stream on which NCCL sends those that are not waited for at once."""

    on = False

    def __init__(self):
        self.kernel = torch.cuda._compile_kernel(SOURCE.replace("THREADS", str(THREADS)), "nccl_stand_in")
        self.kernel.set_shared_memory_config(SHARED)
        self.some, self.stream = torch.zeros(THREADS, device="cuda"), torch.cuda.Stream()

    def take(self, seconds: float) -> None:
        """On the current stream."""
        if self.on:
            grid = (EXCHANGE_PROCESSORS, 1, 1)
            self.kernel(grid, (THREADS, 1, 1), [int(seconds * 1e9), self.some], shared_mem=SHARED)

    def begin(self, seconds: float) -> "Wait":
        """Beside the current stream."""
        if not self.on:
            return Wait(None)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.take(seconds)
            return Wait(self.stream.record_event())


class Wait:
    def __init__(self, event: torch.cuda.Event | None):
        self.event = event

    def wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


def messages_take_time(wire: Wire, ranks: int, state_bytes: int) -> None:
    """From now on halos and exchanges, by `hierarchical`, are as long as they would be among so many ranks."""

    class Timed(ProcessGroups):
        def run(self, exchange):
            self.steps = iter(operations("hierarchical", ranks, ranks // NODE, 1, state_bytes))
            return super().run(exchange)

        def carry(self, request):
            brought, seconds = super().carry(request), next(self.steps).time(H200)
            if isinstance(request, Messages):
                wire.begin(seconds).wait()
            else:
                wire.take(seconds)
            return brought

    def timed_rows(*arguments) -> Arriving:
        rows = begin_rows(*arguments).tensor
        return Arriving(rows, wire.begin(H200.rail.time(rows.nbytes)))

    state_scan.ProcessGroups, halo.begin_rows = Timed, timed_rows


def measure(wire: Wire, ranks: int, tokens: int, d_model: int, ngroups: int, options: argparse.Namespace) -> dict:
    groups = ParallelGroups(cp=ranks, node_size=NODE)
    config = Mamba2Config(ngroups=ngroups)
    state_bytes = 4 * config.nheads(d_model) * config.headdim * config.d_state
    messages_take_time(wire, ranks, state_bytes)
    table = SegmentTable.contiguous(tokens * ranks, ranks)
    mixer = Mamba2Mixer(config, d_model, groups, state_scan="hierarchical", device="cuda", dtype=torch.bfloat16)
    step = forward_backward(mixer, leaf(1, tokens, d_model), leaf(1, tokens, d_model).detach(), table)

    def side(on: bool, processors: int) -> Call:
        def call() -> None:
            wire.on, mixer.states = on, replace(groups.states, max_processors=processors)
            step()

        return call

    calls = {"none": side(False, 0), "after": side(True, 0), "beside": side(True, EXCHANGE_PROCESSORS)}
    times = in_turn(calls, groups.cp, options)
    row = make_row(
        "mixer of one of many",
        f"d_model {d_model}, {ngroups} groups, {tokens} tokens a rank, P = {ranks}",
        times["beside"], times["after"], "exchanges after z's products", "ms",
    )  # fmt: skip
    row |= {"no_messages": times["none"], "host_ms": host_ms(calls["none"])}
    limited = replace(groups.states, max_processors=EXCHANGE_PROCESSORS)
    flops = 2.0 * tokens * d_model * config.d_inner(d_model)
    row["left"] = state_scan.processors_wanted(limited, "hierarchical", 1, state_bytes, flops)
    for name in ("after", "beside"):
        row[f"exposed_{name}"], row["communication"] = communication_ms(kernel_spans(calls[name]))
    return row


def host_ms(call: Call, count: int = 30) -> float:
    """What launching a call takes, whatever the GPU does; NCCL's own launches are not among it."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768], help="of one rank")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=6, help="in one round")
    options = parser.parse_args()
    if any(ranks % NODE or ranks == NODE for ranks in options.ranks):
        parser.error(f"--ranks must be several nodes of {NODE}, got {options.ranks}")
    results, wire = origin() | {"rows": []}, Wire()
    print(f"{'':64} {'none':>9} {'after':>9} {'beside':>9} {'host':>9} ms, left; exposed, us: after, beside, of all")
    for ranks in options.ranks:
        dist.init_process_group("cpu:fake,cuda:fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
        for tokens in options.tokens:
            for d_model, ngroups in SHAPES:
                row = measure(wire, ranks, tokens, d_model, ngroups, options)
                results["rows"].append(row)
                times = "".join(f"{row[name]:10.3f}" for name in ("no_messages", "peer", "ours", "host_ms"))
                names = ("exposed_after", "exposed_beside", "communication")
                times += f"{row['left']:5}"
                print(f"{row['case']:64}{times}" + "".join(f"{row[name] * 1e3:8.0f}" for name in names), flush=True)
                write(results, "one-of-many")
                torch.cuda.empty_cache()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
