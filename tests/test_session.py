"""Laws of a session: an example is tokenized once per stage, with others, not to see whether it can be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.loop_fixture import settings
from transformers import PreTrainedTokenizerBase

from middo_jax import stages
from middo_jax.config import load
from middo_jax.data.example import Example
from middo_jax.data.tokenize import refusal, tokenize
from middo_jax.progress import Silent
from middo_jax.rundir import RoundDir
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
            self._tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in e.messages], tokenize=False
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
    kept, heldout, _ = prepare(session)
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


def test_what_is_refused_is_what_cannot_be_tokenized(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "Hello"}]},
    ]
    config = load(None, settings(tmp_path, data__path=tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    session = Session(config, Silent())
    kept, heldout, rejections = prepare(session)
    assert [e.prompt for e in (*kept, *heldout)] == ["Hi"]
    assert [r.reason for r in rejections] == ["its text holds the model's control token <|im_end|>"]
    [example] = [*kept, *heldout]
    session.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    reason = refusal(example, session.tokenizer)
    assert reason is not None
    with pytest.raises(ValueError, match="does not show the text of turn 1") as raised:
        tokenize(example, session.tokenizer, 64)
    assert str(raised.value) == reason
