"""Conversation -> tokens, with the positions that are learnt and those that are the user's prompt."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from middo_jax.data.example import Example, Message, Role
from middo_jax.data.templates import (
    TemplateError,
    control_tokens,
    declared_ends,
    pin_date,
    set_template,
    template_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough for all cores of a host, few enough that their offsets, which are Python tuples, stay small.
_TEXTS_AT_A_TIME = 1024
NO_LIMIT = 1 << 30  # tokens of a conversation that is not cut


@dataclasses.dataclass(frozen=True)
class TokenizedExample:
    """One rendered conversation.

    Attributes:
      id: the example's.
      tokens_n: int32 token ids.
      is_target_n: bool; the token is learnt: an assistant's word or the end of its turn.
      in_prompt_n: bool; the token is of a user's turn, without the template's own words.
      truncated: whether tokens had to be left out.
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
    """A fast tokenizer that surely has a chat template.

    Args:
      directory: a Hugging Face directory; nothing in it is executed.
      template: overrides the tokenizer's own, see `set_template`.
      date: the day that the template prints, if it prints one; None is the day of each rendering.

    Raises:
      TemplateError: see `set_template`; or the tokenizer is not a fast one (no character offsets).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{directory}: a fast tokenizer (tokenizer.json) is needed to find where answers start"
        )
    set_template(tokenizer, template)
    if date is not None:
        pin_date(tokenizer, date)
    return tokenizer


def eos_token_ids(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, the generation config's and the template's own."""
    ids = (tokenizer.eos_token_id, end_of_turn_token(tokenizer), *declared_ends(directory))
    return frozenset(i for i in ids if isinstance(i, int))


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token that the template puts right after an answer, if it puts one."""
    probe = Example((Message("user", "Hi"), Message("assistant", "Hello")))
    tokens = tokenize(probe, tokenizer, NO_LIMIT)
    last = int(tokens.tokens_n[tokens.is_target_n][-1])
    return last if last in control_tokens(tokenizer).values() else None


def learnt_controls(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The control tokens that are learnt."""
    return frozenset(np.intersect1d(example.tokens_n[example.is_target_n], _control_ids(tokenizer)).tolist())


@functools.lru_cache(maxsize=16)
def _control_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    return np.array(sorted(control_tokens(tokenizer).values()), np.int32)


@functools.lru_cache(maxsize=16)
def steering_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The control tokens conversations are rendered with, or that end an answer: in a sample's own text they
    would end its turn.

    Others, such as a code model's `<filename>`, are rare but honest text.
    """
    rendered = f"{tokenizer.chat_template}{tokenizer.eos_token}{tokenizer.bos_token}"
    ends = declared_ends(tokenizer.name_or_path)
    return frozenset(text for text, i in control_tokens(tokenizer).items() if text in rendered or i in ends)


def refusal(example: Example, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why the model cannot read an example, or None if it can. The text is rendered, not tokenized."""
    for token in sorted(steering_tokens(tokenizer)):
        if any(token in message.content for message in example.messages):
            return f"its text holds the model's control token {token}"
    try:
        _locate(tokenizer, _render(tokenizer, example.messages), example)
    except TemplateError as e:
        return str(e)
    return None


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenizedExample:
    r"""Renders a conversation with the chat template and marks targets and prompt.

    With a ChatML template, `user: Hi`, `assistant: Hello` become

      <|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n Hello <|im_end|> \n
      in_prompt    .    .  1     .        .       .           .      .    .       .     .
      is_target    .    .  .     .        .       .           .      .    1       1     .

    Every assistant turn that is to be `learnt` is a target. Too long a conversation is cut: see `truncate`.

    Raises:
      TemplateError: a turn cannot be found again in what the template rendered.
    """
    return tokenize_all([example], tokenizer, max_length)[0]


def tokenize_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = NO_LIMIT
) -> list[TokenizedExample]:
    """As `tokenize`, many examples at a time: the tokenizer spreads them over the host's cores.

    Raises:
      TemplateError: see `tokenize`.
    """
    tokenized: list[TokenizedExample] = []
    for start in range(0, len(examples), _TEXTS_AT_A_TIME):
        some = examples[start : start + _TEXTS_AT_A_TIME]
        texts = [_render(tokenizer, example.messages) for example in some]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        columns = (encoded["input_ids"], encoded["offset_mapping"])
        for example, text, tokens, offsets in zip(some, texts, *columns, strict=True):
            marked = _mark(example, text, tokens, offsets, tokenizer)
            tokenized.append(truncate(marked, max_length))
    return tokenized


def _mark(
    example: Example,
    text: str,
    tokens: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizedExample:
    """The tokens of a rendered conversation with targets and prompt, not yet cut."""
    spans = _locate(tokenizer, text, example)
    tokens_n = np.asarray(tokens, np.int32)
    starts_n, stops_n = np.asarray(offsets, np.int64).reshape(-1, 2).T
    is_control_n = np.isin(tokens_n, _control_ids(tokenizer))
    is_target_n = np.zeros(len(tokens_n), bool)
    in_prompt_n = np.zeros(len(tokens_n), bool)
    for message, span in zip(example.messages, spans, strict=True):
        if message.role == "user":
            in_prompt_n |= (stops_n > span.start) & (starts_n < span.stop)
        elif message.role == "assistant" and message.learnt:
            # Tokenizers may leave spaces out of the offsets: a space's token then is empty, [stop, stop).
            first = int(np.searchsorted(stops_n, span.start - span.opening, "right"))
            behind = int(np.searchsorted(stops_n, span.stop, "right"))
            after = max(first, behind, int(np.searchsorted(starts_n, span.stop)))
            end = int(np.searchsorted(starts_n, span.stop + span.closing))
            controls = np.flatnonzero(is_control_n[behind:end])
            is_target_n[first : behind + int(controls[0]) + 1 if len(controls) else after] = True
    return TokenizedExample(example.id, tokens_n, is_target_n, in_prompt_n & ~is_target_n, False)


class _Span(NamedTuple):
    """Where a turn's text is in a rendered conversation, [start, stop), in characters.

    Attributes:
      opening: of an assistant's turn, how many characters before `start` follow the generation prompt. The
        template writes them, but the model has to produce them.
      closing: of an assistant's turn, how many characters behind `stop` may hold the start of the control
        token that ends the turn.
    """

    start: int
    stop: int
    opening: int = 0
    closing: int = 0


def _locate(tokenizer: PreTrainedTokenizerBase, text: str, example: Example) -> list[_Span]:
    """The span of each turn: by the template's constant pieces, or by rendering where they vary."""
    try:
        return _layout(tokenizer, tuple(m.role for m in example.messages)).locate(text, example)
    except TemplateError:
        return _by_rendering(tokenizer, text, example)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a template puts around the turns of a conversation with given roles.

    Attributes:
      pieces: the template's own text before each turn, and after the last.
      openings: see `_Span`, one per turn.
      closings: see `_Span`, one per turn.
    """

    pieces: tuple[str, ...]
    openings: tuple[int, ...]
    closings: tuple[int, ...]

    def locate(self, text: str, example: Example) -> list[_Span]:
        """Each turn's span in the rendered text, of which nothing is left over."""
        spans: list[_Span] = []
        start = len(self.pieces[0])
        for turn, message in enumerate(example.messages):
            following = self.pieces[turn + 1]
            for content in _as_rendered(message.content):
                stop = start + len(content)
                if text.startswith(content, start) and text.startswith(following, stop):
                    break
            else:
                raise _changed(example, turn)
            spans.append(_Span(start, stop, self.openings[turn], self.closings[turn]))
            start = stop + len(following)
        if not text.startswith(self.pieces[0]) or start != len(text):
            raise _changed(example, 0)
        return spans


def _changed(example: Example, turn: int) -> TemplateError:
    role = example.messages[turn].role
    return TemplateError(
        f"sample {example.id}: the chat template does not show the text of turn {turn + 1} (the {role}'s) as "
        "it is; set model.template"
    )


def _as_rendered(content: str) -> list[str]:
    """What templates are known to leave of a text: all of it, or what is within spaces or empty lines."""
    ways = (content, content.strip(), content.rstrip(), content.lstrip())
    return list(dict.fromkeys((*ways, content.strip("\n"), content.rstrip("\n"), content.lstrip("\n"))))


@functools.lru_cache(maxsize=1024)
def _layout(tokenizer: PreTrainedTokenizerBase, roles: tuple[Role, ...]) -> _Layout:
    # A mark of private-use characters stands for each turn, so that no text can be taken for another's.
    marks = [f"\ue000{turn}\ue001" for turn in range(len(roles))]
    messages = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
    text = _render(tokenizer, messages)
    pieces, openings, closings, rest = [], [], [], text
    for turn, (role, mark) in enumerate(zip(roles, marks, strict=True)):
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise TemplateError(
                f"the chat template does not show turn {turn + 1}, the {role}'s, once and in its place; "
                "set model.template"
            )
        pieces.append(piece)
        is_answer = role == "assistant"
        openings.append(
            text.index(mark) - _generation_prompt(tokenizer, text, messages[:turn]) if is_answer else 0
        )
        closings.append(_closing(tokenizer, rest, messages[: turn + 1], mark) if is_answer else 0)
    return _Layout((*pieces, rest), tuple(openings), tuple(closings))


def _generation_prompt(tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message]) -> int:
    """The number of characters that ask for the answer to some messages, with which `text` begins."""
    prompt = _render(tokenizer, messages, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise TemplateError("the chat template's generation prompt is not what stands before an answer")
    return len(prompt)


def _closing(
    tokenizer: PreTrainedTokenizerBase, following: str, messages: Sequence[Message], mark: str
) -> int:
    """See `_Span.closing`; `following` is all that follows the answer, the last of the marked messages.

    What the template also writes where the conversation ends with this answer is of this turn. The next
    turn's opening is not, unless it is the first thing behind the answer but white space.
    """
    own = _render(tokenizer, messages).rpartition(mark)[2]
    shared = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, following, strict=False))
    )
    return max(shared, len(following) - len(following.lstrip()) + 1)


_OPENING = 64  # characters of a generation prompt that may begin the answer
# Reasoning that a template leaves out of earlier answers ends with one of these.
_END_OF_REASONING = re.compile(r"(</[\w:]+>|\[/\w+\])$")


def _by_rendering(tokenizer: PreTrainedTokenizerBase, text: str, example: Example) -> list[_Span]:
    """As `_Layout.locate` where the template's own words depend on the text, as those around reasoning do.

    Each turn is rendered once more with a mark behind it, and a user's or system turn with one before it. An
    answer begins where the generation prompt ends, also if that writes its first words. White space may
    differ within a turn, and an answer before the last may lack its reasoning; all else of the text must be
    there.
    """
    everything = "".join(m.content for m in example.messages)
    mark = next(m for n in itertools.count() if (m := f"\ue000{n}\ue001") not in everything)
    spans = []
    for turn, message in enumerate(example.messages):
        ahead, later = example.messages[:turn], example.messages[turn + 1 :]
        ended = Message(message.role, message.content + mark)
        _, found, tail = _render(tokenizer, [*ahead, ended, *later]).partition(mark)
        stop = len(text) - len(tail)
        if not found or mark in tail or not text.endswith(tail):
            raise _changed(example, turn)
        wanted = "".join(message.content.split())
        if message.role == "assistant":
            start = _generation_prompt(tokenizer, text, ahead)
            shown = "".join(text[start:stop].split())
            # The generation prompt may write the answer's first words itself, such as `<think>`.
            with_opening = "".join(text[max(0, start - _OPENING) : stop].split())
            kept = with_opening.endswith(wanted) or (
                bool(later)
                and wanted.endswith(shown)
                and _END_OF_REASONING.search(wanted.removesuffix(shown)) is not None
            )
            closing = _closing(tokenizer, text[stop:], [*ahead, ended], mark)
        else:
            begun = Message(message.role, mark + message.content)
            head, found, _ = _render(tokenizer, [*ahead, begun, *later]).partition(mark)
            start, closing = len(head), 0
            kept = bool(found) and text.startswith(head) and "".join(text[start:stop].split()) == wanted
        if start > stop or not kept:
            raise _changed(example, turn)
        spans.append(_Span(start, stop, closing=closing))
    return spans


def tokenize_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, continue_with: str = ""
) -> np.ndarray:
    """int32 tokens of a conversation that asks for an answer, the answer's first words given or not."""
    text = _render(tokenizer, messages, add_generation_prompt=True)
    encoded = tokenizer(text + continue_with, add_special_tokens=False, verbose=False)
    return np.asarray(encoded["input_ids"], np.int32)


def response_header(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """int32 tokens that the template puts before any answer, whatever was asked.

    That is its generation prompt, such as `<|im_start|>assistant` and a line break, behind the start token if
    the template begins every conversation with one.
    """
    probe = [Message("user", "Hi")]
    asked, text = _render(tokenizer, probe), _render(tokenizer, probe, add_generation_prompt=True)
    if not text.startswith(asked):
        raise TemplateError("the chat template's generation prompt is not what it adds to a conversation")
    header, bos = text[len(asked) :], str(tokenizer.bos_token or "")
    if bos and text.startswith(bos) and not header.startswith(bos):
        header = bos + header
    return np.asarray(tokenizer(header, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_arguments(tokenizer),
        )
    except jinja2.TemplateError as e:
        raise TemplateError(f"the chat template refuses a conversation of {len(messages)} turns: {e}") from e
    assert isinstance(text, str)
    return text


def truncate(example: TokenizedExample, max_length: int) -> TokenizedExample:
    """Cuts a conversation to `max_length` tokens, keeping the end of the prompt.

    What the template puts after the last answer goes first. The answer may take half of the room, and more
    where the rest leaves it; what is over is cut from its end. Then the oldest words go: the head (what
    stands before the first prompt token, at most half of what is left) and the end of what precedes the
    answer, where the question usually is, stay.
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
    room = max_length - kept_answer  # for what precedes the answer
    dropped = max(0, start - room)
    prompt = np.flatnonzero(example.in_prompt_n)
    head = min(int(prompt[0]) if len(prompt) else 0, room // 2)
    keep = np.r_[0:head, head + dropped : start + kept_answer]
    return TokenizedExample(
        example.id,
        example.tokens_n[keep],
        example.is_target_n[keep],
        example.in_prompt_n[keep],
        truncated=dropped > 0 or start + kept_answer < stop,
    )
