"""Tables as aligned plain text that is reStructuredText at the same time, and the facts that belong to figures."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .peers import FAMILY, LOCKS, version_of
from .rounds import Spread

NO_FIGURE = "n/a"


@dataclass(frozen=True)
class Table:
    """A title and rows of text; the first column is aligned left, the others right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def render(self) -> str:
        """A reStructuredText simple table."""
        # A simple table takes an empty first cell for a continuation line.
        cells = [[cell or "\\" for cell in row] for row in (self.head, *self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.head))]
        rule = "  ".join("=" * width for width in widths)

        def line(row: Sequence[str]) -> str:
            padded = [row[0].ljust(widths[0])]
            padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return "  ".join(padded).rstrip()

        lines = [self.title, "-" * len(self.title), "", rule, line(cells[0]), rule]
        lines += [line(row) for row in cells[1:]]
        lines += [rule, ""]
        for note in self.notes:
            lines += [f"- {note}"]
        if self.notes:
            lines += [""]
        return "\n".join(lines)


@dataclass
class Findings:
    """What a group found: tables for reading, data for JSON."""

    tables: list[Table] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)


def missing_notes(missing: dict[str, str]) -> list[str]:
    """One line for each peer that did not take part."""
    return [f"left out: {name}: {reason}" for name, reason in missing.items()]


def failure_notes(failures: dict[str, str | None]) -> list[str]:
    """One line for each cell that has no figures."""
    return [f"failed: {place}: {reason}" for place, reason in failures.items() if reason]


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def quartiles(value: Spread, scale: float = 1.0) -> str:
    return f"{number(value.p25 / scale)}..{number(value.p75 / scale)}"


def ratio(value: Spread | None) -> str:
    return number(value.median) if value else NO_FIGURE


def machine_facts() -> dict[str, object]:
    """What a reader must know about the machine; nothing that identifies it."""
    modules = sorted({peer.module for peer in (*LOCKS, *FAMILY) if peer.module})
    return {
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "libc": " ".join(platform.libc_ver()),
        "load_average_at_start": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {module: version_of(module) for module in modules},
    }


def _processor() -> str | None:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return None


def facts_line(facts: dict[str, object]) -> str:
    return (
        f"{facts['implementation']} {facts['python']}, Linux {facts['kernel']} {facts['architecture']}, "
        f"{facts['cpus_usable']} of {facts['cpus']} CPUs ({facts['processor'] or 'unnamed'}), "
        f"load {facts['load_average_at_start']:.2f}"
    )


def load_warning() -> str | None:
    """A line to print if others are using the machine, or None."""
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < cpus / 2:
        return None
    return (
        f"Others use this machine (load {load:.1f} on {cpus} CPUs): what is measured with several processes, "
        "contended, recovery and fairness, will show that more than the locks."
    )
