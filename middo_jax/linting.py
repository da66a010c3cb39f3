"""`middo inspect` as a linter: faults of a dataset that no format shows, counted. No model is needed.

lint(examples, places, limits={"refusals": 0.01}, benchmarks=read_benchmarks(["gsm8k_test.jsonl"]))
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from middo_jax.data.every_split import every_split
from middo_jax.data.example import Example
from middo_jax.data.files import Rejection
from middo_jax.data.formats import DataError
from middo_jax.data.repair import EMPTY, EMPTY_BESIDE
from middo_jax.data.tools import dumped
from middo_jax.data.user_rows import DUPLICATE, Repair
from middo_jax.refinement.acceptance.language import languages
from middo_jax.refinement.acceptance.overlap import jaccard, shingles, words_of
from middo_jax.refinement.acceptance.refusal import is_refusal

SHOWN = 3  # places per check
NEAR = 0.8  # share of common word triples from which two prompts are near-duplicates
_SKETCH = 4  # smallest hashes of a prompt's triples: near-duplicates share one of them almost surely
_GRAM = 13  # words of a text that is taken for a quotation of a benchmark, as in the report on GPT-3
_SHORTEST = 6  # words of a benchmark's text that is looked for whole

NO_BENCHMARKS: Mapping[str, Sequence[str]] = {}
_MISSING = frozenset(
    {"nan", "null", "none", "n/a", "na", "undefined", "nil", "[]", "{}", '""', "<na>", "#n/a"}
)
# Reasons of refusals for a text that is empty, null or not there.
_IS_EMPTY = re.compile(r"^empty |is empty$|missing or null$|, not null$")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")
_SECRETS: Mapping[str, re.Pattern[str]] = {
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,})"),
    "an OpenAI or Anthropic key": re.compile(r"\bsk-(?:ant-|proj-|svcacct-)?[A-Za-z0-9_-]{20,}"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a JSON web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "an e-mail address": re.compile(
        r"\b[\w.+-]+@(?!(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|test|invalid)\b)[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b",
        re.IGNORECASE,
    ),
}


class Check(NamedTuple):
    """What a check looks for, in words, and its limit with `--strict`: a share of the rows, or None."""

    text: str
    strict: float | None


CHECKS: Mapping[str, Check] = {
    "empty": Check("rows with an empty or missing text: refused, or without that turn", 0),
    "unusable": Check("rows refused for another reason", 0),
    "missing": Check('a text such as "nan" or "null" in the place of a value', 0),
    "mojibake": Check("UTF-8 that was read as another encoding, or characters that were lost", 0),
    "refusals": Check("answers that refuse", 0),
    "near_duplicates": Check("rows that are an earlier row, or whose prompt is nearly that of one", 0),
    "languages": Check("rows in another language than most", None),
    "secrets": Check("keys, tokens, e-mail addresses", 0),
    "benchmarks": Check("rows that quote a file of --against", 0),
}


class Found(NamedTuple):
    """The result of one check.

    Attributes:
      check: its name in `CHECKS`.
      n: rows with the fault.
      share: of all rows that were read.
      limit: the largest allowed share; None: any.
      first: place and detail of the first ones.
    """

    check: str
    n: int
    share: float
    limit: float | None
    first: list[tuple[str, str]]

    @property
    def is_over(self) -> bool:
        """Whether the share is over the limit."""
        return self.limit is not None and self.share > self.limit

    def to_json(self) -> dict[str, Any]:
        """JSON values for `--json`."""
        first = [{"where": where, "detail": detail} for where, detail in self.first]
        return {**self._asdict(), "first": first, "over": self.is_over}


def lint(
    examples: Sequence[Example],
    places: Sequence[str],
    rejections: Sequence[Rejection] = (),
    limits: Mapping[str, float] | None = None,
    strict: bool = False,
    benchmarks: Mapping[str, Sequence[str]] = NO_BENCHMARKS,
    repairs: Sequence[Repair] = (),
) -> list[Found]:
    """The results of all checks, in the order of `CHECKS`; `benchmarks` only if there are any.

    Args:
      examples: the usable rows.
      places: where each is, such as file:line.
      rejections: the other rows.
      limits: the largest allowed share of rows by check; over `strict`.
      strict: whether the limits of `CHECKS` hold.
      benchmarks: texts that no row may quote, by split, see `read_benchmarks`.
      repairs: what was repaired of the usable rows.
    """
    if unknown := sorted((limits or {}).keys() - CHECKS.keys()):
        raise ValueError(f"there is no check {unknown[0]!r}; there are: {', '.join(CHECKS)}")
    if "benchmarks" in (limits or {}) and not benchmarks:
        raise ValueError("--max benchmarks: name what is compared, as in --against gsm8k_test.jsonl")
    rows = list(zip(places, examples, strict=True))
    faults: dict[str, list[tuple[str, str]]] = {
        "empty": [
            *((r.where, r.reason) for r in rejections if _IS_EMPTY.search(r.reason)),
            # A row may have both.
            *{r.where: (r.where, r.reason) for r in repairs if r.reason in (EMPTY, EMPTY_BESIDE)}.values(),
        ],
        "unusable": [
            (r.where, r.reason)
            for r in rejections
            if not (_IS_EMPTY.search(r.reason) or r.reason.startswith(DUPLICATE))
        ],
        "missing": _each(rows, _missing),
        "mojibake": _each(rows, _mojibake),
        "refusals": _each(rows, _refuses),
        "near_duplicates": [
            *((r.where, r.reason) for r in rejections if r.reason.startswith(DUPLICATE)),
            *_near_duplicates(rows),
        ],
        "languages": list(_other_languages(rows)),
        "secrets": _each(rows, _secret),
    }
    if benchmarks:
        faults["benchmarks"] = _each(rows, _Quotations(benchmarks).find)
    total = max(1, len(examples) + len(rejections))
    given = {name: check.strict for name, check in CHECKS.items() if strict} | dict(limits or {})
    return [
        Found(name, len(found), len(found) / total, given.get(name), found[:SHOWN])
        for name, found in faults.items()
    ]


def read_limits(options: Sequence[str]) -> dict[str, float]:
    """The limits of `--max NAME=SHARE`.

    Raises:
      ValueError: the form is another one, or the share is not in 0..1.
    """
    limits = {}
    for option in options:
        name, _, share = option.partition("=")
        try:
            limits[name] = float(share)
        except ValueError as e:
            raise ValueError(f"--max {option}: write NAME=SHARE, as in --max refusals=0.01") from e
        if not 0 <= limits[name] <= 1:
            raise ValueError(f"--max {option}: the share must be in 0..1")
    return limits


def read_benchmarks(paths: Sequence[str]) -> dict[str, list[str]]:
    """All texts of benchmarks, of any columns, by the names of their splits and files, see `every_split`.

    Raises:
      DataError: a file, or a row of it, cannot be read, or a path has no text.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        here = dict[str, list[str]]()
        for name, rows in every_split(path):
            texts = here.setdefault(name, [])
            for item in rows:
                if isinstance(item, Rejection):
                    raise DataError(
                        f"{item.where}: {item.reason}; rows are not compared with half of a benchmark"
                    )
                texts += _texts(item[1])
        if not any(words_of(text) for texts in here.values() for text in texts):
            raise DataError(f"{path}: no text there to compare with")
        found |= here
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _each(
    rows: Sequence[tuple[str, Example]], check: Callable[[Example], str | None]
) -> list[tuple[str, str]]:
    return [(where, found) for where, example in rows if (found := check(example)) is not None]


def _missing(example: Example) -> str | None:
    for message in example.messages:
        if message.content.strip().lower() in _MISSING:
            return f"the {message.role}'s text is {message.content.strip()!r}"
    for name, text in example.prompt_columns.items():  # such as an empty `input` that became "nan"
        if text.strip().lower() in _MISSING:
            return f"column {name!r} is {text.strip()!r}"
    return None


def _refuses(example: Example) -> str | None:
    """Any answer that is learnt counts, not only the last one."""
    for n, message in enumerate(example.messages, 1):
        if message.role == "assistant" and message.learnt and is_refusal(message.text):
            return f"the answer in turn {n} refuses"
    return None


def _mojibake(example: Example) -> str | None:
    for message in example.messages:
        if "\ufffd" in message.content:
            return "a character was lost (U+FFFD)"
        for run in _NOT_ASCII.findall(message.content):
            for encoding in ("cp1252", "latin-1"):
                try:
                    meant = run.encode(encoding).decode("utf-8")
                except UnicodeError:
                    continue
                return f"{run!r} was {meant!r}"
    return None


def _secret(example: Example) -> str | None:
    """The kind of the first secret; never the secret itself, since outputs are kept and shared."""
    turns = (*example.messages, *example.behind)
    text = "\n".join(f"{message.text}\n{message.fields}" for message in turns)
    # Outputs keep the user's other columns too.
    text = f"{text}\n{example.tools}\n{dumped(dict(example.extra))}\n{example.user_id}"
    return next((kind for kind, pattern in _SECRETS.items() if pattern.search(text)), None)


def _other_languages(rows: Sequence[tuple[str, Example]]) -> Iterator[tuple[str, str]]:
    codes = [(where, languages(example.response) or languages(example.prompt)) for where, example in rows]
    # By rank, not by the likeliest alone: a doubtful text, such as a key, has a dozen languages.
    counts: defaultdict[str, float] = defaultdict(float)
    for _, found in codes:
        for rank, code in enumerate(found, 1):
            counts[code] += 1 / rank
    if not counts:
        return
    main = max(counts, key=lambda code: counts[code])
    for where, found in codes:
        if found and main not in found:
            yield where, f"{found[0]}, most rows are {main}"


def _near_duplicates(rows: Sequence[tuple[str, Example]]) -> Iterator[tuple[str, str]]:
    """Compares prompts that share one of their smallest hashes, so that time is proportional to the rows."""
    seen: defaultdict[int, list[int]] = defaultdict(list)
    known = []
    for number, (where, example) in enumerate(rows):
        own = shingles(example.prompt)
        known.append(own)
        hashes = sorted(zlib.crc32(" ".join(triple).encode("utf-8", "replace")) for triple in own)[:_SKETCH]
        others = dict.fromkeys(other for value in hashes for other in seen[value])
        near = ((jaccard(own, known[other]), other) for other in others)
        best = max(near, default=(0.0, 0))
        if best[0] >= NEAR:
            yield where, f"{best[0]:.2f} like {rows[best[1]][0]}"
            continue  # the earlier row stands for both
        for value in hashes:
            seen[value].append(number)


class _Quotations:
    """Finds rows with 13 consecutive words of a benchmark, or with a short text of it as a whole."""

    def __init__(self, benchmarks: Mapping[str, Sequence[str]]) -> None:
        self._names = list(benchmarks)
        # Number of words -> texts of that length -> the splits that have them, one bit each.
        self._splits: defaultdict[int, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        for number, texts in enumerate(benchmarks.values()):
            for words in map(words_of, texts):
                size = min(len(words), _GRAM)
                for gram in _grams(words, size) if size >= _SHORTEST else ():
                    self._splits[size][gram] |= 1 << number

    def find(self, example: Example) -> str | None:
        first, splits = "", 0
        for message in example.messages:
            words = words_of(message.content)
            for size, known in self._splits.items():
                for gram in _grams(words, size):
                    if here := known.get(gram):
                        first, splits = first or gram, splits | here
        if not splits:
            return None
        names = [name for number, name in enumerate(self._names) if splits >> number & 1]
        return f"{first!r}" + (f" of {', '.join(names)}" if len(self._names) > 1 else "")


def _grams(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def render(found: Sequence[Found]) -> list[str]:
    """The results as lines for a terminal."""
    lines = ["", "checks (share of all rows, limit):"]
    for result in found:
        limit = "no limit" if result.limit is None else f"limit {result.limit:.2%}"
        mark = "FAIL" if result.is_over else "    "
        lines.append(f"{mark} {result.check:<16} {result.n:>7,}  {result.share:7.2%}  {limit}")
        lines += [f"       {where}: {detail}" for where, detail in result.first]
    return lines
