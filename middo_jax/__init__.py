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
    from middo_jax.comparing import ModelScores, score_models
    from middo_jax.config import Config, ConfigError, SettingsLike
    from middo_jax.data.in_memory import RowsLike
    from middo_jax.data.sources import DataError, Rejection
    from middo_jax.evaluation.heldout import HeldoutLoss, SourceLoss
    from middo_jax.models.hf import CheckpointError
    from middo_jax.refinement.endpoint.faults import RefinerError
    from middo_jax.results import Exported, Refined, Run, Scores, Selection, Trained
    from middo_jax.reviewing import read_review, write_review
    from middo_jax.rundir import RunError
    from middo_jax.rundir.files import DamagedFile, DiskFull
    from middo_jax.rundir.lock import RunLocked
    from middo_jax.rundir.records import PassRow, UsageRow
    from middo_jax.rundir.rows import BenchmarksFile, MetricsRow, RefinedRow, SelectionFile
    from middo_jax.selecting import load_config, select
    from middo_jax.training.checkpoint import AnotherTraining
    from middo_jax.training.memory import OutOfMemory
    from middo_jax.training.metrics import TrainingDiverged, TrainingWrecked

_MODULES = {
    "middo_jax.api": "benchmark evaluate export refine run score train",
    "middo_jax.comparing": "ModelScores score_models",
    "middo_jax.config": "Config ConfigError SettingsLike",
    "middo_jax.data.in_memory": "RowsLike",
    "middo_jax.data.sources": "DataError Rejection",
    "middo_jax.evaluation.heldout": "HeldoutLoss SourceLoss",
    "middo_jax.models.hf": "CheckpointError",
    "middo_jax.refinement.endpoint.faults": "RefinerError",
    "middo_jax.results": "Exported Refined Run Scores Selection Trained",
    "middo_jax.reviewing": "read_review write_review",
    "middo_jax.rundir": "RunError",
    "middo_jax.rundir.files": "DamagedFile DiskFull",
    "middo_jax.rundir.lock": "RunLocked",
    "middo_jax.rundir.records": "PassRow UsageRow",
    "middo_jax.rundir.rows": "BenchmarksFile MetricsRow RefinedRow SelectionFile",
    "middo_jax.selecting": "load_config select",
    "middo_jax.training.checkpoint": "AnotherTraining",
    "middo_jax.training.memory": "OutOfMemory",
    "middo_jax.training.metrics": "TrainingDiverged TrainingWrecked",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AnotherTraining",
    "BenchmarksFile",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DamagedFile",
    "DataError",
    "DiskFull",
    "Exported",
    "HeldoutLoss",
    "MetricsRow",
    "ModelScores",
    "OutOfMemory",
    "PassRow",
    "Refined",
    "RefinedRow",
    "RefinerError",
    "Rejection",
    "RowsLike",
    "Run",
    "RunError",
    "RunLocked",
    "Scores",
    "Selection",
    "SelectionFile",
    "SettingsLike",
    "SourceLoss",
    "Trained",
    "TrainingDiverged",
    "TrainingWrecked",
    "UsageRow",
    "__version__",
    "benchmark",
    "evaluate",
    "export",
    "load_config",
    "read_review",
    "refine",
    "run",
    "score",
    "score_models",
    "select",
    "train",
    "write_review",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
