"""The two effects on held-out loss: kept apart, with an interval, or a reason for none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.report_page import Page
from support.synthetic_run import write_run

from middo_jax.report import effects
from middo_jax.report.build import page
from middo_jax.report.effects import bootstrap, effect_lines
from middo_jax.report.status import render_status, status
from middo_jax.rundir import RunDir, RunError, write_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", n_rows=60)


@pytest.fixture
def run(finished: RunDir, tmp_path: Path) -> RunDir:
    """A copy that a test may take apart."""
    return RunDir(shutil.copytree(finished.path, tmp_path / "demo"))


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nll before, nll after, targets) of n rows: losses vary far more between rows than within one."""
    rng = np.random.default_rng(seed)
    targets_n = rng.integers(5, 200, n)
    loss_n = rng.gamma(4, 0.5, n)
    return loss_n * targets_n, (loss_n + rng.normal(-0.03, 0.1, n)) * targets_n, targets_n


# The interval


def test_the_interval_of_many_rows_is_the_normal_one_of_a_ratio() -> None:
    before_n, after_n, targets_n = rows(4_000)
    low, high = bootstrap(before_n, after_n, targets_n) or (0, 0)
    ratio = (after_n - before_n).sum() / targets_n.sum()
    residual_n = after_n - before_n - ratio * targets_n
    deviation = np.sqrt((residual_n**2).sum()) / targets_n.sum()  # the delta method's
    assert (low, high) == pytest.approx(
        (ratio - 1.96 * deviation, ratio + 1.96 * deviation), abs=0.1 * deviation
    )


def test_the_interval_holds_the_true_effect_in_95_of_100_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "RESAMPLES", 1_000)
    found = [bootstrap(*rows(100, seed)) for seed in range(400)]
    covered = np.mean([low < -0.03 < high for low, high in filter(None, found)])
    assert 0.91 < covered < 0.98  # 0.95 give or take three standard deviations of 400 datasets


def test_it_is_paired() -> None:
    before_n, after_n, targets_n = rows(500)
    low, high = bootstrap(before_n, after_n, targets_n) or (0, 0)
    shuffled = np.random.default_rng(1).permutation(len(after_n))
    apart = bootstrap(before_n, (after_n / targets_n)[shuffled] * targets_n, targets_n) or (0, 0)
    assert high - low < (apart[1] - apart[0]) / 5


def test_a_row_weighs_as_its_target_tokens() -> None:
    targets_n = np.array([1000, *[1] * 50])
    before_n = targets_n * 2.0
    after_n = before_n + np.array(
        [-100.0, *[0.5] * 50]
    )  # the long row gains 0.1 per token, all others lose 0.5
    interval = bootstrap(before_n, after_n, targets_n)
    assert interval is not None
    mean_of_rows = ((after_n - before_n) / targets_n).mean()
    assert interval[0] < -75 / 1050 < interval[1]
    assert mean_of_rows > 0.4
    # Without the long row every resample says 0.5; with it, it decides.
    assert interval == pytest.approx((-0.09, 0.5), abs=0.02)


def test_it_is_seeded_and_equal_models_differ_by_nothing() -> None:
    before_n, after_n, targets_n = rows(50)
    assert bootstrap(before_n, after_n, targets_n) == bootstrap(before_n, after_n, targets_n)
    assert bootstrap(before_n, after_n, targets_n, seed=1) != bootstrap(before_n, after_n, targets_n)
    assert bootstrap(before_n, before_n, targets_n) == (0, 0)


def test_rows_without_a_target_change_nothing() -> None:
    before_n, after_n, targets_n = rows(50)
    before_m, after_m, targets_m = (np.append(x, [0, 0]) for x in (before_n, after_n, targets_n))
    assert bootstrap(before_m, after_m, targets_m) == bootstrap(before_n, after_n, targets_n)
    assert bootstrap(np.array([1.0, 0]), np.array([2.0, 0]), np.array([3, 0])) is None


def test_many_rows_take_fewer_resamples_and_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "_MAX_DRAWS", 3_000_000)
    before_n, after_n, targets_n = rows(3_000)
    low, high = bootstrap(before_n, after_n, targets_n) or (0, 0)
    monkeypatch.undo()
    assert (low, high) == pytest.approx(bootstrap(before_n, after_n, targets_n), abs=(high - low) / 10)


# What is said of it


def test_the_gain_of_fine_tuning_is_not_credited_to_the_rounds(run: RunDir) -> None:
    """A run whose rounds changed 0.0002 for the worse, beside a gain of 0.286 by fine-tuning."""
    losses = {"base": 2.4624, "round_00": 2.1766, "final": 2.1768}
    models = [{"name": name, "loss": loss, "n_target_tokens": 800} for name, loss in losses.items()]
    write_json(run.heldout_losses, {"n": 20, "models": models})
    rng = np.random.default_rng(0)
    table = []
    for name, loss in losses.items():
        noise_n = rng.normal(0, 0.01, 20)
        noise_n += loss - noise_n.mean()
        table += [
            {"model": name, "id": f"row {i}", "nll": 40 * x, "n_target_tokens": 40}
            for i, x in enumerate(noise_n.tolist())
        ]
    pq.write_table(pa.Table.from_pylist(table), run.heldout_rows)

    found = status(run)["effects"]
    assert (found["rounds"]["before"], found["rounds"]["after"]) == ("round_00", "final")
    assert found["rounds"]["change"] == pytest.approx(0.0002)
    low, high = found["rounds"]["interval"]
    assert low < 0 < high
    assert found["rounds"]["verdict"] == "no effect shown"
    assert found["fine_tuning"]["change"] == pytest.approx(-0.2858)
    assert found["fine_tuning"]["verdict"] == "better"
    assert found["fine_tuning"]["n_rows"] == 20

    words = Page(page(run)).words
    assert "Effect of the rounds on held-out loss +0.0002 95 % interval −0.00" in words
    assert "round_00 2.1766 → final 2.1768" in words
    assert "Effect of fine-tuning on held-out loss −0.2858" in words
    assert "base 2.4624 → round_00 2.1766" in words
    assert "2.4624 → final" not in words
    text = render_status(status(run))
    assert "effect of the rounds (round_00 to final): +0.0002 nats per token, 95 % interval -0.00" in text
    assert "effect of fine-tuning (base to round_00): -0.2858 nats per token" in text


def test_an_old_folder_gets_its_changes_without_an_interval(run: RunDir) -> None:
    run.heldout_rows.unlink()
    found = status(run)["effects"]
    assert found["rounds"]["change"] == pytest.approx(-0.121)
    assert found["rounds"]["interval"] is found["rounds"]["verdict"] is found["rounds"]["n_rows"] is None
    words = Page(page(run)).words
    assert "−0.1210 no interval can be given: the run has no losses per row (heldout_rows.parquet)" in words
    lines = effect_lines(found)
    assert [line.partition(", no interval: ")[1] for line in lines] == [", no interval: "] * 2
    assert "95 % interval" not in render_status(status(run))


def test_rows_that_are_not_of_both_models_give_no_interval(run: RunDir) -> None:
    table = pq.read_table(run.heldout_rows)
    pq.write_table(table.slice(0, len(table) - 1), run.heldout_rows)
    found = status(run)["effects"]
    assert found["rounds"]["interval"] is None
    assert "does not have the same rows for round_00 and final" in found["rounds"]["reason"]
    assert found["fine_tuning"]["interval"] is not None


def test_rows_of_another_evaluation_give_no_interval(run: RunDir) -> None:
    facts = json.loads(run.heldout_losses.read_text(encoding="utf-8"))
    facts["models"][-1]["loss"] += 0.001
    write_json(run.heldout_losses, facts)
    found = status(run)["effects"]
    assert found["rounds"]["interval"] is None
    assert found["rounds"]["reason"] == "heldout_rows.parquet and heldout_losses.json disagree on final"
    assert found["fine_tuning"]["interval"] is not None


def test_rows_are_joined_by_id(run: RunDir) -> None:
    before = status(run)["effects"]
    table = pq.read_table(run.heldout_rows)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), run.heldout_rows)
    for name, effect in status(run)["effects"].items():
        width = effect["interval"][1] - effect["interval"][0]
        assert effect["interval"] == pytest.approx(before[name]["interval"], abs=width / 10)


def test_a_broken_file_of_rows_is_an_error_that_names_it(run: RunDir) -> None:
    run.heldout_rows.write_bytes(b"PAR1 not")
    with pytest.raises(RunError, match=r"heldout_rows\.parquet: not a table"):
        status(run)


def test_models_that_are_not_measured_yet_have_no_effect(run: RunDir) -> None:
    models = json.loads(run.heldout_losses.read_text(encoding="utf-8"))["models"]
    write_json(run.heldout_losses, {"n": 20, "models": models[:2]})
    found = status(run)["effects"]
    assert found["rounds"] is None
    assert found["fine_tuning"] is not None
    assert len(effect_lines(found)) == 1
    assert "Effect of the rounds on held-out loss not yet" in Page(page(run)).words


def test_the_page_says_when_the_final_model_was_also_trained_longer(run: RunDir) -> None:
    words = "was also trained longer"
    assert words not in page(run)
    with run.config.open("a", encoding="utf-8") as file:
        file.write("train: {start_from: previous}\n")
    assert words in page(run)
