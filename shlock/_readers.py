"""Many readers or one writer: a record for each reader, beside the word that the writers take like a Lock's.

    W   the writers' word, as in ``_owned``.  While it has an owner, the door is closed: no reader goes in by himself
    C   one word for each reader at a time, its record: 0, or the process that reads, with IN_LINE while it waits
    G   DRAINING   W's owner is not inside yet: it waits for the readers that are
        SUSPECT    and when it began, a death inside was still to be told
        CROWDED    somebody waits for a record

    # C             the reader                        entered by                          leaves to
    # 0             nobody                            L1, Q8, reap                        READING, IN LINE
    # READING  p    is inside, or about to look at W  Q1, Q5, let in by a writer (W2)     0, IN LINE (Q2)
    # IN LINE  p|IN_LINE  waits for the writer        Q2, Q3, Q5 from LEFT                READING, LEFT (W2'), 0
    # LEFT     p|IN_LINE|LEFT  likewise, and a writer went by since it looked  W2'        READING, IN LINE (Q5), 0

    read
    Q1  W free: CAS(C: 0 -> me).   Q2  W still free: in.   Else CAS(C: me -> me|IN_LINE), L2 -> Q4
    Q3  W owned: CAS(C: 0 -> me|IN_LINE).  No C is 0: G := CROWDED, always, and look for one again.
    Q4  publish the spot.
    Q5  C = me: let in.   W free: CAS(C: me|IN_LINE -> me): in, without another look.
        W owned: CAS(w -> w|PARKED), always -> Q6
    Q6  sleep.  poll: W's owner is dead: CAS(w -> DIED, or 0 if he was not inside), wake as his release would have.  -> Q5
    Q7  S := IDLE: inside.   Q8  withdraw: S := IDLE, then as L1, L2
    leave
    L1  CAS(C: me -> 0).   L2  DRAINING: wake the writer that waits.  CROWDED: clear it, wake the line.
    write
    A1 to A8 of ``_owned``.  Then, with W:
    W1  DIED, but G says that who died was not inside: DIED := 0.
    W2  look at every C once: CAS(me|IN_LINE -> me) lets in who is in line.  Wake the line.
    W3  no C reads -> W5.  G := DRAINING, and SUSPECT if W has DIED.
    W4  publish the spot; no C reads -> W5; sleep.  poll: clear the records of the dead.
    W5  DRAINING := 0, SUSPECT := 0: inside.
    R1 to R3 of ``_owned``; R3 wakes the line first.

The line and the writer that waits have keys of their own in the parking place: the indices of the first two extensions.

Where some contracts have precedence (``rank``, or the class "kernel"), W is handed over as in ``_handover``, and besides:

    Q1' Q2 finds W owned: L1, L2; Q3' only with a spot: Q4 comes first
    Q5' C is LEFT: CAS(C: -> me|IN_LINE), and only then the look at W.  CAS(C: me|IN_LINE -> me) fails if it is LEFT meanwhile
    Q6' poll: W is reserved for one that does not come: as a writer's poll
    W2' lets in who is as good as this writer, or better; the others stay in line, CAS(C: me|IN_LINE -> me|IN_LINE|LEFT), and
        wake at R3
    W4' before each look, and so at each poll: lets in who is better.   A better writer waits for W: DRAINING := 0, give W back,
        and A1 again; not twice for the same one, which may be stopped

    # P1  a record in line belongs to a process that has a spot in line: there stands its precedence.  A process has one
    #     contract, and so one precedence, for all of its threads
    # P2  no reader is let in before a writer that is better.  X2 then counts the writers that are not better than the reader
    # P3  a writer that has W and is not inside waits as everybody does: it lets better ones go first, and is not thrown out
    # P4  a supervisor throws out those in the way only: of a writer W's owner and the readers, of a reader W's owner.  It
    #     compares what it granted, and ends each record of lower precedence by itself

    # X1  a writer is inside alone: its CAS of W comes before its looks at the C, a reader's CAS of C before its look at W
    # X2  while a reader is in line, at most one writer gets in: who takes W after that finds it at W2.  Whoever of the line
    #     sees W free may go in for the same reason: each writer that takes W from then on waits for it, or has left it in line,
    #     which its exchange sees: a look at W after that exchange would not do, as it may find the next writer again and again
    # X3  new readers wait as soon as a writer has W.  W2 is done once, so a stream of readers keeps no writer out
    # X4  DRAINING is set before the writer looks whether to sleep; pairs with L1 before L2.  It changes with W in hand only
    # X5  a death inside is told to everybody who comes until a writer has left; a death at W2 to W4, or of a reader, to nobody

    # killed after                 the words say          repaired by            outcome
    # C50 Q1 record taken          READING                a writer's poll        cleared
    # C51 Q2, Q3 in line           IN LINE                W2, then as C50        cleared
    # C52 inside, reading          READING                a writer's poll        cleared, nobody told
    # C53 L1, nobody woken         0                      the writer's poll      it gets in within its poll interval
    # C54 W taken, W2 not begun    HELD                   poll                   told, as C6 of a Lock
    # C55 line let in, not woken   READING                the readers' polls     they are in
    # C56 DRAINING set             HELD, DRAINING         poll                   nobody told
    # C57 DRAINING cleared         HELD                   poll                   told
    # C58 reader wrote who died    DEAD                   the next poll          it writes the same
    # C59 dead writer cleared      0, DIED, RESERVED      the others' polls      as C8 of a Lock
    # C63 about to give way        HELD, DRAINING         poll                   as C56: the better one gets in, nobody told
    # C64 record given back        0                      -                      nothing to repair
    # C68 W2' some left in line    HELD, LEFT             poll                   as C54; the readers' next look clears LEFT
    # C69 Q5' LEFT cleared         IN LINE                as C51                 as C51: nobody waits for it

All changes are compare-exchanges: there are no plain stores whose order would matter.  Under a lease a supervisor may take a
record away from a reader that is not inside (``_leased_readers``): so a reader believes of its record what its exchange says.
"""

from __future__ import annotations

import itertools
import weakref
from _thread import get_ident
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from . import _layout as at
from . import _process
from ._arena import Arena, Block
from ._atomic import Operand, Pointer
from ._handover import first_in_line, pass_on, settle
from ._owned import NO_POINTER, POISON, OwnedWords, describe
from ._parking import POLL_INTERVAL, Spot, deadline_after
from ._process import Forked
from ._sys import SYSTEM, crash_points
from .errors import Abandoned, AbandonedError

if TYPE_CHECKING:
    from .contract import Lease

__all__ = ["RWWords", "ReadHold", "Reading", "Writing", "keys_of", "runs"]

Place = tuple[int, int]  # of a waiter: spot and sequence
OF_WRITER: Final = at.DRAINING | at.SUSPECT
#: Looks at the records before a writer goes to sleep.
DRAINING_LOOKS: Final = 20


class RWWords(OwnedWords):
    """W, G and the records of one block, as this process uses them."""

    __slots__ = ("cells", "draining", "gate", "gate_pointer", "holds", "inherited", "line", "parts", "spare", "word")

    def __init__(self, block: Block) -> None:
        super().__init__(block, [block.word])
        words = block.arena.words
        self.word, self.gate = block.word, block.start + at.BLOCK_GATE
        self.gate_pointer = words.pointer(self.gate) if words.is_writable else NO_POINTER
        self.cells = [(place, words.pointer(place) if words.is_writable else NO_POINTER) for place in block.cells]
        #: The records, in runs that lie together: what looks at all of them takes a run at once.
        self.parts = [words.view[first:last] for first, last in runs(block.cells)]
        self.line, self.draining = keys_of(block.arena, block.index)
        self.holds: dict[int, ReadHold] = {}  # of the threads that read
        self.inherited: dict[int, int] = {}  # threads of the parent that read when this process was forked, and how deep
        self.spare: list[ReadHold] = []
        this = weakref.ref(self)
        self.on_heir = lambda: _judge(this())
        _all.add(self)

    # -- what is so ---------------------------------------------------------------------------------------------------

    def anybody_reads(self) -> bool:
        return any(c and not c & at.IN_LINE for part in self.parts for c in part.tolist())

    def readers(self) -> list[int]:
        """The process of each reader that is inside."""
        return [c for part in self.parts for c in part.tolist() if c and not c & at.IN_LINE]

    def abandoned(self) -> Abandoned | None:
        """Who died inside; one that still waited for the readers was not."""
        return None if self.was_outside() else super().abandoned()

    def was_outside(self) -> bool:
        """Whether W's owner, or the last one if that died, waits for readers, and nothing is to be told from before."""
        return self.view[self.gate] & OF_WRITER == at.DRAINING

    # -- the gate -----------------------------------------------------------------------------------------------------

    def change_gate(self, clear: int, add: int) -> None:
        """Change bits of G.  May be called again when it was interrupted."""
        operand = Operand()
        while (g := self.view[self.gate]) & ~clear | add != g and not operand.compare_exchange(
            self.gate_pointer, g, g & ~clear | add
        ):
            pass

    def next_word(self, w: int, free: int) -> tuple[int, int] | None:
        """Handed over only where there is precedence: readers would wait for the writer that is chosen."""
        return super().next_word(w, free) if self.is_ranked() else (w, free)

    def wake_next(self) -> None:
        """R3."""
        self.parking.unpark_many(self.line)
        super().wake_next()

    def wake_one(self) -> None:
        self.parking.unpark_many(self.line)
        super().wake_one()

    # -- reading ------------------------------------------------------------------------------------------------------

    def take_hold(self) -> ReadHold:
        try:
            hold = self.spare.pop()
        except IndexError:
            hold = ReadHold(next((cell for cell in self.cells if not self.view[cell[0]]), self.cells[0]))
        hold.take.tried = hold.back.tried = None
        hold.is_in_line = hold.owes_crowd = False
        return hold

    def claim(self, hold: ReadHold, cell: tuple[int, Pointer]) -> bool:
        """Before Q1 and Q3: whether this may be the record of ``hold``."""
        hold.cell, (hold.place, hold.pointer) = cell, cell
        return True

    def lose(self, hold: ReadHold) -> None:
        """The record is not that of ``hold`` any more, which could have been so only under a lease."""
        raise self.block.arena.damaged(f"a reader's record of block {self.block.index} was overwritten")

    def enter_slowly(self, hold: ReadHold, timeout: float | None, preempt: bool = False) -> None:
        """All of reading but the fast path; the hold may have a record already.  ``preempt``: only under a lease."""
        deadline = deadline_after(timeout)
        waiter = _ReaderInLine(self, hold)
        got = waiter.advance(None)
        if not got and timeout is not None and timeout <= 0:
            now = SYSTEM.monotonic()
            if now >= self.next_look:  # as A3: who only ever tries has to find a dead writer, too
                self.next_look = now + POLL_INTERVAL
                waiter.poll(None)
                got = waiter.advance(None)
        elif not got:
            looks = self.worthwhile_looks()
            while not got and looks > 1:
                looks -= 1
                got = waiter.advance(None)
            got = got or self.parking.park(waiter, deadline)
        if not got:
            raise self.timed_out(timeout)
        if self.view[self.word] & at.DIED:
            self.tell_heir()

    def leave(self, hold: ReadHold) -> None:
        """L1 and L2.  May be called again when it was interrupted."""
        while hold.has_record() and (c := self.view[hold.place]) & at.OWNER == hold.process.word:
            hold.back.compare_exchange(hold.pointer, c, 0)  # L1
        if crash_points:
            crash_points[0]("C53 record cleared, nobody woken")
        if self.view[self.gate] or hold.owes_crowd:
            self.after_leaving(hold)

    def step_back(self, hold: ReadHold) -> None:
        """P1: a reader without a spot that finds W owned gives its record back, and takes one when it has a spot."""
        self.leave(hold)
        hold.take.tried = hold.back.tried = None
        if crash_points:
            crash_points[0]("C64 record given back, no spot yet")

    def announce(self, reads: bool) -> None:
        """The calling thread is about to sleep, or to sleep on: who should know of it under a lease is told."""

    def settle_wait(self) -> None:
        """And it is told when the thread waits no more."""

    def after_leaving(self, hold: ReadHold) -> None:
        """L2."""
        g = self.view[self.gate]
        if g & at.DRAINING:
            self.parking.unpark_one(self.draining)
        if g & at.CROWDED:
            hold.owes_crowd = True
            self.change_gate(at.CROWDED, 0)
        if hold.owes_crowd:
            self.parking.unpark_many(self.line)
            hold.owes_crowd = False

    def refuse_if_poisoned(self, w: int) -> None:
        if w & at.DIED and self.policy == POISON:
            abandoned = self.abandoned()
            if abandoned is not None:
                raise AbandonedError(describe(self.block), abandoned)

    def recover(self) -> None:
        """Q6: pass on what a dead writer holds."""
        w = self.view[self.word]
        if at.is_reservation(w):
            self.poll_reservation(w, None)
        owner = at.process_in(w)
        if not owner or _process.is_alive(owner):
            return
        # G is what the dead one left: it changes only with W in hand, and the exchange below fails if somebody took that.
        g = self.view[self.gate]
        if not g & at.DRAINING:
            self.view[self.block.start + at.BLOCK_DEAD] = owner
            self.view[self.block.start + at.BLOCK_FOUND] = SYSTEM.time_ns()
        if crash_points:
            crash_points[0]("C58 a reader wrote who died")
        outside = g & OF_WRITER == at.DRAINING
        if pass_on(self.parking, self.block.index, w, keep=0 if outside else at.DIED, alive=True):
            if crash_points:
                crash_points[0]("C59 dead writer cleared, nobody woken")
            self.parking.unpark_many(self.line)
            settle(self.parking, self.block.index)

    def reap(self) -> None:
        """Clear the records of the dead."""
        alive: dict[int, bool] = {}
        operand = Operand()
        reaped = False
        for place, word in self.cells:
            c = self.view[place]
            owner = c & at.OWNER
            if owner and not alive.setdefault(owner, owner in alive or _process.is_alive(owner)):
                reaped |= operand.compare_exchange(word, c, 0)
        if reaped and self.view[self.gate] & at.CROWDED:
            self.change_gate(at.CROWDED, 0)
            self.parking.unpark_many(self.line)

    # -- writing ------------------------------------------------------------------------------------------------------

    def drain(self, deadline: float | None, preempt: bool = False, gave_way_to: Collection[Place] = ()) -> bool:
        """W2 to W5, with W in hand; False if the deadline came first.  GiveWay: a better writer waits, and is to have W (P3).

        preempt      readers of lower precedence are thrown out meanwhile
        gave_way_to  to whom this thread has given way already: one may be stopped
        """
        if crash_points:
            crash_points[0]("C54 W taken, nobody looked for")
        for part in self.parts:
            if any(part.tolist()):
                if not self._drain_slowly(deadline, preempt, gave_way_to):
                    return False
                self.begin_hold()
                break
        if self.view[self.gate] & OF_WRITER:
            self.change_gate(OF_WRITER, 0)  # W5
        if crash_points:
            crash_points[0]("C57 alone inside")
        return True

    def _drain_slowly(self, deadline: float | None, preempt: bool, gave_way_to: Collection[Place]) -> bool:
        self.let_in(self.precedence, leaves=True)
        for _ in range(DRAINING_LOOKS):
            if not self.anybody_reads():
                return True
            if deadline is not None and SYSTEM.monotonic() >= deadline:
                return False
        suspect = at.SUSPECT if self.view[self.word] & at.DIED else 0
        self.change_gate(0, at.DRAINING | suspect)  # W3
        if crash_points:
            crash_points[0]("C56 DRAINING set")
        self.move_deadline()
        with self.grant.preempts() if preempt else nullcontext():
            try:
                return self.parking.park(_Drainer(self, gave_way_to), deadline)
            finally:
                self.settle_wait()

    def let_in(self, least: int, leaves: bool = False) -> None:
        """W2, and W4 where there is precedence: let in who is in line, with precedence only who has so much, and wake them.

        leaves  W2': the others are to know that they were not, as one may have seen W free before it was taken
        """
        operand = Operand()
        found = False
        precedences = self._precedences_in_line() if self.is_ranked() else None
        for place, word in self.cells:
            while (c := self.view[place]) & at.IN_LINE:
                if precedences is None or precedences.get(c & at.OWNER, 0) >= least:
                    found = True
                    operand.compare_exchange(word, c, c & ~(at.IN_LINE | at.LEFT))
                elif not leaves or c & at.LEFT or operand.compare_exchange(word, c, c | at.LEFT):
                    break
        if crash_points and leaves:
            crash_points[0]("C68 line let in or left, nobody woken")
        if found:
            if crash_points:
                crash_points[0]("C55 line let in, not woken")
            self.parking.unpark_many(self.line)

    def _precedences_in_line(self) -> dict[int, int]:
        """By process; it has one for all of its threads.  P1: who is in line has a spot."""
        load, spot = self.parking.words.load, self.parking.layout.spot
        return {
            load(spot(at.SPOT_CLAIM, index)): load(spot(at.SPOT_PRECEDENCE, index)) for index in self.parking.in_line(self.line)
        }

    @property
    def precedence(self) -> int:
        """Of this process."""
        return 0 if self.grant is None else int(self.grant.precedence)

    def better_writer(self, but: Collection[Place]) -> Place | None:
        """P3: the first in line for W, if that one is better than this process and lives, and is none of these."""
        load, spot = self.parking.words.load, self.parking.layout.spot
        index = first_in_line(self.parking, self.block.index, alive=True)
        if index is None or load(spot(at.SPOT_PRECEDENCE, index)) <= self.precedence:
            return None
        place = index, load(spot(at.SPOT_STATE, index)) & at.SEQUENCE
        return None if place in but else place

    def move_deadline(self) -> None:
        """Under a lease: the time that a writer waits for readers is none of its hold's."""
        grant = self.grant
        if grant is not None and grant.seat.cell_contents == get_ident():
            grant.moments[grant.began] = SYSTEM.monotonic()

    def begin_hold(self) -> None:
        """Under a lease, after waiting for readers: the hold begins now, and its token is larger than theirs (Y4)."""
        self.move_deadline()
        if self.grant is not None:
            token = self.block.start + at.BLOCK_TOKEN
            self.view[token] = self.view[token] + 1 & at.WORD_MASK

    def timed_out(self, timeout: float | None) -> TimeoutError:
        readers, owners = self.readers(), self.owners()
        by = f"{len(readers)} read" if readers else f"pid {_process.pid_of(owners[0])} has it" if owners else "now it is free"
        return TimeoutError(f"{describe(self.block)}: not within {timeout or 0.0:g} s; {by}")

    def misused(self, fact: str) -> RuntimeError:
        return RuntimeError(f"{describe(self.block)}: this thread {fact}")


def _judge(words: RWWords | None) -> None:
    """W1."""
    if words is not None and words.was_outside():
        operand, pointer = Operand(), words.places[0][1]
        while (w := words.view[words.word]) & at.DIED and not operand.compare_exchange(pointer, w, w & ~at.DIED):
            pass


def runs(places: Any) -> Iterator[tuple[int, int]]:
    """First and behind-the-last place of each run of consecutive ones."""
    first = last = -1
    for place in places:
        if place != last:
            if first >= 0:
                yield first, last
            first = place
        last = place + 1
    if first >= 0:
        yield first, last


def keys_of(arena: Arena, index: int) -> tuple[int, int]:
    """Under which keys the line is parked, and a writer that waits for readers.  SegmentError if the block is damaged."""
    load = arena.words.load
    first = load(arena.layout.block(index) + at.BLOCK_MORE)
    second = load(arena.layout.block(first) + at.EXTENSION_NEXT) if 0 < first < arena.layout.blocks else 0
    if not 0 < second < arena.layout.blocks:
        raise arena.damaged(f"RWLock {index} has no records")
    return first, second


class ReadHold:
    """A reader's record and its way in and out.  It knows what has been done, whatever interrupts."""

    __slots__ = (
        "back", "cell", "depth", "is_in_line", "lease", "owes_crowd", "place", "pointer", "process", "slot", "take", "thread",
        "token", "turn",
    )  # fmt: skip
    is_in_line: bool  # it once was: READING means that it is inside
    owes_crowd: bool  # it cleared CROWDED, and has not woken anybody yet

    def __init__(self, cell: tuple[int, Pointer]) -> None:
        self.cell = cell  # the record to be tried first
        self.place, self.pointer = cell
        self.depth = 0
        # Under a lease: the present one, the slot of the ledger, the thread, and what the token was (``_leased_readers``).
        self.lease: Lease | None = None
        self.slot: Any = None
        self.thread = self.token = 0
        self.take, self.turn, self.back = Operand(), Operand(), Operand()
        self.process = _process.current

    def has_record(self) -> bool:
        return self.take.succeeded() and not self.back.succeeded()


class _ReaderInLine:
    """One thread on its way to read."""

    def __init__(self, words: RWWords, hold: ReadHold) -> None:
        self.words = words
        self.hold = hold
        self.index = words.line
        self.precedence = words.precedence
        self.mark = Operand()

    def advance(self, spot: Spot | None) -> bool:
        """Q1 to Q5, as far as it goes; whether it is inside."""
        words, hold = self.words, self.hold
        view, word, token, me = words.view, words.word, words.block.start + at.BLOCK_TOKEN, hold.process.word
        while True:
            hold.token = view[token]  # Y4: before W
            w = view[word]
            if not w & at.OWNER:
                words.refuse_if_poisoned(w)
            if not hold.has_record():
                is_closed = bool(w & at.OWNER)
                if is_closed and spot is None and words.is_ranked():
                    return False  # P1: the spot first
                if not self._take_record(me | at.IN_LINE if is_closed else me, spot):
                    return False
                hold.is_in_line = is_closed
                if crash_points:
                    crash_points[0]("C51 in line" if is_closed else "C50 record taken")
                continue
            c = view[hold.place]
            if c & at.OWNER != me:
                words.lose(hold)
                continue
            if hold.is_in_line and not c & at.IN_LINE:
                hold.token = view[token]
                return True
            if c & at.LEFT:  # before the look at W: who takes that later leaves it once more, or lets in
                if hold.turn.compare_exchange(hold.pointer, c, c & ~at.LEFT) and crash_points:
                    crash_points[0]("C69 in line again, not yet looked")
                continue
            if not w & at.OWNER:
                if not hold.is_in_line or hold.turn.compare_exchange(hold.pointer, c, me):
                    return True
            elif not hold.is_in_line and spot is None and words.is_ranked():
                words.step_back(hold)  # P1
                return False
            elif not hold.is_in_line:
                if not hold.turn.compare_exchange(hold.pointer, c, me | at.IN_LINE):
                    continue
                hold.is_in_line = True
                if crash_points:
                    crash_points[0]("C51 in line")
                if view[words.gate]:
                    words.after_leaving(hold)
            elif spot is None or self.mark.compare_exchange(words.places[0][1], w, w | at.PARKED):
                return False

    def _take_record(self, value: int, spot: Spot | None) -> bool:
        words, hold = self.words, self.hold
        view, take = words.view, hold.take
        for is_last in (spot is None, True):
            for cell in itertools.chain((hold.cell,), words.cells):
                if not view[cell[0]] and words.claim(hold, cell) and take.compare_exchange(hold.pointer, 0, value):
                    return True
            if is_last:
                break
            while not self.mark.compare_exchange(words.gate_pointer, g := view[words.gate], g | at.CROWDED):
                pass
        return False

    def attempt(self, spot: Spot) -> bool:
        spot.renew()
        if self.advance(spot):
            return True
        self.words.announce(reads=True)
        return False

    def poll(self, spot: Spot | None) -> None:
        self.words.recover()
        if not self.hold.has_record():
            self.words.reap()

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """Q8."""
        self.words.leave(self.hold)

    def pass_on(self) -> None:
        """The whole line is woken at once: nothing to pass on."""


class GiveWay(Exception):
    """P3: a writer that waits for readers is to leave W to a better one."""

    def __init__(self, to: Place) -> None:
        super().__init__(to)
        self.to = to


class _Drainer:
    """The writer that has W, and waits until the readers are gone."""

    precedence = 0

    def __init__(self, words: RWWords, gave_way_to: Collection[Place]) -> None:
        self.words = words
        self.index = words.draining
        self.gave_way_to = gave_way_to

    def attempt(self, spot: Spot) -> bool:
        """W4."""
        spot.renew()
        words = self.words
        if words.is_ranked():
            words.let_in(words.precedence + 1)  # P2
        if not words.anybody_reads():
            return True
        if words.is_ranked() and (better := words.better_writer(self.gave_way_to)):
            raise GiveWay(better)
        words.announce(reads=False)
        return False

    def poll(self, spot: Spot) -> None:
        self.words.reap()
        self.words.move_deadline()

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """Nobody else is woken for this."""

    def pass_on(self) -> None:
        """Nobody else is woken for this."""


class Reading:
    """The ``with`` of read.  Which thread is inside, and how deep, the words know: an object may be used again and again."""

    __slots__ = ("_preempt", "_timeout", "_words")

    def __init__(self, words: RWWords, timeout: float | None, preempt: bool = False) -> None:
        self._words = words
        self._timeout = timeout
        self._preempt = preempt

    def __enter__(self) -> Lease | None:
        words = self._words
        thread = get_ident()
        hold = words.holds.get(thread)
        if hold is not None and hold.process is _process.current:
            hold.depth += 1
            return hold.lease
        if words.holder.cell_contents == thread and words.is_mine():
            raise words.misused("writes, and would have to wait for itself to read: leave the write first")
        hold = None
        try:
            while True:
                try:
                    hold = words.take_hold()
                    if words.view[words.word] or not hold.take.compare_exchange(hold.pointer, 0, hold.process.word):  # Q1
                        words.enter_slowly(hold, self._timeout, self._preempt)
                    else:
                        if crash_points:
                            crash_points[0]("C50 record taken")
                        if words.view[words.word]:  # Q2
                            words.enter_slowly(hold, self._timeout)
                    if crash_points:
                        crash_points[0]("C52 inside, reading")
                    if hold.process is _process.current:
                        hold.depth = 1
                        words.holds[thread] = hold
                        return hold.lease  # nothing is called once it is noted
                except Forked:
                    pass  # we are a child that was forked meanwhile: it starts as itself
        except BaseException:
            try:
                self._undo(hold)
            except BaseException:  # a signal handler's, when what we undo for was none of those
                _process.to_the_end(lambda: self._undo(hold))
                raise
            raise

    def _undo(self, hold: ReadHold | None) -> None:
        if hold is not None and hold.process is _process.current:
            self._words.leave(hold)

    def __exit__(self, kind: object = None, value: object = None, traceback: object = None) -> None:
        words = self._words
        hold: ReadHold | None = None
        interruption: BaseException | None = None
        tries = thread = 0
        while True:
            try:
                if hold is None:
                    thread = get_ident()
                    hold = words.holds.get(thread)
                    if hold is None or hold.process is not _process.current:
                        hold = None
                        depth = words.inherited.get(thread, 0)
                        if depth:
                            words.inherited[thread] = depth - 1
                        else:
                            interruption = words.misused("does not read")
                        break
                    if hold.depth > 1:
                        hold.depth -= 1
                        break
                words.leave(hold)
                if hold.process is not _process.current:
                    return
                del words.holds[thread]  # no call since the test
                words.spare.append(hold)
                break
            except Forked:
                return  # a child, in the middle of its parent's way out
            except BaseException as error:  # finish first: a half-done way out would keep writers out
                tries += 1
                if tries > _process.MOST_INTERRUPTIONS:
                    raise
                interruption = error
                if hold is not None and words.holds.get(thread) is not hold:
                    break  # all was done
        if interruption is not None:
            raise interruption


class Writing:
    """The ``with`` of write, and of repair.

    ``acquire`` and ``leave`` are those of the lock of the writers; ``give_back`` leaves it as one who was not inside.
    """

    __slots__ = ("_acquire", "_give_back", "_leave", "_preempt", "_process", "_timeout", "_words")

    def __init__(
        self,
        words: RWWords,
        acquire: Callable[..., Any],
        leave: Callable[..., object],
        give_back: Callable[[], object],
        timeout: float | None,
        preempt: bool = False,
    ) -> None:
        self._words = words
        self._preempt = preempt
        self._acquire, self._leave, self._give_back = acquire, leave, give_back
        self._timeout = timeout
        self._process: _process.ProcessIdentity | None = None

    def __enter__(self) -> Any:
        words, timeout = self._words, self._timeout
        if words.is_mine():
            raise words.misused("writes already, and it is not recursive")
        hold = words.holds.get(get_ident())
        if hold is not None and hold.process is _process.current:
            raise words.misused("reads, and would have to wait for itself to write: leave the read first, then look again")
        try:
            deadline, left = deadline_after(timeout), timeout
            gave_way_to: set[Place] = set()
            while True:
                try:
                    if not self._acquire(True, left) or not words.drain(deadline, self._preempt, gave_way_to):
                        raise words.timed_out(timeout)
                    grant = words.grant
                    if grant is not None and grant.record_site:
                        grant.note_site(2)
                    lease = None if grant is None else grant.lease
                    self._process = _process.current
                    return lease
                except Forked:
                    pass  # as in Reading
                except GiveWay as better:
                    gave_way_to.add(better.to)
                    if crash_points:
                        crash_points[0]("C63 about to give way")
                    self._undo()
                if deadline is not None:
                    left = max(0.0, deadline - SYSTEM.monotonic())
        except BaseException:
            try:
                self._undo()
            except BaseException:  # as in Reading
                _process.to_the_end(self._undo)
                raise
            raise

    def _is_inside(self) -> bool:
        words = self._words
        return words.is_mine() or words.lease_seat.cell_contents == get_ident()

    def _undo(self) -> None:
        words = self._words
        if self._is_inside():
            words.change_gate(OF_WRITER, 0)
            self._give_back()

    def __exit__(self, kind: object = None, value: object = None, traceback: object = None) -> None:
        if self._process is not _process.current:
            return  # a child that was forked inside: it is its parent's
        interruption: BaseException | None = None
        tries = 0
        while True:
            try:
                if self._is_inside():
                    self._leave(kind, value, traceback)
                break
            except BaseException as error:
                tries += 1
                if tries > _process.MOST_INTERRUPTIONS:
                    raise
                interruption = error
        if interruption is not None:
            raise interruption


_all: weakref.WeakSet[RWWords] = weakref.WeakSet()


def _in_child() -> None:
    for words in list(_all):
        for thread, hold in words.holds.items():
            words.inherited[thread] = words.inherited.get(thread, 0) + hold.depth
        words.holds.clear()
        words.spare.clear()


_process.refresh_in_child.append(_in_child)
