"""The state that rows take from the batch before and leave to the next, with gradient where it requires one.

Each rank of the group has all of it, so that the next batch may be cut in another way. What enters a row goes through
its first segment to the others by the exchange that they have anyway; the rank with the row's last token knows what
leaves it, and broadcasts that. Backward, ranks' gradients of what entered are summed, and the gradient of what left,
which every rank has, goes on from the row's last token.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2_dist.kernels.common.transfer import to_device

from .collectives import Arriving, begin_broadcast, replicate
from .groups import Group
from .segments import SegmentTable


@dataclass(frozen=True)
class _LastInputs:
    """Where the last d_conv - 1 inputs of each row are; worked out on the host."""

    tokens: Tensor  # those among the rank's tokens
    before: Tensor  # those among what precedes its pieces, piece * (d_conv - 1) + place
    order: Tensor  # (batch * (d_conv - 1),) where each stands among both

    def take(self, inputs: Tensor, halo: Tensor) -> Tensor:
        """(batch * (d_conv - 1), channels), from (tokens, channels) and (pieces * (d_conv - 1), channels)."""
        return torch.cat([inputs.index_select(0, self.tokens), halo[self.before]]).index_select(0, self.order)

    def add_to_inputs(self, d_taken: Tensor, d_inputs: Tensor) -> None:
        """The gradients of what was taken, in place."""
        d_inputs.index_add_(0, self.tokens, self._parted(d_taken)[0])

    def add_to_halo(self, d_taken: Tensor, d_halo: Tensor) -> Tensor:
        """The same of the halo's rows, (pieces, d_conv - 1, channels); a copy."""
        return d_halo.flatten(0, 1).index_add(0, self.before, self._parted(d_taken)[1]).view_as(d_halo)

    def _parted(self, d_taken: Tensor) -> tuple[Tensor, ...]:
        both = torch.empty_like(d_taken).index_copy_(0, self.order, d_taken)
        return both.split([len(self.tokens), len(self.before)])


class Carry:
    """One layer's, for one batch.

    conv: (batch, d_conv - 1, channels/tp), the last inputs of the convolution; ssm: (batch, nheads/tp, headdim,
    d_state). What they hold of rows that are not carried is not read.
    """

    def __init__(self, conv: Tensor, ssm: Tensor, table: SegmentTable, group: Group):
        self.differentiable = torch.is_grad_enabled() and (conv.requires_grad or ssm.requires_grad)
        """Whether gradients pass to what enters and from what leaves."""
        if self.differentiable:
            conv, ssm = replicate(conv, group), replicate(ssm, group)
        self.conv, self.ssm, self.table, self.group = conv, ssm, table, group
        self.local = table.local(group.rank)
        self.initial_states: Tensor | None = None
        """ssm, zeros in rows that are not carried; None: no row is."""
        if table.carried.any():
            rows = self.local.tensor("carried", ssm.device)[:, None, None, None]
            self.initial_states = torch.where(rows, ssm, 0.0)
        # the slot that states enter and the slot that they leave, where those are this rank's
        self.opening, self.closing = (
            segment.slot if segment.rank == group.rank else None for segment in (table.segments[0], table.closing)
        )
        self.last_inputs = self.final_states = conv.new_empty(0)
        """What this rank knows of what leaves."""
        self._left: Arriving

    def find_last_inputs(self, device: torch.device) -> _LastInputs | None:
        """None: another rank has them."""
        if self.closing is None:
            return None
        reach = self.conv.shape[1]
        return self.local.kept(("carry", reach, device), lambda: self._find_last_inputs(reach, device))

    def _find_last_inputs(self, reach: int, device: torch.device) -> _LastInputs:
        last, offsets = self.local.last[self.closing], np.asarray(self.local.documents.offsets)
        start, end = offsets[last, None], offsets[last + 1, None]
        token = end + np.arange(-reach, 0)
        inside = token >= start
        before = last[:, None] * reach + token - start + reach
        order = np.argsort(np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)]))
        return _LastInputs(*(to_device(found, device) for found in (token[inside], before[~inside], order)))

    def through_opening(self, state: Tensor, decay: Tensor) -> Tensor:
        """What the segments leave, (segments x batch, nheads/tp, headdim, d_state), given what enters the first; decay:
        (segments, batch, nheads/tp, 1, 1), the share that passes each."""
        states = state.view(*decay.shape[:2], *state.shape[1:])
        if self.closing is not None:
            self.own_state = states[self.closing]
        if self.initial_states is None or self.opening is None:
            return state
        return added_at(states, self.opening, decay[self.opening] * self.initial_states).view(state.shape)

    def enter(self, entering: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the segments, (segments, batch, nheads/tp, headdim, d_state), the first included; and what leaves
        the last, which is known then, where it is this rank's."""
        if self.initial_states is not None and self.opening is not None:
            entering = added_at(entering, self.opening, self.initial_states)
        final_states = entering.new_empty(0)
        if self.closing is not None:
            final_states = decay[self.closing] * entering[self.closing] + self.own_state
            del self.own_state
        self.leave(final_states)
        return entering, final_states

    def leave(self, final_states: Tensor) -> None:
        """Begin to tell every rank what leaves the rows, which the one with their last token knows; it is like ssm."""
        self.final_states = final_states
        packed = self.ssm.new_empty(self.ssm.numel() + self.conv.numel())
        if self.closing is not None:
            parts = final_states.detach(), self.last_inputs.detach()
            torch.cat([part.to(packed.dtype).flatten() for part in parts], out=packed)
        self._left = begin_broadcast(packed, self.group, self.table.closing.rank)

    def left(self) -> tuple[Tensor, Tensor]:
        """What leaves the rows, like conv and ssm."""
        ssm, conv = self._left.wait().split([math.prod(self.ssm.shape), math.prod(self.conv.shape)])
        ssm, conv = ssm.view(self.ssm.shape), conv.view(self.conv.shape).to(self.conv.dtype)
        if self.differentiable:
            ssm, conv = _Left.apply(ssm, self.final_states), _Left.apply(conv, self.last_inputs)
        # a recipe may keep this object, which must not keep the graph that the recipe is in
        del self._left, self.final_states, self.last_inputs
        return conv, ssm


def added_at(states: Tensor, slot: int | None, share: Tensor) -> Tensor:
    """(segments, ...) with `share` added to one of them; None: to none. A copy, as others may read what was there."""
    if slot is None:
        return states
    states = states.clone()
    states[slot] += share
    return states


class _Left(torch.autograd.Function):
    """What was broadcast; its gradient, which all ranks have, goes to `sent`, which is empty on all but one."""

    @staticmethod
    def forward(ctx, received, sent):
        ctx.sent = sent.shape, sent.dtype
        return received.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        shape, dtype = ctx.sent
        return None, grad.flatten()[: math.prod(shape)].view(shape).to(dtype)
