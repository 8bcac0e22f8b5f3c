"""A POSIX semaphore that lies in a segment, for parking spots that several users share.

A named semaphore, as ``posix_ipc`` has them, is a file in /dev/shm.  Who may wait on it or post it may also truncate it, and
then everybody else who has it mapped is killed by SIGBUS.  Among processes of one user that is no news; among several it must
not be.  So where a segment is sealed against truncation, its semaphores lie inside.

Whoever can write the segment can overwrite them.  A ``sem_t`` holds numbers and no addresses: the worst that comes of it is a
wake-up too many or too few, which the parking place expects of every semaphore.
"""

from __future__ import annotations

import ctypes
import math
import time
from typing import Final

from ._atomic import Words

__all__ = ["SegmentSemaphore"]

_libc: Final = ctypes.CDLL(None, use_errno=True)
_sem_init, _sem_post, _sem_trywait = _libc.sem_init, _libc.sem_post, _libc.sem_trywait
_sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
_sem_post.argtypes = _sem_trywait.argtypes = [ctypes.c_void_p]
#: On the monotonic clock where the C library has it (glibc 2.30), else on the wall clock.
_sem_wait_until = getattr(_libc, "sem_clockwait", None)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


if _sem_wait_until is not None:
    _sem_wait_until.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_TimeSpec)]
_sem_timedwait = _libc.sem_timedwait
_sem_timedwait.argtypes = [ctypes.c_void_p, ctypes.POINTER(_TimeSpec)]


class SegmentSemaphore:
    """The semaphore at a word of a writable segment.  It keeps the mapping alive."""

    __slots__ = ("_address", "_words")

    def __init__(self, words: Words, place: int) -> None:
        words.pointer(place)  # IndexError if it is not inside, or not writable
        self._words = words
        self._address = words.address + place * 8

    def clear(self) -> None:
        """Make it a semaphore of value 0, whatever was there."""
        _sem_init(self._address, 1, 0)

    def acquire(self, seconds: float) -> None:
        """Take a token, or return without one after so many seconds, or when a signal arrives.  Blocks."""
        if seconds <= 0:
            _sem_trywait(self._address)
            return
        clock = time.CLOCK_REALTIME if _sem_wait_until is None else time.CLOCK_MONOTONIC
        fraction, whole = math.modf(time.clock_gettime(clock) + seconds)
        until = ctypes.byref(_TimeSpec(int(whole), int(fraction * 1e9)))
        if _sem_wait_until is None:
            _sem_timedwait(self._address, until)
        else:
            _sem_wait_until(self._address, clock, until)

    def release(self) -> None:
        """Post one token.  No effect on one that is overwritten with its largest value."""
        _sem_post(self._address)
