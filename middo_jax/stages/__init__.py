"""The stages of a round, each a function from files to files; the loop and the commands both call them.

A stage reads what earlier ones left in a round's folder, writes its own files, and only then records itself
in the manifest. So any of them can be killed and started again.
"""

from middo_jax.stages.batch import BatchState, batch_stage
from middo_jax.stages.checks import check_continues, check_refiner, check_training
from middo_jax.stages.evaluate import HeldOut, export_adapter, export_checkpoint, measure_heldout
from middo_jax.stages.refine import merge_stage, merged, plan_refinement, refine_round, refine_stage
from middo_jax.stages.score import Scored, check_embedder, measure, score_stage, select_stage
from middo_jax.stages.surroundings import answer_cache, heldout_of
from middo_jax.stages.train import remove_training, train_stage

__all__ = [
    "BatchState",
    "HeldOut",
    "Scored",
    "answer_cache",
    "batch_stage",
    "check_continues",
    "check_embedder",
    "check_refiner",
    "check_training",
    "export_adapter",
    "export_checkpoint",
    "heldout_of",
    "measure",
    "measure_heldout",
    "merge_stage",
    "merged",
    "plan_refinement",
    "refine_round",
    "refine_stage",
    "remove_training",
    "score_stage",
    "select_stage",
    "train_stage",
]
