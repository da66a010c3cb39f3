"""Chat templates by name: the formats that families are fine-tuned in, one Jinja file each in `jinja/`."""

from __future__ import annotations

import datetime
import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Name -> the control tokens that the format stands on. Each must be one token of the tokenizer: spelt out in
# ordinary tokens, an end of turn is neither learnt as one nor does it stop an answer.
CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "default": (),
}


class TemplateError(ValueError):
    """The chat template is not there, is not this tokenizer's, or hides where an answer starts and ends."""


def named_template(name: str) -> str:
    """The Jinja text of one of the names in CONTROL_TOKENS."""
    file = importlib.resources.files("middo_jax.data").joinpath("jinja", f"{name}.jinja")
    return file.read_text(encoding="utf-8")


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Gives a tokenizer the chat template that the user asked for.

    Args:
      tokenizer: its `chat_template` is replaced, unless it has one and no other is asked for.
      template: a name in CONTROL_TOKENS, or a Jinja file. None: its own, or 'default' if it has none.

    Raises:
      TemplateError: neither a name nor a file that can be read, or a format whose control tokens are not
        tokens of this tokenizer.
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
            f"model.template: {name!r} is neither a known name ({names}) nor a Jinja file that can be read: "
            f"{e.strerror}"
        ) from e
    except UnicodeDecodeError as e:
        raise TemplateError(f"model.template: {name} is not a text file in UTF-8: {e}") from e


# Before a template: `strftime_now` as a macro of our own, so that it prints the pinned day.
_PINNED = (
    "{%- macro strftime_now(format) -%}{%- set pinned = namespace(text=format) -%}"
    "{%- for code, value in pinned_day.items() -%}"
    "{%- set pinned.text = pinned.text.replace(code, value) -%}"
    "{%- endfor -%}{{- pinned.text -}}{%- endmacro -%}{{- '' }}"
)
# What `strftime` knows in the C library; a template may ask for any of it. `-` leaves out leading zeros.
_CODES = [f"%{pad}{letter}" for pad in ("-", "") for letter in "aAbBcCdDeFgGhHIjklmMnpPrRsSTtuUVwWxXyYzZ"]


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints the day on which it is rendered."""
    return "strftime_now" in str(tokenizer.chat_template)


def pin_date(tokenizer: PreTrainedTokenizerBase, day: datetime.date) -> None:
    """Makes `template_arguments` render the chat template as on that day, whatever the clock says."""
    noon = datetime.datetime.combine(day, datetime.time(12))
    # %% is an escaped percent sign: it is put aside while the codes are replaced.
    codes = {"%%": "\0"} | {code: noon.strftime(code) for code in _CODES} | {"\0": "%"}
    tokenizer.init_kwargs["pinned_day"] = codes


def template_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `apply_chat_template` needs so that a template that asks for the date gets the pinned one."""
    codes = tokenizer.init_kwargs.get("pinned_day")
    if codes is None or not asks_for_date(tokenizer):
        return {}
    return {"chat_template": f"{_PINNED}{tokenizer.chat_template}", "pinned_day": codes}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens that steer the model, and that no sample's own text may contain."""
    ends = declared_ends(tokenizer.name_or_path)
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special or i in ends}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def declared_ends(directory: str | Path) -> frozenset[int]:
    """The tokens at which servers end an answer: of generation_config.json, without it of config.json.

    An empty name, that of a tokenizer which was not read from a directory, declares none.

    Raises:
      TemplateError: the file is no JSON object.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if str(directory) and path.is_file():
            try:
                named = dict(json.loads(path.read_text(encoding="utf-8"))).get("eos_token_id")
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
            f"model.template: {name} is written with {', '.join(missing)}, no control tokens of this "
            f"tokenizer; of the known names {', '.join(fitting)} fit it, or give a Jinja file"
        )


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with BOS, as it was in pre-training."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
