"""Laws of the adapter: order, cuts, windows and stops, with a backend that only counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from middo_jax.evaluation.harness import HarnessModel, Prompt
from middo_jax.evaluation.pairs import Encoder, Pair

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|im_end|>")
TOKENIZER.chat_template = CHAT_TEMPLATE
EOS = TOKENIZER.eos_token_id


class Recording:
    """A score is the number of tokens; an answer names its prompt's length."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.prompts: list[Prompt] = []

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        self.pairs += pairs
        return [(-float(len(pair.continuation)), False) for pair in pairs]

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        self.prompts += prompts
        return [str(len(prompt.tokens)) for prompt in prompts]


def model(max_length: int = 64) -> tuple[HarnessModel, Recording, list[str]]:
    backend, said = Recording(), list[str]()
    return HarnessModel(Encoder(TOKENIZER), backend, max_length, said.append), backend, said


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_an_empty_continuation_scores_nothing_and_kills_nothing() -> None:
    lm, backend, said = model()
    requests = instances("loglikelihood", ("a", " b c d"), ("a", ""), ("", ""), ("", " b c"))
    long, short = (-float(len(TOKENIZER.encode(text))) for text in (" b c d", " b c"))
    assert lm.loglikelihood(requests) == [(long, False), (0.0, True), (0.0, True), (short, False)]
    assert len(backend.pairs) == 2
    assert said == ["2 continuations have no token; their log-likelihood is 0"]


def test_a_long_context_is_cut_on_its_left() -> None:
    lm, backend, said = model(8)
    words = "the capital of France is the capital of France is the"
    tokens = TOKENIZER.encode(words + " Paris")
    (found,) = lm.loglikelihood(instances("loglikelihood", (words, " Paris")))
    (pair,) = backend.pairs
    assert [*pair.context, *pair.continuation] == tokens[-9:]  # the last is not read
    assert found == (-float(len(pair.continuation)), False)
    assert said == ["1 contexts were cut on the left to fit into 8 tokens"]
    with pytest.raises(ValueError, match=r"evaluate\.max_length=8"):
        lm.loglikelihood(instances("loglikelihood", ("a", words)))


@pytest.mark.parametrize("max_length", [2, 3, 7, 50])
def test_rolling_windows_tile_the_text_exactly_once(max_length: int) -> None:
    lm, backend, _ = model(max_length)
    texts = ["the capital of France is Paris.", "", "a", "Write a short story about a cat."]
    totals = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in texts)))
    counts = [len(TOKENIZER.encode(text)) for text in texts]
    assert totals == [-float(count) for count in counts]
    predicted = [token for pair in backend.pairs for token in pair.continuation]
    assert predicted == [token for text in texts for token in TOKENIZER.encode(text)]
    assert all(len(pair.context) + len(pair.continuation) <= max_length + 1 for pair in backend.pairs)
    assert backend.pairs[0].context == [EOS]


def test_prompts_keep_their_end_their_order_and_their_stops() -> None:
    lm, backend, said = model(32)
    settings = {"until": ["\n\n", "Q:"], "max_gen_toks": 20}
    long = "the capital of France is " * 6
    answers = lm.generate_until(
        instances("generate_until", (long, settings), ("a", settings), ("", {"max_gen_toks": 4}))
    )
    assert answers == ["12", "1", "1"]
    assert backend.prompts[0].tokens == TOKENIZER.encode(long)[-12:]
    assert backend.prompts[0].until == ("\n\n", "Q:", "<|im_end|>")
    assert backend.prompts[2].tokens == [EOS]
    assert said == ["1 prompts were cut on the left to leave room in 32 tokens"]
    assert settings == {"until": ["\n\n", "Q:"], "max_gen_toks": 20}


def test_sampling_is_seeded_by_the_place() -> None:
    lm, backend, _ = model()
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_gen_toks": 8}
    greedy = {"do_sample": False, "temperature": 0.7, "max_gen_toks": 8, "until": "x"}
    lm.generate_until(instances("generate_until", ("a", sampled), ("a", sampled), ("a", greedy)))
    first, second, third = backend.prompts
    assert (first.temperature, first.top_p, first.top_k, first.seed) == (0.7, 0.9, 5, 0)
    assert second == first._replace(seed=1)
    assert (third.temperature, third.until) == (0.0, ("x", "<|im_end|>"))


def test_what_the_engine_cannot_do_is_refused() -> None:
    lm, _, _ = model(16)
    with pytest.raises(ValueError, match=r"num_beams is not supported"):
        lm.generate_until(instances("generate_until", ("a", {"num_beams": 4, "max_gen_toks": 4})))
    with pytest.raises(ValueError, match=r"evaluate\.max_length=16"):
        lm.generate_until(instances("generate_until", ("a", {"max_gen_toks": 16})))


def test_a_chat_ends_open_for_an_answer_or_within_one() -> None:
    lm, _, _ = model()
    user = {"role": "user", "content": "Hi"}
    assert lm.apply_chat_template([user]).endswith("<|im_start|>assistant\n")
    begun = lm.apply_chat_template([user, {"role": "assistant", "content": "The"}], False)
    assert begun.endswith("assistant\nThe")
    assert lm.tok_encode("Hi", add_special_tokens=False) == TOKENIZER.encode("Hi")
