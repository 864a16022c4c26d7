"""Published models by name. Sizes: arXiv 2405.21060, table 10, and arXiv 2406.07887, table 6 with its layer pattern."""

from mamba2_dist.config import AttentionConfig, HybridConfig, Mamba2Config, MLPConfig


def _mamba2(layers: int, d_model: int) -> HybridConfig:
    return HybridConfig(pattern="M" * layers, d_model=d_model, vocab_size=50288)


def mamba2_130m() -> HybridConfig:
    """128.99M parameters."""
    return _mamba2(24, 768)


def mamba2_370m() -> HybridConfig:
    """368.35M parameters."""
    return _mamba2(48, 1024)


def mamba2_780m() -> HybridConfig:
    """780.16M parameters."""
    return _mamba2(48, 1536)


def mamba2_1_3b() -> HybridConfig:
    """1343.76M parameters."""
    return _mamba2(48, 2048)


def mamba2_2_7b() -> HybridConfig:
    """2702.60M parameters."""
    return _mamba2(64, 2560)


def hybrid_8b() -> HybridConfig:
    """8.65B parameters: 24 Mamba-2, 4 attention and 28 MLP layers, no position embedding."""
    return HybridConfig(
        pattern="M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
        d_model=4096,
        vocab_size=256000,
        tie_embeddings=False,
        mamba=Mamba2Config(ngroups=8, chunk_size=128),
        attention=AttentionConfig(nheads=32, head_dim=128, nheads_kv=8),
        mlp=MLPConfig(d_ff=16384, activation="gelu"),
    )


PRESETS = {
    preset.__name__: preset for preset in (mamba2_130m, mamba2_370m, mamba2_780m, mamba2_1_3b, mamba2_2_7b, hybrid_8b)
}
