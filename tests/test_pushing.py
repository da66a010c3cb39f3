"""`middo push`: what is sent to the hub, and what is refused before anything is sent."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import RepositoryNotFoundError
from support.synthetic_run import write_run

from middo_jax import cli, pushing
from middo_jax.config import ConfigError
from middo_jax.data.sources import read
from middo_jax.pushing import Push, push
from middo_jax.rundir import RunDir, RunError

TOKEN = "hf_marker_5f0e9d1c7a"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", n_rows=60)


class Hub:
    """HfApi without a network: keeps repositories and files. Calls must fit the real signatures."""

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.sent: dict[str, bytes] = {}
        self.tokens: list[str] = []
        self.fault: Exception | None = None

    def __call__(self, token: str) -> Hub:
        self.tokens.append(token)
        return self

    def repo_info(self, *args: Any, **kwargs: Any) -> Any:
        given = _given("repo_info", args, kwargs)
        if given["repo_id"] not in self.repos:
            response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("no such repository", response=response)
        return SimpleNamespace(private=self.repos[given["repo_id"]])

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        given = _given("create_repo", args, kwargs)
        assert given["repo_type"] == "dataset"
        self.repos[given["repo_id"]] = given["private"]

    def upload_folder(self, *args: Any, **kwargs: Any) -> Any:
        given = _given("upload_folder", args, kwargs)
        if self.fault is not None:
            raise self.fault
        folder = Path(given["folder_path"])
        self.sent = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }
        return SimpleNamespace(commit_url=f"https://hub/{given['repo_id']}/commit/1")


def _given(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    return inspect.signature(getattr(huggingface_hub.HfApi, name)).bind(None, *args, **kwargs).arguments


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(pushing, "HfApi", made)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


def test_a_new_repository_is_private_and_has_the_dataset(run: RunDir, hub: Hub, tmp_path: Path) -> None:
    done = push(run, Push("me/mine", "cc-by-4.0"), heldout=True)
    assert hub.tokens == [TOKEN]
    assert hub.repos == {"me/mine": True}
    assert done.url == "https://hub/me/mine/commit/1"
    assert hub.sent.keys() == done.files.keys() >= {"README.md", "train.jsonl", "heldout.jsonl"}
    card = hub.sent["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
    assert "Fill in `license`" not in card
    (tmp_path / "train.jsonl").write_bytes(hub.sent["train.jsonl"])
    assert len(read(str(tmp_path / "train.jsonl"))[0]) > 0
    assert not any(TOKEN.encode() in data for data in hub.sent.values())


def test_a_dry_run_sends_nothing_and_needs_no_token(
    run: RunDir, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    command = ["middo", "push", str(run.path), "me/mine", "--license", "other", "--dry-run"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "licence other, to me/mine (private if it is new)" in shown
    assert "train.jsonl" in shown
    assert "dry run: nothing was sent" in shown
    assert (hub.tokens, hub.repos, hub.sent) == ([], {}, {})


def test_a_public_repository_is_not_filled_without_being_told(run: RunDir, hub: Hub) -> None:
    hub.repos["me/open"] = False
    with pytest.raises(RunError, match="me/open is public: --public says"):
        push(run, Push("me/open", "mit"))
    assert hub.sent == {}
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
    run: RunDir, hub: Hub, plan: Push, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=error):
        push(run, plan)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="set the environment variable HF_TOKEN"):
        push(run, Push("me/mine", "mit"))
    assert hub.tokens == []


def test_the_hubs_refusal_has_no_token(run: RunDir, hub: Hub) -> None:
    hub.fault = RuntimeError(f"403 Forbidden for {TOKEN}\nsee above")
    with pytest.raises(RunError, match=r"push: me/mine: RuntimeError: 403 Forbidden for \*\*\* see above"):
        push(run, Push("me/mine", "mit"))
