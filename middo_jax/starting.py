"""The start of a run: its first line, and all checks, before anything in its folder is changed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from middo_jax import stages
from middo_jax.config import RENAMED, Config
from middo_jax.config.axis_table import scored_axes
from middo_jax.data.example import Example
from middo_jax.data.files import inputs_of, require_not_read
from middo_jax.parallel.coordination import agree, from_first
from middo_jax.progress import HeldBack
from middo_jax.report.status import unreadable_events
from middo_jax.rundir import RunDir, RunError, read_jsonl
from middo_jax.rundir.arms import control_links
from middo_jax.rundir.chain import chain
from middo_jax.rundir.damage import damages, refuse_damaged
from middo_jax.rundir.events import read_events
from middo_jax.rundir.link import Begun, Link, State, assess
from middo_jax.rundir.manifest import TOKENIZER
from middo_jax.rundir.stopping import check_heldout
from middo_jax.session import Prepared, Session, prepare, read_data, read_dataset
from middo_jax.version import __version__

PREPARE = "prepare"  # done before the first numbered stage of its folder, and not numbered itself


@dataclasses.dataclass
class FreshData:
    """The user's data, just read.

    Attributes:
      begun: record of the started stage that read the data.
      data: the data; None after that stage has written it, because later stages read the files.
    """

    begun: Begun
    data: Prepared | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Inputs of a run that are determined before its folder is changed.

    Attributes:
      run: the run.
      session: settings, tokenizer, mesh.
      heldout: examples that are never trained on.
      links: all stages, in order.
      fresh: the user's data, if it had to be read.
      data: files and folders of the user's data by role.
    """

    run: RunDir
    session: Session
    heldout: Sequence[Example]
    links: Sequence[Link]
    fresh: FreshData | None
    data: Mapping[str, Path]


class Header:
    """The first line of a run: version, devices, mesh, model, data and its usable rows. It is said once.

    Warnings about the rows, which are read before, follow it.
    """

    def __init__(self, session: Session, opening: HeldBack) -> None:
        shape = ", ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items())
        devices = session.mesh.devices
        kinds = " and ".join(sorted({device.device_kind for device in devices.flat}))
        config = session.config
        self._text: str | None = (
            f"middo-jax {__version__} on {devices.size} {kinds} ({shape}), model {config.model.path}, "
            f"data {config.data.name}"
        )
        self._recorded = stages.recorded_line(config)
        self._opening = opening

    def say(self, n_rows: int | None = None) -> None:
        """Says it; without the rows if they are not known, because the run ends before they are."""
        if self._text is not None:
            rows = "" if n_rows is None else f" ({n_rows:,} rows)"
            self._opening.first(f"{self._text}{rows}{f'; {self._recorded}' if self._recorded else ''}")
            self._text = None


def check_start(run: RunDir, session: Session, header: Header) -> Plan:
    """Says the first line and which stages are redone; runs all checks before the folder is changed.

    All processes of a job must agree on settings, data and stages.

    Raises:
      RunError, ConfigError, DataError: the message says what to do.
      HostsError: the processes of a job differ.
    """
    config, first = session.config, run.round(0)
    _refuse_own_files(run, config)
    data = inputs_of(config.data)
    links = chain(run, config, session.base, data)
    arms = [link for link, _ in control_links(run, config, session.base)]
    refuse_damaged(list(damages(run, [*links, *arms])))
    _refuse_previous_version(run)
    n_unreadable, states = read_events(run.events).n_unreadable, assess(links, config)
    _offer_choice(run, config, *states[0])
    fresh, kept = None, None
    if states[0][1].is_fresh:
        heldout = [Example.from_json(row) for row in read_jsonl(run.heldout)]
        header.say(first.stages()[PREPARE]["n"] + len(heldout))
    else:
        begun, rows = links[0].begin(), read_data(session)
        header.say(len(rows.examples))
        prepared = prepare(session, rows)
        fresh, kept, heldout = FreshData(begun, prepared), prepared.kept, prepared.heldout
    if n_unreadable:
        session.progress.say(unreadable_events(n_unreadable))
    stages.check_own_texts(config)
    if pending := {link.name for link, state in states if not state.is_fresh}:
        stages.check_attention(session)
    check_heldout(config, len(heldout))
    # The processes tokenize together, so they must agree before on what.
    agree(_facts(session, links, heldout, kept))
    trains = any(link.name == "train" and not state.is_fresh for link, state in states[:2])
    if from_first("check the training", lambda: trains):
        stages.check_training(session, read_dataset(first) if kept is None else kept, heldout)
    if "score" in pending and "quality" in scored_axes(config):
        stages.check_judge(session)
    if "refine" in pending:
        # Before a training only: later the stage itself waits for a server that is away.
        asks = "train" in pending
        for line in from_first("refiner: checks", lambda: stages.check_refiner(config, asks)):
            session.progress.say(line)
        stages.check_cache(Path(config.refine.cache or run.llm_cache))
    if "benchmark" in pending:
        stages.check_benchmarks(config)
    for line in redone(states):
        session.progress.say(line)
    return Plan(run, session, heldout, links, fresh, data)


def _refuse_own_files(run: RunDir, config: Config) -> None:
    """Refuses a model or data that the run itself writes: it would be replaced while it is read.

    Raises:
      RunError: the base model is in the run's folder.
      DataError: the data is one of the run's files, or these would be among the data.
    """
    model = Path(config.model.path).expanduser()
    if model.exists() and model.resolve().is_relative_to(run.path.resolve()):
        raise RunError(
            f"model.path={config.model.path}: the model is in this run's own folder, where it would be "
            "replaced; give the new run another name (name=...)"
        )
    written = [run.heldout, run.rejected]
    for folder in (run.round(0), run.final, *run.rounds()):
        written += [*folder.written, folder.own_format, folder.taken_back]
    for path in filter(None, (*config.data.paths, config.data.eval_path)):
        require_not_read(path, written)


def _offer_choice(run: RunDir, config: Config, link: Link, state: State) -> None:
    """Refuses to replace a run's results because its data was edited, unless `data.if_changed` is `redo`.

    Raises:
      RunError: the data has changed since the run read it.
    """
    if config.data.if_changed == "redo" or state.why is None:
        return
    if state.why.input not in (None, TOKENIZER):
        raise RunError(
            f"{run.path}: the data of this run was edited ({state.why}). name=NEW starts a new run and keeps "
            "this one; data.if_changed=redo goes on in this one and makes again what depends on the data"
        )


def _facts(
    session: Session, links: Sequence[Link], heldout: Sequence[Example], kept: Sequence[Example] | None
) -> dict[str, str]:
    """Returns facts that must be equal in all processes of a job before any of them starts."""
    ids = [example.id for example in (*heldout, *(kept or ()))]
    return {
        "version": __version__,
        "settings": _short_hash(session.config.to_yaml()),
        "data": _short_hash("\n".join(ids)),
        "stages": _short_hash("\n".join(link.where for link in links)),
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def redone(states: Sequence[tuple[Link, State]]) -> list[str]:
    """Returns one line per done stage that is stale, with the reason, and one for all dependent stages."""
    stale = [(link, state.why) for link, state in states if state.is_done and state.why is not None]
    lines = [f"{link.where} will be redone: {why}" for link, why in stale if not why.is_forecast]
    following = [link.where for link, why in stale if why.is_forecast]
    if following:
        lines.append(f"will also be redone if their inputs change: {', '.join(following)}")
    return lines


def _refuse_previous_version(run: RunDir) -> None:
    for directory in (*run.rounds(), run.final):
        for name, record in directory.stages().items():
            if "settings" not in record:
                why = "does not record the settings"
            elif old := sorted(RENAMED.keys() & record["settings"].keys()):
                why = f"names {old[0]}, which is now {RENAMED[old[0]]}"
            else:
                continue
            raise RunError(
                f"{run.path} was made by an earlier version of middo-jax: its record of "
                f"{directory.path.name} {name} {why}. `middo report`, `status` and `trace` still read it; "
                "give this run another name (name=...)"
            )
