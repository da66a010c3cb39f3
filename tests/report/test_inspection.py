"""Laws of `middo inspect`: what it counts is what the model will see."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import write_tiny_model
from support.tiny_sentencepiece import tiny_sentencepiece
from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from middo_jax import cli
from middo_jax.config import load
from middo_jax.data.example import Example, Message
from middo_jax.data.sources import Rejection, write
from middo_jax.data.templates import set_template
from middo_jax.data.tokenize import load_tokenizer, tokenize, tokenize_all, truncate
from middo_jax.parallel.mesh import MESH_AXES
from middo_jax.passes import losses
from middo_jax.passes.loss_plan import plan_losses
from middo_jax.progress import Silent
from middo_jax.report.inspection import inspect_rows, inspect_tokens, length_histogram, sample_parts
from middo_jax.report.terminal import printable, render_inspection, render_trace
from middo_jax.session import Session

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


def inspected(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, pack_length: int = 1024
) -> dict[str, Any]:
    whole = tokenize_all(examples, tokenizer)
    cut = [truncate(t, max_length) for t in whole]
    scoring = plan_losses(cut, True, 1, 512).facts()
    sizes = {"max_length": max_length, "pack_length": pack_length}
    return inspect_tokens(whole, cut, tokenizer, scoring=scoring, **sizes)


@pytest.mark.parametrize("max_length", [48, 1024])
def test_counts(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    facts = inspected(EXAMPLES, tokenizer, max_length)["tokens"]
    whole = sorted(len(tokenize(e, tokenizer, 1 << 20)) for e in EXAMPLES)
    tokenized = [tokenize(e, tokenizer, max_length) for e in EXAMPLES]
    left = sum(map(len, tokenized))
    assert (facts["quantiles"]["min"], facts["quantiles"]["max"]) == (whole[0], whole[-1])
    assert facts["quantiles"]["median"] in (whole[4], whole[5])
    assert (facts["total"], facts["tokens_cut"]) == (left, sum(whole) - left)
    assert facts["truncated"] == sum(t.truncated for t in tokenized)
    assert (facts["truncated"] > 0) == (max_length == 48)
    assert facts["target_share"] == pytest.approx(sum(t.is_target_n.sum() for t in tokenized) / left)
    assert facts["training"]["fill"] == pytest.approx(left / (1024 * facts["training"]["rows"]))


@pytest.mark.parametrize("turns", ["alike", "as they are"])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2), (8, 1, 1)], ids=str)
def test_what_is_said_of_scoring_is_what_runs(
    shape: tuple[int, int, int],
    turns: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The mesh's divisor and the prefix that rows share: shapes and fill are those of the pass itself."""
    model = write_tiny_model(tmp_path / "model")
    system = Message("system", "You answer in one short sentence.")
    examples = [
        Example((system, *e.messages)) if turns == "alike" else e
        for e in (Example((Message("user", f"{n}?"), Message("assistant", "one " * n))) for n in range(2, 90))
    ]
    data = tmp_path / "data.jsonl"
    write(examples, data, "messages")
    settings = [f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True)]
    settings += ["model.dtype=float32", "model.max_length=256", "scoring.batch_tokens=4096"]
    command = ["middo", "inspect", str(data), "--model", str(model), "--json", *settings]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    session = Session(load(None, [f"model.path={model}", f"data.path={data}", *settings]), Silent())
    compiled: list[tuple[int, int, int]] = []
    lower = losses.score_batch.lower

    class Watched:
        def lower(self, graphdef: Any, params: Any, batch: losses.LossInputs[Any], **static: Any) -> Any:
            rows, length = batch.tokens_bt.shape
            compiled.append((rows, length, static["longest"]))
            return lower(graphdef, params, batch, **static)

    monkeypatch.setattr(losses, "score_batch", Watched())
    _, took = losses.score_examples(
        session.load_model(model), session.tokenize(examples), batch_tokens=4096, chunk=64
    )
    scoring = facts["tokens"]["scoring"]
    assert scoring["shapes"] == [list(shape) for shape in compiled]
    assert scoring["fill"] == pytest.approx(took.fill)
    assert (scoring["prefix"] > 0) == (turns == "alike")


@given(lengths=st.lists(st.integers(1, 100_000), min_size=1, max_size=50), max_length=st.integers(1, 200_000))
def test_histogram(lengths: list[int], max_length: int) -> None:
    bars = length_histogram(lengths, max_length)
    assert sum(bar["n"] for bar in bars) == len(lengths)
    assert bars[0]["from"] <= min(lengths)
    assert bars[-1]["to"] >= max(lengths)
    assert [bar["from"] for bar in bars[1:]] == [bar["to"] + 1 for bar in bars[:-1]]
    for bar in bars:
        assert bar["n"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)
        assert not bar["from"] <= max_length < bar["to"]
    assert len(bars) <= 20


def test_the_first_sample_shows_what_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = inspected(EXAMPLES, tokenizer, 1024)["sample"]
    assert sample == {
        "id": EXAMPLES[0].id,
        "truncated": False,
        "parts": [
            {"kind": "template", "text": "<|im_start|>user\n"},
            {"kind": "prompt", "text": "Hi"},
            {"kind": "template", "text": "<|im_end|>\n<|im_start|>assistant\n"},
            {"kind": "target", "text": "Héllo 🦙<|im_end|>"},
            {"kind": "template", "text": "\n<|im_start|>user\n"},
            {"kind": "prompt", "text": "?"},
            {"kind": "template", "text": "<|im_end|>\n<|im_start|>assistant\n"},
            {"kind": "target", "text": "!<|im_end|>"},
            {"kind": "template", "text": "\n"},
        ],
    }


def test_parts_keep_the_spaces_of_a_sentencepiece() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_sentencepiece("first"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    set_template(tokenizer, "mistral")
    parts = sample_parts(tokenize(EXAMPLES[0], tokenizer, 1024), tokenizer)
    assert "".join(part["text"] for part in parts) == (
        "<s>[INST] Hi[/INST] Héllo 🦙</s>[INST] ?[/INST] !</s>"
    )
    assert [part["text"] for part in parts if part["kind"] == "target"] == [" Héllo 🦙</s>", " !</s>"]


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        ("{{ '<s>' }}%s", None),
        ("%s", "begins every text with <s>, the template does not"),
        ("{{ '<s><s>' }}%s", "begins with <s> twice"),
        (
            "{{ '<s>' }}{%% for m in messages %%}{{ m['content'] + '\n' }}{%% endfor %%}",
            "writes no control token",
        ),
    ],
)
def test_odd_templates_are_warned_of(template: str, warning: str | None) -> None:
    backend = tiny_sentencepiece()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    usual = "{% for m in messages %}{{ m['content'] + '</s>\n' }}{% endfor %}"
    tokenizer.chat_template = template % usual if "%s" in template else template.replace("%%", "%")
    warnings = inspected(EXAMPLES, tokenizer, 1024)["warnings"]
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_what_is_printed(tokenizer: PreTrainedTokenizerBase) -> None:
    rejections = [Rejection(where=f"data.jsonl:{n}", reason="no response", row=None) for n in range(7)]
    facts = inspect_rows(EXAMPLES, rejections)
    assert facts["n"] == len(EXAMPLES)
    assert len(facts["rejected"]) == 7
    text = render_inspection(facts | inspected(EXAMPLES, tokenizer, 48, 48))
    assert facts["reasons"] == [{"n": 7, "reason": "no response", "where": "data.jsonl:0"}]
    counted = "  7 of 7: no response (data.jsonl:0)\n"
    assert text.startswith(f"{len(EXAMPLES)} rows can be used, 7 cannot\n{counted}")
    assert "[[Héllo 🦙<|im_end|>]]" in text
    assert "cut at model.max_length 48: " in text
    assert re.search(r"packed for scoring: [\d.]+% full, \d compiled shapes? \(\d+ x \d+", text)
    assert re.search(r"packed for training: [\d.]+% full, \d+ rows of 48\n", text)
    bars = re.findall(r"^ *([\d,]+)-[\d,]+  (█*) *(\d+)(  cut)?$", text, re.MULTILINE)
    assert sum(int(n) for _, _, n, _ in bars) == len(EXAMPLES)
    for start, bar, n, cut in bars:
        assert (len(bar) > 0) == (int(n) > 0)
        assert (cut != "") == (int(start) > 48 and int(n) > 0)
    assert "tokens per conversation" not in render_inspection(facts)


def test_colours_are_ours_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """On a terminal a dataset's text neither steers nor is read as markup, and is shown to the letter."""
    nasty = "[bold red]x[/] \x1b[31m \x1b]0;title\x07 [link=a]b[/link] [/]\r :smile:"
    example = Example((Message("user", nasty), Message("assistant", f"{nasty}\n\nend")))
    facts = inspect_rows([example], []) | inspected([example], tokenizer, 1024)
    shown = render_inspection(facts, color=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", plain)
    assert plain.endswith("".join(printable(part["text"]) for part in facts["sample"]["parts"]))
    learnt = "".join(re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", shown, re.DOTALL))
    assert learnt == f"what is learnt{printable(nasty)}end<|im_end|>"  # line ends carry no colour


def test_nothing_steers_the_terminal() -> None:
    assert printable("a\nb 漢") == "a\nb 漢"
    for steering in ("\x1b[2J", "\r", "\x07", "\u202e", "\x9b31m"):
        assert printable(f"x{steering}")[1] == "\N{REPLACEMENT CHARACTER}"
    sample = {
        "round": 0, "id": "s", "op": "seed", "axis": None, "parent_ids": [], "accepted": True,
        "prompt": "\x1b]0;title\x07", "response": "r",
    }  # fmt: skip
    assert "\x1b" not in render_trace([sample])
