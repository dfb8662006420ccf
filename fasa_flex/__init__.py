"""fasa_flex: frequency-aware sparse attention (FASA, ICLR 2026) in PyTorch, compiled through flex_attention."""

from fasa_flex.agreement import contextual_agreement
from fasa_flex.attention import fasa_attention
from fasa_flex.cache import CacheSize, FasaCache
from fasa_flex.calibration import calibrate
from fasa_flex.config import FasaConfig
from fasa_flex.profile import FasaProfile
from fasa_flex.rotary import RotaryLayout
from fasa_flex.transformers import enable

__all__ = [
    "CacheSize",
    "FasaCache",
    "FasaConfig",
    "FasaProfile",
    "RotaryLayout",
    "calibrate",
    "contextual_agreement",
    "enable",
    "fasa_attention",
]
