"""Where the base model of a checkpoint is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from middo_jax.models.hf import CheckpointError
from middo_jax.models.loading import locate
from middo_jax.rundir import write_json


def test_the_base_of_a_checkpoint_is_where_it_was_or_moved_along_or_named(tmp_path: Path) -> None:
    checkpoint, model = tmp_path / "project" / "run" / "checkpoint", tmp_path / "project" / "model"
    gone = tmp_path / "before" / "model"
    facts = {"base": str(gone), "base_from_here": "../../model", "identity": "a"}
    write_json(checkpoint / "metadata.json", facts)
    write_json(model / "config.json", {})
    assert locate(checkpoint).base == model  # both were moved together
    elsewhere = tmp_path / "elsewhere"
    model.rename(elsewhere)
    with pytest.raises(CheckpointError, match=rf"trained from the base model {gone}, .*model\.path=DIR"):
        locate(checkpoint)
    assert locate(checkpoint, base=str(elsewhere)).base == elsewhere
    write_json(gone / "config.json", {})
    assert locate(checkpoint).base == gone
