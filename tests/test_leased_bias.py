"""Leased locks that are biased to a process: the steps of `shlock/_leased_door.py`, and who dies or stops there.

A lock is biased here on request only, whatever the mode is.  Real supervisors watch; whoever has to be inside says so in shared
memory, as in `test_enforcement`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support import PATIENCE, Child, Page, eventually
from test_bias import bias, is_biased, take_and_give_back, want_it, word_of
from test_enforcement import (
    GO,
    HELD,
    LONG,
    OVER,
    READY,
    SHORT,
    TOKEN,
    VIOLATIONS,
    contracts,
    events,
    go_in,
    go_out,
    inherit,
    leased,
    page,
    spin,
    start_server,
    state_of,
)
from test_fork import ForkEverywhere
from test_signals import InThread, ReleaseFree, TakeAgain, TakeFree, Trial, With, interrupt_everywhere

import shlock
from shlock import _bias, _leased_door, _ledger, _process, _sys, snapshot
from shlock import _layout as at
from shlock.errors import LeaseExpired
from shlock.supervisor.leases import Terms, Verdict, Watched
from shlock.supervisor.watch import Client, Supervised, Watch

__all__ = ["page"]

KINDS = {"Lock": shlock.Lock, "RLock": shlock.RLock}
E2, B1, B2, B3, X1 = STEPS = ("E2", "B1", "B2", "B3", "X1")
IN, LEAVE, DONE = 50, 51, 52  # words of the page, beside those of test_enforcement


@pytest.fixture(autouse=True)
def _no_bias_but_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bias, "_chosen", "never")


@pytest.fixture(params=KINDS)
def lock(request: pytest.FixtureRequest) -> Any:
    return bias(KINDS[request.param](lease=LONG))


def began_of(lock: Any) -> float:
    """What the ledger of this process says."""
    moment: float = lock._words.lease_began.cell_contents[0]
    return moment


def hold_of(lock: Any) -> int:
    """H of the slot."""
    hold: int = lock._words.view[lock._words.first_hold]
    return hold


class At:
    """Does something once, at a step of this process on its way in or out by the door."""

    def __init__(self, lock: Any, step: str, action: Callable[[], Any]) -> None:
        self.action = action
        words = lock._words
        enter, leave, finish = words.go_in.cell_contents, words.go_out.cell_contents, _leased_door.finish

        def go_in(block: bool) -> Any:
            if step == E2:
                self.act()
            done = enter(block)
            if step == B1 and done:
                self.act()
            return done

        def go_out() -> None:
            if step == B2:
                self.act()
            leave()
            if step == B3:
                self.act()

        def come_to_the_end(words: Any) -> None:
            if step == X1:
                self.act()
            finish(words)

        words.go_in.cell_contents, words.go_out.cell_contents = go_in, go_out
        _leased_door.finish = come_to_the_end

    def act(self) -> None:
        action, self.action = self.action, lambda: None
        action()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pass_through(domain: str, page: Page, step: str, action: Callable[[], Any], lease: float = LONG) -> None:
    """Have the bias, go in and out by the door, and do something at a step of that."""
    lock = bias(leased(domain, lease=lease))
    if step in (E2, B1):
        At(lock, step, action)
    page[READY] = os.getpid()
    eventually(lambda: page[HELD])
    with lock as hold:
        go_in(page, hold)
        assert step == E2 or lock._words.inside.cell_contents == 1
        page[IN] = 1
        eventually(lambda: page[LEAVE])
        if step not in (E2, B1):
            At(lock, step, action)
        go_out(page)
    page[DONE] = 1


def start(domain: str, page: Page, step: str, action: Callable[[], Any], lease: float = LONG) -> Child:
    page[READY] = page[HELD] = page[IN] = page[LEAVE] = page[DONE] = 0
    child = Child(pass_through, domain, page, step, action, lease)
    eventually(lambda: page[READY] or not child.is_alive())
    return child


def revoke_by(heir: Child, page: Page, lock_of: Any) -> None:
    """Have the heir wait for it, and so revoke the bias."""
    page[GO] = 1
    eventually(lambda: word_of(lock_of) & at.REVOKED == at.REVOKED or not heir.is_alive(), "the waiter revokes the bias")


def onlooker(domain: str) -> Any:
    """The lock, for who only looks at its word."""
    return shlock.Lock("lock", domain=domain, on_abandoned="ignore", lease=LONG)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    return Child(function, *arguments).result()


def words_at(domain: str) -> Any:
    """What is seen of it without taking part."""
    (found,) = [one for seen in snapshot.domains() if seen.domain == domain for one in seen.primitives if one.name == "lock"]
    return found


# -- as an ordinary one ---------------------------------------------------------------------------------------------------


def test_a_leased_lock_is_biased_and_has_its_lease_and_its_token(lock: Any) -> None:
    tokens = []
    for _ in range(3):
        with lock as lease:
            assert is_biased(lock)
            assert lock._words.inside.cell_contents == 1
            assert lease.token == lock.lease.token
            assert lease.deadline == began_of(lock) + LONG
            assert not lease.terminate_requested
            assert LONG - PATIENCE < lease.remaining() <= LONG
            assert lock.owner.pid == os.getpid()
            assert lock.locked()
            assert hold_of(lock) == at.INSIDE
            tokens.append(lease.token)
        assert began_of(lock) == 0.0
        assert (hold_of(lock), lock.lease, lock.locked()) == (at.OUTSIDE, None, False)
        assert lock._words.lease_seat.cell_contents == 0
    assert tokens == [tokens[0], tokens[0] + 1, tokens[0] + 2]


def test_tokens_grow_by_one_whatever_way_the_lock_is_taken(lock: Any) -> None:
    tokens = []

    def note() -> None:
        tokens.append(lock.lease.token)
        lock.release()

    for _ in range(2):
        for arguments in ((), (False,), (True, 5.0)):
            assert lock.acquire(*arguments)
            assert is_biased(lock)
            note()
        _bias.revoke(lock._words, word_of(lock))
        for arguments in ((), (False,), (True, 5.0)):
            assert lock.acquire(*arguments)
            assert not is_biased(lock)
            note()
        tokens.append(in_child(_take_token, lock))
        for arguments in ((True, 5.0), ()):
            want_it(lock)
            assert lock.acquire(*arguments)
            note()
        assert is_biased(lock)
    assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))


def _take_token(lock: Any) -> int:
    with lock as lease:
        token: int = lease.token
        return token


def test_a_lease_that_somebody_keeps_stays_what_it_was(lock: Any) -> None:
    kept = []
    for _ in range(3):
        with lock as lease:
            kept.append((lease, lease.token, lease.deadline))
    with lock:
        pass
    with lock as last:
        for lease, token, deadline in kept:
            assert (lease.token, lease.deadline) == (token, deadline)
            assert lease is not last
    assert len({id(lease) for lease, _, _ in kept}) == 3


@pytest.mark.parametrize("options", [{"inherit": True}, {"record_site": True}, {"rank": 1}], ids=str)
def test_nothing_is_biased_under_a_contract_that_inherits_or_records_sites_or_has_precedence(options: dict[str, Any]) -> None:
    lock: Any = shlock.Lock(lease=LONG, **options)
    for _ in range(3):
        want_it(lock)
        with lock:
            assert not word_of(lock) & at.REVOKED
    assert lock._words.door is None


@pytest.mark.parametrize(("mode", "releases"), [("always", 1), ("adaptive", _bias.FIRST_CREDIT + 1), ("never", None)])
def test_it_is_biased_after_so_many_releases(mode: str, releases: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bias, "_chosen", mode)
    made: Any = [shlock.Lock(lease=LONG), shlock.Lock(lease=LONG)]
    for number in range(1, 3 * _bias.FIRST_CREDIT):
        with made[0]:
            pass
        made[1].acquire()
        made[1].release()
        assert [lock._words.door is not None for lock in made] == [releases is not None and number >= releases] * 2


def test_functions_that_were_kept_from_before_the_bias_or_from_it_go_on_to_be_right() -> None:
    lock: Any = shlock.Lock(lease=LONG)
    before = lock.acquire, lock.release
    bias(lock)
    during = lock.acquire, lock.release
    for acquire, release in ((before[0], during[1]), (during[0], before[1]), before, during):
        assert acquire()
        assert is_biased(lock)
        assert lock.lease.token == lock._words.lease_token.cell_contents
        assert in_child(lambda: lock.acquire(False)) is False
        release()
        bias(lock)
    _bias.revoke(lock._words, word_of(lock))
    for acquire, release in ((before[0], during[1]), (during[0], before[1]), before, during):
        assert acquire()
        assert in_child(lambda: lock.acquire(False)) is False
        release()
        assert not lock.locked()


def test_another_process_does_not_get_it_and_revokes_the_bias(lock: Any) -> None:
    with lock:
        assert in_child(lambda: lock.acquire(timeout=0.05)) is False
        assert word_of(lock) & at.REVOKED == at.REVOKED
        assert lock.lease is not None
    assert word_of(lock) == 0
    assert in_child(take_and_give_back, lock) == (True, None)
    bias(lock)


def test_a_waiter_is_woken_by_the_release_of_a_revoked_hold(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shlock._parking.POLL_INTERVAL", 10_000.0)
    lock.acquire()
    waiter = Child(take_and_give_back, lock)
    eventually(lambda: lock.waiters)
    lock.release()
    assert waiter.result() == (True, None)


def test_a_slot_of_the_dead_is_claimed_anew(lock: Any) -> None:
    def claim() -> bool:
        return bias(lock)._words.door is not None

    _bias.revoke(lock._words, word_of(lock))
    take_and_give_back(lock)  # B6
    for _ in range(2):
        assert in_child(claim)
    bias(lock)


def test_who_has_lost_its_bias_and_lives_keeps_the_only_slot_until_it_comes_back(lock: Any) -> None:
    def try_it() -> bool:
        for _ in range(2):
            want_it(lock)
            with lock:
                pass
        return lock._words.door is not None

    assert in_child(try_it) is False
    take_and_give_back(lock)
    assert in_child(try_it) is True


# -- threads --------------------------------------------------------------------------------------------------------------


def test_threads_of_the_process_are_let_in_one_by_one(lock: Any) -> None:
    inside, seen, tokens = [0], [], []

    def work() -> None:
        for _ in range(300):
            with lock as lease:
                inside[0] += 1
                tokens.append(lease.token)
                if inside[0] != 1:
                    seen.append(inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [InThread(work) for _ in range(3)]
    for thread in threads:
        thread.result()
    assert not seen
    assert tokens == list(range(tokens[0], tokens[0] + 900))
    assert not lock.locked()
    bias(lock)


def test_another_thread_neither_gets_in_nor_releases_and_changes_nothing(lock: Any) -> None:
    with lock as lease:
        assert InThread(lambda: lock.acquire(False)).result() is False
        assert InThread(lambda: lock.acquire(timeout=0.02)).result() is False
        for release in (lock.release, lambda: lock.__exit__(None, None, None)):
            with pytest.raises((ValueError, AssertionError)):
                InThread(release).result()
            assert began_of(lock) == lease.deadline - LONG
            assert (hold_of(lock), lock._words.inside.cell_contents, lock.lease.token) == (at.INSIDE, 1, lease.token)
            assert is_biased(lock)
        waiter = InThread(lambda: lock.acquire(timeout=PATIENCE) and lock.lease.token)
        eventually(lambda: lock._words.grant.gates)
    assert waiter.result() == lease.token + 1
    assert lock.locked()


def test_a_thread_that_waits_for_the_seat_gets_it_from_one_that_failed_at_the_door(lock: Any) -> None:
    """A signal handler of the thread that is just at B1 would wait for itself."""
    words, got = lock._words, []
    go_in = words.go_in.cell_contents

    def enter(block: bool) -> bool:
        words.go_in.cell_contents = go_in
        done: bool = go_in(block)
        assert not done
        got.append(lock.acquire(timeout=PATIENCE))  # as a handler that runs when the call returns
        token = lock.lease.token
        lock.release()
        got.append(token)
        return done

    _bias.revoke(words, word_of(lock))
    words.go_in.cell_contents = enter
    with lock as lease:
        assert got == [True, lease.token - 1]
        assert began_of(lock) == lease.deadline - LONG
    assert not lock.locked()


def test_a_thread_that_waits_for_the_seat_gets_it_from_one_that_is_out_already(lock: Any) -> None:
    got: list[Any] = []

    def take() -> None:
        got.append(lock.acquire(timeout=PATIENCE))
        got.append(lock.lease.token)
        lock.release()

    At(lock, B3, take)
    with lock as lease:
        pass
    assert got == [True, lease.token + 1]
    assert (began_of(lock), lock.locked()) == (0.0, False)
    with lock:
        assert lock.lease.token == lease.token + 2


def test_a_thread_that_is_out_already_leaves_alone_who_has_taken_over_its_seat(lock: Any) -> None:
    inside, over = threading.Event(), threading.Event()
    found: list[Any] = []

    def hold() -> None:
        with lock as lease:
            found.append((lock._words.lease_seat.cell_contents, lease.deadline - LONG))
            inside.set()
            assert over.wait(PATIENCE)
            found.append((lock._words.lease_seat.cell_contents, began_of(lock)))

    def let_in() -> None:
        threads.append(InThread(hold))
        assert inside.wait(PATIENCE)

    threads: list[InThread] = []
    At(lock, B3, let_in)
    with lock:
        pass
    over.set()
    threads[0].result()
    assert found[0] == found[1] == (found[0][1],) * 2
    assert (began_of(lock), lock.locked()) == (0.0, False)


def test_who_takes_over_a_seat_does_x1_for_who_had_it(lock: Any) -> None:
    grant, found = lock._words.grant, []

    def take_seat() -> None:
        found.append(began_of(lock) > 0.0)
        assert grant.wait_for_seat(False, None)
        found.append(began_of(lock))
        grant.leave_seat()

    At(lock, B3, take_seat)
    with lock:
        pass
    assert found == [True, 0.0]
    assert not lock.locked()


# -- RLock, Condition, repair ---------------------------------------------------------------------------------------------


def test_an_rlock_is_recursive_by_the_door() -> None:
    lock: Any = bias(shlock.RLock(lease=LONG))
    with lock as first:
        with lock as second:
            assert (second.token, second.deadline) == (first.token, first.deadline)
            assert lock._semlock._count() == 2
            assert is_biased(lock)
            assert lock.acquire(timeout=1.0)
            lock.release()
        assert lock._semlock._count() == 1
        assert began_of(lock) == first.deadline - LONG
        assert in_child(lambda: lock.acquire(False)) is False
        with lock:  # the bias is revoked by now
            assert lock._semlock._count() == 2
    assert not lock.locked()
    with pytest.raises(AssertionError):
        lock.release()


def test_a_lock_that_is_held_by_the_door_is_not_taken_again() -> None:
    lock: Any = bias(shlock.Lock(lease=LONG))
    with lock as lease:
        assert lock.acquire(False) is False
        assert lock.acquire(timeout=0.02) is False
        assert lock.lease.token == lease.token
    assert not lock.locked()
    with lock as again:
        assert again.token == lease.token + 1


@pytest.mark.parametrize("depth", [1, 2])
def test_a_condition_waits_with_a_lock_that_is_biased(lock: Any, depth: int) -> None:
    if depth == 2 and not isinstance(lock, shlock.RLock):
        return
    condition = shlock.Condition(lock)
    with condition:
        for _ in range(depth - 1):
            lock.acquire()
        token = lock.lease.token
        assert is_biased(lock)
        assert condition.wait(timeout=0.01) is False
        assert condition._lock._semlock._is_mine()
        assert lock._semlock._count() == depth
        assert lock.lease.token == token + 1
        for _ in range(depth - 1):
            lock.release()
    assert not lock.locked()
    bias(lock)
    notified = InThread(lambda: _wait(condition))
    eventually(lambda: condition.waiters)
    bias(lock)
    with condition:
        condition.notify()
    assert notified.result() is True
    bias(lock)


def _wait(condition: Any) -> bool:
    with condition:
        woken: bool = condition.wait(PATIENCE)
        return woken


def test_a_repair_of_a_biased_lock_is_a_hold_like_any_other(lock: Any) -> None:
    with lock as lease:
        token = lease.token
    with lock.repair() as abandoned:
        assert abandoned is None
        assert lock.lease.token == token + 1
        assert in_child(lambda: lock.acquire(False)) is False
    assert not lock.locked()
    bias(lock)


def test_who_stays_inside_by_its_word_is_inside_all_the_time(lock: Any) -> None:
    with lock as lease:
        lock._leased.stay()
        assert not word_of(lock) & at.REVOKED
        assert lock._words.door is None
        assert lock.lease.token == lease.token
        assert began_of(lock) == lease.deadline - LONG
        assert in_child(lambda: lock.acquire(False)) is False
    assert not lock.locked()
    assert (began_of(lock), lock._words.lease_seat.cell_contents) == (0.0, 0)
    bias(lock)


# -- interruptions and forks ----------------------------------------------------------------------------------------------


class Biased(Trial):
    """A trial with the door there."""

    def __init__(self, lock: Any, make: Callable[[], Trial], is_revoked: bool = False) -> None:
        bias(lock)
        self.trial = make()
        if is_revoked:
            _bias.revoke(lock._words, word_of(lock))

    def operate(self) -> None:
        self.trial.operate()

    def finish(self, outcome: Any) -> None:
        self.trial.finish(outcome)


@pytest.mark.parametrize("is_revoked", [False, True])
def test_whatever_is_interrupted_is_done_or_not(lock: Any, is_revoked: bool) -> None:
    for arguments in ((), (False,), (True, 5.0)):
        interrupt_everywhere(lambda a=arguments: Biased(lock, lambda: TakeFree(lock, *a), is_revoked), 1)  # type: ignore[misc]
    interrupt_everywhere(lambda: Biased(lock, lambda: ReleaseFree(lock), is_revoked), 1)
    interrupt_everywhere(lambda: Biased(lock, lambda: With(lock), is_revoked), 3)
    if isinstance(lock, shlock.RLock):
        interrupt_everywhere(lambda: Biased(lock, lambda: TakeAgain(lock), is_revoked), 0)
    assert began_of(lock) == 0.0
    assert lock._words.lease_seat.cell_contents == 0


class Grants(Trial):
    """The release that grants the bias."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        if lock._words.door is not None:
            _bias.revoke(lock._words, word_of(lock))
            take_and_give_back(lock)
        lock.acquire()
        want_it(lock)

    def operate(self) -> None:
        self.lock.release()

    def finish(self, outcome: Any) -> None:
        if outcome.at_entry and outcome.raised:
            self.lock.release()
        assert not self.lock.locked()
        assert began_of(self.lock) == 0.0
        assert take_and_give_back(self.lock) == (True, None)


def test_a_release_that_grants_the_bias_and_is_interrupted_has_released(lock: Any) -> None:
    interrupt_everywhere(lambda: Grants(lock), 3)


class Waits(Trial):
    """``stay``, and all that a Condition does."""

    def __init__(self, lock: Any) -> None:
        self.lock = bias(lock)
        self.condition = shlock.Condition(lock)
        self.lock.acquire()

    def operate(self) -> None:
        self.condition.wait(0.0)

    def finish(self, outcome: Any) -> None:
        assert self.lock._semlock._is_mine()
        assert self.lock._semlock._count() == 1
        self.lock.release()
        assert not self.lock.locked()
        assert take_and_give_back(self.lock) == (True, None)


def test_a_wait_with_a_biased_lock_that_is_interrupted_holds_it_afterwards(lock: Any) -> None:
    interrupt_everywhere(lambda: Waits(lock), 20)


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_fork_anywhere_leaves_lock_and_bias_to_the_parent(domain: str, is_inside: bool) -> None:
    parent, held = os.getpid(), []
    server = start_server(domain)
    locks: list[Any] = [shlock.Lock("lock", domain=domain, lease=LONG)]

    def prepare() -> None:
        held.clear()
        bias(locks[0])
        if is_inside:
            locks[0].acquire()

    def operate() -> None:
        try:
            if is_inside:
                locks[0].release()
            else:
                held.append(locks[0].acquire())
        except (AssertionError, ValueError):
            assert os.getpid() != parent, "only a child that had not begun yet may be told that it holds nothing"

    def in_child() -> None:
        if not locks[0]._words.is_mine():  # it had not begun yet, and has got in as itself
            assert not locks[0]._words.inside.cell_contents
            assert locks[0].acquire(timeout=PATIENCE)
        assert locks[0].lease is not None
        locks[0].release()

    def in_parent() -> None:
        if is_inside:
            assert (began_of(locks[0]), locks[0]._words.inside.cell_contents) == (0.0, 0)
        else:
            assert locks[0].lease is not None
            locks[0].release()
        assert take_and_give_back(locks[0]) == (True, None)

    try:
        ForkEverywhere().run(prepare, operate, in_child, in_parent, 1)
    finally:
        locks.clear()
        server.kill()


def test_a_child_of_who_is_inside_has_nothing_and_leaves_its_parent_alone(lock: Any) -> None:
    def leave() -> tuple[bool, Any, bool]:
        lock.__exit__(None, None, None)
        with pytest.raises((ValueError, AssertionError)):
            lock.release()
        return lock.locked(), lock.lease, lock.acquire(False)

    with lock as lease:
        assert in_child(leave) == (True, None, False)
        assert began_of(lock) == lease.deadline - LONG
        assert lock.lease.token == lease.token
    assert not lock.locked()
    assert in_child(take_and_give_back, lock) == (True, None)


# -- death ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_revoked", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_the_heir_of_who_is_killed_at_a_step_is_told_if_it_was_inside(
    step: str, is_revoked: bool, domain: str, page: Page
) -> None:
    if (is_revoked and step in (E2, B1)) or (step == X1 and not is_revoked):
        return  # nobody revokes before it is in; and without that nothing is left to be done after X1
    server = start_server(domain)
    child, heir = start(domain, page, step, die), Child(inherit, domain, page, 2)
    page[HELD] = 1
    if step not in (E2, B1):
        eventually(lambda: page[IN] or not child.is_alive())
        if is_revoked:
            page[GO] = 1
            eventually(lambda: words_at(domain).waiters or not heir.is_alive())
        page[LEAVE] = 1
    assert child.wait() == -signal.SIGKILL
    page[GO] = 2
    is_told = step in (B1, B2) or is_revoked
    assert heir.result() == [(child.pid, "owner died") if is_told else None, None]
    assert page[VIOLATIONS] == 0
    assert len(events(domain, "abandoned")) <= is_told
    server.kill()


@pytest.mark.parametrize("label", ["C72 REVOKING", "C72 shut, or found INSIDE", "C73 an ordinary word"])
def test_the_heir_is_told_when_the_supervisor_is_killed_while_it_revokes_the_bias_of_a_dead_holder(
    label: str, domain: str, page: Page
) -> None:
    server = start_server(domain, label=label)
    child = start(domain, page, B1, die)
    page[HELD] = 1
    assert child.wait() == -signal.SIGKILL
    assert server.wait() == -signal.SIGKILL, "it never came to the label"
    heir = Child(inherit, domain, page, 1)
    page[GO] = 1
    assert heir.result() == [(child.pid, "owner died")]


# -- time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [B1, B2, B3])
def test_who_stops_while_it_has_the_lock_is_killed_when_its_lease_is_over(step: str, domain: str, page: Page) -> None:
    """At B3 it has it because the bias was revoked, and its word says so."""
    server = start_server(domain)
    for number in range(1, 6):
        page[GO] = 0
        child, heir = start(domain, page, step, stop, 10 * SHORT if step == B3 else SHORT), Child(inherit, domain, page, 1)
        before = time.monotonic()
        page[HELD] = 1
        if step == B3:
            eventually(lambda child=child: page[IN] or not child.is_alive())
            page[GO] = 1
            eventually(lambda heir=heir: words_at(domain).waiters or not heir.is_alive())
        page[LEAVE] = 1
        assert child.wait() == -signal.SIGKILL
        assert time.monotonic() - before >= SHORT
        page[GO] = 1
        assert heir.result() == [(child.pid, "lease overrun")]
        assert len(events(domain, "killed")) == number
    server.kill()


@pytest.mark.parametrize("step", [E2, B3])
def test_who_stops_at_the_door_and_is_not_inside_keeps_nobody_out_and_lives(step: str, domain: str, page: Page) -> None:
    server = start_server(domain)
    for _ in range(5):
        page[GO] = 0
        child, heir = start(domain, page, step, stop, SHORT), Child(inherit, domain, page, 1)
        page[HELD] = page[LEAVE] = 1
        eventually(lambda child=child: state_of(child.pid) in "TZ", "it stops")
        page[GO] = 1
        assert heir.result() == [None]
        over = time.monotonic() + 3 * SHORT
        eventually(lambda over=over: time.monotonic() >= over)
        child.go_on()
        child.result()
        assert page[DONE] == 1
    assert events(domain, "killed") == events(domain, "taken away") == []
    server.kill()


def test_who_was_stopped_before_it_got_in_by_the_door_has_a_whole_lease(domain: str, page: Page) -> None:
    """It wrote down a moment from before that.  Nobody else wanted the lock, so the door is still there."""
    lease = 0.5
    server = start_server(domain)
    child = start(domain, page, E2, stop, lease)
    page[HELD] = 1
    eventually(lambda: state_of(child.pid) in "TZ", "it stops")
    over = time.monotonic() + 2 * lease
    eventually(lambda: time.monotonic() >= over)
    child.go_on()
    eventually(lambda: page[IN] or not child.is_alive())
    over = time.monotonic() + 0.6 * lease  # longer than from the look before it went on to the next one, or not
    eventually(lambda: time.monotonic() >= over or not child.is_alive())
    page[LEAVE] = 1
    child.result()
    assert events(domain, "killed") == []
    child = start(domain, page, E2, stop, lease)
    page[HELD] = 1
    eventually(lambda: state_of(child.pid) in "TZ", "it stops")
    child.go_on()
    assert child.wait() == -signal.SIGKILL, "but not for ever"
    server.kill()


def test_who_stalls_after_x1_loses_the_lock_but_not_its_life(domain: str, page: Page) -> None:
    server = start_server(domain)
    for number in range(1, 4):
        page[GO] = 0
        child, heir = start(domain, page, X1, stop, 1.0), Child(inherit, domain, page, 1)
        page[HELD] = 1
        eventually(lambda child=child: page[IN] or not child.is_alive())
        page[GO] = 1
        eventually(lambda heir=heir: words_at(domain).waiters or not heir.is_alive())
        page[10] = 1  # STAY
        page[LEAVE] = 1
        eventually(lambda child=child: state_of(child.pid) in "TZ", "it stops")
        assert [entry["holds"] for entry in contracts(domain) if entry["pid"] == child.pid] == [False]
        eventually(lambda heir=heir: page[0] or not heir.is_alive(), "the heir is inside")
        child.go_on()
        child.result()  # while the heir is inside
        page[10] = 0
        assert heir.result() == [None]
        assert len(events(domain, "taken away")) == number
    assert events(domain, "killed") == []
    server.kill()


def test_no_other_thread_gets_in_by_the_door_of_a_lock_that_was_taken_away(domain: str, page: Page) -> None:
    """It is open after B3, until the thread that is stalled there comes to B5: the supervisor shuts it."""

    def stall() -> list[Any]:
        lock = bias(leased(domain, lease=1.0))
        stalled, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            stalled.set()
            assert go_on.wait(PATIENCE)

        def pass_through() -> None:
            with lock:
                page[IN] = 1
                eventually(lambda: page[LEAVE])
                At(lock, X1, wait)

        thread = InThread(pass_through)
        assert stalled.wait(PATIENCE)
        page[READY] = 1
        eventually(lambda: page[0], "the heir is inside")
        enter = lock._words.go_in.cell_contents
        found = [enter(False), lock.acquire(False)]
        page[10] = 0  # STAY
        go_on.set()
        thread.result()
        assert lock.acquire(timeout=PATIENCE)
        lock.release()
        return found

    server = start_server(domain)
    page[10] = 1
    child, heir = Child(stall), Child(inherit, domain, page, 1)
    eventually(lambda: page[IN] or not child.is_alive())
    page[GO] = 1
    eventually(lambda: words_at(domain).waiters or not heir.is_alive())
    page[LEAVE] = 1
    assert child.result() == [False, False]
    assert heir.result() == [None]
    assert len(events(domain, "taken away")) == 1
    server.kill()


def test_a_holder_by_the_door_is_asked_to_leave_in_time(domain: str, page: Page) -> None:
    def be_asked(on_terminate: str) -> tuple[bool, bool]:
        lock = bias(leased(domain, lease=0.1, grace=PATIENCE, on_terminate=on_terminate))
        try:
            with lock as lease:
                assert is_biased(lock)
                eventually(lambda: lease.terminate_requested and on_terminate == "flag")  # else it goes on until it is raised
                return lease.remaining() <= 0.0, False
        except LeaseExpired as error:
            return error.token > 0 and not lock.locked(), True

    server = start_server(domain)
    assert in_child(be_asked, "flag") == (True, False)
    assert in_child(be_asked, "raise") == (True, True)
    assert len(events(domain, "terminate")) == 2
    assert events(domain, "killed") == []
    server.kill()


def test_the_next_supervisor_kills_who_stays_inside_by_the_door(domain: str, page: Page) -> None:
    def stay() -> None:
        lock = bias(leased(domain, lease=0.3))
        with lock as hold:
            assert is_biased(lock)
            go_in(page, hold)
            page[IN] = 1
            spin()

    server = start_server(domain)
    holder = Child(stay)
    eventually(lambda: page[IN] or not holder.is_alive())
    server.kill()
    server = start_server(domain)
    assert holder.wait() == -signal.SIGKILL
    heir = Child(inherit, domain, page, 1)
    page[GO] = 1
    assert heir.result() == [(holder.pid, "lease overrun")]
    server.kill()


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_holder_by_the_door_is_preempted(is_deaf: bool, domain: str, page: Page) -> None:
    def hold() -> str:
        lock = bias(leased(domain, grace=0.01 if is_deaf else PATIENCE))
        with lock as lease:
            assert is_biased(lock)
            page[IN] = 1
            if is_deaf:
                spin()
            eventually(lambda: lease.terminate_requested)
            return "asked"

    def preempt() -> Any:
        lock = leased(domain, rank=5, operations=("acquire", "preempt"))
        assert lock.acquire(timeout=PATIENCE, preempt=True)
        abandoned = lock.abandoned
        lock.release()
        return abandoned and (abandoned.pid, abandoned.reason)

    server = start_server(domain)
    holder = Child(hold)
    eventually(lambda: page[IN] or not holder.is_alive())
    told = in_child(preempt)
    if is_deaf:
        assert holder.wait() == -signal.SIGKILL
        assert told == (holder.pid, "preempted")
    else:
        assert holder.result() == "asked"
        assert told is None
    server.kill()


def test_a_hold_by_the_door_is_seen_from_outside(domain: str, page: Page) -> None:
    def hold() -> int:
        lock = bias(leased(domain))
        page[READY] = 1
        eventually(lambda: page[GO])
        with lock as lease:
            assert is_biased(lock)
            page[IN] = lease.token
            eventually(lambda: page[LEAVE])
        page[DONE] = 1
        eventually(lambda: page[OVER])
        token: int = lease.token
        return token

    server = start_server(domain)
    child = Child(hold)
    eventually(lambda: page[READY] or not child.is_alive())
    assert (words_at(domain).state, words_at(domain).owner) == ("free", None)
    assert [entry["holds"] for entry in contracts(domain)] == [False]
    page[GO] = 1
    eventually(lambda: page[IN] or not child.is_alive())
    found = words_at(domain)
    assert (found.state, found.owner.pid, found.lease.token) == ("held", child.pid, page[IN])
    assert LONG - PATIENCE < found.lease.remaining <= LONG
    (entry,) = contracts(domain)
    assert (entry["holds"], entry["token"]) == (True, page[IN])
    page[LEAVE] = 1
    eventually(lambda: page[DONE])
    assert words_at(domain).owner is None
    page[OVER] = 1
    assert child.result() == page[IN]
    server.kill()


def test_a_contract_that_is_taken_back_while_its_holder_is_in_by_the_door_ends_with_the_hold(lock: Any) -> None:
    words = lock._words
    with lock:
        words.grant.close_seat()
        token = lock.lease.token
        assert is_biased(lock)
    assert not lock.locked()
    assert words.lease_seat.cell_contents == -1
    assert began_of(lock) == 0.0
    with lock as again:  # under a new one
        assert again.token == token + 1
        assert again._grant is words.grant
        assert began_of(lock) == again.deadline - LONG
    del again
    bias(lock)
    with lock as last:
        assert last._grant is words.grant


def watch_of(lock: Any) -> tuple[Watch, Supervised]:
    """What a supervisor knows of the contract of this process."""
    grant, block = lock._words.grant, lock._block
    client = Client(_process.current.word, -1, grant.ledger, os.geteuid())
    contract = Supervised(
        client, grant.number, block.arena, block.index, Terms(grant.terms.lease, 0),
        name=None, rank=0, raises=False, rule="", precedence=0, adopted_at=0,
    )  # fmt: skip
    contract.watched._unstamped = (0, contract.token)
    return Watch(lambda *what, **more: None, lambda *what: None, lambda arena: None), contract


def test_a_lock_is_not_taken_away_whose_door_a_thread_went_through_meanwhile(
    lock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was INSIDE when H was to be shut, and is out when BEGAN is looked at: the door is open, and another may go in."""
    finish, stalled, go_on = _leased_door.finish, [], threading.Event()
    others: list[InThread] = []
    inside, leave = threading.Event(), threading.Event()

    def stall(words: Any) -> None:
        stalled.append(words)
        assert go_on.wait(PATIENCE)
        finish(words)

    def pass_through(is_first: bool) -> None:
        with lock:
            if is_first:
                _bias.revoke(lock._words, word_of(lock))
            else:
                inside.set()
                assert leave.wait(PATIENCE)

    def note(label: str) -> None:
        if label == "S-T1 TAKEN":
            others.append(InThread(lambda: pass_through(False)))
            assert inside.wait(PATIENCE)

    def membarrier(system: Any) -> bool:
        leave.set()
        eventually(lambda: len(stalled) == 2)
        return True

    monkeypatch.setattr(_leased_door, "finish", stall)
    first = InThread(lambda: pass_through(True))
    eventually(lambda: stalled)
    watch, contract = watch_of(lock)
    with monkeypatch.context() as patched:
        patched.setattr(_sys.System, "membarrier", membarrier)
        _sys.crash_points[:] = [note]
        try:
            watch.take_away(contract)
        finally:
            _sys.crash_points.clear()
    assert (hold_of(lock), began_of(lock)) == (at.OUTSIDE, 0.0)
    assert word_of(lock) == _process.current.word | at.REVOKED
    go_on.set()
    first.result()
    others[0].result()
    assert take_and_give_back(lock) == (True, None)


def test_a_door_that_another_process_says_is_taken_keeps_nobody_out_for_longer_than_a_lease(lock: Any) -> None:
    lock._words.view[lock._words.first_hold] = at.INSIDE
    assert lock.locked()
    watch, contract = watch_of(lock)
    watch.take_away(contract)
    assert word_of(lock) == 0
    assert in_child(take_and_give_back, lock) == (True, None)
    assert take_and_give_back(lock) == (True, None)


def test_nobody_is_killed_who_was_out_when_its_word_was_looked_at_and_is_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """K2 while P stalls between B3 and X1, after its deadline: then P goes on, and in again, before W is read."""
    watch, killed = Watch(lambda *what, **more: None, lambda *what: None, lambda arena: None), []
    monkeypatch.setattr(Watch, "kill", lambda watch, contract, reason: killed.append(contract))

    class Hold:
        deadline = 1000
        watched = SimpleNamespace(deadline=1000)

        def __init__(self, comes_again: bool) -> None:
            self.comes_again = comes_again

        def owns(self) -> bool:
            if self.comes_again:
                self.deadline = 5000  # X1, E2, B1
            return True

    for comes_again in (True, False):
        watch._kill_if_still_due(Hold(comes_again), at.LEASE_OVERRUN)  # type: ignore[arg-type]
        assert bool(killed) is not comes_again


def test_a_hold_that_looks_older_than_the_look_before_has_a_whole_lease() -> None:
    """L4."""
    contract = Watched(Terms(1000, 0), 10)

    def look(now: int, deadline: int, before: int) -> Verdict:
        return contract.look(now, owns=True, deadline=deadline, token=1, before=before)[0]

    assert look(50_000, 40_000, 49_500) is Verdict.NOTHING
    assert look(50_999, 40_000, 50_000) is Verdict.NOTHING
    assert look(51_000, 40_000, 50_999) is Verdict.KILL
    assert look(60_000, 60_000, 59_000) is Verdict.KILL, "it may be as old as the look before"
    assert look(70_000, 70_000, 0) is Verdict.KILL, "there was none"


def test_a_crowd_with_leases_and_biases_lets_in_one_at_a_time(domain: str, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bias, "_chosen", "always")

    def work(number: int) -> int:
        lock, own = leased(domain), 0

        def one() -> None:
            nonlocal own
            for turn in range(150):
                with lock as lease:
                    own += lock._words.inside.cell_contents
                    go_in(page, lease)
                    if turn % 10 == number:
                        time.sleep(0)
                    go_out(page)

        threads = [InThread(one) for _ in range(2)]
        for thread in threads:
            thread.result()
        return own

    server = start_server(domain)
    children = [Child(work, number) for number in range(3)]
    assert sum(child.result() for child in children) > 0, "nobody went in by a door"
    assert page[TOKEN] >= 900
    server.kill()


def test_a_storm_of_deaths_tells_every_heir_and_never_lets_two_in(
    domain: str, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bias, "_chosen", "always")

    def work() -> None:
        lock = leased(domain)
        while not page[OVER]:
            for _ in range(20):
                with lock as lease:
                    go_in(page, lease)
                    go_out(page)
            page[DONE] += 1

    server = start_server(domain)
    children = [Child(work) for _ in range(3)]
    for _ in range(30):
        seen = page[DONE]
        eventually(lambda seen=seen: page[DONE] > seen)
        children.pop(0).kill()
        children.append(Child(work))
    page[OVER] = 1
    for child in children:
        child.result()
    server.kill()


def test_a_ledger_says_that_it_is_inside_as_long_as_its_door_is_taken(lock: Any) -> None:
    """D1, at each of the steps."""
    seen = []

    def note() -> None:
        seen.append((hold_of(lock) == at.INSIDE, began_of(lock) > 0.0))

    for step in STEPS:
        At(lock, step, note)
        if step == X1:
            _bias.revoke(lock._words, word_of(lock))
        with lock:
            if step == X1:
                bound = lock._words
        bias(lock)
    del bound
    assert _ledger.LEFT < 0
    assert seen[:4] == [(False, True), (True, True), (True, True), (False, True)]
