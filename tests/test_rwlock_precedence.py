"""Precedence and preemption of readers and writers: who is thrown out, who goes first, and what becomes of it when they die.

Everything that holds a lease runs in forked children, as in ``test_enforcement``.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    PATIENCE,
    Child,
    DieAtLabel,
    Page,
    eventually,
    supervisor_of,
)
from test_enforcement import LONG, events
from test_leased_readers import records_of, seen
from test_rwlock import told

import shlock
from shlock import _atomic, _parking, _process, _sys
from shlock import _layout as at
from shlock.errors import ContractDenied, LeaseExpired

INSIDE, OVER, STAYED, COUNT, GO, READY, COME = range(7)  # words of the page
SAW_FREE, GO_ON, TRIED = range(40, 43)
FIRST = 16  # who came, in this order; and what everybody does
ALL = ("read", "write", "preempt")
#: At which of the source's labels a process is killed here.
LABELS = {
    "C63 about to give way",
    "C64 record given back, no spot yet",
    "C68 line let in or left, nobody woken",
    "C69 in line again, not yet looked",
}


def table(domain: str, rank: int, grace: float = 60.0, **options: Any) -> Any:
    options = {"lease": LONG, "operations": ALL, "on_abandoned": "ignore", **options}
    return shlock.RWLock("table", domain=domain, rank=rank, grace=grace, **options)


def waiting(domain: str) -> set[int]:
    return {waiter.pid for waiter in seen(domain).waiters}


def wait_in_line(domain: str, child: Child) -> Child:
    """Until it sleeps, and everybody who comes later is behind it."""
    eventually(lambda: child.pid in waiting(domain) or not child.is_alive(), "it waits")
    assert child.is_alive(), child.result()
    return child


# -- who is thrown out ----------------------------------------------------------------------------------------------------
# What a holder does.  Each says when it is inside; the deaf ones have a short grace, the others one that is never over.


def cooperate(domain: str, page: Page, rank: int, how: str) -> str:
    with getattr(table(domain, rank), how)() as lease:
        page[INSIDE] += 1
        eventually(lambda: lease.terminate_requested or page[OVER], patience=4 * PATIENCE)
        return "asked" if lease.terminate_requested else "let alone"


def raise_(domain: str, page: Page, rank: int, how: str) -> str:
    try:
        with getattr(table(domain, rank, on_terminate="raise"), how)():
            page[INSIDE] += 1
            eventually(lambda: page[OVER], patience=4 * PATIENCE)
    except LeaseExpired:
        return "asked"
    return "let alone"


def be_deaf(domain: str, page: Page, rank: int, how: str) -> str:
    with getattr(table(domain, rank, 0.01), how)():
        page[INSIDE] += 1
        while not page[OVER]:
            pass
    return "let alone"


def stop(domain: str, page: Page, rank: int, how: str) -> str:
    """Is stopped from outside when it is inside."""
    return be_deaf(domain, page, rank, how)


def throw_out(domain: str, page: Page, rank: int, how: str) -> tuple[bool, int | None]:
    rwlock = table(domain, rank)
    try:
        with told(), getattr(rwlock, how)(timeout=0.2 if page[STAYED] else PATIENCE, preempt=True):
            assert rwlock._words.grant.preempting == set()
            return True, None if rwlock.abandoned is None else rwlock.abandoned.pid
    except TimeoutError:
        assert rwlock._words.grant.preempting == set()
        return False, None


@pytest.mark.parametrize("holder", [cooperate, raise_, be_deaf, stop])
@pytest.mark.parametrize(("rank_of_holder", "rank"), [(0, 1), (3, 100), (1, 1), (0, 0), (5, 2)])
@pytest.mark.parametrize(("how_held", "how"), [("write", "write"), ("write", "read"), ("read", "write"), ("read", "read")])
def test_exactly_the_lower_one_that_is_in_the_way_loses(
    domain: str, holder: Callable[..., str], rank_of_holder: int, rank: int, how_held: str, how: str
) -> None:
    page = Page()
    inside = Child(holder, domain, page, rank_of_holder, how_held)
    eventually(lambda: page[INSIDE])
    if holder is stop:
        inside.stop()
    is_in_the_way = how_held == "write" or how == "write"
    loses = is_in_the_way and rank_of_holder < rank
    page[STAYED] = not loses
    got, abandoned = Child(throw_out, domain, page, rank, how).result()
    if not loses:
        assert got == (not is_in_the_way)
        assert inside.is_alive()
        inside.go_on()
        page[OVER] = 1
        assert inside.result() == "let alone"
        assert events(domain, "terminate") == events(domain, "killed") == []
        return
    assert got
    if holder in (cooperate, raise_):
        assert inside.result() == "asked"
        assert abandoned is None
        assert events(domain, "killed") == []
        assert [event["reason"] for event in events(domain, "terminate")] == ["preempted"]
    else:
        assert inside.wait() == -signal.SIGKILL
        assert abandoned == (inside.pid if how_held == "write" else None), "nobody is told of a reader"
        assert [event["reason"] for event in events(domain, "killed")] == ["preempted"]


def test_of_several_readers_those_of_lower_rank_are_thrown_out_and_the_others_waited_for(domain: str) -> None:
    page = Page()
    children = {}
    for count, rank in enumerate((0, 2, 3, 5), 1):
        children[rank] = Child(cooperate, domain, page, rank, "read")
        eventually(lambda count=count: page[INSIDE] == count)
    writer = wait_in_line(domain, Child(throw_out, domain, page, 3, "write"))
    assert (children[0].result(), children[2].result()) == ("asked", "asked")
    assert writer.is_alive()
    page[OVER] = 1
    assert (children[3].result(), children[5].result()) == ("let alone", "let alone")
    assert writer.result() == (True, None)


def test_a_reader_throws_out_the_writer_and_not_the_readers_that_wait_or_read(domain: str) -> None:
    page = Page()
    writer = Child(cooperate, domain, page, 1, "write")
    eventually(lambda: page[INSIDE])
    other = wait_in_line(domain, Child(cooperate, domain, page, 0, "read"))
    reader = Child(throw_out, domain, page, 2, "read")
    assert writer.result() == "asked"
    assert reader.result() == (True, None)
    eventually(lambda: page[INSIDE] == 2)
    page[OVER] = 1
    assert other.result() == "let alone"
    assert [event["pid"] for event in events(domain, "terminate")] == [writer.pid]


def test_who_may_only_read_throws_out_no_readers(domain: str) -> None:
    """Whatever its process says at the supervisor's socket."""
    page = Page()
    reader = Child(cooperate, domain, page, 0, "read")
    eventually(lambda: page[INSIDE])

    def lie() -> None:
        rwlock = table(domain, 5, operations=("read", "preempt"))
        grant = rwlock._words.grant
        for reads in (False, True):
            with grant.preempts():
                grant.ask_for_preemption(reads)

    Child(lie).result()
    assert events(domain, "terminate") == []
    page[OVER] = 1
    assert reader.result() == "let alone"


@pytest.mark.parametrize("how", ["read", "write"])
def test_preempting_has_to_be_allowed(domain: str, how: str) -> None:
    def ask() -> str:
        rwlock = table(domain, 1, operations=("read", "write"))
        with pytest.raises(ContractDenied) as caught:
            getattr(rwlock, how)(preempt=True)
        with getattr(rwlock, how)():
            pass
        return str(caught.value)

    assert "does not allow to preempt, only read, write" in Child(ask).result()
    with pytest.raises(ValueError, match="preempt= needs lease=: without a lease there is no precedence"):
        getattr(shlock.RWLock(), how)(preempt=True)


# -- who goes first -------------------------------------------------------------------------------------------------------


def come(domain: str, page: Page, rank: int, how: str, number: int) -> None:
    """Get in, say so, and leave when told to, or at once."""
    with told(), getattr(table(domain, rank), how)(PATIENCE):
        page[FIRST + page[COUNT]] = number
        page[COUNT] += 1
        eventually(lambda: page[GO], patience=4 * PATIENCE)


def hold(domain: str, page: Page, how: str, rank: int = 0) -> Child:
    child = Child(cooperate, domain, page, rank, how)
    count = page[INSIDE] + 1
    eventually(lambda: page[INSIDE] == count)
    return child


def order(page: Page, count: int) -> list[int]:
    eventually(lambda: page[COUNT] >= count)
    return [page[FIRST + place] for place in range(count)]


def line_up(domain: str, page: Page, *waiters: tuple[str, int]) -> list[Child]:
    return [wait_in_line(domain, Child(come, domain, page, rank, how, number)) for number, (how, rank) in enumerate(waiters, 1)]


def test_writers_go_by_rank_and_then_by_arrival(domain: str) -> None:
    page = Page(64)
    page[GO] = 1
    holder = hold(domain, page, "write")
    ranks = [1, 3, 0, 3, 7, 1, 0]
    children = line_up(domain, page, *(("write", rank) for rank in ranks))
    page[OVER] = 1
    holder.result()
    found = order(page, len(ranks))
    assert found == sorted(range(1, len(ranks) + 1), key=lambda number: (-ranks[number - 1], number))
    for child in children:
        child.result()


@pytest.mark.parametrize(
    ("reader", "writer", "first"), [(1, 5, "writer"), (5, 1, "reader"), (5, 5, "reader"), (0, 0, "reader"), (0, 1, "writer")]
)
@pytest.mark.parametrize("comes_first", ["reader", "writer"])
def test_a_reader_in_line_goes_before_a_writer_that_is_not_better(
    domain: str, comes_first: str, reader: int, writer: int, first: str
) -> None:
    """Among equals as without precedence: the line is let in by the next writer."""
    page = Page(64)
    holder = hold(domain, page, "write", 9)  # so that there is precedence
    waiters = [("read", reader), ("write", writer)]
    number = {"reader": 1, "writer": 2}
    if comes_first == "writer":
        waiters.reverse()
        number = {"reader": 2, "writer": 1}
    children = line_up(domain, page, *waiters)
    page[OVER] = 1
    holder.result()
    assert order(page, 1) == [number[first]]
    page[GO] = 1
    assert order(page, 2)[0] == number[first]
    for child in children:
        child.result()


def test_a_better_reader_goes_in_while_a_writer_waits_for_readers_and_no_other_one_does(domain: str) -> None:
    page = Page(64)
    holder = hold(domain, page, "read")
    children = line_up(domain, page, ("write", 3), ("read", 1), ("read", 3))
    children.append(Child(come, domain, page, 4, "read", 4))
    assert order(page, 1) == [4]
    page[OVER] = page[GO] = 1
    assert order(page, 2) == [4, 1]
    assert sorted(order(page, 4)) == [1, 2, 3, 4]
    for child in (holder, *children):
        child.result()


def test_a_writer_that_waits_for_readers_lets_a_better_one_go_first_and_is_not_asked_to_leave(domain: str) -> None:
    page = Page(64)
    page[GO] = 1
    holder = hold(domain, page, "read", 9)
    at_the_door = line_up(domain, page, ("write", 1))
    eventually(lambda: len(records_of(domain, holder)) == 1)
    better = wait_in_line(domain, Child(throw_out_and_note, domain, page, 5, 2))
    page[OVER] = 1
    assert holder.result() == "let alone"
    assert order(page, 2) == [2, 1]
    for child in (better, *at_the_door):
        child.result()
    assert events(domain, "terminate") == []


def throw_out_and_note(domain: str, page: Page, rank: int, number: int) -> None:
    with told(), table(domain, rank).write(preempt=True):
        page[FIRST + page[COUNT]] = number
        page[COUNT] += 1


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_writer_at_the_door_that_is_stopped_is_not_thrown_out(domain: str, how: str) -> None:
    """It holds nothing yet; whoever preempts waits for it as for one that is as good."""
    page = Page(64)
    page[GO] = page[STAYED] = 1
    holder = hold(domain, page, "read", 9)
    low = line_up(domain, page, ("write", 1))[0]
    low.stop()
    assert Child(throw_out, domain, page, 5, how).result() == (False, None)
    assert events(domain, "terminate") == []
    page[OVER] = 1
    assert holder.result() == "let alone"
    low.go_on()
    low.result()


def test_it_gives_way_once_to_one_that_is_stopped_and_gets_in(domain: str) -> None:
    """Else whoever is stopped would keep it out for good."""
    page = Page(64)
    page[GO] = 1
    holder = hold(domain, page, "read")
    low = line_up(domain, page, ("write", 1))[0]
    low.stop()  # at the door, until the better one sleeps
    better = Child(come, domain, page, 5, "write", 2)
    wait_in_line(domain, better)
    better.stop()
    low.go_on()
    eventually(lambda: seen(domain).owner is None)
    eventually(lambda: (owner := seen(domain).owner) is not None and owner.pid == low.pid)
    page[OVER] = 1
    holder.result()
    assert order(page, 1) == [1]
    low.result()
    better.go_on()
    better.result()
    assert sorted(order(page, 2)) == [1, 2]


# -- a reader in line that sees W free ------------------------------------------------------------------------------------


def record_of(domain: str, child: Child) -> int:
    """The one record that names a process."""
    (record,) = records_of(domain, child)
    return record


def is_left(domain: str, reader: Child) -> bool:
    return record_of(domain, reader) & (at.IN_LINE | at.LEFT) == at.IN_LINE | at.LEFT


def stop_in_line(domain: str, reader: Child) -> Child:
    """So that it does not look whether it was left there, by a poll or because the line was woken."""
    eventually(lambda: any(c & at.IN_LINE for c in records_of(domain, reader)) or not reader.is_alive())
    reader.stop()
    return wait_in_line(domain, reader)


def come_late(domain: str, page: Page, rank: int, number: int) -> None:
    """See W free, from the line, and go in by ourselves only when told to.  TRIED: 1 + whether the first attempt succeeded."""
    exchange, me = _atomic.Operand.compare_exchange, _process.current.word

    def compare_exchange(operand: Any, word: Any, expected: int, desired: int) -> bool:
        if (expected, desired) != (me | at.IN_LINE, me) or page[TRIED]:
            return exchange(operand, word, expected, desired)
        page[SAW_FREE] = 1
        eventually(lambda: page[GO_ON])
        done = exchange(operand, word, expected, desired)
        page[TRIED] = 1 + done
        return done

    _atomic.Operand.compare_exchange = compare_exchange  # type: ignore[method-assign]
    come(domain, page, rank, "read", number)


@pytest.mark.parametrize("rank", [2, 1, 0])
def test_a_reader_that_saw_w_free_does_not_go_in_beside_the_writer_that_took_it_since(domain: str, rank: int) -> None:
    """Whether that one lets it in or leaves it in line."""
    page = Page(64)
    holder = hold(domain, page, "write", 9)
    reader = wait_in_line(domain, Child(come_late, domain, page, rank, 1))
    page[OVER] = 1
    holder.result()
    eventually(lambda: page[SAW_FREE])
    writer = Child(come, domain, page, 1, "write", 2)
    if rank == 0:
        assert order(page, 1) == [2]
        assert is_left(domain, reader)
    else:
        eventually(lambda: writer.pid in waiting(domain), "it waits for the reader, which it has let in")
    page[GO_ON] = 1
    eventually(lambda: page[TRIED])
    assert page[TRIED] == 1, "it went in by itself"
    assert order(page, 1) == [2 if rank == 0 else 1]
    page[GO] = 1
    reader.result()
    writer.result()
    assert seen(domain).state == "free"


def leave_one_in_line(domain: str, page: Page) -> tuple[Child, Child]:
    """A reader of rank 3 in line, which is stopped, and a writer inside that has gone by; both leave at GO."""
    holder = hold(domain, page, "write", 9)
    reader, writer = line_up(domain, page, ("read", 3), ("write", 5))
    stop_in_line(domain, reader)
    page[OVER] = 1
    holder.result()
    assert order(page, 1) == [2]
    assert is_left(domain, reader)
    return reader, writer


def test_who_was_left_in_line_is_let_in_by_the_next_writer(domain: str) -> None:
    page = Page(64)
    reader, writer = leave_one_in_line(domain, page)
    other = wait_in_line(domain, Child(come, domain, page, 3, "write", 3))
    page[GO] = 1
    writer.result()
    word = record_of(domain, reader)
    eventually(lambda: record_of(domain, reader) == word & at.OWNER, "nothing but its process stands there")
    assert page[COUNT] == 1
    reader.go_on()
    assert order(page, 3) == [2, 1, 3]
    reader.result()
    other.result()


def test_who_was_left_in_line_goes_in_when_the_way_is_free(domain: str) -> None:
    page = Page(64)
    reader, writer = leave_one_in_line(domain, page)
    page[GO] = 1
    writer.result()
    reader.go_on()
    reader.result()
    assert order(page, 2) == [2, 1]
    assert (seen(domain).state, seen(domain).waiters) == ("free", ())


def test_who_was_left_in_line_may_give_up(domain: str) -> None:
    page = Page(64)

    def give_up() -> list[int]:
        rwlock, me = table(domain, 3), _process.current.word

        def at_point(label: str) -> None:
            if label == "A6 awake" and page[COME]:
                raise KeyError

        _sys.crash_points[:] = [at_point]
        with pytest.raises(KeyError), rwlock.read():
            pass
        return [c for place, _ in rwlock._words.cells if (c := rwlock._words.view[place]) & at.OWNER == me]

    holder = hold(domain, page, "write", 9)
    reader = stop_in_line(domain, Child(give_up))
    writer = wait_in_line(domain, Child(come, domain, page, 5, "write", 2))
    page[OVER] = 1
    holder.result()
    assert order(page, 1) == [2]
    assert is_left(domain, reader)
    page[COME] = 1
    reader.go_on()
    assert reader.result() == [], "its record is nobody's"
    page[GO] = 1
    writer.result()
    assert (seen(domain).state, seen(domain).waiters) == ("free", ())


def test_a_child_that_is_forked_by_a_reader_in_line_changes_nothing_of_its_record(domain: str) -> None:
    """It goes on where its parent saw that a writer had gone by."""
    page = Page(64)

    def come_and_fork() -> int:
        exchange, me, found = _atomic.Operand.compare_exchange, _process.current.word, []

        def compare_exchange(operand: Any, word: Any, expected: int, desired: int) -> bool:
            if (expected, desired) == (me | at.IN_LINE | at.LEFT, me | at.IN_LINE) and not found:
                found.append(os.fork())
                if not found[0]:
                    try:
                        exchange(operand, word, expected, desired)
                    except _process.Forked:
                        os._exit(0)
                    os._exit(1)
                found.append(os.waitpid(found[0], 0)[1])
            return exchange(operand, word, expected, desired)

        _atomic.Operand.compare_exchange = compare_exchange  # type: ignore[method-assign]
        come(domain, page, 3, "read", 1)
        return found[1]

    holder = hold(domain, page, "write", 9)
    reader = stop_in_line(domain, Child(come_and_fork))
    writer = wait_in_line(domain, Child(come, domain, page, 5, "write", 2))
    page[OVER] = 1
    holder.result()
    assert order(page, 1) == [2]
    reader.go_on()
    eventually(lambda: not is_left(domain, reader))
    page[GO] = 1
    writer.result()
    assert reader.result() == 0
    assert order(page, 2) == [2, 1]


# -- who gives up when it is chosen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["deadline", "exception"])
def test_the_line_is_woken_when_the_chosen_writer_gives_up(domain: str, why: str) -> None:
    """Nobody polls here."""
    page = Page(64)

    def wait_for_ever() -> None:
        _parking.POLL_INTERVAL = 1e6  # type: ignore[misc]
        with table(domain, 1).read():
            page[COUNT] += 1

    def give_up() -> None:
        rwlock = table(domain, 5)
        words = rwlock._words

        def at_point(label: str) -> None:
            if label == "A6 before sleeping" and why == "exception":
                raise KeyError
            if label == "A8 before S is IDLE":
                page[OVER] = 1
                eventually(lambda: at.is_reservation(words.view[words.word]), "it is chosen")

        _sys.crash_points[:] = [at_point]
        timeout, error = (None, KeyError) if why == "exception" else (0.001, TimeoutError)
        with pytest.raises(error), rwlock.write(timeout):
            pass
        page[COME] = 1
        eventually(lambda: page[COUNT], "the reader is in", 2 * PATIENCE)

    holder = hold(domain, page, "write", 9)
    reader = wait_in_line(domain, Child(wait_for_ever))
    writer = Child(give_up)
    eventually(lambda: page[COME])
    eventually(lambda: page[COUNT])
    for child in (holder, writer, reader):
        child.result()
    assert (seen(domain).state, seen(domain).waiters) == ("free", ())


# -- somebody who dies ----------------------------------------------------------------------------------------------------


StopSupervisor = Callable[[], Callable[[], None]]


@pytest.fixture
def stop_supervisor(domain: str) -> Iterator[StopSupervisor]:
    """Stops it, and returns what lets it go on; which is done at the end, whatever came."""
    stopped: list[int] = []

    def go_on() -> None:
        while stopped:
            os.kill(stopped.pop(), signal.SIGCONT)

    def stop_it() -> Callable[[], None]:
        pid = supervisor_of(domain)
        assert pid is not None
        stopped.append(pid)
        os.kill(pid, signal.SIGSTOP)
        return go_on

    yield stop_it
    go_on()


@pytest.mark.parametrize("is_supervised", [True, False])
def test_readers_go_on_when_the_chosen_writer_dies_or_is_stopped(
    domain: str, is_supervised: bool, stop_supervisor: StopSupervisor
) -> None:
    """Nobody else would look whether it comes: readers are no writers, and not in their line."""
    for ending in (Child.kill, Child.stop):
        page = Page(64)
        page[GO] = 1
        holder = hold(domain, page, "write")
        chosen, reader = line_up(domain, page, ("write", 5), ("read", 1))
        chosen.stop()
        go_on = (lambda: None) if is_supervised else stop_supervisor()
        page[OVER] = 1
        holder.result()
        assert page[COUNT] == 0, "somebody slipped in front of the one with the highest rank"
        ending(chosen)
        assert order(page, 1) == [2]
        reader.result()
        go_on()
        if ending is Child.stop:
            chosen.go_on()
            chosen.result()


def die_at(domain: str, page: Page, rank: int, how: str, label: str) -> None:
    _sys.crash_points[:] = [DieAtLabel(label, 1).label]
    rwlock = table(domain, rank)
    page[READY] += 1
    with getattr(rwlock, how)():
        pass
    raise AssertionError(f"never came to {label!r}")


STEPS_OF_WRITER = (
    "C54 W taken, nobody looked for",
    "C55 line let in, not woken",
    "C56 DRAINING set",
    "C57 alone inside",
    "C60 PARKED taken away, first in line known",
    "C63 about to give way",
    "C68 line let in or left, nobody woken",
    "R3 released, nobody woken",
)
STEPS_OF_READER = (
    "C51 in line",
    "C52 inside, reading",
    "C53 record cleared, nobody woken",
    "C65 record taken, no deadline",
    "C66 deadline written",
    "C67 deadline cleared, record not",
)


def test_the_others_go_on_when_a_reader_dies_that_gave_its_record_back(domain: str) -> None:
    """It had looked while the door was open, and then found it closed."""
    page = Page(64)
    holder = Child(come_when_told, domain, page, 1, "write", 1)
    eventually(lambda: page[READY])

    def look_and_die() -> None:
        rwlock = table(domain, 2)

        def at_point(label: str) -> None:
            if label == "C50 record taken":
                page[COME] = 1
                eventually(lambda: rwlock.owner is not None)
            elif label in LABELS:
                os.kill(os.getpid(), signal.SIGKILL)

        _sys.crash_points[:] = [at_point]
        with rwlock.read():
            pass

    assert Child(look_and_die).wait() == -signal.SIGKILL
    holder.result()
    Child(come_when_told, domain, page, 0, "read", 2).result()
    assert order(page, 2) == [1, 2]
    assert seen(domain).state == "free"


@pytest.mark.parametrize("is_supervised", [True, False])
def test_who_was_left_in_line_goes_on_when_that_writer_dies_before_it_is_inside(
    domain: str, is_supervised: bool, stop_supervisor: StopSupervisor
) -> None:
    """It looks for itself, as its wake-up died with that one."""
    page = Page(64)
    page[GO] = 1
    holder = hold(domain, page, "write", 9)
    reader = stop_in_line(domain, line_up(domain, page, ("read", 3))[0])
    victim = wait_in_line(domain, Child(die_at, domain, page, 5, "write", "C68 line let in or left, nobody woken"))
    go_on = (lambda: None) if is_supervised else stop_supervisor()
    page[OVER] = 1
    holder.result()
    assert victim.wait() == -signal.SIGKILL
    assert is_left(domain, reader)
    reader.go_on()
    assert order(page, 1) == [1]
    reader.result()
    go_on()
    Child(come, domain, page, 0, "write", 2).result()
    assert (seen(domain).state, seen(domain).waiters) == ("free", ())


@pytest.mark.parametrize("is_supervised", [True, False])
@pytest.mark.parametrize("label", [None, "C69 in line again, not yet looked"])
def test_the_others_go_on_when_a_reader_dies_that_was_left_in_line(
    domain: str, label: str | None, is_supervised: bool, stop_supervisor: StopSupervisor
) -> None:
    """Asleep, or when it has seen that a writer went by."""
    page = Page(64)
    holder = hold(domain, page, "write", 9)
    victim = stop_in_line(domain, Child(die_at, domain, page, 3, "read", label or "C52 inside, reading"))
    writer = wait_in_line(domain, Child(come, domain, page, 5, "write", 2))
    others = [Child(come_when_told, domain, page, rank, how, 3) for how, rank in (("write", 3), ("write", 4), ("read", 1))]
    eventually(lambda: page[READY] == 1 + len(others))
    go_on = (lambda: None) if is_supervised else stop_supervisor()
    page[OVER] = 1
    holder.result()
    assert order(page, 1) == [2]
    assert is_left(domain, victim)
    if label is None:
        victim.kill()
    else:
        victim.go_on()
    page[GO] = 1
    assert victim.wait() == -signal.SIGKILL
    page[COME] = 1
    for child in (writer, *others):
        child.result()
    go_on()
    Child(come, domain, page, 0, "write", 4).result()
    assert (seen(domain).state, seen(domain).waiters) == ("free", ())
    assert events(domain, "killed") == []


def come_when_told(domain: str, page: Page, rank: int, how: str, number: int) -> None:
    rwlock = table(domain, rank)
    page[READY] += 1
    eventually(lambda: page[COME])
    with told(), getattr(rwlock, how)(PATIENCE):
        page[FIRST + page[COUNT]] = number
        page[COUNT] += 1


@pytest.mark.parametrize("is_supervised", [True, False])
@pytest.mark.parametrize("label", [*STEPS_OF_WRITER, *STEPS_OF_READER])
def test_the_others_go_on_when_one_dies_among_readers_and_writers_with_ranks(
    domain: str, label: str, is_supervised: bool, stop_supervisor: StopSupervisor
) -> None:
    """A writer of rank 3 comes after another one, finds readers in line, waits for one of them, and gives way to a better."""
    page = Page(64)
    holder = hold(domain, page, "write")
    reader = line_up(domain, page, ("read", 3))[0]
    others = [Child(come_when_told, domain, page, rank, how, 2) for how, rank in (("write", 5), ("read", 1))]
    eventually(lambda: page[READY] == len(others))
    victim = Child(die_at, domain, page, 3, "write" if label in STEPS_OF_WRITER else "read", label)
    eventually(lambda: page[READY] == len(others) + 1)
    eventually(lambda: not victim.is_alive() or victim.pid in waiting(domain))
    go_on = (lambda: None) if is_supervised else stop_supervisor()
    page[OVER] = 1
    holder.result()
    assert order(page, 1) == [1]
    page[COME] = 1
    eventually(lambda: not victim.is_alive() or {other.pid for other in others} <= waiting(domain))
    page[GO] = 1
    assert victim.wait() == -signal.SIGKILL
    for child in (reader, *others):
        child.result()
    go_on()
    Child(come, domain, page, 0, "write", 4).result()
    assert (seen(domain).state, seen(domain).waiters) == ("free", ())
    assert events(domain, "killed") == []


# -- at random ------------------------------------------------------------------------------------------------------------

SEATS, CLASH, PROGRESS = 5, 8, 32


def live(domain: str, page: Page, seat: int, seed: int) -> None:
    """Read and write with a rank of our own; preempt now and then, give up, and see that nobody is inside who must not be."""
    chance = random.Random(seed)
    rwlock = table(domain, seat % 3, 0.02 if seat % 2 else 60.0)
    mine = FIRST + seat
    while not page[OVER]:
        how = chance.choice(("read", "read", "write"))
        try:
            with told(), getattr(rwlock, how)(chance.choice((None, 0.0, 0.01, 0.2)), preempt=chance.random() < 0.3) as lease:
                page[mine] = os.getpid() << 1 | (how == "write")
                others = [page[FIRST + other] for other in range(SEATS) if other != seat]
                page[CLASH] += sum(lives(word >> 1) for word in others if word and (how == "write" or word & 1))
                while not lease.terminate_requested and chance.random() < 0.9:
                    pass
                while chance.random() < 0.01:  # not asked to leave, or deaf
                    time.sleep(0.05)
                page[mine] = 0
        except TimeoutError:
            pass
        page[PROGRESS + seat] += 1


def lives(pid: int) -> bool:
    """A word of the page may be that of one who was killed inside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("runs", [8, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.patience(3600)])])
def test_nobody_is_ever_inside_with_a_writer_and_everybody_goes_on_whoever_dies(runs: int, domain: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance, page = random.Random(seed), Page(64)
    children = [Child(live, domain, page, seat, seed + seat) for seat in range(SEATS)]
    for _ in range(runs):
        goals = [page[PROGRESS + seat] + 5 for seat in range(SEATS)]
        for seat, goal in enumerate(goals):
            eventually(lambda seat=seat, goal=goal: page[PROGRESS + seat] >= goal or not children[seat].is_alive())
        children[chance.randrange(SEATS)].kill()
        for seat, child in enumerate(children):
            if not child.is_alive():  # thrown out, perhaps
                assert child.wait() == -signal.SIGKILL, child.result()
                children[seat] = Child(live, domain, page, seat, chance.randrange(1 << 30))
    page[OVER] = 1
    for child in children:
        assert child.wait() in (0, -signal.SIGKILL), child.result()
    assert page[CLASH] == 0
    print(f"preempted: {len(events(domain, 'terminate'))} asked, {len(events(domain, 'killed'))} killed")
    page[GO] = 1
    Child(come, domain, page, 0, "write", 9).result()
    assert (seen(domain).state, seen(domain).waiters) == ("free", ())
