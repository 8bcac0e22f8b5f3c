"""Acquiring and releasing a leased lock: the steps around those of a plain one, and the path for when nobody is in the way.

A lock that is opened with ``lease=`` belongs to a contract, which the supervisor of its domain grants.  From then on the holder
needs nobody: after it got the lock it writes into its own ledger since when it has it, and clears that before it releases.
The supervisor watches from outside.

    E0  the seat: one thread of this process at a time from here to X3.  BEGAN is 0.  THREAD := us, if it inherits
    E1  acquire W, as ever
    E2  BEGAN := now                                                         plain store
    E3  w = W, plain load.  ours with TAKEN: CAS(w -> w without TAKEN), failed: E3.  not ours any more: BEGAN := 0, E1 again
        W was 0 before E1: only if DOUBT, which is then cleared first         plain load and store
    E4  token + 1: inside
    X1  BEGAN := 0; LEFT if an earlier owner's death is still told by W      plain store
    X2  release W, as ever, with TAKEN or without.  W is not ours any more: nothing to do
    X3  BEGAN := 0 after LEFT; leave the seat

Between E1 and E2, and between X1 and X2, the ledger does not say that we are inside.  A holder that stalls there has its lock
taken away by the supervisor (see ``supervisor/watch.py``): that is what E3 and X2 look for.  No fence is needed here: the
supervisor makes every processor pass one (membarrier) after it set TAKEN and DOUBT, and before it reads BEGAN again.  So either
it sees our BEGAN, or E3 sees DOUBT and TAKEN.  DOUBT comes after TAKEN, which no hold leaves to the next one: else the end of
one hold could clear the DOUBT that was meant for the next.

W and the ledger name the process.  The seat keeps its threads apart: one that stalls before X2 must not release what another
has got since.  A leased lock is released by the thread that took it.

    killed or stopped    the ledger says    done by the supervisor
    after E1             not inside         W is taken away after a lease; dead: pass on, abandoned
    after E2, E4         inside             killed at deadline + grace, pass on, abandoned
    after X1             not inside         W is taken away after a lease; dead: pass on, abandoned
    after X2             not inside         nothing to do
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from . import _bias, _ledger, _process
from . import _layout as at
from ._atomic import ZERO, raw_compare_exchange
from ._fast_path import over
from ._layout import WORD_MASK
from ._leased_door import Functions, go_in_by_door, go_out_by_door, is_in_by_door, make_door_functions
from ._owned import OwnedWords, describe
from ._process import identity_pointer
from ._sys import SYSTEM
from .contract import AWAY, FREE, Grant, Lease
from .errors import ContractDenied

__all__ = ["LeasedPath", "make_leased_path", "make_refusing_path"]


_clock: Final = SYSTEM.monotonic


class LeasedPath(NamedTuple):
    """What a leased lock does instead of a plain one.

    ``take`` and ``leave`` go in and out by any acquire and release of the word that are given: for ``repair()`` and Conditions.
    The word has to be ours then: ``stay`` sees to that for who is in by the door.  ``by_door`` gives the first four for as long
    as there is one.
    """

    acquire: Callable[..., bool]
    release: Callable[..., None]
    enter: Callable[[], Lease]
    exit: Callable[..., None]
    take: Callable[..., Lease | None]
    leave: Callable[[Callable[[], object]], None]
    stay: Callable[[], None]
    by_door: Callable[[], Functions]


def make_refusing_path(words: OwnedWords, needs: str) -> LeasedPath:
    """That of a lock whose contract does not allow what is needed to acquire it."""

    def refuse(*arguments: object, **options: object) -> Any:
        terms, contract = words.grant.terms, words.grant.contract
        what = "acquire it" if needs == "acquire" else needs
        reason = f"its contract does not allow to {what}, only {', '.join(terms.operations)}"
        raise ContractDenied(describe(words.block), reason, "no rule" if contract is None else contract.rule)

    return LeasedPath(refuse, refuse, refuse, refuse, take=refuse, leave=refuse, stay=refuse, by_door=refuse)


def make_leased_path(
    words: OwnedWords,
    plain: tuple[Callable[..., bool], Callable[[], None], Callable[..., None]],
    renew: Callable[[OwnedWords], Grant],
    *,
    recursive: bool,
    raises: bool,
) -> LeasedPath:
    """The path of a leased lock, around that of a plain one."""
    acquire_plain, release_plain, leave_plain = plain
    view, (place, word), token_place = words.view, words.places[0], words.block.start + at.BLOCK_TOKEN
    block_words = words.block.arena.words
    # What enter and exit use.  Those that are assigned to are cells of the words, which stay when another contract comes.
    states, tokens = view[place : place + 1], view[token_place : token_place + 1]
    zero, mine = words.zero[0], words.mine[0]  # whoever has the seat has them to himself
    seat: Any = 0
    holder = me = token = credit = 0
    odd = has_door = False
    moments: Any = None
    doubts: Any = None

    def make_enter(as_lease: bool) -> Callable[..., Any]:
        """``take`` for the case that is all but always: nobody has the lock.  It returns the Lease, or True.

        A seat that is not ours any more after a call means that we are a forked child, and that none of this is ours.
        """
        does_more = as_lease or words.grant.record_site

        def enter(block: bool = True, timeout: float | None = None, preempt: bool = False) -> Any:
            nonlocal seat, holder, token
            thread = get_ident()
            if seat or timeout is not None or preempt or has_door:
                return enter_slowly(block, timeout, as_lease, preempt)
            seat = thread  # E0: no call since the test, so nobody came in between
            try:
                if raw_compare_exchange(word, zero, identity_pointer):  # E1
                    holder = thread
                    began = _clock()
                    if seat is thread:  # else a forked child
                        moments[0] = began  # E2
                        if not doubts[0] or is_ours(words.grant):  # E3
                            tokens[0] = token = tokens[0] + 1  # E4
                            if not does_more:
                                return True
                            grant: Grant = words.grant
                            if grant.record_site:
                                grant.note_site(2)
                            if not as_lease:
                                return True
                            lease = Lease()
                            lease._grant = grant
                            lease._began = began
                            lease.token = token
                            return lease
                        moments[0] = 0.0
                    holder = 0
                else:
                    words.zero[1][0] = 0
            except BaseException as error:
                if seat == thread:
                    if states[0] & at.OWNER == me:
                        holder = thread  # E1 was made: no other thread of this process could have
                    words.zero[1][0] = 0
                undo(words.grant)
                if error.__class__ is ValueError and tokens[0] == WORD_MASK:
                    return enter_slowly(block, timeout, as_lease)  # overwritten: there is no larger token
                raise
            if seat == thread:
                grant = words.grant
                seat = AWAY if grant.is_away else FREE  # no call before it
                grant.open_gate()
            return enter_slowly(block, timeout, as_lease)

        return over(enter, shared)

    def make_slow_enter(as_lease: bool) -> Callable[..., Any]:
        """``enter`` under a contract that inherits: the supervisor has to know which thread holds the lock, and who waits."""

        def enter(block: bool = True, timeout: float | None = None, preempt: bool = False) -> Any:
            return enter_slowly(block, timeout, as_lease, preempt)

        return enter

    def enter_slowly(block: bool, timeout: float | None, as_lease: bool, preempt: bool = False) -> Any:
        lease = take(preempting if preempt else None, block, timeout, 4 if preempt else 3)
        return lease if as_lease else lease is not None

    def preempting(block: bool, timeout: float | None) -> bool:
        """An acquire that throws out who has lower precedence."""
        with words.grant.preempts():
            return acquire_word_only(block, timeout)

    def acquire_word_only(block: bool, timeout: float | None) -> bool:
        """E1 by W, though there may be a door."""
        if words.has_door.cell_contents:
            return words.acquire(block, timeout, raises=raises)
        return acquire_plain(block, timeout)

    def take(
        acquire_word: Callable[..., bool] | None = None, block: bool = True, timeout: float | None = None, frames: int = 1
    ) -> Lease | None:
        until = _clock() + max(0.0, timeout) if block and timeout is not None else None
        while True:
            grant: Grant = words.grant
            if grant.is_away:
                grant = renew(words)
            go_in = acquire_word or acquire_word_only
            if grant.terms.inherit:
                go_in = announced(grant, go_in)
            by_door = is_in_by_door(words)
            if by_door or grant.seat.cell_contents == get_ident():
                # The thread has it already: deeper into an RLock, or into the deadlock that a Lock makes of it.
                if not by_door or not words.inside.cell_contents or not recursive:
                    grant.odd.cell_contents = True  # it has to get out as often
                before = level()
                try:
                    if not (acquire_plain if by_door and recursive else go_in)(block, timeout):
                        return None
                    if by_door and not words.inside.cell_contents:  # ``drop``: W was not ours, and now is
                        grant.seat.cell_contents = get_ident()
                    return grant.lease
                except BaseException:
                    if level() > before:
                        leave_plain()
                    raise
            try:
                if not grant.wait_for_seat(block, until):  # E0
                    if grant.is_away:
                        continue
                    return None
                if grant.terms.inherit:
                    grant.note_thread()
                if words.has_door.cell_contents and acquire_word in (None, preempting):
                    lease = go_in_by_door(words, grant, get_ident())
                    if lease is not None:
                        return lease
                while go_in(block, timeout if until is None else max(0.0, until - _clock())):  # E1
                    grant.moments[grant.began] = began = _clock()  # E2
                    if view[place] == words.me.cell_contents or is_ours(grant):  # E3
                        view[token_place] = token = view[token_place] + 1 & WORD_MASK  # E4
                        words.lease_token.cell_contents = token
                        if grant.record_site:
                            grant.note_site(frames)
                        return grant.make_lease(began, token)
                    grant.moments[grant.began] = 0.0
                    words.holder.cell_contents = 0
                grant.leave_seat()
                return None
            except BaseException:
                undo(grant)
                raise

    def announced(grant: Grant, acquire_word: Callable[..., bool]) -> Callable[..., bool]:
        """An acquire after which the supervisor is told that we wait no more, if it was told that we do."""

        def acquire(block: bool, timeout: float | None) -> bool:
            try:
                return acquire_word(block, timeout)
            finally:
                grant.settle_wait()

        return acquire

    def is_ours(grant: Grant) -> bool:
        """E3, when W may be more than our name: with flags, TAKEN among them, or another's."""
        grant.view[_ledger.DOUBT + grant.number] = 0
        while (w := view[place]) & at.OWNER == words.me.cell_contents:
            if not w & at.TAKEN or block_words.compare_exchange(place, w, w & ~at.TAKEN):
                if w & at.DIED:
                    grant.left, grant.odd.cell_contents = _ledger.LEFT, True
                return True
        return False

    def undo(grant: Grant) -> None:
        """After an exception on the way in, anywhere between E0 and the return."""
        if is_in_by_door(words):
            go_out_by_door(words)
        elif grant.seat.cell_contents == get_ident():
            if words.holder.cell_contents == get_ident() and view[place] & at.OWNER == words.me.cell_contents:
                leave(leave_plain)
            else:
                grant.moments[grant.began] = 0.0
                grant.leave_seat()

    def level() -> int:
        """How often the calling thread is in; 0 also if it has the seat, and the word was taken away."""
        door = words.door
        if door is not None and door._is_mine():
            return int(door._count())
        return words.depth if words.lease_seat.cell_contents == get_ident() else 0

    def leave(release_word: Callable[[], object]) -> None:
        """X1 to X3.  What a signal handler raises meanwhile comes out when the lock is released."""
        grant: Grant = words.grant
        interruption: BaseException | None = None
        while True:  # no recursion: a function that refers to itself would keep the lock alive
            try:
                thread, by_door, depth = get_ident(), is_in_by_door(words), level()
                break
            except BaseException as error:
                interruption = error
        if by_door and depth == 1:
            _process.to_the_end(lambda: go_out_by_door(words))
            if interruption is not None:
                raise interruption
            return
        if by_door or grant.seat.cell_contents != thread or depth > 1:
            release_word()
            if interruption is not None:
                raise interruption
            return
        try:
            grant.moments[grant.began] = grant.left  # X1
            release_word()  # X2
        except BaseException as error:
            if view[place] & at.OWNER == words.me.cell_contents:  # not released: nobody else of this process could have it
                if error.__class__ is not ValueError:
                    release_word()
                raise
            if error.__class__ is not ValueError:
                raise  # else it was taken away meanwhile
        finally:
            if grant.left:
                grant.moments[grant.began] = grant.left = 0.0
            if grant.terms.inherit:
                grant.view[_ledger.THREAD + grant.number] = 0
            grant.seat.cell_contents = AWAY if grant.is_away else FREE  # X3, and no call before it
            grant.open_gate()
            if grant.rings:
                grant.tell_if_lifted()
        if interruption is not None:
            raise interruption

    def stay() -> None:
        """Have W itself, and the seat by our number, if we are in by the door."""
        if is_in_by_door(words):
            words.lease_seat.cell_contents, words.lease_odd.cell_contents = get_ident(), True
            _bias.stay(words)

    def leave_plainly() -> None:
        leave(leave_plain)

    def make_exit(leave_slowly: Callable[[], None]) -> Callable[..., None]:
        """``leave`` for the case that is all but always: nobody waits, and nothing is odd."""

        def exit_(kind: object = None, value: object = None, traceback: object = None) -> None:
            nonlocal seat, holder, credit
            try:
                thread = get_ident()
            except BaseException:  # a signal handler's: release first
                leave_slowly()
                raise
            taken_by = seat
            if taken_by != thread or odd or not credit:
                depth = None
                try:
                    depth = level()
                    return leave_slowly()
                except (AssertionError, ValueError):
                    raise
                except BaseException:  # a signal handler's, at the entry
                    if depth is None or (depth and level() == depth):
                        leave_plainly()
                    raise
            try:
                moments[0] = 0.0  # X1
                if raw_compare_exchange(word, mine, ZERO):  # X2
                    if seat is taken_by:  # else a forked child, in the middle of its parent's release
                        holder = 0
                        credit -= 1
                        seat = FREE  # X3
                    return None
                if seat != thread:
                    return None
                words.mine[1][0] = words.me.cell_contents
            except BaseException:
                if seat == thread:
                    me = words.me.cell_contents
                    if words.mine[1][0] == me:  # X2 was made
                        holder = 0
                        words.grant.leave_seat()
                    else:
                        words.mine[1][0] = me
                        leave_plainly()
                raise
            return leave_plainly()

        return over(exit_, shared)

    def release_slowly() -> None:
        grant: Grant = words.grant
        try:
            thread = get_ident()
        except BaseException:
            if words.inside.cell_contents or (words.holder.cell_contents and view[place] & at.OWNER == words.me.cell_contents):
                leave(leave_plain)
            raise
        if grant.seat.cell_contents == thread or is_in_by_door(words):
            leave(leave_plain)
            return
        owner = words.word_at(place) & at.OWNER
        if owner and not recursive:
            raise ValueError(
                f"{describe(words.block)} is leased: it is released by the thread that took it, of pid {_process.pid_of(owner)}"
            )
        release_plain()  # raises what there is to be raised

    shared = {
        "seat": words.lease_seat,
        "holder": words.holder,
        "me": words.me,
        "moments": words.lease_began,
        "doubts": words.lease_doubt,
        "odd": words.lease_odd,
        "token": words.lease_token,
        "credit": words.credit,
        "has_door": words.has_door,
    }
    four = Functions(make_enter(False), make_exit(release_slowly), make_enter(True), make_exit(leave_plainly))
    door_functions: Functions | None = None

    def by_door() -> Functions:
        """Made when they are first needed: most locks never are biased."""
        nonlocal door_functions
        if door_functions is None:
            door_functions = make_door_functions(words, four)
        return door_functions

    if words.grant.terms.inherit:
        return LeasedPath(
            acquire=make_slow_enter(False),
            release=release_slowly,
            enter=make_slow_enter(True),
            exit=lambda kind=None, value=None, traceback=None: leave_plainly(),
            take=take,
            leave=leave,
            stay=stay,
            by_door=lambda: four,
        )
    return LeasedPath(*four, take=take, leave=leave, stay=stay, by_door=by_door)
