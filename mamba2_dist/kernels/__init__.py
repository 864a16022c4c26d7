"""Single-device SSD, convolution and norm operators: fast implementations beside their PyTorch references."""

from pathlib import Path

_here = Path(__file__).resolve().parent
# a source checkout keeps the operators in <repository>/kernels; a wheel ships them beside this file
if not (_here / "ssd").is_dir():
    __path__.append(str(_here.parents[1] / "kernels"))
