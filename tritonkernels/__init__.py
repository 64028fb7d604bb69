"""Triton kernels of the streaming passes: addresses in tables, no policy, no torch."""
