"""Laws of the readings beside the loss: which token ends a turn, and a prompt behind its response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.tiny_model import write_tiny_model

from middo_jax.config import MeshSettings
from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import end_of_turn_token, load_tokenizer, tokenize_all
from middo_jax.models import hf
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes.losses import score_examples
from middo_jax.signals.readings import GUESS, end_nll, last_targets, pmi, prompts_behind_responses
from middo_jax.signals.table import Measured

ONE_TURN = Example(
    (
        Message("system", "Be brief."),
        Message("user", "What is the capital of France?"),
        Message("assistant", "Paris, of course."),
    )
)
TWO_TURNS = Example((*ONE_TURN.messages, Message("user", "Why?"), Message("assistant", "It was so.")))
CONVERSATIONS = [ONE_TURN, TWO_TURNS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_end_is_that_of_the_last_turn_and_a_cut_answer_has_none(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    whole = tokenize_all(CONVERSATIONS, tokenizer)
    long = Example((Message("user", "Where?"), Message("assistant", "Paris, of course. " * 20)))
    [cut] = tokenize_all([long], tokenizer, 64)
    assert cut.truncated
    end = end_of_turn_token(tokenizer)
    last = np.array([0.5, 0.25, 2.0], np.float32)
    np.testing.assert_array_equal(end_nll(last, last_targets([*whole, cut]), end), [0.5, 0.25, np.nan])
    assert np.isnan(
        end_nll(last, last_targets([*whole, cut]), None)
    ).all()  # a template without an end of turn
    whole[0].is_target_n[:] = False
    assert np.isnan(end_nll(last[:1], last_targets(whole[:1]), end)).all()


def test_the_end_of_turn_has_the_loss_of_its_token_alone(directory: Path) -> None:
    """The pass over a conversation of which the end of turn is the only target."""
    mesh = make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    model, tokenizer = hf.load(directory, mesh=mesh), load_tokenizer(directory)
    whole = tokenize_all(CONVERSATIONS, tokenizer)
    ends = tokenize_all(CONVERSATIONS, tokenizer)
    for example in ends:
        last = np.flatnonzero(example.is_target_n)[-1]
        example.is_target_n[:] = np.arange(len(example)) == last
        assert example.tokens_n[last] == end_of_turn_token(tokenizer)

    def scores(examples: list) -> tuple[np.ndarray, np.ndarray]:
        found, _ = score_examples(model, examples, batch_tokens=256, chunk=64)
        return found.last_nll_n, found.loss_n

    np.testing.assert_allclose(scores(whole)[0], scores(ends)[1], rtol=1e-5)


def test_a_prompt_behind_its_response_keeps_its_tokens(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    tokenized = tokenize_all(CONVERSATIONS, tokenizer)
    turned, several = prompts_behind_responses(CONVERSATIONS, tokenized, tokenizer, 512)
    assert several is None
    assert turned is not None
    assert tokenizer.decode(turned.tokens_n) == (
        f"<|im_start|>user\n{GUESS}Paris, of course.<|im_end|>\n"
        "<|im_start|>assistant\nWhat is the capital of France?"
    )
    targets, prompt = turned.tokens_n[turned.is_target_n], tokenized[0].tokens_n[tokenized[0].in_prompt_n]
    np.testing.assert_array_equal(targets, prompt)
    assert not turned.in_prompt_n.any()
    assert prompts_behind_responses(CONVERSATIONS, tokenized, tokenizer, len(turned) - 1) == [None, None]
    mute = Example((Message("user", "Hi"), Message("assistant", "")))
    assert prompts_behind_responses([mute], tokenize_all([mute], tokenizer), tokenizer, 512) == [None]


def test_a_long_response_is_not_tokenized_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(directory)
    long = Example((Message("user", "Where?"), Message("assistant", "Paris, of course. " * 50_000)))
    examples = [long, ONE_TURN, long, ONE_TURN]
    tokenized = tokenize_all(examples, tokenizer, 128)
    given: list[int] = []
    encode = type(tokenizer)._encode_plus

    def counted(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        given.append(sum(map(len, [text] if isinstance(text, str) else text)))
        return encode(self, text, *args, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counted)
    turned = prompts_behind_responses(examples, tokenized, tokenizer, 128)
    assert [one is None for one in turned] == [True, False, True, False]
    assert 0 < sum(given) < 20_000
    [alone] = prompts_behind_responses([ONE_TURN], tokenized[1:2], tokenizer, 128)
    for one in (turned[1], turned[3]):
        assert one is not None
        assert alone is not None
        np.testing.assert_array_equal(one.tokens_n, alone.tokens_n)


def test_columns() -> None:
    n = np.array([4, 2], np.int32)
    loss, alone = np.array([1.0, 2.0]), np.array([1.5, 1.0])
    np.testing.assert_allclose(pmi(loss, alone, n), [2.0, -2.0])
    table = Measured(
        ["a", "b"],
        n,
        np.zeros(2, bool),
        loss_post=loss,
        loss_unconditional=alone,
        end_nll=np.array([0.5, np.nan]),
        worst_decile_nll=np.array([3.0, np.nan]),
        prompt_nll=np.array([2.0, 4.0]),
        reverse_ifd=np.array([0.5, np.nan]),
    ).to_table()
    assert table["pmi"].to_pylist() == [2.0, -2.0]
    assert table["reverse_ifd"].to_pylist() == [0.5, None]
    assert table["end_nll"].to_pylist() == [0.5, None]
    # No end and no single turn are no errors; each target has a loss.
    assert table["error"].to_pylist() == [None, "worst_decile_nll is not finite"]
