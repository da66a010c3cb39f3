"""Laws of the self-rating: one shared prefill says what six separate passes would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.forward import forward
from support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_model
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from middo_jax.config import MeshSettings
from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import load_tokenizer, tokenize_prompt
from middo_jax.models import hf
from middo_jax.models.model import Model
from middo_jax.parallel.mesh import make_mesh
from middo_jax.signals.judge.questions import JudgeError, RatingTokens, RatingTree, rating_tree
from middo_jax.signals.judge.rubrics import ANSWER_STEM, COLUMNS, DIMENSIONS, PARTS, judge_message, quality
from middo_jax.signals.judge.sampled import parse_rating
from middo_jax.stages.ratings import Asked, judge, read_rating

MAX_LENGTH = 1024


def sample(prompt: str, response: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


EXAMPLES = [
    sample("What is the capital of France?", "Paris."),
    sample("", ""),
    sample("Count to 10.", "1 2 3 4 5 6 7 8 9 10"),
    sample("Fill in {response} and {prompt}.", "{prompt}"),
    sample("Write a story. " * 6, "Once upon a time. " * 6),
]


def one_ten_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a token of its own for "10"."""
    backend = tiny_tokenizer()
    backend.add_tokens([AddedToken("10", normalized=False)])
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=408)  # room for "10"


@pytest.fixture(scope="module", params=["two tokens", "one token"])
def tokenizer(request: pytest.FixtureRequest, directory: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(directory) if request.param == "two tokens" else one_ten_tokenizer()


def next_token_log_p(model: Model, tokens: list[int]) -> np.ndarray:
    """float64 log-probabilities of what follows; padded on the right, so that few shapes are compiled."""
    length = 256 * -(-len(tokens) // 256)
    at = jnp.arange(length)[None]
    row = jnp.zeros((1, length), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
    hidden_btd = PASS(model.graphdef, model.params, row, jnp.where(at < len(tokens), 0, -1), at)
    logits = np.asarray(model.decoder().unembed(hidden_btd[0, len(tokens) - 1][None])[0], np.float64)
    return logits - np.log(np.exp(logits).sum())


PASS = jax.jit(forward, static_argnums=0)


def rating_by_hand(model: Model, tokenizer: PreTrainedTokenizerBase, question: str) -> float:
    """The eleven answers spelt out, each one's probability from passes of its own.

    "1" is the answer only if "10" is not, which is what the model says after "1".
    """
    asked = tokenize_prompt([Message("user", question)], tokenizer).tolist()
    spelt = [tokenizer(f"{ANSWER_STEM}{n}", add_special_tokens=False).input_ids for n in range(11)]
    log_p = next_token_log_p(model, asked + spelt[0][:-1])
    p = np.append(np.exp(log_p[[ids[-1] for ids in spelt[:10]]]), 0.0)
    if len(spelt[10]) == len(spelt[0]):
        p[10] = np.exp(log_p[spelt[10][-1]])
    else:
        zero_after_one = np.exp(next_token_log_p(model, asked + spelt[1])[spelt[10][-1]])
        p[10], p[1] = p[1] * zero_after_one, p[1] * (1 - zero_after_one)
    return float(p @ np.arange(11) / p.sum())


def ratings_of(
    directory: Path, tokenizer: Any, shape: tuple[int, int, int] | None = None, **how: Any
) -> np.ndarray:
    mesh = make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    if shape is not None:
        mesh = make_mesh(MeshSettings(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    asked = Asked.of(EXAMPLES, tokenizer, MAX_LENGTH)
    options: dict[str, Any] = {"batch_tokens": 4096} | how
    return judge(hf.load(directory, mesh=mesh), asked, **options)[0]


@pytest.fixture(scope="module")
def ratings(directory: Path, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    return ratings_of(directory, tokenizer)


def test_one_prefill_is_six_separate_passes(
    directory: Path, tokenizer: PreTrainedTokenizerBase, ratings: np.ndarray
) -> None:
    model = hf.load(directory)
    expected = [
        [
            rating_by_hand(model, tokenizer, judge_message(dimension, part, e.prompt, e.response))
            for dimension in DIMENSIONS
            for part in PARTS
        ]
        for e in EXAMPLES
    ]
    np.testing.assert_allclose(ratings, expected, rtol=1e-5)
    assert ratings.std() > 0.01  # they do differ, so that a mix-up would show
    np.testing.assert_allclose(quality(ratings), np.mean(expected, axis=1), rtol=1e-5)
    assert COLUMNS[:3] == ("clarity_prompt", "clarity_response", "completeness_prompt")


def test_mesh_and_batch_change_nothing(
    directory: Path, tokenizer: PreTrainedTokenizerBase, ratings: np.ndarray
) -> None:
    on_eight = ratings_of(directory, tokenizer, shape=(2, 2, 2), batch_tokens=2048)
    np.testing.assert_allclose(on_eight, ratings, rtol=1e-5)


def questions_of(tree: RatingTree) -> dict[str, list[int]]:
    """The texts that a tree stands for: what each last reading sees."""
    tokens, _, until = tree.tree
    ends = tree.read_positions[-len(COLUMNS) :]
    seen = [[int(t) for j, t in enumerate(tokens[: end + 1]) if end < until[j]] for end in ends]
    return dict(zip(COLUMNS, seen, strict=True))


def test_a_tree_holds_the_six_questions(tokenizer: PreTrainedTokenizerBase) -> None:
    ratings = RatingTokens.of(tokenizer)
    tree = rating_tree(EXAMPLES[0], tokenizer, ratings, MAX_LENGTH)
    one = tokenizer(f"{ANSWER_STEM}1", add_special_tokens=False).input_ids
    found = questions_of(tree)
    for dimension in DIMENSIONS:
        for part in PARTS:
            question = judge_message(dimension, part, EXAMPLES[0].prompt, EXAMPLES[0].response)
            asked = tokenize_prompt([Message("user", question)], tokenizer).tolist()
            column = found[f"{dimension}_{part}"]
            assert column == asked + (one if ratings.ten_second is not None else one[:-1])
    assert len(tree.tree.tokens_n) < 0.45 * sum(map(len, found.values()))


@pytest.mark.parametrize("max_length", [500, 300, 240])
def test_a_long_sample_is_shortened_and_the_question_is_not(directory: Path, max_length: int) -> None:
    tokenizer = load_tokenizer(directory)
    ratings = RatingTokens.of(tokenizer)
    long = sample("BEGIN " + "word " * 400 + "END", "First. " + "漢字 🦙 " * 300 + "Last.")
    found = questions_of(rating_tree(long, tokenizer, ratings, max_length))
    for part in PARTS:
        text = ""
        for dimension in DIMENSIONS:
            branch = found[f"{dimension}_{part}"]
            assert len(branch) <= max_length
            text = str(tokenizer.decode(branch))
            question = judge_message(dimension, part, "", "").split("### Question\n")[1]
            assert text.endswith(f"### Question\n{question}<|im_end|>\n<|im_start|>assistant\n{ANSWER_STEM}1")
            assert text.startswith("<|im_start|>user\nYou rate training data")
            assert "�" not in text
        # No more is lost than must be.
        assert max(len(found[f"{dimension}_{part}"]) for dimension in DIMENSIONS) > max_length - 20
        if max_length >= 300:
            assert "BEGIN" in text
            assert "END" in text
            assert part == "prompt" or ("First." in text and "Last." in text)


def test_shortening_takes_from_the_longer_text(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    long = sample("What is this about?", "word " * 400 + "END")
    for example in (long, sample(long.response, long.prompt)):
        tree = rating_tree(example, tokenizer, RatingTokens.of(tokenizer), 400)
        text = str(tokenizer.decode(questions_of(tree)["clarity_response"]))
        assert "What is this about?" in text
        assert " … " in text
        assert "END" in text


def test_a_question_that_does_not_fit_is_an_error(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    with pytest.raises(JudgeError, match=r"over model\.max_length=100; raise it"):
        rating_tree(EXAMPLES[-1], tokenizer, RatingTokens.of(tokenizer), 100)


def test_how_ratings_are_spelt(directory: Path) -> None:
    two = load_tokenizer(directory)
    digits = [two.convert_tokens_to_ids(str(n)) for n in range(10)]
    ratings = RatingTokens.of(two)
    assert list(ratings.first) == [*digits, digits[1]]
    assert ratings.ten_second == digits[0]
    assert two.decode(list(ratings.stem)) == ANSWER_STEM
    one = RatingTokens.of(one_ten_tokenizer())
    assert one.ten_second is None
    assert len(set(one.first)) == 11


def test_tokenizers_that_cannot_spell_ratings_are_refused() -> None:
    # A word is one token or unknown, and 3 is as unknown as 4.
    known = ["?", "Rating", ":", "0", "1", "2", "10"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    split_ten = tiny_tokenizer()
    split_ten.normalizer = normalizers.Replace("10", "1 0")  # three tokens
    for backend in (words, split_ten):
        with pytest.raises(JudgeError, match=r"set quality\.method=sample"):
            RatingTokens.of(wrapped(backend))


def test_a_samples_own_marks_are_not_filled_in() -> None:
    message = judge_message("clarity", "response", "Say {response} {prompt}", "It is {prompt}")
    assert "### Instruction\nSay {response} {prompt}\n" in message
    assert "### Response\nIt is {prompt}\n" in message


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_message_holds_both_texts_as_they_are(prompt: str, response: str) -> None:
    message = judge_message("factuality", "response", prompt, response)
    assert f"### Instruction\n{prompt}\n\n### Response\n{response}\n\n### Question\n" in message
    assert judge_message("factuality", "prompt", prompt, response) == judge_message(
        "factuality", "prompt", prompt, ""
    )


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        (" 9", 9),
        (" 10", 10),
        ("10.", 10),
        ("10.0", 10),
        (" 7.5", 7.5),
        ("**8**", 8),
        (" 8/10", 8),
        ("0", 0),
        ("I give 9 out of 10.", 9),
        ("It is good. Rating: 6", 6),
        ("Score: 3. No, wait. Score: 4", 4),
        ("The rating is 5.", 5),
        ("score = 10/10", 10),
        ("5\n\nThe response has 3 faults.", 5),
        # Nothing can be read, which is not a 0.
        ("On a scale of 0 to 10 I give 9", None),
        ("on a scale of 0-10, it is a 9", None),
        ("0 to 10, I would say 9", None),
        ("Score (0-10) nine", None),
        ("rating of 0 to 10: hard to say", None),
        ("", None),
        ("I cannot rate this.", None),
        ("11", None),
        ("100", None),
        ("10.5", None),
        ("95%", None),
        ("-3", None),
        ("In 2024 it was", None),
        ("8/100", None),
        # The number at the start is the rating; what follows explains.
        (" 7. For a rating of 10 it would need examples.", 7),
        (" 6\n\nA score of 9 would need more.", 6),
        ("**4** - rating: 10 is for perfect answers", 4),
        (" 6,5", 6.5),
        (" 8, because it is right", 8),
        ("The score is 7,5.", 7.5),
        (" 7.5/10", 7.5),
        (" 9 out of ten", 9),
        (" 8 points out of 10", 8),
        (" 10 von 10", 10),
        (" ８", 8),
        (" ٨", 8),
        (" 8分", 8),
        # Another scale.
        (" 3 out of 5", None),
        (" 4/5", None),
        (" 4 stars out of 5", None),
        (" 3 of 4. Rating: 8", None),
        (" 85/100, a rating of 9", None),
        (" 80 percent", None),
        (" 6½", None),
        ("9 percent", None),
        ("The rating is 4 out of 5.", None),
    ],
)
def test_parse_rating(text: str, rating: float | None) -> None:
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("<think>\nA score of 3? No.\n</think>\n\n8", 8),
        ("A score of 3? No.\n</think>\n\n8", 8),  # the template wrote the opening mark
        ("<think>A score of 3", None),
        ("<think></think>", None),
        (" 8", 8),
    ],
)
def test_a_rating_in_the_judges_reasoning_does_not_count(answer: str, rating: float | None) -> None:
    assert read_rating(answer) == rating


@given(st.text(max_size=60))
def test_a_rating_is_0_to_10_or_none(text: str) -> None:
    rating = parse_rating(text)
    assert rating is None or 0 <= rating <= 10
