"""The contestants: shlock and what people use today, each behind the same three methods.

A `Peer` makes a lock in the parent (`open`), a worker turns that into its own handle after the fork (`Shared.attach`),
and the parent removes what it left (`Shared.close`). All run with their own defaults, polling intervals included.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import resource_tracker, shared_memory
from multiprocessing.managers import SyncManager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from .crew import FORK, describe, die_with_parent
from .robust import RobustMutex

BASELINE = "multiprocessing.Lock"
OURS = "shlock.Lock"


class LockLike(Protocol):
    """What the measurements use of a lock; nobody's return values matter."""

    def acquire(self) -> Any: ...
    def release(self) -> Any: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None, /) -> Any: ...


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Shared:
    """One lock that forked workers can attach; `helper` is the pid of a process that works for it."""

    attach: Callable[[], Any]
    close: Callable[[], None] = _nothing
    helper: int | None = None


class Scratch:
    """Names and a folder for one run; both are gone when the `with` block ends."""

    def __enter__(self) -> Self:
        # Started before any fork: otherwise each worker that uses SharedMemory would start a tracker of its own.
        resource_tracker.ensure_running()
        self._cleanups = ExitStack()
        self._folder = self._cleanups.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-"))
        self._numbers = itertools.count()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanups.close()

    def at_exit(self, cleanup: Callable[[], object]) -> None:
        """Call this when the block ends, however it ends."""
        self._cleanups.callback(cleanup)

    def name(self) -> str:
        """A new name, unique on this machine."""
        return f"benchmarks-{os.getpid()}-{next(self._numbers)}"

    def path(self) -> Path:
        """A new path in the folder."""
        return Path(self._folder, self.name())


@dataclass(frozen=True)
class Peer:
    """A kind of lock. `short` heads a column; `poll_s` is the longest nap of its waiters, 0 if they are woken."""

    name: str
    short: str
    open: Callable[[Scratch], Shared]
    module: str = ""  # what to import first, and what must be in it; empty: the standard library
    attribute: str = ""
    slow: bool = False  # tens of microseconds for an uncontended pair: measured in fewer cells by --quick
    poll_s: float = 0.0

    def missing(self) -> str | None:
        """Why this peer cannot take part, or None."""
        return missing(self.module, self.attribute)


def missing(module: str, attribute: str) -> str | None:
    """Why this cannot be imported, or None."""
    if not module:
        return None
    try:
        getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        return f"cannot be imported: {describe(error)}"
    return None


def version_of(module: str) -> str | None:
    """The installed version of the distribution that is called like the module."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


def _inherited(make: Callable[[], Any]) -> Callable[[Scratch], Shared]:
    """A lock that workers simply inherit through the fork."""

    def open_(_: Scratch) -> Shared:
        lock = make()
        return Shared(attach=lambda: lock)

    return open_


def _of_module(module: str, attribute: str) -> Callable[[Scratch], Shared]:
    return _inherited(lambda: getattr(importlib.import_module(module), attribute)())


def _never_biased(attribute: str) -> Callable[[Scratch], Shared]:
    """A lock of shlock that stays an ordinary one, however often one process takes it."""

    def open_(_: Scratch) -> Shared:
        lock = getattr(importlib.import_module("shlock"), attribute)()
        return Shared(attach=lambda: never_bias(lock))

    return open_


def never_bias(lock: Any) -> Any:
    """Have this process never bias a lock; the lock."""
    from shlock import _bias

    lock._words.limit = lock._words.credit.cell_contents = _bias.NEVER
    return lock


def bias(lock: Any) -> Any:
    """Bias a lock to this process, whatever SHLOCK_BIAS says; the lock."""
    for _ in range(3):  # this process may have to notice first that an earlier bias was revoked
        lock._words.limit = lock._words.credit.cell_contents = 0
        with lock:
            pass
    if lock._words.door is None:
        raise RuntimeError("this lock cannot be biased: the C library's semaphores, or the system call membarrier, are missing")
    return lock


def _robust(_: Scratch) -> Shared:
    mutex = RobustMutex()
    return Shared(attach=lambda: mutex, close=mutex.close)


def _posix_ipc(scratch: Scratch) -> Shared:
    posix_ipc: ModuleType = importlib.import_module("posix_ipc")
    semaphore = posix_ipc.Semaphore("/" + scratch.name(), posix_ipc.O_CREX, initial_value=1)
    semaphore.unlink()  # As multiprocessing does: the object stays, the name is gone.
    return Shared(attach=lambda: semaphore, close=semaphore.close)


def _by_path(module: str, attribute: str) -> Callable[[Scratch], Shared]:
    """A file lock: each worker opens the file for itself."""

    def open_(scratch: Scratch) -> Shared:
        path = scratch.path()
        make = getattr(importlib.import_module(module), attribute)
        return Shared(attach=lambda: make(str(path)), close=lambda: path.unlink(missing_ok=True))

    return open_


def start_manager(scratch: Scratch) -> SyncManager:
    """A running ``multiprocessing.Manager()`` that dies with this process, its socket in our own folder."""
    manager = SyncManager(str(scratch.path()), ctx=FORK)
    manager.start(initializer=die_with_parent)
    return manager


def _manager(scratch: Scratch) -> Shared:
    manager = start_manager(scratch)
    lock = manager.Lock()
    return Shared(attach=lambda: lock, close=manager.shutdown, helper=manager._process.pid)  # type: ignore[attr-defined]


def _shmlock(scratch: Scratch) -> Shared:
    name = scratch.name()
    return Shared(attach=lambda: make_shmlock(name), close=lambda: unlink_segment(name))


def make_shmlock(name: str) -> Any:
    """A ShmLock that resource trackers do not see, set up as its documentation says for processes that share one."""
    shmlock: ModuleType = importlib.import_module("shmlock")
    if sys.version_info >= (3, 13):
        return shmlock.ShmLock(name, track=False)
    if resource_tracker.register.__module__ == resource_tracker.__name__:
        shmlock.remove_shm_from_resource_tracker("benchmarks-")  # Once, and in workers only.
    return shmlock.ShmLock(name)


def unlink_segment(name: str) -> None:
    """Remove a shared memory segment that a killed process may have left."""
    try:
        segment = shared_memory.SharedMemory(name)
    except FileNotFoundError:
        return
    segment.close()
    segment.unlink()


def _peer(module: str, attribute: str, short: str, open_: Callable[[Scratch], Shared], poll_s: float = 0.0) -> Peer:
    return Peer(f"{module}.{attribute}", short, open_, module, attribute, slow=poll_s > 0, poll_s=poll_s)


LOCKS: tuple[Peer, ...] = (
    _peer("shlock", "Lock", "shlock", _of_module("shlock", "Lock")),
    Peer(BASELINE, "mp.Lock", _inherited(FORK.Lock)),
    Peer("robust mutex (ctypes)", "robust", _robust),
    _peer("posix_ipc", "Semaphore", "posix_ipc", _posix_ipc),
    _peer("filelock", "FileLock", "filelock", _by_path("filelock", "FileLock"), poll_s=0.05),
    _peer("fasteners", "InterProcessLock", "fasteners", _by_path("fasteners", "InterProcessLock"), poll_s=0.1),
    Peer("Manager().Lock", "Manager", _manager, slow=True),
    _peer("shmlock", "ShmLock", "shmlock", _shmlock, poll_s=0.05),
)


class EmptyLock:
    """No lock at all: what `with` costs when the methods are Python. The floor for any lock written in Python."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> bool:
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


FAMILY: tuple[Peer, ...] = (
    Peer(f"{OURS}, never biased", "", _never_biased("Lock"), "shlock", "Lock"),
    _peer("shlock", "RLock", "", _of_module("shlock", "RLock")),
    Peer("shlock.RLock, never biased", "", _never_biased("RLock"), "shlock", "RLock"),
    _peer("shlock", "Semaphore", "", _of_module("shlock", "Semaphore")),
    Peer("multiprocessing.RLock", "", _inherited(FORK.RLock)),
    Peer("multiprocessing.Semaphore", "", _inherited(FORK.Semaphore)),
    Peer("floor: empty Python methods", "", _inherited(EmptyLock)),
)


def present(peers: tuple[Peer, ...]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can take part, and for the others the reason by name."""
    absent = {peer.name: reason for peer in peers if (reason := peer.missing())}
    return [peer for peer in peers if peer.name not in absent], absent
