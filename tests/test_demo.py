"""The demo: its table survives a kill after every single store, its stream any kill, and whole runs come out exact."""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Literal

import pytest

from shlock import Lock, Queue, demo
from shlock.demo import folder, job, stream, table, workers
from shlock.demo.gathered import Gathered, record_of
from shlock.demo.stream import Stream
from shlock.demo.table import Phase, Table, Word

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


def commit_one(mortal: MortalTable, number: int = 1, told: bool = False, index: int = 0) -> None:
    """What a worker does for one file in its critical section."""
    one_section(mortal, number, told, lambda: mortal.commit(0, number, index, 1000 + index, digest(index)))


def count_stores(action: Callable[[MortalTable], None]) -> int:
    mortal = MortalTable(2, 1)
    mortal.stores_left = 10**9
    action(mortal)
    used = 10**9 - mortal.stores_left
    mortal.close()
    return used


STORES = count_stores(commit_one)


def finish(mortal: MortalTable, told: bool) -> None:
    """Another worker does all of it again, and everything is as if nobody had ever been killed."""
    for index in (0, 1, 1):
        commit_one(mortal, number=9, told=told, index=index)
        told = False
    assert mortal.violations() == []
    for index in range(2):
        result = mortal.result(index)
        assert (result.size, result.commits) == (1000 + index, 1)
        assert result.digest == digest(index)
    assert mortal.statistic(Word.COUNT) == 2
    assert mortal.statistic(Word.BYTES) == 2001


def test_there_are_as_many_crash_steps_as_words_to_change() -> None:
    # section: SECTIONS, HOLDER, WAITS, LONGEST_WAIT_NS, HOLDER; update: 13 words, each with its index and old value
    # noted before, and JOURNAL twice
    assert STORES == 5 + 3 * 13 + 2


@pytest.mark.parametrize("stores", range(STORES + 1))
def test_a_worker_killed_after_any_store_loses_nothing_and_counts_nothing_twice(stores: int, segments: list[str]) -> None:
    mortal = MortalTable(2, 1)
    try:
        mortal.stores_left = stores
        killed = False
        try:
            commit_one(mortal)
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
                commit_one(mortal)
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
        mortal.stores_left = STORES - 3  # left out: the last quarter of SUM, JOURNAL, and the end of the section
        with pytest.raises(Killed):
            commit_one(mortal)
        assert [text[:2] for text in mortal.violations()] == ["T1", "T2"]
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
        commit_one(mortal)
        mortal._store(mortal._entry_at(0) + table._COMMITS, 2)
        assert [text[:2] for text in mortal.violations()] == ["T3"]
    finally:
        mortal.close()


def test_an_item_that_is_delivered_again_after_its_commit_counts_once(segments: list[str]) -> None:
    mortal = MortalTable(2, 1)
    try:
        commit_one(mortal)
        one_section(mortal, 2, False, lambda: mortal.commit(0, 2, 0, 1000, digest(0), deliveries=2))
        assert mortal.violations() == []
        assert [mortal.statistic(word) for word in (Word.COUNT, Word.GIVEN_AGAIN, Word.THERE_ALREADY)] == [1, 1, 1]
        assert mortal.result(0).who == 1
    finally:
        mortal.close()


def test_a_result_that_is_gathered_again_counts_once() -> None:
    gathered = Gathered(2)
    for index in (0, 0, 1):
        assert not gathered.is_complete()
        gathered.add(index, record_of(f"file {index}", 1000, digest(index)))
    assert gathered.is_complete()
    assert gathered.records() == [record_of(f"file {index}", 1000, digest(index)) for index in range(2)]
    assert gathered.violations() == []


def test_a_result_that_was_counted_twice_in_the_block_is_seen() -> None:
    gathered = Gathered(2)
    gathered.add(0, record_of("file", 1000, digest(0)))
    with gathered._block.write() as view:
        view[0] = 2
    assert gathered.violations() == ["the Block holds 1 records and has counted 2"]


LONG = bytes(range(256)) * 700
"""A content of three pieces."""


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    assert 2 * stream._PIECE_BYTES < len(LONG) < 3 * stream._PIECE_BYTES
    path = tmp_path / "long"
    path.write_bytes(LONG)
    return path


@contextlib.contextmanager
def reader(of: Stream) -> Iterator[None]:
    """A process that reads, until the end of the block."""
    process = multiprocessing.get_context("fork").Process(target=of.serve, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join(WATCHDOG)


def in_child(action: Callable[[], object]) -> None:
    """Do it in a forked child that ends there as if it were killed."""

    def run() -> None:
        action()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(WATCHDOG)
    assert process.exitcode == -signal.SIGKILL


def test_a_worker_passes_over_what_was_sent_to_the_one_that_was_killed_before_it(long_file: Path, tmp_path: Path) -> None:
    of = Stream()
    other = tmp_path / "other"
    other.write_bytes(b"other")

    def ask_and_die() -> None:
        of._worker.send_bytes(stream._TICKET.pack(1, 0) + os.fsencode(long_file))
        assert of._worker.poll(WATCHDOG)

    with reader(of):
        in_child(ask_and_die)
        assert of.digest_of(str(other), 2, 1) == (5, hashlib.sha256(b"other").digest())


@pytest.mark.parametrize("pieces", range(4))
def test_a_reader_killed_after_any_piece_is_replaced_and_the_content_comes_whole(
    pieces: int, long_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Stream()
    sent = 0
    reserve = of._reader.reserve

    def die_or_reserve(size: int) -> object:
        nonlocal sent
        if sent == pieces:
            os.kill(os.getpid(), signal.SIGKILL)
        sent += 1
        return reserve(size)

    of._worker.send_bytes(stream._TICKET.pack(1, 0) + os.fsencode(long_file))
    of._worker.send_bytes(stream._TICKET.pack(1, 1) + os.fsencode(tmp_path / "none"))
    with monkeypatch.context() as patch:
        patch.setattr(of._reader, "reserve", die_or_reserve)
        patch.setattr(of._reader, "send_bytes", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        in_child(of.serve)
    assert of._worker.qsize() == pieces
    with monkeypatch.context() as patch, reader(of):
        patch.setattr(of._worker, "send_bytes", lambda _: None)  # it was asked for already
        assert of.digest_of(str(long_file), 1, 0) == (len(LONG), hashlib.sha256(LONG).digest())
        assert of.digest_of(str(tmp_path / "none"), 1, 1) == folder.digest_of(str(tmp_path / "none"))


def test_a_piece_that_is_missing_is_seen(long_file: Path) -> None:
    of = Stream()
    of._worker.send_bytes(stream._TICKET.pack(1, 0) + os.fsencode(long_file))
    in_child(lambda: of._answer((1, 0), str(long_file)))
    first = of._worker.recv_bytes()
    of._worker.recv_bytes()
    of._reader.send_bytes(first)
    with pytest.raises(ValueError, match="a piece from byte 0 on should come, and one from 131072 on came"):
        of.digest_of(str(long_file), 1, 0)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.STARTING, Phase.RECOVERING, Phase.READING)])
def test_a_worker_killed_in_any_phase_leaves_its_item_to_another_and_it_counts_once(
    phase: Phase, long_file: Path, segments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Lock(on_abandoned="ignore")
    shared = workers.Shared(Queue(), [Stream()], lock, Table(1, 1), Gathered(1))
    set_phase = shared.table.set_phase
    taking = 0  # how often; after the second time it has just acknowledged

    def die_or_set(slot: int, now: Phase) -> None:
        nonlocal taking
        taking += now is Phase.TAKING
        if now is phase and (taking == 2 or phase is not Phase.TAKING):
            os.kill(os.getpid(), signal.SIGKILL)
        set_phase(slot, now)

    shared.items.put((0, str(long_file)))
    parent = os.getpid()
    try:
        with reader(shared.streams[0]):
            with monkeypatch.context() as patch:
                patch.setattr(shared.table, "set_phase", die_or_set)
                in_child(lambda: workers.work(shared, 0, 1, parent))
            second = multiprocessing.get_context("fork").Process(target=workers.work, args=(shared, 0, 2, parent))
            second.start()
            second.join(WATCHDOG)
            assert second.exitcode == 0
        assert shared.table.violations() + shared.gathered.violations() == []
        is_committed = phase >= Phase.LEAVING or phase is Phase.TAKING
        assert shared.table.result(0).who == (1 if is_committed else 2)
        assert shared.table.result(0).commits == 1
        assert shared.gathered.records() == [record_of(str(long_file), *folder.digest_of(str(long_file)))]
        is_given_again = phase.has_item
        assert shared.table.statistic(Word.GIVEN_AGAIN) == is_given_again
        assert shared.table.statistic(Word.THERE_ALREADY) == (is_given_again and is_committed)
    finally:
        shared.table.close()


def test_an_item_is_acknowledged_only_when_its_result_is_in_the_block(
    long_file: Path, segments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = workers.Shared(Queue(), [Stream()], Lock(on_abandoned="ignore"), Table(1, 1), Gathered(1))
    shared.items.put((0, str(long_file)))
    parent = os.getpid()
    try:
        with reader(shared.streams[0]), monkeypatch.context() as patch:
            patch.setattr(shared.gathered, "add", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            in_child(lambda: workers.work(shared, 0, 1, parent))
        with shared.items.take(timeout=WATCHDOG) as item:
            assert item == (0, str(long_file))
    finally:
        shared.table.close()


def outcome_of(files: Path) -> tuple[demo.Outcome, job.Found]:
    """A run that has found out what is so."""
    outcome = demo.Outcome(demo.Settings(files), folder.list_files(files))
    found = [(f.path, *folder.digest_of(f.path)) for f in outcome.listing.files]
    results = [table.Result(1, size, 1, content) for _, size, content in found]
    return outcome, job.Found(results, [record_of(*one) for one in found])


def test_what_is_lost_or_wrong_in_table_or_block_is_told_by_the_comparison(files: Path) -> None:
    outcome, found = outcome_of(files)
    listed, results, records = outcome.listing.files, found.results, found.records
    results[3] = table.Result(0, 0, 0, bytes(32))
    results[5] = table.Result(1, results[5].size, 1, bytes(32))
    records[7] = bytes(len(records[7]))
    records[9] = record_of(listed[9].path + "x", results[9].size, results[9].digest)
    records[11] = record_of(listed[11].path, results[11].size + 1, results[11].digest)
    job._compare(outcome, listed, [found], [])
    assert [p.split("' ")[1] for p in outcome.problems] == [
        "is lost in pass 1: it is missing in the table",
        "has another size or digest in pass 1 than in the sequential run",
        "is lost in pass 1: it is missing in the Block",
        *2 * ["has another name, size or digest in the Block of pass 1 than in the sequential run"],
    ]
    assert outcome.checksum == ""


def test_what_is_wrong_in_a_later_pass_is_told_too(files: Path) -> None:
    outcome, found = outcome_of(files)
    second = job.Found(found.results, [*found.records[:-1], bytes(len(found.records[0]))])
    job._compare(outcome, outcome.listing.files, [found, second], [])
    assert [p.split("' ")[1] for p in outcome.problems] == ["is lost in pass 2: it is missing in the Block"]


def test_a_file_that_somebody_changes_meanwhile_is_no_failure(files: Path) -> None:
    outcome, found = outcome_of(files)
    listed = outcome.listing.files
    Path(listed[3].path).write_bytes(b"changed")
    Path(listed[4].path).unlink()
    job._compare(outcome, listed, [found], [])
    assert (outcome.problems, outcome.changed) == ([], 2)


@pytest.mark.parametrize("lock", ["multiprocessing", "shlock"])
def test_a_run_without_chaos_is_exact_with_either_lock(
    lock: Literal["multiprocessing", "shlock"], files: Path, segments: list[str]
) -> None:
    outcome = demo.run(demo.Settings(files, lock=lock, chaos=False, seconds=0), io.StringIO())
    assert (outcome.problems, outcome.deaths, outcome.passes) == ([], [], 1)
    assert len(outcome.listing.files) == 200
    assert outcome.statistics[Word.SECTIONS] == 200
    assert outcome.statistics[Word.GIVEN_AGAIN] == 0
    assert demo.report(outcome).endswith("nothing lost, nothing counted twice\nPASS")
    assert multiprocessing.active_children() == []


def runs(settings: demo.Settings) -> Iterator[demo.Outcome]:
    """One run after the other, with other seeds, for as long as a test needs them and may take."""
    give_up = time.monotonic() + 2 * WATCHDOG
    seed = int(time.time())
    while time.monotonic() < give_up:
        seed += 1
        outcome = demo.run(dataclasses.replace(settings, seed=seed), io.StringIO())
        print(demo.report(outcome))
        assert outcome.problems == []
        assert multiprocessing.active_children() == []
        yield outcome
    pytest.fail("chaos did not hit often enough")


def test_workers_and_readers_killed_all_the_time_lose_nothing_and_count_nothing_twice(files: Path, segments: list[str]) -> None:
    hits: Counter[str] = Counter()
    for outcome in runs(demo.Settings(files, kills_per_second=60, seconds=1, timeout=20)):
        hits["inside"] += outcome.kills_inside
        hits["of the reader"] += outcome.kills_by_phase[Phase.READING]
        hits["heirs told"] += outcome.statistics[Word.TOLD]
        hits["items again"] += outcome.statistics[Word.GIVEN_AGAIN]
        if len(hits) == 4 and min(hits.values()) > 5:
            break


def test_workers_that_hang_inside_are_removed_at_their_deadline(files: Path, segments: list[str]) -> None:
    hung = removed = 0
    for outcome in runs(demo.Settings(files, kills_per_second=60, seconds=1, lease=0.05, timeout=20)):
        hung += outcome.statistics[Word.HUNG]
        removed += outcome.statistics[Word.REMOVED]
        if hung and removed:
            break


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
    def fail(*_: object, **__: object) -> None:
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
        Phase.ENTERED,
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
