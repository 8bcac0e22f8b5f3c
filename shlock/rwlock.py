"""RWLock: many readers, or one writer.

It is a Lock for the writers, leased or not, and a record for each reader.  How they take turns, and what is so when a process
dies in between, stands in ``_readers``; how a lease limits a reader, in ``_leased_readers``.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from . import _layout as at
from . import _process
from ._arena import Block, Declaration
from ._leased_readers import LeasedRWWords
from ._owned import describe
from ._parking import deadline_after
from ._readers import Reading, RWWords, Writing
from .contract import Contract, Lease, OnTerminate, Terms
from .errors import Abandoned, ContractDenied, SegmentError
from .synchronize import Lock, Owner, Policy, Waiter, _Owned, _shared, policy_number, terms_for, waiters_of

__all__ = ["RWLock"]

OPERATIONS: Final = ("read", "write")
#: A block has fourteen records in each extension, and needs two extensions for their numbers.
FEWEST_RECORDS: Final = 2 * at.EXTENSION_CELL_COUNT


class RWLock(_Owned):
    """A lock that many readers hold at a time, or one writer alone.  Without a lease a reader that hangs keeps writers out.

    ::

        with rwlock.read():    # together with other readers
            ...
        with rwlock.write():   # alone
            ...

    Writers go first: when one waits, new readers wait, too.  But the readers that wait when a writer gets its turn go in before
    it, so a waiting reader lets one writer pass at most, the one that had its turn when it came.  Neither starves the other.

    A thread that reads may read again, any number of times, also while a writer waits.  Everything else inside is refused with
    RuntimeError, because it would wait for itself: writing inside a read (an upgrade: two that try it wait for each other), and
    reading or writing inside a write.

    When a process dies while it writes, what it guards may be half-written: every reader and writer that comes is told, as
    ``on_abandoned`` says, until a writer has left.  When one dies while it reads or waits, the others go on and nobody needs to
    know.  A thread that ends without leaving, in a process that lives on, is not dead.  A forked child holds nothing of what
    its parent holds.

    name          the lock of that name in ``domain``, created if there is none
    readers       how many threads can read at the same time, 64 if it is created; further ones wait.  SegmentError if it is
                  there with another number.  A writer looks at the records of all of them
    on_abandoned  what is seen of a dead writer: "warn" (an AbandonedWarning), "ignore" (``abandoned`` is set), "poison"
                  (AbandonedError, until somebody repairs it inside ``with rwlock.repair()``).  It belongs to the lock
    lease, grace, on_terminate, record_site
                  as for a Lock: how long a ``with`` of write may last, counted from when the last reader has left, or one of
                  read.  Who overruns is asked to leave, then killed, and the others go on when it is dead.  Each thread that
                  reads has a deadline of its own; the first of them that overruns ends its process.  A read within a read
                  belongs to the outer one and its deadline
    rank          who waits goes in by precedence: a reader goes before a writer that is not better, as without ranks; a worse
                  one waits until that writer has left
    operations    what the contract is asked for: "read", "write", "preempt".  What it does not allow raises ContractDenied
    inherit       priority inheritance, as for a Lock: a writer lifts all the readers that it waits for, a reader the writer.
                  Who waits because there are more readers than ``readers`` lifts nobody

    Uncontended, neither read nor write makes a system call.
    """

    _kind = at.RWLOCK
    _terms: Terms | None = None
    _words: RWWords

    def __init__(
        self,
        name: str | None = None,
        *,
        readers: int | None = None,
        domain: str | None = None,
        on_abandoned: Policy | None = None,
        lease: float | None = None,
        grace: float | None = None,
        rank: int = 0,
        operations: Collection[str] = OPERATIONS,
        on_terminate: OnTerminate = "flag",
        record_site: bool = False,
        inherit: bool = False,
        ctx: Any = None,
    ) -> None:
        terms = self._terms = terms_for(lease, grace, rank, operations, on_terminate, record_site, OPERATIONS, inherit)
        if readers is not None:
            if isinstance(readers, bool) or not isinstance(readers, int):
                raise TypeError(f"readers must be an int, not {type(readers).__name__}")
            if readers < 1:
                raise ValueError(f"readers must be at least 1, not {readers}")
        declaration = Declaration(
            at.RWLOCK,
            parameter=0 if readers in (None, at.USUAL_READERS) else readers or 0,
            cells=at.BLOCK_CELL_COUNT + max(FEWEST_RECORDS, readers or at.USUAL_READERS),  # none of them in the first block
            policy=policy_number(on_abandoned),
            lease=terms.lease if terms is not None else 0,
            grace=terms.grace if terms is not None else 0,
        )
        self._open(declaration, name, domain)
        there = len(self._words.cells)
        if readers not in (None, there):
            raise SegmentError(
                self._block.arena.segment.name,
                f"{name!r} is for {there} readers there, and {readers} are wanted",
                "Use another name or domain, or ask for what is there.",
            )

    def _bind(self, block: Block) -> None:
        super()._bind(block)
        words = self._words = _shared(block, lambda: LeasedRWWords(block) if block.leased else RWWords(block))
        if block.leased and self._terms is None:
            lease, grace = (words.view[block.start + place] for place in (at.BLOCK_LEASE, at.BLOCK_GRACE))
            self._terms = Terms(lease, grace, 0, OPERATIONS) if words.grant is None else words.grant.terms
        self._lock = Lock._over(block, self._terms, needs="write")
        self._reading = Reading(words, None)
        path = self._lock._leased

        def give_back() -> None:
            words.release(repaired=False, leaving=True)

        self._give_back = give_back if path is None else lambda: path.leave(give_back)

    def _prepare(self, state: Any) -> None:
        self._terms = state

    def _extra_state(self) -> Any:
        return self._terms

    # -- holding it ---------------------------------------------------------------------------------------------------

    def read(self, timeout: float | None = None, preempt: bool = False) -> Reading:
        """``with rwlock.read() as lease:`` hold it together with other readers; ``lease`` is None for one without a lease.

        Blocks while somebody writes or waits to write; TimeoutError after ``timeout`` seconds.  A thread that reads already
        goes in at once, on the lease that it has.  RuntimeError in a thread that writes.

        ``preempt``, of a leased lock whose contract allows it (else ContractDenied; without a lease ValueError): while it
        waits, a writer of lower precedence is asked to leave at once, and killed after its grace.  Readers are not in its way.

        ``lease.token`` is smaller than that of every writer that goes in afterwards, and not smaller than that of any that was
        inside before; readers may have the same.  So a resource that has seen a later writer can reject who still acts on what
        it read before that.
        """
        terms = self._terms
        if terms is not None and "read" not in terms.operations:
            self._refuse("read")
        if timeout is None and not preempt:
            return self._reading
        deadline_after(timeout)
        self._check_preemption(preempt)
        return Reading(self._words, timeout, preempt)

    def write(self, timeout: float | None = None, preempt: bool = False) -> Writing:
        """``with rwlock.write() as lease:`` hold it alone; ``lease`` is None for one without a lease.

        Blocks until the readers and the writer that are inside have left; TimeoutError after ``timeout`` seconds.  RuntimeError
        in a thread that reads or writes already.

        ``preempt`` as for ``read``; of lower precedence it throws out the writer and all readers.
        """
        self._check_preemption(preempt)
        acquire = partial(self._lock.acquire, preempt=True) if preempt else self._lock.acquire
        return Writing(self._words, acquire, self._lock.__exit__, self._give_back, timeout, preempt)

    @contextmanager
    def repair(self) -> Iterator[Abandoned | None]:
        """Write although it is poisoned, and put in order what it guards.

        Yields who died, or None if nobody did.  Leaving normally makes it usable for everyone; leaving by an exception leaves
        it poisoned.  Blocks until it is free.
        """
        words, path = self._words, self._lock._leased

        def acquire(block: bool, timeout: float | None) -> Any:
            return words.acquire(block, timeout, repair=True)

        def leaver(repaired: bool) -> Callable[..., None]:
            def leave(*exception: object) -> None:
                words.release(repaired=repaired and exception[:1] == (None,), leaving=True)

            return leave

        if path is None:
            writing = Writing(words, acquire, leaver(True), leaver(False), None)
        else:
            take, leave = path.take, path.leave
            writing = Writing(
                words,
                lambda block, timeout: take(acquire, block, timeout) is not None,
                lambda *exception: leave(lambda: leaver(True)(*exception)),
                lambda: leave(leaver(False)),
                None,
            )
        with writing:
            yield words.abandoned()

    def _check_preemption(self, preempt: bool) -> None:
        if not preempt:
            return
        if self._terms is None:
            raise ValueError(f"{describe(self._block)}: preempt= needs lease=: without a lease there is no precedence")
        self._words.grant.check_preemption()

    def _refuse(self, what: str) -> None:
        contract, allowed = self.contract, ", ".join(self._terms.operations if self._terms is not None else ())
        reason = f"its contract does not allow to {what}, only {allowed}"
        raise ContractDenied(describe(self._block), reason, "no rule" if contract is None else contract.rule)

    # -- what it is ---------------------------------------------------------------------------------------------------

    def locked(self) -> bool:
        """Whether somebody reads or writes, or has closed the door to write."""
        return bool(self._words.view[self._block.word] & at.OWNER) or self._words.anybody_reads()

    @property
    def readers(self) -> int:
        """How many are reading now: a process counts once for each thread.  The dead that nobody has found yet count, too."""
        return len(self._words.readers())

    @property
    def owner(self) -> Owner | None:
        """Who writes, or waits for the last reader to leave; else None.  Takes no lock; it may be old when it arrives."""
        return super().owner

    @property
    def waiters(self) -> tuple[Waiter, ...]:
        """The threads that are blocked on it now, to read or to write, the longest-waiting first.  Takes no lock."""
        words = self._words
        return waiters_of(self._block, words.line, words.draining)

    @property
    def contract(self) -> Contract | None:
        """What the supervisor granted this process; None for a lock without a lease."""
        return self._lock.contract

    @property
    def lease(self) -> Lease | None:
        """The present hold, if the calling thread writes or reads; else None."""
        hold = self._words.holds.get(get_ident())
        if hold is not None and hold.process is _process.current:
            return hold.lease
        return self._lock.lease

    def __repr__(self) -> str:
        try:
            return f"<{type(self).__name__}(readers={self.readers}, owner={self._owner_name(self._words)}{self._suffix()})>"
        except Exception:
            return f"<{type(self).__name__}(unknown)>"
