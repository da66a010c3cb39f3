"""Compiled programs that machines leave for each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from middo_jax.buckets import Place, keeping
from middo_jax.buckets.keeping import kept
from middo_jax.buckets.store import Store
from middo_jax.buckets.working import publish
from middo_jax.rundir import files

pytest_plugins = ["support.bucket_servers"]
pytestmark = pytest.mark.usefixtures("own_copies")


def test_what_one_machine_adds_the_next_one_has(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place.of(s3)
    assert place is not None
    added = []
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        monkeypatch.setattr(keeping, "_kept", {})
        folder = kept(place)
        assert sorted(path.name for path in folder.iterdir()) == added
        (folder / f"program-{name}").write_text(name)
        added.append(f"program-{name}")
        # Meanwhile another job adds to it.
        Store(place).put_text("", f"another-{name}")
        added.append(f"another-{name}")
        added.sort()
        publish()
        assert sorted(Store(place).list()) == added
    (kept(place) / "program-two").unlink()
    publish()
    assert sorted(Store(place).list()) == added  # nothing is removed


def test_in_a_job_process_0_alone_pushes(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(s3)
    assert place is not None
    monkeypatch.setattr(keeping, "_kept", {})
    monkeypatch.setattr(files, "_reader", 1)
    (kept(place) / "program").write_text("of another process")
    publish()
    assert Store(place).list() == {}
