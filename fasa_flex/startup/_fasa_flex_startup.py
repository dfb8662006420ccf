"""Makes the command ``lm_eval --model fasa_hf`` find fasa_flex on lm-eval releases that load no plug-ins.

``fasa_flex_startup.pth`` imports this module when Python starts. All it does is place one finder on
``sys.meta_path``. When (and if) ``lm_eval.models`` is imported, the finder lets the ordinary finders load it, adds the
*name* ``fasa_hf`` to lm-eval's registry and is gone. Nothing of fasa_flex, torch or lm-eval is imported before that.

lm-eval has no registry of folders of tasks, so the packaged ones stay unknown to it without ``--include_path``; an
error that ends a process for want of one of them is followed by a line that says so.

Set ``FASA_FLEX_NO_STARTUP=1`` to switch it off. It does nothing where lm-eval reads entry points by itself
(``lm_eval.api.registry.load_plugins`` exists), and goes when such a release is the oldest supported one.
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
    """Print, behind an uncaught error of lm-eval that names a packaged task, how it is included."""
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
    """A finder that has ``lm_eval.models`` loaded as always and registers the name once it has run."""

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
