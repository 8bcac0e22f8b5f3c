"""``python -m benchmarks [--quick] [--only GROUP ...] [--output FOLDER] [--json FILE] [--plots-from FILE]``"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import (
    contended,
    fairness,
    frames,
    lifecycle,
    messages,
    plots,
    recovery,
    revocation,
    scale,
    supervised,
    targets,
    uncontended,
)
from .crew import CellFailed
from .peers import Scratch
from .report import Findings, facts_line, failure_notes, load_warning, machine_facts

GROUPS: dict[str, Callable[[bool, Scratch], Findings]] = {
    "uncontended": uncontended.run,
    "revocation": revocation.run,
    "contended": contended.run,
    "recovery": recovery.run,
    "lifecycle": lifecycle.run,
    "fairness": fairness.run,
    "supervised": supervised.run,
    "messages": messages.run,
    "frames": frames.run,
    "scale": scale.run,
}

OUTPUT = Path("build", "benchmarks")  # which git ignores


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure shlock against its peers.")
    parser.add_argument("--quick", action="store_true", help="a minute or two instead of a quarter of an hour")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every round's figures (default: results.json in FOLDER)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="for the plots (default: %(default)s)")
    parser.add_argument("--plots-from", type=Path, metavar="FILE", help="only draw the plots, from an earlier run's figures")
    options = parser.parse_args()
    if options.plots_from:
        return 0 if _draw(json.loads(options.plots_from.read_text())["groups"], options.output) else 1
    signal.signal(signal.SIGTERM, _terminated)  # So that the with blocks clean up.

    try:
        return _run(
            options.quick, options.only or list(GROUPS), options.json or options.output / "results.json", options.output
        )
    finally:
        # A signal may have come between a fork and the with block that was to look after the child.
        for child in multiprocessing.active_children():
            child.kill()
            child.join()


def _run(quick: bool, only: list[str], document: Path, folder: Path) -> int:
    """Exit status 1 if a group could not be measured at all."""
    facts = machine_facts()
    print(facts_line(facts), end="\n\n", flush=True)
    if warning := load_warning():
        print(warning, end="\n\n", flush=True)
    groups: dict[str, dict[str, object]] = {}
    failures: dict[str, str | None] = {}
    document.parent.mkdir(parents=True, exist_ok=True)
    with Scratch() as scratch:
        for name in only:
            start = time.monotonic()
            try:
                findings = GROUPS[name](quick, scratch)
            except CellFailed as failure:
                failures[name] = str(failure)
                continue
            groups[name] = findings.data
            for table in findings.tables:
                print(table.render(), flush=True)
            document.write_text(json.dumps({"facts": facts, "quick": quick, "groups": groups}, indent=1) + "\n")
            print(f"({name}: {time.monotonic() - start:.0f} s)", end="\n\n", file=sys.stderr, flush=True)
    print(replace(targets.table(groups), notes=failure_notes(failures)).render())
    print(f"{document}")
    _draw(groups, folder)
    return 1 if failures else 0


def _draw(groups: dict[str, dict[str, object]], folder: Path) -> bool:
    if reason := plots.why_not():
        print(f"no plots: {reason}")
        return False
    for path in plots.draw(groups, folder):
        print(path)
    return True


if __name__ == "__main__":
    sys.exit(main())
