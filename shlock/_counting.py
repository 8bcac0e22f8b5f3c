"""Words that count: a plain Semaphore, a Condition, an Event, a Barrier.  Nobody owns them.

    Semaphore  value << 5 | PARKED
    Condition  notifications << 5 | PARKED
    Event      times set << 5 | SET | PARKED
    Barrier    outcomes << 45 | round << 21 | arrived << 5 | ACTING | BROKEN | PARKED

Each change is a compare-exchange; whoever changes a word so that waiters may go on wakes them afterwards.  PARKED says that
somebody may be parked.  Its rules are those of the lock (``_owned``): a waiter publishes its spot, then sets PARKED by a
compare-exchange that it always makes, then sleeps; who goes in from the parking place leaves PARKED set.

    # killed after                       repaired by        outcome
    # C11 permit given, nobody woken     poll               a waiter takes it within its poll interval
    # C12 permit taken                   -                  the permit of a plain semaphore is gone, as documented
    # C13 waits on a condition           notify, reap       it may be chosen in vain: the notification goes on to the next
    # C14 condition: chose, didn't post  poll               the chosen waiter sees NOTIFIED
    # C15 event set, nobody woken        poll               waiters see the flag, or that it was set meanwhile
    # C16 party arrived, not counted     poll               the others see its party word: the barrier breaks
    # C17 party counted, waits           poll               as C16
    # C18 last one acts                  poll               as C16
    # C19 round over, nobody woken       poll               waiters see that the round is over
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing import util
from threading import BrokenBarrierError
from typing import Any, ClassVar, Final

from . import _layout as at
from . import _process
from ._arena import Block
from ._atomic import Operand, borrow_operand, give_back
from ._parking import Spot, deadline_after, parking_of
from ._process import Forked
from ._sys import crash_points
from .errors import AbandonedError

__all__ = ["BarrierWord", "ConditionWord", "EventWord", "SemaphoreWord"]

RELEASED_TOO_OFTEN: Final = "semaphore or lock released too many times"


class _Word:
    """The word of one block, as this process uses it."""

    def __init__(self, block: Block) -> None:
        words = block.arena.words
        self.block = block
        self.index = block.index
        self.view = words.view
        self.place = block.word
        self.pointer = words.pointer(block.word)
        self.parking = parking_of(block.arena)

    def change(self, operand: Operand, seen: int, new: int) -> bool:
        return operand.compare_exchange(self.pointer, seen, new)

    def mark_parked(self, operand: Operand, seen: int) -> bool:
        """Set PARKED by an exchange that is always made; False if the word was another one by then."""
        return operand.compare_exchange(self.pointer, seen, seen | at.PARKED)


def _as_itself(action: Callable[[], bool]) -> bool:
    """Start again if this process turns out to be a child that was forked in the middle.  Nothing is called afterwards."""
    while True:
        try:
            return action()
        except Forked:
            continue


# -- Semaphore ------------------------------------------------------------------------------------------------------------


class SemaphoreWord(_Word):
    """A counter of permits."""

    def __init__(self, block: Block, limit: int) -> None:
        super().__init__(block)
        self.limit = limit

    def value(self) -> int:
        return self.view[self.place] >> at.COUNT_SHIFT

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        take: Operand | None = None
        got = False
        try:
            take = borrow_operand()
            w = self.view[self.place]
            if w >= at.ONE and timeout is None and take.compare_exchange(self.pointer, w, w - at.ONE):
                got = True
                give_back(take)
                if take.process is _process.current:
                    return True
                got = False  # forked meanwhile: it is the parent's
        except Forked:
            pass
        except BaseException:
            if got or (take is not None and take.process is _process.current and take.succeeded()):
                self.release()
            raise
        deadline = deadline_after(timeout) if block else None
        wait = bool(block) and (timeout is None or timeout > 0)
        return _as_itself(lambda: self._acquire(wait, deadline))

    def _acquire(self, block: bool, deadline: float | None) -> bool:
        waiter = _PermitWaiter(self)
        try:
            while (w := self.view[self.place]) >= at.ONE:
                if waiter.take.compare_exchange(self.pointer, w, w - at.ONE):
                    return True
            return block and self.parking.park(waiter, deadline)
        except BaseException:
            if waiter.take.process is _process.current and waiter.inside():
                waiter.withdraw(False, True)
            raise

    def release(self) -> None:
        give: Operand | None = None
        error = False
        interruption: BaseException | None = None
        tries = 0
        while True:
            try:
                if give is None:
                    give = borrow_operand()
                while not error and not give.succeeded():
                    w = self.view[self.place]
                    error = w >> at.COUNT_SHIFT >= self.limit
                    if not error:
                        give.compare_exchange(self.pointer, w, w + at.ONE)
                if not error and give.tried is not None and give.tried & at.PARKED:
                    self.wake_next()
                break
            except Forked:
                return  # a child: the release was its parent's
            except BaseException as exception:  # finish first: a half-done release would lose a permit or a wake-up
                tries += 1
                if tries > _process.MOST_INTERRUPTIONS:
                    raise
                interruption = exception
        if interruption is not None:
            raise interruption
        if error:
            raise ValueError(RELEASED_TOO_OFTEN)
        give_back(give)

    def wake_next(self) -> None:
        if crash_points:
            crash_points[0]("C11 permit given, nobody woken")
        if not self.parking.unpark_one(self.index):
            w = self.view[self.place]
            if w >> at.COUNT_SHIFT:
                self.change(Operand(), w, w & ~at.PARKED)


class _PermitWaiter:
    """One thread on its way to a permit."""

    precedence = 0

    def __init__(self, word: SemaphoreWord) -> None:
        self.word = word
        self.index = word.index
        self.take = Operand()
        self.mark = Operand()
        self.back = Operand()

    def inside(self) -> bool:
        return self.take.succeeded() and not self.back.succeeded()

    def attempt(self, spot: Spot) -> bool:
        if self.take.succeeded():
            return True
        spot.renew()
        word = self.word
        while True:
            w = word.view[word.place]
            if w >> at.COUNT_SHIFT:
                if self.take.compare_exchange(word.pointer, w, (w - at.ONE) | at.PARKED):
                    self.pass_on()  # a permit that is left over may have been given when PARKED was clear for a moment
                    return True
            elif word.mark_parked(self.mark, w):
                return False

    def poll(self, spot: Spot) -> None:
        """A permit without an owner is nobody's to take back."""

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        word = self.word
        while self.inside():
            w = word.view[word.place]
            word.change(self.back, w, w + at.ONE)
        self.pass_on()

    def pass_on(self) -> None:
        """Wake the next if a permit is free; else see to it that whoever gives one will."""
        word = self.word
        while not (w := word.view[word.place]) >> at.COUNT_SHIFT:
            if word.mark_parked(self.mark, w):
                return
        word.parking.unpark_one(self.index)


# -- Condition ------------------------------------------------------------------------------------------------------------


class ConditionWord(_Word):
    """Who waits is in the spots; the word only says whether it is worth looking."""

    def wait(self, lock: Any, timeout: float | None) -> bool:
        deadline = deadline_after(timeout)
        depth = _depth(lock)
        while True:
            process = _process.current
            waiter = _NotificationWaiter(self, lock, depth)
            try:
                self.parking.park(waiter, deadline)
                self.take_again(lock, depth)
                return waiter.notified
            except Forked:
                # A child that was forked while its parent waited holds nothing: it takes the lock and waits as itself.
                self.take_again(lock, depth)
            except BaseException:
                if process is _process.current:
                    waiter.hand_on()
                    self.take_again(lock, depth)
                raise

    def take_again(self, lock: Any, depth: int) -> None:
        """Take the lock again, so that whoever leaves ``wait`` by an exception holds it, too.

        One exception from a signal handler waits until the lock is taken; a second one gets through at once, without it.
        """
        interruption: BaseException | None = None
        while not lock._semlock._is_mine():
            try:
                _acquire_fully(lock, depth)
            except (Forked, AbandonedError):
                raise
            except BaseException as error:
                if interruption is not None:
                    raise
                interruption = error
        if interruption is not None:
            raise interruption

    def notify(self, n: int) -> None:
        w = self.view[self.place]
        if not w & at.PARKED:
            return
        if crash_points:
            crash_points[0]("C13 before a waiter is chosen")
        self.parking.unpark_many(self.index, n)
        if not any(True for _ in self.parking.waiting(self.index)):
            # Nobody can have come: who waits publishes its spot while it holds the lock that we hold.
            self.change(Operand(), w, (w & ~at.PARKED) + at.ONE & at.WORD_MASK)


class _NotificationWaiter:
    """One thread that waits for a notification, and gave its lock back for that time."""

    precedence = 0

    def __init__(self, word: ConditionWord, lock: Any, depth: int) -> None:
        self.word = word
        self.index = word.index
        self.mark = Operand()
        self.lock = lock
        self.depth = depth
        self.released = False
        self.notified = False
        self.handed_on = False

    def attempt(self, spot: Spot) -> bool:
        word = self.word
        if not self.released:
            while not word.mark_parked(self.mark, word.view[word.place]):
                pass
            if crash_points:
                crash_points[0]("C13 spot published, lock still held")
            self.released = True
            _release_fully(self.lock, self.depth)
            if crash_points:
                crash_points[0]("C13 lock released")
        if spot.is_notified():
            self.notified = True
            # The spot stays NOTIFIED until the lock is ours: if we die on the way, the notification goes to the next.
            self.word.take_again(self.lock, self.depth)
        return self.notified

    def poll(self, spot: Spot) -> None:
        """Nothing to recover: the parking place itself passes on what a dead waiter was told."""

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        # At the deadline a notification that came just in time counts; by an exception it goes on to the next.
        self.notified = self.notified or notified
        if interrupted:
            self.hand_on()

    def hand_on(self) -> None:
        """Leaving by an exception, after having been chosen: the notification is for the next one."""
        if self.notified and not self.handed_on:
            self.word.parking.unpark_many(self.index, 1)
            self.handed_on = True

    def pass_on(self) -> None:
        """To have been chosen is what this thread waited for: nothing is left over."""


def _depth(lock: Any) -> int:
    depth: int = lock._semlock._count()
    return depth


def _release_fully(lock: Any, depth: int) -> None:
    save = getattr(lock, "_release_save", None)
    if save is not None:
        save()
    else:
        for _ in range(depth):
            lock.release()


def _acquire_fully(lock: Any, depth: int) -> None:
    restore = getattr(lock, "_acquire_restore", None)
    if restore is not None:
        restore(depth)
    else:
        for _ in range(depth):
            lock.acquire()


# -- Event ----------------------------------------------------------------------------------------------------------------


class EventWord(_Word):
    """A flag, and how often it was raised."""

    def is_set(self) -> bool:
        return bool(self.view[self.place] & at.SET)

    def set(self) -> None:
        operand = Operand()
        try:
            while True:
                w = self.view[self.place]
                if w & at.SET:
                    return
                if self.change(operand, w, ((w & ~at.PARKED) + at.ONE | at.SET) & at.WORD_MASK):
                    break
            if crash_points:
                crash_points[0]("C15 event set, nobody woken")
            if w & at.PARKED:
                self.parking.unpark_many(self.index)
        except Forked:
            return
        except BaseException:
            if operand.process is _process.current and operand.succeeded():
                self.parking.unpark_many(self.index)
            raise

    def clear(self) -> None:
        operand = Operand()
        with contextlib.suppress(Forked):
            while (w := self.view[self.place]) & at.SET and not self.change(operand, w, w & ~at.SET):
                pass

    def wait(self, timeout: float | None) -> bool:
        w = self.view[self.place]
        if w & at.SET:
            return True
        deadline = deadline_after(timeout)
        if timeout is not None and timeout <= 0:
            return False
        return _as_itself(lambda: self.parking.park(_FlagWaiter(self, w >> at.COUNT_SHIFT), deadline))


class _FlagWaiter:
    """One thread that waits for the flag, or for it to have been raised meanwhile."""

    precedence = 0

    def __init__(self, word: EventWord, raised: int) -> None:
        self.word = word
        self.index = word.index
        self.raised = raised
        self.mark = Operand()

    def attempt(self, spot: Spot) -> bool:
        word = self.word
        spot.renew()
        while True:
            w = word.view[word.place]
            if w & at.SET or w >> at.COUNT_SHIFT != self.raised:
                return True
            if word.mark_parked(self.mark, w):
                return False

    def poll(self, spot: Spot) -> None:
        """Nothing to recover: the word itself says whether it was set."""

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """Everybody is woken at once: nothing to pass on."""

    def pass_on(self) -> None:
        """Everybody is woken at once: nothing to pass on."""


# -- Barrier --------------------------------------------------------------------------------------------------------------


class BarrierWord(_Word):
    """A count of arrivals in rounds, and one word for each party: who it is, and in which round it waits.

    party word   the process, ARRIVED and the lowest bits of the round while it waits; the process alone once it came
                 through: it is expected again.  0 once it has left normally, or if there never was one.
    """

    COUNT_BITS: ClassVar[int] = 16
    ROUND_SHIFT: ClassVar[int] = at.COUNT_SHIFT + 16
    ROUND_BITS: ClassVar[int] = 24
    OUTCOME_SHIFT: ClassVar[int] = at.COUNT_SHIFT + 16 + 24
    OUTCOMES: ClassVar[int] = 64 - (at.COUNT_SHIFT + 16 + 24)  # of how many past rounds the word knows whether they broke

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.parties = block.parameter
        self.cells = [(place, block.arena.words.pointer(place)) for place in block.cells]
        self.mine: list[int] = []  # party words of this process that are not in use
        self.process: _process.ProcessIdentity | None = None  # for which ``mine`` stands; set by its first wait()

    # What the word says.

    def _round(self, w: int) -> int:
        return w >> self.ROUND_SHIFT & (1 << self.ROUND_BITS) - 1

    def _arrived(self, w: int) -> int:
        arrived = w >> at.COUNT_SHIFT & (1 << self.COUNT_BITS) - 1
        if arrived > self.parties:
            raise self.block.arena.damaged(f"barrier {self.block.index} counts {arrived} of {self.parties} parties")
        return arrived

    def _next_round(self, w: int, *, broken: bool) -> int:
        outcomes = (w >> self.OUTCOME_SHIFT) << 1 & (1 << self.OUTCOMES) - 1 | broken
        number = self._round(w) + 1 & (1 << self.ROUND_BITS) - 1
        return outcomes << self.OUTCOME_SHIFT | number << self.ROUND_SHIFT

    def outcome(self, w: int, number: int) -> bool | None:
        """Whether a round came through (True) or broke (False); None while it goes on."""
        if self._round(w) == number:
            return False if w & at.BROKEN else None
        ago = (self._round(w) - number - 1) % (1 << self.ROUND_BITS)
        return ago < self.OUTCOMES and not w >> self.OUTCOME_SHIFT + ago & 1

    def waiting(self) -> int:
        w = self.view[self.place]
        return 0 if w & (at.ACTING | at.BROKEN) else self._arrived(w)

    def is_broken(self) -> bool:
        return bool(self.view[self.place] & at.BROKEN)

    # What parties do.

    def wait(self, action: Callable[[], object] | None, timeout: float | None) -> int:
        deadline = deadline_after(timeout)
        arrival = _Arrival(self)
        try:
            while True:
                if not self.parking_until_open(deadline):
                    self.abort()
                    raise BrokenBarrierError
                position = arrival.arrive()
                if position is not None:
                    break
            if position == self.parties - 1:
                self._act(action, arrival.number)
            elif not self.parking.park(arrival, deadline):
                self.abort()
                if not self.outcome(self.view[self.place], arrival.number):
                    raise BrokenBarrierError
            if not self.outcome(self.view[self.place], arrival.number):
                raise BrokenBarrierError
            return position
        except Forked:
            raise BrokenBarrierError("this process was forked from a party that was waiting") from None
        except BrokenBarrierError:
            raise
        except BaseException:
            if arrival.process is _process.current:
                _process.to_the_end(arrival.take_back)
            raise
        finally:
            arrival.leave()

    def parking_until_open(self, deadline: float | None) -> bool:
        """Wait while the last of a full round still acts.  BrokenBarrierError if it is broken."""
        w = self.view[self.place]
        if w & at.BROKEN:
            raise BrokenBarrierError
        if not w & at.ACTING and self._arrived(w) < self.parties:
            return True
        return self.parking.park(_OpenWaiter(self), deadline)

    def _act(self, action: Callable[[], object] | None, number: int) -> None:
        """Everybody is here and we came last: run the action, end the round, wake the others."""
        try:
            if crash_points:
                crash_points[0]("C18 last one acts")
            if action is not None:
                action()
        except BaseException:
            self.abort()
            raise
        end = Operand()
        try:
            while self._round(w := self.view[self.place]) == number and not w & at.BROKEN:
                if self.change(end, w, self._next_round(w, broken=False)):
                    break
            if crash_points:
                crash_points[0]("C19 round over, nobody woken")
        finally:
            if end.process is _process.current:
                self._wake_all()

    def abort(self) -> None:
        operand = Operand()
        while not (w := self.view[self.place]) & at.BROKEN and not self.change(operand, w, w | at.BROKEN):
            pass
        self._wake_all()

    def reset(self) -> None:
        operand = Operand()
        while True:
            w = self.view[self.place]
            if not w & at.BROKEN and not self._arrived(w):
                break
            if self.change(operand, w, self._next_round(w, broken=True)):
                break
        for place, pointer in self.cells:
            party = self.view[place]
            if party & at.OWNER and not _process.is_alive(party):
                operand.compare_exchange(pointer, party, 0)
        self._wake_all()

    def _wake_all(self) -> None:
        _process.to_the_end(lambda: self.parking.unpark_many(self.index))

    def break_if_a_party_died(self) -> None:
        for place, _ in self.cells:
            party = self.view[place]
            if party & at.OWNER and not _process.is_alive(party):
                self.abort()
                return

    # Party words.

    def enter_party(self, number: int) -> int | None:
        """Take a party word for this round: one that is ours, a free one, or one of somebody who doesn't wait now."""
        if self.process is not _process.current:
            self.process, self.mine = _process.current, []
            # In each process for itself: multiprocessing ignores a finalizer that another process registered.
            util.Finalize(self, _leave_party, (self.view, self.cells, _process.current), exitpriority=20)
        me = _process.current.word
        waiting = me | at.ARRIVED | (number & 15) << 1
        operand = Operand()
        while self.mine:
            with contextlib.suppress(IndexError):
                position = self.mine.pop()
                place, pointer = self.cells[position]
                if self.view[place] == me and operand.compare_exchange(pointer, me, waiting):
                    return position
        for wanted in (self._is_free, self._is_expected, lambda party: self._is_late(party, number)):
            for position, (place, pointer) in enumerate(self.cells):
                party = self.view[place]
                if wanted(party) and operand.compare_exchange(pointer, party, waiting):
                    return position
        return None  # more threads than parties wait: our death would go unnoticed, as in multiprocessing

    @staticmethod
    def _is_free(party: int) -> bool:
        return not party & at.OWNER

    @staticmethod
    def _is_expected(party: int) -> bool:
        return not party & at.ARRIVED and _process.is_alive(party)

    @staticmethod
    def _is_late(party: int, number: int) -> bool:
        return bool(party & at.ARRIVED) and party >> 1 & 15 != number & 15 and _process.is_alive(party)


def _leave_party(view: memoryview, cells: list[tuple[int, Any]], process: _process.ProcessIdentity) -> None:
    """A normal end, or the last object of this barrier is gone: this process is not expected any more."""
    if process is _process.current:
        operand = Operand()
        for place, pointer in cells:
            if view[place] == process.word:
                operand.compare_exchange(pointer, process.word, 0)


class _Arrival:
    """One thread that waits in one round."""

    precedence = 0

    def __init__(self, word: BarrierWord) -> None:
        self.word = word
        self.index = word.index
        self.number = -1
        self.position: int | None = None
        self.is_last = False
        self.process = _process.current
        self.count = Operand()
        self.back = Operand()
        self.mark = Operand()

    def arrive(self) -> int | None:
        """Be counted in the present round; how many were there before.  None if the round is over or full: again."""
        word = self.word
        w = word.view[word.place]
        self.leave()
        self.number = word._round(w)
        self.position = word.enter_party(self.number)
        if crash_points:
            crash_points[0]("C16 party arrived, not counted")
        while True:
            w = word.view[word.place]
            arrived = word._arrived(w)
            if w & (at.BROKEN | at.ACTING) or word._round(w) != self.number or arrived >= word.parties:
                return None
            self.is_last = arrived == word.parties - 1
            if word.change(self.count, w, w + at.ONE | (at.ACTING if self.is_last else 0)):
                if crash_points:
                    crash_points[0]("C17 party counted")
                return arrived

    def take_back(self) -> None:
        """By an exception: be no longer counted, if the round goes on.  May be called again when it was interrupted."""
        word = self.word
        if not self.count.succeeded():
            return
        if self.is_last:  # the round was ours to end: nobody else would
            if word.outcome(word.view[word.place], self.number) is None:
                word.abort()
            word.parking.unpark_many(self.index)
            return
        while not self.back.succeeded() and word.outcome(w := word.view[word.place], self.number) is None:
            if w & at.ACTING or not word._arrived(w):
                return  # everybody is here: the last one ends the round
            word.change(self.back, w, w - at.ONE)

    def leave(self) -> None:
        """Be no longer waiting, but expected in the next round."""
        word, position, self.position = self.word, self.position, None
        if position is None or self.count.process is not _process.current:
            return
        me = _process.current.word
        _, pointer = word.cells[position]
        if Operand().compare_exchange(pointer, me | at.ARRIVED | (self.number & 15) << 1, me):
            word.mine.append(position)

    def attempt(self, spot: Spot) -> bool:
        word = self.word
        spot.renew()
        while True:
            w = word.view[word.place]
            if word.outcome(w, self.number) is not None:
                return True
            if word.mark_parked(self.mark, w):
                return False

    def poll(self, spot: Spot) -> None:
        self.word.break_if_a_party_died()

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """Everybody is woken at once: nothing to pass on."""

    def pass_on(self) -> None:
        """Everybody is woken at once: nothing to pass on."""


class _OpenWaiter:
    """One thread that came while the last round was still ending."""

    precedence = 0

    def __init__(self, word: BarrierWord) -> None:
        self.word = word
        self.index = word.index
        self.mark = Operand()

    def attempt(self, spot: Spot) -> bool:
        word = self.word
        spot.renew()
        while True:
            w = word.view[word.place]
            if w & at.BROKEN:
                return True
            if not w & at.ACTING and word._arrived(w) < word.parties:
                return True
            if word.mark_parked(self.mark, w):
                return False

    def poll(self, spot: Spot) -> None:
        self.word.break_if_a_party_died()

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """Everybody is woken at once: nothing to pass on."""

    def pass_on(self) -> None:
        """Everybody is woken at once: nothing to pass on."""
