"""Mappings of shared memory files: without a descriptor of their own, and with parts that can be made private.

Python's ``mmap`` duplicates the descriptor of its file and keeps it as long as the mapping.  A pipe or a queue has several
mappings of one file; so here an ``mmap`` of no file is made, and the file is put in the place of its pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

__all__ = ["make_private", "map_file"]

_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_libc: Final = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


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


def _address_of(mapping: mmap.mmap) -> int:
    """Where a mapping begins in the memory of this process, writable or not."""
    buffer = _Buffer()
    if ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(buffer), 0) != 0:
        raise BufferError("a mapping without a buffer")
    address: int = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


def _replace(mapping: mmap.mmap, first: int, length: int, protection: int, flags: int, fd: int, offset: int) -> None:
    """Put other pages in the place of some of a mapping.  OSError."""
    address = _address_of(mapping) + first
    if _mmap(address, length, protection, flags | _MAP_FIXED, fd, offset) == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def map_file(fd: int, offset: int, length: int, *, writable: bool) -> mmap.mmap:
    """A shared mapping of some bytes of a file, from a page on.  It needs the descriptor only until it is made.  OSError."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection)
    _replace(mapping, 0, length, protection, mmap.MAP_SHARED, fd, offset)
    return mapping


def make_private(mapping: mmap.mmap, first: int, end: int) -> None:
    """Put private pages with the same content in the place of some of a mapping, for whoever still has views of it."""
    content = mapping[first:end]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    _replace(mapping, first, end - first, protection, flags, -1, 0)
    ctypes.memmove(_address_of(mapping) + first, content, end - first)
