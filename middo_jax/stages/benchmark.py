"""The benchmarks stage: a model -> its scores on `evaluate.tasks`."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from middo_jax.config import Config, ConfigError
from middo_jax.data.tokenize import eos_token_ids
from middo_jax.evaluation.pairs import Encoder, Pair
from middo_jax.inference.engine import Engine
from middo_jax.inference.sampling import Request
from middo_jax.inference.until import answers_until
from middo_jax.models.model import Model
from middo_jax.passes.continuations import Continuation, score_continuations
from middo_jax.rundir import RoundDir, write_json
from middo_jax.rundir.rows import BenchmarkModelRow, BenchmarkScoreRow, BenchmarksFile
from middo_jax.session import Session

if TYPE_CHECKING:
    from middo_jax.evaluation.harness import Prompt


def check_benchmarks(config: Config) -> None:
    """Checks what can be known of `evaluate.tasks` before a model is there.

    Raises:
      ConfigError: lm-eval is not installed, the job has several processes, or see `check_tasks`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("config: evaluate.tasks needs lm-eval: pip install 'middo-jax[eval]'")
    if jax.process_count() > 1:
        raise ConfigError(
            f"config: evaluate.tasks runs in one process, and this job has {jax.process_count()}; leave it "
            "out here, and run `middo eval --tasks` on a round's checkpoint on one host"
        )
    from middo_jax.evaluation.benchmarks import check_tasks  # not at the top: needs the extra `eval`

    check_tasks(config.evaluate)


class SessionBackend:
    """A loaded model as the harness uses it: a scoring pass for log-likelihoods, the engine for answers."""

    def __init__(self, session: Session, model: Model, max_length: int) -> None:
        self._session, self._model, self._max_length = session, model, max_length

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `evaluation.harness.Backend`."""
        scoring = self._session.config.scoring
        scores, _ = score_continuations(
            self._model,
            [Continuation(*pair) for pair in pairs],
            batch_tokens=scoring.batch_tokens,
            chunk=scoring.unembed_chunk,
            progress=self._session.progress,
        )
        return list(zip(scores.log_likelihood_n.tolist(), scores.is_greedy_n.tolist(), strict=True))

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `evaluation.harness.Backend`."""
        session, tokenizer = self._session, self._session.tokenizer
        ends = eos_token_ids(session.base, tokenizer)
        requests = [
            Request(p.tokens, p.max_tokens, p.temperature, p.top_p, p.top_k, p.seed, ends) for p in prompts
        ]
        decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        slots = session.config.serve.max_batch
        with (
            session.progress.task("answers", "questions") as advance,
            Engine(self._model.graphdef, self._model.params, slots, self._max_length) as engine,
        ):
            return answers_until(
                engine, requests, [p.until for p in prompts], lambda ids: str(decode(ids)), advance
            )


def benchmark_scores(session: Session, model: Model) -> list[BenchmarkScoreRow]:
    """The scores of a loaded model on `evaluate.tasks`.

    Raises:
      ConfigError: see `check_benchmarks`.
      OSError: a task's dataset is neither here nor within reach.
    """
    check_benchmarks(session.config)
    # Not at the top: they need the extra `eval`.
    from middo_jax.evaluation.benchmarks import run_benchmarks
    from middo_jax.evaluation.harness import HarnessModel

    settings, progress = session.config.evaluate, session.progress
    max_length = min(settings.max_length, model.config.max_position_embeddings)
    backend = SessionBackend(session, model, max_length)
    lm = HarnessModel(Encoder(session.tokenizer), backend, max_length, progress.say)
    return run_benchmarks(lm, settings)


def measure_benchmarks(session: Session, models: Mapping[str, Path]) -> BenchmarksFile:
    """The scores of some models by name, one model after another."""
    measured: list[BenchmarkModelRow] = []
    for name, path in models.items():
        model = session.load_model(path)
        measured.append({"name": name, "scores": benchmark_scores(session, model)})
        del model
        gc.collect()  # two models need not fit into the memory
    settings = session.config.evaluate
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "chat_template": settings.chat_template,
        "limit": settings.limit,
        "models": measured,
    }


def benchmark_stage(
    session: Session, directory: RoundDir, models: Mapping[str, Path]
) -> dict[str, dict[str, float]]:
    """Writes benchmarks.json; returns by model and task the score that is shown first."""
    found = measure_benchmarks(session, models)
    write_json(directory.benchmarks, found)
    return {of["name"]: first_scores(of["scores"]) for of in found["models"]}


def first_scores(rows: Sequence[BenchmarkScoreRow]) -> dict[str, float]:
    """The first metric of each task or group that was asked for, by its name."""
    found: dict[str, float] = {}
    for row in rows:
        if row["group"] is None:
            found.setdefault(row["task"], row["value"])
    return found
