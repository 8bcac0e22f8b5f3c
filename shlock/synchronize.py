"""Lock, RLock, Semaphore, BoundedSemaphore, Condition, Event and Barrier, as multiprocessing.synchronize has them.

Each is one word in shared memory plus the parking place; none of them sleeps or wakes by itself.  Signatures, results and
exceptions are multiprocessing's (3.11, and ``locked()`` from 3.14), and beyond that every primitive

- may have a name: in any process of the same user, the same name in the same ``domain`` is the same primitive (and in a
  domain of the machine, ``"/NAME"``, a leased Lock or RLock, as a Block, Channel or Queue, is the same for all users, see
  ``_machine``);
- goes on working when processes that use it die at any instant.

``Lock``, ``RLock``, the lock of a ``Condition`` and ``Semaphore(owned=True)`` know their owner.  When the owner's process
dies, a waiter gets the lock and is told.  A thread that ends without releasing, in a process that lives on, is not a dead
owner.  A plain Semaphore has no owners: it may be acquired here and released there; a dead process's permit is gone.

Objects without a name can be pickled only while a process is being spawned, as multiprocessing's; those with a name always.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import context as mp_context
from multiprocessing import process as mp_process
from threading import BrokenBarrierError
from typing import Any, ClassVar, Final, Literal, TypeVar

from . import _anonymous, _bias, _machine, _names, _process
from . import _layout as at
from ._arena import Block, Declaration
from ._counting import BarrierWord, ConditionWord, EventWord, SemaphoreWord
from ._fast_path import make_fast_path
from ._leased import LeasedPath, make_leased_path, make_refusing_path
from ._multiprocessing import SemLockView, ZeroCount
from ._owned import OwnedWords, describe
from ._parking import parking_of
from .contract import Contract, Lease, OnTerminate, Terms, check_request
from .errors import Abandoned, ContractDenied

__all__ = [
    "Barrier", "BoundedSemaphore", "Condition", "Event", "Lock", "Owner", "RLock", "Semaphore", "Waiter",
    "attach_of_machine", "owned_words", "policy_number", "terms_for", "waiters_of",
]  # fmt: skip

SEM_VALUE_MAX: Final = 2**31 - 1

Policy = Literal["warn", "ignore", "poison"]
OnDeadlock = Literal["wait", "raise"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Owner:
    """Who holds a primitive.

    pid    its process number
    name   what that process is, as far as it was recorded: process name and program, else None
    alive  False if it is dead and no waiter has noticed yet
    since  monotonic seconds at which it got in, or None: an uncontended acquire reads no clock
    """

    pid: int
    name: str | None
    alive: bool
    since: float | None

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


@dataclass(frozen=True)
class Waiter:
    """A thread that is blocked on a primitive: process number, native thread number, name, and for how many seconds."""

    pid: int
    thread_id: int
    name: str | None
    waiting_for: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


class _Primitive:
    """A control block, with or without a name, and how it travels to other processes."""

    _kind: ClassVar[int]
    _block: Block

    def _open(self, declaration: Declaration, name: str | None, domain: str | None) -> None:
        if name is None:
            if domain is not None:
                raise ValueError(f"domain={domain!r} is for a primitive with a name, and there is none")
            self._bind(_anonymous.allocate(declaration))
            return
        name = _names.check_name(name)
        domain = _names.DEFAULT_DOMAIN if domain is None else _names.check_name(domain, "domain")
        if _machine.is_of_machine(domain):
            self._bind(self._attach_of_machine(domain, name, declaration))
        else:
            self._bind(_names.open_named(domain, name, declaration))

    def _attach_of_machine(self, domain: str, name: str, declaration: Declaration) -> Block:
        return attach_of_machine(domain, name, declaration, None)

    def _bind(self, block: Block) -> None:
        """Set up what this object needs of its block."""
        self._block = block

    @property
    def name(self) -> str | None:
        """The name, or None."""
        return self._block.name

    @property
    def domain(self) -> str | None:
        """The domain of the name, or None."""
        return self._block.arena.domain

    @property
    def waiters(self) -> tuple[Waiter, ...]:
        """The threads that are blocked on it now, the longest-waiting first.  Takes no lock."""
        return waiters_of(self._block)

    def __reduce__(self) -> tuple[Any, ...]:
        block = self._block
        attach: Callable[..., Block]
        arguments: tuple[Any, ...]
        if block.name is None:
            mp_context.assert_spawning(self)
            attach, arguments = _anonymous.attach_inherited, _anonymous.export(block)
        elif _machine.is_of_machine(block.arena.domain):
            declaration = Declaration(self._kind, policy=block.policy)
            terms, _ = self._extra_state()
            attach, arguments = attach_of_machine, (block.arena.domain, block.name, declaration, terms)
        else:
            attach, arguments = _names.attach_named, (block.arena.domain, block.name)
        return _rebuild, (type(self), attach, arguments, self._extra_state())

    def _extra_state(self) -> Any:
        """What a copy in another process needs beside the block."""
        return None

    def _prepare(self, state: Any) -> None:
        """Called in the other process before ``_bind``."""

    def _restore(self, state: Any) -> None:
        """Called there after it."""

    def _suffix(self) -> str:
        """The part of repr that every primitive has."""
        parts = [f", name={self._block.name!r}"] if self._block.name is not None else []
        count = len(self.waiters)
        if count:
            parts.append(f", waiters={count}")
        return "".join(parts)


def _rebuild(cls: type[_Primitive], attach: Callable[..., Block], arguments: tuple[Any, ...], state: Any) -> _Primitive:
    self = cls.__new__(cls)
    self._prepare(state)
    block = attach(*arguments)
    if block.kind != cls._kind:
        raise block.arena.damaged(f"block {block.index} is no {cls.__name__}")
    self._bind(block)
    self._restore(state)
    return self


def attach_of_machine(domain: str, name: str, declaration: Declaration, terms: Terms | None) -> Block:
    """The first control block of a name in a domain of the machine, from its supervisor.  ValueError without terms."""
    if terms is None:
        raise ValueError(
            f"domain {domain!r} is of the machine: only Lock, RLock, Block, Channel and Queue can be opened there, with "
            "lease=. A domain of this user has no '/' at its beginning."
        )
    from ._client import attach  # only who asks for contracts talks to a supervisor

    return attach(domain, name, declaration, terms)


def waiters_of(block: Block, *more: int) -> tuple[Waiter, ...]:
    """Who is parked for a block, or for ``more`` keys of it."""
    arena, now = block.arena, time.monotonic_ns()
    parking = parking_of(block.arena)
    found = sorted((waiter for key in (block.index, *more) for waiter in parking.waiting(key)), key=lambda waiter: waiter[2])
    return tuple(
        Waiter(_process.pid_of(claim), thread, arena.process_name(claim), max(0, now - since) / 1e9)
        for claim, thread, since in found
    )


def _shared(block: Block, make: Callable[[], _T]) -> _T:
    """What this process knows of a block, one however many objects there are.  Kept weakly: it refers to the block."""
    there: _T | None = block.local() if block.local is not None else None
    if there is None:
        there = make()
        block.local = weakref.ref(there)
    return there


def policy_number(on_abandoned: Policy | None) -> int | None:
    """The policy of a declaration.  ValueError if there is no such policy."""
    if on_abandoned is None:
        return None
    if on_abandoned not in at.POLICIES:
        raise ValueError(f"on_abandoned must be one of {', '.join(at.POLICIES)}, not {on_abandoned!r}")
    return at.POLICIES.index(on_abandoned)


def terms_for(
    lease: float | None,
    grace: float | None,
    rank: int,
    operations: Collection[str],
    on_terminate: OnTerminate,
    record_site: bool,
    usual: tuple[str, ...] = ("acquire",),
    inherit: bool = False,
) -> Terms | None:
    """What to ask the supervisor for, checked as far as no policy is needed; None without a lease.

    usual  the operations that may be named without a lease
    """
    if lease is None:
        for name, is_given in (
            ("grace", grace is not None),
            ("rank", rank != 0),
            ("operations", tuple(operations) != usual),
            ("on_terminate", on_terminate != "flag"),
            ("record_site", record_site),
            ("inherit", inherit),
        ):
            if is_given:
                raise ValueError(f"{name}= needs lease=: without a lease there is no contract")
        return None
    if on_terminate not in ("flag", "raise"):
        raise ValueError(f'on_terminate must be "flag" or "raise", not {on_terminate!r}')
    check_request(operations=operations, lease=lease, grace=grace or 0.0, rank=rank)
    nanoseconds = round(lease * 1e9), round((grace or 0.0) * 1e9)
    return Terms(*nanoseconds, rank, tuple(sorted(operations)), on_terminate, record_site, inherit)


def _refusal(block: Block, needs: str, terms: Terms) -> Callable[..., Any]:
    """What the lock of a block does for who has no contract that is good for it."""
    reason = f"its contract does not allow to {needs}, only {', '.join(terms.operations)}"

    def refuse(*arguments: object, **options: object) -> Any:
        raise ContractDenied(describe(block), reason, block.arena.rights.rule)

    return refuse


def owned_words(block: Block, places: list[int]) -> OwnedWords:
    """The OwnedWords of this process for the block: one, however many objects there are."""
    return _shared(block, lambda: OwnedWords(block, places))


class _Owned(_Primitive):
    """What Lock, RLock and an owned Semaphore have in common."""

    _words: OwnedWords

    @property
    def abandoned(self) -> Abandoned | None:
        """Who died holding it, from the death until the heir releases or somebody repairs; else None."""
        return self._words.abandoned()

    @property
    def owner(self) -> Owner | None:
        """Who holds it now, or None.  Takes no lock; the answer may be old when it arrives."""
        owners = self._words.owners()
        return _owner(self._block, owners[0], self._words.since()) if owners else None

    @contextmanager
    def repair(self) -> Iterator[Abandoned | None]:
        """Hold it although it is poisoned, and put in order what it guards.

        Yields who died, or None if nobody did.  Leaving normally makes it usable for everyone; leaving by an exception
        leaves it poisoned.  Blocks until it is free.
        """
        self._words.acquire(True, None, repair=True)
        try:
            yield self._words.abandoned()
        except BaseException:
            self._words.release(repaired=False, leaving=True)
            raise
        self._words.release(repaired=True, leaving=True)

    def _owner_name(self, words: OwnedWords) -> str:
        owners = words.owners()
        if not owners:
            return "None"
        if words.is_mine():
            name: str = mp_process.current_process().name
            thread = threading.current_thread().name
            return name if thread == "MainThread" else f"{name}|{thread}"
        if owners[0] == _process.current.word:
            return "SomeOtherThread"
        owner = _owner(self._block, owners[0], 0)
        return f"pid {owner.pid}{f' {owner.name}' if owner.name else ''}{'' if owner.alive else ', dead'}"

    def _suffix(self) -> str:
        abandoned = self.abandoned
        return super()._suffix() + (f", abandoned by pid {abandoned.pid}" if abandoned else "")


def _owner(block: Block, word: int, since: int) -> Owner:
    alive = _process.is_alive(word)
    name = block.arena.process_name(word)
    return Owner(_process.pid_of(word), name, alive, since / 1e9 if since else None)


class Lock(_Owned):
    """A lock that cannot be orphaned: when its owner's process dies, a waiter gets it and is told.

    A thread that ends without releasing it, in a process that lives on, is not a dead owner.  Not recursive.  Any process
    or thread may release it, unless it has a lease.

    name          the lock of that name in ``domain``, created if there is none; at most 200 bytes in UTF-8
    on_abandoned  what the heir sees: "warn" (an AbandonedWarning, and the lock), "ignore" (the lock; ``abandoned`` is set),
                  "poison" (every acquire raises AbandonedError until somebody repairs it inside ``with lock.repair()``).
                  It belongs to the lock: who attaches to a name either gives the same or none.
    on_deadlock   "raise": DeadlockError, also before a timeout has passed, in an acquire by this object that closes a cycle:
                  the owner waits, directly or through others, for what the calling thread holds; "wait": it blocks
    lease         seconds that a hold may last.  The lock then belongs to a contract, which the supervisor of the domain grants
                  (``contract``; opening it blocks for the answer: ContractDenied, SupervisorError).  ``with lock as lease:``
                  gives a Lease.  Only the thread that took it releases it.
    grace         seconds between the call to leave at the end of the lease, and SIGKILL; default 0
    rank          precedence among the waiters, larger goes first, as far as the policy allows
    operations    what the contract is asked for.  Without "acquire" the lock can only be looked at; with "preempt",
                  ``acquire(preempt=True)`` ends the hold of a process of lower precedence at once: it is asked to leave, and
                  killed after its grace
    on_terminate  "flag": the call to leave is ``lease.terminate_requested``; "raise": also LeaseExpired in the main thread
    record_site   note the line of the program at each acquire, for ``shlock why``; costs a microsecond
    inherit       priority inheritance: while a thread waits that is scheduled before the holder, the supervisor lifts the
                  holder to its priority (``contract.inherits``, or why not).  Of those who ask for it; costs microseconds

    Uncontended, acquire and release are one compare-exchange each and no system call.  Safe to use in signal handlers as
    far as a lock that is not recursive can be, and across fork: a child is never the owner of what its parent holds.
    """

    __slots__ = ("__enter__", "__exit__")
    __enter__: Callable[..., Any]
    __exit__: Callable[..., None]
    _kind = at.LOCK
    _terms: Terms | None = None
    _leased: LeasedPath | None = None
    _on_deadlock: OnDeadlock = "wait"
    _needs = "acquire"  # what its contract must allow

    def __init__(
        self,
        name: str | None = None,
        *,
        domain: str | None = None,
        on_abandoned: Policy | None = None,
        on_deadlock: OnDeadlock = "wait",
        lease: float | None = None,
        grace: float | None = None,
        rank: int = 0,
        operations: Collection[str] = ("acquire",),
        on_terminate: OnTerminate = "flag",
        record_site: bool = False,
        inherit: bool = False,
        ctx: Any = None,
    ) -> None:
        if on_deadlock not in ("wait", "raise"):
            raise ValueError(f'on_deadlock must be "wait" or "raise", not {on_deadlock!r}')
        self._on_deadlock = on_deadlock
        self._terms = terms_for(lease, grace, rank, operations, on_terminate, record_site, inherit=inherit)
        terms = self._terms or Terms(0)
        declaration = Declaration(self._kind, policy=policy_number(on_abandoned), lease=terms.lease, grace=terms.grace)
        self._open(declaration, name, domain)

    @classmethod
    def _over(cls, block: Block, terms: Terms | None = None, needs: str = "acquire", *, may_be_biased: bool = False) -> Lock:
        """The lock of a control block of something larger, whose contract must allow what ``needs`` says."""
        lock = cls.__new__(cls)
        lock._terms, lock._needs = terms, needs
        words = owned_words(block, [block.word])  # kept until the lock has it
        if may_be_biased:
            _bias.allow(words)
        lock._bind(block)
        return lock

    def _bind(self, block: Block) -> None:
        super()._bind(block)
        words = self._words = owned_words(block, [block.word])
        if block.arena.extents and self._terms is not None and self._needs not in self._terms.operations:
            # Its supervisor gives a contract for one end of a ring only to who may use that one.
            refuse = _refusal(block, self._needs, self._terms)
            self.__dict__["acquire"] = self.__dict__["release"] = self.__enter__ = self.__exit__ = refuse
            return
        if block.leased:
            self._obtain_contract()
            if self._needs not in words.grant.terms.operations:
                self._leased = path = make_refusing_path(words, self._needs)
                self.__dict__["acquire"], self.__dict__["release"] = path.acquire, path.release
                self.__enter__, self.__exit__ = path.enter, path.exit
                return
        # As in multiprocessing: the object's own functions, without the detour over the class; "with" finds them in slots.
        self._paths = make_fast_path(words, recursive=self._kind == at.RLOCK, raises=self._on_deadlock == "raise")
        if block.leased:
            from ._client import renew

            options = {"recursive": self._kind == at.RLOCK, "raises": self._on_deadlock == "raise"}
            self._leased = make_leased_path(words, self._paths[0], renew, **options)
        self._choose_path()
        words.users = [user for user in words.users if user() is not None] + [weakref.ref(self)]

    def _choose_path(self) -> None:
        """Have the functions that suit the lock as it is now: biased to this process, or not."""
        has_door, leased = self._words.door is not None, self._leased
        if leased is not None:
            functions = leased.by_door() if has_door else leased
            self.__dict__["acquire"], self.__dict__["release"] = functions.acquire, functions.release
            self.__enter__, self.__exit__ = functions.enter, functions.exit
            return
        ordinary, by_door = self._paths
        path = by_door() if has_door else ordinary
        self.__dict__["acquire"], self.__dict__["release"] = path.acquire, path.release
        self.__enter__, self.__exit__ = path.acquire, path.leave

    def _obtain_contract(self) -> None:
        """The contract of this process for this lock, on our terms or on those that the lock was created with."""
        words, block = self._words, self._block
        if self._terms is None:
            lease, grace = (block.arena.words.load(block.start + place) for place in (at.BLOCK_LEASE, at.BLOCK_GRACE))
            self._terms = words.grant.terms if words.grant is not None else Terms(lease, grace)
        grant = words.grant
        if grant is None or grant.process is not _process.current:
            from ._client import obtain

            obtain(words, self.domain or _names.DEFAULT_DOMAIN, self._terms).use()
        elif grant.terms != self._terms:
            raise ValueError(
                f"{describe(block)}: this process has a contract for it on other terms ({grant.terms}). "
                "One process has one contract for a lock: ask for the same, or drop the other object first."
            )

    def _attach_of_machine(self, domain: str, name: str, declaration: Declaration) -> Block:
        return attach_of_machine(domain, name, declaration, self._terms)

    def _prepare(self, state: Any) -> None:
        self._terms, self._on_deadlock = state

    def _extra_state(self) -> Any:
        return self._terms, self._on_deadlock

    @property
    def contract(self) -> Contract | None:
        """What the supervisor granted this process; None for a lock without a lease."""
        grant = self._words.grant
        return None if grant is None or grant.process is not _process.current else grant.contract

    @property
    def lease(self) -> Lease | None:
        """The present hold, if the calling thread has it; else None."""
        grant = self._words.grant
        return grant.lease if grant is not None and self._words.is_mine() else None

    @contextmanager
    def repair(self) -> Iterator[Abandoned | None]:
        """As of every owned primitive; under a lease, the repair has its deadline too."""
        if self._leased is None:
            with super().repair() as abandoned:
                yield abandoned
            return
        words, path = self._words, self._leased
        path.take(lambda block, timeout: words.acquire(block, timeout, repair=True))
        try:
            yield words.abandoned()
        except BaseException:
            path.leave(lambda: words.release(repaired=False, leaving=True))
            raise
        path.leave(lambda: words.release(repaired=True, leaving=True))

    def acquire(self, block: bool = True, timeout: float | None = None, preempt: bool = False) -> bool:
        """Take the lock; whether it was taken.

        ``timeout`` is in seconds on the monotonic clock; None waits for ever, zero or less does not wait.  It is ignored
        unless ``block``.  A signal resumes the wait; what its handler raises leaves the lock consistent.  NaN raises
        ValueError; a poisoned lock AbandonedError; a wait that would never end DeadlockError, with ``on_deadlock="raise"``.

        ``preempt``, of a leased lock whose contract allows it (else ContractDenied): as long as this call waits, a holder of
        lower precedence is asked to leave at once, and killed after its grace.  For one of equal or higher precedence it waits.
        """
        raise NotImplementedError  # every object has its own

    def release(self) -> None:
        """Release the lock, whoever took it.  ValueError if it is free."""
        raise NotImplementedError  # every object has its own

    def locked(self) -> bool:
        """Whether somebody holds it, or it was handed over to somebody who is waking up."""
        return bool(self._words.word_at(self._block.word) & at.OWNER)

    @property
    def _semlock(self) -> SemLockView:
        words = self._words
        return SemLockView(self, value=words.free, is_mine=words.is_mine, count=words.count, maxvalue=1)

    def _release_save(self) -> int:
        """Release completely, for a Condition; what ``_acquire_restore`` needs."""
        words = self._words
        depth = words.count()
        if self._leased is not None:
            self._leased.stay()
            words.depth = 1
            self._leased.leave(words.release)
            return depth

        def release_all() -> None:
            while words.count():
                self.release()

        _process.to_the_end(release_all)
        return depth

    def _acquire_restore(self, depth: int) -> None:
        """Take it again, for a Condition, with or without what a dead owner left; then tell, as the policy says."""
        if self._leased is None:
            self._words.acquire(True, None, repair=True)
        else:
            self._leased.take(lambda block, timeout: self._words.acquire(block, timeout, repair=True))
        self._words.depth = depth
        self._words.tell_heir()

    def __repr__(self) -> str:
        try:
            return f"<{type(self).__name__}(owner={self._owner_name(self._words)}{self._suffix()})>"
        except Exception:
            return f"<{type(self).__name__}(owner=unknown)>"


class RLock(Lock):
    """A recursive :class:`Lock`: the thread that owns it may take it again, and only that thread may release it.

    An attempt to release it by anybody else raises AssertionError.  When the owner's *process* dies, a waiter gets it.
    """

    _kind = at.RLOCK

    def __repr__(self) -> str:
        try:
            words = self._words
            count = words.count() or ("nonzero" if words.owners() else 0)
            return f"<{type(self).__name__}({self._owner_name(words)}, {count}{self._suffix()})>"
        except Exception:
            return f"<{type(self).__name__}(unknown, unknown)>"


class Semaphore(_Owned):
    """A semaphore of ``value`` permits.

    A plain one counts: any process may release what another acquired, also beyond the first value, and the permit of a
    process that died is gone.  With ``owned=True`` each permit knows its owner: only the process that took a permit gives
    it back (ValueError otherwise), never more than ``value`` exist, and the permit of a dead process goes to a waiter, who
    is told as with a Lock (``on_abandoned``).  A thread of a living process that ends while it holds a permit is not dead.
    """

    _kind = at.SEMAPHORE
    _count: SemaphoreWord | None
    _leave: Callable[[], None]

    def __init__(
        self,
        value: int = 1,
        name: str | None = None,
        *,
        owned: bool = False,
        domain: str | None = None,
        on_abandoned: Policy | None = None,
        ctx: Any = None,
    ) -> None:
        if not isinstance(value, int):
            raise TypeError(f"value must be an int, not {type(value).__name__}")
        if not 0 <= value <= SEM_VALUE_MAX:
            fact = f"a semaphore's value must be 0 to {SEM_VALUE_MAX}, not {value}"
            # As multiprocessing, which hands the value to C.
            raise OSError(errno.EINVAL, fact) if -SEM_VALUE_MAX <= value < 0 else OverflowError(fact)
        if on_abandoned is not None and not owned:
            raise ValueError("on_abandoned needs owned=True: a plain semaphore does not know its owners")
        if owned:
            if value < 1:
                raise ValueError("an owned semaphore needs at least one permit")
            declaration = Declaration(self._kind, 0, value, value, True, policy_number(on_abandoned))
        else:
            declaration = Declaration(self._kind, value << at.COUNT_SHIFT, value)
        self._open(declaration, name, domain)

    def _bind(self, block: Block) -> None:
        super()._bind(block)
        self._limit = block.parameter if block.owned or self._kind == at.BOUNDED_SEMAPHORE else SEM_VALUE_MAX
        if block.owned:
            self._words = words = owned_words(block, list(block.cells))
            self._count = None
            self.__dict__["acquire"] = words.acquire_any
            self.__dict__["release"] = words.release_own
            self._leave = words.leave_own
        else:
            self._count = SemaphoreWord(block, self._limit)
            self.__dict__["acquire"], self.__dict__["release"] = self._count.acquire, self._count.release
            self._leave = self._count.release

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take a permit; whether one was taken.  As :meth:`Lock.acquire`."""
        raise NotImplementedError  # every object has its own

    def release(self) -> None:
        """Give a permit back.  OverflowError (plain) or ValueError (bounded, owned) if there would be too many."""
        raise NotImplementedError  # every object has its own

    def get_value(self) -> int:
        """How many permits are free.  The answer may be old when it arrives."""
        return self._words.free() if self._count is None else self._count.value()

    def locked(self) -> bool:
        """Whether no permit is free."""
        return self.get_value() == 0

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self._leave()

    @property
    def abandoned(self) -> Abandoned | None:
        """Of an owned semaphore: who died holding a permit, until its heir gives it back; else None."""
        return self._words.abandoned() if self._count is None else None

    @property
    def owner(self) -> Owner | None:
        """Of an owned semaphore: one of those who hold a permit; else None."""
        return super().owner if self._count is None else None

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Of an owned semaphore: who holds permits, one entry for each permit; else empty."""
        return tuple(_owner(self._block, w, 0) for w in self._words.owners()) if self._count is None else ()

    @contextmanager
    def repair(self) -> Iterator[Abandoned | None]:
        """Hold a permit of an owned semaphore although it is poisoned: as :meth:`Lock.repair`."""
        if self._count is not None:
            raise ValueError("a plain semaphore is never poisoned: it does not know its owners")
        with super().repair() as abandoned:
            yield abandoned

    @property
    def _semlock(self) -> SemLockView:
        return SemLockView(self, value=self.get_value, is_mine=lambda: False, count=lambda: 0, maxvalue=self._limit)

    def _suffix(self) -> str:
        return super()._suffix() if self._count is None else _Primitive._suffix(self)

    def __repr__(self) -> str:
        try:
            return f"<{type(self).__name__}(value={self.get_value()}{self._suffix()})>"
        except Exception:
            return f"<{type(self).__name__}(value=unknown)>"


class BoundedSemaphore(Semaphore):
    """A :class:`Semaphore` that raises ValueError when it is released above its first value."""

    _kind = at.BOUNDED_SEMAPHORE

    def __repr__(self) -> str:
        try:
            return f"<{type(self).__name__}(value={self.get_value()}, maxvalue={self._limit}{self._suffix()})>"
        except Exception:
            return f"<{type(self).__name__}(value=unknown, maxvalue=unknown)>"


class Condition(_Primitive):
    """A condition variable: wait for a notification that comes from whoever holds the same lock.

    lock  an shlock Lock or RLock (or one of multiprocessing's); by default an RLock of its own, under the same name

    A notifier that dies before it has chosen a waiter has notified nobody; a waiter that dies after it was chosen passes the
    notification on to the next.  If the lock's owner dies, ``wait`` returns holding the lock as any heir does; under
    "poison" it raises AbandonedError, holding the lock, so that ``with`` can release it.
    """

    _kind = at.CONDITION

    def __init__(
        self,
        lock: Any = None,
        name: str | None = None,
        *,
        domain: str | None = None,
        on_abandoned: Policy | None = None,
        ctx: Any = None,
    ) -> None:
        if lock is not None and on_abandoned is not None:
            raise ValueError("on_abandoned belongs to the lock, and a lock was given")
        self._open(Declaration(self._kind), name, domain)
        if lock is None:
            lock = RLock.__new__(RLock)
            declaration = Declaration(at.RLOCK, policy=policy_number(on_abandoned))
            if name is None:
                lock._bind(_anonymous.allocate(declaration))
            else:
                # No name that a user gives holds a NUL.
                lock._bind(_names.open_named(self._block.arena.domain or _names.DEFAULT_DOMAIN, f"{name}\0lock", declaration))
        self._restore(lock)

    def _restore(self, state: Any) -> None:
        self._lock = state
        self.acquire: Callable[..., bool] = state.acquire
        self.release: Callable[[], None] = state.release
        self._word = ConditionWord(self._block)
        # multiprocessing's tests look at these; here only the parked threads count.
        block = self._block
        self._sleeping_count = ZeroCount(lambda: len(waiters_of(block)))
        self._woken_count = self._wait_semaphore = ZeroCount(lambda: 0)

    def _extra_state(self) -> Any:
        return self._lock

    @property
    def owner(self) -> Owner | None:
        """Who holds its lock."""
        return getattr(self._lock, "owner", None)

    @property
    def abandoned(self) -> Abandoned | None:
        """Who died holding its lock, as :attr:`Lock.abandoned`."""
        return getattr(self._lock, "abandoned", None)

    def locked(self) -> bool:
        """Whether its lock is held."""
        return bool(self._lock.locked())

    def __enter__(self) -> Any:
        return self._lock.__enter__()  # nothing is called once it is held

    def __exit__(self, *exception: object) -> None:
        self._lock.__exit__(*exception)

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, block until notified, take the lock again.  False if ``timeout`` seconds passed first."""
        assert self._lock._semlock._is_mine(), "must acquire() condition before using wait()"
        return self._word.wait(self._lock, timeout)

    def notify(self, n: int = 1) -> None:
        """Wake up to ``n`` waiters, the longest-waiting first.  Does not block; they go on when the lock is free."""
        assert self._lock._semlock._is_mine(), "lock is not owned"
        self._word.notify(n)

    def notify_all(self) -> None:
        """Wake every waiter."""
        self.notify(n=sys.maxsize)

    def wait_for(self, predicate: Callable[[], _T], timeout: float | None = None) -> _T:
        """Wait until ``predicate()`` is true or ``timeout`` seconds have passed; its last value."""
        result = predicate()
        if result:
            return result
        deadline = None if timeout is None else time.monotonic() + timeout
        while not result:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
            result = predicate()
        return result

    def __repr__(self) -> str:
        try:
            return f"<{type(self).__name__}({self._lock!r}, {len(self.waiters)})>"
        except Exception:
            return f"<{type(self).__name__}({self._lock!r}, unknown)>"


class Event(_Primitive):
    """A flag that processes wait for.  Who waits when it is set goes on, also if it is cleared at once."""

    _kind = at.EVENT

    def __init__(self, name: str | None = None, *, domain: str | None = None, ctx: Any = None) -> None:
        self._open(Declaration(self._kind), name, domain)

    def _bind(self, block: Block) -> None:
        super()._bind(block)
        self._word = EventWord(block)

    def is_set(self) -> bool:
        """Whether the flag is up."""
        return self._word.is_set()

    def set(self) -> None:
        """Raise the flag and wake everybody who waits.  Does not block."""
        self._word.set()

    def clear(self) -> None:
        """Lower the flag.  Does not block."""
        self._word.clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the flag is up; False if ``timeout`` seconds passed first."""
        return self._word.wait(timeout)

    def __repr__(self) -> str:
        state = "set" if self.is_set() else "unset"
        return f"<{type(self).__qualname__} at {id(self):#x} {state}{self._suffix()}>"


class Barrier(_Primitive):
    """A barrier for ``parties`` threads or processes.

    parties  how many have to wait() until all go on
    action   called by one of them, before any goes on
    timeout  seconds, for every wait() that gives none

    The barrier breaks (BrokenBarrierError) when a party dies: a process that waits now, or that came through last time and
    has not ended normally since.  A process that dies before its first wait() was never known to the barrier.
    """

    _kind = at.BARRIER

    def __init__(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        name: str | None = None,
        *,
        domain: str | None = None,
        ctx: Any = None,
    ) -> None:
        if not isinstance(parties, int):
            raise TypeError(f"parties must be an int, not {type(parties).__name__}")
        if not 0 < parties < 1 << BarrierWord.COUNT_BITS:
            raise ValueError(f"parties must be 1 to {(1 << BarrierWord.COUNT_BITS) - 1}, not {parties}")
        self._open(Declaration(self._kind, 0, parties, parties), name, domain)
        self._restore((action, timeout))

    def _bind(self, block: Block) -> None:
        super()._bind(block)
        self._word = _shared(block, lambda: BarrierWord(block))

    def _extra_state(self) -> Any:
        return self._action, self._timeout

    def _restore(self, state: Any) -> None:
        self._action, self._timeout = state

    @property
    def parties(self) -> int:
        """How many have to wait()."""
        return self._word.parties

    @property
    def n_waiting(self) -> int:
        """How many are waiting now."""
        return self._word.waiting()

    @property
    def broken(self) -> bool:
        """Whether it is broken: nobody gets through until reset()."""
        return self._word.is_broken()

    def wait(self, timeout: float | None = None) -> int:
        """Block until all parties are here; a number from 0 to parties-1, another one for each.

        BrokenBarrierError if it is or gets broken, is reset, a party dies, or ``timeout`` seconds pass.
        """
        return self._word.wait(self._action, self._timeout if timeout is None else timeout)

    def reset(self) -> None:
        """Back to the first state; who waits gets BrokenBarrierError."""
        self._word.reset()

    def abort(self) -> None:
        """Break it; who waits, and who comes, gets BrokenBarrierError until reset()."""
        self._word.abort()

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"waiters={self.n_waiting}/{self.parties}"
        name = f", name={self.name!r}" if self.name is not None else ""
        return f"<{type(self).__module__}.{type(self).__qualname__} at {id(self):#x}: {state}{name}>"


assert BrokenBarrierError is threading.BrokenBarrierError
