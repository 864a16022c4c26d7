"""The chunked SSD algorithm in PyTorch: matrix products inside chunks, a recurrence between them.

The four steps of arXiv 2405.21060, section 6: cumulative decay, what each chunk adds to the state, the recurrence over
chunks, outputs. The algorithm is cut where the state passes, so that the state entering a span of tokens may come from
elsewhere: another split of the sequence or another rank.
"""

import torch
from torch import Tensor

from ..common.documents import Documents
from .reference import segsum
from .state_passing import state_passing


class ChunkedSpan:
    """A span of packed tokens whose entering states are not known yet.

    x: (tokens, nheads, headdim), dt: (tokens, nheads), already discretized, A: (nheads,),
    B and C: (tokens, ngroups, d_state). All arithmetic is float32, or float64 when x is.
    """

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, documents: Documents):
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.layout = documents.chunks(chunk_size, x.device)
        self.documents = len(documents)
        self.chunk_size = chunk_size
        self.ngroups = B.shape[1]
        self.x = self._to_chunks(x).unflatten(2, (self.ngroups, -1)).permute(0, 2, 3, 1, 4)  # (c, g, r, l, p)
        self.B = self._to_chunks(B).transpose(1, 2)  # (c, g, l, n)
        self.C = self._to_chunks(C).transpose(1, 2)
        # padding has dt = 0: it neither decays the state nor adds to it
        self.dt = self._to_chunks(dt).transpose(1, 2).unflatten(1, (self.ngroups, -1))  # (c, g, r, l)
        self.log_decay = self.dt * A.to(self.dtype).view(self.ngroups, -1, 1)
        self.cumulative = self.log_decay.cumsum(-1)
        self.states = self._chunk_states()

    def _to_chunks(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.dtype)
        if self.layout.slots is not None:
            padded = tensor.new_zeros(self.layout.nchunks * self.chunk_size, *tensor.shape[1:])
            tensor = padded.index_copy(0, self.layout.slots, tensor)
        return tensor.reshape(self.layout.nchunks, self.chunk_size, *tensor.shape[1:])

    def _from_chunks(self, tensor: Tensor) -> Tensor:
        tensor = tensor.flatten(0, 1)
        return tensor if self.layout.slots is None else tensor.index_select(0, self.layout.slots)

    def _chunk_states(self) -> Tensor:
        """What each chunk adds to the state, sum_s exp(decay from s to the chunk's end) dt_s x_s B_s^T."""
        weight = torch.exp(self.cumulative[..., -1:] - self.cumulative) * self.dt
        x = (self.x * weight[..., None]).transpose(-1, -2).flatten(2, 3)  # (c, g, r p, l)
        return (x @ self.B).unflatten(2, (-1, self.x.shape[-1])).flatten(1, 2)  # (c, h, p, n)

    def _chunk_decay(self) -> Tensor:
        return torch.exp(self.cumulative[..., -1]).flatten(1)[..., None, None]  # (c, h, 1, 1)

    def leaving(self) -> tuple[Tensor, Tensor]:
        """Each document's final state when nothing enters, (documents, nheads, headdim, d_state), and its total
        decay, (documents, nheads)."""
        nothing = self.states.new_zeros(self.documents, *self.states.shape[1:])
        _, final = state_passing(self.states, self._chunk_decay(), nothing, self.layout)
        # a document's total decay is the same recurrence on the logarithms, with nothing to decay them
        total = self.cumulative[..., -1].flatten(1)
        _, total = state_passing(
            total, torch.ones_like(total), total.new_zeros(self.documents, total.shape[1]), self.layout
        )
        return final, torch.exp(total)

    def scan(self, initial_states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs, (tokens, nheads, headdim), and final states, given the states entering the documents."""
        if initial_states is None:
            initial_states = self.states.new_zeros(self.documents, *self.states.shape[1:])
        entering, final = state_passing(self.states, self._chunk_decay(), initial_states.to(self.dtype), self.layout)
        inside = (self.C @ self.B.transpose(-1, -2))[:, :, None] * torch.exp(segsum(self.log_decay))  # (c, g, r, l, s)
        y = inside @ (self.x * self.dt[..., None])
        before = entering.unflatten(1, (self.ngroups, -1))  # (c, g, r, p, n)
        y = y + (self.C[:, :, None] @ before.transpose(-1, -2)) * torch.exp(self.cumulative)[..., None]
        return self._from_chunks(y.flatten(1, 2).transpose(1, 2)), final
