"""How long a lock stays lost when its owner is killed: from the SIGKILL to a waiter holding it, in ms.

The owner says on a shared page that it is inside, the waiters say that they are about to wait, and after a random
time (so that no poll is hit in step) the parent reads the clock and kills. Waiters read the same clock as soon as
they hold the lock. There is no supervisor, and the parent reaps the dead owner only afterwards. A contestant that
gives the lock to nobody within `BOUND_S` the first time is said to recover never.

The floor is what the kernel needs to take an identical process apart: from SIGKILL to its pidfd being readable.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from dataclasses import dataclass, field

from .crew import Board, CellFailed, Crew, describe
from .peers import LOCKS, Peer, Scratch, Shared, present
from .report import NO_FIGURE, Findings, Table, failure_notes, missing_notes, number
from .rounds import percentile, turns

WAITERS = (1, 3)
REPETITIONS, REPETITIONS_QUICK = 100, 10
BOUND_S = 2.0
PATIENCE_S = 10.0
SETTLE_S = 0.02  # at least this long between "about to wait" and the kill, plus up to the poll interval
POLL_S = 0.01  # a random part of at least this is added
FLOOR = "floor: SIGKILL to pidfd"

_READY, _STAMP_NS, _TOLD = range(3)  # words of a worker's row; the owner is worker 0


@dataclass
class Outcome:
    """Times in ns since the kill, one per repetition; `told` counts heirs that could see what had happened.

    `failures` has the reason of each repetition that gave no time; after three of them, or one at the start, the
    contestant is given up.
    """

    first_ns: list[int] = field(default_factory=list)
    last_ns: list[int] = field(default_factory=list)
    told: int = 0
    failures: list[str] = field(default_factory=list)
    given_up: bool = False


def _own(shared: Shared, board: Board) -> None:
    lock = shared.attach()
    lock.acquire()
    board.words[board.row(0) + _READY] = 1
    while True:
        signal.pause()


def _wait(shared: Shared, board: Board, worker: int) -> None:
    lock = shared.attach()
    row = board.row(worker)
    board.words[row + _READY] = 1
    lock.acquire()
    stamp = time.monotonic_ns()
    board.words[row + _TOLD] = bool(getattr(lock, "abandoned", None))
    lock.release()
    board.words[row + _STAMP_NS] = stamp


def _kill_owner(peer: Peer, scratch: Scratch, waiters: int, outcome: Outcome) -> None:
    try:
        shared = peer.open(scratch)
    except Exception as error:
        raise CellFailed(describe(error)) from error
    board = Board(waiters + 1)
    rows = [board.row(worker) for worker in range(1, waiters + 1)]
    try:
        with Crew() as crew:
            owner = crew.start(_own, shared, board)
            board.await_all([board.row(0) + _READY], PATIENCE_S, crew)
            heirs = [crew.start(_wait, shared, board, worker) for worker in range(1, waiters + 1)]
            board.await_all([row + _READY for row in rows], PATIENCE_S, crew)
            time.sleep(SETTLE_S + random.uniform(0, max(POLL_S, peer.poll_s)))
            assert owner.pid is not None
            killed = time.monotonic_ns()
            os.kill(owner.pid, signal.SIGKILL)
            # One that has recovered before gets longer: a stall of a busy machine is no hang.
            crew.wait(heirs, PATIENCE_S if outcome.first_ns else BOUND_S)
        stamps = sorted(board.words[row + _STAMP_NS] for row in rows)
        if stamps[0] < killed:
            raise CellFailed("taken while the owner was alive: does not exclude")
        outcome.first_ns.append(stamps[0] - killed)
        outcome.last_ns.append(stamps[-1] - killed)
        outcome.told += any(board.words[row + _TOLD] for row in rows)
    finally:
        board.close()
        shared.close()


def _floor(outcome: Outcome) -> None:
    board = Board(1)
    try:
        with Crew() as crew:
            victim = crew.start(_own, Shared(attach=_NoLock), board)
            board.await_all([board.row(0) + _READY], PATIENCE_S, crew)
            time.sleep(SETTLE_S)
            assert victim.pid is not None
            pidfd = os.pidfd_open(victim.pid)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                killed = time.monotonic_ns()
                os.kill(victim.pid, signal.SIGKILL)
                poll.poll(PATIENCE_S * 1000)
                outcome.first_ns.append(time.monotonic_ns() - killed)
            finally:
                os.close(pidfd)
    finally:
        board.close()


class _NoLock:
    def acquire(self) -> None:
        pass


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; about 10 s when quick, else 2 minutes."""
    peers, missing = present(LOCKS)
    by_name = {peer.name: peer for peer in peers}
    floor = Outcome()
    outcomes = {(name, waiters): Outcome() for name in by_name for waiters in WAITERS}
    repetitions = REPETITIONS_QUICK if quick else REPETITIONS
    for _, name in turns([*by_name, FLOOR], repetitions):
        if name == FLOOR:
            _floor(floor)
            continue
        for waiters in WAITERS:
            outcome = outcomes[name, waiters]
            if outcome.given_up or any(outcomes[name, count].given_up for count in WAITERS if count < waiters):
                continue
            try:
                _kill_owner(by_name[name], scratch, waiters, outcome)
            except CellFailed as failure:
                outcome.failures.append(str(failure))
                outcome.given_up = not outcome.first_ns or len(outcome.failures) >= 3
    return _findings(peers, floor, outcomes, missing)


def _findings(peers: list[Peer], floor: Outcome, outcomes: dict[tuple[str, int], Outcome], missing: dict[str, str]) -> Findings:
    rows = [_row(FLOOR, 0, floor)]
    for peer in peers:
        for waiters in WAITERS:
            outcome = outcomes[peer.name, waiters]
            if outcome.failures or outcome.first_ns:
                rows.append(_row(peer.name, waiters, outcome))
    failures: dict[str, str | None] = {
        f"{name}, {waiters} waiters": "; ".join(outcome.failures)
        for (name, waiters), outcome in outcomes.items()
        if not _never(outcome)
    }
    head = ["lock", "waiters", "median, ms", "p90", "max", "all through, median", "repetitions", "heir told", "failed"]
    notes = [
        "from just before os.kill(owner, SIGKILL) until the first waiter holds the lock",
        f"never: nobody had the lock after {BOUND_S:g} s; tried once",
        "heir told: how often the new holder could see that the last one had died",
        *failure_notes(failures),
        *missing_notes(missing),
    ]
    data: dict[str, object] = {FLOOR: {"first_ns": floor.first_ns}}
    for (name, waiters), outcome in outcomes.items():
        data[f"{name}, {waiters} waiters"] = {
            "first_ns": outcome.first_ns,
            "last_ns": outcome.last_ns,
            "median_ns": percentile(outcome.first_ns, 50) if outcome.first_ns else None,
            "told": outcome.told,
            "failures": outcome.failures,
        }
    return Findings([Table("Recovery after the owner's SIGKILL", head, rows, notes)], {**data, "missing": missing})


def _never(outcome: Outcome) -> bool:
    return not outcome.first_ns and any(reason.startswith("hang") for reason in outcome.failures)


def _row(name: str, waiters: int, outcome: Outcome) -> list[str]:
    if not outcome.first_ns:
        text = "never" if _never(outcome) else "failed"
        return [name, str(waiters), text, *[NO_FIGURE] * 6]
    times = [number(percentile(outcome.first_ns, percent) / 1e6) for percent in (50, 90, 100)]
    through = number(percentile(outcome.last_ns, 50) / 1e6) if outcome.last_ns else NO_FIGURE
    told = f"{outcome.told}" if waiters else NO_FIGURE
    return [
        name,
        str(waiters or NO_FIGURE),
        *times,
        through,
        str(len(outcome.first_ns)),
        told,
        str(len(outcome.failures)),
    ]
