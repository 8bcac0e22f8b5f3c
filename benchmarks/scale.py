"""Is the ten-thousandth lock as cheap as the first one, with a thousand processes and a thousand parked waiters about?

Two domains are compared within the same rounds: a small one, of one lock and two processes, and a large one.  Of each, a host
opens the locks; the other processes, the attendants, have opened the domain too and are blocked in a read until they are told
to wait for a lock.

    open     a lock of a name that is there
    pair     acquire() with release(), nobody else wanting the lock
    release  the call that finds a waiter and wakes it: with one waiter, with one and everybody else parked for other locks,
             with everybody parked for this one
    passage  from one waiter to the next one, when everybody waits for the same lock, or one does
    idle     processor time of the attendants while they are parked, each for a lock of its own
    ps       ``shlock ps``, with all of that; and bytes of shared memory for each lock

Flat means: at most twice as much in the large domain.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import shlock
from shlock import _layout, _names, snapshot
from shlock._parking import parking_of

from .contended import _cpu_of
from .crew import Board, Crew, Host
from .peers import Scratch
from .report import NO_FIGURE, Findings, Table, number, quartiles, ratio
from .rounds import Series, turns
from .uncontended import USAGES, fastest

NAMES = 10_000
PROCESSES, PROCESSES_QUICK = 1000, 200  # as many waiters
ROUNDS, ROUNDS_QUICK = 9, 3
BATCHES, BATCHES_QUICK = 15, 5
PASSES = 15  # of one waiter, in each round: the median counts
OTHERS = 900  # locks for which attendants are parked: they share their segment, and so the table of spots, with the first one
IDLE_S, IDLE_S_QUICK = 3.0, 1.0
PATIENCE_S = 120.0
SPARE_DESCRIPTORS = 200

SMALL, LARGE = "one lock, two processes", "large"
FIRST = "first"

_READY, _DONE = range(2)  # words of an attendant's row
_FOR_ITS_OWN, _FOR_THE_FIRST = b"o", b"f"


def name_of(number: int) -> str:
    return f"lock-{number:05}" if number else FIRST


@dataclass(frozen=True)
class World:
    """A domain, its attendants' rows, and the pipe from which each of them reads what to wait for."""

    domain: str
    names: int
    board: Board
    reader: int
    writer: int

    @classmethod
    def make(cls, scratch: Scratch, names: int, attendants: int) -> World:
        domain = scratch.name()
        scratch.at_exit(lambda: snapshot.clean(domain))
        return cls(domain, names, Board(attendants), *os.pipe())

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)
        self.board.close()


def _attend(world: World, worker: int) -> None:
    # Descriptors of the measurement, made later than the pipe: as many as there are processes.  ``shlock ps`` looks at each.
    os.closerange(world.writer + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    words, row = world.board.words, world.board.row(worker)
    own = shlock.Lock(name_of(1 + worker % OTHERS) if world.names > OTHERS else FIRST, domain=world.domain)
    first = shlock.Lock(FIRST, domain=world.domain)
    words[row + _READY] = 1
    while order := os.read(world.reader, 1):
        with own if order == _FOR_ITS_OWN else first:
            pass
        words[row + _DONE] += 1


class _Owner:
    """The host of a world: it has opened all the locks, and answers questions."""

    def __init__(self, world: World, batches: int) -> None:
        self.world = world
        self.batches = batches
        self.counts: dict[str, int] = {}
        self.locks: list[Any] = []
        self.held: list[Any] = []

    def create(self) -> list[int]:
        """ns for each name."""
        taken = []
        for index in range(self.world.names):
            start = time.perf_counter_ns()
            self.locks.append(shlock.Lock(name_of(index), domain=self.world.domain))
            taken.append(time.perf_counter_ns() - start)
        return taken

    def open(self, name: str) -> float:
        def timer(count: int) -> int:
            start = time.perf_counter_ns()
            for _ in range(count):
                shlock.Lock(name, domain=self.world.domain)
            return time.perf_counter_ns() - start

        return fastest(timer, self.batches, self.counts, "open" + name)

    def pair(self, number: int) -> float:
        lock = self.locks[number]
        timer = USAGES["acquire/release"]
        return fastest(lambda count: timer(lock, count), self.batches, self.counts, f"pair{number}")

    def passes(self, waiters: int, times: int) -> tuple[float, float]:
        """ns of a release, and ns until the last waiter has left, for each of them; medians."""
        lock, words = self.locks[0], self.world.board.words
        releases, passages = [], []
        for _ in range(times):
            done = self._done()
            lock.acquire()
            self._order(_FOR_THE_FIRST, waiters)
            _until(lambda: len(self._parking().in_line(lock._block.index)) == waiters)
            start = time.perf_counter_ns()
            lock.release()
            releases.append(time.perf_counter_ns() - start)
            last = done + waiters
            _until(lambda last=last: self._done() == last, 0.0002)  # type: ignore[misc]
            passages.append((time.perf_counter_ns() - start) / waiters)
        assert words[Board.START] == 0
        return statistics.median(releases), statistics.median(passages)

    def park(self, waiters: int) -> int:
        """Have so many attendants wait for locks of their own."""
        self.held = self.locks[1 : 1 + OTHERS]
        for lock in self.held:
            lock.acquire()
        self._order(_FOR_ITS_OWN, waiters)
        _until(lambda: self._parked() == waiters)
        return waiters

    def unpark(self) -> None:
        done, parked = self._done(), self._parked()
        for lock in self.held:
            lock.release()
        _until(lambda: self._done() == done + parked)

    def _parking(self) -> Any:
        return parking_of(self.locks[0]._block.arena)

    def _parked(self) -> int:
        parking = self._parking()
        states = parking.words.view[parking.state_first : parking.state_first + parking.spots].tolist()
        return sum(1 for state in states if state & _layout.STATE)

    def _order(self, what: bytes, count: int) -> None:
        os.write(self.world.writer, what * count)

    def _done(self) -> int:
        board = self.world.board
        return sum(board.words[board.row(worker) + _DONE] for worker in range(board.workers))


def _until(condition: Callable[[], bool], nap_s: float = 0.002) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {PATIENCE_S:g} s")
        time.sleep(nap_s)


def _setup(world: World, batches: int) -> Callable[[tuple[Any, ...]], Any]:
    owner = _Owner(world, batches)
    return lambda question: getattr(owner, question[0])(*question[1:])


def bytes_of(domain: str) -> int:
    """Of the segments of a domain; not of semaphores, of which there is one for each thread that is blocked."""
    first = _names.segment_name(domain)
    folder = Path(snapshot.SHM_FOLDER)
    return sum((folder / name).stat().st_size for name in os.listdir(folder) if name.split("+")[0] == first)


def _ps() -> float:
    """ns of ``shlock ps``."""
    start = time.perf_counter_ns()
    subprocess.run([sys.executable, "-m", "shlock", "ps"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter_ns() - start


#: What is compared: of which domain, and what is asked of its host.  The first one of each is the base.
MEASURES: dict[str, dict[str, tuple[str, tuple[Any, ...]]]] = {
    "open": {
        SMALL: (SMALL, ("open", FIRST)),
        "the first name": (LARGE, ("open", FIRST)),
        "the last name": (LARGE, ("open", name_of(NAMES - 1))),
    },
    "pair": {
        SMALL: (SMALL, ("pair", 0)),
        "the first lock": (LARGE, ("pair", 0)),
        "the last lock": (LARGE, ("pair", NAMES - 1)),
    },
}
ONE_WAITER, OTHERS_PARKED, ALL_PARKED = "one waiter", "one waiter, the others parked elsewhere", "all waiting for it"
PASSAGES = (ONE_WAITER, OTHERS_PARKED, ALL_PARKED)


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; about 15 s when quick (200 processes), else a minute."""
    processes, rounds, batches = (PROCESSES_QUICK, ROUNDS_QUICK, BATCHES_QUICK) if quick else (PROCESSES, ROUNDS, BATCHES)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < processes + SPARE_DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, processes + SPARE_DESCRIPTORS), hard))
    series = {measure: {case: Series() for case in cases} for measure, cases in MEASURES.items()}
    series |= {measure: {case: Series() for case in PASSAGES} for measure in ("release", "passage")}
    series["ps"] = {SMALL: Series(), LARGE: Series()}
    with (
        Crew() as crew,
        closing(World.make(scratch, 1, 1)) as little,
        closing(World.make(scratch, NAMES, processes)) as great,
        closing(Host(partial(_setup, little, batches))) as small,
        closing(Host(partial(_setup, great, batches))) as large,
    ):
        hosts = {SMALL: small, LARGE: large}
        small.ask(("create",), PATIENCE_S)
        created = large.ask(("create",), PATIENCE_S)
        _attach(crew, little)
        _measure_ps(series["ps"][SMALL], rounds)
        _attach(crew, great)
        for measure, cases in MEASURES.items():
            for index, case in turns(list(cases), rounds):
                world, question = cases[case]
                series[measure][case].values[index] = hosts[world].ask(question, PATIENCE_S)
        _measure_passages(series, hosts, (ONE_WAITER, ALL_PARKED), rounds, processes)
        large.ask(("park", processes - 1), PATIENCE_S)
        idle = _idle(crew, IDLE_S_QUICK if quick else IDLE_S)
        _measure_passages(series, hosts, (OTHERS_PARKED,), rounds, processes)
        _measure_ps(series["ps"][LARGE], rounds)
        large.ask(("unpark",), PATIENCE_S)
        size = bytes_of(great.domain)
    return _findings(series, created, idle, size, processes)


def _attach(crew: Crew, world: World) -> None:
    for worker in range(world.board.workers):
        crew.start(_attend, world, worker)
    crew_rows = [world.board.row(worker) + _READY for worker in range(world.board.workers)]
    world.board.await_all(crew_rows, PATIENCE_S, crew)


def _measure_passages(
    series: dict[str, dict[str, Series]], hosts: dict[str, Host], cases: tuple[str, ...], rounds: int, processes: int
) -> None:
    questions = {
        ONE_WAITER: (SMALL, ("passes", 1, PASSES)),
        OTHERS_PARKED: (LARGE, ("passes", 1, PASSES)),
        ALL_PARKED: (LARGE, ("passes", processes, 1)),
    }
    for index, case in turns(cases, rounds):
        world, question = questions[case]
        found = hosts[world].ask(question, PATIENCE_S)
        for measure, value in zip(("release", "passage"), found, strict=True):
            series[measure][case].values[index] = value


def _measure_ps(series: Series, rounds: int) -> None:
    for index in range(rounds):
        series.values[index] = _ps()


def _idle(crew: Crew, seconds: float) -> float:
    """Share of one core that all attendants use together."""

    def used() -> int:
        return sum(_cpu_of(member.pid) for member in crew.members)

    before, start = used(), time.monotonic_ns()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic_ns() - start)


def _findings(series: dict[str, dict[str, Series]], created: list[int], idle: float, size: int, processes: int) -> Findings:
    rows = []
    data: dict[str, Any] = {"names": NAMES, "processes": processes, "cells": {}}
    for measure, cases in series.items():
        base = cases[next(iter(cases))]
        for case, one in cases.items():
            found, summary = one.ratio_to(base), one.spread()
            figures = [number(summary.median / 1e3), quartiles(summary, 1e3)] if summary else [NO_FIGURE] * 2
            rows.append([f"{measure}: {case}", *figures, ratio(found)])
            data["cells"][f"{measure}, {case}"] = one.as_json() | {"ratio": found and found.median}
    early, late = (statistics.median(part) for part in (created[: NAMES // 10], created[-NAMES // 10 :]))
    data |= {"created_ns": [early, late], "idle_share": idle, "bytes_per_lock": size / NAMES}
    title = f"Scale: {NAMES:,} named locks, {processes:,} processes, as many parked waiters"
    facts = [
        f"creating a name: {number(early / 1e3)} us for the first {NAMES // 10:,}, {number(late / 1e3)} us for the last",
        f"shared memory: {size / NAMES:.0f} bytes for each named lock",
        f"{processes - 1:,} processes parked for locks of their own use {idle * 100:.1f} % of one core",
        "passage: for each waiter, until the last one has left",
    ]
    head = ["", "us", "p25..p75", "ratio"]
    return Findings([Table(title, head, rows, [f"ratio: to {SMALL}", *facts])], data)
