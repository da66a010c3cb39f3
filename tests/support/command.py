"""The program's own entry within the process of a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from middo_jax import cli


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, which must be JSON and nothing else."""
        assert self.code == 0, self.err
        return json.loads(self.out)


Middo = Callable[..., Ended]


@pytest.fixture
def middo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Middo:
    """Runs a command: `middo("run", "runs_dir=...")`."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "MIDDO_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["middo", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return Ended(code, str(out), str(err))

    return call
