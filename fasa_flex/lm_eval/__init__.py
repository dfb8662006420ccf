"""lm-evaluation-harness with sparse attention: the model ``fasa_hf``, packaged tasks, and a launcher.

``lm_eval --model fasa_hf --model_args pretrained=...,profile=...,n_fac=256`` works once the package is installed;
``python -m fasa_flex.lm_eval`` takes the same arguments and also finds the packaged tasks.
"""

from pathlib import Path

TASKS_PATH = Path(__file__).parent / "tasks"
"""Folder of the packaged tasks, for ``--include_path`` or ``TaskManager(include_path=...)``."""
