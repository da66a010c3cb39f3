"""Merges outcomes into the dataset: replacements in place, additions at the end. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from middo_jax.data.example import Example
from middo_jax.refinement.tasks import Outcome


def merge(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> list[Example]:
    """D_{t+1} = (D_t minus replaced) + replacements + additions.

    A replacement takes the place of its original; additions follow in the order of their cores. The result
    does not depend on the order of the outcomes, and len(result) == len(examples) + accepted additions.

    Raises:
      ValueError: the original of an accepted outcome is not in the dataset, two outcomes replace or extend
        the same sample, or ids would repeat (which the gate `duplicate` rejects).
    """
    replacements: dict[str, Example] = {}
    additions: dict[str, Example] = {}
    known = {example.id for example in examples}
    for outcome in outcomes:
        if outcome.example is None:
            continue
        source_id = outcome.task.original.id
        children = additions if outcome.task.op == "synthesize" else replacements
        if source_id not in known or source_id in children:
            fault = "is not in the dataset" if source_id not in known else "was already refined"
            raise ValueError(
                f"{outcome.task.task_id}: {source_id} {fault}; refine this round's dataset again"
            )
        children[source_id] = outcome.example
    merged = [replacements.get(example.id, example) for example in examples]
    merged += [additions[example.id] for example in examples if example.id in additions]
    if len({example.id for example in merged}) < len(merged):
        raise ValueError(
            "the merged dataset would contain an example twice: refine this round's dataset again"
        )
    return merged
