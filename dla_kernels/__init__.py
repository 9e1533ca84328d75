"""Functional kernels of dynamic layer attention on tensors."""
