"""The state that rows take from the batch before and leave to the next, without gradient.

Each rank of the group has all of it, so that the next batch may be cut in another way. What enters a row goes through
its first segment to the others by the exchange that they have anyway; the rank with the row's last token knows what
leaves it, and broadcasts that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mamba2_dist.kernels.common.transfer import to_device

from .collectives import broadcast_over
from .groups import Group
from .segments import SegmentTable


@dataclass(frozen=True)
class _LastInputs:
    """Where the last d_conv - 1 inputs of each row are; worked out on the host."""

    tokens: Tensor  # those among the rank's tokens
    before: Tensor  # those among what precedes its pieces, piece * (d_conv - 1) + place
    order: Tensor  # (batch * (d_conv - 1),) where each stands among both


class Carry:
    """One layer's, for one batch.

    conv: (batch, d_conv - 1, channels/tp), the last inputs of the convolution; ssm: (batch, nheads/tp, headdim,
    d_state). What they hold of rows that are not carried is not read.
    """

    def __init__(self, conv: Tensor, ssm: Tensor, table: SegmentTable, group: Group):
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
        self._left: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def leave_conv(self, x: Tensor, halo: Tensor | None) -> None:
        """Take the last inputs of each row from x, (batch, seqlen/cp, channels/tp), and from what precedes its pieces,
        (pieces, d_conv - 1, channels/tp)."""
        if self.closing is None:
            return
        reach, channels = self.conv.shape[1:]
        last = self.local.kept(("carry", reach, x.device), lambda: self._find_last_inputs(reach, x.device))
        rows = x.flatten(0, 1).index_select(0, last.tokens)
        # nothing precedes any piece where there is no halo
        others = rows.new_zeros(len(last.before), channels) if halo is None else halo.flatten(0, 1)[last.before]
        self.last_inputs = torch.cat([rows, others]).index_select(0, last.order)

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
        states = states.clone()  # others may read what a segment leaves by itself
        states[self.opening] += decay[self.opening] * self.initial_states
        return states.view(state.shape)

    def enter(self, entering: Tensor, decay: Tensor) -> Tensor:
        """What enters the segments, (segments, batch, nheads/tp, headdim, d_state), the first included; what leaves the
        last is known then."""
        if self.initial_states is not None and self.opening is not None:
            entering = entering.clone()
            entering[self.opening] += self.initial_states
        if self.closing is None:
            self.leave_states(None)
        else:
            self.leave_states(decay[self.closing] * entering[self.closing] + self.own_state)
            del self.own_state
        return entering

    def leave_states(self, final_states: Tensor | None) -> None:
        """Begin to tell every rank what leaves the rows, which the one with their last token knows; it is like ssm."""
        if final_states is None:
            packed = self.ssm.new_empty(self.ssm.numel() + self.conv.numel())
        else:
            parts = final_states.detach(), self.last_inputs
            packed = torch.cat([part.to(self.ssm.dtype).flatten() for part in parts])
            del self.last_inputs
        self._left = broadcast_over(packed, self.group, self.table.closing.rank)

    def left(self) -> tuple[Tensor, Tensor]:
        """What leaves the rows, like conv and ssm."""
        assert self._left is not None, "outputs come first"
        ssm, conv = self._left().split([math.prod(self.ssm.shape), math.prod(self.conv.shape)])
        self._left = None
        return conv.view(self.conv.shape).to(self.conv.dtype), ssm.view(self.ssm.shape)
