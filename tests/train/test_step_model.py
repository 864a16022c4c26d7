"""The modelled step against whole models as they were measured, and against its parts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mamba2_dist import AttentionConfig, HybridConfig, HybridModel, Mamba2Config, ParallelConfig
from mamba2_dist.config import MLPConfig
from mamba2_dist.parallel.cost_model import H200, SLOWER, Link, exchange_time
from mamba2_dist.train.config import DataConfig, TrainConfig
from mamba2_dist.train.step_model import Sizes, choose_layout, model_step, parameter_counts

ROOT = Path(__file__).parents[2]


def _config(**changes) -> TrainConfig:
    split = {
        name: changes.pop(name) for name in ("tp", "cp", "dp", "layout", "sharding", "attention") if name in changes
    }
    settled = {
        "preset": "mamba2_2_7b", "data": DataConfig(seqlen=changes.pop("seqlen", 65536)), "global_batch": 1,
        "compile": True, "parallel": ParallelConfig(**split),
    }  # fmt: skip
    return TrainConfig(**(settled | changes))


def _measured(name: str) -> tuple[TrainConfig, dict]:
    from mamba2_dist.cli import parse

    rows = json.loads((ROOT / "benchmarks" / "results" / "pretrain-h200.json").read_text())["rows"]
    row = next(row for row in rows if row["case"].startswith(name) and row["what"] == "tokens/s")
    return parse(TrainConfig, "train", [str(ROOT / f"examples/{name}.yaml"), "micro_batch=4"], with_file=True), row


@pytest.mark.parametrize("name", ["mamba2_1_3b", "hybrid_1_3b"])
def test_measured_training(name):
    """Whole models on an H200, which no constant was fitted to."""
    config, row = _measured(name)
    step = model_step(config, "all_gather", H200)
    assert step.exposed_s == 0
    assert step.tokens / step.seconds == pytest.approx(row["ours"], rel=0.06)
    assert step.memory_bytes / 2**30 == pytest.approx(row["peak_GiB"], rel=0.05)


@pytest.mark.parametrize("seqlen", [2**20, 2**21])
def test_measured_long_sequences(seqlen):
    """In parts over two H200s; no constant was fitted to them either."""
    from mamba2_dist.cli import parse

    rows = json.loads((ROOT / "benchmarks" / "results" / "exchange-h200.json").read_text())["rows"]
    row = next(row for row in rows if row["what"] == "long context" and f"{seqlen:,} tokens" in row["case"])
    keys = [f"data.seqlen={seqlen}", f"parts={seqlen // 2**16}", f"recompute={'none' if seqlen == 2**20 else 'inner'}"]
    config = parse(TrainConfig, "train", [str(ROOT / "examples/mamba2_1_3b_long.yaml"), *keys], with_file=True)
    step = model_step(config, "all_gather", H200)
    assert step.tokens / step.seconds == pytest.approx(row["ours"] / 2, rel=0.05)
    assert step.memory_bytes / 2**30 == pytest.approx(row["peak_GiB"], rel=0.05)


def test_states_hide_behind_the_last_product_of_z():
    """Backward the second of its gradient; forward there is one, which ends before they travel."""
    config = _config(cp=8)
    window = 8192 * 2 * 2560 * 5120 / H200.matmul_flops
    state, decay = 4 * 80 * 64 * 128, 4 * 80
    slow = replace(H200, all_gather=Link(3 * window, 1e15))
    forward = exchange_time("all_gather", 8, 1, 1, state, slow, decay_bytes=decay)
    backward = exchange_time("all_gather", 8, 1, 1, state, slow)
    step = model_step(config, "all_gather", slow)
    assert step.exchange_s == pytest.approx(64 * (forward + backward))
    assert step.exposed["states"] == pytest.approx(64 * (forward + backward - window))
    exposed = model_step(config, "all_gather", H200).exposed
    forward = exchange_time("all_gather", 8, 1, 1, state, H200, decay_bytes=decay)
    assert exposed["states"] == pytest.approx(64 * forward)
    assert exposed["halo"] == exposed["keys"] == exposed["tensor"] == exposed["imbalance"] == 0


def test_between_nodes_products_of_z_leave_processors_to_states():
    """And are slower, forward one and backward two."""
    config = _config(cp=16, seqlen=16 * 8192)
    window = 8192 * 2 * 2560 * 5120 / H200.matmul_flops
    for latency in (0.5 * window, 3 * window):
        slow = replace(H200, rail=Link(latency, 1e15))
        forward, backward = (
            exchange_time("hierarchical", 16, 2, 1, 4 * 80 * 64 * 128, slow, decay_bytes=bytes) for bytes in (320, 0)
        )
        exposed = model_step(config, "hierarchical", slow).exposed["states"]
        slower = SLOWER * window
        beyond = max(forward - slower, 0) + max(backward - 2 * slower, 0)
        assert exposed == pytest.approx(64 * (3 * (slower - window) + beyond))
    # more tokens: the exchange may as well follow the product
    config = _config(cp=16, seqlen=16 * 65536)
    forward = exchange_time("hierarchical", 16, 2, 1, 4 * 80 * 64 * 128, H200, decay_bytes=320)
    assert model_step(config, "hierarchical", H200).exposed["states"] == pytest.approx(64 * forward)


def test_the_halo_hides_behind_the_convolution():
    """Forward two passes over the channels, backward three."""
    row = (5120 + 256) * 2
    one_pass = 8192 * row / H200.memory_bytes_per_s
    slow = replace(H200, node=Link(4 * one_pass, 1e30))
    assert model_step(_config(cp=8), "all_gather", slow).exposed["halo"] == pytest.approx(64 * 3 * one_pass)
    # three rows of x, B and C
    narrow = replace(H200, node=Link(1e-30, 3 * row / (4 * one_pass)))
    assert model_step(_config(cp=8), "all_gather", narrow).exposed["halo"] == pytest.approx(64 * 3 * one_pass)


def test_what_tensor_parallelism_divides():
    whole, halves = model_step(_config(), "all_gather", H200), model_step(_config(tp=2), "all_gather", H200)
    assert halves.exposed["tensor"] > 0
    # all but the norms of the residual stream
    norms = 65 * 65536 * 28 * 2560 / H200.memory_bytes_per_s
    assert halves.compute_s == pytest.approx((whole.compute_s - norms) / 2 + norms)
    spread = replace(_config(), parallel=ParallelConfig(tp=2, sequence_parallel=True))
    assert model_step(spread, "all_gather", H200).compute_s == pytest.approx(whole.compute_s / 2)


def test_parameters_are_counted_by_the_model():
    config = _config().architecture
    model = HybridModel(config, device="meta")
    assert sum(parameter_counts(config, 1)) == sum(parameter.numel() for parameter in model.parameters())
    assert len(parameter_counts(config, 2)) == 65
    with pytest.raises(ValueError, match="divisible by tp"):
        parameter_counts(config, 3)


def test_memory_of_a_split():
    """Parameters, gradients and moments are shared by the data group under FSDP and are whole under DDP."""
    count = 2_702_599_680
    sharded, whole = (
        model_step(_config(cp=8, sharding=sharding), "sliced", H200).memory_bytes for sharding in ("fsdp", "ddp")
    )
    outside = 50288 * 2560 + 2560
    layer = (count - outside) / 64
    expected = 22 * count - (16 * count / 8 + 8 * (outside + layer) + 2 * outside)
    assert whole - sharded == pytest.approx(expected, rel=1e-6)
    state = 4 * 80 * 64 * 128
    gathered = model_step(_config(cp=8), "all_gather", H200).memory_bytes
    assert gathered - sharded == pytest.approx(state * (8 - 3))


def test_gathered_keys_are_a_part_of_the_heads_but_at_least_one():
    """What more ranks add: one head's keys and values of all tokens, three times, once that is above 1 GiB."""
    memory = {
        cp: model_step(
            _config(preset="hybrid_8b", cp=cp, seqlen=8192 * cp, sharding="ddp"), "sliced", H200
        ).memory_bytes
        for cp in (512, 1024, 2048)
    }
    head = 2 * 128 * 2 * 8192
    assert memory[2048] - memory[1024] == pytest.approx(3 * 1024 * head)
    assert memory[1024] - memory[512] == pytest.approx(3 * 512 * head)


def test_parts():
    """One more forward pass of all but the last; the memory of one, and the states between them."""
    one, whole, cut = (
        model_step(_config(cp=8, seqlen=seqlen, parts=parts), "sliced", H200)
        for seqlen, parts in ((2**19, 1), (2**22, 1), (2**22, 8))
    )
    assert cut.tokens == whole.tokens == 8 * one.tokens
    assert cut.compute_s == pytest.approx((8 + 7 / 3) * one.compute_s)
    assert cut.exchange_s == pytest.approx((8 + 7 / 2) * one.exchange_s)
    assert cut.memory_bytes == pytest.approx(one.memory_bytes + 7 * 64 * 4 * 80 * 64 * 128)


def test_kept_activations_are_what_a_layer_was_measured_to_keep():
    """GiB at 8 x 4096 tokens beside the input, docs/layer.md."""
    from mamba2_dist.train.step_model import _kept

    for recompute, measured in (("none", 1.60), ("conv", 1.27), ("inner", 0.65)):
        config = _config(seqlen=32768, recompute=recompute)
        stream = 32768 * 6 * 2560
        assert (_kept(Sizes(config, H200), "M") - stream) / 2**30 == pytest.approx(measured, abs=0.01)


HYBRID = HybridConfig(
    pattern="M-M*", d_model=2048, vocab_size=4096, mamba=Mamba2Config(), mlp=MLPConfig(d_ff=8192),
    attention=AttentionConfig(head_dim=128, nheads_kv=4),
)  # fmt: skip


def test_layout():
    pure = _config(cp=64, seqlen=64 * 65536)
    assert choose_layout(pure, H200, "all_gather").parallel.layout == "contiguous"
    asked = _config(cp=64, layout="zigzag", seqlen=64 * 65536)
    assert choose_layout(asked, H200).parallel.layout == "zigzag"
    # long sequences: the last rank's attention; short shards of many ranks: the second state of each
    hybrid = _config(preset=None, model=HYBRID, cp=64, seqlen=64 * 8192)
    assert choose_layout(hybrid, H200, "hierarchical").parallel.layout == "zigzag"
    # data groups that fill nodes in part
    small = _config(preset=None, model=HYBRID, cp=2, dp=5, seqlen=2 * 65536, global_batch=5)
    assert choose_layout(small, H200).parallel.layout in ("contiguous", "zigzag")
    for tp, cp in ((1, 12), (6, 4), (3, 8)):  # the last two fill nodes, but a tp group lies on two of them
        uneven = _config(preset=None, model=HYBRID, tp=tp, cp=cp, seqlen=cp * 8192)
        assert choose_layout(uneven, H200).parallel.layout == "zigzag"
    short = _config(preset=None, model=HYBRID, cp=64, seqlen=64 * 16)
    assert choose_layout(short, H200, "all_gather").parallel.layout == "contiguous"
    serial = replace(short, parallel=replace(short.parallel, state_scan="serial_exact"))
    assert choose_layout(serial, H200).parallel.layout == "zigzag"


def test_imbalance_is_the_last_ranks_attention():
    config = _config(preset=None, model=HYBRID, cp=4, seqlen=4096, layout="contiguous", attention="all_gather")
    table = model_step(config, "sliced", H200)
    # query t sees t + 1 keys
    pairs = torch.arange(1, 4097).view(4, -1).sum(1)
    excess = (pairs[-1] / pairs.float().mean() - 1).item()
    scores = 3 * 4 * 2048 * pairs.float().mean().item() / (0.5 * H200.matmul_flops)
    assert table.exposed["imbalance"] == pytest.approx(excess * scores, rel=1e-3)
    assert (
        model_step(replace(config, parallel=ParallelConfig(cp=4, layout="zigzag")), "sliced", H200).exposed["imbalance"]
        == 0
    )


def test_parameters_hide_behind_compute():
    """The root's are gathered before anything else; the rest shows where there is little to compute."""
    long, short = (model_step(_config(cp=8, seqlen=8 * n), "sliced", H200).exposed["parameters"] for n in (8192, 256))
    outside = 4 * (50288 * 2560 + 2560) * 7 / 8
    assert long == pytest.approx(H200.all_gather.latency_s + 6 * H200.node_step_s + outside / 264e9)
    assert short > 5 * long
    assert model_step(_config(cp=8, sharding="ddp"), "sliced", H200).exposed["parameters"] == 0
