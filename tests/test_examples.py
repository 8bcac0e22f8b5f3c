"""The examples run as they stand: one test each, all of them in a process of their own, with a bound."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shlock import snapshot

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

WATCHDOG = 60.0
"""Seconds after which an example is taken for hung."""

PATIENCE = 3.0
"""Seconds after which a program that should hang is taken to do so."""


def run(program: Path, *arguments: str, timeout: float = WATCHDOG) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; none of its processes is left when it has to be given up."""
    process = subprocess.Popen(
        [sys.executable, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # it need not be installed
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_every_example_is_listed_in_readme() -> None:
    readme = (ROOT / "README.rst").read_text()
    assert [path.name for path in EXAMPLES.iterdir() if path.is_file() and f"``{path.name}``" not in readme] == []


def test_kill_the_owner_goes_on_and_is_told() -> None:
    done = run(EXAMPLES / "kill_the_owner.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "parent: I hold it, and I was told: owner pid" in done.stdout


def test_named_lock_passes_between_programs_that_share_only_its_name() -> None:
    done = run(EXAMPLES / "named_lock.py", "--both")
    snapshot.clean("named-lock-example")
    assert (done.returncode, done.stderr) == (0, "")
    assert "second: the last holder died" in done.stdout


def test_pool_one_line_ends_with_the_sum_and_says_who_died() -> None:
    done = run(EXAMPLES / "pool_one_line.py")
    assert (done.returncode, done.stdout) == (0, f"sum: {sum(range(1000))}\n")
    assert "AbandonedWarning: " in done.stderr
    assert "Traceback" not in done.stderr


def test_pool_one_line_hangs_with_that_line_changed_back(tmp_path: Path) -> None:
    ours = (EXAMPLES / "pool_one_line.py").read_text()
    [line] = [line for line in ours.splitlines(keepends=True) if "  # was: " in line]
    assert "shlock" not in ours.replace(line, "")
    program = tmp_path / "before.py"
    program.write_text(ours.replace(line, line.partition("  # was: ")[2]))
    with pytest.raises(subprocess.TimeoutExpired):
        run(program, timeout=PATIENCE)


def test_work_queue_does_every_job_though_its_workers_are_killed() -> None:
    done = run(EXAMPLES / "work_queue.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 of 40 jobs done; 10 workers were killed" in done.stdout
    assert "given up: 0" in done.stdout


def test_shared_frame_is_never_torn_though_its_writer_is_killed() -> None:
    done = run(EXAMPLES / "shared_frame.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("20 writers killed, ")
    assert done.stdout.endswith(" looked at, 0 of them torn\n")


def test_producer_and_consumer_loses_no_message_though_consumers_are_killed() -> None:
    done = run(EXAMPLES / "producer_and_consumer.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "a consumer ended with -9 after message 300",
        "a consumer ended with -9 after message 600",
        "a consumer ended with 0 after message 1000",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="SCHED_FIFO needs root")
def test_mars_pathfinder_waits_for_medium_only_without_inheritance() -> None:
    done = run(EXAMPLES / "mars_pathfinder.py")
    assert (done.returncode, done.stderr) == (0, "")
    alone, inverted, inherited = (int(found) for found in re.findall(r": high waits (\d+) ms\n", done.stdout))
    assert inverted >= 10 * alone
    assert inherited <= 1.5 * alone


def test_four_roles_answers_every_datagram() -> None:
    done = run(EXAMPLES / "four_roles.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "answer: 5 bytes, sum 532",
        "answer: 25600 bytes, sum 3264000",
        "answer: 60000 bytes, sum 15300000",
        "exit codes: [0, 0]",
    ]
