"""Laws of the named templates: what families publish, to the character; every turn is found in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_model import tiny_tokenizer, write_tiny_model
from support.tiny_sentencepiece import Prefix, tiny_sentencepiece
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from middo_jax.data.example import Example, Message, Role
from middo_jax.data.templates import CONTROL_TOKENS, TemplateError, named_template, set_template
from middo_jax.data.tokenize import TokenizedExample, load_tokenizer, tokenize, tokenize_prompt

NO_LIMIT = 1 << 20
TURNS: tuple[tuple[Role, str], ...] = (("user", "Hi there"), ("assistant", "Hello!"))
MORE: tuple[tuple[Role, str], ...] = (("user", "And you?"), ("assistant", "Fine.\nThanks."))
SYSTEM: tuple[Role, str] = ("system", "Be kind.")


def tokenizer_of(
    backend: Tokenizer, template: str, bos: str | None = "<s>", eos: str = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer that has the control tokens of a named template, and the template."""
    backend.add_special_tokens([t for t in (*CONTROL_TOKENS[template], bos, eos) if t])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    set_template(tokenizer, template)
    return tokenizer


def byte_level(template: str, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    backend = tiny_tokenizer()
    if trim_offsets:  # spaces are left out of offsets, as Llama 3's tokenizer does
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer_of(backend, template)


def sentencepiece(template: str, prefix: Prefix = "none") -> PreTrainedTokenizerFast:
    return tokenizer_of(tiny_sentencepiece(prefix), template)


# Every template with the tokenizers that its family has, and with some that it may meet.
TOKENIZERS = {
    "chatml": byte_level("chatml"),
    "chatml sentencepiece": sentencepiece("chatml"),
    "llama3": byte_level("llama3"),
    "llama3 trimmed offsets": byte_level("llama3", trim_offsets=True),
    "mistral": sentencepiece("mistral", "first"),
    "mistral prefixed everywhere": sentencepiece("mistral", "always"),
    "mistral byte-level": byte_level("mistral"),
    "gemma": sentencepiece("gemma"),
    "gemma byte-level": byte_level("gemma"),
    "default": byte_level("default"),
    "default sentencepiece": sentencepiece("default"),
    "default prefixed": sentencepiece("default", "always"),
}
END = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "default": "</s>",
}


def conversation(*turns: tuple[Role, str]) -> Example:
    return Example(tuple(Message(role, content) for role, content in turns))


def runs(tokenizer: PreTrainedTokenizerFast, t: TokenizedExample, marked_n: np.ndarray) -> list[str]:
    """The text of every run of marked tokens, without the space that is part of a first word."""
    edges = np.flatnonzero(np.diff(np.r_[False, marked_n, False]))
    texts = [str(tokenizer.decode(t.tokens_n[a:b].tolist())) for a, b in edges.reshape(-1, 2)]
    return [text.removeprefix(" ") for text in texts]


EXPECTED = {
    "chatml": (
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\nFine.\nThanks.<|im_end|>\n",
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nAnd you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFine.\nThanks.<|eot_id|>",
    ),
    "mistral": (
        "[INST] Hi there[/INST] Hello!</s>",
        None,
        "[INST] And you?[/INST] Fine.\nThanks.</s>",
    ),
    "gemma": (
        "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n",
        None,
        "<start_of_turn>user\nAnd you?<end_of_turn>\n<start_of_turn>model\nFine.\nThanks.<end_of_turn>\n",
    ),
    "default": (
        "Human: Hi there</s>\nAssistant:Hello!</s>\n",
        "Be kind.\n",
        "Human: And you?</s>\nAssistant:Fine.\nThanks.</s>\n",
    ),
}
BEFORE_AN_ANSWER = {
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "gemma": "<start_of_turn>model\n",
    "default": "Assistant:",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_templates_to_the_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    first, system, more = EXPECTED[name]
    bos = "<s>" if "bos_token" in named_template(name) else ""

    def rendered(*turns: tuple[Role, str], ask: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))

    assert rendered(*TURNS) == bos + first
    assert rendered(*TURNS, *MORE) == bos + first + more
    if system is None:  # a system turn opens the first user turn
        assert rendered(SYSTEM, *TURNS, *MORE) == bos + first.replace("Hi", "Be kind.\n\nHi") + more
    else:
        assert rendered(SYSTEM, *TURNS, *MORE) == bos + system + first + more
    asked = rendered(*TURNS, *MORE[:1], ask=True)
    answered = rendered(*TURNS, *MORE)
    assert answered.startswith(asked)
    assert asked.endswith(BEFORE_AN_ANSWER[name])
    assert answered.removeprefix(asked).strip().startswith("Fine.")


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_trimming(name: str) -> None:
    padded = conversation(("user", " \nHi there\n "), ("assistant", "\n\nHello! "))
    plain = conversation(*TURNS)
    ours, theirs = (tokenize(e, TOKENIZERS[name], NO_LIMIT).tokens_n.tolist() for e in (padded, plain))
    assert ours == theirs


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bos_once(name: str) -> None:
    tokenizer, template = TOKENIZERS[name], name.split()[0]
    tokens = tokenize(conversation(SYSTEM, *TURNS, *MORE), tokenizer, NO_LIMIT).tokens_n.tolist()
    wanted = "bos_token" in named_template(template)
    assert tokens.count(tokenizer.bos_token_id) == wanted
    assert (tokens[0] == tokenizer.bos_token_id) == wanted


def test_plain_words_start_as_the_tokenizer_starts_a_text() -> None:
    """A tokenizer that puts BOS before every text was pre-trained so."""
    backend = tiny_sentencepiece()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = tokenizer_of(backend, "default")
    tokens = tokenize(conversation(*TURNS, *MORE), tokenizer, NO_LIMIT).tokens_n.tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("folded", [False, True], ids=["", "system"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_targets_and_prompt(name: str, folded: bool) -> None:
    tokenizer, end = TOKENIZERS[name], END[name.split()[0]]
    example = conversation(*([SYSTEM] if folded else []), *TURNS, *MORE)
    t = tokenize(example, tokenizer, NO_LIMIT)
    assert runs(tokenizer, t, t.is_target_n) == [f"Hello!{end}", f"Fine.\nThanks.{end}"]
    assert runs(tokenizer, t, t.in_prompt_n) == ["Hi there", "And you?"]
    before_first = t.tokens_n[: int(np.flatnonzero(t.is_target_n)[0])].tolist()
    assert before_first == tokenize_prompt(example.messages[: 1 + folded], tokenizer).tolist()


NASTY = st.lists(
    st.sampled_from(
        [
            "user",
            "model",
            "\n",
            "\n\n",
            " ",
            "Human: ",
            "[INST",
            "<s",
            "é",
            "漢",
            "🦙",
            "a\tb",
            "'s",
            ".",
            "Be",
        ]
    )
    | st.characters(codec="utf-8", exclude_characters="▁"),  # which a sentencepiece cannot tell from a space
    max_size=8,
).map(lambda parts: "".join(parts).strip())


@given(
    prompt=NASTY,
    response=NASTY,
    system=st.none() | NASTY,
    again=NASTY,
    name=st.sampled_from(list(TOKENIZERS)),
)
@settings(max_examples=400, deadline=None)
def test_spans_survive_any_text(
    prompt: str, response: str, system: str | None, again: str, name: str
) -> None:
    tokenizer, end = TOKENIZERS[name], END[name.split()[0]]
    turns: list[tuple[Role, str]] = [("user", prompt), ("assistant", response)]
    turns.extend([("user", f"{again}?"), ("assistant", again)])
    if system is not None:
        turns.insert(0, ("system", system))
    t = tokenize(conversation(*turns), tokenizer, NO_LIMIT)
    assert runs(tokenizer, t, t.is_target_n) == [response + end, again + end]
    assert "".join(runs(tokenizer, t, t.in_prompt_n)) == f"{prompt}{again}?"


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma"])
def test_a_format_that_is_not_the_tokenizers(name: str, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    if name == "chatml":
        assert load_tokenizer(directory, name).chat_template == named_template(name)
        return
    with pytest.raises(TemplateError, match=f"model.template: {name} needs ") as error:
        load_tokenizer(directory, name)
    assert all(token in str(error.value) for token in CONTROL_TOKENS[name])
    assert "use chatml or default, or give a Jinja file" in str(error.value)


def test_a_format_that_needs_bos() -> None:
    with pytest.raises(TemplateError, match="gemma needs its bos_token"):
        tokenizer_of(tiny_sentencepiece(), "gemma", bos=None)


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    names = ", ".join(CONTROL_TOKENS)
    refused = rf"'chatlm' is neither a known name \({names}\) nor a readable Jinja file: No such file"
    with pytest.raises(TemplateError, match=refused):
        load_tokenizer(directory, "chatlm")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(TemplateError, match="not a text file in UTF-8"):
        load_tokenizer(directory, str(tmp_path / "latin.jinja"))


def test_every_name_has_a_file_and_every_file_a_name() -> None:
    folder = Path(named_template.__code__.co_filename).parent / "jinja"
    assert {file.stem for file in folder.glob("*.jinja")} == CONTROL_TOKENS.keys()
