"""The demo's parent: starts workers, reader and chaos, replaces the killed, notices a hang, cleans up, and judges.

    pass      the whole folder once, on a new table, with a new set of workers
    run       passes until the wanted time is over, then a sequential run to compare every pass with

While others are at work the parent takes no lock, so that no lock can hang it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Literal, TextIO

from .. import Lock, Queue
from .chaos import Chaos
from .folder import DemoError, File, Listing, digest_of, list_files
from .gathered import Gathered, record_of
from .stream import Stream
from .table import Phase, Result, Table, Word
from .workers import AnyLock, Shared, read, work

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
    """A worker, or a reader, that was killed, and where it was."""

    name: str
    pid: int
    phase: Phase


@dataclass(frozen=True)
class Found:
    """What a pass has found out: the table's results and the Block's records, both in the order of the files."""

    results: list[Result]
    records: list[bytes]


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
    checksum: str = ""
    """SHA-256 of all names, sizes and digests that were compared, if all is well."""
    problems: list[str] = field(default_factory=list)

    @property
    def kills_by_phase(self) -> Counter[Phase]:
        """How many processes were killed in each phase."""
        return Counter(death.phase for death in self.deaths)

    @property
    def kills_inside(self) -> int:
        """How many workers were killed while they certainly held the lock."""
        return sum(death.phase.inside for death in self.deaths)

    @property
    def kills_with_item(self) -> int:
        """How many workers were killed while they certainly had an item that was not acknowledged."""
        return sum(death.phase.has_item for death in self.deaths)

    def add(self, table: Table) -> None:
        """Add a pass's statistics, finished or not."""
        for word in (
            Word.SECTIONS, Word.TOLD, Word.ROLLED_BACK, Word.GIVEN_AGAIN, Word.THERE_ALREADY, Word.WAITS, Word.HUNG,
            Word.REMOVED,
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
    passes: list[Found] = []
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
    # The demo looks at ``abandoned`` after each acquire, which is all that a warning could remind it of.
    lock: AnyLock = Lock(on_abandoned="ignore", lease=settings.lease)
    return lock


class _Pass:
    """One pass over the folder: the processes that live meanwhile, and what they share."""

    def __init__(self, outcome: Outcome, lock: AnyLock, line: _ProgressLine, signals: list[int]) -> None:
        self._outcome = outcome
        self._settings = outcome.settings
        self._line = line
        self._signals = signals
        self._context = multiprocessing.get_context("fork")
        files, workers = outcome.listing.files, self._settings.workers
        self._reader = workers  # the slot behind those of the workers
        items = Queue()
        items.put_many((index, file.path) for index, file in enumerate(files))
        streams = [Stream() for _ in range(workers)]
        gathered = Gathered(len(files))
        self._table = Table(len(files), workers + 1)
        self._shared = Shared(items, streams, lock, self._table, gathered)
        self._processes: dict[int, ForkProcess] = {}
        self._chaos: Chaos | None = None
        self._started = 0
        self._moved = (-1, 0.0)
        """The count of critical sections when it was last seen to change, and when that was (monotonic seconds)."""

    def run(self) -> Found:
        """Run the pass; whatever happens, nothing of it is left afterwards."""
        table, gathered = self._table, self._shared.gathered
        try:
            self._supervise()
            self._outcome.problems += table.violations() + gathered.violations()
            return Found([table.result(i) for i in range(table.files)], gathered.records())
        finally:
            if self._chaos is not None:
                self._chaos.stop()
            for process in self._processes.values():
                process.kill()
                process.join()
                process.close()
            self._outcome.add(table)
            table.close()

    def _supervise(self) -> None:
        settings = self._settings
        if settings.chaos:
            seed = settings.seed + self._outcome.passes
            self._chaos = Chaos(self._context, self._table, settings.kills_per_second, seed, hangs=settings.hangs)
        for slot in (self._reader, *range(settings.workers)):
            self._start(slot)
        while self._processes.keys() > {self._reader}:
            sentinels = {process.sentinel: slot for slot, process in self._processes.items()}
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
        """Start the worker of a slot, or the reader, or the replacement of one that was killed."""
        self._started += 1
        target: Callable[..., None]
        arguments: tuple[Any, ...]
        if slot == self._reader:
            name, phase, target, arguments = "reader", Phase.READING, read, ()
        else:
            name, phase, target, arguments = f"worker-{slot}", Phase.STARTING, work, (slot, self._started)
        self._table.set_phase(slot, phase)
        process = self._context.Process(target=target, args=(self._shared, *arguments, os.getpid()), name=name, daemon=True)
        process.start()
        self._processes[slot] = process
        assert process.pid is not None
        if self._chaos is not None:
            self._chaos.target(slot, process.pid)

    def _bury(self, slot: int) -> None:
        """A process has ended: replace it if it was killed."""
        process = self._processes.pop(slot)
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
        waiting = sum(self._table.phase(slot) is Phase.ENTERING for slot in self._processes)
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
            text += f"; the lock is {self._shared.lock!r}"
        return text

    def _show_progress(self) -> None:
        outcome, table = self._outcome, self._table
        told = outcome.statistics[Word.TOLD] + table.statistic(Word.TOLD)
        hung = outcome.statistics[Word.HUNG] + table.statistic(Word.HUNG)
        removed = outcome.statistics[Word.REMOVED] + table.statistic(Word.REMOVED)
        again = outcome.statistics[Word.GIVEN_AGAIN] + table.statistic(Word.GIVEN_AGAIN)
        waits = outcome.statistics[Word.WAITS] + table.statistic(Word.WAITS)
        longest = max(outcome.statistics[Word.LONGEST_WAIT_NS], table.statistic(Word.LONGEST_WAIT_NS))
        self._line.show(
            f"pass {outcome.passes + 1}: {table.statistic(Word.COUNT)}/{table.files} files,"
            f" {len(outcome.deaths)} kills ({outcome.kills_inside} inside),"
            f" {hung} hung ({removed} removed), {told} recoveries, {again} items again,"
            f" {waits} waits <= {longest / 1e6:.0f} ms"
        )


def _compare(outcome: Outcome, files: Sequence[File], passes: Sequence[Found], signals: list[int]) -> None:
    """Hash everything once more, one file after the other, and compare names, sizes and digests with every pass."""
    checksum = hashlib.sha256()
    for index, file in enumerate(files):
        if signals:
            raise SignalledError(signals[0])
        expected = digest_of(file.path)
        record = record_of(file.path, *expected)
        lost = wrong = None
        for number, found in enumerate(passes, 1):
            result, gathered = found.results[index], found.records[index]
            if not (result.commits and any(gathered)):
                lost = lost or f"is lost in pass {number}: it is missing in the {'Block' if result.commits else 'table'}"
            elif gathered != record:
                wrong = wrong or f"has another name, size or digest in the Block of pass {number} than in the sequential run"
            elif (result.size, result.digest) != expected:
                wrong = wrong or f"has another size or digest in pass {number} than in the sequential run"
        if lost:
            outcome.problems.append(f"{file.path!r} {lost}")
        elif wrong and file.changed():
            outcome.changed += 1
        elif wrong:
            outcome.problems.append(f"{file.path!r} {wrong}")
        else:
            checksum.update(record)
    if not outcome.problems:
        outcome.checksum = checksum.hexdigest()


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
