"""What the model before training says of a dataset. Where it is frozen, what an earlier round measured holds.

Axes: n sample, e sample of the earlier round, d width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from middo_jax.config import affecting
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.rundir import RoundDir, fingerprint
from middo_jax.session import Session

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from middo_jax.models.model import Model
    from middo_jax.passes.losses import ExampleScores
    from middo_jax.signals.neighbours.incremental import Earlier

    Scored = Callable[[str, Model, Sequence[TokenizedExample]], ExampleScores]


class Before(NamedTuple):
    """What the model before training says of N samples.

    Attributes:
      loss_n: mean NLL of the targets; None if not asked for.
      embedding_nd: of the prompts; None if not asked for.
      earlier: if embeddings were: which sample of the earlier round each one is, and the neighbours there.
      n_kept: samples that were not measured again.
      identity: of what was measured, for the manifest.
    """

    loss_n: np.ndarray | None
    embedding_nd: np.ndarray | None
    earlier: Earlier
    n_kept: int
    identity: str


def measure_before(
    session: Session,
    path: Path,
    model: Model,
    tokenized: Sequence[TokenizedExample],
    raw: Sequence[TokenizedExample] | None,
    hashes: Sequence[str],
    *,
    with_loss: bool,
    with_embeddings: bool,
    earlier: RoundDir | None,
    scored: Scored,
) -> Before:
    """Measures what is new since an earlier round; the rest is taken from its files.

    A sample is the same if its id, which is a hash of its text, and the hash of its prompt's tokens are. The
    earlier round counts only if its manifest names the same identity, and its files are those it names.

    Args:
      session: settings, tokenizer.
      path: of the model before training.
      model: that model, loaded.
      tokenized: the samples.
      raw: their prompts, if these are embedded without the conversation.
      hashes: of the prompts as they are embedded.
      with_loss: whether losses are wanted.
      with_embeddings: whether embeddings are.
      earlier: the earlier round's folder, if there is one.
      scored: runs a pass under a name.
    """
    import numpy as np

    from middo_jax.signals.neighbours.incremental import Earlier, rows_before
    from middo_jax.signals.table import as_floats, neighbours_of

    k, ids = session.config.diversity.k, [example.id for example in tokenized]
    digest = _identity(session, path, model, with_loss, with_embeddings)
    found = None if earlier is None else _measured_under(earlier, digest)
    table, embedding_ed = found or (None, None)
    known, row_n = Earlier.nothing(len(ids), k), np.full(len(ids), -1)
    if table is not None:
        keys = zip(table["id"].to_pylist(), table["prompt_hash"].to_pylist(), strict=True)
        row_n = rows_before(list(zip(ids, hashes, strict=True)), list(keys))
        known = Earlier(neighbours_of(table, k), row_n) if with_embeddings else known
    new, old = np.flatnonzero(row_n < 0), np.flatnonzero(row_n >= 0)
    if earlier is not None:
        stands = "nothing stands" if table is None else f"{len(old):,} of {len(ids):,} samples stand"
        session.progress.say(f"under the model before training: of {earlier.path.name} {stands}")

    def of_all(of_new: np.ndarray, of_earlier: np.ndarray | None) -> np.ndarray:
        """[n, ...] of what was measured now, and what was before."""
        values = np.empty((len(ids), *of_new.shape[1:]), of_new.dtype)
        values[new] = of_new
        if of_earlier is not None:
            values[old] = of_earlier[row_n[old]]
        return values

    loss_n = embedding_nd = None
    if with_loss or raw is None:
        scores = scored("loss before training", model, [tokenized[i] for i in new.tolist()])
        embedding_nd = scores.embedding_nd
        if with_loss:
            loss_n = of_all(scores.loss_n, None if table is None else as_floats(table, "loss_pre"))
    if with_embeddings and raw is not None:
        embedding_nd = scored("embeddings of raw prompts", model, [raw[i] for i in new.tolist()]).embedding_nd
    if with_embeddings and embedding_nd is not None:
        embedding_nd = of_all(embedding_nd, embedding_ed)
    return Before(loss_n, embedding_nd if with_embeddings else None, known, len(old), digest)


def _identity(session: Session, path: Path, model: Model, with_loss: bool, with_embeddings: bool) -> str:
    """SHA-256 of all but the samples that the losses, embeddings and neighbours depend on.

    The model's place, shape and weights; the tokenizer, the template, how rows become text; what is
    embedded and which neighbours are sought. The mesh and the attention kernel change rounding alone.
    """
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from middo_jax.parallel.hosts import to_host
    from middo_jax.training.identity import checksums

    config, tokenizer = session.config, session.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # `load_tokenizer` gives no other
    neighbours = affecting(config.diversity, {"scores"})
    decisive = [
        str(path.resolve()),
        repr(dataclasses.replace(model.config, attention="auto")),
        np.stack(to_host(checksums(model.params))).tolist(),
        tokenizer.chat_template,
        tokenizer.backend_tokenizer.to_str(),
        affecting(config, {"text"}),
        with_loss,
        neighbours if with_embeddings else config.diversity.text,
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _measured_under(earlier: RoundDir, identity: str) -> tuple[pa.Table, np.ndarray] | None:
    """A round's scores and embeddings; None if they are another model's, or not what its manifest names."""
    import numpy as np

    from middo_jax.signals.table import read_scores

    stages = earlier.stages()
    if stages.get("score", {}).get("pre_identity") != identity:
        return None
    files = stages["score"]["files"]
    for path in (earlier.scores, earlier.embeddings):
        if not path.exists() or fingerprint(path) != files[path.name]:
            return None
    return read_scores(earlier.scores), np.load(earlier.embeddings, mmap_mode="r", allow_pickle=False)
