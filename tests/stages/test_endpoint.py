"""The embedded refiner: other weights at the same place have no answers in the cache."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from support.loop_fixture import settings
from support.tiny_model import write_tiny_model

from middo_jax.config import load
from middo_jax.stages.endpoint import served_revision

DAY = datetime.date(2026, 11, 27)


def test_whatever_changes_an_answer_changes_the_revision(tmp_path: Path) -> None:
    config = load(None, settings(tmp_path))
    model = write_tiny_model(tmp_path / "served")

    def revision(template: str = "a", day: datetime.date = DAY, **more: Any) -> str:
        changed = load(None, settings(tmp_path, **more)) if more else config
        return served_revision(model, template, day, changed)

    first = revision()
    assert revision() == first
    assert revision(serve__max_batch=3) == first  # decoded together with others, an answer is the same
    others = [revision("b"), revision(day=datetime.date(2026, 11, 28)), revision(model__dtype="bfloat16")]
    others.append(revision(serve__max_context=99))
    write_tiny_model(tmp_path / "served", seed=1)
    others.append(revision())
    assert len({first, *others}) == 6
