"""Conversation -> tokens, with masks of the tokens that are learnt and of those in the user's prompt.

Axes: docs/contributing.md#axes; here n is a token.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from middo_jax.data.example import Example, Message
from middo_jax.data.long_texts import Encoded, encode_around, first_tokens, is_long
from middo_jax.data.spans import locate, render, require_tools
from middo_jax.data.templates import (
    TemplateError,
    control_tokens,
    declared_ends,
    pin_date,
    require_bounded,
    set_template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough to use all cores of a host. The offsets are Python tuples, so more would take much memory.
_TEXTS_AT_A_TIME = 1024
NO_LIMIT = 1 << 30  # a `max_length` at which no conversation is cut


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One rendered conversation.

    Attributes:
      id: the example's.
      tokens_n: int32 token ids.
      is_target_n: bool; the token is learnt: it belongs to an answer or ends the answer's turn.
      in_prompt_n: bool; the token belongs to a user's text, not to the template.
      truncated: whether tokens were left out.
    """

    id: str
    tokens_n: np.ndarray
    is_target_n: np.ndarray
    in_prompt_n: np.ndarray
    truncated: bool

    def __len__(self) -> int:
        return len(self.tokens_n)


def load_tokenizer(
    directory: str | Path, template: str | None = None, date: datetime.date | None = None
) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a chat template.

    Args:
      directory: a Hugging Face directory; no code in it is executed.
      template: replaces the tokenizer's own, see `set_template`.
      date: the day that the template prints, if it prints one; None: the day of each rendering.

    Raises:
      TemplateError: see `set_template`; or the tokenizer is not a fast one (no character offsets).
    """
    # Not at the top: `middo select` imports this module and must start without transformers.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # the libraries raise whatever a damaged file leads to, Exception itself too
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TemplateError(
            f"{directory}: its tokenizer cannot be loaded: {said}. It must be a Hugging Face tokenizer with "
            "a whole tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{directory}: a fast tokenizer (tokenizer.json) is needed to find where answers start"
        )
    if not tokenizer.get_vocab():
        raise TemplateError(f"{directory}: its tokenizer has no tokens; tokenizer.json is empty or damaged")
    set_template(tokenizer, template)
    require_bounded(tokenizer)
    if date is not None:
        pin_date(tokenizer, date)
    return tokenizer


def eos_token_ids(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, the generation config's and the template's own."""
    ids = (tokenizer.eos_token_id, end_of_turn_token(tokenizer), *declared_ends(directory))
    return frozenset(i for i in ids if isinstance(i, int))


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token that the template writes after an answer; None if it writes none."""
    probe = Example((Message("user", "Hi"), Message("assistant", "Hello")))
    tokens = tokenize(probe, tokenizer, NO_LIMIT)
    last = int(tokens.tokens_n[tokens.is_target_n][-1])
    return last if last in control_tokens(tokenizer).values() else None


def learnt_controls(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The control tokens among the targets of an example."""
    return frozenset(np.intersect1d(example.tokens_n[example.is_target_n], _control_ids(tokenizer)).tolist())


@functools.lru_cache(maxsize=16)
def _control_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    return np.array(sorted(control_tokens(tokenizer).values()), np.int32)


@functools.lru_cache(maxsize=16)
def steering_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The control tokens that the chat template uses or that end an answer, as text.

    In a sample's own text they would end its turn. Other control tokens, such as a code model's `<filename>`,
    are rare but may be part of a text.
    """
    rendered = f"{tokenizer.chat_template}{tokenizer.eos_token}{tokenizer.bos_token}"
    ends = declared_ends(tokenizer.name_or_path)
    return frozenset(text for text, i in control_tokens(tokenizer).items() if text in rendered or i in ends)


def refusal(example: Example, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why an example cannot be used with this tokenizer, or None if it can. The text is only rendered."""
    for token in sorted(steering_tokens(tokenizer)):
        if any(token in text for message in example.messages for text in (message.content, message.tool)):
            return f"its text contains the model's control token {token}"
    try:
        text = render(tokenizer, example.messages, tools=example.tools)
        require_tools(text, example)
        locate(tokenizer, text, example)
    except TemplateError as e:
        return str(e)
    return None


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenizedExample:
    r"""Renders a conversation with the chat template and marks targets and prompt.

    With a ChatML template, `user: Hi`, `assistant: Hello` become

      <|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n Hello <|im_end|> \n
      in_prompt    .    .  1     .        .       .           .      .    .       .     .
      is_target    .    .  .     .        .       .           .      .    1       1     .

    All assistant turns with `learnt` are targets. A conversation over `max_length` is cut, see `truncate`.

    Raises:
      TemplateError: the rendered text does not contain a turn as it is.
    """
    return tokenize_all([example], tokenizer, max_length)[0]


def tokenize_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = NO_LIMIT
) -> list[TokenizedExample]:
    """`tokenize` for many examples; the tokenizer spreads them over the host's cores.

    Of a text that is far longer than `max_length`, only the parts that can remain are tokenized, see
    `long_texts`.

    Raises:
      TemplateError: see `tokenize`.
    """
    tokenized: list[TokenizedExample] = []
    for start in range(0, len(examples), _TEXTS_AT_A_TIME):
        some = examples[start : start + _TEXTS_AT_A_TIME]
        texts = [render(tokenizer, example.messages, tools=example.tools) for example in some]
        parts = [_parts(*pair, tokenizer, max_length) for pair in zip(some, texts, strict=True)]
        whole = [text for text, part in zip(texts, parts, strict=True) if part is None]
        encoded = _encode_all(whole, tokenizer)
        for example, text, part in zip(some, texts, parts, strict=True):
            tokens, offsets = next(encoded) if part is None else part
            marked = _mark(example, text, tokens, offsets, tokenizer)
            tokenized.append(truncate(marked, max_length))
    return tokenized


def _encode_all(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    if not texts:
        return
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    yield from map(Encoded, encoded["input_ids"], encoded["offset_mapping"])


def _parts(
    example: Example, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded | None:
    """The tokens of a long text that its cut can keep; None if the text is not long, or has no answer."""
    if not is_long(text, max_length):
        return None
    pairs = zip(example.messages, locate(tokenizer, text, example), strict=True)
    answers = [span.start - span.opening for m, span in pairs if m.role == "assistant" and m.learnt]
    return encode_around(tokenizer, text, answers[-1], max_length) if answers else None


def _mark(
    example: Example,
    text: str,
    tokens: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizedExample:
    """The tokens of a rendered conversation with its masks, not cut yet."""
    spans = locate(tokenizer, text, example)
    tokens_n = np.asarray(tokens, np.int32)
    starts_n, stops_n = np.asarray(offsets, np.int64).reshape(-1, 2).T
    is_control_n = np.isin(tokens_n, _control_ids(tokenizer))
    is_target_n = np.zeros(len(tokens_n), bool)
    in_prompt_n = np.zeros(len(tokens_n), bool)
    for message, span in zip(example.messages, spans, strict=True):
        if message.role == "user":
            in_prompt_n |= (stops_n > span.start) & (starts_n < span.stop)
        elif message.role == "assistant" and message.learnt:
            # Some tokenizers exclude spaces from offsets, so the token of a space is empty: [stop, stop).
            first = int(np.searchsorted(stops_n, span.start - span.opening, "right"))
            behind = int(np.searchsorted(stops_n, span.stop, "right"))
            after = max(first, behind, int(np.searchsorted(starts_n, span.stop)))
            end = int(np.searchsorted(starts_n, span.stop + span.closing))
            controls = np.flatnonzero(is_control_n[behind:end])
            is_target_n[first : behind + int(controls[0]) + 1 if len(controls) else after] = True
    return TokenizedExample(example.id, tokens_n, is_target_n, in_prompt_n & ~is_target_n, False)


def tokenize_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    continue_with: str = "",
    max_length: int = NO_LIMIT,
) -> np.ndarray:
    """int32 tokens of a conversation that ends with the generation prompt, followed by `continue_with`.

    Of a long text that has over `max_length` tokens only the first ones, but over `max_length` of them.
    """
    text = render(tokenizer, messages, add_generation_prompt=True) + continue_with
    return np.asarray(first_tokens(tokenizer, text, max_length, add_special_tokens=False), np.int32)


def response_header(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """int32 tokens that the template writes before any answer, whatever the question.

    These are its generation prompt, such as `<|im_start|>assistant` and a line break, after the start token
    if the template begins every conversation with one.

    Raises:
      TemplateError: the template does not append the generation prompt to a conversation.
    """
    probe = [Message("user", "Hi")]
    asked, text = render(tokenizer, probe), render(tokenizer, probe, add_generation_prompt=True)
    if not text.startswith(asked):
        raise TemplateError("the chat template does not append its generation prompt to a conversation")
    header, bos = text[len(asked) :], str(tokenizer.bos_token or "")
    if bos and text.startswith(bos) and not header.startswith(bos):
        header = bos + header
    return np.asarray(tokenizer(header, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def truncate(example: TokenizedExample, max_length: int) -> TokenizedExample:
    """Cuts a conversation to `max_length` tokens; the last answer and the end of the prompt are kept.

    Tokens are dropped in this order: first those of the template after the last answer. Then the end of the
    answer, which keeps half of `max_length`, or more if the text before it is shorter. Then the middle of the
    text before the answer. Of that text, the head (tokens before the first prompt token, at most half of what
    is left) and the end, where the question usually is, are kept.
    """
    if len(example) <= max_length:
        return example
    targets = np.flatnonzero(example.is_target_n)
    stop = int(targets[-1]) + 1
    start = (
        int(np.flatnonzero(~example.is_target_n[:stop])[-1]) + 1
        if not example.is_target_n[:stop].all()
        else 0
    )
    kept_answer = min(stop - start, max(max_length - start, max_length // 2))
    left = max_length - kept_answer  # tokens for the text before the answer
    dropped = max(0, start - left)
    prompt = np.flatnonzero(example.in_prompt_n)
    head = min(int(prompt[0]) if len(prompt) else 0, left // 2)
    keep = np.r_[0:head, head + dropped : start + kept_answer]
    return TokenizedExample(
        example.id,
        example.tokens_n[keep],
        example.is_target_n[keep],
        example.in_prompt_n[keep],
        truncated=dropped > 0 or start + kept_answer < stop,
    )
