"""A semaphore that lies in a segment, for parking spots that several users share.

A named semaphore, as ``posix_ipc`` has them, is a file in /dev/shm.  Who may wait on it or post it may also truncate it, and
then everybody else who has it mapped is killed by SIGBUS.  Among processes of one user that is no news; among several it must
not be.  So where a segment is sealed against truncation, its semaphores lie inside.

Whoever can write the segment can overwrite them.  The C library does not expect that: its ``sem_post`` aborts the process, or
waits for ever, when it finds in a ``sem_t`` what it did not write.  So this is a futex, of which only the number of tokens is
in memory: the worst that comes of it is a wake-up too many or too few, which the parking place expects of every semaphore.

    tokens  the low half of the first word
    post    one more, by compare-exchange; then wake one
    wait    take one if there is one; else sleep if there is none, which the kernel tests and begins in one step; then try again
"""

from __future__ import annotations

import ctypes
import math
import platform
from typing import Final

from ._atomic import Words

__all__ = ["SegmentSemaphore"]

_syscall: Final = ctypes.CDLL(None).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [
    ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint
]  # fmt: skip
_FUTEX: Final = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 98)
_WAIT, _WAKE = 0, 1
MOST_TOKENS: Final = 1 << 16
TOKENS: Final = (1 << 32) - 1
MOST_TRIES: Final = 1000  # somebody may overwrite it all the time


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SegmentSemaphore:
    """The semaphore at a word of a writable segment.  It keeps the mapping alive."""

    __slots__ = ("_address", "_place", "_words")

    def __init__(self, words: Words, place: int) -> None:
        words.pointer(place)  # IndexError if it is not inside, or not writable
        self._words = words
        self._place = place
        self._address = ctypes.c_void_p(words.address + place * 8)  # the processors that we know are little-endian

    def clear(self) -> None:
        """Make it a semaphore of value 0, whatever was there."""
        self._words.store(self._place, 0)

    def acquire(self, seconds: float) -> None:
        """Take a token, or return without one: after so many seconds, for a signal, or because another took it.  Blocks."""
        if not self._take() and seconds > 0:
            fraction, whole = math.modf(seconds)
            until = _TimeSpec(int(whole), int(fraction * 1e9))
            _syscall(_FUTEX, self._address, _WAIT, 0, ctypes.byref(until), None, 0)
            self._take()

    def _take(self) -> bool:
        words, place = self._words, self._place
        for _ in range(MOST_TRIES):
            seen = words.load(place)
            if not seen & TOKENS:
                break
            if words.compare_exchange(place, seen, (seen & TOKENS) - 1):
                return True
        return False

    def release(self) -> None:
        """Post one token.  No more are kept than ``MOST_TOKENS``."""
        words, place = self._words, self._place
        for _ in range(MOST_TRIES):
            seen = words.load(place)
            if words.compare_exchange(place, seen, min((seen & TOKENS) + 1, MOST_TOKENS)):
                break
        _syscall(_FUTEX, self._address, _WAKE, 1, None, None, 0)
