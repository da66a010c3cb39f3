"""Example: one conversation with its id and its ancestry.

All other code handles rows of a dataset as this type.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypedDict, get_args

from middo_jax.data.id_columns import without_ids
from middo_jax.data.tools import calls_text, dumped, of_calls, of_result, parts_of
from middo_jax.rundir.rows import ExampleRow, LineageRow, TurnRow

Role = Literal["system", "user", "assistant", "tool"]
Op = Literal["seed", "simplify", "rewrite", "synthesize", "reanswer", "complete"]
# One text per role: a JSON parser makes a new one for each turn.
_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn. An answer that is not `learnt` is context only: none of its tokens is a target.

    `tool` has the tool calls of an assistant's turn, or whose result a tool's turn is, see `data.tools`.
    `fields` are the turn's other fields as the JSON text of an object, such as {"name": "Ann"}. No model
    sees them, so they are not compared.
    """

    role: Role
    content: str
    learnt: bool = True
    tool: str = ""
    fields: str = dataclasses.field(default="", compare=False)

    @property
    def text(self) -> str:
        """The content, and the tool calls as JSON."""
        calls = calls_text(self.tool)
        return "\n".join(part for part in (self.content, calls) if part) if calls else self.content

    def to_json(self) -> TurnRow:
        """A turn of dataset.jsonl: role, content, tool calls, weight 0 if it is not learnt, other fields."""
        row: TurnRow = {"role": self.role, "content": self.content, **parts_of(self.tool)}
        if not self.learnt:
            row["weight"] = 0
        if self.fields:
            row["fields"] = json.loads(self.fields)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Message:
        """Reads a turn of dataset.jsonl."""
        tool = of_result(row) if row["role"] == "tool" else of_calls(row.get("tool_calls") or [])
        learnt, fields = row.get("weight") in (None, 1), row.get("fields")
        role = _ROLES.get(row["role"], row["role"])
        return cls(role, row["content"], learnt, tool, dumped(fields) if fields else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Lineage:
    """Where an example comes from, and its scores before and after the rewrite.

    `root_id` is the user's own row at the start of the ancestry. That row itself has "", so that all such
    rows share one lineage; `Example.root_id` is never empty. `scores_before` are the scores for which the
    parent was selected. `scores_after` are this example's own scores: under the same model if the gates
    measured it, otherwise those of the next round, once it has been scored.
    """

    parent_ids: tuple[str, ...] = ()
    root_id: str = ""
    round: int = 0
    op: Op = "seed"
    axis: str | None = None
    hint_ids: tuple[str, ...] = ()
    refiner: str | None = None
    prompt_version: str | None = None
    scores_before: dict[str, float | None] | None = None
    scores_after: dict[str, float | None] | None = None

    def to_json(self) -> LineageRow:
        """The lineage as a row of dataset.jsonl has it."""
        return {
            "parent_ids": list(self.parent_ids),
            "root_id": self.root_id,
            "round": self.round,
            "op": self.op,
            "axis": self.axis,
            "hint_ids": list(self.hint_ids),
            "refiner": self.refiner,
            "prompt_version": self.prompt_version,
            "scores_before": self.scores_before,
            "scores_after": self.scores_after,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any], id_: str) -> Lineage:
        """Reads the lineage of the sample `id_` from a row of dataset.jsonl."""
        # Version 0.1 also wrote whether and why an example was accepted.
        fields = {k: v for k, v in row.items() if k not in ("accepted", "reject_reason")}
        for name in ("parent_ids", "hint_ids"):
            fields[name] = tuple(fields[name])
        if fields["root_id"] == id_:
            fields["root_id"] = ""
        found = cls(**fields)
        return SEED if found == SEED else found


SEED = Lineage()  # of all the user's own rows
# Shared by all samples without columns of their own: an empty dict per sample would take 80 bytes.
NO_COLUMNS: Mapping[str, Any] = {}


class _Given(TypedDict, total=False):
    """The keys of an `ExampleRow` that are absent if there is nothing in them."""

    user_id: str | int
    tools: list[Any]
    prompt_columns: dict[str, str]
    behind: list[TurnRow]
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A conversation whose last message is the assistant's.

    `id` is a content hash, so the same row has the same id in any file and at any position. `extra` contains
    the user's other columns, which are kept unchanged. `tools` are the definitions of the tools that the
    assistant may call, as the JSON text of a list. `user_id` is the id that the user's row has; an addition
    has none. `prompt_columns` are the columns that the prompt was joined of, of Alpaca or prompt and context;
    {} if it was one. `behind` are the turns behind the last answer that is learnt; no model sees them.
    """

    messages: tuple[Message, ...]
    id: str = ""
    lineage: Lineage = SEED
    extra: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NO_COLUMNS)
    tools: str = ""
    user_id: str | int | None = None
    # Not compared: it says how the same conversation was spread over columns.
    prompt_columns: Mapping[str, str] = dataclasses.field(default_factory=lambda: NO_COLUMNS, compare=False)
    behind: tuple[Message, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_id(self.messages, self.tools))

    @property
    def root_id(self) -> str:
        """The id of the user's own row at the start of the ancestry."""
        return self.lineage.root_id or self.id

    @property
    def prompt(self) -> str:
        """The user's words: all user turns before the last assistant turn, joined by a blank line."""
        return "\n\n".join(m.content for m in self.messages[:-1] if m.role == "user")

    @property
    def response(self) -> str:
        """The last assistant turn, with its tool calls as JSON."""
        return self.messages[-1].text

    @property
    def has_tools(self) -> bool:
        """Whether tools are defined, called or answer."""
        return bool(self.tools) or any(m.tool or m.role == "tool" for m in self.messages)

    @property
    def question(self) -> str:
        """The last user turn, which a rewrite replaces."""
        return self.messages[self._asked].content

    @property
    def context(self) -> tuple[Message, ...]:
        """All turns before the last user turn, the system turn among them."""
        return self.messages[: self._asked]

    @property
    def n_user_turns(self) -> int:
        """How many turns are the user's; over 1 in a conversation of several turns."""
        return sum(m.role == "user" for m in self.messages)

    @property
    def _asked(self) -> int:
        return max(n for n, m in enumerate(self.messages) if m.role == "user")

    @property
    def is_single_turn(self) -> bool:
        """Whether it is one user's turn and one answer, system turns aside."""
        return [m.role for m in self.messages if m.role != "system"] == ["user", "assistant"]

    def replace_text(
        self,
        prompt: str,
        response: str,
        lineage: Lineage,
        context: tuple[Message, ...] | None = None,
        id_columns: Collection[str] = (),
    ) -> Example:
        """The child that a refiner's prompt and answer make. It has the extra columns and its own id.

        A rewrite keeps all turns before the last user turn, or has `context` in their place. An addition
        (`lineage.op` is `synthesize`) has one prompt after the system turn, and null in `id_columns` and in
        columns that are called like an id.

            [system, u1, a1, u2, a2]  ->  rewrite [system, u1, a1, prompt, response]
                                          addition [system, prompt, response]
        """
        before = self.context if context is None else context
        user_id, extra = self.user_id, self.extra
        if lineage.op == "synthesize":
            before, user_id = tuple(m for m in self.messages if m.role == "system"), None
            extra = shared_names(without_ids(extra, id_columns))
        asked, parts = Message("user", prompt), NO_COLUMNS
        if prompt == self.question:
            asked, parts = self.messages[self._asked], self.prompt_columns
        turns = (asked, Message("assistant", response))
        if lineage.op == "synthesize":  # a field may name the row that it was made from
            before = tuple(Message(m.role, m.content) for m in before)
        return Example(before + turns, "", lineage, extra, self.tools, user_id, parts)

    def changed_turns(self, original: Example) -> list[int]:
        """Which turns of this conversation differ from its original's, counted from 0.

        Earlier versions made one prompt and one answer of several turns; then all turns behind the first
        changed one differ.
        """
        one, other = self.messages, original.messages
        differs = [a != b for a, b in zip(one, other, strict=False)]
        if len(one) == len(other):
            return [n for n, differs_here in enumerate(differs) if differs_here]
        return list(range(differs.index(True) if any(differs) else len(differs), len(one)))

    def to_json(self) -> ExampleRow:
        """A row of dataset.jsonl; `from_json` reads it back to an equal Example."""
        given = _Given()
        if self.user_id is not None:
            given["user_id"] = self.user_id
        if self.tools:
            given["tools"] = json.loads(self.tools)
        if self.prompt_columns:
            given["prompt_columns"] = dict(self.prompt_columns)
        if self.extra:
            given["extra"] = dict(self.extra)
        if self.behind:
            given["behind"] = [message.to_json() for message in self.behind]
        messages = [message.to_json() for message in self.messages]
        lineage: LineageRow = {**self.lineage.to_json(), "root_id": self.root_id}
        return {"id": self.id, "messages": messages, **given, "lineage": lineage}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Example:
        """Reads a row of dataset.jsonl."""
        lineage = Lineage.from_json(row["lineage"], row["id"])
        messages = tuple(Message.from_json(m) for m in row["messages"])
        tools = dumped(row["tools"]) if row.get("tools") else ""
        extra, parts = shared_names(row.get("extra")), shared_names(row.get("prompt_columns"))
        behind = tuple(Message.from_json(m) for m in row.get("behind") or ())
        return cls(messages, row["id"], lineage, extra, tools, row.get("user_id"), parts, behind)


def shared_names(columns: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Columns with one text per name for all samples: a JSON parser makes new ones for each row."""
    return {sys.intern(name): value for name, value in columns.items()} if columns else NO_COLUMNS


def content_id(messages: tuple[Message, ...], tools: str = "") -> str:
    """The first 16 hexadecimal digits (64 bits) of the SHA-256 of roles, contents, `learnt` flags and tools.

    Equal rows have equal ids. Among a hundred million different rows, any two share an id with probability
    3e-4 (birthday bound).
    """
    turns = [[m.role, m.content, *([] if m.learnt else [0]), *([m.tool] if m.tool else [])] for m in messages]
    text = json.dumps([*turns, *([tools] if tools else [])], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
