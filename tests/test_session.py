"""Laws of a session: an example is tokenized once per stage, with others, not to see whether it can be."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import fake_refiner, settings
from support.said import Said
from transformers import PreTrainedTokenizerBase

import middo_jax as middo
from middo_jax import stages
from middo_jax.config import load
from middo_jax.data.example import Example, Message
from middo_jax.data.tokenize import load_tokenizer, refusal, tokenize
from middo_jax.loop import run_loop
from middo_jax.progress import Silent
from middo_jax.rundir import RoundDir, read_jsonl
from middo_jax.session import Session, prepare, write_dataset


class Tokenized:
    """What a tokenizer is asked for, in calls of one text or many."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tokenizer = session.tokenizer
        self._calls: list[list[str]] = []
        call = PreTrainedTokenizerBase.__call__

        def counted(tokenizer: Any, text: Any = None, *arguments: Any, **how: Any) -> Any:
            self._calls.append([text] if isinstance(text, str) else list(text))
            return call(tokenizer, text, *arguments, **how)

        monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)

    def times(self, examples: list[Example]) -> tuple[set[int], int]:
        """({how often each was tokenized}, calls that held any) since this was last asked."""
        texts = {
            str(
                self._tokenizer.apply_chat_template(
                    [{"role": m.role, "content": m.content} for m in e.messages], tokenize=False
                )
            )
            for e in examples
        }
        counted = Counter(text for texts_of_call in self._calls for text in texts_of_call)
        calls = sum(bool(texts & set(texts_of_call)) for texts_of_call in self._calls)
        self._calls = []
        return {counted[text] for text in texts}, calls


def test_each_example_is_tokenized_once_per_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"data__eval_fraction": 0.25, "train__eval_every": 1, "train__num_epochs": 2}
    session = Session(load(None, settings(tmp_path, **more)), Silent())
    directory, tokenized = RoundDir(tmp_path / "round"), Tokenized(session, monkeypatch)
    kept, heldout, *_ = prepare(session)
    assert tokenized.times([*kept, *heldout]) == ({0}, 0)
    write_dataset(directory, kept)
    stages.train_stage(session, directory, session.base, heldout)
    assert tokenized.times([*kept, *heldout]) == ({1}, 2)
    stages.score_stage(session, directory, directory.checkpoint, session.base, ("complexity", "diversity"))
    assert tokenized.times(kept) == ({1}, 1)
    held_out = stages.HeldOut(session, heldout)
    models = (session.load_model(path) for path in (session.base, directory.checkpoint))
    losses = [held_out.loss(model).loss for model in models]
    assert losses[0] != losses[1]
    assert tokenized.times(heldout) == ({1}, 1)


class PerStage(Silent):
    """Counts the conversations that are rendered and tokenized, stage by stage as a run names them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokenized: dict[str, Counter[str]] = {}
        self.rendered: dict[str, Counter[str]] = {}
        self._stage = "checks"
        call, render = PreTrainedTokenizerBase.__call__, PreTrainedTokenizerBase.apply_chat_template

        def counted(tokenizer: Any, text: Any = None, *arguments: Any, **how: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            self.tokenized.setdefault(self._stage, Counter()).update(texts)
            return call(tokenizer, text, *arguments, **how)

        def shown(tokenizer: Any, messages: Any, *arguments: Any, **how: Any) -> Any:
            text = render(tokenizer, messages, *arguments, **how)
            assert isinstance(text, str)
            self.rendered.setdefault(self._stage, Counter()).update([text])
            return text

        monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
        monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", shown)

    def say(self, text: str) -> None:
        if text.startswith("["):
            self._stage = text.partition("] ")[2]

    def times(self, stage: str, texts: Iterable[str]) -> tuple[set[int], set[int]]:
        """({how often each was tokenized in a stage}, {how often each was rendered})."""
        tokenized, rendered = self.tokenized.get(stage, Counter()), self.rendered.get(stage, Counter())
        texts = list(texts)
        assert texts
        return {tokenized[text] for text in texts}, {rendered[text] for text in texts}


def as_rendered(rows: Iterable[dict[str, Any]], model: Path) -> list[str]:
    """Rows of a dataset.jsonl as the tiny model's template shows them."""
    template = load_tokenizer(model)
    return [
        str(
            template.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in row["messages"]], tokenize=False
            )
        )
        for row in rows
    ]


def test_a_run_tokenizes_each_conversation_once_per_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"data__limit": 12, "refine__accept": "measured", "train__eval_every": 1}
    with fake_refiner() as (url, _):
        config = load(None, settings(tmp_path, url, **more))
        counted = PerStage(monkeypatch)
        run = run_loop(config, counted)
        monkeypatch.undo()
    model, before = tmp_path / "model", read_jsonl(run.round(0).dataset)
    kept, heldout = as_rendered(before, model), as_rendered(read_jsonl(run.heldout), model)
    # Reading renders each row, to see whether it can be; the checks tokenize for the first training.
    assert counted.times("checks", kept) == ({1}, {2})
    assert counted.times("round_00 train", kept) == ({0}, {0})
    assert counted.times("round_00 train", heldout) == ({1}, {1})
    assert counted.times("round_00 score", kept) == ({1}, {1})
    assert counted.times("final evaluate", heldout) == ({1}, {1})
    assert counted.times("final train", heldout) == ({1}, {1})
    assert counted.times("final train", as_rendered(read_jsonl(run.final.dataset), model)) == ({1}, {1})
    children = [
        text
        for text in counted.rendered["round_00 refine"]
        if "It is for counting up to" in text and text.endswith("<|im_end|>\n")
    ]
    assert children
    assert {counted.tokenized["round_00 refine"][text] for text in children} == {1}


def test_train_and_score_tokenize_each_conversation_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(tmp_path)  # makes model and data
    small = {"model.max_length": 512, "data.eval_fraction": 0.25, "data.limit": 12}
    small |= {"train.batch_size": 8, "train.eval_every": 1}
    counted = PerStage(monkeypatch)
    out, model = tmp_path / "trained", tmp_path / "model"
    trained = middo.train(tmp_path / "data.json", model, out, settings=small)
    assert trained.heldout is not None
    texts = {text for text, n in counted.tokenized["checks"].items() if " sides." in text}
    assert len(texts) == 12
    assert counted.times("checks", texts) == ({1}, {2})  # rendered once more to see whether it can be
    counted.tokenized.clear()
    counted.rendered.clear()
    middo.score(
        tmp_path / "data.json", model, trained.checkpoint, ("diversity", "complexity"), settings=small
    )
    assert counted.times("checks", texts & set(counted.tokenized["checks"])) == ({1}, {2})


def test_what_was_tokenized_is_dropped_after_the_stage(tmp_path: Path) -> None:
    session = Session(load(None, settings(tmp_path)), Silent())
    example = Example((Message("user", "Hi"), Message("assistant", "Hello")))
    twin = dataclasses.replace(example, id="twin")
    with session.stage():
        with session.stage():
            [first] = session.tokenize([example])
        [again, other] = session.tokenize([example, twin])  # the inner block has not dropped it
    assert again is first
    assert (other.id, other.tokens_n is first.tokens_n) == ("twin", True)
    assert not session._kept.tokenized
    assert session.tokenize([example])[0] is not first


def test_what_is_refused_is_what_cannot_be_tokenized(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "Hello"}]},
    ]
    config = load(None, settings(tmp_path, data__path=tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    session = Session(config, Silent())
    kept, heldout, rejections, *_ = prepare(session)
    assert [e.prompt for e in (*kept, *heldout)] == ["Hi"]
    assert [r.reason for r in rejections] == ["its text contains the model's control token <|im_end|>"]
    [example] = [*kept, *heldout]
    session.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    reason = refusal(example, session.tokenizer)
    assert reason is not None
    with pytest.raises(ValueError, match="does not show the text of turn 1") as raised:
        tokenize(example, session.tokenizer, 64)
    assert str(raised.value) == reason


def test_sources_repairs_and_a_heldout_dataset_of_ones_own(tmp_path: Path) -> None:
    a = [{"prompt": f"Name {n}.", "completion": "Yes.", "id": f"a{n}"} for n in range(4)]
    a.append({"prompt": "Name <|im_end|>.", "completion": "No.", "id": "a4"})  # the count is of usable rows
    turns = [("user", "Name 9."), ("user", "Please."), ("assistant", "Yes."), ("user", "And?")]
    b = [{"messages": [{"role": role, "content": text} for role, text in turns], "id": "b0"}]
    for rows in (a, b):
        for n, row in enumerate(rows):
            row |= {"place": n, "author": f"{row['id']}"}
    held = [{"prompt": f"Name {text}.", "completion": "No."} for text in ("1", "77")]
    held.append({"prompt": "Name 78.", "completion": " "})
    for name, rows in (("a", a), ("b", b), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = settings(tmp_path)
    said = Said()
    config = load(
        None,
        [
            *given,
            {
                "data.sources": [
                    {"path": str(tmp_path / "a.jsonl"), "count": 4},
                    {"path": str(tmp_path / "b.jsonl")},
                ],
                "data.eval_path": str(tmp_path / "held.jsonl"),
                "data.source_column": "author",
            },
        ],
    )
    kept, heldout, rejections, repairs, *_, id_columns = prepare(Session(config, said))
    assert id_columns == ["id", "place"]
    assert [e.user_id for e in kept] == ["a0", "a2", "a3", "b0"]
    assert kept[-1].prompt == "Name 9.\n\nPlease."
    assert [e.prompt for e in heldout] == ["Name 1.", "Name 77."]
    assert [(r.where, r.reason) for r in rejections] == [
        (f"{tmp_path / 'a.jsonl'}:5, id a4", "its text contains the model's control token <|im_end|>"),
        (f"{tmp_path / 'a.jsonl'}:2, id a1", "its prompt is held out (data.eval_path)"),
        (f"{tmp_path / 'held.jsonl'}:3", "empty response"),
    ]
    assert len(repairs) == 2
    assert "1 row repaired (data.strict=true refuses such rows)" in said.lines
    assert f"{tmp_path / 'a.jsonl'}: 4 of 5 rows taken" in said.lines


def test_held_out_rows_have_the_ids_of_the_column_that_the_others_have(tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {n}.", "completion": "Yes.", "uid": f"a{n}", "id": n} for n in range(6)]
    held = [{**rows[0], "prompt": "Name 77."}, {"prompt": "Name 78.", "completion": "No.", "id": 7}]
    for name, of in (("rows", rows), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    data = {"data.path": str(tmp_path / "rows.jsonl"), "data.eval_path": str(tmp_path / "held.jsonl")}
    config = load(None, [*settings(tmp_path), {**data, "data.id_column": "uid"}])
    kept, heldout, *_ = prepare(Session(config, Said()))
    assert [e.user_id for e in kept] == [f"a{n}" for n in range(6)]
    assert [(e.user_id, dict(e.extra)) for e in heldout] == [("a0", {"id": 0}), (None, {"id": 7})]
