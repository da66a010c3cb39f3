"""A run's folder: where each file lies, how it is written, and which stages are done, stale, and why.

layout.py: paths. files.py: writing. manifest.py: what is done, stale, and why. chain.py: which stage
reads and writes which files, and which settings it depends on. lock.py: one process at a time writes.
"""

from middo_jax.rundir.files import (
    atomic,
    file_hash,
    json_line,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from middo_jax.rundir.layout import RoundDir, RunDir, local
from middo_jax.rundir.lock import RunLocked, held
from middo_jax.rundir.manifest import Manifest, RunError, fingerprint

__all__ = [
    "Manifest",
    "RoundDir",
    "RunDir",
    "RunError",
    "RunLocked",
    "atomic",
    "file_hash",
    "fingerprint",
    "held",
    "json_line",
    "local",
    "read_jsonl",
    "write_json",
    "write_jsonl",
    "write_text",
]
