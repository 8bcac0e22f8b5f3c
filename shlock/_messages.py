"""What a client and its supervisor say to each other: JSON objects of bounded size, one a packet, over a Unix socket.

The socket has an abstract address, which the kernel gives to one process at a time and takes back when that one dies: there is
one supervisor for a domain, and never a stale file.  (Of a domain of the machine it is a path, since an abstract address is
anybody's; there a file lock does the same.)  Whoever connects is known by the kernel's word (``SO_PEERCRED``); nothing
that it says of itself is believed.  Descriptors travel beside a message.  Never pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from . import _machine

__all__ = ["MOST_BYTES", "MessageError", "address", "decode", "encode", "exchange", "peer", "receive", "send", "set_patience"]

MOST_BYTES: Final = 16384  # of one message
MOST_DESCRIPTORS: Final = 253  # beside one message, says the kernel; one that is not received is closed at once
SLICES: Final = 20  # of the time in which an answer must come
_TIMEVAL: Final = struct.Struct("ll")  # seconds, microseconds
_CREDENTIALS: Final = struct.Struct("iII")  # pid, uid, gid
_SO_PEERPIDFD: Final = 77  # Linux 6.5
# As plain numbers: to combine the flags of the socket module anew takes longer than to decode a message.
_TRUNCATED: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_QUIETLY: Final = int(socket.MSG_NOSIGNAL)
_CLOSED_ON_EXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_to_json: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class MessageError(ValueError):
    """What came is no message: too long, no JSON object, or not in UTF-8."""


def address(user: int, domain: str) -> str:
    """The address of the supervisor of a domain: abstract, or of the machine.  ``user`` is the one whom it serves."""
    if _machine.is_of_machine(domain):
        return _machine.socket_path(domain)
    return f"\0shlock/{user}/{hashlib.blake2b(domain.encode(), digest_size=16).hexdigest()}"


def encode(message: dict[str, Any]) -> bytes:
    data = _to_json(message).encode()
    if len(data) > MOST_BYTES:
        raise MessageError(f"a message of {len(data)} bytes is longer than {MOST_BYTES}")
    return data


def decode(data: bytes) -> dict[str, Any]:
    if len(data) > MOST_BYTES:
        raise MessageError(f"a message is longer than {MOST_BYTES} bytes")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"a message is no JSON: {error}") from None
    if not isinstance(message, dict):
        raise MessageError("a message must be a JSON object")
    return message


def send(connection: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send one message.  Blocks as the socket does; BrokenPipeError, ConnectionResetError if nobody listens any more."""
    if descriptors:
        socket.send_fds(connection, [encode(message)], list(descriptors), _QUIETLY)
    else:
        connection.send(encode(message), _QUIETLY)


def receive(connection: socket.socket, close: Callable[[int], None] = os.close) -> tuple[bytes, list[int]]:
    """One packet and the descriptors beside it, which the caller has to close.  Empty at the end of the connection.

    ``close`` is for the descriptors beside a packet that is refused with MessageError.
    """
    data, descriptors, flags, _ = socket.recv_fds(connection, MOST_BYTES + 1, MOST_DESCRIPTORS, _CLOSED_ON_EXEC)
    if flags & _TRUNCATED:
        for descriptor in descriptors:
            close(descriptor)
        raise MessageError("a message or its descriptors are too many for one packet")
    return data, list(descriptors)


def set_patience(connection: socket.socket, seconds: float | None) -> None:
    """How long ``exchange`` waits at most; None: for ever.  The kernel sees to it, at no cost to a call."""
    connection.settimeout(None)
    for option, share in ((socket.SO_SNDTIMEO, 1), (socket.SO_RCVTIMEO, SLICES)):
        microseconds = 0 if seconds is None else max(1, round(seconds / share * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))


def exchange(
    connection: socket.socket,
    message: dict[str, Any],
    descriptors: tuple[int, ...] = (),
    received: list[int] | None = None,
) -> dict[str, Any]:
    """Send a message and wait for the answer: see ``set_patience``.  ConnectionResetError at its end; TimeoutError.

    The descriptors beside the answer are added to ``received``, and closed if there is none.
    """
    try:
        send(connection, message, descriptors)
    except BlockingIOError:
        raise TimeoutError("the other end does not listen") from None
    data, beside = _receive_patiently(connection)
    if received is not None:
        received += beside
    else:
        for descriptor in beside:
            os.close(descriptor)
    if not data:
        raise ConnectionResetError("the other end has closed the connection")
    return decode(data)


def _receive_patiently(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Wait in slices: a machine that stood still for a while, as virtual ones do, cost the other end as much time as us."""
    for _ in range(SLICES):
        with contextlib.suppress(BlockingIOError):
            return receive(connection)
    raise TimeoutError("no answer")


def peer(connection: socket.socket) -> tuple[int, int, int]:
    """Process number, user and group of who made the connection, as the kernel says."""
    pid, uid, gid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid


def peer_pidfd(connection: socket.socket) -> int | None:
    """A descriptor of the process that made the connection; None if the kernel can't tell.  ProcessLookupError: it is gone."""
    try:
        descriptor: int = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise ProcessLookupError(error.errno, "the process that connected is gone") from None
        return None
    return descriptor
