"""Refining by batch files: what can be asked now goes into one, results come out of others, and so on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from middo_jax.refinement import AnswerCache, BatchClient, Ledger, NotAnswered, prompts, read_results
from middo_jax.refinement.endpoint.address import Secrets
from middo_jax.refinement.endpoint.client import read_key
from middo_jax.refinement.endpoint.receiving import answer_bytes
from middo_jax.rundir import RoundDir, RunError
from middo_jax.session import Session
from middo_jax.stages.refine import refine_stage
from middo_jax.stages.surroundings import heldout_of, model_of


@dataclasses.dataclass(frozen=True)
class BatchState:
    """The state of a batch.

    Attributes:
      taken: results that this call used.
      waiting: unanswered requests; 0 when the stage is finished.
      failed: those among them whose result was an error.
      first_failure: the message of the first such error.
    """

    taken: int
    waiting: int
    failed: int
    first_failure: str | None

    @property
    def is_finished(self) -> bool:
        """Whether the stage has written its files."""
        return self.waiting == 0


def batch_stage(
    session: Session,
    directory: RoundDir,
    cache: AnswerCache,
    read: Sequence[Path] = (),
    write: Path | None = None,
) -> BatchState:
    """Takes results in, finishes the stage if that was all, else writes the next requests.

    Args:
      session: settings, tokenizer, mesh; `refine.model` must be set.
      directory: holds dataset, scores and selection.
      cache: of the refiner's answers.
      read: result files. A request that was refused in one of them is not asked again, and its sample keeps
        its original; other failures are asked again.
      write: gets the requests that wait, if any do.

    Raises:
      RunError: `refine.model` is not set, a file holds no results, or results of other requests only.
    """
    config = session.config
    if config.refine.model is None:
        raise RunError("config: refine.model is missing: the name of the model that the batch is for")
    secrets = Secrets([read_key(config.refine.api_key_env)])  # a server may have echoed it into the results
    # An answer that was cut off is asked once more for twice the tokens.
    results = read_results(read, secrets, answer_bytes(2 * config.refine.max_tokens))
    index, heldout = directory.index, heldout_of(directory)
    requests = prompts.requests(config.refine.model, config.refine, config.seed)
    client = BatchClient(requests, cache, Ledger(cache, config.name, index))
    taken: set[str] = set()
    while True:
        client.start_over()
        try:
            refine_stage(session, directory, index, cache, heldout, model_of(directory), client)
            return BatchState(len(taken), 0, 0, None)
        except NotAnswered:
            settled = client.take(results)
            taken |= settled
            if not settled:
                break
    known = client.waiting.keys() | taken
    if results and not any(key in known or cache.get(key) for key in results):
        raise RunError(
            f"{read[0]}: none of the results belongs to a request of {directory.path}: they are of other "
            "data or other settings (refine.model, refine.temperature, ...)"
        )
    failed = [results[key].said for key in client.waiting if key in results]
    if write is not None:
        client.write(write)
    return BatchState(len(taken), len(client.waiting), len(failed), failed[0] if failed else None)
