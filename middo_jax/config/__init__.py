"""Every setting of the program: one frozen tree of small classes, validated when it is read.

A setting's unit and reason stand in its description. `load()` reads YAML, applies `a.b=c` overrides and
answers an unknown key with the nearest valid name.
"""

from middo_jax.config.base import ConfigError, Settings
from middo_jax.config.reading import load, setting_names
from middo_jax.config.refine import GateSettings, Prices, RefineSettings
from middo_jax.config.settings import (
    AdaptedMatrix,
    ComplexitySettings,
    Config,
    DataSettings,
    DiversitySettings,
    LoraSettings,
    MeshSettings,
    ModelSettings,
    QualitySettings,
    ScoringSettings,
    ServeSettings,
    Threshold,
    TrainSettings,
)

__all__ = [
    "AdaptedMatrix",
    "ComplexitySettings",
    "Config",
    "ConfigError",
    "DataSettings",
    "DiversitySettings",
    "GateSettings",
    "LoraSettings",
    "MeshSettings",
    "ModelSettings",
    "Prices",
    "QualitySettings",
    "RefineSettings",
    "ScoringSettings",
    "ServeSettings",
    "Settings",
    "Threshold",
    "TrainSettings",
    "load",
    "setting_names",
]
