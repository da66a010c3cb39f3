"""A bad day of an endpoint, on real sockets: nothing is lost, doubled, asked in vain; the money is right.

Times are divided by 20; benchmarks/hostile_refiner.py runs the same in real life and holds it to its time.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.hostile_load import Load, check, run_load, served

SCALE = 20.0
SAMPLES = 1650  # about 5,000 tries
MEMORY_MB = 500


@pytest.fixture(scope="module")
def bad_day(tmp_path_factory: pytest.TempPathFactory) -> tuple[Load, list[dict[str, object]], Path]:
    """The load, the server's log, and where the cache is."""
    folder = tmp_path_factory.mktemp("hostile")
    with served(folder / "log.jsonl", SCALE, "--faults", "--overload", "100") as server:
        server.wait()
        load = run_load(server, SAMPLES, folder / "cache.sqlite", 64, restart=True)
        check(load, server, folder / "cache.sqlite")
        return load, server.tries(), folder


@pytest.mark.multiprocess
def test_every_sample_ends_once_and_the_money_is_counted_to_the_token(
    bad_day: tuple[Load, list[dict[str, object]], Path],
) -> None:
    load, tries, _ = bad_day
    met = collections.Counter(str(line["what"]) for line in tries)
    assert len(tries) > 4500
    assert load.away
    everything = {"429", "429 retry-after", "500", "hang", "drop", "body", "content", "length", "empty"}
    assert everything | {"overload", "loading", "400", "answer"} == met.keys()
    reasons = load.reasons()
    assert reasons["accepted"] > 0.94 * SAMPLES
    known = {"accepted", "empty answer", "truncated answer", "unparsable", "request refused (400)"}
    failed = {reason for reason in reasons if reason.startswith("request failed")}
    assert reasons.keys() <= known | failed
    assert sum(reasons[reason] for reason in failed) < 0.01 * SAMPLES


@pytest.mark.multiprocess
def test_a_second_start_pays_only_for_what_had_failed(
    bad_day: tuple[Load, list[dict[str, object]], Path], tmp_path: Path
) -> None:
    first, _, folder = bad_day
    with served(tmp_path / "log.jsonl", SCALE) as server:
        server.wait()
        again = run_load(server, SAMPLES, folder / "cache.sqlite", 64, restart=False)
        assert again.ledger.here.requests == len(server.tries()) < 0.1 * SAMPLES
    # What had failed may have been asked in another way then, whose answer is not needed now.
    unused = first.ledger.here.answers - again.ledger.here.from_cache
    assert 0 <= unused <= first.ledger.here.failed
    for before, after in zip(first.outcomes, again.outcomes, strict=True):
        # A refusal is not kept: neither that of a request nor that of more room for a truncated answer.
        if before.example or (before.verdict and before.verdict.detail in ("empty answer", "unparsable")):
            assert (after.example, after.verdict) == (before.example, before.verdict)


@pytest.mark.multiprocess
def test_a_thousand_requests_in_flight_take_little_memory(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "support" / "hostile_load.py"
    command = [sys.executable, str(program), str(tmp_path / "log.jsonl"), "1000"]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    assert told["most_in_flight"] >= 999  # an answer is no longer in flight when its sample ends
    assert told["accepted"] == 1000
    assert told["rss_mb"] < MEMORY_MB


def test_the_servers_faults_are_those_it_promises() -> None:
    from support.hostile_server import FAULTS, chance

    drawn = [chance("fault", key, 0) for key in range(20_000)]
    assert min(drawn) >= 0
    assert max(drawn) < 1
    assert sum(FAULTS.values()) == pytest.approx(0.31)
    assert sum(draw < 0.1 for draw in drawn) == pytest.approx(2000, rel=0.1)
