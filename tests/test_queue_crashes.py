"""A process that uses a Queue is killed at every step; no item is lost or doubled, and everybody else goes on.

Every item has a number and a checksum.  The larger ones do not fit into a chunk two by two, so that chunks are taken and
given back all the time.  What the victim did it notes in shared memory, so what the others must see follows from where it died.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import zlib
from collections import Counter
from collections.abc import Callable
from queue import Empty
from typing import Any

import pytest
from support import PATIENCE, Child, DieAtLabel, Page, eventually
from test_queue import LARGE, assert_sound, drain, fail, settle

import shlock
from shlock import _sys

WRITTEN, SENT, CHUNKS = "C30 bytes written", "C31 TAIL stored", "C32 chunks taken, link written"
READ, GONE = "C33 bytes read", "C34 HEAD stored"
LEAVING = ("C35 HEAD stored, chunks USED", "C35 chunks LEFT, INTENT closed")
TAKING, FILLED, MOVED, CLEARED = "C40 TAKING set", "C41 slot filled", "C42 HEAD moved", "C43 TAKING cleared"
AGAIN, EMPTIED, BURIED, BACK = "C44 taken once more", "C45 slot emptied", "C46 put among the letters", "C47 given back"
INSIDE = "inside the block"  # not of the source: while the item is being worked on

PUTTING = (WRITTEN, SENT, CHUNKS)
GETTING = (READ, GONE, *LEAVING)
TAKEN = (TAKING, READ, FILLED, MOVED, GONE, *LEAVING, CLEARED)

#: At which of the source's labels a process is killed here.
LABELS = {*PUTTING, *GETTING, *TAKEN, AGAIN, EMPTIED, BURIED, BACK}

PEERS = pytest.mark.parametrize("peers", [0, 1, 3])
ITEMS = 24
SIZES = pytest.mark.parametrize("size", [None, 1_100_000])

soak = [pytest.mark.soak, pytest.mark.patience(900)]


def item(number: int, length: int | None = None) -> tuple[int, bytes, int]:
    body = number.to_bytes(4, "big") * ((LARGE if length is None else length) // 4)
    return number, body, zlib.crc32(body)


def number_of(item: tuple[int, bytes, int]) -> int:
    number, body, checksum = item
    assert zlib.crc32(body) == checksum, "torn"
    assert body[:4] in (b"", number.to_bytes(4, "big"))
    return number


def die_at(label: str, times: int, operation: Callable[[], Any]) -> None:
    _sys.crash_points[:] = [DieAtLabel(label, times).label]
    operation()


def killed(label: str, times: int, operation: Callable[[], Any]) -> Child:
    return Child(die_at, label, times, operation)


def assert_killed(child: Child) -> None:
    status = child.wait()
    assert status == -signal.SIGKILL, f"it never came to the place where it was to die: {status or child.result()}"


# -- putting --------------------------------------------------------------------------------------------------------------


@SIZES
@PEERS
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("label", PUTTING)
def test_an_item_is_there_or_not_when_its_producer_is_killed_at(label: str, times: int, peers: int, size: int | None) -> None:
    queue, page = shlock.Queue(size=size), Page(4)

    def put() -> None:
        for number in range(10):
            queue.put(item(number), timeout=PATIENCE)
            page[0] = number + 1

    def consume() -> list[int]:
        found = []
        while (number := number_of(queue.get(timeout=PATIENCE))) < 1000:
            found.append(number)
        return found

    def produce() -> None:
        for number in range(100, 105):
            queue.put(item(number), timeout=PATIENCE)

    consumers = [Child(consume) for _ in range(peers)]
    assert_killed(killed(label, times, put))
    producers = [Child(produce) for _ in range(min(peers, 1))] or [None]
    if producers == [None]:
        found = drain_numbers(queue) if size else []
        produce() if not size else [queue.put(item(number, 8), timeout=PATIENCE) for number in range(100, 105)]
    else:
        found = []
        for producer in producers:
            producer.result()
    for _ in range(peers):
        queue.put(item(1000), timeout=PATIENCE)
    for consumer in consumers:
        found += consumer.result()
    found += drain_numbers(queue)
    confirmed = page[0] + (label == SENT)
    assert sorted(found) == [*range(confirmed), *range(100, 105)]
    settle(queue)
    assert_sound(queue)


def drain_numbers(queue: Any) -> list[int]:
    return [number_of(found) for found in drain(queue)]


@PEERS
@pytest.mark.parametrize("label", PUTTING)
def test_of_many_that_are_put_a_prefix_is_there_when_their_producer_is_killed_at(label: str, peers: int) -> None:
    queue = shlock.Queue()
    numbers = range(9)
    consumers = [Child(lambda: number_of(queue.get(timeout=PATIENCE))) for _ in range(peers)]
    assert_killed(killed(label, 1 if label != CHUNKS else 3, lambda: queue.put_many(map(item, numbers))))
    before = drain_numbers(queue) if not peers else []
    queue.put_many(item(number, 8) for number in range(100, 100 + peers))
    found = [*before, *(consumer.result() for consumer in consumers), *drain_numbers(queue)]
    prefix = sorted(number for number in found if number < 100)
    assert prefix == list(range(len(prefix)))
    assert len(prefix) == 9 or label != SENT
    assert sorted(number for number in found if number >= 100) == list(range(100, 100 + peers))
    settle(queue)
    assert_sound(queue)


@pytest.mark.parametrize("label", PUTTING)
def test_putters_that_wait_for_room_go_on_when_one_of_them_is_killed_at(label: str) -> None:
    queue = shlock.Queue(2)
    queue.put_many(map(item, range(2)))
    victim = killed(label, 1, lambda: queue.put(item(2), timeout=PATIENCE))
    eventually(lambda: len(queue.waiters) == 1)
    others = [Child(queue.put, item(number), True, PATIENCE) for number in (3, 4)]
    eventually(lambda: len(queue.waiters) == 3)
    found = []

    def get_until_all_are_over() -> bool:
        found.extend(drain_numbers(queue))
        return not any(child.is_alive() for child in (victim, *others))

    eventually(get_until_all_are_over)
    assert_killed(victim)
    for other in others:
        other.result()
    found += drain_numbers(queue)
    assert sorted(found) == sorted([0, 1, 3, 4] + [2] * (label == SENT))


# -- getting --------------------------------------------------------------------------------------------------------------


def getter(queue: shlock.Queue, page: Page, many: bool) -> Callable[[], list[int]]:
    """Gets until there is an item that says no; notes what it has."""

    def get() -> list[int]:
        found: list[int] = []
        while True:
            got = queue.get_many(2, timeout=PATIENCE) if many else [queue.get(timeout=PATIENCE)]
            for number in map(number_of, got):
                if number >= 1000:
                    return found
                page[number] = os.getpid()
                found.append(number)

    return get


@PEERS
@pytest.mark.parametrize("many", [False, True], ids=["get", "get_many"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("label", GETTING)
def test_only_what_a_consumer_had_got_is_gone_when_it_is_killed_at(label: str, times: int, many: bool, peers: int) -> None:
    queue, page = shlock.Queue(), Page(ITEMS)
    get = getter(queue, page, many)
    victim = killed(label, times, get)
    others = [Child(getter(queue, page, False)) for _ in range(peers)]
    eventually(lambda: len(queue.waiters) == 1 + peers)
    for number in range(ITEMS):
        queue.put(item(number))
        if peers:  # everybody has his turn
            eventually(lambda number=number: queue.empty() or not victim.is_alive())
    eventually(lambda: not victim.is_alive() or (peers and queue.empty()))
    for number in range(100):  # until the victim, who waits among others, has had enough of them
        if not victim.is_alive():
            break
        queue.put(item(number % ITEMS, 8))
        eventually(lambda: queue.empty() or not victim.is_alive())
    assert_killed(victim)
    for _ in others:
        queue.put(item(1000, 8))
    found = Counter(number for other in others for number in other.result())
    rest = Counter(drain_numbers(queue))
    if number == 0:  # none of them was put again
        by_victim = Counter(number for number in range(ITEMS) if page[number] == victim.pid)
        total = found + rest + by_victim
        assert max(total.values()) == 1, "an item was got twice"
        missing = ITEMS - total.total()
        if label == READ:  # the message that it was reading is there; one that the same call had got before is gone
            assert missing <= (1 if many and times == 2 else 0)
        else:
            assert 1 <= missing <= (2 if many else 1)
    settle(queue)
    assert_sound(queue)


@pytest.mark.parametrize("label", GETTING)
def test_no_item_but_one_is_lost_and_none_comes_twice_when_consumers_die_one_after_the_other_at(label: str) -> None:
    queue, page = shlock.Queue(), Page(ITEMS)
    for number in range(ITEMS):
        queue.put(item(number))
    deaths = 5
    for times in range(1, deaths + 1):
        assert_killed(killed(label, 1 + times % 2, getter(queue, page, False)))
    by_victims = {number for number in range(ITEMS) if page[number]}
    rest = drain_numbers(queue)
    assert not by_victims & set(rest)
    assert len(rest) == len(set(rest))
    assert len(by_victims) + len(rest) == ITEMS - (0 if label == READ else deaths)
    settle(queue)
    assert_sound(queue)


# -- taking ---------------------------------------------------------------------------------------------------------------

Books = dict[int, list[int]]
"""Of each item, with which delivery counts it was handed out."""


def deliveries_of(number: int, books: list[Books]) -> list[int]:
    return sorted(count for book in books for count in book.get(number, []))


def taker(queue: shlock.JoinableQueue, victims: Page | None = None) -> Callable[[], Books]:
    """Works on items until there is one that says no."""

    def take() -> Books:
        books: Books = {}
        while True:
            taken = queue.take(timeout=PATIENCE)
            with taken as found:
                number = number_of(found)
                if victims is not None:
                    victims[number] = taken.deliveries
                books.setdefault(number, []).append(taken.deliveries)
                if _sys.crash_points:
                    _sys.crash_points[0](INSIDE)
            if victims is not None:
                victims[number] |= 1 << 32  # acknowledged
            if number >= 1000:
                return books

    return take


@SIZES
@PEERS
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("label", [*TAKEN, INSIDE, EMPTIED])
def test_each_item_is_worked_on_and_counted_when_one_that_takes_is_killed_at(
    label: str, times: int, peers: int, size: int | None
) -> None:
    queue, page = shlock.JoinableQueue(size=size), Page(2000)
    count = 3 if size else 12

    def feed() -> None:
        for number in range(count):
            queue.put(item(number), timeout=PATIENCE)

    # Alone first, so that it surely comes to its end.
    feeder = Child(feed)
    victim = killed(label, times, taker(queue, page))
    assert_killed(victim)
    others = [Child(taker(queue)) for _ in range(peers)]
    feeder.result()
    for _ in range(max(1, peers)):
        queue.put(item(1000, 8), timeout=PATIENCE)
    books: list[Books] = [other.result() for other in others] or [taker(queue)()]
    handed_out = {number: page[number] & 0xFFFF for number in range(count) if page[number]}
    acknowledged = {number for number in handed_out if page[number] >> 32}
    seen = Counter(number for book in books for number in book if number < 1000)
    in_hand = len(acknowledged)
    assert acknowledged == set(range(in_hand))
    if label == EMPTIED:
        acknowledged.add(in_hand)
    assert set(seen) == set(range(count)) - acknowledged, "an item was lost, or came again"
    assert set(seen.values()) == {1}
    for book in books:
        for number, deliveries in book.items():
            before = 1 if number == in_hand and label in (MOVED, GONE, *LEAVING, CLEARED, INSIDE) else 0
            assert deliveries == [1 + before], (number, deliveries)
    queue.join()
    with pytest.raises(ValueError, match="too many"):
        queue.task_done()
    assert_sound_soon(queue)


def assert_sound_soon(queue: shlock.Queue) -> None:
    """After the locks of the dead were looked at by somebody."""
    settle(queue)

    def use_all_slots() -> bool:
        slots = queue._slots
        for index in range(len(slots.view[slots._word])):
            lock = slots.slot(index).lock
            if lock.acquire(False):
                lock.release()
            elif lock.owner is not None:
                return False
        return True

    eventually(use_all_slots)
    if isinstance(queue, shlock.JoinableQueue):
        for _ in range(3):
            queue.task_done()
    assert_sound(queue)


@PEERS
@pytest.mark.parametrize("label", [AGAIN, INSIDE, EMPTIED])
def test_an_item_that_came_back_is_counted_right_when_its_next_holder_is_killed_at(label: str, peers: int) -> None:
    queue, page = shlock.JoinableQueue(), Page(2000)
    queue.put(item(0))
    fail(queue)
    others = [Child(taker(queue)) for _ in range(peers if label == EMPTIED else 0)]
    eventually(lambda: len(queue.waiters) == len(others) or queue.empty())
    if others:  # one of them has it: it is not the victim's
        for _ in others:
            queue.put(item(1000, 8))
        assert deliveries_of(0, [other.result() for other in others]) == [2]
        queue.put(item(0))
        fail(queue)
    assert_killed(killed(label, 1, taker(queue, page)))
    others = [Child(taker(queue)) for _ in range(peers)]
    for _ in range(max(1, peers)):
        queue.put(item(1000, 8))
    books = [other.result() for other in others] or [taker(queue)()]
    seen = deliveries_of(0, books)
    assert seen == ([] if label == EMPTIED else [3])
    queue.join()
    assert_sound_soon(queue)


@PEERS
def test_an_item_comes_back_once_when_its_holder_is_killed_after_giving_it_back(peers: int) -> None:
    queue = shlock.JoinableQueue()
    queue.put(item(0))
    others = []
    assert_killed(killed(BACK, 1, lambda: fail(queue)))
    others = [Child(taker(queue)) for _ in range(peers)]
    for _ in range(max(1, peers)):
        queue.put(item(1000, 8))
    books = [other.result() for other in others] or [taker(queue)()]
    assert deliveries_of(0, books) == [2]
    queue.join()
    assert_sound_soon(queue)


@PEERS
@pytest.mark.parametrize("label", [BURIED, EMPTIED])
def test_a_dead_letter_is_there_once_or_twice_when_who_buries_it_is_killed_at(label: str, peers: int) -> None:
    queue = shlock.JoinableQueue(max_deliveries=1)
    queue.put(item(0))
    queue.put(item(1))
    fail(queue)
    assert_killed(killed(label, 1, lambda: queue.get(False)))
    others = [Child(taker(queue)) for _ in range(peers)]
    for _ in range(max(1, peers)):
        queue.put(item(1000, 8))
    books = [other.result() for other in others] or [taker(queue)()]
    assert deliveries_of(0, books) == [], "it was handed out too often"
    assert deliveries_of(1, books) == [1]
    eventually(lambda: drained(queue))
    assert drain_numbers(queue.dead_letters) == [0] * (2 if label == BURIED else 1)
    queue.join()
    assert_sound_soon(queue)


def drained(queue: shlock.Queue) -> bool:
    """Whether nothing is kept for anybody; looks for it as a consumer does."""
    with contextlib.suppress(Empty):
        raise AssertionError(f"{queue.get(False)} is left")
    return queue.qsize() == 0


@pytest.mark.parametrize("how", ["get", "take"])
def test_sleeping_consumers_get_what_a_dead_one_held(how: str) -> None:
    queue, page = shlock.JoinableQueue(), Page(4)
    queue.put_many(map(item, range(3)))

    def hold() -> None:
        held = [queue.take() for _ in range(3)]
        for taken in held:
            taken.__enter__()
        page[0] = 1
        signal.pause()

    def consume() -> int:
        if how == "get":
            return number_of(queue.get(timeout=PATIENCE))
        taken = queue.take(timeout=PATIENCE)
        with taken as found:
            assert taken.deliveries == 2
            return number_of(found)

    holder = Child(hold)
    eventually(lambda: page[0])
    consumers = [Child(consume) for _ in range(3)]
    eventually(lambda: len(queue.waiters) == 3)
    holder.kill()
    assert sorted(consumer.result() for consumer in consumers) == [0, 1, 2]


def test_whoever_joins_goes_on_when_the_last_worker_is_killed_after_its_work() -> None:
    """The item is gone and counted in one step, so that nobody is missing who would count it."""
    queue = shlock.JoinableQueue()
    queue.put(item(0))
    joiner = Child(queue.join)
    eventually(lambda: queue.waiters)
    assert_killed(killed(EMPTIED, 1, taker(queue)))
    joiner.result()


def test_memory_of_large_items_is_given_back_though_their_holders_die() -> None:
    queue = shlock.JoinableQueue()
    for number in range(12):
        queue.put(item(number, 1_000_000))
        label = (EMPTIED, CLEARED, INSIDE)[number % 3]
        assert_killed(killed(label, 1, taker(queue)))
        for _ in range(queue.qsize()):
            with queue.take(timeout=PATIENCE):
                pass
    eventually(lambda: drained(queue))
    queue.join()
    assert_sound_soon(queue)
    taken = os.fstat(queue._memory.arena.segment.fd).st_blocks * 512
    assert taken < 8_000_000


def test_memory_of_items_is_given_back_though_workers_die_before_they_have_done_so() -> None:
    queue = shlock.JoinableQueue()

    def memory() -> int:
        return os.fstat(queue._memory.arena.segment.fd).st_blocks * 512

    for number in range(3):
        queue.put(item(number, 3_000_000))
        assert_killed(killed(EMPTIED, 1, taker(queue)))
    with_rest = memory()

    eventually(lambda: drained(queue) and memory() < with_rest - 2_500_000)
    queue.join()
    assert_sound_soon(queue)


# -- a storm --------------------------------------------------------------------------------------------------------------

STORM = pytest.mark.parametrize("deaths", [200, pytest.param(3000, marks=soak)])
MOST, STINT = 800_000, 200  # items in all, and of one producer


@STORM
@pytest.mark.patience(300)
@pytest.mark.parametrize("maxsize", [0, 5])
def test_the_books_balance_after_a_storm_of_deaths_among_producers_and_workers(deaths: int, maxsize: int) -> None:
    """At least once: what was put is worked on, and nothing comes again after it was acknowledged."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    queue = shlock.JoinableQueue(maxsize)
    # Of each item: whether its put began, whether it ended, its last delivery, whether it was acknowledged.
    begun, put, delivered, done, errors = (Page(MOST) for _ in range(5))
    over, next_number, progress = Page(1), Page(1), Page(2)

    def produce(first: int) -> None:
        lengths = random.Random(first)
        for number in range(first, first + STINT):
            if over[0]:
                return
            length = lengths.choice([0, 8, 400, 5000, LARGE])
            begun[number] = 1
            if lengths.randrange(4):
                queue.put(item(number, length))
            else:
                queue.put_many([item(number, length)], timeout=PATIENCE)
            put[number] = 1
            progress[0] += 1

    def work() -> None:
        while True:
            taken = queue.take(timeout=PATIENCE)
            with taken as found:
                number = number_of(found)
                if number == MOST:
                    return
                if done[number] or taken.deliveries <= delivered[number] or not begun[number]:
                    errors[number] += 1
                delivered[number] = taken.deliveries
                progress[1] += 1
            done[number] = 1

    def producer() -> Child:
        next_number[0] += STINT
        return Child(produce, next_number[0] - STINT)

    producers, workers = [producer() for _ in range(2)], [Child(work) for _ in range(3)]
    for _ in range(deaths):
        assert next_number[0] < MOST - 10 * STINT
        wanted = progress[1] + chance.randrange(1, 12)
        eventually(lambda wanted=wanted: progress[1] >= wanted or not any(map(Child.is_alive, producers)), "progress")
        for index, child in enumerate(producers):
            if not child.is_alive():
                child.result()
                producers[index] = producer()
        group, again = (producers, producer) if chance.randrange(2) else (workers, lambda: Child(work))
        index = chance.randrange(len(group))
        for _ in range(chance.randrange(2000)):  # at any instant
            pass
        group[index].kill()
        group[index] = again()
    over[0] = 1
    for child in producers:
        child.result()
    queue.join()
    for _ in workers:
        queue.put(item(MOST, 8))
    for child in workers:
        child.result()
    confirmed = {number for number in range(MOST) if put[number]}
    seen = {number for number in range(MOST) if delivered[number]}
    assert not any(errors[number] for number in range(MOST)), f"an item came again, or its count was wrong (seed {seed})"
    assert confirmed <= seen, f"lost: {confirmed - seen} (seed {seed})"
    uncertain = seen - confirmed
    assert all(begun[number] for number in uncertain)
    assert len(uncertain) <= deaths
    assert len(seen) > deaths
    queue.join()
    with pytest.raises(ValueError, match="too many"):
        queue.task_done()
    assert drained(queue)
    assert_sound_soon(queue)


@STORM
@pytest.mark.patience(300)
def test_a_storm_among_those_who_get_costs_an_item_for_a_death_at_most(deaths: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    queue = shlock.Queue(20)
    put, got = Page(MOST), Page(MOST)
    next_number, progress, over = Page(1), Page(1), Page(1)

    def produce(first: int) -> None:
        lengths = random.Random(first)
        for number in range(first, first + STINT):
            if over[0]:
                return
            queue.put(item(number, lengths.choice([0, 8, 400, 5000, LARGE])))
            put[number] = 1

    def get() -> None:
        while True:
            number = number_of(queue.get(timeout=PATIENCE))
            if number == MOST:
                return
            got[number] += 1
            progress[0] += 1

    def producer() -> Child:
        next_number[0] += STINT
        return Child(produce, next_number[0] - STINT)

    producers, consumers, killed_consumers = [producer() for _ in range(2)], [Child(get) for _ in range(3)], 0
    for _ in range(deaths):
        assert next_number[0] < MOST - 10 * STINT
        wanted = progress[0] + chance.randrange(1, 12)
        eventually(lambda wanted=wanted: progress[0] >= wanted or not any(map(Child.is_alive, producers)), "progress")
        for index, child in enumerate(producers):
            if not child.is_alive():
                child.result()
                producers[index] = producer()
        for _ in range(chance.randrange(2000)):
            pass
        if chance.randrange(2):
            index = chance.randrange(len(consumers))
            consumers[index].kill()
            consumers[index] = Child(get)
            killed_consumers += 1
        else:
            index = chance.randrange(len(producers))
            producers[index].kill()
            producers[index] = producer()
    over[0] = 1
    for child in producers:
        child.result()
    for _ in consumers:
        queue.put(item(MOST, 8))
    for child in consumers:
        child.result()
    confirmed = {number for number in range(MOST) if put[number]}
    seen = {number for number in range(MOST) if got[number]}
    assert max(got[number] for number in range(MOST)) == 1, f"an item was got twice (seed {seed})"
    assert len(confirmed - seen) <= killed_consumers, f"seed {seed}"
    assert len(seen - confirmed) <= deaths
    assert drained(queue)
    settle(queue)
    assert_sound(queue)
