"""The demo's parent: starts the workers and chaos, replaces the killed, notices a hang, cleans up, and judges.

    pass      the whole folder once, on a new table, with a new set of workers
    run       passes until the wanted time is over, then a sequential run to compare every pass with

The parent never takes the lock itself, so that no lock can hang it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Literal, TextIO

from .chaos import Chaos
from .folder import DemoError, File, Listing, digest_of, list_files
from .table import Phase, Result, State, Table, Word
from .workers import AnyLock, work

__all__ = ["Death", "HangError", "Outcome", "Settings", "SignalledError", "run"]

_TICK = 0.1
"""How often progress is shown and a hang looked for (seconds)."""


@dataclass(frozen=True)
class Settings:
    """What to run. Times in seconds."""

    folder: Path
    lock: Literal["shlock", "multiprocessing"] = "shlock"
    workers: int = 4
    chaos: bool = True
    kills_per_second: float = 20.0
    hangs: bool = True
    """Chaos also stops workers inside (SIGSTOP) and leaves them so, for the supervisor to remove at their deadline."""
    lease: float = 0.1
    """How long a worker may hold the lock (shlock's only)."""
    seed: int = 0
    seconds: float = 20.0
    """Begin another pass over the folder until this much time has gone by; there is always one."""
    timeout: float = 5.0
    """Give up when nobody has entered the critical section for this long."""


@dataclass(frozen=True)
class Death:
    """A worker that was killed, and where it was."""

    name: str
    pid: int
    phase: Phase


class SignalledError(Exception):
    """A signal asked the demo to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class HangError(Exception):
    """Nothing has moved for ``Settings.timeout`` seconds; the message says who died holding the lock if known."""


@dataclass
class Outcome:
    """What a run has come to. ``problems`` is empty if and only if all is well."""

    settings: Settings
    listing: Listing
    passes: int = 0
    seconds: float = 0.0
    deaths: list[Death] = field(default_factory=list)
    statistics: Counter[Word] = field(default_factory=Counter)
    """Sums over the passes; for LONGEST_WAIT_NS the maximum."""
    changed: int = 0
    """Files that somebody else wrote during the run, which are not compared."""
    problems: list[str] = field(default_factory=list)

    @property
    def kills_by_phase(self) -> Counter[Phase]:
        """How many workers were killed in each phase."""
        return Counter(death.phase for death in self.deaths)

    @property
    def kills_inside(self) -> int:
        """How many workers were killed while they certainly held the lock."""
        return sum(death.phase.inside for death in self.deaths)

    def add(self, table: Table) -> None:
        """Add a pass's statistics, finished or not."""
        for word in (
            Word.SECTIONS, Word.TOLD, Word.ROLLED_BACK, Word.TAKEN_BACK, Word.WAITS, Word.HUNG, Word.REMOVED,
        ):  # fmt: skip
            self.statistics[word] += table.statistic(word)
        longest = max(self.statistics[Word.LONGEST_WAIT_NS], table.statistic(Word.LONGEST_WAIT_NS))
        self.statistics[Word.LONGEST_WAIT_NS] = longest


def run(settings: Settings, progress: TextIO | None = None) -> Outcome:
    """Run the demo to its end and judge it; blocks for some ``settings.seconds``.

    Progress goes to ``progress`` (default stderr). Raises DemoError when it cannot start or a worker fails by itself,
    and SignalledError on SIGINT and SIGTERM. No process and no shared memory is left behind in any case. A hang is no
    exception here: it is in ``Outcome.problems``.
    """
    outcome = Outcome(settings, list_files(settings.folder))
    files = outcome.listing.files
    line = _ProgressLine(sys.stderr if progress is None else progress)
    lock = _new_lock(settings)
    started = time.monotonic()
    passes: list[list[Result]] = []
    with _signals_noted() as signals, line:
        try:
            while not passes or time.monotonic() - started < settings.seconds:
                passes.append(_Pass(outcome, lock, line, signals).run())
                outcome.passes += 1
        except HangError as hang:
            outcome.problems.append(str(hang))
        outcome.seconds = time.monotonic() - started
        if not outcome.problems:
            line.show("comparing with a sequential run", now=True)
            _compare(outcome, files, passes, signals)
    return outcome


def _new_lock(settings: Settings) -> AnyLock:
    if settings.lock == "multiprocessing":
        return multiprocessing.get_context("fork").Lock()
    import shlock  # the demo is part of the package: at the top this would be a circle

    # The demo looks at ``abandoned`` after each acquire, which is all that a warning could remind it of.
    lock: AnyLock = shlock.Lock(on_abandoned="ignore", lease=settings.lease)
    return lock


class _Pass:
    """One pass over the folder: the processes that live meanwhile, and their table."""

    def __init__(self, outcome: Outcome, lock: AnyLock, line: _ProgressLine, signals: list[int]) -> None:
        self._outcome = outcome
        self._settings = outcome.settings
        self._lock = lock
        self._line = line
        self._signals = signals
        self._context = multiprocessing.get_context("fork")
        self._files = outcome.listing.files
        self._table = Table(len(self._files), self._settings.workers)
        self._workers: dict[int, ForkProcess] = {}
        self._chaos: Chaos | None = None
        self._started = 0
        self._moved = (-1, 0.0)
        """The count of critical sections when it was last seen to change, and when that was (monotonic seconds)."""

    def run(self) -> list[Result]:
        """Run the pass; whatever happens, nothing of it is left afterwards."""
        try:
            self._supervise()
            self._outcome.problems += self._table.violations()
            return [self._table.result(i) for i in range(len(self._files))]
        finally:
            if self._chaos is not None:
                self._chaos.stop()
            for process in self._workers.values():
                process.kill()
                process.join()
                process.close()
            self._outcome.add(self._table)
            self._table.close()

    def _supervise(self) -> None:
        settings = self._settings
        if settings.chaos:
            seed = settings.seed + self._outcome.passes
            self._chaos = Chaos(self._context, self._table, settings.kills_per_second, seed, hangs=settings.hangs)
        for slot in range(settings.workers):
            self._start(slot)
        while self._workers:
            sentinels = {process.sentinel: slot for slot, process in self._workers.items()}
            watched = [*sentinels, *([self._chaos.sentinel] if self._chaos else [])]
            for ended in connection.wait(watched, timeout=_TICK):
                assert isinstance(ended, int)
                if ended not in sentinels:
                    raise DemoError("the chaos process has failed")
                self._bury(sentinels[ended])
            if self._signals:
                raise SignalledError(self._signals[0])
            self._show_progress()
            self._look_for_hang()

    def _start(self, slot: int) -> None:
        self._started += 1
        self._table.set_phase(slot, Phase.STARTING)
        arguments = (self._table, self._lock, self._files, slot, self._started, os.getpid())
        process = self._context.Process(target=work, args=arguments, name=f"worker-{slot}", daemon=True)
        process.start()
        self._workers[slot] = process
        assert process.pid is not None
        if self._chaos is not None:
            self._chaos.target(slot, process.pid)

    def _bury(self, slot: int) -> None:
        """A worker has ended: replace it if it was killed."""
        process = self._workers.pop(slot)
        process.join()
        name, pid, exitcode = process.name, process.pid, process.exitcode
        process.close()
        if exitcode == -signal.SIGKILL:
            self._outcome.deaths.append(Death(name, pid or 0, self._table.phase(slot)))
            self._start(slot)
        elif exitcode:
            raise DemoError(f"{name} (pid {pid}) failed with exit status {exitcode}")

    def _look_for_hang(self) -> None:
        sections, now = self._table.statistic(Word.SECTIONS), time.monotonic()
        if sections != self._moved[0]:
            self._moved = (sections, now)
        elif now - self._moved[1] > self._settings.timeout:
            raise HangError(self._describe_hang())

    def _describe_hang(self) -> str:
        waiting = sum(self._table.phase(slot) is Phase.ENTERING for slot in self._workers)
        text = f"hung: nothing has moved for {self._settings.timeout:g} s, {waiting} workers wait for the lock"
        if inside := [death for death in self._outcome.deaths if death.phase.inside]:
            last = inside[-1]
            text += f"; {last.name} (pid {last.pid}) was the last to be killed inside the critical section"
            text += f" ({last.phase.name.lower()})"
            if self._settings.lock == "multiprocessing":
                text += " and multiprocessing.Lock waits for it for ever"
        elif self._settings.lock == "multiprocessing" and self._table.statistic(Word.HUNG):
            text += "; a worker was stopped inside the critical section, and nobody removes it"
        elif maybe := [death for death in self._outcome.deaths if death.phase.maybe_inside]:
            first = maybe[0]
            text += f"; {first.name} (pid {first.pid}) was killed as it took the lock or gave it back"
        if self._settings.lock == "shlock":
            text += f"; the lock is {self._lock!r}"
        return text

    def _show_progress(self) -> None:
        outcome, table = self._outcome, self._table
        told = outcome.statistics[Word.TOLD] + table.statistic(Word.TOLD)
        hung = outcome.statistics[Word.HUNG] + table.statistic(Word.HUNG)
        removed = outcome.statistics[Word.REMOVED] + table.statistic(Word.REMOVED)
        waits = outcome.statistics[Word.WAITS] + table.statistic(Word.WAITS)
        longest = max(outcome.statistics[Word.LONGEST_WAIT_NS], table.statistic(Word.LONGEST_WAIT_NS))
        self._line.show(
            f"pass {outcome.passes + 1}: {table.statistic(Word.COUNT)}/{table.files} files,"
            f" {len(outcome.deaths)} kills ({outcome.kills_inside} inside),"
            f" {hung} hung ({removed} removed), {told} recoveries,"
            f" {waits} waits <= {longest / 1e6:.0f} ms"
        )


def _compare(outcome: Outcome, files: Sequence[File], passes: list[list[Result]], signals: list[int]) -> None:
    """Hash everything once more, one file after the other, and compare with every pass."""
    for index, file in enumerate(files):
        if signals:
            raise SignalledError(signals[0])
        expected = digest_of(file.path)
        wrong = [n for n, results in enumerate(passes, 1) if (results[index].size, results[index].digest) != expected]
        lost = [n for n, results in enumerate(passes, 1) if results[index].state is not State.DONE]
        if lost:
            outcome.problems.append(f"{file.path!r} is lost in pass {lost[0]}: it is not in state DONE")
        elif wrong and file.changed():
            outcome.changed += 1
        elif wrong:
            outcome.problems.append(f"{file.path!r} has another size or digest in pass {wrong[0]} than in the sequential run")


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in a list: an exception at any instant would leave no clean-up that can be relied on."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield noted
        return
    old = {signum: signal.signal(signum, lambda n, _: noted.append(n)) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in old.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's


class _ProgressLine:
    """A line that is rewritten on a terminal, and a new line now and then elsewhere."""

    _SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rewrites = stream.isatty()
        self._last = time.monotonic()

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(self, *args: object) -> None:
        if self._rewrites:
            self._write("\r\x1b[K")

    def show(self, text: str, *, now: bool = False) -> None:
        if self._rewrites:
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80  # some terminals say 0
            self._write("\r" + text[: columns - 1] + "\x1b[K")
        elif now or time.monotonic() - self._last >= self._SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._write(text + "\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # nobody is looking any more: no reason to stop working
            pass
