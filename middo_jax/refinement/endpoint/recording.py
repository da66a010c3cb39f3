"""Recorded answers: a file that any run can replay in the place of a server (`refine.base_url: replay:FILE`).

The first line says which model answered. Each further line has a request's body as it was sent, and its
answer. A request is answered by the line with an equal body, so nothing else can be taken for an answer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from middo_jax.refinement.endpoint.batch import LINE_BYTES
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.probe import JSON, TEXT
from middo_jax.refinement.endpoint.request import Answer, canonical, encodable, request_key
from middo_jax.rundir import RunError, file_hash, write_jsonl
from middo_jax.rundir.nesting import require_flat

VERSION = 1
_MODEL_CHARS = 200
_REASON_CHARS = 64
_NOT_SENT = ("model_revision", "prompt_version", "attempt")  # of a request's identity in the cache


@dataclasses.dataclass(frozen=True)
class Recording:
    """The answers of a file.

    Attributes:
      path: of the file.
      model: the model that answered.
      hash: of the file's content.
      form: whether new prompts were asked for with a schema (`json`) or between tags (`text`).
      answers: by the key of the request's body.
    """

    path: Path
    model: str
    hash: str
    form: str
    answers: Mapping[str, Answer] = dataclasses.field(repr=False)

    def answer(self, body: Mapping[str, Any]) -> Answer | None:
        """The recorded answer to a request's body; None if there is none."""
        return self.answers.get(body_key(body))


def body_key(body: Mapping[str, Any]) -> str:
    """The key of a request's body as it is sent."""
    return request_key({name: value for name, value in body.items() if value is not None})


def sent_body(request_json: str) -> dict[str, Any]:
    """The body that was sent, of a request as the cache has it."""
    identity = json.loads(request_json)
    return {name: value for name, value in identity.items() if name not in _NOT_SENT and value is not None}


def read_header(path: Path) -> tuple[str, str]:
    """(model, form) of a file of recorded answers.

    Raises:
      RunError: the file cannot be read, or is none.
    """
    first = next(_lines(path), None)
    if first is None:
        raise RunError(f"{path}: no recorded answers: the file is empty")
    header, where = first
    version, model, form = (header.get(name) for name in ("recorded_answers", "model", "form"))
    if not isinstance(version, int) or isinstance(version, bool):
        raise RunError(
            f"{where}: not a file of recorded answers; `middo refine DIR --record FILE` writes one"
        )
    if version > VERSION:
        raise RunError(f"{where}: version {version}; this middo-jax reads up to {VERSION}. Update it")
    if not isinstance(model, str) or not 0 < len(model) <= _MODEL_CHARS or not model.isprintable():
        raise RunError(
            f"{where}: `model` must name the model that answered, in up to {_MODEL_CHARS} characters"
        )
    if form not in (JSON, TEXT):
        raise RunError(f"{where}: `form` must be json or text")
    return model, form


def read_recording(path: Path) -> Recording:
    """Reads a file of recorded answers; of equal requests the first counts.

    Raises:
      RunError: the file cannot be read, or a line is not as it must be; the message names the line.
    """
    model, form = read_header(path)
    answers: dict[str, Answer] = {}
    for n, (row, where) in enumerate(_lines(path)):
        if n == 0:
            continue
        body, text, reason = row.get("request"), row.get("text"), row.get("finish_reason")
        if not isinstance(body, dict) or body.get("model") != model:
            raise RunError(f"{where}: `request` must be the body of a request to {model}")
        if not isinstance(text, str) or not isinstance(reason, str) or len(reason) > _REASON_CHARS:
            raise RunError(f"{where}: `text` and `finish_reason` must be texts")
        asked, written = (
            _count(row.get(name), name, where) for name in ("prompt_tokens", "completion_tokens")
        )
        try:
            key = body_key(body)
        except ValueError as error:  # a number that is not finite
            raise RunError(f"{where}: `request` is not JSON: {error}") from None
        answers.setdefault(key, Answer(encodable(text), encodable(reason), asked, written))
    return Recording(path, model, file_hash(path), form, answers)


def _count(value: Any, name: str, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise RunError(f"{where}: `{name}` must be a number of tokens")
    return value


def write_recording(path: Path, cache: AnswerCache, model: str) -> int:
    """Writes all answers of one model that a cache has; returns their number.

    Of equal requests, of several revisions of the model, the last counts.

    Raises:
      RunError: the file exists, or the cache has no answer of the model.
    """
    if path.exists():
        raise RunError(f"{path} exists; name another file, or remove it")
    rows: dict[str, dict[str, Any]] = {}
    for request_json, answer in cache.all():
        body = sent_body(request_json)
        if body.get("model") == model:
            facts = {name: getattr(answer, name) for name in ("text", "finish_reason")}
            counts = {name: getattr(answer, name) for name in ("prompt_tokens", "completion_tokens")}
            rows[body_key(body)] = {"request": body, **facts, **counts}
    if not rows:
        raise RunError(
            f"{cache.path}: no answer of {model}; refine.model names the model whose answers are meant"
        )
    found = {form for name, form in cache.facts().items() if f"{name} ".startswith(f"form of {model} ")}
    form = JSON if JSON in found else TEXT
    header = {"recorded_answers": VERSION, "model": model, "form": form, "n": len(rows)}
    write_jsonl(path, [header, *(rows[key] for key in sorted(rows, key=lambda key: canonical(rows[key])))])
    return len(rows)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines as objects, each with its place."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > LINE_BYTES:
                    raise RunError(f"{where}: a line of more than {LINE_BYTES:,} bytes")
                if line.strip():
                    yield _object(line, where), where
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror or error}); refine.base_url names it"
        ) from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        require_flat(line)
        value = json.loads(line.decode())
    except ValueError as error:
        raise RunError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise RunError(f"{where}: not an object")
    return value
