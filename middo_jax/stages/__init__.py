"""The stages of a round, each a function from files to files; the loop and the commands both call them.

A stage reads what earlier ones left in a round's folder, writes its own files, and only then enters itself in
the manifest. So any of them can be killed and started again.
"""

from middo_jax.stages.batch import BatchState, batch_stage
from middo_jax.stages.evaluate import HeldOut, export_adapter, export_checkpoint, measure_heldout
from middo_jax.stages.refine import merge_stage, plan_refinement, refine_stage
from middo_jax.stages.score import AXES, score_stage, select_stage
from middo_jax.stages.train import train_stage

__all__ = [
    "AXES",
    "BatchState",
    "HeldOut",
    "batch_stage",
    "export_adapter",
    "export_checkpoint",
    "measure_heldout",
    "merge_stage",
    "plan_refinement",
    "refine_stage",
    "score_stage",
    "select_stage",
    "train_stage",
]
