"""Make the repository's `evals` importable, behind the installed package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
