"""Turns: a process that was chosen has the lock to itself for a while, then it goes to the end of the line.

That nobody is lost by it is shown by the schedules, in which processes give way all the time, and by the model; what it is good
for by ``python -m benchmarks --only contended fairness``.  Here is who gives way, and when one that naps believes its eyes.
"""

from __future__ import annotations

from typing import Any

import pytest
from support import PATIENCE, Child, Page, eventually

import shlock
from shlock import _layout as at
from shlock import _owned, _parking, _process
from shlock._owned import LONGEST_RALLY, LONGEST_RALLY_IN_TURN, LONGEST_RESPECT, LOOKS_AT_A_GAP, RALLY, SYSTEM, TURN


@pytest.fixture(params=[shlock.Lock, shlock.RLock])
def lock(request: pytest.FixtureRequest) -> Any:
    return request.param()


class Clock:
    """Stands still until it is told to go on; ns."""

    now = 10**15

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(SYSTEM, "monotonic_ns", clock)
    return clock


def is_marked(lock: Any) -> bool:
    """Whether somebody has set PARKED, and is about to sleep."""
    return bool(lock._words.view[lock._block.word] & at.PARKED)


class Waiter(Child):
    """A process that waits for a lock that is held, takes it once, and gives it back."""

    def __init__(self, lock: Any) -> None:
        def take() -> None:
            assert lock.acquire(timeout=PATIENCE)
            lock.release()

        super().__init__(take)
        eventually(lambda: is_marked(lock))


# -- who gives way ----------------------------------------------------------------------------------------------------------


def test_who_hands_it_over_gives_way_for_some_turns(lock: Any, clock: Clock) -> None:
    words = lock._words
    lock.acquire()
    assert not words._gives_way()
    waiter = Waiter(lock)  # by its own clock, it has waited since long ago
    words.turn = clock.now
    clock.now = 10**17  # the turn is over
    lock.release()
    waiter.result()
    assert words.has_had_turn
    words.turn = clock.now - LONGEST_RESPECT * TURN + 1
    assert words._gives_way()
    clock.now += 1
    assert not words._gives_way()


def test_who_is_chosen_begins_a_turn_and_gives_way_no_more(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", PATIENCE)
    words, page = lock._words, Page()

    def hold() -> None:
        with lock:
            page[0] = 1
            eventually(lambda: is_marked(lock))

    holder = Child(hold)
    eventually(lambda: page[0])
    words.has_had_turn, words.rally = True, LONGEST_RALLY
    before = words.turn = SYSTEM.monotonic_ns()
    assert lock.acquire(timeout=PATIENCE)
    assert (words.has_had_turn, words.rally) == (False, 0)
    assert words.turn > before
    assert not words._gives_way()
    lock.release()
    holder.result()


def test_two_that_take_it_from_each_other_at_every_passage_give_way(lock: Any, clock: Clock) -> None:
    words = lock._words
    for _ in range(LONGEST_RALLY):
        assert not words._gives_way()
        clock.now += RALLY - 1
        words._count_rally()
    words._count_rally()
    assert words._gives_way()
    clock.now += RALLY
    words._count_rally()
    assert not words._gives_way()


def test_who_is_in_its_turn_puts_up_with_more(lock: Any, clock: Clock) -> None:
    words = lock._words
    words.turn, words.looked = clock.now, clock.now
    for _ in range(LONGEST_RALLY_IN_TURN):
        assert not words._gives_way()
        words._count_rally()
    assert words._gives_way()


def test_a_bias_that_is_revoked_after_a_turn_counts_as_handed_over(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from shlock import _bias

    if not _bias.is_possible():
        pytest.skip("nothing is biased here")
    monkeypatch.setattr(_bias, "_chosen", "always")
    words = lock._words
    for is_over in (True, False):
        words.limit = words.credit.cell_contents = 0
        with lock:
            pass
        assert words.door is not None
        words.turn = SYSTEM.monotonic_ns() - TURN if is_over else 1 << 62
        Child(lambda: lock.acquire() and lock.release()).result()
        monkeypatch.setattr(_bias, "_chosen", "never")
        with lock:
            pass
        monkeypatch.setattr(_bias, "_chosen", "always")
        assert words.has_had_turn == is_over


def test_where_there_is_precedence_and_where_there_are_permits_nobody_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    permits, ranked = shlock.Semaphore(2, owned=True)._words, shlock.Lock()._words
    for words in (permits, ranked):
        words.rally, words.has_had_turn, words.turn = LONGEST_RALLY_IN_TURN, True, SYSTEM.monotonic_ns()
    assert ranked._gives_way()
    monkeypatch.setattr(_owned.OwnedWords, "is_ranked", lambda self: True)
    assert not ranked._gives_way()
    assert not permits._gives_way()


def test_who_has_polled_gives_way_no_more(lock: Any) -> None:
    """Whom it relies on may have been chosen by a process that died before it called it."""
    waiter = _owned._take_waiter(lock._words, False)
    waiter.gives_way = True
    waiter.poll(None)
    assert not waiter.gives_way


def test_who_wakes_somebody_in_its_turn_lends_it_the_processor(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", PATIENCE)  # else it may come just before it is called
    lent = []
    monkeypatch.setattr(SYSTEM, "yield_processor", lambda: lent.append(1))
    for turn, expected in ((SYSTEM.monotonic_ns() + 3600 * 10**9, 1), (0, 0)):
        lent.clear()
        lock.acquire()
        waiter = Waiter(lock)
        lock._words.turn = turn
        lock.release()
        waiter.result()
        assert len(lent) == expected
    lock.acquire()
    lock.release()
    assert lent == []


# -- looking at a gap -------------------------------------------------------------------------------------------------------


class Flicker:
    """What a thread reads of a word, look by look; the last one stays."""

    def __init__(self, view: memoryview, place: int, looks: list[int]) -> None:
        self.view, self.place, self.looks = view, place, looks

    def __getitem__(self, place: int) -> int:
        if place != self.place:
            return self.view[place]
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


HELD = _process.make_word(4711, 1)
FREE = 0


@pytest.mark.parametrize(
    ("seen", "gets_in"),
    [
        ([HELD], False),
        ([FREE], True),
        ([FREE] * (LOOKS_AT_A_GAP - 1) + [HELD], False),
        ([FREE] * LOOKS_AT_A_GAP + [HELD], True),
        ([HELD, FREE], False),
    ],
    ids=["held", "free", "a gap", "free for long enough", "released just now"],
)
def test_who_has_napped_goes_in_only_where_nobody_comes_and_goes(lock: Any, seen: list[int], gets_in: bool) -> None:
    words = lock._words
    view, place = words.view, lock._block.word
    waiter = _owned._take_waiter(words, False)
    words.view = Flicker(view, place, list(seen))
    try:
        assert waiter.look(LOOKS_AT_A_GAP, at.PARKED, patient=True) is gets_in
    finally:
        words.view = view
    assert view[place] == (_process.current.word | at.PARKED if gets_in else FREE)
    if gets_in:
        view[place] = FREE


def test_who_may_look_once_only_takes_what_is_free(lock: Any) -> None:
    waiter = _owned._take_waiter(lock._words, False)
    assert waiter.look(1, patient=True)
    lock._words.view[lock._block.word] = FREE
