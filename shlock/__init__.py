"""Locks between processes that outlive their holder: multiprocessing's synchronize family in shared memory.

    >>> import shlock
    >>> lock = shlock.Lock()
    >>> with lock:
    ...     pass

When a process dies while it holds such a lock, by whatever means, the next one gets it and is told: ``lock.abandoned``.
"""

from typing import TYPE_CHECKING, Any

from .block import Block
from .channel import Channel, Connection, Pipe
from .context import get_context
from .contract import Contract, Lease
from .errors import (
    Abandoned,
    AbandonedError,
    AbandonedWarning,
    ContractDenied,
    DeadlockError,
    DeadlockMember,
    LeaseExpired,
    PickleRefused,
    SegmentError,
    SupervisorError,
)
from .queue import JoinableQueue, Queue, SimpleQueue
from .rwlock import RWLock
from .synchronize import Barrier, BoundedSemaphore, Condition, Event, Lock, Owner, RLock, Semaphore, Waiter

if TYPE_CHECKING:
    from .supervisor import Supervisor

__all__ = [
    "Abandoned",
    "AbandonedError",
    "AbandonedWarning",
    "Barrier",
    "Block",
    "BoundedSemaphore",
    "Channel",
    "Condition",
    "Connection",
    "Contract",
    "ContractDenied",
    "DeadlockError",
    "DeadlockMember",
    "Event",
    "JoinableQueue",
    "Lease",
    "LeaseExpired",
    "Lock",
    "Owner",
    "PickleRefused",
    "Pipe",
    "Queue",
    "RLock",
    "RWLock",
    "SegmentError",
    "Semaphore",
    "SimpleQueue",
    "Supervisor",
    "SupervisorError",
    "Waiter",
    "get_context",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Supervisor":  # few programs run one
        from .supervisor import Supervisor

        return Supervisor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
