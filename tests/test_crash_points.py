"""A real process is killed at every step of every operation; everybody else goes on, and every invariant holds.

A *scenario* brings processes into position: a victim that is about to do one operation, and others that wait.  The victim
gets a way to die: at the k-th reaching of a crash point, or before or after its n-th operation on shared memory.  What was
true at that instant (who was inside, what was counted) the victim writes into a shared page as its last act; what the others
must see follows from that.

``LABELS`` says at which crash points each scenario must be able to die.  A crash point of the source that stands nowhere
in it fails a test, and so does one at which nobody dies.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_enforcement
from support import (
    PATIENCE,
    Child,
    DieAtLabel,
    DieAtOperation,
    Page,
    Step,
    clean,
    end_children,
    eventually,
    no_steps,
    watch_steps,
)

import shlock
from shlock import _anonymous, _arena, _counting, _names, _process, _sys
from shlock import _layout as at
from shlock._atomic import Operand

# Words of the page.
READY, GO, AWAKE, VIOLATIONS, DEAD, CREATING = range(6)
INSIDE, OTHER_OWNER, HELD, NOTIFIED, RAISED, KNOWN, OVER, DIED = range(8, 16)  # what was true when the victim died
GUARDED_A, GUARDED_B = 20, 21
SLOTS = 32  # one for each process: whether it is inside

OTHERS = (0, 1, 3)
MOST_OPERATIONS = 400


class Stage:
    """The processes of one run of a scenario."""

    def __init__(self, others: int, step: Step, domain: str | None = None) -> None:
        self.others = others
        self.step = step
        self.domain = domain
        self.page = Page()
        self.victim: Child | None = None
        self.seats = itertools.count()
        self.finals: list[Callable[[], None]] = []

    # The victim.

    def start_victim(
        self,
        operation: Callable[[], Any],
        *primitives: Any,
        prepare: Callable[[], Any] = lambda: None,
        note: Callable[[], None] = lambda: None,
    ) -> Child:
        """A process that prepares, waits for ``let_victim_go``, and does its operation, dying on the way."""
        page, step = self.page, self.step

        def before_death() -> None:
            with no_steps():
                note()
            page[DEAD] = os.getpid()

        class Progress(type(step)):  # type: ignore[misc]
            def label(self, label: str) -> None:
                if label == "A6 awake":
                    page[AWAKE] += 1
                if label.startswith("N1"):
                    page[CREATING] = 1
                super().label(label)

        def body() -> tuple[list[str], Any]:
            prepare()
            page[READY] = 1
            eventually(lambda: page[GO])
            step.__class__ = Progress
            step.before_death = before_death
            watch_steps(step, *primitives)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", shlock.AbandonedWarning)
                return step.passed, operation()

        self.victim = Child(body)
        eventually(lambda: page[READY] or not self.victim_lives())
        return self.victim

    def let_victim_go(self) -> None:
        self.page[GO] = 1

    def victim_lives(self) -> bool:
        assert self.victim is not None
        return self.victim.is_alive()

    def until_victim_is_over_or_sleeps(self) -> None:
        """Until it has ended, or has slept and woken up twice."""
        eventually(lambda: not self.victim_lives() or self.page[AWAKE] >= 2)

    def end_of_victim(self) -> bool:
        """Wait for it; whether it was killed.  Anything else but a normal end is an error."""
        assert self.victim is not None
        self.killed = self.victim.wait() == -signal.SIGKILL
        self.passed, self.answer = ([], None) if self.killed else self.victim.result()
        return self.killed

    # All.

    def fork(self, function: Callable[..., Any], *arguments: Any) -> Child:
        return Child(function, *arguments)

    def guard(self, seat: int | None = None) -> None:
        """A critical section for one: two words that nobody else may touch meanwhile."""
        page, me = self.page, os.getpid()
        for word in (GUARDED_A, GUARDED_B):
            if page[word] not in (0, page[DEAD]):
                page[VIOLATIONS] += 1
        for word in (GUARDED_A, GUARDED_B):
            page[word] = me
        for _ in range(20):
            if not page[GUARDED_A] == page[GUARDED_B] == me:
                page[VIOLATIONS] += 1
        for word in (GUARDED_B, GUARDED_A):
            page[word] = 0

    def seat(self) -> int:
        return SLOTS + next(self.seats)

    def guard_many(self, seat: int, most: int) -> None:
        """A critical section for several: at most so many living processes are inside."""
        page = self.page
        page[seat] = os.getpid()
        for _ in range(20):
            if sum(1 for slot in range(SLOTS, len(page)) if page[slot] not in (0, page[DEAD])) > most:
                page[VIOLATIONS] += 1
        page[seat] = 0


Scenario = Callable[[Stage], None]


# -- locks ----------------------------------------------------------------------------------------------------------------


def told(primitive: Any) -> int:
    """Acquire; the pid of who died inside, as an heir is told, else 0."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert primitive.acquire(timeout=PATIENCE), f"nobody holds {primitive!r}, and it cannot be had"
    was_warned = any(issubclass(warning.category, shlock.AbandonedWarning) for warning in caught)
    abandoned = primitive.abandoned
    assert was_warned == (abandoned is not None)
    return abandoned.pid if abandoned is not None else 0


def word_of(lock: Any) -> int:
    return lock._words.word_at(lock._block.word)


def note_lock(stage: Stage, lock: Any) -> Callable[[], None]:
    def note() -> None:
        owner = word_of(lock) & at.OWNER
        stage.page[INSIDE] = owner == _process.current.word
        stage.page[DIED] = bool(word_of(lock) & at.DIED)
        stage.page[OTHER_OWNER] = 0 if stage.page[INSIDE] else _process.pid_of(owner)

    return note


def lock_user(stage: Stage, lock: Any, rounds: int = 3) -> Callable[[], Counter[int]]:
    """Takes the lock some times, twice at once if it is recursive; of whose death it was told."""
    depth = 2 if isinstance(lock, shlock.RLock) else 1

    def use() -> Counter[int]:
        tally: Counter[int] = Counter()
        for _ in range(rounds):
            pid = told(lock)
            if pid:
                tally[pid] += 1
            for _ in range(depth - 1):
                lock.acquire()
            stage.guard()
            for _ in range(depth):
                lock.release()
        return tally

    return use


def start_waiters(stage: Stage, lock: Any, body: Callable[[], Any]) -> list[Child]:
    """The others: they are parked when this returns."""
    children = [stage.fork(body) for _ in range(stage.others)]
    until_waiting(lock, children)
    return children


def until_waiting(primitive: Any, children: list[Child]) -> None:
    """Until all of them are parked.  None of them may end before."""
    pids = {child.pid for child in children}

    def all_wait() -> bool:
        for child in children:
            assert child.is_alive(), f"instead of waiting, process {child.pid} ended with {child.result()}"
        return pids <= {waiter.pid for waiter in primitive.waiters}

    eventually(all_wait, f"{len(pids)} wait for {primitive}")


def check_lock(stage: Stage, lock: Any, children: list[Child], expected: Counter[int] | None = None) -> None:
    """The end of every lock scenario: all others come through, and exactly the right ones were told."""
    killed = stage.end_of_victim()
    tally: Counter[int] = Counter()
    for child in children:
        tally += child.result()
    if pid := told(lock):
        tally[pid] += 1
    stage.guard()
    lock.release()
    if expected is None:
        expected = Counter({stage.victim.pid: 1}) if killed and stage.page[INSIDE] else Counter()
    assert tally == expected
    assert stage.page[VIOLATIONS] == 0
    assert word_of(lock) in (0, at.PARKED)
    assert lock.owner is None
    assert lock.abandoned is None


def acquire_contended(stage: Stage, make: Callable[[], Any] = shlock.Lock) -> None:
    lock = make()
    lock.acquire()
    children = start_waiters(stage, lock, lock_user(stage, lock))
    stage.start_victim(lock_user(stage, lock, 1), lock, note=note_lock(stage, lock))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    lock.release()
    check_lock(stage, lock, children)


def acquire_contended_recursively(stage: Stage) -> None:
    acquire_contended(stage, shlock.RLock)


def acquire_uncontended(stage: Stage, make: Callable[[], Any] = shlock.Lock) -> None:
    """The others come while the victim is at it, or when it is dead."""
    lock = make()

    def operation() -> None:
        for _ in range(2):
            with lock:
                stage.guard()
        lock.acquire()
        stage.guard()
        lock.release()

    stage.start_victim(operation, lock, note=note_lock(stage, lock))
    children = [stage.fork(lock_user(stage, lock)) for _ in range(stage.others)]
    stage.let_victim_go()
    check_lock(stage, lock, children)


def acquire_uncontended_recursively(stage: Stage) -> None:
    acquire_uncontended(stage, shlock.RLock)


def acquire_with_a_timeout_that_passes(stage: Stage) -> None:
    lock = shlock.Lock()
    lock.acquire()
    children = start_waiters(stage, lock, lock_user(stage, lock))
    stage.start_victim(lambda: lock.acquire(timeout=0.03), lock, note=note_lock(stage, lock))
    stage.let_victim_go()
    stage.end_of_victim()
    assert stage.answer in (None, False)
    lock.release()
    check_lock(stage, lock, children)


def release_with_waiters(stage: Stage, make: Callable[[], Any] = shlock.Lock) -> None:
    lock = make()
    stage.start_victim(lambda: lock.release(), lock, prepare=lock.acquire, note=note_lock(stage, lock))
    children = start_waiters(stage, lock, lock_user(stage, lock))
    assert lock.acquire(timeout=0.01) is False  # leaves PARKED, also where nobody waits
    stage.let_victim_go()
    check_lock(stage, lock, children)


def release_recursive_lock_with_waiters(stage: Stage) -> None:
    release_with_waiters(stage, shlock.RLock)


class Holder(Child):
    """A process that holds something until it is killed."""

    def __init__(self, acquire: Callable[[], object]) -> None:
        page = Page(1)

        def hold() -> None:
            acquire()
            page[0] = 1
            signal.pause()

        super().__init__(hold)
        eventually(lambda: page[0] or not self.is_alive())


def inherit(stage: Stage) -> None:
    """A second death: the victim takes the lock over from an owner that was killed."""
    lock = shlock.Lock()
    first = Holder(lock.acquire)
    children = start_waiters(stage, lock, lock_user(stage, lock))
    for child in children:
        child.stop()
    stage.start_victim(lock_user(stage, lock, 1), lock, note=note_lock(stage, lock))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    first.kill()
    stage.end_of_victim()
    for child in children:
        child.go_on()
    check_lock(stage, lock, children, heirs_of(stage, first))


def heirs_of(stage: Stage, first: Child) -> Counter[int]:
    """Who has to be told of whom, where the victim may have died as the heir of another."""
    if not stage.killed:
        assert stage.answer in (Counter({first.pid: 1}), True), "the victim was not told"
        return Counter()
    if stage.page[INSIDE]:
        return Counter({stage.victim.pid: 1})
    return Counter({first.pid: 1}) if stage.page[OTHER_OWNER] == first.pid else Counter()


def try_to_acquire_from_a_dead_owner(stage: Stage) -> None:
    """Who only ever tries finds a dead owner, too."""
    lock = shlock.Lock()
    first = Holder(lock.acquire)
    children = start_waiters(stage, lock, lock_user(stage, lock))
    for child in children:
        child.stop()

    def operation() -> bool:
        got = lock.acquire(block=False)
        assert got
        stage.guard()
        lock.release()
        return got

    stage.start_victim(operation, lock, note=note_lock(stage, lock))
    first.kill()
    stage.let_victim_go()
    stage.end_of_victim()
    for child in children:
        child.go_on()
    check_lock(stage, lock, children, heirs_of(stage, first))


def poison(stage: Stage) -> None:
    """The victim finds the dead owner of a lock that is poisoned then; the parent repairs it."""
    lock = shlock.Lock(on_abandoned="poison")
    first = Holder(lock.acquire)

    def blocked() -> int:
        try:
            lock.acquire()
        except shlock.AbandonedError as error:
            return error.abandoned.pid
        raise AssertionError("a poisoned lock was given away")

    children = start_waiters(stage, lock, blocked)
    for child in children:
        child.stop()
    stage.start_victim(blocked, lock, note=note_lock(stage, lock))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    first.kill()
    assert stage.end_of_victim() or stage.answer == first.pid
    for child in children:
        child.go_on()
    assert {child.result() for child in children} <= {first.pid}
    with lock.repair() as abandoned:
        assert abandoned is not None
        assert abandoned.pid == first.pid
    assert told(lock) == 0
    lock.release()
    assert word_of(lock) in (0, at.PARKED)


def repair(stage: Stage) -> None:
    """The victim dies while it repairs: the lock stays poisoned, for whoever comes, until somebody has repaired it."""
    lock = shlock.Lock(on_abandoned="poison")
    first = Holder(lock.acquire)
    first.kill()
    with pytest.raises(shlock.AbandonedError):
        lock.acquire(timeout=PATIENCE)

    def operation() -> bool:
        with lock.repair() as abandoned:
            assert abandoned is not None
            stage.guard()
        return True

    def blocked() -> str:
        try:
            lock.acquire()
        except shlock.AbandonedError:
            return "poisoned"
        stage.guard()
        lock.release()
        return "in"

    stage.start_victim(operation, lock, note=note_lock(stage, lock))
    stage.let_victim_go()
    children = [stage.fork(blocked) for _ in range(stage.others)]
    killed = stage.end_of_victim()
    is_poisoned = killed and bool(stage.page[DIED])
    answers = {child.result() for child in children}
    if is_poisoned:
        assert answers <= {"poisoned"}
        with pytest.raises(shlock.AbandonedError):
            lock.acquire(timeout=PATIENCE)
        with lock.repair() as abandoned:
            assert abandoned is not None
            assert abandoned.pid in (first.pid, stage.victim.pid)
    assert told(lock) == 0
    lock.release()
    assert stage.page[VIOLATIONS] == 0


def reap_a_chosen_one(stage: Stage) -> None:
    """Three deaths: a waiter is chosen and dies, and the victim that would pass its wake-up on dies, too."""
    lock = shlock.Lock()
    lock.acquire()
    chosen = stage.fork(lock.acquire)
    until_waiting(lock, [chosen])
    chosen.stop()
    lock._words.turn = time.monotonic_ns() + 3600 * 10**9  # in its turn: it chooses, and does not hand over
    lock.release()
    chosen.kill()
    assert lock.acquire(timeout=PATIENCE)
    body = lock_user(stage, lock)
    children = start_waiters(stage, lock, stopped_when_parked(body))  # before they poll: they would reap that one, too
    for child in children:
        eventually(lambda child=child: test_enforcement.state_of(child.pid) == "T")
    stage.start_victim(lock_user(stage, lock, 1), lock, note=note_lock(stage, lock))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    for child in children:
        child.go_on()
    lock.release()
    check_lock(stage, lock, children)


def stopped_when_parked(body: Callable[[], Any]) -> Callable[[], Any]:
    """Stops its process when that is parked for the first time."""

    def stop(label: str) -> None:
        if label == "A5 S published":
            _sys.crash_points.clear()
            os.kill(os.getpid(), signal.SIGSTOP)

    def run() -> Any:
        _sys.crash_points[:] = [stop]
        return body()

    return run


def waiting_of(primitive: Any, pids: set[int]) -> int:
    return sum(1 for waiter in primitive.waiters if waiter.pid in pids)


def wait_where_all_spots_are_taken_by_the_dead(stage: Stage) -> None:
    """The victim takes a dead thread's spot over."""
    spots, _arena.SPOTS = _arena.SPOTS, stage.others + 3  # some are spare: two that claim get in each other's way
    own, _anonymous._own = _anonymous._own, None
    try:
        lock = shlock.Lock()
    finally:
        _arena.SPOTS, _anonymous._own = spots, own
    lock.acquire()
    dead = [stage.fork(lock.acquire) for _ in range(stage.others + 3)]
    until_waiting(lock, dead)
    for child in dead:
        child.stop()
    lock._words.turn = time.monotonic_ns() + 10**12  # nothing is handed over to one that is stopped
    lock.release()  # one of them is chosen
    assert lock.acquire(timeout=PATIENCE)
    for child in dead:
        child.kill()
    stage.start_victim(lock_user(stage, lock, 1), lock, note=note_lock(stage, lock))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    children = start_waiters(stage, lock, lock_user(stage, lock))
    lock.release()
    check_lock(stage, lock, children)


# -- semaphores -----------------------------------------------------------------------------------------------------------


def count_permits(stage: Stage, semaphore: Any) -> None:
    """In the victim: count in HELD how many permits of a plain semaphore it holds."""
    page, change = stage.page, Operand.compare_exchange

    def counted(self: Operand, word: Any, expected: int, desired: int) -> bool:
        done = change(self, word, expected, desired)
        if done and word is semaphore._count.pointer:
            page[HELD] += (expected >> at.COUNT_SHIFT) - (desired >> at.COUNT_SHIFT)
        return done

    Operand.compare_exchange = counted  # type: ignore[method-assign]


PERMITS = 2


def semaphore_user(stage: Stage, semaphore: Any, rounds: int = 3) -> Callable[[], int]:
    seat = stage.seat()

    def use() -> int:
        warned = 0
        for _ in range(rounds):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert semaphore.acquire(timeout=PATIENCE), "no permit comes back"
            warned += len(caught)
            stage.guard_many(seat, PERMITS)
            semaphore.release()
        return warned

    return use


def note_permits(stage: Stage, semaphore: Any) -> Callable[[], None]:
    def note() -> None:
        if semaphore._count is None:
            stage.page[HELD] = semaphore._words.owners().count(_process.current.word)

    return note


def start_victim_of_semaphore(stage: Stage, semaphore: Any, operation: Callable[[], Any], taken: int = 0) -> None:
    def prepare() -> None:
        if semaphore._count is not None:
            # Rebinding keeps what is counted here: the Operand of the steps calls this one.
            count_permits(stage, semaphore)
        for _ in range(taken):
            semaphore.acquire()

    stage.start_victim(operation, semaphore, prepare=prepare, note=note_permits(stage, semaphore))


def check_semaphore(stage: Stage, semaphore: Any, children: list[Child]) -> None:
    killed = stage.end_of_victim()
    warned = sum(child.result() for child in children)
    lost = stage.page[HELD] if killed else 0
    if semaphore._count is not None:
        assert semaphore.get_value() == PERMITS - lost
        assert warned == 0
    else:
        # Whoever waits finds what is missing.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(PERMITS):
                assert semaphore.acquire(timeout=PATIENCE)
        warned += len(caught)
        for _ in range(PERMITS):
            semaphore.release()
        assert semaphore.get_value() == PERMITS
        assert warned == lost, "each lost permit has one heir, who is told"
        assert semaphore.owners == ()
        assert semaphore.abandoned is None
    assert stage.page[VIOLATIONS] == 0


def acquire_permit(stage: Stage, *, owned: bool = False) -> None:
    semaphore = shlock.Semaphore(PERMITS, owned=owned)
    for _ in range(PERMITS):
        semaphore.acquire()
    children = start_waiters(stage, semaphore, semaphore_user(stage, semaphore))
    start_victim_of_semaphore(stage, semaphore, semaphore_user(stage, semaphore, 1))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    for _ in range(PERMITS):
        semaphore.release()
    check_semaphore(stage, semaphore, children)


def acquire_owned_permit(stage: Stage) -> None:
    acquire_permit(stage, owned=True)


def acquire_permit_with_a_timeout_that_passes(stage: Stage, *, owned: bool = False) -> None:
    semaphore = shlock.Semaphore(PERMITS, owned=owned)
    for _ in range(PERMITS):
        semaphore.acquire()
    children = start_waiters(stage, semaphore, semaphore_user(stage, semaphore))
    start_victim_of_semaphore(stage, semaphore, lambda: semaphore.acquire(timeout=0.03))
    stage.let_victim_go()
    stage.end_of_victim()
    for _ in range(PERMITS):
        semaphore.release()
    check_semaphore(stage, semaphore, children)


def acquire_owned_permit_with_a_timeout_that_passes(stage: Stage) -> None:
    acquire_permit_with_a_timeout_that_passes(stage, owned=True)


def use_free_permit(stage: Stage, *, owned: bool = False) -> None:
    semaphore = shlock.Semaphore(PERMITS, owned=owned)
    start_victim_of_semaphore(stage, semaphore, semaphore_user(stage, semaphore, 2))
    children = [stage.fork(semaphore_user(stage, semaphore)) for _ in range(stage.others)]
    stage.let_victim_go()
    check_semaphore(stage, semaphore, children)


def use_free_owned_permit(stage: Stage) -> None:
    use_free_permit(stage, owned=True)


def release_permit(stage: Stage, *, owned: bool = False) -> None:
    semaphore = shlock.Semaphore(PERMITS, owned=owned)
    start_victim_of_semaphore(stage, semaphore, lambda: semaphore.release(), taken=1)
    for _ in range(PERMITS - 1):
        semaphore.acquire()
    children = start_waiters(stage, semaphore, semaphore_user(stage, semaphore))
    assert semaphore.acquire(timeout=0.01) is False  # leaves PARKED
    stage.let_victim_go()
    stage.end_of_victim()
    for _ in range(PERMITS - 1):
        semaphore.release()
    check_semaphore(stage, semaphore, children)


def release_owned_permit(stage: Stage) -> None:
    release_permit(stage, owned=True)


def inherit_permit(stage: Stage) -> None:
    """The victim takes over the permit of an owner that was killed."""
    semaphore = shlock.Semaphore(PERMITS, owned=True)
    first = Holder(semaphore.acquire)
    for _ in range(PERMITS - 1):
        semaphore.acquire()
    children = start_waiters(stage, semaphore, semaphore_user(stage, semaphore))
    for child in children:
        child.stop()

    def note() -> None:
        owners = semaphore._words.owners()
        dead = {_process.current.word} | {word for word in owners if _process.pid_of(word) == first.pid}
        stage.page[HELD] = sum(1 for owner in owners if owner in dead)

    stage.start_victim(semaphore_user(stage, semaphore, 1), semaphore, note=note)
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    first.kill()
    stage.end_of_victim()
    for child in children:
        child.go_on()
    for _ in range(PERMITS - 1):
        semaphore.release()
    check_semaphore(stage, semaphore, children)


# -- conditions -----------------------------------------------------------------------------------------------------------


def condition_waiter(condition: Any) -> Callable[[], tuple[bool, int]]:
    """Waits once; whether it was notified, and how often it was told of a death on the way."""

    def wait() -> tuple[bool, int]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with condition:
                notified = condition.wait(PATIENCE)
        return notified, len(caught)

    return wait


def note_condition(stage: Stage, condition: Any) -> Callable[[], None]:
    noted = note_lock(stage, condition._lock)

    def note() -> None:
        noted()
        arena = condition._block.arena
        for index in range(arena.layout.spots):
            state = arena.words.load(arena.layout.spot(at.SPOT_STATE, index))
            claim = arena.words.load(arena.layout.spot(at.SPOT_CLAIM, index))
            is_here = (state & at.KEY) >> at.KEY_SHIFT == condition._block.index
            if claim == _process.current.word and state & at.STATE == at.NOTIFIED and is_here:
                stage.page[NOTIFIED] = 1

    return note


def check_condition(stage: Stage, condition: Any, children: list[Child]) -> None:
    """Notify all who still wait, until all have come through."""
    warned = 0

    def notify() -> bool:
        nonlocal warned
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with condition:
                condition.notify_all()
        warned += len(caught)
        return not any(child.is_alive() for child in children)

    eventually(notify, "all waiters come through", PATIENCE / 2)
    for child in children:
        notified, times = child.result()
        assert notified
        warned += times
    assert warned == (1 if stage.killed and stage.page[INSIDE] else 0)
    lock = condition._lock
    assert word_of(lock) in (0, at.PARKED)
    # And it works.
    child = stage.fork(condition_waiter(condition))
    until_waiting(condition, [child])
    with condition:
        condition.notify(1)
    assert child.result() == (True, 0)


def wait_for_notification(stage: Stage, make_lock: Callable[[], Any] | None = None) -> None:
    condition = shlock.Condition(make_lock() if make_lock else None)
    children = start_waiters(stage, condition, condition_waiter(condition))
    stage.start_victim(condition_waiter(condition), condition._lock, condition, note=note_condition(stage, condition))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    if not stage.victim_lives():
        stage.end_of_victim()
        check_condition(stage, condition, children)
        return
    with condition:
        condition.notify_all()
    stage.end_of_victim()
    check_condition(stage, condition, children)


def wait_for_notification_with_a_plain_lock(stage: Stage) -> None:
    wait_for_notification(stage, shlock.Lock)


def wait_for_notification_in_vain(stage: Stage) -> None:
    """The victim's timeout passes, or would."""
    condition = shlock.Condition()
    children = start_waiters(stage, condition, condition_waiter(condition))

    def operation() -> bool:
        with condition:
            return bool(condition.wait(0.03))

    stage.start_victim(operation, condition._lock, condition, note=note_condition(stage, condition))
    stage.let_victim_go()
    stage.end_of_victim()
    assert stage.answer in (None, False)
    check_condition(stage, condition, children)


def notify(stage: Stage, n: int | None = 1) -> None:
    condition = shlock.Condition()
    children = start_waiters(stage, condition, condition_waiter(condition))

    def operation() -> None:
        with condition:
            condition.notify(n) if n else condition.notify_all()

    # PARKED is set also where nobody waits.
    with condition:
        assert condition.wait(0.01) is False
    stage.start_victim(operation, condition._lock, condition, note=note_condition(stage, condition))
    stage.let_victim_go()
    stage.end_of_victim()
    if not stage.killed:
        eventually(lambda: sum(1 for child in children if not child.is_alive()) >= min(n or 99, stage.others))
    check_condition(stage, condition, children)


def notify_all(stage: Stage) -> None:
    notify(stage, None)


def be_notified(stage: Stage) -> None:
    """The victim is chosen, and dies: its notification goes to one of the others, without anybody's help."""
    condition = shlock.Condition()

    def operation() -> tuple[bool, int]:
        return condition_waiter(condition)()

    stage.start_victim(operation, condition._lock, condition, note=note_condition(stage, condition))
    stage.let_victim_go()
    eventually(lambda: not stage.victim_lives() or waiting_of(condition, {stage.victim.pid}))
    children = start_waiters(stage, condition, condition_waiter(condition))
    was_there = stage.victim_lives()
    if was_there:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", shlock.AbandonedWarning)
            with condition:
                was_there = stage.victim_lives()
                condition.notify(1)
    stage.end_of_victim()
    if was_there and stage.killed and stage.page[NOTIFIED] and children:
        eventually(lambda: any(not child.is_alive() for child in children), "the notification goes on to the next")
    if was_there and (not stage.killed or stage.page[NOTIFIED]):
        assert sum(1 for child in children if not child.is_alive()) <= 1
    end_condition(condition, children)


def end_condition(condition: Any, children: list[Child]) -> None:
    def notify() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", shlock.AbandonedWarning)
            with condition:
                condition.notify_all()
        return not any(child.is_alive() for child in children)

    eventually(notify, "all waiters come through", PATIENCE / 2)
    assert all(child.result()[0] for child in children)
    assert word_of(condition._lock) in (0, at.PARKED)


# -- events ---------------------------------------------------------------------------------------------------------------


def note_event(stage: Stage, event: Any) -> Callable[[], None]:
    def note() -> None:
        stage.page[RAISED] = event.is_set()

    return note


def wait_for_event(stage: Stage) -> None:
    event = shlock.Event()
    children = start_waiters(stage, event, lambda: event.wait())
    stage.start_victim(lambda: event.wait(), event, note=note_event(stage, event))
    stage.let_victim_go()
    stage.until_victim_is_over_or_sleeps()
    event.set()
    stage.end_of_victim()
    check_event(stage, event, children)


def wait_for_event_in_vain(stage: Stage) -> None:
    event = shlock.Event()
    children = start_waiters(stage, event, lambda: event.wait())
    stage.start_victim(lambda: event.wait(0.03), event, note=note_event(stage, event))
    stage.let_victim_go()
    stage.end_of_victim()
    assert stage.answer in (None, False)
    event.set()
    check_event(stage, event, children)


def set_event(stage: Stage) -> None:
    event = shlock.Event()
    children = start_waiters(stage, event, lambda: event.wait())
    stage.start_victim(event.set, event, note=note_event(stage, event))
    stage.let_victim_go()
    if stage.end_of_victim() and not stage.page[RAISED]:
        assert not event.is_set()
        event.set()
    check_event(stage, event, children)


def set_and_clear_event(stage: Stage) -> None:
    """Who waits goes on although the flag is down again, unless the victim died before it was up."""
    event = shlock.Event()
    children = start_waiters(stage, event, lambda: event.wait())

    def operation() -> None:
        event.set()
        stage.page[OVER] = 1
        event.clear()

    def note() -> None:
        stage.page[RAISED] = event.is_set() or stage.page[OVER]

    stage.start_victim(operation, event, note=note)
    stage.let_victim_go()
    if stage.end_of_victim() and not stage.page[RAISED]:
        event.set()
    check_event(stage, event, children)


def check_event(stage: Stage, event: Any, children: list[Child]) -> None:
    assert all(child.result() for child in children)
    # And it works.
    event.clear()
    child = stage.fork(lambda: event.wait())
    until_waiting(event, [child])
    event.set()
    assert child.result() is True


# -- barriers -------------------------------------------------------------------------------------------------------------


def barrier_party(barrier: Any) -> Callable[[], int | str]:
    def party() -> int | str:
        try:
            return int(barrier.wait(PATIENCE))
        except threading.BrokenBarrierError:
            return "broken"

    return party


def note_barrier(stage: Stage, barrier: Any) -> Callable[[], None]:
    def note() -> None:
        word = barrier._word
        stage.page[KNOWN] = any(word.view[place] & at.OWNER == _process.current.word for place in barrier._block.cells)
        stage.page[OVER] = word._round(word.view[word.place]) != 0

    return note


def check_barrier(stage: Stage, barrier: Any, children: list[Child], *, was_last: bool = False) -> None:
    killed = stage.end_of_victim()
    if killed and not stage.page[KNOWN]:
        # It died before anybody knew it: the parent stands in.
        answer = barrier_party(barrier)()
        answers = [answer, *(child.result() for child in children)]
        assert sorted(answers) == list(range(barrier.parties))
    else:
        answers = [child.result() for child in children]
        if killed:
            assert len({answer == "broken" for answer in answers}) <= 1, "either all come through or none"
            if stage.page[OVER]:
                assert "broken" not in answers, "the round was over"
            elif was_last:
                assert set(answers) <= {"broken"}
        else:
            assert sorted([stage.answer, *answers]) == list(range(barrier.parties))
    for _ in range(2):  # and it works, as long as nobody who was there before is missing
        barrier.reset()
        parties = [stage.fork(barrier_party(barrier)) for _ in range(barrier.parties)]
        assert sorted(party.result() for party in parties) == list(range(barrier.parties))


def arrive_first(stage: Stage) -> None:
    barrier = shlock.Barrier(stage.others + 1)
    stage.start_victim(barrier_party(barrier), barrier, note=note_barrier(stage, barrier))
    stage.let_victim_go()
    eventually(lambda: not stage.victim_lives() or stage.page[AWAKE] >= 1)
    children = [stage.fork(leaving(barrier)) for _ in range(stage.others)]
    check_barrier(stage, barrier, children)


def arrive_last(stage: Stage) -> None:
    calls = stage.page
    barrier = shlock.Barrier(stage.others + 1, action=lambda: calls.__setitem__(DIED, 1))
    children = start_waiters(stage, barrier, leaving(barrier))
    stage.start_victim(barrier_party(barrier), barrier, note=note_barrier(stage, barrier))
    stage.let_victim_go()
    check_barrier(stage, barrier, children, was_last=True)


def leaving(barrier: Any) -> Callable[[], int | str]:
    """A party that ends normally: it is not expected any more."""
    party = barrier_party(barrier)

    def wait() -> int | str:
        answer = party()
        word = barrier._word
        _counting._leave_party(word.view, word.cells, _process.current)
        return answer

    return wait


def arrive_in_vain(stage: Stage) -> None:
    """The victim's timeout passes and breaks the barrier, for all who wait and all who come."""
    barrier = shlock.Barrier(stage.others + 2)
    children = start_waiters(stage, barrier, leaving(barrier))

    def operation() -> str:
        try:
            barrier.wait(0.03)
        except threading.BrokenBarrierError:
            return "broken"
        raise AssertionError("came through without all")

    stage.start_victim(operation, barrier, note=note_barrier(stage, barrier))
    stage.let_victim_go()
    if stage.end_of_victim() and not stage.page[KNOWN]:
        barrier.abort()
    assert {child.result() for child in children} <= {"broken"}
    assert stage.answer in (None, "broken")
    barrier.reset()
    parties = [stage.fork(leaving(barrier)) for _ in range(barrier.parties)]
    assert sorted(party.result() for party in parties) == list(range(barrier.parties))


# -- names ----------------------------------------------------------------------------------------------------------------

NAME = "the name"


def create_name(stage: Stage, make: Callable[[str], Any], *, others_first: int = 0) -> None:
    """The victim creates a name and others the same one while it is at it: afterwards all have the same primitive."""
    assert stage.domain is not None

    def create() -> tuple[int, int]:
        primitive = make(NAME)
        return primitive._block.arena.identity, primitive._block.index

    def create_at_once() -> tuple[int, int]:
        eventually(lambda: stage.page[CREATING] or stage.page[DEAD])
        return create()

    def create_others() -> None:
        for number in range(others_first):
            make(f"name {number}")

    def check() -> tuple[int, int]:
        """It is in its first state, it works, and so do other names."""
        for name in (NAME, *(f"further name {number}" for number in range(4))):
            primitive = make(name)
            assert primitive.acquire(block=False)
            assert Child(lambda name=name: make(name).acquire(block=False)).result() is (primitive._kind == at.SEMAPHORE)
            primitive.release()
        return create()

    # This process itself attaches nothing: it could not let go of it without looking through all its memory.
    if others_first:
        stage.fork(create_others).result()
    stage.start_victim(create)
    children = [stage.fork(create_at_once) for _ in range(stage.others)]
    stage.let_victim_go()
    killed = stage.end_of_victim()
    found = {child.result() for child in children} | {stage.fork(check).result()}
    if not killed:
        found.add(stage.answer)
    assert len(found) == 1, "one name, several primitives"


def create_first_name(stage: Stage) -> None:
    """In a domain that is not there yet."""
    create_name(stage, lambda name: shlock.Lock(name, domain=stage.domain))


def create_further_name(stage: Stage) -> None:
    create_name(stage, lambda name: shlock.Lock(name, domain=stage.domain), others_first=3)


def create_name_with_many_words(stage: Stage) -> None:
    def make(name: str) -> Any:
        return shlock.Semaphore(30, name, owned=True, domain=stage.domain)

    create_name(stage, make, others_first=1)


def create_name_in_a_further_segment(stage: Stage) -> None:
    blocks, _names.FIRST_BLOCKS = _names.FIRST_BLOCKS, 2
    try:
        full = _names.FIRST_BLOCKS * 4 * _names.FULL[0] // _names.FULL[1]  # block 0 is never used
        create_name(stage, lambda name: shlock.Lock(name, domain=stage.domain), others_first=full)
    finally:
        _names.FIRST_BLOCKS = blocks


# -- the tests ------------------------------------------------------------------------------------------------------------

CLAIM = "C1 spot claimed"
PUBLISH = ("A4 before S is published", "A5 S published")
SLEEP = ("A6 before sleeping", "A6 awake")
GOT_IN = ("A7 got in, S not yet IDLE", "A7 S IDLE")
WITHDRAW = ("A8 before S is IDLE", "A8 S IDLE", "A8 withdrawn")
HAND_OVER = "C60 PARKED taken away, first in line known"
WAKE = ("R3 waiter chosen", "R3 NOTIFIED, not posted", "R3 posted")
REAP = ("C4 spot of a dead thread claimed", "C4 its wake-up passed on")
PARK = (CLAIM, *PUBLISH, *SLEEP, *GOT_IN)
NAMING = (
    "N1 name: before the text is taken",
    "C1 name: text room taken",
    "C3 name: extensions taken",
    "C2 name: block and text written",
    "C4 name: hash written",
)
SEGMENT = ("C5 segment: made, not published", "C6 segment: published")

#: Of each scenario: crash points that the victim reaches in any case, and those it reaches only if others wait.
LABELS: dict[Scenario, tuple[tuple[str, ...], tuple[str, ...]]] = {
    acquire_contended: ((*PARK, "C6 taken", "R3 released, nobody woken"), ()),
    acquire_contended_recursively: ((*PARK, "C6 taken", "R3 released, nobody woken"), ()),
    acquire_with_a_timeout_that_passes: ((CLAIM, *PUBLISH, *SLEEP, *WITHDRAW), ()),
    release_with_waiters: ((HAND_OVER, "R3 released, nobody woken"), WAKE[1:]),
    release_recursive_lock_with_waiters: ((HAND_OVER, "R3 released, nobody woken"), WAKE[1:]),
    inherit: ((*PARK, "C10 who died is written", "C6 taken", HAND_OVER, "R3 released, nobody woken"), WAKE[1:]),
    try_to_acquire_from_a_dead_owner: (
        ("C10 who died is written", "C6 taken", HAND_OVER, "R3 released, nobody woken"),
        WAKE[1:],
    ),
    poison: ((CLAIM, *PUBLISH, *SLEEP, "C10 who died is written", *WITHDRAW), ()),
    repair: (("C6 taken",), ()),
    reap_a_chosen_one: ((*PARK, *REAP), ()),
    wait_where_all_spots_are_taken_by_the_dead: ((*REAP, *PARK), ()),
    acquire_permit: (PARK, ()),
    acquire_owned_permit: ((*PARK, "C6 taken"), ()),
    acquire_permit_with_a_timeout_that_passes: ((CLAIM, *PUBLISH, *SLEEP, *WITHDRAW), ()),
    acquire_owned_permit_with_a_timeout_that_passes: ((CLAIM, *PUBLISH, *SLEEP, *WITHDRAW), ()),
    release_permit: (("C11 permit given, nobody woken",), WAKE),
    release_owned_permit: (("R3 released, nobody woken",), WAKE),
    inherit_permit: ((*PARK, "C10 who died is written", "C6 taken"), ()),
    wait_for_notification: ((*PARK, "C13 spot published, lock still held", "C13 lock released"), ()),
    wait_for_notification_with_a_plain_lock: ((*PARK, "C13 spot published, lock still held", "C13 lock released"), ()),
    wait_for_notification_in_vain: ((CLAIM, *PUBLISH, *SLEEP, *WITHDRAW, "C13 lock released"), ()),
    notify: (("C13 before a waiter is chosen",), WAKE[1:]),
    notify_all: (("C13 before a waiter is chosen",), WAKE[1:]),
    be_notified: (PARK, ()),
    wait_for_event: (PARK, ()),
    wait_for_event_in_vain: ((CLAIM, *PUBLISH, *SLEEP, *WITHDRAW), ()),
    set_event: (("C15 event set, nobody woken",), WAKE[1:]),
    set_and_clear_event: (("C15 event set, nobody woken",), WAKE[1:]),
    arrive_first: (("C16 party arrived, not counted", "C17 party counted"), PARK),
    arrive_last: (
        (
            "C16 party arrived, not counted",
            "C17 party counted",
            "C18 last one acts",
            "C19 round over, nobody woken",
        ),
        WAKE[1:],
    ),
    arrive_in_vain: ((*PUBLISH, *SLEEP, *WITHDRAW, "C16 party arrived, not counted", "C17 party counted"), WAKE[1:]),
    create_first_name: ((*SEGMENT, *NAMING), ()),
    create_further_name: (NAMING, ()),
    create_name_with_many_words: (NAMING, ()),
    create_name_in_a_further_segment: ((*SEGMENT, *NAMING), ()),
}


#: Scenarios in which the victim dies before and after each single operation.
STEPPED = (
    acquire_uncontended,
    acquire_uncontended_recursively,
    use_free_permit,
    use_free_owned_permit,
    *(scenario for scenario in LABELS),
)


def name_of(scenario: Scenario) -> str:
    return scenario.__name__


def cases() -> list[Any]:
    found = []
    for scenario, (always, with_others) in LABELS.items():
        for others in OTHERS:
            labels = (*always, *(with_others if others else ()))
            for label in dict.fromkeys(labels):
                found.append(pytest.param(scenario, label, others, id=f"{scenario.__name__}-{label}-{others}"))
    return found


@pytest.mark.parametrize(("scenario", "label", "others"), cases())
def test_everybody_goes_on_when_a_process_is_killed_at(scenario: Scenario, label: str, others: int, domain: str) -> None:
    for times in (1, 2):
        for attempt in range(20):  # how often a waiter wakes up, and who is the first to reap, is a matter of time
            stage = Stage(others, DieAtLabel(label, times), domain)
            scenario(stage)
            fresh_domain(domain)
            if stage.killed or times > 1:
                break
        else:
            pytest.fail(f"nobody ever came to {label!r}; it passed {stage.passed}")


def fresh_domain(domain: str) -> None:
    end_children()
    clean(domain)


@pytest.mark.patience(300)
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("scenario", STEPPED, ids=name_of)
def test_everybody_goes_on_when_a_process_is_killed_before_or_after_any_operation_of(
    scenario: Scenario, others: int, domain: str
) -> None:
    for number in range(1, MOST_OPERATIONS):
        stage = Stage(others, DieAtOperation(number), domain)
        try:
            scenario(stage)
        except BaseException as error:
            error.add_note(f"killed at step {number}")
            raise
        fresh_domain(domain)
        if not stage.killed:
            break
    else:
        pytest.fail(f"the operation takes more than {MOST_OPERATIONS} steps")
    assert number > 2, "there was nothing to be killed at"


def test_each_crash_point_of_the_source_has_a_scenario_in_which_a_process_dies_there() -> None:
    source = {
        label
        for path in Path(shlock.__file__).parent.rglob("*.py")
        for label in re.findall(r"crash_points\[0\]\(\s*\"([^\"]*)\"", path.read_text())
    }
    calls = sum(path.read_text().count("crash_points[0](") for path in Path(shlock.__file__).parent.rglob("*.py"))
    assert len(source) > 20
    assert calls >= len(source)
    covered = {label for always, others in LABELS.values() for label in (*always, *others)}
    covered |= {*test_enforcement.CAUSES, *test_enforcement.GRANTS, test_enforcement.ADOPTION}
    others = [path.stem for path in Path(__file__).parent.glob("test_*_crashes.py")]
    for name in (
        *others,
        "test_precedence",
        "test_inheritance",
        "test_bias",
        "test_leased_readers",
        "test_rwlock_precedence",
        "test_privilege_blocks",
    ):  # each has LABELS, too
        covered |= set(importlib.import_module(name).LABELS)
    assert source - covered == set(), "crash points at which no test kills anybody"
    assert covered - source == set(), "labels that the source does not have (any more)"
