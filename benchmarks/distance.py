"""How far two processors are from each other: how long a word takes from one to the other, and back.

Everything that is passed on between two processes depends on it.  On a guest of a larger machine it may change within a minute,
as its processors are moved: between two that share a cache and two that do not, it doubles and more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from .crew import Board, CellFailed, Crew
from .report import number

TRIPS = 1000
START_S = 5.0  # at most, until the other side is there
LOOKS = range(100_000_000)  # for a word, some seconds at least: either side may have lost its processor
_READY = 0  # of the worker's row
_THERE, _BACK = 2, 3  # words of the board, each written by one side


def there_and_back(processors: tuple[int, int]) -> float:
    """Median of many trips, in ns, with what Python adds to each; CellFailed if one does not come back."""
    mine = os.sched_getaffinity(0)
    board = Board(2)
    here, there = board.row(0), board.row(1)
    try:
        with Crew() as crew:
            crew.start(_answer, board, processors[1])
            board.await_all([there + _READY], START_S, crew)
            os.sched_setaffinity(0, {processors[0]})
            words, taken = board.words, []
            for trip in range(1, TRIPS + 1):
                start = time.perf_counter_ns()
                words[here + _THERE] = trip
                for _ in LOOKS:
                    if words[there + _BACK] == trip:
                        break
                else:
                    raise CellFailed("hang (a word did not come back)")
                taken.append(time.perf_counter_ns() - start)
            return median(taken)
    finally:
        os.sched_setaffinity(0, mine)
        board.close()


def _answer(board: Board, processor: int) -> None:
    os.sched_setaffinity(0, {processor})
    words, there, back = board.words, board.row(0) + _THERE, board.row(1) + _BACK
    words[board.row(1) + _READY] = 1
    for trip in range(1, TRIPS + 1):
        while words[there] != trip:
            pass
        words[back] = trip


def two_cores() -> tuple[tuple[int, int] | None, str | None]:
    """Two processors to pin to, of different cores where there are such; and what there is to say about it."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        return None, "pinned: left out, there is one processor only"
    for other in usable[1:]:
        if _siblings(other) != _siblings(usable[0]):
            return (usable[0], other), None
    return (usable[0], usable[1]), "pinned: the two processors are of one core"


def _siblings(processor: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def distance(cores: tuple[int, int] | None) -> list[float]:
    """``there_and_back`` of these, if there are two, and if it can be told."""
    if cores is None:
        return []
    try:
        return [there_and_back(cores)]
    except CellFailed:
        return []


def distance_notes(found: Iterable[float]) -> list[str]:
    """What there is to say about several of them below a table."""
    taken = sorted(found)
    if not taken:
        return []
    return [
        f"a word from one processor to the other and back: {number(median(taken))} ns, in several tries "
        f"{number(taken[0])} to {number(taken[-1])}"
    ]
