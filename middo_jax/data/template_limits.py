"""Tries a model's chat template before it is used: whether it takes too much time, memory or output.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and from the network,
and stops `range(10**9)`. It cannot stop nested loops, `'a' * 10**10` or `10 ** (10 ** 10)`. Therefore a
template is rendered once in a process of its own, which the kernel ends when it exceeds a limit. What a
template does with conversations that are unlike those of the trial is not limited.
"""

from __future__ import annotations

import functools
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

MOST_SECONDS = 0.5  # of processor time, for all conversations of the trial; templates in use take 0.05
MOST_BYTES = 512 << 20  # of memory
MOST_OUTPUT = 1_000_000  # characters for one conversation
MOST_CHARS = 1_000_000  # of the template itself; the longest in use has 20,000
_WALL_SECONDS = 60.0  # a busy machine may need long for half a second of work

_log = logging.getLogger(__name__)


def fault_of(template: str, tokens: Mapping[str, str]) -> str | None:
    """What is wrong with the resources that a chat template takes, in words; None if nothing is.

    Args:
      template: Jinja text.
      tokens: the special tokens that the template may write, by name.
    """
    if len(template) > MOST_CHARS:
        return f"it has {len(template):,} characters, and may have {MOST_CHARS:,}"
    return _tried(template, tuple(sorted(tokens.items())))


@functools.lru_cache(maxsize=64)
def _tried(template: str, tokens: tuple[tuple[str, str], ...]) -> str | None:
    limits = {"seconds": MOST_SECONDS, "bytes": MOST_BYTES, "chars": MOST_OUTPUT}
    given = json.dumps({"template": template, "tokens": dict(tokens), "limits": limits})
    # -P: modules beside the program, such as tokenize.py, must not be taken for those of Python.
    command = [sys.executable, "-P", str(Path(__file__).with_name("template_trial.py"))]
    try:
        ran = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {_WALL_SECONDS:g} s"
    except OSError as error:
        return _untried(str(error))
    if ran.returncode == -signal.SIGPROF:
        return f"it takes more than {MOST_SECONDS:g} s of processor time"
    try:
        return json.loads(ran.stdout)["fault"]
    except (ValueError, KeyError, TypeError):
        # Even the report of the fault can lack memory.
        said = (ran.stderr.strip().splitlines() or ["no message"])[-1][:200]
        if said.startswith(("ModuleNotFoundError", "ImportError")):  # this process got Jinja by another way
            return _untried(said)
        return f"its trial ended with {ran.returncode}: {said}"


def _untried(why: str) -> None:
    _log.warning("the chat template could not be tried in a process of its own: %s", why)
