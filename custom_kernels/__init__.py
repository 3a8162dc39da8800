"""Fused GPU kernels. One file per kernel, one dispatcher per operation with its plain PyTorch definition beside it."""
