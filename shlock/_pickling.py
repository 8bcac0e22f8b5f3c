"""Objects as messages: pickle protocol 5, large buffers beside the pickle and not inside it.

What pickles while a process is being spawned, pickles as multiprocessing pickles it (its ForkingPickler).  A pickler is kept
and used again: making one costs more than pickling a small object.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

from . import _process
from .errors import PickleRefused

__all__ = ["BYTES", "OBJECT_IS_BYTES", "OUT_OF_BAND", "PICKLE", "bytes_of_message", "dumps", "loads", "refusing"]

# Tags of messages.
BYTES: Final = 0  # as they were given to send_bytes
PICKLE: Final = 1
OBJECT_IS_BYTES: Final = 2  # a bytes object, not pickled
OUT_OF_BAND: Final = 3  # a pickle, and its buffers behind it

SMALLEST_BUFFER: Final = 4096  # bytes; smaller ones stay in the pickle
ALIGNMENT: Final = 16

Part = tuple[int, Any]
"""A place in a message, and the bytes that come there."""


class _Pickler:
    """A pickler and where it writes."""

    def __init__(self) -> None:
        self.process = _process.current
        self.file = io.BytesIO()
        self.buffers: list[memoryview] = []
        self.pickler = ForkingPickler(self.file, 5, True, self._keep)

    def _keep(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not in one piece
            return True
        if raw.nbytes < SMALLEST_BUFFER:
            return True
        self.buffers.append(raw)
        return False

    def dump(self, obj: Any) -> bytes:
        self.pickler.dump(obj)
        body = self.file.getvalue()
        self.file.seek(0)
        self.file.truncate()
        self.pickler.clear_memo()
        return body


_spare: list[_Pickler] = []


def dumps(obj: Any) -> tuple[int, Any]:
    """The tag of an object's message and its bytes; with OUT_OF_BAND its parts instead (see ``layout``)."""
    if obj.__class__ is bytes:
        return OBJECT_IS_BYTES, obj
    try:
        pickler = _spare.pop()
    except IndexError:
        pickler = _Pickler()
    body = pickler.dump(obj)  # one that was interrupted is not used again
    buffers = pickler.buffers
    if not buffers:
        _spare.append(pickler)
        return PICKLE, body
    return OUT_OF_BAND, [body, *buffers]


def layout(pieces: Sequence[Any]) -> tuple[int, list[Part]]:
    """Length of a message of several pieces, and where each of them goes; the first part is the table that says so."""
    lengths = [len(piece) for piece in pieces]
    end = 8 * (1 + len(pieces))
    parts: list[Part] = [(0, struct.pack(f"<{1 + len(pieces)}Q", len(pieces), *lengths))]
    for piece, length in zip(pieces, lengths, strict=True):
        end = -(-end // ALIGNMENT) * ALIGNMENT
        parts.append((end, piece))
        end += length
    return end, parts


def _pieces(body: Any) -> list[memoryview]:
    """The pieces of a message.  ValueError if it is none."""
    view = memoryview(body)
    try:
        (count,) = struct.unpack_from("<Q", view)
        lengths = struct.unpack_from(f"<{count}Q", view, 8) if count <= len(view) // 8 else ()
    except struct.error as error:
        raise ValueError(f"a message with buffers was overwritten: {error}") from None
    end = 8 * (1 + len(lengths))
    pieces = []
    for length in lengths:
        first = -(-end // ALIGNMENT) * ALIGNMENT
        end = first + length
        if end > len(view):
            break
        pieces.append(view[first:end])
    if not count or len(pieces) != count:
        raise ValueError("a message with buffers was overwritten: its pieces are longer than it is")
    return pieces


def loads(tag: int, body: Any) -> Any:
    """The object of a message."""
    if tag == OBJECT_IS_BYTES:
        return body
    if tag == OUT_OF_BAND:
        first, *buffers = _pieces(body)
        return pickle.loads(first, buffers=buffers)
    return pickle.loads(body)


def bytes_of_message(tag: int, body: Any, loads: Callable[[int, Any], Any] = loads) -> bytes:
    """What ``recv_bytes`` gives for a message that ``send`` sent: its pickle, as multiprocessing's connections do."""
    if tag in (BYTES, PICKLE):
        return bytes(body)
    return pickle.dumps(loads(tag, body), 5)


def refusing(queue: str) -> Callable[[int, Any], Any]:
    """``loads`` for messages of whom nobody has to trust: it gives bytes objects.  PickleRefused for all else."""

    def refuse(tag: int, body: Any) -> bytes:
        if tag == OBJECT_IS_BYTES:
            return bytes(body)
        raise PickleRefused(queue, bytes(body))

    return refuse
