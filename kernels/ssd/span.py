"""The SSD operator over a run of tokens in four steps, two in each pass: between them states come from elsewhere."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.backend import Backend, takes_triton
from ..common.documents import Documents, check_numbers
from ..common.transfer import to_device
from .chunked import ChunkedSpan
from .combined import check, check_sizes
from .reference import discretize, skip

Numbers = Sequence[int] | np.ndarray


class _Span:
    """Packed documents, the states that enter some of them and those that others leave.

    x: (1, tokens, nheads, headdim), dt: (1, tokens, nheads), B, C: (1, tokens, ngroups, d_state); the rest as in
    `mamba_chunk_scan_combined`. enters, leaves: numbers of the documents that states enter, and of those whose states
    are asked for; each at most once. Raises ValueError for shapes and numbers that do not fit.
    """

    whole = False

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        documents: Documents,
        enters: Numbers,
        leaves: Numbers,
        *,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        backend: Backend = "auto",
    ):
        check(x, dt, A, B, C, chunk_size, D, None, dt_bias, None, documents, dt_limit)
        documents = Documents.of(documents, x.shape[1])
        for name, numbers in (("enters", enters), ("leaves", leaves)):
            check_numbers(name, numbers, len(documents))
        tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in (x, dt, A, B, C, D, dt_bias))
        self.steps: Any
        if takes_triton(backend, x, lambda: check_sizes(x, B)):
            from .gpu.span import GPUSpan

            edges = _on_host(enters), _on_host(leaves)
            self.steps = GPUSpan(tensors, documents.on_host, edges, dt_softplus, dt_limit, self.whole)
        else:
            edges = to_device(_on_host(enters), x.device), to_device(_on_host(leaves), x.device)
            self.steps = _InTorch(tensors, chunk_size, documents, edges, dt_softplus, dt_limit)


class SSDSpan(_Span):
    """The operator in four steps, two in each pass, so that every span may begin before any state has come:

        forward:   `leaving`, then `outputs`, of the states that enter
        backward:  `entering_gradient`, then `gradients`, of the gradients of the states that were left

    Nothing here is recorded by autograd. The steps of one pass share their work if one object takes both; each pass may
    have its own object. Arguments as in `_Span`.
    """

    def leaving(self) -> tuple[Tensor, Tensor]:
        """What the documents `leaves` leave when nothing enters, (leaves, nheads, headdim, d_state), and the share of
        an entering state that they leave, (leaves, nheads); float32 or wider."""
        return self.steps.leaving()

    def outputs(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        """y like x, given the states that enter, (enters, nheads, headdim, d_state), and what `gradients` can use."""
        return self.steps.outputs(entering)

    def entering_gradient(self, dy: Tensor) -> Tensor:
        """The gradient of the states that enter when nothing follows, (enters, nheads, headdim, d_state)."""
        return self.steps.entering_gradient(dy)

    def gradients(
        self, dy: Tensor, entering: Tensor, d_leaving: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, dt, A, B, C, D and dt_bias, None for those that are None.

        d_leaving: of the states left, (leaves, nheads, headdim, d_state), with what entered among them; kept: the
        second result of `outputs`, if there is one.
        """
        return self.steps.gradients(dy, entering, d_leaving, kept)


class SerialSpan(_Span):
    """The operator with states handed on: kernels that had all tokens would give the same bits, if their documents were
    cut at chunks of 128 tokens.

        forward:   `forward`, from the states that enter to those that are left
        backward:  `left_again`, the same states as the backward pass has them; `back`, from the gradients of the
                   states left to those of the states that enter; `gradients`

    Nothing here is recorded by autograd. Each pass has an object of its own. Arguments as in `_Span`.
    """

    whole = True

    def forward(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        """y like x, and (leaves, nheads, headdim, d_state), given (enters, nheads, headdim, d_state)."""
        return self.steps.outputs_and_left(entering)

    def left_again(self, dy: Tensor, entering: Tensor) -> Tensor:
        """(leaves, nheads, headdim, d_state), given what enters as the span before has it in this pass."""
        return self.steps.left_again(dy, entering)

    def back(self, d_leaving: Tensor) -> Tensor:
        """(enters, nheads, headdim, d_state), given (leaves, nheads, headdim, d_state)."""
        return self.steps.whole_entering_gradient(d_leaving)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of x, dt, A, B, C, D and dt_bias, None for those that are None."""
        return self.steps.whole_gradients()


class _InTorch:
    """The steps in PyTorch; autograd takes the second pass."""

    def __init__(self, tensors, chunk_size, documents, edges, dt_softplus, dt_limit):
        self.chunk_size, self.documents, self.edges = chunk_size, documents, edges
        self.step_options = dt_softplus, dt_limit
        self.leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
        self.span: ChunkedSpan | None = None

    def _span(self) -> ChunkedSpan:
        if self.span is None:
            x, dt, A, B, C, _, dt_bias = self.leaves
            dt = discretize(dt, dt_bias, *self.step_options)
            flat = [tensor.flatten(0, 1) for tensor in (x, dt, B, C)]
            self.span = ChunkedSpan(flat[0], flat[1], A, flat[2], flat[3], self.chunk_size, self.documents)
        return self.span

    def _scan(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        x, D = self.leaves[0], self.leaves[5]
        initial = entering.new_zeros(len(self.documents), *entering.shape[1:]).index_copy(0, self.edges[0], entering)
        y, final = self._span().scan(initial)
        y = y.view(x.shape)
        return (y if D is None else y + skip(x, D)).to(x.dtype), final[self.edges[1]]

    def _state(self, count: int) -> Tensor:
        x, B = self.leaves[0], self.leaves[3]
        return x.new_zeros(count, *x.shape[2:], B.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))

    def _autocast_off(self):
        return torch.autocast(self.leaves[0].device.type, enabled=False)

    def leaving(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self._autocast_off():
            state, decay = self._span().leaving()
        return state[self.edges[1]], decay[self.edges[1]]

    def outputs(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self._autocast_off():
            return self._scan(entering)[0], entering.new_empty(0)

    def entering_gradient(self, dy: Tensor) -> Tensor:
        with torch.enable_grad(), self._autocast_off():
            # outputs are linear in what enters: anything may, here nothing
            entering = self._state(len(self.edges[0])).requires_grad_()
            y, _ = self._scan(entering)
            return torch.autograd.grad(y, entering, dy, retain_graph=True)[0]

    def outputs_and_left(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self._autocast_off():
            return self._scan(entering)

    def left_again(self, dy: Tensor, entering: Tensor) -> Tensor:
        with torch.enable_grad(), self._autocast_off():
            self.entering, self.dy = entering.detach().requires_grad_(), dy
            self.y, self.left = self._scan(self.entering)
        return self.left.detach()

    def whole_entering_gradient(self, d_leaving: Tensor) -> Tensor:
        wanted = [self.entering, *(leaf for leaf in self.leaves if leaf is not None)]
        with self._autocast_off():
            d_entering, *self.found = torch.autograd.grad(
                [self.y, self.left], wanted, [self.dy, d_leaving], materialize_grads=True
            )
        return d_entering

    def whole_gradients(self) -> tuple[Tensor | None, ...]:
        found = iter(self.found)
        return tuple(None if leaf is None else next(found) for leaf in self.leaves)

    def gradients(self, dy, entering, d_leaving, kept=None) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), self._autocast_off():
            y, left = self._scan(entering)
            wanted = [leaf for leaf in self.leaves if leaf is not None]
            found = iter(torch.autograd.grad([y, left], wanted, [dy, d_leaving], materialize_grads=True))
        return tuple(None if leaf is None else next(found) for leaf in self.leaves)


def _on_host(numbers: Numbers) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.int64, device="cpu")
