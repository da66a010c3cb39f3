"""When the rounds end and which training is the best, from the measurements alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from middo_jax.config import ConfigError, StopSettings, load
from middo_jax.rundir import RunDir
from middo_jax.rundir.chain import chain
from middo_jax.rundir.stopping import check_heldout, course, decide


@pytest.mark.parametrize(
    ("values", "stop", "rounds", "last", "best"),
    [
        ([], {"patience": 1}, 3, None, None),
        ([2.0], {"patience": 1}, 3, None, 0),
        ([2.0, 2.1], {"patience": 1}, 3, 1, 0),
        ([2.0, 2.0], {"patience": 1}, 3, 1, 0),  # a tie is no gain, and the earlier is the best
        ([2.0, 1.9, 1.8, 1.7], {"patience": 1}, 3, 3, 3),  # all rounds were run
        ([2.0, 2.1, 1.9, 2.0, 2.0, 1.0], {"patience": 2}, 9, 4, 2),  # what is behind the end does not count
        ([2.0, 1.99, 1.98], {"patience": 2, "min_gain": 0.05}, 9, 2, 2),  # the best need not be a gain
        ([2.0, 1.97, 1.94], {"patience": 2, "min_gain": 0.05}, 9, None, 2),  # small gains add up
        ([0.2, 0.3, 0.3], {"patience": 1, "metric": "task"}, 9, 2, 1),  # a higher score is better
    ],
)
def test_the_end_and_the_best(
    values: list[float], stop: dict[str, Any], rounds: int, last: int | None, best: int | None
) -> None:
    found = decide(values, StopSettings(**stop), rounds)
    assert (found.last, found.best) == (last, best)
    assert (found.why is None) == (last is None)


def test_measurements_are_read_up_to_the_first_that_is_missing_or_unreadable(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    config = load(None, ["model.path=m", "data.path=d", "stop.patience=1", "rounds=5"])
    for t, loss in enumerate((2.0, 1.9, 1.8)):
        run.round(t).path.mkdir()
        run.round(t).finish("heldout", [], 0.0, losses={f"round_0{t}": loss})
    assert course(run, config).values == (2.0, 1.9, 1.8)
    assert course(run, config).line() == "so far the best is round_02 (held-out loss 1.8000)"
    run.round(1).manifest.write_text("{", encoding="utf-8")
    assert course(run, config).values == (2.0,)
    assert [link.where for link in chain(run, config)][-2:] == ["final evaluate", "final export"]


def test_what_cannot_be_measured_is_refused() -> None:
    given = ["model.path=m", "data.path=d", "stop.patience=1"]
    with pytest.raises(ConfigError, match=r"stop\.metric=task needs evaluate\.tasks"):
        load(None, [*given, "stop.metric=task"])
    with pytest.raises(ConfigError, match=r"data\.eval_fraction"):
        check_heldout(load(None, given), 0)
    check_heldout(load(None, given), 1)
