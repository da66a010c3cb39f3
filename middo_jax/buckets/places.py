"""URLs of places in buckets, gs://BUCKET/PATH and s3://BUCKET/PATH, and the folders of their copies here."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from middo_jax.rundir import RunError

# pathlib turns gs://bucket into gs:/bucket.
_URL = re.compile(r"(gs|s3):/{1,2}([^/]+)(?:/(.*))?", re.DOTALL)
_KINDS = r"runs(?:-\d+)?|read"  # of copies: to work in, of a further process, only to read
_COPY = re.compile(rf".*/middo-jax/buckets/(?:{_KINDS})/(gs|s3)/(.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder or an object in a bucket.

    Attributes:
      scheme: gs or s3.
      bucket: its name.
      path: the names of the folders and the object, joined by /; "" for the whole bucket.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def of(cls, text: str | os.PathLike[str]) -> Place | None:
        """The place that a URL names; None if the text is no URL of a bucket.

        Raises:
          RunError: a name within the path cannot be that of a file here.
        """
        match = _URL.fullmatch(os.fspath(text))
        if match is None:
            return None
        names = [name for name in (match[3] or "").split("/") if name]
        refuse_unsafe("/".join(names), f"{match[1]}://{match[2]}")
        return cls(match[1], match[2], "/".join(names))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.path}" if self.path else "")

    def __truediv__(self, name: str) -> Place:
        return dataclasses.replace(self, path=f"{self.path}/{name}" if self.path else name)

    @property
    def parent(self) -> Place:
        """The folder that contains this place."""
        return dataclasses.replace(self, path=self.path.rpartition("/")[0])

    @property
    def name(self) -> str:
        """The last name of the path; "" for the whole bucket."""
        return self.path.rpartition("/")[2]

    def work(self, process: int | None = None) -> Path:
        """The folder on this machine that a command which writes there works in.

        Several processes of a job may run on one machine: `process` is the index of one that does not decide.
        """
        kind = "runs" if process is None else f"runs-{process}"
        return _copies() / kind / self.scheme / self.bucket / self.path

    @property
    def copy(self) -> Path:
        """The copy on this machine of what is only read from there."""
        return _copies() / "read" / self.scheme / self.bucket / self.path


def refuse_unsafe(name: str, where: object) -> None:
    """Raises RunError if the name of an object would be a file outside of its folder, or none at all."""
    parts = name.split("/")
    if name and (any(part in ("", ".", "..") for part in parts) or "\0" in name or "\\" in name):
        raise RunError(f"{where}: the object {name!r} cannot be a file here: rename it or move it elsewhere")


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL of which a path of this or another machine is the copy; None if it is none."""
    match = _COPY.fullmatch(os.fspath(path))
    return None if match is None else f"{match[1]}://{match[2]}"


def shown(path: str | os.PathLike[str]) -> str:
    """A path for people: the URL, if it is the copy of something in a bucket."""
    return url_of(path) or os.fspath(path)


def with_urls(text: str) -> str:
    """A message for people, in which the paths of copies on this machine are URLs."""
    return re.sub(rf"{re.escape(str(_copies()))}/(?:{_KINDS})/(gs|s3)/", r"\1://", text)


def record_of(folder: Path) -> Path:
    """The file with the record of a copy. It is not in the folder, which commands want to find empty."""
    digest = hashlib.sha256(str(folder).encode()).hexdigest()
    return _copies() / "records" / f"{digest[:24]}.json"


def _copies() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    return cache / "middo-jax" / "buckets"
