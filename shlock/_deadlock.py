"""Deadlock: threads each of which holds a lock and waits for the one that the next of them holds.

An owner word names a process; which of its threads is inside, only that process knows.  So a thread that has waited for a poll
interval says itself where it waits, in two words of each lock that it holds, and says it again whenever it polls:

    EDGE       the holder waits at this spot: index and sequence of the spot, a number made of its arena's identity, and
               RAISES if that thread wants a DeadlockError
    CONFIRMED  when that was true, in monotonic nanoseconds; in the place of the lowest bits the spot once more

    # the words say    the holder of the lock                                     killed then
    # a past wait      does not wait for a lock, or not yet for a poll interval   -
    # EDGE             waits, and is about to write CONFIRMED                     the edge is never confirmed
    # EDGE, CONFIRMED  waits, and confirms it at each poll                        it isn't again; a waiter inherits the lock

Nobody clears them: what they say ends with the wait, whose spot is IDLE then, or has another sequence.

Whoever looks goes from a lock by its EDGE to a spot, from there to the lock that is waited for, and on.  A lock has one holder,
who waits for one lock at most: there is one way, and it ends or comes back.  If it comes back, each member has shown when it
began to wait (``since``, in its spot) and when it confirmed that it holds its lock and waits (``confirmed``).

    # G1  at ``confirmed`` it held the lock: it read the clock, then looked whether the lock is its own, then wrote
    # G2  it held the lock from ``since`` to ``confirmed``: a thread that is blocked acquires nothing
    # G3  it has waited from ``since`` on, and still does: S, read after CONFIRMED, is of the wait that EDGE names

So if the latest ``since`` is not after the earliest ``confirmed``, then at that latest ``since`` all of them held their locks,
and each waited for the next one's lock.  One look proves that there was such a moment, however slow the look was and whatever
happened meanwhile; where locks are always taken in one order there is none.  What may end a true cycle is a timeout, an
exception, a lease, a death, or somebody who releases another one's Lock.  Therefore it is told only when the same waits are
seen once more, at the next poll, and all members are alive.

Not seen: waits for what has no owner (a plain Semaphore, a Condition, Event or Barrier); owned Semaphores, where another permit
may get free; the locks of channels and queues; threads that wait for the lease of another thread of their process (its seat);
segments that the looking process has not mapped; a member that is stopped, until it goes on.  A thread is known to a lock
by its number: one that ended while it held a lock is taken for a later thread that has the same number.

Of the members that want it, the one that began to wait last raises.  All of them see the same times, so it is one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from . import _arena, _bias, _names, _process
from . import _layout as at
from ._arena import Arena
from ._parking import POLL_INTERVAL
from ._sys import SYSTEM
from .errors import DeadlockMember

if TYPE_CHECKING:
    from ._owned import OwnedWords
    from ._parking import Spot

__all__ = [
    "Cycle", "Edge", "Graph", "Place", "Wait", "all_alive", "copy_of", "cycle_through", "cycles_among", "deadlocks_in",
    "has_edge", "same_waits",
]  # fmt: skip

KINDS: Final = (at.LOCK, at.RLOCK, at.GUARDED)
MOST_MEMBERS: Final = 1024  # a longer way is not followed: somebody may be overwriting the words all the time

#: A lock: identity of its arena, index of its control block.
Place = tuple[int, int]
T = TypeVar("T")


# -- cycles, from edges alone ---------------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """Who holds one lock and waits for another, as read from both.  Times are monotonic nanoseconds."""

    lock: Place
    wants: Place
    word: int  # EDGE: as long as it is the same, so is the wait
    owner: int  # identity word
    thread: int  # native thread number
    since: int
    confirmed: int


Cycle = tuple[Edge, ...]
Follow = Callable[[Place], Edge | None]


def cycle_through(place: Place, follow: Follow) -> Cycle | None:
    """The deadlock to which a lock belongs, beginning with that lock; None if there is none, or it is not sure."""
    way: list[Edge] = []
    passed: set[Place] = set()
    at_place = place
    while at_place not in passed and len(way) < MOST_MEMBERS:
        edge = follow(at_place)
        if edge is None:
            return None
        passed.add(at_place)
        way.append(edge)
        at_place = edge.wants
    return tuple(way) if at_place == place and _is_proven(way) else None


def cycles_among(places: Iterable[Place], follow: Follow) -> list[Cycle]:
    """Every deadlock to which one of these locks leads, once, beginning with its lowest place."""
    cycles: list[Cycle] = []
    done: set[Place] = set()
    for start in places:
        way: dict[Place, Edge] = {}
        place = start
        while place not in done and place not in way and len(way) < MOST_MEMBERS:
            edge = follow(place)
            if edge is None:
                break
            way[place] = edge
            place = edge.wants
        if place in way:
            ring = list(way.values())[list(way).index(place) :]
            if _is_proven(ring):
                cycles.append(_turned(ring, min(edge.lock for edge in ring)))
        done |= way.keys()
    return cycles


def _is_proven(ring: Collection[Edge]) -> bool:
    """G1-G3: there was a moment at which all of them waited and held."""
    return max(edge.since for edge in ring) <= min(edge.confirmed for edge in ring)


def _turned(ring: list[Edge], first: Place) -> Cycle:
    index = next(index for index, edge in enumerate(ring) if edge.lock == first)
    return (*ring[index:], *ring[:index])


def same_waits(cycle: Cycle) -> tuple[tuple[Place, int], ...]:
    """What is the same in two looks at a deadlock that went on in between."""
    return tuple((edge.lock, edge.word) for edge in cycle)


def victim_of(cycle: Cycle) -> Edge | None:
    """Which member raises: of those that want to, the one that began to wait last."""
    wanting = [edge for edge in cycle if edge.word & at.RAISES]
    return max(wanting, key=lambda edge: (edge.since, edge.owner, edge.word), default=None)


def all_alive(cycle: Cycle) -> bool:
    return all(_process.is_alive(edge.owner) for edge in cycle)


# -- reading --------------------------------------------------------------------------------------------------------------


class Graph:
    """The edges in some arenas, each read when it is asked for.  What is read is bounded, whatever stands there."""

    def __init__(self, arenas: Iterable[Arena]) -> None:
        self._arenas = {arena.identity: arena for arena in arenas}
        self._by_number: dict[int, list[Arena]] = {}
        for arena in self._arenas.values():
            self._by_number.setdefault(at.arena_number(arena.identity), []).append(arena)

    def follow(self, place: Place) -> Edge | None:
        """The edge of the lock at a place: None if nobody holds it, or its holder does not wait."""
        arena = self._arenas.get(place[0])
        if arena is None:
            return None
        view, start = arena.words.view, arena.layout.block(place[1])
        if view[start + at.BLOCK_KIND] & at.KIND not in KINDS:
            return None
        owner = at.process_in(_bias.ordinary(view, start, view[start + at.BLOCK_WORD]))
        word, confirmed = view[start + at.BLOCK_EDGE], view[start + at.BLOCK_CONFIRMED]
        index = at.reserved_spot(word)
        if not owner or confirmed & at.CONFIRMED_SPOT != index + 1:
            return None
        for there in self._by_number.get(word & at.EDGE_ARENA, ()):
            if not 0 <= index < there.layout.spots:
                continue
            spots, spot = there.words.view, there.layout.spot
            state = spots[spot(at.SPOT_STATE, index)]
            claim, thread, since = (spots[spot(array, index)] for array in (at.SPOT_CLAIM, at.SPOT_THREAD, at.SPOT_SINCE))
            after = spots[spot(at.SPOT_STATE, index)]
            if at.IDLE in (state & at.STATE, after & at.STATE) or (state ^ after) & ~at.STATE:
                continue
            if claim != owner or at.reservation(index, state) != word & at.OWNER & ~at.PID:
                continue
            key = (state & at.KEY) >> at.KEY_SHIFT
            if key < there.layout.blocks:
                wants = (there.identity, key)
                return Edge(place, wants, word, owner, thread, since, confirmed & ~at.CONFIRMED_SPOT)
        return None

    def held_places(self) -> list[Place]:
        """The locks that have an EDGE, of a present wait or of a past one."""
        places: list[Place] = []
        for arena in self._arenas.values():
            first, step = arena.layout.block(0), at.BLOCK_WORDS
            end = arena.layout.block(arena.layout.blocks)
            edges = arena.words.view[first + at.BLOCK_EDGE : end : step].tolist()
            places += [(arena.identity, index) for index, edge in enumerate(edges) if edge]
        return places

    def members(self, cycle: Cycle) -> tuple[DeadlockMember, ...]:
        """The cycle in words."""
        return tuple(self._member(edge) for edge in cycle)

    def _member(self, edge: Edge) -> DeadlockMember:
        arena = self._arenas[edge.lock[0]]
        name = _names.name_at(arena, edge.lock[1])
        kind = at.KIND_NAMES[min(arena.words.load(arena.layout.block(edge.lock[1]) + at.BLOCK_KIND) & at.KIND, at.EXTENSION)]
        return DeadlockMember(
            pid=_process.pid_of(edge.owner),
            thread_id=edge.thread & 0xFFFFFFFF,
            name=arena.process_name(edge.owner),
            lock=f"{kind} without a name (block {edge.lock[1]})" if name is None else _names.text_of(name),
            domain=arena.domain,
        )


def deadlocks_in(arenas: Iterable[Arena]) -> list[tuple[Cycle, tuple[DeadlockMember, ...]]]:
    """The deadlocks in some arenas.  Takes a poll interval if there seems to be one, else no time."""
    graph = Graph(arenas)

    def look() -> dict[object, Cycle]:
        return {same_waits(cycle): cycle for cycle in cycles_among(graph.held_places(), graph.follow)}

    first = look()
    if not first:
        return []
    SYSTEM.nap(POLL_INTERVAL)
    return [(cycle, graph.members(cycle)) for key, cycle in look().items() if key in first and all_alive(cycle)]


def has_edge(view: memoryview, start: int) -> bool:
    """Whether the holder of the lock with this control block ever waited: a hint, for one load."""
    return bool(view[start + at.BLOCK_EDGE])


# -- the waiting thread ---------------------------------------------------------------------------------------------------


def copy_of(all_: weakref.WeakSet[T]) -> list[T]:
    """What is in a set to which other threads add meanwhile."""
    for _ in range(100):
        try:
            return list(all_)
        except RuntimeError:
            continue
    return []


class Wait:
    """What a thread that waits for an owned word says of itself, and looks for, at each poll.

    held    the locks that it held when it first polled: while it waits there come no more
    raises  whether it wants the DeadlockError
    """

    __slots__ = ("_held", "_raises", "_seen", "_words")

    def __init__(self, words: OwnedWords, held: list[OwnedWords], raises: bool) -> None:
        self._words = words
        self._held = [one for one in held if one.block.kind in KINDS]
        self._raises = raises
        self._seen: tuple[object, ...] = ()  # the deadlock of the last poll

    def look(self, spot: Spot) -> tuple[DeadlockMember, ...] | None:
        """Confirm the edges.  The deadlock, beginning with this thread, if it is the one to raise the error."""
        if not self._held:
            return None
        now = SYSTEM.monotonic_ns()  # G1
        arena = self._words.block.arena
        edge = at.reservation(spot.index, spot.words.load(spot.state_word)) | at.arena_number(arena.identity)
        if self._raises:
            edge |= at.RAISES
        is_member = False
        for words in self._held:
            if words.is_mine():
                start = words.block.start
                words.view[start + at.BLOCK_EDGE] = edge
                words.view[start + at.BLOCK_CONFIRMED] = now & ~at.CONFIRMED_SPOT | spot.index + 1
                is_member = True
        return self._deadlock(edge) if self._raises and is_member else None

    def _deadlock(self, mine: int) -> tuple[DeadlockMember, ...] | None:
        graph = Graph(arena for arena in copy_of(_arena.living) if arena.segment.is_open)
        block = self._words.block
        cycle = cycle_through((block.arena.identity, block.index), graph.follow)
        # Who holds the last lock waits for the first one, as we do.
        if cycle is None or cycle[-1].word != mine or cycle[-1].owner != _process.current.word:
            self._seen = ()
            return None
        seen, self._seen = self._seen, same_waits(cycle)
        if self._seen != seen or victim_of(cycle) is not cycle[-1] or not all_alive(cycle):
            return None
        try:
            return graph.members((cycle[-1], *cycle[:-1]))
        except ValueError:  # a supervisor in another thread has just closed a segment: at the next poll, then
            return None
