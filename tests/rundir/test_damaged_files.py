"""Damaged files that commands read without the chain: one sentence with the file and the way on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from middo_jax.rundir import read_jsonl
from middo_jax.rundir.files import DamagedFile, read_json
from middo_jax.signals.table import read_scores


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", bytes(64), b"[" * 100_000])
@pytest.mark.parametrize(
    ("name", "read"),
    [("scores.parquet", read_scores), ("selection.json", read_json), ("refined.jsonl", read_jsonl)],
)
def test_the_file_and_the_way_on_are_in_one_line(
    tmp_path: Path, name: str, read: Callable[[Path], Any], content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(b"{}\n" + content if content and name == "refined.jsonl" else content)
    if read is read_jsonl and not content:
        assert read(path) == []
        return
    with pytest.raises(DamagedFile, match=rf"{re.escape(str(path))}.*--repair") as raised:
        read(path)
    assert "\n" not in str(raised.value)
    if read is read_jsonl:
        assert f"{name}:2" in str(raised.value)
