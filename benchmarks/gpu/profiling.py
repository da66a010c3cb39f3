"""Which kernels a GPU spends its time in: a trace of one call, added up by name."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

SHOWN = 25


def kernel_times(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of one call that take most time: name, number of launches, milliseconds; longest first.

    Empty where the device leaves no trace of its kernels, as a CPU does. Numbers in names are left out, so
    that the clones of one kernel count as one.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(call())
        files = sorted(Path(directory).rglob("*.xplane.pb"))
        spaces = [jax.profiler.ProfileData.from_file(str(file)) for file in files]
        milliseconds: collections.Counter[str] = collections.Counter()
        launches: collections.Counter[str] = collections.Counter()
        for plane in (plane for space in spaces for plane in space.planes if "GPU" in plane.name):
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    name = re.sub(r"[._]\d+", "", event.name)[:100]
                    milliseconds[name] += event.duration_ns / 1e6
                    launches[name] += 1
    return [
        {"kernel": name, "launches": launches[name], "ms": round(spent, 3)}
        for name, spent in milliseconds.most_common(SHOWN)
    ]
