"""What shlock promises of its figures, and whether this run keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .peers import BASELINE, OURS
from .recovery import WAITERS
from .report import NO_FIGURE, Table, number
from .supervised import OPEN_LOCKS

UNCONTENDED_RATIO = 3.5
CONTENDED_RATIO = 1.0
CONTENDED_FROM_US = 2
RECOVERY_MEDIAN_MS = 15.0
LIFECYCLE_RATIO = 1.0
FAIRNESS_FACTOR = 2.0
LEASED_RATIO = 1.5
FLOOR_FACTOR = 2.0
IDLE_PER_CENT = 0.5
GRANTS_PER_SECOND = 1000
ENFORCED_WITHIN_MS = 100


def _uncontended(data: dict[str, Any]) -> tuple[str, float, bool]:
    found = data["with"][OURS]["ratio"]
    return f"uncontended `with` at most {UNCONTENDED_RATIO} times {BASELINE}'s", found, found <= UNCONTENDED_RATIO


def _contended(data: dict[str, Any]) -> tuple[str, float, bool]:
    """The worst cell with several processes and a long enough section."""
    found = []
    for place, cell in data["cells"].items():
        processes, section = (int(part.split()[0]) for part in place.split(", "))
        if processes > 1 and section >= CONTENDED_FROM_US:
            found.append((cell[OURS]["ratio"], place))
    worst, place = min(found)
    text = f"contended, section of {CONTENDED_FROM_US} us or more: throughput at least {CONTENDED_RATIO} times"
    return f"{text} (worst cell: {place})", worst, worst >= CONTENDED_RATIO


def _recovery(data: dict[str, Any]) -> tuple[str, float, bool]:
    worst = max(data[f"{OURS}, {count} waiters"]["median_ns"] for count in WAITERS) / 1e6
    return f"recovery without supervisor: median under {RECOVERY_MEDIAN_MS:g} ms", worst, worst < RECOVERY_MEDIAN_MS


def _lifecycle(data: dict[str, Any]) -> tuple[str, float, bool]:
    found = data["drop"][OURS]["ratio"]
    return f"make and drop at most {LIFECYCLE_RATIO} times {BASELINE}'s", found, found <= LIFECYCLE_RATIO


def _fairness(data: dict[str, Any]) -> tuple[str, float, bool]:
    shares = data[OURS]["shares"]
    worst = max(shares[-1], 1 / shares[0] if shares[0] else float("inf"))
    return f"no share further than a factor of {FAIRNESS_FACTOR} from the mean", worst, worst <= FAIRNESS_FACTOR


def _supervised(data: dict[str, Any]) -> list[tuple[str, float, bool]]:
    pair, idle = data["cost"]["acquire/release"]["ratio"], data["idle"]
    few, many = (idle[str(count)]["share"] * 100 for count in OPEN_LOCKS)
    grants = min(found["grants_per_second"] for found in idle.values())
    overrun, death = (data["after"][name]["times_floor"] for name in ("overrun", "death"))
    enforced = max(data["restart"]["then enforced"]["first_ns"]) / 1e6
    return [
        (f"leased acquire/release at most {LEASED_RATIO} times the plain one's", pair, pair <= LEASED_RATIO),
        (f"overrun: heir inside within {FLOOR_FACTOR} times the floor", overrun, overrun <= FLOOR_FACTOR),
        (f"death, supervised: heir inside within {FLOOR_FACTOR} times the floor", death, death <= FLOOR_FACTOR),
        (f"next supervisor: enforces within {ENFORCED_WITHIN_MS} ms (longest)", enforced, enforced <= ENFORCED_WITHIN_MS),
        (f"idle with {OPEN_LOCKS[0]:,} leased locks: below {IDLE_PER_CENT} % of a core", few, few < IDLE_PER_CENT),
        (f"idle with {OPEN_LOCKS[1]:,}: linear or better, % of a core", many, many < IDLE_PER_CENT * 10),
        (f"at least {GRANTS_PER_SECOND:,} contracts per second", grants, grants >= GRANTS_PER_SECOND),
    ]


_CHECKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "uncontended": _uncontended,
    "contended": _contended,
    "recovery": _recovery,
    "lifecycle": _lifecycle,
    "fairness": _fairness,
    "supervised": _supervised,
}


def table(groups: dict[str, dict[str, object]]) -> Table:
    """One row per target whose group has run."""
    rows = []
    for group, data in groups.items():
        try:
            found = _CHECKS[group](data)
        except (KeyError, TypeError, ValueError):
            rows.append([f"{group}: no figure for {OURS}", NO_FIGURE, "no"])
            continue
        for text, measured, kept in found if isinstance(found, list) else [found]:
            rows.append([text, number(measured), "yes" if kept else "no"])
    return Table("Targets", ["target", "measured", "kept"], rows)
