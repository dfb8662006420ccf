"""fasa_flex: frequency-aware sparse attention (FASA, ICLR 2026) in PyTorch, compiled through flex_attention.

A name is imported when it is first asked for, so that ``fasa-flex --help`` waits for neither torch nor transformers.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasa_flex.agreement import contextual_agreement
    from fasa_flex.attention import fasa_attention
    from fasa_flex.cache import CacheSize, FasaCache
    from fasa_flex.calibration import calibrate
    from fasa_flex.config import FasaConfig
    from fasa_flex.handle import Fasa
    from fasa_flex.profile import FasaProfile
    from fasa_flex.rotary import RotaryLayout
    from fasa_flex.scoring import Scorer, SequenceScorer
    from fasa_flex.transformers import enable

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
    "CacheSize": "cache",
    "Fasa": "handle",
    "FasaCache": "cache",
    "FasaConfig": "config",
    "FasaProfile": "profile",
    "RotaryLayout": "rotary",
    "Scorer": "scoring",
    "SequenceScorer": "scoring",
    "calibrate": "calibration",
    "contextual_agreement": "agreement",
    "enable": "transformers",
    "fasa_attention": "attention",
}


try:
    __version__ = version(__name__)
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
