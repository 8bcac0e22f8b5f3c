"""The workers of the demo, and the reader that sends them the files' contents.

A worker takes a file from the queue, hashes what the reader sends, adds the result to the table under the lock and to the
Block, and only then acknowledges it: a worker that is killed before has not taken it, and another one gets it. So a file is
hashed at least once; that it counts once is due to table and Block, which look whether it is there already.

Any of them may be killed at any instant. Whoever gets the lock next is told so and recovers the table. Nothing here cleans
up, because a killed process cannot.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from .. import Queue
from ..queue import Empty
from .gathered import Gathered, record_of
from .stream import Stream
from .table import Phase, Table

__all__ = ["AnyLock", "Shared", "die_with", "read", "work"]

_PR_SET_PDEATHSIG = 1

_PATIENCE = 0.05
"""How long a worker waits for an item before it looks whether all is done (seconds)."""


class AnyLock(Protocol):
    """What the demo needs of a lock: shlock's and multiprocessing's both have it."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *args: Any) -> None: ...


@dataclass(frozen=True)
class Shared:
    """What the processes of one pass have in common: made by the parent, and inherited."""

    items: Queue
    """The files, as (index, path)."""
    streams: list[Stream]
    """One a slot."""
    lock: AnyLock
    """Guards the table."""
    table: Table
    gathered: Gathered


def work(shared: Shared, slot: int, number: int, parent: int) -> None:
    """Run one worker in its own process. ``number`` is new for every worker; a replacement inherits the ``slot``."""
    _begin(parent)
    table, stream = shared.table, shared.streams[slot]
    while True:
        table.set_phase(slot, Phase.TAKING)
        taken = shared.items.take(timeout=_PATIENCE)
        try:
            with taken as (index, path):
                table.set_phase(slot, Phase.HASHING)
                size, digest = stream.digest_of(path, number, index)
                with _critical_section(shared, slot, number):
                    table.commit(slot, number, index, size, digest, deliveries=taken.deliveries)
                table.set_phase(slot, Phase.GATHERING)
                shared.gathered.add(index, record_of(path, size, digest))
        except Empty:
            # Others may be at work on the last items, and may be killed: then these come back.
            if shared.gathered.is_complete():
                break
    table.set_phase(slot, Phase.DONE)


def read(shared: Shared, parent: int) -> None:
    """Send the workers what they ask for, for ever; in a process of its own."""
    _begin(parent)
    threads = [threading.Thread(target=stream.serve) for stream in shared.streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us all; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the parent dies: a wait for an orphaned lock would outlast it for ever."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


@contextmanager
def _critical_section(shared: Shared, slot: int, number: int) -> Iterator[None]:
    """Hold the lock, with the table recovered first if its last holder died, and say in the table where we are."""
    table, lock = shared.table, shared.lock
    table.set_phase(slot, Phase.ENTERING)
    started_ns = time.monotonic_ns()
    with lock:
        table.set_phase(slot, Phase.ENTERED)
        waited_ns = time.monotonic_ns() - started_ns
        # multiprocessing.Lock has no ``abandoned``; but it never lets anybody in after a death either.
        abandoned = getattr(lock, "abandoned", None)
        removed = abandoned is not None and abandoned.reason == "lease overrun"
        table.enter(slot, number, told=abandoned is not None, waited_ns=waited_ns, removed=removed)
        yield
        table.leave(number)
        table.set_phase(slot, Phase.LEAVING)
