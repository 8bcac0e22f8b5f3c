"""Block: a buffer in shared memory whose content is all there or not at all.

It is a segment of its own (``_memory``) with a lock (``_owned``, ``_leased``) and several copies of the content, of which one
is the last that was committed.  How they take turns, and what is so when a process dies in between, stands in ``_content``.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Collection
from multiprocessing import context as mp_context
from types import TracebackType
from typing import Any, Final

from . import _anonymous, _machine, _names
from . import _arena as arenas
from . import _layout as at
from ._arena import Declaration
from ._content import Content, Editing, Hold, Writing
from ._memory import Memory, Shape
from ._owned import IGNORE, describe
from ._parking import deadline_after
from .contract import Contract, Lease, OnTerminate, Terms
from .errors import Abandoned, ContractDenied, SegmentError
from .synchronize import Lock, Owner, Policy, _owner, _Primitive, _shared, attach_of_machine, policy_number, terms_for

__all__ = ["Block"]

USUAL_COPIES: Final = 3
OPERATIONS: Final = ("read", "write")


class Block(_Primitive):
    """A buffer of ``size`` bytes that processes share: written whole or not at all, read without a lock.

    ``read`` waits for nobody but an ``edit`` that is going on.  A process that dies while it writes leaves the last committed
    content, and nobody needs to know; one that dies while it *edits in place* leaves what it had changed by then, and
    everybody is told (``on_abandoned``): readers, and the next to write or edit, until somebody has committed again.
    At first it is full of zeros, version 0.

    ::

        with block.write() as view:   # exclusive; nobody sees it until the end.  An exception: it is as if it had never begun
            view[:5] = b"hello"
        with block.read() as view:    # the last committed content, consistent for ever
            bytes(view)
        with block.edit() as view:    # exclusive and in place, for what is too large to be copied
            view[0] += 1

    Any consumer of buffers works on the views: bytes, struct, memoryview.cast, numpy.frombuffer.  At the end of its ``with`` a
    view is released.  What was made of it and kept (a slice, an array) goes on showing what it showed, and is private then.
    The lock is not recursive: who is inside and wants in again gets RuntimeError.

    name          the block of that name in ``domain``, created if there is none and a size is given
    size          bytes.  SegmentError if the block is there with another size; OSError (ENOSPC) at once if there is no
                  memory for all of its copies
    buffers       how many copies there are, 1 to 4; 3 if it is created.  A reader is overtaken, and begins anew, when so many
                  versions less one are written while it copies.  With 1 there is only ``edit``, and ``read``
    on_abandoned  what who comes after a dead editor sees: "warn" (an AbandonedWarning, and the content as it is), "ignore" (the
                  content as it is; ``abandoned`` is set), "poison" (AbandonedError, until ``repair``).  It belongs to the block
    lease, grace, rank, on_terminate, record_site
                  as for a Lock: how long a ``with`` of write or edit may last.  Who overruns is killed, and its write undone
    operations    what the contract is asked for.  Without "write", all of the block is mapped read-only in this process; in a
                  domain of the machine, ``"/NAME"``, it has no descriptor from which more could be had

    In a domain of the machine several users share the block (see ``_machine``).  It needs a lease there, its memory counts
    against who had it made (``most_bytes`` of the policy: ContractDenied), and it is there as long as somebody uses it, or its
    maker has room for it: then it goes with its content.  Who may write can also break it for the others.

    Uncontended, none of the four makes a system call, as far as the allocation of a copy by ``read`` needs none.  A forked
    child has neither the lock nor the view of its parent.  Without a name, a block can be pickled only while a process is being
    spawned.
    """

    _kind = at.GUARDED
    _terms: Terms | None = None
    _lock: Lock
    _content: Content

    def __init__(
        self,
        name: str | None = None,
        *,
        size: int | None = None,
        buffers: int | None = None,
        domain: str | None = None,
        on_abandoned: Policy | None = None,
        lease: float | None = None,
        grace: float | None = None,
        rank: int = 0,
        operations: Collection[str] = OPERATIONS,
        on_terminate: OnTerminate = "flag",
        record_site: bool = False,
        ctx: Any = None,
    ) -> None:
        terms = self._terms = terms_for(lease, grace, rank, operations, on_terminate, record_site, OPERATIONS)
        _check_count("size", size, sys.maxsize)
        _check_count("buffers", buffers, at.MOST_COPIES)
        shape = None
        declaration = Declaration(
            at.GUARDED,
            parameter=size or 0,
            policy=policy_number(on_abandoned),
            lease=terms.lease if terms is not None else 0,
            grace=terms.grace if terms is not None else 0,
            copies=buffers or USUAL_COPIES,
        )
        if size is not None:
            data = at.pages(size) * (buffers or USUAL_COPIES)
            if data > sys.maxsize // 2:
                raise OSError(errno.ENOSPC, f"no memory for {buffers or USUAL_COPIES} copies of {size} bytes")
            # An extension is nothing that is shown, or could be opened, by itself.
            shape = Shape((declaration, Declaration(at.EXTENSION)), data, reserve=data)
        if name is not None:
            domain = _names.DEFAULT_DOMAIN if domain is None else _names.check_name(domain, "domain")
            name = _names.check_name(name)
            if _machine.is_of_machine(domain):
                memory = Memory(self._attach_of_machine(domain, name, declaration).arena)
            else:
                memory = Memory.open(domain, name, declaration, shape, read_only=_is_read_only(terms))
        elif domain is not None:
            raise ValueError(f"domain={domain!r} is for a block with a name, and there is none")
        elif shape is None:
            raise ValueError("a block without a name needs size=")
        elif _is_read_only(terms):
            raise ValueError(f"operations={tuple(operations)!r} needs a name: nobody could ever write a block without one")
        else:
            memory = Memory.create(shape)
        self._bind(memory.control(0))
        if buffers is not None and buffers != self._content.copies:
            raise SegmentError(
                memory.arena.segment.name,
                f"{name!r} has {self._content.copies} buffers there, and {buffers} are wanted",
                "Use another name or domain, or ask for what is there.",
            )

    def _attach_of_machine(self, domain: str, name: str, declaration: Declaration) -> arenas.Block:
        if declaration.parameter > _machine.MOST_CONTENT:
            raise OSError(errno.ENOSPC, f"no memory for {declaration.parameter} bytes")
        return attach_of_machine(domain, name, declaration, self._terms)

    # -- how it travels -----------------------------------------------------------------------------------------------

    def _bind(self, block: arenas.Block) -> None:
        memory = Memory(block.arena)
        if memory.arena.layout.blocks < 2:
            raise memory.arena.damaged("it has no second control block")
        content = _shared(memory.control(1), lambda: Content(memory))
        if block.leased and self._terms is None:
            words = block.local() if block.local is not None else None
            load = block.arena.words.load
            lease, grace = (load(block.start + place) for place in (at.BLOCK_LEASE, at.BLOCK_GRACE))
            grant = None if words is None else words.grant
            self._terms = Terms(lease, grace, 0, OPERATIONS) if grant is None else grant.terms
        lock = Lock._over(block, self._terms, needs="write")
        lock._words.policy = IGNORE  # who dies while he writes leaves nothing to be told; of edits, the content itself knows
        content.words = lock._words
        super()._bind(block)
        self._lock, self._content = lock, content

    def __reduce__(self) -> tuple[Any, ...]:
        block = self._block
        arguments: tuple[Any, ...]
        if block.name is None:
            mp_context.assert_spawning(self)
            return _rebuild, (type(self), _anonymous.attach_inherited, _anonymous.export(block), self._terms)
        arguments = (block.arena.domain, block.name, self._terms)
        return _rebuild, (type(self), _attach, arguments, self._terms)

    def close(self) -> None:
        """Let go of it in this object; every other use of the object raises ValueError afterwards.  The block stays.

        A ``with`` that is still going on in another thread comes to its end as ever.
        """
        for attribute in ("_lock", "_content", "_block"):
            self.__dict__.pop(attribute, None)

    def __getattr__(self, name: str) -> Any:
        if name in ("_lock", "_content", "_block"):
            raise ValueError("the block is closed")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- views --------------------------------------------------------------------------------------------------------

    def write(self, *, fresh: bool = False, timeout: float | None = None) -> Hold:
        """``with block.write() as view``: change the content, all at once.

        The view is of a copy that nobody else sees.  Leaving normally publishes it by one store; an exception, or the death of
        the process at any instant, leaves the last committed content.  ``fresh`` skips copying that in first: the view then
        shows anything at all, and has to be written completely.

        Blocks until nobody else writes or edits; TimeoutError after ``timeout`` seconds.  LeaseExpired at the end if the lease
        is over and somebody else has been inside since: nothing is published then.
        """
        content = self._content
        if content.copies == 1:
            raise ValueError(f"{describe(content.block)}: write() needs a second buffer, and buffers=1: use edit()")
        hold = Writing(content, self._lock.acquire, self._lock.__exit__, timeout)
        hold.is_fresh = fresh
        return hold

    def edit(self, *, timeout: float | None = None) -> Hold:
        """``with block.edit() as view``: change the content in place.  Meanwhile ``read`` waits.

        For what is too large to be copied.  An exception leaves what was changed so far, as a new version; so does the death of
        the process, but then everybody is told.  Blocks and raises as ``write``.
        """
        return self._editing(timeout, is_repair=False)

    def repair(self, *, timeout: float | None = None) -> Hold:
        """``with block.repair() as view``: as ``edit``, although it is poisoned, to put in order what a dead editor left.

        ``abandoned`` says who that was, also inside.  Leaving normally makes the block usable for everyone; leaving by an
        exception leaves it as it is.
        """
        return self._editing(timeout, is_repair=True)

    def _editing(self, timeout: float | None, *, is_repair: bool) -> Hold:
        hold = Editing(self._content, self._lock.acquire, self._lock.__exit__, timeout)
        hold.is_repair = is_repair
        return hold

    def read(self, *, timeout: float | None = None) -> Reading:
        """``with block.read() as view``: the last committed content, as a read-only copy.

        Takes no lock and writes nothing, so it needs no right to.  Waits only while somebody edits in place; TimeoutError after
        ``timeout`` seconds, or if writers overtake it again and again.  What it returns knows the ``version`` of the view.
        """
        terms = self._terms
        if terms is not None and "read" not in terms.operations:
            contract = self.contract
            reason = f"its contract does not allow to read, only {', '.join(terms.operations)}"
            raise ContractDenied(describe(self._block), reason, "no rule" if contract is None else contract.rule)
        return Reading(self._content, timeout)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes."""
        return self._content.size

    @property
    def buffers(self) -> int:
        """How many copies of the content there are."""
        return self._content.copies

    @property
    def version(self) -> int:
        """Number of the last committed version: each ``write`` and ``edit`` adds one."""
        return self._content.version()

    def wait_for_change(self, version: int | None = None, timeout: float | None = None) -> int | None:
        """Block until there is another version than ``version`` (default: than now); its number, or None after ``timeout``.

        A process without the right to write looks every 10 ms instead of being woken.
        """
        content, deadline = self._content, deadline_after(timeout)
        before = content.version() if version is None else version
        if content.version() == before and not content.wait(lambda: content.version() != before, deadline):
            return None
        return content.version()

    @property
    def owner(self) -> Owner | None:
        """Who writes or edits it now, or None.  Takes no lock; the answer may be old when it arrives."""
        words = self._lock._words
        owners = words.owners()
        return _owner(self._block, owners[0], words.since()) if owners else None

    @property
    def abandoned(self) -> Abandoned | None:
        """Who died while he edited it, from the death until somebody has committed again; else None."""
        return self._content.abandoned()

    @property
    def contract(self) -> Contract | None:
        """What the supervisor granted this process; None for a block without a lease."""
        return self._lock.contract

    @property
    def lease(self) -> Lease | None:
        """The present hold, if the calling thread has it; else None."""
        return self._lock.lease

    def __repr__(self) -> str:
        try:
            content = self._content
            owner = self._lock._owner_name(self._lock._words)
            abandoned = self.abandoned
            suffix = self._suffix() + (f", abandoned by pid {abandoned.pid}" if abandoned else "")
            return f"<{type(self).__name__}(size={content.size}, version={content.version()}, owner={owner}{suffix})>"
        except Exception:
            return f"<{type(self).__name__}({'unknown' if '_block' in self.__dict__ else 'closed'})>"


class Reading:
    """The ``with`` of read."""

    __slots__ = ("_content", "_timeout", "_view", "version")

    #: Of the content that was read.
    version: int

    def __init__(self, content: Content, timeout: float | None) -> None:
        self._content = content
        self._timeout = timeout

    def __enter__(self) -> memoryview:
        content, self.version = self._content.read(self._timeout)
        self._view = memoryview(content)
        return self._view

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        with contextlib.suppress(BufferError):  # something was made of it; that has the copy to itself
            self._view.release()


def _check_count(what: str, value: Any, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{what} must be at least 1, not {value}")
    if value > most:
        if most == sys.maxsize:
            raise OSError(errno.ENOSPC, f"no memory for {value} bytes")
        raise ValueError(f"{what} must be at most {most}, not {value}")


def _is_read_only(terms: Terms | None) -> bool | None:
    """Whether to map everything read-only; None: as this process has it already, or writable."""
    return None if terms is None else "write" not in terms.operations


def _attach(domain: str, name: str, terms: Terms | None) -> arenas.Block:
    if _machine.is_of_machine(domain):
        return attach_of_machine(domain, name, Declaration(at.GUARDED), terms)
    return Memory.open(domain, name, Declaration(at.GUARDED), None, read_only=_is_read_only(terms)).control(0)


def _rebuild(cls: type[Block], attach: Any, arguments: tuple[Any, ...], terms: Terms | None) -> Block:
    self = cls.__new__(cls)
    self._terms = terms
    block = attach(*arguments)
    if block.kind != at.GUARDED:
        raise block.arena.damaged(f"block {block.index} is no {cls.__name__}")
    self._bind(block)
    return self
