"""``python -m fasa_flex.lm_eval ...``: the ``lm_eval`` command with ``fasa_hf`` and the packaged tasks registered.

``python -m fasa_flex.lm_eval --tasks-path`` prints the folder of the packaged tasks. This launcher works without the
start-up hook, and also as ``accelerate launch -m fasa_flex.lm_eval ...``.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from fasa_flex.lm_eval import TASKS_PATH

_SUBCOMMANDS = ("run", "ls", "validate")
_INCLUDE = "--include_path"


def with_tasks(arguments: list[str]) -> list[str]:
    """Add ``--include_path`` with the packaged tasks' folder, unless the user passes an ``--include_path``."""
    included = any(argument.split("=")[0] == _INCLUDE for argument in arguments)
    if included or not arguments or arguments == ["run"]:
        return arguments
    at = 1 if arguments[0] in _SUBCOMMANDS else 0
    if at and arguments[0] == "ls":
        at = len(arguments)  # "ls tasks" takes its options last
    return [*arguments[:at], _INCLUDE, str(TASKS_PATH), *arguments[at:]]


def main() -> None:
    """Run lm-eval's own command line."""
    if sys.argv[1:] == ["--tasks-path"]:
        print(TASKS_PATH)
        return
    if find_spec("lm_eval") is None:
        sys.exit("fasa_flex.lm_eval needs lm-eval, which is not installed: pip install 'fasa-flex[lm-eval]'")
    import lm_eval.models  # noqa: F401  fills the registry, which must come before adding a name
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "fasa_hf" not in model_registry:
        model_registry.register("fasa_hf", target="fasa_flex.lm_eval.model:FasaHFLM")
    sys.argv[1:] = with_tasks(sys.argv[1:])
    cli_evaluate()


if __name__ == "__main__":
    main()
