"""`middo push`: what is sent to the hub, and what is refused before anything is sent."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from support.loopback_hub import TOKEN, LoopbackHub, loopback_hub
from support.synthetic_run import write_run

from middo_jax import cli
from middo_jax.config import ConfigError
from middo_jax.data.sources import read
from middo_jax.pushing import Push, push
from middo_jax.rundir import RunDir, RunError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", n_rows=60)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with loopback_hub() as made:
        yield made


def middo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["middo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_a_new_repository_is_private_and_has_the_dataset(
    run: RunDir,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("push", str(run.path), "me/mine", "--license", "cc-by-4.0", "--with-heldout", "--json")
    middo(monkeypatch, *command)
    done = json.loads(capsys.readouterr().out)
    sent = hub.files["me/mine"]
    assert hub.repos == {"me/mine": True}
    assert hub.commits == {"me/mine": [f"{done['n']:,} rows, by middo push"]}
    assert done["url"].endswith("/datasets/me/mine/commit/" + "1" * 40)
    assert {name: len(data) for name, data in sent.items()} == done["files"]
    assert sent.keys() >= {"README.md", "train.jsonl", "heldout.jsonl"}
    card = sent["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
    assert "Fill in `license`" not in card
    (tmp_path / "train.jsonl").write_bytes(sent["train.jsonl"])
    assert sent["train.jsonl"].count(b"\n") == done["n"]
    assert len(read(str(tmp_path / "train.jsonl"))[0]) > 0
    assert not any(TOKEN.encode() in data for data in sent.values())


def test_an_existing_repository_gets_one_more_commit(run: RunDir, hub: LoopbackHub) -> None:
    hub.repos["me/mine"] = True
    hub.files["me/mine"] = {"notes.txt": b"of the user"}
    push(run, Push("me/mine", "mit"))
    assert "/api/repos/create" not in hub.posted
    assert len(hub.commits["me/mine"]) == 1
    assert hub.files["me/mine"].keys() > {"notes.txt", "README.md"}


def test_a_dry_run_sends_nothing_and_needs_no_token(
    run: RunDir, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    middo(monkeypatch, "push", str(run.path), "me/mine", "--license", "other", "--dry-run")
    shown = capsys.readouterr().out
    assert "licence other, to me/mine (private if it is new)" in shown
    assert "train.jsonl" in shown
    assert "dry run: nothing was sent" in shown
    assert hub.posted == []


def test_a_public_repository_is_not_filled_without_being_told(run: RunDir, hub: LoopbackHub) -> None:
    hub.repos["me/open"] = False
    with pytest.raises(RunError, match="me/open is public: --public says"):
        push(run, Push("me/open", "mit"))
    assert hub.posted == []
    assert push(run, Push("me/open", "mit", public=True)).url is not None
    push(run, Push("me/new", "mit", public=True))
    assert hub.repos["me/new"] is False


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (Push("mine", "mit"), "'mine' has no owner; write OWNER/mine"),
        (Push("me/a b", "mit"), "push: .*me/a b"),
        (Push("me/mine"), "--license is missing. The dataset's licence"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_sent(
    run: RunDir, hub: LoopbackHub, plan: Push, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=error):
        push(run, plan)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="set the environment variable HF_TOKEN"):
        push(run, Push("me/mine", "mit"))
    assert hub.posted == []


def test_the_hubs_refusal_has_no_token(
    run: RunDir, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = (400, f"no room for {TOKEN}")
    with pytest.raises(RunError, match=r"push: me/mine: .*no room for \*\*\*"):
        push(run, Push("me/mine", "mit"))
    with pytest.raises(RunError, match=r"push: them/mine: the token in \$HF_TOKEN may not write there"):
        push(run, Push("them/mine", "mit"))
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(RunError, match=r"the hub does not accept the token in \$HF_TOKEN") as raised:
        push(run, Push("me/mine", "mit"))
    assert "hf_another" not in str(raised.value)
    assert hub.files == {}


def test_a_hub_that_is_not_there_is_said(
    run: RunDir, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"cannot reach the hub at http://127\.0\.0\.1:9"):
        push(run, Push("me/mine", "mit"))
