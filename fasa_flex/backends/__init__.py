"""Backends that compute attention to the selected keys (flex, gather, Triton kernels), and grouped dense attention."""
