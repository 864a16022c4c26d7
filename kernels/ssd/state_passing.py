"""The recurrence over chunks: which state enters each chunk, and which leaves each document."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.documents import ChunkLayout


class _StatePassing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, decay: Tensor, initial_states: Tensor, steps: tuple[int, ...]):
        entering = torch.empty_like(states)
        state = initial_states.clone()
        start = 0
        for running in steps:
            step = slice(start, start + running)
            entering[step] = state[:running]
            state[:running] = decay[step] * state[:running] + states[step]
            start += running
        ctx.save_for_backward(entering, decay)
        ctx.steps = steps
        return entering, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_entering: Tensor, d_final: Tensor):
        entering, decay = ctx.saved_tensors
        d_states, d_decay = torch.empty_like(entering), torch.empty_like(decay)
        d_state = d_final.clone()
        end = entering.shape[0]
        for running in reversed(ctx.steps):
            step = slice(end - running, end)
            leaving = d_state[:running]
            d_states[step] = leaving
            d_decay[step] = (leaving * entering[step]).sum_to_size(decay[step].shape)
            d_state[:running] = decay[step] * leaving + d_entering[step]
            end -= running
        return d_states, d_decay, d_state, None


def state_passing(states: Tensor, decay: Tensor, initial_states: Tensor, layout: ChunkLayout) -> tuple[Tensor, Tensor]:
    """h_c = decay_c h_{c-1} + states_c over the chunks of each document.

    states: (nchunks, nheads, headdim, d_state), what each chunk adds to the state; decay: the same with axes of size 1
    where it is shared, what it leaves of the state that enters; initial_states: (documents, nheads, headdim, d_state).
    Returns the state entering each chunk and the state leaving each document, shaped like the inputs.
    """
    entering, final = _StatePassing.apply(
        states[layout.order], decay[layout.order], initial_states[layout.ranking], layout.steps
    )
    return entering[layout.inverse], final[layout.unranking]
