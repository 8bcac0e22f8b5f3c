"""When to leave messages until there are more of them, instead of taking each as soon as it is there.

What a consumer reads while it is still in the cache of the producer's core, both cores keep, and the producer has to wait for
the other one when it writes there again.  To copy 64 KiB into a ring then takes 5.3 us; and 1.9 us, where the consumer is half
a megabyte behind (AMD EPYC; if the two cores share no cache, 19 and 9 us).  So a consumer that is always there at once slows
its producer down, and for this reason is always there at once.  When there is some distance, the producer is the faster one
of the two, and messages pile up by themselves.

Therefore who has waited FEW times, with hardly a message in between that it had not to wait for, leaves messages in the ring
once: until PILE bytes are there, or no further one comes for about as long as one takes to be copied.  If it has to wait for
each of the following ones as well, it tries again after twice as many, up to MOST_PATIENCE: where one message at a time is
sent and then answered, every thousandth is some 20 us late.

Nothing depends on it: no word is written, and what is read here of others' words decides only how long to wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ._geometry import COUNT_SHIFT
from ._sys import SYSTEM

if TYPE_CHECKING:
    from ._ring import Consumer

__all__ = ["Piling"]

#: Bytes of a message: a shorter one takes less to be copied than to be passed on.  Bytes that are to be there.
LEAST, PILE = 8 << 10, 1 << 20
FEW, MOST_PATIENCE = 8, 1024
#: Bytes that are copied in a ns at least.
SLOWEST_COPY: Final = 3
PAUSE: Final = 3000  # ns without another message, and the time in which one is copied


class Piling:
    """Of one consumer."""

    __slots__ = ("_count", "_end", "_patience", "_waits")

    def __init__(self, end: Consumer) -> None:
        self._end = end
        self._count = 0  # of messages that had been taken, by whomever, when this one had last waited
        self._patience = self._waits = FEW  # after how many times it is tried; how many of them are left

    def after_waiting(self) -> None:
        """Called when a message came that was waited for; may wait a little longer."""
        end = self._end
        count = end.view[end.head] >> COUNT_SHIFT
        if count - self._count > FEW:  # they do pile up
            self._patience = self._waits = FEW
        self._count = count
        self._waits -= 1
        if self._waits <= 0:
            self._patience = self._waits = min(MOST_PATIENCE, 2 * self._patience)
            length = end.next_length()
            if length >= LEAST:
                pile = min(PILE, end.geometry.most * end.chunk // 2)
                self._wait_for(min(-(-pile // length), end.most_messages), PAUSE + length // SLOWEST_COPY)

    def _wait_for(self, messages: int, pause: int) -> None:
        end = self._end
        seen = end.waiting()
        while 0 < seen < messages:
            until = SYSTEM.monotonic_ns() + pause
            while (now := end.waiting()) <= seen:
                if SYSTEM.monotonic_ns() > until:
                    return
            seen = now
