"""``python -m benchmarks [--quick] [--json FILE] [--only GROUP ...]``"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import contended, fairness, lifecycle, recovery, targets, uncontended
from .peers import Scratch
from .report import Findings, facts_line, machine_facts

GROUPS: dict[str, Callable[[bool, Scratch], Findings]] = {
    "uncontended": uncontended.run,
    "contended": contended.run,
    "recovery": recovery.run,
    "lifecycle": lifecycle.run,
    "fairness": fairness.run,
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

    facts = machine_facts()
    print(facts_line(facts), end="\n\n", flush=True)
    groups: dict[str, dict[str, object]] = {}
    with Scratch() as scratch:
        for name, run in GROUPS.items():
            if options.only and name not in options.only:
                continue
            start = time.monotonic()
            findings = run(options.quick, scratch)
            groups[name] = findings.data
            for table in findings.tables:
                print(table.render(), flush=True)
            print(f"({name}: {time.monotonic() - start:.0f} s)", end="\n\n", file=sys.stderr, flush=True)
    print(targets.table(groups).render())
    if options.json:
        document = {"facts": facts, "quick": options.quick, "groups": groups}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
