"""Priority inheritance: who gets what, against an oracle; and real processes, which are lifted and put back, whatever dies.

What a process is scheduled as, the kernel is asked; no time is measured.  The supervisor is a process of its own.
"""

from __future__ import annotations

import contextlib
import encodings.ascii
import encodings.idna  # noqa: F401 - an unprivileged user may not read where Python is
import gc
import grp  # noqa: F401
import os
import pwd  # noqa: F401
import random
import resource
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    PATIENCE,
    Child,
    DieAtLabel,
    Page,
    clean,
    end_children,
    eventually,
    is_sleeping,
    supervisor_of,
)
from test_enforcement import events, nobody_starts_a_supervisor

import shlock
from shlock import _client, _ledger, _owned, _sys, cli, snapshot
from shlock._sys import SYSTEM
from shlock.errors import SupervisorError
from shlock.supervisor.inheritance import Inheritance, Priority, inherited
from shlock.supervisor.server import Server

LONG = 60.0
FIFO, RR, OTHER, BATCH, IDLE = os.SCHED_FIFO, os.SCHED_RR, os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE
RESET = os.SCHED_RESET_ON_FORK
USER = 61005
"""A user with no other processes."""

# Words of the page.
INSIDE, GO, READY, IN, SPINNING, LATE, THREAD, OVER, BACK, PAUSE, PROGRESS = range(11)
PAUSED = 16  # one for each process


# -- who gets what --------------------------------------------------------------------------------------------------------

priorities = st.one_of(
    st.builds(Priority, st.sampled_from([FIFO, RR, FIFO | RESET]), st.integers(1, 99), st.integers(-20, 19)),
    st.builds(Priority, st.sampled_from([OTHER, BATCH, IDLE, OTHER | RESET]), st.just(0), st.integers(-20, 19)),
)
threads = st.integers(0, 7)


def best_of_those_that_wait(
    own: dict[int, Priority], waits: list[tuple[int, int]], thread: int, seen: frozenset[int] = frozenset()
) -> tuple[int, int]:
    """The best rank among a thread and all that wait for it, by trying every path."""
    behind = [waiter for waiter, holder in waits if holder == thread and waiter in own and waiter not in seen | {thread}]
    return max([own[thread].rank, *(best_of_those_that_wait(own, waits, waiter, seen | {thread}) for waiter in behind)])


@given(st.dictionaries(threads, priorities), st.lists(st.tuples(threads, threads), max_size=10))
def test_everybody_gets_the_best_of_those_that_wait_for_it(own: dict[int, Priority], waits: list[tuple[int, int]]) -> None:
    sources = inherited(own, waits)
    for thread, priority in own.items():
        best = best_of_those_that_wait(own, waits, thread)
        assert (thread in sources) == (best > priority.rank)
        if thread in sources:
            assert own[sources[thread]].rank == best
            lifted = priority.lifted_to(own[sources[thread]], reset_on_fork=True)
            assert lifted.nice <= priority.nice
            if priority.kind == IDLE and best < (2, 0):  # its nice value counts from now on
                best = max(best, (1, -priority.nice))
            assert lifted.rank == best


@given(priorities)
def test_a_priority_survives_the_ledger(priority: Priority) -> None:
    assert Priority.from_word(priority.to_word()) == priority


@given(st.integers(0, (1 << 64) - 1))
def test_what_no_thread_can_be_given_is_not_believed_of_a_ledger(word: int) -> None:
    found = Priority.from_word(word)
    assert found is None or (-20 <= found.nice <= 19 and 0 <= found.realtime <= 99 and found.can_be_lifted)


def test_real_time_is_better_than_any_nice_value_and_idle_the_last() -> None:
    order = [(IDLE, 0, -20), (OTHER, 0, 19), (BATCH, 0, 0), (OTHER, 0, -20), (FIFO, 1, 19), (RR, 50, 0), (6, 0, 0)]
    ranks = [Priority(*one).rank for one in order]
    assert ranks == sorted(ranks)
    assert Priority(FIFO, 7, 0).rank == Priority(RR, 7, 5).rank


def test_who_is_lifted_keeps_its_nice_value_under_real_time_and_its_real_time_policy() -> None:
    assert Priority(OTHER, 0, 5).lifted_to(Priority(RR, 9, 0), reset_on_fork=False) == Priority(RR, 9, 5)
    assert Priority(RR, 3, 5).lifted_to(Priority(FIFO, 9, 0), reset_on_fork=True) == Priority(RR | RESET, 9, 5)
    assert Priority(BATCH, 0, 5).lifted_to(Priority(OTHER, 0, -3), reset_on_fork=False) == Priority(BATCH, 0, -3)
    assert Priority(IDLE, 0, 5).lifted_to(Priority(BATCH, 0, 7), reset_on_fork=False) == Priority(OTHER, 0, 5)
    assert Priority(OTHER, 0, 5).lifted_to(Priority(6, 0, 0), reset_on_fork=False) == Priority(FIFO, 99, 5)


# -- processes ------------------------------------------------------------------------------------------------------------


def _why_not() -> str | None:
    """Why real processes can't be lifted here, or None."""
    before = SYSTEM.scheduling(0)
    try:
        SYSTEM.set_scheduling(0, FIFO | RESET, 1, before[2])
        SYSTEM.set_scheduling(0, *before)
    except OSError as error:
        return f"this user may not use SCHED_FIFO: {error.strerror}"
    return None


_reason = _why_not()
privileged = pytest.mark.skipif(_reason is not None, reason=_reason or "")
soak = [pytest.mark.soak, pytest.mark.patience(3600)]


@pytest.fixture
def server(domain: str) -> Iterator[Child]:
    """The supervisor of the domain, forked: a program that clients start takes seconds on a busy machine."""
    with nobody_starts_a_supervisor(domain):
        yield start_server(domain)
        end_children()


served = pytest.mark.usefixtures("server")


@pytest.fixture
def page() -> Page:
    return Page(256)


def told(domain: str, *kinds: str) -> list[str]:
    """The events of some kinds, by name, of the present supervisor."""
    found = [event for kind in kinds for event in events(domain, kind)]
    return [event["event"] for event in sorted(found, key=lambda event: event["number"])]


def serve(domain: str, label: str | None = None) -> None:
    """Be the supervisor; with a label, die there."""
    if label is not None:
        _sys.crash_points[:] = [DieAtLabel(label, 1).label]
    Server(domain).run()


def start_server(domain: str, label: str | None = None) -> Child:
    server = Child(serve, domain, label)
    eventually(lambda: supervisor_of(domain) == server.pid or not server.is_alive(), "the supervisor listens")
    return server


def lock_of(domain: str, name: str = "lock", **options: Any) -> Any:
    return shlock.Lock(name, domain=domain, on_abandoned="ignore", lease=LONG, **{"inherit": True, **options})


def become(policy: int, realtime: int, nice: int) -> None:
    SYSTEM.set_scheduling(0, policy, realtime, nice)


def scheduled(pid: int) -> tuple[int, int, int]:
    return SYSTEM.scheduling(pid)


def hold(
    domain: str, page: Page, own: tuple[int, int, int] = (OTHER, 0, 0), name: str = "lock", go: int = GO
) -> tuple[int, int, int]:
    """Be inside until told to go; how we are scheduled afterwards, once that is as before or nobody restores it."""
    lock = lock_of(domain, name)
    become(*own)
    with lock:
        page[INSIDE] = os.getpid()
        eventually(lambda: page[go])
    with contextlib.suppress(AssertionError):
        eventually(lambda: scheduled(0) == own)
    return scheduled(0)


def wait(domain: str, page: Page, own: tuple[int, int, int], timeout: float | None = None, name: str = "lock") -> bool:
    """Wait for the lock with that priority."""
    lock = lock_of(domain, name)
    become(*own)
    got = bool(lock.acquire(timeout=timeout))
    page[IN] += got
    if got:
        lock.release()
    return got


def start_holder(domain: str, page: Page, own: tuple[int, int, int] = (OTHER, 0, 0)) -> Child:
    holder = Child(hold, domain, page, own)
    eventually(lambda: page[INSIDE] or not holder.is_alive())
    assert page[INSIDE], holder.result()
    return holder


def is_lifted_to(child: Child, policy: int, realtime: int, nice: int) -> bool:
    return scheduled(child.pid) == (policy | RESET, realtime, nice)


@privileged
@served
@pytest.mark.parametrize(
    ("own", "waiters", "lifted"),
    [
        ((OTHER, 0, 0), (FIFO, 10, 0), (FIFO, 10, 0)),
        ((OTHER, 0, 7), (RR, 10, 0), (RR, 10, 7)),
        ((FIFO, 3, 0), (FIFO, 10, 0), (FIFO, 10, 0)),
        ((RR | RESET, 3, 2), (FIFO, 10, 0), (RR, 10, 2)),
        ((OTHER, 0, 15), (OTHER, 0, 4), (OTHER, 0, 4)),
        ((BATCH, 0, 15), (OTHER, 0, -4), (BATCH, 0, -4)),
        ((IDLE, 0, 9), (OTHER, 0, 5), (OTHER, 0, 5)),
        ((IDLE, 0, 0), (OTHER, 0, 5), (OTHER, 0, 0)),
    ],
)
def test_a_holder_is_lifted_to_its_waiter_and_put_back(
    own: tuple[int, int, int], waiters: tuple[int, int, int], lifted: tuple[int, int, int], domain: str, page: Page
) -> None:
    holder = start_holder(domain, page, own)
    waiter = Child(wait, domain, page, waiters)
    eventually(lambda: is_lifted_to(holder, *lifted), "the holder is lifted")
    page[GO] = 1
    assert holder.result() == own
    assert waiter.result()
    assert told(domain, "lifted", "restored", "not lifted") == ["lifted", "restored"]


@privileged
@served
def test_why_and_contracts_show_a_lift(domain: str, page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    holder = start_holder(domain, page)
    Child(wait, domain, page, (FIFO, 10, 0))
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    assert cli.main(["why", "lock", "--domain", domain]) == 0
    assert "It is lifted from nice 0 to SCHED_FIFO 10, because" in capsys.readouterr().out
    found = _client.ask(domain, {"op": "contracts", "from": 0})["contracts"]
    assert {contract["pid"]: contract["lifted"] for contract in found}[holder.pid] == "from nice 0 to SCHED_FIFO 10"
    assert all(contract["inherits"] for contract in found)


@privileged
@served
def test_who_is_as_good_as_its_waiter_is_not_lifted(domain: str, page: Page) -> None:
    holder = start_holder(domain, page, (FIFO, 10, 0))
    waiters = [Child(wait, domain, page, own) for own in ((FIFO, 10, 0), (RR, 9, 0), (OTHER, 0, -20))]
    eventually(lambda: all(is_sleeping(waiter.pid) for waiter in waiters))
    eventually(lambda: len(lock_of(domain, inherit=True).waiters) == 3)
    page[GO] = 1
    holder.result()
    for waiter in waiters:
        waiter.result()
    assert not [event for event in events(domain, "lifted") if event["pid"] == holder.pid]


@privileged
@served
def test_the_best_waiter_counts_and_the_next_one_when_it_gives_up_or_dies(domain: str, page: Page) -> None:
    holder = start_holder(domain, page)
    low = Child(wait, domain, page, (FIFO, 10, 0))
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    high = Child(wait, domain, page, (FIFO, 20, 0))
    eventually(lambda: is_lifted_to(holder, FIFO, 20, 0))
    high.kill()
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0), "the next best")
    high = Child(wait, domain, page, (FIFO, 30, 0), 0.3)
    eventually(lambda: is_lifted_to(holder, FIFO, 30, 0))
    assert not high.result()
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0), "the next best")
    low.kill()
    eventually(lambda: scheduled(holder.pid) == (OTHER, 0, 0), "its own")
    page[GO] = 1
    assert holder.result() == (OTHER, 0, 0)


@privileged
@served
def test_a_waiter_whose_priority_is_changed_while_it_waits_takes_the_holder_with_it(domain: str, page: Page) -> None:
    holder = start_holder(domain, page)
    waiter = Child(wait, domain, page, (OTHER, 0, 0))
    eventually(lambda: lock_of(domain).waiters)
    SYSTEM.set_scheduling(waiter.pid, FIFO, 5, 0)
    eventually(lambda: is_lifted_to(holder, FIFO, 5, 0))
    SYSTEM.set_scheduling(waiter.pid, OTHER, 0, 0)
    eventually(lambda: scheduled(holder.pid) == (OTHER, 0, 0))
    page[GO] = 1
    holder.result()
    waiter.result()


def hold_and_wait(domain: str, page: Page, name: str, other: str) -> None:
    lock, wanted = lock_of(domain, name), lock_of(domain, other)
    with lock:
        page[INSIDE] += 1
        with wanted:
            pass


@privileged
@served
def test_a_lift_goes_on_to_whom_the_holder_itself_waits_for(domain: str, page: Page) -> None:
    last = start_holder(domain, page)
    page[INSIDE] = 0
    links = []
    for number, (name, other) in enumerate((("b", "lock"), ("c", "b"), ("d", "c")), 1):
        links.append(Child(hold_and_wait, domain, page, name, other))
        eventually(lambda number=number: page[INSIDE] == number)
    waiter = Child(wait, domain, page, (FIFO, 42, 0), None, "d")
    for child in (last, *links):
        eventually(lambda child=child: is_lifted_to(child, FIFO, 42, 0))
    links[1].kill()
    for child in (last, links[0]):
        eventually(lambda child=child: scheduled(child.pid) == (OTHER, 0, 0), "the chain is broken")
    assert is_lifted_to(links[2], FIFO, 42, 0) or waiter.result()
    page[GO] = 1
    assert last.result() == (OTHER, 0, 0)
    for child in (links[0], links[2]):
        child.result()
    assert waiter.result()


@privileged
@served
def test_the_next_holder_is_lifted_in_its_turn(domain: str, page: Page) -> None:
    first = start_holder(domain, page)
    second = Child(hold, domain, page, (OTHER, 0, 0), "lock", OVER)
    eventually(lambda: len(lock_of(domain).waiters) == 1)
    high = Child(wait, domain, page, (FIFO, 9, 0))
    eventually(lambda: is_lifted_to(first, FIFO, 9, 0))
    high.stop()  # so that the second one gets in before it
    page[GO] = 1
    assert first.result() == (OTHER, 0, 0)
    eventually(lambda: page[INSIDE] == second.pid)
    eventually(lambda: is_lifted_to(second, FIFO, 9, 0))
    high.go_on()
    page[OVER] = 1
    assert second.result() == (OTHER, 0, 0)
    assert high.result()


@privileged
@served
def test_a_nice_value_that_the_holder_gets_meanwhile_is_kept(domain: str, page: Page) -> None:
    holder = start_holder(domain, page)
    waiter = Child(wait, domain, page, (FIFO, 10, 0))
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    os.setpriority(os.PRIO_PROCESS, holder.pid, 5)
    page[GO] = 1
    waiter.result()
    eventually(lambda: scheduled(holder.pid) == (OTHER, 0, 5))
    holder.kill()


@privileged
@served
def test_a_policy_that_the_holder_sets_itself_is_kept(domain: str, page: Page) -> None:
    holder = start_holder(domain, page)
    waiter = Child(wait, domain, page, (FIFO, 10, 0))
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    SYSTEM.set_scheduling(holder.pid, RR, 33, 0)
    page[GO] = 1
    waiter.result()
    eventually(lambda: events(domain, "restored"))
    assert scheduled(holder.pid) == (RR, 33, 0)
    holder.kill()


@privileged
@served
def test_children_of_a_lifted_holder_are_not_lifted(domain: str, page: Page) -> None:
    def hold_and_fork() -> tuple[int, int, int]:
        with lock_of(domain):
            page[INSIDE] = 1
            eventually(lambda: page[GO])
            found: tuple[int, int, int] = Child(lambda: scheduled(0)).result()
            return found

    holder = Child(hold_and_fork)
    eventually(lambda: page[INSIDE])
    Child(wait, domain, page, (FIFO, 10, 0))
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    page[GO] = 1
    assert holder.result() == (OTHER, 0, 0)


@privileged
@served
def test_a_thread_that_waits_for_another_thread_of_its_process_lifts_it(domain: str) -> None:
    child = Child(lambda: hold_while_a_thread_waits(lock_of(domain)))
    assert child.result() == ((FIFO | RESET, 5, 0), (OTHER, 0, 0))


@privileged
@served
def test_a_thread_that_is_not_the_first_one_of_its_process_is_lifted_alone(domain: str, page: Page) -> None:
    def hold_in_a_thread() -> None:
        lock = lock_of(domain)

        def low() -> None:
            with lock:
                page[THREAD] = threading.get_native_id()
                eventually(lambda: page[GO])
            eventually(lambda: page[OVER])

        thread = threading.Thread(target=low)
        thread.start()
        thread.join()

    holder = Child(hold_in_a_thread)
    eventually(lambda: page[THREAD])
    waiter = Child(wait, domain, page, (FIFO, 10, 0))
    eventually(lambda: scheduled(page[THREAD]) == (FIFO | RESET, 10, 0))
    assert scheduled(holder.pid) == (OTHER, 0, 0)
    page[GO] = 1
    eventually(lambda: scheduled(page[THREAD]) == (OTHER, 0, 0))
    page[OVER] = 1
    holder.result()
    waiter.result()


@privileged
@served
def test_a_holder_that_came_while_nobody_looked_is_lifted_for_who_waits_already(domain: str, page: Page) -> None:
    """Nobody is to be lifted when the waiter comes; and the next holder gets in without waiting, so it does not ring."""

    def hold_plainly() -> None:
        _owned.TURN = 1 << 60  # it is not handed over
        with lock_of(domain, inherit=False):
            page[READY] += 1
            eventually(lambda: page[OVER])

    def hold_when_told() -> None:
        lock = lock_of(domain)
        page[READY] += 1
        eventually(lambda: page[BACK])
        assert lock.acquire(False)
        page[INSIDE] = 1
        eventually(lambda: page[GO])
        lock.release()

    plain, low = Child(hold_plainly), Child(hold_when_told)
    eventually(lambda: page[READY] == 2)
    high = Child(wait, domain, page, (FIFO, 9, 0))
    eventually(lambda: lock_waits(domain) and is_sleeping(high.pid))
    high.stop()  # so that it neither gets in nor rings again
    for _ in range(2):
        assert told(domain, "lifted") == []  # the answer comes after the look
    page[OVER] = 1
    plain.result()
    page[BACK] = 1
    eventually(lambda: page[INSIDE])
    eventually(lambda: is_lifted_to(low, FIFO, 9, 0))
    high.go_on()
    page[GO] = 1
    low.result()
    high.result()


def test_a_thread_that_lost_the_seat_while_it_was_looked_at_is_not_taken_for_the_holder() -> None:
    """W names the process, THREAD the one of its threads that has the seat: they are two words."""

    class Changing:
        inherits, view = True, None

        def __init__(self, *threads: int) -> None:
            self.client = SimpleNamespace(word=1)
            self.threads = list(threads)

        @property
        def thread(self) -> int:
            return self.threads.pop(0) if len(self.threads) > 1 else self.threads[0]

    def pairs(holder: Changing) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        words = [0] * _ledger.SIZE
        words[_ledger.WAITS] = 5 | 1 << _ledger.WAIT_SLOT_SHIFT
        contract = SimpleNamespace(inherits=True, thread=5)
        client = SimpleNamespace(word=2, contracts={0: contract}, ledger=SimpleNamespace(view=memoryview(array("Q", words))))
        watch: Any = SimpleNamespace(clients={2: client}, holder_of=lambda contract: holder)
        found, somebody_waits = Inheritance(watch, lambda *_, **__: None)._waits()
        assert somebody_waits
        return found

    assert pairs(Changing(7)) == [((2, 5), (1, 7))]
    assert pairs(Changing(7, 8)) == []
    assert pairs(Changing(0)) == []


@privileged
@served
def test_without_inherit_on_either_side_nobody_is_lifted(domain: str, page: Page) -> None:
    def hold_plainly() -> None:
        with lock_of(domain, inherit=False):
            page[INSIDE] = 1
            eventually(lambda: page[GO])

    def wait_plainly() -> None:
        lock = lock_of(domain, inherit=False)
        become(FIFO, 20, 0)
        with lock:
            pass

    holder = Child(hold_plainly)
    eventually(lambda: page[INSIDE])
    high = Child(wait, domain, page, (FIFO, 20, 0))
    eventually(lambda: lock_of(domain).waiters)
    page[GO] = 1
    holder.result()
    high.result()
    page[GO] = page[INSIDE] = 0
    other = start_holder(domain, page)
    plain = Child(wait_plainly)
    eventually(lambda: lock_of(domain).waiters)
    page[GO] = 1
    other.result()
    plain.result()
    assert told(domain, "lifted", "not lifted") == []


# -- claims ---------------------------------------------------------------------------------------------------------------


def hold_as(domain: str, page: Page, thread: int) -> None:
    """Hold the lock and say that another thread does."""
    with (lock := lock_of(domain)):
        grant = lock._words.grant
        grant.view[_ledger.THREAD + grant.number] = thread
        page[INSIDE] = 1
        eventually(lambda: page[OVER])


def wait_as(domain: str, thread: int) -> None:
    """Wait for the lock and say that another thread does."""
    lock = lock_of(domain)
    grant = lock._words.grant
    grant.view[_ledger.WAITS] = thread | grant.number + 1 << _ledger.WAIT_SLOT_SHIFT
    assert grant.connection.ring({"op": "waiting", "slot": grant.number})
    with lock:
        pass


@privileged
@served
@pytest.mark.parametrize("side", ["holder", "waiter"])
def test_a_thread_of_another_process_is_neither_lifted_nor_counted(side: str, domain: str, page: Page) -> None:
    victim = Child(lambda: eventually(lambda: page[LATE]))
    if side == "holder":
        Child(hold_as, domain, page, victim.pid)
        eventually(lambda: page[INSIDE])
        Child(wait, domain, page, (FIFO, 10, 0))
    else:
        SYSTEM.set_scheduling(victim.pid, FIFO, 10, 0)
        page[GO] = 0
        start_holder(domain, page)
        Child(wait_as, domain, victim.pid)
    eventually(lambda: lock_of(domain).waiters)
    before = scheduled(victim.pid)
    honest = Child(hold, domain, page, (OTHER, 0, 0), "another", OVER)
    eventually(lambda: page[INSIDE] == honest.pid)
    Child(wait, domain, page, (FIFO, 11, 0), None, "another")
    eventually(lambda: is_lifted_to(honest, FIFO, 11, 0), "a look that has seen both")
    assert scheduled(victim.pid) == before
    assert told(domain, "lifted", "not lifted") == ["lifted"]


# -- on one core ----------------------------------------------------------------------------------------------------------


def invert(domain: str, page: Page, inherit: bool) -> None:
    """Low holds, high waits, medium spins, all on one core, under SCHED_FIFO; medium ends when high is in, or when it has spun
    for half a second.  So nothing but an inherited priority lets low go on before that.
    """
    core = max(os.sched_getaffinity(0))

    def low() -> None:
        lock = lock_of(domain, inherit=inherit)
        os.sched_setaffinity(0, {core})
        become(FIFO, 10, 0)
        with lock:
            page[INSIDE] = 1
            eventually(lambda: page[GO])

    def medium() -> None:
        os.sched_setaffinity(0, {core})
        become(FIFO, 20, 0)
        page[SPINNING] = 1
        end = time.monotonic() + 0.5
        while not page[IN] and time.monotonic() < end:
            pass
        page[LATE] = not page[IN]

    def high() -> None:
        lock = lock_of(domain, inherit=inherit)
        os.sched_setaffinity(0, {core})
        become(FIFO, 30, 0)
        assert lock.acquire(timeout=PATIENCE)
        page[IN] = 1
        lock.release()

    children = [Child(low)]
    eventually(lambda: page[INSIDE])
    children.append(Child(high))
    eventually(lambda: lock_of(domain).waiters)
    children.append(Child(medium))
    eventually(lambda: page[SPINNING])
    page[GO] = 1
    for child in children:
        child.result()


@privileged
@served
@pytest.mark.parametrize("inherit", [True, False])
def test_who_waits_on_one_core_passes_medium_only_with_inheritance(inherit: bool, domain: str, page: Page) -> None:
    invert(domain, page, inherit)
    assert page[IN] == 1
    assert page[LATE] == (not inherit)


# -- without privilege ----------------------------------------------------------------------------------------------------


def as_user(function: Callable[[], Any], realtime: int) -> Child:
    """Run something as an unprivileged user that may use so high a real-time priority."""

    def run() -> Any:
        resource.setrlimit(resource.RLIMIT_RTPRIO, (realtime, realtime))
        resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        return function()

    return Child(run)


def contract_of(domain: str) -> tuple[bool, str | None]:
    with shlock.Supervisor(domain):
        contract = lock_of(domain).contract
    clean(domain)
    return contract.inherits, contract.no_inheritance


@privileged
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_contract_says_so_if_the_supervisor_may_not_lift(domain: str) -> None:
    inherits, reason = as_user(lambda: contract_of(domain), 0).result()
    assert not inherits
    assert "may not raise priorities: it has no CAP_SYS_NICE" in reason


@privileged
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_limits_of_the_process_are_privilege_enough(domain: str) -> None:
    if not Child(may_raise_limits).result():
        pytest.skip("this root may not raise resource limits (CAP_SYS_RESOURCE)")
    assert as_user(lambda: contract_of(domain), 5).result() == (True, None)
    assert as_user(lambda: lifted_by_itself(domain), 5).result() == ((FIFO, 5, 0), (OTHER, 0, 0))


def may_raise_limits() -> bool:
    try:
        resource.setrlimit(resource.RLIMIT_RTPRIO, (5, 5))
    except (ValueError, OSError):
        return False
    return True


def lifted_by_itself(domain: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """As what a holder was scheduled while another thread of its process waited, and afterwards."""
    with shlock.Supervisor(domain):
        found = hold_while_a_thread_waits(lock_of(domain))
    clean(domain)
    return found


def hold_while_a_thread_waits(lock: Any) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    def high() -> None:
        become(FIFO, 5, 0)
        with lock:
            pass

    with lock:
        thread = threading.Thread(target=high)
        thread.start()
        eventually(lambda: scheduled(0)[1] == 5)
        meanwhile = scheduled(0)
    thread.join()
    eventually(lambda: scheduled(0)[1] == 0)
    return meanwhile, scheduled(0)


@pytest.mark.parametrize("kind", [shlock.Lock, shlock.RWLock])
def test_inherit_needs_a_lease(kind: Any) -> None:
    with pytest.raises(ValueError, match="inherit= needs lease="):
        kind("x", inherit=True)


# -- what dies ------------------------------------------------------------------------------------------------------------


LABELS = (
    "S-I1 before the record",
    "S-I2 record written",
    "S-I3 lifted",
    "S-I4 GIVEN written",
    "S-I5 changed to another",
    "S-I6 restored",
)


@privileged
@pytest.mark.parametrize("is_over", [False, True])
@pytest.mark.parametrize("label", LABELS)
def test_the_next_supervisor_puts_back_what_the_dead_one_lifted(label: str, is_over: bool, domain: str, page: Page) -> None:
    server = start_server(domain, label)
    own = (BATCH, 0, 3)
    holder = start_holder(domain, page, own)
    with nobody_starts_a_supervisor(domain):
        waiter = Child(wait, domain, page, (FIFO, 10, 0))
        if label.startswith("S-I5"):
            eventually(lambda: is_lifted_to(holder, FIFO, 10, 3))
            better = Child(wait, domain, page, (FIFO, 20, 0))
        elif label.startswith("S-I6"):
            eventually(lambda: is_lifted_to(holder, FIFO, 10, 3))
            waiter.kill()
            waiter = None
        assert server.wait() == -signal.SIGKILL
        if is_over:
            for child in (waiter, better if label.startswith("S-I5") else None):
                if child is not None:
                    child.kill()
        start_server(domain)
    if not is_over and waiter is not None:
        lifted = 20 if label.startswith("S-I5") else 10
        eventually(lambda: is_lifted_to(holder, FIFO, lifted, 3), "the next one goes on lifting")
    else:
        eventually(lambda: scheduled(holder.pid) == own, "the next one puts it back")
    page[GO] = 1
    assert holder.result() == own


@privileged
def test_the_next_supervisor_puts_back_who_has_dropped_the_lock_meanwhile(domain: str, page: Page) -> None:
    """A process without contracts has no reason to come to the next supervisor, but that it is lifted."""

    def hold_and_drop() -> None:
        lock = lock_of(domain)
        connect = _client.connect

        def connect_when_told(*arguments: Any) -> Any:
            page[PROGRESS] += 1
            if not page[BACK]:
                raise SupervisorError(domain, "none has answered for 20 s", "")
            return connect(*arguments)

        def has_given_up_or_tried_again(tries: int) -> bool:
            return page[PROGRESS] >= tries or not any("supervisor" in thread.name for thread in threading.enumerate())

        with lock:
            _client.connect = connect_when_told
            page[INSIDE] = 1
            eventually(lambda: page[GO])
        del lock
        gc.collect()
        tries = page[PROGRESS] + 2
        eventually(lambda: has_given_up_or_tried_again(tries))
        page[READY] = 1
        eventually(lambda: page[OVER])

    server = start_server(domain)
    holder = Child(hold_and_drop)
    eventually(lambda: page[INSIDE])
    with nobody_starts_a_supervisor(domain):
        waiter = Child(wait, domain, page, (FIFO, 10, 0))
        eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
        server.kill()
        waiter.kill()
        page[GO] = 1
        eventually(lambda: page[READY])
        start_server(domain)
    page[BACK] = 1
    eventually(lambda: scheduled(holder.pid) == (OTHER, 0, 0), "the next one puts it back")
    page[OVER] = 1
    holder.result()


@privileged
@pytest.mark.parametrize("own", [(IDLE, 0, 0), (IDLE, 0, -7), (OTHER, 0, -7), (OTHER, 0, 7), (RR, 3, 2)])
@pytest.mark.parametrize("waiters", [(OTHER, 0, 5), (FIFO, 9, 0)])
def test_whatever_was_there_the_next_supervisor_puts_it_back(
    own: tuple[int, int, int], waiters: tuple[int, int, int], domain: str, page: Page
) -> None:
    if Priority(*own).rank >= Priority(*waiters).rank:
        pytest.skip("it is not lifted for that one")
    server = start_server(domain)
    holder = start_holder(domain, page, own)
    with nobody_starts_a_supervisor(domain):
        waiter = Child(wait, domain, page, waiters)
        eventually(lambda: scheduled(holder.pid) != own)
        server.kill()
        waiter.kill()
        start_server(domain)
    eventually(lambda: scheduled(holder.pid) == own, "the next one puts it back")
    page[GO] = 1
    assert holder.result() == own


@privileged
@pytest.mark.parametrize("lie", [(IDLE, 0, -20), (OTHER, 0, -20), (FIFO, 50, -20)])
def test_a_record_that_the_client_made_up_raises_nobody(lie: tuple[int, int, int], domain: str, page: Page) -> None:
    """It says that a supervisor has lifted the thread from what it would like to be; while it is lifted, the thread changes."""

    def make_up() -> tuple[int, int, int]:
        lock = lock_of(domain)
        with lock:
            become(OTHER, 0, 5)
            grant = lock._words.grant
            thread = threading.get_native_id()
            for word, value in (
                (_ledger.LIFT_BIRTH, SYSTEM.thread_birth(os.getpid(), thread)),
                (_ledger.LIFT_OWN, Priority(*lie).to_word()),
                (_ledger.LIFT_GIVEN, Priority(OTHER, 0, 5).to_word()),
                (_ledger.LIFT_NEXT, 0),
                (_ledger.LIFT_THREAD, thread),
            ):
                grant.view[_ledger.LIFTS + word] = value
            page[INSIDE] = os.getpid()
            eventually(lambda: page[GO])
            os.sched_setscheduler(0, BATCH, os.sched_param(0))
            page[READY] = 1
            eventually(lambda: page[OVER])
        return scheduled(0)

    server = start_server(domain)
    liar = Child(make_up)
    eventually(lambda: page[INSIDE])
    with nobody_starts_a_supervisor(domain):
        server.kill()
        waiter = Child(wait, domain, page, (OTHER, 0, 4))
        start_server(domain)
    eventually(lambda: scheduled(liar.pid) == (OTHER | RESET, 0, 4), "it is lifted for the one that waits")
    page[GO] = 1
    eventually(lambda: page[READY])
    waiter.kill()
    eventually(lambda: told(domain, "restored"))
    policy, realtime, nice = scheduled(liar.pid)
    assert (policy & ~RESET, realtime) == (BATCH, 0)
    assert nice >= 5
    page[OVER] = 1
    liar.result()


@privileged
def test_a_process_inherits_in_one_domain_and_its_contracts_in_another_one_say_so(domain: str) -> None:
    """Each supervisor would take what the other one has lifted a thread to for its own."""

    def open_both() -> list[tuple[bool, str | None]]:
        with shlock.Supervisor(domain), shlock.Supervisor(f"{domain}-2"):
            locks = [lock_of(name) for name in (domain, f"{domain}-2", domain)]
            return [(lock.contract.inherits, lock.contract.no_inheritance) for lock in locks]

    found = Child(open_both).result()
    clean(f"{domain}-2")
    assert [inherits for inherits, _ in found] == [True, False, True]
    assert found[1][1] == f"threads of this process are lifted in domain {domain!r}, and can be in one domain only"


@privileged
def test_the_next_supervisor_lifts_for_who_waits_already(domain: str, page: Page) -> None:
    server = start_server(domain)
    holder = start_holder(domain, page)
    with nobody_starts_a_supervisor(domain):
        server.kill()
        waiter = Child(wait_when_granted, domain, page)
        second = start_server(domain)
        eventually(lambda: page[READY])
        second.kill()
        page[BACK] = 1
        eventually(lambda: lock_waits(domain))
        start_server(domain)
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    page[GO] = 1
    holder.result()
    waiter.result()


def wait_when_granted(domain: str, page: Page) -> None:
    lock = lock_of(domain)
    become(FIFO, 10, 0)
    page[READY] = 1
    eventually(lambda: page[BACK])
    with lock:
        pass


def lock_waits(domain: str) -> bool:
    """Whether somebody waits, seen without a contract."""
    return any(primitive.waiters for seen in snapshot.domains() if seen.domain == domain for primitive in seen.primitives)


@privileged
def test_the_lock_goes_on_while_the_supervisor_hears_nothing(domain: str, page: Page) -> None:
    def take_in_turn() -> None:
        lock = lock_of(domain)
        page[READY] += 1
        eventually(lambda: page[GO])
        for _ in range(200):
            with lock:
                page[IN] += 1

    server = start_server(domain)
    children = [Child(take_in_turn)]
    eventually(lambda: page[READY] == 1)
    children.append(Child(take_in_turn))
    eventually(lambda: page[READY] == 2)
    server.stop()
    page[GO] = 1
    for child in children:
        child.result()
    assert page[IN] == 400
    server.kill()


@privileged
def test_a_supervisor_that_ends_puts_everybody_back(domain: str, page: Page) -> None:
    def serve_until(page: Page) -> None:
        with shlock.Supervisor(domain):
            page[READY] = 1
            eventually(lambda: page[OVER])

    server = Child(serve_until, page)
    eventually(lambda: page[READY])
    holder = start_holder(domain, page)
    Child(wait, domain, page, (FIFO, 10, 0))
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    with nobody_starts_a_supervisor(domain):
        page[OVER] = 1
        server.result()
        assert scheduled(holder.pid) == (OTHER, 0, 0)


# -- readers and writers --------------------------------------------------------------------------------------------------


def table(domain: str, **options: Any) -> Any:
    return shlock.RWLock("table", domain=domain, lease=LONG, **{"inherit": True, **options})


def go_in(domain: str, page: Page, how: str, own: tuple[int, int, int], inherit: bool = True) -> tuple[int, int, int]:
    """Read or write until told to go; how we are scheduled afterwards, once that is as before or nobody restores it."""
    rwlock = table(domain, inherit=inherit)
    become(*own)
    with getattr(rwlock, how)():
        page[INSIDE] += 1
        eventually(lambda: page[GO])
    with contextlib.suppress(AssertionError):
        eventually(lambda: scheduled(0) == own)
    return scheduled(0)


LOW = (OTHER, 0, 0)


def inside(domain: str, page: Page, how: str, own: tuple[int, int, int] = LOW, inherit: bool = True) -> Child:
    before = page[INSIDE]
    child = Child(go_in, domain, page, how, own, inherit)
    eventually(lambda: page[INSIDE] > before or not child.is_alive())
    assert page[INSIDE] > before, child.result()
    return child


def waits(domain: str, page: Page, how: str, own: tuple[int, int, int]) -> Child:
    child = Child(go_in, domain, page, how, own)
    eventually(lambda: child.pid in waiting(domain) or not child.is_alive())
    assert child.is_alive(), child.result()
    return child


def waiting(domain: str) -> set[int]:
    shots = [one for seen in snapshot.domains() if seen.domain == domain for one in seen.primitives]
    return {waiter.pid for shot in shots for waiter in shot.waiters}


@privileged
@served
def test_a_writer_lifts_every_reader_that_it_waits_for(domain: str, page: Page) -> None:
    own = [LOW, (OTHER, 0, 9), (RR, 4, 0)]
    readers = [inside(domain, page, "read", priority) for priority in own]
    better = inside(domain, page, "read", (FIFO, 20, 0))
    plain = inside(domain, page, "read", LOW, False)
    writer = waits(domain, page, "write", (FIFO, 10, 0))
    lifted = [(FIFO, 10, 0), (FIFO, 10, 9), (RR, 10, 0)]
    eventually(lambda: all(is_lifted_to(reader, *to) for reader, to in zip(readers, lifted, strict=True)))
    assert (scheduled(better.pid), scheduled(plain.pid)) == ((FIFO, 20, 0), LOW)
    found = contracts_of(domain)
    assert {entry["pid"]: entry["lifted"] for entry in found}[readers[0].pid] == "from nice 0 to SCHED_FIFO 10"
    page[GO] = 1
    assert [reader.result() for reader in readers] == own
    assert (better.result(), writer.result(), plain.result()) == ((FIFO, 20, 0), (FIFO, 10, 0), LOW)


@privileged
@served
def test_a_reader_lifts_the_writer_and_not_the_readers_that_wait_beside_it(domain: str, page: Page) -> None:
    writer = inside(domain, page, "write")
    other = waits(domain, page, "read", LOW)
    reader = waits(domain, page, "read", (FIFO, 10, 0))
    eventually(lambda: is_lifted_to(writer, FIFO, 10, 0))
    reader.kill()
    eventually(lambda: scheduled(writer.pid) == LOW)
    assert scheduled(other.pid) == LOW
    page[GO] = 1
    assert (writer.result(), other.result()) == (LOW, LOW)
    assert told(domain, "lifted", "restored") == ["lifted", "restored"]


@privileged
@served
@pytest.mark.parametrize("how", ["read", "write"])
def test_a_lift_goes_on_from_the_writer_at_the_door_to_the_readers(domain: str, page: Page, how: str) -> None:
    reader = inside(domain, page, "read")
    at_the_door = waits(domain, page, "write", LOW)
    assert scheduled(reader.pid) == LOW
    high = waits(domain, page, how, (FIFO, 10, 0))
    for child in (reader, at_the_door):
        eventually(lambda child=child: is_lifted_to(child, FIFO, 10, 0))
    high.kill()
    for child in (reader, at_the_door):
        eventually(lambda child=child: scheduled(child.pid) == LOW)
    page[GO] = 1
    assert (reader.result(), at_the_door.result()) == (LOW, LOW)


@privileged
@served
def test_a_reader_waits_for_who_writes_and_not_for_a_thread_of_its_own_process_that_waits_to_write(
    domain: str, page: Page
) -> None:
    def wait_in_two_threads() -> tuple[int, int, int]:
        rwlock = table(domain)

        def write() -> None:
            page[THREAD] = threading.get_native_id()
            with rwlock.write():
                pass

        writer = threading.Thread(target=write)
        writer.start()
        eventually(lambda: page[THREAD] and len(rwlock.waiters) == 1)
        become(FIFO, 10, 0)
        with rwlock.read():
            pass
        writer.join()
        return scheduled(0)

    holder = inside(domain, page, "write")
    child = Child(wait_in_two_threads)
    eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
    assert scheduled(page[THREAD]) == LOW
    page[GO] = 1
    assert holder.result() == LOW
    assert child.result() == (FIFO, 10, 0)
    lifted = [event["reason"].split()[1] for event in events(domain, "lifted")]
    assert lifted[0] == str(holder.pid)


@privileged
@served
def test_of_a_process_only_the_thread_that_reads_is_lifted(domain: str, page: Page) -> None:

    def read_in_one_of_three_threads() -> list[tuple[int, int, int]]:
        rwlock = table(domain)
        numbers: dict[str, int] = {}

        def low() -> None:
            numbers["low"] = threading.get_native_id()
            with rwlock.read():
                page[INSIDE] = 1
                eventually(lambda: page[GO])
            eventually(lambda: page[OVER])

        def idle() -> None:
            numbers["idle"] = threading.get_native_id()
            eventually(lambda: page[OVER])

        threads = [threading.Thread(target=function) for function in (low, idle)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(numbers) == 2 and scheduled(numbers["low"])[1] == 10)
        found = [scheduled(numbers[name]) for name in ("low", "idle")]
        page[GO] = 1
        eventually(lambda: scheduled(numbers["low"]) == LOW)
        page[OVER] = 1
        for thread in threads:
            thread.join()
        return [*found, scheduled(0)]

    child = Child(read_in_one_of_three_threads)
    eventually(lambda: page[INSIDE])
    writer = Child(go_in, domain, page, "write", (FIFO, 10, 0))
    assert child.result() == [(FIFO | RESET, 10, 0), LOW, LOW]
    writer.result()


@privileged
@pytest.mark.parametrize("how", ["read", "write"])
def test_the_next_supervisor_goes_on_lifting_who_holds_an_rwlock_or_puts_it_back(domain: str, page: Page, how: str) -> None:
    server = start_server(domain)
    holder = inside(domain, page, how)
    with nobody_starts_a_supervisor(domain):
        waiter = waits(domain, page, "write", (FIFO, 10, 0))
        eventually(lambda: is_lifted_to(holder, FIFO, 10, 0))
        server.kill()
        server = start_server(domain)
        eventually(lambda: any(entry["lifted"] for entry in contracts_of(domain)))
        assert is_lifted_to(holder, FIFO, 10, 0)
        server.kill()
        waiter.kill()
        start_server(domain)
    eventually(lambda: scheduled(holder.pid) == LOW)
    page[GO] = 1
    assert holder.result() == LOW


def contracts_of(domain: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _client.ask(domain, {"op": "contracts", "from": 0})["contracts"]
    return found


# -- at random ------------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
OWN = [(OTHER, 0, 0), (OTHER, 0, 9), (BATCH, 0, 4), (RR, 4, 0), (FIFO, 12, 3), (FIFO | RESET, 30, 0)]


def live(domain: str, page: Page, seat: int, seed: int) -> None:
    """Take locks, one inside another in the order of their names, hold them for a while or give up; pause when told to."""
    chance = random.Random(seed)
    locks = [lock_of(domain, name) for name in NAMES]
    become(*OWN[seat])
    while not page[OVER]:
        if pause := page[PAUSE]:
            page[PAUSED + seat] = pause
            eventually(lambda pause=pause: page[PAUSE] != pause, patience=2 * PATIENCE)
            continue
        wanted = [lock for lock in locks if chance.random() < 0.5]
        with contextlib.ExitStack() as held:
            for lock in wanted:
                if not lock.acquire(timeout=chance.choice((0.0, 0.005, 0.05, 0.2))):
                    break
                held.callback(lock.release)
            time.sleep(chance.random() * 0.01)  # all of them spinning under SCHED_FIFO would keep the others out for seconds
        page[PROGRESS] += 1


@privileged
@pytest.mark.parametrize("runs", [15, pytest.param(1000, marks=soak)])
def test_priorities_are_put_back_exactly_whoever_dies(runs: int, domain: str, page: Page) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    seats = range(len(OWN))
    dead = {"a process": 0, "the supervisor": 0}
    lifted = 0
    with nobody_starts_a_supervisor(domain):
        server = start_server(domain)
        children = [Child(live, domain, page, seat, chance.randrange(1 << 30)) for seat in seats]
        for run in range(1, runs + 1):
            goal = page[PROGRESS] + chance.randrange(1, 20)
            eventually(lambda goal=goal: page[PROGRESS] >= goal)
            lifted += len(events(domain, "lifted"))
            victims = chance.choice((("a process",), ("the supervisor",), ("a process", "the supervisor"), ("a process",) * 2))
            for victim in victims:
                dead[victim] += 1
                if victim == "a process":
                    chance.choice(children).kill()
                else:
                    server.kill()
            if "the supervisor" in victims:
                server = start_server(domain)
            page[PAUSE] = run
            living = [seat for seat in seats if children[seat].is_alive()]
            for seat in living:
                child = children[seat]
                eventually(lambda child=child, seat=seat, run=run: page[PAUSED + seat] == run or not child.is_alive())
                assert child.is_alive(), child.result()
            for seat in living:
                eventually(lambda seat=seat: scheduled(children[seat].pid) == OWN[seat], f"run {run}: {OWN[seat]} is put back")
            for seat in set(seats).difference(living):
                children[seat] = Child(live, domain, page, seat, chance.randrange(1 << 30))
            page[PAUSE] = 0
        page[OVER] = 1
        for child in children:
            child.result()
    print(f"{runs} runs; dead: {dead}; {lifted} lifts or more")
    assert lifted > runs / 10
