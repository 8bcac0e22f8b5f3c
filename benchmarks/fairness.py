"""Does anybody starve? Eight processes hammer one lock for a minute; each one's passages as a multiple of the mean."""

from __future__ import annotations

from dataclasses import asdict

from . import contended
from .crew import CellFailed
from .peers import BASELINE, LOCKS, OURS, Scratch, present
from .report import NO_FIGURE, Findings, Table, failure_notes, missing_notes, number

PROCESSES = 8
SECTION_US = 0
WINDOW_S, WINDOW_S_QUICK = 60.0, 5.0


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; 10 s when quick, else two minutes. One window each: what is asked is whether anybody starves in it."""
    peers, missing = present(tuple(peer for peer in LOCKS if peer.name in (OURS, BASELINE)))
    seconds = WINDOW_S_QUICK if quick else WINDOW_S
    rows: list[list[str]] = []
    failures: dict[str, str | None] = {}
    data: dict[str, object] = {"missing": missing}
    for peer in peers:
        try:
            outcome = contended.measure(peer, scratch, PROCESSES, SECTION_US, seconds)
        except CellFailed as failure:
            rows.append([peer.name, "failed", *[NO_FIGURE] * (PROCESSES + 1)])
            failures[peer.name] = str(failure)
            data[peer.name] = {"failure": str(failure)}
            continue
        shares = [number(share) for share in outcome.shares]
        rows.append([peer.name, number(outcome.per_second), *shares, number(outcome.longest_wait_ns / 1e6)])
        data[peer.name] = asdict(outcome) | {"shares": outcome.shares}
    title = f"Fairness: {PROCESSES} processes, {seconds:g} s, critical section {SECTION_US} us"
    head = ["lock", "passages/s", "least share", *[f"{n}." for n in range(2, PROCESSES)], "largest", "longest wait, ms"]
    notes = ["shares are multiples of the mean share, ascending", *failure_notes(failures), *missing_notes(missing)]
    return Findings([Table(title, head, rows, notes)], data)
