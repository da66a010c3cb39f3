"""Laws of the boundary between context and continuation, on a real byte-level tokenizer."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM
from support.tiny_model import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from middo_jax.evaluation.pairs import Encoder

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|im_end|>")
ENCODER = Encoder(TOKENIZER)
EOS = cast(int, TOKENIZER.eos_token_id)
TEXT = st.text("abc Thecapitlofn.\n?é日", max_size=12)


class Theirs(TemplateLM):
    """lm-eval's own rule over the same tokenizer."""

    @property
    def eot_token_id(self) -> int:
        return EOS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return TOKENIZER.encode(string, add_special_tokens=bool(add_special_tokens))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


THEIRS = Theirs()


@given(TEXT, TEXT)
def test_nothing_is_lost_and_nothing_twice(context: str, continuation: str) -> None:
    (pair,) = ENCODER.pairs([(context, continuation)])
    whole = TOKENIZER.encode(context + continuation)
    assert pair.context
    assert [*pair.context, *pair.continuation] in (whole, [EOS, *whole])
    assert (
        str(TOKENIZER.decode(pair.continuation)).endswith(continuation)
        or "é" in continuation
        or "日" in continuation
    )


@given(TEXT, TEXT)
def test_where_no_token_spans_the_boundary_the_tokens_are_lm_evals(context: str, continuation: str) -> None:
    kept = context.rstrip()
    whole = TOKENIZER.encode(context + continuation)
    alone = TOKENIZER.encode(kept)
    if kept and whole[: len(alone)] == alone and len(whole) > len(alone):
        (ours,) = ENCODER.pairs([(context, continuation)])
        assert tuple(ours) == THEIRS._encode_pair(context, continuation)


def test_a_token_across_the_boundary_is_scored() -> None:
    words = (t for t in sorted(TOKENIZER.get_vocab()) if len(t) > 3 and t.isascii() and t.isalpha())
    word = next(word for word in words if TOKENIZER.tokenize(f"a.{word}")[-1] == word)
    context, continuation = f"a.{word[:-1]}", word[-1]
    (pair,) = ENCODER.pairs([(context, continuation)])
    assert TOKENIZER.decode(pair.continuation) == word
    assert [*pair.context, *pair.continuation] == TOKENIZER.encode(context + continuation)
    theirs = THEIRS._encode_pair(context, continuation)  # has other tokens than the text, or too few of them
    assert [*theirs[0], *theirs[1]] != TOKENIZER.encode(context + continuation)


def test_without_a_context_the_context_is_the_prefix() -> None:
    empty, spaces, alone, twice = ENCODER.pairs([("", ""), ("  ", "a"), ("", "b c"), ("", "<|im_end|>b")])
    assert tuple(empty) == ([EOS], [])
    assert tuple(spaces) == ([EOS], TOKENIZER.encode("  a"))
    assert tuple(alone) == ([EOS], TOKENIZER.encode("b c"))
    assert tuple(twice) == ([EOS], TOKENIZER.encode("b"))


def test_special_tokens_are_added_once() -> None:
    adding = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    from tokenizers.processors import TemplateProcessing

    bos = cast(int, adding.bos_token_id)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    encoder = Encoder(adding)
    plain, chat = encoder.pairs([("a b", " c"), ("<|endoftext|>a b", " c")])
    assert tuple(plain) == tuple(chat)
    assert plain.context[0] == bos
    assert plain.context.count(bos) == 1
    assert Encoder(adding, False).pairs([("a b", " c")])[0].context == plain.context[1:]


def test_a_tokenizer_without_any_end_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()))
