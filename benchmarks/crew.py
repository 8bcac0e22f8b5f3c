"""Forked worker processes that cannot outlive, hang or crash the measurement.

Every worker dies with its parent, is killed and joined when its `Crew` or `Host` closes, and is waited for with a
limit. What goes wrong in one becomes a `CellFailed` with a reason short enough for a table.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, Self

FORK = multiprocessing.get_context("fork")
CACHE_LINE_WORDS = 8
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class CellFailed(Exception):
    """One contestant failed in one cell; the text is the reason, for the table."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that happens."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:  # It ended before we had asked.
        os._exit(1)


def describe(error: BaseException) -> str:
    """An exception in one short line, the folders of paths left out: reports are published."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"(?<!\w)/(?:[^\s/]+/)+", "", text)[:120]


def _describe_exit(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


class Board:
    """A page of signed 64-bit words that a parent shares with its forked children.

    `words[0]` to `words[7]` are for the whole crew; worker i has a cache line of its own from `row(i)` on.
    """

    START = 0  # perf_counter_ns at which everybody starts; 0 means not yet
    COUNTER = 1  # incremented without atomics inside the lock under test

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, (workers + 1) * CACHE_LINE_WORDS * 8)
        self.words = memoryview(self._memory).cast("q")

    @staticmethod
    def row(worker: int) -> int:
        return (worker + 1) * CACHE_LINE_WORDS

    def await_all(self, indices: list[int], timeout_s: float, crew: Crew) -> None:
        """Wait until all these words differ from 0; CellFailed when time is up or a worker has failed."""
        limit = time.monotonic() + timeout_s
        while not all(self.words[index] for index in indices):
            crew.raise_failure()
            if time.monotonic() > limit:
                raise CellFailed(f"hang (not ready after {timeout_s:g} s)")
            time.sleep(0.0005)

    def close(self) -> None:
        self.words.release()
        self._memory.close()


class Crew:
    """Workers of one cell. Leaving the `with` block kills and joins whoever is left."""

    def __init__(self) -> None:
        self.members: list[BaseProcess] = []
        self._reader, self._writer = FORK.Pipe(duplex=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.kill()
        for member in self.members:
            member.join()
            member.close()
        self._reader.close()
        self._writer.close()

    def start(self, work: Callable[..., None], *args: object) -> BaseProcess:
        """Fork a worker that does ``work(*args)``."""
        member = FORK.Process(target=self._main, args=(work, args), daemon=True)
        member.start()
        self.members.append(member)
        return member

    def _main(self, work: Callable[..., None], args: tuple[object, ...]) -> None:
        _prepare_worker()
        try:
            work(*args)
        except BaseException as error:
            self._writer.send(describe(error))
            os._exit(1)

    def raise_failure(self, members: list[BaseProcess] | None = None) -> None:
        """Raise CellFailed if one of these workers (default: all) ended in any other way than well."""
        bad = [code for member in members or self.members if (code := member.exitcode)]
        if bad:
            raise CellFailed(self._reader.recv() if self._reader.poll() else _describe_exit(bad[0]))

    def wait(self, members: list[BaseProcess], timeout_s: float) -> None:
        """Wait until these workers have ended well; CellFailed when time is up or one has not."""
        limit = time.monotonic() + timeout_s
        waiting: dict[Any, BaseProcess] = {member.sentinel: member for member in members}
        while waiting:
            left = limit - time.monotonic()
            ended = multiprocessing.connection.wait(list(waiting), max(left, 0))
            if not ended:
                raise CellFailed(f"hang (gave up after {timeout_s:g} s)")
            for sentinel in ended:
                member = waiting.pop(sentinel)
                member.join()
                self.raise_failure([member])


class Host:
    """One contestant in a process of its own, which answers one question at a time.

    Separate processes keep contestants from each other: a crash or a hang costs one row, and CPython's specialised
    bytecode in the timing loops never sees the types of another contestant.
    """

    def __init__(self, setup: Callable[[], Callable[[Any], Any]]) -> None:
        """Fork; the child calls `setup` and then answers with what that returned."""
        self._connection, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_serve, args=(theirs, setup), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: Any, timeout_s: float) -> Any:
        """The child's answer; CellFailed if it raised, died, or did not answer in time."""
        try:
            self._connection.send(question)
            if not self._connection.poll(timeout_s):
                raise CellFailed(f"hang (gave up after {timeout_s:g} s)")
            good, answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise CellFailed(_describe_exit(self._process.exitcode or 0)) from None
        if not good:
            raise CellFailed(answer)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()


def _serve(connection: Any, setup: Callable[[], Callable[[Any], Any]]) -> None:
    _prepare_worker()
    try:
        answer = setup()
        while True:
            connection.send((True, answer(connection.recv())))
    except EOFError:
        pass
    except BaseException as error:
        connection.send((False, describe(error)))


def _prepare_worker() -> None:
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, which then kills us.
    warnings.simplefilter("ignore")
    gc.freeze()
