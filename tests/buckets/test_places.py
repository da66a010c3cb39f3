"""URLs of buckets, and the folders of their copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from middo_jax.buckets.places import Place, shown, url_of, with_urls
from middo_jax.rundir import RunError


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("gs://bucket/runs/mine", "gs://bucket/runs/mine"),
        (Path("gs://bucket/runs/"), "gs://bucket/runs"),  # pathlib leaves one slash
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket//a///b/", "s3://bucket/a/b"),
    ],
)
def test_urls_of_buckets(text: str, url: str) -> None:
    place = Place.of(text)
    assert place is not None
    assert str(place) == url
    assert shown(place.work() / "report.html") == f"{url}/report.html"
    assert url_of(Path("/elsewhere/.cache/middo-jax/buckets/read") / place.scheme / place.bucket) == (
        f"{place.scheme}://{place.bucket}"
    )


@pytest.mark.parametrize(
    "text", ["runs", "/gs/bucket", "file:///a", "gs:///a", "http://a/b", "hf:name:train"]
)
def test_other_texts_are_none(text: str) -> None:
    assert Place.of(text) is None
    assert shown(text) == text


def test_messages_name_urls_instead_of_copies() -> None:
    read, work = Place("s3", "bucket", "a model").copy, Place("gs", "bucket", "runs/mine").work(2)
    other = "/elsewhere/buckets/read/s3/bucket"
    text = f"{read}/config.json: missing; {work} and {other}"
    assert with_urls(text) == f"s3://bucket/a model/config.json: missing; gs://bucket/runs/mine and {other}"


@pytest.mark.parametrize("text", ["s3://bucket/../a", "gs://bucket/a/./b", "s3://bucket/a\\b"])
def test_names_that_are_no_files_here_are_refused(text: str) -> None:
    with pytest.raises(RunError, match="cannot be a file here"):
        Place.of(text)
