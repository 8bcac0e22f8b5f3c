"""A process that reads or writes under an RWLock is killed at every step; the others go on, and are told if it wrote."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import pytest
from support import PATIENCE, Child, DieAtLabel, DieAtOperation, Page, eventually, watch_steps
from test_rwlock import INSIDE, assert_free, die_inside, told

import shlock
from shlock import _layout as at
from shlock import _sys

ROUNDS = 3
OTHERS = (0, 1, 4)

TAKEN, IN_LINE, READS, CLEARED = "C50 record taken", "C51 in line", "C52 inside, reading", "C53 record cleared, nobody woken"
HAS_W, LET_IN, DRAINING, ALONE = (
    "C54 W taken, nobody looked for",
    "C55 line let in, not woken",
    "C56 DRAINING set",
    "C57 alone inside",
)
WROTE, PASSED_ON = "C58 a reader wrote who died", "C59 dead writer cleared, nobody woken"
WAITS = (
    "A4 before S is published",
    "A5 S published",
    "A6 before sleeping",
    "A6 awake",
    "A7 got in, S not yet IDLE",
    "A7 S IDLE",
)
WAKES = ("R3 released, nobody woken", "R3 waiter chosen", "R3 NOTIFIED, not posted", "R3 posted")

#: At which of the source's labels a process is killed here.
LABELS = {TAKEN, IN_LINE, READS, CLEARED, HAS_W, LET_IN, DRAINING, ALONE, WROTE, PASSED_ON}


def die_at(label: str, rwlock: shlock.RWLock, how: str, before: Callable[[str], None] = lambda label: None) -> None:
    """Go in and out; ``before`` is called at each step."""
    death = DieAtLabel(label, 1)

    def at_point(seen: str) -> None:
        before(seen)
        death.label(seen)

    _sys.crash_points[:] = [at_point]
    with INSIDE[how](rwlock):
        pass
    raise AssertionError(f"never came to {label!r}, only to {death.passed}")


def go_on(rwlock: shlock.RWLock, page: Page, number: int) -> list[int]:
    """What the others do: some rounds.  Of whose death they were told."""
    heard: list[int] = []
    mine = 8 + number
    for turn in range(ROUNDS):
        how = ("read", "write")[(turn + number) % 2]
        with told() as pids, getattr(rwlock, how)(PATIENCE):
            page[mine] = 2 if how == "write" else 1
            others = [page[word] for word in range(8, 16) if word != mine]
            assert not any(others) if how == "write" else 2 not in others, f"to {how} with others: {others}"
            page[mine] = 0
        heard += pids
    return heard


def crowd(rwlock: shlock.RWLock, others: int, page: Page) -> list[Child]:
    return [Child(go_on, rwlock, page, number) for number in range(others)]


def assert_others_go_on(rwlock: shlock.RWLock, children: list[Child], victim: Child, is_told: bool) -> None:
    """They, and who comes after them; if the victim wrote, whoever came next is told, and in the end nobody."""
    assert victim.wait() == -signal.SIGKILL
    heard = [pid for child in children for pid in child.result()]
    page = Page()
    heard += go_on(rwlock, page, 0)
    assert set(heard) == ({victim.pid} if is_told else set())
    assert go_on(rwlock, page, 0) == go_on(rwlock, page, 1) == []
    assert rwlock.abandoned is None
    assert_free(rwlock)


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize(
    ("how", "label", "is_told"),
    [
        ("read", TAKEN, False), ("read", READS, False), ("read", CLEARED, False),
        ("write", HAS_W, True), ("write", ALONE, True),
    ],
)  # fmt: skip
def test_the_others_go_on_when_one_is_killed_that_met_nobody_at(how: str, label: str, is_told: bool, others: int) -> None:
    rwlock = shlock.RWLock()
    victim = Child(die_at, label, rwlock, how)
    assert victim.wait() == -signal.SIGKILL
    assert_others_go_on(rwlock, crowd(rwlock, others, Page()), victim, is_told)


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("outer", INSIDE)
@pytest.mark.parametrize("label", [IN_LINE, READS, CLEARED, ALONE, *WAITS, *WAKES])
@pytest.mark.parametrize("how", INSIDE)
def test_the_others_go_on_when_one_is_killed_that_waited_among_them_at(how: str, label: str, outer: str, others: int) -> None:
    if (how == "read") == (label == ALONE) or (
        (label in (IN_LINE, READS, CLEARED)) != (how == "read") and label not in WAITS + WAKES
    ):
        pytest.skip("not a step of this one")
    if (label in WAKES and not (how == "write" and others)) or (how == outer == "read"):
        pytest.skip("it would meet nobody")
    rwlock, page = shlock.RWLock(), Page()

    def note_sleep(label: str) -> None:
        page[0] |= label == "A6 before sleeping"

    with INSIDE[outer](rwlock):
        if outer == "write":
            children = crowd(rwlock, others, page)
            eventually(lambda: len(rwlock.waiters) == others)
        victim = Child(die_at, label, rwlock, how, note_sleep)
        eventually(lambda: not victim.is_alive() or page[0])
        if outer == "read":
            children = crowd(rwlock, others, page)
            eventually(lambda: len(rwlock.waiters) >= others)
    if victim.wait() != -signal.SIGKILL:  # it left last, and woke nobody
        assert label in WAKES
        for child in children:
            child.result()
        return
    is_told = how == "write" and (label == ALONE or (outer == "write" and label in WAITS[-2:]))
    assert_others_go_on(rwlock, children, victim, is_told)


@pytest.mark.parametrize("others", OTHERS)
def test_who_was_let_in_goes_on_when_the_writer_is_killed_that_let_it_in_and_woke_nobody(others: int) -> None:
    rwlock, page = shlock.RWLock(), Page()

    def wait_for_a_line(label: str) -> None:
        if label == HAS_W:
            page[0] = 1
            eventually(lambda: any(rwlock._words.view[place] & at.IN_LINE for place, _ in rwlock._words.cells))

    victim = Child(die_at, LET_IN, rwlock, "write", wait_for_a_line)
    eventually(lambda: page[0])
    reader = Child(go_on, rwlock, page, 0)
    children = [reader, *(Child(go_on, rwlock, page, 1 + number) for number in range(others))]
    assert_others_go_on(rwlock, children, victim, True)


@pytest.mark.parametrize("others", OTHERS)
def test_nobody_is_told_when_a_writer_is_killed_that_waited_for_the_readers(others: int) -> None:
    rwlock, page = shlock.RWLock(), Page()
    with rwlock.read():
        victim = Child(die_at, DRAINING, rwlock, "write")
        assert victim.wait() == -signal.SIGKILL
        children = crowd(rwlock, others, page)
        eventually(lambda: len(rwlock.waiters) >= others // 2)
    assert_others_go_on(rwlock, children, victim, False)


@pytest.mark.parametrize("then", INSIDE)
def test_a_death_inside_is_told_although_the_heir_was_killed_while_it_waited_for_the_readers(then: str) -> None:
    rwlock = shlock.RWLock()
    first = die_inside(rwlock, "write")
    with told() as pids, rwlock.read(PATIENCE):
        heir = Child(die_at, DRAINING, rwlock, "write")
        assert heir.wait() == -signal.SIGKILL
        with told() as others, rwlock.read():
            pass
    assert pids == [first.pid]
    assert others == [], "who reads already is inside"
    with told() as pids, getattr(rwlock, then)(PATIENCE):
        pass
    assert pids in ([first.pid], [heir.pid])
    with told(), rwlock.write(PATIENCE):
        pass
    assert rwlock.abandoned is None


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("label", [WROTE, PASSED_ON])
def test_the_others_go_on_when_a_reader_is_killed_that_found_a_dead_writer(label: str, others: int) -> None:
    rwlock, page = shlock.RWLock(), Page()

    def stay() -> None:
        with rwlock.write():
            page[0] = 1
            signal.pause()

    writer = Child(stay)
    eventually(lambda: page[0])
    victim = Child(die_at, label, rwlock, "read")
    eventually(lambda: rwlock.waiters)
    writer.kill()
    assert victim.wait() == -signal.SIGKILL
    children = crowd(rwlock, others, page)
    assert_others_go_on(rwlock, children, writer, True)


@pytest.mark.parametrize("others", OTHERS)
def test_a_writer_gets_in_when_the_last_reader_is_killed_before_it_has_woken_it(others: int) -> None:
    rwlock, page = shlock.RWLock(), Page()

    def wait_for_writer(label: str) -> None:
        if label == READS:
            page[0] = 1
            eventually(lambda: rwlock.waiters)

    for label in (CLEARED, "R3 waiter chosen", "R3 NOTIFIED, not posted"):
        for _ in range(20):
            page[0] = 0
            victim = Child(die_at, label, rwlock, "read", wait_for_writer)
            eventually(lambda: page[0])
            writer = Child(go_on, rwlock, page, 1)  # begins with write
            if victim.wait() == -signal.SIGKILL:
                break
            writer.result()  # it looked for itself just before it would have been woken
        assert_others_go_on(rwlock, [writer, *crowd(rwlock, others, Page())], victim, False)


@pytest.mark.parametrize("outer", [None, *INSIDE])
@pytest.mark.parametrize("how", INSIDE)
def test_the_others_go_on_when_one_is_killed_before_or_after_any_operation(how: str, outer: str | None) -> None:
    number = 0
    while True:
        number += 1
        rwlock, page = shlock.RWLock(on_abandoned="ignore"), Page()

        def use(number: int = number, rwlock: shlock.RWLock = rwlock) -> None:
            watch_steps(DieAtOperation(number), rwlock)
            with INSIDE[how](rwlock):
                pass

        with contextlib.nullcontext() if outer is None else INSIDE[outer](rwlock):
            victim = Child(use)
            eventually(lambda victim=victim, rwlock=rwlock: not victim.is_alive() or rwlock.waiters)
        status = victim.wait()
        assert go_on(rwlock, page, 0) == go_on(rwlock, page, 1) == []
        assert_free(rwlock)
        if not status:
            break
        assert status == -signal.SIGKILL
    assert number > 4, f"only {number - 1} operations"


@pytest.mark.parametrize("how", INSIDE)
def test_nothing_is_torn_while_readers_and_writers_are_killed_again_and_again(how: str) -> None:
    rwlock, page = shlock.RWLock(on_abandoned="ignore"), Page()
    A, B, OVER = 20, 21, 22

    def write_on() -> None:
        while not page[OVER]:
            with rwlock.write():
                page[A] = (page[B] or page[A]) + 1  # in order again, whatever a dead one left
                page[B] = page[A]

    def read_on() -> int:
        count = 0
        while not page[OVER]:
            with rwlock.read(PATIENCE):
                assert rwlock.abandoned is not None or page[A] == page[B]
                count += 1
        return count

    others: list[Child] = [Child(read_on), Child(read_on), Child(write_on)]
    for _ in range(40):
        before = page[B]
        victim: Any = Child(write_on if how == "write" else read_on)
        eventually(lambda before=before: page[B] > before + 3)
        victim.kill()
    page[OVER] = 1
    assert all(child.result() > 10 for child in others[:2])
    others[2].result()
    with rwlock.write(PATIENCE):
        pass
    assert_free(rwlock)
