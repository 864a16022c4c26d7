"""examples/megatron: a run goes on under another split, and every size is a model."""

import json
import sys

import numpy as np
import pytest
import yaml

from mamba2_dist.train.indexed import write_indexed

from ..distributed import run_ranks
from ..tolerances import MEGATRON
from .megatron_example import EXAMPLE, example_losses
from .megatron_run import HAVE_EXPERTS

pytest.importorskip("megatron.core", reason="needs megatron-core")

SIZES = sorted((EXAMPLE / "sizes").glob("*.yaml"))


@pytest.fixture
def options(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 10)):
        lengths = random.integers(5, 60, count)
        tokens = random.integers(1, 60, lengths.sum()).astype(np.uint16)
        ends = lengths.cumsum()
        tokens[ends - 1] = 0
        write_indexed(folder / split, tokens, ends)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 60, "end_token": 0}))
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "mamba_num_groups": 1}
    sizes |= {"mamba_head_dim": 8, "mamba_state_dim": 8, "pattern": "M*-M", "seqlen": 32, "dtype": "fp32"}
    length = {"micro_batch": 2, "global_batch": 4, "steps": 5, "warmup_steps": 1, "lr": 0.01, "eval_batches": 1}
    return {"data": str(folder), "out": str(tmp_path / "out")} | sizes | length


def test_a_run_goes_on_under_another_split(tmp_path, options):
    (expected,) = run_ranks(1, example_losses, options | {"out": str(tmp_path / "unbroken")}, 5, False)
    (first,) = run_ranks(1, example_losses, options, 3, True)
    rest = run_ranks(2, example_losses, options | {"cp": 2}, 2, False)
    assert expected[-1] < expected[0]
    assert first == pytest.approx(expected[:3], rel=MEGATRON["training"])
    for found in rest:
        assert found == pytest.approx(expected[3:], rel=MEGATRON["training"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step-00000003"]


@pytest.mark.skipif(not HAVE_EXPERTS, reason="needs megatron-core 0.18 or newer")
def test_experts_of_one_rank_do_not_go_on_over_more(options):
    options |= {"pattern": "ME", "num_moe_experts": 2}
    run_ranks(1, example_losses, options, 1, True)
    with pytest.raises(AssertionError, match=r"ep \(2\) cannot go on from .*step-00000001, of ep 1: .* set ep to 1"):
        run_ranks(2, example_losses, options | {"ep": 2}, 1, False)


def test_batches_that_ranks_cannot_share_are_refused(options):
    with pytest.raises(AssertionError, match=r"global_batch \(3\) must be divisible by micro_batch \(2\) \* dp \(1\)"):
        run_ranks(1, example_losses, options | {"global_batch": 3}, 1, False)


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_every_size_is_a_model(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    import pretrain

    from mamba2_dist.adapters.megatron import training_flops

    config = pretrain.Config(data="", out="", **yaml.safe_load(path.read_text()))
    megatron = pretrain.megatron_config(config)
    forward = training_flops(megatron, config.pattern, 32000, config.seqlen) / 3 / config.seqlen
    # with this vocabulary, which is not the one that the sizes are called by
    parameters = {"20m": 37e6, "1_3b": 1.4e9, "2_7b": 2.9e9, "8b": 6.5e9}[path.stem]
    # two operations a parameter, and the scans and scores
    assert 2 * parameters * 0.9 < forward < 2 * parameters * 1.3


def test_flops_of_experts():
    from megatron.core.transformer import TransformerConfig

    from mamba2_dist.adapters.megatron import training_flops

    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96, mamba_head_dim=16,
        mamba_num_groups=1, num_moe_experts=8, moe_router_topk=2, add_bias_linear=False,
    )  # fmt: skip
    dense, sparse = (training_flops(config, pattern, 100, 32) for pattern in ("M", "ME"))
    assert sparse - dense == 3 * 32 * (2 * 2 * 64 * 2 * 96 + 2 * 64 * 8)
    with pytest.raises(ValueError, match="FLOPs of layers G are not known"):
        training_flops(config, "MG", 100, 32)
