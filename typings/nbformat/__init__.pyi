"""Not checked: optional, so that types come out alike with and without it."""

from typing import Any

def __getattr__(name: str) -> Any: ...
