"""megatron-core's training code on a machine without a GPU, where it asks for one by name."""

import contextlib
import functools
import gc
import multiprocessing
import types
from collections.abc import Iterator
from unittest import mock

import torch

CPU = torch.device("cpu")
FACTORIES = "tensor zeros ones empty full arange rand randn zeros_like ones_like empty_like full_like as_tensor"


class _Stream:
    """What waits for nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def wait_stream(self, stream):
        pass

    wait_event = wait_stream

    def synchronize(self):
        pass

    def record_event(self, *args):
        return self


def _on_cpu(make):
    @functools.wraps(make)
    def call(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return call


def _cuda_type(tensor, *args, **kwargs):
    kind = _type(tensor, *args, **kwargs)
    # Megatron's optimizers know parameters by the name of their type on a GPU
    return kind.replace("torch.", "torch.cuda.", 1) if isinstance(kind, str) and "cuda" not in kind else kind


_type = torch.Tensor.type


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Inside, CUDA's names mean the CPU; nothing changes where there is a GPU."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import random

    cuda = {
        "current_device": lambda: CPU,
        "synchronize": lambda *a, **k: None,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,
        "Stream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": _Stream,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in FACTORIES.split():
            stack.enter_context(mock.patch.object(torch, name, _on_cpu(getattr(torch, name))))
        for name, value in (("cuda", lambda tensor, *a, **k: tensor), ("type", _cuda_type)):
            stack.enter_context(mock.patch.object(torch.Tensor, name, value))
        states = {
            "_get_cuda_rng_state": lambda *a, **k: torch.get_rng_state(),
            "_set_cuda_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        }
        for name, value in states.items():
            stack.enter_context(mock.patch.object(random, name, value))
        for name in ("range_push", "range_pop"):
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name))
        yield


_sizes: tuple[int | None, ...] | None = None


def initialize(tp: int, pp: int, cp: int, ep: int = 1, vp: int | None = None) -> None:
    """Megatron's groups, made again only where these change: gloo's groups stay with the process."""
    from megatron.core import parallel_state, tensor_parallel

    global _sizes
    if _sizes != (tp, pp, cp, ep, vp):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp, pp, vp, context_parallel_size=cp, expert_model_parallel_size=ep)
        _sizes = tp, pp, cp, ep, vp
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


@contextlib.contextmanager
def writers_are_processes() -> Iterator[None]:
    """Megatron's checkpoints are written by processes, which a rank of these tests may not start."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):
        yield
    filesystem_async._results_queue = None  # the process behind it ends with its last reference
    gc.collect()


@contextlib.contextmanager
def parameters_come_late() -> Iterator[None]:
    """Inside, parameters that Megatron gathers on the way come when they are waited for, and never otherwise."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

    gather = Buckets.start_param_sync

    def start(buckets, force_sync=False):
        def arrive():
            buckets.param_gather_handle = None
            gather(buckets, force_sync=True)

        if force_sync or not buckets.ddp_config.overlap_param_gather:
            gather(buckets, force_sync)
        else:
            buckets.param_gather_handle = types.SimpleNamespace(wait=arrive)
            buckets.param_gather_dispatched = True

    with mock.patch.object(Buckets, "start_param_sync", start):
        yield
