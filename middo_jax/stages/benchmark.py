"""The benchmarks stage: a model -> its scores on `evaluate.tasks`."""

from __future__ import annotations

import base64
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from middo_jax.config import Config, ConfigError
from middo_jax.data.tokenize import eos_token_ids
from middo_jax.evaluation.pairs import Encoder, Pair
from middo_jax.inference.engine import Engine
from middo_jax.inference.sampling import Request
from middo_jax.inference.until import answers_until
from middo_jax.models.loading import load, locate
from middo_jax.models.model import Model
from middo_jax.parallel.coordination import Together, follow, is_first, lead
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes.continuations import Continuation, score_continuations
from middo_jax.rundir import RoundDir, write_json
from middo_jax.rundir.rows import BenchmarkModelRow, BenchmarkScoreRow, BenchmarksFile
from middo_jax.session import Session

if TYPE_CHECKING:
    from middo_jax.evaluation.harness import Prompt

FOLLOWED = "benchmark"  # the name of what process 0 leads


def check_benchmarks(config: Config) -> None:
    """Checks `evaluate.tasks` as far as that is possible without a model.

    Raises:
      ConfigError: lm-eval is not installed, or see `check_tasks`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("config: evaluate.tasks needs lm-eval: pip install 'middo-jax[eval]'")
    from middo_jax.evaluation.benchmarks import check_tasks  # not at the top: needs the extra `eval`

    check_tasks(config.evaluate)


class SessionBackend:
    """A loaded model as the harness uses it: a scoring pass for log-likelihoods, the engine for answers.

    In a job of several processes the first one runs lm-eval, and the others follow its passes; the engine
    runs on the first process's own devices.

    Args:
      session: settings, tokenizer, mesh.
      path: of the model.
      model: the model there, on the session's mesh.
      together: sends the other processes what all do next, see `parallel.coordination.lead`.
    """

    def __init__(
        self, session: Session, path: Path, model: Model, together: Together = contextlib.nullcontext
    ) -> None:
        self._session, self._path, self._model, self._together = session, path, model, together
        self.max_length = min(session.config.evaluate.max_length, model.config.max_position_embeddings)

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `evaluation.harness.Backend`."""
        if not pairs:
            return []
        with self._together(packed_pairs(pairs) if jax.process_count() > 1 else None):
            return self.scored(pairs)

    def scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Every process's part of `log_likelihoods`."""
        scores, _ = score_continuations(
            self._model,
            [Continuation(*pair) for pair in pairs],
            batch_tokens=self._session.batch_tokens,
            chunk=self._session.config.scoring.unembed_chunk,
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
        slots, model = session.config.serve.max_batch, self._own_model
        with (
            session.progress.task("answers", "questions") as advance,
            Engine(model.graphdef, model.params, slots, self.max_length) as engine,
        ):
            return answers_until(
                engine, requests, [p.until for p in prompts], lambda ids: str(decode(ids)), advance
            )

    @functools.cached_property
    def _own_model(self) -> Model:
        """The model on this process's devices alone."""
        if jax.process_count() == 1:
            return self._model
        return load(
            locate(self._path), self._session.config.model.dtype, mesh=make_mesh(devices=jax.local_devices())
        )


def packed_pairs(pairs: Sequence[Pair]) -> str:
    """Pairs as text for the other processes; similar contexts take almost no space."""
    numbers = [n for pair in pairs for part in pair for n in (len(part), *part)]
    return base64.b64encode(zlib.compress(np.asarray(numbers, np.int32).tobytes())).decode()


def unpacked_pairs(text: str) -> list[Pair]:
    """The reverse of `packed_pairs`."""
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int32).tolist()
    parts: list[list[int]] = []
    start = 0
    while start < len(numbers):
        end = start + 1 + numbers[start]
        parts.append(numbers[start + 1 : end])
        start = end
    return [Pair(*both) for both in zip(parts[::2], parts[1::2], strict=True)]


def benchmark_scores(session: Session, path: Path) -> list[BenchmarkScoreRow]:
    """The scores of a model on `evaluate.tasks`; in all processes but the first one [].

    Raises:
      ConfigError: see `check_benchmarks`.
      OSError: a task's dataset is neither here nor within reach.
    """
    check_benchmarks(session.config)
    # Not at the top: they need the extra `eval`.
    from middo_jax.evaluation.benchmarks import run_benchmarks
    from middo_jax.evaluation.harness import HarnessModel

    model, progress = session.load_model(path), session.progress
    if not is_first():
        backend = SessionBackend(session, path, model)
        for told in follow(FOLLOWED):
            backend.scored(unpacked_pairs(told))
        return []
    with lead(FOLLOWED) as together:
        backend = SessionBackend(session, path, model, together)
        lm = HarnessModel(Encoder(session.tokenizer), backend, backend.max_length, progress.say)
        return run_benchmarks(lm, session.config.evaluate)


def measure_benchmarks(session: Session, models: Mapping[str, Path]) -> BenchmarksFile:
    """The scores of some models by name, one model after another."""
    measured: list[BenchmarkModelRow] = []
    for name, path in models.items():
        measured.append({"name": name, "scores": benchmark_scores(session, path)})
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
    if session.config.stop.patience is not None and session.config.stop.metric == "task":
        require_higher_is_better(found)
    write_json(directory.benchmarks, found)
    return {of["name"]: first_scores(of["scores"]) for of in found["models"]}


def require_higher_is_better(found: BenchmarksFile) -> None:
    """Raises ConfigError if `stop.metric=task` would take a metric that is better when lower."""
    for model in found["models"]:
        names = first_scores(model["scores"])
        firsts = [next(row for row in model["scores"] if row["task"] == name) for name in names]
        if lower := [row for row in firsts if row["higher_is_better"] is False]:
            raise ConfigError(
                f"config: stop.metric=task takes the mean of scores that are better when higher; "
                f"{lower[0]['metric']} of {lower[0]['task']} is better when lower. Leave the task out of "
                "evaluate.tasks, or set stop.metric=heldout_loss"
            )


def first_scores(rows: Sequence[BenchmarkScoreRow]) -> dict[str, float]:
    """The first metric of each task or group that was asked for, by its name."""
    found: dict[str, float] = {}
    for row in rows:
        if row["group"] is None:
            found.setdefault(row["task"], row["value"])
    return found
