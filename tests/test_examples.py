"""Every example is a configuration that is not refused."""

from pathlib import Path

import pytest

from mamba2_dist.cli import parse
from mamba2_dist.train.config import TrainConfig

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    config = parse(TrainConfig, "train", [str(path)], with_file=True)
    assert config != TrainConfig()
