"""SSD kernels in Triton: one pass over a span forward, two sweeps and products within chunks backward."""
