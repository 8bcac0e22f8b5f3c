"""The demo: its table survives a kill after every single store, and whole runs come out exact."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Literal

import pytest

from shlock import demo
from shlock.demo import folder, job, table
from shlock.demo.table import Phase, State, Table, Word

WATCHDOG = 60.0
"""Seconds after which something that should have happened is taken for hung."""


class Killed(BaseException):
    """Stands for SIGKILL: no code of the demo catches it."""


class MortalTable(Table):
    """A table whose user is killed right after a given number of stores."""

    stores_left: int | None = None

    def _store(self, index: int, value: int) -> None:
        if self.stores_left == 0:
            raise Killed
        super()._store(index, value)
        if self.stores_left is not None:
            self.stores_left -= 1


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the segments that tables of this test created; none of them may be left."""
    names: list[str] = []

    class Recorded(SharedMemory):
        def __init__(self, create: bool, size: int) -> None:
            super().__init__(create=create, size=size)
            names.append(self.name)

    monkeypatch.setattr(table, "SharedMemory", Recorded)
    yield names
    assert not [name for name in names if Path("/dev/shm", name).exists()]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with 200 small files, an empty one and an unreadable one among them, in two levels."""
    for number in range(200):
        path = tmp_path / "data" / str(number % 7) / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 10))
    path.chmod(0)
    return tmp_path / "data"


def digest(index: int) -> bytes:
    return hashlib.sha256(str(index).encode()).digest()


def one_section(mortal: MortalTable, number: int, told: bool, action: Callable[[], object]) -> None:
    mortal.enter(0, number, told=told, waited_ns=2 * table.LONG_WAIT_NS)
    action()
    mortal.leave(number)


def claim_and_commit(mortal: MortalTable, number: int = 1, told: bool = False) -> None:
    """What a worker does for one file, in two critical sections."""
    index = None

    def claim() -> None:
        nonlocal index
        index = mortal.claim(0, number)

    one_section(mortal, number, told, claim)
    if index is not None:
        file = index
        one_section(mortal, number, False, lambda: mortal.commit(0, number, file, 1000 + file, digest(file)))


def count_stores(action: Callable[[MortalTable], None]) -> int:
    mortal = MortalTable(2, 1)
    mortal.stores_left = 10**9
    action(mortal)
    used = 10**9 - mortal.stores_left
    mortal.close()
    return used


STORES = count_stores(claim_and_commit)


def finish(mortal: MortalTable, told: bool) -> None:
    """A replacement does all the rest, and everything is as if nobody had ever been killed."""
    for _ in range(3):
        claim_and_commit(mortal, number=9, told=told)
        told = False
    assert mortal.violations() == []
    for index in range(2):
        result = mortal.result(index)
        assert (result.state, result.size, result.commits) == (State.DONE, 1000 + index, 1)
        assert result.digest == digest(index)
    assert mortal.statistic(Word.COUNT) == 2
    assert mortal.statistic(Word.BYTES) == 2001


def test_there_are_as_many_crash_steps_as_words_to_change() -> None:
    # sections: 2 x (SECTIONS, HOLDER, WAITS, LONGEST_WAIT_NS, HOLDER); updates: 4 and 15 words, each with its
    # index and old value noted before, and JOURNAL twice
    assert STORES == 2 * 5 + 3 * 4 + 2 + 3 * 15 + 2


@pytest.mark.parametrize("stores", range(STORES + 1))
def test_a_worker_killed_after_any_store_loses_nothing_and_counts_nothing_twice(stores: int, segments: list[str]) -> None:
    mortal = MortalTable(2, 1)
    try:
        mortal.stores_left = stores
        killed = False
        try:
            claim_and_commit(mortal)
        except Killed:
            killed = True
        assert killed == (stores < STORES)
        mortal.stores_left = None
        finish(mortal, told=killed)
    finally:
        mortal.close()


@pytest.mark.parametrize("stores", range(STORES))
def test_an_heir_killed_after_any_store_of_its_recovery_leaves_the_rest_to_the_next_heir(
    stores: int, segments: list[str]
) -> None:
    for more in range(60):
        mortal = MortalTable(2, 1)
        try:
            mortal.stores_left = stores
            with pytest.raises(Killed):
                claim_and_commit(mortal)
            mortal.stores_left = more
            killed_again = False
            try:
                mortal.enter(0, 2, told=True, waited_ns=0)
            except Killed:
                killed_again = True
            mortal.stores_left = None
            if not killed_again:
                mortal.leave(2)
            finish(mortal, told=killed_again)
        finally:
            mortal.close()
        if not killed_again:
            break
    else:
        pytest.fail("the recovery did not come to an end")


def test_without_recovery_a_torn_commit_is_seen(segments: list[str]) -> None:
    mortal = MortalTable(2, 1)
    try:
        mortal.stores_left = STORES - 4  # left out: the last quarter of SUM, the claim, and the end of the section
        with pytest.raises(Killed):
            claim_and_commit(mortal)
        assert [text[:2] for text in mortal.violations()] == ["T1", "T2", "T3"]
    finally:
        mortal.close()


def test_a_death_that_the_lock_hides_is_seen(segments: list[str]) -> None:
    mortal = MortalTable(2, 1)
    try:
        mortal.enter(0, 1, told=False, waited_ns=0)
        mortal.enter(0, 2, told=False, waited_ns=0)
        mortal.leave(2)
        assert mortal.violations() == ["the lock was handed on 1 times from inside the critical section and nobody was told"]
        mortal.leave(1)
        assert "two workers were inside the critical section 1 times" in mortal.violations()
    finally:
        mortal.close()


def test_a_file_committed_twice_is_seen(segments: list[str]) -> None:
    mortal = MortalTable(2, 1)
    try:
        claim_and_commit(mortal)
        one_section(mortal, 1, False, lambda: mortal.commit(0, 1, 0, 1000, digest(0)))
        found = mortal.violations()
        assert [text[:2] for text in found] == ["T2", "T4"]
    finally:
        mortal.close()


def test_a_lost_file_and_a_wrong_digest_are_told_by_the_comparison(files: Path) -> None:
    outcome = demo.Outcome(demo.Settings(files), folder.list_files(files))
    results = [
        table.Result(State.DONE, 1, size, 1, content)
        for size, content in (folder.digest_of(f.path) for f in outcome.listing.files)
    ]
    results[3] = table.Result(State.CLAIMED, 1, 0, 0, bytes(32))
    results[5] = table.Result(State.DONE, 1, results[5].size, 1, bytes(32))
    job._compare(outcome, outcome.listing.files, [results], [])
    assert [p.split("' ")[1][:12] for p in outcome.problems] == ["is lost in p", "has another "]


def test_a_file_that_somebody_changes_meanwhile_is_no_failure(files: Path) -> None:
    outcome = demo.Outcome(demo.Settings(files), folder.list_files(files))
    listed = outcome.listing.files
    results = [table.Result(State.DONE, 1, size, 1, content) for size, content in (folder.digest_of(f.path) for f in listed)]
    Path(listed[3].path).write_bytes(b"changed")
    Path(listed[4].path).unlink()
    job._compare(outcome, listed, [results], [])
    assert (outcome.problems, outcome.changed) == ([], 2)


@pytest.mark.parametrize("lock", ["multiprocessing", "shlock"])
def test_a_run_without_chaos_is_exact_with_either_lock(
    lock: Literal["multiprocessing", "shlock"], files: Path, segments: list[str]
) -> None:
    outcome = demo.run(demo.Settings(files, lock=lock, chaos=False, seconds=0), io.StringIO())
    assert (outcome.problems, outcome.deaths, outcome.passes) == ([], [], 1)
    assert len(outcome.listing.files) == 200
    # each file is claimed and committed, and each worker finds once that there is nothing left
    assert outcome.statistics[Word.SECTIONS] == 2 * 200 + 4
    assert demo.report(outcome).endswith("nothing lost, nothing counted twice\nPASS")
    assert multiprocessing.active_children() == []


def test_workers_killed_all_the_time_lose_nothing_and_count_nothing_twice(files: Path, segments: list[str]) -> None:
    settings = demo.Settings(files, kills_per_second=60, seconds=4, seed=int(time.time()), timeout=20)
    outcome = demo.run(settings, io.StringIO())
    print(demo.report(outcome))
    assert outcome.problems == []
    assert outcome.kills_inside > 5
    assert outcome.statistics[Word.TOLD] > 5
    assert outcome.statistics[Word.TAKEN_BACK] > 5
    assert multiprocessing.active_children() == []


def test_workers_that_hang_inside_are_removed_at_their_deadline(files: Path, segments: list[str]) -> None:
    settings = demo.Settings(files, kills_per_second=60, seconds=4, seed=int(time.time()), lease=0.05, timeout=20)
    outcome = demo.run(settings, io.StringIO())
    assert outcome.problems == [], settings.seed
    assert outcome.statistics[Word.HUNG] > 0, settings.seed
    assert outcome.statistics[Word.REMOVED] > 0, settings.seed


def test_multiprocessing_lock_hangs_and_the_dead_holder_is_named(files: Path, segments: list[str]) -> None:
    settings = demo.Settings(files, lock="multiprocessing", kills_per_second=60, hangs=False, seconds=WATCHDOG, timeout=1)
    started = time.monotonic()
    outcome = demo.run(settings, io.StringIO())
    assert 1 <= time.monotonic() - started < WATCHDOG
    [problem] = outcome.problems
    assert problem.startswith("hung: nothing has moved for 1 s")
    assert any(f"{death.name} (pid {death.pid})" in problem for death in outcome.deaths)
    assert demo.report(outcome).endswith("\nFAIL")
    assert multiprocessing.active_children() == []


def test_a_worker_that_fails_by_itself_ends_the_run(
    files: Path, segments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of paper")

    monkeypatch.setattr(Table, "commit", fail)
    with pytest.raises(demo.DemoError, match=r"worker-\d \(pid \d+\) failed with exit status 1"):
        demo.run(demo.Settings(files, lock="multiprocessing", chaos=False), io.StringIO())
    assert multiprocessing.active_children() == []
    assert "out of paper" in capfd.readouterr().err


def test_a_folder_that_is_missing_or_empty_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoError, match="there is no such folder"):
        demo.run(demo.Settings(tmp_path / "nowhere"))
    with pytest.raises(demo.DemoError, match="holds no file"):
        demo.run(demo.Settings(tmp_path))
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(demo.DemoError, match="not a folder"):
        demo.run(demo.Settings(file))
    os.truncate(file, folder.LARGEST_FILE + 1)
    with pytest.raises(demo.DemoError, match="only 1 of more than"):
        demo.run(demo.Settings(tmp_path))


def test_an_unreadable_file_counts_no_bytes_and_has_the_digest_of_its_error(tmp_path: Path) -> None:
    name = errno.errorcode[errno.ENOENT]
    assert folder.digest_of(str(tmp_path / "none")) == (0, hashlib.sha256(f"cannot be read: {name}".encode()).digest())


def test_the_phases_inside_are_those_between_acquire_and_release() -> None:
    assert [phase for phase in Phase if phase.inside] == [
        Phase.CHOOSING,
        Phase.RECOVERING,
        Phase.JOURNALLING,
        Phase.WRITING,
    ]


def children(pid: int) -> list[int]:
    """Pids of the processes whose parent this is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + WATCHDOG
    while not condition():
        assert time.monotonic() < give_up, f"not within {WATCHDOG} s: {what}"
        time.sleep(0.01)


def start_demo(files: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a demo that would run for long; returns it and pidfds of its workers."""
    arguments = ["demo", str(files), "--no-chaos", "--lock", "multiprocessing", "--seconds", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shlock", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(children(process.pid)) > 2, "three children")
    pidfds = []
    for pid in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))
    return process, pidfds


def check_all_gone(pidfds: list[int]) -> None:
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], WATCHDOG)[0], "a process of the demo is still alive"
        os.close(pidfd)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(files: Path, signum: signal.Signals) -> None:
    process, pidfds = start_demo(files)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=WATCHDOG)
    assert (process.returncode, output) == (128 + signum, "")
    assert errors.splitlines()[-1] == f"shlock: interrupted by {signum.name}"
    assert "resource_tracker" not in errors
    assert "Traceback" not in errors
    check_all_gone(pidfds)


def test_workers_die_with_a_demo_that_is_killed(files: Path) -> None:
    process, pidfds = start_demo(files)
    process.kill()
    process.communicate(timeout=WATCHDOG)  # returns when the resource tracker, which unlinks the segment, has ended too
    check_all_gone(pidfds)
