"""Leases among real processes: who overruns is killed and the lock goes on, who does not is let alone, whatever dies meanwhile.

Everything that holds a lease runs in forked children, so this process never is a client.  Whoever is inside says so in
shared memory; who comes next checks that the one before has left, or is dead, and that the token has grown.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pickle
import random
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    PATIENCE,
    Child,
    DieAtLabel,
    Page,
    end_process,
    eventually,
    is_sleeping,
    run,
    supervisor_of,
)

import shlock
from shlock import _client, _ledger, _messages, _names, _process, _sys
from shlock import _layout as at
from shlock.errors import ContractDenied, LeaseExpired
from shlock.supervisor.leases import LEFT, deadline_of
from shlock.supervisor.policy import parse
from shlock.supervisor.server import Server, run_embedded

# Words of the page.
INSIDE, TOKEN, VIOLATIONS, FALLS, HELD, GO, DONE, OVER, READY, PROGRESS, STAY = range(11)
LEFT_OF, LEFT_AT, COUNT, WORD_OF, ARENA_OF, GOT_IN, LATE_AT = range(12, 40, 4)  # one for each of four processes

SHORT = 0.03
"""Seconds of the leases that are overrun.  Whoever is to keep its lock has a lease of LONG seconds."""
LONG = 60.0

soak = [pytest.mark.soak, pytest.mark.patience(900)]
overruns = pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=soak)])


# -- processes, and what they do ------------------------------------------------------------------------------------------


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page()
    yield page
    assert page[VIOLATIONS] == 0, "two were inside"
    assert page[FALLS] == 0, "a token fell, or came twice"


def events(domain: str, kind: str, after: int = 0) -> list[dict[str, Any]]:
    """Those of one kind, of the present supervisor, from a number on."""
    found: list[dict[str, Any]] = []
    while more := _client.ask(domain, {"op": "events", "after": found[-1]["number"] if found else after})["events"]:
        found += more
    return [event for event in found if event["event"] == kind]


def event_of(domain: str, pid: int, after: int) -> dict[str, Any] | None:
    """Of a killed process; it is dead before its end is noted."""
    return next((event for event in events(domain, "killed", after) if event["pid"] == pid), None)


def contracts(domain: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        answer = _client.ask(domain, {"op": "contracts", "from": len(found)})
        found += answer["contracts"]
        if len(found) >= answer["all"]:
            return found


@contextlib.contextmanager
def nobody_starts_a_supervisor(domain: str) -> Iterator[None]:
    """Until the end of the block, because we have the right to, and don't."""
    claim = _client._claim_start(_messages.address(os.geteuid(), domain))
    assert claim is not None
    with claim:
        yield


def serve(domain: str, text: str | None = None, label: str | None = None) -> None:
    """Be the supervisor; with a label, die there."""
    if label is not None:
        _sys.crash_points[:] = [DieAtLabel(label, 1).label]
    Server(domain, None if text is None else parse(text, "policy")).run()


def start_server(domain: str, text: str | None = None, label: str | None = None) -> Child:
    server = Child(serve, domain, text, label)
    eventually(lambda: supervisor_of(domain) == server.pid or not server.is_alive(), "the supervisor listens")
    assert server.is_alive(), server.result()
    return server


def leased(domain: str, name: str = "lock", lease: float = LONG, **options: Any) -> Any:
    return shlock.Lock(name, domain=domain, on_abandoned="ignore", lease=lease, **options)


def go_in(page: Page, lease: Any) -> None:
    """Note that we are inside, and what should not be so."""
    before = page[INSIDE]
    if before and _process.is_alive(before):
        page[VIOLATIONS] += 1
    if lease.token <= page[TOKEN]:
        page[FALLS] += 1
    page[TOKEN] = lease.token
    page[INSIDE] = _process.current.word


def go_out(page: Page) -> None:
    if page[INSIDE] != _process.current.word:
        page[VIOLATIONS] += 1
    page[INSIDE] = 0


def inherit(domain: str, page: Page, rounds: int, name: str = "lock") -> list[tuple[int, str] | None]:
    """Get in at each round; of whose end we were told, and of what reason."""
    lock = leased(domain, name)
    told = []
    for number in range(1, rounds + 1):
        eventually(lambda: page[GO] >= number)
        assert lock.acquire(timeout=PATIENCE), "the lock is lost"
        go_in(page, lock.lease)
        abandoned = lock.abandoned
        told.append(None if abandoned is None else (abandoned.pid, abandoned.reason))
        eventually(lambda: not page[STAY])
        go_out(page)
        lock.release()
        page[DONE] = number
    return told


def overrun(
    domain: str, page: Page, number: int, stay: Callable[[], Any], name: str = "lock", lease: float = SHORT, grace: float = 0.0
) -> None:
    """Get in and stay there."""
    lock = leased(domain, name, lease, grace=grace)
    with lock as hold:
        go_in(page, hold)
        page[LEFT_OF] = round(hold.deadline * 1e9)
        page[HELD] = number
        stay()


def check_that_overruns_are_killed(domain: str, page: Page, name: str = "lock") -> None:
    page[HELD] = 0
    hog = Child(overrun, domain, page, 1, spin, name)
    assert hog.wait() == -signal.SIGKILL
    page[GO] = page[DONE] = 0
    heir = Child(inherit, domain, page, 1, name)
    page[GO] = 1
    assert heir.result() in ([(hog.pid, "lease overrun")], [None]), "None: another one inherited first"


# -- ways to stay too long ------------------------------------------------------------------------------------------------


def spin() -> None:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        pass


def sleep() -> None:
    time.sleep(PATIENCE)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stay_in_c() -> None:
    """In a function that keeps the interpreter's lock: no other thread of this process can run."""
    ctypes.PyDLL(None).sleep(int(PATIENCE))


def ignore_everything() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    spin()


def raise_and_catch() -> None:
    while True:
        with contextlib.suppress(BaseException):
            spin()


@overruns
@pytest.mark.parametrize("stay", [spin, sleep, stop, stay_in_c, ignore_everything], ids=lambda stay: stay.__name__)
def test_who_stays_too_long_is_killed_and_the_lock_goes_on(
    stay: Callable[[], None], rounds: int, domain: str, page: Page
) -> None:
    heir = Child(inherit, domain, page, rounds)
    lateness = []
    for number in range(1, rounds + 1):
        before, token = time.monotonic(), page[TOKEN]
        holder = Child(overrun, domain, page, number, stay)
        eventually(lambda: page[HELD] == number or not holder.is_alive())
        page[GO] = number
        assert holder.wait() == -signal.SIGKILL
        assert time.monotonic() - before >= SHORT, "it had its lease"
        eventually(lambda: page[DONE] == number or not heir.is_alive())
        assert page[TOKEN] > token + 1 or page[HELD] != number
        killed = events(domain, "killed")[-1]
        assert killed["pid"] == holder.pid
        lateness.append(to_monotonic(killed["time"]) - page[LEFT_OF])
    told = heir.result()
    assert len(told) == rounds
    assert {entry[1] for entry in told if entry} == {"lease overrun"}
    assert None not in told
    assert len(events(domain, "killed")) == rounds
    assert min(lateness) >= 0, "killed before the deadline"


def test_a_child_of_who_was_killed_lives_on_and_has_nothing(domain: str, page: Page) -> None:
    def fork_and_stay() -> None:
        if os.fork() == 0:
            page[READY] = os.getpid()
            try:
                eventually(lambda: page[OVER], patience=2 * PATIENCE)
            finally:
                os._exit(0)
        spin()

    heir = Child(inherit, domain, page, 5)
    for number in range(1, 6):
        page[READY] = page[OVER] = 0
        holder = Child(overrun, domain, page, number, fork_and_stay, "lock", 0.2)
        eventually(lambda: page[READY] or not holder.is_alive())
        page[GO] = number
        try:
            assert holder.wait() == -signal.SIGKILL
            eventually(lambda: page[DONE] == number or not heir.is_alive())
            if page[READY]:
                os.kill(page[READY], 0)  # it is there
        finally:
            page[OVER] = 1
            if page[READY]:
                end_process(page[READY], 0)
    assert {entry and entry[1] for entry in heir.result()} == {"lease overrun"}


class StopAtTheDoor:
    """SIGSTOP between E1 and E2, or between X1 and X2: at the compare-exchange that takes the word, or gives it back."""

    def __init__(self) -> None:
        self.place = ""
        for name, module in list(sys.modules.items()):
            if name.startswith("shlock.") and hasattr(module, "raw_compare_exchange"):
                setattr(module, "raw_compare_exchange", self.wrap(module.raw_compare_exchange))  # noqa: B010

    def wrap(self, compare_exchange: Callable[..., bool]) -> Callable[..., bool]:
        def call(*arguments: Any) -> bool:
            if self.place == "leaving":
                self.stop()
            done = compare_exchange(*arguments)
            if done and self.place == "entering":
                self.stop()
            return done

        return call

    def stop(self) -> None:
        self.place = ""
        os.kill(os.getpid(), signal.SIGSTOP)


def stall(domain: str, page: Page, place: str, name: str = "lock") -> None:
    door = StopAtTheDoor()
    lock = leased(domain, name, SHORT)
    page[READY] = os.getpid()
    eventually(lambda: page[HELD])
    if place == "entering":
        door.place = place
    lock.acquire()
    go_in(page, lock.lease)
    go_out(page)
    if place == "leaving":
        door.place = place
    lock.release()
    assert not door.place, "it did not stop"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@overruns
@pytest.mark.parametrize("place", ["entering", "leaving"])
def test_who_stalls_at_the_door_loses_the_lock_but_not_its_life(place: str, rounds: int, domain: str, page: Page) -> None:
    heir = Child(inherit, domain, page, rounds)
    for number in range(1, rounds + 1):
        page[READY] = page[HELD] = 0
        child = Child(stall, domain, page, place)
        eventually(lambda: page[READY] == child.pid)
        page[HELD] = 1
        eventually(lambda: state_of(child.pid) in "TZ", "it stops at the door")
        mine = [entry for entry in contracts(domain) if entry["pid"] == child.pid]
        assert [entry["holds"] for entry in mine] == [False], "it stopped elsewhere"
        page[STAY] = 1
        page[GO] = number
        eventually(lambda: page[INSIDE] or not heir.is_alive())
        assert child.is_alive()
        child.go_on()
        if place == "entering":  # while the heir is inside
            eventually(lambda: is_sleeping(child.pid) or not child.is_alive())
        page[STAY] = 0
        child.result()
        eventually(lambda: page[DONE] == number or not heir.is_alive())
    assert heir.result() == [None] * rounds
    assert events(domain, "killed") == []
    assert len(events(domain, "taken away")) >= rounds


# -- who leaves in time ---------------------------------------------------------------------------------------------------

QUICK = 0.01


def leave_in_time(domain: str, page: Page, seat: int, holds: int, seed: int) -> None:
    """Hold it very often; a tenth of the time until just before the deadline.  When it left, stands in the page."""
    lock = leased(domain, f"lock {seat}", QUICK)
    page[ARENA_OF + seat] = lock._block.arena.identity
    page[WORD_OF + seat] = _process.current.word
    chance = random.Random(seed)
    while page[COUNT + seat] < holds:
        with lock as lease:
            page[GOT_IN + seat] = deadline = round(lease.deadline * 1e9)
            if not page[COUNT + seat] % 10:
                leave_at = lease.deadline - chance.uniform(0.0001, 0.001)
                time.sleep(max(0.0, leave_at - 0.0005 - time.monotonic()))
                while time.monotonic() < leave_at:
                    pass
        now = time.monotonic_ns()
        if now >= deadline:
            page[LATE_AT + seat] = now
        page[LEFT_AT + seat] = 0
        page[LEFT_OF + seat] = deadline
        page[LEFT_AT + seat] = now
        page[COUNT + seat] += 1


@pytest.mark.parametrize("holds", [1500, pytest.param(250_000, marks=[pytest.mark.soak, pytest.mark.patience(3600)])])
def test_who_leaves_in_time_is_never_killed(holds: int, domain: str) -> None:
    """Who was descheduled and left too late may be: what counts is what the killed process had written down."""
    page = Page()
    seats = range(4)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    children: dict[int, Child] = {}
    ledgers: dict[int, _ledger.Ledger] = {}
    looked_at = dict.fromkeys(seats, 0)  # the last event of each seat: fetching all of them takes ever longer
    killed = 0

    def start(seat: int) -> None:
        nonlocal seed
        seed += 1
        page[WORD_OF + seat] = page[LEFT_AT + seat] = page[GOT_IN + seat] = page[LATE_AT + seat] = 0
        children[seat] = child = Child(leave_in_time, domain, page, seat, holds, seed)
        eventually(lambda: page[WORD_OF + seat] or not child.is_alive())
        ledger = _ledger.ledger_of(child.pid, page[WORD_OF + seat], page[ARENA_OF + seat], read_only=True)
        if ledger is not None:  # else it is dead already
            ledgers[seat] = ledger

    busy = [Child(spin_until_told, page) for _ in range(2)]
    for seat in seats:
        start(seat)
    while children:
        seat = eventually(lambda: next((f"{seat}" for seat, child in children.items() if not child.is_alive()), None))
        seat = int(seat)
        child, ledger = children.pop(seat), ledgers.pop(seat, None)
        if child.wait() != -signal.SIGKILL:
            child.result()
            assert page[COUNT + seat] == holds
        else:
            killed += 1
            if ledger is not None:
                inside = max(
                    deadline_of(ledger.moments[_ledger.BEGAN + slot], ledger.view[_ledger.LEASE + slot]) for slot in range(8)
                )
                event = eventually(lambda seat=seat, pid=child.pid: event_of(domain, pid, looked_at[seat]))
                looked_at[seat] = event["number"]
                killed_at = to_monotonic(event["time"])
                is_over = killed_at >= inside if inside > LEFT else page[GOT_IN + seat] != page[LEFT_OF + seat]
                # The signal may come when it has left at last, and is in its next holds.
                was_late = killed_at - page[LATE_AT + seat] < 100_000_000
                assert is_over or was_late, (
                    f"killed in time: {killed_at=} {inside=} {page[LEFT_AT + seat]=} {page[LEFT_OF + seat]=}"
                )
            start(seat)
        if ledger is not None:
            ledger.close()
    page[OVER] = 1
    for child in busy:
        child.result()
    print(f"{killed} were late and killed")
    close = len(seats) * holds // 10
    assert killed < close * 9 // 10, "hardly anybody who was to leave just before the deadline did: this machine is too busy"


def to_monotonic(seconds: float) -> int:
    """Nanoseconds on the other clock; never too early, and half a microsecond too late because of the float."""
    offset = min(-time.time_ns() + time.monotonic_ns() for _ in range(20))  # read in this order
    return round(seconds * 1e9) + offset + 500


def spin_until_told(page: Page) -> None:
    os.nice(19)
    while not page[OVER]:
        pass


def test_who_dies_inside_in_time_is_passed_on_at_once_as_dead(domain: str, page: Page) -> None:
    """By the supervisor: nobody else is there who could notice."""
    holder = Child(overrun, domain, page, 1, sleep, "lock", LONG)
    eventually(lambda: page[HELD])
    holder.kill()
    eventually(lambda: events(domain, "abandoned"), "the supervisor notices")
    assert [(event["pid"], event["reason"]) for event in events(domain, "abandoned")] == [(holder.pid, "owner died")]
    page[GO] = 1
    assert Child(inherit, domain, page, 1).result() == [(holder.pid, "owner died")]


# -- the terminate call ---------------------------------------------------------------------------------------------------


def test_a_holder_is_asked_to_leave_at_its_deadline_and_has_its_grace(domain: str, page: Page) -> None:
    def hold() -> None:
        lock = leased(domain, lease=SHORT, grace=LONG)
        with lock as lease:
            go_in(page, lease)
            eventually(lambda: lease.terminate_requested)
            assert time.monotonic() >= lease.deadline
            assert lease.remaining() <= 0
            with pytest.raises(LeaseExpired) as caught:
                lease.check()
            assert caught.value.token == lease.token
            assert "terminate requested" in repr(lease)
            go_out(page)
        with lock as lease:
            assert not lease.terminate_requested, "that was the hold before"

    Child(hold).result()
    assert events(domain, "killed") == []
    assert len(events(domain, "terminate")) >= 1


def test_a_holder_is_killed_when_its_grace_is_over(domain: str) -> None:
    page = Page()

    def hold() -> None:
        with leased(domain, lease=SHORT, grace=0.2) as lease:
            page[TOKEN] = round(lease.deadline * 1e9)
            eventually(lambda: lease.terminate_requested)
            page[HELD] = 1
            spin()

    child = Child(hold)
    assert child.wait() == -signal.SIGKILL
    assert time.monotonic_ns() >= page[TOKEN] + 200_000_000
    assert page[HELD], "it was not asked before"


def sleep_long(domain: str) -> None:
    time.sleep(PATIENCE)


def wait_for_a_lock(domain: str) -> None:
    shlock.Lock("other", domain=domain).acquire(timeout=PATIENCE)


def wait_for_a_leased_lock(domain: str) -> None:
    leased(domain, "other").acquire(timeout=PATIENCE)


def wait_for_an_event(domain: str) -> None:
    shlock.Event("event", domain=domain).wait(PATIENCE)


def test_the_terminate_call_raises_also_for_who_has_such_locks_in_two_domains(domain: str) -> None:
    """Each domain has its own ledger, and so its own slot 0."""

    def hold() -> None:
        lock = leased(domain, lease=SHORT, grace=LONG, on_terminate="raise")
        other = shlock.Lock(lease=LONG, on_terminate="raise")  # of the default domain
        with pytest.raises(LeaseExpired), lock:
            sleep_long(domain)
        assert not lock.locked()
        assert not other.locked()

    Child(hold).result()


@pytest.mark.parametrize(
    "wait", [sleep_long, wait_for_a_lock, wait_for_a_leased_lock, wait_for_an_event], ids=lambda wait: wait.__name__
)
def test_the_terminate_call_raises_in_the_main_thread_and_with_releases(
    wait: Callable[[str], None], domain: str, page: Page
) -> None:
    def hold_the_other() -> None:
        other = leased(domain, "other") if wait is wait_for_a_leased_lock else shlock.Lock("other", domain=domain)
        with other:
            page[READY] = 1
            eventually(lambda: page[OVER])
        page[DONE] = 1

    def hold() -> None:
        lock = leased(domain, lease=SHORT, grace=LONG, on_terminate="raise")
        for _ in range(5):
            with pytest.raises(LeaseExpired), lock as lease:
                go_in(page, lease)
                try:
                    wait(domain)
                finally:
                    go_out(page)
            assert not lock.locked()
        page[OVER] = 1
        eventually(lambda: page[DONE])
        with contextlib.suppress(LeaseExpired), lock as lease:
            go_in(page, lease)
            go_out(page)

    other = Child(hold_the_other)
    eventually(lambda: page[READY])
    Child(hold).result()
    other.result()
    assert events(domain, "killed") == []
    for name in ("other",):  # nothing is left of the waits that were given up
        Child(lambda name=name: free(domain, name)).result()


def free(domain: str, name: str) -> None:
    lock = shlock.Lock(name, domain=domain)
    assert lock.acquire(timeout=PATIENCE)
    lock.release()


# -- supervisors that die -------------------------------------------------------------------------------------------------


def work(domain: str, page: Page, seat: int) -> None:
    lock = leased(domain, "work")
    while not page[OVER]:
        with lock as lease:
            go_in(page, lease)
            page[PROGRESS] += 1
            go_out(page)
        page[COUNT + seat] += 1


@pytest.mark.parametrize("deaths", [10, pytest.param(100, marks=soak)])
def test_supervisors_die_under_load_and_nothing_is_lost(deaths: int, domain: str, page: Page) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    workers = [Child(work, domain, page, seat) for seat in range(3)]
    hog_page = Page()
    for _ in range(deaths):
        goal = page[PROGRESS] + chance.choice((1, 10, 100, 1000))
        eventually(lambda: page[PROGRESS] >= goal)
        pid = eventually(lambda: supervisor_of(domain))
        end_process(pid, signal.SIGKILL)
        eventually(lambda: supervisor_of(domain) not in (None, pid), "another supervisor")
        if chance.random() < 0.3:  # this one at once
            end_process(supervisor_of(domain) or pid, signal.SIGKILL)
        eventually(lambda: supervisor_of(domain) is not None)
        eventually(
            lambda: {worker.pid for worker in workers} <= {entry["pid"] for entry in contracts(domain)},
            "all contracts are presented again",
        )
        check_that_overruns_are_killed(domain, hog_page, "hog")
    before = [page[COUNT + seat] for seat in range(3)]
    eventually(lambda: all(page[COUNT + seat] > before[seat] for seat in range(3)), "everybody gets in")
    page[OVER] = 1
    for worker in workers:
        worker.result()
    assert hog_page[VIOLATIONS] == hog_page[FALLS] == 0


def idle(domain: str, page: Page) -> None:
    """Have a contract with a short lease, and use it not."""
    lock = leased(domain, "another", SHORT)
    eventually(lambda: page[OVER], patience=2 * PATIENCE)
    assert not lock.locked()


@pytest.mark.parametrize("stay", [spin, stop], ids=lambda stay: stay.__name__)
def test_time_without_a_supervisor_does_not_count(stay: Callable[[], None], domain: str, page: Page) -> None:
    lease = 2.0
    first = start_server(domain)  # clients would start a second one when the first is slow, which may come up much later
    heir = Child(inherit, domain, page, 1)
    eventually(lambda: heir.pid in {entry["pid"] for entry in contracts(domain)})
    bystander = Child(idle, domain, page)  # because of whom a supervisor looks often
    eventually(lambda: bystander.pid in {entry["pid"] for entry in contracts(domain)})
    holder = Child(overrun, domain, page, 1, stay, "lock", lease)
    eventually(lambda: page[HELD])
    page[GO] = page[STAY] = 1
    with nobody_starts_a_supervisor(domain):
        first.kill()
        over = time.monotonic() + lease
        eventually(lambda: time.monotonic() > over)
        assert holder.is_alive()
        adopted = time.monotonic()
    assert holder.wait() == -signal.SIGKILL
    assert time.monotonic() >= adopted + lease
    (adoption,) = (event["time"] for event in events(domain, "adopted") if event["pid"] == holder.pid)
    (killed,) = (event["time"] for event in events(domain, "killed"))
    assert killed - adoption >= lease * 0.5, "the event comes a moment after the adoption itself"
    page[STAY] = 0
    assert heir.result() == [(holder.pid, "lease overrun")]


def until_inside(holder: Child, page: Page) -> Child:
    eventually(lambda: page[HELD] or not holder.is_alive())
    return holder


def an_overrun(domain: str, page: Page) -> Child:
    return until_inside(Child(overrun, domain, page, 1, spin), page)


def an_overrun_with_grace(domain: str, page: Page) -> Child:
    return until_inside(Child(overrun, domain, page, 1, spin, "lock", SHORT, SHORT), page)


def a_stall(domain: str, page: Page) -> Child:
    page[HELD] = 1
    child = Child(stall, domain, page, "entering")
    eventually(lambda: state_of(child.pid) in "TZ")
    return child


def a_stall_on_the_way_out(domain: str, page: Page) -> Child:
    page[HELD] = 1
    child = Child(stall, domain, page, "leaving")
    eventually(lambda: state_of(child.pid) in "TZ")
    return child


def a_death(domain: str, page: Page) -> Child:
    child = Child(overrun, domain, page, 1, spin, "lock", LONG)
    eventually(lambda: page[HELD])
    child.kill()
    return child


#: What brings a supervisor to each of its crash points, and why the holder loses the lock in the end (None: no death).
CAUSES: dict[str, tuple[tuple[Callable[[str, Page], Child], ...], str | None]] = {
    "S-K1 before the terminate call": ((an_overrun_with_grace,), "lease overrun"),
    "S-K1 terminate call made": ((an_overrun_with_grace,), "lease overrun"),
    "S-K3 before the sentence": ((an_overrun, an_overrun_with_grace), "lease overrun"),
    "S-K3 sentence written": ((an_overrun,), "lease overrun"),
    "S-K4 killed": ((an_overrun,), "lease overrun"),
    "S-T1 before TAKEN": ((a_stall, a_stall_on_the_way_out), None),
    "S-T1 TAKEN": ((a_stall, a_stall_on_the_way_out), None),
    "S-T1 DOUBT": ((a_stall, a_stall_on_the_way_out), None),
    "S-T3 settled, nobody woken": ((a_stall, a_stall_on_the_way_out), None),
    "S-D before it is passed on": ((a_death,), "owner died"),
    "S-D passed on, nobody woken": ((a_death,), "owner died"),
}
GRANTS = ("S-G1 decided, not added", "S-G2 added, not answered")
ADOPTION = "S-A address bound"


@pytest.mark.parametrize(
    ("label", "cause"),
    [(label, cause) for label, (causes, _) in CAUSES.items() for cause in causes],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_everybody_goes_on_when_a_supervisor_is_killed_at(
    label: str, cause: Callable[[str, Page], Child], domain: str, page: Page
) -> None:
    reason = CAUSES[label][1]
    server = start_server(domain, label=label)
    heir = Child(inherit, domain, page, 2)
    eventually(lambda: heir.pid in {entry["pid"] for entry in contracts(domain)})
    holder = cause(domain, page)
    page[GO] = 1
    assert server.wait() == -signal.SIGKILL, "it never came to the label"
    eventually(lambda: page[DONE] == 1 or not heir.is_alive(), "the heir gets in")
    if reason is None:
        assert holder.is_alive()
        holder.go_on()
        holder.result()
    else:
        assert holder.wait() == -signal.SIGKILL
    page[GO] = 2
    assert heir.result() == [None if reason is None else (holder.pid, reason), None]
    check_that_overruns_are_killed(domain, page)
    assert supervisor_of(domain) not in (None, server.pid)


@pytest.mark.parametrize("label", GRANTS)
def test_a_client_asks_the_next_supervisor_when_one_is_killed_at(label: str, domain: str, page: Page) -> None:
    server = start_server(domain, label=label)
    heir = Child(inherit, domain, page, 1)
    assert server.wait() == -signal.SIGKILL, "it never came to the label"
    page[GO] = 1
    assert heir.result() == [None]
    check_that_overruns_are_killed(domain, page)


@pytest.mark.parametrize("stay", [spin, stop], ids=lambda stay: stay.__name__)
def test_holders_are_adopted_when_one_supervisor_after_the_other_is_killed_before_adopting(
    stay: Callable[[], None], domain: str, page: Page
) -> None:
    first = start_server(domain)
    heir = Child(inherit, domain, page, 1)
    eventually(lambda: heir.pid in {entry["pid"] for entry in contracts(domain)})
    holder = Child(overrun, domain, page, 1, stay, "lock", 5.0)
    eventually(lambda: page[HELD])
    page[GO] = 1
    with nobody_starts_a_supervisor(domain):
        first.kill()
        for _ in range(3):
            assert Child(serve, domain, None, ADOPTION).wait() == -signal.SIGKILL
        assert holder.is_alive()
    assert holder.wait() == -signal.SIGKILL
    assert heir.result() == [(holder.pid, "lease overrun")]


def test_each_crash_point_of_the_supervisor_is_one_of_these() -> None:
    source = {
        label
        for path in (Path(shlock.__file__).parent / "supervisor").glob("*.py")
        for label in re.findall(r"crash_points\[0\]\(\s*\"([^\"]*)\"", path.read_text())
        if not label.startswith("S-I")  # of inheritance, which has tests of its own
    }
    assert source == {*CAUSES, *GRANTS, ADOPTION}


def test_who_started_a_supervisor_that_died_starts_another(domain: str) -> None:
    def open_first() -> int:
        start, calls = _client._start, 0

        def start_what_dies_once(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                spawn.set_executable("/bin/true")
            try:
                return start(*arguments)
            finally:
                spawn.set_executable(sys.executable)

        _client._start = start_what_dies_once
        with leased(domain) as lease:
            assert lease.token == 1
        return calls

    assert Child(open_first).result() >= 2  # one more for each second that the second one needs to come up


# -- opening --------------------------------------------------------------------------------------------------------------


def test_of_many_that_open_the_first_leased_lock_at_once_one_starts_the_supervisor(domain: str, page: Page) -> None:
    def race() -> int | None:
        eventually(lambda: page[GO])
        lock = leased(domain)
        with lock as lease:
            go_in(page, lease)
            go_out(page)
            page[PROGRESS] += 1
        eventually(lambda: page[OVER])
        return supervisor_of(domain)

    racers = [Child(race) for _ in range(16)]
    page[GO] = 1
    eventually(lambda: page[PROGRESS] == len(racers) or not all(racer.is_alive() for racer in racers))
    found = contracts(domain)
    page[OVER] = 1
    answers = {racer.result() for racer in racers}
    assert len(answers) == 1
    assert None not in answers
    assert {entry["pid"] for entry in found} == {racer.pid for racer in racers}


def test_a_forked_child_has_a_contract_of_its_own(domain: str, page: Page) -> None:
    def parent() -> list[Any]:
        lock = leased(domain, lease=5.0)
        with lock as lease:
            go_in(page, lease)
            go_out(page)

        def child() -> tuple[bool, Any, bool]:
            before = lock.contract
            with lock as lease:
                go_in(page, lease)
                go_out(page)
            return before is None, lock.contract, {entry["pid"] for entry in contracts(domain)} >= {os.getpid(), os.getppid()}

        inside = Child(child)
        answer = inside.result()
        with lock as lease:  # ours is what it was
            go_in(page, lease)
            go_out(page)
        return [*answer, lock.contract]

    had_none, of_child, both, of_parent = Child(parent).result()
    assert had_none
    assert both
    assert of_child == of_parent
    assert of_child.lease == 5.0


def test_a_child_that_is_forked_inside_has_its_own_time(domain: str, page: Page) -> None:
    """The parent overruns and dies; the child, which never was inside, goes on and inherits."""

    def parent() -> None:
        lock = leased(domain, lease=0.2)
        with lock as lease:
            go_in(page, lease)
            if os.fork() == 0:
                try:
                    page[READY] = os.getpid()
                    with lock as mine:
                        go_in(page, mine)
                        abandoned = lock.abandoned
                        page[DONE] = abandoned.pid if abandoned else 1
                        go_out(page)
                finally:
                    os._exit(0)
            spin()

    holder = Child(parent)
    assert holder.wait() == -signal.SIGKILL
    eventually(lambda: page[DONE], "the child gets in")
    end_process(page[READY], 0)
    assert page[DONE] == holder.pid


def test_a_pickled_lock_has_a_contract_where_it_arrives(domain: str) -> None:
    data = Child(lambda: pickle.dumps(leased(domain, lease=3.0, grace=1.5))).result()
    out = run(
        """
        import pickle, sys
        lock = pickle.loads(bytes.fromhex(sys.argv[1]))
        with lock as lease:
            print(lock.contract.lease, lock.contract.grace, lease.token, lease.remaining() <= 3.0)
        """,
        data.hex(),
    )
    assert out.split() == ["3.0", "1.5", "1", "True"]


def test_who_names_a_lock_with_a_lease_and_asks_for_none_gets_its_terms(domain: str) -> None:
    Child(lambda: leased(domain, lease=3.0, grace=1.5).locked()).result()
    assert Child(lambda: shlock.Lock("lock", domain=domain).contract).result().lease == 3.0


def test_waiting_on_a_condition_is_not_holding_its_leased_lock(domain: str, page: Page) -> None:
    lease = 0.5

    def condition() -> Any:
        return shlock.Condition(shlock.RLock("its lock", domain=domain, lease=lease), "condition", domain=domain)

    def wait() -> int:
        there = condition()
        with there:
            page[READY] = 1
            assert there.wait(PATIENCE)
            return there._lock.lease.token if there._lock.lease else 0

    def notify() -> int:
        there = condition()
        with there:
            there.notify()
            return there._lock.lease.token

    waiter = Child(wait)
    eventually(lambda: page[READY] or not waiter.is_alive())
    later = time.monotonic() + 2.5 * lease
    eventually(lambda: time.monotonic() > later)
    notifier = Child(notify)
    assert waiter.result() > notifier.result(), "it has it under a new token"


def test_who_waits_on_a_condition_and_then_stays_is_killed(domain: str, page: Page) -> None:
    def wait(with_lease: float, stay: Callable[[], Any]) -> None:
        there = shlock.Condition(
            shlock.RLock("its lock", domain=domain, lease=with_lease, on_abandoned="ignore"), "condition", domain=domain
        )
        with there:
            page[READY] = 1
            there.wait_for(lambda: page[OVER], PATIENCE)
            stay()

    def notify() -> None:
        there = shlock.Condition(
            shlock.RLock("its lock", domain=domain, lease=LONG, on_abandoned="ignore"), "condition", domain=domain
        )
        with there:
            page[OVER] = 1
            there.notify_all()

    waiter = Child(wait, 0.5, spin)
    eventually(lambda: page[READY] or not waiter.is_alive())
    Child(notify).result()
    assert waiter.wait() == -signal.SIGKILL


def test_a_recursive_lock_has_one_lease_from_its_outermost_hold_on(domain: str) -> None:
    def nest() -> None:
        lock = shlock.RLock("recursive", domain=domain, lease=LONG)
        with lock as outer:
            with lock as inner:
                assert (inner.token, inner.deadline) == (outer.token, outer.deadline)
                assert lock.acquire(block=False)
                lock.release()
            assert lock.locked()
            assert lock.lease.token == outer.token
        assert not lock.locked()
        with lock as again:
            assert again.token == outer.token + 1

    Child(nest).result()

    def nest_and_stay() -> None:
        lock = shlock.RLock("recursive", domain=domain, lease=0.1)
        with lock:
            while True:
                with lock:
                    pass

    child = Child(nest_and_stay)
    assert child.wait() == -signal.SIGKILL


def go_on_from_the_largest_token(domain: str) -> None:
    for enter in ("with", "acquire"):
        lock = leased(domain, enter)
        block = lock._block
        block.arena.words.store(block.start + at.BLOCK_TOKEN, at.WORD_MASK)
        if enter == "with":
            with lock as lease:
                assert lease.token == 0
        else:
            assert lock.acquire()
            lock.release()
        with lock as lease:
            assert lease.token == 1
        assert not lock.locked()


def test_a_lock_whose_token_was_overwritten_with_the_largest_goes_on(domain: str) -> None:
    Child(go_on_from_the_largest_token, domain).result()


def test_a_repair_has_a_lease_too(domain: str, page: Page) -> None:
    def poisoned(lease: float = LONG) -> Any:
        return shlock.Lock("poisoned", domain=domain, on_abandoned="poison", lease=lease)

    def stay(lease: float) -> None:
        with poisoned(lease):
            spin()

    def repair(lease: float, then: Callable[[], Any]) -> tuple[int, str, int]:
        lock = poisoned(lease)
        with pytest.raises(shlock.AbandonedError):
            lock.acquire()
        with lock.repair() as abandoned:
            token = lock.lease.token
            then()
        with lock as hold:
            assert hold.token == token + 1
        return abandoned.pid, abandoned.reason, token

    first = Child(stay, SHORT)
    assert first.wait() == -signal.SIGKILL
    second = Child(repair, 0.3, spin)
    assert second.wait() == -signal.SIGKILL
    pid, reason, token = Child(repair, LONG, bool).result()
    assert (pid, reason) == (second.pid, "lease overrun")
    assert token >= 3


POLICY = """
[[rule]]
users = ["*"]
names = ["forbidden"]
deny = true

[[rule]]
users = ["*"]
names = ["*"]
operations = ["acquire"]
longest_lease = 1.0
longest_grace = 0.5
most_contracts = 3
"""


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("lock", {"lease": 1.5}, "lease"),
        ("lock", {"lease": 1.0, "grace": 0.75}, "grace"),
        ("lock", {"lease": 1.0, "rank": 1}, "rank"),
        ("lock", {"lease": 1.0, "operations": {"acquire", "preempt"}}, "preempt"),
        ("forbidden", {"lease": 1.0}, "hides"),
    ],
)
def test_a_contract_is_refused_that_the_policy_does_not_allow(
    name: str, options: dict[str, Any], part: str, domain: str
) -> None:
    start_server(domain, POLICY)

    def ask() -> tuple[ContractDenied, int]:
        for _ in range(5):  # a refusal takes nothing away
            with pytest.raises(ContractDenied) as caught:
                shlock.Lock(name, domain=domain, **options)
        lock = shlock.Lock("allowed", domain=domain, lease=1.0, grace=0.5)
        with lock as lease:
            return pickle.loads(pickle.dumps(caught.value)), lease.token

    error, token = Child(ask).result()
    assert part in error.reason
    assert name in error.lock
    assert token == 1
    assert len(events(domain, "denied")) == 5


def test_no_more_contracts_than_the_policy_allows(domain: str) -> None:
    start_server(domain, POLICY)

    def ask() -> None:
        locks = [shlock.Lock(f"lock {number}", domain=domain, lease=1.0) for number in range(3)]
        with pytest.raises(ContractDenied, match="3"):
            shlock.Lock("one more", domain=domain, lease=1.0)
        for lock in locks:
            with lock:
                pass
        del lock
        locks.pop()
        shlock.Lock("instead", domain=domain, lease=1.0)

    Child(ask).result()


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("kind", [shlock.Lock, shlock.RLock])
@pytest.mark.parametrize(
    "options",
    [
        *({"lease": value} for value in (0, 0.0, -1, NAN, INFINITY, -INFINITY, "1", 1j, [1], 1e300, 1e-300)),
        *({"lease": 1.0, "grace": value} for value in (-1, NAN, INFINITY, "1")),
        *({"lease": 1.0, "rank": value} for value in (-1, 1.5, "1", 2**31)),
        *({"lease": 1.0, "operations": value} for value in ((), "acquire", {"steal"}, {1}, 7)),
        *({"lease": 1.0, "on_terminate": value} for value in ("exit", None, 1)),
        {"grace": 1.0},
        {"grace": 0.0},
        {"rank": 1},
        {"operations": {"preempt"}},
        {"on_terminate": "raise"},
        {"record_site": True},
    ],
    ids=repr,
)
def test_terms_that_mean_nothing_are_refused_before_anybody_is_asked(
    kind: Callable[..., Any], options: dict[str, Any], domain: str
) -> None:
    with pytest.raises((ValueError, TypeError)):
        kind("lock", domain=domain, **options)
    assert supervisor_of(domain) is None


# -- whoever talks to the supervisor --------------------------------------------------------------------------------------


def open_files(server: Child) -> int:
    """How many descriptors a supervisor has open: one or two more than that while it has not seen us go."""
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def check_service(domain: str, server: Child) -> None:
    """It answers, it grants, it kills."""
    assert server.is_alive()
    assert supervisor_of(domain) == server.pid
    page = Page()
    check_that_overruns_are_killed(domain, page)
    assert page[VIOLATIONS] == page[FALLS] == 0


def raw(domain: str) -> socket.socket:
    return _client.connect(domain, 0.0, start=False)


@contextlib.contextmanager
def introduced(domain: str) -> Iterator[socket.socket]:
    """A connection that has said hello."""
    ledger = _ledger.Ledger.create()
    with contextlib.closing(ledger), raw(domain) as connection:
        _messages.send(connection, {"op": "hello", "version": 1}, (ledger.fd,))
        assert _messages.decode(_messages.receive(connection)[0])["ok"]
        yield connection


def push(connection: socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """Send it, whether it is heard or not."""
    with contextlib.suppress(OSError):
        socket.send_fds(connection, [data], list(descriptors))


NONSENSE = {
    "empty object": b"{}",
    "nothing": b"",
    "no JSON": b"\x00\xff\xfe garbage",
    "truncated": b'{"op": "hello", "version"',
    "an array": b"[1, 2, 3]",
    "a number": b"1",
    "too long": b'{"op": "' + b"x" * _messages.MOST_BYTES + b'"}',
    "the longest": b'{"op": "' + b"x" * (_messages.MOST_BYTES - 10) + b'"}',
    "much too long": b"[" * 150_000,
    "deep": b'{"op":' + b"[" * 8000 + b"]" * 8000 + b"}",
    "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "a long number": b'{"op": "contracts", "from": ' + b"9" * 16000 + b"}",
    "an exponent": b'{"op": "contracts", "from": 1e999}',
    "not a number": b'{"op": "contracts", "from": NaN}',
    "half a character": b'{"op": "revoke", "name": "\\ud800"}',
    "zeros": bytes(16384),
    "the same key twice": b'{"op": "hello", "op": "open", "op": "close"}',
}


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_costs_its_sender_the_connection_and_nobody_else_anything(data: bytes, domain: str) -> None:
    server = start_server(domain)
    files = open_files(server)
    for connect in (raw, introduced):
        for _ in range(5):
            with connect(domain) as connection:
                push(connection, data)
                push(connection, data)
                assert contracts(domain) is not None
    eventually(lambda: open_files(server) <= files, "it closes all that it opened")
    check_service(domain, server)


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-10, 70000),
        st.integers(-(1 << 70), 1 << 70),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["acquire", "lock", "", "\0", "\ud800"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
MESSAGES: dict[str, dict[str, Any]] = {
    "hello": {"version": 1},
    "arena": {"identity": 1},
    "open": {
        "slot": 0, "name": "lock", "arena": 1, "block": 1, "operations": ["acquire"], "lease": 10**9, "grace": 0, "rank": 0,
        "raise": False,
    },
    "close": {"slot": 0},
    "contracts": {"from": 0},
    "events": {"after": 0, "wait": True},
    "revoke": {"name": "lock"},
    "kill": {"name": "lock"},
}  # fmt: skip


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message in which some fields are of any type and value, missing, or new."""
    operation = draw(st.sampled_from(sorted(MESSAGES)))
    message: dict[str, Any] = {"op": operation, **MESSAGES[operation]}
    for field in draw(st.lists(st.sampled_from([*message, "more"]), max_size=3)):
        message[field] = draw(VALUES)
    for field in draw(st.lists(st.sampled_from(sorted(message)), max_size=1)):
        del message[field]
    return json.dumps(message).encode()


@pytest.mark.parametrize("connect", [raw, introduced], ids=["unknown", "known"])
def test_no_type_in_any_field_stops_the_supervisor(connect: Callable[..., Any], domain: str) -> None:
    server = start_server(domain)
    files = open_files(server)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(messages(), min_size=1, max_size=5))
    def check(some: list[bytes]) -> None:
        with connect(domain) as connection:
            for data in some:
                push(connection, data)
            assert contracts(domain) is not None
            assert server.is_alive()

    check()
    eventually(lambda: open_files(server) <= files, "it closes all that it opened")
    check_service(domain, server)


def test_an_arena_that_is_shown_opens_no_door(domain: str) -> None:
    """With a real arena in hand, an open with any field wrong is refused, and never ends the supervisor."""
    server = start_server(domain)
    Child(lambda: leased(domain).locked()).result()
    path = Path("/dev/shm") / _names.segment_name(domain)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(messages(), min_size=1, max_size=5))
    def check(some: list[bytes]) -> None:
        with introduced(domain) as connection, open(path, "rb+") as segment:
            header = segment.read(4096)
            identity = int.from_bytes(header[6 * 8 : 7 * 8], "little")
            _messages.send(connection, {"op": "arena", "identity": identity}, (segment.fileno(),))
            assert _messages.decode(_messages.receive(connection)[0])["ok"]
            for data in some:
                push(connection, data.replace(b'"arena": 1,', b'"arena": %d,' % identity))
            assert contracts(domain) is not None
            assert server.is_alive()

    check()
    check_service(domain, server)


def wrong_descriptors() -> list[int]:
    """None of them is a ledger or an arena."""
    reader, writer = os.pipe()
    small, unsealed, garbage = (os.memfd_create("nothing", os.MFD_ALLOW_SEALING) for _ in range(3))
    os.ftruncate(small, 4096)
    os.ftruncate(unsealed, _ledger.SIZE)
    os.ftruncate(garbage, _ledger.SIZE)
    fcntl.fcntl(garbage, fcntl.F_ADD_SEALS, _ledger.SEALS)
    ledger = _ledger.Ledger.create()
    read_only = os.open(f"/proc/self/fd/{ledger.fd}", os.O_RDONLY)
    path = os.open("/proc/self", os.O_PATH)
    ours, theirs = socket.socketpair()
    found = [
        os.open(os.devnull, os.O_RDWR),
        os.open("/", os.O_RDONLY),
        reader,
        writer,
        small,
        unsealed,
        garbage,
        read_only,
        path,
    ]
    found += [ours.detach(), theirs.detach(), os.dup(ledger.fd)]
    ledger.close()
    return found


def test_descriptors_that_are_nothing_are_refused_and_closed(domain: str) -> None:
    server = start_server(domain)
    files = open_files(server)
    descriptors = wrong_descriptors()
    try:
        for operation in ({"op": "hello", "version": 1}, {"op": "arena", "identity": 1}, {"op": "contracts", "from": 0}):
            data = _messages.encode(operation)
            for connect in (raw, introduced):
                for some in (
                    *((descriptor,) for descriptor in descriptors),
                    descriptors[:4],
                    descriptors,
                    descriptors * 20,
                    (),
                ):
                    with connect(domain) as connection:
                        push(connection, data, tuple(some))
                        assert contracts(domain) is not None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    eventually(lambda: open_files(server) <= files, "it closes all that it was given")
    check_service(domain, server)


def test_clients_that_vanish_leave_nothing(domain: str) -> None:
    server = start_server(domain)
    files = open_files(server)

    def vanish(steps: int) -> None:
        connection = raw(domain)
        ledger = _ledger.Ledger.create()
        if steps > 0:
            _messages.send(connection, {"op": "hello", "version": 1}, (ledger.fd,))
        if steps > 1:
            _messages.receive(connection)
        if steps > 2:
            _messages.send(connection, {"op": "events", "after": 1 << 40, "wait": True})
        os.kill(os.getpid(), signal.SIGKILL)

    for steps in (0, 1, 2, 3) * 5:
        assert Child(vanish, steps).wait() == -signal.SIGKILL
        raw(domain).close()
    eventually(lambda: open_files(server) <= files, "it lets go of them")
    check_service(domain, server)


def test_programs_that_come_and_go_leave_nothing(domain: str) -> None:
    """Each has an arena of its own, without a name."""
    server = start_server(domain)

    def use() -> None:
        lock = leased(domain, "lock")
        with lock:
            pass
        nameless = shlock.Lock(lease=LONG)
        with nameless:
            pass

    Child(use).result()
    eventually(lambda: not contracts(domain))
    files = open_files(server)
    for _ in range(20):
        Child(use).result()
    eventually(lambda: open_files(server) <= files, "it lets go of them")


def test_a_client_that_never_reads_loses_its_connection(domain: str) -> None:
    server = start_server(domain)
    with raw(domain) as connection:
        connection.setblocking(False)
        data = _messages.encode({"op": "events", "after": 0})
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            try:
                connection.send(data)
            except BlockingIOError:
                assert contracts(domain) is not None
            except OSError:
                break
        else:
            pytest.fail("it is still served")
    check_service(domain, server)


def with_few_files(soft: int, hard: int, serve: Callable[[str], None], domain: str) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    serve(domain)


def test_hundreds_of_silent_connections_hinder_nobody(domain: str) -> None:
    """Also where a process may have no more than 1024 descriptors unless it asks for more."""
    server = Child(with_few_files, 1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1], run_embedded, domain)
    eventually(lambda: supervisor_of(domain) or not server.is_alive())
    with raw(domain):  # or it would end when it is idle
        check_service(domain, server)
        eventually(lambda: not contracts(domain))
        files = open_files(server)
        with contextlib.ExitStack() as stack:
            for _ in range(600):
                stack.enter_context(raw(domain))
            check_service(domain, server)
        eventually(lambda: open_files(server) <= files, "it closes them")
        check_service(domain, server)


def test_a_supervisor_without_descriptors_goes_on_when_there_are_some_again(domain: str) -> None:
    server = Child(with_few_files, 64, 64, serve, domain)
    eventually(lambda: supervisor_of(domain) or not server.is_alive())
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.connect(_messages.address(os.geteuid(), domain))
        eventually(lambda: open_files(server) >= 60 or not server.is_alive(), "it has none left")
        assert server.is_alive()
    check_service(domain, server)
