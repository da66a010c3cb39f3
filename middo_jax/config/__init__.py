"""All settings of the program: one frozen tree of small classes, validated when it is read.

A setting's description gives its unit and reason. Its mark, `Affects`, lists what changes with it. `load()`
reads YAML and applies `a.b=c` overrides. For an unknown key its error suggests the nearest valid name; for a
renamed key it gives the new name.
"""

from middo_jax.config.axes import (
    ComplexitySettings,
    Deviations,
    DiversitySettings,
    ExpectedRating,
    Fraction,
    QualitySettings,
    SampledRating,
    Threshold,
)
from middo_jax.config.base import (
    GIVEN,
    RESULTLESS,
    Affects,
    AnyOf,
    ConfigError,
    Contains,
    Effect,
    Settings,
)
from middo_jax.config.effects import Leaf, affecting, default_of, leaves
from middo_jax.config.reading import SettingsLike, layers_of, load, stored
from middo_jax.config.refine import (
    Dollars,
    GateSettings,
    Prices,
    RefineSettings,
    RequestRate,
    TokenRate,
    Tokens,
    replayed_file,
)
from middo_jax.config.renamed import RENAMED
from middo_jax.config.settings import (
    Config,
    DataSettings,
    HostsSettings,
    MeshSettings,
    ModelSettings,
    ScoringSettings,
    ServeSettings,
)
from middo_jax.config.stopping import Control, StopSettings
from middo_jax.config.training import (
    Adafactor,
    AdamW,
    AdaptedMatrix,
    BadSteps,
    LoraSettings,
    TrainSettings,
    WandB,
)
from middo_jax.config.unions import OneOf, members_of, union_of

__all__ = [
    "GIVEN",
    "RENAMED",
    "RESULTLESS",
    "Adafactor",
    "AdamW",
    "AdaptedMatrix",
    "Affects",
    "AnyOf",
    "BadSteps",
    "ComplexitySettings",
    "Config",
    "ConfigError",
    "Contains",
    "Control",
    "DataSettings",
    "Deviations",
    "DiversitySettings",
    "Dollars",
    "Effect",
    "ExpectedRating",
    "Fraction",
    "GateSettings",
    "HostsSettings",
    "Leaf",
    "LoraSettings",
    "MeshSettings",
    "ModelSettings",
    "OneOf",
    "Prices",
    "QualitySettings",
    "RefineSettings",
    "RequestRate",
    "SampledRating",
    "ScoringSettings",
    "ServeSettings",
    "Settings",
    "SettingsLike",
    "StopSettings",
    "Threshold",
    "TokenRate",
    "Tokens",
    "TrainSettings",
    "WandB",
    "affecting",
    "default_of",
    "layers_of",
    "leaves",
    "load",
    "members_of",
    "replayed_file",
    "stored",
    "union_of",
]
