"""Views over shared memory that end when their ``with`` block does.

A memoryview can be released, and is dead then.  But what was made of it may live on: a slice, a cast, a numpy array.  Nothing
can take the memory away from those, and they must not go on reading, or worse writing, what belongs to others by then.  So
who still has something of a view when it ends is *cut off*: the pages under it are replaced, in this process alone, by
private ones with the same content.  It keeps what it saw; what it writes reaches nobody.  That costs a system call and
a copy, and is paid only by who keeps something.  The lender then takes a fresh mapping for itself.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable

from . import _layout as at
from ._mapping import make_private

__all__ = ["Lender"]


class Lender:
    """Lends views over one mapping, one at a time.

    ``mapping`` is the present one; whoever keeps views of its own of it has to look again after ``end`` said True.
    """

    __slots__ = ("_before", "_first", "_length", "_map", "mapping")

    def __init__(self, make_mapping: Callable[[], mmap.mmap]) -> None:
        self._map = make_mapping
        self.mapping = make_mapping()
        self._first = self._length = self._before = 0

    def lend(self, first: int, length: int, *, read_only: bool = False) -> memoryview:
        """A view of some bytes of the mapping.  Nobody else has one until it was given to ``end``."""
        self._first, self._length = first, length
        self._before = sys.getrefcount(self.mapping)
        # A memoryview of its own: every slice and cast of it holds a reference to the mapping, and so can be counted.
        view = memoryview(self.mapping)[first : first + length]
        return view.toreadonly() if read_only else view

    def end(self, view: memoryview) -> bool:
        """Release a view.  True if something was made of it that is still there, and is cut off now."""
        try:
            view.release()
        except BufferError:  # something reads it through the view itself
            pass
        else:
            if sys.getrefcount(self.mapping) <= self._before:
                return False
        self._cut_off()
        return True

    def _cut_off(self) -> None:
        kept = self.mapping
        first = self._first // at.PAGE * at.PAGE
        end = min(-(-(self._first + self._length) // at.PAGE) * at.PAGE, len(kept))
        if end <= first:
            return
        self.mapping = self._map()
        make_private(kept, first, end)
