"""Every setting of the program: one frozen tree of small classes, validated when it is read.

A setting's description gives its unit and reason; its mark, `Affects`, gives what changes with it. `load()`
reads YAML, applies `a.b=c` overrides and answers an unknown key with the nearest valid name.
"""

from middo_jax.config.base import RESULTLESS, Affects, ConfigError, Effect, Settings
from middo_jax.config.effects import affecting, default_of, flat, marks
from middo_jax.config.reading import SettingsLike, layers_of, load, setting_names, stored
from middo_jax.config.refine import GateSettings, Prices, RefineSettings
from middo_jax.config.settings import (
    AdaptedMatrix,
    ComplexitySettings,
    Config,
    DataSettings,
    DiversitySettings,
    HostsSettings,
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
    "RESULTLESS",
    "AdaptedMatrix",
    "Affects",
    "ComplexitySettings",
    "Config",
    "ConfigError",
    "DataSettings",
    "DiversitySettings",
    "Effect",
    "GateSettings",
    "HostsSettings",
    "LoraSettings",
    "MeshSettings",
    "ModelSettings",
    "Prices",
    "QualitySettings",
    "RefineSettings",
    "ScoringSettings",
    "ServeSettings",
    "Settings",
    "SettingsLike",
    "Threshold",
    "TrainSettings",
    "affecting",
    "default_of",
    "flat",
    "layers_of",
    "load",
    "marks",
    "setting_names",
    "stored",
]
