"""Laws of IFD: the loss with the prompt over the loss without it, of the same tokens."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_model import write_tiny_model

from middo_jax.config import MeshSettings
from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import load_tokenizer, response_header, tokenize
from middo_jax.models import hf
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes.losses import score_examples
from middo_jax.signals.ifd import ifd, mean_by_example, responses_alone
from middo_jax.signals.table import SCHEMA, Measured, read_scores, write_scores

CONVERSATIONS = [
    Example((Message("user", "What is the capital of France?"), Message("assistant", "Paris, of course."))),
    Example((Message("user", "List 3 reasons."), Message("assistant", "One. Two. Three, in order."))),
    Example(
        (
            Message("system", "Answer in simple words."),
            Message("user", "Who wrote it?"),
            Message("assistant", "A cat."),
            Message("user", "And the response?"),
            Message("assistant", "It was the same cat, who wanted to see the sea."),
        )
    ),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (None, "<|im_start|>assistant\n"),
        ("chatml", "<|im_start|>assistant\n"),
        ("default", "Assistant:"),
    ],
)
def test_the_header_is_the_templates_own(directory: Path, template: str | None, header: str) -> None:
    tokenizer = load_tokenizer(directory, template)
    assert tokenizer.decode(response_header(tokenizer)) == header


def test_the_start_token_is_kept(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "with_start.jinja"
    text = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    file.write_text(text + "{% if add_generation_prompt %}[assistant]{% endif %}")
    tokenizer = load_tokenizer(directory, str(file))
    assert tokenizer.decode(response_header(tokenizer)) == f"{tokenizer.bos_token}[assistant]"


def test_responses_alone_by_hand(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    header = response_header(tokenizer)
    for example in CONVERSATIONS:
        tokenized = tokenize(example, tokenizer, 512)
        answers = [m.content for m in example.messages if m.role == "assistant"]
        alone = responses_alone(tokenized, header)
        assert [tokenizer.decode(a.tokens_n) for a in alone] == [
            f"<|im_start|>assistant\n{answer}<|im_end|>" for answer in answers
        ]
        targets = np.concatenate([a.tokens_n[a.is_target_n] for a in alone])
        np.testing.assert_array_equal(targets, tokenized.tokens_n[tokenized.is_target_n])
        assert not any(a.in_prompt_n.any() or a.is_target_n[: len(header)].any() for a in alone)
    # Nothing is learnt: there is no response.
    cut = tokenize(CONVERSATIONS[0], tokenizer, 512)
    cut.is_target_n[:] = False
    assert responses_alone(cut, header) == []


def test_means_by_example() -> None:
    losses, counts = np.asarray([1.0, 2.0, 4.0, np.nan], np.float32), np.asarray([1, 3, 1, 0])
    found = mean_by_example([1, 0, 2, 1], losses, counts)
    np.testing.assert_allclose(found, [1, np.nan, (3 * 2 + 4) / 4, np.nan])
    np.testing.assert_allclose(ifd(np.array([1, 2, np.nan]), np.array([2, 0, 1])), [0.5, np.inf, np.nan])


@pytest.mark.parity
def test_it_is_what_transformers_says(directory: Path) -> None:
    """Both losses from whole logits of conversations and responses one by one."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    mesh = make_mesh(MeshSettings(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    model = hf.load(directory, mesh=mesh)
    tokenized = [tokenize(e, tokenizer, 512) for e in CONVERSATIONS]
    alone = [responses_alone(t, response_header(tokenizer)) for t in tokenized]

    def nlls(text: str, answer: str) -> list[float]:
        """Of the answer and its end of turn, where it stands last in the text."""
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        start = text.rindex(answer)
        prefix = len(tokenizer(text[:start], add_special_tokens=False).input_ids)
        count = len(tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids)
        with torch.no_grad():
            log_p = torch.log_softmax(theirs(ids).logits[0], dim=-1)
        return [-float(log_p[t - 1, ids[0, t]]) for t in range(prefix, prefix + count)]

    def score(examples: list) -> tuple[np.ndarray, np.ndarray]:
        scores, _ = score_examples(model, examples, batch_tokens=1024, chunk=128)
        return scores.loss_n, scores.n_targets_n

    with_prompt, _ = score(tokenized)
    without = mean_by_example([len(a) for a in alone], *score([r for a in alone for r in a]))
    for i, example in enumerate(CONVERSATIONS):
        text = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in example.messages], tokenize=False
        )
        assert isinstance(text, str)
        answers = [m.content for m in example.messages if m.role == "assistant"]
        given = [x for a in answers for x in nlls(text[: text.index(a) + len(a)] + "<|im_end|>", a)]
        blind = [x for a in answers for x in nlls(f"<|im_start|>assistant\n{a}<|im_end|>", a)]
        np.testing.assert_allclose(with_prompt[i], np.mean(given), rtol=1e-4)
        np.testing.assert_allclose(without[i], np.mean(blind), rtol=1e-4)
        expected = np.mean(given) / np.mean(blind)
        np.testing.assert_allclose(ifd(with_prompt, without)[i], expected, rtol=2e-4)


def test_the_column_and_tables_without_it(tmp_path: Path) -> None:
    n = np.ones(3, np.int32), np.zeros(3, bool)
    loss, alone = np.array([1.0, 2, 3]), np.array([2, 1, np.nan])
    table = Measured(["a", "b", "c"], *n, loss_post=loss, loss_unconditional=alone).to_table()
    assert table["ifd"].to_pylist() == [0.5, 2.0, None]
    assert table["loss_unconditional"].to_pylist() == [2.0, 1.0, None]
    assert table["error"].to_pylist()[:2] == [None, None]
    assert "ifd is not finite" in table["error"].to_pylist()[2]
    older = Measured(["a", "b", "c"], *n, loss_post=loss).to_table()
    assert older["ifd"].null_count == older["prompt_hash"].null_count == 3
    write_scores(tmp_path / "older.parquet", older.drop_columns(["ifd", "loss_unconditional", "prompt_hash"]))
    assert read_scores(tmp_path / "older.parquet").equals(older)
    assert read_scores(tmp_path / "older.parquet").schema == SCHEMA
