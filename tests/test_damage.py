"""Random bytes anywhere in a segment: every bounded call works or raises an Exception, and nobody crashes, hangs or is killed.

Each batch runs in a process of its own, whose exit status is checked.  It prints its seed; SHLOCK_TEST_SEED repeats it.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import PATIENCE, Child, forget

import shlock
from shlock import _arena, _process, snapshot
from shlock import _layout as at

SEED = int(os.environ.get("SHLOCK_TEST_SEED", "0")) or secrets.randbits(32)

SHORT = 0.002
"""A timeout, in seconds."""

BOUND = 20.0
"""Seconds that one call may take before it counts as hung; only a hang takes this long."""

ROUNDS = 60

#: Words that mean something, with their flags set at random.
OWNERS = (0, at.OWNER, _process.current.word, _process.make_word(1, 1), _process.make_word(2**22 - 1, 2**37 - 1))


def a_word(numbers: random.Random) -> int:
    kind = numbers.randrange(6)
    if kind == 0:
        return numbers.getrandbits(64)
    if kind == 1:
        return numbers.choice(OWNERS) | numbers.getrandbits(5)
    if kind == 2:
        return numbers.choice((0, 1, 2, 3, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
    if kind == 3:
        return numbers.choice(OWNERS) | numbers.choice((at.TAKEN, at.BIASED, at.REVOKING, at.FLAGS))
    if kind == 4:
        return numbers.getrandbits(numbers.randrange(1, 64))
    return numbers.getrandbits(3) | numbers.randrange(64) << at.KEY_SHIFT | numbers.getrandbits(38) << at.SEQUENCE_SHIFT


def make_all(domain: str | None) -> list[Any]:
    """One primitive of every kind, with names if there is a domain."""

    def named(name: str) -> dict[str, Any]:
        return {} if domain is None else {"name": name, "domain": domain}

    return [
        shlock.Lock(**named("lock")),
        shlock.Lock(**named("poison"), on_abandoned="poison"),
        shlock.RLock(**named("rlock")),
        shlock.Semaphore(2, **named("semaphore")),
        shlock.Semaphore(12, owned=True, **named("owned")),
        shlock.BoundedSemaphore(2, **named("bounded")),
        shlock.Condition(**named("condition")),
        shlock.Event(**named("event")),
        shlock.Barrier(11, **named("barrier")),
    ]


def bounded_calls(primitive: Any) -> Iterator[Callable[[], object]]:
    """Every public operation that must come to an end by itself."""
    yield lambda: repr(primitive)
    yield lambda: primitive.waiters
    for name in ("owner", "owners", "abandoned", "n_waiting", "broken", "parties"):
        if hasattr(type(primitive), name):
            yield lambda name=name: getattr(primitive, name)
    if isinstance(primitive, shlock.Event):
        yield primitive.set
        yield lambda: primitive.wait(SHORT)
        yield primitive.clear
        yield lambda: primitive.wait(SHORT)
        yield primitive.is_set
        return
    if isinstance(primitive, shlock.Barrier):
        yield lambda: primitive.wait(SHORT)
        yield primitive.abort
        yield lambda: primitive.wait(SHORT)
        yield primitive.reset
        return
    yield lambda: primitive.acquire(block=False)
    yield lambda: primitive.acquire(timeout=SHORT)
    yield lambda: primitive.acquire(True, SHORT)
    yield primitive.locked
    if isinstance(primitive, shlock.Condition):
        yield primitive.notify
        yield primitive.notify_all
    if isinstance(primitive, shlock.Semaphore):
        yield primitive.get_value
    yield primitive.release
    yield primitive.release
    yield lambda: primitive.acquire(timeout=SHORT)


class Hung(BaseException):
    """A call took too long."""


def survives(call: Callable[[], object]) -> str:
    """Call it; the name of the Exception that it raised, or ''."""
    begin = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:
        name = type(error).__name__
        str(error)
    else:
        name = ""
    if time.monotonic() - begin > BOUND:
        raise Hung(call)
    return name


def regions(primitive: Any) -> dict[str, range]:
    """Where damage may be done: the words of each table of a primitive's arena, near what is in use."""
    layout, block = primitive._block.arena.layout, primitive._block
    found = {
        "control block": range(block.start, block.start + at.BLOCK_WORDS),
        "cells": range(layout.block(0), layout.block(min(layout.blocks, 40))),
        "spots": range(layout.spot(at.SPOT_STATE, 0), layout.spot(at.SPOT_STATE, 4)),
        "claims": range(layout.spot(at.SPOT_CLAIM, 0), layout.spot(at.SPOT_CLAIM, 8)),
        "since": range(layout.spot(at.SPOT_SINCE, 0), layout.spot(at.SPOT_SINCE, 4)),
        "all spots": range(layout.spot_table, layout.process_table),
        "processes": range(layout.process_table, layout.block_table),
        "counters of the header": range(at.HEADER_SPOTS_USED, at.HEADER_BLOCKS_USED + 1),
        "header": range(at.HEADER_WORDS),
        "everything": range(layout.size // at.WORD),
    }
    if layout.text:
        found["names"] = range(layout.name_table, layout.text_start)
        found["text"] = range(layout.text_start, layout.size // at.WORD)
    return found


def own_arena() -> None:
    """Forget the arena that came from the parent: what is damaged here is nobody else's."""
    from shlock import _anonymous

    _anonymous._own = None


def batch(seed: int, where: str, domain: str | None, rounds: int) -> int:
    """Damage, call, repair, and so on; how many calls raised an Exception."""
    numbers = random.Random(seed)
    own_arena()
    primitives = make_all(domain)
    for primitive in primitives:  # take spots, so that there are semaphores
        if not isinstance(primitive, shlock.Barrier):
            survives(lambda p=primitive: (p.acquire(False), p.acquire(timeout=1e-6)) if hasattr(p, "acquire") else p.wait(1e-6))
    raised = 0
    for _ in range(rounds):
        primitive = numbers.choice(primitives)
        words = primitive._block.arena.words
        good = words.view.tobytes()
        region = regions(primitive)[where]
        for index in numbers.sample(region, min(len(region), numbers.choice((1, 1, 2, 5, 1000)))):
            words.store(index, a_word(numbers))
        for call in bounded_calls(primitive):
            raised += bool(survives(call))
        raised += bool(survives(lambda: shlock.Lock(f"new {numbers.randrange(9)}", domain=domain) if domain else shlock.Lock()))
        if domain is not None:
            raised += bool(survives(lambda: make_all(domain)))
        # What was made of damaged tables may be anything; the tables are put right for the next round.
        words.view[:] = memoryview(good).cast("Q")
    return raised


WHERE = (
    "control block", "cells", "spots", "claims", "since", "all spots", "processes", "counters of the header", "header",
    "everything", "names", "text",
)  # fmt: skip


@pytest.mark.patience(300)
@pytest.mark.parametrize(
    ("kind", "where"),
    [("named", where) for where in WHERE] + [("anonymous", where) for where in WHERE if where not in ("names", "text")],
)
def test_every_bounded_call_survives_random_words_in(kind: str, where: str, domain: str) -> None:
    print(f"SHLOCK_TEST_SEED={SEED}")
    Child(batch, SEED, where, domain if kind == "named" else None, ROUNDS).result(6 * PATIENCE)


@pytest.mark.parametrize("where", ["control block", "spots", "claims", "counters of the header"])
def test_waiters_survive_damage_done_while_they_wait(where: str) -> None:
    """Somebody writes random words all the time while four threads of another process go in and out with timeouts."""
    print(f"SHLOCK_TEST_SEED={SEED}")

    def body() -> None:
        own_arena()
        lock, event = shlock.Lock(), shlock.Event()
        numbers = random.Random(SEED)
        region = regions(lock)[where]
        over = time.monotonic() + 1.0

        def vandal() -> None:
            while time.monotonic() < over:
                lock._block.arena.words.store(numbers.choice(region), a_word(numbers))

        def use() -> None:
            while time.monotonic() < over:
                survives(lambda: lock.acquire(timeout=SHORT))
                survives(lambda: event.wait(SHORT))
                survives(lock.release)

        process = Child(vandal)
        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        process.result()

    Child(body).result()


@pytest.mark.parametrize("flags", range(32))
@pytest.mark.parametrize("owner", ["nobody", "the dead", "this process", "pid 1"])
def test_a_lock_whose_word_has_any_flags_works_or_raises(flags: int, owner: str) -> None:
    dead = Child(lambda: _process.current.word).result()
    word = {"nobody": 0, "the dead": dead, "this process": _process.current.word, "pid 1": _process.make_word(1, 1)}[owner]
    lock = shlock.Lock()
    lock._words.view[lock._block.word] = word | flags
    for call in bounded_calls(lock):
        assert survives(call) in ("", "ValueError")
    # Whoever's it was, in the end it can be had, and given back, again and again.
    survives(lock.release)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert lock.acquire(timeout=PATIENCE)
            lock.release()
    assert not lock.locked()
    words = (0, lock._words.biased)  # of a bias that this process has been granted, or else 0 as well
    assert lock._words.view[lock._block.word] in words, "flags that mean nothing stay, and with them the slow way in"


@pytest.mark.parametrize("target", range(1, 12))
def test_dropping_a_primitive_whose_chain_of_blocks_is_damaged_neither_hangs_nor_spreads(target: int) -> None:
    def body() -> None:
        own_arena()
        semaphore = shlock.Semaphore(60, owned=True)
        arena = semaphore._block.arena
        first = arena.layout.block(semaphore._block.index)
        more = arena.words.load(first + at.BLOCK_MORE)
        value = (more, semaphore._block.index, 2**64 - 1, arena.layout.blocks, 0, 2**24, 200, 201, 202, 1, 2)[target - 1]
        arena.words.store(arena.layout.block(more) + at.EXTENSION_NEXT, value)
        arena.words.store(first + at.BLOCK_MORE, value if target % 2 else more)
        other = shlock.Lock()
        other.acquire()
        del semaphore
        made = [shlock.Lock() for _ in range(3 * arena.layout.blocks)]
        places = {(lock._block.arena.identity, lock._block.index) for lock in made}
        assert len(places) == len(made)
        assert other.locked()
        for lock in made:
            assert lock.acquire(block=False)

    Child(body).result()


SEEN = ("header", "counters of the header", "everything", "names", "control block", "processes", "all spots")


@pytest.mark.parametrize("where", SEEN)
def test_a_snapshot_of_a_damaged_domain_is_bounded_and_shows_the_rest(where: str, domain: str) -> None:
    print(f"SHLOCK_TEST_SEED={SEED}")

    def body() -> None:
        numbers = random.Random(SEED)
        primitives = make_all(domain)
        words = primitives[0]._block.arena.words
        good = words.view.tobytes()
        for _ in range(15):
            region = regions(primitives[0])[where]
            for index in numbers.sample(region, min(len(region), 20)):
                words.store(index, a_word(numbers))
            assert survives(snapshot.domains) == ""
            words.view[:] = memoryview(good).cast("Q")
        (seen,) = [d for d in snapshot.domains() if d.domain == domain]
        assert len(seen.primitives) == len(primitives) + 1  # the Condition's lock

    Child(body).result(3 * PATIENCE)


def test_a_number_of_used_spots_beyond_their_table_is_believed_up_to_its_end_only() -> None:
    """A release takes no word of another table for a waiter, whatever it looks like."""

    def body() -> None:
        own_arena()
        lock = shlock.Lock()
        arena, block = lock._block.arena, lock._block
        lock.acquire()
        likeness = block.index << at.KEY_SHIFT | at.WAITING
        places = [arena.layout.spot(at.SPOT_CLAIM, 5), arena.layout.process_table + 9, arena.layout.block(40)]
        for place in places:
            arena.words.store(place, likeness)
        arena.words.store(at.HEADER_SPOTS_USED, 2**64 - 1)
        arena.words.store(block.word, arena.words.load(block.word) | at.PARKED)
        lock.release()
        assert [arena.words.load(place) for place in places] == [likeness] * len(places)

    Child(body).result()


def test_a_name_is_looked_for_once_through_a_table_that_has_no_free_place(domain: str) -> None:
    """All of it is taken by names of nobody: the name goes into a further segment, and is found there."""

    def body() -> bool:
        arena = shlock.Lock("before", domain=domain)._block.arena
        for index in range(arena.layout.blocks):
            arena.words.store(arena.layout.name_table + index * at.NAME_WORDS + at.NAME_HASH, 2**40 + index)
        lock = shlock.Lock("after", domain=domain)
        return lock._block.arena is not arena and shlock.Lock("after", domain=domain)._block is lock._block

    assert Child(body).result()


#: Number of permits, and the block in which those beyond the first eight are: "itself" is a circle, "end" one too far.
CELLS = [(2**64 - 1, "itself"), (2**40, "itself"), (100_000, "itself"), *((60, n) for n in (0, "end", 2**24, 2**64 - 1))]


@pytest.mark.parametrize(("permits", "more"), CELLS)
def test_a_semaphore_whose_permits_are_nowhere_is_called_damaged(permits: int, more: int | str, domain: str) -> None:
    def body() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # of what a list without a bound takes
        semaphore = shlock.Semaphore(60, "s", owned=True, domain=domain)
        block, text = semaphore._block, pickle.dumps(semaphore)
        words, layout = block.arena.words, block.arena.layout
        first = words.load(block.start + at.BLOCK_MORE)
        words.store(layout.block(first) + at.EXTENSION_NEXT, first)
        words.store(block.start + at.BLOCK_PARAMETER, permits)
        words.store(block.start + at.BLOCK_MORE, {"itself": first, "end": layout.blocks}.get(more, more))  # type: ignore[call-overload]
        (seen,) = [d for d in snapshot.domains() if d.domain == domain]
        assert [primitive.state for primitive in seen.primitives] == ["damaged"]
        del semaphore, block
        forget(domain)
        with pytest.raises(shlock.SegmentError, match="block"):
            pickle.loads(text)

    Child(body).result()


def test_a_barrier_at_which_more_wait_than_it_has_parties_is_called_damaged() -> None:
    barrier = shlock.Barrier(3)
    barrier._block.arena.words.store(barrier._block.word, 4 << at.COUNT_SHIFT)
    for call in (lambda: barrier.n_waiting, lambda: barrier.wait(PATIENCE), barrier.reset):
        with pytest.raises(shlock.SegmentError, match="counts 4 of 3"):
            call()


def test_a_name_beyond_the_text_is_nobody_s(domain: str) -> None:
    def body() -> None:
        block = shlock.Lock("x", domain=domain)._block
        arena = block.arena
        place = arena.layout.name_table + block.index * at.NAME_WORDS + at.NAME_TEXT
        for offset, length in ((arena.layout.text - 1, 2), (arena.layout.text, 1), (0, 0xFFFF), (2**47, 1)):
            arena.words.store(place, offset << 16 | length)
            (seen,) = [d for d in snapshot.domains() if d.domain == domain]
            assert seen.primitives == ()

    Child(body).result()


assert _arena.SPOTS >= 8
