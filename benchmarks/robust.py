"""A robust process-shared pthread mutex through ctypes, as somebody would write it who needs no more than that.

Works between a process and its forked children only: the mutex lives in anonymous shared memory.
The numbers below are those of glibc and musl on Linux; both fit the mutex into 64 bytes everywhere.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from types import TracebackType

PTHREAD_PROCESS_SHARED = 1
PTHREAD_MUTEX_ROBUST = 1
MUTEX_BYTES = 64

_libc = ctypes.CDLL(None)
_lock = _libc.pthread_mutex_lock  # Sleeps, therefore through CDLL, which gives up the GIL around the call.
_trylock = ctypes.PyDLL(None).pthread_mutex_trylock  # These two do not sleep; keeping the GIL makes them twice as fast.
_unlock = ctypes.PyDLL(None).pthread_mutex_unlock


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


class RobustMutex:
    """A mutex that the kernel passes on when its owner dies; `abandoned` then is True for the heir."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._bytes = (ctypes.c_char * MUTEX_BYTES).from_buffer(self._memory)
        # The argument is wrapped once: making it for each call costs more than the call.
        self._mutex = ctypes.byref(self._bytes)
        self.abandoned = False
        attributes = (ctypes.c_char * MUTEX_BYTES)()
        _check(_libc.pthread_mutexattr_init(attributes))
        _check(_libc.pthread_mutexattr_setpshared(attributes, PTHREAD_PROCESS_SHARED))
        _check(_libc.pthread_mutexattr_setrobust(attributes, PTHREAD_MUTEX_ROBUST))
        _check(_libc.pthread_mutex_init(self._mutex, attributes))
        _libc.pthread_mutexattr_destroy(attributes)

    def acquire(self) -> bool:
        code = _trylock(self._mutex)
        if code:
            self._acquire_slow(code)
        return True

    def release(self) -> None:
        code = _unlock(self._mutex)
        if code:
            _check(code)

    __enter__ = acquire

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        code = _unlock(self._mutex)
        if code:
            _check(code)

    def _acquire_slow(self, code: int) -> None:
        if code == errno.EBUSY:
            code = _lock(self._mutex)
        if code == errno.EOWNERDEAD:
            self.abandoned = True
            code = _libc.pthread_mutex_consistent(self._mutex)
        _check(code)

    def close(self) -> None:
        """Destroy the mutex and unmap its memory; nobody may be using it."""
        _libc.pthread_mutex_destroy(self._mutex)
        del self._mutex, self._bytes
        self._memory.close()
