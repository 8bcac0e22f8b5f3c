"""How far two processors are from each other: how long a word takes from one to the other, and back.

Everything that is passed on between two processes depends on it.  On a guest of a larger machine it may change within a minute,
as its processors are moved: between two that share a cache and two that do not, it doubles and more.
"""

from __future__ import annotations

import os
import time
from statistics import median

from .crew import Board, CellFailed, Crew

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
