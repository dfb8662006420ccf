"""How fast and how large: dense attention and FASA side by side, as one attention call and as a whole decode step.

``python -m fasa_flex.bench`` measures; `fasa_flex.bench.limits` holds the arithmetic that says what to expect.
"""
