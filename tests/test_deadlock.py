"""Deadlocks are found, are named, and are never seen where there is none."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PATIENCE, Child, Page, eventually, files_of, is_sleeping

import shlock
from shlock import DeadlockError, DeadlockMember, _deadlock, _owned, _parking, cli, snapshot
from shlock import _layout as at
from shlock._arena import Arena
from shlock._deadlock import Edge, Graph, Place, cycle_through, cycles_among
from shlock._segment import Segment

# Words of the page, one for each of up to eight members.
HOLDS, GO, POLLS, STAY = range(0, 32, 8)

MOST_POLLS = 20
"""Within 200 ms: the first in line polls every 10 ms."""

ENOUGH_POLLS = 30
"""Nobody who has not found a deadlock by then finds one."""

soak = [pytest.mark.soak, pytest.mark.patience(3600)]


# -- cycles, from edges alone ---------------------------------------------------------------------------------------------

PLACES = [(1, index) for index in range(7)]


def edge(lock: Place, wants: Place, since: int = 0, confirmed: int = 0, word: int = 0) -> Edge:
    return Edge(lock, wants, word, owner=0, thread=0, since=since, confirmed=confirmed)


@st.composite
def edges(draw: st.DrawFn) -> dict[Place, Edge]:
    """Who waits for whom, and when, by the lock that each holds."""
    found = {}
    for place in PLACES:
        wants = draw(st.none() | st.sampled_from(PLACES))
        if wants is not None:
            found[place] = edge(place, wants, draw(st.integers(0, 3)), draw(st.integers(2, 5)))
    return found


def rings(found: dict[Place, Edge]) -> dict[Place, list[Place]]:
    """By brute force: from each place, where one comes back to it, the way."""
    way_back = {}
    for start in PLACES:
        way = [start]
        while len(way) <= len(PLACES) and way[-1] in found:
            way.append(found[way[-1]].wants)
            if way[-1] == start:
                way_back[start] = way[:-1]
                break
    return way_back


def all_at_one_moment(members: list[Edge]) -> bool:
    return any(all(one.since <= moment <= one.confirmed for one in members) for moment in range(6))


@given(edges())
@settings(max_examples=500)
def test_the_cycles_found_are_those_of_brute_force_in_which_all_waited_at_one_moment(found: dict[Place, Edge]) -> None:
    true = {
        start: tuple(found[place] for place in way)
        for start, way in rings(found).items()
        if all_at_one_moment([found[place] for place in way])
    }
    for place in PLACES:
        assert cycle_through(place, found.get) == true.get(place)
    lowest = [members for start, members in true.items() if start == min(one.lock for one in members)]
    assert sorted(cycles_among(PLACES, found.get)) == sorted(lowest)


def test_a_way_without_end_is_left() -> None:
    endless = iter(range(10**9))
    assert cycle_through((1, 0), lambda place: edge(place, (1, next(endless) + 1))) is None
    assert cycles_among([(1, 0)], lambda place: edge(place, (1, next(endless) + 1))) == []


class Simulated:
    """Threads that take and release locks, wait, give up and poll at random; what was true at each moment is kept."""

    def __init__(self, chance: random.Random, threads: int, locks: int) -> None:
        self.chance = chance
        self.now = 0
        self.owner: list[int | None] = [None] * locks
        self.waits: list[tuple[int, int] | None] = [None] * threads  # for which lock, since when
        self.words: list[tuple[int, int, int] | None] = [None] * locks  # EDGE (thread, since), CONFIRMED
        self.history = [self._moment()]

    def _moment(self) -> tuple[Any, ...]:
        return tuple(self.owner), tuple(self.waits)

    def step(self) -> None:
        self.now += 1
        thread = self.chance.randrange(len(self.waits))
        wait = self.waits[thread]
        held = [lock for lock, owner in enumerate(self.owner) if owner == thread]
        if wait is None:
            lock = self.chance.randrange(len(self.owner))
            if lock in held and self.chance.random() < 0.7:
                self.owner[lock] = None
            elif self.owner[lock] is None:
                self.owner[lock] = thread
            else:
                self.waits[thread] = lock, self.now
        elif self.owner[wait[0]] is None:
            self.owner[wait[0]] = thread
            self.waits[thread] = None
        elif self.chance.random() < 0.2:
            self.waits[thread] = None
        else:
            for lock in held:
                self.words[lock] = thread, wait[1], self.now
        self.history.append(self._moment())

    def follow(self, place: Place) -> Edge | None:
        """As Graph.follow, by a reader that takes its time between two locks."""
        for _ in range(self.chance.randrange(6)):
            self.step()
        words = self.words[place[1]]
        if words is None:
            return None
        thread, since, confirmed = words
        wait = self.waits[thread]
        if self.owner[place[1]] != thread or wait is None or wait[1] != since:
            return None
        return Edge(place, (0, wait[0]), since, thread, 0, since, confirmed)


@given(st.integers(2, 4), st.integers(2, 4), st.integers())
@settings(max_examples=300, deadline=None)
def test_what_a_slow_look_finds_was_a_deadlock_at_one_moment(threads: int, locks: int, seed: int) -> None:
    simulated = Simulated(random.Random(seed), threads, locks)
    for _ in range(100):
        for cycle in cycles_among([(0, lock) for lock in range(locks)], simulated.follow):
            owner, waits = simulated.history[max(one.since for one in cycle)]
            for one in cycle:
                assert owner[one.lock[1]] == one.owner
                assert waits[one.owner] == (one.wants[1], one.since)
        simulated.step()


def test_the_simulated_threads_come_into_deadlocks() -> None:
    simulated = Simulated(random.Random(1), 3, 3)
    found = 0
    for _ in range(10_000):
        found += bool(cycles_among([(0, lock) for lock in range(3)], simulated.follow))
        simulated.step()
    assert found > 20


# -- processes in a ring --------------------------------------------------------------------------------------------------


def count_polls(page: Page, index: int) -> None:
    """From now on, in this process and for good, count how often it looks for deadlocks."""
    plain = _owned.OwnerWaiter._look_for_deadlock

    def look(self: Any, spot: Any) -> None:
        page[POLLS + index] += 1
        plain(self, spot)

    _owned.OwnerWaiter._look_for_deadlock = look  # type: ignore[method-assign]


def member(
    page: Page, index: int, mine: Any, wanted: Any, prepare: Callable[[], None] | None = None, timeout: float | None = None
) -> tuple[Any, float]:
    """Hold one lock, wait for another when told to.  What acquire returned or raised, and after how many seconds."""
    count_polls(page, index)
    if prepare is not None:
        prepare()
    result: Any
    with mine:
        page[HOLDS + index] = 1
        eventually(lambda: page[GO + index])
        begun = time.monotonic()
        try:
            result = wanted.acquire(timeout=timeout)
            if result:
                wanted.release()
        except Exception as error:
            result = error
        after = time.monotonic() - begun
    return result, after


class Ring:
    """Processes each of which holds a lock; one after the other they begin to wait for the next one's."""

    def __init__(self, functions: Iterable[Callable[[Page, int], Any]]) -> None:
        self.page = Page()
        self.members = [Child(function, self.page, index) for index, function in enumerate(functions)]
        eventually(lambda: all(self.page[HOLDS + index] for index in range(len(self.members))), "everybody holds a lock")

    def go(self, index: int) -> None:
        """Have one wait; returns when it does, or has come back from waiting."""
        self.page[GO + index] = 1
        eventually(lambda: self.page[POLLS + index] or not self.members[index].is_alive(), f"member {index} waits")

    def go_all(self) -> None:
        for index in range(len(self.members)):
            self.go(index)

    def polls(self, index: int) -> int:
        return self.page[POLLS + index]

    def poll_on(self, *indices: int) -> None:
        """Return when these have polled so often that they would have found a deadlock."""
        for index in indices:
            goal = self.polls(index) + ENOUGH_POLLS
            eventually(lambda: self.polls(index) >= goal, f"member {index} goes on waiting")

    def results(self) -> list[Any]:
        return [child.result()[0] for child in self.members]


def ring_of(
    locks: list[Any],
    wanted: list[Any] | None = None,
    prepare: dict[int, Callable[[], None]] | None = None,
    timeout: dict[int, float] | None = None,
) -> Ring:
    """A ring in which each holds one of the locks, and wants the next one if nothing else is said."""
    wanted = [*locks[1:], locks[0]] if wanted is None else wanted
    return Ring(
        functools.partial(
            member, mine=mine, wanted=wants, prepare=(prepare or {}).get(index), timeout=(timeout or {}).get(index)
        )
        for index, (mine, wants) in enumerate(zip(locks, wanted, strict=True))
    )


def make(count: int, kind: type = shlock.Lock, domain: str | None = None, **options: Any) -> list[Any]:
    return [kind(*([f"lock {index}"] if domain else []), domain=domain, **options) for index in range(count)]


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "anonymous"])
@pytest.mark.parametrize("kind", [shlock.Lock, shlock.RLock])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_who_closes_a_cycle_is_told_within_a_few_polls_and_the_others_go_on(
    count: int, kind: type, is_named: bool, domain: str
) -> None:
    ring = ring_of(make(count, kind, domain if is_named else None, on_deadlock="raise"))
    ring.go_all()
    *others, error = ring.results()
    assert others == [True] * (count - 1)
    assert isinstance(error, DeadlockError)
    pids = [child.pid for child in ring.members]
    assert [one.pid for one in error.cycle] == [pids[-1], *pids[:-1]]
    assert [one.thread_id for one in error.cycle] == [one.pid for one in error.cycle]
    if is_named:
        assert [one.lock for one in error.cycle] == [f"lock {index}" for index in (count - 1, *range(count - 1))]
        assert {one.domain for one in error.cycle} == {domain}
        assert f"pid {pids[-1]}" in str(error) and "holds 'lock 0' and waits for 'lock 1'" in str(error)
    polls, seconds = ring.polls(count - 1), ring.members[-1].result()[1]
    print(f"{count} processes: {polls} polls, {seconds * 1000:.0f} ms")
    assert polls <= MOST_POLLS


def test_a_cycle_whose_members_stand_behind_other_waiters_is_found() -> None:
    locks = make(3, on_deadlock="raise")
    ring = ring_of(locks)
    bystanders = [Child(lambda lock=lock: lock.acquire() and lock.release()) for lock in locks for _ in range(2)]
    eventually(lambda: all(len(lock.waiters) == 2 for lock in locks))
    ring.go_all()
    *others, error = ring.results()
    assert others == [True, True]
    assert isinstance(error, DeadlockError) and len(error.cycle) == 3
    assert [bystander.wait() for bystander in bystanders] == [0] * 6


def test_a_lock_that_its_thread_takes_twice_is_a_cycle_of_one() -> None:
    lock = shlock.Lock(on_deadlock="raise")
    page = Page()

    def take_twice() -> DeadlockError:
        count_polls(page, 0)
        with lock:
            with pytest.raises(DeadlockError) as caught:
                lock.acquire()
            assert lock.locked()
        return caught.value

    alone = Child(take_twice)
    error = alone.result()
    assert [one.pid for one in error.cycle] == [alone.pid]
    assert "RLock" in str(error)
    assert page[POLLS] <= MOST_POLLS
    assert lock.acquire(block=False)


def test_an_rlock_that_its_thread_takes_twice_is_no_deadlock() -> None:
    lock = shlock.RLock(on_deadlock="raise")
    with lock, lock:
        pass


def test_of_several_only_those_raise_that_want_to_and_of_these_the_last_one(domain: str) -> None:
    locks = make(4, domain=domain)
    wanting = [shlock.Lock(lock.name, domain=domain, on_deadlock="raise") for lock in locks]
    ring = ring_of(locks, wanted=[wanting[1], wanting[2], locks[3], locks[0]])
    ring.go_all()
    first, second, *rest = ring.results()
    assert isinstance(second, DeadlockError)
    assert [first, *rest] == [True] * 3


def test_where_nobody_wants_the_error_all_go_on_waiting_and_ps_and_why_name_the_cycle(
    domain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = ring_of(make(3, domain=domain))
    ring.go_all()
    pids = [child.pid for child in ring.members]

    def seen() -> list[snapshot.PrimitiveSnapshot]:
        return [p for d in snapshot.domains() if d.domain == domain for p in d.primitives if p.deadlock]

    eventually(lambda: len(seen()) == 3)
    for primitive in seen():
        assert primitive.deadlock is not None and primitive.owner is not None
        assert primitive.deadlock[0].lock == primitive.name
        assert primitive.deadlock[0].pid == primitive.owner.pid
        assert sorted(one.pid for one in primitive.deadlock) == sorted(pids)

    assert cli.main(["ps", "--domain", domain]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Deadlock: ")]
    assert all(f"pid {pid} " in line and f"'lock {index}'" in line for index, pid in enumerate(pids))

    assert cli.main(["ps", "--json", "--domain", domain]) == 0
    [shown] = json.loads(capsys.readouterr().out)["domains"]
    by_name = {primitive["name"]: primitive["deadlock"] for primitive in shown["primitives"]}
    assert [one["pid"] for one in by_name["lock 1"]] == [pids[1], pids[2], pids[0]]
    assert [one["lock"] for one in by_name["lock 1"]] == ["lock 1", "lock 2", "lock 0"]

    assert cli.main(["why", "lock 2", "--domain", domain]) == 0
    text = capsys.readouterr().out
    assert f"Deadlock: pid {pids[2]} " in text and "waits for 'lock 0'" in text

    ring.members[0].kill()
    assert [child.wait() for child in ring.members[1:]] == [0, 0]
    assert not seen()


def test_a_held_lock_for_which_somebody_waits_is_shown_without_a_deadlock(domain: str) -> None:
    ring = ring_of(make(2, domain=domain))
    ring.go(0)
    ring.poll_on(0)
    assert [p.deadlock for d in snapshot.domains() if d.domain == domain for p in d.primitives] == [None, None]
    ring.page[GO + 1] = 1
    ring.members[0].kill()


def test_a_cycle_through_a_block_is_found(domain: str) -> None:
    lock = shlock.Lock("lock", domain=domain, on_deadlock="raise")
    block = shlock.Block("block", size=8, domain=domain)
    page = Page()

    def hold_the_block() -> Any:
        with block.write() as view:
            page[HOLDS] = 1
            eventually(lambda: lock.locked())
            with pytest.raises(DeadlockError) as caught:
                lock.acquire()
            view[:] = b"12345678"
        return caught.value

    def hold_the_lock() -> None:
        eventually(lambda: page[HOLDS])
        with lock, block.write() as view:
            view[:] = b"abcdefgh"

    children = Child(hold_the_block), Child(hold_the_lock)
    error = children[0].result()
    children[1].result()
    assert [(one.pid, one.lock) for one in error.cycle] == [(children[0].pid, "block"), (children[1].pid, "lock")]
    with block.read() as view:
        assert bytes(view) == b"abcdefgh"


# -- threads --------------------------------------------------------------------------------------------------------------


def test_two_threads_of_one_process_that_wait_for_each_other_are_found() -> None:
    first, second = make(2, on_deadlock="raise")
    both = threading.Barrier(2)
    results: dict[str, Any] = {}

    def take(name: str, mine: Any, wanted: Any) -> None:
        with mine:
            both.wait(PATIENCE)
            try:
                with wanted:
                    results[name] = threading.get_native_id()
            except DeadlockError as error:
                results[name] = error

    threads = [threading.Thread(target=take, args=a) for a in (("a", first, second), ("b", second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    [error] = [result for result in results.values() if isinstance(result, DeadlockError)]
    [other] = [result for result in results.values() if isinstance(result, int)]
    assert {one.pid for one in error.cycle} == {os.getpid()}
    assert [one.thread_id for one in error.cycle][1] == other
    assert f"thread {other} of pid" in str(error)


def test_one_thread_that_holds_and_another_one_that_waits_are_no_cycle() -> None:
    held, wanted = make(2, on_deadlock="raise")
    page = Page()

    def two_threads() -> Any:
        count_polls(page, 0)
        results: list[Any] = []

        def wait() -> None:
            eventually(lambda: page[HOLDS + 1])
            try:
                results.append(wanted.acquire())
            except DeadlockError as error:
                results.append(error)

        with held:
            thread = threading.Thread(target=wait)
            thread.start()
            page[HOLDS] = 1
            eventually(lambda: page[POLLS] > ENOUGH_POLLS and page[POLLS + 1] > ENOUGH_POLLS)
        thread.join(PATIENCE)
        return results

    def other() -> Any:
        count_polls(page, 1)
        with wanted:
            page[HOLDS + 1] = 1
            eventually(lambda: page[HOLDS])
            return held.acquire()

    children = Child(two_threads), Child(other)
    assert children[1].result() is True
    assert children[0].result() == [True]


# -- what is over, stopped or dead ----------------------------------------------------------------------------------------


def test_the_edge_of_a_past_wait_is_none(domain: str) -> None:
    a, b, c = make(3, domain=domain, on_deadlock="raise")
    page = Page()

    def first() -> Any:
        """Hold a, wait for b in vain, then wait for c."""
        with a:
            page[HOLDS] = 1
            eventually(lambda: page[HOLDS + 1])
            assert not b.acquire(timeout=0.05)
            page[GO] = 1
            count_polls(page, 0)
            return c.acquire()

    def second() -> Any:
        with b:
            page[HOLDS + 1] = 1
            eventually(lambda: page[GO])
            count_polls(page, 1)
            return a.acquire()

    with c:
        children = Child(first), Child(second)
        eventually(lambda: page[POLLS] > ENOUGH_POLLS and page[POLLS + 1] > ENOUGH_POLLS)
        assert _deadlock.has_edge(a._words.view, a._words.block.start)
    assert [child.result() for child in children] == [True, True]


def test_an_edge_is_followed_only_to_the_wait_that_it_names() -> None:
    locks = make(2)
    ring = ring_of(locks)
    ring.go(0)
    ring.poll_on(0)
    ring.members[0].stop()
    words = locks[0]._words
    view, start, arena = words.view, words.block.start, words.block.arena
    place, wanted = ((arena.identity, lock._words.block.index) for lock in locks)
    found = Graph([arena]).follow(place)
    assert found is not None and (found.lock, found.wants, found.owner) == (place, wanted, words.owners()[0])
    spot = at.reserved_spot(view[start + at.BLOCK_EDGE])
    changes = [
        (start + at.BLOCK_WORD, 1 << at.PID_SHIFT),
        (start + at.BLOCK_KIND, at.KIND),
        (start + at.BLOCK_EDGE, 1 << at.RESERVED_SEQUENCE_SHIFT),
        (start + at.BLOCK_EDGE, 1 << at.RESERVED_SPOT_SHIFT),
        (start + at.BLOCK_EDGE, 1 << 5),
        (start + at.BLOCK_CONFIRMED, 1),
        (arena.layout.spot(at.SPOT_STATE, spot), at.WAITING),
        (arena.layout.spot(at.SPOT_STATE, spot), at.KEY),
        (arena.layout.spot(at.SPOT_CLAIM, spot), 1 << at.PID_SHIFT),
    ]
    for index, bits in changes:
        view[index] ^= bits
        changed = Graph([arena]).follow(place)
        view[index] ^= bits
        assert changed is None, (index, bits)
    assert Graph([arena]).follow(place) == found
    ring.members[0].go_on()
    ring.page[GO + 1] = 1
    ring.members[0].kill()


def test_a_member_that_is_stopped_before_the_cycle_closes_raises_no_alarm_and_dead_it_has_an_heir() -> None:
    ring = ring_of(make(2, on_deadlock="raise"), prepare={1: ignore_warnings})
    ring.go(0)
    ring.poll_on(0)
    ring.members[0].stop()
    ring.go(1)
    ring.poll_on(1)
    ring.members[0].kill()
    assert ring.members[1].result()[0] is True


def test_a_member_that_is_stopped_and_goes_on_closes_the_cycle() -> None:
    ring = ring_of(make(2, on_deadlock="raise"))
    ring.go(0)
    ring.members[0].stop()
    ring.go(1)
    ring.poll_on(1)
    ring.members[0].go_on()
    assert isinstance(ring.results()[1], DeadlockError)


def ignore_warnings() -> None:
    import warnings

    warnings.simplefilter("ignore")


def test_a_cycle_of_which_a_member_has_died_meanwhile_is_none() -> None:
    locks = make(2)
    shy, bold = locks[0], make_bold(locks[0])
    page = Page()

    def die_waiting() -> None:
        with shy:
            page[HOLDS] = 1
            eventually(lambda: page[HOLDS + 1])
            locks[1].acquire()

    def inherit() -> Any:
        ignore_warnings()
        plain = _deadlock.same_waits

        def look(cycle: Any) -> Any:
            page[STAY] += 1
            eventually(lambda: page[STAY] == 1 or page[GO])
            return plain(cycle)

        _deadlock.same_waits = look  # type: ignore[assignment]
        with locks[1]:
            eventually(lambda: page[HOLDS])
            page[HOLDS + 1] = 1
            return bold.acquire()

    victim, heir = Child(die_waiting), Child(inherit)
    eventually(lambda: page[STAY] == 2, "the cycle is seen for the second time")
    victim.kill()
    page[GO] = 1
    assert heir.result() is True


def make_bold(lock: Any) -> Any:
    """The same lock, with the other answer to a deadlock."""
    other = shlock.Lock.__new__(shlock.Lock)
    other._on_deadlock = "raise"
    other._bind(lock._block)
    return other


@pytest.mark.parametrize("place", [at.BLOCK_EDGE, at.BLOCK_CONFIRMED])
def test_a_member_that_is_killed_before_it_writes_a_word_of_its_edge_has_an_heir(place: int) -> None:
    locks = make(2, on_deadlock="raise")

    def die_at_store() -> None:
        words = locks[0]._words
        words.view = DeadlyView(words.view, words.block.start + place)

    ring = ring_of(locks, prepare={0: die_at_store, 1: ignore_warnings})
    ring.page[GO + 1] = 1
    eventually(lambda: ring.polls(1) > 3)
    ring.page[GO] = 1
    assert ring.members[0].wait() == -signal.SIGKILL
    assert ring.members[1].result()[0] is True


class DeadlyView:
    """A memoryview of words; who stores into one of them is killed before."""

    def __init__(self, view: memoryview, place: int) -> None:
        self._view, self._place = view, place

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if index == self._place:
            os.kill(os.getpid(), signal.SIGKILL)
        self._view[index] = value


def test_a_member_whose_timeout_passes_ends_the_cycle_and_nobody_is_told() -> None:
    ring = ring_of(make(2), timeout={1: 0.1})
    ring.go_all()
    assert ring.results() == [True, False]


def test_a_member_with_a_timeout_is_told_before_it_passes() -> None:
    ring = ring_of(make(2, on_deadlock="raise"), timeout={1: PATIENCE})
    ring.go_all()
    first, error = ring.results()
    assert first is True
    assert isinstance(error, DeadlockError)


def test_an_attempt_that_does_not_wait_raises_nothing() -> None:
    lock = shlock.Lock(on_deadlock="raise")
    with lock:
        assert not lock.acquire(block=False)
        assert not lock.acquire(timeout=0.001)


def test_a_member_that_is_interrupted_ends_the_cycle_and_the_others_go_on() -> None:
    class Interrupted(Exception):
        pass

    def be_interruptible() -> None:
        def interrupt(*_: object) -> None:
            raise Interrupted

        signal.signal(signal.SIGUSR1, interrupt)

    ring = ring_of(make(3), prepare={1: be_interruptible})
    ring.go_all()
    eventually(lambda: all(is_sleeping(child.pid) for child in ring.members))
    ring.members[1].signal(signal.SIGUSR1)
    assert ring.members[0].wait() == ring.members[2].wait() == 0
    assert [ring.members[index].result()[0] for index in (0, 2)] == [True, True]


# -- the interface --------------------------------------------------------------------------------------------------------


def test_a_segment_that_this_process_has_closed_is_not_looked_at(domain: str) -> None:
    lock = shlock.Lock("a", domain=domain, on_deadlock="raise")
    closed = [Arena.over(Segment.attach(files_of(domain)[0])) for _ in range(20)]
    for arena in closed:
        arena.segment.close()
    with lock, pytest.raises(DeadlockError):
        lock.acquire(timeout=1)


def test_on_deadlock_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match="on_deadlock must be"):
        shlock.Lock(on_deadlock="panic")  # type: ignore[arg-type]


def test_a_copy_in_another_process_gives_the_same_answer(domain: str) -> None:
    lock = pickle.loads(pickle.dumps(shlock.RLock("a", domain=domain, on_deadlock="raise")))
    ring = ring_of([lock, shlock.RLock("b", domain=domain)])
    ring.go(0)
    ring.go(1)
    first, error = ring.results()
    assert first is True
    assert isinstance(error, DeadlockError)


def test_the_error_says_who_waits_for_whom_and_survives_pickling() -> None:
    cycle = (DeadlockMember(12, 12, "worker (a.py)", "x", "shop"), DeadlockMember(13, 14, None, "y", "till"))
    error = pickle.loads(pickle.dumps(DeadlockError("Lock 'y'", cycle)))
    assert error.lock == "Lock 'y'" and error.cycle == cycle
    assert isinstance(error, RuntimeError)
    assert str(error).startswith(
        "Lock 'y': deadlock: pid 12 (worker (a.py)) holds 'x' of domain 'shop' and waits for 'y' of domain 'till'; "
        "thread 14 of pid 13 holds 'y' of domain 'till' and waits for 'x' of domain 'shop'. "
    )
    assert json.dumps([one.as_dict() for one in cycle])


def test_of_a_long_cycle_the_beginning_is_told() -> None:
    cycle = tuple(DeadlockMember(pid, pid, None, f"lock {pid}", None) for pid in range(1, 101))
    text = str(DeadlockError("Lock", cycle))
    assert "pid 16 holds" in text and "pid 17 holds" not in text and "100 in all" in text


def test_arenas_are_told_apart_by_their_numbers_also_when_their_identities_follow_one_another() -> None:
    numbers = {at.arena_number(identity) for identity in range(10_000)}
    assert len(numbers) > 9_990
    assert all(not number & ~at.EDGE_ARENA for number in numbers)


def test_whatever_stands_in_the_words_a_look_is_bounded(domain: str) -> None:
    lock = shlock.Lock("a", domain=domain)
    words = lock._words
    arena, start = words.block.arena, words.block.start
    chance = random.Random(5)
    with lock:
        for _ in range(2000):
            index = chance.choice([0, 1, 500, 1023, 2000])
            state = chance.getrandbits(38) << at.SEQUENCE_SHIFT | chance.getrandbits(26)
            words.view[start + at.BLOCK_EDGE] = at.reservation(index, state) | at.arena_number(arena.identity)
            words.view[start + at.BLOCK_CONFIRMED] = chance.getrandbits(50) << 11 | index + 1
            if index < 1000:
                words.view[arena.layout.spot(at.SPOT_STATE, index)] = state & at.WORD_MASK
                words.view[arena.layout.spot(at.SPOT_CLAIM, index)] = _owned._process.current.word
            graph = Graph([arena])
            cycles_among(graph.held_places(), graph.follow)
        for index in (0, 1, 500):
            words.view[arena.layout.spot(at.SPOT_STATE, index)] = words.view[arena.layout.spot(at.SPOT_CLAIM, index)] = 0


# -- leases ---------------------------------------------------------------------------------------------------------------


def leased_member(page: Page, index: int, domain: str, on_deadlock: str) -> Any:
    locks = make(2, domain=domain, lease=60.0, on_deadlock=on_deadlock)
    return member(page, index, locks[index], locks[1 - index])


def leased_ring(domain: str, on_deadlock: str) -> Ring:
    return Ring([functools.partial(leased_member, domain=domain, on_deadlock=on_deadlock)] * 2)


def test_a_cycle_of_leased_locks_is_raised(domain: str) -> None:
    with shlock.Supervisor(domain):
        ring = leased_ring(domain, "raise")
        ring.go_all()
        first, error = ring.results()
        assert first is True
        assert isinstance(error, DeadlockError)


def test_the_supervisor_tells_once_of_a_cycle_of_leased_locks(domain: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "shlock"), shlock.Supervisor(domain) as supervisor:
        ring = leased_ring(domain, "wait")
        ring.go_all()
        pids = [child.pid for child in ring.members]

        def told() -> list[Any]:
            return [event for event in supervisor.events() if event.event == "deadlock"]

        eventually(told)
        ring.poll_on(0, 1)
        supervisor._call(lambda server: server.watch.look())
        [event] = told()
        assert event.level == logging.WARNING
        assert event.lock in ("lock 0", "lock 1") and event.pid in pids
        assert all(f"pid {pid} " in event.reason for pid in pids)
        assert "holds 'lock 0' and waits for 'lock 1'" in event.reason
        assert any("deadlock" in record.getMessage() for record in caplog.records)
        ring.members[0].kill()
        ring.members[1].wait()


def test_the_supervisor_says_nothing_where_one_waits_for_the_other(domain: str) -> None:
    with shlock.Supervisor(domain) as supervisor:
        ring = leased_ring(domain, "wait")
        ring.go(0)
        ring.poll_on(0)
        supervisor._call(lambda server: server.watch.look())
        assert not [event for event in supervisor.events() if event.event == "deadlock"]
        ring.members[1].kill()
        ring.members[0].wait()


# -- storms ---------------------------------------------------------------------------------------------------------------

SHORT_POLL = 0.0003
"""Seconds: so that in a storm all that waits looks for deadlocks, again and again."""

ROUNDS, LOOKS, ERRORS = range(3)


def weather(page: Page, index: int, locks: list[Any], seed: int, rounds: int, threads: int, ordered: bool) -> None:
    """Take some of the locks, in their order or in any, hold them for a moment, release them; many times."""
    _parking.POLL_INTERVAL = SHORT_POLL  # type: ignore[misc]
    plain = _deadlock.Wait._deadlock
    mine = 3 * index
    counting = threading.Lock()

    def count(word: int) -> None:
        with counting:
            page[mine + word] += 1

    def look(self: Any, edge: int) -> Any:
        count(LOOKS)
        return plain(self, edge)

    _deadlock.Wait._deadlock = look  # type: ignore[method-assign]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        try:
            for _ in range(rounds):
                chosen = chance.sample(range(len(locks)), chance.randint(2, 3))
                if ordered:
                    chosen.sort()
                held = []
                try:
                    for position in chosen:
                        if locks[position].acquire(timeout=chance.choice([None, None, 0.002])):
                            held.append(position)
                    if chance.random() < 0.3:
                        time.sleep(chance.random() * 0.002)
                except DeadlockError:
                    count(ERRORS)
                    if ordered:
                        raise
                finally:
                    chance.shuffle(held)
                    for position in held:
                        locks[position].release()
                count(ROUNDS)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index * threads + number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


@pytest.mark.patience(240)
@pytest.mark.parametrize("rounds", [4000, pytest.param(200_000, marks=soak)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_storm_in_one_order_never_raises_an_alarm(threads: int, rounds: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    page, locks = Page(), make(4, on_deadlock="raise")
    children = [Child(weather, page, index, locks, seed, rounds // threads, threads, True) for index in range(5)]
    for child in children:
        child.result(3600)
    looks = sum(page[3 * index + LOOKS] for index in range(5))
    print(f"{5 * rounds} rounds, {looks} looks")
    assert looks > rounds / 2, "they hardly ever looked: this storm was none"


@pytest.mark.patience(240)
@pytest.mark.parametrize("rounds", [300, pytest.param(20_000, marks=soak)])
def test_a_storm_in_any_order_comes_to_its_end_because_every_deadlock_is_raised(rounds: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    page, locks = Page(), make(4, on_deadlock="raise")
    children = [Child(weather, page, index, locks, seed, rounds, 1, False) for index in range(5)]
    for child in children:
        child.result(3600)
    errors = sum(page[3 * index + ERRORS] for index in range(5))
    print(f"{errors} deadlocks in {5 * rounds} rounds")
    assert errors > rounds / 10
