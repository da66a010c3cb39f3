"""The load test and the fuzzer of benchmarks/, in short."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_model import write_tiny_model

from benchmarks.serving_fuzz import fuzz
from benchmarks.serving_load import alone, good_requests, growth, hostile_requests, plan, run_load
from middo_jax.config import ServeSettings
from middo_jax.inference.engine import Engine
from middo_jax.inference.listening import serve_in_background
from middo_jax.inference.server import build_app, load_engine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Engine]]:
    """(port, engine)"""
    model = write_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)
    engine, tokenizer, eos_ids = load_engine(model, ServeSettings(max_batch=4, max_context=512))
    with engine, serve_in_background(build_app(engine, tokenizer, "tiny", eos_ids)) as url:
        yield int(url.split(":")[2].split("/")[0]), engine


def test_every_good_request_is_answered_under_load(served: tuple[int, Engine]) -> None:
    port, engine = served
    expected = asyncio.run(alone(port))
    assert len(set(expected)) == len(good_requests())
    # Every hostile request at least once.
    requests = [("hostile", i, 0.0) for i in range(len(hostile_requests()))]
    requests += plan(40, hostile=0.1, leaving=0.3, seed=0)
    load = asyncio.run(run_load(port, expected, requests, concurrency=20))
    assert load.faults == []
    assert len(load.seconds) > 15
    assert load.n_left > 5
    assert asyncio.run(alone(port)) == expected
    assert not any(slot.answer for slot in engine._slots)


def test_memory_is_compared() -> None:
    assert growth([700, 760, 790, 761, 790, 762, 790, 790]) == 2
    assert growth([700, 760, 790, 761, 790, 790, 795, 800]) == 30
    assert growth([700] * 7) is None


def test_the_fuzzer_finds_nothing(served: tuple[int, Engine], tmp_path: Path) -> None:
    port, engine = served
    expected = asyncio.run(alone(port))
    assert fuzz(port, 3, tmp_path, workers=1) == 0
    assert asyncio.run(alone(port)) == expected
    assert engine.is_running
