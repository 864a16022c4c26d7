"""The RMS norms on one GPU."""
