"""The commands as a user types them: results on stdout, errors that help on stderr, no traceback."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from starlette.testclient import TestClient
from support.command import Ended, Middo
from support.loop_fixture import Finished, contents, rows_by_id, write_data
from support.tiny_model import write_tiny_model

from middo_jax import api, cli
from middo_jax.data.sources import read
from middo_jax.inference import listening, server
from middo_jax.inference.guard import TOKEN_VARIABLE
from middo_jax.progress import Bars, Lines
from middo_jax.rundir import read_jsonl
from middo_jax.signals.table import SCHEMA
from middo_jax.version import __version__

pytest_plugins = ["support.command", "support.loop_fixture"]

COMMANDS = sorted(c.name or getattr(c.callback, "__name__", "") for c in cli.app.registered_commands)
SMALL = ("model.max_length=512", "train.batch_size=8", "train.learning_rate=0.01")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and data.json."""
    root = tmp_path_factory.mktemp("cli")
    write_tiny_model(root / "model")
    write_data(root / "data.json")
    return root


def test_help_is_answered_without_heavy_imports() -> None:
    script = (
        "import sys; sys.argv = ['middo', '--help']\n"
        "from middo_jax.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'flax', 'numpy', 'pyarrow', 'transformers', 'openai', 'sklearn', 'starlette'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in COMMANDS)


def test_the_version_and_the_completion(middo: Middo) -> None:
    assert middo("--version") == Ended(0, f"middo-jax {__version__}\n", "")
    assert "--install-completion" in middo("--help").out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(middo: Middo, command: str) -> None:
    ended = middo(command, "--help")
    assert ended.code == 0
    assert f"Example: middo {command} " in ended.out
    assert ended.err == ""


def test_every_argument_and_option_is_explained() -> None:
    program = typer.main.get_group(cli.app)
    commands = {"middo": program, **program.commands}
    assert commands.keys() >= {"run", "score", "serve"}
    without = [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert without == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score --data none.json --model {model} --out o", "there is no file none.json"),
        ("score --data {data} --model ./none --out o", "./none: no such file or directory"),
        ("score --data {data} --model {model} --axes quality,beauty --out o", "--axes: 'beauty' is none of"),
        (
            "train --data {data} --model {model} --out o train.learing_rate=1",
            "Did you mean train.learning_rate",
        ),
        ("train --data {data} --model {model} --out o train.batch_size=512", "of the 512 rows of a batch"),
        ("train --data {data} --model {model} --out o rounds", "'rounds' is not of the form a.b=value"),
        ("eval --data broken.json --model {model}", "broken.json: broken JSON at line 2, column"),
        (
            "eval --data broken.jsonl --model {model}",
            "1 of 1: broken JSON: Expecting value (column 1) (broken.jsonl:1)",
        ),
        ("eval --data empty.jsonl --model {model}", "empty.jsonl has no rows"),
        ("eval --data {data} --model .", "no config.json there"),
        (
            "eval --data {data} --model {model} model.attention=splash",
            "cannot be used for a cpu: it is a TPU kernel",
        ),
        ("inspect columns.json", "fit no format"),
        ("run none.yaml", "cannot read none.yaml"),
        ("run wrong.yaml", "wrong.yaml is not valid YAML"),
        ("run partial.yaml", "data.path is missing; set it"),
        ("select .", "no config.yaml there or above"),
        ("refine .", "no config.yaml there or above"),
        ("export . out", "no finished checkpoint there"),
        ("convert {data} out.csv --format messages", "must end in .json or .jsonl or .parquet"),
        ("convert {data} out.json --format toml", "unknown format 'toml'"),
        ("status none", "none: no such run"),
        ("trace none 0f", "none: no such run"),
        ("report none", "none: no such run"),
        ("serve ./none", "./none: no such file or directory"),
    ],
)
def test_an_error_says_what_and_where_without_a_traceback(
    middo: Middo, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "broken.json": '[{"instruction": "a", "output": "b"},\n {"instruction": }]',
        "broken.jsonl": '{"instruction": \n',
        "empty.jsonl": "",
        "columns.json": '[{"question": "a", "answer": "b"}]',
        "wrong.yaml": "model: [",
        "partial.yaml": "model: {path: x}",
    }
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    ended = middo(*arguments.format(data=place / "data.json", model=place / "model").split())
    assert ended.code == 1
    assert ended.out == ""
    assert message in ended.err.replace("\n", " ")
    assert "Traceback" not in ended.err
    assert {path.name for path in tmp_path.iterdir()} == files.keys()  # nothing was begun


def test_usage_that_cannot_be_parsed_exits_with_two(middo: Middo) -> None:
    ended = middo("score", "--data", "x.json")
    assert (ended.code, ended.out) == (2, "")
    assert "--model" in ended.err


def test_score_select_refine_by_hand(middo: Middo, finished: Finished, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored"
    tuned = finished.run.final.checkpoint
    scored = middo(
        *("score", "--data", place / "data.json", "--model", tuned, "--pre-model", place / "model"),
        *("--out", out, "--json", *SMALL),
    ).json
    assert (scored["n"], scored["rejected"]) == (24, 0)
    table = pq.read_table(out / "scores.parquet")
    assert not (out / "selection.parquet").exists()
    assert np.mean(table["loss_post"].to_numpy()) < np.mean(table["loss_pre"].to_numpy())

    wanted = ("complexity.fraction=0.1", "diversity.fraction=0.1", "quality.fraction=0.1")
    selection = middo("select", out, *wanted, "--json").json
    assert {axis: facts["n_selected"] for axis, facts in selection["axes"].items()} == {
        "complexity": 2,
        "diversity": 2,
        "quality": 2,
    }
    assert "hard" in middo("select", out, *wanted).out
    assert pq.read_table(out / "selection.parquet")["hard"].to_pylist().count(True) == 2

    endpoint = (f"refine.base_url={finished.url}", "refine.model=fake", "refine.temperature=0")
    endpoint += ("refine.accept=sane", "refine.gates.open=[numbers]")
    asked = len(finished.requests)
    before = contents(out)
    plan = middo("refine", out, "--dry-run", *endpoint, "--json").json
    assert len(finished.requests) == asked
    assert contents(out) == before
    assert plan["requests"] == 2 * len(plan["rows"]) + plan["probes"] > plan["probes"] == 1
    told = middo("refine", out, "--dry-run", *endpoint).out
    requests = f"{plan['requests']:,} requests"
    assert f"{requests}, the first to find out whether the server enforces a schema" in told
    assert plan["rows"][0]["messages"][0]["content"].splitlines()[0] in told

    done = middo("refine", out, *endpoint, "--json").json
    assert len(finished.requests) - asked == plan["requests"]
    assert done["tasks"] == done["accepted"] == len(plan["rows"])
    kept, merged = rows_by_id(out / "dataset.jsonl"), rows_by_id(Path(done["merged"]))
    replaced = {row["replaces"] for row in read_jsonl(out / "refined.jsonl")} - {None}
    assert kept.keys() - merged.keys() == replaced
    assert len(merged) == 24 + 2
    # Told again, it asks nothing again.
    asked = len(finished.requests)
    again = middo("refine", out, *endpoint, "--json").json
    assert len(finished.requests) == asked
    for axis, used in again["usage"].items():
        assert used["requests"] == done["usage"][axis]["requests"]  # of all starts together
    assert rows_by_id(Path(again["merged"])) == merged


def test_columns_of_the_data_stand_beside_the_scores(middo: Middo, place: Path, tmp_path: Path) -> None:
    call = ("score", "--data", place / "data.json", "--model", place / "model", "--axes", "diversity", *SMALL)
    assert middo(*call, "--out", tmp_path / "a").code == 0
    assert middo(*call, "--out", tmp_path / "b", "--keep-columns", "source").code == 0
    names = [pq.read_table(tmp_path / name / "scores.parquet").column_names for name in "ab"]
    assert names[0] == [*SCHEMA.names, "instruction", "input", "output", "source"]
    assert names[1] == [*SCHEMA.names, "source"]
    assert middo("select", tmp_path / "b").code == 0
    assert pq.read_table(tmp_path / "b" / "scores.parquet").column_names[-1] == "source"
    wrong = middo(*call, "--out", tmp_path / "c", "--keep-columns", "sauce")
    assert (wrong.code, wrong.out) == (1, "")
    assert "no column 'sauce' to keep; there are: instruction, input, output, source" in wrong.err
    assert not (tmp_path / "c").exists()


def test_one_axis_alone_leaves_the_others_null(middo: Middo, place: Path, tmp_path: Path) -> None:
    call = ("score", "--data", place / "data.json", "--model", place / "model", "--out", tmp_path / "o")
    ended = middo(*call, "--axes", "diversity", "--json", *SMALL)
    table = pq.read_table(ended.json["scores"])
    for name in ("loss_pre", "quality", "clarity_prompt"):
        assert table[name].null_count == 24
    for name in ("loss_post", "knn_mean_sim", "knn_ids"):
        assert table[name].null_count == 0
    selection = middo("select", tmp_path / "o", "--json").json
    assert list(selection["axes"]) == ["diversity"]
    assert middo("refine", tmp_path / "o", "--dry-run").code == 0
    # Scored again, the selection is of other scores.
    middo(*call, "--axes", "diversity", "--force", *SMALL)
    stale = middo("refine", tmp_path / "o", "--dry-run")
    assert (stale.code, stale.out) == (1, "")
    assert "run `middo select` first" in stale.err


def test_scores_are_reused_replaced_and_compared(middo: Middo, place: Path, tmp_path: Path) -> None:
    call = ("score", "--data", place / "data.json", "--axes", "complexity", *SMALL, "--json")
    one = (*call, "--model", place / "model", "--out", tmp_path / "o")
    assert [middo(*one, *more).json["reused"] for more in ((), (), ("--force",))] == [False, True, False]
    other = middo(*one, "model.max_length=40")
    assert (other.code, other.out) == (1, "")
    assert "has other scores (model.max_length was 512, is 40): --force" in other.err
    named = ("--model", f"a={place / 'model'}", "--model", f"b={place / 'model'}", "--out", tmp_path / "two")
    assert [m["reused"] for m in middo(*call, *named).json["models"].values()] == [False, False]
    again = middo(*call, *named).json
    assert [m["reused"] for m in again["models"].values()] == [True, True]
    table = pq.read_table(again["scores"])
    assert table["loss_post_a"].equals(table["loss_post_b"])
    for wrong, why in (
        (["a=x", "y"], "--model y: of several models each needs a name: --model NAME=y"),
        (["a=x", "a=y"], "two models have the same name"),
    ):
        ended = middo(
            *call, *(part for value in wrong for part in ("--model", value)), "--out", tmp_path / "n"
        )
        assert (ended.code, why in ended.err) == (1, True)
    assert not (tmp_path / "n").exists()


def test_options_of_tasks_are_not_ignored_with_data(middo: Middo, place: Path) -> None:
    call = ("eval", "--data", place / "data.json", "--model", place / "model")
    ended = middo(*call, "--limit", 3, "--num-fewshot", 2)
    assert ended.code == 1
    assert "middo eval: --limit and --num-fewshot: only with --tasks, not with --data" in ended.err


def test_score_measures_the_axes_of_the_settings(
    middo: Middo, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[Any] = []

    def score(data: str, model: str, **how: Any) -> None:
        wanted.append(how["axes"])
        raise ValueError("enough")

    monkeypatch.setattr(api, "score", score)
    call = ("score", "--data", place / "data.json", "--model", place / "model", "--out", tmp_path / "o")
    for more in ((), ("--axes", "complexity, diversity")):
        assert "enough" in middo(*call, *more).err
    assert wanted == [None, ["complexity", "diversity"]]  # None: those of the settings


def test_train_eval_export_and_score_what_was_exported(middo: Middo, place: Path, tmp_path: Path) -> None:
    data, base, out = place / "data.json", place / "model", tmp_path / "tuned"
    train = ("train", "--data", data, "--model", base, "--out", out, *SMALL, "train.num_epochs=2", "--json")
    trained = middo(*train).json
    checkpoint = Path(trained["checkpoint"])
    assert trained["last"] == read_jsonl(out / "metrics.jsonl")[-1]
    files = contents(out)
    assert middo(*train).json == trained  # done before: nothing is trained again
    weights = {name: data for name, data in contents(out).items() if name.startswith("checkpoint/")}
    assert weights == {name: data for name, data in files.items() if name.startswith("checkpoint/")}

    def loss(model: Path) -> dict[str, Any]:
        return middo("eval", "--data", data, "--model", model, *SMALL, "--json").json

    tuned = loss(checkpoint)
    assert tuned["loss"] < loss(base)["loss"]
    exported = middo("export", checkpoint, tmp_path / "hf")
    assert (exported.code, exported.out.strip()) == (0, str(tmp_path / "hf"))
    assert loss(tmp_path / "hf") == tuned
    again = middo("export", checkpoint, tmp_path / "hf")
    assert (again.code, again.out) == (1, "")
    assert "is not an empty directory" in again.err

    scored = middo(
        *("score", "--data", data, "--model", tmp_path / "hf", "--out", tmp_path / "s", "--json"),
        *("--axes", "complexity", *SMALL),
    )
    assert "no --pre-model" in scored.err
    table = pq.read_table(scored.json["scores"])
    weights_n = table["n_target_tokens"].to_numpy()
    assert weights_n.sum() == tuned["n_target_tokens"]
    mean = np.average(table["loss_post"].to_numpy(), weights=weights_n)
    np.testing.assert_allclose(mean, tuned["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("alpaca", "a.json"),
        ("messages", "m.jsonl"),
        ("sharegpt", "s.parquet"),
        ("prompt_completion", "p.jsonl"),
        ("parquet", "q.parquet"),
        ("tfds", "t"),
    ],
)
def test_convert_to_every_format_keeps_every_sample(
    middo: Middo, place: Path, tmp_path: Path, form: str, name: str
) -> None:
    ended = middo("convert", place / "data.json", tmp_path / name, "--format", form)
    assert (ended.code, ended.out.strip()) == (0, str(tmp_path / name))
    wanted, got = read(str(place / "data.json"))[0], read(str(tmp_path / name))[0]
    assert [(e.id, e.messages, e.extra) for e in got] == [(e.id, e.messages, e.extra) for e in wanted]


def test_rows_that_cannot_be_used_are_counted_and_kept_beside(middo: Middo, tmp_path: Path) -> None:
    data = tmp_path / "some.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\nbroken\n', encoding="utf-8")
    ended = middo("convert", data, tmp_path / "out.jsonl", "--format", "messages")
    assert ended.code == 0
    assert "2 rows could not be used" in ended.err
    beside = read_jsonl(tmp_path / "out.jsonl.rejected.jsonl")
    assert [row["where"] for row in beside] == [f"{data}:2", f"{data}:3"]
    facts = middo("inspect", data, "--json").json
    assert (facts["n"], len(facts["rejected"])) == (1, 2)
    again = middo("convert", data, tmp_path / "out.jsonl", "--format", "messages", "--json")
    assert again.json == {"out": str(tmp_path / "out.jsonl"), "n": 1, "rejected": 2, "repaired": 0}


def test_reasons_are_counted_largest_first_with_the_first_place(
    middo: Middo, place: Path, tmp_path: Path
) -> None:
    """The same lines from every command, for rows that cannot be read and rows that the model cannot take."""
    ended_turn = {"instruction": "a <|im_end|> b", "output": "c"}
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "c"},
        ended_turn,
        ended_turn | {"output": "d"},
    ]
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = [
        f"  2 of 3: its text contains the model's control token <|im_end|> ({data}:3)",
        f"  1 of 3: column 'output' is missing or null ({data}:2)",
    ]
    shown = middo("inspect", data, "--model", place / "model", *SMALL).out.splitlines()
    assert shown[:3] == ["1 rows can be used, 3 cannot", *lines]
    scored = middo("eval", "--data", data, "--model", place / "model", *SMALL)
    assert scored.code == 0
    assert "\n".join(lines) in scored.err


def test_inspect_shows_what_is_learnt(middo: Middo, place: Path) -> None:
    facts = middo("inspect", place / "data.json", "--model", place / "model", *SMALL, "--json").json
    assert facts["n"] == 24
    assert facts["tokens"]["truncated"] == 0
    first = read(str(place / "data.json"))[0][0]
    assert {"kind": "target", "text": f"{first.response}<|im_end|>"} in facts["sample"]["parts"]
    shown = middo("inspect", place / "data.json", "--model", place / "model", *SMALL)
    assert "24 rows can be used, 0 cannot" in shown.out
    assert f"[[{first.response}<|im_end|>]]" in shown.out


def test_a_finished_run_is_told_as_text_and_as_json(middo: Middo, finished: Finished, tmp_path: Path) -> None:
    finished.copy(tmp_path)
    run = tmp_path / "run"
    status = middo("status", run, "--json").json
    assert status["complete"]
    assert [r["name"] for r in status["rounds"]] == ["round_00", "round_01"]
    assert "run: complete" in middo("status", run).out

    child = next(
        row
        for row in rows_by_id(run / "final" / "dataset.jsonl").values()
        if row["lineage"]["op"] == "rewrite" and row["lineage"]["round"] == 1
    )
    chain = middo("trace", run, child["id"], "--json").json
    assert [sample["relation"] for sample in chain][:2] == ["ancestor", "self"]
    assert chain[0]["id"] == child["lineage"]["parent_ids"][0]
    assert chain[0]["scores"]["loss_post"] == child["lineage"]["scores_before"]["loss_post"]
    assert child["id"] in middo("trace", run, child["id"][:12]).out
    unknown = middo("trace", run, "zzz")
    assert (unknown.code, unknown.out) == (1, "")
    assert "no sample has the id 'zzz'" in unknown.err

    (run / "report.html").unlink()
    report = middo("report", run)
    assert (report.code, report.out.strip()) == (0, str(run / "report.html"))
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert middo("report", run, "--json").json == {"report": str(run / "report.html")}

    models = [str(run / name / "checkpoint") for name in ("round_00", "round_01")]
    listed = middo("clean", run, "--json").json
    assert (listed["removed"], [row["path"] for row in listed["paths"]]) == (False, models)
    assert middo("clean", run, "--yes").out.endswith(" removed\n")
    assert not any(Path(model).exists() for model in models)
    assert middo("clean", run).out == f"{run}: nothing can be removed\n"

    (tmp_path / "no_run").mkdir()
    nowhere = middo("status", tmp_path / "nowhere")
    assert (nowhere.code, nowhere.out) == (1, "")
    assert nowhere.err.startswith(f"middo: {tmp_path / 'nowhere'}: no such run; runs beside it: run\n")


def test_run_prints_its_report_and_goes_on_with_a_finished_one(
    middo: Middo, finished: Finished, tmp_path: Path
) -> None:
    runs_dir = finished.copy(tmp_path)
    config = tmp_path / "config.yaml"
    shutil.copyfile(finished.run.config, config)
    told = middo("run", config, f"runs_dir={runs_dir}", "--json")
    assert told.json["complete"]
    assert told.json["report"] == str(tmp_path / "run" / "report.html")
    assert told.err.count("done before") == 13
    shown = middo("run", config, f"runs_dir={runs_dir}", "--repair")
    assert f"{tmp_path / 'run'}: nothing to repair\n" in shown.err
    *effects, last = shown.out.splitlines()
    assert last == str(tmp_path / "run" / "report.html")
    # What fine-tuning did is told apart from what the rounds did, each with its interval.
    for line, name in zip(effects, ("fine_tuning", "rounds"), strict=True):
        change, (low, high) = (told.json["effects"][name][key] for key in ("change", "interval"))
        assert f"{change:+.4f} nats per token, 95 % interval {low:+.4f} to {high:+.4f}" in line


class Idle(contextlib.nullcontext[None]):
    """What the server needs of an engine that is asked nothing."""

    max_context = 64
    is_running = True


def test_serve_is_behind_a_token_where_others_can_reach_it(
    middo: Middo, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[TestClient] = []
    monkeypatch.setattr(server, "load_engine", lambda *_, **__: (Idle(), None, frozenset()))
    monkeypatch.setattr(listening, "serve_forever", lambda app, *_: served.append(TestClient(app)))
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    refused = middo("serve", place / "model", "--host", "0.0.0.0")
    assert (refused.code, refused.out, served) == (1, "", [])
    assert "0.0.0.0 is no loopback address" in refused.err
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-24-characters")
    assert middo("serve", place / "model", "--host", "0.0.0.0").code == 0
    [client] = served
    assert client.get("/v1/models").status_code == 401
    token = {"authorization": "Bearer a-token-of-24-characters"}
    assert client.get("/v1/models", headers=token).status_code == 200


@pytest.mark.parametrize("kind", [Lines, Bars])
def test_progress_is_told_on_stderr_only(
    kind: type[Lines] | type[Bars], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = kind()
    progress.say("[1/8] round_00 train [bold]")
    with progress.task("train", "steps") as advance:
        for done in range(1, 4):
            advance(done, 3, "loss [0.5]")
    out, err = capsys.readouterr()
    assert out == ""
    assert "[1/8] round_00 train [bold]" in err  # nothing of it is taken for markup
    assert "3/3" in err
    assert "loss [0.5]" in err
