"""The depthwise causal convolution before the SSD operator."""

from .causal_conv1d import causal_conv1d, causal_conv1d_split
from .reference import causal_conv1d_reference
from .span import ConvSpan

__all__ = ["ConvSpan", "causal_conv1d", "causal_conv1d_reference", "causal_conv1d_split"]
