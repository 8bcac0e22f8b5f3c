"""Leases of readers: who reads too long is asked to leave, then killed, and only then a writer goes in; nobody else is hurt.

Everything that holds a lease runs in forked children, as in ``test_enforcement``.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import (
    PATIENCE,
    Child,
    DieAtLabel,
    DieAtOperation,
    Page,
    eventually,
    is_sleeping,
    supervisor_of,
    watch_steps,
)
from test_enforcement import (
    contracts,
    events,
    nobody_starts_a_supervisor,
    serve,
    spin,
    start_server,
    state_of,
    stay_in_c,
    stop,
    to_monotonic,
)
from test_rwlock import assert_free, is_refused, told
from test_signals import Interruption, Trial, interrupt_everywhere

import shlock
from shlock import _atomic, _client, _leased_readers, _ledger, _names, _process, _sys, cli, snapshot
from shlock import _layout as at
from shlock._arena import Arena
from shlock._segment import Segment
from shlock.errors import ContractDenied, LeaseExpired

SHORT, MEDIUM, LONG = 0.05, 0.4, 60.0
"""Seconds of the leases that are overrun; of those that end, but not before who has them did a few steps; and of the others."""

IN, OUT, GO, DONE, DEADLINE, WRITTEN = range(6)

#: At which of the source's labels a process is killed here, or stopped.
AT_THE_DOOR = ("C65 record taken, no deadline", "C67 deadline cleared, record not")
INSIDE = ("C66 deadline written", "C52 inside, reading")
CLEARED = "C53 record cleared, nobody woken"
LABELS = {*AT_THE_DOOR, *INSIDE, CLEARED}


def table(domain: str, lease: float = LONG, **options: Any) -> shlock.RWLock:
    return shlock.RWLock("table", domain=domain, lease=lease, **options)


def read(domain: str, page: Page, stay: Callable[[], Any], lease: float = LONG, **options: Any) -> None:
    """Be inside for so long, and say so."""
    with table(domain, lease, **options).read() as hold:
        page[DEADLINE] = round(hold.deadline * 1e9)
        page[IN] += 1
        stay()
    page[OUT] += 1


def write(domain: str, page: Page, timeout: float | None = PATIENCE) -> list[int]:
    """Go in once.  Of whose death we were told."""
    rwlock = table(domain)
    with told() as pids, rwlock.write(timeout):
        page[WRITTEN] += 1
        page[DONE] = time.monotonic_ns()
        assert rwlock.readers == 0
    return pids


def wait_for(page: Page, word: int = GO) -> Callable[[], int]:
    return lambda: eventually(lambda: page[word])


def held(domain: str) -> list[dict[str, Any]]:
    return [entry for entry in contracts(domain) if entry["holds"]]


def seen(domain: str) -> snapshot.PrimitiveSnapshot:
    """The table, as somebody sees it who has no contract."""
    return next(
        one for found in snapshot.domains() if found.domain == domain for one in found.primitives if one.name == "table"
    )


def records_of(domain: str, child: Child) -> list[int]:
    """The records that name a process."""
    segment = Segment.attach(_names.segment_name(domain))
    assert segment is not None
    try:
        arena = Arena.over(segment)
        starts = [arena.layout.block(index) for index in range(arena.layout.blocks)]
        blocks = [i for i, start in enumerate(starts) if arena.words.load(start + at.BLOCK_KIND) & at.KIND == at.RWLOCK]
        words = [arena.words.load(place) for block in blocks for place in arena.cells_of(block)]
        return [word for word in words if _process.pid_of(word) == child.pid]
    finally:
        segment.close()


# -- who reads too long ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stay", [spin, stop, stay_in_c], ids=lambda stay: stay.__name__)
def test_a_reader_that_stays_too_long_is_killed_and_then_the_writer_goes_in(stay: Callable[[], Any], domain: str) -> None:
    for _ in range(5):
        page = Page()
        reader = Child(read, domain, page, stay, SHORT)
        eventually(lambda page=page: page[IN])
        writer = Child(write, domain, page)
        assert reader.wait() == -signal.SIGKILL
        assert writer.result() == [], "nobody is told of a reader: it has changed nothing"
        assert page[DONE] >= page[DEADLINE], "the reader had its lease"
        (killed,) = [event for event in events(domain, "killed") if event["pid"] == reader.pid]
        assert killed["reason"] == "lease overrun"
    assert events(domain, "abandoned") == events(domain, "taken away") == []


def test_the_writer_does_not_go_in_before_the_killed_reader_is_dead(domain: str) -> None:
    """Here it takes its time to die, and says that it is inside until then."""
    page = Page()

    def serve_and_kill_slowly() -> None:
        _sys.System.send_signal = lambda *arguments: True  # type: ignore[method-assign]
        serve(domain)

    def keep_saying() -> None:
        while True:
            page[OUT] = time.monotonic_ns()

    Child(serve_and_kill_slowly)
    eventually(lambda: supervisor_of(domain))
    reader = Child(read, domain, page, keep_saying, SHORT)
    eventually(lambda: page[IN])
    writer = Child(write, domain, page)
    eventually(lambda: events(domain, "killed"))
    until = time.monotonic() + 0.2  # twenty polls of the writer
    eventually(lambda: time.monotonic() > until)
    assert not page[WRITTEN]
    reader.kill()
    assert writer.result() == []
    assert page[OUT] < page[DONE]


def test_a_reader_whose_grace_is_long_enough_is_asked_to_leave_and_lives(domain: str) -> None:
    page = Page()

    def leave_when_asked() -> tuple[bool, float, str]:
        rwlock = table(domain, MEDIUM, grace=LONG)
        with rwlock.read() as lease:
            assert rwlock.lease is lease
            assert 0 < lease.remaining() <= MEDIUM
            before = lease.terminate_requested
            page[IN] = 1
            eventually(lambda: lease.terminate_requested)
            with pytest.raises(LeaseExpired) as caught:
                lease.check()
            return before, lease.remaining(), str(caught.value)

    reader = Child(leave_when_asked)
    eventually(lambda: page[IN])
    assert Child(write, domain, page).result() == []
    before, remaining, text = reader.result()
    assert not before
    assert remaining <= 0
    assert "'table'" in text
    assert [event["pid"] for event in events(domain, "terminate")] == [reader.pid]
    assert events(domain, "killed") == []


def test_lease_expired_is_raised_in_a_reader_that_wants_it(domain: str) -> None:
    page = Page()

    def read_until_raised() -> str:
        rwlock = table(domain, SHORT, grace=LONG, on_terminate="raise")
        for _ in range(3):
            with pytest.raises(LeaseExpired), rwlock.read():
                spin()
            assert_free(rwlock)
        with pytest.raises(LeaseExpired), rwlock.write():
            spin()
        return repr(rwlock)

    reader = Child(read_until_raised)
    assert "readers=0" in reader.result()
    assert Child(write, domain, page).result() == []
    assert len(events(domain, "terminate")) == 4


def test_only_the_reader_that_overruns_is_killed(domain: str) -> None:
    page = Page()
    other = Child(read, domain, page, wait_for(page), LONG)
    eventually(lambda: page[IN] == 1)
    hog = Child(read, domain, page, spin, SHORT)
    assert hog.wait() == -signal.SIGKILL
    (entry,) = held(domain)
    assert entry["pid"] == other.pid
    writer = Child(write, domain, page)
    eventually(lambda: seen(domain).waiters)
    assert not page[WRITTEN]
    page[GO] = 1
    other.result()
    assert writer.result() == []


def test_who_reads_again_and_again_in_time_is_never_killed(domain: str) -> None:
    """Records are taken and left all the time, also just at the looks of the supervisor, while others write."""
    page, lease = Page(), 0.4

    def read_on() -> int:
        rwlock, count = table(domain, lease), 0
        while not page[GO]:
            with rwlock.read() as hold:
                count += 1
                if not count % 50:
                    time.sleep(0.002)
            if hold.remaining() < 0:
                page[OUT] = 1  # late, because others had the processor: it may be killed
        return count

    def write_on() -> int:
        rwlock, count = table(domain, lease), 0
        while not page[GO]:
            with rwlock.write():
                count += 1
        return count

    children = [Child(read_on), Child(read_on), Child(write_on)]
    until = time.monotonic() + 5 * lease
    eventually(lambda: time.monotonic() > until)
    page[GO] = 1
    if not page[OUT]:
        assert all(child.result() > 10 for child in children)
        assert events(domain, "killed") == events(domain, "taken away") == []


# -- threads of one process -----------------------------------------------------------------------------------------------


def in_threads(*functions: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_each_thread_of_a_process_has_a_deadline_of_its_own(domain: str) -> None:
    """One that began late is not measured by one that began early, and the first that overruns ends the process."""
    page, lease = Page(), 1.5

    def read_in_turns() -> None:
        rwlock = table(domain, lease)

        def early() -> None:
            with rwlock.read() as hold:
                page[IN] = 1
                eventually(lambda: hold.remaining() < lease / 2)
                eventually(lambda: page[IN] == 2)
            page[OUT] = 1

        def late() -> None:
            eventually(lambda: page[IN])
            begun = time.monotonic()
            eventually(lambda: time.monotonic() > begun + lease / 4)
            with rwlock.read() as hold:
                page[DEADLINE] = round(hold.deadline * 1e9)
                page[IN] = 2
                spin()

        in_threads(early, late)

    child = Child(read_in_turns)
    assert child.wait() == -signal.SIGKILL
    assert page[OUT] == 1
    (killed,) = events(domain, "killed")
    assert to_monotonic(killed["time"]) >= page[DEADLINE], "killed at the deadline of the one that had left in time"


def test_a_thread_that_overruns_ends_the_process_although_another_one_came_and_went(domain: str) -> None:
    page = Page()

    def hang_beside_another() -> None:
        rwlock = table(domain, 0.2)

        def come_and_go() -> None:
            eventually(lambda: page[IN])
            while True:
                with rwlock.read():
                    page[OUT] += 1

        in_threads(lambda: read(domain, page, spin, 0.2), come_and_go)

    child = Child(hang_beside_another)
    eventually(lambda: page[OUT] > 3)
    assert Child(write, domain, page).result() == []
    assert child.wait() == -signal.SIGKILL


def test_as_many_threads_of_a_process_read_as_there_are_records_and_all_are_seen(domain: str) -> None:
    page, count = Page(), 6

    def read_together() -> tuple[int, list[bool]]:
        rwlock = table(domain, readers=count)
        barrier = threading.Barrier(count + 1)
        refused: list[bool] = []
        deadlines: set[float] = set()

        def one() -> None:
            with rwlock.read() as lease:
                deadlines.add(lease.deadline)
                barrier.wait()
                eventually(lambda: page[GO])

        def look() -> None:
            barrier.wait()
            refused.append(is_refused(rwlock, "read"))
            page[IN] = 1
            eventually(lambda: page[GO])

        in_threads(*[one] * count, look)
        refused.append(is_refused(rwlock, "read"))
        assert_free(rwlock)
        return len(deadlines), refused

    child = Child(read_together)
    eventually(lambda: page[IN])
    (entry,) = contracts(domain)
    assert (entry["pid"], entry["holds"], entry["readers"]) == (child.pid, True, count)
    page[GO] = 1
    assert child.result() == (count, [True, False])
    assert events(domain, "killed") == []


def test_a_thread_that_finds_only_the_seat_of_the_last_record_taken_is_woken_without_polling(domain: str) -> None:
    """The record is free already, its seat is not; and whoever left it has looked whom to wake."""
    page = Page()

    def leave_slowly() -> bool:
        rwlock = table(domain, readers=1)
        first = threading.get_ident()
        leave_seat = _leased_readers.LeasedRWWords._leave_seat

        def read_beside() -> None:
            with rwlock.read():
                page[IN] = 1

        def wait_for_the_other(words: Any, hold: Any) -> None:
            if threading.get_ident() == first and hold.back.succeeded() and other.ident is None:
                other.start()
                eventually(lambda: rwlock.waiters)
            leave_seat(words, hold)

        other = threading.Thread(target=read_beside, daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shlock._parking.POLL_INTERVAL", 10_000.0)
            with rwlock.read():
                patch.setattr(_leased_readers.LeasedRWWords, "_leave_seat", wait_for_the_other)
            eventually(lambda: page[IN])
        other.join()
        assert_free(rwlock)
        return True

    assert Child(leave_slowly).result()


def test_a_read_in_a_read_has_the_lease_of_the_outer_one(domain: str) -> None:
    def nest() -> bool:
        rwlock = table(domain)
        with rwlock.read() as outer, rwlock.read() as inner:
            same = inner is outer
        with rwlock.read() as later:
            assert later is not outer
        assert_free(rwlock)
        return same

    assert Child(nest).result()


def test_a_process_that_waits_to_write_beside_its_own_reader_dies_with_it_and_nobody_is_told(domain: str) -> None:
    page = Page()

    def read_and_wait() -> None:
        rwlock = table(domain, 0.3)

        def wait_to_write() -> None:
            eventually(lambda: page[IN])
            with rwlock.write():
                page[WRITTEN] = 1

        in_threads(lambda: read(domain, page, spin, 0.3), wait_to_write)

    child = Child(read_and_wait)
    eventually(lambda: page[IN])
    assert child.wait() == -signal.SIGKILL
    assert not page[WRITTEN]
    assert Child(write, domain, page).result() == []


# -- tokens ---------------------------------------------------------------------------------------------------------------


def test_the_token_of_a_reader_is_between_those_of_the_writers_before_and_after_it(domain: str) -> None:
    page = Page()
    LAST, LEAST = 10, 11  # the token of the last writer that was inside, and the least that one may still have

    def write_on(number: int) -> int:
        rwlock, count = table(domain), 0
        while not page[GO]:
            with rwlock.write() as lease:
                assert lease.token > page[LAST], "a token came twice"
                assert lease.token > page[LEAST], "a reader before had as large a one"
                page[LAST] = lease.token
                count += 1
                page[20 + number] = count
        return count

    def read_on(number: int) -> int:
        rwlock, count = table(domain), 0
        while not page[GO]:
            with rwlock.read() as lease:
                assert lease.token >= page[LAST], "smaller than that of a writer that has been inside"
                page[LEAST] = max(page[LEAST], lease.token)
                count += 1
                page[22 + number] = count
        return count

    children = [Child(write_on, 0), Child(write_on, 1), Child(read_on, 0), Child(read_on, 1)]
    eventually(
        lambda: (
            (page[LAST] > 400 and all(page[20 + number] for number in range(4)))
            or not all(child.is_alive() for child in children)
        )
    )
    page[GO] = 1
    assert all(child.result() > 0 for child in children)


@pytest.mark.parametrize("meets", [True, False])
def test_a_writer_has_a_larger_token_than_a_reader_that_had_looked_just_before_it_came(meets: bool, domain: str) -> None:
    """It has its word and its token already when that reader goes in, and finds it inside or gone."""
    page = Page()

    def read_late() -> int:
        rwlock = table(domain)

        def at_point(label: str) -> None:
            if label == "C65 record taken, no deadline":
                page[IN] = 1
                eventually(lambda: page[WRITTEN])

        _sys.crash_points[:] = [at_point]
        with rwlock.read() as lease:
            if meets:
                eventually(lambda: rwlock.waiters)
        page[OUT] = 1
        return int(lease.token)

    def write_after() -> int:
        rwlock = table(domain)
        eventually(lambda: page[IN])

        def at_point(label: str) -> None:
            if label == "C54 W taken, nobody looked for":
                page[WRITTEN] = 1
                eventually(lambda: meets or page[OUT])

        _sys.crash_points[:] = [at_point]
        with rwlock.write(PATIENCE) as lease:
            assert lease.token == rwlock.lease.token
            return int(lease.token)

    reader, writer = Child(read_late), Child(write_after)
    assert reader.result() < writer.result()


# -- killed or stopped at each step ---------------------------------------------------------------------------------------


def stop_at(domain: str, page: Page, label: str, how: str, lease: float) -> str:
    """Read, and stop there, or die there; say who we are."""
    step = DieAtLabel(label, 1)

    def at_point(seen: str) -> None:
        if how == "killed":
            step.label(seen)
        elif seen == label and not page[IN]:
            page[IN] = 1
            os.kill(os.getpid(), signal.SIGSTOP)

    rwlock = table(domain, lease)
    _sys.crash_points[:] = [at_point]
    with rwlock.read() as hold:
        assert hold.remaining() > 0
        assert rwlock.readers >= 1
    _sys.crash_points.clear()
    assert not rwlock._words.holds
    return repr(rwlock)


@pytest.mark.parametrize("label", sorted(LABELS))
def test_the_others_go_on_when_a_leased_reader_is_killed_at(label: str, domain: str) -> None:
    page = Page()
    keeper = Child(read, domain, page, wait_for(page))  # so that the supervisor stays
    eventually(lambda: page[IN])
    victim = Child(stop_at, domain, page, label, "killed", LONG)
    assert victim.wait() == -signal.SIGKILL
    eventually(lambda: seen(domain).state == "1 reader", "the keeper reads on")
    eventually(lambda: not records_of(domain, victim), "the supervisor clears the record of the dead one")
    page[GO] = 1
    keeper.result()
    assert Child(write, domain, page).result() == []
    assert seen(domain).state == "free"
    assert events(domain, "killed") == events(domain, "abandoned") == []


def test_the_others_go_on_when_a_leased_reader_is_killed_before_or_after_any_operation(domain: str) -> None:
    page, number = Page(), 0
    start_server(domain)

    def use(number: int) -> None:
        rwlock = table(domain)
        watch_steps(DieAtOperation(number), rwlock)
        with rwlock.read():
            pass

    while True:
        number += 1
        status = Child(use, number).wait()
        assert Child(write, domain, page).result() == []
        assert seen(domain).state == "free"
        if not status:
            break
        assert status == -signal.SIGKILL
    assert number > 6, f"only {number - 1} operations"
    assert events(domain, "abandoned") == events(domain, "taken away") == []


@pytest.mark.parametrize("label", AT_THE_DOOR)
def test_a_reader_that_is_stopped_at_the_door_loses_its_record_but_not_its_life(label: str, domain: str) -> None:
    page = Page()
    victim = Child(stop_at, domain, page, label, "stopped", MEDIUM)
    eventually(lambda: page[IN] and state_of(victim.pid) in "TZ")
    assert Child(write, domain, page).result() == []
    assert [event["pid"] for event in events(domain, "taken away")] == [victim.pid]
    other = Child(read, domain, page, wait_for(page))  # in the record that the stopped one had
    eventually(lambda: page[IN] == 2)
    victim.go_on()
    assert "readers=1" in victim.result(), "it has not cleared what is another's by now"
    page[GO] = 1
    other.result()
    assert seen(domain).state == "free"
    assert events(domain, "killed") == []


def test_a_thread_that_stalls_at_the_door_clears_no_record_that_another_thread_has_by_now(domain: str) -> None:
    page = Page()

    def stall_and_go_on() -> int:
        rwlock = table(domain, MEDIUM, readers=2)
        first, place = threading.get_ident(), rwlock._words.cells[0][0]
        seen_inside = []

        def at_point(label: str) -> None:
            if label == "C67 deadline cleared, record not" and threading.get_ident() == first:
                eventually(lambda: not rwlock._words.view[place], "the record is taken away")
                other.start()
                eventually(lambda: page[IN])

        def read_beside() -> None:
            with rwlock.read():
                page[IN] = 1
                eventually(lambda: page[GO])
                seen_inside.append(rwlock.readers)

        other = threading.Thread(target=read_beside)
        _sys.crash_points[:] = [at_point]
        with rwlock.read():
            pass
        page[GO] = 1
        other.join()
        _sys.crash_points.clear()
        assert_free(rwlock)
        return seen_inside[0]

    assert Child(stall_and_go_on).result() == 1


@pytest.mark.parametrize("how", ["hangs inside", *AT_THE_DOOR])
def test_the_supervisor_wakes_the_writer_that_waited_for_a_reader(how: str, domain: str) -> None:
    page = Page()

    def write_without_polling() -> list[int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shlock._parking.POLL_INTERVAL", 10_000.0)
            return write(domain, page, None)

    if how in AT_THE_DOOR:
        reader = Child(stop_at, domain, page, how, "stopped", 1.0)
    else:
        reader = Child(read, domain, page, spin, 1.0)
    eventually(lambda: page[IN])
    writer = Child(write_without_polling)
    eventually(lambda: (seen(domain).waiters and is_sleeping(writer.pid)) or page[WRITTEN])
    assert writer.result() == []
    reader.kill()


def test_a_reader_that_is_stopped_at_the_door_waits_for_the_writer_that_has_gone_in_meanwhile(domain: str) -> None:
    page = Page()

    def write_long() -> None:
        with table(domain).write():
            page[WRITTEN] = 1
            eventually(lambda: page[GO])
            page[DONE] = 1

    def read_after() -> int:
        stop_at(domain, page, AT_THE_DOOR[0], "stopped", MEDIUM)
        return page[DONE]

    victim = Child(read_after)
    eventually(lambda: page[IN] and state_of(victim.pid) in "TZ")
    writer = Child(write_long)
    eventually(lambda: page[WRITTEN])
    victim.go_on()
    eventually(lambda: seen(domain).waiters or not victim.is_alive())
    page[GO] = 1
    writer.result()
    assert victim.result() == 1, "it was inside with the writer"


@pytest.mark.parametrize("label", INSIDE)
def test_a_reader_that_is_stopped_inside_is_killed(label: str, domain: str) -> None:
    page = Page()
    victim = Child(stop_at, domain, page, label, "stopped", MEDIUM)
    eventually(lambda: page[IN])
    assert Child(write, domain, page).result() == []
    assert victim.wait() == -signal.SIGKILL
    assert [event["pid"] for event in events(domain, "killed")] == [victim.pid]


def test_a_reader_that_was_let_in_and_does_not_come_keeps_the_writers_out_for_a_lease_only(domain: str) -> None:
    page = Page()

    def wait_and_read() -> int:
        with table(domain, MEDIUM).read(PATIENCE):
            return page[WRITTEN]

    def write_first() -> None:
        with table(domain).write():
            page[IN] = 1
            eventually(lambda: page[GO])

    first = Child(write_first)
    eventually(lambda: page[IN])
    reader = Child(wait_and_read)
    eventually(lambda: seen(domain).waiters)
    reader.stop()
    second = Child(write, domain, page)
    eventually(lambda: len(seen(domain).waiters) == 2)
    page[GO] = 1
    first.result()
    assert second.result() == []
    assert [event["pid"] for event in events(domain, "taken away")] == [reader.pid]
    reader.go_on()
    assert reader.result() == 1
    assert seen(domain).state == "free"


def test_a_reader_that_finds_its_record_marked_keeps_it(domain: str) -> None:
    """T1 was made, and then nothing: the supervisor died there."""

    def find_it_marked() -> tuple[int, bool]:
        rwlock = table(domain)
        seen: list[int] = []

        def at_point(label: str) -> None:
            words = rwlock._words
            place = words.cells[0][0]
            if label == "C66 deadline written":
                words.view[place] |= at.TAKEN
            elif label == "C52 inside, reading":
                seen.append(words.view[place])
            elif label == "C67 deadline cleared, record not":
                words.view[place] |= at.TAKEN

        _sys.crash_points[:] = [at_point]
        with rwlock.read():
            pass
        _sys.crash_points.clear()
        assert_free(rwlock)
        return seen[0], seen[0] == _process.current.word

    assert Child(find_it_marked).result()[1]


def test_a_reader_whose_record_is_marked_just_as_it_steps_back_is_not_let_in(domain: str) -> None:
    """Its exchange fails, although nobody has let it in; and the writer that has W is inside, having found no record."""
    page = Page()

    def write_long() -> None:
        with table(domain).write():
            page[WRITTEN] = 1
            eventually(lambda: page[GO])
            page[DONE] = 1

    def step_back() -> int:
        rwlock = table(domain)
        view, me = rwlock._words.view, _process.current.word
        place = rwlock._words.cells[0][0]
        exchange = _atomic.Operand.compare_exchange

        def compare_exchange(operand: Any, word: Any, expected: int, desired: int) -> bool:
            if (expected, desired) == (0, me) and word is not _leased_readers._NO_RECORD and not page[IN]:
                page[IN] = 1
                eventually(lambda: page[WRITTEN])
            elif (expected, desired) == (me, me | at.IN_LINE):
                view[place] |= at.TAKEN  # T1
            return exchange(operand, word, expected, desired)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_atomic.Operand, "compare_exchange", compare_exchange)
            with rwlock.read(PATIENCE):
                return page[DONE]

    reader = Child(step_back)
    eventually(lambda: page[IN])
    writer = Child(write_long)
    eventually(lambda: seen(domain).waiters or not reader.is_alive())
    page[GO] = 1
    writer.result()
    assert reader.result() == 1, "it was inside with the writer"


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_a_signal_at_any_moment_leaves_a_free_lock_and_an_empty_ledger(timeout: float | None, domain: str) -> None:
    def interrupt_reads() -> None:
        rwlock = table(domain)

        class Read(Trial):
            def __init__(self) -> None:
                self.inside = False

            def operate(self) -> None:
                with rwlock.read(timeout):
                    self.inside = True

            def finish(self, outcome: Interruption) -> None:
                if outcome.at_entry and self.inside and rwlock.locked():  # the documented limit
                    assert outcome.where.startswith("Reading.__exit__"), outcome.where
                    rwlock.read().__exit__()
                assert_free(rwlock)
                words = rwlock._words
                assert words.holds == {}
                for slot in words.grant.readers.values():
                    assert slot.seat is None
                    assert slot.lease is None

        interrupt_everywhere(Read, 20)

    Child(interrupt_reads).result()
    assert events(domain, "taken away") == []


# -- processes and supervisors that come and go ---------------------------------------------------------------------------


def test_a_child_that_is_forked_inside_a_read_has_nothing_of_it(domain: str) -> None:
    page = Page()

    def fork_inside() -> None:
        rwlock = table(domain)
        holding = rwlock.read()

        def in_child() -> tuple[int, bool]:
            holding.__exit__()  # its parent's
            assert rwlock.lease is None
            with rwlock.read(PATIENCE) as lease:
                return rwlock.readers, lease.remaining() > 0

        with holding as lease:
            assert Child(in_child).result() == (2, True)
            assert rwlock.lease is lease
            page[IN] = 1
        assert_free(rwlock)

    Child(fork_inside).result()


def test_readers_go_on_while_no_supervisor_runs_and_the_next_one_ends_who_overran_meanwhile(domain: str) -> None:
    page = Page()
    first = start_server(domain)
    hog = Child(read, domain, page, stop, SHORT)
    other = Child(read_anew, domain, page)
    eventually(lambda: page[IN] == 2 and state_of(hog.pid) in "TZ")
    with nobody_starts_a_supervisor(domain):
        first.kill()
        page[GO] = 1  # in a record of its own, of which no supervisor has ever known
        eventually(lambda: page[OUT])
        assert supervisor_of(domain) is None
        assert hog.is_alive()
    second = start_server(domain)
    adopted = {event["pid"] for event in events(domain, "adopted")}
    assert adopted == {hog.pid, other.pid}
    assert hog.wait() == -signal.SIGKILL
    # Not at once: it is just presenting its contract.
    eventually(lambda: [(entry["pid"], entry["readers"]) for entry in held(domain)] == [(other.pid, 2)])
    page[DONE] = 1
    other.result()
    assert Child(write, domain, page).result() == []
    second.kill()


def read_anew(domain: str, page: Page) -> None:
    """Read in a second record, which is taken while there is no supervisor."""
    rwlock = table(domain)
    with rwlock.read():
        page[IN] += 1
        eventually(lambda: page[GO])

        def again() -> None:
            with rwlock.read():
                page[OUT] = 1
                eventually(lambda: page[DONE])

        in_threads(again)


@pytest.mark.parametrize("label", ["S-T1 TAKEN", "S-T3 settled, nobody woken", "S-K1 terminate call made", "S-K4 killed"])
def test_the_writer_goes_in_although_the_supervisor_dies_at(label: str, domain: str) -> None:
    page = Page()
    server = start_server(domain, label=label)
    with nobody_starts_a_supervisor(domain):
        if label.startswith("S-T"):
            reader = Child(stop_at, domain, page, AT_THE_DOOR[0], "stopped", MEDIUM)
        else:  # with a grace, or it is killed at once
            reader = Child(functools.partial(read, domain, page, spin, SHORT, grace=SHORT))
        eventually(lambda: page[IN])
        writer = Child(write, domain, page)
        assert server.wait() == -signal.SIGKILL
    start_server(domain)
    assert writer.result() == []
    if label.startswith("S-T"):
        reader.go_on()
        reader.result()
    else:
        assert reader.wait() == -signal.SIGKILL


# -- the supervisor's decisions, and what is shown ------------------------------------------------------------------------


def test_to_revoke_asks_every_reader_and_to_kill_ends_them_but_not_the_writer_that_waits(domain: str) -> None:
    page = Page()

    def leave_when_asked() -> None:
        with table(domain, LONG, grace=LONG).read() as lease:
            page[IN] += 1
            eventually(lambda: lease.terminate_requested)

    polite = Child(leave_when_asked)
    eventually(lambda: page[IN] == 1)
    hog = Child(functools.partial(read, domain, page, spin, LONG, grace=LONG))
    eventually(lambda: page[IN] == 2)
    writer = Child(write, domain, page)
    eventually(lambda: seen(domain).waiters)
    assert set(_client.ask(domain, {"op": "revoke", "name": "table"})["holders"]) == {polite.pid, hog.pid}
    polite.result()
    assert hog.is_alive()
    assert not page[WRITTEN]
    assert _client.ask(domain, {"op": "kill", "name": "table"})["holders"] == [hog.pid]
    assert hog.wait() == -signal.SIGKILL
    assert writer.result() == []
    assert [event["reason"] for event in events(domain, "killed")] == ["killed by command"]


def test_a_contract_for_reading_limits_who_reads(domain: str) -> None:
    page = Page()

    def read_only() -> None:
        rwlock = table(domain, SHORT, operations=("read",))
        with pytest.raises(ContractDenied, match="does not allow to write, only read"), rwlock.write():
            pass
        assert rwlock.lease is None
        read(domain, page, spin, SHORT, operations=("read",))

    hog = Child(read_only)
    assert hog.wait() == -signal.SIGKILL
    assert page[IN] == 1
    assert Child(write, domain, page).result() == []


def test_a_policy_that_allows_only_to_read_is_kept(domain: str) -> None:
    text = """
[[rule]]
users = ["@self"]
names = ["*"]
operations = ["read"]
longest_lease = 60.0
"""
    start_server(domain, text)

    def try_both() -> float:
        with pytest.raises(ContractDenied):
            table(domain)
        with table(domain, operations=("read",)).read() as lease:
            return lease.remaining()

    assert 0 < Child(try_both).result() <= LONG


def test_ps_and_why_say_who_reads_and_until_when(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page()
    long = Child(functools.partial(read, domain, page, wait_for(page), 50.0, record_site=True))
    eventually(lambda: page[IN] == 1)
    short = Child(read, domain, page, wait_for(page), 40.0)
    eventually(lambda: page[IN] == 2)
    found = seen(domain)
    assert found.state == "2 readers"
    assert [reader.pid for reader in found.readers] == [short.pid, long.pid], "the one whose lease ends first"
    first, second = found.readers
    assert first.remaining is not None
    assert 0 < first.remaining <= 40.0
    assert (first.site, first.terminate_requested) == (None, False)
    assert second.site is not None
    assert "test_leased_readers.py:" in second.site
    assert cli.main(["why", "--domain", domain, "table"]) == 0
    text = capsys.readouterr().out
    assert f"pid {short.pid}" in text
    assert re.search(r"reads it; its lease ends in \d+\.\d s\.", text)
    assert f"test_leased_readers.py:{second.site.rpartition(':')[2]}; its lease ends in" in text
    assert cli.main(["ps", "--domain", domain]) == 0
    assert re.search(r" 2 readers +\d+\.\d s", capsys.readouterr().out)
    assert cli.main(["ps", "--domain", domain, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["domains"][0]["primitives"]
    assert len(entry["readers"]) == 2
    page[GO] = 1
    for child in (long, short):
        child.result()
    assert seen(domain).readers == ()


def test_slots_of_readers_are_given_back_with_the_lock(domain: str) -> None:
    """And a lock that has the slot afterwards is not taken for a record."""

    def use_many() -> tuple[int, list[int]]:
        used, holds = 0, {}
        for number in range(20):
            rwlock = shlock.RWLock(f"table {number % 3}", domain=domain, lease=LONG)
            with rwlock.read():
                pass
            with rwlock.read():
                pass
            connection = rwlock._words.grant.connection
            (slot,) = rwlock._words.grant.readers.values()
            assert connection.ledger.view[_ledger.HOLDS + slot.number] - holds.get(slot.number, 0) == 2, "holds are counted"
            holds[slot.number] = connection.ledger.view[_ledger.HOLDS + slot.number]
            used = max(used, rwlock._words.grant.number, *(slot.number for slot in rwlock._words.grant.readers.values()))
            del rwlock
        lock = shlock.Lock("lock", domain=domain, lease=LONG)
        view = connection.ledger.view
        with lock:
            return used, [view[_ledger.RECORD + lock._words.grant.number]]

    used, record = Child(use_many).result()
    assert used <= 4
    assert record == [0]
