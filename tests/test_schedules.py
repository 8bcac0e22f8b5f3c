"""The real code of every primitive, stepped through all schedules of two and three threads up to a bound.

What a schedule is, and how the code is made to follow one, stands in `schedules`.  A step is an operation on W, on a
party word, on an S, an H or a slot, a post, or going to sleep.  Each test says its bound, runs *every* schedule within it, and
prints how many those were: up to four preemptions for two threads, two for three; for locks also a kill at every step.

Without polling (all tests but those with a death) a thread that sleeps wakes up by a token or at its own deadline only:
"everybody finishes" then means that no wake-up is lost, whatever the poll interval would have repaired.

That these tests can fail is shown by `test_the_scheduler_finds_...`: the same scenarios and bounds on code with one
line changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from threading import BrokenBarrierError
from typing import Any

import pytest
from schedules import Bound, Interrupted, Scenario, ScheduleFailure, World, explore, mutated

Made = Callable[..., World]

PARKED = 1
SHORT = 0.005
"""A timeout below the poll interval: the deadline comes before the first poll."""


@pytest.fixture
def world() -> Iterator[Made]:
    """Makes worlds that are closed at the end."""
    made: list[World] = []

    def make(processes: int, *kinds: str, **options: Any) -> World:
        made.append(World(processes, *kinds, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def every(scenario: Scenario, bound: Bound) -> int:
    count = explore(scenario, bound)
    print(f"{count} schedules, all with at most {bound}")
    return count


def lock_scenario(
    world: World,
    *,
    kind: str = "Lock",
    rounds: int = 1,
    threads: tuple[int, ...] | None = None,  # the process of each
    hasty: tuple[int, ...] = (),  # threads that wait SHORT only
    use_with: bool = False,
    depth: int = 1,
    biased: tuple[int, ...] = (),  # processes that take a bias wherever they may; the first one has it
    giving_way: tuple[int, ...] = (),  # processes that give way all the time
) -> Scenario:
    """Every thread goes in and out, `rounds` times."""
    places = tuple(range(len(world.processes))) if threads is None else threads
    locks: list[Any] = []

    def body(number: int) -> None:
        lock, can_switch = locks[places[number]], world.scheduler.can_switch
        for _ in range(rounds):
            try:
                can_switch()
                if use_with:
                    with lock:
                        world.visit(number)
                    continue
                told = world.told.count(places[number])
                if lock.acquire(True, SHORT if number in hasty else None):
                    if world.told.count(places[number]) > told:
                        assert lock.abandoned is not None, "who was told of a death cannot look it up"
                    for _ in range(depth - 1):
                        can_switch()
                        assert lock.acquire()
                    world.visit(number)
                    for _ in range(depth):
                        can_switch()
                        lock.release()
                else:
                    assert number in hasty
            except Interrupted:
                pass
        if world.has_buffers:
            world.scheduler.step("does", "something else")  # what it has posted may still not be out

    def start() -> list[tuple[Callable[[], None], int, bool]]:
        for number, process in enumerate(world.processes):
            process.modules["_owned"].OwnedWords._gives_way = lambda words, gives_way=number in giving_way: gives_way
            if biased:
                process.modules["_bias"]._chosen = "always" if number in biased else "never"
        locks[:] = [process.primitive(kind, 0) for process in world.processes]
        if biased:
            with locks[biased[0]]:
                pass
            assert world.word() & world.at.REVOKED == world.at.BIASED
        return [((lambda number=number: body(number)), process, number in hasty) for number, process in enumerate(places)]

    def at_end() -> None:
        if world.dead:
            # Whoever is alive finds what the dead left, be it by trying only.
            for number, lock in enumerate(locks):
                if number not in world.dead:
                    assert lock.acquire(False), f"process {number} cannot get in: W is {world.word():#x}"
                    lock.release()
                    world.processes[number].drain()
            check_who_was_told(world)
        assert world.ordinary() in (0, PARKED), f"W is {world.word():#x} with nobody inside"
        assert not world.spots_in_use(), f"spots {world.spots_in_use()} are still in use"

    return Scenario(world, start, at_end)


def check_who_was_told(world: World) -> None:
    """I6: exactly one is told after the last death inside, nobody if nobody died inside."""
    if world.may_have_died_inside:
        assert world.told_after_death <= 1, f"{world.told_after_death} were told of a death that was perhaps inside"
    elif True in world.died_inside:
        assert world.told_after_death == 1, f"{world.told_after_death} were told of a death inside"
    else:
        assert world.told == [], f"{world.told} were told of nothing"


# -- Lock -----------------------------------------------------------------------------------------------------------------


def test_lock_two_processes_exclude_each_other_and_nobody_sleeps_for_ever(world: Made) -> None:
    """All schedules with at most 4 preemptions, two rounds each, no polling."""
    assert every(lock_scenario(world(2, "Lock"), rounds=2), Bound(4)) > 1000


def test_lock_three_processes_exclude_each_other_and_nobody_sleeps_for_ever(world: Made) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(lock_scenario(world(3, "Lock")), Bound(2)) > 1000


def test_lock_three_processes_that_give_way_to_each_other_all_get_in(world: Made) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(lock_scenario(world(3, "Lock"), giving_way=(0, 1, 2)), Bound(2)) > 1000


def test_lock_who_gives_way_gets_in_though_others_die(world: Made) -> None:
    """Three processes.  All schedules with at most 1 preemption and 1 kill, with polling."""
    assert every(lock_scenario(world(3, "Lock"), giving_way=(0, 1, 2)), Bound(1, kills=1, polls=True)) > 1000


def test_lock_two_threads_of_one_process_exclude_each_other(world: Made) -> None:
    """The owner word says the same for both.  All schedules with at most 3 preemptions, no polling."""
    assert every(lock_scenario(world(1, "Lock", spots_each=2), threads=(0, 0), rounds=2), Bound(3)) > 1000


def test_lock_two_threads_of_one_process_and_one_of_another(world: Made) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(lock_scenario(world(2, "Lock", spots_each=2), threads=(0, 0, 1)), Bound(2)) > 1000


def test_lock_as_with_statement(world: Made) -> None:
    """All schedules with at most 3 preemptions, no polling."""
    assert every(lock_scenario(world(2, "Lock"), rounds=2, use_with=True), Bound(3)) > 100


def test_lock_a_deadline_at_any_time_takes_nobodys_wake_up_two_processes(world: Made) -> None:
    """One of two gives up, at every point.  All schedules with at most 3 preemptions, no polling for the other."""
    assert every(lock_scenario(world(2, "Lock"), hasty=(1,), rounds=2), Bound(3)) > 1000


def test_lock_a_deadline_at_any_time_takes_nobodys_wake_up_three_processes(world: Made) -> None:
    """One of three gives up, at every point.  All schedules with at most 2 preemptions, no polling for the others."""
    assert every(lock_scenario(world(3, "Lock"), hasty=(1,)), Bound(2)) > 1000


def test_lock_an_exception_in_a_sleep_takes_nobodys_wake_up(world: Made) -> None:
    """A signal handler raises in one sleep of one of three.  At most 2 preemptions and 1 interruption, no polling."""
    assert every(lock_scenario(world(3, "Lock")), Bound(2, interruptions=1)) > 1000


def test_lock_a_death_at_every_step_of_two_processes_is_survived_and_told_once(world: Made) -> None:
    """One kill at every step, at most 2 preemptions, with polling."""
    assert every(lock_scenario(world(2, "Lock")), Bound(2, kills=1, polls=True)) > 100


def test_lock_a_death_at_every_step_of_three_processes_is_survived_and_told_once(world: Made) -> None:
    """One kill at every step, at most 1 preemption, with polling."""
    assert every(lock_scenario(world(3, "Lock")), Bound(1, kills=1, polls=True)) > 100


def test_lock_two_deaths_are_survived_and_told_to_the_last_heir(world: Made) -> None:
    """Two kills at any steps, no preemption (but a death lets any other go on), with polling."""
    assert every(lock_scenario(world(3, "Lock")), Bound(0, kills=2, polls=True)) > 100


def test_lock_a_death_while_another_gives_up_is_survived(world: Made) -> None:
    """One kill, one that waits SHORT only, at most 1 preemption, with polling."""
    assert every(lock_scenario(world(3, "Lock"), hasty=(1,)), Bound(1, kills=1, polls=True)) > 100


# -- RLock ----------------------------------------------------------------------------------------------------------------


def test_rlock_two_processes_exclude_each_other_at_any_depth(world: Made) -> None:
    """Taken twice each.  All schedules with at most 3 preemptions, no polling."""
    assert every(lock_scenario(world(2, "RLock"), kind="RLock", depth=2, rounds=2), Bound(3)) > 100


def test_rlock_two_threads_of_one_process_exclude_each_other_at_any_depth(world: Made) -> None:
    """One process, so one owner word: only the thread tells them apart.  At most 3 preemptions, no polling."""
    scenario = lock_scenario(world(1, "RLock", spots_each=2), kind="RLock", depth=2, threads=(0, 0), rounds=2)
    assert every(scenario, Bound(3)) > 1000


# -- biased locks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["stores are out at once", "store buffers"])
def has_buffers(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_biased_lock_its_owner_and_another_exclude_each_other(world: Made, has_buffers: bool) -> None:
    """Two rounds each.  All schedules with at most 3 preemptions, no polling."""
    assert every(lock_scenario(world(2, "Lock", has_buffers=has_buffers), rounds=2, biased=(0,)), Bound(3)) > 1000


def test_biased_lock_that_both_want_goes_to_and_fro(world: Made, has_buffers: bool) -> None:
    """Two rounds each.  All schedules with at most 3 preemptions, no polling."""
    assert every(lock_scenario(world(2, "Lock", has_buffers=has_buffers), rounds=2, biased=(0, 1)), Bound(3)) > 1000


def test_biased_lock_two_who_revoke_at_once(world: Made, has_buffers: bool) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(lock_scenario(world(3, "Lock", has_buffers=has_buffers), biased=(0,)), Bound(2)) > 1000


def test_biased_lock_two_threads_of_its_owner_and_another(world: Made, has_buffers: bool) -> None:
    """Two rounds each.  All schedules with at most 2 preemptions, no polling."""
    one = world(2, "Lock", spots_each=2, has_buffers=has_buffers)
    assert every(lock_scenario(one, threads=(0, 0, 1), rounds=2, biased=(0,)), Bound(2)) > 1000


def test_biased_lock_a_deadline_at_any_time_takes_nobodys_wake_up(world: Made, has_buffers: bool) -> None:
    """The one who revokes gives up, at every point.  All schedules with at most 2 preemptions, no polling for the owner."""
    scenario = lock_scenario(world(2, "Lock", has_buffers=has_buffers), hasty=(1,), rounds=2, biased=(0,))
    assert every(scenario, Bound(2)) > 500


def test_biased_rlock_at_any_depth(world: Made, has_buffers: bool) -> None:
    """All schedules with at most 3 preemptions, no polling."""
    scenario = lock_scenario(world(2, "RLock", has_buffers=has_buffers), kind="RLock", depth=2, rounds=2, biased=(0, 1))
    assert every(scenario, Bound(3)) > 1000


def test_biased_rlock_two_threads_of_its_owner_exclude_each_other(world: Made) -> None:
    """Each takes it twice, in two rounds.  All schedules with at most 2 preemptions, no polling."""
    one = world(1, "RLock", spots_each=2)
    assert every(lock_scenario(one, kind="RLock", depth=2, threads=(0, 0), rounds=2, biased=(0,)), Bound(2)) > 500


@pytest.mark.parametrize(("rounds", "bound"), [(1, Bound(2, kills=1, polls=True)), (2, Bound(1, kills=1, polls=True))], ids=str)
def test_biased_lock_a_death_at_every_step_is_survived_and_told_once(
    rounds: int, bound: Bound, world: Made, has_buffers: bool
) -> None:
    """One kill at every step, of its owner or of who revokes, with polling; two rounds each, or more preemptions."""
    assert every(lock_scenario(world(2, "Lock", has_buffers=has_buffers), rounds=rounds, biased=(0, 1)), bound) > 500


def test_biased_lock_a_death_at_every_step_of_three_processes_is_survived_and_told_once(world: Made) -> None:
    """One kill at every step, no preemption (but a death lets any other go on), with polling."""
    assert every(lock_scenario(world(3, "Lock", has_buffers=True), biased=(0, 1)), Bound(0, kills=1, polls=True)) > 50


# -- Semaphore ------------------------------------------------------------------------------------------------------------


def semaphore_scenario(world: World, permits: int, *, rounds: int = 1, hasty: tuple[int, ...] = ()) -> Scenario:
    users: list[Any] = []
    inside: set[int] = set()

    def body(number: int) -> None:
        semaphore = users[number]
        for _ in range(rounds):
            try:
                if semaphore.acquire(True, SHORT if number in hasty else None):
                    inside.add(number)
                    assert len(inside) <= permits, f"{inside} are inside, and there are {permits} permits"
                    world.scheduler.step("is", "inside")
                    inside.discard(number)
                    semaphore.release()
                else:
                    assert number in hasty
            except Interrupted:
                pass

    def start() -> list[tuple[Callable[[], None], int, bool]]:
        inside.clear()
        users[:] = [process.primitive("Semaphore", 0) for process in world.processes]
        return [((lambda number=number: body(number)), number, number in hasty) for number in range(len(users))]

    def at_end() -> None:
        assert world.word() >> world.at.COUNT_SHIFT == permits, f"{world.word() >> world.at.COUNT_SHIFT} permits are left"
        assert not world.spots_in_use()

    return Scenario(world, start, at_end)


def a_semaphore(world: Made, processes: int, permits: int) -> World:
    return world(processes, "Semaphore", parameter=permits, first_word=permits << 5)


def test_semaphore_of_one_two_processes(world: Made) -> None:
    """All schedules with at most 3 preemptions, two rounds each, no polling."""
    assert every(semaphore_scenario(a_semaphore(world, 2, 1), 1, rounds=2), Bound(3)) > 1000


def test_semaphore_of_one_three_processes(world: Made) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(semaphore_scenario(a_semaphore(world, 3, 1), 1), Bound(2)) > 1000


def test_semaphore_of_two_three_processes(world: Made) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(semaphore_scenario(a_semaphore(world, 3, 2), 2), Bound(2)) > 500


def test_semaphore_a_deadline_at_any_time_takes_no_permit_and_nobodys_wake_up(world: Made) -> None:
    """One of three gives up.  All schedules with at most 2 preemptions, no polling for the others."""
    assert every(semaphore_scenario(a_semaphore(world, 3, 1), 1, hasty=(1,)), Bound(2)) > 1000


def test_semaphore_an_exception_in_a_sleep_takes_no_permit_and_nobodys_wake_up(world: Made) -> None:
    """A handler raises in one sleep of one of three.  At most 2 preemptions and 1 interruption, no polling."""
    assert every(semaphore_scenario(a_semaphore(world, 3, 1), 1), Bound(2, interruptions=1)) > 1000


def test_semaphore_as_a_signal_from_one_process_to_another(world: Made) -> None:
    """No permit at first; one releases twice, the other takes both.  At most 4 preemptions, no polling."""
    one = world(2, "Semaphore", parameter=0, first_word=0)
    users: list[Any] = []

    def give() -> None:
        users[0].release()
        users[0].release()

    def take() -> None:
        assert users[1].acquire()
        assert users[1].acquire()

    def start() -> list[tuple[Callable[[], None], int, bool]]:
        users[:] = [process.primitive("Semaphore", 0) for process in one.processes]
        return [(give, 0, False), (take, 1, False)]

    def at_end() -> None:
        assert one.word() >> one.at.COUNT_SHIFT == 0

    assert every(Scenario(one, start, at_end), Bound(4)) > 100


# -- Event ----------------------------------------------------------------------------------------------------------------


def event_scenario(world: World, *, clear: bool) -> Scenario:
    """Everybody but the first waits; the first sets, and clears at once."""
    events: list[Any] = []

    def set_it() -> None:
        events[0].set()
        if clear:
            events[0].clear()

    def wait(number: int) -> None:
        # Who comes after the clear waits SHORT only, and may see nothing.
        assert events[number].wait(SHORT if clear else None) or clear

    def start() -> list[tuple[Callable[[], None], int, bool]]:
        events[:] = [process.primitive("Event", 0) for process in world.processes]
        waiters = [((lambda number=number: wait(number)), number, clear) for number in range(1, len(events))]
        return [(set_it, 0, False), *waiters]

    def at_end() -> None:
        assert events[0].is_set() is not clear
        assert not world.spots_in_use()

    return Scenario(world, start, at_end)


def test_event_set_reaches_a_waiter_at_any_point(world: Made) -> None:
    """All schedules with at most 4 preemptions, no polling."""
    assert every(event_scenario(world(2, "Event"), clear=False), Bound(4)) > 10


def test_event_set_reaches_two_waiters_at_any_point(world: Made) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(event_scenario(world(3, "Event"), clear=False), Bound(2)) > 100


def test_event_set_and_cleared_at_once_leaves_nobody_asleep(world: Made) -> None:
    """All schedules with at most 1 preemption; the waiters have a deadline."""
    assert every(event_scenario(world(3, "Event"), clear=True), Bound(1)) > 50


def test_event_who_waits_when_it_is_set_goes_on_though_it_is_cleared(world: Made) -> None:
    """Set and cleared only once the other is about to sleep.  At most 4 preemptions, no polling, no deadline."""
    one = world(2, "Event")
    events: list[Any] = []

    def set_and_clear() -> None:
        if one.word() & PARKED:  # without a step; and in the schedules in which the other isn't there yet:
            events[0].set()
            events[0].clear()
        else:
            events[0].set()

    def wait() -> None:
        assert events[1].wait()

    def start() -> list[tuple[Callable[[], None], int, bool]]:
        events[:] = [process.primitive("Event", 0) for process in one.processes]
        return [(wait, 1, False), (set_and_clear, 0, False)]

    assert every(Scenario(one, start), Bound(4)) > 10


# -- Condition ------------------------------------------------------------------------------------------------------------


def condition_scenario(world: World, *, one_by_one: bool, hasty: tuple[int, ...] = ()) -> Scenario:
    """All but the first wait for a unit each, which the first makes."""
    conditions: list[Any] = []
    units = [0]

    def make() -> None:
        made = 0
        while made < (len(conditions) - 1 if one_by_one else 1):
            with contextlib.suppress(Interrupted), conditions[0]:  # in the sleep of its acquire: again
                made += 1
                units[0] += 1 if one_by_one else len(conditions) - 1
                if one_by_one:
                    conditions[0].notify()
                else:
                    conditions[0].notify_all()

    def consume(number: int) -> None:
        with contextlib.suppress(Interrupted), conditions[number]:
            while not units[0]:
                if not conditions[number].wait(SHORT if number in hasty else None):
                    return
            units[0] -= 1

    def start() -> list[tuple[Callable[[], None], int, bool]]:
        units[0] = 0
        conditions[:] = [process.primitive("Condition", 0, process.primitive("RLock", 1)) for process in world.processes]
        consumers = [((lambda number=number: consume(number)), number, number in hasty) for number in range(1, len(conditions))]
        return [*consumers, (make, 0, False)]

    def at_end() -> None:
        assert not world.spots_in_use()
        assert world.ordinary(1) in (0, PARKED), "its lock is still held"

    return Scenario(world, start, at_end)


def test_condition_notify_all_reaches_a_waiter_at_any_point(world: Made) -> None:
    """All schedules with at most 2 preemptions, no polling."""
    assert every(condition_scenario(world(2, "Condition", "RLock", spots_each=2), one_by_one=False), Bound(2)) > 50


def test_condition_notify_all_reaches_two_waiters_at_any_point(world: Made) -> None:
    """All schedules with at most 1 preemption, no polling."""
    assert every(condition_scenario(world(3, "Condition", "RLock", spots_each=2), one_by_one=False), Bound(1)) > 50


def test_condition_each_notify_reaches_another_of_two_waiters(world: Made) -> None:
    """All schedules with at most 1 preemption, no polling."""
    assert every(condition_scenario(world(3, "Condition", "RLock", spots_each=2), one_by_one=True), Bound(1)) > 50


def test_condition_an_exception_in_a_wait_takes_nobodys_notification(world: Made) -> None:
    """Of two waiters one is interrupted; every notification that came meets a waiter.  At most 1 preemption, no polling."""
    scenario = condition_scenario(world(3, "Condition", "RLock", spots_each=2), one_by_one=True)
    assert every(scenario, Bound(1, interruptions=1)) > 50


# -- Barrier --------------------------------------------------------------------------------------------------------------


def barrier_scenario(world: World, *, rounds: int, parties: int = 2) -> Scenario:
    barriers: list[Any] = []
    came: list[list[int]] = []

    def pass_it(number: int) -> None:
        for turn in range(rounds):
            try:
                position = barriers[number].wait()
            except BrokenBarrierError:
                assert world.dead, "nobody died, and it broke"
                return
            came[turn].append(position)

    def start() -> list[tuple[Callable[[], None], int, bool]]:
        barriers[:] = [process.primitive("Barrier", 0, (None, None)) for process in world.processes]
        came[:] = [[] for _ in range(rounds)]
        return [((lambda number=number: pass_it(number)), number, False) for number in range(parties)]

    def at_end() -> None:
        if not world.dead:
            assert [sorted(positions) for positions in came] == [list(range(parties))] * rounds
            assert not world.spots_in_use()

    return Scenario(world, start, at_end)


def test_barrier_of_two_lets_both_through_twice(world: Made) -> None:
    """Two rounds.  All schedules with at most 2 preemptions, no polling."""
    assert every(barrier_scenario(world(2, "Barrier", parameter=2), rounds=2), Bound(2)) > 100


def test_barrier_of_three_lets_all_through(world: Made) -> None:
    """One round.  All schedules with at most 1 preemption, no polling."""
    assert every(barrier_scenario(world(3, "Barrier", parameter=3), rounds=1, parties=3), Bound(1)) > 50


# -- the scheduler can find what is wrong -----------------------------------------------------------------------------------

MUTATIONS: dict[str, tuple[Callable[[Made], Scenario], Bound, str, str, str, str]] = {
    "an_acquire_that_is_not_atomic": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(2),
        "_fast_path.make_fast_path",
        "raw_compare_exchange(word, zero, identity_pointer)",
        "not_atomic(words, identity_pointer)",
        "",
    ),
    "a_waiter_that_does_not_mark_the_word": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(2),
        "_owned.OwnerWaiter.attempt",
        "or self.mark.compare_exchange(place[1], w, w | at.PARKED):",
        "or True:",
        "nobody can go on",
    ),
    "a_waiter_that_takes_the_word_without_PARKED": (
        lambda world: lock_scenario(world(3, "Lock")),
        Bound(2),
        "_owned.OwnerWaiter.attempt",
        "me | at.PARKED | w & at.DIED",
        "me | w & at.DIED",
        "nobody can go on",
    ),
    "a_chosen_waiter_that_does_not_wait_again": (
        lambda world: lock_scenario(world(2, "Lock"), rounds=2),
        Bound(4),
        "_owned.OwnerWaiter.attempt",
        "spot.renew()",
        "pass",
        "",
    ),
    "a_waiter_that_relies_on_nobody": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(2),
        "_parking.Parking.relies_on_another",
        "bool(self._line(key, at.NOTIFIED))",
        "True",
        "nobody can go on",
    ),
    "a_waiter_that_gives_way_to_nobody": (
        lambda world: lock_scenario(world(2, "Lock"), giving_way=(0, 1)),
        Bound(2),
        "_owned.OwnerWaiter.attempt",
        "if self.gives_way and self._relies_on_another(spot):",
        "if self.gives_way:",
        "nobody can go on",
    ),
    "a_waiter_that_naps_while_nobody_knows_of_it": (
        lambda world: lock_scenario(world(2, "Lock"), rounds=2),
        Bound(3),
        "_parking.Parking.park",
        "until = min(until, now + FIRST_NAP * 2 ** (spot.naps - 1))",
        "spot.renew()",
        "nobody can go on",
    ),
    "a_waiter_that_got_in_and_still_waits": (
        lambda world: lock_scenario(world(3, "Lock")),
        Bound(2),
        "_parking.Parking.park",
        "if spot.leave():",
        "if False:",
        "",
    ),
    "a_release_that_wakes_nobody": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(2),
        "_owned.OwnedWords.release_word",
        "self.wake_next()",
        "pass",
        "nobody can go on",
    ),
    "a_waiter_that_gives_up_and_passes_no_wake_up_on": (
        lambda world: lock_scenario(world(3, "Lock"), hasty=(1,)),
        Bound(2),
        "_owned.OwnerWaiter.pass_on",
        "words.wake_one()",
        "pass",
        "nobody can go on",
    ),
    "a_waiter_that_is_interrupted_and_passes_no_wake_up_on": (
        lambda world: lock_scenario(world(3, "Lock")),
        Bound(2, interruptions=1),
        "_owned.OwnerWaiter.pass_on",
        "words.wake_one()",
        "pass",
        "nobody can go on",
    ),
    "a_waker_that_does_not_post": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(2),
        "_parking.Parking._notify",
        'crash_points[0]("R3 NOTIFIED, not posted")\n        self._post(index)',
        "pass",
        "nobody can go on",
    ),
    "a_poll_that_takes_from_the_living": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(2, kills=1, polls=True),
        "_owned.OwnerWaiter.poll",
        "if not owner or words.names_slot(w) or _process.is_alive(owner):",
        "if not owner or words.names_slot(w):",
        "",
    ),
    "an_heir_who_is_not_told": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(1, kills=1, polls=True),
        "_owned.OwnerWaiter.poll",
        "self.died = True",
        "self.died = False",
        "were told",
    ),
    "an_heir_who_takes_the_flag_away": (
        lambda world: lock_scenario(world(2, "Lock")),
        Bound(1, kills=1, polls=True),
        "_owned.OwnerWaiter.poll",
        "_process.current.word | at.PARKED | at.DIED",
        "_process.current.word | at.PARKED",
        "",
    ),
    "a_revoker_that_calls_no_membarrier": (
        lambda world: lock_scenario(world(2, "Lock", has_buffers=True), biased=(0,)),
        Bound(2),
        "_bias._revoke",
        "if IS_WEAK and not SYSTEM.membarrier():  # V1",
        "if False:",
        "nobody can go on",
    ),
    "a_revoker_that_looks_at_the_door_before_its_membarrier": (
        lambda world: lock_scenario(world(2, "Lock", has_buffers=True), biased=(0,)),
        Bound(2),
        "_bias._revoke",
        "if IS_WEAK and not SYSTEM.membarrier():  # V1",
        "h = globals()['_shut'](slots, at.slot_in(w))\n    _shut = lambda *what: h\n    if not SYSTEM.membarrier():",
        "nobody can go on",
    ),
    "a_revoker_that_looks_at_the_door_and_does_not_shut_it": (
        lambda world: lock_scenario(world(2, "Lock"), biased=(0,)),
        Bound(2),
        "_bias._revoke",
        "_shut(slots, slot) == at.INSIDE",
        "words.load(slots.holds + slot) == at.INSIDE",
        "released too many times",  # the owner's release finds that W is somebody else's
    ),
    "a_release_that_looks_at_the_word_before_its_post": (
        lambda world: lock_scenario(world(2, "Lock"), biased=(0,)),
        Bound(2),
        "_biased_path.make_biased_path",
        "go_out()  # B3\n                if lowest[0] == mark:  # B4",
        "stands = lowest[0] == mark\n                go_out()\n                if stands:",
        "nobody can go on",
    ),
    "a_release_that_does_not_look_whether_the_bias_still_stands": (
        lambda world: lock_scenario(world(2, "Lock"), biased=(0,)),
        Bound(2),
        "_biased_path.make_biased_path",
        "if lowest[0] == mark:  # B4",
        "if lowest[0] == mark or True:",
        "nobody can go on",
    ),
    "an_owner_that_finds_its_bias_revoked_and_leaves_what_is_its_own": (
        lambda world: lock_scenario(world(2, "Lock"), biased=(0,)),
        Bound(2),
        "_bias._finish",
        "elif w & at.OWNER != this or w & at.REVOKED != at.REVOKED:",
        "elif True:",
        "nobody can go on",
    ),
    "an_owner_that_gives_back_what_another_of_its_threads_has": (
        lambda world: lock_scenario(world(2, "Lock", spots_each=2), threads=(0, 0, 1), rounds=2, biased=(0,)),
        Bound(2),
        "_bias._finish",
        "or _shut(_slots_of(words), slot) == at.INSIDE",
        "",
        "inside together",
    ),
    "two_threads_that_both_give_the_bias_back": (
        lambda world: lock_scenario(world(2, "Lock", spots_each=2), threads=(0, 0, 1), biased=(0,)),
        Bound(3),
        "_bias._finish",
        "if words.door is not door or words.leaver:",
        "if False:",
        "",
    ),
    "two_threads_that_both_have_a_door_made": (
        lambda world: lock_scenario(world(2, "Lock", spots_each=2), threads=(0, 0, 1), rounds=2, biased=(0,)),
        Bound(2),
        "_bias.grant",
        "or words.granter:",
        "or False:",
        "is not INSIDE, and is posted",
    ),
    "a_slot_that_is_taken_from_the_living": (
        lambda world: lock_scenario(world(2, "Lock"), rounds=2, biased=(0, 1)),
        Bound(2),
        "_bias._claim",
        "is_free = not owner or not _process.is_alive(owner)",
        "is_free = True",
        "",
    ),
    "a_slot_that_is_taken_over_with_the_door_of_the_dead": (
        lambda world: lock_scenario(world(2, "Lock"), biased=(0, 1)),
        Bound(1, kills=1, polls=True),
        "_bias._claim",
        "words.view[h] = at.OUTSIDE",
        "if not owner: words.view[h] = at.OUTSIDE",
        "",
    ),
    "a_hold_that_was_revoked_and_looks_like_any_other": (
        lambda world: lock_scenario(world(2, "Lock"), biased=(0,)),
        Bound(2),
        "_bias._revoke",
        "swap(place, w, owner | at.REVOKED)  # V2",
        "swap(place, w, owner)",
        "nobody can go on",
    ),
    "an_rlock_that_forgets_which_thread_holds_it": (
        lambda world: lock_scenario(world(1, "RLock", spots_each=2), kind="RLock", depth=2, threads=(0, 0)),
        Bound(2),
        "_fast_path.make_fast_path",
        "if recursive and thread == holder:",
        "if recursive and words.owners() == [_process.current.word]:",
        "",
    ),
    "a_door_of_an_rlock_that_forgets_which_thread_is_in": (
        lambda world: lock_scenario(world(1, "RLock", spots_each=2), kind="RLock", depth=2, threads=(0, 0), biased=(0,)),
        Bound(2),
        "_bias._grant",
        "recursive=words.has_recursive_door",
        "recursive=False",
        "nobody can go on",
    ),
    "a_permit_taken_twice": (
        lambda world: semaphore_scenario(a_semaphore(world, 2, 1), 1),
        Bound(2),
        "_counting.SemaphoreWord.acquire",
        "take.compare_exchange(self.pointer, w, w - at.ONE)",
        "self.view.__setitem__(self.place, w - at.ONE) is None",
        "",
    ),
    "a_permit_given_that_wakes_nobody": (
        lambda world: semaphore_scenario(a_semaphore(world, 2, 1), 1),
        Bound(2),
        "_counting.SemaphoreWord.wake_next",
        "if not self.parking.unpark_one(self.index):",
        "if False:",
        "nobody can go on",
    ),
    "an_event_that_wakes_one_of_two": (
        lambda world: event_scenario(world(3, "Event"), clear=False),
        Bound(2),
        "_counting.EventWord.set",
        "if w & at.PARKED:\n            self.parking.unpark_many(self.index)",
        "if w & at.PARKED:\n            self.parking.unpark_many(self.index, 1)",
        "nobody can go on",
    ),
    "a_condition_that_gives_its_lock_back_before_it_can_be_chosen": (
        lambda world: condition_scenario(world(2, "Condition", "RLock", spots_each=2), one_by_one=False),
        Bound(2),
        "_counting._NotificationWaiter.attempt",
        "while not word.mark_parked(self.mark, word.view[word.place]):",
        "while False:",
        "nobody can go on",
    ),
    "a_barrier_that_wakes_nobody": (
        lambda world: barrier_scenario(world(2, "Barrier", parameter=2), rounds=1),
        Bound(1),
        "_parking.Parking.unpark_many",
        "woken += self._notify(index, state)",
        "woken += 1",
        "nobody can go on",
    ),
}


def _look_then_store(words: Any, me: int) -> bool:
    """What A1 must not be."""
    place = words.places[0][0]
    if words.view[place]:
        return False
    words.view[place] = me
    return True


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_scheduler_finds(mutation: str, world: Made) -> None:
    """Within the bound that the unchanged code is run with, or a smaller one."""
    make, bound, where, old, new, complaint = MUTATIONS[mutation]
    scenario = make(world)
    for process in scenario.world.processes:
        process.modules["_fast_path"].not_atomic = lambda words, me, word=process.word: _look_then_store(words, word)
    with mutated(scenario.world, where, old, new), pytest.raises(ScheduleFailure) as caught:
        explore(scenario, bound)
    assert complaint in str(caught.value)
    print(str(caught.value).split("\n")[0])


def test_the_same_decisions_give_the_same_steps(world: Made) -> None:
    """What depth-first search rests on."""
    one = world(3, "Lock")
    scenario = lock_scenario(one, hasty=(2,))
    seen = []
    for _ in range(3):
        one.reset()
        one.scheduler.run(scenario.start(), Bound(2), [0, 1, 0, 1], one.kill, scenario.at_end)
        assert one.scheduler.failure is None
        seen.append([*one.scheduler.steps])
    assert seen[0] == seen[1] == seen[2]
