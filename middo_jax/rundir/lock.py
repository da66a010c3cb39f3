"""The lock of a folder: one process at a time writes there, and its file says which.

    with held(folder, say): ...

The file `middo.lock` contains the owner: process, host, command and time. It is made with a hard link, which
either makes it whole or fails, also on NFS. A lock is removed only where its owner has provably ended: it was
of this host, and there is no such process, or one that started at another time. docs/design.md says why the
file is not an fcntl lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from middo_jax.rundir.files import full_disk_named, is_reader, json_line, temporary_prefix
from middo_jax.rundir.layout import RoundDir
from middo_jax.rundir.leftovers import sweep
from middo_jax.rundir.manifest import RunError
from middo_jax.rundir.process import first_line, namespace, started

NAME = "middo.lock"
_FIRST_NAMESPACE = "pid:[4026531836]"  # of processes that are in no container; Linux gives it this number
# A file system that has no hard links answers with one of these.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class RunLocked(RunError):
    """Another process writes into the folder; the message names it and says what to do."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
      pid: its number.
      started: when the process started, as the system counts it; the number may be another process's later.
      host: the name of its machine.
      boot: of the machine's present start; "" where the system does not tell.
      namespace: of process numbers, which containers have of their own; "" where there are none.
      machine: an id that the machine keeps over its restarts; "" where it has none.
      command: what the user typed.
      since: seconds since the epoch.
      token: of this lock alone.
    """

    pid: int
    started: str
    host: str
    boot: str
    namespace: str
    machine: str
    command: str
    since: float
    token: str

    @classmethod
    def this_process(cls) -> Owner:
        """The present process, with a new token."""
        pid = os.getpid()
        return cls(
            pid=pid,
            started=started(pid) or "",
            host=socket.gethostname(),
            boot=first_line("/proc/sys/kernel/random/boot_id"),
            namespace=namespace(),
            machine=first_line("/etc/machine-id"),
            command=_command(),
            since=time.time(),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def of(cls, text: str) -> Owner | None:
        """The owner that a lock's file names; None if the file is damaged."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def has_ended(self) -> bool:
        """Whether this process has provably ended. Of another host or container nothing can be proven."""
        here = Owner.this_process()
        if self.host != here.host:
            return False
        if (self.boot, self.namespace) == (here.boot, here.namespace):
            return started(self.pid) != self.started
        # The machine was restarted. In a container an id may be that of an image, and many machines have it.
        is_same_machine = bool(here.machine) and self.machine == here.machine
        return is_same_machine and self.namespace == here.namespace == _FIRST_NAMESPACE

    def __str__(self) -> str:
        age = _age(time.time() - self.since)
        return f"`{self.command}` (process {self.pid} on {self.host}, started {age} ago)"


@dataclasses.dataclass
class _Held:
    """A lock of this process: how often it was taken, by which process id, and its token."""

    depth: int
    pid: int
    token: str


_held: dict[Path, _Held] = {}


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """Locks a folder against other processes while the block runs.

    Temporary files and folders of killed processes are removed, see `leftovers`. A round of a run has its
    run's lock. The same process may take a lock again within the block. If the
    folder does not exist, it is made, and removed afterwards if nothing else was written into it.

    Args:
      folder: that the block writes into.
      say: is told if a left-over lock, file or folder was removed.

    Raises:
      RunLocked: another process holds the lock, or may hold it. The folder is as it was.
    """
    if is_reader():  # the process of the job that writes holds it
        yield
        return
    run = RoundDir(folder).run
    root = (folder if run is None else run.path).absolute()
    key = root.resolve()
    mine = _held.get(key)
    if mine is None or mine.pid != os.getpid():  # a forked child inherits the table, not the lock
        made = _make(root)
        try:
            mine = _held[key] = _Held(0, os.getpid(), _take(root, say))
            sweep(root, say)
        except BaseException:
            _remove_empty(made)
            raise
    else:
        made = []
    mine.depth += 1
    try:
        yield
    finally:
        mine.depth -= 1
        if mine.depth == 0:
            del _held[key]
            _release(root / NAME, mine.token)
            _remove_empty(made)


def _take(root: Path, say: Callable[[str], None]) -> str:
    """Makes the lock's file, once a left-over one is removed; returns its token."""
    path, owner = root / NAME, Owner.this_process()
    while not _create(path, json_line(dataclasses.asdict(owner))):
        text = _read(path)
        if text is None:  # released meanwhile
            continue
        other = Owner.of(text)
        if other is None:
            raise RunLocked(
                f"{root} is locked, and {path} does not say by whom: make sure that no other process writes "
                f"there, delete {path}, and start again"
            )
        if not other.has_ended():
            raise RunLocked(_refusal(root, path, other))
        if _break(path, text):
            say(f"{root}: removed the lock of {other}, which has ended without releasing it")
    return owner.token


def _refusal(root: Path, path: Path, other: Owner) -> str:
    here = Owner.this_process()
    of = f"{root} is locked by {other}"
    if (other.host, other.boot, other.namespace) == (here.host, here.boot, here.namespace):
        return f"{of}: wait until it ends, or stop it"
    return (
        f"{of}, and from here nobody can tell if it still runs: if it does not, delete {path} and start again"
    )


def _create(path: Path, text: str) -> bool:
    """Makes a file with this text, whole and only if there is none; whether it did."""
    temporary = path.with_name(f"{temporary_prefix(path)}{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)  # whoever made it may have removed it meanwhile
    try:
        with full_disk_named(path):
            temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return _has_two_names(temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                if _has_two_names(temporary):  # the answer of an NFS server was lost, the link was made
                    return True
                raise
            return _create_exclusively(path, text)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _has_two_names(path: Path) -> bool:
    return path.stat().st_nlink == 2


def _create_exclusively(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _break(path: Path, text: str) -> bool:
    """Removes a lock of which the owner has ended, if it still has this text; whether it did.

    Two processes may find the same left-over lock. All that may remove it are on one host, so that an fcntl
    lock, which the system releases at any end, orders them: the second one finds another text, or no file.
    """
    guard = path.with_name(f"{NAME}.removing")
    with guard.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise RunLocked(
                f"{path} is left over, and the file system cannot order those that would remove it "
                f"({error}): delete it and start again"
            ) from error
        is_it = _read(path) == text
        if is_it:
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), guard.stat()):  # another one's may be there by now
                guard.unlink()
    return is_it


def _release(path: Path, token: str) -> None:
    """Removes the lock, unless somebody has deleted it and another process holds one there now."""
    owner = Owner.of(_read(path) or "")
    if owner is not None and owner.token == token:
        path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _make(folder: Path) -> list[Path]:
    """Makes a folder; returns what was made, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(made: list[Path]) -> None:
    for path in made:
        with contextlib.suppress(OSError):  # something is in it, or another process has removed it
            path.rmdir()


def _command() -> str:
    """What the user typed, short enough for a line."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    text = shlex.join([{"__main__.py": "middo"}.get(program, program), *sys.argv[1:]])
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a minute"
