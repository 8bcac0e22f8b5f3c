"""A SharedMemory mapping that the resource tracker never hears of: by descriptor or by path, named or nameless.

``multiprocessing.shared_memory`` registers every attach with the resource tracker, which then unlinks the segment under
the living when one attaching process ends (before 3.13's ``track=False``).  A :class:`Segment` is a ``SharedMemory`` that
is built from a file descriptor instead.

A segment without a name is freed by the kernel when its last process is gone.  Every process that uses a segment keeps
its descriptor, and with it a shared lock on byte ``BYTE_IN_USE``: whoever gets that byte exclusively knows that nobody
alive uses the segment.  A descriptor that a child inherits shares its parent's lock.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from multiprocessing.shared_memory import SharedMemory
from typing import Final

from ._layout import HEADER_WORDS, WORD, bytes_of_tables
from ._sys import SHM_FOLDER, SYSTEM
from .errors import SegmentError

__all__ = ["BYTE_CREATING", "BYTE_IN_USE", "PREFIX", "Segment"]

PREFIX: Final = "shlock"  # of every file name in the folder of shared memory

BYTE_IN_USE: Final = 0  # shared: this process uses the segment
REMOVAL_TIMEOUT: Final = 5.0  # seconds
BYTE_CREATING: Final = 1  # exclusive: this process changes the table of names


class Segment(SharedMemory):
    """One mapping of a shared memory file.  ``buf`` is its memoryview, ``fd`` its descriptor, ``name`` may be ''.

    The segment takes the descriptor over.  A read-only mapping raises TypeError on a store.  Of a segment with data only
    the tables are mapped, which come first; ``size`` is that of the whole.
    """

    def __init__(self, fd: int, name: str = "", *, read_only: bool = False, tables: int | None = None) -> None:
        # SharedMemory's own __init__ opens by name and registers with the tracker; these are the fields it sets.
        self._size = os.fstat(fd).st_size
        if tables is None:
            tables = bytes_of_tables(os.pread(fd, HEADER_WORDS * WORD, 0), self._size)
        self._mmap = mmap.mmap(fd, tables, access=mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE)
        self._buf = memoryview(self._mmap)
        self._name = name
        self._fd = fd  # last: from here on the object closes it

    @classmethod
    def create(cls, size: int, *, tables: int | None = None, reserve: int | None = None) -> Segment:
        """A new segment without a name, its pages zero.  OSError (ENOSPC) if they can't be had.

        tables   bytes at its beginning to map; None: all of it
        reserve  bytes at its beginning whose memory is taken now; None: all of it
        """
        fd = SYSTEM.create_nameless(size, size if reserve is None else reserve)
        SYSTEM.lock_byte(fd, BYTE_IN_USE, shared=True)
        return cls._over(fd, "", tables=size if tables is None else tables)

    @classmethod
    def attach(cls, name: str, *, read_only: bool = False) -> Segment | None:
        """The segment of that name, or None if there is none (any more)."""
        deadline = SYSTEM.monotonic() + REMOVAL_TIMEOUT
        while True:
            try:
                fd = SYSTEM.open_segment(f"{SHM_FOLDER}/{name}", read_only=read_only)
            except FileNotFoundError:
                return None
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or not facts.st_size:
                os.close(fd)
                fact = "it is truncated: 0 bytes" if stat.S_ISREG(facts.st_mode) else "it is no regular file"
                raise SegmentError(name, fact, f"Remove {SHM_FOLDER}/{name} if it is yours.")
            if SYSTEM.lock_byte(fd, BYTE_IN_USE, shared=True) and os.fstat(fd).st_nlink:
                return cls._over(fd, name, read_only=read_only)
            # Somebody is removing it at this very moment, holding the byte while he unlinks.
            os.close(fd)
            if SYSTEM.monotonic() > deadline:
                raise SegmentError(
                    name,
                    f"a process has been removing it for {REMOVAL_TIMEOUT:.0f} s and does not go on",
                    "See who has the file open ('fuser'), and let that process run or end it.",
                )
            SYSTEM.nap(0.001)

    @classmethod
    def _over(cls, fd: int, name: str, *, read_only: bool = False, tables: int | None = None) -> Segment:
        try:
            return cls(fd, name, read_only=read_only, tables=tables)
        except BaseException:
            os.close(fd)
            raise

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def name(self) -> str:
        return self._name

    @property
    def is_open(self) -> bool:
        return self._buf is not None

    @property
    def memory(self) -> memoryview:
        """The bytes of the segment."""
        if self._buf is None:
            raise ValueError("the segment is closed")
        return self._buf

    def publish(self, name: str) -> bool:
        """Give the segment its name, in one step; False if that name is taken."""
        if not SYSTEM.publish_name(self._fd, name):
            return False
        self._name = name
        return True

    def unlink(self) -> None:
        if self._name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{SHM_FOLDER}/{self._name}")

    def close(self) -> None:
        """Let go of the mapping and the descriptor.  Views that are still out keep the memory until they are gone."""
        buf, mapping, fd = self._buf, self._mmap, self._fd
        self._buf = self._mmap = None  # type: ignore[assignment]
        self._fd = -1
        try:
            if buf is not None:
                buf.release()
            if mapping is not None:
                mapping.close()
        except BufferError:
            pass
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - when the interpreter is shutting down, contextlib may be gone
            self.close()
        except (AttributeError, OSError, TypeError):
            pass
