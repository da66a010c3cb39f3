"""Refinement with batch files: writes all possible requests to a file, and reads results from other files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from middo_jax.refinement import AnswerCache, BatchClient, Ledger, NotAnswered, prompts, read_results
from middo_jax.refinement.endpoint.address import Secrets
from middo_jax.refinement.endpoint.batch import require_batch_file
from middo_jax.refinement.endpoint.client import read_key
from middo_jax.refinement.endpoint.receiving import answer_bytes
from middo_jax.refinement.words import read_words
from middo_jax.rundir import RoundDir, RunError
from middo_jax.session import Session
from middo_jax.stages.refine import check_learnt, refine_stage
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
    """Reads results. Finishes the stage if all requests are answered, else writes the next requests.

    Args:
      session: settings, tokenizer, mesh; `refine.model` must be set.
      directory: folder with dataset, scores and selection.
      cache: cache of the refiner's answers.
      read: result files. A refused request is not sent again, and its sample stays as it is; other failed
        requests are sent again.
      write: file for the unanswered requests, if there are any.

    Raises:
      RunError: `refine.model` is not set, a file contains no results or only results of other requests,
        `write` is another file or would be in the folder, or training made the model worse, see
        `check_learnt`.
    """
    config = session.config
    if write is not None:
        directory.require_elsewhere(write)
        require_batch_file(write)
    check_learnt(config, directory)
    if config.refine.model is None:
        raise RunError("config: refine.model is missing: set it to the name of the model that runs the batch")
    secrets = Secrets([read_key(config.refine.api_key_env)])  # a server may have echoed it into the results
    # A truncated answer is requested once more with twice the tokens.
    results = read_results(read, secrets, answer_bytes(2 * config.refine.max_tokens))
    index, heldout = directory.index, heldout_of(directory)
    requests = prompts.requests(
        config.refine.model, config.refine, config.seed, read_words(config.refine.prompts)
    )
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
            f"{read[0]}: none of the results belongs to a request of {directory.path}: they were requested "
            "for other data or with other settings (refine.model, refine.temperature, ...)"
        )
    failed = [results[key].said for key in client.waiting if key in results]
    if write is not None:
        client.write(write)
    return BatchState(len(taken), len(client.waiting), len(failed), failed[0] if failed else None)
