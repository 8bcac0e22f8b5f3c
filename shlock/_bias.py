"""A lock that is reserved for one process, which then takes it by plain loads and stores: the biased path.

A compare-exchange costs a Python program 260 ns, a plain load or store a tenth of that.  So a Lock or RLock that one process
takes again and again is *biased* to it: acquire and release are stores into a byte of its own, and a look whether the bias
still stands.  Whoever else wants the lock revokes the bias; then it is an ordinary lock, until somebody deserves it again.

    # W         names                 for                            entered by      leaves to
    # BIASED    slot, generation      P, whose H says if it is in    R1'             REVOKING (V0)
    # REVOKING  slot, generation      P, and P is told to look       V0              REVOKED, 0, or held by the revoker (V2)
    # REVOKED   P (both flags)        P, in since before V0          V2              as HELD: whatever ``_owned`` does to that

    A control block has a few slots: in each the identity of the process that claimed it, and H, a byte that only that process
    writes.  A generation is used once.  The seat is a process's own: which of its threads is in, and whether it has the bias.

    acquire, where the seat says that the bias is ours and nobody is in
    B0  seat := thread
    B1  H := 1                                                  plain store
    B2  W still BIASED to our slot: in                          plain load
    B3  else H := 0, seat := LEAVING; -> B6, then A1
    release, where the seat says that a thread of ours is in by the biased path
    B4  H := 0                                                  plain store
    B5  W still BIASED to our slot: seat := free; out           plain load
    B6  W is REVOKING our generation: V1, V2.  W is REVOKED and ours: R2, R3.  Slot := 0, seat := AWAY
    revocation, by anybody, this process included
    V0  CAS(W: BIASED -> REVOKING)
    V1  membarrier: every processor that runs a registered process passes a full fence
    V2  H of the slot.  1: CAS(W: REVOKING -> P|REVOKED).  0: membarrier again where stores may pass stores; then
        CAS(W: REVOKING -> me), or -> 0 by who only wants to see an ordinary word
    granting
    R1' instead of R1, by a process that has taken it often enough, and whose seat is AWAY: claim a slot (0, or a dead
        process's), H := 0, generation + 1, CAS(W: me -> BIASED)

Nobody waits for anybody here: whoever finds REVOKING does V1 and V2 itself, because the first one may have died.  That is why
the word has a generation: the decision of one that has slept in between must not hit a later bias.

    # V1  a thread that saw BIASED at B2 after V0 can't be: its H is seen at V2; one that stores H later sees REVOKING at B2
    # V2  P releases what is REVOKED and P's, at B6: its seat keeps its other threads out of the biased path until then
    # V3  a slot is claimed by its process from R1' to B6; only then, or after its death, by another: no late store of H hits
    #     another's
    # V4  W is BIASED or REVOKING without PARKED: a waiter revokes before it sleeps, so I1 needs nothing new
    # V5  both flags never stand without an owner, one of them never with one

    # killed after                   the word says        repaired by             outcome
    # C70 B1, inside                 BIASED, H = 1        the next one's V0-V2    REVOKED of a dead process: told by the poll
    # C71 B4                         BIASED, H = 0        the next one's V0-V2    nothing to tell
    # C72 V0 or V1, by the revoker   REVOKING             the next one, or P      V1 and V2 again
    # C73 V2                         REVOKED, or 0        -                       P releases it, or it is free
    # C74 slot claimed, no R1'       HELD                 poll                    the slot is claimed anew from a dead process

A process that dies between B1 and B2 counts as inside: it was on its way in.

Between the end of ``get_ident()`` and B2, and from B4 to B5, there is no call: so no signal handler, no switch of threads and
no fork comes in between (without the interpreter's lock there is no biased path).  A forked child starts with its seat AWAY.

*When.*  Only in a process with ``SHLOCK_BIAS=adaptive`` in its environment: after so many releases without a waiter that they
outweigh a revocation.  A bias that is revoked soon doubles that number, one that has lasted halves it.  ``always`` makes the
process take a bias wherever it may.  Where membarrier is missing nobody is biased; a revoker that may not call it waits until
every processor has certainly passed a fence, and forbids the bias of this lock for good.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import TYPE_CHECKING, Final

from . import _layout as at
from . import _process
from ._atomic import IS_WEAK, Operand
from ._sys import SYSTEM, crash_points

if TYPE_CHECKING:
    from ._owned import OwnedWords

__all__ = ["AWAY", "LEAVING", "NEVER", "first_credit", "forget", "grant", "is_possible", "leave", "ordinary", "revoke"]

#: Of a seat, beside the number of the thread that is in, and 0: the bias is ours, and nobody is in.
AWAY: Final = -1
LEAVING: Final = -2

NEVER: Final = 1 << 29
#: Releases without a waiter until a lock is biased.
FIRST_CREDIT: Final = 2_000
LARGEST_CREDIT: Final = 1 << 20
#: A bias that is revoked within so many ns was not worth it.
SOON: Final = 2_000_000
MODES: Final = ("adaptive", "always", "never")


def _mode() -> str:
    mode = os.environ.get("SHLOCK_BIAS", "never")
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


def ordinary(view: memoryview, start: int, w: int) -> int:
    """The ordinary owner word that says the same as ``w``, for who only looks.  ``start``: of the control block."""
    if not at.names_slot(w):
        return w
    slot = at.slot_in(w)
    if slot >= at.BIAS_SLOTS or not view[start + at.BLOCK_HOLDS] >> 8 * slot & 1:
        return 0
    return view[start + at.BLOCK_BIASES + slot] & at.OWNER


def revoke(words: OwnedWords, w: int, take: Operand | None = None, parked: int = 0) -> bool:
    """V0 to V2, as far as nobody else goes on with it.  With ``take``: whether that took the lock."""
    start, view, swap = words.block.start, words.view, words.block.arena.words.compare_exchange
    place, pointer = words.places[0]
    if w & at.BIASED:
        if not swap(place, w, w ^ at.REVOKED):  # V0
            return False
        w ^= at.REVOKED
        if crash_points:
            crash_points[0]("C72 REVOKING")
    is_fast = SYSTEM.membarrier()  # V1
    if not is_fast:
        kind = view[start + at.BLOCK_KIND]
        swap(start + at.BLOCK_KIND, kind, kind | at.UNBIASED)
    if crash_points:
        crash_points[0]("C72 fence passed")
    owner = ordinary(view, start, w)
    if owner:
        swap(place, w, owner | at.REVOKED)  # V2
    else:
        if IS_WEAK:
            SYSTEM.membarrier()
        if take is not None:
            taken: bool = take.compare_exchange(pointer, w, _process.current.word | parked)
            return taken
        swap(place, w, 0)
    if crash_points:
        crash_points[0]("C73 an ordinary word")
    return False


def grant(words: OwnedWords) -> bool:
    """R1': release a lock that this thread holds, by keeping it for this process.  False: it is still held.

    May be interrupted; ``words.granting`` knows then whether it was released.  Forked: this is a child, and holds nothing.
    """
    operand = words.granting
    if operand is None:
        operand = words.granting = Operand()
    operand.tried = None
    me, (place, pointer), start, view = _process.current.word, words.places[0], words.block.start, words.view
    if words.limit == NEVER or view[place] != me or words.seat.cell_contents != AWAY:
        return False
    if view[start + at.BLOCK_KIND] & (at.LEASED | at.RANKED | at.UNBIASED) or not is_possible():
        words.limit = words.credit.cell_contents = NEVER
        return False
    slot = _claim(words, operand.process)
    if slot is None:
        words.credit.cell_contents = LARGEST_CREDIT
        return False
    if operand.process is not _process.current:  # no call from here to the store of the generation
        raise _process.Forked
    view[start + at.BLOCK_SINCE] = 0
    generation = view[start + at.BLOCK_GENERATION] + 1 & at.GENERATION
    view[start + at.BLOCK_GENERATION] = generation
    biased = at.biased(slot, generation)
    memory = words.block.arena.segment.memory
    h, w = (start + at.BLOCK_HOLDS) * at.WORD + at.byte_of(slot), place * at.WORD + at.byte_of(0)
    held, lowest = memory[h : h + 1], memory[w : w + 1]
    if crash_points:
        crash_points[0]("C74 slot claimed")
    now = SYSTEM.monotonic_ns()
    words.holder.cell_contents = 0
    if not operand.compare_exchange(pointer, me, biased):
        _give_back(words, slot)
        return False
    if operand.process is _process.current:  # no call from here on
        words.slot, words.biased, words.granted = slot, biased, now
        words.held.cell_contents, words.lowest.cell_contents, words.mark.cell_contents = held, lowest, biased & 0xFF
        words.seat.cell_contents = 0
    operand.tried = None
    return True


def leave(words: OwnedWords) -> None:
    """B6, H being 0 and the seat LEAVING.  May be interrupted, and is called again then."""
    if words.seat.cell_contents != LEAVING:
        return
    me, (place, pointer), view, mine = _process.current.word, words.places[0], words.view, words.biased
    back = words.granting
    if back is None:
        return  # we are a forked child
    while not back.succeeded():
        w = view[place]
        if w in (mine, mine ^ at.REVOKED):
            revoke(words, w)
        elif w & at.OWNER != me or w & at.REVOKED != at.REVOKED:
            break
        elif (step := words.next_word(w, 0)) is not None:
            back.compare_exchange(pointer, *step)  # R2
    if back.succeeded():
        words.wake_next()  # R3
    now = SYSTEM.monotonic_ns()
    _give_back(words, words.slot)
    if words.seat.cell_contents == LEAVING:  # else we are a forked child
        back.tried = None
        if _chosen == "adaptive":
            soon = now - words.granted < SOON
            words.limit = min(2 * words.limit, LARGEST_CREDIT) if soon else max(words.limit // 2, FIRST_CREDIT)
        words.credit.cell_contents = words.limit
        words.seat.cell_contents = AWAY


def forget(words: OwnedWords) -> None:
    """In a forked child: the parent's bias is not ours."""
    words.seat.cell_contents, words.credit.cell_contents, words.biased = AWAY, words.limit, 0
    words.granting = None


def is_possible() -> bool:
    """Whether this process can have a biased path: whether the kernel lets others order its memory accesses."""
    if _process.current not in _registered:
        if not SYSTEM.register_membarrier():
            return False
        _registered[:] = [_process.current]
    return True


def _claim(words: OwnedWords, process: _process.ProcessIdentity) -> int | None:
    """A slot that is this process's now, with its H 0; None if living processes have all of them.

    Forked: this is a child of ``process``.  It must not write a thing in its parent's name, least of all H: its parent is in.
    """
    arena, start, operand = words.block.arena, words.block.start, Operand()
    memory = arena.segment.memory
    if operand.process is not process:
        raise _process.Forked
    for slot in range(at.BIAS_SLOTS):
        place, h = start + at.BLOCK_BIASES + slot, (start + at.BLOCK_HOLDS) * at.WORD + at.byte_of(slot)
        owner, key = words.view[place], (arena.identity, words.block.index, slot)
        if owner == process.word:
            is_free = key not in _claims  # ours, of an object that is gone
        else:
            is_free = not owner or not _process.is_alive(owner)
        if is_free and operand.compare_exchange(arena.words.pointer(place), owner, process.word):
            if process is not _process.current:  # no call from here to the store
                raise _process.Forked
            memory[h] = 0
            _claims[key] = words
            return slot
    return None


def _give_back(words: OwnedWords, slot: int) -> None:
    arena, operand = words.block.arena, Operand()
    _claims.pop((arena.identity, words.block.index, slot), None)
    operand.compare_exchange(arena.words.pointer(words.block.start + at.BLOCK_BIASES + slot), operand.process.word, 0)


_process.refresh_in_child.append(_claims.clear)
