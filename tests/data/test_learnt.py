"""What is learnt of a conversation: the answers, and what the template writes up to the end of the turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_model
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from middo_jax.data.example import Example, Message, Role
from middo_jax.data.templates import TemplateError, control_tokens
from middo_jax.data.tokenize import (
    end_of_turn_token,
    eos_token_ids,
    load_tokenizer,
    steering_tokens,
    tokenize,
)

NO_LIMIT = 1 << 20
EOT = "<|im_end|>"
TWO_TURNS: tuple[tuple[Role, str], ...] = (
    ("user", "Which sea?"),
    ("assistant", "The North."),
    ("user", "More"),
    ("assistant", "No"),
)


def template(header: str, behind: str, answer: str = "m['content']") -> str:
    """A chat template that writes `header`, the answer and `behind`; a user's turn is one line."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        f"{{{{ {header!r} + {answer} + {behind!r} }}}}"
        "{% else %}{{ '<|im_start|>' + m['content'] + '\n' }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
    )


def fast(chat_template: str, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    backend = tiny_tokenizer()
    if trim_offsets:  # leaves spaces out of the offsets, as Llama 3's tokenizer does
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token=EOT,
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def learnt(tokenizer: PreTrainedTokenizerFast, *turns: tuple[Role, str]) -> str:
    t = tokenize(Example(tuple(Message(*turn) for turn in turns)), tokenizer, NO_LIMIT)
    assert not (t.is_target_n & t.in_prompt_n).any()
    return str(tokenizer.decode(t.tokens_n[t.is_target_n].tolist()))


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("space", ["", "\n", " ", "\n\n", " \n", "\t", " ###\n"])
def test_the_end_of_a_turn_is_learnt_behind_what_the_template_writes(space: str, trim_offsets: bool) -> None:
    tokenizer = fast(template("A:\n", space + EOT + "\n"), trim_offsets=trim_offsets)
    assert end_of_turn_token(tokenizer) == control_tokens(tokenizer)[EOT]
    assert learnt(tokenizer, *TWO_TURNS) == f"The North.{space}{EOT}No{space}{EOT}"
    for answer in ("5", "5\n", "Yes ", "a\n\nb", ""):
        assert learnt(tokenizer, ("user", "?"), ("assistant", answer)) == answer + space + EOT


def test_only_what_ends_the_turn_is_learnt() -> None:
    tokenizer = fast(template("A:\n", "\n\n" + EOT + "<|endoftext|>\n" + EOT))
    assert learnt(tokenizer, *TWO_TURNS) == f"The North.\n\n{EOT}No\n\n{EOT}"


def test_the_next_turns_words_are_not_learnt() -> None:
    """A template without an end of turn: what opens the next turn is not of this one."""
    named = template("A:\n", "\n").replace("'<|im_start|>' + m", "'User <|im_start|>' + m")
    tokenizer = fast(named)
    assert end_of_turn_token(tokenizer) is None
    assert learnt(tokenizer, *TWO_TURNS) == "The North.No"


@pytest.mark.parametrize("header", ["A: ", "A:  ", "### \n ", "A:\n ", EOT + " "])
def test_the_first_word_is_learnt_behind_a_space_of_the_generation_prompt(header: str) -> None:
    tokenizer = fast(template(header, EOT + "\n"))
    assert "".join(learnt(tokenizer, *TWO_TURNS).split()) == f"TheNorth.{EOT}No{EOT}"
    for answer in ("the", "Paris is", "cat", "5"):
        assert learnt(tokenizer, ("user", "?"), ("assistant", answer)).lstrip() == answer + EOT


QWEN3 = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}{%- for m in messages -%}"
    "{%- set content = m.content -%}{%- set reasoning = '' -%}"
    "{%- if m.role == 'assistant' and '</think>' in content -%}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<think>\n' + reasoning + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
THOUGHT = "<think>\nA small one.\n</think>\n\nA wren."


def test_reasoning_that_the_generation_prompt_begins_is_learnt_behind_it() -> None:
    opens = CHAT_TEMPLATE.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
    tokenizer = fast(opens)
    asked: tuple[Role, str] = ("user", "Name a bird.")
    assert learnt(tokenizer, asked, ("assistant", THOUGHT)) == THOUGHT.removeprefix("<think>\n") + EOT
    with pytest.raises(TemplateError):  # asked for an answer, the model is past what this one begins with
        learnt(tokenizer, asked, ("assistant", "A wren."))


def test_reasoning_that_the_template_writes_itself_is_learnt() -> None:
    tokenizer = fast(QWEN3)
    asked: tuple[Role, str] = ("user", "Name a bird.")
    assert learnt(tokenizer, asked, ("assistant", THOUGHT)) == THOUGHT + EOT
    # White space around reasoning is the template's.
    assert learnt(tokenizer, asked, ("assistant", "<think>A small one.</think>A wren.")) == THOUGHT + EOT
    # The empty block is the template's, and the model has to write it.
    assert learnt(tokenizer, asked, ("assistant", "A wren.")) == f"<think>\n\n</think>\n\nA wren.{EOT}"
    # An earlier answer is shown without its reasoning, as it is when the model is asked.
    both = learnt(tokenizer, asked, ("assistant", THOUGHT), ("user", "Why?"), ("assistant", THOUGHT))
    assert both == f"A wren.{EOT}{THOUGHT}{EOT}"
    assert learnt(tokenizer, ("system", "Think."), asked, ("assistant", THOUGHT)) == THOUGHT + EOT


@pytest.mark.parametrize(
    "answer",
    ["m['content'].split('</think>')[-1]", "m['content'] | replace('small', '')", "m['content'] | upper"],
)
def test_an_answer_that_the_template_changes_is_refused_by_its_turn(answer: str) -> None:
    with pytest.raises(TemplateError, match=r"does not show the text of turn 2 \(the assistant's\)"):
        learnt(fast(template("A:\n", EOT, answer)), ("user", "Name a bird."), ("assistant", THOUGHT))


def steering(directory: Path, eos: object, file: str = "generation_config.json") -> frozenset[str]:
    path = directory / file
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {"eos_token_id": eos}))
    return steering_tokens(load_tokenizer(directory))


@pytest.mark.parametrize("eos", [[2, 0], 0, [0]])
def test_every_stop_token_of_the_generation_config_steers(eos: object, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    (directory / "generation_config.json").unlink(missing_ok=True)
    assert "<|endoftext|>" not in steering_tokens(load_tokenizer(directory))
    assert {"<|endoftext|>", EOT} <= steering(directory, eos)


def test_stop_tokens_of_config_json_and_of_added_text(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    (directory / "generation_config.json").unlink(missing_ok=True)
    assert "<|endoftext|>" in steering(directory, [2, 0], "config.json")
    assert eos_token_ids(directory, load_tokenizer(directory)) == {0, 2}
    # An added token that is not marked as special ends an answer too; a word of the vocabulary is text.
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens(["<end>"])
    tokenizer.save_pretrained(directory)
    end, word = tokenizer.convert_tokens_to_ids("<end>"), tokenizer.convert_tokens_to_ids("cat")
    found = steering(directory, [end, word])
    assert "<end>" in found
    assert "cat" not in found


def test_a_generation_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(TemplateError, match=r"generation_config\.json: not a JSON object"):
        steering_tokens(load_tokenizer(directory))


def test_the_tiny_template_is_as_before() -> None:
    assert learnt(fast(CHAT_TEMPLATE), *TWO_TURNS) == f"The North.{EOT}No{EOT}"
