"""What supervision costs and how fast it is: leased locks, overruns, deaths, and an idle supervisor.

    cost      ``with`` and acquire() with release() of a leased lock, as a ratio to those of plain ones in the same process:
              one that is biased, as any is that one process takes again and again, and one that never is
    overrun   from the deadline (grace 0) of a holder that sleeps to the heir inside
    death     from SIGKILL of a holder whose lease is long to the heir inside
    restart   the supervisor is killed: until the next one has started; and from there until a hold that goes on has been ended,
              beyond the lease that it then has
    idle      share of one core that the supervisor uses while so many leased locks (lease 0.2 s) are open and unused
    grants    contracts granted per second, for new names, with so many processes asking

The floor is what the kernel needs to take an identical process apart: from SIGKILL to its pidfd being readable.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import shlock
from shlock import _client, snapshot

from .crew import Board, CellFailed, Crew, Host
from .peers import never_bias
from .recovery import FLOOR, Outcome, _floor
from .report import NO_FIGURE, Findings, Table, number, quartiles
from .rounds import Series, percentile, turns
from .uncontended import USAGES, fastest

REPETITIONS, REPETITIONS_QUICK = 100, 15
ROUNDS, ROUNDS_QUICK = 21, 7
BATCHES, BATCHES_QUICK = 40, 15
IDLE_S, IDLE_S_QUICK = 10.0, 3.0
OPEN_LOCKS = (1000, 10_000)
ASKING = (1, 2)  # processes
GRANTS, GRANTS_ROUNDS, GRANTS_ROUNDS_QUICK = 1000, 7, 3  # contracts in each round
OVERRUN_LEASE_S = 0.1  # the heir waits before it ends
PATIENCE_S = 10.0
RESTARTS, RESTARTS_QUICK = 30, 5
RESTART_LEASE_S = 0.3
POLL_S = 0.01  # a random part of it is added before a kill, so that no poll of the waiter is hit in step

COSTS = BIASED, UNBIASED, LEASED = "biased", "never biased", "leased"

_READY, _STAMP_NS, _TOLD = range(3)  # words of a worker's row; the owner is worker 0


def _cost_setup(domain: str, batches: int) -> Callable[[tuple[str, str]], float]:
    locks = {
        BIASED: shlock.Lock("plain", domain=domain),
        UNBIASED: never_bias(shlock.Lock("ordinary", domain=domain)),
        LEASED: shlock.Lock("leased", domain=domain, lease=3600),
    }
    counts: dict[str, int] = {}

    def answer(question: tuple[str, str]) -> float:
        usage, which = question
        return fastest(lambda count: USAGES[usage](locks[which], count), batches, counts, usage + which)

    return answer


def _keep(domain: str) -> Callable[[object], None]:
    """In a process of its own: keep the supervisor."""
    keeper = shlock.Lock("keeper", domain=domain, lease=3600)

    def answer(_: object) -> None:
        assert not keeper.locked()

    return answer


def _cost(domain: str, quick: bool) -> dict[str, dict[str, Series]]:
    series = {usage: {which: Series() for which in COSTS} for usage in USAGES}
    with closing(Host(partial(_cost_setup, domain, BATCHES_QUICK if quick else BATCHES))) as host:
        for index, which in turns(list(COSTS), ROUNDS_QUICK if quick else ROUNDS):
            for usage in USAGES:
                series[usage][which].values[index] = host.ask((usage, which), PATIENCE_S)
    return series


def _own(domain: str, lease: float, board: Board) -> None:
    lock = shlock.Lock("held", domain=domain, lease=lease)
    with lock as hold:
        board.words[board.row(0) + _STAMP_NS] = round(hold.deadline * 1e9)
        board.words[board.row(0) + _READY] = 1
        while True:
            signal.pause()


def _wait(domain: str, board: Board) -> None:
    lock = shlock.Lock("held", domain=domain, lease=3600)
    board.words[board.row(1) + _READY] = 1
    with lock:
        board.words[board.row(1) + _STAMP_NS] = time.monotonic_ns()
        board.words[board.row(1) + _TOLD] = lock.abandoned is not None


def _heir_after(domain: str, lease: float, kills: bool, outcome: Outcome) -> None:
    """One holder and one heir; the time from the kill, or from the deadline, until the heir is inside."""
    board = Board(2)
    try:
        with Crew() as crew:
            heir_ready, owner_ready = board.row(1) + _READY, board.row(0) + _READY
            owner = crew.start(_own, domain, lease, board)
            board.await_all([owner_ready], PATIENCE_S, crew)
            heir = crew.start(_wait, domain, board)
            if kills:
                board.await_all([heir_ready], PATIENCE_S, crew)
                time.sleep(0.02 + random.uniform(0, POLL_S))
                assert owner.pid is not None
                since = time.monotonic_ns()
                os.kill(owner.pid, signal.SIGKILL)
            else:
                since = board.words[board.row(0) + _STAMP_NS]
            crew.wait([heir], PATIENCE_S)
        outcome.first_ns.append(board.words[board.row(1) + _STAMP_NS] - since)
        outcome.told += board.words[board.row(1) + _TOLD]
    except CellFailed as failure:
        outcome.failures.append(str(failure))
    finally:
        board.close()


def _restart(domain: str, started: Outcome, enforced: Outcome) -> None:
    """The supervisor dies while somebody holds, who stays."""
    board = Board(2)
    try:
        with Crew() as crew:
            crew.start(_own, domain, RESTART_LEASE_S, board)
            board.await_all([board.row(0) + _READY], PATIENCE_S, crew)
            heir = crew.start(_wait, domain, board)
            board.await_all([board.row(1) + _READY], PATIENCE_S, crew)
            pid = _client.supervisor_pid(domain)
            assert pid is not None
            since = time.time_ns()
            os.kill(pid, signal.SIGKILL)
            crew.wait([heir], PATIENCE_S)
        times = {event["event"]: event["time"] for event in _client.events(domain, follow=False)}
        started.first_ns.append(round(times["started"] * 1e9) - since)
        enforced.first_ns.append(round((times["killed"] - times["started"] - RESTART_LEASE_S) * 1e9))
    except CellFailed as failure:
        started.failures.append(str(failure))
    finally:
        board.close()


def _cpu_seconds(pid: int) -> float:
    """Of the main thread, which is all that the supervisor has; to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextmanager
def _domain(scratch: Any) -> Iterator[str]:
    """A domain; it goes when its supervisor has gone, which goes when nobody uses the domain any more."""
    domain = scratch.name()
    try:
        yield domain
    finally:
        pid = _client.supervisor_pid(domain)
        if pid is not None:
            with suppress(ProcessLookupError), open(os.pidfd_open(pid), closefd=True) as supervisor:
                select.select([supervisor], [], [], PATIENCE_S)
        snapshot.clean(domain)


def _ask(domain: str, board: Board, worker: int, names: range) -> None:
    """Obtain a contract for each name, having begun with one that does not count."""
    locks = [shlock.Lock("keeper", domain=domain, lease=3600)]
    board.words[board.row(worker) + _READY] = 1
    while not board.words[Board.START]:
        time.sleep(0.001)
    locks += [shlock.Lock(f"asked-{number}", domain=domain, lease=1) for number in names]
    board.words[board.row(worker) + _STAMP_NS] = time.monotonic_ns()
    signal.pause()


def _grants(domain: str, rounds: int) -> dict[str, Series]:
    found = {str(asking): Series() for asking in ASKING}
    names = 0
    for index, asking in turns(list(found), rounds):
        board = Board(int(asking))
        try:
            with Crew() as crew:
                for worker in range(board.workers):
                    share = GRANTS // board.workers
                    crew.start(_ask, domain, board, worker, range(names, names := names + share))
                board.await_all([board.row(worker) + _READY for worker in range(board.workers)], PATIENCE_S, crew)
                board.words[Board.START] = start = time.monotonic_ns()
                ends = [board.row(worker) + _STAMP_NS for worker in range(board.workers)]
                board.await_all(ends, 6 * PATIENCE_S, crew)
                found[asking].values[index] = GRANTS / (max(board.words[end] for end in ends) - start) * 1e9
        except CellFailed as failure:
            found[asking].failure = str(failure)
        finally:
            board.close()
    return found


def _idle(domain: str, seconds: float) -> dict[str, dict[str, float]]:
    """Open the locks, and look what the supervisor uses while nothing happens."""
    found: dict[str, dict[str, float]] = {}
    locks: list[Any] = []
    for count in OPEN_LOCKS:
        locks += [shlock.Lock(f"idle-{index}", domain=domain, lease=0.2) for index in range(len(locks), count)]
        pid = _client.supervisor_pid(domain)
        assert pid is not None
        time.sleep(0.5)
        used, start = _cpu_seconds(pid), time.monotonic()
        time.sleep(seconds)
        share = (_cpu_seconds(pid) - used) / (time.monotonic() - start)
        found[str(count)] = {"share": share}
    return found


def run(quick: bool, scratch: Any) -> Findings:
    """Measure; about half a minute when quick, else two."""
    outcomes = {"overrun": Outcome(), "death": Outcome(), FLOOR: Outcome()}
    with _domain(scratch) as domain, closing(Host(partial(_keep, domain))) as keeper:
        keeper.ask(None, PATIENCE_S)
        series = _cost(domain, quick)
        for _, name in turns(list(outcomes), REPETITIONS_QUICK if quick else REPETITIONS):
            if name == FLOOR:
                _floor(outcomes[name])
            else:
                _heir_after(domain, OVERRUN_LEASE_S if name == "overrun" else 60.0, name == "death", outcomes[name])
        restarts = {"next one started": Outcome(), "then enforced": Outcome()}
        for _ in range(RESTARTS_QUICK if quick else RESTARTS):
            _restart(domain, *restarts.values())
        grants = _grants(domain, GRANTS_ROUNDS_QUICK if quick else GRANTS_ROUNDS)
    with _domain(scratch) as domain, closing(Host(lambda: partial(_idle, domain))) as host:
        idle = host.ask(IDLE_S_QUICK if quick else IDLE_S, 120.0)
    return _findings(series, outcomes, restarts, grants, idle)


def _findings(
    series: dict[str, dict[str, Series]],
    outcomes: dict[str, Outcome],
    restarts: dict[str, Outcome],
    grants: dict[str, Series],
    idle: dict[str, dict[str, float]],
) -> Findings:
    cost_rows = []
    data: dict[str, Any] = {"cost": {}, "after": {}, "restart": {}, "grants": {}, "idle": idle}
    for usage, all_of_it in series.items():
        ratios = {}
        for which in COSTS[:-1]:
            found = all_of_it[LEASED].ratio_to(all_of_it[which])
            plain, leased = all_of_it[which].spread(), all_of_it[LEASED].spread()
            assert found and plain and leased
            ratios[which] = found.median
            row = [f"{usage}, {which}", number(plain.median), number(leased.median), number(found.median), quartiles(found)]
            cost_rows.append(row)
        data["cost"][usage] = {"ratios": ratios, **{which: one.as_json() for which, one in all_of_it.items()}}
    floor = percentile(outcomes[FLOOR].first_ns, 50)
    after_rows = []
    for name, outcome in outcomes.items():
        times = [number(percentile(outcome.first_ns, percent) / 1e6) for percent in (50, 90, 100)]
        told = NO_FIGURE if name == FLOOR else str(outcome.told)
        over = percentile(outcome.first_ns, 50) / floor
        after_rows.append([name, *times, number(over), str(len(outcome.first_ns)), told, str(len(outcome.failures))])
        data["after"][name] = {"first_ns": outcome.first_ns, "times_floor": over, "failures": outcome.failures}
    restart_rows = []
    for name, outcome in restarts.items():
        times = [number(percentile(outcome.first_ns, percent) / 1e6) for percent in (50, 90, 100)]
        restart_rows.append([name, *times, str(len(outcome.first_ns)), str(len(outcome.failures))])
        data["restart"][name] = {"first_ns": outcome.first_ns, "failures": outcome.failures}
    grant_rows = []
    for asking, one in grants.items():
        rate = one.spread()
        figures = [number(rate.median), f"{number(rate.p25)}..{number(rate.p75)}"] if rate else [NO_FIGURE, one.failure or ""]
        grant_rows.append([asking, *figures])
        data["grants"][asking] = one.as_json()
    idle_rows = [[f"{int(count):,}", number(found["share"] * 100)] for count, found in idle.items()]
    return Findings(
        [
            Table("Leased lock, uncontended", ["usage, over a lock", "that, ns", "leased, ns", "ratio", "p25..p75"], cost_rows),
            Table(
                "Supervised: until the heir is inside",
                ["after", "median, ms", "p90", "max", "times the floor", "repetitions", "heir told", "failed"],
                after_rows,
                ["overrun: from the deadline, grace 0; death: from SIGKILL of a holder whose lease is long"],
            ),
            Table(
                "Supervisor killed, a hold goes on",
                ["until", "median, ms", "p90", "max", "repetitions", "failed"],
                restart_rows,
                [f"then enforced: from its start, beyond the lease of {RESTART_LEASE_S:g} s that the hold gets"],
            ),
            Table("Contracts granted", ["processes asking", "per second", "p25..p75"], grant_rows),
            Table("Idle supervisor", ["leased locks open", "per cent of a core"], idle_rows),
        ],
        data,
    )
