"""The stages of a round: functions from files to files, called by the loop and by the commands.

A stage reads the files of earlier stages in a round's folder, writes its own files, and only then records
itself in the manifest. So every stage can be killed and started again.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from middo_jax.stages.batch import batch_stage
    from middo_jax.stages.benchmark import benchmark_stage, check_benchmarks, measure_benchmarks
    from middo_jax.stages.checks import (
        check_attention,
        check_continues,
        check_judge,
        check_own_texts,
        check_refiner,
        check_training,
    )
    from middo_jax.stages.controls import refine_arm
    from middo_jax.stages.endpoint import recorded_line
    from middo_jax.stages.evaluate import HeldOut, export_adapter, export_checkpoint, measure_heldout
    from middo_jax.stages.merge import merge_stage, merged
    from middo_jax.stages.refine import (
        check_learnt,
        follow_refinement,
        kept_samples,
        plan_refinement,
        refine_round,
        refine_stage,
    )
    from middo_jax.stages.review import outcomes_of, read_review, waits_for_review, write_review
    from middo_jax.stages.score import check_embedder, score_stage, scoring
    from middo_jax.stages.scored_before import found_scores, kept_scores
    from middo_jax.stages.select import select_stage
    from middo_jax.stages.surroundings import answer_cache, check_cache, save_answers
    from middo_jax.stages.taking_back import take_back_stage
    from middo_jax.stages.train import count_steps, remove_training, train_stage

# Imported on first use: all stages but `select` import JAX, and `select` must run without it.
_MODULES = {
    "batch": "batch_stage",
    "benchmark": "benchmark_stage check_benchmarks measure_benchmarks",
    "checks": "check_attention check_continues check_judge check_own_texts check_refiner check_training",
    "controls": "refine_arm",
    "endpoint": "recorded_line",
    "evaluate": "HeldOut export_adapter export_checkpoint measure_heldout",
    "merge": "merge_stage merged",
    "refine": "check_learnt follow_refinement kept_samples plan_refinement refine_round refine_stage",
    "review": "outcomes_of read_review waits_for_review write_review",
    "score": "check_embedder score_stage scoring",
    "scored_before": "kept_scores found_scores",
    "select": "select_stage",
    "surroundings": "answer_cache check_cache save_answers",
    "taking_back": "take_back_stage",
    "train": "count_steps remove_training train_stage",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "HeldOut",
    "answer_cache",
    "batch_stage",
    "benchmark_stage",
    "check_attention",
    "check_benchmarks",
    "check_cache",
    "check_continues",
    "check_embedder",
    "check_judge",
    "check_learnt",
    "check_own_texts",
    "check_refiner",
    "check_training",
    "count_steps",
    "export_adapter",
    "export_checkpoint",
    "follow_refinement",
    "found_scores",
    "kept_samples",
    "kept_scores",
    "measure_benchmarks",
    "measure_heldout",
    "merge_stage",
    "merged",
    "outcomes_of",
    "plan_refinement",
    "read_review",
    "recorded_line",
    "refine_arm",
    "refine_round",
    "refine_stage",
    "remove_training",
    "save_answers",
    "score_stage",
    "scoring",
    "select_stage",
    "take_back_stage",
    "train_stage",
    "waits_for_review",
    "write_review",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
