"""What every stage needs: settings, tokenizer, mesh, models and the user's data."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from middo_jax import template_date
from middo_jax.config import Config, SettingsLike, layers_of
from middo_jax.config import load as load_config
from middo_jax.data.example import Example, Message
from middo_jax.data.files import with_id
from middo_jax.data.in_memory import IN_MEMORY
from middo_jax.data.mixing import read_sources
from middo_jax.data.reading import Reading
from middo_jax.data.sources import (
    DataError,
    Rejection,
    Repair,
    UserRows,
    commonest_reasons,
    read_rows,
)
from middo_jax.data.split import split_heldout
from middo_jax.data.tokenize import (
    TokenizedExample,
    eos_token_ids,
    learnt_controls,
    load_tokenizer,
    refusal,
    tokenize_all,
)
from middo_jax.models.attention import shares_prefixes
from middo_jax.models.checkpoint import read_metadata
from middo_jax.models.model import Model
from middo_jax.models.resolve import resolve
from middo_jax.models.source import load, locate
from middo_jax.parallel.mesh import batch_divisor, make_mesh
from middo_jax.passes.losses import plan_losses
from middo_jax.passes.runner import Plan
from middo_jax.progress import Progress, for_stderr
from middo_jax.rundir import RoundDir, RunError, read_jsonl, write_jsonl
from middo_jax.rundir.settings import settings_of

Content = tuple[tuple[Message, ...], str]  # of an example: messages and tools


@dataclasses.dataclass
class _Kept:
    """What was tokenized within a stage, by content; `depth`: blocks of `Session.stage` under way."""

    depth: int = 0
    tokenized: dict[Content, TokenizedExample] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Session:
    """What all stages share: the settings, where to say how far one is, and, made when first needed, the
    base model's directory, its tokenizer and the mesh.
    """

    config: Config
    progress: Progress
    _kept: _Kept = dataclasses.field(default_factory=_Kept, init=False, repr=False, compare=False)

    @functools.cached_property
    def base(self) -> Path:
        """The base model as a Hugging Face directory."""
        base = resolve(self.config.model.path)
        if not (base / "config.json").is_file():  # else the tokenizer would complain first, of other things
            raise RunError(f"model {base}: no config.json there; it is not a Hugging Face model directory")
        return base

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's, with the template and its date that the settings ask for."""
        date = self.config.model.template_date or datetime.date.today()
        return load_tokenizer(self.base, self.config.model.template, date)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices, as `mesh.*` arranges them. Compiled programs are kept for the next start."""
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            jax.config.update("jax_compilation_cache_dir", str(cache / "middo-jax" / "jax"))
        return make_mesh(self.config.mesh)

    def load_model(self, path: Path, param_dtype: str | None = None, base: Model | None = None) -> Model:
        """A model from a Hugging Face directory, a checkpoint of ours or a PEFT adapter, on the mesh.

        See `models.source.load`, also for `base`.
        """
        settings = self.config.model
        model = load(locate(path), settings.dtype, param_dtype, self.mesh, base)
        return model.with_config(dataclasses.replace(model.config, attention=settings.attention))

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """Within the block each conversation is tokenized once; what was tokenized is dropped at its end.

        Blocks may be nested: what an inner one tokenized is kept to the end of the outermost one.
        """
        self._kept.depth += 1
        try:
            yield
        finally:
            self._kept.depth -= 1
            if self._kept.depth == 0:
                self._kept.tokenized.clear()

    def tokenize(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """All examples; those that cannot be rendered were refused when the data was read."""
        kept = self._kept.tokenized if self._kept.depth else {}
        new = {_content(e): e for e in examples if _content(e) not in kept}
        found = tokenize_all(list(new.values()), self.tokenizer, self.config.model.max_length)
        kept.update(zip(new, found, strict=True))
        tokenized = [_named(kept[_content(example)], example.id) for example in examples]
        self.tell_of_no_end(tokenized)
        return tokenized

    def tell_of_no_end(self, tokenized: Sequence[TokenizedExample]) -> None:
        """Says, once per session, that none of these examples learns where an answer ends, if that is so."""
        if tokenized and not self._told and (reason := self._why_no_end(tokenized)) is not None:
            self._told.add(reason)
            self.progress.say(
                f"no sample learns where an answer ends, so the trained model will not stop: {reason}"
            )

    @functools.cached_property
    def _told(self) -> set[str]:
        return set()

    def _why_no_end(self, tokenized: Sequence[TokenizedExample]) -> str | None:
        """Why no example's targets hold a token that ends an answer; None if some do, as a rule the first."""
        ends = eos_token_ids(self.base, self.tokenizer)
        if not ends or any(not ends.isdisjoint(learnt_controls(t, self.tokenizer)) for t in tokenized):
            return None
        if all(t.truncated for t in tokenized):
            return f"every conversation is cut at model.max_length={self.config.model.max_length}"
        return "the chat template puts no control token behind an answer; set model.template"

    def plan_losses(self, tokenized: Sequence[TokenizedExample]) -> Plan:
        """The batches of a scoring pass over these examples, on this mesh and with these settings."""
        with jax.set_mesh(self.mesh):
            share_prefix = shares_prefixes(self.config.model.attention)
        ways = batch_divisor(self.mesh)
        return plan_losses(tokenized, share_prefix, ways, self.config.scoring.batch_tokens)


def _content(example: Example) -> Content:
    return example.messages, example.tools


def _named(tokenized: TokenizedExample, id_: str) -> TokenizedExample:
    return tokenized if tokenized.id == id_ else dataclasses.replace(tokenized, id=id_)


def new_session(settings: Sequence[str | Mapping[str, Any]]) -> Session:
    """A session with these settings, that reports on stderr.

    Unless they say otherwise it computes in float32 on a CPU, where that is the fast dtype.
    """
    dtype = [{"model.dtype": "float32"}] if jax.default_backend() == "cpu" else []
    return Session(load_config(None, [*dtype, *settings]), for_stderr())


def session_for(
    model: Path, data: str | None, settings: SettingsLike = None, out: Path | None = None
) -> Session:
    """A session for one model and one dataset, of which nothing is held out unless `settings` say so.

    A template's date is that of an earlier start in `out`, or of the training that made the model.

    Args:
      model: as `resolve` gives it; its base and tokenizer become the session's.
      data: what `data.path` takes; None is for rows in memory.
      settings: laid over these; a whole tree lies under them.
      out: the folder that gets the results, if there is one.
    """
    named = {
        "model": {"path": str(locate(model).base)},
        "data": {"path": data or IN_MEMORY, "eval_fraction": 0},
    }
    layers = layers_of(settings)
    session = new_session([*layers, named] if isinstance(settings, Config) else [named, *layers])
    made_in = [model.parent, model.parent.parent] if read_metadata(model) is not None else []
    recorded = [folder / "config.yaml" for folder in ([out] if out else []) + made_in]
    return dataclasses.replace(session, config=template_date.pin(session.config, recorded))


def session_of(directory: Path, settings: SettingsLike = None) -> Session:
    """A session with the settings of a folder, or of the run that it is a round of, and others over them.

    Raises:
      RunError: there is no config.yaml.
    """
    return Session(settings_of(directory, settings), for_stderr())


class Prepared(NamedTuple):
    """The user's data.

    Attributes:
      kept: examples to train on.
      heldout: examples that are never trained on.
      rejections: rows that cannot be used.
      repairs: rows that were repaired.
      format: of the rows.
    """

    kept: list[Example]
    heldout: list[Example]
    rejections: list[Rejection]
    repairs: Sequence[Repair]
    format: str


def prepare(session: Session, data: UserRows | None = None) -> Prepared:
    """The user's data, split and reported.

    Args:
      session: settings, tokenizer.
      data: as `read_data` gives it, if it was read already.

    Raises:
      DataError: the data cannot be read, or nothing of it can be used.
    """
    settings = session.config.data
    data = data or read_data(session)
    if settings.eval_path is None:
        kept, heldout = split_heldout(
            data.examples, settings.eval_fraction, session.config.seed, settings.source_column
        )
    else:
        heldout = _own_heldout(session, settings.eval_path)
        data = _without(data, heldout)
        kept = data.examples
    session.progress.say(
        f"{settings.name}: {len(kept)} samples, {len(heldout)} held out, {len(data.rejections)} rows refused"
    )
    for line in commonest_reasons(data.rejections):
        session.progress.say(line)
    if data.repairs:
        n = len({repair.where for repair in data.repairs})
        session.progress.say(f"{n} rows repaired (data.strict=true refuses them)")
    for line in commonest_reasons(data.repairs):
        session.progress.say(line)
    return Prepared(kept, heldout, data.rejections, data.repairs, data.format)


def _own_heldout(session: Session, path: str) -> list[Example]:
    """The usable rows of `data.eval_path`."""
    settings = session.config.data
    reading = dataclasses.replace(Reading.of(settings), id_column=None)
    data = usable(session, read_rows(path, settings.format, None, reading))
    session.progress.say(f"{path}: {len(data.examples)} held out, {len(data.rejections)} rows refused")
    for line in commonest_reasons(data.rejections):
        session.progress.say(line)
    return data.examples


def _without(data: UserRows, heldout: Sequence[Example]) -> UserRows:
    """A dataset without the rows whose prompt is held out; these are rejections.

    Raises:
      DataError: nothing is left.
    """
    prompts = {example.prompt for example in heldout}
    out = {i for i, example in enumerate(data.examples) if example.prompt in prompts}
    if len(out) == len(data.examples):
        raise DataError("data.eval_path has the prompts of all rows, so there is nothing to train on")
    rejections = [
        Rejection(data.places[i], "its prompt is held out (data.eval_path)", data.examples[i].to_json())
        for i in sorted(out)
    ]
    kept = [i for i in range(len(data.examples)) if i not in out]
    return UserRows(
        [data.examples[i] for i in kept],
        [data.rows[i] for i in kept],
        [data.places[i] for i in kept],
        data.rejections + rejections,
        data.repairs,
        data.format,
    )


def read_data(session: Session, rows: Any = None) -> UserRows:
    """Reads the user's data, and refuses what the model cannot read.

    Args:
      session: settings, tokenizer.
      rows: in memory, see `rows_in_memory`; None reads `data.path`.

    Raises:
      DataError: the data cannot be read, or nothing of it can be used.
    """
    settings = session.config.data
    reading = Reading.of(settings)
    if rows is None and settings.sources:
        data, said = read_sources(settings.sources, settings.limit, reading, session.config.seed)
        for line in said:
            session.progress.say(line)
    else:
        source = settings.path if rows is None else rows
        data = read_rows(source, settings.format, settings.limit, reading)
    return usable(session, data)


def usable(session: Session, data: UserRows) -> UserRows:
    """The dataset without the examples that the template or the tokenizer cannot take; these are rejections.

    Raises:
      DataError: no example can be used.
    """
    reasons = [refusal(example, session.tokenizer) for example in data.examples]
    rows = [row for row, reason in zip(data.rows, reasons, strict=True) if reason is None]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    refused = [
        Rejection(with_id(data.places[i], data.examples[i].user_id), reason, data.examples[i].to_json())
        for i, reason in enumerate(reasons)
        if reason is not None
    ]
    if not kept:
        lines = "".join(f"\n{line}" for line in commonest_reasons(refused))
        raise DataError(
            f"{session.config.data.name}: this model can use none of the {len(refused)} rows. The commonest "
            f"reasons:{lines}"
        )
    examples, places = [data.examples[i] for i in kept], [data.places[i] for i in kept]
    known = set(places)
    repairs = [repair for repair in data.repairs if repair.where in known]
    return UserRows(examples, rows, places, data.rejections + refused, repairs, data.format)


def read_dataset(directory: RoundDir) -> list[Example]:
    """The examples of a round's folder."""
    if not directory.dataset.exists():
        raise RunError(
            f"{directory.path}: no dataset.jsonl there; `middo score --data F --out DIR` makes one"
        )
    return [Example.from_json(row) for row in read_jsonl(directory.dataset)]


def write_dataset(directory: RoundDir, examples: Sequence[Example]) -> None:
    """Writes a round's examples and enters them in its manifest."""
    write_jsonl(directory.dataset, (e.to_json() for e in examples))
    directory.finish("prepare", [directory.dataset], 0.0, n=len(examples))
