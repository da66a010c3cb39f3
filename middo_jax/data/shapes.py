"""The shapes of the four formats: a row's turns, and the row of a conversation. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from middo_jax.data.example import Example, Message
from middo_jax.data.tools import parts_of
from middo_jax.data.turns import Role, Row, RowError, Turn, content_of, kind_of, listed, text_of, turn_list


class ShapeError(ValueError):
    """A conversation does not fit into a format; the message says what it has no place for."""


def alpaca_turns(row: Row) -> list[Turn]:
    """The turns of a row of alpaca, those of `history` first."""
    turns = [Turn("system", "")]
    history = listed(row.get("history")) or []  # an empty cell of a table is ""
    if not isinstance(history, list):
        raise RowError(f"column 'history' must be a list of [user, assistant] pairs, not {kind_of(history)}")
    for n, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"column 'history': pair {n} is not a list of two texts, [user, assistant]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    prompt = _joined_prompt(prompt_parts(row) or {"instruction": text_of(row, "instruction")})
    return [*turns, Turn("user", prompt), Turn("assistant", text_of(row, "output"))]


def prompt_parts(row: Row) -> dict[str, str]:
    """The columns of an Alpaca row that its prompt is joined of: those with a text."""
    texts = {name: text_of(row, name, "") for name in ("instruction", "context", "input")}
    return {name: text for name, text in texts.items() if text.strip()}


def prompt_columns(row: Row, form: str) -> dict[str, str]:
    """The columns that the prompt of a row is joined of; {} if it is its format's usual column alone.

    Of prompt_completion, `prompt` is the text of the last question.
    """
    if form == "alpaca":
        parts = prompt_parts(row)
        return {} if parts.keys() == {"instruction"} else parts
    if form == "prompt_completion" and (context := text_of(row, "context", "")).strip():
        asked = [turn.content for turn in _sides(row) if turn.role == "user"]
        return {"prompt": asked[-1], "context": context} if asked else {}
    return {}


def prompt_row(example: Example) -> Row:
    """The columns of the prompt of an unchanged Alpaca row, as they were; {} for all others."""
    parts = example.prompt_columns
    if not parts or "prompt" in parts or _joined_prompt(parts) != example.question:
        return {}
    return {"instruction": "", "input": "", **parts}


def _joined_prompt(parts: Mapping[str, str]) -> str:
    return "\n".join(dict.fromkeys(parts.values()))


def alpaca_row(messages: Sequence[Message]) -> Row:
    """A row of alpaca.

    Raises:
      ShapeError: there are tool turns, or an answer before the first question.
    """
    if any(m.tool or m.role == "tool" for m in messages):
        raise ShapeError("has no place for tool turns")
    if next(m.role for m in messages if m.role != "system") != "user":
        raise ShapeError("has no place for an answer before the first question")
    system = [m.content for m in messages if m.role == "system"]
    texts = [m.content for m in messages if m.role != "system"]
    row: Row = {"instruction": texts[-2], "input": "", "output": texts[-1]}
    if system:
        row["system"] = system[0]
    if texts[:-2]:
        row["history"] = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return row


def sharegpt_row(messages: Sequence[Message]) -> Row:
    """A row of ShareGPT; calls and results of tools as LLaMA-Factory has them."""
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns = []
    for m in messages:
        weight = {} if m.learnt else {"weight": 0}
        result, others = parts_of(m.tool), _fields_of(m)
        calls = result.pop("tool_calls", ())
        if m.content or not calls:
            turns.append({"from": names[m.role], "value": m.content, **result, **weight, **others})
        if calls:
            others = {} if m.content else others
            turns.append({"from": "function_call", "value": calls_value(calls), **weight, **others})
    return {"conversations": turns}


def _fields_of(message: Message) -> Row:
    """The user's other fields of a turn as `fields`, which is a part of no format: see `layout`."""
    return {"fields": json.loads(message.fields)} if message.fields else {}


def calls_value(calls: Sequence[Mapping[str, Any]]) -> str:
    """Tool calls as the text of a turn: one call as a JSON object, several as a list."""
    found = [{**({"id": call["id"]} if "id" in call else {}), **call["function"]} for call in calls]
    return json.dumps(found[0] if len(found) == 1 else found, ensure_ascii=False)


def messages_row(messages: Sequence[Message]) -> Row:
    """A row of messages."""
    return {"messages": [m.to_json() for m in messages]}


def prompt_completion_turns(row: Row) -> list[Turn]:
    """The turns of a row of prompt_completion, with its context in the last question."""
    turns = _sides(row)
    context = text_of(row, "context", "")
    asked = max((n for n, turn in enumerate(turns) if turn.role == "user"), default=None)
    if context.strip() and asked is not None:
        turns[asked] = turns[asked]._replace(content=with_context(turns[asked].content, context))
    return turns


def with_context(prompt: str, context: str) -> str:
    """A prompt that contains its context."""
    return prompt if context.strip() in prompt else f"{prompt}\n{context}"


def _sides(row: Row) -> list[Turn]:
    """The turns of prompt and completion."""
    turns = []
    sides: dict[str, Role] = {"prompt": "user", "completion": "assistant"}
    for column, role in sides.items():
        value = row.get(column)
        if has_turns(listed(value) if isinstance(value, str) else value):
            turns += turn_list(row, column, ("role", "content"))
        elif isinstance(value, list | dict):
            turns.append(Turn(role, content_of(value, f"column {column!r}")))
        else:
            turns.append(Turn(role, text_of(row, column)))
    return turns


def apart(row: Row, example: Example) -> Row:
    """A row of prompt_completion with the context of an unchanged prompt in its own column again."""
    parts = example.prompt_columns
    if "prompt" not in parts or with_context(parts["prompt"], parts["context"]) != example.question:
        return row
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {**row, "prompt": parts["prompt"], "context": parts["context"]}
    asked = max(n for n, turn in enumerate(prompt) if turn["role"] == "user")
    prompt = [*prompt[:asked], {**prompt[asked], "content": parts["prompt"]}, *prompt[asked + 1 :]]
    return {**row, "prompt": prompt, "context": parts["context"]}


def has_turns(value: Any) -> bool:
    """Whether a value is a list of turns, rather than of text parts."""
    return isinstance(value, list) and any(isinstance(turn, dict) and "role" in turn for turn in value)


def prompt_completion_row(messages: Sequence[Message]) -> Row:
    """A row of prompt and completion as texts."""
    user, assistant = messages
    return {"prompt": user.content, "completion": assistant.content}


def conversational_row(messages: Sequence[Message]) -> Row:
    """A row of prompt and completion as lists of turns."""
    turns = [m.to_json() for m in messages]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def turn_fields(rows: Iterable[Row]) -> Collection[str]:
    """The fields that all turns of some rows get in typed columns; none if they have the same ones anyway."""
    fields = dict.fromkeys(key for row in rows for turn in _turns(row) for key in turn)
    return fields.keys() if fields.keys() & {"tool_calls", "tool_call_id", "name"} else ()


def filled(row: Row, fields: Collection[str]) -> Row:
    """A row whose turns all have the same fields, null where a turn has none, as typed columns need it.

    The arguments of tool calls become JSON text, which is OpenAI's own form.

    Args:
      row: of a dataset.
      fields: those of `turn_fields` of the dataset; the row stays as it is if there are none.
    """
    if not fields:
        return row

    def turn_of(turn: Any) -> Any:
        return {key: _as_texts(turn.get(key)) if key == "tool_calls" else turn.get(key) for key in fields}

    def is_turns(value: Any) -> bool:
        return isinstance(value, list) and any(map(_is_turn, value))

    return {name: [turn_of(t) for t in v] if is_turns(v) else v for name, v in row.items()}


def _turns(row: Row) -> list[dict[str, Any]]:
    """All turns in the columns of a row."""
    return [item for value in row.values() if isinstance(value, list) for item in value if _is_turn(item)]


def _is_turn(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    return {"role", "content"} <= item.keys() or {"from", "value"} <= item.keys()


def _as_texts(calls: Any) -> Any:
    if not calls:
        return None
    return [
        {
            "id": call.get("id"),
            "type": call["type"],
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in calls
    ]
