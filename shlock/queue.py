"""Queues of objects between processes that lose nothing when any of them dies: multiprocessing.Queue's interface, and ``take``.

An item is pickled by who puts it there and copied into shared memory at once: there is no feeder thread, nothing is lost when
the process ends, and an object that cannot be pickled is an error of ``put``.  The items wait in a ring (``_ring``); ``get``
takes one for good.  ``take`` holds it (``_taken``) until the ``with`` block ends, so that it is delivered at least once.

A process that is killed while it puts, gets or holds an item leaves everybody else working.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Collection, Iterable
from multiprocessing import context as mp_context
from queue import Empty, Full
from typing import Any, ClassVar, Final

from . import _anonymous, _machine, _names, _pickling
from . import _layout as at
from ._arena import Declaration
from ._atomic import Operand
from ._memory import Memory, Shape, pages
from ._owned import IGNORE
from ._parking import deadline_after
from ._ring import CONTROLS, COUNT, COUNT_SHIFT, Consumer, Geometry, Producer, Within, declarations, prepare
from ._taken import SLOTS, Slot, Slots
from .channel import PIPE_CHUNK, PIPE_CHUNKS, Closed, check_size, memory_of
from .contract import Contract, OnTerminate, Terms
from .synchronize import Waiter, terms_for, waiters_of

__all__ = ["Empty", "Full", "JoinableQueue", "Queue", "SimpleQueue", "Taken"]

ITEMS, LETTERS = 1, 1 + CONTROLS  # first control blocks of the two rings
DONE: Final = 1 + 2 * CONTROLS  # counts the items that are done; who joins parks here
FIRST_SLOT: Final = DONE + 1  # and behind the slots a word at which parks who waits for an empty one
BLOCKS: Final = FIRST_SLOT + SLOTS + 1
MOST_ITEMS: Final = 2**31 - 1

_USUAL: Final = ("send", "receive")


def _geometries(size: int) -> tuple[Geometry, Geometry]:
    """Of the items and of the dead letters; ``size`` 0: as large as need be."""
    if size:
        items = Geometry.for_capacity(size)
    else:
        items = Geometry(PIPE_CHUNK, PIPE_CHUNKS, PIPE_CHUNKS, is_lazy=True)
    return items, Geometry(items.chunk, max(items.chunks, PIPE_CHUNKS), PIPE_CHUNKS, items.size, is_lazy=True)


def _shape(size: int, most_items: int, most_deliveries: int, terms: Terms | None) -> Shape:
    items, letters = _geometries(size)
    lease, grace = (terms.lease, terms.grace) if terms is not None else (0, 0)
    slot = Declaration(at.QUEUE, policy=IGNORE, lease=lease, grace=grace)
    controls = (
        Declaration(at.QUEUE, parameter=size, lease=lease, grace=grace),
        *2 * declarations(at.QUEUE, lease, grace),
        Declaration(at.QUEUE),
        *(slot,) * SLOTS,
        Declaration(at.QUEUE),
    )

    def prepare_all(memory: Memory) -> None:
        prepare(memory, items)
        prepare(memory, letters)
        start = memory.control(0).start
        memory.arena.words.store(start + at.BLOCK_MOST_ITEMS, most_items)
        memory.arena.words.store(start + at.BLOCK_MOST_DELIVERIES, most_deliveries)

    return Shape(controls, items.size + letters.size + SLOTS * _stride(items), 0, prepare_all)


def _stride(items: Geometry) -> int:
    return pages(items.longest)


class _Items:
    """Taking objects from one ring."""

    _in: Any  # Consumer, or Closed
    _slots: Slots | None = None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the next item for good.

        Blocks until there is one, at most ``timeout`` seconds; queue.Empty if there is none in time, or at once if not
        ``block``.
        """
        if block and timeout is None and (self._slots is None or not self._slots.view[self._slots.returned]):
            got = self._in.get()
            if got is not None:
                return _pickling.loads(*got)
        return _pickling.loads(*self._get_slowly(block, timeout))

    def _get_slowly(self, block: bool, timeout: float | None) -> tuple[int, Any]:
        source, slots = self._in, self._slots
        deadline = deadline_after(timeout if block else 0.0)
        lock = None if deadline is None else Within(source, deadline)
        while True:
            source.lock  # noqa: B018 - ValueError if it is closed
            slot = slots.take_returned() if slots is not None else None
            if slots is not None and slot is not None:
                with _held(slots, slot):
                    tag, body = slot.tag, slot.read()
                    slot.acknowledge()
                source.pass_on()
                return tag, body
            try:
                got: tuple[int, Any] | None = source.get(lock)
            except TimeoutError:
                raise Empty from None
            if got is not None:
                source.pass_on()
                return got
            if not block or not self._wait(deadline):
                raise Empty

    def _wait(self, deadline: float | None) -> bool:
        """Until there may be an item."""
        source, slots = self._in, self._slots
        if slots is None:
            return bool(source.wait_for_message(deadline))
        view, returned = slots.view, slots.returned
        return bool(
            source.wait_until(
                source.readable_block,
                lambda: not source.is_empty() or bool(view[returned]),
                deadline,
                slots.look_for_the_dead,
            )
        )

    def get_nowait(self) -> Any:
        """``get(False)``."""
        return self.get(False)

    def get_many(self, most: int, block: bool = True, timeout: float | None = None) -> list[Any]:
        """Take up to ``most`` items for good: all that are there, and at least one.  Blocks as ``get``."""
        if most < 1:
            raise ValueError(f"most must be at least 1, not {most}")
        if self._slots is None or not self._slots.view[self._slots.returned]:
            found = self._in.get_many(most)
            if found:
                return [_pickling.loads(tag, body) for tag, body in found]
        first = self._get_slowly(block, timeout)
        rest = self._in.get_many(most - 1) if most > 1 else []
        return [_pickling.loads(tag, body) for tag, body in (first, *rest)]

    def qsize(self) -> int:
        """How many items are there to get.  The answer may be old when it arrives."""
        returned = sum(1 for owner, _ in self._slots.holders() if not owner) if self._slots is not None else 0
        return int(self._in.waiting()) + returned

    def empty(self) -> bool:
        """Whether there is nothing to get."""
        return self.qsize() == 0


@contextlib.contextmanager
def _held(slots: Slots, slot: Slot) -> Any:
    try:
        yield
    finally:
        if slot.lock._words.is_mine():
            slots.release(slot)


class Taken:
    """An item that is being worked on: ``with queue.take() as item:``."""

    __slots__ = ("_block", "_queue", "_slot", "_timeout", "deliveries")

    #: How often the item was handed out, this time included.
    deliveries: int

    def __init__(self, queue: Queue, block: bool, timeout: float | None) -> None:
        self._queue = queue
        self._block = block
        self._timeout = timeout
        self._slot: Slot | None = None
        self.deliveries = 0

    def __enter__(self) -> Any:
        if self.deliveries:
            raise ValueError("this was used already")
        queue = self._queue
        slot = self._slot = queue._take(self._block, self._timeout)
        try:
            self.deliveries = slot.deliveries
            return _pickling.loads(slot.tag, slot.read())
        except BaseException:
            self._give_back(slot)
            raise

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        slot = self._slot
        assert slot is not None
        try:
            if kind is None:
                slot.acknowledge()
        finally:
            self._give_back(slot)
        if kind is None:
            self._queue._acknowledged()

    def _give_back(self, slot: Slot) -> None:
        slots = self._queue._slots
        if slots is not None and slot.lock._words.is_mine():
            slots.release(slot)


class Queue(_Items):
    """A queue of objects, first in first out, for any number of producers and consumers.

    maxsize         items that it holds at most; 0 or less: as many as there is memory for
    name            the queue of that name in ``domain``, created if there is none; None: a new one
    size            bytes of items that it holds, whose memory is taken at once, and the longest single item; None: memory is
                    taken as it is needed and given back (OSError of ``put`` when /dev/shm is full), items of up to a gigabyte
    max_deliveries  an item that was handed out so often and is not acknowledged goes to ``dead_letters``; None: no limit
    lease, grace, rank, on_terminate, record_site   as for :class:`Lock`: how long an item may be worked on in ``take``
    operations      what the contract is asked for: "send" (put), "receive" (get and take) or both

    maxsize, size and max_deliveries belong to the queue: who attaches to a name either gives the same or none.  Without a name
    it can be pickled only while a process is being spawned.  There is no feeder thread: ``put`` pickles and copies before it
    returns, and raises what is wrong with the object.
    """

    _joinable: ClassVar[bool] = False

    def __init__(
        self,
        maxsize: int = 0,
        name: str | None = None,
        *,
        size: int | None = None,
        max_deliveries: int | None = None,
        domain: str | None = None,
        lease: float | None = None,
        grace: float | None = None,
        rank: int = 0,
        operations: Collection[str] = _USUAL,
        on_terminate: OnTerminate = "flag",
        record_site: bool = False,
        ctx: Any = None,
    ) -> None:
        if isinstance(maxsize, bool) or not isinstance(maxsize, int):
            raise TypeError(f"maxsize must be a number of items, not {type(maxsize).__name__}")
        most_items = maxsize if 0 < maxsize < MOST_ITEMS else 0
        if max_deliveries is not None and (not isinstance(max_deliveries, int) or max_deliveries < 1):
            raise ValueError(f"max_deliveries must be a number from 1 on, not {max_deliveries!r}")
        terms = terms_for(lease, grace, rank, operations, on_terminate, record_site, usual=_USUAL)
        bytes_ = 0 if size is None else check_size(size)
        shape = _shape(bytes_, most_items, max_deliveries or 0, terms)
        if name is None:
            if domain is not None:
                raise ValueError(f"domain={domain!r} is for a queue with a name, and there is none")
            memory = Memory.create(shape)
        else:
            domain = _names.DEFAULT_DOMAIN if domain is None else _names.check_name(domain, "domain")
            if _machine.is_of_machine(domain):
                raise ValueError(f"domain {domain!r} is of the machine: only Lock and RLock can be opened there")
            wanted = Declaration(at.QUEUE, parameter=bytes_, lease=terms.lease if terms is not None else 0)
            memory = Memory.open(domain, _names.check_name(name), wanted, shape)
        self._bind(memory, terms)
        for what, asked, there in (
            ("maxsize", most_items, self._most_items),
            ("max_deliveries", max_deliveries or 0, self._slots_there.most_deliveries),
        ):
            if asked and asked != there:
                raise memory.arena.different(f"{self._text()} has {what}={there} there, and {what}={asked} is wanted")

    def _bind(self, memory: Memory, terms: Terms | None) -> None:
        self._memory = memory
        self._terms = terms
        control, view = memory.control(0), memory.arena.words.view
        size = control.parameter
        if control.kind != at.QUEUE or memory.arena.layout.blocks != BLOCKS or size > 1 << 33:
            raise memory.arena.damaged("it is no Queue")
        items, letters = _geometries(size)
        stride = _stride(items)
        if memory.size != items.size + letters.size + SLOTS * stride:
            raise memory.arena.damaged(f"it says that it holds {size} bytes")
        text = self._text()
        self._out: Any = Producer(memory, ITEMS, items, text, terms)
        self._in: Any = Consumer(memory, ITEMS, items, text, terms)
        self._letters_out = Producer(memory, LETTERS, letters, text, terms)
        self._letters_geometry = letters
        most = view[control.start + at.BLOCK_MOST_ITEMS]
        self._most_items = most
        if most:
            self._out.most_messages = self._in.most_messages = most
        self._done = memory.control(DONE)
        self._slots = Slots(memory, FIRST_SLOT, items.size + letters.size, stride, self._in, self._letters_out, terms)
        self._slots.most_deliveries = view[control.start + at.BLOCK_MOST_DELIVERIES]

    @property
    def _slots_there(self) -> Slots:
        assert self._slots is not None
        return self._slots

    # -- putting ------------------------------------------------------------------------------------------------------

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put an item there.

        Blocks while the queue is full, at most ``timeout`` seconds; queue.Full if it still is, or at once if not ``block``.
        Whatever is raised, nothing was put.
        """
        out = self._out
        out.put  # noqa: B018 - ValueError of a closed queue comes before whatever is wrong with the object
        tag, body = _pickling.dumps(obj)
        if tag == _pickling.OUT_OF_BAND or timeout is not None or not block or not out.put(body, tag):
            self._put_slowly(tag, body, block, timeout)

    def _put_slowly(self, tag: int, body: Any, block: bool, timeout: float | None) -> None:
        out = self._out
        deadline = deadline_after(timeout if block else 0.0)
        lock = None if deadline is None else Within(out, deadline)
        length, parts = _pickling.layout(body) if tag == _pickling.OUT_OF_BAND else (len(body), None)
        try:
            while not (out.put(body, tag, lock) if parts is None else out.put_parts(parts, length, tag, lock)):
                if not block or not out.wait_for_room(length, deadline):
                    raise Full
        except TimeoutError:
            raise Full from None
        out.pass_on()

    def put_nowait(self, obj: Any) -> None:
        """``put(obj, False)``."""
        self.put(obj, False)

    def put_many(self, objs: Iterable[Any], block: bool = True, timeout: float | None = None) -> None:
        """Put many items there, in order and faster than one by one.  Blocks as ``put``.

        queue.Full has ``put``, the number of items that were put.
        """
        out = self._out
        out.put  # noqa: B018 - as in put()
        tags: list[int] = []
        bodies: list[Any] = []
        for obj in objs:
            tag, body = _pickling.dumps(obj)
            if tag == _pickling.OUT_OF_BAND:
                length, parts = _pickling.layout(body)
                joined = bytearray(length)
                for offset, part in parts:
                    joined[offset : offset + len(part)] = part
                body = joined
            tags.append(tag)
            bodies.append(body)
        deadline = deadline_after(timeout if block else 0.0)
        lock = None if deadline is None else Within(out, deadline)
        done = 0
        while True:
            with contextlib.suppress(TimeoutError):
                done += out.put_many(bodies, tags, done, lock)
            if done == len(bodies):
                return
            if not block or not out.wait_for_room(len(bodies[done]), deadline):
                full = Full()
                full.put = done  # type: ignore[attr-defined]
                raise full

    # -- taking -------------------------------------------------------------------------------------------------------

    def take(self, block: bool = True, timeout: float | None = None) -> Taken:
        """``with queue.take() as item:`` work on an item; leaving the block acknowledges it.

        Leaving by an exception, dying, or being removed when the lease is over puts it back, in its old place, with its
        delivery count (``Taken.deliveries``) one higher.  So every item is worked on at least once, and more than once only if
        somebody did not finish.  Blocks as ``get``.
        """
        return Taken(self, block, timeout)

    def _take(self, block: bool, timeout: float | None) -> Slot:
        slots, source = self._slots_there, self._in
        deadline = deadline_after(timeout if block else 0.0)
        while True:
            source.lock  # noqa: B018 - ValueError if it is closed
            slot = slots.take_returned() or slots.take_new()
            if slot is not None:
                source.pass_on()
                return slot
            if not block:
                raise Empty
            if not slots.any_free():
                waited = source.wait_until(slots.free_block, slots.any_free, deadline, slots.look_for_the_dead)
            else:
                waited = self._wait(deadline)
            if not waited:
                raise Empty

    def _acknowledged(self) -> None:
        """An item that was taken is done."""

    @property
    def dead_letters(self) -> DeadLetters:
        """The items that were handed out ``max_deliveries`` times and never acknowledged."""
        return DeadLetters(
            Consumer(self._memory, LETTERS, self._letters_geometry, f"{self._text()}, dead letters", self._terms)
        )

    # -- the rest of the interface ------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The name, or None."""
        return self._memory.arena.only_name

    @property
    def domain(self) -> str | None:
        """The domain of the name, or None."""
        return self._memory.arena.domain

    @property
    def contracts(self) -> tuple[Contract, ...]:
        """What the supervisor granted this process: for putting, and for getting.  Empty without a lease."""
        if isinstance(self._in, Closed):
            return ()
        return tuple(contract for end in (self._out, self._in) if (contract := end.lock.contract) is not None)

    @property
    def waiters(self) -> tuple[Waiter, ...]:
        """The threads that wait for an item or for room, the longest-waiting first."""
        found = [waiter for block in self._memory.controls() for waiter in waiters_of(block)]
        return tuple(sorted(found, key=lambda waiter: -waiter.waiting_for))

    def full(self) -> bool:
        """Whether ``put`` would have to wait."""
        return not self._out.has_room(0)

    def close(self) -> None:
        """This object will not be used any more; the queue stays for others.  Closing again does nothing."""
        self._out = self._in = Closed(f"{self!r} is closed", ValueError)

    def join_thread(self) -> None:
        """Nothing: there is no thread.  AssertionError before ``close``, as multiprocessing's."""
        assert isinstance(self._in, Closed), f"Queue {self!r} not closed"

    def cancel_join_thread(self) -> None:
        """Nothing: there is no thread, and what was put is in shared memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._in, Closed):
            raise ValueError(f"{self!r} is closed")
        if self.name is None:
            mp_context.assert_spawning(self)
            return _rebuild, (type(self), _anonymous.export(self._memory.control(0)), None, self._terms)
        return _rebuild, (type(self), None, (self.domain, self.name), self._terms)

    def _text(self) -> str:
        return f"Queue {self.name!r}" if self.name is not None else "Queue without a name"

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name is not None else ""
        if isinstance(self._in, Closed):
            return f"<{type(self).__name__}({name}closed)>"
        try:
            return f"<{type(self).__name__}({name}{self.qsize()} items)>"
        except Exception:
            return f"<{type(self).__name__}({name}unknown)>"

    __class_getitem__: ClassVar[Any] = classmethod(types.GenericAlias)


class JoinableQueue(Queue):
    """A :class:`Queue` that counts the items which are not done yet.

    ``task_done`` says that one is; so does leaving a ``take`` block.  Items that a dead process had got are never done.
    """

    _joinable = True

    def _unfinished(self) -> int:
        view = self._memory.arena.words.view
        return (view[self._tail] >> COUNT_SHIFT) - (view[self._done.word] >> at.COUNT_SHIFT) & COUNT

    def _bind(self, memory: Memory, terms: Terms | None) -> None:
        super()._bind(memory, terms)
        self._tail: int = self._out.tail
        self._end: Producer = self._out

    def task_done(self) -> None:
        """One item that was got is done.  ValueError if all of them were already."""
        words = self._memory.arena.words
        operand = Operand()
        pointer = words.pointer(self._done.word)
        for _ in range(100_000):
            w = words.load(self._done.word)
            if not self._unfinished():
                raise ValueError("task_done() called too many times")
            if operand.compare_exchange(pointer, w, (w + at.ONE) & at.WORD_MASK):
                break
        if not self._unfinished() and words.load(self._done.word) & at.PARKED:
            self._end.wake(self._done, MOST_ITEMS)

    def _acknowledged(self) -> None:
        self.task_done()

    def join(self) -> None:
        """Block until every item that was put is done."""
        self._end.wait_until(self._done, lambda: not self._unfinished(), None)


class SimpleQueue:
    """The few methods of multiprocessing.SimpleQueue."""

    def __init__(self, *, ctx: Any = None) -> None:
        self._queue = Queue()

    def get(self) -> Any:
        """Take the next item.  Blocks until there is one."""
        return self._queue.get()

    def put(self, obj: Any) -> None:
        """Put an item there."""
        self._queue.put(obj)

    def empty(self) -> bool:
        """Whether there is nothing to get."""
        return self._queue.empty()

    def close(self) -> None:
        """This object will not be used any more."""
        self._queue.close()

    __class_getitem__: ClassVar[Any] = classmethod(types.GenericAlias)


class DeadLetters(_Items):
    """The items that were delivered too often: to be looked at, or put again."""

    def __init__(self, consumer: Consumer) -> None:
        self._in = consumer

    def __repr__(self) -> str:
        return f"<DeadLetters({self.qsize()} items)>"


def _rebuild(cls: type[Queue], inherited: tuple[Any, ...] | None, named: tuple[str, str] | None, terms: Terms | None) -> Queue:
    queue = cls.__new__(cls)
    queue._bind(memory_of(inherited, named, Declaration(at.QUEUE)), terms)
    return queue
