"""What shlock promises of its figures, and whether this run keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .peers import BASELINE, OURS
from .recovery import WAITERS
from .report import NO_FIGURE, Table, number

UNCONTENDED_RATIO = 3.5
CONTENDED_RATIO = 1.0
CONTENDED_FROM_US = 2
RECOVERY_MEDIAN_MS = 15.0
LIFECYCLE_RATIO = 1.0
FAIRNESS_FACTOR = 2.0


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


_CHECKS: dict[str, Callable[[dict[str, Any]], tuple[str, float, bool]]] = {
    "uncontended": _uncontended,
    "contended": _contended,
    "recovery": _recovery,
    "lifecycle": _lifecycle,
    "fairness": _fairness,
}


def table(groups: dict[str, dict[str, object]]) -> Table:
    """One row per target whose group has run."""
    rows = []
    for group, data in groups.items():
        try:
            text, measured, kept = _CHECKS[group](data)
        except (KeyError, TypeError, ValueError):
            rows.append([f"{group}: no figure for {OURS}", NO_FIGURE, "no"])
        else:
            rows.append([text, number(measured), "yes" if kept else "no"])
    return Table("Targets", ["target", "measured", "kept"], rows)
