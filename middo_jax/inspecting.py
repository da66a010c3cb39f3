"""`middo inspect`: faults of a dataset; with a model, lengths, packing and the first sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from middo_jax.config import load
from middo_jax.data.mixing import read_configured
from middo_jax.data.tokenize import tokenize_all, truncate
from middo_jax.data.user_rows import UserRows
from middo_jax.linting import Found, lint, read_benchmarks, read_limits, render
from middo_jax.models.loading import tokenizer_directory
from middo_jax.progress import for_stderr
from middo_jax.report.inspection import inspect_rows, inspect_tokens
from middo_jax.report.terminal import printable, render_inspection
from middo_jax.session import Session, read_data


class Inspected(NamedTuple):
    """What was found.

    Attributes:
      facts: rows, reasons, lengths and `checks`, as `--json` prints them.
      checks: the faults with their shares and limits.
      said: what was taken of each source, and with which of several splits rows were compared.
    """

    facts: dict[str, Any]
    checks: Sequence[Found]
    said: Sequence[str]

    @property
    def is_over(self) -> bool:
        """Whether a fault has a larger share than allowed."""
        return any(check.is_over for check in self.checks)

    def text(self, color: bool) -> str:
        """The facts and checks for a terminal."""
        return f"{render_inspection(self.facts, color=color)}\n" + printable("\n".join(render(self.checks)))


def inspect(
    settings: Sequence[str | Mapping[str, str]],
    model: str | None = None,
    against: Sequence[str] = (),
    most: Sequence[str] = (),
    strict: bool = False,
) -> Inspected:
    """Looks at the rows of a dataset, and with a model at their tokens.

    Args:
      settings: with `data.path` or `data.sources`; `data`, `model`, `scoring` and `seed` count.
      model: whose tokenizer and template are used; None looks at rows only.
      against: benchmarks that no row may quote; all splits of each are read.
      most: NAME=SHARE, the largest share of rows with a fault.
      strict: whether any fault is too much.

    Raises:
      ConfigError, DataError: the message says what is wrong.
    """
    base = str(tokenizer_directory(model)) if model else "none"
    config = load(None, [*settings, {"model.path": base}])
    session = Session(config, for_stderr()) if model else None
    rows = read_configured(config.data, config.seed) if session is None else read_data(session)
    benchmarks, limits = read_benchmarks(against), read_limits(most)
    checks = lint(rows.examples, rows.places, rows.rejections, limits, strict, benchmarks, rows.repairs)
    facts = inspect_rows(rows.examples, rows.rejections, rows.repairs)
    several = benchmarks.items() if len(benchmarks) > 1 else ()
    compared = [f"--against {name}: {len(texts):,} texts" for name, texts in several]
    if session is not None:
        facts |= _of_tokens(session, rows)
    return Inspected(
        facts | {"checks": [check.to_json() for check in checks]}, checks, [*rows.said, *compared]
    )


def _of_tokens(session: Session, rows: UserRows) -> dict[str, Any]:
    """What a model's tokenizer makes of the rows."""
    max_length = session.config.model.max_length
    whole = tokenize_all(rows.examples, session.tokenizer)
    cut = [truncate(tokenized, max_length) for tokenized in whole]
    session.tell_of_no_end(len(cut), sum(t.truncated for t in cut), session.learns_end(cut))
    return inspect_tokens(
        whole,
        cut,
        session.tokenizer,
        max_length=max_length,
        pack_length=max_length,
        scoring=session.plan_losses(cut).facts(),
    )
