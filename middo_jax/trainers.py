"""How other trainers read a dataset that was written: LLaMA-Factory, axolotl, TRL.

Each file says what its trainer has to be told: names of columns and roles, and what it does not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from middo_jax.data.own_shape import OwnShape
from middo_jax.data.spelling import USUAL_ROLES
from middo_jax.rundir import write_json, write_text

# The kinds of turns as LLaMA-Factory calls them.
_TAGS = {"user": "user_tag", "assistant": "assistant_tag", "tool": "observation_tag", "system": "system_tag"}
_CALL_TAG = {"call": "function_tag"}


class Contents(NamedTuple):
    """What the rows of a dataset contain.

    Attributes:
      columns: of the files.
      is_weighted: whether some answers have the weight 0.
      has_calls: whether some turns call tools.
      has_turns: whether prompt and completion are lists of turns.
    """

    columns: frozenset[str]
    is_weighted: bool = False
    has_calls: bool = False
    has_turns: bool = False


def write_readers(
    out: Path, name: str, files: Mapping[str, str], shape: OwnShape, contents: Contents
) -> str | None:
    """Writes dataset_info.json for LLaMA-Factory, axolotl.yaml and trl.py beside a dataset.

    Args:
      out: the folder of the dataset.
      name: of the dataset.
      files: split -> name of its file, among them `train`.
      shape: of the rows.
      contents: of the rows.

    Returns:
      Why there is no dataset_info.json, in words; None if there is one.
    """
    names = _Names(shape, contents)
    unread = _unread_by_llama_factory(names)
    if unread is None:
        told = _llama_factory(names)
        info = {name if split == "train" else f"{name}_{split}": file for split, file in files.items()}
        write_json(
            out / "dataset_info.json", {key: {"file_name": file, **told} for key, file in info.items()}
        )
    kind = "parquet" if files["train"].endswith(".parquet") else "json"
    write_text(out / "axolotl.yaml", _axolotl(files["train"], kind, names))
    test = f', "test": "{files["heldout"]}"' if "heldout" in files else ""
    loaded = f'data = load_dataset("{kind}", data_files={{"train": "{files["train"]}"{test}}})\n'
    write_text(out / "trl.py", f"{_TRL_HEAD}{loaded}{_trl(names)}{_sft(names)}")
    return unread


_TRL_HEAD = '"""For TRL: run in this folder, or give full paths."""\n\nfrom datasets import load_dataset\n\n'
_UNREAD_WEIGHTS = "# TRL does not read `weight: 0`: it would learn these answers too. Leave out such rows.\n"


def _sft(names: _Names) -> str:
    """The call of TRL's trainer. Of prompt and completion it learns the completion, without being told."""
    if names.form in ("alpaca", "prompt_completion"):
        return '# SFTTrainer(model, train_dataset=data["train"])\n'
    call = '# SFTTrainer(model, train_dataset=data["train"], args=SFTConfig(assistant_only_loss=True))\n'
    return (_UNREAD_WEIGHTS if names.contents.is_weighted else "") + call


class _Names:
    """The names of columns and roles in the files, by their usual names."""

    def __init__(self, shape: OwnShape, contents: Contents) -> None:
        self.form = "messages" if shape.format == "parquet" else shape.format
        self.contents, self.spelling, self.system = contents, shape.spelling, shape.system_column
        self._names = shape.names

    def __getitem__(self, name: str) -> str:
        return self._names.get(name, name)

    @property
    def turns(self) -> str:
        """The column with the turns."""
        return self["conversations" if self.form == "sharegpt" else "messages"]

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of a turn's role and text."""
        return self.spelling.keys_in(self.form)

    @property
    def sides(self) -> tuple[str, str]:
        """The usual names of the columns of a question and its answer."""
        return ("instruction", "output") if self.form == "alpaca" else ("prompt", "completion")

    def role(self, kind: str) -> str | None:
        """The name of a kind of turn."""
        return self.spelling.role(kind, self.form)

    def present(self, **named: str) -> dict[str, str]:
        """Those of some columns that the files have: key -> name in the files."""
        found = {key: self.system if key == "system" and self.system else self[n] for key, n in named.items()}
        return {key: name for key, name in found.items() if name in self.contents.columns}

    @property
    def beside(self) -> list[str]:
        """The columns behind the first one of which a prompt is joined."""
        usual = {"alpaca": ("context", "input"), "prompt_completion": ("context",)}.get(self.form, ())
        return list(self.present(**{name: name for name in usual}).values())


def _unread_by_llama_factory(names: _Names) -> str | None:
    """Why LLaMA-Factory cannot read the rows, with the way out; None if it can."""
    has_tools = bool(names.present(tools="tools"))
    if names.contents.has_turns:
        return "prompts that are lists of turns; `--format messages` writes what it reads"
    if len(names.beside) > 1:
        return f"`{names.beside[0]}` beside `{names.beside[1]}`; `--format sharegpt` writes what it reads"
    if names.spelling.parts:
        return "text parts; `--format sharegpt` writes what it reads"
    if names.contents.has_calls and names.role("call") is None:
        # Its formatting `openai` reads them, and adds a sentence to the system texts.
        return "`tool_calls`; `--format sharegpt` writes what it reads"
    if has_tools and names.spelling.tool_lists:
        return "lists of tools; `--format sharegpt` writes what it reads"
    return None


def _llama_factory(names: _Names) -> dict[str, Any]:
    if names.form in ("alpaca", "prompt_completion"):
        asked, answered = names.sides
        more = {"history": "history", "tools": "tools"} if names.form == "alpaca" else {}
        named = names.present(prompt=asked, response=answered, system="system", **more)
        return {"columns": named | ({"query": names.beside[0]} if names.beside else {})}
    columns = {"messages": names.turns, **names.present(system="system", tools="tools")}
    told = {"formatting": "sharegpt", "columns": columns}
    if names.form == "sharegpt" and not names.spelling.roles and names.spelling.keys is None:
        return told
    found = {tag: name for kind, tag in (_TAGS | _CALL_TAG).items() if (name := names.role(kind)) is not None}
    return told | {"tags": {"role_tag": names.keys[0], "content_tag": names.keys[1], **found}}


def _axolotl(file: str, kind: str, names: _Names) -> str:
    said = "# For axolotl, whose paths are relative to where it is started.\n"
    source: dict[str, Any] = {"path": file, "ds_type": kind}
    if names.form in ("alpaca", "prompt_completion"):
        source["type"] = _axolotl_type(names)
        if names.present(history="history"):
            said += "# It does not read `history`: export with --format messages.\n"
        for name in names.beside[1:]:
            said += f"# It does not read `{name}`: export with --format messages.\n"
        if names.contents.has_turns:
            said += "# It does not read prompts that are lists of turns: export with --format messages.\n"
    else:
        source |= {"type": "chat_template", "field_messages": names.turns}
        if names.keys != ("role", "content"):
            source["message_property_mappings"] = {"role": names.keys[0], "content": names.keys[1]}
        if names.spelling.roles:
            source["roles"] = {k: [name] for k in _TAGS if (name := names.role(k)) is not None}
        if names.contents.is_weighted:
            source["message_field_training"] = (names.spelling.weight or ("weight",))[0]
        if names.contents.has_calls and names.role("call") is not None:
            said += "# It does not read calls that are turns of their own: export with --format messages.\n"
        for name in ("system", "tools"):
            if names.present(**{name: name}).get(name, name) != name:
                said += f"# It reads {name} from a column `{name}` only: export with --format messages.\n"
    text = yaml.safe_dump({"datasets": [source]}, sort_keys=False, allow_unicode=True)
    return said + text


def _axolotl_type(names: _Names) -> str | dict[str, str]:
    """Its type for rows of one question and one answer. Its own `alpaca` reads no system texts."""
    is_alpaca, (asked, answered) = names.form == "alpaca", names.sides
    fields = names.present(instruction=asked, output=answered, system="system")
    if names.beside:
        fields["input"] = names.beside[0]
    if is_alpaca and all(field == name for field, name in fields.items()):
        return "alpaca_w_system.load_instruct" if "system" in fields else "alpaca"
    formats = {
        "system_format": "{system}\n",
        "format": "{instruction}\n{input}\n",
        "no_input_format": "{instruction}\n",
    }
    return {f"field_{key}": name for key, name in fields.items()} | formats


def _trl(names: _Names) -> str:
    """The lines that make the columns of TRL's SFTTrainer."""
    system = names.present(system="system").get("system")
    before = ""
    if system is not None:
        turn = f'{{"role": "system", "content": row[{system!r}]}}'
        before = f"*([{turn}] if row[{system!r}] else []), "
    if names.form in ("alpaca", "prompt_completion"):
        return _trl_of_pairs(names, before)
    tools = names.present(tools="tools").get("tools", "tools")
    told = "" if tools == "tools" else f', "tools": row[{tools!r}]'
    lines, turns = _trl_turns(names)
    if names.contents.has_calls and (call := names.role("call")) is not None:
        known = f"all(t[{names.keys[0]!r}] in roles for t in row[{names.turns!r}])"
        lines += f"# Rows with {call} turns are left out: for them, export as messages.\n"
        lines += f"data = data.filter(lambda row: {known})\n"
    if turns == "row['messages']" and not before and not told:
        return ""
    made = f'lambda row: {{"messages": [{before}*{turns}]{told}}}'
    if names.turns != "messages":  # TRL renames a column `conversations`, over the one that is made here
        made += f", remove_columns=[{names.turns!r}]"
    lines += f"data = data.map({made})\n"
    return lines


def _trl_turns(names: _Names) -> tuple[str, str]:
    """(lines of definitions, an expression for the turns of a row with TRL's roles, keys and texts)."""
    roles = {name: kind for kind in USUAL_ROLES["messages"] if (name := names.role(kind)) is not None}
    row = f"row[{names.turns!r}]"
    is_usual = names.keys == ("role", "content") and all(name == kind for name, kind in roles.items())
    is_usual = is_usual and names.role("call") is None
    if is_usual and not names.spelling.parts:
        return "", row
    role, content = (f"t[{key!r}]" for key in names.keys)
    lines = f"roles = {roles!r}\n"
    if names.spelling.parts:
        lines += (
            'join = lambda text: text if isinstance(text, str) else "".join(\n'
            '    part if isinstance(part, str) else part["text"] for part in text or []\n'
            ")\n"
        )
        content = f"join({content})"
    rest = "**t, " if names.keys == ("role", "content") else ""
    lines += f'named = lambda turns: [{{{rest}"role": roles[{role}], "content": {content}}} for t in turns]\n'
    return lines, f"named({row})"


def _trl_of_pairs(names: _Names, before: str) -> str:
    """The lines for alpaca and prompt_completion; `before` are the turns before the first question.

    Alpaca rows become turns: they were trained on with the chat template, which TRL does not use for texts.
    """
    is_alpaca, (asked, answered) = names.form == "alpaca", names.sides
    fields = names.present(asked=asked, answered=answered, history="history")
    prompt, answer = f"row[{fields['asked']!r}]", f"row[{fields['answered']!r}]"
    said, is_joined = "", bool(names.beside) and not names.contents.has_turns
    if is_joined:
        parts = ", ".join([prompt, *(f"row[{name!r}]" for name in names.beside)])
        prompt = f'"\\n".join(filter(None, [{parts}]))'
    elif names.beside:
        said = f"# It does not read `{names.beside[0]}`: export with --format messages.\n"
    if "history" in fields:
        of_pair = 'for role, text in zip(("user", "assistant"), pair)'
        pairs = f"for pair in row[{fields['history']!r}] or []"
        before += f'*[{{"role": role, "content": text}} {pairs} {of_pair}], '
    if not before and not is_alpaca:
        made = f'data = data.map(lambda row: {{"prompt": {prompt}, "completion": {answer}}})\n'
        return said if fields["asked"] == "prompt" and not is_joined else said + made
    return said + (
        "turns = lambda text, role: "
        'text if isinstance(text, list) else [{"role": role, "content": text}]\n'
        "data = data.map(\n"
        f'    lambda row: {{"prompt": [{before}*turns({prompt}, "user")], '
        f'"completion": turns({answer}, "assistant")}}\n'
        ")\n"
    )
