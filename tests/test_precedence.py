"""Who goes first: by precedence, then by arrival; and what becomes of a lock handed over to somebody who does not come.

Leased locks are opened in forked children only, so this process never is a client.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import (
    PATIENCE,
    Child,
    Page,
    eventually,
    supervisor_of,
)
from test_enforcement import LONG

import shlock
from shlock import _atomic, _handover, _owned, _parking, _sys, snapshot
from shlock import _layout as at

WAITERS = 16
TURN, ROUND, COUNT, HELD, OVER = range(5)  # words of the page; the order of the grants comes behind
FIRST = 8
LABELS = ("C60 PARKED taken away, first in line known", "C61 reserved, nobody called")
RANKS = [3, 1, 0, 2, 2, 0, 7, 1, 3, 3, 0, 5, 1, 7, 2, 0]


def ranked(domain: str, rank: int) -> Any:
    return shlock.Lock("lock", domain=domain, on_abandoned="ignore", lease=LONG, rank=rank)


def come_in_turn(domain: str, page: Page, number: int, rounds: int) -> None:
    """At each round: wait for our turn to stand in line, get in, say so, leave."""
    lock = ranked(domain, RANKS[number])
    for round_ in range(1, rounds + 1):
        eventually(lambda round_=round_: page[ROUND] == round_ and page[TURN] == number + 1)
        assert lock.acquire(timeout=PATIENCE)
        page[FIRST + page[COUNT]] = number
        page[COUNT] += 1
        lock.release()


def hold_and_call(domain: str, page: Page, rounds: int, seed: int) -> list[int]:
    """Hold the lock, let everybody stand in line in some order, and leave; the order in which they came, per round."""
    lock = ranked(domain, 0)
    order = list(range(WAITERS))
    chance = random.Random(seed)
    wrong = []
    for round_ in range(1, rounds + 1):
        chance.shuffle(order)
        lock.acquire()
        page[COUNT] = page[TURN] = 0
        page[ROUND] = round_
        for position, number in enumerate(order):
            page[TURN] = number + 1
            # Marked last: before that it may see the lock free, and go in without a wait.
            eventually(lambda position=position: len(lock.waiters) == position + 1 and is_marked(lock))
        lock.release()
        eventually(lambda: page[COUNT] == WAITERS)
        found = [page[FIRST + place] for place in range(WAITERS)]
        expected = sorted(order, key=lambda number: (-RANKS[number], order.index(number)))
        if found != expected:
            wrong.append((round_, order[:], found, expected))
    return wrong


def is_marked(lock: Any) -> bool:
    return bool(lock._words.view[lock._block.word] & at.PARKED)


def test_a_thousand_grants_go_by_rank_and_then_by_arrival(domain: str) -> None:
    page = Page(64)
    rounds = 63
    children = [Child(come_in_turn, domain, page, number, rounds) for number in range(WAITERS)]
    caller = Child(hold_and_call, domain, page, rounds, random.randrange(1 << 30))
    wrong = caller.result(4 * PATIENCE)
    assert not wrong, "\n".join(map(str, wrong))
    for child in children:
        child.result()


# -- somebody who does not come -------------------------------------------------------------------------------------------


def wait_in_line(domain: str, rank: int, page: Page, number: int) -> list[int]:
    """Get in and leave; of whose deaths we were told."""
    lock = ranked(domain, rank)
    assert lock.acquire(timeout=PATIENCE)
    abandoned = lock.abandoned
    page[FIRST + page[COUNT]] = number
    page[COUNT] += 1
    lock.release()
    return [] if abandoned is None else [abandoned.pid]


def hold_until_told(domain: str, page: Page) -> None:
    lock = ranked(domain, 0)
    with lock:
        page[HELD] = 1
        eventually(lambda: page[OVER], patience=4 * PATIENCE)


def waiting(domain: str) -> set[int]:
    found = [one for shot in snapshot.domains() if shot.domain == domain for one in shot.primitives]
    return {waiter.pid for one in found for waiter in one.waiters}


@pytest.mark.parametrize("is_supervised", [True, False])
def test_when_the_chosen_waiter_dies_the_next_best_gets_in(domain: str, is_supervised: bool) -> None:
    page = Page(64)
    holder = Child(hold_until_told, domain, page)
    eventually(lambda: page[HELD])
    children = []
    for number, rank in enumerate([1, 5, 9, 7]):
        children.append(Child(wait_in_line, domain, rank, page, number))
        eventually(lambda: children[-1].pid in waiting(domain))
    best = children.pop(2)
    best.stop()
    if not is_supervised:
        pid = supervisor_of(domain)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    page[OVER] = 1
    holder.result()
    assert page[COUNT] == 0, "somebody slipped in front of the one with the highest rank"
    best.kill()
    eventually(lambda: page[COUNT] == 3)
    assert [page[FIRST + place] for place in range(3)] == [3, 1, 0]
    assert [child.result() for child in children] == [[], [], []], "it was not inside: nobody is to be told"
    if not is_supervised:
        os.kill(pid, signal.SIGCONT)


# -- an owner that dies ---------------------------------------------------------------------------------------------------

OPENED, COME, AT_W, GO_ON = range(40, 44)
KINDS = {"Lock": shlock.Lock, "RWLock": shlock.RWLock}


class Ranked:
    """A ranked Lock, or the writers' side of an RWLock."""

    def __init__(self, domain: str, kind: str, rank: int) -> None:
        self.primitive = KINDS[kind]("it", domain=domain, on_abandoned="ignore", lease=LONG, rank=rank)

    def go_in(self, timeout: float | None) -> bool:
        """As acquire(), whatever it is."""
        if isinstance(self.primitive, shlock.Lock):
            return self.primitive.acquire(timeout=timeout) if timeout else self.primitive.acquire(False)
        self.inside = self.primitive.write(timeout)
        try:
            self.inside.__enter__()
        except TimeoutError:
            return False
        return True

    def go_out(self) -> None:
        if isinstance(self.primitive, shlock.Lock):
            self.primitive.release()
        else:
            self.inside.__exit__()


def die_inside(domain: str, kind: str, page: Page) -> None:
    assert Ranked(domain, kind, 0).go_in(PATIENCE)
    page[HELD] = 1
    signal.pause()


def come(domain: str, kind: str, page: Page, rank: int, number: int, polls: bool = True) -> int | None:
    """Open it; when told to, get in, say so, and leave when it is OVER.  Of whose death we were told."""
    it = Ranked(domain, kind, rank)
    if not polls:
        _parking.POLL_INTERVAL = 1e6  # type: ignore[misc]
    page[OPENED] += 1
    eventually(lambda: page[COME] >= number)
    assert it.go_in(PATIENCE)
    page[FIRST + page[COUNT]] = number
    page[COUNT] += 1
    abandoned = it.primitive.abandoned
    eventually(lambda: page[OVER])
    it.go_out()
    return None if abandoned is None else abandoned.pid


def meet_at_the_dead_word(page: Page, dead: int) -> None:
    """Before this process's first exchange of the dead owner's word for another one's: AT_W, and GO_ON."""
    exchange = _atomic.Operand.compare_exchange

    def compare_exchange(operand: Any, word: Any, expected: int, desired: int) -> bool:
        is_ours = at.process_in(expected) and expected >> at.PID_SHIFT & (1 << at.PID_BITS) - 1 == dead
        if is_ours and (desired ^ expected) & at.OWNER and not page[AT_W]:
            page[AT_W] = 1
            eventually(lambda: page[GO_ON])
        return exchange(operand, word, expected, desired)

    _atomic.Operand.compare_exchange = compare_exchange  # type: ignore[method-assign]


@pytest.fixture
def stopped_supervisor(domain: str) -> Iterator[Callable[[], None]]:
    """What stops it.  At the end it goes on, whatever came."""
    stopped: list[int] = []

    def stop() -> None:
        pid = supervisor_of(domain)
        assert pid is not None
        stopped.append(pid)
        os.kill(pid, signal.SIGSTOP)

    yield stop
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", KINDS)
def test_who_polls_does_not_take_it_from_the_dead_in_front_of_a_better_one_that_has_just_come(
    domain: str, kind: str, stopped_supervisor: Callable[[], None]
) -> None:
    """Its word was marked already: the better one that goes to sleep changes nothing of it."""
    page = Page(64)
    holder = Child(die_inside, domain, kind, page)
    eventually(lambda: page[HELD])

    def poll() -> int | None:
        meet_at_the_dead_word(page, holder.pid)
        return come(domain, kind, page, 1, 1)

    first = Child(poll)
    better = Child(come, domain, kind, page, 5, 2, False)
    eventually(lambda: page[OPENED] == 2)
    page[COME] = 1
    eventually(lambda: first.pid in waiting(domain))
    stopped_supervisor()
    holder.kill()
    holder.wait()
    eventually(lambda: page[AT_W])
    page[COME], page[OVER] = 2, 1
    eventually(lambda: better.pid in waiting(domain))
    page[GO_ON] = 1
    eventually(lambda: page[COUNT] == 2)
    assert [page[FIRST], page[FIRST + 1]] == [2, 1]
    assert (better.result(), first.result()) == (holder.pid, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", ["nobody", "a dead one", "somebody"])
def test_who_does_not_wait_gets_it_from_the_dead_if_nobody_is_in_line(
    domain: str, kind: str, line: str, stopped_supervisor: Callable[[], None]
) -> None:
    page = Page(64)
    holder = Child(die_inside, domain, kind, page)
    eventually(lambda: page[HELD])

    def attempt() -> tuple[bool, int | None]:
        it = Ranked(domain, kind, 1)
        page[OPENED] += 1
        eventually(lambda: page[GO_ON])
        got = it.go_in(0)
        abandoned = it.primitive.abandoned if got else None
        if got:
            it.go_out()
        return got, None if abandoned is None else abandoned.pid

    who_tries = Child(attempt)
    waiter = Child(come, domain, kind, page, 0, 1, False)
    eventually(lambda: page[OPENED] == 2)
    if line != "nobody":
        page[COME] = 1
        eventually(lambda: waiter.pid in waiting(domain))
    stopped_supervisor()
    holder.kill()
    holder.wait()
    if line == "a dead one":
        waiter.kill()
        waiter.wait()
    page[GO_ON] = 1
    assert who_tries.result() == ((False, None) if line == "somebody" else (True, holder.pid))
    page[COME] = page[OVER] = 1
    if line != "a dead one":
        assert waiter.result() == (holder.pid if line == "somebody" else None)


# -- without contracts: a bound on waiting --------------------------------------------------------------------------------


class Waiter(Child):
    """A process that waits for a lock that this one holds."""

    def __init__(self, lock: Any, body: Callable[[], Any] | None = None) -> None:
        def wait() -> Any:
            assert lock.acquire(timeout=PATIENCE)
            result = body() if body is not None else None
            lock.release()
            return result

        super().__init__(wait)
        eventually(lambda: self.pid in {waiter.pid for waiter in lock.waiters})


def let_turns_pass(lock: Any) -> None:
    """As if the owner and all who wait had been there for longer than a turn."""
    lock._words.turn = 0
    words, spot = lock._block.arena.words, lock._block.arena.layout.spot
    parking = _parking.parking_of(lock._block.arena)
    for index in parking.in_line(lock._block.index):
        words.store(spot(at.SPOT_SINCE, index), time.monotonic_ns() - 2 * _owned.TURN)


@pytest.fixture(params=[shlock.Lock, shlock.RLock])
def held(request: pytest.FixtureRequest) -> Any:
    """A lock that is held, and handed over to a process that is stopped: it was the only one that waited."""
    lock = request.param()
    lock.acquire()
    return lock


def hand_over(lock: Any) -> Waiter:
    waiter = Waiter(lock)
    waiter.stop()
    let_turns_pass(lock)
    mark(lock)
    lock.release()
    return waiter


def mark(lock: Any) -> None:
    """As a waiter does that does not rely on another one."""
    word = lock._block.word
    words = lock._block.arena.words
    words.compare_exchange(word, words.load(word), words.load(word) | at.PARKED)


def test_after_a_turn_the_lock_goes_to_who_waits_and_nobody_can_be_faster(held: Any) -> None:
    waiter = hand_over(held)
    for _ in range(100):
        assert held.acquire(False) is False
    assert held.owner is None
    assert held.locked()
    waiter.go_on()
    waiter.result()
    assert held.acquire(timeout=PATIENCE)
    held.release()


def test_within_a_turn_it_does_not() -> None:
    lock = shlock.Lock()
    lock.acquire()
    waiter = Waiter(lock)
    waiter.stop()
    mark(lock)
    lock._words.turn = time.monotonic_ns() + 10**12
    lock.release()
    assert lock.acquire(False) is True
    lock.release()
    waiter.go_on()
    waiter.result()


def test_a_lock_that_is_handed_over_cannot_be_released_by_anybody_else() -> None:
    lock = shlock.Lock()
    lock.acquire()
    waiter = hand_over(lock)
    with pytest.raises(ValueError, match="released too many times"):
        lock.release()
    assert lock.acquire(False) is False
    waiter.go_on()
    waiter.result()


def test_it_is_shown_as_being_handed_over(domain: str) -> None:
    lock = shlock.Lock("lock", domain=domain)
    lock.acquire()
    waiter = hand_over(lock)
    (shot,) = [one for found in snapshot.domains() if found.domain == domain for one in found.primitives]
    assert (shot.state, shot.owner) == ("being handed over", None)
    assert [found.pid for found in shot.waiters] == [waiter.pid]
    waiter.go_on()
    waiter.result()


def test_who_only_tries_gets_a_lock_that_was_handed_over_to_the_dead_and_is_told_nothing(held: Any) -> None:
    waiter = hand_over(held)
    waiter.kill()
    eventually(lambda: held.acquire(False))
    assert held.abandoned is None
    held.release()


def test_who_waits_gets_a_lock_that_was_handed_over_to_the_dead_and_is_told_nothing(held: Any) -> None:
    waiter = hand_over(held)
    waiter.kill()
    assert held.acquire(timeout=PATIENCE)
    assert held.abandoned is None
    held.release()


def test_it_is_taken_back_from_who_is_stopped(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_owned, "LONGEST_RESERVATION", 0.05)
    waiter = hand_over(held)
    assert held.acquire(timeout=PATIENCE)
    held.release()
    waiter.go_on()
    waiter.result()


def test_the_next_in_line_gets_what_the_chosen_one_does_not_take(held: Any) -> None:
    """The chosen one's deadline passes while it is stopped."""
    lock = held
    first = Child(lambda: lock.acquire(timeout=0.05) and lock.release())
    eventually(lambda: first.pid in {waiter.pid for waiter in lock.waiters})
    first.stop()
    second = Waiter(lock)
    second.stop()
    let_turns_pass(lock)
    mark(lock)
    lock.release()
    word = lock._words.view[lock._block.word]
    assert at.is_reservation(word)
    second.go_on()
    first.go_on()  # it may take it, or leave: both are right
    first.result()
    second.result()


@pytest.mark.parametrize(
    "label", ["C60 PARKED taken away, first in line known", "R3 released, nobody woken", "R3 NOTIFIED, not posted"]
)
@pytest.mark.parametrize("others", [1, 3])
def test_they_go_on_when_the_owner_is_killed_while_it_hands_over_at(label: str, others: int) -> None:
    lock = shlock.Lock(on_abandoned="ignore")
    page = Page(2)

    def hold() -> None:
        lock.acquire()
        page[0] = 1
        eventually(lambda: page[1])
        let_turns_pass(lock)
        mark(lock)
        _sys.crash_points[:] = [lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == label else None]
        lock.release()

    victim = Child(hold)
    eventually(lambda: page[0])
    waiters = [Waiter(lock, lambda: lock.abandoned is not None) for _ in range(others)]
    page[1] = 1
    assert victim.wait() == -signal.SIGKILL
    told = sum(waiter.result() for waiter in waiters)
    assert told == (1 if label.startswith("C60") else 0), "who dies before it has let go is a dead owner"
    assert lock.acquire(timeout=PATIENCE)
    lock.release()


def test_who_goes_to_sleep_while_two_take_it_back_from_the_dead_is_overlooked_by_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whoever took the spot of the dead would pass the lock on by that, too.
    monkeypatch.setattr(_parking.Parking, "_claim_dead", lambda parking, indices: None)
    lock = shlock.Lock()
    lock.acquire()
    waiter = hand_over(lock)
    waiter.kill()
    parking, key = _parking.parking_of(lock._block.arena), lock._block.index
    looks, me = itertools.count(), os.getpid()
    sleepers: list[Waiter] = []
    second_has_looked, second_may_go_on = threading.Event(), threading.Event()

    def take_it_back() -> None:
        _handover.pass_on(parking, key, lock._words.view[lock._block.word], alive=True)

    second = threading.Thread(target=take_it_back)

    def meet(label: str) -> None:
        if os.getpid() != me or label != LABELS[0]:
            return
        look = next(looks)
        if look == 0:  # the first one has found nobody
            sleepers.append(Waiter(lock))
            sleepers[0].stop()
            mark(lock)
            second.start()
            assert second_has_looked.wait(PATIENCE)
        elif look == 1:
            second_has_looked.set()
            assert second_may_go_on.wait(PATIENCE)

    _sys.crash_points[:] = [meet]
    try:
        take_it_back()
        assert lock.locked(), "the first one left it free although somebody is asleep"
    finally:
        second_may_go_on.set()
        second.join()
        _sys.crash_points.clear()
    _handover.settle(parking, key)
    sleepers[0].go_on()
    sleepers[0].result()
    assert lock.acquire(timeout=PATIENCE)
    lock.release()


@pytest.mark.parametrize("way", ["try", "wait"])
@pytest.mark.parametrize("label", LABELS)
def test_who_takes_it_back_from_the_dead_may_die_as_well(label: str, way: str) -> None:
    lock = shlock.Lock()
    lock.acquire()
    waiter = hand_over(lock)
    waiter.kill()

    def die_on_the_way() -> None:
        _sys.crash_points[:] = [lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == label else None]
        if way == "wait":
            lock.acquire(timeout=PATIENCE)
        else:
            eventually(lambda: lock.acquire(False))

    assert Child(die_on_the_way).wait() == -signal.SIGKILL
    assert lock.acquire(timeout=PATIENCE)
    assert lock.abandoned is None
    lock.release()


def test_a_poisoned_lock_that_is_handed_over_is_refused_by_each_waiter_in_turn() -> None:
    lock = shlock.Lock(on_abandoned="poison")
    dead = Child(lambda: (lock.acquire(), os.kill(os.getpid(), signal.SIGKILL)))
    dead.wait()

    def wait() -> str:
        try:
            lock.acquire(timeout=PATIENCE)
        except shlock.AbandonedError as error:
            return str(error.abandoned.pid)
        return "got in"

    page = Page(1)

    def repair_in_vain() -> None:
        with lock.repair():
            page[0] = 1
            eventually(lambda: len(lock.waiters) == 2)
            let_turns_pass(lock)
            mark(lock)
            raise KeyError

    repairer = Child(repair_in_vain)
    eventually(lambda: page[0])
    waiters = [Child(wait) for _ in range(2)]
    assert repairer.wait() == 0
    assert [waiter.result() for waiter in waiters] == [str(dead.pid)] * 2


def test_threads_hammer_and_hand_over_and_nobody_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With turns of no length every release that finds somebody hands over."""
    monkeypatch.setattr(_owned, "TURN", 0)
    lock, counter = shlock.Lock(), Page(1)

    def hammer() -> None:
        for _ in range(300):
            with lock:
                counter[0] += 1

    def hammer_with_threads() -> None:
        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    children = [Child(hammer_with_threads) for _ in range(3)]
    for child in children:
        child.result()
    assert counter[0] == 3 * 3 * 300
    assert lock._words.word_at(lock._block.word) == 0
