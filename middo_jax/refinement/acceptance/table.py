"""The checks of the gates, and how they are applied in order.

The rows of the table are in `config.gates`, since settings and reports are derived from them too. A gate of
your own:

    def polite(candidate: Candidate, minimum: float) -> Finding | None:
        return None if candidate.response.count("please") >= minimum else Finding("not polite")

    row = Gate("polite", needs="answer", accept="sane", of="all", title="polite", rule="...",
               feedback={"": "It was rude."}, switch=Switch(1.0, ge=0))
    register(row, polite)      # from now on refine.gates.polite=2 is a setting
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from middo_jax.config import Config, GateSettings, RefineSettings
from middo_jax.config import gates as rows
from middo_jax.config.refine import declare, withdraw
from middo_jax.refinement.acceptance import measured, text
from middo_jax.refinement.acceptance.agreement import agrees
from middo_jax.refinement.acceptance.candidate import Candidate, Check, Finding
from middo_jax.refinement.tasks import Verdict

_USERS = (RefineSettings, Config)  # the groups that contain the gates' settings, innermost first


def _duplicate(candidate: Candidate, _: Any) -> Finding | None:
    return None if candidate.repeats is None else Finding(candidate.repeats)


_CHECKS: dict[str, Check] = {
    "readable": text.readable,
    "sane": text.sane,
    "numbers": text.numbers,
    "code": text.code,
    "language": text.language,
    "answer_readable": text.answer_readable,
    "answer_sane": text.answer_sane,
    "answer_language": text.answer_language,
    "agreement": agrees,
    "length": measured.length,
    "context": measured.context,
    "information": measured.information,
    "ending": measured.ending,
    "floor": measured.floor,
    "loss": measured.loss,
    "coverage": measured.coverage,
    "novelty": measured.novelty,
    "distribution": measured.distribution,
    "quality": measured.quality,
    "duplicate": _duplicate,
}


def register(row: rows.Gate, check: Check) -> None:
    """Adds a gate: its row after the rows of the same phase, its setting, and its check.

    Raises:
      ValueError: a gate of that name exists.
    """
    rows.enter(row)
    _CHECKS[row.name] = check
    declare([row], _USERS)


def unregister(name: str) -> None:
    """Removes a gate.

    Raises:
      KeyError: there is no gate of that name.
    """
    rows.strike(name)
    del _CHECKS[name]
    withdraw(name, _USERS)


def asked(
    needs: rows.Needs, axes: Collection[str], settings: RefineSettings, *, refines_itself: bool = False
) -> list[rows.Gate]:
    """The gates of one phase that a rewrite for these axes must pass, in order; see `Gate.concerns`."""
    values = settings.gates.values()
    return [
        row
        for row in rows.gates()
        if row.needs == needs
        and row.concerns(axes, refines_itself=refines_itself)
        and row.is_shut(settings.accept, values)
    ]


def is_asked(name: str, settings: RefineSettings) -> bool:
    """Whether a gate runs on the rewrites that it is for."""
    return rows.gate(name).is_shut(settings.accept, settings.gates.values())


def first_verdict(candidate: Candidate, needs: rows.Needs, settings: RefineSettings) -> Verdict | None:
    """The verdict of the first gate of one phase that the candidate does not pass; None if it passes all."""
    itself = candidate.limits.refines_itself
    for row in asked(needs, candidate.task.axes, settings, refines_itself=itself):
        finding = _CHECKS[row.name](candidate, _value(row, settings.gates))
        if finding is not None:
            return Verdict(row.name, finding.detail, finding.fault)
    return None


def _value(row: rows.Gate, settings: GateSettings) -> Any:
    return None if row.setting is None else settings.value(row.setting)
