"""Handing a lock over to one waiter, instead of leaving it free for whoever comes first.

A lock that is left free goes to who is awake: that is fast, and it starves who has to wake up first.  So where waiters have
precedence (``rank`` of their contracts), or one has waited for longer than a turn, the release *reserves* the lock: W names the
spot of the chosen waiter, and nobody else gets in.

    # W         owner                entered by    leaves to
    # RESERVED  spot and sequence    F2            HELD|P by that waiter (A5); for nobody (F0)
    # RESERVED  for nobody           F0            RESERVED for a waiter, free (F2); for nobody, by another (F0)

    F0  from a word that is ours (R2, A8): CAS(w -> w without PARKED), if it is set
        from a dead owner's, or one reserved in vain: CAS(w -> RESERVED for nobody, with a number of this attempt's own)
    F1  the first in line of the spots of this block, WAITING or NOTIFIED: precedence, then the longest wait
    F2  one is there: CAS(W: -> RESERVED for it|PARKED|DIED kept).  nobody: CAS(W: -> DIED kept).  failed: F0, if it is ours
    F3  look at the S of whom W is reserved for.  WAITING: CAS(S: -> NOTIFIED), post.  NOTIFIED: post, it may be napping.
        not any more of that sequence: in vain -> F0.   W free: wake one, and of an RWLock the readers, too
    A5  W is RESERVED for this very spot: CAS(w -> me|PARKED|DIED of w): in
    A8  the spot is IDLE, and W is RESERVED: F3, by whoever leaves
    poll  W is RESERVED for a dead process, or the same as LONGEST_RESERVATION ago: F0.  else F3's look
          with precedence: W's owner is dead: F0 with DIED, also by who is the first in line, or does not wait; then F3

F0 is why F2 may free the lock without waking anybody: who goes to sleep after F1 has set PARKED again, and F2 fails.  What is
nobody's several may pass on at the same time, and one of them could take away the PARKED by which F2 of another was to fail:
hence the number.  F3 begins with what W says, so anybody may do it, again and again; a reservation whose maker died after F2
is found by the polls.  With precedence nobody takes a dead owner's W by itself: whoever goes to sleep meanwhile, and is better,
may find PARKED set already, and would not make that exchange fail.

    # H1  only the waiter for whom W is reserved leaves RESERVED by getting in: A1 and A2 see an owner
    # H2  with precedence, nobody is granted the lock while somebody better is asleep
    # H3  a reservation ends: its waiter comes, or A8, a poll or the supervisor finds that it does not
    # H4  a reserved waiter that dies was not inside: nobody is told

    # killed after               the word says    repaired by                     outcome
    # C60 F1                     HELD             poll, as ever                   PARKED is set again by who looks
    #                            RESERVED         poll: it is for nobody          the first in line gets it
    # C61 F2, nobody called      RESERVED         the poll of that waiter         it gets in within its poll interval
    # C62 chosen, not yet in     RESERVED         poll, or the supervisor at once  the next one in line gets it
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from . import _layout as at
from . import _process
from ._sys import crash_points

if TYPE_CHECKING:
    from ._parking import Parking

__all__ = [
    "LONGEST_RESERVATION", "after_reaping", "first_in_line", "is_for", "is_in_vain", "is_of_the_dead", "pass_on", "prepare",
    "settle",
]  # fmt: skip

#: Seconds after which a lock is taken back from a chosen waiter that lives and does not come: it may be stopped.
LONGEST_RESERVATION: Final = 1.0
#: Exchanges with words that somebody may be changing all the time.
MOST_TRIES: Final = 1000
_attempts: Final = itertools.count()


def first_in_line(parking: Parking, key: int, *, alive: bool = False, but: int = -1) -> int | None:
    """Index of the spot whose thread is the next to get in; None if nobody waits.

    alive  only one whose process lives: that costs system calls
    but    not this one
    """
    waiting = [index for index in parking.in_line(key) if index != but]
    while waiting:
        index = parking.first_of(waiting)
        if not alive or parking.is_alive(index):
            return index
        waiting.remove(index)
    return None


def prepare(
    parking: Parking, key: int, w: int, keep: int, *, is_worth_it: Callable[[int], bool] = lambda index: True
) -> tuple[int, int] | None:
    """F0 and F1 from our own word ``w``: what it is then, and what F2 makes of it.  None if the word is another by now.

    keep         DIED, or 0: what stays in the word
    is_worth_it  whether to hand over to that spot; else the lock is left free
    """
    words = parking.words
    if not _may_be_reserved(parking, key):
        return w, keep
    bare = w & ~at.PARKED
    if bare != w and not words.compare_exchange(parking.layout.block(key) + at.BLOCK_WORD, w, bare):
        return None
    found = _reserved_for_first(parking, key, is_worth_it=is_worth_it)
    return None if found is None else (bare, found | keep)


def _may_be_reserved(parking: Parking, key: int) -> bool:
    """Of an RWLock only with precedence: else readers would wait for the writer that is chosen."""
    kind = parking.words.load(parking.layout.block(key) + at.BLOCK_KIND)
    return kind & at.KIND in at.OWNED_KINDS or kind & (at.KIND | at.RANKED) == at.RWLOCK | at.RANKED


def _reserved_for_first(
    parking: Parking, key: int, *, is_worth_it: Callable[[int], bool] = lambda index: True, alive: bool = False, but: int = -1
) -> int | None:
    """F1: the word that F2 makes.  0: nobody waits; None: that one has just left."""
    index = first_in_line(parking, key, alive=alive, but=but)
    if crash_points:
        crash_points[0]("C60 PARKED taken away, first in line known")
    if index is None or not is_worth_it(index):
        return 0
    state = parking.words.load(parking.state_first + index)
    if not state & at.STATE or (state & at.KEY) >> at.KEY_SHIFT != key:
        return None
    return at.reservation(index, state) | at.PARKED


def is_in_vain(parking: Parking, key: int, w: int) -> bool:
    """Whether a reservation is for nobody: its waiter has left.  No look at whether that one lives."""
    index = at.reserved_spot(w)
    if not 0 <= index < parking.spots:
        return True
    state = parking.words.load(parking.state_first + index)
    return not state & at.STATE or (state & at.KEY) >> at.KEY_SHIFT != key or at.reservation(index, state) != w & at.OWNER


def settle(parking: Parking, key: int) -> None:
    """F3, and F0 to F2 from there as long as it is in vain: whoever is to have the lock knows of it.

    For a word that is free: wakes one, and of an RWLock the line.  May be interrupted, and called again.
    """
    place = parking.layout.block(key) + at.BLOCK_WORD
    words = parking.words
    for _ in range(MOST_TRIES):
        w = words.load(place)
        if not w & at.OWNER or at.names_slot(w):  # who comes then sees to it that it is an ordinary word
            _wake_line(parking, key)
            parking.unpark_one(key)
            return
        if not at.is_reservation(w):
            return
        if is_in_vain(parking, key, w):
            pass_on(parking, key, w)
            continue
        index = at.reserved_spot(w)
        if parking.call(index, words.load(parking.state_first + index)):
            return


def _wake_line(parking: Parking, key: int) -> None:
    """Of an RWLock: its readers, who are parked under a key of their own."""
    load, block = parking.words.load, parking.layout.block(key)
    if load(block + at.BLOCK_KIND) & at.KIND == at.RWLOCK:
        line = load(block + at.BLOCK_MORE)
        if 0 < line < parking.layout.blocks:
            parking.unpark_many(line)


def pass_on(parking: Parking, key: int, w: int, *, keep: int | None = None, alive: bool = False, but: int = -1) -> bool:
    """F0 to F2 from a word that is not ours: a dead owner's, or reserved in vain.  Whether it was still that one.

    keep   DIED, or 0: what stays in the word; None: what is there
    alive  only to a process that lives: that costs system calls
    but    not to the waiter at this spot
    """
    words, place = parking.words, parking.layout.block(key) + at.BLOCK_WORD
    keep = w & at.DIED if keep is None else keep
    if not _may_be_reserved(parking, key):
        return words.compare_exchange(place, w, keep)
    before = w
    for _ in range(MOST_TRIES):
        bare = at.reserved_for_nobody(_process.current.pid, next(_attempts)) | keep
        if not words.compare_exchange(place, before, bare):
            return before != w  # if it is not the first attempt, another passes it on by now
        found = _reserved_for_first(parking, key, alive=alive, but=but)
        if found is not None and words.compare_exchange(place, bare, found | keep):
            break
        before = bare if found is None else bare | at.PARKED  # somebody went to sleep, if it is still ours
    if crash_points:
        crash_points[0]("C61 reserved, nobody called")
    return True


def after_reaping(parking: Parking, key: int) -> None:
    """A dead thread's spot was for this block and is IDLE now: the lock may have been reserved for it."""
    if key < parking.layout.blocks and _may_be_reserved(parking, key):
        w = parking.words.load(parking.layout.block(key) + at.BLOCK_WORD)
        if at.is_reservation(w):
            settle(parking, key)


def is_for(parking: Parking, w: int, index: int) -> bool:
    """Whether a word is reserved for the thread at a spot."""
    if w & (at.PID | at.REVOKED) or not w & at.OWNER:
        return False
    return w & at.OWNER == at.reservation(index, parking.words.load(parking.state_first + index))


def is_of_the_dead(parking: Parking, w: int) -> bool:
    """Whether a reservation is for a thread of a dead process."""
    index = at.reserved_spot(w)
    return not 0 <= index < parking.spots or not parking.is_alive(index)
