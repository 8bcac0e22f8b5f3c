"""put() and get() of an end whose lock is biased to this process: in by the door, one message, and out again, in one piece.

These are the steps of ``Producer.put_anyhow`` and ``Consumer.get_anyhow`` for what most messages are, with those of
``_biased_path`` around them: B1 to B4 of ``_bias``.  A message goes where the last one of this process ended, in the same
chunk.  Or it was copied with those before it, while HEAD was further back: nobody writes where there are messages.  Whatever is
not so (no bias, a long message, another process in between) goes the other way, which is always right.

The interpreter looks at signals, switches threads and forks when a call has returned.  Between B1 and B3 nothing is called, so
that none of this is seen half-done; only the collector may run finalizers there, before anything has been stored.  What is
raised there comes from the body, or from words that were overwritten.

W is looked at once, on the way out.  Before B2 nothing can be wrong with it: a ring's lock is released only by a thread that
has just seen that it is its own, and as at the end of a ``with``, which does nothing in a child that was forked in between.

The steps on the way in and out, and those after an exception, stand in both functions, as in ``_biased_path``: a call of
common ones could be interrupted, or forked, before it begins.

With a lock that waits until a deadline the door is tried first all the same: that waits for nobody, and looks at no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from . import _layout as at
from . import _process
from ._bias import NEVER_OPEN, finish, undo
from ._biased_path import ATTEMPTS, CELLS, over
from ._geometry import ATTENTION, COUNT, STEP, TAG_SHIFT
from ._process import Forked
from ._sys import crash_points

if TYPE_CHECKING:
    from ._ring import Consumer, Producer, Within
    from .synchronize import Lock

__all__ = ["make_get", "make_put"]

#: Bytes of a message for which it is tried: of longer ones, there is seldom room for the next one in the same chunk.
MOST_IN_ONE_PIECE: Final = 128 << 10


def make_put(end: Producer) -> Callable[..., bool]:
    """The ``put`` of an end with an ordinary lock of its own, which has no lease."""
    # These become the cells of the lock's words.
    go_in: Any = NEVER_OPEN
    go_out: Any = None
    lowest: Any = None
    inside = mark = 0
    has_door = False
    words, tail_place, readable, put_anyhow = end.lock._words, end.tail, end.readable, end.put_anyhow

    def put(body: Any, tag: int = 0, lock: Lock | Within | None = None) -> bool:
        """Put one message there, without waiting for room; whether there was any."""
        nonlocal inside
        length = len(body)
        if length > MOST_IN_ONE_PIECE:
            return put_anyhow(body, tag, lock)
        process = _process.current
        is_sent = False
        try:
            if go_in(False) and has_door:  # B1
                inside += 1
                view = end.view
                tail = view[tail_place]
                place = end.place_left
                if tail == end.tail_left and place + length <= end.limit:
                    start = place + 8
                    end.mapping[start : start + length] = body
                    end.words[place >> 3] = length | tag << TAG_SHIFT if tag else length
                    if crash_points:
                        crash_points[0]("C30 bytes written")
                    if length != end.last_length:
                        end.last_length, end.last_size, end.last_step = length, length + 15 & ~7, length + STEP >> 3
                    after, left = tail + end.last_step, place + end.last_size
                    view[tail_place] = end.tail_left = after  # R1
                    end.place_left = left
                    is_sent = True
                    if crash_points:
                        crash_points[0]("C31 TAIL stored")
                inside -= 1  # B2
                go_out()  # B3
                if lowest[0] != mark:  # B4
                    finish(words)
                if is_sent:
                    if view[readable] & ATTENTION:
                        end.tell()
                    return True
        except BaseException as error:
            for _ in ATTEMPTS:
                try:
                    undo(words)
                    break
                except Forked:
                    break
                except BaseException:
                    pass  # what was raised first is what comes out
            raise end.failed(end.readable_block, error, process) from None
        return put_anyhow(body, tag, lock)

    return over(put, {name: getattr(words, name) for name in CELLS})


def make_get(end: Consumer) -> Callable[..., tuple[int, bytes | bytearray] | None]:
    """The ``get`` of an end with an ordinary lock of its own, which has no lease."""
    go_in: Any = NEVER_OPEN
    go_out: Any = None
    lowest: Any = None
    inside = mark = 0
    has_door = False
    words, head_place, writable, get_anyhow = end.lock._words, end.head, end.writable, end.get_anyhow

    def get(lock: Lock | Within | None = None) -> tuple[int, bytes | bytearray] | None:
        """Take the next message: its tag and its bytes; None if there is none.  Waits for nothing but other consumers."""
        nonlocal inside
        if end.ahead_index < 0:
            return get_anyhow(lock)
        process = _process.current
        body, tag = None, 0
        try:
            if go_in(False) and has_door:  # B1
                inside += 1
                view, index = end.view, end.ahead_index
                head = view[head_place]
                if head == end.head_left and index >= 0:
                    tag, body = end.ahead_tag, end.ahead[index]
                    if crash_points:
                        crash_points[0]("C33 bytes read")
                    view[head_place] = end.head_left = head + end.ahead_step  # R2
                    end.ahead_index = index - 1
                    end.ahead[index] = None
                    if crash_points:
                        crash_points[0]("C34 HEAD stored")
                inside -= 1  # B2
                go_out()  # B3
                if lowest[0] != mark:  # B4
                    finish(words)
                if body is not None:
                    if view[writable] & at.PARKED and (end.most_messages != COUNT or end.is_empty()):
                        end.wake(end.writable_block)
                    return tag, body
        except BaseException as error:
            for _ in ATTEMPTS:
                try:
                    undo(words)
                    break
                except Forked:
                    break
                except BaseException:
                    pass  # what was raised first is what comes out
            raise end.failed(end.writable_block, error, process) from None
        return get_anyhow(lock)

    return over(get, {name: getattr(words, name) for name in CELLS})
