"""Held-out losses and exports of trained models. Axes: docs/contributing.md#axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from middo_jax.buckets import shown
from middo_jax.data.example import Example
from middo_jax.data.tokenize import eos_token_ids, load_tokenizer
from middo_jax.evaluation.contrast import Margin, faulty, last_answer, margins
from middo_jax.evaluation.heldout import HeldoutLoss, RowLosses, row_losses, total
from middo_jax.models import hf
from middo_jax.models.checkpoint import read_metadata
from middo_jax.models.config import read_config
from middo_jax.models.loading import load, load_adapters, locate
from middo_jax.models.lora import merge_adapters
from middo_jax.models.model import Model
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes.losses import LossPass
from middo_jax.progress import Progress, Silent
from middo_jax.rundir import RoundDir, RunDir, RunError, atomic, write_json
from middo_jax.rundir.rows import HeldoutLosses, ModelLossRow
from middo_jax.rundir.schemas import CONTRAST_ROWS, HELDOUT_ROWS
from middo_jax.rundir.tables import arrow_schema
from middo_jax.session import Session
from middo_jax.stages.shared_tokens import SharedTokens


class HeldOut:
    """Held-out examples, tokenized once, and the losses of several models on them."""

    def __init__(self, session: Session, examples: Sequence[Example]) -> None:
        """Tokenizes the examples and groups them by source (`data.source_column`). All processes call it."""
        self._session = session
        self._tokenized = SharedTokens.of(session, examples)
        column = session.config.data.source_column
        self._sources = [str(example.extra.get(column, "")) for example in examples]
        self._pass: LossPass | None = None

    def rows(self, model: Model) -> RowLosses:
        """Returns the loss of each example. Models with the same config share the compiled pass."""
        if self._pass is None:
            chunk = self._session.config.scoring.unembed_chunk
            outline = self._tokenized.outline(prompts=False)
            self._pass = LossPass(self._tokenized, model, self._session.batch_tokens, chunk, outline=outline)
        scores, _ = self._pass(model, Silent(), "held-out loss")
        return row_losses(self._tokenized.ids, scores.loss_n, scores.n_targets_n)

    def loss(self, model: Model) -> HeldoutLoss:
        """Returns the loss over all examples, and over the examples of each source."""
        return total(self.rows(model), self._sources)


class Contrast:
    """Held-out examples with planted faults, tokenized once, and the margins of several models on them."""

    def __init__(self, session: Session, examples: Sequence[Example]) -> None:
        """Plants the faults, see `evaluation.contrast`."""
        self._planted = faulty(examples)
        # Where the last answer is the only learnt one, its loss is that of the example.
        right = {i: alone for i, e in enumerate(examples) if (alone := last_answer(e)).messages != e.messages}
        self._alone = list(right)
        self._more = HeldOut(session, [*right.values(), *(one.example for one in self._planted)])

    def margins(self, model: Model, rows: RowLosses) -> list[Margin]:
        """Returns the margin of each example and kind of fault; `rows` are the losses of the examples."""
        if not self._planted:
            return []
        more, n = self._more.rows(model), len(self._alone)
        nll_n, n_targets_n = rows.nll_n.copy(), rows.n_targets_n.copy()
        nll_n[self._alone], n_targets_n[self._alone] = more.nll_n[:n], more.n_targets_n[:n]
        right = RowLosses(rows.ids, nll_n, n_targets_n)
        return margins(right, RowLosses(more.ids[n:], more.nll_n[n:], more.n_targets_n[n:]), self._planted)


def measure_heldout(
    session: Session, folder: RunDir | RoundDir, models: Mapping[str, Path], heldout: Sequence[Example]
) -> dict[str, float]:
    """Writes heldout_losses.json and heldout_rows.parquet into a folder; returns model name -> loss.

    heldout_rows.parquet has one row per model and held-out example, models in the given order: `model`, `id`,
    `nll` (sum over the target tokens, in nats) and `n_target_tokens`. Without held-out examples both files
    are empty. With `evaluate.contrast`, a run's folder gets contrast_rows.parquet too.
    """
    losses: list[ModelLossRow] = []
    rows: dict[str, RowLosses] = {}
    held_out = HeldOut(session, heldout)  # tokenized once for all models
    contrast, found_margins = None, dict[str, list[Margin]]()
    if isinstance(folder, RunDir) and session.config.evaluate.contrast:
        contrast = Contrast(session, heldout)
    with session.progress.task("held-out loss", "models") as advance:
        for done, (name, path) in enumerate(models.items() if heldout else (), 1):
            model = session.load_model(path)
            rows[name] = held_out.rows(model)
            if contrast is not None:
                found_margins[name] = contrast.margins(model, rows[name])
            del model
            found = total(rows[name])
            if not math.isfinite(found.loss):
                raise RunError(
                    f"the held-out loss under {name} ({path}) is {found.loss}: the model is wrecked"
                )
            losses.append({"name": name, "loss": found.loss, "n_target_tokens": found.n_target_tokens})
            advance(done, len(models), f"{name} {losses[-1]['loss']:.4f}")
    _write_rows(folder.heldout_rows, rows)
    if isinstance(folder, RunDir) and contrast is not None:
        _write_margins(folder.contrast_rows, found_margins)
    found_all: HeldoutLosses = {"n": len(heldout), "models": losses}
    write_json(folder.heldout_losses, found_all)
    return {m["name"]: m["loss"] for m in losses}


def _write_rows(path: Path, rows: Mapping[str, RowLosses]) -> None:
    columns = {
        "model": [name for name, of in rows.items() for _ in of.ids],
        "id": [id_ for of in rows.values() for id_ in of.ids],
        "nll": [nll for of in rows.values() for nll in of.nll_n.tolist()],
        "n_target_tokens": [n for of in rows.values() for n in of.n_targets_n.tolist()],
    }
    with atomic(path, "wb") as file:
        pq.write_table(pa.table(columns, schema=arrow_schema(HELDOUT_ROWS)), file)


def _write_margins(path: Path, of_models: Mapping[str, Sequence[Margin]]) -> None:
    rows = [{"model": name, **one._asdict()} for name, found in of_models.items() for one in found]
    with atomic(path, "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(CONTRAST_ROWS)), file)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    dtype: str | None,
    progress: Progress,
    *,
    mesh: Mesh | None = None,
    verify: bool = True,
    base: str | None = None,
) -> dict[str, Any]:
    """Writes a trained model as a Hugging Face directory, adapters merged into their base.

    The export contains the chat template of the training. If torch is installed and memory suffices,
    transformers loads the export, and its logits are compared with those of this package.

    Args:
      checkpoint: of ours, or a PEFT adapter.
      out: must not exist, or be empty.
      dtype: float32, bfloat16 or float16; None is float32, in which training keeps its weights.
      progress: shows how far the export's logits differ, or why they were not compared.
      mesh: holds the parameters during the export; None: all devices, parameters sharded.
      verify: whether to compare.
      base: the user's name of the base model, if it may have been moved.

    Returns:
      {"verified": True, "max_difference", "largest_logit", "n_prompts", "n_tokens"}, or {"verified": False,
      "reason"}.

    Raises:
      RunError: there is no finished checkpoint.
      FileExistsError: `out` is not empty.
      CheckpointError: the export's logits differ from the model's; the export is removed.
    """
    source = locate(checkpoint, base=base)
    if source.trained is None:
        raise RunError(
            f"{shown(checkpoint)}: no finished checkpoint there; a round's is at round_XX/checkpoint"
        )
    hf.require_vacant(out)  # raises before anything is computed
    config, mesh = read_config(source.base), mesh or make_mesh()
    model = merge_adapters(load(source, mesh=mesh))
    tokenizer = _tokenizer(source.base, checkpoint)
    reason = hf.obstacle(config) if verify else "switched off"
    verification = hf.export(
        model,
        source.base,
        out,
        dtype,
        chat=hf.ChatFormat(tokenizer.chat_template, eos_token_ids(source.base, tokenizer)),
        expectation=None if reason else hf.expect(model, tokenizer, dtype),
    )
    if reason is not None:
        progress.say(f"not verified: {reason}")
        return {"verified": False, "reason": reason}
    if verification is None:  # only the first process compares
        return {"verified": True}
    progress.say(str(verification))
    return {"verified": True, **verification._asdict()}


def _tokenizer(base: Path, checkpoint: Path) -> PreTrainedTokenizerBase:
    """Returns the base model's tokenizer with the chat template of the training."""
    tokenizer = load_tokenizer(base)
    if template := (read_metadata(checkpoint) or {}).get("chat_template"):
        tokenizer.chat_template = template
    return tokenizer


def export_adapter(checkpoint: Path, out: Path, dtype: str | None = None) -> None:
    """Writes the LoRA adapters of a checkpoint as a PEFT directory, which refers to their base model.

    Raises:
      RunError: the checkpoint has no adapters.
      FileExistsError: `out` is not empty.
    """
    source = locate(checkpoint)
    config = dataclasses.replace(read_config(source.base), lora=source.lora)
    adapters = load_adapters(source, config, make_mesh())
    template = (read_metadata(checkpoint) or {}).get("chat_template")
    hf.export_adapters(adapters, config, source.base, out, dtype, template)
