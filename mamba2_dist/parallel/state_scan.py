"""The state entering each segment, from what every segment before it leaves: an exclusive scan over ranks.

A segment is an element (decay a, state S); two neighbours combine as (a1, S1) o (a2, S2) = (a1 a2, a2 S1 + S2). The
decay may be a scalar per head, a signed scalar, or one value per element of the state. With D_i the gradient of the
state leaving segment i and U_i that of the state entering it,

    H_{i+1} = a_i H_i + S_i        D_{i-1} = a_i D_i + U_i        da_i = <D_i, H_i>

so backward is the same scan in reverse order with the decays already known: only state gradients travel.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.checks import check_choice

from . import ledger
from .collectives import gather_over
from .groups import Group
from .segments import SegmentTable

StateScan = Literal["all_gather", "ring"]


def state_scan(state: Tensor, decay: Tensor, table: SegmentTable, group: Group, backend: StateScan) -> Tensor:
    """The state that enters each of this rank's segments; communicates over `group`.

    state: (segments, ...), what each segment leaves when nothing enters it, in slot order; float32 or wider.
    decay: the same number of axes, of size 1 where it is shared: the share of an entering state each segment leaves.
    backend: "all_gather": one collective that brings every rank every state; "ring": hand-overs from segment to
    segment, least traffic, one after the other. Returns (segments, ...) like `state`; zeros enter the first segment.
    """
    check_choice("backend", backend, ("all_gather", "ring"))
    if len(table.chain) == 1:
        return torch.zeros_like(state)
    return _StateScan.apply(state, decay, table, group, backend)


class _StateScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, decay, table, group, backend):
        if backend == "ring":
            entering = _ring(state, decay, table.chain, group)
            decays = decay
        else:
            # one message for both; the decays alone are kept for backward
            packed = _gather(torch.cat([state.flatten(1), decay.flatten(1)], dim=1), table, group)
            states, decays = packed.split([math.prod(state.shape[1:]), math.prod(decay.shape[1:])], dim=2)
            states, decays = states.unflatten(2, state.shape[1:]), decays.unflatten(2, decay.shape[1:]).clone()
            entering = _prefix(states, decays, table.chain, group.rank, state)
        ctx.save_for_backward(decays, entering)
        ctx.table, ctx.group, ctx.backend, ctx.decay_shape = table, group, backend, decay.shape
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx, d_entering):
        decays, entering = ctx.saved_tensors
        chain = ctx.table.chain[::-1]
        if ctx.backend == "ring":
            d_leaving = _ring(d_entering, decays, chain, ctx.group)
        else:
            gathered = _gather(d_entering, ctx.table, ctx.group)
            d_leaving = _prefix(gathered, decays, chain, ctx.group.rank, d_entering)
        return d_leaving, (d_leaving * entering).sum_to_size(ctx.decay_shape), None, None, None


def _gather(tensor: Tensor, table: SegmentTable, group: Group) -> Tensor:
    """(ranks, slots, ...) from every rank's (segments, ...); ranks with fewer segments are padded."""
    missing = table.slots - tensor.shape[0]
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return gather_over(tensor, group)


def _prefix(states: Tensor, decays: Tensor, chain: Iterable[tuple[int, int]], rank: int, like: Tensor) -> Tensor:
    """Run the recurrence along the chain and keep what enters this rank's segments."""
    entering = torch.zeros_like(like)
    missing = len(like)
    state: Tensor | None = None
    for holder, slot in chain:
        if missing == 0:
            break
        if holder == rank:
            missing -= 1
            if state is not None:
                entering[slot] = state
        state = states[holder, slot] if state is None else decays[holder, slot] * state + states[holder, slot]
    return entering


def _ring(state: Tensor, decay: Tensor, chain: tuple[tuple[int, int], ...], group: Group) -> Tensor:
    """Hand the state along the chain; a rank waits for its predecessor only."""
    entering = torch.zeros_like(state)
    leaving = torch.zeros_like(state[0]) if len(state) else state
    for link, (holder, slot) in enumerate(chain):
        if holder != group.rank:
            continue
        if link > 0 and chain[link - 1][0] != group.rank:
            dist.recv(leaving, group.ranks[chain[link - 1][0]], group=group.handle)
        entering[slot] = leaving
        leaving = decay[slot] * entering[slot] + state[slot]
        if link + 1 < len(chain) and chain[link + 1][0] != group.rank:
            ledger.enter("send", group.name, leaving)
            dist.send(leaving.contiguous(), group.ranks[chain[link + 1][0]], group=group.handle)
    return entering
