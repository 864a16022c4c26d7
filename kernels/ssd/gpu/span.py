"""The SSD operator in four steps, by the kernels; see `..span`."""

import torch
from torch import Tensor

from .backward import Gradients, WholeBackward, backward
from .forward import Swept, forward, leaving_documents, sweep_spans
from .problem import aligned, make_problem


class GPUSpan:
    def __init__(self, tensors, offsets, edges, dt_softplus, dt_limit, whole):
        x, dt, A, B, C, self.D, dt_bias = tensors
        self.problem = make_problem(x, dt, A, B, C, dt_bias, dt_softplus, dt_limit, offsets, *edges, whole)
        self.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        self.enters, self.leaves = map(len, edges)
        self.swept: Swept | None = None
        self.back: WholeBackward | None = None

    def leaving(self) -> tuple[Tensor, Tensor]:
        problem = self.problem
        self.swept = sweep_spans(problem, problem.x, problem.B, problem.table.leads)
        state, log_decay = leaving_documents(problem, self.swept, self.leaves)
        return state, torch.exp(log_decay)

    def outputs(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        y, _, _, kept = forward(self.problem, self.D, None, entering, 0, True, self.swept)
        return y, entering.new_empty(0) if kept is None else kept

    def entering_gradient(self, dy: Tensor) -> Tensor:
        problem = self.problem
        rows = aligned(dy.to(problem.x.dtype))
        self.swept = sweep_spans(problem, rows, problem.C, problem.table.trails, reverse=True)
        return leaving_documents(problem, self.swept, self.enters)[0]

    def outputs_and_left(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        y, left, _, _ = forward(self.problem, self.D, None, entering, self.leaves, False)
        return y, left

    def left_again(self, dy: Tensor, entering: Tensor) -> Tensor:
        self.back = WholeBackward(self.problem, self.D, dy)
        return self.back.ahead(entering, self.leaves)

    def whole_entering_gradient(self, d_leaving: Tensor) -> Tensor:
        assert self.back is not None, "states come first"
        return self.back.back(d_leaving, self.enters)

    def whole_gradients(self) -> tuple[Tensor | None, ...]:
        assert self.back is not None, "states come first"
        return self._in_their_dtypes(self.back.gradients())

    def gradients(self, dy, entering, d_leaving, kept=None) -> tuple[Tensor | None, ...]:
        kept = kept if kept is not None and kept.numel() else None
        made = backward(self.problem, self.D, entering, kept, dy, d_leaving, d_swept=self.swept, wants_d_initial=False)
        return self._in_their_dtypes(made)

    def _in_their_dtypes(self, made: Gradients) -> tuple[Tensor | None, ...]:
        found = (made.dx, made.ddt, made.dA, made.dB, made.dC, made.dD, made.ddt_bias)
        pairs = zip(found, self.dtypes, strict=True)
        return tuple(None if dtype is None or tensor is None else tensor.to(dtype) for tensor, dtype in pairs)
