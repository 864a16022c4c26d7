"""FLOPs against counting, and the history of a run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mamba2_dist import AttentionConfig, HybridConfig, HybridModel, Mamba2Config
from mamba2_dist.config import MLPConfig
from mamba2_dist.train.metrics import CHUNK, History, attention_flops, flops_per_token, plot_loss, read_history


@pytest.mark.parametrize("pattern", ["M", "*", "-", "M*-M"])
def test_flops_against_torch(pattern):
    config = HybridConfig(
        pattern=pattern, d_model=64, vocab_size=96,
        mamba=Mamba2Config(d_state=16, headdim=16, ngroups=2, chunk_size=CHUNK),
        attention=AttentionConfig(head_dim=16, nheads_kv=4), mlp=MLPConfig(activation="relu2"),
    )  # fmt: skip
    model, seqlen = HybridModel(config), 2 * CHUNK
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, seqlen, dtype=torch.long))
    counted = counter.get_total_flops()
    ours = seqlen * flops_per_token(config) + attention_flops(config, [[0, seqlen]])
    # torch counts whole squares of scores, we the causal half; it does not count the convolution's products
    halves = seqlen * CHUNK * (2 * 16 + 128) * pattern.count("M")
    diagonal = 4 * pattern.count("*") * 64 * seqlen / 2
    halves += (attention_flops(config, [[0, seqlen]]) - diagonal) - diagonal if "*" in pattern else 0
    convolution = seqlen * 2 * 4 * (128 + 64) * pattern.count("M")
    assert ours + halves - convolution == pytest.approx(counted, rel=1e-6)


def test_documents_need_less_attention():
    config = HybridConfig(pattern="*", d_model=64, vocab_size=96)
    assert attention_flops(config, [[0, 50, 100]]) < attention_flops(config, [[0, 100]])
    assert attention_flops(config, [[0, 100]] * 2) == 2 * attention_flops(config, [[0, 100]])


def test_history_forgets_what_is_done_again(tmp_path):
    history = History(tmp_path, 0)
    for step in range(1, 6):
        history.add(step=step, loss=1.0 / step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3, 4, 5]
    History(tmp_path, 3).add(step=4, loss=9.0)
    assert [row["loss"] for row in read_history(tmp_path)] == [1.0, 0.5, 1 / 3, 9.0]
    assert plot_loss(tmp_path).stat().st_size > 1000
