"""Ten thousand names, a thousand blocked threads: correct at that size.  What it costs, ``benchmarks/scale.py`` measures."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
from support import Child, Page, eventually, forget

import shlock
from shlock import _arena, _names
from shlock import _layout as at
from shlock._parking import MOST_POLLS, POLL_INTERVAL, Spot, parking_of

NAMES = 10_000
PROCESSES = 8
WAITERS = 1000
BYTES_PER_LOCK = 256


def name_of(number: int) -> str:
    return f"lock-{number:05}"


# -- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.patience(120)
def test_ten_thousand_names_are_all_distinct_and_found_by_another_process(domain: str) -> None:
    page = Page(2 * NAMES)

    def create() -> None:
        for number in range(NAMES):
            page[2 * number], page[2 * number + 1] = place_of(shlock.Lock(name_of(number), domain=domain))

    Child(create).result(100)
    created = [(page[2 * number], page[2 * number + 1]) for number in range(NAMES)]
    assert len(set(created)) == NAMES
    attached = [place_of(shlock.Lock(name_of(number), domain=domain)) for number in range(NAMES)]
    assert attached == created
    for arena in _names._domains[domain]:
        number = arena.words.load(at.HEADER_NAMES_USED)
        assert all(_names.name_at(arena, index) is not None for index in indices_of(created, arena))
        assert number == len(indices_of(created, arena))
    assert sum(arena.segment.size for arena in _names._domains[domain]) < BYTES_PER_LOCK * NAMES
    forget(domain)


def place_of(lock: Any) -> tuple[int, int]:
    return lock._block.arena.identity, lock._block.index


def indices_of(places: list[tuple[int, int]], arena: _arena.Arena) -> list[int]:
    return [index for identity, index in places if identity == arena.identity]


def test_a_held_lock_among_many_is_that_one_alone(domain: str) -> None:
    locks = [shlock.Lock(name_of(number), domain=domain) for number in range(NAMES // 5)]
    with locks[1234]:
        assert Child(held_among, domain, len(locks)).result() == [1234]
    assert Child(held_among, domain, len(locks)).result() == []
    del locks
    forget(domain)


def held_among(domain: str, count: int) -> list[int]:
    return [number for number in range(count) if shlock.Lock(name_of(number), domain=domain).locked()]


def test_the_layout_takes_less_than_256_bytes_for_each_lock() -> None:
    """In a full chain of segments; what is the same in each of them included."""
    size = room = 0
    for position in range(4):
        blocks = _names.blocks_at(position)
        size += at.Layout(_arena.SPOTS, _arena.PROCESSES, blocks, blocks * _arena.TEXT_PER_BLOCK).size
        room += blocks * _names.FULL[0] // _names.FULL[1]
    assert room >= NAMES
    assert size / NAMES < BYTES_PER_LOCK


def test_a_full_table_is_searched_to_its_end_and_no_further() -> None:
    """Every row is used: what is not there is not found, and what is there is, wherever its hash puts it."""
    arena = _arena.Arena.create(70, "full")  # more than one stretch
    declaration = _arena.Declaration(at.LOCK)
    names = [f"{number}".encode() for number in range(69)]  # block 0 is never used
    for index, name in enumerate(names):
        arena.words.store(at.HEADER_NAMES_USED, 0)
        assert _names.insert(arena, name, declaration) is not None, index
    assert len({_names.find(arena, name) for name in names} - {None, 0}) == 69
    assert _names.find(arena, b"another") is None
    assert _names.insert(arena, b"another", declaration) is None
    arena.segment.close()


# -- blocked threads ------------------------------------------------------------------------------------------------------


def wait_in_threads(domain: str, count: int, page: Page, row: int) -> None:
    """So many threads wait for the lock, add 1 to a plain number while they have it, and say how often each had it."""
    lock = shlock.Lock("wanted", domain=domain)
    passes = [0] * count

    def wait(number: int) -> None:
        with lock:
            page[0] += 1
            passes[number] += 1

    before = threading.stack_size(256 * 1024)
    threads = [threading.Thread(target=wait, args=(number,)) for number in range(count)]
    threading.stack_size(before)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page[row] = passes.count(1)


@pytest.mark.patience(120)
def test_a_thousand_waiters_of_one_lock_all_get_it_exactly_once(domain: str) -> None:
    page = Page()
    lock = shlock.Lock("wanted", domain=domain)
    with lock:
        share = WAITERS // PROCESSES
        children = [Child(wait_in_threads, domain, share, page, 1 + number) for number in range(PROCESSES)]
        eventually(partial(are_in_line, domain, WAITERS), "all are in line", 60)
        assert len(lock.waiters) == WAITERS
        assert page[0] == 0
    for child in children:
        child.result(60)
    assert page[0] == WAITERS
    assert [page[1 + number] for number in range(PROCESSES)] == [share] * PROCESSES
    assert not lock.waiters
    del lock
    forget(domain)


def are_in_line(domain: str, count: int) -> bool:
    block = shlock.Lock("wanted", domain=domain)._block
    return len(parking_of(block.arena).in_line(block.index)) == count


def test_who_finds_no_spot_is_told_how_many_there_are_and_what_to_do(domain: str) -> None:
    """The 1,025th thread that would block."""
    lock = shlock.Lock("wanted", domain=domain)
    arena = lock._block.arena
    parking = parking_of(arena)
    spots: list[Spot] = [parking._claim() for _ in range(_arena.SPOTS)]
    with lock:
        error = Child(error_of_waiting, domain).result()
    assert error.startswith("SegmentError") and "all 1024 parking spots are taken" in error
    assert "Let fewer threads wait" in error
    spots.pop()  # one is given back
    child = Child(pass_through, domain)
    child.result()
    spots.clear()
    del lock, arena, parking
    forget(domain)


def error_of_waiting(domain: str) -> str:
    try:
        shlock.Lock("wanted", domain=domain).acquire(timeout=10)
    except shlock.SegmentError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def pass_through(domain: str) -> None:
    with shlock.Lock("wanted", domain=domain):
        pass


# -- the line, in long tables and in short ones ---------------------------------------------------------------------------


class Line:
    """Spots of the table as threads would leave them: for a block, in a state, since a moment, with a precedence."""

    def __init__(self, parking: Any, spots: list[tuple[int, int, int, int]]) -> None:
        words, layout = parking.words, parking.layout
        for index, (key, state, since, precedence) in enumerate(spots):
            sequence = (index * 0x9E3779B97F4A7C15 & at.SEQUENCE) | index << at.SEQUENCE_SHIFT & at.SEQUENCE
            words.store(layout.spot(at.SPOT_STATE, index), sequence | key << at.KEY_SHIFT | state)
            words.store(layout.spot(at.SPOT_SINCE, index), since)
            words.store(layout.spot(at.SPOT_PRECEDENCE, index), precedence)
        words.store(at.HEADER_SPOTS_USED, len(spots))
        self.in_line = {}
        for key in {key for key, *_ in spots}:
            found = [(index, spot[1]) for index, spot in enumerate(spots) if spot[0] == key and spot[1] != at.IDLE]
            self.in_line[key] = found


@pytest.fixture
def arena() -> Any:
    arena = _arena.Arena.create(16)
    yield arena
    arena.words.store(at.HEADER_SPOTS_USED, 0)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 300, 1024])
@pytest.mark.parametrize("keys", [1, 3, 200], ids=lambda keys: f"{keys} blocks")
def test_the_line_of_a_block_is_the_same_however_it_is_looked_for(arena: Any, count: int, keys: int) -> None:
    """Keys that have their lowest bits in common are among them, and all three states."""
    parking = parking_of(arena)
    spots = [(n * 7 % keys * 64 + 5, (n * 5 + n // 3) % 3, 10**9 - n * 31 % 1000, n % 4 if n % 2 else 0) for n in range(count)]
    line = Line(parking, spots)
    for key, expected in line.in_line.items():
        assert [(index, state & at.STATE) for index, state in parking._line(key)] == expected
        for wanted in (at.WAITING, at.NOTIFIED):
            assert [index for index, _ in parking._line(key, wanted)] == [index for index, state in expected if state == wanted]
        indices = [index for index, _ in expected]
        assert parking.in_line(key) == indices
        if indices:
            assert parking.first_of(indices) == min(indices, key=parking.turn_of)
    assert parking._line(4) == []
    assert parking._lines() == sum(bool(found) for found in line.in_line.values())


def test_polls_get_rarer_behind_others_and_where_there_are_many_lines(arena: Any) -> None:
    parking = parking_of(arena)
    Line(parking, [(5, at.WAITING, 1000 + number, 0) for number in range(20)])
    spots = [type("", (), {"index": index}) for index in range(20)]
    assert [parking._place_in_line(spot, 5) for spot in spots] == [min((1 + place) ** 2, 100) for place in range(20)]
    few = int(MOST_POLLS * POLL_INTERVAL)
    for lines, intervals in ((few, 1), (4 * few, 4), (1000, 100)):
        Line(parking, [(number, at.WAITING, 1000, 0) for number in range(lines)])
        assert parking._place_in_line(spots[0], 0) == pytest.approx(intervals)
