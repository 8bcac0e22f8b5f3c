"""Making a lock and dropping it, and attaching one by name, in ns.

"use" adds one ``with lock:`` in between, because some contestants put the work off until then (a file lock's
constructor opens nothing). "cold" is the first such turn in a process just forked, whose parent has the module
imported but has never opened that lock or its domain. The collector stays on, unlike in timeit: a lock that leaves
cycles behind shall pay for them. Locks whose close is explicit are closed within the turn.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from .crew import FORK, Board, CellFailed, Crew, Host, describe
from .peers import BASELINE, Scratch, make_shmlock, start_manager, unlink_segment
from .peers import missing as why_missing
from .report import NO_FIGURE, Findings, Table, failure_notes, missing_notes, number, quartiles, ratio
from .robust import RobustMutex
from .rounds import Series, turns
from .uncontended import fastest

ROUNDS, ROUNDS_QUICK = 15, 5
BATCHES, BATCHES_QUICK = 25, 10  # of each kind, per contestant and round; the fastest counts
TIMEOUT_S = 10.0
MEASURES = ("drop", "use", "cold")


def _nothing(_: object = None) -> None:
    pass


@dataclass(frozen=True)
class Maker:
    """How to make one lock and how to drop it; `prepare`'s result is kept while the warm turns run."""

    make: Callable[[], Any]
    drop: Callable[[Any], None] = _nothing
    prepare: Callable[[], object] = _nothing
    close: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Contestant:
    """A `Maker` by name; `open` runs in the parent and may leave a process in the crew to keep a name alive."""

    name: str
    open: Callable[[Scratch, Crew], Maker]
    module: str = ""
    attribute: str = ""


def _plain(make: Callable[[], Any]) -> Callable[[Scratch, Crew], Maker]:
    return lambda scratch, crew: Maker(make)


def _shlock_anonymous(_: Scratch, __: Crew) -> Maker:
    return Maker(importlib.import_module("shlock").Lock)


def _robust(_: Scratch, __: Crew) -> Maker:
    return Maker(RobustMutex, RobustMutex.close)


def _posix_ipc_anonymous(_: Scratch, __: Crew) -> Maker:
    posix_ipc = importlib.import_module("posix_ipc")

    def make() -> Any:
        semaphore = posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=1)
        semaphore.unlink()
        return semaphore

    return Maker(make, lambda semaphore: semaphore.close())


def _manager(scratch: Scratch, _: Crew) -> Maker:
    manager = start_manager(scratch)
    return Maker(manager.Lock, close=manager.shutdown)


def _by_path(module: str, attribute: str) -> Callable[[Scratch, Crew], Maker]:
    def open_(scratch: Scratch, _: Crew) -> Maker:
        path = scratch.path()
        make = getattr(importlib.import_module(module), attribute)
        return Maker(lambda: make(str(path)), close=lambda: path.unlink(missing_ok=True))

    return open_


def _shmlock(scratch: Scratch, _: Crew) -> Maker:
    name = scratch.name()
    return Maker(lambda: make_shmlock(name), close=lambda: unlink_segment(name))


def _keep_name(make: Callable[[str], Any], board: Board) -> None:
    kept = make("kept")
    board.words[board.row(0)] = 1
    while kept is not None:
        time.sleep(3600)


def _shlock_named(scratch: Scratch, crew: Crew) -> Maker:
    shlock = importlib.import_module("shlock")
    domain = scratch.name()
    clean = importlib.import_module("shlock.snapshot").clean
    scratch.at_exit(lambda: clean(domain))  # At the very end: by then nobody uses the domain any more.

    def make(name: str = "kept") -> Any:
        return shlock.Lock(name, domain=domain)

    # Another process keeps the name, because every child of one that has opened the domain inherits the mapping.
    board = Board(1)
    crew.start(_keep_name, make, board)
    board.await_all([board.row(0)], TIMEOUT_S, crew)
    return Maker(make, prepare=lambda: make("another"))


def _posix_ipc_named(scratch: Scratch, _: Crew) -> Maker:
    posix_ipc = importlib.import_module("posix_ipc")
    name = "/" + scratch.name()
    kept = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=1)

    def close() -> None:
        kept.unlink()
        kept.close()

    return Maker(lambda: posix_ipc.Semaphore(name), lambda semaphore: semaphore.close(), close=close)


ANONYMOUS: tuple[Contestant, ...] = (
    Contestant("shlock.Lock", _shlock_anonymous, "shlock", "Lock"),
    Contestant(BASELINE, _plain(FORK.Lock)),
    Contestant("robust mutex (ctypes)", _robust),
    Contestant("posix_ipc.Semaphore", _posix_ipc_anonymous, "posix_ipc", "Semaphore"),
    Contestant("Manager().Lock", _manager),
)
NAMED: tuple[Contestant, ...] = (
    Contestant("shlock.Lock(name)", _shlock_named, "shlock", "Lock"),
    Contestant("posix_ipc.Semaphore(name)", _posix_ipc_named, "posix_ipc", "Semaphore"),
    Contestant("filelock.FileLock(path)", _by_path("filelock", "FileLock"), "filelock", "FileLock"),
    Contestant(
        "fasteners.InterProcessLock(path)",
        _by_path("fasteners", "InterProcessLock"),
        "fasteners",
        "InterProcessLock",
    ),
    Contestant("shmlock.ShmLock(name)", _shmlock, "shmlock", "ShmLock"),
)


def _time_drop(maker: Maker, count: int) -> int:
    make, drop = maker.make, maker.drop
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        drop(make())
    return time.perf_counter_ns() - start


def _time_use(maker: Maker, count: int) -> int:
    make, drop = maker.make, maker.drop
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        lock = make()
        with lock:
            pass
        drop(lock)
        del lock
    return time.perf_counter_ns() - start


def _setup(maker: Maker, batches: int) -> Callable[[str], float]:
    counts: dict[str, int] = {}
    prepared: list[object] = []

    def answer(measure: str) -> float:
        if measure == "cold":
            return _time_use(maker, 1)
        if not prepared:
            prepared.append(maker.prepare())
        timer = _time_use if measure == "use" else _time_drop
        return fastest(lambda count: timer(maker, count), batches, counts, measure)

    return answer


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; about 5 s when quick, else half a minute."""
    everybody = (*ANONYMOUS, *NAMED)
    missing = {one.name: reason for one in everybody if (reason := why_missing(one.module, one.attribute))}
    batches = BATCHES_QUICK if quick else BATCHES
    series: dict[str, dict[str, Series]] = {measure: {} for measure in MEASURES}
    makers: dict[str, Maker] = {}
    hosts: dict[str, Host] = {}
    try:
        with Crew() as crew:
            try:
                for one in everybody:
                    if one.name in missing:
                        continue
                    try:
                        maker = makers[one.name] = one.open(scratch, crew)
                    except Exception as error:
                        missing[one.name] = describe(error)
                        continue
                    for measure in MEASURES:
                        series[measure][one.name] = Series()
                    hosts[one.name] = Host(partial(_setup, maker, batches))
                for index, name in turns(list(hosts), ROUNDS_QUICK if quick else ROUNDS):
                    for measure in MEASURES:
                        if any(series[each][name].failure for each in MEASURES):
                            continue
                        fresh = Host(partial(_setup, makers[name], batches)) if measure == "cold" else None
                        try:
                            series[measure][name].values[index] = (fresh or hosts[name]).ask(measure, TIMEOUT_S)
                        except CellFailed as failure:
                            series[measure][name].failure = str(failure)
                        finally:
                            if fresh:
                                fresh.close()
            finally:
                for host in hosts.values():
                    host.close()
    finally:
        for maker in makers.values():  # After the crew: nobody keeps a name any more.
            maker.close()
    return _findings(series, missing)


def _findings(series: dict[str, dict[str, Series]], missing: dict[str, str]) -> Findings:
    def row(name: str) -> list[str]:
        cells = [name]
        for measure in MEASURES:
            one = series[measure][name]
            summary = one.spread()
            if summary is None:
                cells += ["failed", NO_FIGURE, NO_FIGURE]
            else:
                found = one.ratio_to(series[measure][BASELINE])
                cells += [number(summary.median / 1e3), quartiles(summary, 1e3), ratio(found)]
        return cells

    def table(title: str, contestants: tuple[Contestant, ...], verb: str, notes: list[str]) -> Table:
        head = ["lock", f"{verb}, us", "p25..p75", "ratio", "with use, us", "p25..p75", "ratio"]
        head += ["cold, us", "p25..p75", "ratio"]
        return Table(title, head, [row(one.name) for one in contestants if one.name in series["use"]], notes)

    note = f"ratio: time over that of making, using and dropping a {BASELINE}; smaller is better"
    failures = {f"{name}, {measure}": one.failure for measure in MEASURES for name, one in series[measure].items()}
    problems = [*failure_notes(failures), *missing_notes(missing)]
    tables = [
        table("Lifecycle: make and drop", ANONYMOUS, "make+drop", [note, *problems]),
        table("Lifecycle: attach by name and drop", NAMED, "attach+drop", [note + " (it has no names)"]),
    ]
    data: dict[str, object] = {
        measure: {
            name: one.as_json() | {"ratio": (found := one.ratio_to(by_name[BASELINE])) and found.median}
            for name, one in by_name.items()
        }
        for measure, by_name in series.items()
    }
    return Findings(tables, {"unit": "ns per turn", **data, "missing": missing})
