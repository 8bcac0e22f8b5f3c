"""``python -m benchmarks [--quick] [--json FILE] [--only GROUP ...]``"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import contended, fairness, frames, lifecycle, messages, recovery, supervised, targets, uncontended
from .peers import Scratch
from .report import Findings, facts_line, load_warning, machine_facts

GROUPS: dict[str, Callable[[bool, Scratch], Findings]] = {
    "uncontended": uncontended.run,
    "contended": contended.run,
    "recovery": recovery.run,
    "lifecycle": lifecycle.run,
    "fairness": fairness.run,
    "supervised": supervised.run,
    "messages": messages.run,
    "frames": frames.run,
}


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure shlock against its peers.")
    parser.add_argument("--quick", action="store_true", help="a minute instead of a quarter of an hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures there as well")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"some of: {', '.join(GROUPS)}")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminated)  # So that the with blocks clean up.

    try:
        _run(options.quick, options.only or list(GROUPS), options.json)
    finally:
        # A signal may have come between a fork and the with block that was to look after the child.
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
    return 0


def _run(quick: bool, only: list[str], document: Path | None) -> None:
    facts = machine_facts()
    print(facts_line(facts), end="\n\n", flush=True)
    if warning := load_warning():
        print(warning, end="\n\n", flush=True)
    groups: dict[str, dict[str, object]] = {}
    with Scratch() as scratch:
        for name in only:
            start = time.monotonic()
            findings = GROUPS[name](quick, scratch)
            groups[name] = findings.data
            for table in findings.tables:
                print(table.render(), flush=True)
            print(f"({name}: {time.monotonic() - start:.0f} s)", end="\n\n", file=sys.stderr, flush=True)
    print(targets.table(groups).render())
    if document:
        document.write_text(json.dumps({"facts": facts, "quick": quick, "groups": groups}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
