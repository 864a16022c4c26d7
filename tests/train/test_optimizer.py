"""Which parameters decay, and the learning rate of every step."""

import pytest

from mamba2_dist import HybridModel
from mamba2_dist.config import HybridConfig
from mamba2_dist.train.config import OptimizerConfig, ScheduleConfig
from mamba2_dist.train.optimizer import learning_rate, make_optimizer


def test_vectors_do_not_decay():
    model = HybridModel(HybridConfig(pattern="M*-", d_model=64, vocab_size=64))
    still = {id(p) for group in make_optimizer(model, OptimizerConfig()).param_groups if not group["weight_decay"]
             for p in group["params"]}  # fmt: skip
    names = {name.split(".")[-2] + "." + name.split(".")[-1] for name, p in model.named_parameters() if id(p) in still}
    assert names == {"mixer.A_log", "mixer.dt_bias", "mixer.D", "norm.weight", "norm_f.weight", "conv1d.bias"}


def test_cosine():
    config = ScheduleConfig(shape="cosine", warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate(step, 110, 2.0, config) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * 0.55, rel=0.02)
    assert rates[-1] == pytest.approx(0.2)


def test_wsd():
    config = ScheduleConfig(shape="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0)
    rates = [learning_rate(step, 100, 1.0, config) for step in range(100)]
    assert rates[9:80] == [1.0] * 71
    assert rates[89] == pytest.approx(0.5)
    assert rates[-1] == 0.0
