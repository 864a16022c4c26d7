"""The convolution of a run of tokens in steps, two in each pass: between them the inputs before documents travel."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..common.backend import Backend, takes_triton
from ..common.checks import check_shape
from ..common.documents import Documents, Openings, check_numbers
from .causal_conv1d import causal_conv1d_split, check


class ConvSpan:
    """`causal_conv1d_split` of packed documents in steps, as only their first outputs need what precedes them:

        forward:   `outputs`, of the inputs before documents so far as they are known; `enter`, when they all are
        backward:  `initial_gradient`, the gradient of those inputs; `gradients`, all others

    Nothing here is recorded by autograd, and no step leaves anything for another.

    x: (1, tokens, at least sum(sizes)); weight: (sum(sizes), width); bias: (sum(sizes),). enters: numbers of the
    documents that something precedes, each at most once. Raises ValueError for shapes and numbers that do not fit.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        documents: Documents,
        enters: Sequence[int] | np.ndarray,
        *,
        activation: Literal["silu"] | None = None,
        backend: Backend = "auto",
    ):
        check(x, weight, bias, sizes, None, None, documents, activation)
        documents = Documents.of(documents, x.shape[1])
        check_numbers("enters", enters, len(documents))
        tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in (x, weight, bias))
        enters = np.asarray(enters, np.int64)
        self.state_shape = len(documents), weight.shape[1] - 1, weight.shape[0]
        self.steps: Any
        if takes_triton(backend, x):
            from .gpu.span import GPUSpan

            self.steps = GPUSpan(tensors, list(sizes), documents, enters, activation == "silu")
        else:
            self.steps = _InTorch(tensors, sizes, documents, enters, activation)

    def outputs(self, initial_state: Tensor) -> list[Tensor]:
        """The parts and the rest of x, as `causal_conv1d_split` has them; initial_state: (documents, width - 1,
        channels), of which `enters` may still change."""
        return self.steps.outputs(self._checked(initial_state))

    def enter(self, parts: list[Tensor], initial_state: Tensor) -> None:
        """Write those outputs again that depend on what precedes the documents `enters`."""
        self.steps.enter(parts, self._checked(initial_state))

    def initial_gradient(self, d_parts: Sequence[Tensor], initial_state: Tensor) -> Tensor:
        """The gradient of `initial_state`, zeros but for the documents `enters`."""
        return self.steps.initial_gradient(list(d_parts), self._checked(initial_state))

    def gradients(
        self, d_parts: Sequence[Tensor], d_rest: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of x, weight and bias, None where there is none."""
        return self.steps.gradients(list(d_parts), d_rest, self._checked(initial_state))

    def _checked(self, initial_state: Tensor) -> Tensor:
        check_shape("initial_state", initial_state, self.state_shape, "(documents, width - 1, channels)")
        return initial_state


class _InTorch:
    """The steps in PyTorch; autograd takes the second pass."""

    def __init__(self, tensors, sizes, documents, enters, activation):
        self.tensors, self.sizes, self.documents, self.enters = tensors, sizes, documents, enters
        self.options = {"activation": activation, "backend": "torch"}

    def _convolve(self, tensors, initial_state: Tensor, documents: Documents) -> list[Tensor]:
        x, weight, bias = tensors
        return causal_conv1d_split(
            x, weight, bias, self.sizes, initial_state=initial_state, cu_seqlens=documents, **self.options
        )

    def _first_outputs(self, initial_state: Tensor) -> list[Tensor]:
        """Of the documents `enters`, parts alone."""
        x, weight, bias = self.tensors
        first = self._openings()
        rows, states = x.index_select(1, first.token), initial_state.index_select(0, first.document)
        return self._convolve((rows, weight, bias), states, first.documents)[:-1]

    def _openings(self) -> Openings:
        x, weight, _ = self.tensors
        return self.documents.openings(self.enters, weight.shape[1] - 1, x.device)

    def outputs(self, initial_state: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self._convolve(self.tensors, initial_state, self.documents)

    def enter(self, parts: list[Tensor], initial_state: Tensor) -> None:
        token = self._openings().token
        with torch.no_grad():
            for part, rows in zip(parts, self._first_outputs(initial_state), strict=True):
                part.index_copy_(1, token, rows)

    def initial_gradient(self, d_parts: list[Tensor], initial_state: Tensor) -> Tensor:
        token, leaf = self._openings().token, initial_state.detach().requires_grad_()
        with torch.enable_grad():
            parts = self._first_outputs(leaf)
        return torch.autograd.grad(parts, leaf, [part.index_select(1, token) for part in d_parts])[0]

    def gradients(self, d_parts, d_rest, initial_state) -> tuple[Tensor | None, ...]:
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in self.tensors]
        with torch.enable_grad():
            outputs = self._convolve(leaves, initial_state, self.documents)
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(outputs, wanted, [*d_parts, d_rest]))
        return tuple(None if leaf is None else next(found) for leaf in leaves)
