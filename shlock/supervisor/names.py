"""The names of a domain of the machine, as its supervisor keeps them: what it has made, for whom, and what may go.

Everything that is read in the segments was written by their users.  What a segment is, the kernel says (``_machine``).

A segment stays as long as its maker's room lasts, with all that is in it, whether somebody uses it or not.  When there is no
room for one more, the oldest of the same user go that nobody uses.  To be used is no matter of contracts only: who has given
his back may have kept the memory.  So nothing goes, and everything counts, that somebody else than the supervisor still has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator

from .. import _machine
from .._arena import Arena
from .._machine import Made
from .._sys import SYSTEM
from ..errors import SegmentError

__all__ = ["Names", "made_for"]

log = logging.getLogger("shlock.supervisor")


class Names:
    """The segments of one domain, by name: the oldest first.

    is_used  whether somebody is known to use an arena: has a contract for it, or was given it over a connection that lasts
    """

    def __init__(self, domain: str, is_used: Callable[[Arena], bool]) -> None:
        self.domain = domain
        self._is_used = is_used
        self._arenas: dict[str, Arena] = {}
        self._kept: set[str] = set()  # made by this supervisor

    def get(self, name: str) -> Arena | None:
        return self._arenas.get(name)

    def make(self, made: Made, lease: int, grace: int, meanwhile: Callable[[], None], limits: tuple[int, int]) -> Arena:
        """A new segment.  OSError if the memory can't be had."""
        arena = self._arenas[made.name] = _machine.make_arena(self.domain, made, lease, grace, meanwhile, limits)
        self._kept.add(made.name)
        return arena

    def _of(self, user: int) -> list[Arena]:
        return [arena for arena in self._arenas.values() if made_for(arena).user == user]

    def count(self, user: int) -> int:
        """How many were made for a user and are still there."""
        return len(self._of(user))

    def size(self, user: int) -> int:
        """Bytes of them."""
        return sum(made_for(arena).total() for arena in self._of(user))

    def why_no_room(self, user: int, size: int, most: int, most_bytes: int) -> str | None:
        """Why a user may not have one more, of so many bytes, where he may have so many, and so many bytes; or None.

        Makes room by removing the oldest of his that nobody uses: first those that nobody has left unfinished.
        """
        free = [arena for arena in reversed(self._of(user)) if not self._is_used(arena)]
        free.sort(key=_machine.is_unfinished, reverse=True)  # the last one goes first: finished, and the oldest
        while True:
            if self.count(user) < most and self.size(user) + size <= most_bytes:
                return None
            while free and _has_others(free[-1]):
                free.pop()
            if not free:
                break
            self._close(free.pop())
        if self.count(user) >= most:
            return f"the user has made {most} names that are in use"
        used = self.size(user)
        return f"{size} bytes are more than the {most_bytes} that the user may have, of which {used} are in use"

    def recognise(self, fd: int, identity: int, adopt: Callable[[Arena], None]) -> Arena:
        """The arena behind a descriptor that a client presents again: one that a supervisor of this domain gave out.

        ``adopt`` is called with one that was not known.  SegmentError, OSError, ValueError if it is none, or another one.
        """
        made = _machine.made_of(fd, self.domain)
        name = made.name
        arena = self._arenas.get(name)
        if arena is None and made.parts():  # the rest of it was nowhere when we looked for it
            raise SegmentError("of the machine", f"not all of {name!r} is there any more", "Open it by its name.")
        if arena is None:
            arena = self._arenas[name] = _machine.arena_over(_machine.open_again(fd, read_only=False), self.domain)
            _machine.restore(arena)
            adopt(arena)
        if not arena.identity == identity == os.fstat(fd).st_ino:
            raise SegmentError("of the machine", "this is another arena than it is said to be", "Open the lock by its name.")
        return arena

    def find(self) -> Iterator[Arena]:
        """What earlier supervisors of the domain have given out and somebody still has; known from now on."""
        newest: dict[str, dict[int, int]] = {}  # by name: descriptors by part
        facts: dict[str, Made] = {}
        for fd in _machine.segments_of(self.domain):
            try:
                made = _machine.made_of(fd, self.domain)
            except SegmentError:
                SYSTEM.close(fd)  # of another version
                continue
            whole, known = made._replace(part=0), facts.get(made.name)
            if known is not None and known.serial > made.serial:
                SYSTEM.close(fd)  # left by who kept it although nobody else used it any more
                continue
            if known != whole:
                for other in newest.pop(made.name, {}).values():
                    SYSTEM.close(other)
                facts[made.name] = whole
            newest.setdefault(made.name, {})[made.part] = fd
        for name, found in newest.items():
            try:
                files = {part: _machine.open_again(fd, read_only=False) for part, fd in found.items()}
                arena = _machine.complete(self.domain, facts[name], files)
            except (OSError, ValueError, SegmentError) as error:
                log.warning("a segment of domain %r cannot be adopted: %s", self.domain, error)
                continue
            finally:
                for fd in found.values():
                    SYSTEM.close(fd)
            _machine.restore(arena)
            self._arenas[name] = arena
            yield arena

    def release(self, arenas: Iterable[Arena]) -> None:
        """Let go of those that nobody uses any more.  What this supervisor has made stays while there is room."""
        for arena in list(arenas):
            name = arena.only_name
            if (
                name is not None
                and name not in self._kept
                and self._arenas.get(name) is arena
                and not self._is_used(arena)
                and not _machine.is_unfinished(arena)
                and not _has_others(arena)
            ):
                self._close(arena)

    def _close(self, arena: Arena) -> None:
        assert arena.only_name is not None
        del self._arenas[arena.only_name]
        self._kept.discard(arena.only_name)
        _machine.close(arena)

    def close(self) -> None:
        """Let go of all of them."""
        for arena in self._arenas.values():
            _machine.close(arena)
        self._arenas.clear()


def made_for(arena: Arena) -> Made:
    """What an arena of the machine was made for."""
    assert isinstance(arena.made, Made)
    return arena.made


def _has_others(arena: Arena) -> bool:
    """Whether anybody else has any of its files."""
    return any(map(_machine.has_others, _machine.descriptors(arena)))
