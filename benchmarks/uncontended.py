"""What a lock costs that nobody else wants: ``with lock:`` and acquire() with release(), in ns per pair.

Each contestant lives in a process of its own. In each round it times a number of short batches and answers with the
fastest, as timeit's users do: longer ones would mostly measure who else was scheduled meanwhile. The loop itself
(about 15 ns per turn) is not subtracted: it is the same for all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat

from .crew import CellFailed, Host, describe
from .peers import BASELINE, FAMILY, LOCKS, LockLike, Peer, Scratch, Shared, present
from .report import NO_FIGURE, Findings, Table, failure_notes, missing_notes, number, quartiles, ratio
from .rounds import Series, turns

ROUNDS, ROUNDS_QUICK = 21, 7
BATCHES, BATCHES_QUICK = 40, 15  # of each kind, per contestant and round
BATCH_NS = 1_000_000
TIMEOUT_S = 10.0


def _time_with(lock: LockLike, count: int) -> int:
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        with lock:
            pass
    return time.perf_counter_ns() - start


def _time_calls(lock: LockLike, count: int) -> int:
    acquire, release = lock.acquire, lock.release
    start = time.perf_counter_ns()
    for _ in repeat(None, count):
        acquire()
        release()
    return time.perf_counter_ns() - start


USAGES: dict[str, Callable[[LockLike, int], int]] = {"with": _time_with, "acquire/release": _time_calls}


def _calibrate(timer: Callable[[int], int]) -> int:
    """How many turns take about `BATCH_NS`."""
    count = 1
    while min(timer(count) for _ in range(3)) < BATCH_NS // 8:
        count *= 2
    return max(1, count * BATCH_NS // min(timer(count) for _ in range(3)))


def fastest(timer: Callable[[int], int], batches: int, counts: dict[str, int], kind: str) -> float:
    """Time per turn, in ns, in the fastest of some batches; `counts` remembers how long batches of this kind are."""
    if kind not in counts:
        counts[kind] = _calibrate(timer)
    return min(timer(counts[kind]) for _ in range(batches)) / counts[kind]


def _setup(shared: Shared, batches: int) -> Callable[[str], float]:
    lock = shared.attach()
    gc.disable()  # As timeit does.
    counts: dict[str, int] = {}
    return lambda usage: fastest(lambda count: USAGES[usage](lock, count), batches, counts, usage)


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; a few seconds when quick, else half a minute."""
    peers, missing = present((*LOCKS, *FAMILY))
    batches = BATCHES_QUICK if quick else BATCHES
    series = {usage: {peer.name: Series() for peer in peers} for usage in USAGES}
    hosts: dict[str, Host] = {}
    opened: list[Shared] = []
    try:
        for peer in peers:
            try:
                opened.append(shared := peer.open(scratch))
                hosts[peer.name] = Host(partial(_setup, shared, batches))
            except Exception as error:
                missing[peer.name] = describe(error)
        for index, name in turns(list(hosts), ROUNDS_QUICK if quick else ROUNDS):
            for usage in USAGES:
                row = series[usage][name]
                if any(series[each][name].failure for each in USAGES):
                    continue  # Its host is gone.
                try:
                    row.values[index] = hosts[name].ask(usage, TIMEOUT_S)
                except CellFailed as failure:
                    row.failure = str(failure)
    finally:
        for host in hosts.values():
            host.close()
        for shared in opened:
            shared.close()
    return _findings([peer for peer in peers if peer.name in hosts], series, missing)


def _findings(peers: list[Peer], series: dict[str, dict[str, Series]], missing: dict[str, str]) -> Findings:
    rows = []
    failures: list[str] = []
    for peer in peers:
        row = [peer.name]
        for usage in USAGES:
            one = series[usage][peer.name]
            summary = one.spread()
            if summary is None:
                row += ["failed", NO_FIGURE, NO_FIGURE]
                failures += failure_notes({f"{peer.name}, {usage}": one.failure})
            else:
                row += [number(summary.median), quartiles(summary), ratio(one.ratio_to(series[usage][BASELINE]))]
        rows.append(row)
    head = ["lock", "with, ns", "p25..p75", "ratio", "acquire+release, ns", "p25..p75", "ratio"]
    notes = [f"ratio: time over {BASELINE}'s in the same rounds; smaller is better", *failures, *missing_notes(missing)]
    data: dict[str, object] = {
        usage: {
            name: one.as_json() | {"ratio": (found := one.ratio_to(by_name[BASELINE])) and found.median}
            for name, one in by_name.items()
        }
        for usage, by_name in series.items()
    }
    return Findings([Table("Uncontended", head, rows, notes)], {"unit": "ns per pair", **data, "missing": missing})
