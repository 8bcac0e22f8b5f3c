"""When to leave messages until there are more of them, instead of taking each as soon as it is there.

What a consumer reads while it is still in the cache of the producer's core, both cores keep, and the producer has to wait for
the other one when it writes there again.  To copy 64 KiB into a ring then takes 5.3 us; and 1.9 us, where the consumer is half
a megabyte behind (AMD EPYC; if the two cores share no cache, 19 and 9 us).  So a consumer that is always there at once slows
its producer down, and for this reason is always there at once.  When there is some distance, the producer is the faster one
of the two, and messages pile up by themselves.

Therefore who had to wait FEW times, with few messages in between for which it had not to, leaves messages in the ring once:
until PILE bytes are there, or as many as fit without filling it, or no further one comes for about as long as one takes to be
copied.  If they do not pile up afterwards, it tries again after twice as many times, up to MOST_PATIENCE: where one message is
sent at a time and then answered, the 8th, the 24th, .., and then every 1024th comes later, by 25 us if it has 64 KiB.

Nothing depends on it.  No word is read that others might have made unreadable meanwhile, none is written, no lock is held.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ._geometry import COUNT_SHIFT
from ._sys import SYSTEM

if TYPE_CHECKING:
    from ._ring import Consumer

__all__ = ["Piling"]

#: Of the machine: the other end may have been pinned to another one than this.
CORES: Final = os.cpu_count() or 1
#: Bytes of a message: a shorter one takes less to be copied than to be passed on.  Bytes that are to be there.
LEAST, PILE = 8 << 10, 1 << 20
FEW, MOST_PATIENCE = 8, 1024
#: Bytes that are copied in a ns at least.
SLOWEST_COPY: Final = 3
PAUSE: Final = 3000  # ns without another message, and the time in which one is copied
LONGEST: Final = 0.001  # seconds that it takes at most: 128 times PAUSE, and PILE bytes copied


class Piling:
    """Of one consumer."""

    __slots__ = ("_count", "_end", "_patience", "_waits")

    def __init__(self, end: Consumer) -> None:
        self._end = end
        self._count = 0  # of messages that had been taken, by whomever, when this one had last waited
        self._patience = self._waits = FEW  # after how many times it is tried; how many of them are left

    def after_waiting(self, length: int, deadline: float | None, pass_on: Callable[[], None]) -> None:
        """Called when a message came that was waited for; may wait for up to LONGEST more, but not up to the deadline.

        length   of the last message: the next ones will be as long
        pass_on  called before waiting: it wakes who else sleeps and might take what is there (R7 of ``_ring``)
        """
        end = self._end
        count = end.view[end.head] >> COUNT_SHIFT
        if count - self._count > FEW:  # they do pile up
            self._patience = self._waits = FEW
        self._count = count
        self._waits -= 1
        if self._waits > 0 or length < LEAST or CORES < 2:
            return
        if deadline is not None and deadline - SYSTEM.monotonic() <= LONGEST:
            return
        self._patience = self._waits = min(MOST_PATIENCE, 2 * self._patience)
        pass_on()
        pile = min(PILE, end.geometry.most * end.chunk // 4)  # of a full ring the producer would go to sleep
        self._wait_for(min(-(-pile // length), end.most_messages // 2), PAUSE + length // SLOWEST_COPY)

    def _wait_for(self, messages: int, pause: int) -> None:
        end = self._end
        seen = end.waiting()
        while 0 < seen < messages:
            until = SYSTEM.monotonic_ns() + pause
            while (now := end.waiting()) <= seen:
                if SYSTEM.monotonic_ns() > until:
                    return
            seen = now
