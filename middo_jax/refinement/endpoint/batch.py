"""Refining without an endpoint: writes requests to files in OpenAI's batch format and reads the result files.

A task sends several requests, and each depends on the answers before it. So several files are needed: write
the requests that are possible now, have them answered, read the results into the cache, write the next ones.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from middo_jax.refinement.endpoint.address import Secrets
from middo_jax.refinement.endpoint.budget import NOTHING, Budget
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.context_check import check_context
from middo_jax.refinement.endpoint.dialect import Dialect, refused_field
from middo_jax.refinement.endpoint.faults import RETRIED, BudgetReached, NotAnswered, RequestRefused, words
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.probe import JSON, TEXT, Probe
from middo_jax.refinement.endpoint.request import Answer, Messages, PreparedRequest, Requests, read_answer
from middo_jax.refinement.endpoint.stored import keep_schema_refusal, stored_answer
from middo_jax.refinement.endpoint.usage import Ceiling, ceiling
from middo_jax.rundir import RunError, write_jsonl
from middo_jax.rundir.nesting import NestedTooDeep, require_flat

URL = "/v1/chat/completions"
LINE_BYTES = 64_000_000  # of a result file; an answer of 100,000 tokens needs less than half of it
NO_SECRETS = Secrets()
_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*"([0-9a-f]{64})"')
_OF_SCHEMA = re.compile(r"schema|grammar|response_format|json|structured|guided", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of a result file.

    Attributes:
      answer: None if the request failed.
      said: the server's message instead of an answer.
      is_final: whether the same request would fail again.
      field: the field of the request that the server refuses, if it refused one.
    """

    answer: Answer | None
    said: str = ""
    is_final: bool = False
    field: str | None = None


class BatchClient:
    """Answers from the cache. Other requests are collected in `waiting`, by key, in the order of asking."""

    def __init__(self, requests: Requests, cache: AnswerCache, ledger: Ledger) -> None:
        """See `ChatClient`. Raises ConfigError if a budget in US dollars is set without prices."""
        settings = requests.settings
        self.model = requests.model
        self.ledger = ledger
        self.waiting: dict[str, tuple[PreparedRequest, str]] = {}  # with the account
        self._budget = Budget(settings, ledger)
        self._planned = NOTHING
        self._settings = settings
        self._cache = cache
        self._requests = requests
        self._refused: dict[str, Result] = {}
        self._dialect = Dialect(cache, requests.served)

    async def honours(self, probe: Probe) -> bool:
        """The finding in the cache.

        Without one it is False, which is stored, since there is no server to try.
        """
        return self._cache.learn(self._requests.form_fact, TEXT) == JSON

    async def refuse_schema(self, reason: str) -> None:
        """Records that the server refuses schemas: no request with a schema is written from then on."""
        keep_schema_refusal(reason, self._requests, self._cache)

    async def complete(
        self,
        messages: Messages,
        *,
        attempt: int = 0,
        account: str = "all",
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """The answer in the cache.

        Raises:
          NotAnswered: the cache has no answer; the request waits for a batch.
          RequestRefused: a result file contains a refusal of this request.
          BudgetReached: this request and those that wait could exceed a budget.
        """
        request = self._requests.build(
            messages, attempt=attempt, response_format=response_format, max_tokens=max_tokens
        )
        if stored := stored_answer(request, account, self._requests, self._cache, self.ledger):
            return stored
        if refused := self._refused.get(request.key):
            raise RequestRefused(f"refused in the batch: {refused.said}", f"request refused: {refused.said}")
        if request.key not in self.waiting:
            most = ceiling(self._settings.prices, request.body["messages"], request.body["max_tokens"])
            if limit := self._budget.passed_by(most, self._planned):
                raise BudgetReached(limit, "budget")
            self._planned = Ceiling(self._planned.tokens + most.tokens, self._planned.usd + most.usd)
            self.waiting[request.key] = (request, account)
        raise NotAnswered("requests wait for a batch", "waits for a batch", stops_stage=True)

    async def close(self) -> None:
        """Does nothing: there are no connections."""

    def start_over(self) -> None:
        """Forgets the waiting requests, before all tasks are asked again."""
        self.waiting.clear()
        self._planned = NOTHING

    def take(self, results: Mapping[str, Result]) -> set[str]:
        """Removes the waiting requests with a final result and returns their keys.

        Answers are written to the cache and the ledger. Refusals are kept in this object only, other failures
        not at all. If the server refused a field, the request keeps waiting and is written without the field.
        """
        settled = set()
        for key, (request, account) in list(self.waiting.items()):
            result = results.get(key)
            if result is None or not (result.answer or result.is_final):
                continue
            if result.field and (
                self._dialect.adapt(result.field, self._dialect.sent(request.body))
                or result.field not in self._dialect.sent(request.body)
            ):
                continue
            settled.add(key)
            if result.answer:
                check_context(self._cache, request.body["messages"], result.answer)
                prices = self._settings.prices
                most = ceiling(prices, request.body["messages"], request.body["max_tokens"])
                self.ledger.begin(account, most, retry=False)
                self.ledger.answered(account, most, 0.0, result.answer, request.canonical, prices)
            else:
                if "response_format" in request.body and _OF_SCHEMA.search(result.said):
                    keep_schema_refusal(f"request refused: {result.said}", self._requests, self._cache)
                self._refused[key] = result
                self.ledger.failed(account)
            del self.waiting[key]
        return settled

    def write(self, path: Path) -> None:
        """Writes the waiting requests, one per line, whole or not at all."""
        rows = (
            {"custom_id": key, "method": "POST", "url": URL, "body": self._dialect.sent(request.body)}
            for key, (request, _) in self.waiting.items()
        )
        write_jsonl(path, rows)


def require_batch_file(path: Path) -> None:
    """Requires that a file does not exist, is empty, or has requests that `BatchClient.write` wrote.

    Raises:
      RunError: it is another file, which would be lost.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        first = lines.readline(LINE_BYTES)
    if first.strip() and not (_CUSTOM_ID.search(first[:200]) and b'"method"' in first[:200]):
        raise RunError(f"{path} exists and has no requests of a batch; name another file, or remove it")


def read_results(
    paths: Iterable[Path], secrets: Secrets = NO_SECRETS, most_bytes: int = LINE_BYTES
) -> dict[str, Result]:
    """The results by request key. If a request has several, an answer is preferred, otherwise the last one.

    A line that is longer than `most_bytes`, or nested too deep, is a failure of its request.

    Args:
      paths: result files.
      secrets: are removed from answers and messages.
      most_bytes: of a line.

    Raises:
      RunError: a line is not a result of a batch; the message names file and line.
    """
    results: dict[str, Result] = {}
    for path in paths:
        with path.open("rb") as lines:
            number = 0
            while line := lines.readline(most_bytes + 1):
                number += 1
                try:
                    found = _read_line(line, most_bytes, secrets)
                except (ValueError, TypeError, LookupError) as e:
                    raise RunError(
                        f"{path}:{number}: not a result of a batch ({e!r}); give the output file of a batch "
                        "that `middo refine --write-batch` wrote"
                    ) from e
                # The rest of a line that is too long.
                while len(line) > most_bytes and not line.endswith(b"\n"):
                    line = lines.readline(most_bytes + 1)
                if found is not None and (found[0] not in results or results[found[0]].answer is None):
                    results[found[0]] = found[1]
    return results


def _read_line(line: bytes, most_bytes: int, secrets: Secrets) -> tuple[str, Result] | None:
    """(request key, result) of a line, which may be cut; None if it is empty."""
    if not line.strip():
        return None
    why = None
    if len(line) > most_bytes:
        why = f"its line is longer than {most_bytes:,} bytes"
    else:
        try:
            require_flat(line)
        except NestedTooDeep as e:
            why = str(e)
    if why is not None:
        if named := _CUSTOM_ID.search(line):
            return named[1].decode(), Result(None, why)
        raise ValueError(why)
    row = json.loads(line.decode())
    key = row["custom_id"]
    if not isinstance(key, str):
        raise TypeError("custom_id is no text")
    return key, _read_result(row, key, secrets)


def _read_result(row: dict[str, Any], key: str, secrets: Secrets) -> Result:
    response = row.get("response")
    response = response if isinstance(response, dict) else {}
    status, body = response.get("status_code"), response.get("body")
    if row.get("error") is None and status in (None, 200):
        try:
            return Result(read_answer(body, key, secrets))
        except ValueError as e:
            return Result(None, words(e, secrets))
    error = body.get("error") if isinstance(body, dict) else None
    said = words(row.get("error") or error or body, secrets)
    is_final = isinstance(status, int) and 400 <= status < 500 and status not in RETRIED
    field = refused_field(body) if is_final else None
    return Result(None, f"({status}) {said}" if isinstance(status, int) and status else said, is_final, field)
