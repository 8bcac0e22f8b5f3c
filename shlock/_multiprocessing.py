"""What multiprocessing's own code and tests read of a primitive's private parts, answered in one place.

queues.py and pool.py ask ``_semlock._get_value()`` and ``_is_zero()``, Condition asks ``_is_mine()`` and ``_count()``; the
tests look at a Condition's ``_sleeping_count``, ``_woken_count`` and ``_wait_semaphore``, which here are views of the parked
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["SemLockView", "ZeroCount"]


class SemLockView:
    """The face of ``_multiprocessing.SemLock`` over one of our primitives."""

    def __init__(
        self,
        primitive: Any,
        *,
        value: Callable[[], int],
        is_mine: Callable[[], bool],
        count: Callable[[], int],
        maxvalue: int,
    ) -> None:
        self._get_value = value
        self._is_mine = is_mine
        self._count = count
        self.acquire = primitive.acquire
        self.release = primitive.release
        self.maxvalue = maxvalue
        self.name = primitive.name
        self.kind = 0 if primitive._kind == 2 else 1  # RECURSIVE_MUTEX, SEMAPHORE

    def _is_zero(self) -> bool:
        return self._get_value() == 0


class ZeroCount:
    """The face of a Semaphore that nobody acquires: only ``get_value`` means something."""

    def __init__(self, value: Callable[[], int]) -> None:
        self.get_value = value
