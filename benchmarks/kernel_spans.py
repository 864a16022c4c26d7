"""Which kernels calls launch on a GPU, and when: what of communication nothing is computed beside, and what differs."""

import itertools
import statistics

import torch
import torch.distributed as dist
from ssd import Call

PROFILED = 9  # calls
Span = tuple[str, float, float]


def kernel_spans(call: Call) -> list[list[Span]]:
    """Of each of `PROFILED` calls, which launch the same, name, start and end in us of every kernel and copy; one that
    runs beside the next call's first may be counted there."""
    call()
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    spans.sort(key=lambda span: span[1])
    edges = [round(index * len(spans) / PROFILED) for index in range(PROFILED + 1)]
    return [spans[start:end] for start, end in itertools.pairwise(edges)]


def communication_ms(calls: list[list[Span]]) -> tuple[float, float]:
    """Time of communication kernels beside which nothing computes, and all of it: ms a call on this rank, medians over
    calls. Ranks wait in these kernels for one another too."""
    times = []
    for kernels in calls:
        talking = [(start, end) for name, start, end in kernels if "nccl" in name.lower()]
        working = [(start, end) for name, start, end in kernels if "nccl" not in name.lower()]
        times.append((total_length(talking + working) - total_length(working), total_length(talking)))
    exposed, wire = (statistics.median(each) / 1e3 for each in zip(*times, strict=True))
    return exposed, wire


def differences(whole_calls: list, cut_calls: list, ranks: int, count: int = 14) -> str:
    """The kernels whose time differs most from their share of the whole step."""
    whole, cut = (list(itertools.chain.from_iterable(calls)) for calls in (whole_calls, cut_calls))
    totals: dict[str, list[float]] = {}
    for side, (kernels, scale) in enumerate(((whole, ranks), (cut, 1))):
        for name, start, end in kernels:
            totals.setdefault(name, [0.0, 0.0])[side] += (end - start) / scale / PROFILED / 1e3
    most = sorted(totals, key=lambda name: -abs(totals[name][1] - totals[name][0]))[:count]
    lines = [f"{name[:70]:70} {totals[name][0]:8.3f} {totals[name][1]:8.3f}" for name in most]
    sums = [sum(each[side] for each in totals.values()) for side in (0, 1)]
    gaps = [(kernels[-1][2] - kernels[0][1]) / PROFILED / 1e3 / scale for kernels, scale in ((whole, ranks), (cut, 1))]
    lines.append(f"{'all kernels':70} {sums[0]:8.3f} {sums[1]:8.3f}")
    lines.append(f"{'from first to last':70} {gaps[0]:8.3f} {gaps[1]:8.3f}")
    return "\n".join(lines)


def total_length(spans: list[tuple[float, float]]) -> float:
    """Of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
