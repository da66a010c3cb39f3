"""Text that comes in pieces is the text as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.tiny_model import write_tiny_model
from support.tiny_sentencepiece import Prefix, tiny_sentencepiece
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
    return sentencepiece(tmp_path, "always")


def sentencepiece(tmp_path: Path, prefix: Prefix) -> PreTrainedTokenizerBase:
    directory = write_tiny_model(tmp_path)
    tiny_sentencepiece(prefix).save(str(directory / "tokenizer.json"))
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
    """Which have bytes that are no character, control tokens, and ids beyond the vocabulary."""
    tokens = np.random.default_rng(seed).integers(0, len(tokenizer) + 5, 60).tolist()
    texts, _ = pieces(tokenizer, tokens)
    assert "".join(texts) == text_of(tokens, tokenizer)


@pytest.mark.parametrize("prefix", ["none", "always", "first"])
def test_so_it_is_with_random_tokens_of_sentencepiece(tmp_path: Path, prefix: Prefix) -> None:
    """A wrong byte changes the text of the right ones beside it."""
    tokenizer = sentencepiece(tmp_path, prefix)
    space = tokenizer.convert_tokens_to_ids("▁")
    rng = np.random.default_rng(0)
    for _ in range(60):
        # Mostly bytes that are characters; spaces and control tokens also in front.
        common = [space, 1, *tokenizer("\n€é日", add_special_tokens=False)["input_ids"]]
        few = rng.choice(common, 40).tolist()
        tokens = rng.choice([*few, *rng.integers(0, len(tokenizer) + 5, 8)], 60).tolist()
        texts, _ = pieces(tokenizer, tokens)
        assert "".join(texts) == text_of(tokens, tokenizer)


def test_a_line_feed_of_bytes_stops_at_once_and_has_its_place(llama2: PreTrainedTokenizerBase) -> None:
    tokens = llama2("What\n is", add_special_tokens=False)["input_ids"]
    feed = llama2.convert_tokens_to_ids("<0x0A>")
    texts, stopped = pieces(llama2, tokens, "\n")
    assert ("".join(texts), stopped, len(texts)) == ("What", True, tokens.index(feed) + 1)
    stream, n_chars = TextStream(llama2), 0
    for token in tokens[: tokens.index(feed) + 1]:
        n_chars += len(stream.push(token))
    assert (n_chars, stream.n_pending) == (4, 1)


class ByteTokens:
    """A tokenizer whose tokens are any bytes; it counts the tokens that it decodes."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.n_decoded = tokens, 0

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.tokens[token].decode("latin-1")

    def decode(self, tokens: list[int], **_: object) -> str:
        self.n_decoded += len(tokens)
        return b"".join(self.tokens[token] for token in tokens).decode(errors="replace")


def test_so_it_is_where_tokens_end_within_a_character_and_begin_within_another() -> None:
    text = "é🙂日".encode()
    parts = [text[i:j] for i in range(len(text)) for j in range(i + 1, min(i + 5, len(text) + 1))]
    rng = np.random.default_rng(0)
    orders = [rng.integers(0, len(parts), 100).tolist() for _ in range(50)]
    for tokens in [*orders, [parts.index(b"\xa9\xf0")] * 100]:
        fake = ByteTokens(parts)
        tokenizer = cast(PreTrainedTokenizerBase, fake)
        texts, _ = pieces(tokenizer, tokens)
        assert fake.n_decoded < 20 * len(tokens)
        assert "".join(texts) == text_of(tokens, tokenizer)
    straddling = ByteTokens(["€".encode()[:1], "€".encode()[1:] + "€".encode()[:1]])
    texts, _ = pieces(cast(PreTrainedTokenizerBase, straddling), [0, *[1] * 99])
    assert texts == ["", *["€"] * 99, "\N{REPLACEMENT CHARACTER}"]
    assert straddling.n_decoded < 2000


@pytest.mark.parametrize("kind", ["bytes", "control", "unknown", "characters", "words"])
@pytest.mark.parametrize("is_sentencepiece", [False, True])
def test_the_work_per_token_is_limited(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    is_sentencepiece: bool,
) -> None:
    """Counted in tokens that are decoded, also where no token ends a character."""
    if is_sentencepiece:
        tokenizer = sentencepiece(tmp_path, "always")
    first, second, third = tokenizer("日", add_special_tokens=False)["input_ids"][-3:]
    cycle = {
        "bytes": [first, second],
        "control": [1],
        "unknown": [len(tokenizer) + 1],
        "characters": [first, second, third],
        "words": tokenizer("What is the sea", add_special_tokens=False)["input_ids"],
    }[kind]
    n_decoded, decode = 0, tokenizer.decode

    def counted(tokens: list[int], **options: Any) -> Any:
        nonlocal n_decoded
        n_decoded += len(tokens)
        return decode(tokens, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    tokens = [*cycle * 1000][:1000]
    texts, _ = pieces(tokenizer, tokens)
    assert n_decoded < 20 * len(tokens)
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
