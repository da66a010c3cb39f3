"""Readings of a sample beside its loss. Each sees a kind of fault that the mean over all targets hides.

  end_nll           NLL of the end-of-turn token alone: high where an answer was cut
  worst_decile_nll  mean NLL of the worst tenth of the targets: high where single tokens are wrong
  prompt_nll        mean NLL of the prompt's tokens: high where the prompt is no language
  ifd               s(y | x) / s(y): near 1 where the prompt does not help, see `signals.ifd`
  pmi               log p(y | x) - log p(y), the sum over all targets in nats: low where they are strangers
  reverse_ifd       s(x | y) / s(x): near 1 where the response does not tell the prompt

x is the prompt, y the response, s the mean NLL per token. The reverse ratio is that of Li et al. 2024
(arXiv 2402.10110), in which a request to guess the instruction precedes the response.
Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.data.long_texts import first_tokens, is_long
from middo_jax.data.spans import render
from middo_jax.data.tokenize import TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The user's turn from which the prompt is to be told.
GUESS = "Below is the response to an instruction. Guess the instruction.\n\n"


def end_nll(last_nll_n: np.ndarray, last_target_n: np.ndarray, end_token: int | None) -> np.ndarray:
    """[n] NLL of the token that ends the last answer's turn; NaN where the last target is another token.

    Args:
      last_nll_n: [n] NLL of the last target.
      last_target_n: [n] that target, see `last_target`. A sample that `model.max_length` cut has lost its
        end.
      end_token: of `tokenize.end_of_turn_token`; None: the template writes none.
    """
    ends_n = np.zeros(len(last_nll_n), bool) if end_token is None else last_target_n == end_token
    return np.where(ends_n, last_nll_n, np.nan).astype(np.float32)


def last_targets(examples: Sequence[TokenizedExample]) -> np.ndarray:
    """int32 [n] `last_target` of each sample."""
    return np.fromiter(map(last_target, examples), np.int32, len(examples))


def last_target(example: TokenizedExample) -> int:
    """The last token that is learnt; -1 if none is."""
    targets = example.tokens_n[example.is_target_n]
    return int(targets[-1]) if len(targets) else -1


def pmi(loss_n: np.ndarray, loss_unconditional_n: np.ndarray, n_targets_n: np.ndarray) -> np.ndarray:
    """[n] log p(y | x) - log p(y) in nats, from the mean NLLs with and without the prompt."""
    return n_targets_n * (loss_unconditional_n - loss_n)


def prompts_behind_responses(
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[TokenizedExample | None]:
    """The conversations turned round: the response in the user's turn after GUESS, the prompt as the answer.

    The prompt's tokens are those of the conversation, without an end of turn, so that the loss is over the
    same tokens as `prompt_nll`. None where there are several turns, where one of the two texts is empty, or
    where the result is over `max_length`.
    """
    turned: list[TokenizedExample | None] = [None] * len(examples)
    single = [i for i, example in enumerate(examples) if example.is_single_turn and example.response]
    texts = [
        render(tokenizer, [Message("user", GUESS + examples[i].response)], add_generation_prompt=True)
        for i in single
    ]
    for i, ids in zip(single, _token_ids(texts, tokenizer, max_length), strict=True):
        prompt_n = tokenized[i].tokens_n[tokenized[i].in_prompt_n]
        tokens_n = np.concatenate([np.asarray(ids, np.int32), prompt_n])
        if not len(prompt_n) or len(tokens_n) > max_length:
            continue
        turned[i] = dataclasses.replace(
            tokenized[i],
            tokens_n=tokens_n,
            is_target_n=np.arange(len(tokens_n)) >= len(ids),
            in_prompt_n=np.zeros(len(tokens_n), bool),
        )
    return turned


def _token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[Sequence[int]]:
    """The tokens of each text; of a long text only the first, where they are over `max_length`."""
    whole = [text for text in texts if not is_long(text, max_length)]
    ids = iter(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"] if whole else [])
    for text in texts:
        if is_long(text, max_length):
            yield first_tokens(tokenizer, text, max_length, add_special_tokens=False)
        else:
            yield next(ids)
