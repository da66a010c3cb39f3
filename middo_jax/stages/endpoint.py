"""The refiner's endpoint: the one in the settings, or the embedded one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import gc
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.applications import Starlette

from middo_jax.config import Config, replayed_file
from middo_jax.data.templates import pin_date
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.inference import listening, server
from middo_jax.inference.guard import Access
from middo_jax.loopback import is_loopback
from middo_jax.models.resolve import resolve, served_name
from middo_jax.parallel.coordination import Together, agree, alone, gather, own_address, shared_secret
from middo_jax.refinement.endpoint.recording import Recording, read_header, read_recording
from middo_jax.rundir import RunError, fingerprint
from middo_jax.session import Session
from middo_jax.stages.replaying import Replay

SERVE, STOP = "serve", "stop serving"  # what process 0 tells those that follow
CONNECT_TIMEOUT_S = 10.0


class Served(NamedTuple):
    """The refiner's endpoint.

    Attributes:
      url: up to and including /v1; several are servers of the same model.
      model: its name in requests.
      sends_key: whether it is the user's and gets their API key; the embedded one gets a dummy.
      revision: of the model, for the keys of its answers; None where only the user can name it.
      recording: the recorded answers that are replayed.
      embedded: the model that answers what the recording lacks.
      token: what the embedded servers of a job want instead of a key; None where there is one process.
    """

    url: str | tuple[str, ...]
    model: str
    sends_key: bool
    revision: str | None = None
    recording: Recording | None = None
    embedded: str = ""
    token: str | None = None


def named_endpoint(config: Config) -> Served | None:
    """Returns the endpoint that `refine.base_url` or $OPENAI_BASE_URL names; None if none is named.

    None also for recorded answers, which no server has.

    Raises:
      RunError: one of them is set, but `refine.model` is not.
    """
    url = config.refine.base_url or os.environ.get("OPENAI_BASE_URL")
    if url is None or replayed_file(config.refine.base_url) is not None:
        return None
    if config.refine.model is None:
        served = "refine.base_url" if config.refine.base_url else "$OPENAI_BASE_URL"
        raise RunError(f"config: refine.model is missing; set it to the name of a model that {served} serves")
    return Served(url, config.refine.model, sends_key=True)


def refines_itself(session: Session) -> bool:
    """Whether the refiner is the model under training: the embedded endpoint with the base model."""
    config = session.config
    if named_endpoint(config) is not None or replayed_file(config.refine.base_url) is not None:
        return False
    named = config.refine.model
    # By its path alone: a name is not looked up, since another program may serve it (batch files).
    return named in (None, config.model.path) or Path(named).resolve() == session.base.resolve()


@contextlib.contextmanager
def endpoint(session: Session, together: Together = alone) -> Iterator[Served]:
    """Yields the refiner's endpoint. If none is set, serves the embedded one on loopback during the block.

    In a job of several processes, each serves the embedded one on its own devices, and the client shares the
    load among them. Recorded answers are served on loopback; the embedded model is loaded when it is needed.

    Args:
      session: settings, mesh.
      together: value that `lead` yields, if other processes follow; they must call `serving` after SERVE.
    """
    config = session.config
    if (named := named_endpoint(config)) is not None:
        yield named
        return
    path, template = embedded_model(session)
    if (file := replayed_file(config.refine.base_url)) is not None:
        recording = read_recording(file)
        chat_template = load_tokenizer(path, template).chat_template
        revision = served_revision(path, chat_template, _date(config), config, recording.hash)
        with contextlib.ExitStack() as stack:
            replay = Replay(recording, lambda: stack.enter_context(_embedded(session, recording.model)))
            url = stack.enter_context(listening.serve_in_background(replay.app(), port=0))
            yield Served(url, recording.model, False, revision, recording, embedded_name(config))
        gc.collect()
        return
    with contextlib.ExitStack() as stack:
        with together({SERVE: True}):
            servers = stack.enter_context(serving(session))
        revision = config.refine.model_revision or servers.revision
        urls = _reached(session, servers.urls)
        yield Served(urls, embedded_name(config), sends_key=False, revision=revision, token=servers.token)
    gc.collect()
    with together({STOP: True}):  # not after an error, which ends this process and so the others
        pass


class Servers(NamedTuple):
    """The embedded endpoints of a job.

    Attributes:
      urls: of all processes, in their order.
      revision: of the model that all of them serve.
      token: what they want as a key, since other machines can reach them; None where there is one process.
    """

    urls: tuple[str, ...]
    revision: str
    token: str | None


@contextlib.contextmanager
def serving(session: Session) -> Iterator[Servers]:
    """Serves the embedded model in this process during the block; all processes of a job must call it.

    Each listens only on the address that process 0 can reach, which is loopback for process 0 itself.

    Raises:
      HostsError: the processes serve different models.
    """
    token, address = shared_secret("refiner"), own_address()
    access = None if token is None else Access(token, only_loopback=is_loopback(address))
    with (
        _embedded(session, embedded_name(session.config), access) as app,
        listening.serve_in_background(app, host=address, port=0) as url,
    ):
        urls = gather("refiner: servers", url)
        agree({"refiner": app.state.revision})
        yield Servers(tuple(urls), app.state.revision, token)


def _reached(session: Session, urls: Sequence[str]) -> tuple[str, ...]:
    """Those of the servers of a job that accept a connection; names the others, whose devices do not help."""
    if len(urls) == 1:
        return tuple(urls)
    with concurrent.futures.ThreadPoolExecutor(len(urls)) as pool:
        reasons = list(pool.map(_why_not_reached, urls))
    for process, (url, reason) in enumerate(zip(urls, reasons, strict=True)):
        if reason is not None:
            session.progress.say(
                f"warning: process 0 cannot reach the refiner of process {process} at {url} ({reason}), so "
                "that process does not help to answer; allow TCP connections between the hosts"
            )
    reached = tuple(url for url, reason in zip(urls, reasons, strict=True) if reason is None)
    session.progress.say(f"the refiner is served by {len(reached)} of {len(urls)} processes")
    return reached


def _why_not_reached(url: str) -> OSError | None:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error
    return None


def embedded_model(session: Session) -> tuple[Path, str | None]:
    """The model of the embedded endpoint, and `model.template` if it is the base model."""
    named = session.config.refine.model
    return (resolve(named), None) if named else (session.base, session.config.model.template)


def embedded_name(config: Config) -> str:
    """The name under which the embedded endpoint serves its model."""
    return served_name(config.refine.model or config.model.path)


def _date(config: Config) -> datetime.date:
    return config.model.template_date or datetime.date.today()


@contextlib.contextmanager
def _embedded(session: Session, name: str, access: Access | None = None) -> Iterator[Starlette]:
    """Yields the embedded endpoint's application under a model's name; its engine runs during the block."""
    config = session.config
    path, template = embedded_model(session)
    engine, tokenizer, eos_ids = server.load_engine(
        path, config.serve, config.model.dtype, template, session.mesh
    )
    # A rewrite depends on what the template prints, so that another day's start must print the same.
    pin_date(tokenizer, _date(config))
    app = server.build_app(engine, tokenizer, name, eos_ids, access)
    app.state.revision = served_revision(path, tokenizer.chat_template, _date(config), config)
    with engine:
        yield app


def recorded_line(config: Config) -> str | None:
    """One line that says that the answers are recorded, and from which model; None if they are not.

    Raises:
      RunError: the file cannot be used.
    """
    file = replayed_file(config.refine.base_url)
    if file is None:
        return None
    embedded = config.refine.model or "the base model"
    model, _ = read_header(file)
    return f"the refiner's answers are recorded: {file}, from {model}; {embedded} answers the rest"


def served_revision(
    path: Path, template: Any, date: datetime.date, config: Config, recorded: str | None = None
) -> str:
    """16 hex digits that identify what the embedded endpoint serves, for the keys of its answers.

    Other weights at the same place are another refiner, whose answers must not be taken from the cache.
    """
    decisive = [fingerprint(path), template, str(date), config.model.dtype, config.serve.max_context]
    decisive += [] if recorded is None else [recorded]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
