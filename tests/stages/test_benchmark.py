"""Benchmarks on a tiny model: the numbers are the model's, a second run repeats them, and faults are told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.command import Middo
from support.forward import forward
from support.local_tasks import LOCAL_TASKS, write_local_tasks
from support.processes import run_together
from support.tiny_model import write_tiny_model

import middo_jax
from middo_jax.config import ConfigError, load
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.evaluation.pairs import Pair
from middo_jax.inference.engine import Engine
from middo_jax.inference.sampling import Request
from middo_jax.models import hf
from middo_jax.report.benchmarks import render_benchmarks
from middo_jax.rundir.rows import BenchmarksFile
from middo_jax.rundir.schemas import faults
from middo_jax.stages.benchmark import (
    check_benchmarks,
    packed_pairs,
    require_higher_is_better,
    unpacked_pairs,
)

pytest_plugins = ["support.command"]

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    write_tiny_model(root / "model")
    write_local_tasks(root / "tasks")
    return root


def run(root: Path, **more: Any) -> BenchmarksFile:
    settings = {"evaluate.include_path": str(root / "tasks"), "evaluate.max_length": 64}
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    return middo_jax.benchmark(root / "model", LOCAL_TASKS, settings=settings)


@pytest.fixture(scope="module")
def found(root: Path) -> BenchmarksFile:
    return run(root)


def values(found: BenchmarksFile) -> dict[tuple[str, str], float]:
    (model,) = found["models"]
    return {(row["task"], row["metric"]): row["value"] for row in model["scores"]}


def log_likelihood(root: Path, text: str) -> float:
    """Of a text behind BOS, without any packing."""
    model, tokenizer = hf.load(root / "model"), load_tokenizer(root / "model")
    tokens = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    at = jnp.arange(len(tokens))[None]
    hidden_btd = forward(model.graphdef, model.params, jnp.asarray([tokens]), jnp.zeros_like(at), at)
    logits = np.asarray(hidden_btd[0], np.float64) @ np.asarray(model.params["embed"][...], np.float64).T
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(log_p[t - 1, tokens[t]] for t in range(1, len(tokens))))


def test_the_file_is_as_declared_and_names_what_it_measured(found: BenchmarksFile) -> None:
    assert faults(found, BenchmarksFile) == []
    assert [model["name"] for model in found["models"]] == ["model"]
    assert set(values(found)) == {
        ("capitals", "answer_p"),
        ("capitals", "acc"),
        ("sums", "exact_match"),
        ("texts", "bits_per_byte"),
    }
    rows = {row["metric"]: row for row in found["models"][0]["scores"]}
    assert rows["acc"]["stderr"] is not None
    assert {rows[m]["kind"] for m in ("acc", "bits_per_byte")} == {"log-likelihood"}
    assert rows["exact_match"]["kind"] == "generative"
    text = render_benchmarks([found])
    assert "answer_p" in text
    assert "+-" in text


def test_rolling_is_the_log_likelihood_of_the_texts(root: Path, found: BenchmarksFile) -> None:
    texts = [
        f"The capital of {a} is {b}, as people know."
        for a, b in (
            ("France", "Paris"),
            ("Spain", "Madrid"),
            ("Italy", "Rome"),
            ("Greece", "Athens"),
            ("Egypt", "Cairo"),
        )
    ]
    total = sum(log_likelihood(root, text) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert values(found)["texts", "bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_a_second_run_and_another_packing_give_the_same(root: Path, found: BenchmarksFile) -> None:
    assert run(root) == found
    other = values(run(root, scoring__batch_tokens=256, serve__max_batch=2))
    assert other == {key: pytest.approx(value, rel=1e-5) for key, value in values(found).items()}


def test_limit_shots_and_chat_change_what_is_asked(root: Path, found: BenchmarksFile) -> None:
    changed = run(root, evaluate__limit=2, evaluate__chat_template=True)
    assert (changed["limit"], changed["chat_template"]) == (2, True)
    assert {row["n"] for row in changed["models"][0]["scores"]} == {2}
    assert values(changed)["capitals", "answer_p"] != values(found)["capitals", "answer_p"]


def test_what_cannot_run_is_told_before(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"model.path": "-", "data.path": "-", "evaluate.include_path": str(root / "tasks")}
    config = load(None, [named, {"evaluate.tasks": ["capitals"]}])
    check_benchmarks(config)
    with pytest.raises(ConfigError, match="no tasks"):
        middo_jax.benchmark(root / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'middo-jax\[eval\]'"):
        check_benchmarks(config)


def test_an_answer_ends_before_its_stop_text_wherever_the_blocks_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from middo_jax.inference import until

    model, tokenizer = hf.load(root / "model"), load_tokenizer(root / "model")
    decode = tokenizer.decode
    requests = [Request(tokenizer.encode(text), 40) for text in ("a", "the capital", "Write a story")]
    seen: list[tuple[int, int]] = []

    def advance(done: int, total: int, note: str = "", /) -> None:
        seen.append((done, total))

    with Engine(model.graphdef, model.params, 2, 96) as engine:
        whole = [str(decode(answer.tokens)) for answer in engine.generate(requests)]
        stops = [[text[len(text) // 2 :][:3]] for text in whole]
        for block in (1, 7, 64):
            monkeypatch.setattr(until, "BLOCK", block)
            ask = until.answers_until
            assert ask(engine, requests, [()] * 3, lambda ids: str(decode(ids)), advance) == whole
            cut = ask(engine, requests, stops, lambda ids: str(decode(ids)), advance)
            assert cut == [text[: text.index(stop)] for text, (stop,) in zip(whole, stops, strict=True)]
        with pytest.raises(ValueError, match="the prompt has 96 tokens"):
            until.answers_until(engine, [Request([5] * 96, 4)], [()], str, advance)
    assert seen[-1] == (3, 3)


def test_pairs_arrive_as_they_were_sent_and_alike_ones_are_small() -> None:
    contexts = [[*range(500), i] for i in range(50)]
    pairs = [Pair(context, [i] * (i % 3)) for i, context in enumerate(contexts)]
    assert unpacked_pairs(packed_pairs(pairs)) == pairs
    assert len(packed_pairs(pairs)) < 50 * 501
    assert unpacked_pairs(packed_pairs([])) == []


def test_the_command_prints_a_table_and_asks_for_what_is_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch, middo: Middo, found: BenchmarksFile
) -> None:
    command = ("eval", "--model", root / "model")
    tasks = ("--tasks", "capitals", "--include-path", root / "tasks", "evaluate.max_length=64")
    code, out, _ = middo(*command, *tasks)
    value = values(found)["capitals", "answer_p"]
    assert code == 0
    assert out.splitlines()[1].split()[:5] == ["capitals", "answer_p", "log-likelihood", "5", f"{value:.4f}"]
    code, out, err = middo(*command)
    assert (code, out) == (1, "")
    assert "give --data for the loss on a dataset, or --tasks for benchmarks" in err
    # lm-eval's own index takes seconds to read.
    own = lm_eval_tasks.TaskManager(include_defaults=False)
    monkeypatch.setattr("middo_jax.evaluation.benchmarks._with_defaults", lambda folder: own)
    code, _, err = middo(*command, "--tasks", "capitols", "--include-path", root / "tasks", "--limit", 2)
    assert code == 1
    assert "lm-eval has no task, group or tag 'capitols'" in err


# What one process prints.
PROGRAM = """
import sys
from middo_jax import cli

model, tasks, out, address, processes, process = sys.argv[1:]
job = ["--coordinator", address, "--processes", processes, "--process", process] if processes != "1" else []
named = ["--tasks", "capitals,sums,texts", "--include-path", tasks, "--model", model, "--json"]
sys.argv = ["middo", *job, "eval", *named, "evaluate.max_length=64", "mesh.fsdp=2"]
sys.stdout = open(out, "w")
try:
    cli.main()
finally:
    sys.stdout.flush()
"""


@pytest.mark.multiprocess
def test_two_processes_find_what_one_finds(
    root: Path, tmp_path: Path, found: BenchmarksFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    run_together(
        2, lambda process: ["-c", PROGRAM, root / "model", root / "tasks", tmp_path / f"{process}.json"]
    )
    assert (tmp_path / "1.json").read_text() == ""
    both = json.loads((tmp_path / "0.json").read_text())
    assert values(both) == {key: pytest.approx(value, rel=1e-5) for key, value in values(found).items()}


def test_a_metric_that_is_better_when_lower_cannot_end_the_rounds(found: BenchmarksFile) -> None:
    with pytest.raises(ConfigError, match=r"bits_per_byte of texts is better when lower"):
        require_higher_is_better(found)
    higher = [row for row in found["models"][0]["scores"] if row["task"] != "texts"]
    require_higher_is_better({**found, "models": [{"name": "model", "scores": higher}]})
