"""Communication between the processes of a job without the devices: decisions, barriers, ends.

All of it uses the key-value store of JAX's coordination service, which process 0 runs. No wait here is a
device collective, since those have timeouts of their own, or none.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the client has no public name; Orbax uses it as well
from jax.experimental import multihost_utils

from middo_jax.beside import beside
from middo_jax.buckets import Place
from middo_jax.buckets.working import in_bucket, learn, publish, receive
from middo_jax.parallel import watch
from middo_jax.parallel.board import board
from middo_jax.parallel.preemption import EXIT_PREEMPTED, Preempted, end_if_asked
from middo_jax.rundir import RunError

T = TypeVar("T")

# Start of XLA's message when a collective breaks. The class may be ValueError, from JAX's fast dispatch.
_BROKEN = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)
_MARK = "mark"
_PART = 1 << 20  # characters per value; gRPC rejects messages over 4 MB

_calls: collections.Counter[str] = collections.Counter()
_points = itertools.count(1)


class HostsError(RunError):
    """Another process of the job failed, or the processes disagree."""


class Unreachable(HostsError):
    """Process 0, which coordinates, is dead or cut off."""


def is_first() -> bool:
    """Whether this process decides and writes: process 0, or the only process."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once all processes have called it. Waits while others make progress (see `watch.Watch`).

    What process 0 has written before is visible to all after it, also in a bucket: the others first push
    their pieces of checkpoints, then process 0 what declares them complete.
    """
    if jax.process_count() == 1:
        publish()
        return
    call, me = _next_call(name), jax.process_index()
    if me > 0:
        _put(f"{call}/{me}", str(publish()))
    pushed = [int(_get(f"{call}/{process}")) for process in range(1, jax.process_count())]
    if me == 0:
        learn(sum(pushed))
        _put(f"{call}/0", str(publish()))
    else:
        receive(int(_get(f"{call}/0")))


def from_first(name: str, function: Callable[[], T]) -> T:
    """Calls the function in process 0 only and returns its value, which must be JSON, in all processes.

    The others wait as long as it takes. If the function raises, process 0 must `leave`, and every other
    process is ended by its `watch.Watch`. A SIGTERM to any process raises `Preempted` in all of them.
    """
    if jax.process_count() == 1:
        value = function()
        publish()
        return value
    call = _next_call(name)
    if is_first():
        with _ticking(call):
            value = function()
            pushed = publish()
        _put(call, json.dumps([value, pushed]))
        return value
    value, pushed = json.loads(_get(call, follow_ticks=True))
    receive(pushed)
    return value


def has_own_disk() -> bool:
    """Whether each process of a job works in a folder of its own, because the run is in a bucket."""
    return jax.process_count() > 1 and in_bucket()


def on_each_disk(name: str, change: Callable[[], None]) -> None:
    """Changes files of the run: in process 0, or in every process if each works in a folder of its own.

    For files that all processes write, which are those of checkpoints.
    """
    if has_own_disk():
        change()
        barrier(name)
    else:
        from_first(name, change)


def gather(name: str, value: T) -> list[T]:
    """The values of all processes, which must be JSON, in their order; all must call it."""
    if jax.process_count() == 1:
        return [value]
    call = _next_call(name)
    _put(f"{call}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_get(f"{call}/{process}")) for process in range(jax.process_count())]


def shared_secret(name: str) -> str | None:
    """A random text of 64 hex digits that the processes of this job have; None for one process alone.

    All must call it. The text is in the job's store only until all have read it, and never in a file. The
    store itself protects nothing: whoever reaches the coordinator's port can disturb the job anyway.
    """
    if jax.process_count() == 1:
        return None
    call = _next_call(name)
    if is_first():
        _put(call, secrets.token_hex(32))
    secret = _get(call)
    gather(f"{name}: read", True)
    if is_first():
        _store().key_value_delete(call)  # with all keys below it
    return secret


def own_address() -> str:
    """An address of this host that process 0 can reach; of process 0, loopback."""
    if is_first():
        return "127.0.0.1"
    host = (distributed.global_state.coordinator_address or "").rpartition(":")[0].strip("[]")
    family, kind, protocol, _, coordinator = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(coordinator)  # sends nothing, but chooses the interface
        return probe.getsockname()[0]


def agree(facts: Mapping[str, str]) -> None:
    """Checks that all processes have the same facts, such as hashes of their inputs.

    Raises:
      HostsError: some differ; the message names hosts and values.
    """
    if jax.process_count() == 1:
        return
    told = gather("agree", {"host": socket.gethostname(), "facts": dict(facts)})
    for name, expected in told[0]["facts"].items():
        others = [
            f"process {i} on {other['host']} has {other['facts'].get(name)}"
            for i, other in enumerate(told)
            if other["facts"].get(name) != expected
        ]
        if others:
            raise HostsError(
                f"the processes differ in {name}: process 0 on {told[0]['host']} has {expected}, "
                f"{', '.join(others)}; all must be started with the same settings, code and data"
            )


Together = Callable[[Any], contextlib.AbstractContextManager[None]]


def alone(told: Any) -> contextlib.AbstractContextManager[None]:
    """A `Together` for a job without followers; does nothing."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def lead(name: str) -> Iterator[Together]:
    """For process 0: the block runs here alone, and parts of it together with the others, which `follow`.

        with lead("refine") as together:
            children = ...
            with together(children):
                measure(children)

    `together` takes a JSON value, which `follow` yields. The values are kept until the job ends.
    """
    if jax.process_count() == 1:
        yield alone
        return
    with contextlib.ExitStack() as ticks:
        call = _next_call(name)
        ticks.enter_context(_ticking(call))

        @contextlib.contextmanager
        def together(value: Any) -> Iterator[None]:
            nonlocal call
            ticks.close()  # the joint part has stop points of its own
            _put(call, json.dumps({"do": value}))
            yield
            call = _next_call(name)
            ticks.enter_context(_ticking(call))

        yield together
        ticks.close()
        _put(call, json.dumps(None))


def follow(name: str) -> Iterator[Any]:
    """For all other processes: yields each value of `together`, until the block of `lead` ends."""
    while (told := json.loads(_get(_next_call(name), follow_ticks=True))) is not None:
        yield told["do"]


def check_shared(shared: str | Path) -> None:
    """Checks that all processes see the same folder, or the same bucket.

    Raises:
      HostsError: a process does not see a file of process 0; the message names its host.
    """
    if jax.process_count() == 1:
        return
    name, text = from_first("check_shared", lambda: _marked(shared))
    note = board(shared, name).notes().get(_MARK)
    sees = note is not None and note.text == text
    blind = [host for host in gather("sees the folder", "" if sees else socket.gethostname()) if host]
    if is_first():
        board(shared, name).remove(_MARK)
    if blind:
        where = shared if Place.of(shared) else Path(shared).absolute()
        raise HostsError(
            f"{where} is not the same folder on all hosts: {', '.join(blind)} cannot see what "
            "process 0 writes there; give a folder on storage that all hosts share"
        )


def _marked(shared: str | Path) -> tuple[str, str]:
    text = f"{socket.gethostname()} {time.time_ns()}"
    name = f".shared-{os.getpid()}"
    board(shared, name).write(_MARK, text)
    return name, text


def stop_point() -> None:
    """Raises `Preempted` in all processes at the same call, once any of them has received a SIGTERM.

    All processes must call it equally often. In a single process the signal's handler raises, and this only
    where that was lost.
    """
    if jax.process_count() == 1:
        end_if_asked()
    elif multihost_utils.reached_preemption_sync_point(next(_points)):
        raise Preempted


def leave(error: BaseException) -> NoReturn:
    """Reports the error to the others and ends this process, with exit code 1.

    JAX's own exit would wait for processes that wait for this one. When process 0 ends, so do the service and
    all others; so it stays until they have read the error.

    If a process is lost, the collectives of the others break first, and the watch detects the loss later. So
    an error that may come from a loss waits for the watch, which ends the process with EXIT_PREEMPTED. If
    process 0 is unreachable, the exit code is EXIT_PREEMPTED too.
    """
    if _may_be_a_loss(error) and watch.ending.wait(watch.DEAD_AFTER_S + 3 * watch.POLL_S):
        time.sleep(watch.END_AFTER_S + 3 * watch.POLL_S)  # the watch ends the process within this time
    _tell_end(f"{type(error).__name__}: {error}")
    patience = time.monotonic() + watch.END_AFTER_S + 3 * watch.POLL_S
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        while is_first() and time.monotonic() < patience:
            if len(_store().key_value_dir_get("middo/end/")) == jax.process_count():
                break
            time.sleep(watch.POLL_S / 5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_PREEMPTED if isinstance(error, Unreachable) else 1)


def _may_be_a_loss(error: BaseException | None) -> bool:
    """Whether an error, or its cause, may come from the loss of another process."""
    while error is not None:
        if _BROKEN.match(str(error)) or isinstance(error, Unreachable):
            return True
        error = error.__cause__
    return False


def tell_good_end() -> None:
    """Reports to the others that this process ends because its work is done."""
    _tell_end("")


def _tell_end(text: str) -> None:
    if jax.process_count() > 1 and (client := distributed.global_state.client) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended as well
            client.key_value_set(f"middo/end/{jax.process_index()}", text, allow_overwrite=True)


def _next_call(name: str) -> str:
    watch.advanced(name)
    _calls[name] += 1
    return f"middo/call/{name}/{_calls[name]}"


def _store() -> Any:
    """The client of JAX's key-value store; there is one in every job of several processes."""
    assert distributed.global_state.client is not None
    return distributed.global_state.client


def _put(key: str, value: str) -> None:
    parts, client = [value[i : i + _PART] for i in range(0, len(value), _PART)] or [""], _store()
    for i, part in enumerate(parts):
        client.key_value_set(f"{key}/part{i}", part)
    client.key_value_set(f"{key}/parts", str(len(parts)))


def _get(key: str, follow_ticks: bool = False) -> str:
    client, ticks = _store(), itertools.count()
    tick = next(ticks)
    while (found := _try_get(f"{key}/parts")) is None:
        if follow_ticks and _try_get(f"{key}/tick{tick}") is not None:
            stop_point()
            tick = next(ticks)
            continue
        time.sleep(0.02 if not follow_ticks else 0.2)
    while follow_ticks and _try_get(f"{key}/tick{tick}") is not None:  # all must call it equally often
        stop_point()
        tick = next(ticks)
    return "".join(client.blocking_key_value_get(f"{key}/part{i}", 60_000) for i in range(int(found)))


def _try_get(key: str) -> str | None:
    try:
        return _store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise Unreachable(f"process 0 cannot be reached: {error}") from error


@contextlib.contextmanager
def _ticking(call: str, every_s: float = 2.0) -> Iterator[None]:
    """While process 0 works alone, it and the waiting processes call `stop_point` in step.

    The others follow numbered ticks, since only processes in step can agree on a stop point.
    """

    def tick(done: threading.Event) -> None:
        for number in itertools.count():
            if done.wait(every_s):
                return
            _store().key_value_set(f"{call}/tick{number}", "")
            try:
                stop_point()
            except Preempted:
                # Not SIGTERM: JAX handles it, and its handler has informed the others.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                return

    def preempted(*_: object) -> None:
        raise Preempted

    before = signal.signal(signal.SIGUSR2, preempted)
    try:
        with beside(tick):
            yield
    finally:
        signal.signal(signal.SIGUSR2, before)
