"""Registers ``fasa_hf`` for the command ``lm_eval`` on lm-eval releases that load no plug-ins.

``fasa_flex_startup.pth`` imports this module when Python starts. The module adds one finder to ``sys.meta_path``. When
``lm_eval.models`` is imported, the finder lets the other finders load it, adds the *name* ``fasa_hf`` to lm-eval's
registry and removes itself. Nothing of fasa_flex, torch or lm-eval is imported before that.

lm-eval has no registry of task folders, so it does not find the packaged tasks without ``--include_path``. If an
uncaught error names a packaged task, this module prints how to include it.

``FASA_FLEX_NO_STARTUP=1`` switches it off. It does nothing on releases of lm-eval that read entry points
(``lm_eval.api.registry.load_plugins`` exists); remove it when these are the oldest supported ones.
"""

import os
import sys

_HOOKED = "lm_eval.models"
_NAME, _TARGET = "fasa_hf", "fasa_flex.lm_eval.model:FasaHFLM"


def _register():
    from lm_eval.api import registry

    if not hasattr(registry, "load_plugins") and _NAME not in registry.model_registry:
        registry.model_registry.register(_NAME, target=_TARGET)


def _lead_to_tasks():
    """After an uncaught error that names a packaged task, print how to include it."""
    former = sys.excepthook
    if getattr(former, "leads_to_tasks", False):
        return

    def excepthook(kind, error, trace):
        former(kind, error, trace)
        if issubclass(kind, (KeyError, ValueError)):
            from fasa_flex.lm_eval import TASKS_PATH

            named = set(str(error).replace("'", " ").replace(",", " ").split())
            missing = sorted(named & {path.stem for path in TASKS_PATH.glob("*.yaml")})
            if missing:
                print(
                    f"fasa_flex: lm_eval by itself does not know packaged tasks ({', '.join(missing)}); add "
                    '--include_path "$(python -m fasa_flex.lm_eval --tasks-path)", or run python -m fasa_flex.lm_eval.',
                    file=sys.stderr,
                )

    excepthook.leads_to_tasks = True
    sys.excepthook = excepthook


class _AfterImport:
    """A finder that registers ``fasa_hf`` after the other finders have loaded ``lm_eval.models``."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "lm_eval":
            _lead_to_tasks()
        if fullname != _HOOKED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                _register()

            spec.loader.exec_module = run_and_register
        return spec


if not os.environ.get("FASA_FLEX_NO_STARTUP"):
    sys.meta_path.insert(0, _AfterImport())
