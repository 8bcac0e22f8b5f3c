"""Several processes that want one lock: passages per second, how evenly shared, the longest wait, CPU per passage.

Each process loops over ``with lock:`` with a busy critical section and nothing outside. Per passage it reads the
clock twice (once before the lock, once inside) and adds 1 to a plain shared counter inside, which afterwards must
agree with the passages: a lock that does not exclude fails here and gets no figures.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass, replace

from .crew import Board, CellFailed, Crew, describe
from .peers import BASELINE, LOCKS, LockLike, Peer, Scratch, Shared, present
from .report import NO_FIGURE, Findings, Table, failure_notes, missing_notes, number, quartiles, ratio
from .rounds import Series, turns

PROCESSES, PROCESSES_QUICK = (1, 2, 4, 8), (1, 2, 8)
SECTIONS_US, SECTIONS_US_QUICK = (0, 2, 10, 100), (0, 2, 100)
ROUNDS, ROUNDS_QUICK, ROUNDS_SLOW = 7, 3, 3
WINDOW_S, WINDOW_S_QUICK = 0.25, 0.1
SLOW_CELLS_QUICK = ((2, 2), (8, 100))  # the slow peers' only cells (processes, us) with --quick
WARM_UP_NS = 20_000_000  # contended already, not counted: what a lock makes when it first has to wait
WATCHDOG_S = 8.0

_READY, _PASSAGES, _IN_WINDOW, _LONGEST_NS, _CPU_NS = range(5)  # words of a worker's row on the board


@dataclass(frozen=True)
class Outcome:
    """One window of one crew. Passages are those that began inside the window; waits and CPU time are in ns."""

    window_s: float
    passages: list[int]
    longest_wait_ns: int
    cpu_ns: int

    @property
    def per_second(self) -> float:
        return sum(self.passages) / self.window_s

    @property
    def shares(self) -> list[float]:
        """Each process's passages as a multiple of the mean, ascending."""
        mean = statistics.fmean(self.passages)
        return sorted(count / mean for count in self.passages) if mean else [0.0] * len(self.passages)

    @property
    def cpu_per_passage_ns(self) -> float:
        return self.cpu_ns / max(1, sum(self.passages))


def _hammer(shared: Shared, board: Board, worker: int, section_ns: int, window_ns: int) -> None:
    lock = shared.attach()
    words, row = board.words, board.row(worker)
    with lock:  # Connections, files and first mappings are made here.
        pass
    gc.disable()
    words[row + _READY] = 1
    while not words[Board.START]:
        time.sleep(0.0005)
    start = words[Board.START]
    warm_up, *_ = _pass_until(start, lock, words, section_ns)
    cpu = time.process_time_ns()
    passages, in_window, longest = _pass_until(start + window_ns, lock, words, section_ns)
    words[row + _CPU_NS] = time.process_time_ns() - cpu
    words[row + _PASSAGES] = warm_up + passages
    words[row + _IN_WINDOW] = in_window
    words[row + _LONGEST_NS] = longest


def _pass_until(end: int, lock: LockLike, words: memoryview, section_ns: int) -> tuple[int, int, int]:
    """Take and release until the clock says `end`: passages, those that began in time, the longest wait in ns."""
    now, counter = time.perf_counter_ns, Board.COUNTER
    passages = in_time = longest = 0
    before = now()
    while before < end:
        with lock:
            inside = now()
            words[counter] += 1
            if section_ns:
                until = inside + section_ns
                while now() < until:
                    pass
        passages += 1
        if inside < end:
            in_time += 1
        if inside - before > longest:
            longest = inside - before
        before = now()
    return passages, in_time, longest


def _cpu_of(pid: int | None) -> int:
    """CPU time of another process in ns, through its CPU clock (the id is MAKE_PROCESS_CPUCLOCK's in the kernel)."""
    return time.clock_gettime_ns((~pid << 3) | 2) if pid else 0


def measure(peer: Peer, scratch: Scratch, processes: int, section_us: float, window_s: float) -> Outcome:
    """Let a crew hammer a new lock for `window_s`; CellFailed if it hangs, crashes, or does not exclude."""
    try:
        shared = peer.open(scratch)
    except Exception as error:
        raise CellFailed(describe(error)) from error
    board = Board(processes)
    rows = [board.row(worker) for worker in range(processes)]
    try:
        with Crew() as crew:
            for worker in range(processes):
                crew.start(_hammer, shared, board, worker, int(section_us * 1000), int(window_s * 1e9))
            board.await_all([row + _READY for row in rows], WATCHDOG_S, crew)
            helper_cpu = _cpu_of(shared.helper)
            board.words[Board.START] = time.perf_counter_ns() + WARM_UP_NS
            crew.wait(crew.members, window_s + WATCHDOG_S)
            helper_cpu = _cpu_of(shared.helper) - helper_cpu
        passages = sum(board.words[row + _PASSAGES] for row in rows)
        if board.words[Board.COUNTER] != passages:
            raise CellFailed(f"does not exclude: counted {board.words[Board.COUNTER]} of {passages}")
        return Outcome(
            window_s,
            [board.words[row + _IN_WINDOW] for row in rows],
            max(board.words[row + _LONGEST_NS] for row in rows),
            sum(board.words[row + _CPU_NS] for row in rows) + helper_cpu,
        )
    finally:
        board.close()
        shared.close()


@dataclass
class Cell:
    """One peer with one number of processes and one critical section, over the rounds."""

    rate: Series
    outcomes: list[Outcome]


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; about 20 s when quick, else 6 minutes."""
    peers, missing = present(LOCKS)
    by_name = {peer.name: peer for peer in peers}
    window_s = WINDOW_S_QUICK if quick else WINDOW_S
    cells: dict[tuple[int, int], dict[str, Cell]] = {}
    for processes in PROCESSES_QUICK if quick else PROCESSES:
        for section_us in SECTIONS_US_QUICK if quick else SECTIONS_US:
            place = (processes, section_us)
            names = [peer.name for peer in peers if not (quick and peer.slow and place not in SLOW_CELLS_QUICK)]
            cells[place] = {name: Cell(Series(), []) for name in names}
            for index, name in turns(names, ROUNDS_QUICK if quick else ROUNDS):
                cell = cells[place][name]
                if cell.rate.failure or (by_name[name].slow and index >= ROUNDS_SLOW):
                    continue
                try:
                    outcome = measure(by_name[name], scratch, processes, section_us, window_s)
                except CellFailed as failure:
                    cell.rate.failure = str(failure)
                else:
                    cell.outcomes.append(outcome)
                    cell.rate.values[index] = outcome.per_second
    return _findings(peers, cells, missing)


def _findings(peers: list[Peer], cells: dict[tuple[int, int], dict[str, Cell]], missing: dict[str, str]) -> Findings:
    others = [peer for peer in peers if peer.name != BASELINE]
    overview = [
        [
            str(processes),
            str(section_us),
            number(summary.median) if (summary := by_name[BASELINE].rate.spread()) else "failed",
            *(_ratio_cell(by_name, peer.name) for peer in others),
        ]
        for (processes, section_us), by_name in cells.items()
    ]
    tables = [
        Table(
            "Contended: throughput as a multiple of multiprocessing.Lock's",
            ["processes", "section, us", "mp.Lock, passages/s", *(peer.short for peer in others)],
            overview,
            ["larger is better; ratios within the same rounds"],
        )
    ]
    for processes in dict.fromkeys(place[0] for place in cells):
        rows = [
            _detail(section_us, name, by_name)
            for (count, section_us), by_name in cells.items()
            if count == processes
            for name in by_name
        ]
        head = ["lock", "section, us", "passages/s", "p25..p75", "ratio"]
        head += ["least share", "largest share", "longest wait, ms", "CPU us/passage"]
        notes = ["shares are multiples of the mean; shares and CPU are medians, the wait is the longest of all rounds"]
        title = f"Contended by {processes} process{'es' if processes > 1 else ''}"
        tables.append(Table(title, head, rows, notes if processes > 1 else []))
    failures = {
        f"{name}, {processes} processes, {section_us} us": cell.rate.failure
        for (processes, section_us), by_name in cells.items()
        for name, cell in by_name.items()
    }
    tables[0] = replace(tables[0], notes=[*tables[0].notes, *failure_notes(failures), *missing_notes(missing)])
    data: dict[str, object] = {
        f"{processes} processes, {section_us} us": {
            name: cell.rate.as_json()
            | {"ratio": (found := cell.rate.ratio_to(by_name[BASELINE].rate)) and found.median}
            | {"windows": [asdict(outcome) for outcome in cell.outcomes]}
            for name, cell in by_name.items()
        }
        for (processes, section_us), by_name in cells.items()
    }
    return Findings(tables, {"unit": "passages per second", "cells": data, "missing": missing})


def _ratio_cell(by_name: dict[str, Cell], name: str) -> str:
    if name not in by_name:
        return NO_FIGURE
    return "failed" if by_name[name].rate.failure else ratio(by_name[name].rate.ratio_to(by_name[BASELINE].rate))


def _detail(section_us: int, name: str, by_name: dict[str, Cell]) -> list[str]:
    cell = by_name[name]
    summary = cell.rate.spread()
    if summary is None:
        return [name, str(section_us), "failed", *[NO_FIGURE] * 6]
    return [
        name,
        str(section_us),
        number(summary.median),
        quartiles(summary),
        ratio(cell.rate.ratio_to(by_name[BASELINE].rate)),
        number(statistics.median(outcome.shares[0] for outcome in cell.outcomes)),
        number(statistics.median(outcome.shares[-1] for outcome in cell.outcomes)),
        number(max(outcome.longest_wait_ns for outcome in cell.outcomes) / 1e6),
        number(statistics.median(outcome.cpu_per_passage_ns for outcome in cell.outcomes) / 1e3),
    ]
