"""fasa_flex: frequency-aware sparse attention (FASA, ICLR 2026) in PyTorch, compiled through flex_attention.

The first access to a name imports its module, so that ``fasa-flex --help`` waits for neither torch nor transformers.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fasa_flex.former_names import FormerNames

if TYPE_CHECKING:
    from fasa_flex.backends.attention import fasa_attention
    from fasa_flex.caches.fasa_cache import CacheSize, FasaCache
    from fasa_flex.calibration.agreement import contextual_agreement
    from fasa_flex.calibration.from_texts import calibrate
    from fasa_flex.calibration.profile import FasaProfile
    from fasa_flex.calibration.rotary import RotaryLayout
    from fasa_flex.core.config import FasaConfig
    from fasa_flex.core.scoring import Scorer, SequenceScorer
    from fasa_flex.model.enable import enable
    from fasa_flex.model.handle import Fasa

__all__ = [
    "CacheSize",
    "Fasa",
    "FasaCache",
    "FasaConfig",
    "FasaProfile",
    "RotaryLayout",
    "Scorer",
    "SequenceScorer",
    "__version__",
    "calibrate",
    "contextual_agreement",
    "enable",
    "fasa_attention",
]

_HOMES = {
    "CacheSize": "caches.fasa_cache",
    "Fasa": "model.handle",
    "FasaCache": "caches.fasa_cache",
    "FasaConfig": "core.config",
    "FasaProfile": "calibration.profile",
    "RotaryLayout": "calibration.rotary",
    "Scorer": "core.scoring",
    "SequenceScorer": "core.scoring",
    "calibrate": "calibration.from_texts",
    "contextual_agreement": "calibration.agreement",
    "enable": "model.enable",
    "fasa_attention": "backends.attention",
}


try:
    __version__ = version(__name__)
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
    sys.meta_path.append(FormerNames())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
