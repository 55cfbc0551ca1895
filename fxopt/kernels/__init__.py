"""Triton kernels, generated: source for one spec at a time, launch configurations, offline compilation."""
