"""The convolution in steps, by the kernels; see `..span`."""

from dataclasses import replace

import torch
from torch import Tensor

from .ops import add_shares, convolve, convolve_back, copy_rest, make_problem, new_parts, new_state_gradient
from .table import lay_out_openings


class GPUSpan:
    def __init__(self, tensors, sizes, documents, enters, silu):
        self.x, weight, bias = tensors
        self.sizes, self.silu = sizes, silu
        self.problem = make_problem(self.x, weight, bias, documents.on_host, None, None, sizes, 0)
        table = lay_out_openings(documents.on_host, enters, weight.shape[1], self.x.device)
        self.openings = replace(self.problem, table=table)

    def outputs(self, initial_state: Tensor) -> list[Tensor]:
        parts = new_parts(self.x, self.sizes)
        convolve(self.problem, initial_state.contiguous(), self.silu, parts)
        return [*parts[: len(self.sizes)], copy_rest(self.x, self.sizes)]

    def enter(self, parts: list[Tensor], initial_state: Tensor) -> None:
        convolve(self.openings, initial_state.contiguous(), self.silu, parts)

    def initial_gradient(self, d_parts: list[Tensor], initial_state: Tensor) -> Tensor:
        d_state = new_state_gradient(initial_state, self.x)
        self._back(self.openings, d_parts, initial_state, d_state)
        return d_state.to(initial_state.dtype)

    def gradients(
        self, d_parts: list[Tensor], d_rest: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        unread = initial_state.new_empty(initial_state.shape, dtype=torch.float32)
        dx, shares = self._back(self.problem, d_parts, initial_state, unread)
        dx[..., sum(self.sizes) :].copy_(d_rest)
        return dx, *add_shares(self.problem, shares)

    def _back(self, problem, d_parts, initial_state, d_state) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        return dx, convolve_back(problem, initial_state.contiguous(), self.silu, d_parts, dx, d_state)
