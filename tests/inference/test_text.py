"""Text that comes in pieces is the text as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_model import write_tiny_model
from support.tiny_sentencepiece import tiny_sentencepiece
from transformers import PreTrainedTokenizerBase

from middo_jax.data.tokenize import load_tokenizer
from middo_jax.inference.text import TextStream, is_whole_text, text_of, token_text

TEXT = "Größe: 3 €, 日本語 🙂🙂 and\n\nmore  of it — naïve."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def llama2(tmp_path: Path) -> PreTrainedTokenizerBase:
    """Texts get a space in front, and characters that it does not have are bytes."""
    directory = write_tiny_model(tmp_path)
    tiny_sentencepiece("always").save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int], *stops: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stops)
    texts = []
    for token in tokens:
        texts.append(stream.push(token))
        if stream.stopped:
            return texts, True
    texts.append(stream.finish())
    return texts, stream.stopped


def test_pieces_are_the_whole_and_never_end_within_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer(TEXT)["input_ids"]
    assert len(tokens) > len(TEXT.split())  # several tokens per character, too
    texts, _ = pieces(tokenizer, tokens)
    assert "".join(texts) == text_of(tokens, tokenizer) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert sum(map(bool, texts)) > 10


def test_so_it_is_with_a_sentencepiece_tokenizer(llama2: PreTrainedTokenizerBase) -> None:
    tokens = llama2(TEXT, add_special_tokens=False)["input_ids"]
    texts, _ = pieces(llama2, tokens)
    assert "".join(texts) == text_of(tokens, llama2)
    assert "日本語 🙂🙂 and" in "".join(texts)


@pytest.mark.parametrize("seed", range(20))
def test_so_it_is_with_random_tokens(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Which have bytes that are no character, and control tokens."""
    tokens = np.random.default_rng(seed).integers(0, len(tokenizer), 60).tolist()
    texts, _ = pieces(tokenizer, tokens)
    assert "".join(texts) == text_of(tokens, tokenizer)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["Japan"], (TEXT, False)),
        (["\n\n"], (TEXT[: TEXT.index("\n\n")], True)),
        (["\n\nmore  of us", "of it"], (TEXT[: TEXT.index("of it")], True)),
        (["naïve.."], (TEXT, False)),  # a beginning of it is held back, and released at the end
        (["G"], ("", True)),
    ],
)
def test_a_stop_text_ends_it_and_no_part_of_one_is_sent(
    tokenizer: PreTrainedTokenizerBase, stops: list[str], expected: tuple[str, bool]
) -> None:
    texts, stopped = pieces(tokenizer, tokenizer(TEXT)["input_ids"], *stops)
    assert ("".join(texts), stopped) == expected


def test_a_part_of_a_character_is_named_by_its_id(tokenizer: PreTrainedTokenizerBase) -> None:
    for token in tokenizer("€ word")["input_ids"]:
        text = token_text(token, tokenizer)
        assert is_whole_text(token, tokenizer) == (text == tokenizer.decode([token]))
        assert is_whole_text(token, tokenizer) or text == f"token_id:{token}"
    assert not is_whole_text(tokenizer("€")["input_ids"][0], tokenizer)
