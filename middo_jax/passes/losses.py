"""The fused pass: each example's losses and the embedding of its prompt, from one forward of packed batches.

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

from middo_jax.data.lazy import Lazy
from middo_jax.data.packing import Bucket
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.data.trees import PackedTrees
from middo_jax.models.attention import shares_prefixes
from middo_jax.models.model import Model, Params, Structure, bound
from middo_jax.models.nll import target_nll
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.passes.loss_plan import MIN_LENGTH, Outline, follows, plan_losses
from middo_jax.passes.parts import Parts, Saved, digests
from middo_jax.passes.runner import Pass, PassFacts
from middo_jax.progress import Progress, Silent

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
      prompt_follows_bt: bool, only where the prompts' losses are wanted; the next token is of the prompt.
    """

    tokens_bt: Array
    segment_ids_bt: Array
    positions_bt: Array
    next_bt: Array
    is_target_bt: Array
    in_prompt_bt: Array
    until_bt: Array | None = None
    prompt_follows_bt: Array | None = None


class SegmentScores(NamedTuple):
    """What a batch gives for each of its segments, in float32; any value where a row has no such segment.

    Attributes:
      nll_sum_bs: sum of the targets' NLLs.
      n_targets_bs: int32.
      last_nll_bs: NLL of the last target.
      worst_decile_bs: mean of the largest tenth of the targets' NLLs.
      embedding_bsd: mean hidden state over the prompt.
      prompt_nll_bs: mean NLL of the prompt's tokens; None if not wanted.
    """

    nll_sum_bs: jax.Array
    n_targets_bs: jax.Array
    last_nll_bs: jax.Array
    worst_decile_bs: jax.Array
    embedding_bsd: jax.Array
    prompt_nll_bs: jax.Array | None = None


class ExampleScores(NamedTuple):
    """Results of a pass per example, in the order of the examples.

    Attributes:
      loss_n: mean NLL of the targets in nats, float32 sums; NaN where there is no target.
      n_targets_n: int32.
      embedding_nd: float32, mean of the last hidden state over the prompt; NaN where there is no prompt.
      last_nll_n: NLL of the last target; NaN where there is no target.
      worst_decile_nll_n: mean NLL of the ceil(n / 10) targets of n that have the largest; likewise.
      prompt_nll_n: mean NLL of the prompt's tokens, without a token that nothing precedes; NaN where there
        is none. None if it was not asked for.
    """

    loss_n: np.ndarray
    n_targets_n: np.ndarray
    embedding_nd: np.ndarray
    last_nll_n: np.ndarray
    worst_decile_nll_n: np.ndarray
    prompt_nll_n: np.ndarray | None = None


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
    """Losses and prompt embeddings of all segments of a packed batch.

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
    read_bt, prompt_follows_bt = batch.is_target_bt, batch.prompt_follows_bt
    if prompt_follows_bt is not None:
        read_bt = read_bt | prompt_follows_bt
    nll_bt = target_nll(model, hidden_btd, batch.next_bt, read_bt, chunk)
    in_segment_bts = batch.segment_ids_bt[..., None] == jnp.arange(max_segments)
    target_bts = in_segment_bts & batch.is_target_bt[..., None]
    prompt_bts = in_segment_bts & batch.in_prompt_bt[..., None]
    prompt_nll_bs = None
    if prompt_follows_bt is not None:
        prompt_nll_bs = _mean(nll_bt, in_segment_bts & prompt_follows_bt[..., None])
    return SegmentScores(
        nll_sum_bs=_sum(nll_bt, target_bts),
        n_targets_bs=target_bts.sum(axis=1, dtype=jnp.int32),
        last_nll_bs=_of_last(nll_bt, target_bts),
        worst_decile_bs=_worst_decile(nll_bt, batch, max_segments),
        embedding_bsd=_sum(hidden_btd.astype(jnp.float32), prompt_bts) / prompt_bts.sum(axis=1)[..., None],
        prompt_nll_bs=prompt_nll_bs,
    )


def _sum(x_bt: jax.Array, chosen_bts: jax.Array) -> jax.Array:
    """[b, s, ...] sums over the chosen positions of each segment."""
    # HIGHEST: on accelerators a float32 product is otherwise rounded to bfloat16 or TF32.
    return jnp.einsum(
        "bt...,bts->bs...", x_bt, chosen_bts.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def _mean(x_bt: jax.Array, chosen_bts: jax.Array) -> jax.Array:
    return _sum(x_bt, chosen_bts) / chosen_bts.sum(axis=1)


def _of_last(x_bt: jax.Array, chosen_bts: jax.Array) -> jax.Array:
    """[b, s] of the last chosen position of each segment."""
    at_t = jnp.arange(x_bt.shape[1])
    last_bs = jnp.where(chosen_bts, at_t[:, None], 0).max(axis=1)
    return jnp.take_along_axis(x_bt, last_bs, axis=1)


def _worst_decile(nll_bt: jax.Array, batch: LossInputs[jax.Array], max_segments: int) -> jax.Array:
    """[b, s] mean of the largest ceil(n / 10) of the NLLs of each segment's n targets.

    Both ways give the same. Elsewhere a sort is fastest, but a TPU's compiler takes minutes for one.
    """
    segment_bt = jnp.where(batch.is_target_bt, batch.segment_ids_bt, max_segments)
    return jax.lax.platform_dependent(
        nll_bt,
        segment_bt,
        tpu=functools.partial(worst_by_threshold, max_segments=max_segments),
        default=functools.partial(worst_by_sort, max_segments=max_segments),
    )


def worst_by_sort(nll_bt: jax.Array, segment_bt: jax.Array, max_segments: int) -> jax.Array:
    """Sorts a row by segment, then by falling NLL, all that is no target last.

    So the targets of a segment are an interval, and its worst tenth is the beginning of that.
    """
    segment_bt, rising_bt = jax.lax.sort((segment_bt, -nll_bt), dimension=1, num_keys=2)
    of_segment_bts = segment_bt[..., None] == jnp.arange(max_segments)
    n_bs = of_segment_bts.sum(axis=1)
    start_bs = jnp.cumsum(n_bs, axis=1) - n_bs
    rank_bts = jnp.arange(nll_bt.shape[1])[:, None] - start_bs[:, None]
    return _mean(-rising_bt, of_segment_bts & (rank_bts < (n_bs[:, None] + 9) // 10))


def worst_by_threshold(nll_bt: jax.Array, segment_bt: jax.Array, max_segments: int) -> jax.Array:
    """Finds the least NLL of each segment's worst tenth bit by bit, the highest bit first.

    Of several targets with that NLL, so many count that the tenth is full.
    """
    bits_bt = jax.lax.bitcast_convert_type(nll_bt, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Whole numbers in the order of the NLLs.
    key_bt = jnp.where(bits_bt >= sign, ~bits_bt, bits_bt | sign)
    of_segment_bts = segment_bt[..., None] == jnp.arange(max_segments)
    worst_bs = (of_segment_bts.sum(axis=1) + 9) // 10

    def step(i: jax.Array, least_bs: jax.Array) -> jax.Array:
        higher_bs = least_bs | sign >> i.astype(jnp.uint32)
        reached_bts = of_segment_bts & (key_bt[..., None] >= higher_bs[:, None])
        return jnp.where(reached_bts.sum(axis=1) >= worst_bs, higher_bs, least_bs)

    least_bs = jax.lax.fori_loop(0, 32, step, jnp.zeros_like(worst_bs, jnp.uint32))
    above_bts = of_segment_bts & (key_bt[..., None] > least_bs[:, None])
    bits_bs = jnp.where(least_bs >= sign, least_bs ^ sign, ~least_bs)
    least_nll_bs = jax.lax.bitcast_convert_type(bits_bs, jnp.float32)
    equal_bs = worst_bs - above_bts.sum(axis=1)
    return (_sum(nll_bt, above_bts) + equal_bs * least_nll_bs) / worst_bs


def score_examples(
    model: Model,
    examples: Sequence[TokenizedExample],
    *,
    batch_tokens: int,
    chunk: int,
    progress: Progress | None = None,
    name: str = "scores",
    prompts: bool = False,
) -> tuple[ExampleScores, PassFacts]:
    """Scores every example; the result depends on neither the packing nor the mesh.

    Args:
      model: whose losses and embeddings are wanted, on its mesh.
      examples: what to score.
      batch_tokens: tokens of a batch, all devices together.
      chunk: target positions of a device whose logits exist at one time.
      progress: is told how far the pass is, under this name.
      name: of the pass.
      prompts: whether the prompts' losses are wanted too; the head is applied to more positions then.
    """
    planned = LossPass(examples, model, batch_tokens, chunk, prompts=prompts)
    return planned(model, progress or Silent(), name)


class LossPass:
    """The pass over some examples, for one or several models with the same width and mesh.

    Compiled programs are reused for the next model if its parameters have the same shapes, dtypes and
    shardings, as in the evaluations of one training.
    """

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        model: Model,
        batch_tokens: int,
        chunk: int,
        *,
        prompts: bool = False,
        outline: Outline | None = None,
    ) -> None:
        """Plans the batches for the mesh and the attention of `model`; see `score_examples`.

        `outline` is that of the examples, if this process does not have all of their tokens.
        """
        self._width, self._examples, self._prompts = model.config.hidden_size, examples, prompts
        with jax.set_mesh(model.mesh):
            share_prefix = shares_prefixes(model.config.attention)
        ways = batch_divisor(model.mesh)
        self.plan = plan_losses(examples, share_prefix, ways, batch_tokens, prompts=prompts, outline=outline)

        def static(bucket: Bucket) -> dict[str, Any]:
            return {
                "max_segments": bucket.length // MIN_LENGTH,
                "chunk": chunk,
                "prefix": self.plan.prefix,
                "longest": bucket.longest,
            }

        inputs = functools.partial(loss_inputs, examples, prompts=prompts)
        self._pass = Pass(score_batch, self.plan, inputs, static)

    def __call__(
        self, model: Model, progress: Progress, name: str, parts: Parts | None = None
    ) -> tuple[ExampleScores, PassFacts]:
        """Returns the scores of all examples under a model; the progress display shows `name`.

        `parts` has results of an earlier start of the pass; new ones are added.
        """
        n = len(self._examples)
        loss_n, last_nll_n, worst_n, prompt_nll_n = np.full((4, n), np.nan, np.float32)
        n_targets_n = np.zeros(n, np.int32)
        embedding_nd = np.full((n, self._width), np.nan, np.float32)

        def keep(index_m: np.ndarray, scores: SegmentScores) -> None:
            n_targets_n[index_m] = scores.n_targets_bs
            with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is the NaN for no target
                loss_n[index_m] = scores.nll_sum_bs / scores.n_targets_bs
            last_nll_n[index_m] = np.where(scores.n_targets_bs > 0, scores.last_nll_bs, np.nan)
            worst_n[index_m] = scores.worst_decile_bs
            if scores.prompt_nll_bs is not None:
                prompt_nll_n[index_m] = scores.prompt_nll_bs
            embedding_nd[index_m] = scores.embedding_bsd

        saved = None if parts is None else Saved(parts, self._digests())
        facts = self._pass.run(model, keep, progress, name, saved)
        prompts_n = prompt_nll_n if self._prompts else None
        return ExampleScores(loss_n, n_targets_n, embedding_nd, last_nll_n, worst_n, prompts_n), facts

    def _digests(self) -> list[bytes]:
        """The digests of all examples, see `passes.parts`."""
        examples = self._examples

        def content(i: int) -> tuple[np.ndarray, ...]:
            e = examples[i]
            return e.tokens_n, e.is_target_n, e.in_prompt_n, *((np.ones(1, bool),) if self._prompts else ())

        own = examples.own if isinstance(examples, Lazy) else None
        return digests(len(examples), content, own)


def loss_inputs(
    examples: Sequence[TokenizedExample], packed: PackedTrees, *, prompts: bool = False
) -> LossInputs[np.ndarray]:
    """What `score_batch` reads of a batch; `until_bt` only where rows share a prefix.

    With `prompts`, the prompts' losses are wanted too.
    """
    if isinstance(examples, Lazy):
        examples.bring(i for row in packed.rows for i in row)

    def fill(values: Callable[[TokenizedExample], np.ndarray]) -> np.ndarray:
        return packed.fill(lambda i: values(examples[i])[: len(packed.trees[i].tokens_n)])

    return LossInputs(
        tokens_bt=fill(lambda e: e.tokens_n),
        segment_ids_bt=packed.tree_bt(),
        positions_bt=packed.fill(lambda i: packed.trees[i].positions_n),
        next_bt=fill(lambda e: np.append(e.tokens_n[1:], np.int32(0))),
        is_target_bt=fill(lambda e: follows(e.is_target_n)),
        in_prompt_bt=fill(lambda e: e.in_prompt_n),
        until_bt=packed.until_bt() if packed.prefix else None,
        prompt_follows_bt=fill(lambda e: follows(e.in_prompt_n)) if prompts else None,
    )
