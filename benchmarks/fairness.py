"""Does anybody starve?  Eight processes hammer one lock for a minute: each one's share of the passages, and the longest wait.

Beside multiprocessing.Lock stands shlock's without its bound on waiting, as what the bound costs.  The minute is cut into
windows in which they alternate.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from . import contended
from .contended import Outcome
from .crew import CellFailed
from .peers import BASELINE, LOCKS, OURS, Peer, Scratch, Shared, present
from .report import NO_FIGURE, Findings, Table, failure_notes, missing_notes, number, ratio
from .rounds import Series, Spread, turns

PROCESSES = 8
SECTIONS_US = (0, 100)
ROUNDS, ROUNDS_QUICK = 6, 1
WINDOW_S, WINDOW_S_QUICK = 10.0, 2.0
UNBOUNDED = f"{OURS}, no bound"


def _unbounded(lock: Peer) -> Peer:
    """The same lock in processes that never hand it over."""

    def open_(scratch: Scratch) -> Shared:
        shared = lock.open(scratch)

        def attach() -> Any:
            from shlock import _owned

            _owned.TURN = 1 << 62  # type: ignore[misc]
            return shared.attach()

        return Shared(attach, shared.close, shared.helper)

    return Peer(UNBOUNDED, "unbounded", open_, lock.module, lock.attribute)


def _as_one(outcomes: list[Outcome]) -> Outcome:
    """All windows of one lock as a single one."""
    passages = [sum(of_one) for of_one in zip(*(outcome.passages for outcome in outcomes), strict=True)]
    longest, cpu = max(outcome.longest_wait_ns for outcome in outcomes), sum(outcome.cpu_ns for outcome in outcomes)
    return Outcome(sum(outcome.window_s for outcome in outcomes), passages, longest, cpu)


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; 12 s when quick, else six minutes."""
    peers, missing = present(tuple(peer for peer in LOCKS if peer.name in (OURS, BASELINE)))
    contestants = {peer.name: peer for peer in peers}
    if OURS in contestants:
        contestants[UNBOUNDED] = _unbounded(contestants[OURS])
    rounds, window_s = (ROUNDS_QUICK, WINDOW_S_QUICK) if quick else (ROUNDS, WINDOW_S)
    tables, sections = [], {}
    for section_us in SECTIONS_US:
        rates: dict[str, Series] = {name: Series() for name in contestants}
        windows: dict[str, list[Outcome]] = {name: [] for name in contestants}
        for index, name in turns(list(contestants), rounds):
            if rates[name].failure:
                continue
            try:
                outcome = contended.measure(contestants[name], scratch, PROCESSES, section_us, window_s)
            except CellFailed as failure:
                rates[name].failure = str(failure)
                continue
            rates[name].values[index] = outcome.per_second
            windows[name].append(outcome)
        notes = ["shares are multiples of the mean share, ascending; the ratio is to the rate of multiprocessing.Lock"]
        notes += [*failure_notes({name: rates[name].failure for name in contestants}), *missing_notes(missing)]
        rows = [_row(name, windows[name], rates[name].ratio_to(rates[BASELINE])) for name in contestants]
        title = f"Fairness: {PROCESSES} processes, {rounds * window_s:g} s, critical section {section_us} us"
        middle = [f"{n}." for n in range(2, PROCESSES)]
        head = ["lock", "passages/s", "ratio", "least share", *middle, "largest", "longest wait, ms"]
        tables.append(Table(title, head, rows, notes))
        sections[f"{section_us} us"] = {name: _data(windows[name], rates[name]) for name in contestants} | {
            "kept by the bound": _median(rates, OURS, UNBOUNDED)
        }
    return Findings(tables, {"missing": missing, "sections": sections})


def _median(rates: dict[str, Series], name: str, other: str) -> float | None:
    found = rates[name].ratio_to(rates[other]) if name in rates and other in rates else None
    return found and found.median


def _row(name: str, windows: list[Outcome], against: Spread | None) -> list[str]:
    if against is None:
        return [name, "failed", *[NO_FIGURE] * (PROCESSES + 2)]
    one = _as_one(windows)
    shares = [number(share) for share in one.shares]
    return [name, number(one.per_second), ratio(against), *shares, number(one.longest_wait_ns / 1e6)]


def _data(windows: list[Outcome], rate: Series) -> dict[str, Any]:
    if rate.failure:
        return {"failure": rate.failure}
    one = _as_one(windows)
    return asdict(one) | {"shares": one.shares, "rate": rate.as_json(), "windows": [asdict(window) for window in windows]}
