"""What becomes of the turns of a row: those that a chat template accepts, repaired or refused.

    [system] [assistant] (user (assistant [tool+ assistant]*))+

Without `strict`, faults with one obvious repair are repaired, and each repair is counted. All others, and
with `strict` every fault, are a `RowError`. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from middo_jax.data.example import Message
from middo_jax.data.tools import dumped, of_calls, parts_of
from middo_jax.data.turns import RowError, Turn

JOINED = "neighbouring turns of one role are joined"
EMPTY = "an empty turn is left out, with the answer or question that belongs to it"
EMPTY_BESIDE = "an empty turn beside one of its role is left out"
TRAILING = "turns behind the last answer are left out"
BEHIND = "turns behind the last answer that is learnt are not used"
LEADING = "an answer before the first question is kept and not learnt"
JOINT = "\n\n"  # between joined turns


def strict_hint(repairs: Iterable[str]) -> str:
    """The end of a heading of repairs: that `data.strict` refuses such rows, if it refuses any of them.

    Turns behind the last learnt answer are no fault: the user's weights say so.
    """
    return " (data.strict=true refuses such rows)" if any(repair != BEHIND for repair in repairs) else ""


class _Numbered(NamedTuple):
    """A turn and its number in the row, counted from 1."""

    n: int
    turn: Turn

    @property
    def role(self) -> str:
        return self.turn.role


def _is_blank(turn: Turn) -> bool:
    return not turn.content.strip() and not turn.tool


def as_messages(turns: Sequence[Turn], strict: bool) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """(the messages of a conversation, what was repaired). A blank system turn is left out.

    Raises:
      RowError: the turns are no conversation, and no repair makes them one.
    """
    given = [_Numbered(n, t) for n, t in enumerate(turns, 1) if t.role != "system" or t.content.strip()]
    repairs: list[str] = []
    kept = given if strict else _repaired(given, repairs)
    # Of a row of which nothing is left, the fault of the row itself is named.
    _require_conversation(kept or given, strict)
    messages = []
    asked = False
    for _, turn in kept:
        asked = asked or turn.role == "user"
        is_learnt = turn.role != "assistant" or (turn.learnt and asked)
        fields = dumped(turn.fields) if turn.fields else ""
        messages.append(Message(turn.role, turn.content, is_learnt, turn.tool, fields))
    if not any(m.role == "assistant" and m.learnt for m in messages):
        raise RowError("nothing is learnt: every answer has weight 0, or is joined to one that has")
    return tuple(messages), tuple(dict.fromkeys(repairs))


def _repaired(given: list[_Numbered], repairs: list[str]) -> list[_Numbered]:
    turns = _joined(given, repairs)
    turns = _without_empty(turns, repairs)
    turns = _joined(turns, repairs)
    while turns and turns[-1].role in ("user", "tool"):
        turns.pop()
        repairs.append(TRAILING)
    spoken = [turn for turn in turns if turn.role != "system"]
    # An answer of weight 0 is not learnt as the row says it.
    if spoken and spoken[0].role == "assistant" and spoken[0].turn.learnt:
        repairs.append(LEADING)
    return turns


def _joined(given: Sequence[_Numbered], repairs: list[str]) -> list[_Numbered]:
    """Neighbours of one role as one turn; results of tools stay apart, since each belongs to a call."""
    turns: list[_Numbered] = []
    for n, turn in given:
        before = turns[-1].turn if turns else None
        if before is None or before.role != turn.role or turn.role == "tool":
            turns.append(_Numbered(n, turn))
            continue
        if before.tool and turn.content.strip():
            raise RowError(f"turn {n}: an answer follows a tool call without the tool's result")
        texts = [text for text in (before.content, turn.content) if text.strip()]
        calls = [*parts_of(before.tool).get("tool_calls", ()), *parts_of(turn.tool).get("tool_calls", ())]
        together = before._replace(
            content=JOINT.join(texts),
            fields={**turn.fields, **before.fields},
            learnt=all(each.learnt for each in (before, turn) if not _is_blank(each)),
            tool=of_calls(calls),
        )
        turns[-1] = _Numbered(turns[-1].n, together)
        # A text and the calls behind it are one turn in OpenAI's form, so that nothing is repaired.
        if _is_blank(before) or _is_blank(turn):
            repairs.append(EMPTY_BESIDE)
        elif len(texts) > 1:
            repairs.append(JOINED)
    return turns


def _without_empty(given: Sequence[_Numbered], repairs: list[str]) -> list[_Numbered]:
    """Without the exchanges, a user's turn and all up to the next one, that have a blank turn."""
    exchanges: list[list[_Numbered]] = [[]]
    for turn in given:
        if turn.role == "user":
            exchanges.append([])
        exchanges[-1].append(turn)
    head, *rest = exchanges
    kept = [each for each in head if each.role == "tool" or not _is_blank(each.turn)]
    if len(kept) < len(head):
        repairs.append(EMPTY)
    for exchange in rest:
        if any(_is_blank(each.turn) for each in exchange if each.role != "tool"):
            repairs.append(EMPTY)
        else:
            kept += exchange
    return kept


def _require_conversation(turns: Sequence[_Numbered], strict: bool) -> None:
    if not turns or turns[-1].role != "assistant":
        last = f"the {turns[-1].role}" if turns else "nothing"
        raise RowError(f"no response: the conversation must end with the assistant, but ends with {last}")
    spoken = list(turns[1:] if turns[0].role == "system" else turns)
    if not any(turn.role == "user" for turn in spoken):
        raise RowError("no prompt: the conversation has no user turn")
    leading = not strict and spoken[0].role == "assistant"
    before, has_calls = ("start", False) if not leading else ("assistant", bool(spoken[0].turn.tool))
    for position, (n, turn) in enumerate(spoken[leading:], int(leading)):
        # Before the first question nothing is learnt, so that an unfinished exchange does no harm.
        if not (turn.role == "user" and leading and before == "tool"):
            _require_turn(n, turn, before, has_calls)
        leading = leading and turn.role != "user"
        if not turn.content.strip() and not turn.tool and turn.role != "tool":
            left = len(spoken) - position
            raise RowError(
                {1: "empty response", 2: "empty prompt"}.get(left, f"turn {n} ({turn.role}) is empty")
            )
        before, has_calls = turn.role, bool(turn.tool)


def _require_turn(n: int, turn: Turn, before: str, has_calls: bool) -> None:
    """Requires that a turn may follow one of the role `before`; `has_calls`: that turn calls tools."""
    if turn.role == "system":
        raise RowError(f"turn {n} is a system turn; only the first may be one")
    if turn.role == "tool":
        if before != "tool" and not (before == "assistant" and has_calls):
            raise RowError(f"turn {n} is a tool's result, and no turn right before it calls a tool")
        return
    if turn.role == "user" and before == "tool":
        raise RowError(
            f"turn {n} is the user's, right behind a tool's result; the assistant's answer is missing"
        )
    expected = {"user": ("start", "assistant"), "assistant": ("user", "tool")}[turn.role]
    if before not in expected:
        raise RowError(f"turn {n} is the {turn.role}'s; user and assistant must alternate, the user first")
