"""Words that name their owner: the lock protocol.  A Lock is one such word; an owned Semaphore of n permits is n of them.

    # W                     owner   entered by                        leaves to
    # 0                     -       R1, R2, A8, first state           HELD
    # HELD      me          live    A1, A2                            0 (R1), HELD|P
    # HELD|P    me|PARKED   live    A5, a waiter's mark               0 (R2)
    # DEAD      any HELD    dead    the owner's death                 HEIR (poll), POISONED (poll, under "poison")
    # HEIR      me|P|DIED   live    poll, A2 and A5 from POISONED     0 (R2), POISONED (A8, or a repair that failed)
    # POISONED  DIED        -       poll, A8 of an heir               HEIR (the next acquire; under "poison" only repair())

    acquire
    A1  CAS(W: 0 -> me): in.
    A2  look for a bounded time: W free: CAS(w -> me | flags of w): in; w had DIED: we are the heir, and told.
        Not by who gives way.
    A3  not blocking: False.  Who only ever tries has to find a dead owner too: a poll, at most once per poll interval.
    A4  publish the spot.
    A5  w = W.  free: CAS(w -> me|PARKED|DIED of w): in -> A7.  Who gives way, and has not polled yet, -> A6 if a thread is
                NOTIFIED for this word.
                held: CAS(w -> w|PARKED), also when the bit is set -> A6.  Needless while a thread is NOTIFIED for this word:
                it takes W with PARKED, or marks it, or passes its wake-up on.  (A4 and A6 are exchanges: our S is out
                before we look.)
    A6  sleep.  poll: the owner is dead: CAS(w -> me|PARKED|DIED): in, and told -> A7.  else -> A5.
                chosen: W stays free for a moment: CAS(w -> me|PARKED|DIED of w): in -> A7.  held: nap, S still NOTIFIED, a
                number of times; then mark W and look for a moment; then S := WAITING -> A5.
    A7  S := IDLE.  The lock was taken WITH PARKED: others may sleep behind us.  Chosen once more meanwhile: as A8.
    A8  withdraw: S := IDLE, then by what W says: ours: CAS -> DIED of w, wake one.  free: wake one.
                another's: CAS(w -> w|PARKED).
    release
    R1  CAS(W: me -> 0): out.
    R2  CAS(w -> 0): PARKED goes, because a waiter will be on its way; DIED goes, because the heir has done its part.
    R3  wake one, unless one is on its way already.  Runs to its end also when it is interrupted.

    R2 clears PARKED before anybody is woken, so that until the woken thread has come the lock is as cheap as an uncontended
    one.  What that thread then does, whatever it is, restores I1: it takes W with PARKED, or marks it, or passes it on.  Where
    somebody takes and releases W all the time it comes too late; instead of marking W, which would cost the owner a wake-up
    at each release, it naps.  To everybody else it has just not woken up yet, so naps need no state.  A turn bounds them.

    So a word that many want goes from one to the next in turns, and in its turn a process has it as if nobody else was there.
    Who has had its turn *gives way*: if the lock is not free when it comes again, it goes to the end of the line, and neither
    looks for a gap nor takes what is free while another thread is on its way in.  So do two processes that take it from each
    other at every passage: that costs both of them more than a turn of the other.

    # I1  a parked waiter implies PARKED, or a wake-up under way, or a releaser between R2 and R3: no release misses it
    # I5  at most one process is inside: W changes to "me" by compare-exchange from a word without an owner, or from the
    #     exact word of an owner that the kernel calls dead
    # I6  a death inside is told once to each heir in turn until one of them releases: DIED stays in W while the heir holds
    # I7  who takes W from the parking place leaves PARKED in it

    # killed after             the word says     repaired by   outcome
    # C6 A1, A2, A5: taken     HELD              poll          heir told
    # C7 R1                    0                 -             nothing to repair
    # C8 R2, nobody woken      0                 poll          a waiter gets in within its poll interval
    # C9 heir took it          HEIR              poll          the next heir is told of this one
    # C10 poll wrote who died  DEAD              poll          the next poll writes the same

"me" is the word of the process.  Which of its threads holds it, and whether an interrupted compare-exchange was carried out,
is known only inside the process (``holder``, ``Operand.succeeded``).  A thread of a living process that ends while it
holds is not a dead owner.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
import weakref
from _thread import get_ident
from collections.abc import Callable
from types import CellType
from typing import Any, Final

from . import _bias, _process
from . import _layout as at
from ._arena import Block
from ._atomic import Door, Operand, Pointer, borrow_operand, give_back, new_cell, pointer
from ._deadlock import Wait, copy_of
from ._handover import LONGEST_RESERVATION, is_for, is_in_vain, is_of_the_dead, pass_on, prepare, settle
from ._parking import POLL_INTERVAL, Spot, deadline_after, parking_of
from ._process import Forked
from ._sys import SYSTEM, crash_points
from .errors import Abandoned, AbandonedError, AbandonedWarning, DeadlockError

__all__ = ["NO_CONTRACT", "OwnedWords", "usable_cores"]

WARN, IGNORE, POISON = range(len(at.POLICIES))
#: Of the seat of a leased lock, beside the number of a thread and 0: there is no contract, or no more.
NO_CONTRACT: Final = -1

#: Looks at a held word before a thread goes to sleep; each look takes some 0.1 us.
MOST_LOOKS: Final = 150
FEWEST_LOOKS: Final = 15
#: Nanoseconds for which a thread insists that has napped for a whole turn.  It marks the word: the owner's next release
#: leaves the word free for several us, because it looks for somebody to wake, and finds that this thread is on its way.
LONGEST_INSISTENCE: Final = 150_000
#: Nanoseconds after which a process that has the word all the time hands it over to a thread that has waited as long.
TURN: Final = 1_000_000
#: So many turns after it began its own one, a process does not give way any more because of that.
LONGEST_RESPECT: Final = 10
#: How often in a row, so many ns apart at most, a process gets in by looking until it gives way; more often in a turn.
LONGEST_RALLY: Final = 8
LONGEST_RALLY_IN_TURN: Final = 32
RALLY: Final = 50_000
#: How often in a row a thread that has napped must see the word free: else its owner is only between two passages.
LOOKS_AT_A_GAP: Final = 20
_PACKAGE: Final = os.path.join(os.path.dirname(__file__), "")
NO_POINTER: Final = pointer(0)
RELEASED_TOO_OFTEN: Final = "semaphore or lock released too many times"


class OwnedWords:
    """The owned words of one control block, as this process uses them: what all its objects for that block share."""

    __slots__ = (
        "__weakref__", "bias_slots", "biased", "block", "credit", "depth", "door", "finishing", "first_claim", "first_hold",
        "go_in", "go_out", "grant", "granted", "granter", "has_door", "has_had_turn", "has_permits", "holder", "inside",
        "is_inherited", "is_lock", "kept", "lease_began", "lease_doubt", "lease_odd", "lease_seat", "lease_spare",
        "lease_token", "leaver", "leaving", "limit", "looked", "looks", "lowest", "mark", "may_release", "may_take", "me",
        "mine", "name", "next_look", "on_heir", "parking", "places", "policy", "rally", "skips", "slot", "turn", "users",
        "view", "zero",
    )  # fmt: skip

    def __init__(self, block: Block, places: list[int]) -> None:
        words = block.arena.words
        self.block = block
        self.view = words.view
        #: Index and pointer of each.  In a read-only mapping there is nothing to point to: the lock then refuses everything.
        self.places: list[tuple[int, Pointer]] = [
            (place, words.pointer(place) if words.is_writable else NO_POINTER) for place in places
        ]
        self.has_permits = block.owned  # of a Semaphore: who took one gives it back, and nobody else
        self.policy = min(block.policy, POISON)
        self.parking = parking_of(block.arena)
        #: Which thread of this process took it last, 0 = none holds it; means something while it is ours.  A cell, as others
        #: below: all functions of the fast path share it.
        self.holder = CellType(0)
        self.depth = 1  # how often an RLock's owner took it
        self.is_inherited = False  # this process was forked while its parent held it, and may be inside the parent's with
        self.next_look = 0.0
        self.looks = MOST_LOOKS // 4  # how often looking is worth it: more after a success, less after a failure
        self.skips = [0]
        #: Of a leased lock (``_leased``): the contract of this process, which of its threads is in or on its way, and the words
        #: of its ledger that say since when, and whether the supervisor doubts it.  These are cells, too, as the functions of
        #: the leased path share them.
        self.grant: Any = None
        self.lease_seat, self.lease_began, self.lease_doubt = CellType(NO_CONTRACT), CellType(None), CellType(None)
        #: Whether there is more to do on the way out: a site to record, LEFT to write, a gate to open, nothing to keep.
        self.lease_odd = CellType(False)
        #: The token of the latest hold of this process; a Lease that nobody has any more, to be used again.
        self.lease_token, self.lease_spare = CellType(0), CellType(None)
        #: Called under the lock by who got it after a death, before anything else: it decides what the dead one has done.
        self.on_heir: Callable[[], None] | None = None
        self.is_lock = not block.owned  # one word, that of the block itself
        self.kept = (0, 0.0)  # the reservation that a poll saw first, and when that was
        self.turn = 0  # when a thread of this process was last chosen and got it, in monotonic nanoseconds
        self.has_had_turn = False  # since then it was handed over, or a bias revoked, at the end of that turn
        self.looked = self.rally = 0  # when it last got in by looking, in the same way, and how often in a row
        # Of the biased path (``_bias``).  The first seven are cells, which the functions of the quick paths share.
        self.go_in, self.go_out = CellType(_bias.NEVER_OPEN), CellType(None)
        self.inside, self.has_door = CellType(0), CellType(False)
        self.lowest, self.mark, self.credit = CellType(None), CellType(0), CellType(0)  # the lowest byte of W, and what it is
        self.limit = self.credit.cell_contents = _bias.first_credit(block.kind)
        self.bias_slots = at.bias_slots(block.kind_word)
        self.first_claim, self.first_hold = (block.start + place for place in at.bias_words(block.kind_word))
        self.door: Door | None = None
        self.leaver = 0  # which of our threads is giving the bias back
        self.users: list[weakref.ref[Any]] = []  # objects whose functions depend on whether there is a door
        self.slot = self.biased = self.granted = 0  # our slot, its word, how long we had run by then
        self.finishing = False  # whether it is at B6
        self.granter = False  # whether one of them is being granted a bias
        self.leaving: Operand | None = None
        # Of ``_fast_path``: this process, what A1 and R1 expect, and whether each operand is free.
        self.me = CellType(_process.current.word)
        self.zero, self.mine = new_cell(0), new_cell(_process.current.word)
        self.may_take, self.may_release = CellType(HAS_LOCK), CellType(HAS_LOCK)
        _all_words.add(self)

    @property
    def may_be_biased(self) -> bool:
        """Not where each hold has to be told to somebody: under a contract that inherits, or records sites."""
        return self.grant is None or not (self.grant.terms.inherit or self.grant.terms.record_site)

    @property
    def has_recursive_door(self) -> bool:
        """Whether only the thread that went in by the door gets out by it: of an RLock, and of what is leased."""
        return bool(self.block.leased) or self.block.kind == at.RLOCK

    def renew_operands(self) -> None:
        """In a forked child: R1 expects another word, and whatever was going on was the parent's."""
        self.me.cell_contents = self.mine[1][0] = _process.current.word
        self.zero[1][0] = 0
        self.may_take.cell_contents = self.may_release.cell_contents = HAS_LOCK

    # -- who ----------------------------------------------------------------------------------------------------------

    def is_mine(self) -> bool:
        """Whether the calling thread holds it (a single word only)."""
        door = self.door
        if door is not None and self.inside.cell_contents:
            if not door._is_mine():
                return False
            w = self.view[self.places[0][0]]
            return w == self.biased or self.word_at(self.places[0][0]) & at.OWNER == _process.current.word
        return self.holder.cell_contents == get_ident() and self.view[self.places[0][0]] & at.OWNER == _process.current.word

    def count(self) -> int:
        """How often the calling thread holds it (a single word only)."""
        door = self.door
        if not self.is_mine():
            return 0
        return int(door._count()) if door is not None and self.inside.cell_contents else self.depth

    def word_at(self, place: int) -> int:
        """The ordinary word that says the same as the one there."""
        w = self.view[place]
        return _bias.ordinary(self.view, self.block.start, w) if self.names_slot(w) else w

    def names_slot(self, w: int) -> bool:
        """Whether the lock is biased, or its bias is being revoked."""
        return self.is_lock and at.names_slot(w)

    def is_of_ancestor(self) -> bool:
        """Whether a process holds it from which this one was forked."""
        return self.word_at(self.places[0][0]) & at.OWNER in _process.ancestors

    def owners(self) -> list[int]:
        return [owner for place, _ in self.places if (owner := at.process_in(self.word_at(place)))]

    def free(self) -> int:
        """How many of the words have no owner."""
        return sum(1 for place, _ in self.places if not self.word_at(place) & at.OWNER)

    def since(self) -> int:
        """When the present owner got in, in monotonic nanoseconds; 0 = unknown."""
        return self.view[self.block.start + at.BLOCK_SINCE]

    def abandoned(self) -> Abandoned | None:
        """Who died inside, from the death to the release of the heir (or to the repair)."""
        if not any(self.view[place] & at.DIED for place, _ in self.places):
            return None
        return self.block.arena.abandoned(self.block.start)

    # -- acquire ------------------------------------------------------------------------------------------------------

    def acquire(self, block: bool, timeout: float | None, *, repair: bool = False, raises: bool = False) -> bool:
        """All of acquire but the fast path.

        repair  go in although it is poisoned
        raises  DeadlockError when this wait closes a cycle
        """
        deadline = deadline_after(timeout) if block else None
        block = block and (deadline is None or timeout is None or timeout > 0)
        while True:
            try:
                return self._acquire(block, deadline, repair, raises)
            except Forked:
                continue  # we are a child that was forked meanwhile: it starts as itself

    def _acquire(self, block: bool, deadline: float | None, repair: bool, raises: bool) -> bool:
        waiter = _take_waiter(self, repair)
        waiter.raises = raises
        done = False
        try:
            waiter.gives_way = block and self._gives_way()
            got = not waiter.gives_way and waiter.look(1, patient=True)
            if not got:
                if block:
                    got = not waiter.gives_way and waiter.look(self.worthwhile_looks())  # A2
                    if got:
                        self._count_rally()
                    else:
                        got = self.parking.park(waiter, deadline)
                else:
                    got = self._look_for_the_dead(waiter)  # A3
            if not got:
                waiter.words = waiter.wait = None  # or they would keep blocks alive
                _waiters.append(waiter)
                return False
            self.holder.cell_contents = get_ident()
            if self.door is not None and self.inside.cell_contents:
                _bias.drop(self)
            start = self.block.start
            if crash_points:
                crash_points[0]("C6 taken")
            if self.view[waiter.place[0]] & at.FLAGS:  # else R1 may release it, which does not clear this
                self.view[start + at.BLOCK_SINCE] = SYSTEM.monotonic_ns()
            if self.limit != _bias.NEVER:
                self.credit.cell_contents = self.limit  # releases count for a bias from the beginning of a turn
            if waiter.is_chosen:
                self.turn, self.has_had_turn, self.rally = SYSTEM.monotonic_ns(), False, 0
            if waiter.died:
                if self.on_heir is not None:
                    self.on_heir()
                if not repair:
                    self.tell_heir()
            done = True
            waiter.words = waiter.wait = None
            _waiters.append(waiter)
            if waiter.process is _process.current:
                return True
            raise Forked
        except Forked:
            raise
        except BaseException:
            if not done:
                waiter.withdraw_fully()
            elif waiter.process is _process.current:
                self.release()
            raise

    def acquire_any(self, block: bool = True, timeout: float | None = None) -> bool:
        """acquire() of a semaphore: one of several words."""
        return self.acquire(block, timeout)

    def release_own(self) -> None:
        """release() of a semaphore: a word of this process, or ValueError."""
        self.release()

    def leave_own(self) -> None:
        """The end of a semaphore's ``with``."""
        self.release(leaving=True)

    def worthwhile_looks(self) -> int:
        """How often to look before sleeping: not at all where the owner cannot go on while we look."""
        if len(self.places) > 1 or usable_cores() < 2:
            return 1
        owner = self.word_at(self.places[0][0]) & at.OWNER
        return 1 if owner == _process.current.word else self.looks

    def _gives_way(self) -> bool:
        """Whether a thread of this process goes to the end of the line, others being there."""
        if not self.is_lock or self.is_ranked():
            return False
        age = SYSTEM.monotonic_ns() - self.turn
        longest_rally = LONGEST_RALLY if age >= TURN else LONGEST_RALLY_IN_TURN
        return self.rally >= longest_rally or (self.has_had_turn and age < LONGEST_RESPECT * TURN)

    def _count_rally(self) -> None:
        now = SYSTEM.monotonic_ns()
        self.rally = self.rally + 1 if now - self.looked < RALLY else 0
        self.looked = now

    def _look_for_the_dead(self, waiter: OwnerWaiter) -> bool:
        now = SYSTEM.monotonic()
        if now < self.next_look:
            return False
        self.next_look = now + POLL_INTERVAL
        waiter.poll(None)
        return waiter.take.succeeded() or waiter.look(1)

    def tell_heir(self) -> None:
        """Tell who holds it of a death inside: a warning, nothing, or AbandonedError (it stays held)."""
        abandoned = self.abandoned()
        if abandoned is None or self.policy == IGNORE:
            return
        if self.policy == POISON:
            raise AbandonedError(describe(self.block), abandoned)
        warnings.warn(AbandonedWarning(f"{describe(self.block)}: {abandoned}"), stacklevel=_callers_level())

    def poll_reservation(self, w: int, spot: Spot | None) -> None:
        """See to it that a lock is not kept for somebody who does not come.  ``spot``: the caller's, if it waits for W."""
        parking, key = self.parking, self.block.index
        index, now = at.reserved_spot(w), SYSTEM.monotonic()
        if spot is not None and is_for(parking, w, spot.index):
            return
        if not is_in_vain(parking, key, w):
            if is_of_the_dead(parking, w):
                pass_on(parking, key, w, alive=True, but=index)
            elif self.kept[0] != w:
                self.kept = (w, now)
            elif now - self.kept[1] >= LONGEST_RESERVATION:
                pass_on(parking, key, w, but=index)
        settle(parking, key)

    # -- release ------------------------------------------------------------------------------------------------------

    def release(self, *, repaired: bool | None = None, leaving: bool = False) -> None:
        """R2 and R3, for any owner: a Lock may be released by another process or thread than took it.

        repaired  whether what a dead owner left is in order now.  None: it is, unless the policy is "poison", under which
                  only ``repair()`` says so
        leaving   at the end of a ``with``, only what this process holds is released.  A forked child that leaves its
                  parent's ``with`` releases nothing; a word that changed hands raises ValueError
        """
        process = _process.current
        back: Operand | None = None
        interruption: BaseException | None = None
        error: Exception | None = None
        tries = 0
        while True:
            try:
                if back is None:
                    back = borrow_operand()
                if process is not _process.current:
                    return  # a forked child: the operand may be its own, which would release what its parent holds
                error = self.release_word(back, repaired, leaving)
                break
            except Forked:
                return
            except BaseException as exception:  # finish first: a half-done release would lose a wake-up
                tries += 1
                if tries > _process.MOST_INTERRUPTIONS:
                    raise
                interruption = exception
        if interruption is not None:
            raise interruption
        if error is not None:
            raise error
        give_back(back)

    def release_word(self, back: Operand, repaired: bool | None, leaving: bool) -> Exception | None:
        """R2 and R3.  May be interrupted and called again with the same operand, which knows what has been done.

        Returns what is wrong, instead of raising it: what it raises came from a signal handler.
        """
        start, view = self.block.start, self.view
        if not back.succeeded():
            place, word = self._place_to_release()
            while True:
                w = view[place]
                owner = w & at.OWNER
                if owner == _process.current.word:
                    if len(self.places) == 1 or self.owners().count(owner) == 1:
                        self.holder.cell_contents = 0
                    self.depth = 1
                elif leaving and (self.is_inherited or owner in _process.ancestors):
                    return None
                elif self.names_slot(w):
                    _bias.revoke(self, w)
                    continue
                elif not owner or at.is_reservation(w):
                    return ValueError(RELEASED_TOO_OFTEN)
                elif leaving or self.has_permits:
                    return ValueError(f"{RELEASED_TOO_OFTEN}: it is held by pid {_process.pid_of(owner)} now")
                view[start + at.BLOCK_SINCE] = 0
                keep = at.DIED if repaired is False or (repaired is None and self.policy == POISON) else 0
                step = self.next_word(w, w & keep)
                if step is not None and back.compare_exchange(word, *step):  # R2
                    self.has_had_turn = self.has_had_turn or at.is_reservation(step[1])
                    break
        if crash_points:
            crash_points[0]("R3 released, nobody woken")
        self.wake_next()
        return None

    def next_word(self, w: int, free: int) -> tuple[int, int] | None:
        """What R2 exchanges for what: the word for a free one, or for a reserved one.  None: look at the word again."""
        if self.is_lock and self.is_ranked():
            return prepare(self.parking, self.block.index, w, free)
        if self.is_lock and w & at.PARKED and not self.is_in_turn():
            return prepare(self.parking, self.block.index, w, free, is_worth_it=self._has_waited_for_a_turn)
        return w, free

    def is_ranked(self) -> bool:
        """Whether some who use it have precedence: then every release is to the first in line."""
        return bool(self.view[self.block.start + at.BLOCK_KIND] & at.RANKED)

    def is_in_turn(self) -> bool:
        """Whether this process was chosen, and got it, less than a turn ago."""
        return SYSTEM.monotonic_ns() - self.turn < TURN

    def _has_waited_for_a_turn(self, spot: int) -> bool:
        return SYSTEM.monotonic_ns() - self.parking.turn_of(spot)[1] >= TURN

    def _place_to_release(self) -> tuple[int, Pointer]:
        """Of several words one of our own."""
        me = _process.current.word
        for place, word in self.places[:-1]:
            if self.view[place] & at.OWNER == me:
                return place, word
        return self.places[-1]

    def wake_next(self) -> None:
        """R3.  Of several words each release wakes one; of a single word a wake-up that is under way is enough."""
        if len(self.places) > 1:
            self.parking.unpark_one(self.block.index)
        elif self.is_lock and at.is_reservation(self.view[self.places[0][0]]):
            settle(self.parking, self.block.index)
        elif self.parking.unpark_one(self.block.index, self.skips) and self.is_lock and self.is_in_turn():
            # Who was woken may have been put on this processor, where it would not run before our time slice ends, though
            # others become idle: it needs it for a moment, and then naps.
            SYSTEM.yield_processor()

    def wake_one(self) -> None:
        """A8: the way is free, and who leaves does not take it."""
        self.parking.unpark_one(self.block.index)


class OwnerWaiter:
    """One thread that is on its way in.  ``take`` is used for nothing but taking: it knows whether we are inside."""

    __slots__ = (
        "back", "died", "gives_way", "index", "is_chosen", "mark", "place", "precedence", "process", "raises", "repair",
        "take", "wait", "words",
    )  # fmt: skip
    words: Any  # the OwnedWords, while it is in use
    raises: bool
    gives_way: bool
    wait: Wait | None  # from the first poll on

    def __init__(self) -> None:
        self.take = Operand()
        self.mark = Operand()
        self.back = Operand()
        self.process = _process.current

    def start(self, words: OwnedWords, repair: bool) -> None:
        self.words = words
        self.index = words.block.index
        self.precedence = 0 if words.grant is None else words.grant.precedence
        self.repair = repair
        self.wait = None
        self.died = self.is_chosen = False
        self.take.tried = None
        self.back.tried = None
        self.place = words.places[0]

    def look(self, looks: int, parked: int = 0, *, patient: bool = False) -> bool:
        """A2: go in if a word gets free within so many looks.

        parked   the mark that a thread with a spot sets
        patient  leave it alone if somebody is in, or is seen to come in: go in at the last look, or not at all
        """
        words = self.words
        view, me = words.view, _process.current.word
        spinning = looks > 1 and not parked
        while True:
            for place in words.places:
                w = view[place[0]]
                if not w & at.OWNER:
                    if patient and looks > 1:
                        continue
                    self._refuse_if_poisoned(w)
                    self.place = place
                    self.died = bool(w & at.DIED)
                    if self.take.compare_exchange(place[1], w, me | parked | w & at.FLAGS):
                        if spinning:
                            words.looks = min(MOST_LOOKS, words.looks + 10)
                        return True
                elif words.names_slot(w):
                    is_in = bool(words.word_at(place[0]))
                    if patient and is_in:
                        return False
                    if looks > 1 and (is_in or patient):
                        continue
                    self.place, self.died = place, False
                    if _bias.revoke(words, w, self.take, parked):
                        return True
                elif patient:
                    return False
            looks -= 1
            if looks <= 0:
                if spinning:
                    words.looks = max(FEWEST_LOOKS, words.looks - 5)
                return False

    def attempt(self, spot: Spot) -> bool:
        """A5."""
        if self.take.succeeded():
            return True
        words = self.words
        self.is_chosen = spot.is_notified()
        if words.is_lock and self._take_what_is_reserved(spot):
            return True
        if len(words.places) == 1 and spot.may_nap() and not words.is_ranked():  # as for relying on another
            spot.naps += 1
            if self.look(LOOKS_AT_A_GAP, at.PARKED, patient=True):
                return True
            if spot.may_nap():
                return False
            if self._insist(spot):
                return True
        spot.renew()
        view, me = words.view, _process.current.word
        for place in words.places:
            while True:
                w = view[place[0]]
                if not w & at.OWNER:
                    if self.gives_way and self._relies_on_another(spot):
                        break
                    self._refuse_if_poisoned(w)
                    self.place = place
                    self.died = bool(w & at.DIED)
                    if self.take.compare_exchange(place[1], w, me | at.PARKED | w & at.DIED):  # I7
                        return True
                elif words.names_slot(w):
                    if words.word_at(place[0]) and self._relies_on_another(spot):
                        break
                    self.place, self.died = place, False
                    if _bias.revoke(words, w, self.take, at.PARKED):
                        return True
                elif words.is_lock and is_for(words.parking, w, spot.index):
                    if self._take_what_is_reserved(spot):
                        return True
                elif self._relies_on_another(spot) or self.mark.compare_exchange(place[1], w, w | at.PARKED):
                    break
        grant = words.grant
        if grant is not None and grant.rings:
            grant.announce_wait()
        if grant is not None and grant.preempting:
            grant.ask_for_preemption()
        return False

    def _relies_on_another(self, spot: Spot) -> bool:
        """Whether the word may stay unmarked.  Not where waiters have precedence: only a marked word makes the owner look."""
        words = self.words
        return len(words.places) == 1 and not words.is_ranked() and bool(words.parking.relies_on_another(spot, self.index))

    def _take_what_is_reserved(self, spot: Spot) -> bool:
        """A5 of a word that was handed over to this thread."""
        words = self.words
        self.place = place, word = words.places[0]
        w = words.view[place]
        if not is_for(words.parking, w, spot.index):
            return False
        self._refuse_if_poisoned(w & at.FLAGS)
        self.died = bool(w & at.DIED)
        taken: bool = self.take.compare_exchange(word, w, _process.current.word | at.PARKED | w & at.DIED)
        return taken

    def _insist(self, spot: Spot) -> bool:
        """Look with the word marked, so that the owner's next release leaves it free for longer (see LONGEST_INSISTENCE)."""
        words = self.words
        place, word = words.places[0]
        while (w := words.view[place]) & at.OWNER:
            if words.names_slot(w):
                self.place, self.died = words.places[0], False
                if _bias.revoke(words, w, self.take, at.PARKED):
                    return True
            elif self.mark.compare_exchange(word, w, w | at.PARKED):
                break
        end = SYSTEM.monotonic_ns() + LONGEST_INSISTENCE
        while SYSTEM.monotonic_ns() < end:
            if self.look(FEWEST_LOOKS, at.PARKED) or (words.is_lock and self._take_what_is_reserved(spot)):
                return True
            SYSTEM.yield_processor()  # the owner may need this very one
        return False

    def poll(self, spot: Spot | None) -> None:
        """A6: recover what dead owners hold, one word at a time."""
        self.gives_way = False  # to a thread that was perhaps chosen, but never called
        self._look_for_deadlock(spot)
        words = self.words
        view, start = words.view, words.block.start
        for place in words.places:
            w = view[place[0]]
            if words.names_slot(w) and (owner := words.word_at(place[0]) & at.OWNER) and not _process.is_alive(owner):
                _bias.revoke(words, w)
                w = view[place[0]]
            owner = w & at.OWNER
            if words.is_lock and at.is_reservation(w):
                words.poll_reservation(w, spot)
                continue
            if not owner or words.names_slot(w) or _process.is_alive(owner):
                continue
            view[start + at.BLOCK_DEAD] = owner
            view[start + at.BLOCK_FOUND] = SYSTEM.time_ns()
            if crash_points:
                crash_points[0]("C10 who died is written")
            if words.policy == POISON and not self.repair:
                self.mark.compare_exchange(place[1], w, at.DIED)
                self._refuse_if_poisoned(view[place[0]])
                continue
            if words.is_ranked():  # to the first in line, whoever that is by then: perhaps to this thread
                if pass_on(words.parking, self.index, w, keep=at.DIED, alive=True):
                    settle(words.parking, self.index)
                continue
            self.place = place
            self.died = True
            if self.take.compare_exchange(place[1], w, _process.current.word | at.PARKED | at.DIED):
                return

    def _look_for_deadlock(self, spot: Spot | None) -> None:
        """Tell who holds what this thread waits for that it waits, and raise DeadlockError if it is to be raised here."""
        if spot is None or self.words.has_permits:
            return
        if self.wait is None:
            held = [words for words in copy_of(_all_words) if not words.has_permits and words.is_mine()]
            self.wait = Wait(self.words, held, self.raises)
        cycle = self.wait.look(spot)
        if cycle is not None:
            raise DeadlockError(describe(self.words.block), cycle)

    def _refuse_if_poisoned(self, w: int) -> None:
        words = self.words
        if w & at.DIED and not w & at.OWNER and words.policy == POISON and not self.repair:
            abandoned = words.abandoned()
            if abandoned is not None:
                raise AbandonedError(describe(words.block), abandoned)

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """A8, the spot being IDLE."""
        words = self.words
        view = words.view
        if self.take.succeeded() and not self.back.succeeded():
            place, word = self.place
            while (w := view[place]) & at.OWNER == _process.current.word:
                words.holder.cell_contents, words.depth = 0, 1
                step = words.next_word(w, w & at.DIED)
                if step is not None and self.back.compare_exchange(word, *step):
                    break
        self.pass_on()

    def pass_on(self) -> None:
        """See to it that the next waiter is woken: now if the way is free, else by whoever opens it."""
        words = self.words
        view = words.view
        for place, word in words.places:
            while (w := view[place]) & at.OWNER and not words.names_slot(w):
                if words.is_lock and at.is_reservation(w):
                    settle(words.parking, self.index)
                    return
                if self.mark.compare_exchange(word, w, w | at.PARKED):
                    break
            else:
                words.wake_one()
                return

    def withdraw_fully(self) -> None:
        """A8 for an exception outside the parking place; finished before the exception goes on."""
        if self.process is _process.current:
            _process.to_the_end(self._withdraw_if_inside)

    def _withdraw_if_inside(self) -> None:
        if self.take.succeeded() and not self.back.succeeded():
            self.withdraw(False, True)


#: Whether threads exclude each other between two calls.
HAS_LOCK: Final[bool] = getattr(sys, "_is_gil_enabled", lambda: True)()

_waiters: list[OwnerWaiter] = []
_all_words: weakref.WeakSet[OwnedWords] = weakref.WeakSet()


def _take_waiter(words: OwnedWords, repair: bool) -> OwnerWaiter:
    try:
        waiter = _waiters.pop()
    except IndexError:
        waiter = OwnerWaiter()
    if waiter.process is not _process.current:  # a child gave back what it had copied from its parent
        waiter = OwnerWaiter()
    waiter.start(words, repair)
    return waiter


def _in_child() -> None:
    for words in list(_all_words):
        words.is_inherited = words.is_inherited or words.holder.cell_contents != 0 or words.inside.cell_contents > 0
        _bias.forget(words)
        words.holder.cell_contents, words.depth = 0, 1  # what the parent's threads hold is not ours
        words.renew_operands()
    _waiters.clear()


_process.refresh_in_child.append(_in_child)


_cores = (0.0, 1)


def usable_cores() -> int:
    """How many processors this process may use; asked anew every second."""
    global _cores
    now = time.monotonic()
    if now >= _cores[0]:
        _cores = (now + 1.0, SYSTEM.usable_cores())
    return _cores[1]


def _callers_level() -> int:
    """The ``stacklevel`` with which our caller's warning points to the program that uses this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def describe(block: Block) -> str:
    """The primitive in an error text: kind and name."""
    kind = at.KIND_NAMES[min(block.kind, at.EXTENSION)] or "primitive"
    return f"{kind} {block.name!r}" if block.name is not None else f"{kind} without a name (block {block.index})"
