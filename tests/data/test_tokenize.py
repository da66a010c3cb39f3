"""Laws of rendering: exactly the answers are learnt, exactly the user's words are the prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_model
from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from middo_jax.data.example import Example, Message, Role
from middo_jax.data.templates import TemplateError, control_tokens, named_template
from middo_jax.data.tokenize import (
    TokenizedExample,
    end_of_turn_token,
    eos_token_ids,
    load_tokenizer,
    refusal,
    steering_tokens,
    tokenize,
    tokenize_all,
    tokenize_prompt,
)

DEFAULT_TEMPLATE = named_template("default")
NO_LIMIT = 1 << 20
STRIPPING_TEMPLATE = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")


def fast(template: str, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template; `trim_offsets` leaves spaces out of offsets, as Llama 3's does."""
    backend = tiny_tokenizer()
    if trim_offsets:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "chatml": fast(CHAT_TEMPLATE),
    "chatml trimmed offsets": fast(CHAT_TEMPLATE, trim_offsets=True),
    "stripping": fast(STRIPPING_TEMPLATE),
    "stripping trimmed offsets": fast(STRIPPING_TEMPLATE, trim_offsets=True),
    "default": fast(DEFAULT_TEMPLATE),
    "default trimmed offsets": fast(DEFAULT_TEMPLATE, trim_offsets=True),
}
CHATML, DEFAULT = TOKENIZERS["chatml"], TOKENIZERS["default"]
EOT = "<|im_end|>"


@pytest.fixture(params=TOKENIZERS, ids=lambda name: name.replace(" ", "-"))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]


def conversation(*turns: tuple[Role, str]) -> Example:
    return Example(tuple(Message(role, content) for role, content in turns))


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens.tolist()))


def parts(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, str, str]:
    """(the whole text, what is learnt, what is the prompt)."""
    t = tokenize(example, tokenizer, NO_LIMIT)
    assert not t.truncated
    assert not (t.is_target_n & t.in_prompt_n).any()
    shown = (t.tokens_n, t.tokens_n[t.is_target_n], t.tokens_n[t.in_prompt_n])
    return tuple(text_of(tokenizer, tokens) for tokens in shown)  # pyright: ignore[reportReturnType]


def test_chatml_by_hand() -> None:
    example = conversation(("system", "Be kind."), ("user", "Hi there"), ("assistant", "Hello!"))
    whole, learnt, prompt = parts(CHATML, example)
    assert whole == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert (learnt, prompt) == ("Hello!<|im_end|>", "Hi there")


def test_chatml_token_by_token() -> None:
    t = tokenize(conversation(("user", "a"), ("assistant", "b")), CHATML, NO_LIMIT)
    tokens = [text_of(CHATML, t.tokens_n[i : i + 1]) for i in range(len(t))]
    learnt = [token for token, yes in zip(tokens, t.is_target_n, strict=True) if yes]
    assert tokens[-3:] == ["b", EOT, "\n"]
    assert learnt == ["b", EOT]
    assert t.is_target_n[-3:].tolist() == [True, True, False]
    assert t.tokens_n.dtype == np.int32


def test_default_template_by_hand() -> None:
    example = conversation(("system", "Be kind."), ("user", "Hi there"), ("assistant", "Hello!"))
    whole, learnt, prompt = parts(DEFAULT, example)
    assert whole == f"Be kind.\nHuman: Hi there{EOT}\nAssistant:Hello!{EOT}\n"
    assert learnt == "Hello!<|im_end|>"
    assert prompt == "Hi there"


def test_every_assistant_turn_is_a_target(tokenizer: PreTrainedTokenizerBase) -> None:
    example = conversation(
        ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four\n\nfive")
    )
    _, learnt, prompt = parts(tokenizer, example)
    assert learnt == f"two{EOT}four\n\nfive{EOT}"
    assert prompt.replace(" ", "") == "onethree"


def test_an_answer_before_the_first_question_is_context(tokenizer: PreTrainedTokenizerBase) -> None:
    welcome = Message("assistant", "Welcome!", learnt=False)
    asked = conversation(("user", "Hi there"), ("assistant", "Hello!")).messages
    example = Example((welcome, *asked))
    assert refusal(example, tokenizer) is None
    whole, learnt, prompt = parts(tokenizer, example)
    assert "Welcome!" in whole
    assert (learnt, prompt.strip()) == (f"Hello!{EOT}", "Hi there")


def test_what_stands_before_a_target_is_the_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = (Message("user", "What is the capital?"), Message("assistant", "Paris."))
    t = tokenize(Example(messages), tokenizer, NO_LIMIT)
    first = int(np.flatnonzero(t.is_target_n)[0])
    assert t.tokens_n[:first].tolist() == tokenize_prompt(messages[:1], tokenizer).tolist()


def test_no_answer_is_only_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert parts(tokenizer, conversation(("user", "say nothing"), ("assistant", "")))[1] == EOT


@pytest.mark.parametrize("name", ["chatml", "chatml trimmed offsets"])
def test_space_around_an_answer_does_not_hide_its_end(name: str) -> None:
    for answer in ("la la ", "la la \n\n", "la\n\n  ", " la", "\n la", "  "):
        example = conversation(("user", "sing"), ("assistant", answer))
        assert parts(TOKENIZERS[name], example)[1] == answer + EOT


@pytest.mark.parametrize("name", ["stripping", "stripping trimmed offsets"])
def test_templates_that_strip(name: str) -> None:
    example = conversation(("user", "  Hi \n"), ("assistant", "\n Hello\n\n"))
    assert parts(TOKENIZERS[name], example)[1:] == (f"Hello{EOT}", "Hi")


PIECES = [
    "user",
    "assistant",
    "system",
    "end",
    "start",
    "im",
    "<",
    ">",
    "\n",
    "\n\n",
    " ",
    "Human: ",
    "Human:",
    "Assistant:",
    "{{ x }}",
    "{% raw %}",
    "</s>",
    "\ue000",
    "\ue0000\ue001",
    "1",
    "10",
    "é",
    "漢",
    "🦙",
    "a\tb",
    "\u200d",
    "\r\n",
    "\xa0",
    "'s",
    ".",
]
NASTY = st.lists(st.sampled_from([*PIECES, "|"]) | st.characters(codec="utf-8"), max_size=8).map("".join)
STRIPPED = NASTY.map(str.strip)


@given(
    prompt=STRIPPED, response=STRIPPED, system=st.none() | STRIPPED, name=st.sampled_from(list(TOKENIZERS))
)
@settings(max_examples=300, deadline=None)
def test_spans_survive_any_text(prompt: str, response: str, system: str | None, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    turns: list[tuple[Role, str]] = [("user", prompt), ("assistant", response)]
    if system is not None:
        turns.insert(0, ("system", system))
    _, learnt, in_prompt = parts(tokenizer, conversation(*turns))
    assert learnt == response + EOT
    assert in_prompt.removeprefix(" " if name.startswith("default") else "") == prompt


@given(turns=st.lists(STRIPPED, min_size=1, max_size=4), name=st.sampled_from(list(TOKENIZERS)))
@settings(max_examples=100, deadline=None)
def test_spans_of_many_turns_survive_any_text(turns: list[str], name: str) -> None:
    messages: list[tuple[Role, str]] = []
    for text in turns:
        messages.extend([("user", text), ("assistant", f"{text}!")])
    _, learnt, _ = parts(TOKENIZERS[name], conversation(*messages))
    assert learnt == "".join(f"{text}!{EOT}" for text in turns)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"),
        CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('think', '')"),
        # Earlier answers are shortened once a later turn exists, as reasoning models' templates do.
        CHAT_TEMPLATE.replace("message['content']", "(message['content'] if loop.last else 'gone')"),
        CHAT_TEMPLATE.replace("message['content']", "message['content'] + message['content']"),
        CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>model\n"),
        "{{ raise_exception('only without system turns') }}",
        "{{ messages[0]['content'",
        "always the same",
    ],
    ids=["upper", "replace", "earlier", "twice", "generation-prompt", "refuses", "broken", "ignores"],
)
def test_templates_that_change_text_are_refused(template: str) -> None:
    example = conversation(
        ("user", "I think so"), ("assistant", "I think not"), ("user", "?"), ("assistant", "!")
    )
    with pytest.raises(TemplateError):
        tokenize(example, fast(template), NO_LIMIT)


WORDS = st.lists(st.sampled_from(["cat", " the", " sea", ".", "\n"]), max_size=40).map("".join).map(str.strip)


@given(
    system=st.none() | WORDS,
    turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    limit=st.integers(2, 90),
)
@settings(max_examples=150, deadline=None)
def test_truncation(system: str | None, turns: list[tuple[str, str]], limit: int) -> None:
    messages: list[tuple[Role, str]] = []
    if system is not None:
        messages.append(("system", system))
    for user, assistant in turns:
        messages.extend([("user", user), ("assistant", assistant)])
    whole = tokenize(conversation(*messages), CHATML, NO_LIMIT)
    cut = tokenize(conversation(*messages), CHATML, limit)
    assert len(cut) == min(len(whole), limit) or len(cut) == len(whole) - 1  # what follows the last answer
    assert len(cut) <= limit
    assert cut.is_target_n.any()
    assert_subsequence(whole, cut)
    target_lost = cut.is_target_n.sum() < whole.is_target_n.sum()
    assert cut.truncated or not target_lost
    assert cut.truncated == (len(whole) - 1 > limit)
    if cut.truncated:
        runs = np.flatnonzero(np.diff(cut.is_target_n.astype(int)) == 1)
        first = int(runs[-1]) + 1  # of the last answer
        whole_first = int(np.flatnonzero(np.diff(whole.is_target_n.astype(int)) == 1)[-1]) + 1
        # The end of what precedes the answer is kept, and the head is as it was.
        near = min(first, (limit // 2 + 1) // 2)
        assert (
            cut.tokens_n[first - near : first].tolist()
            == whole.tokens_n[whole_first - near : whole_first].tolist()
        )
        prompt = np.flatnonzero(whole.in_prompt_n)
        head = min(int(prompt[0]) if len(prompt) else 0, (limit - len(cut.tokens_n[first:])) // 2)
        assert cut.tokens_n[:head].tolist() == whole.tokens_n[:head].tolist()
        # The last answer is only cut where it takes its half of the room, or all that the rest leaves.
        answer, whole_answer = len(cut) - first, len(whole) - 1 - whole_first
        assert answer == min(whole_answer, max(limit - whole_first, limit // 2))


def assert_subsequence(whole: TokenizedExample, cut: TokenizedExample) -> None:
    """`cut` is `whole` without some tokens, each with its own marks."""
    rows = iter(zip(whole.tokens_n, whole.is_target_n, whole.in_prompt_n, strict=True))
    for row in zip(cut.tokens_n, cut.is_target_n, cut.in_prompt_n, strict=True):
        assert any(row == other for other in rows)


def test_truncation_keeps_the_question_and_the_head() -> None:
    user = "Read this. " + "cat " * 200 + "Which animal?"
    example = conversation(("system", "S"), ("user", user), ("assistant", "A cat."))
    t = tokenize(example, CHATML, 80)
    text = text_of(CHATML, t.tokens_n)
    assert (len(t), t.truncated) == (80, True)
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("Which animal?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>")
    assert text_of(CHATML, t.tokens_n[t.is_target_n]) == f"A cat.{EOT}"


def test_a_long_answer_is_cut_at_its_end() -> None:
    example = conversation(("user", "Sing."), ("assistant", "la " * 300))
    t = tokenize(example, CHATML, 60)
    assert (len(t), t.truncated) == (60, True)
    assert text_of(CHATML, t.tokens_n[t.in_prompt_n]) == "Sing."
    learnt = text_of(CHATML, t.tokens_n[t.is_target_n])
    assert learnt.startswith("la la")
    assert EOT not in learnt


def test_load_tokenizer(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    assert load_tokenizer(directory).chat_template == CHAT_TEMPLATE
    assert load_tokenizer(directory, "default").chat_template == DEFAULT_TEMPLATE
    (tmp_path / "t.jinja").write_text(STRIPPING_TEMPLATE)
    assert load_tokenizer(directory, str(tmp_path / "t.jinja")).chat_template == STRIPPING_TEMPLATE
    with pytest.raises(TemplateError, match=r"model\.template: .*nowhere' is neither a known name"):
        load_tokenizer(directory, str(tmp_path / "nowhere"))
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template"', '"unused"'))
    assert load_tokenizer(directory).chat_template == DEFAULT_TEMPLATE


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    tokens = control_tokens(CHATML)
    end_of_text, end_of_turn = tokens["<|endoftext|>"], tokens[EOT]
    assert eos_token_ids(directory, load_tokenizer(directory)) == {end_of_turn}
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": [{end_of_text}, {end_of_turn}]}}')
    assert eos_token_ids(directory, load_tokenizer(directory)) == {end_of_text, end_of_turn}
    # The template's own end of turn counts even if no file names it.
    (directory / "generation_config.json").unlink()
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace(f'"eos_token": "{EOT}"', '"eos_token": "<|endoftext|>"'))
    assert eos_token_ids(directory, load_tokenizer(directory)) == {end_of_text, end_of_turn}


def test_many_at_a_time_are_each_on_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [
        conversation(("user", f"question {i} " * (i % 7)), ("assistant", "answer" * (i % 3)))
        for i in range(1030)
    ]
    together = tokenize_all(examples, tokenizer, 24)
    assert [t.id for t in together] == [e.id for e in examples]
    assert any(t.truncated for t in together)
    for example, t in zip(examples[::97], together[::97], strict=True):
        alone = tokenize(example, tokenizer, 24)
        assert t.truncated == alone.truncated
        for name in ("tokens_n", "is_target_n", "in_prompt_n"):
            np.testing.assert_array_equal(getattr(t, name), getattr(alone, name))
    assert tokenize_all([], tokenizer, 24) == []


def test_end_of_turn_token() -> None:
    assert end_of_turn_token(CHATML) == control_tokens(CHATML)[EOT]
    assert end_of_turn_token(fast(CHAT_TEMPLATE.replace("'<|im_end|>' + ", ""))) is None


def test_only_tokens_of_the_template_steer() -> None:
    tokenizer = fast(CHAT_TEMPLATE)
    tokenizer.add_tokens(["<filename>"], special_tokens=True)
    assert "<filename>" in control_tokens(tokenizer)
    assert {"<|im_start|>", "<|im_end|>"} <= steering_tokens(tokenizer)
    assert "<filename>" not in steering_tokens(tokenizer)


def test_control_tokens() -> None:
    assert control_tokens(CHATML) == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
