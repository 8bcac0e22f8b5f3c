"""Reading under a lease: what W is to its owner (``_leased``), a record is to its reader.

A process has one contract for an RWLock, and in its ledger one slot more for each record in which it has read: so each of its
threads that read has a deadline of its own.  It is one process that is killed, whichever of them it is that overruns.  No
supervisor is asked for such a slot; it finds it by the place of the record, which stands in it (RECORD).

    # C                 the ledger says   its reader                 entered by            leaves to
    # READING  p        not inside        is at the door             Q1, Q5, W2; X1        inside (E2), 0 (X2), TAKEN (T1)
    # READING  p        inside            reads                      E2                    at the door (X1); killed (K)
    # p|TAKEN           either            it is being decided        T1                    READING (E3, T3), IN LINE (Q2), 0
    # IN LINE  p        not inside        keeps nobody out           as in ``_readers``    likewise

    E0  the seat of the record: one thread of this process at a time from here to X3.  BEGAN is 0
    E1  Q1 to Q7
    E2  HOLDS + 1, then BEGAN := now                                                   plain stores
    E3  c = C, plain load.  READING: inside.  TAKEN: CAS(c -> READING), failed: E3.  not ours any more: X1 to X3, then E0
    X1  BEGAN := 0                                                                     plain store
    X2  L1 and L2, with TAKEN or without.  C is not ours any more: nothing to do
    X3  leave the seat; CROWDED: L2 again

    # Y1  C leaves READING of P by an exchange of P's own, by T3, whose TAKEN P's Q2, E3 or L1 sees, or after P's death: so X1
    #     of ``_readers`` stays true.  A supervisor makes every processor pass a fence between T1 and T3, as for W
    # Y2  nobody is killed for reading whose hold ended in time, or who is not inside (K)
    # Y3  C names the process, the seat one of its threads: who was stopped before X2 clears no record that another has by now
    # Y4  a reader's token is smaller than that of each writer that goes in after it, and not smaller than that of one that was
    #     inside before.  It is read after C is READING or in line, and before the look at W that lets the reader in: a writer
    #     that takes W later takes its token after that.  Who was let in reads it then; for a writer that has looked for readers
    #     and found some takes a second token when they are gone
    # Y5  a thread that finds every record taken, or its seat, is woken: it sets CROWDED before it looks at both once more, and
    #     X3 comes before the last look at CROWDED

    # killed or stopped after           the ledger says   done by the supervisor
    # C65 E1, no deadline               not inside        C is taken away after a lease; dead: cleared
    # C66 E2, C not looked at           inside            killed at deadline + grace, then cleared
    # C52 inside                        inside            likewise
    # C67 X1, C not cleared             not inside        as C65
    # C53 X2                            not inside        nothing to do

Under a contract that inherits THREAD of the slot is written before C can be ours; it counts as long as C and the slot say that
we read.  A writer at the door waits for every reader, and a reader for W's owner, which may be at the door itself.

Nobody is told of a dead reader: it has changed nothing.  A reader in line owes nothing; but who was let in and does not come
for a lease loses its record, and begins again when it does come.
"""

from __future__ import annotations

import threading
from _thread import get_ident
from contextlib import nullcontext
from typing import Any, Final

from . import _layout as at
from . import _ledger, _process
from ._atomic import Operand, Pointer, new_cell
from ._readers import ReadHold, RWWords
from ._sys import SYSTEM, crash_points
from .contract import Grant, Lease, Slot, raise_for

__all__ = ["LeasedRWWords"]

#: In place of a record, for who has not claimed one yet: an exchange that expects 0 fails.
_NO_RECORD, _no_record_cell = new_cell(1)
_FRAMES: Final = 3  # from the program's ``with`` to note_site


class ReaderSlot(Slot):
    """One record of an RWLock as this process uses it."""

    __slots__ = ("_arena_view", "_token", "is_open", "seat")

    def __init__(self, grant: Grant, words: RWWords) -> None:
        super().__init__(grant.ledger, grant.connection.take_slot(), grant.text, grant.terms.lease)
        self._arena_view, self._token = words.view, words.block.start + at.BLOCK_TOKEN
        self.is_open = False  # the ledger says what it is for
        self.seat: ReadHold | None = None  # whose it is between E0 and X3

    @property
    def lease(self) -> Lease | None:
        began = self.moments[self.began]
        return self.make_lease(began, self._arena_view[self._token]) if began else None

    def is_of_caller(self) -> bool:
        return self.seat is not None and self.seat.thread == get_ident()


class LeasedRWWords(RWWords):
    """The words of an RWLock whose readers, too, have deadlines."""

    __slots__ = ()

    def take_hold(self) -> ReadHold:
        """As ever; but nothing is its record before its seat is taken: Q1 of ``Reading`` fails, ``enter_slowly`` goes on."""
        if self.grant.is_away:
            from ._client import renew

            renew(self)
        hold = super().take_hold()
        hold.pointer, hold.thread, hold.lease = _NO_RECORD, get_ident(), None
        return hold

    def claim(self, hold: ReadHold, cell: tuple[int, Pointer]) -> bool:
        """E0.  False if another thread of this process has the seat."""
        self._leave_seat(hold)  # of another record, which somebody was faster to get
        grant: Grant = self.grant
        slot = hold.slot = self._slot_of(grant, cell[0])
        if slot.seat is not None:
            return False
        slot.seat = hold  # no call since the test, so nobody came in between
        if not slot.is_open:
            grant.connection.use_for_reader(slot.number, grant, self.block, cell[0])
            slot.is_open = True
        if grant.terms.inherit and hold.process is _process.current:  # else a forked child, which has no ledger
            slot.view[_ledger.THREAD + slot.number] = threading.get_native_id()
        return super().claim(hold, cell)

    def _slot_of(self, grant: Grant, place: int) -> ReaderSlot:
        slot: ReaderSlot | None = grant.readers.get(place)
        if slot is None:
            made = ReaderSlot(grant, self)
            slot = grant.readers.setdefault(place, made)
            if slot is not made:
                grant.connection.give_up_slot(made.number)
            elif grant.terms.on_terminate == "raise":
                raise_for(slot)
        return slot

    def enter_slowly(self, hold: ReadHold, timeout: float | None, preempt: bool = False) -> None:
        deadline = None if timeout is None else SYSTEM.monotonic() + timeout
        while True:
            left = timeout if deadline is None else max(0.0, deadline - SYSTEM.monotonic())
            grant: Grant = self.grant
            with grant.preempts() if preempt else nullcontext():
                try:
                    super().enter_slowly(hold, left)  # E1
                finally:
                    grant.settle_wait()
            if crash_points:
                crash_points[0]("C65 record taken, no deadline")
            slot, began = hold.slot, SYSTEM.monotonic()
            holds = _ledger.HOLDS + slot.number
            if hold.process is not _process.current:
                raise _process.Forked  # no call from here to E2: a child has no ledger any more
            slot.view[holds] = slot.view[holds] + 1 & at.WORD_MASK
            slot.moments[slot.began] = began  # E2
            if crash_points:
                crash_points[0]("C66 deadline written")
            if self._is_ours(hold):  # E3
                hold.lease = slot.make_lease(began, hold.token)
                if self.grant.record_site:
                    slot.note_site(_FRAMES)
                return
            self.lose(hold)

    def _is_ours(self, hold: ReadHold) -> bool:
        me, operand = hold.process.word, Operand()
        while (c := self.view[hold.place]) & at.OWNER == me:
            if c == me or operand.compare_exchange(hold.pointer, c, me):
                return True
        return False

    def lose(self, hold: ReadHold) -> None:
        """T3 has taken the record away: begin again, without one."""
        self.step_back(hold)
        hold.is_in_line = False

    def announce(self, reads: bool) -> None:
        grant: Grant = self.grant
        if grant.rings:
            grant.announce_wait(reads)
        if grant.preempting:
            grant.ask_for_preemption(reads)

    def settle_wait(self) -> None:
        self.grant.settle_wait()

    def leave(self, hold: ReadHold) -> None:
        slot = hold.slot
        if slot is not None and slot.seat is hold and hold.process is _process.current:
            slot.moments[slot.began] = 0.0  # X1
            if crash_points:
                crash_points[0]("C67 deadline cleared, record not")
        super().leave(hold)  # X2
        self._leave_seat(hold)  # X3
        if self.view[self.gate] & at.CROWDED:
            self.after_leaving(hold)  # Y5
        if self.grant.rings:
            self.grant.tell_if_lifted()

    def _leave_seat(self, hold: ReadHold) -> None:
        slot: Any = hold.slot
        if slot is not None:
            if slot.seat is hold:
                slot.seat = None
            hold.slot = None
