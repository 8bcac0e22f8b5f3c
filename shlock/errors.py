"""The exceptions and the warning of shlock.

Every error names the object, the fact, the evidence and the next step; the parts are attributes, and all of them
pickle.  Contention is not an error: a lock that is busy makes ``acquire`` return False.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Abandoned", "AbandonedError", "AbandonedWarning", "SegmentError"]


@dataclass(frozen=True)
class Abandoned:
    """What is known of an owner that died while it held a lock.

    pid        process number of the dead owner
    name       what it was, as far as it was recorded: process name and program, else None
    found_at   when its death was found, in seconds since the epoch
    reason     why it lost the lock; ``"owner died"`` for every death that was found by a waiter
    """

    pid: int
    name: str | None
    found_at: float
    reason: str = "owner died"

    def __str__(self) -> str:
        who = f"pid {self.pid}" + (f" ({self.name})" if self.name else "")
        return f"owner {who} died holding it, found {max(0.0, time.time() - self.found_at):.1f} s ago ({self.reason})"

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


class AbandonedWarning(RuntimeWarning):
    """The previous owner died while it held the lock: what the lock guards may be half-written."""


class AbandonedError(RuntimeError):
    """The lock is poisoned: an owner died, and nobody has repaired what the lock guards.

    Attributes: ``lock`` (text that names the lock), ``abandoned`` (an :class:`Abandoned`).
    """

    def __init__(self, lock: str, abandoned: Abandoned) -> None:
        super().__init__(lock, abandoned)
        self.lock = lock
        self.abandoned = abandoned

    def __str__(self) -> str:
        return (
            f"{self.lock}: {self.abandoned}; what it guards may be half-written. "
            "Repair it inside 'with lock.repair() as abandoned:'."
        )


class SegmentError(OSError):
    """A shared memory segment cannot be used: foreign, damaged, full, or of another boot, namespace, user or kind.

    Attributes: ``segment`` (its name), ``fact`` (what is wrong), ``advice`` (what to do).  Nothing was overwritten.
    """

    def __init__(self, segment: str, fact: str, advice: str) -> None:
        super().__init__(segment, fact, advice)
        self.segment = segment
        self.fact = fact
        self.advice = advice

    def __str__(self) -> str:
        return f"segment {self.segment}: {self.fact}. {self.advice}"
