"""Multiprocessing contexts whose primitives are shlock's.

``get_context(method)`` is multiprocessing's context of that start method, in which Lock, RLock, Semaphore, BoundedSemaphore,
Condition, Event, Barrier, Queue, JoinableQueue, SimpleQueue and Pipe are ours, and with them the locks inside Pool, Value and
Array.  The queues inside a Pool and inside concurrent.futures' executors stay multiprocessing's, on our locks: their code waits
for the pipes in them.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import context as mp_context
from typing import Any

from . import channel, queue, synchronize

__all__ = ["get_context"]


#: Modules that wait for the file inside a SimpleQueue.
_READS_PRIVATE_PARTS = ("concurrent.futures.process", "multiprocessing.pool")


class _Primitives(mp_context.BaseContext):
    """The factories of a context.  They take what ours take beyond multiprocessing's arguments, too."""

    #: What a lock that multiprocessing's own code makes does when its owner dies; None is the default, "warn".
    _on_abandoned: synchronize.Policy | None = None
    #: Whether SimpleQueue is multiprocessing's.
    _for_pool = False

    def Lock(self, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.Lock`."""
        options.setdefault("on_abandoned", self._on_abandoned)
        return synchronize.Lock(name, ctx=self, **options)

    def RLock(self, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.RLock`."""
        options.setdefault("on_abandoned", self._on_abandoned)
        return synchronize.RLock(name, ctx=self, **options)

    def Condition(self, lock: Any = None, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.Condition`."""
        return synchronize.Condition(lock, name, ctx=self, **options)

    def Semaphore(self, value: int = 1, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.Semaphore`."""
        return synchronize.Semaphore(value, name, ctx=self, **options)

    def BoundedSemaphore(self, value: int = 1, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.BoundedSemaphore`."""
        return synchronize.BoundedSemaphore(value, name, ctx=self, **options)

    def Event(self, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.Event`."""
        return synchronize.Event(name, ctx=self, **options)

    def Barrier(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        name: str | None = None,
        **options: Any,
    ) -> Any:
        """As :class:`shlock.Barrier`."""
        return synchronize.Barrier(parties, action, timeout, name, ctx=self, **options)

    def Queue(self, maxsize: int = 0, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.Queue`."""
        return queue.Queue(maxsize, name, ctx=self, **options)

    def JoinableQueue(self, maxsize: int = 0, name: str | None = None, **options: Any) -> Any:
        """As :class:`shlock.JoinableQueue`."""
        return queue.JoinableQueue(maxsize, name, ctx=self, **options)

    def SimpleQueue(self) -> Any:
        """As :class:`shlock.SimpleQueue`; for a Pool, and for concurrent.futures, multiprocessing's own, on our locks."""
        if self._for_pool or sys._getframe(1).f_globals.get("__name__") in _READS_PRIVATE_PARTS:
            return super().SimpleQueue()
        return queue.SimpleQueue(ctx=self)

    def Pipe(self, duplex: bool = True, *, size: int | None = None) -> Any:
        """As :func:`shlock.Pipe`."""
        return channel.Pipe(duplex, size=size)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Any = (),
        maxtasksperchild: int | None = None,
    ) -> Any:
        """As multiprocessing.Pool.

        Its two internal queues say nothing when a worker dies: ``terminate()`` ends workers that hold their locks or wait
        for them, and that is nobody's loss.
        """
        from multiprocessing.pool import Pool

        return Pool(processes, initializer, initargs, maxtasksperchild, context=_context(self._method, "ignore", True))

    _method: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _context, (self._method, self._on_abandoned, self._for_pool)

    def get_context(self, method: str | None = None) -> Any:
        return self if method is None else get_context(method)


@cache
def _context(method: str, on_abandoned: synchronize.Policy | None, for_pool: bool) -> Any:
    """The one context for a start method; ValueError if there is no such method."""
    base = type(multiprocessing.get_context(method))
    options = {"_method": method, "_on_abandoned": on_abandoned, "_for_pool": for_pool}
    return type(f"Shlock{base.__name__}", (_Primitives, base), options)()


def get_context(method: str | None = None) -> Any:
    """A multiprocessing context that uses shlock's primitives.

    method  "fork", "spawn", "forkserver", or None for multiprocessing's default at the time of the call
    """
    if method is None:
        method = multiprocessing.get_start_method()
    return _context(method, None, False)
