"""`middo push`: a run's dataset as a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple, Unpack

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from middo_jax.config import ConfigError
from middo_jax.exporting import Extras, export_data
from middo_jax.rundir import RunDir, RunError

TOKEN = "HF_TOKEN"  # the environment variable; no other place is read
ASKED = "The dataset's licence, as the hub names it (cc-by-4.0, apache-2.0, other, ...)"
_KIND = "dataset"
# Base classes by name, since huggingface_hub's versions use httpx, httpx2 or requests underneath.
_TRANSPORT = {"TransportError", "ConnectionError"}


class Push(NamedTuple):
    """Where to and how.

    Attributes:
      repo: OWNER/NAME.
      license: of the dataset, by its name at the hub; it has to be given.
      public: whether a new repository is public.
      dry_run: whether nothing is sent.
    """

    repo: str
    license: str | None = None
    public: bool = False
    dry_run: bool = False


class Pushed(NamedTuple):
    """What was sent, or would be: files with their sizes in bytes. `url` is None if nothing was sent.

    `note` and `warning`: see `ExportedDataset`.
    """

    repo: str
    private: bool
    license: str
    format: str
    n: int
    files: dict[str, int]
    url: str | None
    note: str | None
    warning: str | None


def push(run: RunDir, plan: Push, form: str | None = None, **extras: Unpack[Extras]) -> Pushed:
    """Sends what `export_data` writes to a dataset repository, which is made if it does not exist.

    Args:
      run: its folder.
      plan: where to and how.
      form: see `export_data`.
      **extras: see `export_data`.

    Raises:
      ConfigError: the repository's name is none, or the licence or $HF_TOKEN is missing.
      RunError: the run has no dataset; the repository is public and `plan.public` is not set; or the hub
        refuses. The message does not have the token.
    """
    try:
        validate_repo_id(plan.repo)
    except HFValidationError as error:
        raise ConfigError(f"push: {error}") from None
    if "/" not in plan.repo:
        raise ConfigError(f"push: {plan.repo!r} has no owner; write OWNER/{plan.repo}")
    if not plan.license:
        raise ConfigError(f"push: --license is missing. {ASKED}: it is yours to say")
    token = os.environ.get(TOKEN)
    if not token and not plan.dry_run:
        raise ConfigError(
            f"push: set the environment variable {TOKEN} to a token that may write to {plan.repo}"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "dataset"
        done = export_data(run, out, form, plan.license, **extras)
        files = {
            p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()
        }
        url = None if plan.dry_run else _send(out, plan, str(token), done.n)
    return Pushed(
        plan.repo, not plan.public, plan.license, done.format, done.n, files, url, done.note, done.warning
    )


def _send(folder: Path, plan: Push, token: str, n: int) -> str:
    """Makes the repository if there is none, and sends the files as one commit; returns its address."""
    api = HfApi(token=token)
    try:
        try:
            is_private = api.repo_info(plan.repo, repo_type=_KIND).private
        except RepositoryNotFoundError:
            api.create_repo(plan.repo, repo_type=_KIND, private=not plan.public)
            is_private = not plan.public
        if not is_private and not plan.public:
            raise RunError(f"{plan.repo} is public: --public says that this dataset may be, too")
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        # Not upload_folder: it may split a large folder into several commits, which readers would see.
        commit = api.create_commit(
            plan.repo,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message=f"{n:,} rows, by middo push",
            repo_type=_KIND,
        )
    except RunError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        said = " ".join(str(error).replace(token, "***").split())
        raise RunError(f"push: {plan.repo}: {_meaning(error)}{type(error).__name__}: {said[:500]}") from None
    return str(commit.commit_url)


def _meaning(error: Exception) -> str:
    """What the commonest faults mean; "" for others."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not accept the token in ${TOKEN}. "
    if status == 403:
        return f"the token in ${TOKEN} may not write there. "
    if status is None and _TRANSPORT & {of.__name__ for of in type(error).__mro__}:
        return f"cannot reach the hub at {constants.ENDPOINT}. "
    return ""


def render(done: Pushed) -> str:
    """What was sent, as text."""
    kind = "private" if done.private else "public"
    head = f"{done.n:,} rows as {done.format}, licence {done.license}, to {done.repo} ({kind} if it is new)"
    lines = [f"{size:>12,} bytes  {name}" for name, size in done.files.items()]
    end = "dry run: nothing was sent" if done.url is None else done.url
    notes = [*filter(None, (done.note, done.warning))]
    return "\n".join([head, *lines, *notes, end])
