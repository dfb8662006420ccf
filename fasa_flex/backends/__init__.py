"""Ways to attend to the selected keys: flex, gather, Triton's kernels, and dense attention by groups."""
