"""A whole model on a GPU against float64 on the CPU, documents, zigzag and FlexAttention included."""

import itertools
import subprocess
import sys

import pytest
import torch

from mamba2_dist import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    Mamba2Config,
    Mamba2Mixer,
    SegmentTable,
    backward_in_parts,
)
from mamba2_dist.parallel.segments import rows_between

from ..tolerances import EXACT, MODEL, assert_close

pytestmark = pytest.mark.gpu

CONFIG = HybridConfig(
    pattern="M*-M",
    d_model=128,
    vocab_size=512,
    mamba=Mamba2Config(d_state=32, headdim=32, ngroups=2, chunk_size=64),
    attention=AttentionConfig(head_dim=32, nheads_kv=2, rope_theta=1e4),
)
SEQLEN, DOCUMENTS = 300, [[0, 1, 130, 300], [0, 300]]


def _losses_and_gradients(device: str, dtype: torch.dtype, table: SegmentTable, autocast: bool):
    model = HybridModel(CONFIG, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 512, (2, SEQLEN), generator=generator).to(device) for _ in range(2))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        losses = model(table.shard(tokens, 0), table.shard(labels, 0), table)
    losses.sum().backward()
    whole = torch.empty(2, SEQLEN, dtype=losses.dtype)
    whole[:, table.local(0).positions] = losses.detach().cpu()
    return {"losses": whole, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_against_float64(layout, packed, autocast):
    documents = DOCUMENTS if packed else [[0, SEQLEN]] * 2
    table = getattr(SegmentTable, layout)(SEQLEN, 1, documents=documents)
    expected = _losses_and_gradients("cpu", torch.float64, table, False)
    actual = _losses_and_gradients("cuda", torch.float32, table, autocast)
    bound = MODEL[torch.bfloat16 if autocast else torch.float32]
    assert_close(actual.pop("losses"), expected.pop("losses"), bound, "losses")
    if not autocast:
        for name, tensor in expected.items():
            assert_close(actual[name], tensor, bound, name)
    assert_close(*(torch.cat([g.cpu().flatten() for g in grads.values()]) for grads in (actual, expected)), bound)


def _in_batches(
    device: str, dtype: torch.dtype, layout: str, cuts: list[int], recompute: str = "none", whole: bool = False
):
    """As above, in batches that go on where the last one stopped; whole: as parts of one sequence."""
    config = HybridConfig(**{**vars(CONFIG), "pattern": "M-M"})
    model = HybridModel(config, recompute=recompute, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 512, (2, SEQLEN), generator=generator).to(device) for _ in range(2))
    edges, parts = list(itertools.pairwise(cuts)), {}

    def loss(index, memory):
        start, end = edges[index]
        table = getattr(SegmentTable, layout)(end - start, 1, **rows_between(DOCUMENTS, start, end))
        losses = model(table.shard(tokens[:, start:end], 0), table.shard(labels[:, start:end], 0), table, memory)
        parts[index] = torch.empty(2, end - start, dtype=losses.dtype)
        parts[index][:, table.local(0).positions] = losses.detach().cpu()
        return losses.sum()

    memory = model.new_memory(2)
    if whole:
        backward_in_parts(loss, len(edges), memory)
    else:
        for index in range(len(edges)):
            loss(index, memory).backward()
    losses = torch.cat([parts[index] for index in range(len(edges))], 1)
    return {"losses": losses, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_carried_states_against_float64(layout):
    """In the last case batches are shorter than the convolution's reach."""
    uncut = _in_batches("cpu", torch.float64, "contiguous", [0, SEQLEN])["losses"]
    for cuts in ([0, 130, 170, SEQLEN], [0, 100, 102, 103, SEQLEN]):
        expected = _in_batches("cpu", torch.float64, "contiguous", cuts)
        assert_close(expected["losses"], uncut, EXACT)
        actual = _in_batches("cuda", torch.float32, layout, cuts)
        for name, tensor in expected.items():
            assert_close(actual[name], tensor, MODEL[torch.float32], name)
        for recompute in ("conv", "inner"):
            again = _in_batches("cuda", torch.float32, layout, cuts, recompute)
            assert all(torch.equal(again[name], tensor) for name, tensor in actual.items())


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("recompute", ["none", "inner"])
def test_parts_against_float64(layout, recompute):
    expected = _in_batches("cpu", torch.float64, "contiguous", [0, SEQLEN])
    for cuts in ([0, 130, 170, SEQLEN], [0, 100, 102, 103, SEQLEN]):
        actual = _in_batches("cuda", torch.float32, layout, cuts, recompute, whole=True)
        for name, tensor in expected.items():
            assert_close(actual[name], tensor, MODEL[torch.float32], name)


def test_recompute_gives_the_same_bits_in_less_memory():
    table = SegmentTable.contiguous(8192, 1, documents=[[0, 700, 8192]])
    u = torch.randn(1, 8192, 512, device="cuda", dtype=torch.bfloat16)
    expected, memory = None, []
    for recompute in ("none", "conv", "inner"):
        mixer = Mamba2Mixer(Mamba2Config(), 512, recompute=recompute, device="cuda", dtype=torch.bfloat16)
        x = u.clone().requires_grad_()
        before = torch.cuda.memory_allocated()
        y = mixer(x, table)
        memory.append(torch.cuda.memory_allocated() - before)
        results = [y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], torch.ones_like(y))]
        expected = results if expected is None else expected
        assert all(map(torch.equal, results, expected))
    inner = 8192 * 1024 * 2  # bytes of z or x or y, to what the allocator rounds
    assert memory[0] - memory[1] >= 0.9 * inner
    assert memory[1] - memory[2] >= 1.8 * inner


def test_a_default_device_changes_no_parameter():
    with torch.device("cuda"):
        model = HybridModel(CONFIG)
    for actual, expected in zip(model.parameters(), HybridModel(CONFIG).parameters(), strict=True):
        assert actual.is_cuda
        assert torch.equal(actual.cpu(), expected)


def test_labels_out_of_range_stop_the_device():
    script = (
        "from tests.models.test_gpu import *\n"
        "tokens = torch.zeros(1, 8, dtype=torch.long, device='cuda')\n"
        "HybridModel(CONFIG, device='cuda')(tokens, tokens - 1)\n"
        "torch.cuda.synchronize()"
    )
    # a process of its own, as it can use its GPU no more
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr
