"""The segment of one guarded buffer: a few control blocks in front, whole pages of data behind them, with a name or without.

Locks and their kin share segments by the thousand.  A Block, a Channel or a Queue has a segment of its own: its memory goes
when nobody uses it any more, its data can be mapped read-only where a contract says so, and a damaged one hurts no other.

The tables are mapped as those of every arena are (``_arena``).  Data is mapped apart, page by page as it is needed: a
segment may be large and sparse, and memory is *reserved* before it is touched, so that a full /dev/shm is an OSError and
never a SIGBUS.

    N1  a name is visible only when its segment is complete: it gets its name last, in one step
    N2  who finds the name taken meanwhile uses what is there; its own, nameless still, goes by itself

    killed after                     the name     outcome
    C20 segment made, not published  -            the kernel frees it: it has no name yet
    C21 segment published            is there     the object is there, in its first state
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Final

from . import _anonymous, _names
from . import _layout as at
from ._arena import PROCESSES, Arena, Block, Declaration, write_header
from ._mapping import map_file
from ._segment import Segment
from ._sys import SYSTEM, crash_points
from .errors import SegmentError

__all__ = ["BUFFER_SPOTS", "Memory", "Shape", "file_name"]

BUFFER_SPOTS: Final = 512  # threads that can be blocked on one buffer at the same time


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a new segment holds.

    controls  what its control blocks are at first; the first one says what the object is, and its parameter how large
    data      bytes of data, whole pages
    reserve   how many of them get their memory now
    prepare   writes the first state of the data, before anybody else can see it
    """

    controls: tuple[Declaration, ...]
    data: int
    reserve: int
    prepare: Callable[[Memory], None] | None = None


#: Buffers with a name that this process has: one arena for a name.
_named: weakref.WeakValueDictionary[tuple[str, str], Arena] = weakref.WeakValueDictionary()


class Memory:
    """One segment of control blocks and data, as this process uses it."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.size = arena.extents[-1].end if arena.extents else arena.layout.data
        self._first = arena.layout.tables

    @classmethod
    def create(cls, shape: Shape, domain: str | None = None, name: str | None = None) -> Memory:
        """A new one, nameless in the file system.  OSError if the memory cannot be had."""
        layout = at.Layout(BUFFER_SPOTS, PROCESSES, len(shape.controls), 0, semaphores=True, data=shape.data)
        segment = Segment.create(layout.size, tables=layout.tables, reserve=layout.tables + shape.reserve)
        write_header(segment, layout, domain, name)
        arena = Arena(segment, layout, domain)
        for index, declaration in enumerate(shape.controls):
            arena.declare(index, declaration, ())
        arena.words.store(at.HEADER_BLOCKS_USED, len(shape.controls))
        if name is None:
            _anonymous.remember(arena)
        memory = cls(arena)
        if shape.prepare is not None:
            shape.prepare(memory)
        return memory

    @classmethod
    def open(cls, domain: str, name: str, wanted: Declaration, shape: Shape | None, *, read_only: bool | None = None) -> Memory:
        """The buffer of that name, created if there is none and a shape is given.

        ``read_only``: neither its tables nor its data can be written through the mappings that this process gets.  None: as
        this process has it already, or writable.
        SegmentError if it is something else, or if it is not there and there is no shape.  ValueError if this process has
        it already with other rights.
        """
        arena = _named.get((domain, name))
        if arena is not None and read_only is not None and arena.words.is_writable == read_only:
            raise _names.other_rights(name, is_writable=read_only)
        file = file_name(domain, name)
        while arena is None:
            arena = _names.attach_file(file, read_only=bool(read_only))
            if arena is None and shape is None:
                raise SegmentError(file, f"there is no {name!r} in domain {domain!r}", "Give a size, and it is created.")
            if arena is None and shape is not None:
                made = cls.create(shape, domain, name).arena
                if crash_points:
                    crash_points[0]("C20 segment made, not published")
                if made.segment.publish(file):
                    arena = None if read_only else made
                    if crash_points:
                        crash_points[0]("C21 segment published")
        arena = _named.setdefault((domain, name), arena)
        _names.checked(arena, 0, name, wanted)
        return cls(arena)

    def control(self, index: int) -> Block:
        return self.arena.block(index, self.arena.only_name)

    def controls(self) -> Sequence[Block]:
        return [self.control(index) for index in range(self.arena.layout.blocks)]

    # -- data ---------------------------------------------------------------------------------------------------------
    # Where it lies in several files, in a domain of the machine, all of its memory is there, and stays (M5).

    def map(self, first: int, length: int, *, writable: bool = True) -> mmap.mmap:
        """A mapping of some bytes of the data, from a page on.  Its memory must have been reserved before it is touched."""
        fd, place = self._place(first, length)
        return map_file(fd, place, length, writable=writable)

    def reserve(self, first: int, length: int) -> None:
        """Take the memory for some bytes of the data.  OSError (ENOSPC) if it can't be had; nothing has changed then."""
        if not self.arena.extents:
            SYSTEM.reserve(self.arena.segment.fd, self._first + first, length)

    def give_back(self, first: int, length: int) -> None:
        """Let go of the memory of some pages of the data; they are zero if they are reserved again."""
        if not self.arena.extents:
            SYSTEM.give_back(self.arena.segment.fd, self._first + first, length)

    def _place(self, first: int, length: int) -> tuple[int, int]:
        """In which file some bytes of the data are, and where."""
        arena = self.arena
        if not arena.extents:
            return arena.segment.fd, self._first + first
        extent = next(extent for extent in arena.extents if extent.first <= first and first + length <= extent.end)
        if not extent.part:
            return arena.segment.fd, self._first + extent.offset + first - extent.first
        return arena.parts[extent.part].fd, extent.offset + first - extent.first


def file_name(domain: str, name: str) -> str:
    """File name of the segment of one name."""
    return f"{_names.segment_name(domain)}={hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"
