"""The session: settings, tokenizer, mesh, models and the user's data, shared by all stages."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from middo_jax import template_date
from middo_jax.buckets import Place
from middo_jax.buckets.keeping import kept
from middo_jax.config import Config, ConfigError, SettingsLike, layers_of
from middo_jax.config import load as load_config
from middo_jax.data.example import Example, Message
from middo_jax.data.files import Rejection
from middo_jax.data.in_memory import IN_MEMORY
from middo_jax.data.mixing import placed, read_configured
from middo_jax.data.reading import Reading
from middo_jax.data.repair import strict_hint
from middo_jax.data.sources import DataError, commonest_reasons, read_rows
from middo_jax.data.spelling import Spelling
from middo_jax.data.split import split_heldout
from middo_jax.data.tokenize import (
    TokenizedExample,
    eos_token_ids,
    learnt_controls,
    load_tokenizer,
    refusal,
    tokenize_all,
)
from middo_jax.data.user_rows import Repair, UserRows, with_ids_of
from middo_jax.models.attention import shares_prefixes
from middo_jax.models.checkpoint import read_metadata
from middo_jax.models.config import DecoderConfig, read_config
from middo_jax.models.loading import ModelSource, load, locate
from middo_jax.models.lora import from_settings
from middo_jax.models.model import Model
from middo_jax.models.resolve import resolve
from middo_jax.parallel.mesh import batch_divisor, make_mesh
from middo_jax.passes.loss_plan import plan_losses
from middo_jax.passes.runner import PassPlan
from middo_jax.planning import automatic
from middo_jax.progress import Progress, for_stderr
from middo_jax.rundir import RoundDir, RunError, read_jsonl, write_jsonl
from middo_jax.rundir.settings import settings_of

Content = tuple[tuple[Message, ...], str]  # of an example: messages and tools


@dataclasses.dataclass
class _Kept:
    """Cache of tokenized conversations within a stage.

    Attributes:
      depth: number of open blocks of `Session.stage`.
      lock: of the cache and the tokenizer. A training's batches are tokenized in a thread of their own.
    """

    depth: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    tokenized: dict[Content, TokenizedExample] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Session:
    """Settings and progress display, shared by all stages.

    The base model's directory, its tokenizer and the mesh are created on first use.
    """

    config: Config
    progress: Progress
    _kept: _Kept = dataclasses.field(default_factory=_Kept, init=False, repr=False, compare=False)

    @functools.cached_property
    def base(self) -> Path:
        """The base model as a Hugging Face directory."""
        base = resolve(self.config.model.path)
        if not (base / "config.json").is_file():  # else the tokenizer would raise a less clear error
            raise RunError(f"model {base}: no config.json there; it is not a Hugging Face model directory")
        return base

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, with the template and date of the settings."""
        date = self.config.model.template_date or datetime.date.today()
        return load_tokenizer(self.base, self.config.model.template, date)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices, arranged by `mesh.*`. Also enables JAX's compilation cache, unless it is set."""
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(_compilation_cache(self.config)))
        settings = self.config.mesh
        if settings.tensor == "auto":
            size = automatic.tensor_size(self.config, self.decoder, jax.devices(), automatic.usable_bytes())
            settings = settings.model_copy(update={"tensor": size})
        return make_mesh(settings)

    @functools.cached_property
    def decoder(self) -> DecoderConfig:
        """The base model's config, with the attention and the adapters of the settings."""
        return dataclasses.replace(
            read_config(self.base, self.config.model.dtype),
            attention=self.config.model.attention,
            lora=from_settings(self.config.lora),
        )

    @functools.cached_property
    def batch_tokens(self) -> int:
        """`scoring.batch_tokens` as a number."""
        given = self.config.scoring.batch_tokens
        if given != "auto":
            return given
        return automatic.batch_tokens(self.config, lambda: self.decoder, self._place)

    def settled(self) -> Session:
        """A session with values in place of the settings that are `auto`, found by compiling."""
        config = automatic.settled(self.config, lambda: self.decoder, self._place)
        return self if config == self.config else dataclasses.replace(self, config=config)

    @property
    def _place(self) -> automatic.Placement:
        return automatic.Placement(self.mesh, automatic.usable_bytes())

    def locate(self, path: Path) -> ModelSource:
        """Locates a model's parts, see `models.loading.locate`; the session's base replaces a moved one."""
        return locate(path, base=self.config.model.path)

    def load_model(self, path: Path, param_dtype: str | None = None, base: Model | None = None) -> Model:
        """Loads a model from a Hugging Face directory, a checkpoint or a PEFT adapter, onto the mesh.

        See `models.loading.load` for the arguments.
        """
        settings = self.config.model
        model = load(self.locate(path), settings.dtype, param_dtype, self.mesh, base)
        return model.with_config(dataclasses.replace(model.config, attention=settings.attention))

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """Caches tokenized conversations within the block; of nested blocks, to the end of the outermost."""
        self._kept.depth += 1
        try:
            yield
        finally:
            self._kept.depth -= 1
            if self._kept.depth == 0:
                self._kept.tokenized.clear()

    def tokenize(self, examples: Sequence[Example], *, tells: bool = True) -> list[TokenizedExample]:
        """Tokenizes examples. Examples that cannot be rendered were rejected when the data was read.

        With `tells`, reports what `tell_of_tokens` does, since the examples are not a part of others.
        """
        with self._kept.lock:
            kept = self._kept.tokenized if self._kept.depth else {}
            new = {_content(e): e for e in examples if _content(e) not in kept}
            found = tokenize_all(list(new.values()), self.tokenizer, self.config.model.max_length)
            kept.update(zip(new, found, strict=True))
        tokenized = [_named(kept[_content(example)], example.id) for example in examples]
        if tells:
            n_cut = sum(t.truncated for t in tokenized)
            self.tell_of_tokens(len(tokenized), n_cut, self.learns_end(tokenized))
        return tokenized

    def learns_end(self, tokenized: Sequence[TokenizedExample]) -> bool:
        """Whether any example has an end-of-answer token among its targets; also if the model has no such."""
        ends = eos_token_ids(self.base, self.tokenizer)
        return not ends or any(not ends.isdisjoint(learnt_controls(t, self.tokenizer)) for t in tokenized)

    def tell_of_tokens(self, n: int, n_cut: int, learns_end: bool) -> None:
        """Reports how many of n examples are cut, once per session: for the first examples of which any is.

        Before that it warns, once per session and reason, if none of them learns the end of an answer.
        """
        self.tell_of_no_end(n, n_cut, learns_end)
        if n_cut and "cut" not in self._told:
            self._told.add("cut")
            self.progress.say(
                f"{n_cut:,} of {n:,} conversations are longer than "
                f"model.max_length={self.config.model.max_length} tokens and are cut"
            )

    def tell_of_no_end(self, n: int, n_cut: int, learns_end: bool) -> None:
        """Warns, once per session and reason, if none of n examples learns the end of an answer."""
        reason = None if learns_end or not n else self._why_no_end(all_cut=n_cut == n)
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            self.progress.say(
                f"no sample learns where an answer ends, so the trained model will not stop: {reason}"
            )

    @functools.cached_property
    def _told(self) -> set[str]:
        return set()

    def _why_no_end(self, *, all_cut: bool) -> str:
        """Returns why no example has an end-of-answer token among its targets."""
        if all_cut:
            return f"every conversation is cut at model.max_length={self.config.model.max_length}"
        return "the chat template writes no control token after an answer; set model.template"

    def plan_losses(self, tokenized: Sequence[TokenizedExample]) -> PassPlan:
        """Returns the batches of a scoring pass over these examples, for this mesh and these settings."""
        with jax.set_mesh(self.mesh):
            share_prefix = shares_prefixes(self.config.model.attention)
        ways = batch_divisor(self.mesh)
        return plan_losses(tokenized, share_prefix, ways, self.batch_tokens)


def _compilation_cache(config: Config) -> Path:
    """The folder for compiled programs. In a job only process 0 writes there, as JAX has it."""
    if config.compilation_cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return cache / "middo-jax" / "jax"
    url = Place.of(config.compilation_cache)
    return Path(config.compilation_cache).expanduser() if url is None else kept(url)


def _content(example: Example) -> Content:
    return example.messages, example.tools


def _named(tokenized: TokenizedExample, id_: str) -> TokenizedExample:
    return tokenized if tokenized.id == id_ else dataclasses.replace(tokenized, id=id_)


def new_session(settings: Sequence[str | Mapping[str, Any]]) -> Session:
    """Returns a session with these settings that reports on stderr.

    On a CPU the default of `model.dtype` becomes float32, the fast dtype there.
    """
    dtype = [{"model.dtype": "float32"}] if jax.default_backend() == "cpu" else []
    return Session(load_config(None, [*dtype, *settings]), for_stderr())


def session_for(
    model: Path, data: str | None, settings: SettingsLike = None, out: Path | None = None
) -> Session:
    """Returns a session for one model and one dataset. Nothing is held out by default.

    The date for the template is that of an earlier start in `out`, or of the training that made the model.

    Args:
      model: path from `resolve`; its base and tokenizer become the session's.
      data: value for `data.path`; None for rows in memory.
      settings: override the session's own; a `Config` does not override model, data and held-out share.
      out: folder for the results, if there is one.
    """
    layers, unnamed = layers_of(settings), "-"
    given = load_config(None, [{"model.path": unnamed, "data.path": unnamed}, *layers]).model.path
    named = {
        "model": {"path": str(locate(model, base=None if given == unnamed else given).base)},
        "data": {"path": data or IN_MEMORY, "eval_fraction": 0},
    }
    session = new_session([*layers, named] if isinstance(settings, Config) else [named, *layers])
    if session.config.data.sources:
        raise ConfigError(f"data.sources is not used here: the dataset is {data or IN_MEMORY}; leave it out")
    made_in = [model.parent, model.parent.parent] if read_metadata(model) is not None else []
    recorded = [folder / "config.yaml" for folder in ([out] if out else []) + made_in]
    return dataclasses.replace(session, config=template_date.pin(session.config, recorded))


def session_of(directory: Path, settings: SettingsLike = None) -> Session:
    """Returns a session with the settings of a folder or its run, overridden by `settings`.

    Raises:
      RunError: there is no config.yaml.
    """
    return Session(settings_of(directory, settings), for_stderr())


class Prepared(NamedTuple):
    """The user's data.

    Attributes:
      kept: training examples.
      heldout: examples that are never trained on.
      rejections: rows that cannot be used.
      repairs: rows that were repaired.
      format: format of the rows.
      columns: the columns of the rows.
      spelling: how the turns of the rows are written.
      id_columns: the columns that name a row, see `data.id_columns`.
    """

    kept: list[Example]
    heldout: list[Example]
    rejections: list[Rejection]
    repairs: Sequence[Repair]
    format: str
    columns: Sequence[str]
    spelling: Spelling
    id_columns: Sequence[str]


def prepare(session: Session, data: UserRows | None = None) -> Prepared:
    """The user's data, split and reported.

    Args:
      session: settings and tokenizer.
      data: return value of `read_data`, if the data was already read.

    Raises:
      DataError: the data cannot be read, or no row can be used.
    """
    settings = session.config.data
    data = data or read_data(session)
    for line in data.said:
        session.progress.say(line)
    own = None
    if settings.eval_path is None:
        kept, heldout = split_heldout(
            data.examples, settings.eval_fraction, session.config.seed, settings.source_column
        )
    else:
        own = _own_heldout(session, settings.eval_path)
        heldout, data = own.examples, _without(data, own.examples)
        kept = data.examples
    session.progress.say(
        f"{settings.name}: {len(kept):,} samples, {len(heldout):,} held out, "
        f"{len(data.rejections):,} rows refused"
    )
    _tell_of_faults(session, data)
    if own is not None:
        rejections, repairs = [*data.rejections, *own.rejections], [*data.repairs, *own.repairs]
        data = data._replace(rejections=rejections, repairs=repairs)
    facts = data.rejections, data.repairs, data.format, data.columns, data.spelling.commonest(data.format)
    ids = [name for name in data.id_columns(settings.id_column) if name != settings.source_column]
    return Prepared(kept, heldout, *facts, id_columns=ids)


def _tell_of_faults(session: Session, data: UserRows) -> None:
    """Reports why rows were refused, and what was repaired."""
    for line in commonest_reasons(data.rejections):
        session.progress.say(line)
    if data.repairs:
        n = len({repair.where for repair in data.repairs})
        hint = strict_hint(repair.reason for repair in data.repairs)
        session.progress.say(f"{n:,} {'row' if n == 1 else 'rows'} repaired{hint}")
    for line in commonest_reasons(data.repairs):
        session.progress.say(line)


def _own_heldout(session: Session, path: str) -> UserRows:
    """The dataset of `data.eval_path`."""
    settings = session.config.data
    reading = dataclasses.replace(Reading.of(settings), id_column=None)
    data = usable(session, read_rows(path, settings.format, None, reading))
    if settings.id_column is not None:
        data = data._replace(examples=with_ids_of(data.examples, settings.id_column))
    session.progress.say(f"{path}: {len(data.examples)} held out, {len(data.rejections)} rows refused")
    _tell_of_faults(session, data)
    rejections = [placed(path, rejection) for rejection in data.rejections]
    return data._replace(rejections=rejections, repairs=[placed(path, repair) for repair in data.repairs])


def _without(data: UserRows, heldout: Sequence[Example]) -> UserRows:
    """A dataset without the rows whose prompt is held out; these are rejections.

    Raises:
      DataError: nothing is left.
    """
    prompts = {example.prompt for example in heldout}
    out = {i for i, example in enumerate(data.examples) if example.prompt in prompts}
    if len(out) == len(data.examples):
        raise DataError("data.eval_path has the prompts of all rows, so there is nothing to train on")
    return data.without(dict.fromkeys(out, "its prompt is held out (data.eval_path)"))


def read_data(session: Session, rows: Any = None, keep_rows: bool = False) -> UserRows:
    """Reads the user's data and rejects rows that the template or tokenizer cannot render.

    Args:
      session: settings and tokenizer.
      rows: rows in memory, see `rows_in_memory`; None reads `data.path`.
      keep_rows: whether the rows are returned too, as they were read.

    Raises:
      DataError: the data cannot be read, or no row can be used.
    """
    settings = session.config.data
    if rows is None and settings.sources:
        seed, tokenizer = session.config.seed, session.tokenizer
        return read_configured(settings, seed, keep_rows, lambda example: refusal(example, tokenizer))
    if rows is None:
        return usable(session, read_configured(settings, session.config.seed, keep_rows))
    return usable(session, read_rows(rows, settings.format, settings.limit, Reading.of(settings), keep_rows))


def usable(session: Session, data: UserRows) -> UserRows:
    """Moves examples that the template or the tokenizer cannot render to the dataset's rejections.

    Raises:
      DataError: no example is left.
    """
    found = ((i, refusal(example, session.tokenizer)) for i, example in enumerate(data.examples))
    reasons = {i: reason for i, reason in found if reason is not None}
    kept = data.without(reasons)
    if not kept.examples:
        lines = "".join(f"\n{line}" for line in commonest_reasons(kept.rejections[len(data.rejections) :]))
        raise DataError(
            f"{session.config.data.name}: this model can use none of the {len(reasons)} rows. The commonest "
            f"reasons:{lines}"
        )
    return kept


def read_dataset(directory: RoundDir) -> list[Example]:
    """Reads the examples of a round's folder."""
    if not directory.dataset.exists():
        raise RunError(
            f"{directory.path}: no dataset.jsonl there; `middo score --data F --out DIR` writes one"
        )
    return [Example.from_json(row) for row in read_jsonl(directory.dataset)]


def write_dataset(directory: RoundDir, examples: Sequence[Example], id_columns: Sequence[str] = ()) -> None:
    """Writes a round's examples and records them in its manifest, with the columns that name a row."""
    write_jsonl(directory.dataset, (e.to_json() for e in examples))
    directory.finish("prepare", [directory.dataset], 0.0, n=len(examples), id_columns=list(id_columns))
