"""Where the base model of a checkpoint is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from middo_jax.models.checkpoint import read_metadata
from middo_jax.models.hf import CheckpointError
from middo_jax.models.loading import ModelSource, locate
from middo_jax.rundir import RoundDir, RunError, write_json
from middo_jax.rundir.link import Link


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


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ['{"version": 1}', "[1]", "{", '{"base": 1}', "[" * 100_000])
def test_a_foreign_metadata_file_in_a_hugging_face_folder_marks_no_checkpoint(
    tmp_path: Path, config: str, content: str
) -> None:
    (tmp_path / config).write_text("{}")
    (tmp_path / "metadata.json").write_text(content)
    assert read_metadata(tmp_path) is None
    if config == "config.json":
        assert locate(tmp_path) == ModelSource(tmp_path)
    stage = Link("score", RoundDir(tmp_path / "round"), frozenset(), (), (), models={"base": tmp_path})
    assert stage.inputs == {"base": tmp_path}
    assert stage.reads == ()


@pytest.mark.parametrize(
    "content",
    ['{"version": 1}', '{"base": 1}', '{"base": "m", "lora": 3}', '{"base": "m", "lora": {"rank": 8}}', "["],
)
def test_a_foreign_metadata_file_alone_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(RunError, match=r"metadata\.json: .*not what a training writes") as caught:
        locate(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_base_with_an_impossible_name_is_missing(tmp_path: Path) -> None:
    for base in ("x" * 1000, "a\0b"):
        write_json(tmp_path / "metadata.json", {"base": base})
        with pytest.raises(CheckpointError, match="which is not there any more"):
            locate(tmp_path)
    write_json(tmp_path / "metadata.json", {"base": "x" * 10**6})
    with pytest.raises(RunError, match="is no path") as caught:
        locate(tmp_path)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
