"""Chat templates by name. Each is the format of a model family, in a Jinja file in `jinja/`."""

from __future__ import annotations

import datetime
import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from middo_jax.data.template_limits import fault_of
from middo_jax.rundir.nesting import require_flat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Name -> the control tokens of the format. The tokenizer must have each as one token: an end of turn that is
# spelt in ordinary tokens is not learnt as an end, and does not stop an answer.
CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "default": (),
}


class TemplateError(ValueError):
    """The chat template is missing, does not fit the tokenizer, or does not show where an answer is."""


def named_template(name: str) -> str:
    """The Jinja text of one of the names in CONTROL_TOKENS."""
    file = importlib.resources.files("middo_jax.data").joinpath("jinja", f"{name}.jinja")
    return file.read_text(encoding="utf-8")


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Sets a tokenizer's chat template as the user wants it.

    Args:
      tokenizer: its `chat_template` is replaced, unless it has one and `template` is None.
      template: a name in CONTROL_TOKENS, or a Jinja file. None: the tokenizer's own, or 'default' if it has
        none.

    Raises:
      TemplateError: `template` is neither a name nor a readable file, or the tokenizer lacks a control token
        of the format.
    """
    if template is None and tokenizer.chat_template:
        return
    name = template or "default"
    if name in CONTROL_TOKENS:
        _check_tokens(name, tokenizer)
        tokenizer.chat_template = named_template(name)
        if name == "default" and starts_with_bos(tokenizer):
            tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        return
    names = ", ".join(CONTROL_TOKENS)
    try:
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    except OSError as e:
        raise TemplateError(
            f"model.template: {name!r} is neither a known name ({names}) nor a readable Jinja file: "
            f"{e.strerror}"
        ) from e
    except UnicodeDecodeError as e:
        raise TemplateError(f"model.template: {name} is not a text file in UTF-8: {e}") from e


def require_bounded(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tries a tokenizer's chat template in a process of its own, see `template_limits`.

    Raises:
      TemplateError: it takes too much time, memory or output.
    """
    own = tokenizer.chat_template
    texts = own.values() if isinstance(own, dict) else [own]
    tokens = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    for text in texts:
        if text and (fault := fault_of(str(text), tokens)) is not None:
            raise TemplateError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot be used: {fault}; "
                "set model.template"
            )


# Put in front of a template: a macro that replaces `strftime_now`, so that it prints the pinned day.
_PINNED = (
    "{%- macro strftime_now(format) -%}{%- set pinned = namespace(text=format) -%}"
    "{%- for code, value in pinned_day.items() -%}"
    "{%- set pinned.text = pinned.text.replace(code, value) -%}"
    "{%- endfor -%}{{- pinned.text -}}{%- endmacro -%}{{- '' }}"
)
# The codes of the C library's `strftime`, all of which a template may use. `-` leaves out leading zeros.
_CODES = [f"%{pad}{letter}" for pad in ("-", "") for letter in "aAbBcCdDeFgGhHIjklmMnpPrRsSTtuUVwWxXyYzZ"]


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints the day on which it is rendered."""
    return "strftime_now" in str(tokenizer.chat_template)


def pin_date(tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> None:
    """Makes `template_arguments` render the chat template as on that day, whatever the clock says."""
    noon = datetime.datetime.combine(day, datetime.time(12))
    # %% is an escaped percent sign; \0 stands for it while the codes are replaced.
    codes = {"%%": "\0"} | {code: noon.strftime(code) for code in _CODES} | {"\0": "%"}
    tokenizer.init_kwargs["pinned_day"] = codes


def template_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Arguments of `apply_chat_template` that make a template print the pinned day instead of today."""
    codes = tokenizer.init_kwargs.get("pinned_day")
    if codes is None or not asks_for_date(tokenizer):
        return {}
    return {"chat_template": f"{_PINNED}{tokenizer.chat_template}", "pinned_day": codes}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the control tokens.

    A sample's own text may not contain those that `steering_tokens` lists.
    """
    ends = declared_ends(tokenizer.name_or_path)
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special or i in ends}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def declared_ends(directory: str | Path) -> frozenset[int]:
    """The tokens at which servers end an answer, from generation_config.json, or config.json without it.

    Args:
      directory: the model's. "", the name of a tokenizer that was not read from a directory, declares none.

    Raises:
      TemplateError: the file is not a JSON object.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if str(directory) and path.is_file():
            try:
                text = path.read_bytes()
                require_flat(text)
                named = dict(json.loads(text.decode())).get("eos_token_id")
            except (ValueError, TypeError) as e:
                raise TemplateError(f"{path}: not a JSON object: {e}") from e
            return frozenset(i for i in (named if isinstance(named, list) else [named]) if type(i) is int)
    return frozenset()


def _check_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    has = control_tokens(tokenizer).keys()
    missing = [token for token in CONTROL_TOKENS[name] if token not in has]
    for role in ("bos_token", "eos_token"):
        if role in named_template(name) and getattr(tokenizer, role) is None:
            missing.append(f"its {role}")
    if missing:
        fitting = [other for other, tokens in CONTROL_TOKENS.items() if has >= set(tokens)]
        raise TemplateError(
            f"model.template: {name} needs {', '.join(missing)}, which are no control tokens of this "
            f"tokenizer; use {' or '.join(fitting)}, or give a Jinja file"
        )


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with BOS, as in pre-training."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
