"""What is known of a batch on the host is worked out once, for however many layers."""

from collections import Counter

import pytest
import torch
from mamba2_dist.kernels.common import documents

from mamba2_dist import AttentionConfig, HybridConfig, HybridModel, Mamba2Config, ParallelConfig, SegmentTable
from mamba2_dist.parallel import attention_mask, exchange, halo, segments, serial_conv

from ..calls import noted_calls
from ..distributed import run_ranks
from ..splits import groups_of

KINDS = (
    segments.LocalSegments,
    documents.Documents,
    documents.Openings,
    halo.HaloPlan,
    exchange._Chain,
    attention_mask.Sight,
)
MODULES = (segments, documents, halo, exchange, attention_mask, serial_conv)
MADE = [*((kind, "__init__") for kind in KINDS), *((module, "to_device") for module in MODULES)]


def _made(pattern: str, scan: str, steps: int) -> Counter:
    config = HybridConfig(
        pattern=pattern, d_model=16, vocab_size=32, mamba=Mamba2Config(d_state=6, headdim=4, chunk_size=5),
        attention=AttentionConfig(head_dim=4),
    )  # fmt: skip
    model = HybridModel(config, groups_of(1, 2), ParallelConfig(cp=2, state_scan=scan))
    table = SegmentTable.zigzag(24, 2, documents=[[0, 3, 24], [0, 24]])
    tokens = torch.randint(0, 32, (2, 12))
    with noted_calls(*MADE) as calls:
        for _ in range(steps):
            model(tokens, tokens, table).sum().backward()
    return Counter(calls)


def _compare(scan: str) -> tuple[Counter, Counter]:
    return _made("M*", scan, 1), _made("M*M*M*", scan, 2)


@pytest.mark.parametrize("scan", ["all_gather", "serial_exact"])
def test_once_for_all_layers(scan):
    for once, often in run_ranks(2, _compare, scan):
        assert len(once) > 5
        assert once == often
