"""The parking place of an arena: the one place where anything sleeps, and where everything is woken.

A thread that has to wait takes a *spot*, publishes in the spot's word S which control block it waits for, makes sure that
whoever changes that block will see it, and sleeps on the spot's semaphore.  Whoever releases looks for the best waiter of
the block, marks its S and posts its semaphore.  Who may go in is decided by the primitive's own word alone: a wake-up is a
hint and no grant, and an empty one does no harm.

    # S         state of the thread              entered by                     leaves to
    # IDLE      not blocked                      leave (A7, A8), reap           WAITING
    # WAITING   asleep, or about to look at W    publish (A4), renew (A6)       NOTIFIED, IDLE
    # NOTIFIED  chosen, its wake-up is under way unpark                         WAITING, IDLE

    # I1  a parked waiter implies PARKED in W, a wake-up under way, or a releaser about to start one: no release misses it
    # I2  S changes from WAITING to NOTIFIED by compare-exchange over state, key and sequence: a slow waker cannot hit
    #     a thread that meanwhile waits for something else
    # I3  who leaves without having got in, when the way in is free, wakes the next one (A8)
    # I4  a spot is claimed by one process at a time, and a dead one's is used again only after its S is IDLE

    # killed after                 S says     repaired by           outcome
    # C1 spot claimed              IDLE       reap, table full      the spot is used again
    # C2 S published (A4)          WAITING    unpark, reap          it may be chosen in vain: then as C4
    # C3 asleep (A6)               WAITING    unpark, reap          as C2
    # C4 chosen, not yet in        NOTIFIED   a waiter's poll       S := IDLE and the wake-up goes on to the next
    # C5 waker chose, didn't post  NOTIFIED   the sleeper's poll    it wakes up within its poll interval

Everybody who sleeps also *polls*: looks for itself after at most the poll interval.  That finds dead owners, and
wake-ups that died with the process that owed them, without any other process's help.  The waiter that is first in line
polls every 10 ms, the one behind it every 40 ms, the next every 90 ms, up to a second, so that a crowd costs little.  Those who
are the first in many lines are a crowd, too: together those of an arena poll 1,000 times a second at most.  Of a process's
threads that are far behind in a line only one polls at a time, ten times a second at most: a thousand who all did would need
every processor for it, and whoever is called would wait for its interpreter.

Signals: a wait that a signal interrupts goes on.  ``posix_ipc`` replaces what a handler raised by its own error (except for
KeyboardInterrupt).  So while the main thread sleeps, signals that have a Python handler other than the default of SIGINT are
blocked, for at most 20 ms at a time, and their handlers run in between, where what they raise goes its normal way.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import math
import os
import secrets
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import spawn, util
from typing import Any, Final, Protocol

import posix_ipc

from . import _handover, _janitor, _process
from . import _layout as at
from ._arena import Arena
from ._atomic import Operand, Pointer, Words, borrow_operand, give_back
from ._segment import PREFIX
from ._semaphore import SegmentSemaphore
from ._sys import SYSTEM, crash_points
from .errors import SegmentError

__all__ = ["POLL_INTERVAL", "Parking", "Spot", "Waiter", "deadline_after", "parking_of"]

POLL_INTERVAL: Final = 0.010  # seconds, of the waiter that is first in line
LONGEST_POLL_INTERVAL: Final = 1.0
FAR_BEHIND: Final = 9  # who has so many ahead polls at the longest interval
GLANCE: Final = 64  # spots all over the table, by which a thread sees that it is far behind
LOOK_INTERVAL: Final = 0.1  # seconds between the polls of a process's threads that are far behind, together
MOST_POLLS: Final = 1000  # in a second, of the first in all the lines of an arena
LONGEST_MASKED_SLEEP: Final = 0.020
LOOKS_FOR_THE_DEAD: Final = 8  # spots that are looked at before a new one is used
#: A releaser that finds a wake-up under way leaves it at that, but not more often than this in a row: the chosen thread
#: may be stopped, or be waiting for a processor for long.
MOST_SKIPS: Final = 10
#: A chosen thread that finds the way closed again naps before it marks the word anew, because a marked word costs the
#: releaser a wake-up.  The first nap lasts so many seconds, each further one twice as long: with what the kernel adds they
#: take three turns (``_owned``) at most.
FIRST_NAP: Final = 100e-6
MOST_NAPS: Final = 6
ON_ITS_WAY: Final = -1
#: In longer tables than this the spots of one block are looked for byte by byte, and their turns are read all at once.
SHORT_TABLE: Final = 16
LOWEST_BYTE: Final = 0 if sys.byteorder == "little" else at.WORD - 1


class Waiter(Protocol):
    """What a primitive tells the parking place about one blocked thread.  All of it may be called again and again."""

    @property
    def index(self) -> int:
        """The control block that it waits for."""

    @property
    def precedence(self) -> int:
        """Who goes first: larger numbers, and among equal ones the longest wait."""

    def attempt(self, spot: Spot) -> bool:
        """A5: go in if possible and say True.

        False promises that whoever opens the way in will see the spot, or, after ``spot.naps`` was raised, that the
        spot is still NOTIFIED: to everybody else a thread that naps is one that has not woken up yet.
        """

    def poll(self, spot: Spot) -> None:
        """Look for dead owners; afterwards ``attempt`` is called again."""

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """A8: the thread leaves (deadline, or ``interrupted`` by an exception), its spot is IDLE already."""

    def pass_on(self) -> None:
        """A7: the thread got in, and had been chosen once more meanwhile: that wake-up is somebody else's."""


class Spot:
    """The place of one blocked thread.  It belongs to one thread of this process at a time."""

    __slots__ = (
        "claim_word", "claimant", "index", "is_leaving", "naps", "operand", "precedence_word", "semaphore",
        "since_word", "state_pointer", "state_word", "thread_word", "trust", "words",
    )  # fmt: skip

    def __init__(self, words: Words, layout: at.Layout, index: int, semaphore: Any, claims: list[int]) -> None:
        """``claims`` has the index as long as it is the caller's to give back; here it becomes ours."""
        self.words = words
        self.index = index
        self.semaphore = semaphore
        self.operand = Operand()
        self.is_leaving = False
        self.naps = 0  # since the thread was chosen
        self.trust = MOST_SKIPS  # how often it may still leave the word unmarked
        self.state_word, self.claim_word, self.thread_word, self.since_word, self.precedence_word = (
            layout.spot(array, index) for array in range(at.SPOT_ARRAYS)
        )
        self.state_pointer = words.pointer(self.state_word)
        # No call from here to the end: the interpreter looks at no signal in between.
        claims[:] = ()
        self.claimant = _process.current

    def publish(self, key: int, precedence: int) -> None:
        """A4: from here on the thread can be chosen.  An exchange, so also a fence."""
        words = self.words
        self.is_leaving = False
        self.naps = 0
        self.trust = MOST_SKIPS
        words.store(self.thread_word, threading.get_native_id())
        words.store(self.since_word, SYSTEM.monotonic_ns())
        words.store(self.precedence_word, precedence)
        sequence = (words.load(self.state_word) & at.SEQUENCE) + at.SEQUENCE_ONE & at.SEQUENCE
        self.operand.exchange(self.state_pointer, sequence | key << at.KEY_SHIFT | at.WAITING)

    def is_notified(self) -> bool:
        return self.words.load(self.state_word) & at.STATE == at.NOTIFIED

    def may_nap(self) -> bool:
        """Whether the thread, chosen, may come back a little later instead of waiting again."""
        return self.naps < MOST_NAPS and self.is_notified()

    def renew(self) -> None:
        """A6: a chosen thread waits again, in its old place in the line."""
        self.naps = 0
        state = self.words.load(self.state_word)
        if state & at.STATE == at.NOTIFIED:
            self.operand.compare_exchange(self.state_pointer, state, state & ~at.STATE | at.WAITING)

    def leave(self) -> bool:
        """A7 and the first step of A8: nobody can choose the thread any more.  Whether it had been chosen."""
        state = self.words.load(self.state_word)
        if state & at.STATE == at.IDLE:
            # Called again, after an interruption: the operand knows what the exchange saw.
            return self.is_leaving and self.operand.seen() & at.STATE == at.NOTIFIED
        self.is_leaving = True
        return self.operand.exchange(self.state_pointer, state & ~at.STATE) & at.STATE == at.NOTIFIED

    def __del__(self) -> None:
        """An exception may lose a spot between two bytecodes: then it goes back to the table."""
        try:
            if self.claimant is _process.current:
                self.leave()
                self.words.store(self.claim_word, 0)
        except (AttributeError, TypeError, ValueError):  # the interpreter is shutting down
            pass


class Parking:
    """The spots of one arena, as this process sees them."""

    def __init__(self, arena: Arena) -> None:
        self.segment = arena.segment
        self.identity = arena.identity
        self.is_nameless = arena.domain is None
        self.words = arena.words
        self.layout = arena.layout
        self.spots = arena.layout.spots
        self.state_first = arena.layout.spot(at.SPOT_STATE, 0)
        self.pool: list[Spot] = []
        self._next_look: dict[int, float] = {}  # by control block
        self.semaphores: dict[int, Any] = {}
        self.pointers: dict[int, Pointer] = {}
        _all.add(self)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def park(self, waiter: Waiter, deadline: float | None) -> bool:
        """Block until ``waiter`` got in (True) or the deadline (monotonic seconds) has passed (False).

        Whatever is raised meanwhile, the thread has withdrawn before it goes on.  In a child that was forked while its
        parent was in here, :class:`_process.Forked` is raised: nothing in here is the child's.
        """
        process = _process.current
        spot: Spot | None = None
        try:
            spot = self._take()
            if crash_points:
                crash_points[0]("A4 before S is published")
            spot.publish(waiter.index, waiter.precedence)
            if crash_points:
                crash_points[0]("A5 S published")
            next_poll = SYSTEM.monotonic() + POLL_INTERVAL
            while True:
                if waiter.attempt(spot):
                    if crash_points:
                        crash_points[0]("A7 got in, S not yet IDLE")
                    if spot.leave():
                        waiter.pass_on()
                    if crash_points:
                        crash_points[0]("A7 S IDLE")
                    mine, spot = spot, None  # an exception from here on must not give it back twice
                    self.pool.append(mine)
                    return True
                now = SYSTEM.monotonic()
                late = deadline is not None and now >= deadline
                if not late:
                    if crash_points:
                        crash_points[0]("A6 before sleeping")
                    while True:
                        until = next_poll if deadline is None else min(next_poll, deadline)
                        if spot.naps:
                            until = min(until, now + FIRST_NAP * 2 ** (spot.naps - 1))
                        if until > now:
                            self._sleep(spot, until - now)
                        now = SYSTEM.monotonic()
                        if now < next_poll or process is not _process.current:
                            break
                        if not self._is_left_to_others(spot, waiter.index):
                            break
                        next_poll = now + LONGEST_POLL_INTERVAL
                    if crash_points:
                        crash_points[0]("A6 awake")
                    now = SYSTEM.monotonic()
                if process is not _process.current:
                    raise _process.Forked
                if late or now >= next_poll:
                    waiter.poll(spot)
                    self._reap_in_line(waiter.index)
                    next_poll = SYSTEM.monotonic() + POLL_INTERVAL * self._place_in_line(spot, waiter.index)
                if late and not waiter.attempt(spot):  # if it says True, it does so again
                    self._withdraw(waiter, spot, False)
                    mine, spot = spot, None  # as above: once it is given back, another thread may be using it
                    self.pool.append(mine)
                    return False
        except _process.Forked:
            raise
        except BaseException:
            if process is _process.current:
                try:
                    self._withdraw(waiter, spot, True)
                finally:
                    if spot is not None:
                        self.pool.append(spot)
            raise

    def _withdraw(self, waiter: Waiter, spot: Spot | None, interrupted: bool) -> None:
        """A8.  Goes on to its end when it is interrupted, and then lets the interruption through."""

        def withdraw() -> None:
            if crash_points:
                crash_points[0]("A8 before S is IDLE")
            notified = spot is not None and spot.leave()
            if crash_points:
                crash_points[0]("A8 S IDLE")
            waiter.withdraw(notified, interrupted)
            if crash_points:
                crash_points[0]("A8 withdrawn")

        _process.to_the_end(withdraw)

    def _sleep(self, spot: Spot, seconds: float) -> None:
        """A6: until a token comes or the time is over or a signal arrives.  The one call that blocks."""
        mask, before = _signals_to_block(), set[int]()
        if mask:
            seconds = min(seconds, LONGEST_MASKED_SLEEP)
            before = _set_mask(signal.SIG_BLOCK, ())
        try:
            if mask:
                _set_mask(signal.SIG_BLOCK, mask)  # raises what came just before, the mask being set
            spot.semaphore.acquire(seconds)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            pass
        finally:
            if mask:
                _set_mask(signal.SIG_SETMASK, before)  # what came meanwhile is handled here

    def _is_left_to_others(self, spot: Spot, key: int) -> bool:
        """Whether a thread sleeps on instead of polling.

        A poll among many waiters takes long.  Who is far behind leaves it to those in front; they all may be dead or stopped,
        so that once in a while one of a process's threads polls for all of them.
        """
        if spot.is_notified() or not self._is_far_behind(spot, key):
            return False
        now = SYSTEM.monotonic()
        if now < self._next_look.get(key, 0.0):
            return True
        self._next_look[key] = now + LOOK_INTERVAL
        return False

    def _is_far_behind(self, spot: Spot, key: int) -> bool:
        """Whether so many are seen to be ahead, at a glance, that this waiter polls as rarely as any."""
        view, first, mine, ahead = self.words.view, self.state_first, self.turn_of(spot.index), 0
        key_bits = key << at.KEY_SHIFT & at.KEY
        used = min(view[at.HEADER_SPOTS_USED], self.spots)
        for index in range(0, used, 1 + used // GLANCE):
            state = view[first + index]
            if state & at.KEY == key_bits and state & at.STATE and self.turn_of(index) < mine:
                ahead += 1
                if ahead == FAR_BEHIND:
                    return True
        return False

    def _place_in_line(self, spot: Spot, key: int) -> float:
        """How many poll intervals this waiter waits between two looks: 1 for the first in line; more if there are many."""
        indices = sorted({spot.index, *self.in_line(key)})
        turns = self._turns(indices)
        mine = turns[indices.index(spot.index)]
        ahead = sum([turn < mine for turn in turns])
        intervals = max((1 + ahead) ** 2, self._lines() / (MOST_POLLS * POLL_INTERVAL))
        return min(intervals, LONGEST_POLL_INTERVAL / POLL_INTERVAL)

    def relies_on_another(self, spot: Spot, key: int) -> bool:
        """Whether a thread that waits may leave the word unmarked: one is on its way in, and will see to it.

        That one may be stopped, so it is believed a limited number of times.
        """
        if spot.trust <= 0:
            spot.trust = MOST_SKIPS
            return False
        spot.trust -= 1
        return bool(self._line(key, at.NOTIFIED))

    # -- waking -------------------------------------------------------------------------------------------------------

    def turn_of(self, index: int) -> tuple[int, int]:
        """By which the waiters are sorted, the first one in line first: precedence, then since when it has waited."""
        load, spot = self.words.load, self.layout.spot
        return -load(spot(at.SPOT_PRECEDENCE, index)), load(spot(at.SPOT_SINCE, index))

    def first_of(self, indices: list[int]) -> int:
        """Of at least one spot the one whose thread is the first in line."""
        if len(indices) == 1:
            return indices[0]
        turns = self._turns(indices)
        return indices[turns.index(min(turns))]

    def _turns(self, indices: list[int]) -> list[int]:
        """Numbers in the order of ``turn_of`` of these spots, whose indices ascend."""
        view, spot = self.words.view, self.layout.spot
        first, end = indices[0], indices[-1] + 1
        if len(indices) <= SHORT_TABLE:
            return [view[spot(at.SPOT_SINCE, index)] - (view[spot(at.SPOT_PRECEDENCE, index)] << 64) for index in indices]
        precedence, since = (view[spot(array, first) : spot(array, end)] for array in (at.SPOT_PRECEDENCE, at.SPOT_SINCE))
        turns = since.tolist()
        if any(ranks := precedence.tolist()):
            turns = [began - (rank << 64) for began, rank in zip(turns, ranks, strict=True)]
        return [turns[index - first] for index in indices]

    def _lines(self) -> int:
        """For how many blocks threads wait."""
        view, first, mask = self.words.view, self.state_first, at.KEY | at.STATE
        states = view[first : first + min(view[at.HEADER_SPOTS_USED], self.spots)].tolist()
        return len({word & at.KEY for word in {state & mask for state in states} if word & at.STATE})

    def _line(self, key: int, *wanted: int) -> list[tuple[int, int]]:
        """Index and S of the threads that wait for this block, those that were chosen included, by index; or in one state only.

        Each word is read at an instant of its own.  Of the lowest bytes, which hold the state and a part of the key, a copy
        is searched: who is not in that one yet is going to look at W itself.
        """
        view, first = self.words.view, self.state_first
        states = view[first : first + min(view[at.HEADER_SPOTS_USED], self.spots)]
        key_bits = key << at.KEY_SHIFT & at.KEY
        accepted = wanted or (at.WAITING, at.NOTIFIED, at.STATE)
        if len(states) > SHORT_TABLE:
            lowest = bytes(states)[LOWEST_BYTE :: at.WORD]
            patterns = [key_bits & 0xFF | state for state in accepted]
            if sum(map(lowest.count, patterns)) <= len(lowest) // 8:
                found = sorted(index for pattern in patterns for index in _places_of(pattern, lowest))
                pairs = [(index, states[index]) for index in found]
                return [(index, state) for index, state in pairs if state & at.KEY == key_bits and state & at.STATE in accepted]
        return [
            (index, state)
            for index, state in enumerate(states.tolist())
            if state & at.KEY == key_bits and state & at.STATE in accepted
        ]

    def unpark_one(self, key: int, skips: list[int] | None = None) -> int:
        """Wake the thread that is the first in line for this block.

        Returns since when it has waited (monotonic ns), ON_ITS_WAY if it was left at an earlier wake-up, 0 if nobody
        waits.  With ``skips`` (one count, kept by the caller), an earlier one is enough up to MOST_SKIPS times.
        """
        since_first = self.layout.spot(at.SPOT_SINCE, 0)
        for _ in range(2 * self.spots):  # each failure is somebody's success, unless somebody overwrites the spots
            if skips is not None and skips[0] < MOST_SKIPS and self._line(key, at.NOTIFIED):
                skips[0] += 1
                return ON_ITS_WAY
            line = self._line(key)
            waiting = {index: state for index, state in line if state & at.STATE == at.WAITING}
            if not waiting:
                return ON_ITS_WAY if line else 0
            if skips is not None:
                skips[0] = 0
            index = self.first_of(list(waiting))
            if crash_points:
                crash_points[0]("R3 waiter chosen")
            since = self.words.load(since_first + index)
            if self._notify(index, waiting[index]):
                return since or ON_ITS_WAY
        return ON_ITS_WAY

    def unpark_behind(self, key: int, spot: Spot) -> None:
        """Wake the thread that has waited for this block the longest of those that began to wait later than this one."""
        since = self.layout.spot(at.SPOT_SINCE, 0)
        mine = self.words.load(spot.since_word)
        behind = [
            (began, index, state)
            for index, state in self._line(key, at.WAITING)
            if (began := self.words.load(since + index)) > mine
        ]
        for _, index, state in sorted(behind):
            if self._notify(index, state):
                return

    def unpark_many(self, key: int, most: int | None = None) -> int:
        """Wake the threads that wait for this block, the longest-waiting first, up to ``most``; how many were."""
        waiting = self._line(key, at.WAITING)
        since = self.layout.spot(at.SPOT_SINCE, 0)
        waiting.sort(key=lambda pair: self.words.load(since + pair[0]))
        woken = 0
        for index, state in waiting:
            if most is not None and woken >= most:
                break
            woken += self._notify(index, state)
        return woken

    def in_line(self, key: int) -> list[int]:
        """The spots of the threads that wait for this block, those that were chosen included."""
        return [index for index, _ in self._line(key)]

    def is_alive(self, index: int) -> bool:
        """Whether the process lives that has a spot."""
        return _process.is_alive(self.words.load(self.layout.spot(at.SPOT_CLAIM, index)))

    def call(self, index: int, state: int) -> bool:
        """Wake the thread at a spot, chosen already or not; False if S is not ``state`` any more."""
        if state & at.STATE == at.WAITING:
            return self._notify(index, state)
        self._post(index)
        return state & at.STATE == at.NOTIFIED

    def _notify(self, index: int, state: int) -> bool:
        pointer = self.pointers.get(index)
        if pointer is None:
            pointer = self.pointers[index] = self.words.pointer(self.state_first + index)
        operand = borrow_operand()
        try:
            if not operand.compare_exchange(pointer, state, state & ~at.STATE | at.NOTIFIED):
                return False
            if crash_points:
                crash_points[0]("R3 NOTIFIED, not posted")
            self._post(index)
        except BaseException:
            if operand.process is _process.current and operand.succeeded():
                self._post(index)  # one token too many does no harm, one too few does
            raise
        if crash_points:
            crash_points[0]("R3 posted")
        give_back(operand)
        return True

    def _post(self, index: int) -> None:
        semaphore = self.semaphores.get(index)
        if semaphore is None:
            try:
                semaphore = self._open_semaphore(index)
            except posix_ipc.ExistentialError:
                return  # its owner finds out by polling
            semaphore = self.semaphores.setdefault(index, semaphore)
        semaphore.release()

    def _open_semaphore(self, index: int) -> Any:
        if self.layout.semaphores:
            return SegmentSemaphore(self.words, self.layout.semaphore(index))
        return posix_ipc.Semaphore(self._semaphore_name(index))

    def _make_semaphore(self, index: int) -> None:
        if self.layout.semaphores:
            SegmentSemaphore(self.words, self.layout.semaphore(index)).clear()
            return
        if self.is_nameless:
            self._start_janitor()
        SYSTEM.create_semaphore(self._semaphore_name(index))

    # -- the table of spots -------------------------------------------------------------------------------------------

    def _semaphore_name(self, index: int) -> str:
        return f"/{PREFIX}-{self.identity:016x}-{index}"

    def _take(self) -> Spot:
        try:
            return self.pool.pop()
        except IndexError:
            return self._claim()

    def _claim(self) -> Spot:
        for _ in range(3):  # somebody who is just reaping the dead holds their spots for a moment
            index = self._claim_index()
            if index is not None:
                break
        else:
            raise SegmentError(
                self.segment.name or "without a name",
                f"all {self.layout.spots} parking spots are taken by blocked threads of living processes",
                "Let fewer threads wait at the same time, or spread the locks over several domains.",
            )
        claims = [index]
        try:
            if crash_points:
                crash_points[0]("C1 spot claimed")
            self.words.raise_to(at.HEADER_SPOTS_USED, index + 1)
            self._make_semaphore(index)
            semaphore = self.semaphores[index] = self._open_semaphore(index)
            return Spot(self.words, self.layout, index, semaphore, claims)
        except BaseException:
            for index in claims:  # else a Spot has it, which a traceback may keep for long
                self.words.store(self.layout.spot(at.SPOT_CLAIM, index), 0)
            raise

    def _claim_index(self) -> int | None:
        me = _process.current.word
        used, spots = min(self.words.load(at.HEADER_SPOTS_USED), self.layout.spots), self.layout.spots
        index = self._claim_free(me, range(used))
        if index is None:  # a few places where a dead thread may have left its spot, before the table grows
            index = self._claim_dead([secrets.randbelow(used) for _ in range(min(used, LOOKS_FOR_THE_DEAD))])
        if index is None:
            index = self._claim_free(me, range(used, spots))
        if index is None:
            index = self._claim_dead(range(spots))
        return index

    def _claim_free(self, me: int, indices: range) -> int | None:
        claims = self.layout.spot(at.SPOT_CLAIM, 0)
        seen = self.words.view[claims + indices.start : claims + indices.stop].tolist()
        for index, claim in zip(indices, seen, strict=True):
            if not claim and self.words.compare_exchange(claims + index, 0, me):
                return index
        return None

    def _claim_dead(self, indices: Iterable[int]) -> int | None:
        claims = self.layout.spot(at.SPOT_CLAIM, 0)
        for index in indices:
            claim = self.words.load(claims + index)
            if claim and not _process.is_alive(claim) and self._reap(index, claim):
                return index
        return None

    def _reap(self, index: int, claim: int) -> bool:
        """I4: take a dead thread's spot.  False if somebody else did.

        The claim comes first, so that one process reaps a spot.  The wake-up goes on before S is IDLE, so that it is not
        lost if the reaper dies in between: whoever reaps the reaper then passes it on once more.
        """
        claim_word = self.layout.spot(at.SPOT_CLAIM, index)
        take = borrow_operand()
        try:
            if not take.compare_exchange(self.words.pointer(claim_word), claim, _process.current.word):
                return False
            if crash_points:
                crash_points[0]("C4 spot of a dead thread claimed")
            _process.to_the_end(lambda: self._make_idle(index))
        except BaseException:
            if take.process is _process.current and take.succeeded():
                _process.to_the_end(lambda: self._make_idle(index))
                self.words.store(claim_word, 0)
            raise
        return True

    def _make_idle(self, index: int) -> None:
        for _ in range(self.spots):
            state = self.words.load(self.state_first + index)
            if not state & at.STATE:
                return
            if state & at.STATE == at.NOTIFIED:
                self.unpark_one((state & at.KEY) >> at.KEY_SHIFT)
            if crash_points:
                crash_points[0]("C4 its wake-up passed on")
            if self.words.compare_exchange(self.state_first + index, state, state & ~at.STATE):
                _handover.after_reaping(self, (state & at.KEY) >> at.KEY_SHIFT)
                return
        self.words.store(self.state_first + index, 0)  # somebody overwrites it all the time

    def _reap_in_line(self, key: int) -> None:
        """Take dead threads out of the line: those that were chosen, and the one that is first."""
        claims = self.layout.spot(at.SPOT_CLAIM, 0)
        line = self._line(key)
        chosen = [index for index, state in line if state & at.STATE == at.NOTIFIED]
        waiting = [index for index, state in line if state & at.STATE != at.NOTIFIED]
        first = [self.first_of(waiting)] if waiting else []
        for index in (*sorted(chosen, key=self.turn_of), *first):
            claim = self.words.load(claims + index)
            if not _process.is_alive(claim) and self._reap(index, claim):
                self.words.store(claims + index, 0)

    def reap_all_of(self, owner: int) -> None:
        """Take the spots of a process that is dead, and pass on the wake-ups that were on their way to it."""
        claims = self.layout.spot(at.SPOT_CLAIM, 0)
        used = min(self.words.load(at.HEADER_SPOTS_USED), self.spots)
        for index, claim in enumerate(self.words.view[claims : claims + used].tolist()):
            if claim == owner and self._reap(index, claim):
                self.words.store(claims + index, 0)

    def waiting(self, key: int) -> Iterator[tuple[int, int, int]]:
        """Of every thread that waits for this block: identity word, native thread number, since (monotonic ns)."""
        for index, _ in self._line(key):
            claim, thread, since = (
                self.words.load(self.layout.spot(array, index)) for array in (at.SPOT_CLAIM, at.SPOT_THREAD, at.SPOT_SINCE)
            )
            if _process.is_alive(claim):
                yield claim, thread, since

    def _start_janitor(self) -> None:
        """Make sure that a janitor waits for the end of this arena."""
        janitor = self.words.load(at.HEADER_JANITOR)
        if janitor and not janitor & at.STARTING and _process.is_alive(janitor):
            return
        # Who finds somebody starting it starts one, too: that one may be killed before it has, and two do no harm.
        starting = _process.current.word | at.STARTING
        self.words.compare_exchange(at.HEADER_JANITOR, janitor, starting)
        started = start_janitor(self.segment.fd, f"sem.{PREFIX}-{self.identity:016x}-")
        self.words.compare_exchange(at.HEADER_JANITOR, starting, started)


def _places_of(pattern: int, text: bytes) -> Iterator[int]:
    place = text.find(pattern)
    while place >= 0:
        yield place
        place = text.find(pattern, place + 1)


_all: weakref.WeakSet[Parking] = weakref.WeakSet()


def _forget_spots() -> None:
    for parking in list(_all):
        parking.pool.clear()


_process.refresh_in_child.append(_forget_spots)


def parking_of(arena: Arena) -> Parking:
    if arena.parking is None:
        arena.parking = Parking(arena)
    parking: Parking = arena.parking
    return parking


def deadline_after(timeout: float | None) -> float | None:
    """The monotonic second at which a timeout (relative seconds, None = never, negative = now) ends."""
    if timeout is None:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds, not NaN")
    return SYSTEM.monotonic() + max(0.0, timeout)


def start_janitor(fd: int, prefix: str) -> int:
    """Start a janitor on a segment; its identity word."""
    executable = os.fsdecode(spawn.get_executable() or b"")
    pid = util.spawnv_passfds(os.fsencode(executable), [executable, "-I", "-S", _janitor.__file__, str(fd), prefix], [fd])
    return _process.make_word(pid, SYSTEM.birth(pid) or 0)


# -- signals --------------------------------------------------------------------------------------------------------------

_SIGNALS: Final = tuple(sorted(set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}))
_get_handler: Callable[[int], Any] = _signal.getsignal
#: Not signal.pthread_sigmask, which is Python: a handler that raises at its first instruction would leave the mask as it is.
_set_mask: Callable[[int, Iterable[int]], set[int]] = _signal.pthread_sigmask
_seen_handlers: list[Any] = []
_mask: frozenset[int] = frozenset()


def _signals_to_block() -> frozenset[int]:
    """Signals with a Python handler whose exception posix_ipc would replace.  Empty in all threads but the main one."""
    global _seen_handlers, _mask
    if threading.current_thread() is not threading.main_thread():
        return frozenset()
    handlers = list(map(_get_handler, _SIGNALS))
    if handlers != _seen_handlers:
        ordinary = (None, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
        _mask = frozenset(n for n, handler in zip(_SIGNALS, handlers, strict=True) if handler not in ordinary)
        _seen_handlers = handlers
    return _mask
