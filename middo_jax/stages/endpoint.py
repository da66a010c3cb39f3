"""The refiner's endpoint: the one in the settings, or the embedded one."""

from __future__ import annotations

import contextlib
import datetime
import gc
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.config import Config
from middo_jax.data.templates import pin_date
from middo_jax.inference import listening, server
from middo_jax.models.resolve import resolve
from middo_jax.rundir import RunError, fingerprint
from middo_jax.session import Session


class Served(NamedTuple):
    """The refiner's endpoint.

    Attributes:
      url: up to and including /v1; several are servers of the same model.
      model: its name in requests.
      sends_key: whether it is the user's and gets their API key; the embedded one gets a dummy.
      revision: of the model, for the keys of its answers; None where only the user can name it.
    """

    url: str | tuple[str, ...]
    model: str
    sends_key: bool
    revision: str | None = None


def named_endpoint(config: Config) -> Served | None:
    """Returns the endpoint that `refine.base_url` or $OPENAI_BASE_URL names; None if neither is set.

    Raises:
      RunError: one of them is set, but `refine.model` is not.
    """
    url = config.refine.base_url or os.environ.get("OPENAI_BASE_URL")
    if url is None:
        return None
    if config.refine.model is None:
        served = "refine.base_url" if config.refine.base_url else "$OPENAI_BASE_URL"
        raise RunError(f"config: refine.model is missing; set it to the name of a model that {served} serves")
    return Served(url, config.refine.model, sends_key=True)


def refines_itself(session: Session) -> bool:
    """Whether the refiner is the model under training: the embedded endpoint with the base model."""
    config = session.config
    if named_endpoint(config) is not None:
        return False
    named = config.refine.model
    # By its path alone: a name is not looked up, since another program may serve it (batch files).
    return named in (None, config.model.path) or Path(named).resolve() == session.base.resolve()


@contextlib.contextmanager
def endpoint(session: Session) -> Iterator[Served]:
    """Yields the refiner's endpoint. If none is set, serves the embedded one on loopback during the block."""
    config = session.config
    if (named := named_endpoint(config)) is not None:
        yield named
        return
    if config.refine.model:
        path, template = resolve(config.refine.model), None
    else:
        path, template = session.base, config.model.template
    engine, tokenizer, eos_ids = server.load_engine(
        path, config.serve, config.model.dtype, template, session.mesh
    )
    # A rewrite depends on what the template prints, so that another day's start must print the same.
    date = config.model.template_date or datetime.date.today()
    pin_date(tokenizer, date)
    name = path.resolve().name
    revision = config.refine.model_revision or served_revision(path, tokenizer.chat_template, date, config)
    app = server.build_app(engine, tokenizer, name, eos_ids)
    with engine, listening.serve_in_background(app, port=0) as url:
        yield Served(url, name, sends_key=False, revision=revision)
    gc.collect()


def served_revision(path: Path, template: Any, date: datetime.date, config: Config) -> str:
    """16 hex digits that identify what the embedded endpoint serves, for the keys of its answers.

    Other weights at the same place are another refiner, whose answers must not be taken from the cache.
    """
    decisive = [fingerprint(path), template, str(date), config.model.dtype, config.serve.max_context]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
