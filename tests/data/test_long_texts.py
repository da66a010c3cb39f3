"""A long text is tokenized by its ends, and the result is that of tokenizing all of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.tiny_gguf import vocab_size, write_gguf
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.data.example import Example, Message
from middo_jax.data.long_texts import first_tokens, is_long, last_tokens
from middo_jax.data.tokenize import load_tokenizer, tokenize_all, truncate
from middo_jax.models.gguf import convert
from middo_jax.signals.judge import questions, sampled
from middo_jax.stages.passes import raw_prompts

WORDS = (
    *("the", "cat", "who", "wanted", "to", "see", "sea,", "12", "reasons:", "café", "“story”\n\nanswer"),
    *("it\tclearly.", "", "(list)\n"),
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A byte-level one, and one of SentencePiece's kind, which marks the beginning of each text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = write_tiny_model(folder / "model", **FAMILIES["llama2"])
    kind = "sentencepiece prefixed"
    other = write_tiny_model(folder / "other", vocab_size=vocab_size(kind), **FAMILIES["llama2"])
    gguf = write_gguf(folder / "m.gguf", other, tokens=kind)
    converted = convert(gguf, folder / "converted", weights=False)
    return {"byte level": load_tokenizer(model), "sentencepiece": load_tokenizer(converted)}


def text(seed: int, chars: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=chars // 6))


SHORT, LONG = 40, 120_000  # characters; with 64 tokens a text is long from 16,384 characters on
CASES: dict[str, Callable[[], tuple[Message, ...]]] = {
    "long prompt": lambda: (Message("user", text(1, LONG)), Message("assistant", text(2, SHORT))),
    "long answer": lambda: (Message("user", text(1, SHORT)), Message("assistant", text(2, LONG))),
    "both long": lambda: (Message("user", text(1, LONG)), Message("assistant", text(2, LONG))),
    "long system turn": lambda: (
        Message("system", text(0, LONG)),
        Message("user", text(1, SHORT)),
        Message("assistant", text(2, SHORT)),
    ),
    "several turns": lambda: (
        Message("user", text(1, LONG)),
        Message("assistant", text(2, LONG)),
        Message("user", text(3, 3000)),
        Message("assistant", text(4, 2000)),
    ),
    "an answer that is not learnt": lambda: (
        Message("user", text(1, LONG)),
        Message("assistant", text(2, 900)),
        Message("user", text(3, LONG)),
        Message("assistant", text(4, LONG), learnt=False),
    ),
    "spaces": lambda: (Message("user", "a" + " " * LONG + "b"), Message("assistant", text(2, SHORT))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@pytest.mark.parametrize("max_length", [16, 64])
def test_cut_before_equals_cut_after(
    tokenizers: dict[str, Any], kind: str, case: str, max_length: int
) -> None:
    tokenizer, example = tokenizers[kind], Example(CASES[case]())
    assert is_long("".join(m.content for m in example.messages), max_length)
    [early] = tokenize_all([example], tokenizer, max_length)
    late = truncate(tokenize_all([example], tokenizer)[0], max_length)
    assert early.truncated
    assert late.truncated
    for name in ("tokens_n", "is_target_n", "in_prompt_n"):
        np.testing.assert_array_equal(getattr(early, name), getattr(late, name), err_msg=name)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_the_last_tokens_of_a_text(tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for content in (text(5, LONG), text(6, 2000), "short"):
        whole = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        assert last_tokens(tokenizer, content, 50) == (whole[-50:], len(whole) > 50)


def test_ten_megabytes_are_cut_at_once(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """Tokenizing all of it does not end within three minutes."""
    row = Example((Message("user", text(1, 1_000_000) * 10), Message("assistant", "word" * 2_500_000)))
    others = [Example((Message("user", f"Q{n}"), Message("assistant", "A"))) for n in range(3)]
    began = time.monotonic()
    tokenized = tokenize_all([others[0], row, *others[1:]], tokenizers["byte level"], 1024)
    assert time.monotonic() - began < 20  # 0.3 where nothing else runs
    assert (
        [len(t) == 1024 for t in tokenized] == [t.truncated for t in tokenized] == [False, True, False, False]
    )
    assert [t.id for t in tokenized] == [e.id for e in (others[0], row, *others[1:])]


def test_the_middle_of_a_long_text_is_in_no_question_about_it(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []

    def tokenize_prompt(turns: list[Message], *_: Any, **__: Any) -> np.ndarray:
        tokenized.append(turns[0].content)
        return np.zeros(1, np.int32)

    for module in (questions, sampled):
        monkeypatch.setattr(module, "tokenize_prompt", tokenize_prompt)
    ratings = questions.RatingTokens(stem=(), first=(), ten_second=None)
    for prompt, response in ((text(1, LONG), "short"), ("short", text(2, LONG))):
        row = Example((Message("user", f"BEGIN {prompt}"), Message("assistant", f"{response} END")))
        questions.questions(row, "response", tokenizers["byte level"], ratings, 64)
        sampled.rating_prompts([row], tokenizers["byte level"], 64)
    assert len(tokenized) == 2 * (3 + 6)
    assert max(map(len, tokenized)) < LONG / 4
    assert all("BEGIN" in each for each in tokenized)
    assert sum(" END" in each for each in tokenized) == 2 * (3 + 3)


def test_the_middle_of_a_long_prompt_is_not_tokenized_either(tokenizers: dict[str, Any]) -> None:
    lengths: list[int] = []

    def tokenizer(given: str | list[str], **more: Any) -> Any:
        lengths.append(len(given))
        return tokenizers["byte level"](given, **more)

    settings = SimpleNamespace(model=SimpleNamespace(max_length=64))
    session = cast(Any, SimpleNamespace(config=settings, tokenizer=tokenizer))
    row = Example((Message("user", text(1, LONG)), Message("assistant", "short")))
    [tokens] = raw_prompts(session, [row])
    assert (len(tokens), tokens.truncated) == (64, True)
    assert max(lengths) < LONG / 4


def test_a_long_text_of_few_tokens_is_tokenized_whole() -> None:
    n_chars: list[int] = []

    def words(text: str, **_: bool) -> dict[str, list[int]]:
        n_chars.append(len(text))
        return {"input_ids": [len(word) for word in text.split()]}

    tokenizer: Any = words
    few, many = "word " + " " * 100_000 + "end", "word " * 20_000
    assert first_tokens(tokenizer, few, 64, add_special_tokens=False) == [4, 3]
    assert n_chars[-1] == len(few)
    n_chars.clear()
    assert 64 < len(first_tokens(tokenizer, many, 64, add_special_tokens=False)) < 1000
    assert sum(n_chars) < 5000
    assert len(first_tokens(tokenizer, many, 10_000, add_special_tokens=False)) == 20_000
