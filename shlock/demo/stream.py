"""The files' contents on their way from the reader to the workers: a Channel for each worker's place.

A worker asks for a file, and the reader answers with its content in pieces. They are not copied on the way: the reader reads
them from the file into the shared memory, and the worker hashes them there. Either may be killed at any instant:

    killed after                 the channel holds               and
    S1 worker has asked          pieces that nobody waits for    its replacement passes over them: they bear another ticket
    S2 reader sent some pieces   the request, only looked at     the next reader sends them all again, from offset 0 on
    S3 reader sent all pieces    the request, only looked at     the same; the worker, which has them, passes over the others
"""

from __future__ import annotations

import enum
import hashlib
import os
import struct

from .. import Channel
from .folder import digest_of_failure, failure_of

__all__ = ["Stream"]

_TICKET = struct.Struct("<QQ")
"""At the front of a request, and of each piece that answers it: number of the worker, and of the file."""

_PIECE = struct.Struct("<QQQQ")
"""In front of a piece's bytes: the ticket, the offset in the file, the kind."""

_PIECE_BYTES = 2**16
_PIECES_AHEAD = 8
"""How far the reader may be ahead of a worker."""


class _Kind(enum.IntEnum):
    DATA = 0
    END = 1
    FAILED = 2
    """The file cannot be read; the bytes are the name of the error."""


class Stream:
    """One worker's place, and the reader, at the two ends of a Channel. Made by the parent and inherited by both."""

    def __init__(self) -> None:
        self._reader = Channel(size=_PIECES_AHEAD * (_PIECE.size + _PIECE_BYTES), privileged=True)
        self._worker = self._reader.other_end()

    def serve(self) -> None:
        """Answer requests for ever; in the reader."""
        while True:
            with self._reader.peek() as request:  # it is taken away when it is answered, and not before
                ticket = _TICKET.unpack_from(request)
                path = os.fsdecode(bytes(request[_TICKET.size :]))
                self._answer(ticket, path)

    def _answer(self, ticket: tuple[int, ...], path: str) -> None:
        try:
            with open(path, "rb", buffering=0) as file:
                offset, kind = 0, _Kind.DATA
                while kind is _Kind.DATA:
                    room = self._reader.reserve(_PIECE.size + _PIECE_BYTES)
                    with room as view:  # sent when the block ends; nothing, if we die in it
                        length = file.readinto(view[_PIECE.size :])
                        kind = _Kind.DATA if length == _PIECE_BYTES else _Kind.END  # only its end reads short
                        _PIECE.pack_into(view, 0, *ticket, offset, kind)
                        room.truncate(_PIECE.size + length)
                    offset += length
        except OSError as error:
            self._reader.send_bytes(_PIECE.pack(*ticket, 0, _Kind.FAILED) + failure_of(error))

    def digest_of(self, path: str, number: int, index: int) -> tuple[int, bytes]:
        """As ``folder.digest_of``, of what the reader sends; in worker ``number``, once for each file."""
        ticket = (number, index)
        self._worker.send_bytes(_TICKET.pack(*ticket) + os.fsencode(path))
        size, content = 0, hashlib.sha256()
        while True:
            with self._worker.peek() as view:
                *answered, offset, kind = _PIECE.unpack_from(view)
                if tuple(answered) != ticket:
                    continue  # S1, S3
                if offset == 0:  # the first piece, or S2
                    size, content = 0, hashlib.sha256()
                if offset != size:
                    raise ValueError(f"{path!r}: a piece from byte {size} on should come, and one from {offset} on came")
                content.update(view[_PIECE.size :])
                size += len(view) - _PIECE.size
                if kind == _Kind.END:
                    return size, content.digest()
                if kind == _Kind.FAILED:
                    return digest_of_failure(bytes(view[_PIECE.size :]))
