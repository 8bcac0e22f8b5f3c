"""Check the protocol models beside this file with SPIN, exhaustively.

    python tests/model/run.py [--quick | --deep] [--jobs N] [--list] [NAME...]

Every configuration below says what SPIN must find: that a model holds, or that a mutation of it is refuted, and by which
check.  A search that did not visit every state (depth or memory exhausted) counts as a failure, because it shows
nothing.  Needs ``spin`` and a C compiler.  Exit status: 0 as expected, 1 a mismatch, 2 something is missing.

NAME is a configuration or a prefix of one; naming a deep one runs it without ``--deep``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
MEMORY_LIMIT_MB = 3000
EXTRA: list[str] = []
Size = Literal["quick", "default", "deep"]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One search: a model, its parameters, and what must come out."""

    name: str
    model: str
    defines: Mapping[str, int | str]
    refuted_by: str | None = None
    """None: every property holds.  Otherwise a part of SPIN's message about the property that is broken."""
    size: Size = "default"
    depth: int = 1_000_000
    """Length of the longest path; the search stack for it takes about 60 bytes a step."""
    progress: bool = False
    """Search for cycles without progress instead of dead ends and broken asserts."""

    @property
    def expected(self) -> str:
        return "holds" if self.refuted_by is None else f"refuted by {self.refuted_by}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What SPIN found, and what that took."""

    found: str
    as_expected: bool
    states: int = 0
    seconds: float = 0.0
    memory_mb: float = 0.0


def holds(name: str, model: str = "lock", /, *, size: Size = "default", depth: int = 1_000_000, progress: bool = False,
          **defines: int | str) -> Configuration:
    return Configuration(name, model, defines, None, size, depth, progress)


def refuted(name: str, by: str, model: str = "lock", /, *, size: Size = "default", depth: int = 1_000_000,
            **defines: int | str) -> Configuration:
    return Configuration(name, model, defines, by, size, depth)


DEADLOCK = "invalid end state"

CONFIGURATIONS: tuple[Configuration, ...] = (
    holds("lock-2", THREADS=2, size="quick"),
    holds("lock-3", THREADS=3, TOKENS=1, SEQUENCES=1),
)


class SearchFailed(Exception):
    """SPIN, the compiler or the search itself did not get to the end."""


def check(configuration: Configuration) -> Outcome:
    """Run one configuration in a temporary folder of its own.  Blocks until the search has ended."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="shlock-model-") as folder:
            report = _search(configuration, Path(folder))
        found = _verdict(report)
    except SearchFailed as failure:
        return Outcome(str(failure), False, seconds=time.monotonic() - started)
    if configuration.refuted_by is None:
        as_expected = found == "holds"
    else:
        as_expected = found != "holds" and configuration.refuted_by in found
    return Outcome(
        found,
        as_expected,
        states=int(float(_number(r"([\d.e+]+) states, stored", report))),
        seconds=time.monotonic() - started,
        memory_mb=float(_number(r"([\d.]+)\s+total actual memory usage", report)),
    )


def _search(configuration: Configuration, folder: Path) -> str:
    """Generate, compile and run the search; return what it printed."""
    model = f"{configuration.model}.pml"
    shutil.copy(HERE / model, folder)
    defines = [f"-D{name}={value}" for name, value in configuration.defines.items()]
    _run(["spin", "-a", *defines, model], folder, output="pan.c")
    kind = "-DNP" if configuration.progress else "-DSAFETY"
    options = ["-O2", "-w", *EXTRA, "-DCOLLAPSE", "-DNOFAIR", kind, f"-DMEMLIM={MEMORY_LIMIT_MB}"]
    _run(["gcc", *options, "-o", "pan", "pan.c"], folder, output="pan")
    command = ["./pan", f"-m{configuration.depth}", *(["-l"] if configuration.progress else [])]
    return _run(command, folder)


def _run(command: list[str], folder: Path, *, output: str | None = None) -> str:
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if output is not None and not (folder / output).exists():
        raise SearchFailed(f"{command[0]} failed: {' '.join(result.stdout.split())[:300]}")
    return result.stdout


def _verdict(report: str) -> str:
    """'holds', or what SPIN says is broken.  Raises SearchFailed for an incomplete search that found nothing."""
    broken = re.search(r"^pan:\d+: (.+?)(?: \(at depth.*)?$", report, re.MULTILINE)
    if broken:
        return broken[1]
    if "max search depth too small" in report:
        raise SearchFailed("incomplete: the search was cut at its maximal depth")
    if "Search not completed" in report or "errors: 0" not in report:
        raise SearchFailed(f"incomplete: {' '.join(report.split())[:200] or 'no report'}")
    return "holds"


def _number(pattern: str, report: str) -> str:
    match = re.search(pattern, report)
    return match[1] if match else "0"


def _selected(arguments: argparse.Namespace) -> Iterator[Configuration]:
    for configuration in CONFIGURATIONS:
        if arguments.names:
            if any(configuration.name.startswith(name) for name in arguments.names):
                yield configuration
        elif arguments.deep or configuration.size == "quick" or (configuration.size == "default" and not arguments.quick):
            yield configuration


def main(argv: list[str] | None = None) -> int:
    """Run the configurations that the command line selects; return the exit status."""
    parser = argparse.ArgumentParser(description="Check the protocol models with SPIN.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a configuration, or a prefix of several")
    parser.add_argument("--quick", action="store_true", help="only the small ones")
    parser.add_argument("--deep", action="store_true", help="the large ones too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="searches at a time (default: one a processor)")
    parser.add_argument("--list", action="store_true", help="show the configurations and stop")
    arguments = parser.parse_args(argv)
    selected = list(_selected(arguments))
    if not selected:
        parser.error(f"no configuration is called {' or '.join(arguments.names)}")
    if arguments.list:
        for configuration in selected:
            defines = " ".join(f"{name}={value}" for name, value in configuration.defines.items())
            print(f"{configuration.name:34} {configuration.size:8} {configuration.expected:34} {configuration.model}.pml {defines}")
        return 0
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        print(f"run.py: not installed: {', '.join(missing)}", file=sys.stderr)
        return 2

    started = time.monotonic()
    mismatches: list[str] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(check, configuration): configuration for configuration in selected}
        for future in as_completed(running):
            configuration, outcome = running[future], future.result()
            verdict = outcome.found if outcome.as_expected else f"{outcome.found}; EXPECTED: {configuration.expected}"
            print(
                f"{'ok  ' if outcome.as_expected else 'FAIL'} {configuration.name:34} {outcome.states:>10,} states "
                f"{outcome.seconds:6.1f} s {outcome.memory_mb:6.0f} MB  {verdict}",
                flush=True,
            )
            if not outcome.as_expected:
                mismatches.append(configuration.name)
    print(f"{len(selected)} configurations, {len(mismatches)} not as expected, {time.monotonic() - started:.0f} s")
    if mismatches:
        print("not as expected:", *mismatches)
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
