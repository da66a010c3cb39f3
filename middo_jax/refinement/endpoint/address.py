"""A server's URL, and the secrets that must not leave it: into a message, a file or the cache."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import urllib.parse
from collections.abc import Iterable

from middo_jax.config import ConfigError

SECRET_CHARS = 16  # a shorter key is a dummy for a local server, and may be a word of a text
MASK = "***"


@dataclasses.dataclass(frozen=True)
class Address:
    """A URL taken apart.

    Attributes:
      url: without user, password, query and fragment.
      host: name or address, without the port.
      query: is sent with every request.
      headers: the user and the password, as HTTP sends them.
      secrets: parts of the URL that must not be shown.
    """

    url: str
    host: str
    query: dict[str, str]
    headers: dict[str, str]
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, url: str) -> Address:
        """Takes a URL apart.

        Raises:
          ConfigError: it cannot be taken apart; the message does not contain it.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            is_read = bool(parts.hostname) and (parts.port or 1) > 0 and not {"@", ";"} & set(parts.path)
        except ValueError:
            parts, is_read = urllib.parse.urlsplit(""), False
        if not is_read:
            raise ConfigError(
                "config: the URL of the refiner cannot be read: it needs a host and a path without ; and in "
                "a user or password the characters : / ? # @ are written as %3A %2F %3F %23 %40"
            )
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        headers, secrets = {}, [value for name, value in query.items() if name != "api-version"]
        if parts.username is not None:
            user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            basic = base64.b64encode(f"{user}:{password}".encode()).decode()
            headers["Authorization"] = f"Basic {basic}"
            # A token may be in the user's place. A short name may be a word of a message.
            secrets += [basic, password, *([user] if len(user) >= SECRET_CHARS else [])]
        return cls(
            shown(url), parts.hostname or "", query, headers, tuple(secret for secret in secrets if secret)
        )


def shown(url: str) -> str:
    """A URL for messages: without user, password, query and fragment."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Secrets:
    """Texts that must not be shown: replaced by *** where a server echoes them.

    A secret is found as it is, as a URL writes it, and as JSON may write it, where any character may be an
    escape: replies are parsed later, and the parsed text must not have the secret either.
    """

    def __init__(self, secrets: Iterable[str | None] = ()) -> None:
        found = {form for secret in secrets if secret for form in _forms(secret)}
        # The longest first: one may contain another.
        ordered = sorted(found, key=lambda form: (-len(form), form))
        self._all = [(len(form), re.compile("".join(map(_written, form)))) for form in ordered]

    def hidden(self, text: str) -> str:
        """A server's message without any secret."""
        for _, secret in self._all:
            text = secret.sub(MASK, text)
        return text

    def hidden_in_answer(self, text: str) -> str:
        """A text of an answer without the secrets; without those only that are too long to be words."""
        for length, secret in self._all:
            if length >= SECRET_CHARS:
                text = secret.sub(MASK, text)
        return text


def _forms(secret: str) -> set[str]:
    return {secret, urllib.parse.quote(secret, safe="")}


def _written(character: str) -> str:
    r"""A pattern of a character as itself, behind a backslash or two, or as \u0041."""
    if not character.isascii():
        return f"(?:{re.escape(character)}|{re.escape(json.dumps(character)[1:-1])})"
    return rf"(?:\\{{0,2}}{re.escape(character)}|\\{{1,2}}u(?i:{ord(character):04x}))"
