"""Waiting: how long, for whom, what it costs, and what those who wait are told when owners die.

Elapsed times are asserted as minima only.  Whoever is killed here is killed with SIGKILL, and nobody helps: waiters find
it out themselves.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from support import PATIENCE, Child, Page, eventually

import shlock
from shlock import _owned, _parking, _process, _sys

KINDS: dict[str, Callable[[], Any]] = {
    "Lock": shlock.Lock,
    "RLock": shlock.RLock,
    "Semaphore": shlock.Semaphore,
    "owned Semaphore": lambda: shlock.Semaphore(1, owned=True),
}

SHORT = 0.15


@pytest.fixture(params=KINDS)
def lock(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


class Holder:
    """A process that holds a lock until it is told to go on, or killed."""

    def __init__(self, lock: Any, times: int = 1) -> None:
        self.page = Page()
        self.child = Child(self._hold, lock, times)
        eventually(lambda: self.page[0])

    def _hold(self, lock: Any, times: int) -> None:
        for _ in range(times):
            lock.acquire()
        self.page[0] = 1
        eventually(lambda: self.page[1])
        lock.release()

    def release(self) -> None:
        self.page[1] = 1
        self.child.result()


def take(lock: Any) -> tuple[int | None, list[str]]:
    """Acquire and release; which dead process was named, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert lock.acquire()
        abandoned = lock.abandoned
        lock.release()
    return (None if abandoned is None else abandoned.pid), [one.category.__name__ for one in caught]


def die_inside(lock: Any) -> int:
    """A process takes the lock and is killed; its pid."""
    holder = Holder(lock)
    holder.child.kill()
    return holder.child.pid


# -- time -----------------------------------------------------------------------------------------------------------------


def test_a_timed_acquire_of_a_held_lock_waits_at_least_its_timeout(lock: Any) -> None:
    holder = Holder(lock)
    start = time.monotonic()
    assert lock.acquire(True, SHORT) is False
    assert time.monotonic() - start >= SHORT
    assert lock.acquire(timeout=0.001) is False
    holder.release()


def test_timed_waits_of_event_and_condition_and_barrier_wait_at_least_their_timeout() -> None:
    condition, event, barrier = shlock.Condition(), shlock.Event(), shlock.Barrier(2)
    start = time.monotonic()
    assert event.wait(SHORT) is False
    assert time.monotonic() - start >= SHORT
    start = time.monotonic()
    with condition:
        assert condition.wait(SHORT) is False
    assert time.monotonic() - start >= SHORT
    start = time.monotonic()
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait(SHORT)
    assert time.monotonic() - start >= SHORT


def test_a_timeout_below_the_poll_interval_is_waited_for_too(lock: Any) -> None:
    holder = Holder(lock)
    for timeout in (0.0005, 0.002, 0.009):
        start = time.monotonic()
        assert lock.acquire(True, timeout) is False
        assert time.monotonic() - start >= timeout
    holder.release()


def test_nan_is_no_timeout(lock: Any) -> None:
    with pytest.raises(ValueError, match="NaN"):
        lock.acquire(True, math.nan)
    assert not lock.locked()
    holder = Holder(lock)
    with pytest.raises(ValueError, match="NaN"):
        lock.acquire(True, math.nan)
    holder.release()


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -1e9, -math.inf])
def test_a_timeout_of_zero_or_less_does_not_wait(timeout: float, lock: Any) -> None:
    holder = Holder(lock)
    seen: list[str] = []
    _sys.crash_points[:] = [seen.append]
    try:
        assert lock.acquire(True, timeout) is False
    finally:
        _sys.crash_points.clear()
    assert not [label for label in seen if label.startswith(("A4", "A6"))], "it got in line"
    holder.release()
    assert lock.acquire(True, timeout) is True
    lock.release()


@pytest.mark.parametrize("timeout", [1e9, float(sys.maxsize), 1e300, math.inf, sys.maxsize])
def test_a_huge_timeout_is_for_ever(timeout: float, lock: Any) -> None:
    """Stock raises OverflowError for some of them: what nobody can live to see is no error here."""
    assert lock.acquire(True, timeout) is True
    lock.release()
    holder = Holder(lock)
    waiter = Child(lambda: (lock.acquire(True, timeout), lock.release())[0])
    eventually(lambda: lock.waiters)
    holder.release()
    assert waiter.result() is True


# -- what waiting costs ---------------------------------------------------------------------------------------------------


def _looks_for(lock: Any, cores: set[int] | None) -> list[int]:
    """How often a blocked acquire may look before it sleeps."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
        _owned._cores = (0.0, 1)
    seen: list[int] = []
    real = _owned.OwnerWaiter.look

    def look(self: Any, looks: int, parked: int = 0, *, patient: bool = False) -> bool:
        seen.append(looks)
        return real(self, looks, parked, patient=patient)

    _owned.OwnerWaiter.look = look  # type: ignore[method-assign]
    try:
        assert lock.acquire(True, 0.01) is False
    finally:
        _owned.OwnerWaiter.look = real  # type: ignore[method-assign]
    return seen


def test_nobody_spins_on_one_core() -> None:
    lock = shlock.Lock()
    holder = Holder(lock)
    one_core = {min(os.sched_getaffinity(0))}
    assert max(Child(_looks_for, lock, one_core).result()) == 1
    holder.release()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_who_waits_for_another_process_on_two_cores_looks_a_while() -> None:
    lock = shlock.Lock()
    holder = Holder(lock)
    assert 1 < max(Child(_looks_for, lock, None).result()) <= _owned.MOST_LOOKS
    holder.release()


def test_nobody_spins_while_a_thread_of_this_very_process_is_the_owner() -> None:
    lock = shlock.Lock()
    assert lock.acquire()
    assert max(_looks_for(lock, None)) == 1
    lock.release()


# -- who holds, who waits -------------------------------------------------------------------------------------------------


def test_waiters_names_those_who_wait_in_their_order(lock: Any) -> None:
    holder = Holder(lock)
    assert lock.waiters == ()
    children = []
    for count in (1, 2, 3):
        children.append(Child(lambda: (lock.acquire(), lock.release())[0]))
        eventually(lambda count=count: len(lock.waiters) == count)  # type: ignore[misc]
    waiters = lock.waiters
    assert [waiter.pid for waiter in waiters] == [child.pid for child in children]
    assert [waiter.thread_id for waiter in waiters] == [child.pid for child in children]  # their main threads
    times = [waiter.waiting_for for waiter in waiters]
    assert times == sorted(times, reverse=True)
    assert min(times) > 0
    assert "waiters=3" in repr(lock)
    holder.release()
    for child in children:
        assert child.result()
    assert lock.waiters == ()


def test_a_thread_that_gave_up_or_got_in_is_no_waiter_any_more(lock: Any) -> None:
    holder = Holder(lock)
    assert lock.acquire(True, 0.02) is False
    assert lock.waiters == ()
    holder.release()
    assert lock.acquire(True, 5)
    assert lock.waiters == ()
    lock.release()


def test_a_waiter_that_was_killed_is_no_waiter_any_more(lock: Any) -> None:
    holder = Holder(lock)
    child = Child(lock.acquire)
    eventually(lambda: lock.waiters)
    child.kill()
    assert lock.waiters == ()
    holder.release()


@pytest.mark.parametrize("kind", ["Lock", "RLock", "owned Semaphore"])
def test_owner_names_the_process_that_holds_it(kind: str) -> None:
    lock = KINDS[kind]()
    assert lock.owner is None
    holder = Holder(lock)
    owner = lock.owner
    assert owner is not None
    assert owner.pid == holder.child.pid
    assert owner.alive
    holder.release()
    assert lock.owner is None


def test_since_when_the_owner_holds_it_is_known_after_a_contended_acquire() -> None:
    lock = shlock.Lock()
    lock.acquire()
    assert lock.owner is not None
    assert lock.owner.since is None  # an uncontended acquire reads no clock
    lock.release()
    holder = Holder(lock)
    start = time.monotonic()
    second = Page()

    def hold() -> None:
        lock.acquire()
        second[0] = 1
        eventually(lambda: second[1])
        lock.release()

    child = Child(hold)
    eventually(lambda: lock.waiters)
    holder.release()
    eventually(lambda: second[0])
    owner = lock.owner
    assert owner is not None
    assert owner.pid == child.pid
    assert owner.since is not None
    assert start <= owner.since <= time.monotonic()
    second[1] = 1
    child.result()
    lock.acquire()
    assert lock.owner is not None
    assert lock.owner.since is None, "the time of somebody else's"
    lock.release()


# -- death ----------------------------------------------------------------------------------------------------------------

OWNED = {kind: KINDS[kind] for kind in ("Lock", "RLock", "owned Semaphore")}


@pytest.fixture(params=OWNED)
def owned(request: pytest.FixtureRequest) -> Any:
    return OWNED[request.param]()


def test_a_waiter_gets_in_by_itself_when_the_owner_is_killed(owned: Any) -> None:
    holder = Holder(owned)
    waiter = Child(take, owned)
    eventually(lambda: owned.waiters)
    holder.child.kill()
    assert waiter.result() == (holder.child.pid, ["AbandonedWarning"])
    assert take(owned) == (None, [])


def test_the_next_to_come_is_the_heir_if_nobody_waited(owned: Any) -> None:
    pid = die_inside(owned)
    assert owned.locked()
    owner = owned.owner
    assert owner is not None
    assert (owner.pid, owner.alive) == (pid, False)
    assert take(owned) == (pid, ["AbandonedWarning"])
    assert take(owned) == (None, [])


def test_who_only_ever_tries_finds_a_dead_owner(owned: Any) -> None:
    """A3: at most once per poll interval it looks."""
    pid = die_inside(owned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shlock.AbandonedWarning)
        eventually(lambda: owned.acquire(False))
    assert owned.abandoned is not None
    assert owned.abandoned.pid == pid
    owned.release()
    assert owned.abandoned is None


def test_who_only_ever_tries_looks_once_per_poll_interval(owned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(owned)
    now, looks, is_alive = [time.monotonic()], list[int](), _process.is_alive
    with monkeypatch.context() as patch:
        patch.setattr(_sys.SYSTEM, "monotonic", lambda: now[0])
        patch.setattr(_process, "is_alive", lambda word: looks.append(word) or is_alive(word))
        for count in (1, 2, 3):
            for _ in range(100):
                assert owned.acquire(False) is False
            assert len(looks) == count
            now[0] += _parking.POLL_INTERVAL
    holder.release()


def test_who_waits_shorter_than_the_poll_interval_finds_a_dead_owner(owned: Any) -> None:
    pid = die_inside(owned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shlock.AbandonedWarning)
        eventually(lambda: owned.acquire(True, 0.0005))
    assert owned.abandoned is not None
    assert owned.abandoned.pid == pid
    owned.release()


def test_ignore_says_nothing_but_abandoned_is_set() -> None:
    lock = shlock.Lock(on_abandoned="ignore")
    pid = die_inside(lock)
    assert take(lock) == (pid, [])
    assert take(lock) == (None, [])


def test_a_warning_that_is_an_error_leaves_the_lock_free_and_the_next_one_told(owned: Any) -> None:
    pid = die_inside(owned)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error", shlock.AbandonedWarning)
            with pytest.raises(shlock.AbandonedWarning):
                owned.acquire()
    assert take(owned) == (pid, ["AbandonedWarning"])
    assert take(owned) == (None, [])


def test_a_warning_that_is_an_error_wakes_the_next_waiter(owned: Any) -> None:
    holder = Holder(owned)

    def strict() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error", shlock.AbandonedWarning)
            try:
                owned.acquire()
            except shlock.AbandonedWarning:
                return "told"
        owned.release()
        return "in"

    children = [Child(strict) for _ in range(3)]
    eventually(lambda: len(owned.waiters) == 3)
    holder.child.kill()
    assert [child.result() for child in children] == ["told"] * 3


def test_poison_makes_every_acquire_raise_until_it_is_repaired() -> None:
    lock = shlock.Lock(on_abandoned="poison")
    pid = die_inside(lock)
    for attempt in (lock.acquire, lock.__enter__, lambda: lock.acquire(True, 1.0)):
        with pytest.raises(shlock.AbandonedError) as caught:
            attempt()
        assert caught.value.abandoned.pid == pid
    assert Child(_is_poisoned, lock).result()
    with lock.repair() as abandoned:
        assert abandoned is not None
        assert abandoned.pid == pid
        assert lock.locked()
    assert take(lock) == (None, [])


def _is_poisoned(lock: Any) -> bool:
    try:
        lock.acquire()
    except shlock.AbandonedError:
        return True
    lock.release()
    return False


def test_poison_is_told_to_all_who_wait() -> None:
    lock = shlock.Lock(on_abandoned="poison")
    holder = Holder(lock)
    children = [Child(_is_poisoned, lock) for _ in range(3)]
    eventually(lambda: len(lock.waiters) == 3)
    holder.child.kill()
    assert [child.result() for child in children] == [True] * 3


def test_a_repair_that_fails_leaves_it_poisoned() -> None:
    lock = shlock.Lock(on_abandoned="poison")
    pid = die_inside(lock)
    with pytest.raises(LookupError), lock.repair():
        raise LookupError
    with pytest.raises(shlock.AbandonedError):
        lock.acquire()
    with lock.repair() as abandoned:
        assert abandoned is not None
        assert abandoned.pid == pid
    assert take(lock) == (None, [])


def test_a_repairer_that_is_killed_leaves_it_poisoned() -> None:
    lock, page = shlock.Lock(on_abandoned="poison"), Page()
    die_inside(lock)

    def repair() -> None:
        with lock.repair():
            page[0] = 1
            signal.pause()

    repairer = Child(repair)
    eventually(lambda: page[0])
    repairer.kill()
    with pytest.raises(shlock.AbandonedError):
        lock.acquire()
    with lock.repair() as abandoned:
        assert abandoned is not None
        assert abandoned.pid == repairer.pid
    assert take(lock) == (None, [])


def test_who_inherits_a_poisoned_lock_in_a_condition_s_wait_leaves_it_poisoned() -> None:
    lock = shlock.Lock(on_abandoned="poison")
    condition = shlock.Condition(lock)
    with pytest.raises(shlock.AbandonedError), condition:
        Child(lambda: (lock.acquire(), os.kill(os.getpid(), signal.SIGKILL)))
        while True:
            condition.wait(0.01)
    with pytest.raises(shlock.AbandonedError):
        lock.acquire()


def test_permits_of_the_dead_come_back() -> None:
    semaphore = shlock.Semaphore(3, owned=True, on_abandoned="ignore")
    holder = Holder(semaphore, times=3)
    assert semaphore.get_value() == 0
    waiter = Child(semaphore.acquire)
    eventually(lambda: semaphore.waiters)
    holder.child.kill()
    assert waiter.result() is True  # and it ends holding it
    for _ in range(3):
        assert semaphore.acquire()
    assert semaphore.acquire(False) is False
    for _ in range(3):
        semaphore.release()
    assert semaphore.get_value() == 3


def test_heirs_that_are_killed_in_turn_are_each_replaced(owned: Any) -> None:
    holder = Holder(owned)
    page = Page()

    def inherit(number: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            owned.acquire()
        page[number] = 1
        signal.pause()

    heirs = []
    for number in range(4):
        heirs.append(Child(inherit, number))
        eventually(lambda number=number: len(owned.waiters) == number + 1)  # type: ignore[misc]
    last = holder.child
    last.kill()
    for _ in heirs:
        number = eventually(lambda: next((n + 1 for n in range(len(heirs)) if page[n]), None)) - 1
        page[number] = 0
        last = heirs[number]
        last.kill()
    assert take(owned) == (last.pid, ["AbandonedWarning"])
    assert take(owned) == (None, [])


# -- a chosen waiter that does not come -----------------------------------------------------------------------------------


def _choose(lock: Any) -> tuple[Child, Page]:
    """A waiter that was chosen, and stands still before it looks at the word."""
    page = Page()

    def stand_still(label: str) -> None:
        if label == "A6 awake" and lock_is_free():
            page[0] = 1
            signal.pause()

    def lock_is_free() -> bool:
        return not lock.locked()

    def wait() -> None:
        _sys.crash_points[:] = [stand_still]
        lock.acquire()
        lock.release()  # it woke up by polling, just before it was chosen, and so did not stand still

    return Child(wait), page


def test_a_chosen_waiter_that_is_killed_keeps_nobody_out(lock: Any) -> None:
    lock.acquire()
    chosen, page = _choose(lock)
    eventually(lambda: lock.waiters)
    others = [Child(lambda: (lock.acquire(), lock.release())[0]) for _ in range(2)]
    eventually(lambda: len(lock.waiters) == 3)
    lock.release()
    eventually(lambda: page[0] or all(not other.is_alive() for other in others))
    chosen.kill()
    for other in others:
        assert other.result() is True
    assert lock.acquire(True, PATIENCE)
    lock.release()


def test_a_chosen_waiter_that_is_stopped_keeps_nobody_out(lock: Any) -> None:
    """SIGSTOP, for as long as it pleases: the others come in by polling."""
    lock.acquire()
    chosen, page = _choose(lock)
    eventually(lambda: lock.waiters)
    others = [Child(lambda: (lock.acquire(), lock.release())[0]) for _ in range(2)]
    eventually(lambda: len(lock.waiters) == 3)
    chosen.stop()
    lock.release()
    for other in others:
        assert other.result() is True
    assert lock.acquire(True, PATIENCE)
    lock.release()
    chosen.kill()
    assert page[0] == 0


# -- without polling ------------------------------------------------------------------------------------------------------


def _in_turn(lock: Any) -> None:
    lock.acquire()
    lock.release()


def _notified(condition: Any) -> None:
    with condition:
        condition.wait()


def _notify_all(condition: Any) -> None:
    with condition:
        condition.notify_all()


def _taken(lock: Any) -> Any:
    lock.acquire()
    return lock


#: What to make, how four threads wait for it, and what lets all of them go on.
WOKEN: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], object]]] = {
    **{kind: (lambda make=make: _taken(make()), _in_turn, lambda lock: lock.release()) for kind, make in KINDS.items()},
    "Condition": (shlock.Condition, _notified, _notify_all),
    "Event": (shlock.Event, lambda event: event.wait(), lambda event: event.set()),
    "Barrier": (lambda: shlock.Barrier(5), lambda barrier: barrier.wait(), lambda barrier: barrier.wait()),
}


@pytest.mark.parametrize("kind", WOKEN)
def test_everybody_who_waits_is_woken_though_nobody_polls(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 100 * PATIENCE)
    make, wait, wake = WOKEN[kind]
    primitive = make()
    threads = [threading.Thread(target=wait, args=(primitive,), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(primitive.waiters) == 4)
    wake(primitive)
    eventually(lambda: not any(thread.is_alive() for thread in threads), "all four go on", PATIENCE / 3)


# -- fairness -------------------------------------------------------------------------------------------------------------


def test_nobody_starves(lock: Any) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    page = Page()

    def hammer(number: int) -> None:
        while not page[8]:
            lock.acquire()
            page[number] = page[number] + 1
            lock.release()

    children = [Child(hammer, number) for number in range(4)]
    try:
        eventually(lambda: all(page[number] >= 20 for number in range(4)), "all four get in again and again")
    finally:
        page[8] = 1
    for child in children:
        child.result()
