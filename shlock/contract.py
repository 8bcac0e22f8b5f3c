"""Contracts and leases: what a process was granted, and what a holder sees of its time.

A lock that is opened with ``lease=`` belongs to a contract, which the supervisor of its domain grants.  From then on the holder
needs nobody: it writes its deadline into its own ledger after it got the lock, and clears it before it releases.  The
supervisor watches from outside.

    E0  the seat: one thread of this process at a time from here to X3; DEADLINE := 0
    E1  acquire W, as ever
    E2  DEADLINE := now + lease                                              plain store
    E3  w = W, plain load.  ours with TAKEN: CAS(w -> w without TAKEN), failed: E3.  not ours any more: DEADLINE := 0, E1 again
    E4  token + 1: inside
    X1  DEADLINE := LEFT                                                     plain store
    X2  release W, as ever, with TAKEN or without.  W is not ours any more: nothing to do
    X3  leave the seat

Between E1 and E2, and between X1 and X2, the ledger does not say that we are inside.  A holder that stalls there has its lock
taken away by the supervisor (see ``supervisor/watch.py``): that is what E3 and X2 look for.  No fence is needed here: the
supervisor makes every processor pass one (membarrier) after it set TAKEN and before it reads DEADLINE again, so either it sees
our DEADLINE, or E3 sees TAKEN.

W and the ledger name the process.  The seat keeps its threads apart: one that stalls before X2 must not release what another
has got since.  A leased lock is released by the thread that took it.

    killed or stopped    the ledger says    done by the supervisor
    after E1             not inside         W is taken away after a lease; dead: pass on, abandoned
    after E2, E4         inside             killed at deadline + grace, pass on, abandoned
    after X1             not inside         W is taken away after a lease; dead: pass on, abandoned
    after X2             not inside         nothing to do

Fork: a child has no contract.  It asks for one of its own when it first acquires.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from _thread import get_ident
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from . import _layout as at
from . import _ledger, _process
from ._owned import OwnedWords, describe
from ._sys import SYSTEM
from .errors import ContractDenied, LeaseExpired

if TYPE_CHECKING:
    from ._client import Connection

__all__ = ["Contract", "Lease", "Terms"]

OnTerminate = Literal["flag", "raise"]

#: Asks for LeaseExpired in the main thread.  Sent only to processes whose contract says on_terminate="raise".
EXPIRY_SIGNAL: Final = signal.SIGRTMAX - 3


@dataclass(frozen=True)
class Terms:
    """What a process asks a contract for.  ``lease`` and ``grace`` in nanoseconds."""

    lease: int
    grace: int = 0
    rank: int = 0
    operations: tuple[str, ...] = ("acquire",)
    on_terminate: OnTerminate = "flag"
    record_site: bool = False


@dataclass(frozen=True)
class Contract:
    """What the supervisor granted this process for one lock.

    operations    what it may do: "acquire", "preempt", ...
    lease, grace  seconds that a hold may last, and seconds between the terminate call and the kill
    rank          precedence among the waiters; larger goes first
    on_terminate  "flag": ``lease.terminate_requested``; "raise": also LeaseExpired in the main thread
    rule          which rule of the policy allowed it
    """

    operations: frozenset[str]
    lease: float
    grace: float
    rank: int
    on_terminate: OnTerminate
    rule: str


class Grant:
    """A contract as one process uses it: its slot in the ledger."""

    __slots__ = (
        "__weakref__", "_words", "connection", "contract", "deadline", "lease", "lease_ns", "leave_seat", "ledger", "number",
        "process", "record_site", "refusal", "seat", "take_seat", "terms", "text", "view",
    )  # fmt: skip

    def __init__(self, connection: Connection, words: OwnedWords, terms: Terms, ledger: _ledger.Ledger, number: int) -> None:
        self.connection = connection
        self._words = weakref.ref(words)  # which refers to us
        self.terms = terms
        self.ledger = ledger
        self.number = number  # of the slot
        self.process = _process.current
        self.text = describe(words.block)
        self.seat: Any = threading.RLock()
        self.take_seat: Callable[[], object] = self.seat.acquire
        self.leave_seat: Callable[[], None] = self.seat.release
        self.view = ledger.view
        self.deadline = _ledger.DEADLINE + number
        self.lease_ns = terms.lease
        self.lease: Lease | None = None  # of the present hold
        self.record_site = terms.record_site
        self.refusal: ContractDenied | None = None
        self.contract: Contract | None = None

    @property
    def words(self) -> OwnedWords | None:
        return self._words()

    def note_site(self, depth: int) -> None:
        frame = sys._getframe(depth)
        self.ledger.write_site(self.number, f"{os.path.abspath(frame.f_code.co_filename)}:{frame.f_lineno}")


class Lease(tuple[Any, int, int]):
    """One hold of a leased lock: the time that is left, and whether the holder is asked to leave.

    A tuple underneath, because that is what Python makes fastest.
    """

    __slots__ = ()

    @property
    def token(self) -> int:
        """Fencing token: larger than that of every earlier hold of this lock, also across restarts of the supervisor."""
        return self[2]

    @property
    def deadline(self) -> float:
        """Monotonic seconds at which the lease ends."""
        return self[1] / 1e9

    def remaining(self) -> float:
        """Seconds until the lease ends; negative afterwards."""
        return (self[1] - SYSTEM.monotonic_ns()) / 1e9

    @property
    def terminate_requested(self) -> bool:
        """Whether the supervisor asks the holder to leave.  One load: cheap enough for every turn of a loop."""
        grant: Grant = self[0]
        return grant.view[_ledger.TERMINATE + grant.number] == self[1]

    def check(self) -> None:
        """Raise LeaseExpired if the holder is asked to leave or the lease is over."""
        if self.terminate_requested or SYSTEM.monotonic_ns() >= self[1]:
            raise LeaseExpired(self[0].text, self[2], max(0.0, -self.remaining()))

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        asked = ", terminate requested" if self.terminate_requested else ""
        return f"<Lease(token={self[2]}, remaining={self.remaining():.3f} s{asked})>"


class LeasedPath(NamedTuple):
    """What a leased lock does instead of a plain one.

    ``take`` and ``leave`` go in and out by any acquire and release of the word that are given: for ``repair()`` and Conditions.
    """

    acquire: Callable[..., bool]
    release: Callable[[], None]
    enter: Callable[[], Lease]
    exit: Callable[..., None]
    take: Callable[..., Lease | None]
    leave: Callable[[Callable[[], object]], None]


def make_leased_path(
    words: OwnedWords,
    plain: tuple[Callable[..., bool], Callable[[], None], Callable[..., None]],
    renew: Callable[[OwnedWords], Grant],
    *,
    recursive: bool,
) -> LeasedPath:
    """The path of a leased lock, around that of a plain one."""
    acquire_plain, release_plain, leave_plain = plain
    view, place, token_place = words.view, words.places[0][0], words.block.start + at.BLOCK_TOKEN
    block_words = words.block.arena.words
    clock, owner_bits, ours_bits = SYSTEM.monotonic_ns, at.OWNER, at.OWNER | at.TAKEN

    def enter() -> Lease:
        """``take`` for the case that is all but always: no thread of this process has it, and nothing is wrong."""
        grant: Grant = words.grant
        me = grant.process
        if words.thread or me is not _process.current or grant.refusal is not None:
            return enter_slowly()
        ledger = grant.view
        try:
            grant.take_seat()  # E0
            ledger[grant.deadline] = 0
            acquire_plain()  # E1
            ledger[grant.deadline] = ends = clock() + grant.lease_ns  # E2
            if view[place] & ours_bits == me.word or reclaim():  # E3
                view[token_place] = token = view[token_place] + 1  # E4
                grant.lease = lease = Lease((grant, ends, token))
                if grant.record_site:
                    grant.note_site(2)
                return lease
            ledger[grant.deadline] = 0
            words.thread = 0
            grant.leave_seat()
        except BaseException:
            undo(grant)
            raise
        return enter_slowly()

    def enter_slowly() -> Lease:
        lease = take(acquire_plain, True, None, 3)
        assert lease is not None
        return lease

    def acquire(block: bool = True, timeout: float | None = None) -> bool:
        if block and timeout is None and not words.thread:
            enter()
            return True
        return take(acquire_plain, block, timeout, 2) is not None

    def take(
        acquire_word: Callable[..., bool], block: bool = True, timeout: float | None = None, frames: int = 1
    ) -> Lease | None:
        grant: Grant = words.grant
        if grant.process is not _process.current or grant.refusal is not None:
            grant = renew(words)
        seat, ledger = grant.seat, grant.view
        if seat._is_owned():
            # The thread has it already: deeper into an RLock, or into the deadlock that a Lock makes of it.
            return grant.lease if acquire_word(block, timeout) else None
        try:
            if timeout is None or not block:
                if not seat.acquire(block):  # E0
                    return None
                until = 0
            else:
                until = clock() + int(max(0.0, timeout) * 1e9)
                if not seat.acquire(True, min(max(0.0, timeout), threading.TIMEOUT_MAX)):
                    return None
                timeout = max(0.0, (until - clock()) / 1e9)
            ledger[grant.deadline] = 0
            while acquire_word(block, timeout):  # E1
                ledger[grant.deadline] = ends = clock() + grant.lease_ns  # E2
                if view[place] & ours_bits == _process.current.word or reclaim():  # E3
                    view[token_place] = token = view[token_place] + 1  # E4
                    grant.lease = lease = Lease((grant, ends, token))
                    if grant.record_site:
                        grant.note_site(frames)
                    return lease
                ledger[grant.deadline] = 0
                words.thread = 0
                if until:
                    timeout = max(0.0, (until - clock()) / 1e9)
            seat.release()
            return None
        except BaseException:
            undo(grant)
            raise

    def undo(grant: Grant) -> None:
        """After an exception on the way in, anywhere between E0 and the return."""
        if grant.seat._is_owned():
            if words.thread == get_ident() and view[place] & owner_bits == _process.current.word:
                leave(leave_plain)
            else:
                grant.seat.release()

    def reclaim() -> bool:
        """E3, when W has TAKEN or is another's: whether it is ours after all."""
        while (w := view[place]) & owner_bits == _process.current.word:
            if not w & at.TAKEN or block_words.compare_exchange(place, w, w & ~at.TAKEN):
                return True
        return False

    def leave(release_word: Callable[[], object]) -> None:
        grant: Grant = words.grant
        if grant.process is not _process.current or not grant.seat._is_owned() or (recursive and words.depth > 1):
            release_word()
            return
        try:
            grant.view[grant.deadline] = _ledger.LEFT  # X1
            release_word()  # X2
        except ValueError:
            if view[place] & owner_bits == _process.current.word:
                raise  # else it was taken away meanwhile
        finally:
            grant.seat.release()  # X3

    def exit_(kind: object = None, value: object = None, traceback: object = None) -> None:
        grant: Grant = words.grant
        if grant.process is not _process.current or words.thread != get_ident() or words.depth > 1:
            leave(leave_plain)
            return
        try:
            grant.view[grant.deadline] = 1  # X1: LEFT
            leave_plain()  # X2
        except ValueError:
            if view[place] & owner_bits == _process.current.word:
                raise  # else it was taken away meanwhile
        finally:
            grant.leave_seat()  # X3

    def release() -> None:
        if words.grant.seat._is_owned():
            exit_()
            return
        owner = view[place] & owner_bits
        if owner and not recursive:
            raise ValueError(
                f"{describe(words.block)} is leased: it is released by the thread that took it, of pid {_process.pid_of(owner)}"
            )
        release_plain()  # raises what there is to be raised

    return LeasedPath(acquire, release, enter, exit_, take, leave)


# -- LeaseExpired in the main thread ----------------------------------------------------------------------------------------

_raising: dict[int, Grant] = {}  # by slot, of this process; both are forgotten by a child
_raised = 0


def prepare_to_raise() -> None:
    """Install the handler of EXPIRY_SIGNAL.  ValueError outside the main thread."""
    if signal.getsignal(EXPIRY_SIGNAL) is not _on_expiry:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError('on_terminate="raise" has to be asked for in the main thread, which is where it raises')
        signal.signal(EXPIRY_SIGNAL, _on_expiry)


def raise_for(grant: Grant) -> None:
    _raising[grant.number] = grant


def stop_raising_for(number: int) -> None:
    _raising.pop(number, None)


def _on_expiry(signum: int, frame: object) -> None:
    global _raised
    for grant in list(_raising.values()):
        lease, words = grant.lease, grant.words
        if lease is None or words is None or words.thread != get_ident() or grant.view[grant.deadline] != lease[1]:
            continue
        if lease.terminate_requested and lease[1] != _raised:
            _raised = lease[1]
            lease.check()


_process.refresh_in_child.append(_raising.clear)
