"""Objects below a place in a bucket: list, read, write and remove them, through s3fs or gcsfs.

An object is replaced as a whole or not at all. Credentials come from where the clouds' own tools look for
them. Servers other than the clouds' are named by $AWS_ENDPOINT_URL and $STORAGE_EMULATOR_HOST.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from middo_jax.buckets.places import Place, refuse_unsafe
from middo_jax.rundir import RunError
from middo_jax.rundir.files import full_disk_named

_RETRIES = {"max_attempts": 8, "mode": "standard"}
_SILENCE = 60  # seconds after which a server that sends nothing is given up
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_CREDENTIALS = {
    "gs": "`gcloud auth application-default login`, or a key's file in $GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "$AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or $AWS_PROFILE",
}


class BucketError(RunError):
    """A bucket cannot be used; the message says which, and what to do."""


class StoredObject(NamedTuple):
    """An object of a listing.

    Attributes:
      size: bytes.
      version: what differs if the content does: S3's ETag, Google's generation.
      modified: when it was written, in seconds since the epoch by the server's clock.
    """

    size: int
    version: str
    modified: float


class Store:
    """The objects below one place. Names are relative to it, with / between folders."""

    def __init__(self, place: Place) -> None:
        """Raises BucketError if the package for this kind of bucket is not installed."""
        self.place = place
        self._root = f"{place.bucket}/{place.path}".rstrip("/")
        with _explained(place):
            self._files = _file_system(place.scheme)

    def list(self) -> dict[str, StoredObject]:
        """All objects below the place by name; "" is the name of an object at the place itself.

        Raises:
          BucketError: the bucket cannot be listed.
          RunError: the name of an object cannot be that of a file here.
        """
        with _explained(self.place):
            found = self._files.find(self._root, detail=True)
            if not found and not self._files.exists(self.place.bucket):
                raise FileNotFoundError(self.place.bucket)
        objects = {}
        for key, info in found.items():
            name = key.removeprefix(self._root).removeprefix("/")
            if info["type"] == "directory" or name.endswith("/"):
                continue  # a marker that consoles create for an empty folder
            refuse_unsafe(name, self.place)
            objects[name] = _stored(info)
        return objects

    def info(self, name: str) -> StoredObject | None:
        """One object; None if there is none."""
        with _explained(self.place):
            try:
                info = self._files.info(self._key(name))
            except FileNotFoundError:
                return None
        return None if info["type"] == "directory" else _stored(info)

    def get(self, name: str, to: Path) -> None:
        """Copies an object to a file, which appears as a whole."""
        temporary = to.with_name(f".{to.name}.bucket-{os.getpid()}")
        with full_disk_named(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                with _explained(self.place):
                    self._files.get_file(self._key(name), str(temporary))
                os.replace(temporary, to)
            finally:
                temporary.unlink(missing_ok=True)

    def put(self, file: Path, name: str) -> str:
        """Writes an object from a file, which must not change meanwhile; returns the object's version."""
        with _explained(self.place):
            self._files.put_file(str(file), self._key(name))
        return self._version(name)

    def put_text(self, text: str, name: str) -> str:
        """Writes a small object; returns its version."""
        with _explained(self.place):
            self._files.pipe_file(self._key(name), text.encode())
        return self._version(name)

    def create(self, text: str, name: str) -> bool:
        """Writes a small object unless there is one; returns whether it did. The server decides."""
        with _explained(self.place):
            try:
                self._files.pipe_file(self._key(name), text.encode(), mode="create")
            except OSError as error:
                if _is_refused_create(error):
                    return False
                raise
        return True

    def read(self, name: str) -> str | None:
        """The text of a small object; None if there is none."""
        with _explained(self.place):
            try:
                return self._files.cat_file(self._key(name)).decode(errors="replace")
            except FileNotFoundError:
                return None

    def remove(self, name: str) -> None:
        """Removes an object; one that is gone is no error."""
        with _explained(self.place), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _version(self, name: str) -> str:
        found = self.info(name)
        if found is None:
            raise BucketError(f"{self.place}/{name} was written, and the bucket does not have it")
        return found.version


@functools.cache
def _file_system(scheme: str) -> Any:
    """The one client per process and kind of bucket. Nothing is cached: other hosts write, too."""
    if scheme == "s3":
        import s3fs

        config = {"retries": _RETRIES, "read_timeout": _SILENCE}
        return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)
    # Not `gcsfs.GCSFileSystem`: it asks another service of Google's which kind of bucket it is.
    import aiohttp
    from gcsfs.core import GCSFileSystem

    token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
    # Without one, it waits for ever. A limit of the whole request would cut off large files.
    patience = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    return GCSFileSystem(
        use_listings_cache=False, skip_instance_cache=True, token=token, requests_timeout=patience
    )


def _stored(info: dict[str, Any]) -> StoredObject:
    version = info.get("generation") or info.get("ETag") or info.get("etag")
    when = info.get("LastModified") or info.get("updated")
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    return StoredObject(int(info["size"]), str(version), 0.0 if when is None else when.timestamp())


def _is_refused_create(error: OSError) -> bool:
    """Whether an object could not be created because there is one, or is being written, of that name."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code in (
        "PreconditionFailed",
        "ConditionalRequestConflict",
        "412",
        "409",
    )


@contextlib.contextmanager
def _explained(place: Place) -> Iterator[None]:
    """Turns the errors of two packages and what they are made of into BucketError."""
    try:
        yield
    except (BucketError, KeyboardInterrupt):
        raise
    except ImportError as error:
        extra = _EXTRAS[place.scheme]
        raise BucketError(
            f"{place}: buckets of {place.scheme}:// need the extra {extra}: pip install 'middo-jax[{extra}]'"
        ) from error
    except FileNotFoundError as error:
        if error.filename is not None:  # a file on this machine
            raise
        raise BucketError(
            f"{place}: there is no bucket {place.bucket!r}, or not what is looked for there ({error})"
        ) from error
    except Exception as error:
        raise BucketError(f"{place}: {_reason(place, error)}") from error


def _reason(place: Place, error: Exception) -> str:
    kind, text = type(error).__name__, str(error).partition("\n")[0]
    code = str(getattr(error, "code", ""))
    if "Credential" in kind or code == "401" or "Anonymous caller" in str(error):
        return f"no credentials for it: set {_CREDENTIALS[place.scheme]} ({kind}: {text})"
    if isinstance(error, PermissionError) or text.startswith("Forbidden"):
        return f"the present credentials may not do this ({kind}: {str(error)[:300]})"
    if isinstance(error, ConnectionError | TimeoutError) or "Connect" in kind or "Timeout" in kind:
        return f"its server cannot be reached ({kind}: {text})"
    return f"{kind}: {text}"
