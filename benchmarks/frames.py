"""Do snapshot readers slow a writer down?  One process writes frames of 1 MiB into a Block; four others copy 1 MiB at a time.

They copy either the frame, with ``read()``, or as much private memory.  Both take processor time and memory bandwidth from the
writer; what is left of a difference is what the readers cost.  With nobody beside it the writer shows what the machine can do.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import shlock

from .crew import Board, CellFailed, Crew
from .distance import distance, distance_notes, two_cores
from .peers import Scratch
from .report import NO_FIGURE, Findings, Table, failure_notes, number, quartiles, ratio
from .rounds import Series, turns

SIZE = 1 << 20
READERS = 4
ROUNDS, ROUNDS_QUICK = 15, 5
WINDOW_S, WINDOW_S_QUICK = 1.0, 0.3
WATCHDOG_S = 10.0

ALONE, COPYING, READING = "nobody", f"{READERS} that copy private memory", f"{READERS} snapshot readers"
CASES = (ALONE, COPYING, READING)

_READY, _COUNT, _CPU_NS = range(3)  # words of a worker's row on the board


@dataclass(frozen=True)
class Outcome:
    """One window: frames a second, copies a second of all others, and the writer's CPU time for a frame in ns."""

    frames: float
    copies: float
    cpu_ns: float


def _write(block: shlock.Block) -> Callable[[], None]:
    frame = bytes(range(256)) * (SIZE // 256)

    def write() -> None:
        with block.write(fresh=True) as view:
            view[:] = frame

    return write


def _read(block: shlock.Block) -> Callable[[], None]:
    def read() -> None:
        with block.read():
            pass

    return read


def _copy(block: shlock.Block) -> Callable[[], None]:
    private = bytearray(SIZE)

    def copy() -> None:
        bytes(private)

    return copy


def _work(
    make: Callable[[shlock.Block], Callable[[], None]], block: shlock.Block, board: Board, row: int, window_ns: int
) -> None:
    act, now, words = make(block), time.perf_counter_ns, board.words
    act()
    gc.disable()
    words[row + _READY] = 1
    while not words[Board.START]:
        time.sleep(0.0005)
    end = words[Board.START] + window_ns
    while now() < words[Board.START]:
        pass
    count, cpu = 0, time.process_time_ns()
    while now() < end:
        act()
        count += 1
    words[row + _CPU_NS] = time.process_time_ns() - cpu
    words[row + _COUNT] = count


def measure(case: str, window_s: float) -> Outcome:
    """One window of one case; CellFailed if it hangs or crashes."""
    block = shlock.Block(size=SIZE)
    makes = [_write, *([] if case == ALONE else [_copy if case == COPYING else _read] * READERS)]
    board = Board(len(makes))
    rows = [board.row(worker) for worker in range(len(makes))]
    try:
        with Crew() as crew:
            for make, row in zip(makes, rows, strict=True):
                crew.start(_work, make, block, board, row, int(window_s * 1e9))
            board.await_all([row + _READY for row in rows], WATCHDOG_S, crew)
            board.words[Board.START] = time.perf_counter_ns() + 5_000_000
            crew.wait(crew.members, window_s + WATCHDOG_S)
        frames, *copies = (board.words[row + _COUNT] for row in rows)
        return Outcome(frames / window_s, sum(copies) / window_s, board.words[rows[0] + _CPU_NS] / max(1, frames))
    finally:
        board.close()
        block.close()


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; 10 s when quick, else a minute."""
    rounds, window_s = (ROUNDS_QUICK, WINDOW_S_QUICK) if quick else (ROUNDS, WINDOW_S)
    rate, cpu, copies = ({case: Series() for case in CASES} for _ in range(3))
    cores, _ = two_cores()
    apart: list[float] = []
    for index, case in turns(CASES, rounds):
        apart += distance(cores)
        if rate[case].failure:
            continue
        try:
            outcome = measure(case, window_s)
        except CellFailed as failure:
            rate[case].failure = cpu[case].failure = copies[case].failure = str(failure)
            continue
        for series, value in zip((rate, cpu, copies), (outcome.frames, outcome.cpu_ns, outcome.copies), strict=True):
            series[case].values[index] = value
    rows: list[list[str]] = []
    data: dict[str, object] = {"ns there and back": apart}
    for case in CASES:
        found, spent, taken = rate[case].spread(), cpu[case].spread(), copies[case].spread()
        against = rate[case].ratio_to(rate[COPYING])
        work = cpu[case].ratio_to(cpu[COPYING])
        data[case] = {
            "frames_per_second": rate[case].as_json(),
            "cpu_ns": cpu[case].as_json(),
            "copies_per_second": copies[case].as_json(),
            "ratio": against and against.median,
            "cpu_ratio": work and work.median,
        }
        if found is None or spent is None or taken is None:
            rows.append([case, *[NO_FIGURE] * 6])
            continue
        figures = [number(found.median), quartiles(found), ratio(against), number(spent.median / 1000), ratio(work)]
        rows.append([case, *figures, number(taken.median)])
    head = ["beside the writer", "frames/s", "quartiles", "ratio", "CPU for a frame, us", "ratio", "copies/s"]
    notes = [
        f"ratios: to {COPYING}, within each round",
        *distance_notes(apart),
        *failure_notes({case: rate[case].failure for case in CASES}),
    ]
    return Findings([Table(f"Frames of {SIZE >> 20} MiB, {rounds} rounds of {window_s:g} s", head, rows, notes)], data)
