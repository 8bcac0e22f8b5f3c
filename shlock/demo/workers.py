"""A worker of the demo: claim a file under the lock, hash it outside, commit the result under the lock; again.

It may be killed at any instant. Whoever gets the lock next is told so and recovers the table; whoever replaces the
worker takes its claim over. Nothing here cleans up, because a killed process cannot.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from .folder import File, digest_of
from .table import Phase, Table

__all__ = ["AnyLock", "die_with", "work"]

_PR_SET_PDEATHSIG = 1


class AnyLock(Protocol):
    """What the demo needs of a lock: shlock's and multiprocessing's both have it."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *args: Any) -> None: ...


def work(table: Table, lock: AnyLock, files: Sequence[File], slot: int, number: int, parent: int) -> None:
    """Run one worker in its own process. ``number`` is new for every worker; a replacement inherits the ``slot``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us all; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    worker = _Worker(table, lock, slot, number)
    while (index := worker.claim()) is not None:
        size, digest = digest_of(files[index].path)
        worker.commit(index, size, digest)
    table.set_phase(slot, Phase.DONE)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the parent dies: a wait for an orphaned lock would outlast it for ever."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


class _Worker:
    def __init__(self, table: Table, lock: AnyLock, slot: int, number: int) -> None:
        self._table = table
        self._lock = lock
        self._slot = slot
        self._number = number

    def claim(self) -> int | None:
        with self._critical_section():
            return self._table.claim(self._slot, self._number)

    def commit(self, index: int, size: int, digest: bytes) -> None:
        with self._critical_section():
            self._table.commit(self._slot, self._number, index, size, digest)

    @contextmanager
    def _critical_section(self) -> Iterator[None]:
        """Hold the lock, with the table recovered first if its last holder died, and say in the table where we are."""
        table, slot = self._table, self._slot
        table.set_phase(slot, Phase.ENTERING)
        started_ns = time.monotonic_ns()
        with self._lock:
            table.set_phase(slot, Phase.CHOOSING)
            waited_ns = time.monotonic_ns() - started_ns
            # multiprocessing.Lock has no ``abandoned``; but it never lets anybody in after a death either.
            abandoned = getattr(self._lock, "abandoned", None)
            removed = abandoned is not None and abandoned.reason == "lease overrun"
            table.enter(slot, self._number, told=abandoned is not None, waited_ns=waited_ns, removed=removed)
            yield
            table.leave(self._number)
            table.set_phase(slot, Phase.LEAVING)
        table.set_phase(slot, Phase.HASHING)
