"""Multiprocessing contexts whose primitives are shlock's.

``get_context(method)`` is multiprocessing's context of that start method, in which Lock, RLock, Semaphore,
BoundedSemaphore, Condition, Event and Barrier are ours, and with them the ones inside Queue, JoinableQueue, SimpleQueue,
Pool, Value and Array.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import cache
from multiprocessing import context as mp_context
from typing import Any

from . import synchronize

__all__ = ["get_context"]


class _Primitives(mp_context.BaseContext):
    """The factories of a context.  They take what ours take beyond multiprocessing's arguments, too."""

    #: What a lock that multiprocessing's own code makes does when its owner dies; None is the default, "warn".
    _on_abandoned: synchronize.Policy | None = None

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

        return Pool(processes, initializer, initargs, maxtasksperchild, context=_context(self._method, "ignore"))

    _method: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _context, (self._method, self._on_abandoned)

    def get_context(self, method: str | None = None) -> Any:
        return self if method is None else get_context(method)


@cache
def _context(method: str, on_abandoned: synchronize.Policy | None) -> Any:
    """The one context for a start method; ValueError if there is no such method."""
    base = type(multiprocessing.get_context(method))
    cls = type(f"Shlock{base.__name__}", (_Primitives, base), {"_method": method, "_on_abandoned": on_abandoned})
    return cls()


def get_context(method: str | None = None) -> Any:
    """A multiprocessing context that uses shlock's primitives.

    method  "fork", "spawn", "forkserver", or None for multiprocessing's default at the time of the call
    """
    if method is None:
        method = multiprocessing.get_start_method()
    return _context(method, None)
