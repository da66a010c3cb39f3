"""Renders a chat template in a process of its own, with limits of time, memory and output.

A program that `template_limits` starts with the path of this file; it imports nothing of the package. It
reads {"template", "tokens", "limits"} from stdin and prints {"fault": words or null}. If it takes too much
time, the kernel ends it: nothing else can stop `10 ** (10 ** 10)` within one instruction.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TURNS = 64  # of the longest conversation: what doubles with each turn shows itself


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark answers. Here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def conversations() -> list[tuple[list[dict[str, str]], bool]]:
    """(messages, whether the generation prompt is added) of each trial."""

    def turns(count: int, text: str = "Name a bird.\n\n- a heron\n") -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(count)]

    system = {"role": "system", "content": "Be brief."}
    return [
        (turns(2), False),
        (turns(1), True),
        ([system, *turns(3)], True),
        ([system, *turns(4, "One line of a text that is longer than others.\n" * 50)], False),
        (turns(_TURNS), False),
    ]


def fault(template: str, tokens: dict[str, str], most_chars: int) -> str | None:
    """What is wrong with the resources that a template takes; its other errors do not matter here."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, default=str)
    environment.globals.update(raise_exception=_refuse, strftime_now=datetime.now().strftime)
    trials: list[Callable[[], Any]] = []
    try:
        compiled = environment.from_string(template)
        trials = [
            lambda m=messages, p=prompt: _length(
                compiled.generate(messages=m, add_generation_prompt=p, tools=None, documents=None, **tokens),
                most_chars,
            )
            for messages, prompt in conversations()
        ]
    except jinja2.TemplateError:  # a mistake in its syntax; the first rendering says which
        return None
    for trial in trials:
        # A template may refuse a conversation, or fail at it: then there is nothing that it takes.
        with contextlib.suppress(
            jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError
        ):
            trial()
    return None


def _length(pieces: Any, most: int) -> int:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > most:
            raise MemoryError(f"it writes more than {most:,} characters for a short conversation")
    return length


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def main() -> None:
    """Sets the limits, tries the template, and prints the fault."""
    given = json.load(sys.stdin)
    limits = given["limits"]
    for kind, most in ((resource.RLIMIT_AS, limits["bytes"]), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(
            ValueError, OSError
        ):  # not every system has this limit, or a lower one holds
            resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
    try:
        found = fault(given["template"], given["tokens"], limits["chars"])
    except MemoryError as error:
        found = str(error) or f"it takes more than {limits['bytes'] >> 20} MiB of memory"
    except RecursionError:
        found = "its parts are nested too deep, or call each other without an end"
    except OverflowError as error:
        found = str(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps({"fault": found and found.splitlines()[0][:200]}))


if __name__ == "__main__":
    main()
