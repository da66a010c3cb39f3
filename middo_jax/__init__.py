"""middo-jax: closed-loop data optimisation for LLM fine-tuning, native to JAX.

import middo_jax as middo

scores = middo.score(rows, model="./tuned", pre_model="./base", axes=("complexity", "diversity"))
chosen = middo.select(scores, complexity={"fraction": 0.05})

Names are imported when they are first used, so that `import middo_jax` takes no time and needs no JAX.
docs/python.md shows all of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from middo_jax.version import __version__

if TYPE_CHECKING:
    from middo_jax.api import export, load_config, score, select
    from middo_jax.config import Config, ConfigError
    from middo_jax.data.sources import DataError, Rejection
    from middo_jax.results import Exported, Scores, Selection
    from middo_jax.run import RunError

_MODULES = {
    "middo_jax.api": "export load_config score select",
    "middo_jax.config": "Config ConfigError",
    "middo_jax.data.sources": "DataError Rejection",
    "middo_jax.results": "Exported Scores Selection",
    "middo_jax.run": "RunError",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "Exported",
    "Rejection",
    "RunError",
    "Scores",
    "Selection",
    "__version__",
    "export",
    "load_config",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
