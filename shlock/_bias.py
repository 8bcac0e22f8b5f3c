"""A lock that is reserved for one process, which then takes it without a compare-exchange of its own: the biased path.

A compare-exchange costs a Python program 260 ns, and a lock needs two.  The C library's semaphores change one word from 1 to 0
and back for 40 ns each, but such a word does not say who holds it.  So a Lock or RLock that one process takes again and again
is *biased* to it: W says who it is, and the process goes in and out by a door of its own, the word H.  Whoever else wants the
lock revokes the bias; then it is an ordinary lock, until somebody deserves it again.

    # W         names                 for                            entered by      leaves to
    # BIASED    slot, generation      P, whose H says if it is in    R1'             REVOKING (V0)
    # REVOKING  slot, generation      P, and P is told to look       V0              REVOKED, 0, or held by the revoker (V2)
    # REVOKED   P (both flags)        P, in since before V0          V2              as HELD: whatever ``_owned`` does to that

    # H         of a slot that P has claimed          entered by        leaves to
    # OUTSIDE   none of P's threads is in             R1', B3           INSIDE (B1), SHUT (V1, B5)
    # INSIDE    one of them is                        B1                OUTSIDE (B3), SHUT (``drop``)
    # SHUT      none is, nor gets in by it any more   V1, B5            OUTSIDE (R1', of a later bias)

    A control block has a few slots: in each the identity of the process that claimed it, and H.  A generation is used once.
    A Lock and an RLock have three, with a lease one (``_leased_door``), each end of a ring (``_ring``) has two.
    In its own memory each process has the door, which knows which thread is in, and ``inside``, how often it went in.

    acquire, where we have a door
    B1  CAS(H: OUTSIDE -> INSIDE), by the door; inside + 1: in.  No look at W.
        failed: H is SHUT: -> B6, then A1.  It is INSIDE: another thread of ours is in: A1, which revokes our own bias
    release, where a thread of ours went in by the door
    B2  W is BIASED or REVOKING, and ours, or P|REVOKED: inside - 1.  Else another process has released this hold: ``drop``
    B3  CAS(H: INSIDE -> OUTSIDE), by the door
    B4  W still BIASED to our slot: out                         plain load
    B5  else CAS(H: OUTSIDE -> SHUT).  It is INSIDE: the thread that went in since B3 comes to B4, too, and this one is out
    B6  no door any more.  W is BIASED or REVOKING, and ours: V0 to V2.  W is REVOKED and ours: R2, R3.  Slot := 0
    revocation, by anybody, this process included
    V0  CAS(W: BIASED -> REVOKING)
    V1  where a release is no full fence: membarrier.  CAS(H: OUTSIDE -> SHUT)
    V2  H was INSIDE: CAS(W: REVOKING -> P|REVOKED).  Else, it is SHUT: CAS(W: REVOKING -> me), or -> 0 by who only wants to see
        an ordinary word
    granting
    R1' instead of R1, by a process that has taken it often enough, and has no door: claim a slot (0, or a dead process's),
        H := OUTSIDE, generation + 1, CAS(W: me -> BIASED); then the door

V0 and V1 against B3 and B4: each side writes one word and then looks at the other's, with a full fence in between.  So either
the revoker sees that nobody is inside, or the owner sees that its bias is revoked, or both.  On x86-64 both writes are locked
instructions, which are full fences.  Elsewhere the C library's release orders only what comes before it; there the revoker
has the kernel pass a fence on the owner's processor (membarrier), and without that system call nobody is biased.

Nobody waits for anybody here: whoever finds REVOKING does V1 and V2 itself, because the first one may have died.  That is why
the word has a generation: the decision of one that has slept in between must not hit a later bias.  What it does to the H of a
later bias at V1 does no harm: that is then SHUT with W still BIASED, which its process finds at B1, and a revoker after V0.

    # V1  H is INSIDE exactly while a thread of P is in by the door: who finds it OUTSIDE and shuts it has kept all of them out
    # V2  W = P|REVOKED is released by a thread of P that has seen H SHUT: then none of them is in
    # V3  a slot is claimed by its process from R1' to B6; only then, or after its death, by another: no door is another's H
    # V4  W is BIASED or REVOKING without PARKED: a waiter revokes before it sleeps, or relies on one that naps, being chosen
    # V5  both flags never stand without an owner, one of them never with one

    # killed after                   the word says        repaired by             outcome
    # C70 B1, inside                 BIASED, INSIDE       the next one's V0-V2    REVOKED of a dead process: told by the poll
    # C71 B3                         BIASED, OUTSIDE      the next one's V0-V2    nothing to tell
    # C72 V0 or V1, by the revoker   REVOKING             the next one, or P      V1 and V2 again
    # C73 V2                         REVOKED, or 0        -                       P releases it, or it is free
    # C74 slot claimed, no R1'       HELD                 poll                    the slot is claimed anew from a dead process
    # C75 B5                         REVOKING, SHUT       the next one's V2       nothing to tell
    #                                REVOKED, SHUT        poll                    told: as one that dies just before R1

*Interruptions.*  A call of the door may end with what a signal handler raises.  Since ``inside`` is changed without a call,
after B1 and before B3, the door's own count says afterwards whether the call was made.  A child that is forked there has none.

*When.* After so many releases, since one of its threads had to wait for it, that they outweigh a revocation.  A bias that is
revoked soon doubles that number, one that has lasted halves it; what counts is how long the process has run, not slept.  Under
contention a process has the lock for a turn (``_owned``): then a bias makes the turn cheap, and whoever naps meanwhile leaves
it alone as long as the process goes in again and again.  To a process with ``SHLOCK_BIAS=never`` in its environment nothing is
biased, though it revokes others' biases; to one with ``always`` everything that may be.  Where the C library has no such
semaphores, or membarrier is needed and missing, nobody is biased; a revoker that needs it and may not call it waits until
every processor has certainly passed a fence, and forbids the bias of this lock for good.
"""

from __future__ import annotations

import os
import sys
import weakref
from _thread import get_ident
from collections.abc import Callable
from operator import truth
from typing import TYPE_CHECKING, Final, NamedTuple

from . import _layout as at
from . import _process
from ._atomic import IS_WEAK, Operand, Words, borrow_operand, give_back, has_doors, make_door
from ._sys import SYSTEM, crash_points

if TYPE_CHECKING:
    from ._owned import OwnedWords

__all__ = [
    "NEVER", "NEVER_OPEN", "Slots", "allow", "drop", "finish", "first_credit", "forget", "grant", "is_possible",
    "make_ordinary", "ordinary", "revoke", "shut_for", "slots_at", "stay", "undo", "why_not",
]  # fmt: skip

NEVER: Final = 1 << 29
#: Releases until a lock is biased, none of its threads having waited since.
FIRST_CREDIT: Final = 100
LARGEST_CREDIT: Final = 1 << 20
#: A bias that is revoked when its process has run for less than so many ns was not worth it: both cost some 35,000, and twice
#: as much between processors that share no cache.
SOON: Final = 600_000
MODES: Final = ("adaptive", "always", "never")


#: What the ``acquire`` of a door is where there is none: called with False it says False.
NEVER_OPEN: Final = truth


def _mode() -> str:
    mode = os.environ.get("SHLOCK_BIAS", "adaptive")
    if mode not in MODES:
        raise ImportError(f"SHLOCK_BIAS={mode!r} in the environment: it must be one of {', '.join(MODES)}, or not set")
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    return mode if has_lock else "never"


_chosen: Final = _mode()
_registered: list[object] = []  # this process, once others can order its memory accesses
#: Who has claimed which slot: arena, block, slot.
_claims: weakref.WeakValueDictionary[tuple[int, int, int], OwnedWords] = weakref.WeakValueDictionary()


def first_credit(kind: int) -> int:
    """After how many releases a lock of this kind may be biased first."""
    if kind not in (at.LOCK, at.RLOCK) or _chosen == "never" or not is_possible():
        return NEVER
    return 0 if _chosen == "always" else FIRST_CREDIT


def allow(words: OwnedWords) -> None:
    """Let a lock be biased of whose kind there are others that may not: that of one end of a ring."""
    if words.limit == NEVER and words.bias_slots:
        words.limit = words.credit.cell_contents = first_credit(at.LOCK)


def ordinary(view: memoryview, start: int, w: int) -> int:
    """The ordinary owner word that says the same as ``w``, for who only looks.  ``start``: of the control block."""
    if not at.names_slot(w):
        return w
    slot, kind = at.slot_in(w), view[start + at.BLOCK_KIND]
    claims, holds = at.bias_words(kind)
    if slot >= at.bias_slots(kind) or view[start + holds + slot] != at.INSIDE:
        return 0
    return view[start + claims + slot] & at.OWNER


class Slots(NamedTuple):
    """A control block and its slots: the words of its arena, and the places of W, of the first claim, and of the first H."""

    words: Words
    start: int
    number: int
    claims: int
    holds: int


def slots_at(words: Words, start: int, kind_word: int) -> Slots:
    """Those of the control block at ``start``."""
    claims, holds = at.bias_words(kind_word)
    return Slots(words, start, at.bias_slots(kind_word), start + claims, start + holds)


def revoke(words: OwnedWords, w: int, take: Operand | None = None, parked: int = 0) -> bool:
    """V0 to V2, as far as nobody else goes on with it.  With ``take``: whether that took the lock."""
    if take is None:
        return _revoke(_slots_of(words), w, None)
    pointer = words.places[0][1]
    return _revoke(_slots_of(words), w, lambda w: take.compare_exchange(pointer, w, _process.current.word | parked))


def _slots_of(words: OwnedWords) -> Slots:
    return Slots(words.block.arena.words, words.block.start, words.bias_slots, words.first_claim, words.first_hold)


def make_ordinary(slots: Slots, w: int) -> None:
    """V0 to V2 for a word ``w``, by who does not use the lock: the supervisor."""
    _revoke(slots, w, None)


def shut_for(slots: Slots, owner: int) -> bool:
    """V1 once more, for a word that is REVOKED, and H of the slot that its owner has claimed.  False: H is INSIDE."""
    claimed = [slot for slot in range(slots.number) if slots.words.load(slots.claims + slot) == owner]
    found = {_shut(slots, slot) for slot in claimed}
    return at.INSIDE not in found


def _revoke(slots: Slots, w: int, take: Callable[[int], bool] | None) -> bool:
    words, start, swap = slots.words, slots.start, slots.words.compare_exchange
    place = start + at.BLOCK_WORD
    if w & at.BIASED:
        if not swap(place, w, w ^ at.REVOKED):  # V0
            return False
        w ^= at.REVOKED
        if crash_points:
            crash_points[0]("C72 REVOKING")
    if IS_WEAK and not SYSTEM.membarrier():  # V1
        kind = words.load(start + at.BLOCK_KIND)
        swap(start + at.BLOCK_KIND, kind, kind | at.UNBIASED)
    slot, owner = at.slot_in(w), 0
    if slot < slots.number and _shut(slots, slot) == at.INSIDE:
        owner = words.load(slots.claims + slot) & at.OWNER
    if crash_points:
        crash_points[0]("C72 shut, or found INSIDE")
    if owner:
        swap(place, w, owner | at.REVOKED)  # V2
    elif take is not None:
        return take(w)
    else:
        swap(place, w, 0)
    if crash_points:
        crash_points[0]("C73 an ordinary word")
    return False


def _shut(slots: Slots, slot: int) -> int:
    """CAS(H: OUTSIDE -> SHUT): what H is then, INSIDE or SHUT."""
    pointer, operand = slots.words.pointer(slots.holds + slot), borrow_operand()
    h = at.OUTSIDE
    while h not in (at.INSIDE, at.SHUT) and not operand.compare_exchange(pointer, h, at.SHUT):
        h = operand.seen()
    give_back(operand)
    return at.INSIDE if h == at.INSIDE else at.SHUT


def grant(words: OwnedWords, operand: Operand) -> bool:
    """R1': release a lock that this thread holds, by keeping it for this process.  False: it is still held.

    May be interrupted; the operand knows then whether it was released.  Forked: this is a child, and holds nothing.
    """
    if words.door is not None or words.leaver or words.granter:
        return False
    words.granter = True  # no call since the test: one thread at a time gets a door, or gives one back
    try:
        return _grant(words, operand)
    finally:
        words.granter = False


def _grant(words: OwnedWords, operand: Operand) -> bool:
    me, (place, pointer), start, view = _process.current.word, words.places[0], words.block.start, words.view
    if words.limit == NEVER or view[place] != me:
        return False
    kind = view[start + at.BLOCK_KIND]
    if kind & (at.RANKED | at.UNBIASED) or not words.may_be_biased or not is_possible():
        words.limit = words.credit.cell_contents = NEVER
        return False
    slot = _claim(words, operand.process)
    if slot is None:
        words.credit.cell_contents = LARGEST_CREDIT
        return False
    if words.leaving is None:
        words.leaving = Operand()
    if operand.process is not _process.current:  # no call from here to the store of the generation
        raise _process.Forked
    view[start + at.BLOCK_SINCE] = 0
    generation = view[start + at.BLOCK_GENERATION] + 1 & at.GENERATION
    view[start + at.BLOCK_GENERATION] = generation
    biased, h = at.biased(slot, generation), words.first_hold + slot
    door = make_door(words.block.arena.words.address + h * at.WORD, recursive=words.has_recursive_door)
    go_in, go_out = door.acquire, door.release
    w = place * at.WORD + at.byte_of(0)
    lowest = words.block.arena.segment.memory[w : w + 1]
    if crash_points:
        crash_points[0]("C74 slot claimed")
    now = SYSTEM.processor_ns()
    words.holder.cell_contents = 0
    try:
        operand.compare_exchange(pointer, me, biased)
    finally:
        is_made = operand.succeeded()
        if is_made and operand.process is _process.current:  # no call from here on
            words.slot, words.biased, words.granted = slot, biased, now
            words.lowest.cell_contents, words.mark.cell_contents = lowest, biased & 0xFF
            words.inside.cell_contents, words.go_out.cell_contents = 0, go_out
            words.door, words.go_in.cell_contents, words.has_door.cell_contents = door, go_in, True
    if is_made:
        _tell_users(words)
    else:
        _give_back(words, slot)
    return is_made


def finish(words: OwnedWords) -> None:
    """B5 and B6, as far as they are due.

    What is raised meanwhile comes out at the end; but what is raised before anything has been done, comes out at once.
    """
    _process.to_the_end(lambda: _finish(words))


def _finish(words: OwnedWords) -> None:
    door, back, slot, me = words.door, words.leaving, words.slot, get_ident()
    if words.leaver != me:
        if door is None or back is None:
            return  # there is nothing to do, or we are a forked child
        if words.view[words.first_hold + slot] != at.SHUT and (
            words.view[words.places[0][0]] == words.biased or _shut(_slots_of(words), slot) == at.INSIDE
        ):  # B5
            return
        if words.door is not door or words.leaver:  # no call from here on
            return
        back.tried = None
        words.leaver = me
        words.door, words.go_in.cell_contents, words.has_door.cell_contents = None, NEVER_OPEN, False
    if back is None:
        return
    is_nested = words.finishing  # we are a signal handler's, in the midst of this
    words.finishing = True
    try:
        if crash_points:
            crash_points[0]("C75 SHUT, no door any more")
        mine, view, (place, pointer), this = words.biased, words.view, words.places[0], _process.current.word
        while not back.succeeded():
            w = view[place]
            if w in (mine, mine ^ at.REVOKED):
                revoke(words, w)
            elif w & at.OWNER != this or w & at.REVOKED != at.REVOKED:
                break
            elif (step := words.next_word(w, 0)) is not None:
                back.compare_exchange(pointer, *step)  # R2
        if back.succeeded():
            words.wake_next()  # R3
        if is_nested:
            return
        now = SYSTEM.processor_ns()
        words.has_had_turn = not words.is_in_turn()
        _give_back(words, slot)
        if words.leaver == me:  # else we are a forked child
            back.tried = None
            if _chosen == "adaptive":
                soon = now - words.granted < SOON
                words.limit = min(2 * words.limit, LARGEST_CREDIT) if soon else max(words.limit // 2, FIRST_CREDIT)
            words.credit.cell_contents = words.limit
            words.leaver = 0
            _tell_users(words)
    finally:
        words.finishing = is_nested


def drop(words: OwnedWords) -> None:
    """Give the door back although a thread is in by it: another process released that hold, and we have an ordinary one now."""
    _process.to_the_end(lambda: _drop(words))


def _drop(words: OwnedWords) -> None:
    me = get_ident()
    if words.leaver != me:
        if words.door is None or words.leaver or not words.inside.cell_contents:
            return
        words.leaver = me  # no call since the test
        words.door, words.go_in.cell_contents, words.has_door.cell_contents = None, NEVER_OPEN, False
        words.inside.cell_contents = 0
        words.view[words.first_hold + words.slot] = at.SHUT
    _finish(words)  # W is not ours by a bias: it is B6's end


def stay(words: OwnedWords) -> None:
    """Stay in, but by W: what this thread has by the door becomes an ordinary hold, and the door is given back."""
    _process.to_the_end(lambda: _stay(words))


def _stay(words: OwnedWords) -> None:
    door, (place, pointer) = words.door, words.places[0]
    if door is not None and words.inside.cell_contents and door._is_mine():  # else it is done, as far as to the end of ``drop``
        words.depth, words.holder.cell_contents = door._count(), get_ident()
        operand, this = Operand(), _process.current.word
        while (w := words.view[place]) in (words.biased, words.biased ^ at.REVOKED):
            revoke(words, w)
        while (w := words.view[place]) & at.OWNER == this and w & at.REVOKED == at.REVOKED:
            operand.compare_exchange(pointer, w, w & ~at.REVOKED)
    drop(words)


def undo(words: OwnedWords) -> None:
    """Get out again by the door if this thread got in and a signal handler has raised since.

    May be interrupted, and called again.
    """
    door = words.door
    if door is not None and door._is_mine() and door._count() > words.inside.cell_contents:
        door.release()
    finish(words)


def forget(words: OwnedWords) -> None:
    """In a forked child: the parent's bias is not ours."""
    had_door = words.door is not None
    words.door = words.go_out.cell_contents = words.leaving = None
    words.go_in.cell_contents, words.has_door.cell_contents = NEVER_OPEN, False
    words.inside.cell_contents = words.leaver = words.biased = 0
    words.granter = words.finishing = False
    words.credit.cell_contents = words.limit
    if had_door:
        _tell_users(words)


def _tell_users(words: OwnedWords) -> None:
    """Give the objects of this lock the functions that are quickest now: a matter of speed alone."""
    for reference in words.users:
        user = reference()
        if user is not None:
            user._choose_path()


def is_possible() -> bool:
    """Whether this process can have a door."""
    return why_not() is None


def why_not() -> str | None:
    """Why this process cannot have a door: the C library has none, or the kernel does not order releases where it must."""
    if not has_doors():
        return "the C library's semaphores are other words than it needs"
    if IS_WEAK and _process.current not in _registered:
        if not SYSTEM.register_membarrier():
            return "the system call membarrier is missing or forbidden here"
        _registered[:] = [_process.current]
    return None


def _claim(words: OwnedWords, process: _process.ProcessIdentity) -> int | None:
    """A slot that is this process's now, with its H OUTSIDE; None if living processes have all of them.

    Forked: this is a child of ``process``.  It must not write a thing in its parent's name, least of all H: its parent is in.
    """
    arena, operand = words.block.arena, Operand()
    if operand.process is not process:
        raise _process.Forked
    for slot in range(words.bias_slots):
        place, h = words.first_claim + slot, words.first_hold + slot
        owner, key = words.view[place], (arena.identity, words.block.index, slot)
        if owner == process.word:
            is_free = _claims.get(key) in (None, words)  # of an object that is gone, or of an attempt that was interrupted
        else:
            is_free = not owner or not _process.is_alive(owner)
        if is_free and operand.compare_exchange(arena.words.pointer(place), owner, process.word):
            if process is not _process.current:  # no call from here to the store
                raise _process.Forked
            words.view[h] = at.OUTSIDE
            _claims[key] = words
            return slot
    return None


def _give_back(words: OwnedWords, slot: int) -> None:
    arena, operand = words.block.arena, Operand()
    _claims.pop((arena.identity, words.block.index, slot), None)
    operand.compare_exchange(arena.words.pointer(words.first_claim + slot), operand.process.word, 0)


_process.refresh_in_child.append(_claims.clear)
