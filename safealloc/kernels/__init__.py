"""Kernels: they take tensors and layouts that were checked, and know no pool."""
