"""A leased lock that is biased to this process: in and out by the door, B1 to B6 of ``_bias``, with the lease around them.

What ``_leased`` does with W, E1 and X2, these functions do with the door, and in another order: the ledger says that we are
inside before we are, and until we are out.  Objects of the lock have them from R1' to B6.

    enter, where we have a door
    E0  the seat := the present moment.  Another thread has it: as in ``_leased``
    E2  BEGAN := that moment                                                  plain store; no call since the look at the seat
    B1  CAS(H: OUTSIDE -> INSIDE), by the door; inside := 1.  failed: BEGAN := 0, leave the seat; as in ``_leased``
    E4  token + 1: inside                                                     plain store; this process has the number itself
    exit
    B2  inside := 0
    B3  CAS(H: INSIDE -> OUTSIDE), by the door.  Another thread is in: the door says so, and nothing is done
    X1  BEGAN := 0                                                            plain store, if the seat is still ours
    X3  leave the seat
    B4  and B5, B6 as ever.  W is not ours any more: nothing to do

Whoever stalls with W between E1 and E2, or X1 and X2, has it taken away.  By the door there is no such place: where H is
INSIDE, BEGAN is the time of that hold, and nothing can be taken away that E3 would have to look for.  A thread that stalls
there overruns, and one that stalls between E2 and B1 keeps nobody out.  After B3 W may be REVOKED, and ours until B6.  That one
the supervisor takes away as any other, but it shuts H first: else another thread of ours could go in by it afterwards.

    # D1  H is INSIDE only while the ledger of who has claimed the slot says that it is inside: E2 before B1, B3 before X1
    # D2  the seat is a moment and H is not INSIDE: its thread is before X1, or its B1 has failed.  It looks whether the seat is
    #     still that one before it touches seat or BEGAN again, so anybody may take the seat over: a signal handler of it would
    #     wait for ever
    # D3  a hold is not older than the look before the one that sees it first (``supervisor/leases.py``): who stalled at E2 for
    #     longer than that, and then got in, has a whole lease from when it is seen

    # killed or stopped    the word says         the ledger says   done by the supervisor, or the next one
    # after E2             BIASED, OUTSIDE       inside            nothing: nobody is in.  V0 to V2 by who wants it
    # after B1, E4         BIASED, INSIDE        inside            killed at deadline + grace; V0 to V2; pass on, abandoned
    # after B3             BIASED, OUTSIDE       inside            nothing
    #                      REVOKED, OUTSIDE      inside            killed at deadline + grace; pass on, abandoned
    # after X1             BIASED, OUTSIDE       not inside        nothing
    #                      REVOKED, not INSIDE   not inside        W is taken away after a lease; dead: pass on, abandoned

A ``wait()`` of a Condition, and everything else that releases W itself, makes an ordinary hold of it first (``_bias.stay``).
Of several threads of the process one is in by the door, and the others wait for the seat.  Nothing is biased under a contract
that inherits, or records sites, and nothing that is handed over by precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from sys import getrefcount
from typing import Any, Final, NamedTuple

from . import _layout as at
from ._bias import NEVER_OPEN, finish
from ._biased_path import ATTEMPTS, CELLS, over
from ._layout import WORD_MASK
from ._owned import OwnedWords
from ._process import Forked
from ._sys import SYSTEM
from .contract import AWAY, FREE, Grant, Lease

__all__ = ["Functions", "go_in_by_door", "go_out_by_door", "is_in_by_door", "make_door_functions", "undo_by_door"]

_clock: Final = SYSTEM.monotonic


def is_in_by_door(words: OwnedWords) -> bool:
    """Whether the calling thread is in by the door, though it may not have noted it yet."""
    door = words.door
    return door is not None and bool(door._is_mine())


def go_in_by_door(words: OwnedWords, grant: Grant, thread: int) -> Lease | None:
    """E2 to E4, for a thread that has the seat by its number; else B6, if it is due, and None."""
    seat, began = grant.seat, _clock()
    if seat.cell_contents == thread and words.has_door.cell_contents:  # else a forked child
        grant.moments[grant.began] = began  # E2
        if words.go_in.cell_contents(False) and words.has_door.cell_contents:  # B1
            seat.cell_contents, words.inside.cell_contents = began, 1
            place = words.block.start + at.BLOCK_TOKEN
            words.view[place] = words.lease_token.cell_contents = words.view[place] + 1 & WORD_MASK  # E4
            return grant.make_lease(began, words.lease_token.cell_contents)
        if seat.cell_contents == thread:
            grant.moments[grant.began] = 0.0
    finish(words)
    return None


def go_out_by_door(words: OwnedWords) -> None:
    """B2 to B6, X1 and X3, for the thread that is in by the door, and once only; nothing if it is not.

    Finish first: what a signal handler raises meanwhile comes out when nothing is left half-done.
    """
    grant: Grant = words.grant
    seat = grant.seat
    interruption: BaseException | None = None
    if not is_in_by_door(words):
        return
    held = seat.cell_contents
    words.inside.cell_contents = 0  # B2
    try:
        words.go_out.cell_contents()  # B3
    except BaseException as raised:
        interruption = raised
    if seat.cell_contents is held:  # else a forked child, or somebody has taken it over
        grant.moments[grant.began] = 0.0  # X1
        seat.cell_contents = AWAY if grant.is_away else FREE  # X3

    for _ in ATTEMPTS:
        try:
            grant.open_gate()
            finish(words)  # B4 to B6
            break
        except Forked:
            break
        except BaseException as raised:
            interruption = raised
    if interruption is not None:
        raise interruption


def undo_by_door(words: OwnedWords, began: float) -> None:
    """After an exception between E0 and the return.  May be interrupted, and called again."""
    if words.lease_seat.cell_contents is not began:
        return  # it is done, or this is a forked child
    if is_in_by_door(words):
        go_out_by_door(words)
    elif words.lease_seat.cell_contents is began:
        words.lease_began.cell_contents[0] = 0.0
        words.grant.leave_seat()


class Functions(NamedTuple):
    """Those of an object of a lock."""

    acquire: Callable[..., bool]
    release: Callable[..., None]
    enter: Callable[..., Lease]
    exit: Callable[..., None]


def make_door_functions(words: OwnedWords, ordinary: Functions) -> Functions:
    """Those of one object of a lock that is biased to us.  ``ordinary``: those of ``_leased``, which take all steps.

    The steps of enter and acquire stand in both: a call of common ones could be interrupted, or forked, before it begins.
    """
    acquire_ordinarily, enter_ordinarily = ordinary.acquire, ordinary.enter
    token_place = words.block.start + at.BLOCK_TOKEN
    tokens = words.view[token_place : token_place + 1]
    # These become the cells of the words.
    seat: Any = FREE
    moments: Any = None
    spare: Any = None
    lowest: Any = None
    go_in: Any = NEVER_OPEN
    go_out: Any = None
    inside = mark = token = 0
    has_door = odd = False
    other = Lease()

    def enter() -> Any:
        nonlocal seat, inside, token, spare, other
        began = _clock()
        if seat:
            return enter_ordinarily()
        seat = moments[0] = began  # E0, E2
        try:
            if go_in(False) and has_door:  # B1
                inside = 1
                tokens[0] = token = token + 1  # E4
                if getrefcount(spare) > 2:  # somebody has it still: the cell and the call are two
                    spare, other = other, spare  # as in ``with lock as lease`` again and again
                    if getrefcount(spare) > 2:
                        spare = Lease()
                    spare._grant = words.grant
                lease = spare
                lease._began = began
                lease.token = token
                return lease
        except BaseException as error:
            for _ in ATTEMPTS:
                try:
                    undo_by_door(words, began)
                    break
                except BaseException:
                    pass  # what was raised first is what comes out
            if error.__class__ is ValueError and token == WORD_MASK:
                return enter_ordinarily()  # overwritten: there is no larger token
            raise
        if seat is began:
            moments[0] = 0.0
            seat = FREE
        return enter_ordinarily()

    def acquire(block: bool = True, timeout: float | None = None, preempt: bool = False) -> bool:
        nonlocal seat, inside, token
        began = _clock()
        if seat or timeout is not None or preempt:
            return acquire_ordinarily(block, timeout, preempt)
        seat = moments[0] = began  # E0, E2
        try:
            if go_in(False) and has_door:  # B1
                inside = 1
                tokens[0] = token = token + 1  # E4
                return True
        except BaseException as error:
            for _ in ATTEMPTS:
                try:
                    undo_by_door(words, began)
                    break
                except BaseException:
                    pass  # what was raised first is what comes out
            if error.__class__ is ValueError and token == WORD_MASK:
                return acquire_ordinarily(block)
            raise
        if seat is began:
            moments[0] = 0.0
            seat = FREE
        return acquire_ordinarily(block)

    def make_exit(leave_ordinarily: Callable[..., None]) -> Callable[..., None]:
        def exit_(kind: object = None, value: object = None, traceback: object = None) -> None:
            nonlocal seat, inside
            held = seat
            if inside != 1 or odd:
                depths = inside, words.depth
                interruption = None
                for _ in ATTEMPTS:
                    try:
                        leave_ordinarily(kind, value, traceback)
                        break
                    except (AssertionError, ValueError):
                        raise
                    except BaseException as raised:
                        if seat is not held or depths != (inside, words.depth):
                            raise
                        interruption = raised  # before it began: the release is made nevertheless
                if interruption is not None:
                    raise interruption
                return None
            inside = 0  # B2
            interruption = None
            try:
                go_out()  # B3
                if seat is held:  # else a forked child, or somebody has taken it over
                    moments[0] = 0.0  # X1
                    seat = FREE  # X3
                if lowest[0] == mark:  # B4
                    return None
            except BaseException as raised:
                trace = raised.__traceback__
                if raised.__class__ is AssertionError and trace is not None and trace.tb_next is None:
                    # The door says so itself, and no signal handler: another thread is in.
                    inside = 1
                    return leave_ordinarily(kind, value, traceback)
                if seat is held:
                    moments[0] = 0.0
                    seat = FREE
                interruption = raised
            for _ in ATTEMPTS:
                try:
                    finish(words)  # B5, B6
                    break
                except Forked:
                    break
                except BaseException as raised:
                    interruption = raised
            if interruption is not None:
                raise interruption
            return None

        return over(exit_, cells)

    cells = {name: getattr(words, name) for name in CELLS}
    for name in ("seat", "odd", "token", "spare"):
        cells[name] = getattr(words, f"lease_{name}")
    cells["moments"] = words.lease_began
    return Functions(over(acquire, cells), make_exit(ordinary.release), over(enter, cells), make_exit(ordinary.exit))
