"""Installs <repository>/kernels/* as mamba2_dist.kernels.*; on PyPI the name `kernels` belongs to another project."""

from pathlib import Path

from setuptools import find_packages, setup

kernels = find_packages("kernels")

train = [
    "tokenizers>=0.20",
    "jsonargparse>=4.35",
    "docstring-parser>=0.16",
    "tensorboard>=2.15",
    "matplotlib>=3.8",
    "tqdm>=4.66",
]
# its checkpoints ask for psutil without saying so
megatron = ["megatron-core>=0.16.1", "psutil>=5.9"]
test = [
    *train,
    *megatron,
    "setuptools>=68",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "transformers>=4.46",
]
deepspeed = ["deepspeed>=0.16"]
hf = ["transformers>=4.46", "safetensors>=0.4"]
lint = ["ruff==0.17.6", "codespell==2.4.3", "mypy==2.4.1"]

setup(
    name="mamba2-dist",
    version="0.1.0",
    description="Tensor- and sequence-parallel Mamba-2 and hybrid language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Triton comes with PyTorch's CUDA builds for Linux; its CPU builds lack it
    install_requires=["torch>=2.8", "numpy>=1.26", "triton>=3.4; sys_platform == 'linux'"],
    extras_require={
        "train": train,
        "test": test,
        "lint": lint,
        "megatron": megatron,
        "deepspeed": deepspeed,
        "hf": hf,
    },
    entry_points={"console_scripts": ["mamba2-dist=mamba2_dist.cli:main"]},
    packages=find_packages(include=["mamba2_dist", "mamba2_dist.*"])
    + [f"mamba2_dist.kernels.{name}" for name in kernels],
    package_dir={f"mamba2_dist.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in kernels},
)
