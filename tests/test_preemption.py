"""Preemption among real processes: exactly who has lower precedence is thrown out, whatever it does, and nobody else ever."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import (
    PATIENCE,
    Child,
    Page,
    eventually,
    supervisor_of,
)
from test_enforcement import LONG, events

import shlock
from shlock import _layout as at
from shlock import _parking, _process
from shlock.contract import precedence_of
from shlock.errors import ContractDenied, LeaseExpired
from shlock.supervisor import Supervisor

INSIDE, OVER, GONE, STAYED = range(4)  # words of the page
BOTH = ("acquire", "preempt")


def opened(domain: str, rank: int, grace: float = 0.0, **options: Any) -> Any:
    return shlock.Lock("lock", domain=domain, on_abandoned="ignore", lease=LONG, rank=rank, grace=grace, **options)


# What a holder does.  Each says when it is inside; the deaf ones have a short grace, the others one that is never over.


def cooperate(domain: str, page: Page, rank: int) -> str:
    with opened(domain, rank, 60.0) as lease:
        page[INSIDE] = 1
        eventually(lambda: lease.terminate_requested or page[OVER], patience=4 * PATIENCE)
        return "asked" if lease.terminate_requested else "let alone"


def raise_(domain: str, page: Page, rank: int) -> str:
    lock = opened(domain, rank, 60.0, on_terminate="raise")
    try:
        with lock:
            page[INSIDE] = 1
            eventually(lambda: page[OVER], patience=4 * PATIENCE)
    except LeaseExpired:
        return "asked"
    return "let alone"


def be_deaf(domain: str, page: Page, rank: int) -> str:
    with opened(domain, rank, 0.01):
        page[INSIDE] = 1
        while not page[OVER]:
            pass
    return "let alone"


def stop(domain: str, page: Page, rank: int) -> str:
    """Is stopped from outside when it is inside."""
    return be_deaf(domain, page, rank)


def throw_out(domain: str, page: Page, rank: int) -> tuple[bool, str | None]:
    lock = opened(domain, rank, operations=BOTH)
    got = lock.acquire(preempt=True, timeout=0.3 if page[STAYED] else PATIENCE)
    abandoned = lock.abandoned
    if got:
        lock.release()
    return got, None if abandoned is None else abandoned.reason


@pytest.mark.parametrize("holder", [cooperate, raise_, be_deaf, stop])
@pytest.mark.parametrize(("rank_of_holder", "rank"), [(0, 1), (3, 100), (1, 1), (0, 0), (5, 2)])
def test_exactly_the_lower_one_loses(domain: str, holder: Callable[..., str], rank_of_holder: int, rank: int) -> None:
    page = Page()
    inside = Child(holder, domain, page, rank_of_holder)
    eventually(lambda: page[INSIDE])
    if holder is stop:
        inside.stop()
    loses = rank_of_holder < rank
    page[STAYED] = not loses
    got, reason = Child(throw_out, domain, page, rank).result()
    if not loses:
        assert not got
        assert inside.is_alive()
        inside.go_on()
        page[OVER] = 1
        assert inside.result() == "let alone"
        assert events(domain, "terminate") == events(domain, "killed") == []
        return
    assert got
    if holder in (cooperate, raise_):
        assert inside.result() == "asked"
        assert reason is None
        assert events(domain, "killed") == []
        assert [event["reason"] for event in events(domain, "terminate")] == ["preempted"]
    else:
        assert inside.wait() == -signal.SIGKILL
        assert reason == "preempted"
        assert [event["reason"] for event in events(domain, "killed")] == ["preempted"]


def test_a_holder_that_comes_later_is_thrown_out_as_well(domain: str) -> None:
    """The request is made again at each poll; in between somebody else may have got in."""
    page = Page()
    first = Child(cooperate, domain, page, 5)
    eventually(lambda: page[INSIDE])
    page[INSIDE] = 0
    second = Child(cooperate, domain, page, 1)
    winner = Child(throw_out, domain, page, 3)

    def is_in_line() -> bool:
        found = [one for shot in shlock.snapshot.domains() if shot.domain == domain for one in shot.primitives]
        return {second.pid, winner.pid} <= {waiter.pid for one in found for waiter in one.waiters}

    eventually(is_in_line)
    assert first.is_alive()
    assert not events(domain, "terminate"), "5 is above 3"
    page[OVER] = 1  # the first one leaves; 3 goes before 1
    assert first.result() == "let alone"
    assert winner.result() == (True, None)
    second.result()


def test_it_has_to_be_allowed(domain: str) -> None:
    def ask() -> str:
        lock = opened(domain, 1)
        try:
            lock.acquire(preempt=True)
        except ContractDenied as error:
            assert lock.acquire(False), "the seat was not given back"
            lock.release()
            return str(error)
        return "got in"

    assert "does not allow to preempt, only acquire" in Child(ask).result()


def test_a_forged_precedence_in_shared_memory_gains_nothing(domain: str) -> None:
    """Whoever writes into the segment may stand first in line; it throws nobody out."""
    page = Page()
    holder = Child(cooperate, domain, page, 3)
    eventually(lambda: page[INSIDE])

    def forge() -> bool:
        lock = opened(domain, 2, operations=BOTH)
        lock._words.grant.precedence = precedence_of("kernel", 2**31 - 1)
        arena = lock._block.arena
        parking = _parking.parking_of(arena)
        for spot in range(arena.layout.spots):
            arena.words.store(arena.layout.spot(at.SPOT_PRECEDENCE, spot), precedence_of("kernel", 1000))
        assert parking.turn_of(0)[0] < 0
        return bool(lock.acquire(preempt=True, timeout=0.3))

    assert Child(forge).result() is False
    page[OVER] = 1
    assert holder.result() == "let alone"
    assert events(domain, "terminate") == []


def test_interrupting_the_request_leaves_no_trace(domain: str) -> None:
    page = Page()
    holder = Child(cooperate, domain, page, 5)
    eventually(lambda: page[INSIDE])

    def ask() -> list[int]:
        lock = opened(domain, 1, operations=BOTH)

        def interrupt(*_: object) -> None:
            raise KeyError

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            lock.acquire(preempt=True)
        except KeyError:
            return list(lock._words.grant.preempting)
        return [-1]

    assert Child(ask).result() == []
    page[OVER] = 1
    assert holder.result() == "let alone"


# -- the kernel's own -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", [cooperate, be_deaf])
def test_the_program_of_the_supervisor_goes_before_every_other_one(domain: str, holder: Callable[..., str]) -> None:
    page = Page()
    inside = Child(wait_for_supervisor, domain, holder, page)
    with Supervisor(domain) as supervisor:
        eventually(lambda: page[INSIDE])
        with supervisor.acquire("lock", timeout=PATIENCE) as lease:
            assert lease.token > 0
            assert not lease.terminate_requested
            (mine,) = [one for one in supervisor.contracts() if one.holds]
            assert (mine.precedence, mine.pid) == ("kernel", _process.current.pid)
        if holder is cooperate:
            assert inside.result() == "asked"
        else:
            assert inside.wait() == -signal.SIGKILL


def wait_for_supervisor(domain: str, holder: Callable[..., str], page: Page) -> str:
    eventually(lambda: supervisor_of(domain) is not None)
    return holder(domain, page, 100)


def test_without_preempting_it_waits(domain: str) -> None:
    page = Page()
    inside = Child(wait_for_supervisor, domain, cooperate, page)
    with Supervisor(domain) as supervisor:
        eventually(lambda: page[INSIDE])
        before = time.monotonic()
        with pytest.raises(TimeoutError), supervisor.acquire("lock", preempt=False, timeout=0.1):
            pass
        assert time.monotonic() - before >= 0.1
        page[OVER] = 1
        assert inside.result() == "let alone"
        with supervisor.acquire("lock", preempt=False):
            pass
