"""The results in a Block: each is there whole or not at all, whoever is killed when.

Compare with the table, whose updates need a journal and an heir that repairs. Here nothing is to be repaired: a write
goes to a copy, which becomes the content by a single store at the end of the ``with``. Its price is that copy.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable

from .. import Block

__all__ = ["Gathered", "record_of"]

_COUNT = struct.Struct("<Q")
"""At the front: how many records there are. A record that was counted twice would show here."""

_RECORD = struct.Struct("<32sQ32s")
"""SHA-256 of the file's name, its size in bytes, SHA-256 of its content. All zeros: not there yet."""


def record_of(path: str, size: int, digest: bytes) -> bytes:
    """What the Block should hold of a file."""
    return _RECORD.pack(hashlib.sha256(os.fsencode(path)).digest(), size, digest)


class Gathered:
    """One record a file, and their number. Made by the parent and inherited by the workers."""

    def __init__(self, files: int) -> None:
        self._files = files
        self._block = Block(size=_COUNT.size + files * _RECORD.size)

    def add(self, index: int, record: bytes) -> None:
        """Put a file's record there. Again is as good as once: an item of the queue may be delivered twice."""
        first = _COUNT.size + index * _RECORD.size
        with self._block.write() as view:
            if not any(view[first : first + _RECORD.size]):
                view[first : first + _RECORD.size] = record
                _COUNT.pack_into(view, 0, _COUNT.unpack_from(view)[0] + 1)

    def is_complete(self) -> bool:
        """Whether all records are there. Takes no lock: nobody who was killed, or stopped, can be in the way."""
        with self._block.read() as view:
            return bool(_COUNT.unpack_from(view)[0] == self._files)

    def records(self) -> list[bytes]:
        """All of them, in the order of the files."""
        with self._block.read() as view:
            return [bytes(view[i : i + _RECORD.size]) for i in range(_COUNT.size, len(view), _RECORD.size)]

    def violations(self) -> list[str]:
        """Whether the count is that of the records, in words; empty if all is well."""
        with self._block.read() as view:
            count = _COUNT.unpack_from(view)[0]
        there = _how_many(self.records())
        return [] if count == there else [f"the Block holds {there} records and has counted {count}"]


def _how_many(records: Iterable[bytes]) -> int:
    return sum(any(record) for record in records)
