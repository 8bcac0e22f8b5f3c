"""Channels and pipes: messages between processes through shared memory, uncopied where possible.

A :class:`Channel` has two ends and two directions.  The privileged end puts into the one buffer, the user end into the other;
at each end there may be any number of producers and consumers, threads and processes.  Each direction is a ring (``_ring``): a
producer that is killed in the middle of a message leaves nothing of it, and a consumer that is killed in the middle of
reading gives its message back.  A full buffer makes senders wait; nothing is ever dropped.

A :func:`Pipe` is two :class:`Connection` objects over such a channel, with the interface of multiprocessing's.  It also knows
when its other end is gone: closed, or its processes dead, however they died.  Each process that has an end open holds, through
an open file description that its children share, a lock of the kernel's on a byte that stands for this end.

    killed after             outcome
    C36 end closed, not said  the other end finds out by itself: a reader within its poll interval, a writer when its messages
                              fill a few chunks that nobody empties
"""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Callable, Collection, Iterable
from multiprocessing import BufferTooShort, reduction
from multiprocessing import context as mp_context
from types import TracebackType
from typing import Any, Final, Literal, Self

from . import _anonymous, _machine, _names, _pickling, _process
from . import _layout as at
from ._arena import Block, Declaration
from ._geometry import (
    CONTROLS,
    LAZY_CHUNK,
    LAZY_CHUNKS,
    MOST_BYTES,
    SHUT,
    Geometry,
    channel_controls,
    channel_rings,
    prepare,
)
from ._memory import Memory, Shape
from ._parking import deadline_after, parking_of
from ._ring import Consumer, Producer, Within
from ._sys import SYSTEM, crash_points
from .contract import Contract, Lease, OnTerminate, Terms
from .errors import SegmentError
from .synchronize import Waiter, attach_of_machine, terms_for, waiters_of

__all__ = ["Channel", "Connection", "Pipe"]

DEFAULT_SIZE: Final = 1 << 20  # bytes
PIPE_MOST, PIPE_KEPT = 9, 64  # chunks of a pipe without a size: in use at a time, and that keep their memory

#: Bytes of the segment's file that stand for the ends; see ``_segment`` for the first two.
BYTE_END: Final = 2

Direction = Literal[0, 1]
_USUAL: Final = ("send", "receive")


def check_size(size: Any) -> int:
    """A size in bytes, checked.  TypeError, ValueError; OSError (ENOSPC) where no machine has so much."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be a number of bytes, not {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"size must be at least one byte, not {size}")
    if size > MOST_BYTES:
        raise OSError(errno.ENOSPC, f"no memory for {size} bytes; a channel holds {MOST_BYTES} at most")
    return size


class Closed:
    """What a closed end, or one that does not go in this direction, has in the place of its ring."""

    def __init__(self, fact: str, error: type[Exception] = OSError) -> None:
        self._fact = fact
        self._error = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by Python itself
            raise AttributeError(name)
        raise self._error(self._fact)


class _Messages:
    """Sending and receiving, over a producer of one ring and a consumer of another."""

    _out: Any  # Producer, or Closed
    _in: Any  # Consumer, or Closed
    _loads: Callable[[int, Any], Any] = staticmethod(_pickling.loads)

    # -- sending ------------------------------------------------------------------------------------------------------

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None, *, timeout: float | None = None) -> None:
        """Send the bytes of a buffer, or ``size`` of them from ``offset`` on, as one message.

        Blocks while there is no room, at most ``timeout`` seconds: then TimeoutError, and nothing was sent.  ValueError for a
        message that is larger than the longest that fits.  The buffer may be changed as soon as this returns.
        """
        if buf.__class__ is not bytes or offset or size is not None:
            buf = _part_of(buf, offset, size)
        if timeout is not None or not self._out.put(buf):
            self._put_slowly(0, buf, timeout)

    def send(self, obj: Any, *, timeout: float | None = None) -> None:
        """Send an object: its pickle (protocol 5), and its large buffers beside it, each copied once.

        Blocks as ``send_bytes``.  Whatever is raised while it is pickled, nothing was sent.
        """
        put = self._out.put  # OSError of a closed end comes before whatever is wrong with the object
        tag, body = _pickling.dumps(obj)
        if tag == _pickling.OUT_OF_BAND or timeout is not None or not put(body, tag):
            self._put_slowly(tag, body, timeout)

    def send_many(self, messages: Iterable[Any], *, timeout: float | None = None) -> None:
        """Send bytes objects, each as one message, many at a time: faster than one by one.

        Blocks as ``send_bytes``; a TimeoutError has ``sent``, the number of messages that were sent.
        """
        bodies = [body if body.__class__ is bytes else _part_of(body, 0, None) for body in messages]
        self._put_many(bodies, [_pickling.BYTES] * len(bodies), timeout)

    def _put_many(self, bodies: list[Any], tags: list[int], timeout: float | None) -> None:
        out, done = self._out, 0
        deadline = deadline_after(timeout)
        lock = None if deadline is None else Within(out, deadline)
        try:
            while True:
                done += out.put_many(bodies, tags, done, lock)
                if done == len(bodies):
                    return
                if not out.wait_for_room(len(bodies[done]), deadline, self._reader_is_gone):
                    self._check_reader()
                    raise TimeoutError(f"{self._text()}: no room for {timeout} s; {done} of {len(bodies)} messages were sent")
        except TimeoutError as error:
            error.sent = done  # type: ignore[attr-defined]
            raise
        finally:
            out.pass_on()

    def _put_slowly(self, tag: int, body: Any, timeout: float | None) -> None:
        out = self._out
        deadline = deadline_after(timeout)
        lock = None if deadline is None else Within(out, deadline)
        length, parts = _pickling.layout(body) if tag == _pickling.OUT_OF_BAND else (len(body), None)
        try:
            while not (out.put(body, tag, lock) if parts is None else out.put_parts(parts, length, tag, lock)):
                if not out.wait_for_room(length, deadline, self._reader_is_gone):
                    self._check_reader()
                    raise TimeoutError(f"{self._text()}: no room for a message of {length} bytes within {timeout} s")
        finally:
            out.pass_on()

    def reserve(self, size: int, *, timeout: float | None = None) -> Reservation:
        """``with channel.reserve(n) as view:`` fill the view, and it is sent when the block ends: nothing is copied.

        The view is in the shared memory itself.  Leaving by an exception sends nothing.  ``truncate(length)`` of the
        reservation sends only the beginning.  Other producers of this direction wait meanwhile.  Blocks as ``send_bytes``.
        """
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be a number of bytes, not {type(size).__name__}")
        if size < 0:
            raise ValueError(f"size must not be negative: {size}")
        return Reservation(self, timeout, size)

    # -- receiving ----------------------------------------------------------------------------------------------------

    def recv_bytes(self, maxlength: int | None = None, *, timeout: float | None = None) -> bytes:
        """Take the next message as bytes.

        Blocks until there is one, at most ``timeout`` seconds: then TimeoutError.  One that is longer than ``maxlength``
        raises OSError, and is lost.
        """
        if maxlength is not None and maxlength < 0:
            raise ValueError("negative maxlength")
        got = self._in.get() if timeout is None else None
        if got is None or maxlength is not None:
            got = got or self._get_slowly(timeout)
            if maxlength is not None and len(got[1]) > maxlength:
                raise self._too_long(len(got[1]), maxlength)
        tag, body = got
        return body if tag == 0 else _pickling.bytes_of_message(tag, body, self._loads)

    def recv_bytes_into(self, buf: Any, offset: int = 0, *, timeout: float | None = None) -> int:
        """Take the next message into a writable buffer, from ``offset`` on; its length in bytes.

        multiprocessing.BufferTooShort, which has the message as its argument, if it does not fit.  Blocks as ``recv_bytes``.
        """
        with memoryview(buf) as view, view.cast("B") as into:
            if offset < 0:
                raise ValueError("negative offset")
            if offset > len(into):
                raise ValueError("offset too large")
            if into.readonly:
                raise TypeError("the buffer cannot be written to")
            body = self.recv_bytes(timeout=timeout)
            if len(into) < offset + len(body):
                raise BufferTooShort(body)
            into[offset : offset + len(body)] = body
            return len(body)

    def recv(self, *, timeout: float | None = None) -> Any:
        """Take the next message as an object.  Blocks as ``recv_bytes``.

        Large buffers of the object, such as the data of numpy arrays, are not copied once more.  PickleRefused in a domain of
        the machine, unless it is a bytes object, or ``unpickle`` was said; the message is taken.
        """
        tag, body = (self._in.get() if timeout is None else None) or self._get_slowly(timeout)
        return self._loads(tag, body)

    def recv_many(self, most: int, *, timeout: float | None = None) -> list[bytes]:
        """Take up to ``most`` messages as bytes: all that are there, and at least one.  Blocks as ``recv_bytes``."""
        if most < 1:
            raise ValueError(f"most must be at least 1, not {most}")
        deadline = deadline_after(timeout)
        source = self._in
        lock = None if deadline is None else Within(source, deadline)
        try:
            while not (found := source.get_many(most, lock)):
                self._wait_for_message(source, deadline, timeout)
        finally:
            source.pass_on()
        return [body if tag == 0 else _pickling.bytes_of_message(tag, body, self._loads) for tag, body in found]

    def _get_slowly(self, timeout: float | None) -> tuple[int, Any]:
        source, deadline = self._in, deadline_after(timeout)
        lock = None if deadline is None else Within(source, deadline)
        try:
            while True:
                got: tuple[int, Any] | None = source.get(lock)
                if got is not None:
                    return got
                self._wait_for_message(source, deadline, timeout)
        finally:
            source.pass_on()

    def _wait_for_message(self, source: Any, deadline: float | None, timeout: float | None) -> None:
        """EOFError if there will be none, TimeoutError if there was none in time."""
        if not source.wait_for_message(deadline, self._writer_is_gone):
            if self._writer_is_gone() and source.is_empty():
                raise EOFError
            if deadline is not None and SYSTEM.monotonic() >= deadline and source.is_empty():
                raise TimeoutError(f"{self._text()}: no message within {timeout} s")

    def peek(self, *, timeout: float | None = None) -> Peek:
        """``with channel.peek() as view:`` read the next message where it lies; it is taken when the block ends.

        The view is read-only.  Leaving by an exception, or dying, leaves the message there.  Other consumers of this direction
        wait meanwhile.  Blocks as ``recv_bytes``.
        """
        return Peek(self, timeout)

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether there is a message; waits at most so many seconds for one, None = as long as it takes.

        Also True if there will never be one: then receiving raises EOFError at once.
        """
        source = self._in
        if not source.is_empty():
            return True
        deadline = deadline_after(timeout)
        if timeout is not None and timeout <= 0:
            return self._writer_is_gone()
        try:
            return bool(source.wait_for_message(deadline, self._writer_is_gone)) or self._writer_is_gone()
        finally:
            source.pass_on()  # we leave the message to others

    # -- the other end ------------------------------------------------------------------------------------------------

    def _reader_is_gone(self) -> bool:
        return False

    def _writer_is_gone(self) -> bool:
        return False

    def _check_reader(self) -> None:
        """BrokenPipeError if nobody will take messages any more."""

    def _too_long(self, length: int, most: int) -> Exception:
        return OSError(f"{self._text()}: a message of {length} bytes, and at most {most} are wanted")

    def _text(self) -> str:
        raise NotImplementedError


class _InPlace:
    """A ``with`` block under the lock of one end of a ring, around one message in shared memory.

    What a signal handler raises inside ``__exit__`` comes out when all is finished; only what it raises at the very entry
    leaves the lock held, as that of a Lock.
    """

    __slots__ = ("_before", "_end", "_error", "_is_done", "_is_over", "_messages", "_process", "_size", "_timeout")

    def __init__(self, messages: _Messages, timeout: float | None, size: int = 0) -> None:
        self._messages = messages
        self._timeout = timeout
        self._size = size
        self._end: Any = None  # Producer or Consumer, from the beginning of the block on
        self._process: object = None
        self._before = 0  # TAIL or HEAD
        self._is_done = self._is_over = False
        self._error: Exception | None = None

    @property
    def lease(self) -> Lease | None:
        """The present hold of a channel with a lease: its deadline, and whether it is asked to leave."""
        lease: Lease | None = self._end.lock.lease if self._end is not None else None
        return lease

    def __enter__(self) -> memoryview:
        if self._end is not None:
            raise ValueError("this was used already")
        end = self._end = self._choose()
        words = end.lock._words
        try:
            deadline = None if self._timeout is None else deadline_after(self._timeout)
            while True:
                if deadline is not None:
                    Within(end, deadline).__enter__()
                elif not words.has_door.cell_contents or words.inside.cell_contents or not end.lock.acquire(False):
                    end.inside.__enter__()
                words_view = end.view  # useless in a child that is forked meanwhile
                self._process = _process.current
                end.way_in = end.inside
                view = self._begin(words_view)
                if self._process is not _process.current:
                    raise ValueError("it is the parent's")
                if view is not None:
                    return view
                self._leave()
                self._wait(deadline)
        except BaseException as error:
            self._leave()
            end.pass_on()
            if error.__class__ is ValueError and self._process not in (None, _process.current):
                raise end.failed(end.readable_block, error, self._process) from None
            if error.__class__ is IndexError:
                raise end.damaged("TAIL or HEAD points nowhere") from None
            raise

    def __exit__(self, kind: object, value: object, traceback: TracebackType | None) -> None:
        # A child that was forked inside has nothing to do: its parent's view is dead there already.
        interruption: BaseException | None = None
        tries = 0
        while self._process is _process.current:
            try:
                self._finish(kind is not None)
                break
            except BaseException as error:
                if self._process is not _process.current and error.__class__ in (ValueError, _process.Forked):
                    break  # of words that are the parent's
                tries += 1
                if tries > _process.MOST_INTERRUPTIONS:  # it isn't a signal handler, then
                    if self._is_over:
                        raise
                    self._is_over, tries = True, 0
                interruption = error
        if interruption is not None:
            raise interruption
        if self._error is not None and self._process is _process.current:
            raise self._error

    def _finish(self, failed: bool) -> None:
        """What is left to be done; may be called again when it was interrupted."""
        end, view = self._end, self._end.view  # useless in a child that is forked meanwhile
        if self._process is not _process.current:
            return
        if failed or self._is_over:
            self._is_over = True
            self._leave()
        else:
            if not end.lock._words.is_mine():
                self._error = RuntimeError(
                    f"{self._messages._text()}: the lock of this block is not held by this thread any more"
                )
                return
            end.take_back()
            self._is_done = True  # before it is so: one wake-up too many does no harm
            if self._place() == self._before:
                self._act(view)
            self._is_over = True
            if self._process is _process.current:
                end.way_in = end.lock
                end.lock.__exit__()
        if self._is_done:
            try:
                end.tell()
            except BrokenPipeError as error:
                self._error = error
        end.pass_on()

    def _leave(self) -> None:
        """Nothing of it is left; may be called again when it was interrupted."""
        end, process = self._end, self._process
        if process is _process.current and end.lock._words.is_mine():
            if end.lent is not None:
                end.take_back()
            lock = end.way_in = end.lock
            lock.__exit__()  # unlike release() it does nothing in a child that was forked since

    def _choose(self) -> Any:
        """The end of the ring."""
        raise NotImplementedError

    def _place(self) -> int:
        """TAIL or HEAD, which only who is inside changes."""
        raise NotImplementedError

    def _begin(self, view: memoryview) -> memoryview | None:
        """Note TAIL or HEAD; a view of the message, or None if there is no room, or none there.  ``view``: the words."""
        raise NotImplementedError

    def _wait(self, deadline: float | None) -> None:
        raise NotImplementedError

    def _act(self, view: memoryview) -> None:
        """Send or take the message.  ``view``: the words of this process."""
        raise NotImplementedError


class Reservation(_InPlace):
    """The room for one message, while it is being written."""

    __slots__ = ("_start",)

    def truncate(self, length: int) -> None:
        """Send only the first ``length`` bytes of the view."""
        if not 0 <= length <= self._size:
            raise ValueError(f"length must be 0 to {self._size}, not {length}")
        self._size = length

    def _choose(self) -> Any:
        return self._messages._out

    def _begin(self, view: memoryview) -> memoryview | None:
        got: tuple[int, int, memoryview] | None = self._end.begin(view, self._size)
        if got is None:
            return None
        self._before, self._start, lent = got
        return lent

    def _wait(self, deadline: float | None) -> None:
        if not self._end.wait_for_room(self._size, deadline, self._messages._reader_is_gone):
            self._messages._check_reader()
            raise TimeoutError(
                f"{self._messages._text()}: no room for a message of {self._size} bytes within {self._timeout} s"
            )

    def _place(self) -> int:
        return int(self._end.view[self._end.tail])

    def _act(self, view: memoryview) -> None:
        self._end.finish(view, self._start, self._size)


class Peek(_InPlace):
    """The next message, while it is being read."""

    __slots__ = ("_after",)

    def _choose(self) -> Any:
        return self._messages._in

    def _begin(self, view: memoryview) -> memoryview | None:
        got: tuple[int, int, int, memoryview] | None = self._end.begin(view)
        if got is None:
            return None
        self._before, self._after, _, lent = got
        return lent

    def _wait(self, deadline: float | None) -> None:
        self._messages._wait_for_message(self._end, deadline, self._timeout)

    def _place(self) -> int:
        return int(self._end.view[self._end.head])

    def _act(self, view: memoryview) -> None:
        self._end.finish(view, self._after)


def _part_of(buf: Any, offset: int, size: int | None) -> memoryview:
    """Bytes of a buffer, as multiprocessing.Connection.send_bytes chooses them."""
    view = memoryview(buf)
    if view.ndim != 1 or view.itemsize != 1 or view.format != "B":
        view = view.cast("B")
    n = len(view)
    if offset < 0:
        raise ValueError("offset is negative")
    if n < offset:
        raise ValueError("buffer length < offset")
    if size is None:
        size = n - offset
    elif size < 0:
        raise ValueError("size is negative")
    elif offset + size > n:
        raise ValueError("buffer length < offset + size")
    return view[offset : offset + size]


# -- Channel --------------------------------------------------------------------------------------------------------------


def _shape(size: int, terms: Terms | None) -> Shape:
    lease, grace = (terms.lease, terms.grace) if terms is not None else (0, 0)
    return _shape_of(channel_controls(size, lease, grace), *channel_rings(size))


def _shape_of(controls: tuple[Declaration, ...], one: Geometry, other: Geometry) -> Shape:
    def prepare_both(memory: Memory) -> None:
        for geometry in (one, other):
            prepare(memory, geometry)

    # All at once: what is more than /dev/shm can ever hold is refused before any of it is taken.
    reserve = 0 if one.is_lazy else one.size + other.size
    return Shape(controls, one.size + other.size, reserve, prepare_both)


class Channel(_Messages):
    """One end of a pair of buffers between a privileged end and a user end.

    name         the channel of that name in ``domain``, created if there is none and a size is given; None: a new one
    size         bytes of the longest message, and about how many each direction holds (each message counts 8 to 15 more);
                 about twice as much memory is taken at once (OSError if it can't be had).  None: as it is
    privileged   which end this object is
    lease, grace, rank, on_terminate, record_site   as for :class:`Lock`: how long a message may be in the making, or being read
                 in place
    operations   what the contract is asked for: "send", "receive" or both
    unpickle     in a domain of the machine: whether ``recv`` unpickles what it gets.  Else it takes bytes objects only, because
                 to unpickle something is to let whoever sent it run a program here: anybody may who can open this name

    In a domain of the machine, ``"/NAME"``, several users share the channel (see ``_machine``).  It needs a lease and a size
    there, and its memory counts against who had it made.  The privileged end is for those to whom the policy gives the class
    "kernel".  Who may only send, or only receive, has no descriptor of what he may not read or write; but all who may open
    the channel can lose and repeat messages, and what ``peek`` shows may still change.  ``recv_many`` takes at most 1,024 at
    a time.

    A producer that is killed in the middle of a message leaves nothing of it; a consumer that is killed before it is done with
    a message gives it back.  Ends come and go: nobody is told of it, and messages wait.  Without a name it can be pickled
    only while a process is being spawned.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        size: int | None = None,
        privileged: bool = False,
        domain: str | None = None,
        lease: float | None = None,
        grace: float | None = None,
        rank: int = 0,
        operations: Collection[str] = _USUAL,
        on_terminate: OnTerminate = "flag",
        record_site: bool = False,
        unpickle: bool = False,
    ) -> None:
        terms = terms_for(lease, grace, rank, operations, on_terminate, record_site, usual=_USUAL)
        if not set(operations) & set(_USUAL):
            raise ValueError(f"operations must be some of {', '.join(_USUAL)}, not {', '.join(operations)}")
        if name is None and size is None:
            size = DEFAULT_SIZE
        shape = None
        if size is not None:
            shape = _shape(check_size(size), terms)
        if name is None:
            if domain is not None:
                raise ValueError(f"domain={domain!r} is for a channel with a name, and there is none")
            assert shape is not None
            memory = Memory.create(shape)
        else:
            domain = _names.DEFAULT_DOMAIN if domain is None else _names.check_name(domain, "domain")
            wanted = Declaration(at.CHANNEL, parameter=size or 0, lease=terms.lease if terms is not None else 0)
            memory = open_memory(domain, _names.check_name(name), wanted, shape, terms)
        self._bind(memory, privileged, terms, unpickle)

    def _bind(self, memory: Memory, privileged: bool, terms: Terms | None, unpickle: bool) -> None:
        self._memory = memory
        self._privileged = privileged
        self._terms = terms
        self._unpickle = unpickle
        if memory.arena.made is not None and not unpickle:
            self._loads = _pickling.refusing(self._text())
        control = memory.control(0)
        if control.kind != at.CHANNEL or memory.arena.layout.blocks != 1 + 2 * CONTROLS:
            raise memory.arena.damaged("it is no Channel")
        self._size = control.parameter
        if not 0 < self._size <= MOST_BYTES or memory.size != sum(ring.size for ring in channel_rings(self._size)):
            raise memory.arena.damaged(f"it says that it holds {self._size} bytes")
        if control.leased and terms is None:
            lease, grace = (memory.arena.words.load(control.start + place) for place in (at.BLOCK_LEASE, at.BLOCK_GRACE))
            terms = self._terms = Terms(lease, grace, 0, tuple(sorted(_USUAL)))
        geometries = channel_rings(self._size)
        out, into = (0, 1) if privileged else (1, 0)
        self._out = Producer(memory, 1 + CONTROLS * out, geometries[out], self._text(), terms)
        self._in = Consumer(memory, 1 + CONTROLS * into, geometries[into], self._text(), terms)

    @property
    def name(self) -> str | None:
        """The name, or None."""
        return self._memory.arena.only_name

    @property
    def domain(self) -> str | None:
        """The domain of the name, or None."""
        return self._memory.arena.domain

    @property
    def size(self) -> int:
        """Bytes of messages that each direction holds."""
        return self._size

    @property
    def privileged(self) -> bool:
        """Whether this is the privileged end."""
        return self._privileged

    @property
    def closed(self) -> bool:
        """Whether this object is closed."""
        return isinstance(self._in, Closed)

    @property
    def contracts(self) -> tuple[Contract, ...]:
        """What the supervisor granted this process: for sending, and for receiving.  Empty without a lease."""
        if self.closed:
            return ()
        return tuple(contract for end in (self._out, self._in) if (contract := end.lock.contract) is not None)

    @property
    def waiters(self) -> tuple[Waiter, ...]:
        """The threads that wait for a message of either direction, or for room, the longest-waiting first."""
        found = [waiter for block in self._memory.controls() for waiter in waiters_of(block)]
        return tuple(sorted(found, key=lambda waiter: -waiter.waiting_for))

    def qsize(self) -> int:
        """How many messages wait to be received at this end."""
        return int(self._in.waiting())

    def other_end(self) -> Channel:
        """The opposite end of the same channel, as another object."""
        other = Channel.__new__(Channel)
        other._bind(self._memory, not self._privileged, self._terms, self._unpickle)
        return other

    def close(self) -> None:
        """Close this object; the channel stays for others.  Closing again does nothing."""
        self._out = self._in = Closed("the channel is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.closed:
            raise OSError("the channel is closed")
        control = self._memory.control(0)
        state = (self._privileged, self._terms, self._unpickle)
        if self.name is None:
            mp_context.assert_spawning(self)
            return _rebuild_channel, (_anonymous.export(control), None, *state)
        return _rebuild_channel, (None, (self.domain, self.name), *state)

    def _text(self) -> str:
        return f"Channel {self.name!r}" if self.name is not None else "Channel without a name"

    def __repr__(self) -> str:
        if self.closed:
            return "<Channel (closed)>"
        end = "privileged" if self._privileged else "user"
        name = f"{self.name!r}, " if self.name is not None else ""
        return f"<Channel({name}{end} end, {self.qsize()} to receive, {self._out.waiting()} sent and not received)>"


def _rebuild_channel(
    inherited: tuple[Any, ...] | None, named: tuple[str, str] | None, privileged: bool, terms: Terms | None, unpickle: bool
) -> Channel:
    channel = Channel.__new__(Channel)
    channel._bind(memory_of(inherited, named, Declaration(at.CHANNEL), terms), privileged, terms, unpickle)
    return channel


def open_memory(domain: str, name: str, wanted: Declaration, shape: Shape | None, terms: Terms | None) -> Memory:
    """The memory of a name, in whatever domain, which is made if there is none."""
    if _machine.is_of_machine(domain):
        return Memory(attach_of_machine(domain, name, wanted, terms).arena)
    return Memory.open(domain, name, wanted, shape)


def memory_of(
    inherited: tuple[Any, ...] | None, named: tuple[str, str] | None, wanted: Declaration, terms: Terms | None
) -> Memory:
    """The memory of a pickled object, in the process where it arrives."""
    if inherited is not None:
        block: Block = _anonymous.attach_inherited(*inherited)
        return Memory(block.arena)
    assert named is not None
    return open_memory(*named, wanted, None, terms)


# -- Pipe -----------------------------------------------------------------------------------------------------------------


class Connection(_Messages):
    """One end of a :func:`Pipe`, with the interface of multiprocessing's Connection.

    It is no file: ``fileno()`` raises, and multiprocessing.connection.wait() can't wait for it; ``poll(timeout)`` can.
    """

    def __init__(self, memory: Memory, side: Direction, token: int, *, readable: bool = True, writable: bool = True) -> None:
        """``token``: a descriptor of its own, which holds the byte of this side, and which this object takes over."""
        self._memory = memory
        self._side = side
        self._token = token
        self._readable, self._writable = readable, writable
        geometries = _pipe_geometries(memory)
        out, into = side, 1 - side
        self._out = Producer(memory, 1 + CONTROLS * out, geometries[out], "Pipe") if writable else _READ_ONLY
        self._in = Consumer(memory, 1 + CONTROLS * into, geometries[into], "Pipe") if readable else _WRITE_ONLY
        if writable:
            self._out.look_for_the_dead = self._say_if_reader_is_gone

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._token < 0

    @property
    def readable(self) -> bool:
        """Whether it can receive."""
        return self._readable

    @property
    def writable(self) -> bool:
        """Whether it can send."""
        return self._writable

    def fileno(self) -> int:
        """There is no file to wait for: io.UnsupportedOperation."""
        raise io.UnsupportedOperation("a connection through shared memory has no file descriptor: use poll(timeout)")

    def close(self) -> None:
        """Close this end, in this process.  The other end is told when no process has it open any more."""
        token, self._token = self._token, -1
        if token < 0:
            return
        self._out = self._in = _HANDLE_IS_CLOSED
        SYSTEM.close(token)
        if crash_points:
            crash_points[0]("C36 end closed, not said")
        if not SYSTEM.is_byte_locked(self._memory.arena.segment.fd, BYTE_END + self._side):
            _shut(self._memory, self._side)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.closed:
            raise OSError("handle is closed")
        mp_context.assert_spawning(self)
        token = reduction.DupFd(self._token)
        inherited = _anonymous.export(self._memory.control(0))
        return _rebuild_connection, (inherited, self._side, token, self._readable, self._writable)

    def _other_is_gone(self) -> bool:
        if self._token < 0:
            raise OSError("handle is closed")
        return not SYSTEM.is_byte_locked(self._token, BYTE_END + 1 - self._side)

    def _writer_is_gone(self) -> bool:
        return self._other_is_gone()

    def _reader_is_gone(self) -> bool:
        return self._other_is_gone()

    def _say_if_reader_is_gone(self) -> None:
        if self._other_is_gone():
            _shut(self._memory, 1 - self._side)

    def _check_reader(self) -> None:
        if self._other_is_gone():
            _shut(self._memory, 1 - self._side)
            self._out.tell()

    def _too_long(self, length: int, most: int) -> Exception:
        if self._writable:
            self._readable, self._in = False, _WRITE_ONLY
        else:
            self.close()
        return super()._too_long(length, most)

    def _text(self) -> str:
        return "Pipe"

    def __repr__(self) -> str:
        state = "closed" if self.closed else "duplex" if self._readable and self._writable else "read-only"
        return f"<Connection ({state if self._readable or self.closed else 'write-only'})>"


_HANDLE_IS_CLOSED: Final = Closed("handle is closed")
_READ_ONLY: Final = Closed("connection is read-only")
_WRITE_ONLY: Final = Closed("connection is write-only")


def _shut(memory: Memory, side: int) -> None:
    """An end is gone for good: its buffer is not filled any more, the other one not emptied."""
    for control, words in ((1 + CONTROLS * side, 3), (1 + CONTROLS * (1 - side), 2)):
        block = memory.control(control + words)
        words_of = memory.arena.words
        for _ in range(1000):
            seen = words_of.load(block.word)
            if words_of.compare_exchange(block.word, seen, seen | SHUT):
                break
    for block in memory.controls():
        parking_of(memory.arena).unpark_many(block.index)


def _pipe_geometries(memory: Memory) -> tuple[Geometry, Geometry]:
    return _pipe_rings(memory.control(0).parameter)


def _pipe_rings(size: int) -> tuple[Geometry, Geometry]:
    """``size``: as for a Channel; 0: as large as need be."""
    if size:
        return channel_rings(size)
    one = Geometry(LAZY_CHUNK, LAZY_CHUNKS, PIPE_MOST, 0, is_lazy=True, kept=PIPE_KEPT)
    other = Geometry(LAZY_CHUNK, LAZY_CHUNKS, PIPE_MOST, one.size, is_lazy=True, kept=PIPE_KEPT)
    return one, other


def Pipe(duplex: bool = True, *, size: int | None = None) -> tuple[Connection, Connection]:
    """Two connected :class:`Connection` objects, as multiprocessing.Pipe: what one sends, the other receives.

    duplex  False: the first one only receives, and the second one only sends
    size    bytes of messages that each direction holds, which is also the longest message, and whose memory is taken at once.
            None: about a megabyte, and single messages of up to a gigabyte, as there is memory in /dev/shm

    When no process has one end open any more, the other one's ``recv`` raises EOFError after the last message, and its ``send``
    BrokenPipeError: at once when the end was closed; when its last process was killed, a writer may go on until its messages
    fill a few chunks that nobody empties.
    """
    bytes_ = 0 if size is None else check_size(size)
    memory = Memory.create(_shape_of(channel_controls(bytes_), *_pipe_rings(bytes_)))
    tokens = []
    try:
        for side in (0, 1):
            tokens.append(SYSTEM.open_segment_again(memory.arena.segment.fd))
            SYSTEM.lock_byte(tokens[side], BYTE_END + side, shared=True)
    except BaseException:
        for token in tokens:
            SYSTEM.close(token)
        raise
    if duplex:
        return Connection(memory, 0, tokens[0]), Connection(memory, 1, tokens[1])
    return Connection(memory, 0, tokens[0], writable=False), Connection(memory, 1, tokens[1], readable=False)


def _rebuild_connection(inherited: tuple[Any, ...], side: Direction, token: Any, readable: bool, writable: bool) -> Connection:
    block: Block = _anonymous.attach_inherited(*inherited)
    fd: int = token.detach()
    SYSTEM.set_cloexec(fd)
    memory = Memory(block.arena)
    if block.kind != at.CHANNEL:
        raise SegmentError("without a name", "it is no Pipe", "Pass the connection that belongs to it.")
    return Connection(memory, side, fd, readable=readable, writable=writable)
