"""Who goes first at one end of a leased Channel: class, then rank, then who came first; and what that leaves to the others.

Who stands in line there waits for the lock of that end.  In what order they went, the messages say: which have arrived from
whom, or who had which.  So one that is lost or comes twice is seen, too.  Of the class "kernel" is here the program of the
supervisor; in ``test_privilege_channels`` the policy decides.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import test_channel
from support import PATIENCE, Child, Page, eventually
from test_enforcement import LONG
from test_precedence import is_marked, let_turns_pass, mark, waiting

from shlock import Channel, _owned
from shlock.supervisor import Supervisor

domain = test_channel.domain  # a fixture

ROUND, TURN, GO, HELD, READY, ROUNDS_OF = range(6)  # words of the page; of ROUNDS_OF one for each number
HOLDER = 255
"""Number of who is inside when the others come."""


# -- the ways in ----------------------------------------------------------------------------------------------------------
# Each sends one message, the number of who sends it, or takes one; which one that was.


def reserve(channel: Channel, number: int) -> int:
    with channel.reserve(1, timeout=PATIENCE) as view:
        view[0] = number
    return number


def send_bytes(channel: Channel, number: int) -> int:
    channel.send_bytes(bytes([number]), timeout=PATIENCE)
    return number


def send_without_a_limit(channel: Channel, number: int) -> int:
    channel.send_bytes(bytes([number]))
    return number


def peek(channel: Channel, number: int) -> int:
    with channel.peek(timeout=PATIENCE) as view:
        return view[0]


def recv_bytes(channel: Channel, number: int) -> int:
    return channel.recv_bytes(timeout=PATIENCE)[0]


def receive_without_a_limit(channel: Channel, number: int) -> int:
    return channel.recv_bytes()[0]


Way = Callable[[Channel, int], int]
SENDING: list[Way] = [reserve, send_bytes, send_without_a_limit]
WAYS: list[Way] = [*SENDING, peek, recv_bytes, receive_without_a_limit]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
in_place = pytest.mark.parametrize("way", [reserve, peek], ids=lambda way: way.__name__)
each_end = pytest.mark.parametrize("privileged", [False, True], ids=["user", "privileged"])

Open = Callable[[int], Channel]
"""How the end at which all this happens is opened with some rank."""


def end_of(domain: str, privileged: bool = False) -> Open:
    return lambda rank: Channel("it", size=10_000, domain=domain, privileged=privileged, lease=LONG, rank=rank)


def lock_of(channel: Channel, way: Way) -> Any:
    """That for which those wait who go in this way."""
    return (channel._out if way in SENDING else channel._in).lock


def come(open_it: Open, page: Page, way: Way, number: int, rank: int = 0, rounds: int = 1, times: int = 1) -> list[int]:
    """In each round wait for our turn to stand in line, and go in, perhaps several times; the messages."""
    channel, messages = open_it(rank), []
    for round_ in range(1, rounds + 1):
        page[ROUNDS_OF + number] = round_
        eventually(lambda round_=round_: page[ROUND] == round_ and page[TURN] == number + 1)
        messages += [way(channel, number) for _ in range(times)]
    return messages


def hold_and_call(
    open_it: Open,
    page: Page,
    way: Way,
    arrivals: list[list[int]],
    times: int = 1,
    before_leaving: Callable[[], None] = lambda: None,
    deaths: int = 0,
) -> list[list[int]]:
    """In each round be inside, have the others stand in line in that order, and leave.

    times   how often each of them goes in
    deaths  how many of them don't

    The messages that come out at the other end, if it is sending, and else nothing: those are what the others have.
    """
    channel, found = open_it(0), []
    other, lock, is_sending = channel.other_end(), lock_of(channel, way), way in SENDING
    for round_, numbers in enumerate(arrivals, 1):
        eventually(lambda: all(page[ROUNDS_OF + number] == round_ for number in numbers), "they are ready")
        count = (len(numbers) - deaths) * times
        page[TURN], page[ROUND] = 0, round_
        if not is_sending:
            other.send_many([bytes([message]) for message in (HOLDER, *range(count))])
        with channel.reserve(1) if is_sending else channel.peek() as view:
            if is_sending:
                view[0] = HOLDER
            assert view[0] == HOLDER
            for place, number in enumerate(numbers, 1):
                page[TURN] = number + 1
                # Marked last: before that it may see the lock free, and go in without a wait.
                eventually(lambda: len(lock.waiters) == place and is_marked(lock), "it waits")
            before_leaving()
        if is_sending:
            messages = [other.recv_bytes(timeout=PATIENCE)[0] for _ in range(count + 1)]
            assert messages.pop(0) == HOLDER
            found.append(messages)
        else:
            eventually(lambda: not channel.qsize(), "they have all")
        eventually(lambda: not lock.waiters and not lock.locked(), "they have left")
        assert not channel.qsize() and not other.qsize(), "a message came twice"
    return found


def went(messages: dict[int, list[int]]) -> list[int]:
    """In what order they were inside, by the messages that each of them had, which were numbered."""
    numbers = {message: number for number, had in messages.items() for message in had}
    assert sorted(message for had in messages.values() for message in had) == list(range(len(numbers))), "one twice, or lost"
    return [numbers[message] for message in sorted(numbers)]


# -- by precedence --------------------------------------------------------------------------------------------------------

RANKS = [3, 0, 2, 2, 0, 7, 3, 0]


@each_end
@each_way
def test_they_go_by_rank_and_then_by_arrival(domain: str, way: Way, privileged: bool) -> None:
    page, open_it, seed = Page(), end_of(domain, privileged), random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    arrivals = [chance.sample(range(len(RANKS)), len(RANKS)) for _ in range(6)]
    children = [Child(come, open_it, page, way, number, rank, len(arrivals)) for number, rank in enumerate(RANKS)]
    found = Child(hold_and_call, open_it, page, way, arrivals).result()
    had = [child.result() for child in children]
    for round_, numbers in enumerate(arrivals):
        order = found[round_] if way in SENDING else went({number: [had[number][round_]] for number in numbers})
        assert order == sorted(numbers, key=lambda number: (-RANKS[number], numbers.index(number))), f"they came as {numbers}"


@each_way
def test_the_class_kernel_goes_before_users_of_any_rank_that_came_before_it(domain: str, way: Way) -> None:
    page, open_it, kernel, ranks = Page(), end_of(domain), 3, [0, 100, 5]

    def be_kernel() -> list[int]:
        with Supervisor(domain):
            channel = open_it(0)
            assert {contract.precedence for contract in channel.contracts} == {"kernel"}
            page[READY] = 1
            messages = come(lambda _: channel, page, way, kernel)
            eventually(lambda: page[GO])  # it is the supervisor of the others
            return messages

    program = Child(be_kernel)
    eventually(lambda: page[READY] or not program.is_alive())
    children = [Child(come, open_it, page, way, number, rank) for number, rank in enumerate(ranks)]
    holder = Child(hold_and_call, open_it, page, way, [[0, 1, 2, kernel]])
    found, had = holder.result(), [child.result() for child in children]
    page[GO] = 1
    had.append(program.result())
    assert (found[0] if way in SENDING else went(dict(enumerate(had)))) == [kernel, 1, 2, 0]


# -- what it leaves to the others -----------------------------------------------------------------------------------------


@in_place
def test_among_equals_nobody_goes_in_twice_while_one_waits_that_was_not_in_yet(domain: str, way: Way) -> None:
    page, open_it, numbers, times = Page(), end_of(domain), [0, 1, 2], 3
    children = [Child(come, open_it, page, way, number, 1, 1, times) for number in numbers]
    found = Child(hold_and_call, open_it, page, way, [numbers], times).result()
    had = [child.result() for child in children]
    order = found[0] if way in SENDING else went(dict(enumerate(had)))
    assert order[: len(numbers)] == numbers
    assert sorted(order) == sorted(numbers * times)


@in_place
def test_who_waits_goes_in_after_the_better_ones_that_come_meanwhile_and_not_later(domain: str, way: Way) -> None:
    """Two better ones take turns: each leaves when the other one waits.  There is no bound but that they have had enough."""
    page, open_it, turns, lower = Page(), end_of(domain), 10, 2

    def alternate(number: int) -> list[int]:
        channel, messages = open_it(1), []
        lock = lock_of(channel, way)
        if way is peek and number == 0:
            channel.other_end().send_many([bytes([message]) for message in range(2 * turns + 1)])
        eventually(lambda: page[TURN] >= number)
        for turn in range(turns):
            with channel.reserve(1) if way is reserve else channel.peek() as view:
                if way is reserve:
                    view[0] = number
                messages.append(view[0])
                if page[TURN] == 0:
                    page[HELD] = 1
                    eventually(lambda: len(lock.waiters) == 1, "the lower one waits")
                    page[TURN] = 1
                is_last = number == 1 and turn == turns - 1
                eventually(lambda: len(lock.waiters) == (1 if is_last else 2) and is_marked(lock))
        return messages

    children = [Child(alternate, number) for number in range(2)]
    eventually(lambda: page[HELD])
    children.append(Child(lambda: [way(open_it(0), lower)]))
    had = [child.result() for child in children]
    left = Child(drain, open_it).result()
    assert (left if way is reserve else went(dict(enumerate(had)))) == [0, 1] * turns + [lower]
    assert way is reserve or left == []


def drain(open_it: Open) -> list[int]:
    """All that was sent at this end, or that is still to be received there."""
    channel, found = open_it(0), []
    for end in (channel, channel.other_end()):
        while end.poll():
            found.append(end.recv_bytes()[0])
    return found


@in_place
def test_without_ranks_who_has_waited_for_a_turn_is_not_overtaken_by_who_is_faster(domain: str, way: Way) -> None:
    page, open_it, number = Page(), end_of(domain), 7

    def hold() -> list[int]:
        _owned.LONGEST_RESERVATION = 1e6  # type: ignore[misc]
        channel = open_it(0)
        lock = lock_of(channel, way)
        if way is peek:
            channel.other_end().send_many([bytes([message]) for message in range(3)])
        with channel.reserve(1) if way is reserve else channel.peek() as view:
            messages = [view[0]]
            page[HELD] = 1
            eventually(lambda: page[GO])
            let_turns_pass(lock)
            mark(lock)
        for _ in range(100):
            with pytest.raises(TimeoutError):
                channel.send_bytes(b"x", timeout=0) if way is reserve else channel.recv_bytes(timeout=0)
        page[TURN] = 1
        return [*messages, way(channel, number + 1)]

    holder = Child(hold)
    eventually(lambda: page[HELD])
    waiter = Child(lambda: way(open_it(0), number))
    eventually(lambda: waiter.pid in waiting(domain))
    waiter.stop()
    page[GO] = 1
    eventually(lambda: page[TURN] or not holder.is_alive())
    waiter.go_on()
    had = waiter.result(), holder.result()
    assert had == ((number, [0, number + 1]) if way is reserve else (1, [0, 2]))
    assert Child(drain, open_it).result() == ([0, number, number + 1] if way is reserve else [])


@each_end
def test_a_line_for_sending_or_receiving_at_one_end_holds_up_nobody_elsewhere(domain: str, privileged: bool) -> None:
    """While somebody is inside and a better one waits, for sending and for receiving alike, at the same end."""
    page = Page()

    def hold() -> int:
        channel = end_of(domain, privileged)(0)
        channel.other_end().send_many([bytes([message]) for message in range(2)])
        channel.send_bytes(b"before")
        with channel.reserve(1) as view, channel.peek() as seen:
            view[0] = HOLDER
            page[HELD] = 1
            eventually(lambda: page[GO])
            return seen[0]

    def elsewhere() -> list[bytes]:
        channel = end_of(domain, not privileged)(0)
        found = [channel.recv_bytes(timeout=PATIENCE)]
        with channel.reserve(1, timeout=PATIENCE) as view:
            view[0] = 2
        channel.send_bytes(bytes([3]), timeout=PATIENCE)
        return found

    holder = Child(hold)
    eventually(lambda: page[HELD])
    waiters = [Child(lambda way=way: way(end_of(domain, privileged)(5), 7)) for way in (reserve, peek)]
    eventually(lambda: {waiter.pid for waiter in waiters} <= waiting(domain))
    assert Child(elsewhere).result() == [b"before"]
    assert holder.is_alive()
    page[GO] = 1
    assert holder.result() == 0
    assert [waiter.result() for waiter in waiters] == [7, 1]
    assert Child(drain, end_of(domain, privileged)).result() == [2, 3, HOLDER, 7]


@in_place
@pytest.mark.parametrize("dies", ["while it waits", "inside"])
def test_the_next_one_goes_in_when_the_best_one_dies_and_its_message_is_not_sent_or_given_back(
    domain: str, way: Way, dies: str
) -> None:
    page, open_it, best = Page(), end_of(domain), 2

    def die() -> None:
        channel = open_it(9)
        page[ROUNDS_OF + best] = 1
        eventually(lambda: page[TURN] == best + 1)
        with channel.reserve(1) if way is reserve else channel.peek() as view:
            if way is reserve:
                view[0] = best
            os.kill(os.getpid(), signal.SIGKILL)

    victim = Child(die)

    def before_leaving() -> None:
        page[READY] = 1
        eventually(lambda: page[GO])

    children = [Child(come, open_it, page, way, number, rank) for number, rank in enumerate([1, 5])]
    holder = Child(hold_and_call, open_it, page, way, [[0, best, 1]], 1, before_leaving, 1)
    eventually(lambda: page[READY] or not holder.is_alive())
    if dies == "while it waits":
        victim.stop()
        victim.kill()
    page[GO] = 1
    found, had = holder.result(), [child.result() for child in children]
    assert victim.wait() == -signal.SIGKILL
    assert (found[0] if way is reserve else went(dict(enumerate(had)))) == [1, 0]
