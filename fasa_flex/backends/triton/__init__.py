"""The Triton backend: which calls it serves, and its operators over `fasa_flex.backends.triton.kernels`."""
