"""Templates that print the date: the same tokens on every day of a run, recorded in its settings."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from starlette.applications import Starlette
from support.tiny_model import CHAT_TEMPLATE, write_tiny_model
from transformers.utils import chat_template_utils

from middo_jax import cli, session, template_date
from middo_jax.config import load
from middo_jax.data.example import Example, Message
from middo_jax.data.templates import pin_date, template_arguments
from middo_jax.data.tokenize import load_tokenizer, tokenize, tokenize_prompt
from middo_jax.inference import listening, server
from middo_jax.progress import Silent
from middo_jax.rundir import RunDir, write_text
from middo_jax.session import Session
from middo_jax.stages.before import Wanted, _identity
from middo_jax.stages.endpoint import endpoint

DAY = datetime.date(2026, 3, 7)
ASKS = "{{- '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHAT_TEMPLATE
EXAMPLE = Example((Message("user", "Hi"), Message("assistant", "Hello")))


def directory_with(path: Path, template: str) -> Path:
    directory = write_tiny_model(path)
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    return directory


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("'%d %b %Y'", "07 Mar 2026"),
        ("'%Y-%m-%d'", "2026-03-07"),
        ("'%B %-d, %Y'", "March 7, 2026"),
        ("'%A'", "Saturday"),
        ("'%d' + '%% of %y'", "07% of 26"),
        ("form", "07.03.2026"),
    ],
)
def test_every_format_prints_the_pinned_day(tmp_path: Path, wanted: str, shown: str) -> None:
    template = (
        "{%- set form = '%d.%m.%Y' %}{%- if strftime_now is defined %}"
        f"{{%- set date = strftime_now({wanted}) %}}{{%- endif %}}{{{{- date + '\n' }}}}" + CHAT_TEMPLATE
    )
    tokenizer = load_tokenizer(directory_with(tmp_path / "model", template), date=DAY)
    text = str(tokenizer.decode(tokenize(EXAMPLE, tokenizer, 1 << 20).tokens_n.tolist()))
    assert text == f"{shown}\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    asked = str(tokenizer.decode(tokenize_prompt(EXAMPLE.messages[:1], tokenizer).tolist()))
    assert text.startswith(asked)
    assert tokenizer.chat_template == template  # an export carries the template that prints each day


def test_a_template_without_a_date_is_rendered_as_it_is(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_model(tmp_path / "model"), date=DAY)
    assert template_arguments(tokenizer) == {}


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the day of the wall clock, for us and for transformers."""

    def set_day(day: datetime.date) -> None:
        moment = datetime.datetime.combine(day, datetime.time(23, 59))
        fake = SimpleNamespace(
            date=SimpleNamespace(today=lambda: day), datetime=SimpleNamespace(now=lambda *_: moment)
        )
        monkeypatch.setattr(template_date, "datetime", fake)
        monkeypatch.setattr(session, "datetime", fake)
        monkeypatch.setattr(chat_template_utils, "datetime", fake.datetime)

    return set_day


def middo(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["middo", *map(str, arguments)])
    monkeypatch.setenv("MIDDO_TRACEBACK", "1")
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Name sea {i}.", "output": "cat " * (i + 1)} for i in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def recorded(folder: Path) -> str | None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    return tree["model"]["template_date"]


def test_training_goes_on_and_is_judged_on_the_next_day(
    tmp_path: Path,
    data: Path,
    today: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = directory_with(tmp_path / "model", ASKS), tmp_path / "out"
    train = (
        "train",
        "--data",
        data,
        "--model",
        model,
        "--out",
        out,
        "train.batch_size=8",
        "model.max_length=128",
    )
    today(DAY)
    middo(monkeypatch, *train)
    assert recorded(out) == "2026-03-07"
    rows = (out / "metrics.jsonl").read_text()
    losses = []
    for day in (DAY, DAY + datetime.timedelta(1)):
        today(day)
        middo(monkeypatch, *train)  # else: "holds a checkpoint of another training"
        assert recorded(out) == "2026-03-07"
        assert (out / "metrics.jsonl").read_text() == rows
        capsys.readouterr()
        middo(monkeypatch, "eval", "--data", data, "--model", out / "checkpoint", "--json")
        losses.append(json.loads(capsys.readouterr().out)["loss"])
        scored = ("--out", tmp_path / f"{day}", "--axes", "complexity")
        middo(monkeypatch, "score", "--data", data, "--model", out / "checkpoint", *scored)
        assert recorded(tmp_path / f"{day}") == "2026-03-07"
    assert losses[0] == losses[1]


def test_a_date_is_recorded_only_where_a_template_prints_it(
    tmp_path: Path, data: Path, today: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = write_tiny_model(tmp_path / "model"), tmp_path / "asks.jinja"
    file.write_text(ASKS)
    today(DAY)
    score = ("score", "--data", data, "--axes", "complexity", "--model", model, "--out")
    middo(monkeypatch, *score, tmp_path / "without")
    assert recorded(tmp_path / "without") is None
    middo(monkeypatch, *score, tmp_path / "file", f"model.template={file}")
    assert recorded(tmp_path / "file") == "2026-03-07"
    middo(monkeypatch, *score, tmp_path / "given", f"model.template={file}", "model.template_date=2025-01-31")
    assert recorded(tmp_path / "given") == "2025-01-31"


def test_another_day_is_another_pass_under_the_model_before(tmp_path: Path) -> None:
    model = directory_with(tmp_path / "model", ASKS)

    def identity(day: str, template: str = "null") -> str:
        named = [f"model.path={model}", "data.path=none", "model.dtype=float32"]
        of_day = Session(load(None, [*named, f"model.template={template}"]), Silent())
        pin_date(of_day.tokenizer, datetime.date.fromisoformat(day))
        return _identity(of_day, model, of_day.load_model(model), Wanted(loss=True, embeddings=False))

    assert identity("2026-03-07") == identity("2026-03-07") != identity("2026-03-08")
    assert identity("2026-03-07", "chatml") == identity("2026-03-08", "chatml")  # prints no date


def test_the_embedded_refiner_prints_the_pinned_day(
    tmp_path: Path, today: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = directory_with(tmp_path / "model", ASKS)
    given = [f"model.path={model}", "data.path=none", f"model.template_date={DAY}"]
    asked: list[str] = []

    def build_app(_: Any, tokenizer: Any, *__: Any) -> Starlette:
        tokens_n = tokenize_prompt(EXAMPLE.messages[:1], tokenizer)
        asked.append(str(tokenizer.decode(tokens_n.tolist())))
        return Starlette()

    loaded = (contextlib.nullcontext(), load_tokenizer(model), frozenset())
    monkeypatch.setattr(server, "load_engine", lambda *_: loaded)
    monkeypatch.setattr(server, "build_app", build_app)
    monkeypatch.setattr(listening, "serve_in_background", lambda *_, **__: contextlib.nullcontext("url"))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    today(DAY + datetime.timedelta(400))
    with endpoint(Session(load(None, given), Silent())):
        pass
    assert "Today: 07 Mar 2026" in asked[0]


def test_a_runs_day_is_that_of_its_first_start(tmp_path: Path, today: Any) -> None:
    model, run = directory_with(tmp_path / "model", ASKS), RunDir(tmp_path / "run")
    config = load(None, [f"model.path={model}", "data.path=none"])
    today(DAY)
    first = template_date.pin(config, [run.config])
    write_text(run.config, first.to_yaml())
    today(DAY + datetime.timedelta(400))
    again = template_date.pin(config, [run.config])
    assert again == first
    assert again.model.template_date == DAY
