"""Where the turns of a conversation are in the text that its chat template renders.

Most templates put constant text around each turn, so one rendering with marks in place of the turns shows
that text (`_Layout`). If a template's own words depend on the turns, as those around reasoning may, each
conversation is rendered again for each of its turns (`_by_rendering`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jinja2

from middo_jax.data.example import Example, Message, Role
from middo_jax.data.templates import TemplateError, control_tokens, template_arguments
from middo_jax.data.tools import names_of, parts_of, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a template raises by itself, and what its expressions raise.
_FAULTS = (
    *(jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError),
    *(MemoryError, RecursionError),
)


class Span(NamedTuple):
    """Where a turn's text is in a rendered conversation, [start, stop), in characters.

    Attributes:
      start: of the text.
      stop: of the text.
      opening: for an answer, the number of characters between the generation prompt and `start`. The template
        writes them, but the model must produce them. Not of an assistant's turn before the first question,
        which is never learnt: most templates have no generation prompt there.
      closing: for an answer, the number of characters after `stop` within which the control token
        that ends the turn may start.
    """

    start: int
    stop: int
    opening: int = 0
    closing: int = 0


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: str = "",
) -> str:
    """The text of a conversation by the tokenizer's chat template; `tools`: see `Example.tools`.

    Raises:
      TemplateError: the template refuses these turns.
    """
    try:
        text = tokenizer.apply_chat_template(
            # The stubs expect texts alone in a message, and a wider list of tools.
            cast(Any, [{"role": m.role, "content": m.content, **parts_of(m.tool)} for m in messages]),
            tools=cast(Any, rendered(tools) or None),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_arguments(tokenizer),
        )
    except _FAULTS as e:
        said = (str(e) or type(e).__name__)[:300]
        raise TemplateError(
            f"the chat template refuses a conversation of {len(messages)} turns: {said}"
        ) from e
    assert isinstance(text, str)
    return text


def locate(tokenizer: PreTrainedTokenizerBase, text: str, example: Example) -> list[Span]:
    """The span of each turn: by the template's constant pieces, or by rendering if they vary.

    Raises:
      TemplateError: the text does not contain a turn as it is.
    """
    if example.has_tools:  # calls are rendered from other fields than the content
        return _by_rendering(tokenizer, text, example)
    try:
        return _layout(tokenizer, tuple(m.role for m in example.messages)).locate(text, example)
    except TemplateError:
        return _by_rendering(tokenizer, text, example)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a template puts around the turns of a conversation with given roles.

    Attributes:
      pieces: the template's own text before each turn, and after the last one.
      openings: one per turn, see `Span`.
      closings: one per turn, see `Span`.
    """

    pieces: tuple[str, ...]
    openings: tuple[int, ...]
    closings: tuple[int, ...]

    def locate(self, text: str, example: Example) -> list[Span]:
        """Each turn's span in the rendered text. Pieces and turns together must be all of the text."""
        spans: list[Span] = []
        start = len(self.pieces[0])
        for turn, message in enumerate(example.messages):
            following = self.pieces[turn + 1]
            for content in _as_rendered(message.content):
                stop = start + len(content)
                if text.startswith(content, start) and text.startswith(following, stop):
                    break
            else:
                raise _changed(example, turn)
            spans.append(Span(start, stop, self.openings[turn], self.closings[turn]))
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
    """The forms in which templates may show a text: as it is, or stripped of white space or line breaks."""
    ways = (content, content.strip(), content.rstrip(), content.lstrip())
    return list(dict.fromkeys((*ways, content.strip("\n"), content.rstrip("\n"), content.lstrip("\n"))))


@functools.lru_cache(maxsize=1024)
def _layout(tokenizer: PreTrainedTokenizerBase, roles: tuple[Role, ...]) -> _Layout:
    # Each turn is a mark of private-use characters, so that no turn can be confused with other text.
    marks = [f"\ue000{turn}\ue001" for turn in range(len(roles))]
    messages = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
    text = render(tokenizer, messages)
    pieces, openings, closings, rest = [], [], [], text
    for turn, (role, mark) in enumerate(zip(roles, marks, strict=True)):
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise TemplateError(
                f"the chat template does not show turn {turn + 1}, the {role}'s, once and in its place; "
                "set model.template"
            )
        pieces.append(piece)
        is_answer = role == "assistant" and "user" in roles[:turn]
        openings.append(
            text.index(mark) - _generation_prompt(tokenizer, text, messages[:turn]) if is_answer else 0
        )
        closings.append(_closing(tokenizer, rest, messages[: turn + 1], mark) if is_answer else 0)
    return _Layout((*pieces, rest), tuple(openings), tuple(closings))


def _generation_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message], tools: str = ""
) -> int:
    """The length of the prompt that asks for an answer to some messages;

    `text` must begin with that prompt.
    """
    prompt = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
    if not text.startswith(prompt):
        raise TemplateError("the chat template's generation prompt differs from the text before an answer")
    return len(prompt)


def _closing(
    tokenizer: PreTrainedTokenizerBase,
    following: str,
    messages: Sequence[Message],
    mark: str,
    tools: str = "",
) -> int:
    """`Span.closing` of the last of some marked messages; `following` is the rendered text after that answer.

    Text that the template also writes when the conversation ends with this answer belongs to this turn. The
    opening of the next turn does not, unless only white space is between it and the answer.
    """
    own = render(tokenizer, messages, tools=tools).rpartition(mark)[2]
    shared = _n_shared(own, following)
    return max(shared, len(following) - len(following.lstrip()) + 1)


def _n_shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


_OPENING = 64  # characters of a generation prompt that may begin the answer
# The end of reasoning, which a template may leave out of earlier answers.
_END_OF_REASONING = re.compile(r"(</[\w:]+>|\[/\w+\])$")


def _by_rendering(tokenizer: PreTrainedTokenizerBase, text: str, example: Example) -> list[Span]:
    """The spans for templates whose own words depend on the turns' text, as those around reasoning may.

    Each turn is rendered again with a mark after it; a user's or system turn also with a mark before it. An
    answer begins where the generation prompt ends, even if that prompt contains its first words. White space
    within a turn may differ, and an answer before the last one may lack its reasoning. All other text must be
    there.
    """
    everything, tools = "".join(m.content for m in example.messages), example.tools
    mark = next(m for n in itertools.count() if (m := f"\ue000{n}\ue001") not in everything)
    spans = []
    for turn, message in enumerate(example.messages):
        ahead, later = example.messages[:turn], example.messages[turn + 1 :]
        if message.role == "assistant" and message.tool:
            spans.append(_call_span(tokenizer, text, example, turn))
            continue
        ended = dataclasses.replace(message, content=message.content + mark)
        _, found, tail = render(tokenizer, [*ahead, ended, *later], tools=tools).partition(mark)
        if message.role == "tool":  # it may be shown as JSON, and no token of it is learnt or the user's
            if not found:
                raise _changed(example, turn)
            spans.append(Span(len(text) - len(tail), len(text) - len(tail)))
            continue
        stop = len(text) - len(tail)
        if not found or mark in tail or not text.endswith(tail):
            raise _changed(example, turn)
        wanted = "".join(message.content.split())
        if message.role == "assistant" and _is_asked(ahead):
            start = _generation_prompt(tokenizer, text, ahead, tools)
            shown = "".join(text[start:stop].split())
            # The generation prompt may write the answer's first words itself, such as `<think>`.
            with_opening = "".join(text[max(0, start - _OPENING) : stop].split())
            kept = with_opening.endswith(wanted) or (
                bool(later)
                and wanted.endswith(shown)
                and _END_OF_REASONING.search(wanted.removesuffix(shown)) is not None
            )
            closing = _closing(tokenizer, text[stop:], [*ahead, ended], mark, tools)
        else:
            begun = Message(message.role, mark + message.content)
            head, found, _ = render(tokenizer, [*ahead, begun, *later], tools=tools).partition(mark)
            start, closing = len(head), 0
            kept = bool(found) and text.startswith(head) and "".join(text[start:stop].split()) == wanted
        if start > stop or not kept:
            raise _changed(example, turn)
        spans.append(Span(start, stop, closing=closing))
    return spans


def _is_asked(ahead: Sequence[Message]) -> bool:
    """Whether a turn follows a question, so that it is an answer."""
    return any(message.role == "user" for message in ahead)


def _call_span(tokenizer: PreTrainedTokenizerBase, text: str, example: Example, turn: int) -> Span:
    """The span of an assistant's turn that calls tools: from the generation prompt to its last control token.

    Raises:
      TemplateError: the template does not show the turn's calls.
    """
    message, ahead, tools = example.messages[turn], example.messages[:turn], example.tools
    start = _generation_prompt(tokenizer, text, ahead, tools) if _is_asked(ahead) else 0
    own = render(tokenizer, [*ahead, message], tools=tools)
    shown = own[start : max(start, _n_shared(own, text))]
    ends = [at for token in control_tokens(tokenizer) if (at := shown.rfind(token)) >= 0]
    stop = max(ends) if ends else len(shown.rstrip())
    calls = parts_of(message.tool).get("tool_calls", [])
    wanted = [*(call["function"]["name"] for call in calls), "".join(message.content.split())]
    if any(piece not in "".join(shown[:stop].split()) for piece in wanted):
        raise TemplateError(
            f"the chat template does not show the tool calls of turn {turn + 1}; use a model whose template "
            "does, or set model.template"
        )
    return Span(start, start + stop, closing=len(shown) - stop)


def require_tools(text: str, example: Example) -> None:
    """Requires that a rendered text shows the tools of its example.

    Raises:
      TemplateError: it does not.
    """
    missing = [name for name in names_of(example.tools) if name not in text]
    if missing:
        raise TemplateError(
            f"the chat template does not show the tool {missing[0]!r} of column 'tools'; use a model whose "
            "template does, set model.template, or remove the column"
        )
