"""Views over shared memory that end when their ``with`` block does.

A memoryview can be released, and is dead then.  But what was made of it may live on: a slice, a cast, a numpy array.  Nothing
can take the memory away from those, and they must not go on reading, or worse writing, what belongs to others by then.  So
who still has something of a view when it ends is *cut off*: the pages under it are replaced, in this process alone, by
private ones with the same content.  It keeps what it saw; what it writes reaches nobody.  That costs a system call and
a copy, and is paid only by who keeps something.  The lender then takes a fresh mapping for itself.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import Final

from . import _layout as at

__all__ = ["Lender", "address_of"]

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class _Buffer(ctypes.Structure):
    """Py_buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(mapping: mmap.mmap) -> int:
    """Where a mapping begins in the memory of this process, writable or not."""
    buffer = _Buffer()
    if ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(buffer), 0) != 0:
        raise BufferError("a mapping without a buffer")
    address: int = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    assert address
    return address


class Lender:
    """Lends views over one mapping, one at a time.

    ``mapping`` is the present one; whoever keeps views of its own of it has to look again after ``end`` said True.
    """

    __slots__ = ("_before", "_first", "_length", "_map", "_mapping")

    def __init__(self, make_mapping: Callable[[], mmap.mmap]) -> None:
        self._map = make_mapping
        self._mapping = make_mapping()
        self._first = self._length = self._before = 0

    @property
    def mapping(self) -> mmap.mmap:
        return self._mapping

    def lend(self, first: int, length: int, *, read_only: bool = False) -> memoryview:
        """A view of some bytes of the mapping.  Nobody else has one until it was given to ``end``."""
        self._first, self._length = first, length
        self._before = sys.getrefcount(self._mapping)
        # A memoryview of its own: every slice and cast of it holds a reference to the mapping, and so can be counted.
        with memoryview(self._mapping) as whole, whole[first : first + length] as part:
            return part.toreadonly() if read_only else part[:]

    def end(self, view: memoryview) -> bool:
        """Release a view.  True if something was made of it that is still there, and is cut off now."""
        try:
            view.release()
        except BufferError:  # something reads it through the view itself
            pass
        else:
            if sys.getrefcount(self._mapping) <= self._before:
                return False
        self._cut_off()
        return True

    def _cut_off(self) -> None:
        kept = self._mapping
        first = self._first // at.PAGE * at.PAGE
        end = min(-(-(self._first + self._length) // at.PAGE) * at.PAGE, len(kept))
        if end <= first:
            return
        self._mapping = self._map()
        content = kept[first:end]
        address = address_of(kept) + first
        got = _libc.mmap(
            address, end - first, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0
        )
        if got == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "no memory for what was kept of a view")
        ctypes.memmove(address, content, end - first)
