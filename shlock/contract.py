"""Contracts and leases: what a process was granted, and what a holder sees of its time.

A lock that is opened with ``lease=`` belongs to a contract, which the supervisor of its domain grants.  The contract of a
process is a slot in its ledger (``_ledger.py``); how a holder uses it is in ``_leased.py``.

Fork: a child has no contract.  It asks for one of its own when it first acquires.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sys
import threading
import weakref
from _thread import get_ident
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from . import _layout as at
from . import _ledger, _process
from ._owned import NO_CONTRACT, OwnedWords, describe
from ._sys import SYSTEM
from .errors import ContractDenied, LeaseExpired

if TYPE_CHECKING:
    from ._client import Connection

__all__ = ["OPERATIONS", "Contract", "Lease", "Terms", "check_request"]

OnTerminate = Literal["flag", "raise"]

FREE: Final = 0
AWAY: Final = NO_CONTRACT

#: Asks for LeaseExpired in the main thread.  Sent only to processes whose contract says on_terminate="raise".
EXPIRY_SIGNAL: Final = signal.SIGRTMAX - 3


# -- what no policy can grant -----------------------------------------------------------------------------------------------

OPERATIONS: Final = frozenset({"acquire", "read", "write", "send", "receive", "preempt"})
"""Everything that a contract can allow."""

SHORTEST_LEASE: Final = 1e-3  # seconds; the supervisor looks once in the shortest lease that it granted
LONGEST_SECONDS: Final = 1e9  # 31 years; in nanoseconds it fits a word
HIGHEST_NUMBER: Final = 2**31 - 1  # of ranks and contracts


def check_request(*, operations: Collection[str], lease: float, grace: float = 0.0, rank: int = 0) -> None:
    """Raise TypeError or ValueError, with a text that says why, for what no policy can grant.  Needs no policy."""
    if isinstance(operations, str | bytes) or not isinstance(operations, Collection):
        raise TypeError(f"operations must be a set of names, not {type(operations).__name__}")
    for operation in operations:
        if not isinstance(operation, str):
            raise TypeError(f"operations must be names, not {type(operation).__name__}")
        if operation not in OPERATIONS:
            raise ValueError(f"operation {short(operation)} is not known; there are {listed(OPERATIONS)}")
    if not operations:
        raise ValueError(f"operations must not be empty; there are {listed(OPERATIONS)}")
    check_seconds("lease ", lease, SHORTEST_LEASE)
    check_seconds("grace ", grace, 0.0)
    check_number("rank ", rank, 0, HIGHEST_NUMBER)


# ``what`` is the subject of the text; empty where a key of a policy was named before it.


def check_seconds(what: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what}must be a number of seconds, not {kind_of(value)}")
    if not least <= value <= LONGEST_SECONDS:  # so that NaN fails as well
        raise ValueError(f"{what}must be from {least:g} to {LONGEST_SECONDS:g} seconds, not {short(value)}")


def check_number(what: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}must be a whole number, not {kind_of(value)}")
    if not least <= value <= most:
        raise ValueError(f"{what}must be from {least} to {most}, not {short(value)}")


def kind_of(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")


def listed(words: Collection[str]) -> str:
    return ", ".join(sorted(words))


def short(value: Any) -> str:
    """Its repr, at most 60 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- contracts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What a process asks a contract for.  ``lease`` and ``grace`` in nanoseconds."""

    lease: int
    grace: int = 0
    rank: int = 0
    operations: tuple[str, ...] = ("acquire",)
    on_terminate: OnTerminate = "flag"
    record_site: bool = False
    inherit: bool = False


@dataclass(frozen=True)
class Contract:
    """What the supervisor granted this process for one lock.

    operations    what it may do: "acquire", "preempt", ...
    lease, grace  seconds that a hold may last, and seconds between the terminate call and the kill
    rank          precedence among the waiters of one class; larger goes first
    on_terminate  "flag": ``lease.terminate_requested``; "raise": also LeaseExpired in the main thread
    rule          which rule of the policy allowed it
    precedence    the class that this rule gives: "kernel" goes before every "user"
    inherits      priority inheritance: while a thread with a better scheduling priority waits, the supervisor lifts the holder
    no_inheritance  why it does not, although it was asked to; else None
    """

    operations: frozenset[str]
    lease: float
    grace: float
    rank: int
    on_terminate: OnTerminate
    rule: str
    precedence: str = "user"
    inherits: bool = False
    no_inheritance: str | None = None


CLASSES: Final = ("user", "kernel")
"""Of contracts, the lower one first."""


def precedence_of(class_: str, rank: int) -> int:
    """Class and rank as one number: the larger one goes first, and may preempt the smaller one."""
    return CLASSES.index(class_) << 32 | rank


class Slot:
    """A slot of the ledger as this process uses it: that of a contract, or of a record in which it reads under one."""

    __slots__ = ("__weakref__", "began", "lasts", "ledger", "moments", "number", "text", "view")

    def __init__(self, ledger: _ledger.Ledger, number: int, text: str, lease: int) -> None:
        self.ledger = ledger
        self.view = ledger.view
        self.number = number
        self.moments = ledger.moments
        self.began = _ledger.BEGAN + number
        self.lasts = lease / 1e9  # seconds that a hold may last
        self.text = text  # what it is for

    @property
    def lease(self) -> Lease | None:
        """The present hold; None if this process is not inside."""
        raise NotImplementedError

    def is_of_caller(self) -> bool:
        """Whether it is the calling thread that is inside, if one is."""
        raise NotImplementedError

    def make_lease(self, began: float, token: int) -> Lease:
        """A hold.  The path of ``_leased`` that is all but always taken does the same without a call."""
        lease = Lease()
        lease._grant, lease._began, lease.token = self, began, token
        return lease

    def note_site(self, depth: int) -> None:
        frame = sys._getframe(depth)
        self.ledger.write_site(self.number, f"{os.path.abspath(frame.f_code.co_filename)}:{frame.f_lineno}")


class Grant(Slot):
    """A contract as one process uses it."""

    __slots__ = (
        "_words",
        "announced",
        "connection",
        "contract",
        "gates",
        "is_away",
        "left",
        "odd",
        "precedence",
        "preempting",
        "process",
        "readers",
        "record_site",
        "refusal",
        "rings",
        "seat",
        "terms",
    )  # fmt: skip

    def __init__(self, connection: Connection, words: OwnedWords, terms: Terms, ledger: _ledger.Ledger, number: int) -> None:
        super().__init__(ledger, number, describe(words.block), terms.lease)
        self.connection = connection
        self._words = weakref.ref(words)  # which refers to us
        self.terms = terms
        self.process = _process.current
        #: Which thread of this process is between E0 and X3, or when it went in by the door (``_leased_door``); FREE; or AWAY:
        #: there is no contract that can be used.
        self.seat = words.lease_seat
        self.is_away = False
        self.gates: collections.deque[Any] = collections.deque()  # of threads that wait for the seat
        self.left = 0.0  # what X1 writes
        self.record_site = terms.record_site
        self.odd = words.lease_odd
        self.precedence = terms.rank  # until the answer says which class it is of
        self.refusal: ContractDenied | None = None
        self.contract: Contract | None = None
        #: Of an RWLock: the slots of the records in which this process has read, by their places.
        self.readers: dict[int, Any] = {}
        #: Whether the supervisor wants to know who waits; and the doorbell at which each thread that waits has told it.
        self.rings = False
        self.announced: dict[int, object] = {}
        self.preempting: set[int] = set()  # threads that wait and may throw out who has lower precedence

    def use(self) -> None:
        """From now on this process takes the lock under this contract."""
        words = self.words
        assert words is not None
        words.lease_odd.cell_contents = self.record_site or words.grant is not None  # a thread may be in under that one
        words.grant = self
        words.lease_began.cell_contents = self.moments[self.began : self.began + 1]
        words.lease_doubt.cell_contents = self.view[_ledger.DOUBT + self.number : _ledger.DOUBT + self.number + 1]
        words.lease_spare.cell_contents = self.make_lease(0.0, 0)
        if words.lease_seat.cell_contents == AWAY:  # no call between
            words.lease_seat.cell_contents = FREE

    def close_seat(self) -> None:
        """No thread takes the seat any more: in a forked child, or when the policy took the contract back."""
        self.is_away = self.odd.cell_contents = True
        if self.seat.cell_contents == FREE:
            self.seat.cell_contents = AWAY

    def wait_for_seat(self, block: bool, until: float | None) -> bool:
        """E0 when another thread may have the seat; whether the caller has it now.  ``until``: monotonic, None = for ever.

        The caller has checked that the seat is not its own.  Between testing and setting it there is no call, so the
        interpreter looks neither at signals nor at other threads.
        """
        me = get_ident()
        words = self.words
        gate = threading.Lock()
        gate.acquire()
        self.gates.append(gate)
        self.odd.cell_contents = True
        try:
            while True:
                if self.seat.cell_contents <= FREE and not self.is_away:
                    self.seat.cell_contents = me
                    return True
                if (
                    self.seat.cell_contents.__class__ is float
                    and words is not None
                    and (words.door is None or words.view[words.first_hold + words.slot] != at.INSIDE)
                    and not self.is_away
                ):  # D2: who has it is not inside; perhaps it is this thread, of which we are a signal handler
                    self.seat.cell_contents = me
                    self.moments[self.began] = 0.0
                    return True
                now = SYSTEM.monotonic()
                if self.is_away or not block or (until is not None and now >= until):
                    return False
                if self.rings:
                    self.announce_wait()
                # Who leaves the seat opens a gate; who came between our test and his look is found by looking again.
                gate.acquire(timeout=0.01 if until is None else min(0.01, until - now))
        finally:
            self.gates.remove(gate)
            self.settle_wait()

    def leave_seat(self) -> None:
        """X3."""
        if self.terms.inherit:
            self.view[_ledger.THREAD + self.number] = 0
        self.seat.cell_contents = AWAY if self.is_away else FREE
        self.open_gate()

    def open_gate(self) -> None:
        """After X3: let a thread of this process look that waits for the seat."""
        if self.gates:
            with contextlib.suppress(IndexError, RuntimeError):
                self.gates[0].release()
        else:
            self.odd.cell_contents = self.record_site or self.is_away or bool(self.left)

    # -- the doorbell: what the supervisor should look at before its next look is due --

    def note_thread(self) -> None:
        """After E0: who will hold the lock."""
        self.view[_ledger.THREAD + self.number] = threading.get_native_id()

    def check_preemption(self) -> None:
        """ContractDenied if this contract does not allow it."""
        if "preempt" not in self.terms.operations:
            rule = "no rule" if self.contract is None else self.contract.rule
            reason = f"its contract does not allow to preempt, only {', '.join(self.terms.operations)}"
            raise ContractDenied(self.text, reason, rule)

    @contextlib.contextmanager
    def preempts(self) -> Iterator[None]:
        """Whoever has lower precedence is thrown out while the calling thread waits in here.  ContractDenied."""
        self.check_preemption()
        thread = get_ident()
        try:
            self.preempting.add(thread)
            yield
        finally:
            _process.to_the_end(lambda: self.preempting.discard(thread))

    def ask_for_preemption(self, reads: bool = False) -> None:
        """The calling thread is about to sleep.  Asked again at each poll: there may be another holder by then.

        ``reads``: it waits to read, and readers are not in its way.
        """
        if get_ident() in self.preempting and self.process is _process.current:
            self.connection.ring({"op": "preempt", "slot": self.number, "reads": reads})

    def announce_wait(self, reads: bool = False) -> None:
        """Tell the supervisor that the calling thread is about to sleep.  Called again at each poll: there may be a new one.

        ``reads``: it waits for the writer of an RWLock, and not for readers.
        """
        if self.process is not _process.current:
            return
        thread = threading.get_native_id()
        bell = self.connection.bell
        if bell is not None and self.announced.get(thread) is bell:
            return
        if thread not in self.announced:
            self.announced[thread] = None
            if self.terms.inherit:
                self._write_wait(thread | (_ledger.WAIT_READS if reads else 0))
        if self.connection.ring({"op": "waiting", "slot": self.number}):
            self.announced[thread] = bell

    def _write_wait(self, thread: int) -> None:
        word, words = thread | self.number + 1 << _ledger.WAIT_SLOT_SHIFT, self.ledger.words
        for place in range(_ledger.WAITS, _ledger.WAITS + _ledger.MOST_WAITS):
            if not self.view[place] and words.compare_exchange(place, 0, word):
                return

    def settle_wait(self) -> None:
        """The calling thread got in or gave up.  Finished although signal handlers raise."""
        if self.announced and self.process is _process.current:
            _process.to_the_end(self._settle_wait)

    def _settle_wait(self) -> None:
        thread = threading.get_native_id()
        if thread not in self.announced:
            return
        word = thread | self.number + 1 << _ledger.WAIT_SLOT_SHIFT
        for index, found in enumerate(self.view[_ledger.WAITS : _ledger.WAITS + _ledger.MOST_WAITS].tolist()):
            if found & ~_ledger.WAIT_READS == word:
                self.view[_ledger.WAITS + index] = 0
        self.connection.ring({"op": "settled", "slot": self.number})
        self.announced.pop(thread, None)

    def tell_if_lifted(self) -> None:
        """After X3: the supervisor may put back the priority of a thread that it lifted."""
        if self.rings and self.process is _process.current and self.ledger.has_lifts():
            self.connection.ring({"op": "settled", "slot": self.number})

    @property
    def words(self) -> OwnedWords | None:
        return self._words()

    @property
    def lease(self) -> Lease | None:
        """The present hold of this process; None if it is not inside."""
        began, words = self.moments[self.began], self.words
        if began <= 0 or words is None:
            return None
        return self.make_lease(began, words.view[words.block.start + at.BLOCK_TOKEN])

    def is_of_caller(self) -> bool:
        words = self.words
        return words is not None and words.is_mine()


class Lease:
    """One hold of a leased lock: the time that is left, and whether the holder is asked to leave."""

    __slots__ = ("_began", "_grant", "token")

    _grant: Slot
    _began: float  # monotonic seconds
    #: Fencing token: larger than that of every earlier hold of this lock, also across restarts of the supervisor.  A reader's
    #: is smaller than that of each writer that goes in after it, and not smaller than that of one that was inside before.
    token: int

    # No __init__: who makes one sets the three, which takes half the time.

    @property
    def deadline(self) -> float:
        """Monotonic seconds at which the lease ends."""
        return self._began + self._grant.lasts

    def remaining(self) -> float:
        """Seconds until the lease ends; negative afterwards."""
        return self.deadline - SYSTEM.monotonic()

    @property
    def terminate_requested(self) -> bool:
        """Whether the supervisor asks the holder to leave.  One load: cheap enough for every turn of a loop."""
        grant = self._grant
        return grant.moments[_ledger.TERMINATE + grant.number] == self._began

    def check(self) -> None:
        """Raise LeaseExpired if the holder is asked to leave or the lease is over."""
        if self.terminate_requested or SYSTEM.monotonic() >= self.deadline:
            raise LeaseExpired(self._grant.text, self.token, max(0.0, -self.remaining()))

    def __repr__(self) -> str:
        asked = ", terminate requested" if self.terminate_requested else ""
        return f"<Lease(token={self.token}, remaining={self.remaining():.3f} s{asked})>"


# -- LeaseExpired in the main thread ----------------------------------------------------------------------------------------

_raising: weakref.WeakSet[Slot] = weakref.WeakSet()  # of this process; a child forgets them
_raised = 0.0  # of the hold that was told last


def prepare_to_raise() -> None:
    """Install the handler of EXPIRY_SIGNAL.  ValueError outside the main thread."""
    if signal.getsignal(EXPIRY_SIGNAL) is not _on_expiry:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError('on_terminate="raise" has to be asked for in the main thread, which is where it raises')
        signal.signal(EXPIRY_SIGNAL, _on_expiry)


def raise_for(slot: Slot) -> None:
    _raising.add(slot)


def _on_expiry(signum: int, frame: object) -> None:
    global _raised
    for slot in list(_raising):
        lease = slot.lease
        if lease is None or not slot.is_of_caller() or slot.moments[slot.began] != lease._began:
            continue
        if lease.terminate_requested and lease._began != _raised:
            _raised = lease._began
            lease.check()


_process.refresh_in_child.append(_raising.clear)
