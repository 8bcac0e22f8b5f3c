"""Locks between processes that outlive their holder: multiprocessing's synchronize family in shared memory.

    >>> import shlock
    >>> lock = shlock.Lock()
    >>> with lock:
    ...     pass

When a process dies while it holds such a lock, by whatever means, the next one gets it and is told: ``lock.abandoned``.
"""

from .context import get_context
from .errors import Abandoned, AbandonedError, AbandonedWarning, SegmentError
from .synchronize import Barrier, BoundedSemaphore, Condition, Event, Lock, Owner, RLock, Semaphore, Waiter

__all__ = [
    "Abandoned",
    "AbandonedError",
    "AbandonedWarning",
    "Barrier",
    "BoundedSemaphore",
    "Condition",
    "Event",
    "Lock",
    "Owner",
    "RLock",
    "SegmentError",
    "Semaphore",
    "Waiter",
    "get_context",
]

__version__ = "0.1.0"
