"""Another implementation with the same weights, loaded by name, gives the same logits."""

import pytest
import torch

from mamba2_dist import HybridConfig, HybridModel, Mamba2Config

from ..tolerances import LOGITS_FP32, assert_close

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("n_groups", [1, 2])
def test_mamba2_for_causal_lm(n_groups):
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=96, hidden_size=64, num_hidden_layers=3, state_size=16, head_dim=16, num_heads=8,
            n_groups=n_groups, expand=2, conv_kernel=4, chunk_size=16, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = HybridModel(
        HybridConfig(
            pattern="MMM", d_model=64, vocab_size=96, tie_embeddings=False,
            mamba=Mamba2Config(d_state=16, headdim=16, ngroups=n_groups, chunk_size=8),
        )
    )  # fmt: skip
    weights = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    tokens = torch.randint(0, 96, (2, 75))
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, LOGITS_FP32)
