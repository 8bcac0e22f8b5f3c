"""Queues of objects between processes that lose nothing when any of them dies: multiprocessing.Queue's interface, and ``take``.

An item is pickled by who puts it there and copied into shared memory at once: there is no feeder thread, nothing is lost when
the process ends, and an object that cannot be pickled is an error of ``put``.  The items wait in a ring (``_ring``); ``get``
takes one for good.  ``take`` holds it (``_taken``) until the ``with`` block ends, so that it is delivered at least once.

A process that is killed while it puts, gets or holds an item leaves everybody else working.

    killed in                       the item
    put, before it is complete      was never there
    put, afterwards                 is there
    get, before HEAD has moved      is there
    get, afterwards                 is gone: it was that process's
    take, until it is acknowledged  comes back, before those that were put later; its delivery count tells
    take, afterwards                is gone, and done

Other processes never wait for the dead one longer than a poll interval.  An exception that a signal handler raises is like a
death, but for one thing: it may come when ``put`` or ``get`` is all but over, and then the item is put, or gone.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Iterable
from multiprocessing import context as mp_context
from queue import Empty, Full
from typing import Any, ClassVar, Final

from . import _anonymous, _names, _pickling, _process
from . import _layout as at
from ._arena import Declaration
from ._atomic import Operand
from ._geometry import (
    DONE,
    FIRST_SLOT,
    ITEMS,
    LETTERS,
    MOST_BYTES,
    SLOTS,
    SLOTS_OF_MACHINE,
    prepare,
    queue_controls,
    queue_rings,
    slot_size,
)
from ._memory import Memory, Shape
from ._parking import deadline_after
from ._ring import Consumer, Producer
from ._taken import MOST_DELIVERIES, Grip, Slots, within
from .channel import Closed, check_size, memory_of, open_memory
from .contract import Contract, Lease, OnTerminate, Terms
from .synchronize import Waiter, terms_for, waiters_of

__all__ = ["Empty", "Full", "JoinableQueue", "Queue", "SimpleQueue", "Taken"]

MOST_ITEMS: Final = 2**31 - 1
JOINABLE: Final = 1 << 32  # in BLOCK_MOST_ITEMS: its items are counted until they are done

_USUAL: Final = ("send", "receive")


def _shape(size: int, most_items: int, most_deliveries: int, terms: Terms | None) -> Shape:
    items, letters = queue_rings(size)
    lease, grace = (terms.lease, terms.grace) if terms is not None else (0, 0)

    def prepare_all(memory: Memory) -> None:
        prepare(memory, items)
        prepare(memory, letters)
        start = memory.control(0).start
        memory.arena.words.store(start + at.BLOCK_MOST_ITEMS, most_items)
        memory.arena.words.store(start + at.BLOCK_MOST_DELIVERIES, most_deliveries)

    data = items.size + letters.size + SLOTS * slot_size(items)
    return Shape(queue_controls(size, lease, grace), data, 0, prepare_all)


class _Items:
    """Taking objects from one ring."""

    _in: Any  # Consumer, or Closed
    _slots: Slots | None = None
    _loads: Callable[[int, Any], Any] = staticmethod(_pickling.loads)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the next item for good.

        Blocks until there is one, at most ``timeout`` seconds; queue.Empty if there is none in time, or at once if not
        ``block``.  What is raised when it is unpickled comes out, and the item is gone.
        """
        slots = self._slots
        if block and timeout is None and (slots is None or not slots.view[slots.kept]):
            got = self._in.get()
            if got is not None:
                tag, body = got
                return body if tag == _pickling.OBJECT_IS_BYTES else self._loads(tag, body)
        return self._loads(*self._get_slowly(block, timeout))

    def _get_slowly(self, block: bool, timeout: float | None) -> tuple[int, Any]:
        source = self._in
        source.lock  # noqa: B018 - ValueError if it is closed
        deadline = deadline_after(timeout if block else 0.0)
        try:
            while True:
                got: tuple[int, Any] | None = self._get_returned(deadline) or source.get(within(source, deadline))
                if got is not None:
                    return got
                if not block or not self._wait(source, deadline):
                    raise Empty
        except TimeoutError:
            raise Empty from None
        finally:
            self._pass_on(source)

    def _get_returned(self, deadline: float | None) -> tuple[int, Any] | None:
        slots = self._slots
        if slots is None:
            return None
        slots.look_now_and_then()
        grip = Grip()
        try:
            if not slots.take_returned(grip, deadline):
                return None
            slot = grip.slot
            assert slot is not None
            tag, body = slot.tag, slot.read()
            if not slot.is_mine():
                raise RuntimeError("this process was forked in the middle of get(). The item is the parent's; begin anew.")
            slot.empty()
            slots.let_go(grip)
            return tag, body
        finally:
            slots.let_go(grip)

    def _wait(self, source: Any, deadline: float | None) -> bool:
        """Until there may be an item."""
        slots = self._slots
        if slots is None:
            return bool(source.wait_for_message(deadline))
        view, returned, was_empty = slots.view, slots.returned, source.is_empty()
        has_come = source.wait_until(
            source.readable_block,
            lambda: not source.is_empty() or bool(view[returned]),
            deadline,
            slots.look_for_the_dead,
        )
        if has_come and was_empty:
            source.piling.after_waiting(source.last_length, deadline, slots.pass_on)
        return bool(has_come)

    def _pass_on(self, source: Any) -> None:
        (source if self._slots is None else self._slots).pass_on()

    def get_nowait(self) -> Any:
        """``get(False)``."""
        return self.get(False)

    def get_many(self, most: int, block: bool = True, timeout: float | None = None) -> list[Any]:
        """Take up to ``most`` items for good: all that are there, and at least one.  Blocks as ``get``.

        An exception that is raised when one of them is unpickled has ``got``, the list of the others.
        """
        if most < 1:
            raise ValueError(f"most must be at least 1, not {most}")
        source, slots = self._in, self._slots
        found: list[tuple[int, Any]] = []
        if block and timeout is None and (slots is None or not slots.view[slots.kept]):
            found = source.get_many(most)
        if not found:
            found = [self._get_slowly(block, timeout)]
            if most > 1:
                with contextlib.suppress(TimeoutError):
                    found += source.get_many(most - 1, within(source, deadline_after(0.0)))
        objects = []
        failure: BaseException | None = None
        for tag, body in found:
            try:
                objects.append(body if tag == _pickling.OBJECT_IS_BYTES else self._loads(tag, body))
            except Exception as error:
                failure = failure or error
        if failure is not None:
            with contextlib.suppress(Exception):
                failure.got = objects  # type: ignore[attr-defined]
            raise failure
        return objects

    def qsize(self) -> int:
        """How many items are there to get.  The answer may be old when it arrives."""
        return int(self._in.waiting()) + (self._slots.count_returned() if self._slots is not None else 0)

    def empty(self) -> bool:
        """Whether there is nothing to get."""
        return self.qsize() == 0


class Taken(Grip):
    """An item that is being worked on: ``with queue.take() as item:``."""

    __slots__ = ("_after", "_block", "_process", "_queue", "_timeout", "deliveries")

    #: How often the item was handed out, this time included.
    deliveries: int

    def __init__(self, queue: Queue, block: bool, timeout: float | None) -> None:
        super().__init__()
        self._queue = queue
        self._block = block
        self._timeout = timeout
        self._process = _process.current
        self._after = 0
        self.deliveries = 0

    @property
    def lease(self) -> Lease | None:
        """Of a queue with a lease, inside the block: the deadline, and whether it is asked to leave."""
        return self.slot.lock.lease if self.slot is not None else None

    def __enter__(self) -> Any:
        if self.deliveries:
            raise ValueError("this was used already")
        self._process = _process.current
        try:
            self._queue._take(self, self._block, self._timeout)
            slot = self.slot
            assert slot is not None
            self._after, self.deliveries = slot.view[slot.after], slot.deliveries
            return self._queue._loads(slot.tag, slot.read())
        except BaseException:
            self._queue._slots_there.let_go(self)
            raise

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if self._process is not _process.current:
            return  # a child that was forked inside: it is its parent's item
        slot, slots = self.slot, self._queue._slots_there
        assert slot is not None
        try:
            is_held = self._is_held()
            self.is_of_other_thread = is_held and not slot.is_mine()
            if kind is None:
                if not is_held:
                    raise RuntimeError(f"{self._queue._text()}: an item was taken by this block, and is not held any more")
                slot.acknowledge()
            slots.let_go(self)
        finally:
            try:
                slots.let_go(self)
            finally:
                if kind is None:
                    slots.wake_joiners()

    def _is_held(self) -> bool:
        """Whether it is this very delivery of the item that is in the slot."""
        slot = self.slot
        return (
            slot is not None
            and self._process is _process.current
            and slot.is_of_this_process()
            and slot.is_filled()
            and (slot.view[slot.after], slot.deliveries) == (self._after, self.deliveries)
        )

    def __del__(self) -> None:
        # Where a signal handler raised at the first step of __exit__.
        with contextlib.suppress(Exception):
            if self._is_held():
                self.is_of_other_thread = True
                self._queue._slots_there.let_go(self)


class Queue(_Items):
    """A queue of objects, first in first out, for any number of producers and consumers.

    maxsize         items that it holds at most; 0 or less: as many as there is memory for
    name            the queue of that name in ``domain``, created if there is none; None: a new one
    size            bytes of items that it holds, whose memory is taken at once, and the longest single item; None: memory is
                    taken as it is needed and given back (OSError of ``put`` when /dev/shm is full), items of up to a gigabyte
    max_deliveries  an item that was handed out so often and was not acknowledged goes to ``dead_letters`` when it would be
                    handed out once more; None: no limit
    lease, grace, rank, on_terminate, record_site   as for :class:`Lock`: how long an item may be worked on in ``take``
    operations      what the contract is asked for: "send" (put), "receive" (get and take) or both
    unpickle        in a domain of the machine: whether items are unpickled that are no bytes objects.  Else they are refused
                    (PickleRefused), because to unpickle something is to let whoever put it there run a program here: anybody
                    may who can open this name.  A refused item is gone, but for ``take``, which gives it back

    In a domain of the machine, ``"/NAME"``, several users share the queue (see ``_machine``).  It needs a lease there, and
    has a fixed size, 256 KiB if none is named; about 22 times that is taken at once, and counts against who had it made.  16
    items can be worked on in ``take`` at a time.  Who may only receive has no descriptor through which he could write into what
    others put; but all who may open the queue can lose, repeat and garble items, and make up some that "came back".

    maxsize, size and max_deliveries belong to the queue: who attaches to a name either gives the same or none.  Without a name
    it can be pickled only while a process is being spawned.  There is no feeder thread: ``put`` pickles and copies before it
    returns, and raises what is wrong with the object.

    A call that does not wait lets others finish their copying, for a second at most: Full and Empty mean that it is so, unless
    somebody was stopped in the middle.  Any number of items may wait, but only 128 can be worked on in ``take`` at a time.
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
        unpickle: bool = False,
        ctx: Any = None,
    ) -> None:
        if isinstance(maxsize, bool) or not isinstance(maxsize, int):
            raise TypeError(f"maxsize must be a number of items, not {type(maxsize).__name__}")
        most_items = maxsize if 0 < maxsize < MOST_ITEMS else 0
        if max_deliveries is not None:
            if isinstance(max_deliveries, bool) or not isinstance(max_deliveries, int):
                raise TypeError(f"max_deliveries must be a number, not {type(max_deliveries).__name__}")
            if not 1 <= max_deliveries < MOST_DELIVERIES:
                raise ValueError(f"max_deliveries must be a number from 1 to {MOST_DELIVERIES - 1}, not {max_deliveries}")
        terms = terms_for(lease, grace, rank, operations, on_terminate, record_site, usual=_USUAL)
        bytes_ = 0 if size is None else check_size(size)
        limits = most_items | (JOINABLE if self._joinable else 0), max_deliveries or 0
        shape = _shape(bytes_, *limits, terms)
        if name is None:
            if domain is not None:
                raise ValueError(f"domain={domain!r} is for a queue with a name, and there is none")
            memory = Memory.create(shape)
        else:
            domain = _names.DEFAULT_DOMAIN if domain is None else _names.check_name(domain, "domain")
            wanted = Declaration(at.QUEUE, parameter=bytes_, lease=terms.lease if terms is not None else 0, limits=limits)
            memory = open_memory(domain, _names.check_name(name), wanted, shape, terms)
        self._bind(memory, terms, unpickle)
        for what, asked, there in (
            ("maxsize", most_items, self._most_items),
            ("max_deliveries", max_deliveries or 0, self._slots_there.most_deliveries),
        ):
            if asked and asked != there:
                raise memory.arena.different(f"{self._text()} has {what}={there} there, and {what}={asked} is wanted")

    def _bind(self, memory: Memory, terms: Terms | None, unpickle: bool) -> None:
        self._memory = memory
        self._terms = terms
        self._unpickle = unpickle
        control, view = memory.control(0), memory.arena.words.view
        size = control.parameter
        is_of_machine = memory.arena.made is not None
        slots = SLOTS_OF_MACHINE if is_of_machine else SLOTS
        if control.kind != at.QUEUE or memory.arena.layout.blocks != FIRST_SLOT + slots + 1 or size > MOST_BYTES:
            raise memory.arena.damaged("it is no Queue")
        items, letters = queue_rings(size, is_of_machine=is_of_machine)
        stride = slot_size(items)
        if memory.size != items.size + letters.size + slots * stride:
            raise memory.arena.damaged(f"it says that it holds {size} bytes")
        if control.leased and terms is None:
            lease, grace = (memory.arena.words.load(control.start + place) for place in (at.BLOCK_LEASE, at.BLOCK_GRACE))
            terms = self._terms = Terms(lease, grace, 0, tuple(sorted(_USUAL)))
        text = self._text()
        self._out: Any = Producer(memory, ITEMS, items, text, terms)
        self._in: Any = Consumer(memory, ITEMS, items, text, terms)
        most = view[control.start + at.BLOCK_MOST_ITEMS]
        if bool(most & JOINABLE) != self._joinable:
            there, wanted = (JoinableQueue, Queue) if most & JOINABLE else (Queue, JoinableQueue)
            raise memory.arena.different(f"{text} is a {there.__name__} there, and a {wanted.__name__} is wanted")
        self._most_items = most & MOST_ITEMS
        if self._most_items:
            self._out.most_messages = self._in.most_messages = self._most_items
        self._letters = DeadLetters(Consumer(memory, LETTERS, letters, f"{text}, dead letters", terms))
        if is_of_machine and not unpickle:
            self._loads = self._letters._loads = _pickling.refusing(text)
        # Whoever takes buries: that is no sending.
        letters_out = Producer(memory, LETTERS, letters, f"{text}, dead letters", terms, needs="receive")
        self._slots = Slots(memory, FIRST_SLOT, items.size + letters.size, stride, self._in, letters_out, terms, DONE, slots)
        self._slots.most_deliveries = view[control.start + at.BLOCK_MOST_DELIVERIES]

    @property
    def _slots_there(self) -> Slots:
        assert self._slots is not None
        return self._slots

    # -- putting ------------------------------------------------------------------------------------------------------

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put an item there.

        Blocks while the queue is full, at most ``timeout`` seconds; queue.Full if it still is, or at once if not ``block``.
        ValueError if the item is larger than the longest that fits, OSError if there is no memory for it.  Whatever is raised
        here, nothing was put.
        """
        put = self._out.put  # ValueError of a closed queue comes before whatever is wrong with the object
        tag, body = (_pickling.OBJECT_IS_BYTES, obj) if obj.__class__ is bytes else _pickling.dumps(obj)
        if tag == _pickling.OUT_OF_BAND or timeout is not None or not block or not put(body, tag):
            self._put_slowly(tag, body, block, timeout)

    def _put_slowly(self, tag: int, body: Any, block: bool, timeout: float | None) -> None:
        out = self._out
        deadline = deadline_after(timeout if block else 0.0)
        length, parts = _pickling.layout(body) if tag == _pickling.OUT_OF_BAND else (len(body), None)
        try:
            while True:
                lock = within(out, deadline)
                if out.put(body, tag, lock) if parts is None else out.put_parts(parts, length, tag, lock):
                    return
                if not block or not out.wait_for_room(length, deadline):
                    raise Full
        except TimeoutError:
            raise Full from None
        finally:
            out.pass_on()

    def put_nowait(self, obj: Any) -> None:
        """``put(obj, False)``."""
        self.put(obj, False)

    def put_many(self, objs: Iterable[Any], block: bool = True, timeout: float | None = None) -> None:
        """Put many items there, in order and faster than one by one.  Blocks as ``put``.

        An exception that comes after some were put has ``put``, their number.
        """
        out = self._out
        out.put  # noqa: B018 - as in put()
        tags: list[int] = []
        bodies: list[Any] = []
        for obj in objs:
            tag, body = (_pickling.OBJECT_IS_BYTES, obj) if obj.__class__ is bytes else _pickling.dumps(obj)
            if tag == _pickling.OUT_OF_BAND:
                length, parts = _pickling.layout(body)
                joined = bytearray(length)
                for offset, part in parts:
                    joined[offset : offset + len(part)] = part
                body = joined
            tags.append(tag)
            bodies.append(body)
        deadline = deadline_after(timeout if block else 0.0)
        done = 0
        try:
            while True:
                try:
                    done += out.put_many(bodies, tags[done:], done, within(out, deadline))
                except TimeoutError:
                    raise Full from None
                if done == len(bodies):
                    return
                if not block or not out.wait_for_room(len(bodies[done]), deadline):
                    raise Full
        except Exception as error:
            with contextlib.suppress(Exception):
                error.put = done  # type: ignore[attr-defined]
            raise
        finally:
            out.pass_on()

    # -- taking -------------------------------------------------------------------------------------------------------

    def take(self, block: bool = True, timeout: float | None = None) -> Taken:
        """``with queue.take() as item:`` work on an item; leaving the block acknowledges it.

        Leaving by an exception, dying, or being removed when the lease is over puts it back, in its old place, with its
        delivery count (``Taken.deliveries``) one higher.  So every item is worked on at least once, and more than once only if
        somebody did not finish.  What is raised when it is unpickled is such an exception.  Blocks as ``get``, and while
        128 items are being worked on.  OSError if there is no memory to keep it in.
        """
        return Taken(self, block, timeout)

    def _take(self, grip: Grip, block: bool, timeout: float | None) -> None:
        slots, source = self._slots_there, self._in
        source.check()  # ValueError if it is closed, ContractDenied
        deadline = deadline_after(timeout if block else 0.0)
        try:
            while True:
                slots.look_now_and_then()
                if slots.take_returned(grip, deadline) or slots.take_new(grip, deadline):
                    return
                if not block or not (self._wait(source, deadline) and self._wait_for_slot(source, deadline)):
                    raise Empty
        except TimeoutError:
            raise Empty from None
        finally:
            slots.pass_on()

    def _wait_for_slot(self, source: Any, deadline: float | None) -> bool:
        """Until an item can be taken again, or there may be an empty slot for a new one."""
        slots = self._slots_there
        view, returned = slots.view, slots.returned
        if slots.any_free():
            return True
        slots.pass_on()  # somebody may get what we cannot take
        return bool(
            source.wait_until(
                slots.free_block, lambda: bool(view[returned]) or slots.any_free(), deadline, slots.look_for_the_dead
            )
        )

    @property
    def dead_letters(self) -> DeadLetters:
        """The items that were handed out ``max_deliveries`` times and never acknowledged."""
        self._in.lock  # noqa: B018 - ValueError if it is closed
        return self._letters

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
        if not isinstance(self._in, Closed):
            self._out = self._in = Closed(f"{self!r} is closed", ValueError)

    def join_thread(self) -> None:
        """Nothing: there is no thread.  AssertionError before ``close``, as multiprocessing's."""
        assert isinstance(self._in, Closed), f"Queue {self!r} not closed"

    def cancel_join_thread(self) -> None:
        """Nothing: there is no thread, and what was put is in shared memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        self._in.lock  # noqa: B018 - ValueError if it is closed
        if self.name is None:
            mp_context.assert_spawning(self)
            return _rebuild, (type(self), _anonymous.export(self._memory.control(0)), None, self._terms, self._unpickle)
        return _rebuild, (type(self), None, (self.domain, self.name), self._terms, self._unpickle)

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

    ``task_done`` says that one is which was got.  One that was taken is done when its block ends normally, without
    ``task_done``; so is one that goes to the dead letters.  Items that a dead process had got are never done.
    """

    _joinable = True

    def task_done(self) -> None:
        """One item that was got is done.  ValueError if all of them were already."""
        slots, words = self._slots_there, self._memory.arena.words
        place = slots.done_block.word
        operand = Operand()
        pointer = words.pointer(place)
        for _ in range(100_000):  # somebody may overwrite it all the time
            w = words.load(place)
            if not slots.unfinished():
                raise ValueError("task_done() called too many times")
            if operand.compare_exchange(pointer, w, (w + at.ONE) & at.WORD_MASK):
                break
        slots.wake_joiners()

    def join(self) -> None:
        """Block until every item that was put is done."""
        slots = self._slots_there
        slots.consumer.wait_until(slots.done_block, lambda: not slots.unfinished(), None)


class SimpleQueue:
    """The few methods of multiprocessing.SimpleQueue.  It can be pickled only while a process is being spawned."""

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


def _rebuild(
    cls: type[Queue], inherited: tuple[Any, ...] | None, named: tuple[str, str] | None, terms: Terms | None, unpickle: bool
) -> Queue:
    queue = cls.__new__(cls)
    queue._bind(memory_of(inherited, named, Declaration(at.QUEUE), terms), terms, unpickle)
    return queue
