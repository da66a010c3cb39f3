"""Laws of `middo inspect`: what it counts is what the model will see."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import write_tiny_model
from transformers import PreTrainedTokenizerBase

from middo_jax.data.example import Example, Message
from middo_jax.data.sources import Rejection
from middo_jax.data.tokenize import load_tokenizer, tokenize
from middo_jax.report.inspection import inspect_rows, inspect_tokens
from middo_jax.report.terminal import printable, render_inspection, render_trace

EXAMPLES = [
    Example(
        (
            Message("user", "Hi"),
            Message("assistant", "Héllo 🦙"),
            Message("user", "?"),
            Message("assistant", "!"),
        )
    ),
    *(
        Example((Message("user", f"Count to {n}."), Message("assistant", "one " * n)))
        for n in range(1, 60, 7)
    ),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("max_length", [48, 1024])
def test_counts(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    facts = inspect_tokens(EXAMPLES, tokenizer, max_length, batch_tokens=512)["tokens"]
    tokenized = [tokenize(e, tokenizer, max_length) for e in EXAMPLES]
    lengths = sorted(map(len, tokenized))
    assert facts["total"] == sum(lengths)
    assert (facts["quantiles"]["min"], facts["quantiles"]["max"]) == (lengths[0], lengths[-1])
    assert facts["quantiles"]["median"] in (lengths[4], lengths[5]) or facts["quantiles"]["median"] == int(
        np.median(lengths)
    )
    assert facts["truncated"] == sum(t.truncated for t in tokenized)
    assert (facts["truncated"] > 0) == (max_length == 48)
    assert facts["target_share"] == pytest.approx(sum(t.is_target_n.sum() for t in tokenized) / sum(lengths))
    assert 0 < facts["fill"] <= 1
    assert facts["shapes"] >= 1


def test_the_first_sample_shows_what_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = inspect_tokens(EXAMPLES, tokenizer, 1024, 512)["rendered"]
    assert rendered == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Héllo 🦙<|im_end|>]]\n"
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n[[!<|im_end|>]]\n"
    )


def test_what_is_printed(tokenizer: PreTrainedTokenizerBase) -> None:
    rejections = [Rejection(where=f"data.jsonl:{n}", reason="no response", row=None) for n in range(7)]
    facts = inspect_rows(EXAMPLES, rejections)
    assert facts["n"] == len(EXAMPLES)
    assert len(facts["rejected"]) == 7
    text = render_inspection(facts | inspect_tokens(EXAMPLES, tokenizer, 48, 512))
    assert text.startswith(f"{len(EXAMPLES)} rows can be used, 7 cannot\n  data.jsonl:0: no response\n")
    assert "[[Héllo 🦙<|im_end|>]]" in text
    assert "longer than max_length 48:" in text
    assert "tokens a conversation" not in render_inspection(facts)


def test_nothing_steers_the_terminal() -> None:
    assert printable("a\nb 漢") == "a\nb 漢"
    for steering in ("\x1b[2J", "\r", "\x07", "\u202e", "\x9b31m"):
        assert printable(f"x{steering}")[1] == "\N{REPLACEMENT CHARACTER}"
    sample = {
        "round": 0, "id": "s", "op": "seed", "axis": None, "parent_ids": [], "accepted": True,
        "prompt": "\x1b]0;title\x07", "response": "r",
    }  # fmt: skip
    assert "\x1b" not in render_trace([sample])
