"""Tool calls and tool definitions of a row, in OpenAI's form. Pure functions.

A `Message` keeps what a turn has beside its text as one JSON text (`Message.tool`), since messages are
compared and hashed: {"tool_calls": [...]} of an assistant's turn, {"tool_call_id": ..., "name": ...} of a
tool's. Arguments are objects there; rows may have them as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

TOOL_COLUMN = "tools"
# Roles of turns in which a tool speaks, and of turns in which the assistant calls one. In lower case.
RESULT_ROLES = frozenset({"tool", "function", "tool_response", "observation", "ipython"})
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})
_RESULT_FIELDS = ("tool_call_id", "name")


class ToolError(ValueError):
    """A tool call or a result cannot be read; the message says why."""


def calls_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls in the fields `tool_calls` and `function_call` of an assistant's turn.

    Raises:
      ToolError: a call has no name, or its arguments are not an object.
    """
    calls = fields.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ToolError("'tool_calls' must be a list of calls")
    old = fields.get("function_call")
    return [_call(call) for call in (*calls, *([old] if old else []))]


def calls_in(text: str) -> list[dict[str, Any]]:
    """The calls in a turn whose text is JSON: one call, or a list of calls.

    {"name": "add", "arguments": {"a": 1}}  ->  one call of add

    Raises:
      ToolError: see `calls_of`, or the text is not JSON.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ToolError(f"a tool call must be JSON, {{'name': ..., 'arguments': ...}}: {e}") from e
    return [_call(call) for call in (value if isinstance(value, list) else [value])]


def _call(value: Any) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise ToolError("a tool call needs a 'name'")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as e:
            raise ToolError(f"the arguments of the call of {name!r} are no JSON: {e}") from e
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ToolError(f"the arguments of the call of {name!r} must be an object")
    named = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}}


def of_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """`Message.tool` of an assistant's turn with these calls; "" without calls."""
    return dumped({"tool_calls": list(calls)}) if calls else ""


def of_result(fields: Mapping[str, Any]) -> str:
    """`Message.tool` of a tool's turn with these fields."""
    kept = {name: fields[name] for name in _RESULT_FIELDS if isinstance(fields.get(name), str)}
    return dumped(kept) if kept else ""


class ToolFields(TypedDict, total=False):
    """The fields of a turn of dataset.jsonl that concern tools, see `rundir.rows.TurnRow`."""

    tool_calls: list[Any]
    tool_call_id: str
    name: str


def parts_of(tool: str) -> ToolFields:
    """The fields in a `Message.tool`; {} if there are none."""
    return json.loads(tool) if tool else {}


def calls_text(tool: str) -> str:
    """The calls of a turn as a text to measure and to show: one line of JSON per call."""
    calls = parts_of(tool).get("tool_calls", ())
    return "\n".join(dumped(call["function"]) for call in calls)


def definitions_of(value: Any) -> str | None:
    """The tools that a column defines, as the JSON text of a list; "" if it defines none.

    Args:
      value: of the column `tools`: a list of definitions, or its JSON text.

    Returns:
      None if the value is something else, so that the column is one of the user's own.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not value:
        return ""
    tools = value if isinstance(value, list) else [value]
    return dumped(tools) if all(_name(tool) is not None for tool in tools) else None


def rendered(tools: str) -> list[dict[str, Any]]:
    """Definitions as chat templates expect them: {"type": "function", "function": {"name": ...}}."""
    found = json.loads(tools) if tools else []
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]


def names_of(tools: str) -> list[str]:
    """The names of the defined tools."""
    return [name for tool in rendered(tools) if (name := _name(tool)) is not None]


def _name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def dumped(value: Any) -> str:
    """The one JSON text of a value, so that equal values have equal texts."""
    return json.dumps(value, ensure_ascii=False)
