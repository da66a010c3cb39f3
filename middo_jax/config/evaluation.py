"""The settings of evaluation on benchmarks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from middo_jax.config.base import Affects, Settings

BENCHMARKS = Affects("benchmarks")


class EvaluateSettings(Settings):
    """Benchmarks after each round and at the end, by lm-eval (extra `eval`), and the contrast margin.

    See docs/evaluation.md.
    """

    contrast: Annotated[bool, Affects("contrast")] = Field(
        default=False,
        description="Measure the contrast margin beside the held-out loss: how much less likely each model "
        "finds held-out answers with a planted fault than the right ones.",
    )
    tasks: Annotated[tuple[str, ...], BENCHMARKS] = Field(
        default=(),
        description="Names of lm-eval's tasks, groups or tags, such as [arc_easy, hellaswag], and of the "
        "offline ones: gsm8k_local, ifeval_local, humaneval_local, mbpp_local. Empty: none.",
    )
    include_path: Annotated[str | None, BENCHMARKS] = Field(
        default=None, description="Folder with further tasks of lm-eval's form."
    )
    local_data: Annotated[str | None, BENCHMARKS] = Field(
        default=None,
        description="Folder with the rows of the offline tasks: gsm8k.jsonl or gsm8k_test.jsonl, and so on.",
    )
    limit: Annotated[PositiveInt | None, BENCHMARKS] = Field(
        default=None, description="Take only the first rows of each task."
    )
    num_fewshot: Annotated[NonNegativeInt | None, BENCHMARKS] = Field(
        default=None, description="Examples before each question. None: as each task says."
    )
    chat_template: Annotated[bool, BENCHMARKS] = Field(
        default=False, description="Whether a question is a chat turn, by the model's chat template."
    )
    max_length: Annotated[PositiveInt, BENCHMARKS] = Field(
        default=2048,
        description="Tokens of context and answer together, at most the model's positions. A longer context "
        "is cut on its left.",
    )
    allow_code: Annotated[bool, BENCHMARKS] = Field(
        default=False,
        description="Whether code that the model wrote may be run, as humaneval_local and mbpp_local need.",
    )
