"""What every stage needs: settings, tokenizer, mesh, models, the user's data, the refiner's endpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from middo_jax.config import Config
from middo_jax.data.example import Example
from middo_jax.data.sources import DataError, Rejection, read, split_heldout
from middo_jax.data.tokenize import (
    TemplateError,
    TokenizedExample,
    load_tokenizer,
    steering_tokens,
    tokenize,
    tokenize_all,
)
from middo_jax.progress import Progress
from middo_jax.run import RoundDir, RunError, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerBase

    from middo_jax.models.lora import Model


@dataclasses.dataclass(frozen=True)
class Workshop:
    """What all stages share: the settings, where to say how far one is, and, made when first needed, the
    base model's directory, its tokenizer and the mesh.
    """

    config: Config
    progress: Progress

    @functools.cached_property
    def base(self) -> Path:
        """The base model as a Hugging Face directory."""
        from middo_jax.models.resolve import resolve

        base = resolve(self.config.model.path)
        if not (base / "config.json").is_file():  # else the tokenizer would complain first, of other things
            raise RunError(f"model {base}: no config.json there; it is not a Hugging Face model directory")
        return base

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's, with the template that the settings ask for."""
        return load_tokenizer(self.base, self.config.model.template)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices, as `mesh.*` arranges them. Compiled programs are kept for the next start."""
        import jax

        from middo_jax.parallel.mesh import make_mesh

        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            jax.config.update("jax_compilation_cache_dir", str(cache / "middo-jax" / "jax"))
        return make_mesh(self.config.mesh)

    def load_model(self, path: Path, param_dtype: str | None = None, base: Model | None = None) -> Model:
        """A model from a Hugging Face directory, a checkpoint of ours or a PEFT adapter, on the mesh.

        See `models.source.load`, also for `base`.
        """
        from flax import nnx

        from middo_jax.models.decoder import abstract
        from middo_jax.models.source import load, locate

        settings = self.config.model
        graphdef, params = load(locate(path), settings.dtype, param_dtype, self.mesh, base)
        config = dataclasses.replace(nnx.merge(graphdef, params).config, attention=settings.attention)
        return abstract(config)[0], params

    def tokenize(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """All examples; those that cannot be rendered were refused when the data was read."""
        return tokenize_all(examples, self.tokenizer, self.config.model.max_length)


def prepare(workshop: Workshop) -> tuple[list[Example], list[Example], list[Rejection]]:
    """Reads the user's data: (to train on, held out, refused with the reason).

    Raises:
      DataError: the data cannot be read, or nothing of it can be used.
    """
    settings = workshop.config.data
    examples, rejections = read(settings.path, settings.format, settings.limit)
    examples, refused = usable(workshop, examples)
    rejections += refused
    kept, heldout = split_heldout(
        examples, settings.eval_fraction, workshop.config.seed, settings.source_column
    )
    workshop.progress.say(
        f"{settings.path}: {len(kept)} samples, {len(heldout)} held out, {len(rejections)} rows refused"
    )
    return kept, heldout, rejections


def usable(workshop: Workshop, examples: Sequence[Example]) -> tuple[list[Example], list[Rejection]]:
    """The examples that the model can read, and those that its template or tokenizer forbids.

    Raises:
      DataError: none can be used.
    """
    kept, refused = [], []
    for example in examples:
        reason = _unusable(workshop, example)
        if reason is None:
            kept.append(example)
        else:
            refused.append(Rejection(f"sample {example.id}", reason, example.to_json()))
    if not kept:
        raise DataError(
            f"{workshop.config.data.path}: no usable row; the first was refused: {refused[0].reason}"
        )
    return kept, refused


def _unusable(workshop: Workshop, example: Example) -> str | None:
    for token in sorted(steering_tokens(workshop.tokenizer)):
        if any(token in message.content for message in example.messages):
            return f"its text holds the model's control token {token}"
    try:
        tokenize(example, workshop.tokenizer, workshop.config.model.max_length)
    except TemplateError as e:
        return str(e)
    return None


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


class Served(NamedTuple):
    """The refiner's endpoint.

    Attributes:
      url: up to and including /v1; several are servers of the same model.
      model: the name to ask for.
      sends_key: whether it is the user's and gets their API key; the embedded one gets a dummy.
    """

    url: str | tuple[str, ...]
    model: str
    sends_key: bool


@contextlib.contextmanager
def endpoint(workshop: Workshop) -> Iterator[Served]:
    """The refiner's endpoint; if none is set, the embedded one serves on loopback while the block runs."""
    config = workshop.config
    url = config.refine.base_url or os.environ.get("OPENAI_BASE_URL")
    if url is not None:
        if config.refine.model is None:
            served = "refine.base_url" if config.refine.base_url else "$OPENAI_BASE_URL"
            raise RunError(f"config: refine.model is missing: the name of a model that {served} serves")
        yield Served(url, config.refine.model, sends_key=True)
        return
    from middo_jax.inference.server import build_app, load_engine, serve_in_background
    from middo_jax.models.resolve import resolve

    if config.refine.model:
        path, template = resolve(config.refine.model), None
    else:
        path, template = workshop.base, config.model.template
    engine, tokenizer, eos_ids = load_engine(path, config.serve, config.model.dtype, template, workshop.mesh)
    name = path.resolve().name
    with engine, serve_in_background(build_app(engine, tokenizer, name, eos_ids), port=0) as url:
        yield Served(url, name, sends_key=False)
    gc.collect()
