"""Published models have their published sizes."""

import pytest

from mamba2_dist import HybridModel, presets

PUBLISHED = {
    "mamba2_130m": (128.99, "M" * 24),
    "mamba2_370m": (368.35, "M" * 48),
    "mamba2_780m": (780.16, "M" * 48),
    "mamba2_1_3b": (1343.76, "M" * 48),
    "mamba2_2_7b": (2702.60, "M" * 64),
    "hybrid_8b": (8654.5, "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_published_size(name):
    millions, pattern = PUBLISHED[name]
    config = presets.PRESETS[name]()
    model = HybridModel(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert config.pattern == pattern


def test_names_are_mamba_ssm_names():
    names = set(HybridModel(presets.mamba2_130m(), device="meta").state_dict())
    layer = {f"backbone.layers.0.mixer.{name}" for name in (
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight",
    )}  # fmt: skip
    outside = {"backbone.embedding.weight", "backbone.norm_f.weight"}
    assert layer | outside | {"backbone.layers.0.norm.weight"} <= names
    assert len(names) == 24 * 9 + 2
