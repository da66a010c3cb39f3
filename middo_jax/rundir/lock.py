"""The lock of a folder: only one process at a time writes there.

    with held(folder, say): ...

The file `middo.lock` contains the owner: process, host, command and time. It is created by a hard link, which
is atomic, also on NFS. A left-over lock is removed only if its owner has provably ended: the owner ran on
this host, and no process has its ID, or one with another start time. docs/design.md explains why this is not
an fcntl lock.
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
from middo_jax.rundir.leftovers import remove_leftovers
from middo_jax.rundir.manifest import RunError
from middo_jax.rundir.process import first_line, namespace, started

NAME = "middo.lock"
_FIRST_NAMESPACE = "pid:[4026531836]"  # Linux's number for the PID namespace outside of containers
# A file system without hard links raises one of these.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class RunLocked(RunError):
    """Another process writes into the folder; the message contains the process and what to do."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
      pid: process ID.
      started: start time of the process, in the system's format; process IDs are reused.
      host: host name.
      boot: ID of the machine's present boot; "" if the system has none.
      namespace: PID namespace, which differs between containers; "" if the system has none.
      machine: ID of the machine, the same after a reboot; "" if the system has none.
      command: the command line.
      since: time when the lock was taken, in seconds since the epoch.
      token: unique ID of this lock.
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
        """Returns the present process, with a new token."""
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
        """Parses the owner from a lock's file; None if the file is damaged."""
        try:
            owner = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        words = (
            owner.started,
            owner.host,
            owner.boot,
            owner.namespace,
            owner.machine,
            owner.command,
            owner.token,
        )
        is_sound = (
            type(owner.pid) is int and isinstance(owner.since, int | float) and abs(owner.since) < 2**53
        )
        return owner if is_sound and all(isinstance(word, str) for word in words) else None

    def has_ended(self) -> bool:
        """Whether this process has provably ended; False on another host or in another container."""
        here = Owner.this_process()
        if self.host != here.host:
            return False
        if (self.boot, self.namespace) == (here.boot, here.namespace):
            return started(self.pid) != self.started
        # The machine was restarted. In a container the ID may come from an image that many machines use.
        is_same_machine = bool(here.machine) and self.machine == here.machine
        return is_same_machine and self.namespace == here.namespace == _FIRST_NAMESPACE

    def __str__(self) -> str:
        age = _age(time.time() - self.since)
        return f"`{self.command}` (process {self.pid} on {self.host}, started {age} ago)"


@dataclasses.dataclass
class _Held:
    """A lock of this process: number of nested blocks, process ID and token."""

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
      say: gets a line for each left-over lock, file or folder that was removed.

    Raises:
      RunLocked: another process holds the lock, or may hold it. The folder is unchanged.
    """
    if is_reader():  # the job's writing process holds the lock
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
            remove_leftovers(root, say)
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
    """Creates the lock's file, after removing a left-over one; returns its token."""
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
    return f"{of}, and this host cannot check whether it still runs: if not, delete {path} and start again"


def _create(path: Path, text: str) -> bool:
    """Atomically creates a file with this text, unless it exists; returns whether it did."""
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
                if _has_two_names(temporary):  # an NFS server's reply was lost, but the link was created
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
    """Removes a lock whose owner has ended, if the file still has this text; returns whether it did.

    Two processes may find the same left-over lock. Both run on the lock's host, so an fcntl lock, which the
    system always releases, can order them: the second one finds another text or no file.
    """
    guard = path.with_name(f"{NAME}.removing")
    with guard.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise RunLocked(
                f"{path} is left over, and the file system has no locks to remove it safely ({error}): "
                "delete it and start again"
            ) from error
        is_it = _read(path) == text
        if is_it:
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), guard.stat()):  # may be another process's by now
                guard.unlink()
    return is_it


def _release(path: Path, token: str) -> None:
    """Removes the lock, unless it was deleted and another process has taken a new one since."""
    owner = Owner.of(_read(path) or "")
    if owner is not None and owner.token == token:
        path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        return ""


def _make(folder: Path) -> list[Path]:
    """Creates a folder with its parents; returns the created folders, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(made: list[Path]) -> None:
    for path in made:
        with contextlib.suppress(OSError):  # it is not empty, or another process has removed it
            path.rmdir()


def _command() -> str:
    """Returns the command line, shortened to about 200 characters."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    text = shlex.join([{"__main__.py": "middo"}.get(program, program), *sys.argv[1:]])
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a minute"
