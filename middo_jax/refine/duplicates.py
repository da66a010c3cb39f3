"""Candidates that repeat a known sample, exactly or nearly, or one another. Pure functions.

An equal id is an equal conversation; near-duplicates are told by their prompts, see overlap.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from middo_jax.data.example import Example
from middo_jax.refine.overlap import Overlaps, jaccard, shingles
from middo_jax.refine.rewrite import Outcome


def reject_duplicates(examples: Iterable[Example], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes in their order, with a child that equals an example or an earlier child rejected.

    To be called before outcomes are written down, with everything that a child must not repeat, held-out
    examples too.
    """
    known = {example.id for example in examples}
    kept = []
    for outcome in outcomes:
        if outcome.example is not None:
            if outcome.example.id in known:
                outcome = outcome.rejected(f"duplicate: equals {outcome.example.id}")
            else:
                known.add(outcome.example.id)
        kept.append(outcome)
    return kept


def reject_near_duplicates(
    training: Iterable[Example], heldout: Iterable[Example], outcomes: Sequence[Outcome], threshold: float
) -> list[Outcome]:
    """Outcomes in their order, with a child whose prompt nearly repeats a known one rejected.

    A rewrite may be like its original, which it replaces, and like another sample as much as its original
    was: where many ask about one long text, all their prompts are alike. Held-out prompts it may not be like.

    Args:
      training: the dataset; read once, so that it may be streamed.
      heldout: what must stay unseen.
      outcomes: as `rewrite.run` gives them.
      threshold: see `Overlaps`.
    """
    children = [(place, outcome) for place, outcome in enumerate(outcomes) if outcome.example is not None]
    index, worst = Overlaps(threshold), dict[int, tuple[float, str]]()
    for _, outcome in children:
        index.add(outcome.example.prompt if outcome.example else "")
    for name, known, is_training in (("", training, True), ("held-out ", heldout, False)):
        for example in known:
            for number, overlap in index.matches(example.prompt):
                place, outcome = children[number]
                source = outcome.task.source
                replaces = is_training and outcome.task.op != "synthesize"
                if replaces and jaccard(shingles(source.prompt), shingles(example.prompt)) >= overlap:
                    continue
                if place not in worst or overlap > worst[place][0]:
                    worst[place] = overlap, f"duplicate: {overlap:.2f} like {name}{example.id}"
    return [o.rejected(worst[place][1]) if place in worst else o for place, o in enumerate(outcomes)]


def reject_alike(accepted: Iterable[Example], outcomes: Sequence[Outcome], threshold: float) -> list[Outcome]:
    """Outcomes in their order, with a child rejected that is nearly like one accepted before it.

    To be called last, so that no child stands in another's way that is itself not accepted.

    Args:
      accepted: children of earlier attempts.
      outcomes: of this one.
      threshold: see `Overlaps`.
    """
    index, ids, kept = Overlaps(threshold), list[str](), []

    def take_up(example: Example) -> None:
        index.add(example.prompt)
        ids.append(example.id)

    for example in accepted:
        take_up(example)
    for outcome in outcomes:
        if outcome.example is not None:
            found = max(index.matches(outcome.example.prompt), key=lambda match: match[1], default=None)
            if found is None:
                take_up(outcome.example)
            else:
                outcome = outcome.rejected(f"duplicate: {found[1]:.2f} like {ids[found[0]]}")
        kept.append(outcome)
    return kept
