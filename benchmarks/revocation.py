"""What a bias costs when somebody else comes: the revocation, and the worst exchange of a lock between two processes.

*Revocation*: from the call of acquire() to being inside, in a process that finds the lock free, biased to another process or
not.  *Exchange*: two processes take turns; each takes and releases the lock so often that it has just been biased to it when
the other one comes.  It is compared with a lock that is never biased.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from .crew import Host
from .peers import Scratch, bias
from .report import Findings, Table, number, quartiles, ratio
from .rounds import Series, turns

BIASED, ORDINARY = "biased to another process", "not biased"
ADAPTIVE, NEVER = "biased when it pays", "never biased"
ROUNDS, ROUNDS_QUICK = 300, 60
EXCHANGES, EXCHANGES_QUICK = 60, 12
TIMEOUT_S = 10.0


def _answer(locks: dict[str, Any], question: str) -> float:
    """In one of the two processes: "bias LOCK", "take LOCK", or a number of passages and a lock.  The answer is in ns."""
    what, _, name = question.partition(" ")
    lock = locks[name]
    if what == "bias":
        bias(lock)
        return 0.0
    times = 1 if what == "take" else int(what)
    if what == "take":
        start = time.perf_counter_ns()
        lock.acquire()
        passed = time.perf_counter_ns() - start
        lock.release()
        return passed
    start = time.perf_counter_ns()
    for _ in range(times):
        with lock:
            pass
    return time.perf_counter_ns() - start


def _setup(locks: dict[str, Any]) -> Callable[[str], float]:
    from shlock import _bias

    _bias._chosen = "adaptive"  # type: ignore[misc]
    for name, lock in locks.items():
        lock._words.limit = lock._words.credit.cell_contents = _bias.FIRST_CREDIT if name == ADAPTIVE else _bias.NEVER
    return partial(_answer, locks)


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; a few seconds."""
    import shlock
    from shlock import _bias

    locks = {name: shlock.Lock() for name in (BIASED, ORDINARY, ADAPTIVE, NEVER)}
    series = {name: Series() for name in locks}
    first, second = Host(partial(_setup, locks)), Host(partial(_setup, locks))
    try:
        for index, name in turns([BIASED, ORDINARY], ROUNDS_QUICK if quick else ROUNDS):
            if name == BIASED:
                first.ask(f"bias {name}", TIMEOUT_S)
            series[name].values[index] = second.ask(f"take {name}", TIMEOUT_S)
        passages = _bias.FIRST_CREDIT + 1
        for index, name in turns([ADAPTIVE, NEVER], EXCHANGES_QUICK if quick else EXCHANGES):
            spent = sum(host.ask(f"{passages} {name}", TIMEOUT_S) for host in (first, second))
            series[name].values[index] = spent / (2 * passages)
    finally:
        first.close()
        second.close()
    data = {name: one.as_json() for name, one in series.items()}
    rows = []
    for title, base, name in (
        ("acquire, us", ORDINARY, BIASED),
        (f"exchange after {passages:,} passages, us each", NEVER, ADAPTIVE),
    ):
        for which in (base, name):
            one = series[which].spread()
            assert one is not None
            found = series[which].ratio_to(series[base])
            data[which]["ratio"] = None if found is None else found.median
            us = type(one)(one.median / 1e3, one.p25 / 1e3, one.p75 / 1e3, one.count)
            rows.append([title, which, number(us.median), quartiles(us), ratio(found)])
    return Findings([Table("Revocation", ["what", "lock", "median", "p25..p75", "ratio"], rows, [])], data)
