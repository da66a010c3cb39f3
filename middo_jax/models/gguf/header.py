"""Checks the header of a GGUF file before the gguf package reads it.

The package trusts the header's counts: an array of 10^12 numbers in a file of 100 bytes makes it fill the
memory. Here every count is compared with the bytes that are left.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by type
_MOST_FIELDS = 65_536
_MOST_TENSORS = 65_536
_MOST_ELEMENTS = 4_000_000  # of all arrays; a vocabulary of 262,144 has about 800,000
_MOST_NAME_BYTES = 4096
_MOST_AXES = 4
_MOST_NUMBERS = 1 << 48  # of a tensor


def require_sane(path: Path) -> None:
    """Walks through a file's header.

    Raises:
      ValueError: a count, a length or a type cannot be true; says which.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._order, self._elements = data, 0, "<", 0

    def header(self) -> None:
        """Reads all fields and the descriptions of all tensors."""
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if self._number("I") & 0xFFFF == 0:  # the file's bytes are in the other order
            self._order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        if fields > _MOST_FIELDS or tensors > _MOST_TENSORS:
            raise ValueError(f"its header claims {fields:,} fields and {tensors:,} tensors")
        for _ in range(fields):
            name = self._string("the name of a field", _MOST_NAME_BYTES)
            self._value(self._number("I"), name)
        for _ in range(tensors):
            self._tensor()

    def _tensor(self) -> None:
        name = self._string("the name of a tensor", _MOST_NAME_BYTES)
        axes = self._number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"tensor {name} claims {axes:,} axes")
        numbers = 1
        for _ in range(axes):
            numbers *= self._number("Q")
        if not 0 < numbers <= _MOST_NUMBERS:
            raise ValueError(f"tensor {name} claims {numbers:,} numbers")
        self._number("I")
        if self._number("Q") > len(self._data):
            raise ValueError(f"tensor {name} is past the end of the file")

    def _value(self, kind: int, name: str) -> None:
        if kind == _STRING:
            self._string(f"field {name}", len(self._data))
        elif kind == _ARRAY:
            self._array(name)
        elif kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind], f"field {name}")
        else:
            raise ValueError(f"field {name} has the unknown type {kind}")

    def _array(self, name: str) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise ValueError(
                f"field {name} claims {count:,} elements; all arrays may have {_MOST_ELEMENTS:,}"
            )
        if kind == _ARRAY:
            raise ValueError(f"field {name} is an array of arrays")
        if kind in _SCALAR_BYTES:
            self._skip(count * _SCALAR_BYTES[kind], f"field {name}")
        else:
            for _ in range(count):
                self._value(kind, name)

    def _string(self, what: str, most: int) -> str:
        length = self._number("Q")
        if length > most:
            raise ValueError(f"{what} claims {length:,} bytes")
        start = self._at
        self._skip(length, what)
        return self._data[start : min(self._at, start + 100)].decode("utf-8", "replace")

    def _number(self, form: str) -> int:
        size = struct.calcsize(form)
        return struct.unpack(self._order + form, self._take(size))[0]

    def _take(self, size: int) -> bytes:
        start = self._at
        self._skip(size, "its header")
        return self._data[start : self._at]

    def _skip(self, size: int, what: str) -> None:
        if size > len(self._data) - self._at:
            raise ValueError(f"{what} goes past the end of the file, which is truncated or no GGUF file")
        self._at += size
