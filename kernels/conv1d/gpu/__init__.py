"""The convolution on one GPU."""
