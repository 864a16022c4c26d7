"""A hybrid under megatron-core, split in any way, trains as on one rank, and its checkpoints fit any other split."""

import dataclasses
import itertools

import pytest
import torch

from ..distributed import run_ranks
from ..tolerances import MEGATRON
from .megatron_run import HAVE_EXPERTS, Run, losses, stock_keys, written_by_stock

core = pytest.importorskip("megatron.core", reason="needs megatron-core")

PACKED = (0, 8, 20, 32)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _ranks(run: Run) -> int:
    return run.tp * run.pp * run.cp * run.dp


def _check(run: Run, bound: float = MEGATRON["training"], device: str = "cpu") -> None:
    whole = dataclasses.replace(run, tp=1, pp=1, cp=1, dp=1, ep=1, vp=None, sequence_parallel=False)
    (expected,) = run_ranks(1, losses, whole, device=device)
    assert expected[0] > 2 * expected[-1]
    for found in run_ranks(_ranks(run), losses, run, device=device):
        assert found == pytest.approx(expected, rel=bound)


SPLITS = {
    "tp2": Run(tp=2),
    "pp2": Run(pp=2),
    "cp2": Run(cp=2),
    "tp2, sequence parallel, dp2": Run(tp=2, dp=2, sequence_parallel=True),
    "tp2 pp2": Run(tp=2, pp=2),
    "cp2 tp2": Run(cp=2, tp=2),
    "one group, tp2": Run(tp=2, ngroups=1),
    "two groups, tp4, sequence parallel": Run(tp=4, sequence_parallel=True),
    "packed, cp2": Run(cp=2, documents=PACKED),
    "packed, one group, cp2 tp2, sequence parallel": Run(
        cp=2, tp=2, ngroups=1, documents=PACKED, sequence_parallel=True
    ),
    "packed, cut in zigzag whole": Run(cp=2, documents=(0, 5, 6, 23, 32), spec={"layout": "zigzag"}),
    "packed, cut into runs": Run(cp=2, documents=(0, 5, 6, 23, 32), spec={"layout": "contiguous"}),
    "distributed optimizer, dp2": Run(dp=2, distributed_optimizer=True),
    "parameters on their way, dp2": Run(dp=2, distributed_optimizer=True, bucket_size=2000),
}


@pytest.mark.parametrize("run", SPLITS.values(), ids=SPLITS)
def test_a_split_trains_as_one_rank(run):
    _check(run)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("name", ["tp2", "pp2", "cp2", "packed, cp2", "one group, tp2"])
def test_two_gpus_train_as_one(name):
    _check(SPLITS[name], bound=1e-4, device="cuda")


@pytest.mark.parametrize(
    "run", [Run(ngroups=1, distributed_optimizer=True, bucket_size=3000), Run()], ids=["distributed optimizer", "plain"]
)
def test_checkpoints_fit_another_split(tmp_path, run):
    (expected,) = run_ranks(1, losses, run)
    saved = [str(tmp_path / name) for name in ("one", "two")]
    parts = [
        (1, dataclasses.replace(run, steps=2, save=saved[0])),
        (2, dataclasses.replace(run, steps=2, tp=2, load=saved[0], save=saved[1])),
        (1, dataclasses.replace(run, steps=1, load=saved[1])),
    ]
    found = [run_ranks(ranks, losses, part)[0] for ranks, part in parts]
    assert list(itertools.chain(*found)) == pytest.approx(expected, rel=MEGATRON["checkpoint"])
    for split in ({"cp": 2}, {"pp": 2}):
        part = dataclasses.replace(run, steps=3, load=saved[0], **split)
        assert run_ranks(2, losses, part)[0] == pytest.approx(expected[2:], rel=MEGATRON["checkpoint"])


def test_a_checkpoint_of_the_stock_mixer_loads(tmp_path):
    run_ranks(1, written_by_stock, str(tmp_path / "stock"))
    (expected,) = run_ranks(1, losses, Run(steps=1))
    found = run_ranks(2, losses, Run(tp=2, steps=1, load=str(tmp_path / "stock"), optimizer_state=False))
    assert found[0] == pytest.approx(expected, rel=MEGATRON["checkpoint"])


def test_keys_are_those_of_the_stock_mixer():
    (found,) = run_ranks(1, stock_keys, Run())
    assert found == []


def test_missing_and_unknown_keys_are_named(tmp_path):
    run_ranks(1, written_by_stock, str(tmp_path / "stock"))
    for pattern, named in (("M*MM", "layers.2.mixer.dt_bias"), ("M*-", "layers.3.mixer.dt_bias")):
        run = Run(pattern=pattern, steps=1, load=str(tmp_path / "stock"), optimizer_state=False)
        with pytest.raises(AssertionError, match=f"decoder.{named}"):
            run_ranks(1, losses, run)


def test_virtual_stages():
    run = Run(pp=2, vp=2)
    if core.__version__.startswith("0.16"):
        with pytest.raises(AssertionError, match=r"virtual_pipeline_model_parallel_size \(2\) of a hybrid needs"):
            run_ranks(2, losses, run)
    else:
        _check(run)


EXPERTS = Run(
    pattern="ME*M",
    config={"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"},
)


@pytest.mark.skipif(not HAVE_EXPERTS, reason="needs megatron-core 0.18 or newer")
@pytest.mark.parametrize("split", [{"tp": 2, "sequence_parallel": True}, {"dp": 2, "ep": 2}], ids=["tp2", "ep2"])
def test_mixture_of_experts(split):
    _check(dataclasses.replace(EXPERTS, **split))


@pytest.mark.skipif(not HAVE_EXPERTS, reason="needs megatron-core 0.18 or newer")
def test_checkpoints_of_experts_fit_another_split(tmp_path):
    run = dataclasses.replace(EXPERTS, distributed_optimizer=True)
    halves = dataclasses.replace(run, dp=2, ep=2)
    (expected,) = run_ranks(1, losses, run)
    saved = [str(tmp_path / name) for name in ("one", "two")]
    run_ranks(1, losses, dataclasses.replace(run, steps=1, save=saved[0], optimizer_state=False))
    # Megatron keeps the optimizer of experts apart where ep is above 1
    part = dataclasses.replace(halves, steps=1, load=saved[0], optimizer_state=False)
    assert run_ranks(2, losses, part)[0] == pytest.approx(expected[1:2], rel=MEGATRON["checkpoint"])
    found = run_ranks(2, losses, dataclasses.replace(halves, steps=2, save=saved[1]))[0]
    part = dataclasses.replace(halves, steps=3, load=saved[1], tp=2, sequence_parallel=True)
    found += run_ranks(4, losses, part)[0]
    assert found == pytest.approx(expected, rel=MEGATRON["checkpoint"])


@pytest.mark.skipif(HAVE_EXPERTS, reason="megatron-core 0.18 has working ones")
def test_experts_that_do_not_work_are_refused():
    with pytest.raises(AssertionError, match=r"MoE layers of megatron-core 0.1\d.\d need TransformerEngine"):
        run_ranks(1, losses, EXPERTS)


FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
RECOMPUTED = {
    "every layer": Run(config={**FULL, "recompute_method": "uniform"}),
    "every layer, cp2": Run(cp=2, config={**FULL, "recompute_method": "uniform"}),
    "three layers": Run(config={**FULL, "recompute_method": "block", "recompute_num_layers": 3}),
    "attention": Run(cp=2, config={"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    "nothing": Run(spec={"recompute": "none"}),
    "inside mixers": Run(cp=2, spec={"recompute": "inner"}),
}


@pytest.mark.parametrize("run", RECOMPUTED.values(), ids=RECOMPUTED)
def test_recomputation_changes_nothing(run):
    (expected,) = run_ranks(1, losses, Run())
    assert run_ranks(run.cp, losses, run)[0] == pytest.approx(expected, rel=MEGATRON["training"])
