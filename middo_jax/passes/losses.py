"""The fused pass: each example's loss and the embedding of its prompt, from one forward of packed batches.

The common prefix of all examples, such as a template's system turn, is computed once per row if the attention
kernel can share it. Tokens that no loss and no embedding needs, such as the end of the last turn, are left
out.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.data.packing import Bucket
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.data.trees import PackedTrees, Tree, common_prefix
from middo_jax.models.attention import shares_prefixes
from middo_jax.models.model import Model, Params, Structure, bound
from middo_jax.models.nll import target_nll
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.passes.runner import Pass, PassFacts, Plan
from middo_jax.progress import Progress, Silent

MIN_LENGTH = 8  # an example counts at least 8 tokens in the plan: a row of 1,024 has at most 128 segments
MIN_PREFIX = 8  # tokens; sharing a shorter prefix is not worth its positions in every row


Array = TypeVar("Array")  # numpy's on the host, JAX's inside the program


class LossInputs(NamedTuple, Generic[Array]):
    """Inputs of `score_batch`: [b, t] each.

    Attributes:
      tokens_bt: int32 token IDs.
      segment_ids_bt: int32, segment of each position; -1 means none.
      positions_bt: int32, position within the example.
      next_bt: int32, ID of the next token.
      is_target_bt: bool, whether the loss of the next token counts.
      in_prompt_bt: bool, whether the hidden state is part of the prompt's embedding.
      until_bt: int32, only with a shared prefix; see `models.attention.Packing`.
    """

    tokens_bt: Array
    segment_ids_bt: Array
    positions_bt: Array
    next_bt: Array
    is_target_bt: Array
    in_prompt_bt: Array
    until_bt: Array | None = None


class SegmentScores(NamedTuple):
    """Results of a batch per segment, float32; for a missing segment the sums are 0, the embedding is NaN."""

    nll_sum_bs: jax.Array
    n_targets_bs: jax.Array
    embedding_bsd: jax.Array


class ExampleScores(NamedTuple):
    """Results of a pass per example, in the order of the examples.

    Attributes:
      loss_n: float32, mean NLL of the targets, in nats; NaN if there is no target.
      n_targets_n: int32, number of target tokens.
      embedding_nd: float32, mean of the last hidden state over the prompt; NaN if there is no prompt.
    """

    loss_n: np.ndarray
    n_targets_n: np.ndarray
    embedding_nd: np.ndarray


@functools.partial(jax.jit, static_argnames=("graphdef", "max_segments", "chunk", "prefix", "longest"))
def score_batch(
    graphdef: Structure,
    params: Params,
    batch: LossInputs[jax.Array],
    *,
    max_segments: int,
    chunk: int,
    prefix: int = 0,
    longest: int | None = None,
) -> SegmentScores:
    """Returns loss sums and prompt embeddings of all segments of a packed batch.

    Args:
      graphdef: the decoder's structure.
      params: the decoder's parameters.
      batch: packed rows.
      max_segments: maximum number of segments per row: the size of axis s.
      chunk: number of target positions per device whose logits exist at one time.
      prefix, longest: see `models.attention.Packing`.
    """
    model = bound(graphdef, params)
    places = batch.segment_ids_bt, batch.positions_bt, batch.until_bt
    hidden_btd = model.hidden(batch.tokens_bt, *places, prefix=prefix, longest=longest)
    nll_bt = target_nll(model, hidden_btd, batch.next_bt, batch.is_target_bt, chunk)
    in_segment_bts = (batch.segment_ids_bt[..., None] == jnp.arange(max_segments)).astype(jnp.float32)
    prompt_bts = in_segment_bts * batch.in_prompt_bt[..., None]
    # HIGHEST: otherwise accelerators round the operands of a float32 product to bfloat16 or TF32.
    total_bsd = jnp.einsum(
        "bts,btd->bsd", prompt_bts, hidden_btd.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return SegmentScores(
        nll_sum_bs=jnp.einsum("bt,bts->bs", nll_bt, in_segment_bts, precision=jax.lax.Precision.HIGHEST),
        n_targets_bs=(batch.is_target_bt[..., None] * in_segment_bts).sum(axis=1),
        embedding_bsd=total_bsd / prompt_bts.sum(axis=1)[..., None],
    )


def score_examples(
    model: Model,
    examples: Sequence[TokenizedExample],
    *,
    batch_tokens: int,
    chunk: int,
    progress: Progress | None = None,
    name: str = "scores",
) -> tuple[ExampleScores, PassFacts]:
    """Scores every example; the result depends on neither the packing nor the mesh.

    Args:
      model: the model to score with; runs on its mesh.
      examples: the examples.
      batch_tokens: tokens per batch, all devices together.
      chunk: number of target positions per device whose logits exist at one time.
      progress: progress display.
      name: name of the pass in the progress display.
    """
    return LossPass(examples, model, batch_tokens, chunk)(model, progress or Silent(), name)


class LossPass:
    """The pass over some examples, for one or several models with the same width and mesh.

    Compiled programs are reused for the next model if its parameters have the same shapes, dtypes and
    shardings, as in the evaluations of one training.
    """

    def __init__(
        self, examples: Sequence[TokenizedExample], model: Model, batch_tokens: int, chunk: int
    ) -> None:
        """Plans the batches for the mesh and the attention of `model`; see `score_examples`."""
        self._width, self._n = model.config.hidden_size, len(examples)
        with jax.set_mesh(model.mesh):
            share_prefix = shares_prefixes(model.config.attention)
        self.plan = plan_losses(examples, share_prefix, batch_divisor(model.mesh), batch_tokens)

        def static(bucket: Bucket) -> dict[str, Any]:
            return {
                "max_segments": bucket.length // MIN_LENGTH,
                "chunk": chunk,
                "prefix": self.plan.prefix,
                "longest": bucket.longest,
            }

        self._pass = Pass(score_batch, self.plan, functools.partial(loss_inputs, examples), static)

    def __call__(self, model: Model, progress: Progress, name: str) -> tuple[ExampleScores, PassFacts]:
        """Returns the scores of all examples under a model; the progress display shows `name`."""
        loss_n = np.full(self._n, np.nan, np.float32)
        n_targets_n = np.zeros(self._n, np.int32)
        embedding_nd = np.full((self._n, self._width), np.nan, np.float32)

        def keep(index_m: np.ndarray, scores: SegmentScores) -> None:
            n_targets_n[index_m] = scores.n_targets_bs
            with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is the NaN for no target
                loss_n[index_m] = scores.nll_sum_bs / scores.n_targets_bs
            embedding_nd[index_m] = scores.embedding_bsd

        facts = self._pass.run(model, keep, progress, name)
        return ExampleScores(loss_n, n_targets_n, embedding_nd), facts


def plan_losses(
    examples: Sequence[TokenizedExample], share_prefix: bool, ways: int, batch_tokens: int
) -> Plan:
    """Plans the batches of a pass. Tokens that no loss and no embedding needs are left out.

    Args:
      examples: the examples to score.
      share_prefix: whether attention can share a common prefix, so that it is computed once per row.
      ways: number of parts into which the mesh splits a batch, see `batch_divisor`.
      batch_tokens: tokens per batch, all devices together.
    """
    trees = [Tree.line(e.tokens_n[: _needed(e)]) for e in examples]
    prefix = _shared_prefix(examples, trees) if share_prefix else 0
    return Plan.of(trees, prefix, batch_tokens, ways, MIN_LENGTH)


def _shared_prefix(examples: Sequence[TokenizedExample], trees: Sequence[Tree]) -> int:
    if len(examples) < 2:
        return 0
    # Every example keeps at least one token of its own, and all positions whose hidden state is needed.
    own = min(int(np.r_[_counts(e), True].argmax()) for e in examples)
    shortest = min(len(tree.tokens_n) for tree in trees)
    prefix = min(common_prefix([tree.tokens_n for tree in trees]), own, shortest - 1)
    return prefix if prefix >= MIN_PREFIX else 0


def loss_inputs(examples: Sequence[TokenizedExample], packed: PackedTrees) -> LossInputs[np.ndarray]:
    """Returns the inputs of `score_batch`; `until_bt` only if rows share a prefix."""

    def fill(values: Callable[[TokenizedExample], np.ndarray]) -> np.ndarray:
        return packed.fill(lambda i: values(examples[i])[: len(packed.trees[i].tokens_n)])

    return LossInputs(
        tokens_bt=fill(lambda e: e.tokens_n),
        segment_ids_bt=packed.tree_bt(),
        positions_bt=packed.fill(lambda i: packed.trees[i].positions_n),
        next_bt=fill(lambda e: np.append(e.tokens_n[1:], np.int32(0))),
        is_target_bt=fill(lambda e: np.append(e.is_target_n[1:], False)),
        in_prompt_bt=fill(lambda e: e.in_prompt_n),
        until_bt=packed.until_bt() if packed.prefix else None,
    )


def _counts(example: TokenizedExample) -> np.ndarray:
    """Returns bool [t], whether a hidden state is needed: it predicts a target or belongs to the prompt."""
    return example.in_prompt_n | np.append(example.is_target_n[1:], False)


def _needed(example: TokenizedExample) -> int:
    """Returns the number of tokens up to the last needed hidden state; all tokens if none is needed."""
    return len(example) - int(_counts(example)[::-1].argmax()) if len(example) else 0
