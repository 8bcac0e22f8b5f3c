"""The names of a domain of the machine, as its supervisor keeps them: what it has made, for whom, and what may go.

Everything that is read in the segments was written by their users.  What a segment is, the kernel says (``_machine``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator

from .. import _layout as at
from .. import _machine
from .._arena import Arena, Declaration
from .._sys import SYSTEM
from ..errors import SegmentError

__all__ = ["Names"]

log = logging.getLogger("shlock.supervisor")


class Names:
    """The segments of one domain, by name: the oldest first.

    is_used  whether somebody is known to use an arena: has a contract for it, or was given it over a connection that lasts
    """

    def __init__(self, domain: str, is_used: Callable[[Arena], bool]) -> None:
        self.domain = domain
        self._is_used = is_used
        self._arenas: dict[str, Arena] = {}
        self._made_by: dict[str, int] = {}  # users

    def get(self, name: str) -> Arena | None:
        return self._arenas.get(name)

    def make(self, name: str, declaration: Declaration, user: int) -> Arena:
        """A new segment, for a user.  OSError if the memory can't be had."""
        arena = self._arenas[name] = _machine.make_arena(self.domain, name, declaration)
        self._made_by[name] = user
        return arena

    def count(self, user: int) -> int:
        """How many a user has made that are still there."""
        return sum(1 for maker in self._made_by.values() if maker == user)

    def has_room(self, user: int, most: int) -> bool:
        """Whether a user may make one more.  Makes room by removing the oldest of his that nobody uses."""
        if self.count(user) < most:
            return True
        for name in [name for name, maker in self._made_by.items() if maker == user]:
            arena = self._arenas[name]
            if not self._is_used(arena) and not arena.words.load(arena.layout.block(0) + at.BLOCK_WORD):
                self._close(arena)
                return True
        return False

    def recognise(self, fd: int, identity: int, adopt: Callable[[Arena], None]) -> Arena:
        """The arena behind a descriptor that a client presents again: one that a supervisor of this domain gave out.

        ``adopt`` is called with one that was not known.  SegmentError, OSError, ValueError if it is none, or another one.
        """
        name, _ = _machine.name_of_segment(fd, self.domain)
        arena = self._arenas.get(name)
        if arena is None:
            arena = self._arenas[name] = _machine.arena_over(_machine.open_again(fd, read_only=False), self.domain, name)
            adopt(arena)
        if not arena.identity == identity == os.fstat(fd).st_ino:
            raise SegmentError("of the machine", "this is another arena than it is said to be", "Open the lock by its name.")
        return arena

    def find(self) -> Iterator[Arena]:
        """What earlier supervisors of the domain have given out and somebody still has; known from now on."""
        newest: dict[str, tuple[int, int]] = {}  # by name: serial number and descriptor
        for fd in _machine.segments_of(self.domain):
            name, serial = _machine.name_of_segment(fd, self.domain)
            if name in newest and newest[name][0] > serial:
                SYSTEM.close(fd)  # left by who kept it although nobody else used it any more
                continue
            if name in newest:
                SYSTEM.close(newest[name][1])
            newest[name] = serial, fd
        for name, (_, fd) in newest.items():
            try:
                arena = _machine.arena_over(_machine.open_again(fd, read_only=False), self.domain, name)
            except (OSError, ValueError, SegmentError) as error:
                log.warning("a segment of domain %r cannot be adopted: %s", self.domain, error)
                continue
            finally:
                SYSTEM.close(fd)
            self._arenas[name] = arena
            yield arena

    def release(self, arenas: Iterable[Arena]) -> None:
        """Let go of those that nobody uses any more.  What this supervisor has made stays, as long as there is room."""
        for arena in list(arenas):
            name = arena.only_name
            if (
                name is not None
                and name not in self._made_by
                and self._arenas.get(name) is arena
                and not self._is_used(arena)
                and not arena.words.load(arena.layout.block(0) + at.BLOCK_WORD)
            ):
                self._close(arena)

    def _close(self, arena: Arena) -> None:
        assert arena.only_name is not None
        del self._arenas[arena.only_name]
        self._made_by.pop(arena.only_name, None)
        arena.segment.close()

    def close(self) -> None:
        """Let go of all of them."""
        for arena in self._arenas.values():
            arena.segment.close()
        self._arenas.clear()
