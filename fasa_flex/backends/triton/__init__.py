"""The Triton backend: checks of the calls that it serves, operators, and their kernels."""
