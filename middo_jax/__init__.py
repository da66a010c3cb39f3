"""middo-jax: closed-loop data optimisation for LLM fine-tuning, native to JAX.

import middo_jax as middo

scores = middo.score(rows, model="./tuned", pre_model="./base", axes=("complexity", "diversity"))
chosen = middo.select(scores, complexity={"fraction": 0.05})

Names are imported on first use, so `import middo_jax` is fast and does not load JAX. docs/python.md describes
all of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from middo_jax.version import __version__

if TYPE_CHECKING:
    from middo_jax.api import benchmark, evaluate, export, refine, run, score, train
    from middo_jax.config import Config, ConfigError
    from middo_jax.data.sources import DataError, Rejection
    from middo_jax.evaluation.heldout import HeldoutLoss
    from middo_jax.results import Exported, Refined, Run, Scores, Selection, Trained
    from middo_jax.rundir import RunError
    from middo_jax.selecting import load_config, select

_MODULES = {
    "middo_jax.api": "benchmark evaluate export refine run score train",
    "middo_jax.config": "Config ConfigError",
    "middo_jax.data.sources": "DataError Rejection",
    "middo_jax.evaluation.heldout": "HeldoutLoss",
    "middo_jax.results": "Exported Refined Run Scores Selection Trained",
    "middo_jax.rundir": "RunError",
    "middo_jax.selecting": "load_config select",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "Exported",
    "HeldoutLoss",
    "Refined",
    "Rejection",
    "Run",
    "RunError",
    "Scores",
    "Selection",
    "Trained",
    "__version__",
    "benchmark",
    "evaluate",
    "export",
    "load_config",
    "refine",
    "run",
    "score",
    "select",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
