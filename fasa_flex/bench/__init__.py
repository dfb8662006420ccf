"""Time and memory of dense attention and FASA, for one attention call and for a whole decode step.

``python -m fasa_flex.bench`` measures; `fasa_flex.bench.limits` computes limits from counted bytes.
"""
