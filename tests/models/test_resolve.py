"""The name under which a model is served says which model it is, not where its files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from middo_jax.models.resolve import served_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/tuned", "tuned"),
        ("models/link", "tuned"),
        ("weights/Qwen2.5-1.5B-Instruct-Q4_K_M.gguf", "Qwen2.5-1.5B-Instruct-Q4_K_M"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("hub/models--Qwen--Qwen2.5-0.5B/snapshots/1a2b3c", "Qwen/Qwen2.5-0.5B"),
        ("gs://bucket/models/mine", "mine"),
        ("gs://bucket/models/mine.gguf", "mine"),
    ],
)
def test_a_model_is_served_under_its_own_name(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    (tmp_path / "models" / "link").symlink_to(tmp_path / "models" / "tuned")
    (tmp_path / "hub/models--Qwen--Qwen2.5-0.5B/snapshots/1a2b3c").mkdir(parents=True)
    assert served_name(path) == name
