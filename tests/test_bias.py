"""The biased path: the states of `shlock/_bias.py`, and who dies or is interrupted in them.

A lock is biased here by setting its credit to zero: the next release then grants it, and no other one, whatever the mode is.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from schedules import Interruption
from support import PATIENCE, Child, DieAtLabel, Page, eventually, run, watch_steps
from test_fork import ForkEverywhere
from test_signals import InThread, Trial, interrupt_everywhere

import shlock
from shlock import _bias, _biased_path, _fast_path, _parking, _sys, cli
from shlock import _layout as at
from shlock._atomic import Operand

LABELS = (
    "C72 REVOKING",
    "C72 shut, or found INSIDE",
    "C73 an ordinary word",
    "C74 slot claimed",
    "C75 SHUT, no door any more",
)
KINDS = {"Lock": shlock.Lock, "RLock": shlock.RLock}
INSIDE, OVER, COUNT, BROKEN, TOLD, READY = range(6)


def want_it(lock: Any) -> None:
    """Let the next release bias it."""
    words = lock._words
    words.limit, words.credit.cell_contents = min(words.limit, _bias.LARGEST_CREDIT), 0


def bias(lock: Any) -> Any:
    """Have it biased to this process; the lock."""
    for _ in range(3):  # it may still have the door of a bias that was revoked
        want_it(lock)
        with lock:
            pass
    assert is_biased(lock), hex(word_of(lock))
    assert lock._words.door is not None
    return lock


def word_of(lock: Any) -> int:
    word: int = lock._words.view[lock._block.word]
    return word


def is_biased(lock: Any) -> bool:
    return word_of(lock) & at.REVOKED == at.BIASED


def take_and_give_back(lock: Any) -> tuple[bool, int | None]:
    """Whether it was taken, and who had died inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", shlock.AbandonedWarning)
        if not lock.acquire(timeout=PATIENCE):
            return False, None
    abandoned = lock.abandoned
    lock.release()
    return True, None if abandoned is None else abandoned.pid


@pytest.fixture(autouse=True)
def _no_bias_but_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bias, "_chosen", "never")


@pytest.fixture(params=KINDS)
def lock(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


# -- as an ordinary lock --------------------------------------------------------------------------------------------------


def test_a_biased_lock_looks_like_any_other(lock: Any) -> None:
    bias(lock)
    assert (lock.locked(), lock.owner) == (False, None)
    assert "owner=None" in repr(lock) or "None, 0" in repr(lock)
    with lock:
        assert is_biased(lock)
        assert lock.locked()
        assert lock.owner is not None
        assert (lock.owner.pid, lock.owner.alive, lock.owner.since) == (os.getpid(), True, None)
        assert "MainProcess" in repr(lock)
    assert is_biased(lock)
    assert not lock.locked()


def test_nobody_else_gets_what_is_held_by_the_biased_path(lock: Any) -> None:
    bias(lock)
    with lock:
        assert InThread(lambda: lock.acquire(False)).result() is False
        assert word_of(lock) & at.REVOKED == at.REVOKED
        assert Child(lambda: lock.acquire(timeout=0.05)).result() is False
        assert InThread(lambda: lock.acquire(timeout=0.05)).result() is False
    assert word_of(lock) == 0
    assert Child(take_and_give_back, lock).result() == (True, None)


def test_a_waiter_is_woken_by_the_release_of_a_revoked_hold(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 10_000.0)
    bias(lock)
    lock.acquire()
    waiter = Child(take_and_give_back, lock)
    eventually(lambda: lock.waiters)
    lock.release()
    assert waiter.result() == (True, None)


def test_an_rlock_is_recursive_on_the_biased_path() -> None:
    lock = bias(shlock.RLock())
    with lock, lock:
        assert is_biased(lock)
        assert lock._semlock._count() == 2
        with pytest.raises(AssertionError):
            InThread(lock.release).result()
    assert not lock.locked()
    with pytest.raises(AssertionError):
        lock.release()


def test_another_thread_or_process_may_release_a_lock_that_is_held_by_the_biased_path() -> None:
    lock = bias(shlock.Lock())
    lock.acquire()
    InThread(lock.release).result()
    assert not lock.locked()
    bias(lock)
    lock.acquire()
    Child(lock.release).result()
    assert not lock.locked()
    with pytest.raises(ValueError, match="too many times"):
        bias(shlock.Lock()).release()


def test_a_hold_by_the_door_that_another_process_releases_is_no_hold_any_more() -> None:
    """Whoever takes it next in the process that has the door has it by its word: the release must be that of the word, too."""
    lock = bias(shlock.Lock())
    lock.acquire()
    Child(lock.release).result()
    assert lock.acquire(timeout=PATIENCE)
    assert lock._words.door is None
    lock.release()
    assert Child(take_and_give_back, lock).result() == (True, None)
    bias(lock)


def test_who_lost_its_hold_by_the_door_to_another_process_may_release_that_ones() -> None:
    """Anybody may release a Lock: it is the word that says whose hold that is."""
    lock, page = bias(shlock.Lock()), Page()

    def take_over() -> None:
        lock.release()
        lock.acquire()
        page[READY] = 1
        eventually(lambda: page[OVER])

    lock.acquire()
    other = Child(take_over)
    eventually(lambda: page[READY])
    lock.release()
    assert not lock.locked()
    assert lock._words.door is None
    with pytest.raises(ValueError, match="too many times"):
        lock.release()
    page[OVER] = 1
    other.result()


def test_a_signal_handler_that_takes_the_lock_while_its_thread_gives_the_bias_back_leaves_that_to_it(
    lock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the thread would give back what the handler has got meanwhile: a slot with somebody in by its door."""
    give_back = _bias._give_back
    handled: list[bool] = []

    def handle_and_give_back(words: Any, slot: int) -> None:
        if not handled:
            handled.append(True)
            for _ in range(3):
                want_it(lock)
                assert lock.acquire(timeout=PATIENCE)
                lock.release()
        give_back(words, slot)

    bias(lock)
    _bias.revoke(lock._words, word_of(lock))
    monkeypatch.setattr(_bias, "_give_back", handle_and_give_back)
    assert take_and_give_back(lock) == (True, None)
    assert handled
    bias(lock)
    with lock:
        assert is_biased(lock)
        assert lock.owner.pid == os.getpid()
        assert Child(lambda: lock.acquire(False)).result() is False


def test_a_grant_that_is_interrupted_again_and_again_uses_up_no_slot(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(address: int, *, recursive: bool) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_bias, "make_door", interrupt)
        for _ in range(at.BIAS_SLOTS[at.LOCK] + 1):
            lock.acquire()
            want_it(lock)
            with pytest.raises(KeyboardInterrupt):
                lock.release()
            assert not lock.locked()
    bias(lock)


def test_a_bias_is_granted_to_one_thread_at_a_time(lock: Any) -> None:
    """Else the one that comes late with its door takes away the other's, with a thread in by it."""
    words = lock._words
    made, over = threading.Event(), threading.Event()

    class Slow(Operand):
        """Switches threads when the exchange has been made."""

        __slots__ = ()

        def compare_exchange(self, word: Any, expected: int, desired: int) -> bool:
            done = super().compare_exchange(word, expected, desired)
            made.set()
            assert over.wait(PATIENCE)
            return done

    lock.acquire()
    want_it(lock)
    first = InThread(lambda: _bias.grant(words, Slow()))
    assert made.wait(PATIENCE)
    for _ in range(3):
        want_it(lock)
        assert take_and_give_back(lock) == (True, None)
        assert words.door is None
    over.set()
    assert first.result()
    assert take_and_give_back(lock) == (True, None)
    assert Child(take_and_give_back, lock).result() == (True, None)
    bias(lock)


def test_a_condition_waits_with_a_lock_that_is_biased(lock: Any) -> None:
    condition = shlock.Condition(bias(lock))
    with condition:
        assert is_biased(lock)
        waiting = threading.Timer(0.0, lambda: None)
        waiting.start()
        assert condition.wait(timeout=0.01) is False
        assert condition._lock._semlock._is_mine()
    notified = InThread(lambda: _wait(condition))
    eventually(lambda: condition.waiters)
    with condition:
        condition.notify()
    assert notified.result() is True


def _wait(condition: Any) -> bool:
    with condition:
        woken: bool = condition.wait(PATIENCE)
        return woken


def test_all_objects_for_a_lock_share_its_bias(domain: str) -> None:
    first, second = shlock.Lock("a", domain=domain), shlock.Lock("a", domain=domain)
    bias(first)
    with second:
        assert first._words.door._is_mine()
        assert first.acquire(False) is False
    assert not first.locked()


def test_owned_semaphores_are_never_biased() -> None:
    semaphore = shlock.Semaphore(1, owned=True)
    want_it(semaphore)
    for _ in range(3):
        with semaphore:
            pass
    assert not semaphore._words.view[semaphore._words.places[0][0]] & at.REVOKED


# -- when -----------------------------------------------------------------------------------------------------------------

COUNTING = """
import shlock, sys
lock = shlock.Lock()
for n in range(1, 100_000):
    lock.acquire()
    lock.release()
    if lock._words.door is not None:
        break
print(n)
"""


@pytest.mark.parametrize(
    ("mode", "releases"),
    [("always", 1), ("adaptive", _bias.FIRST_CREDIT + 1), ("never", 99_999)],
)
def test_a_lock_is_biased_after_so_many_releases(mode: str, releases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHLOCK_BIAS", mode)
    assert int(run(COUNTING)) == releases


def test_another_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHLOCK_BIAS", "sometimes")
    told = run("try:\n    import shlock\nexcept ImportError as error:\n    print(error)")
    assert "SHLOCK_BIAS='sometimes'" in told


def test_a_bias_that_is_revoked_soon_is_granted_later_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bias, "_chosen", "adaptive")
    lock = shlock.Lock()
    words = lock._words
    words.limit = _bias.FIRST_CREDIT
    for expected in (2, 4, 8):
        monkeypatch.setattr(_bias, "SOON", 1 << 62)
        bias(lock)
        assert Child(take_and_give_back, lock).result() == (True, None)
        take_and_give_back(lock)
        assert words.limit == expected * _bias.FIRST_CREDIT
    for expected in (4, 2, 1, 1):
        monkeypatch.setattr(_bias, "SOON", 0)
        bias(lock)
        assert Child(take_and_give_back, lock).result() == (True, None)
        take_and_give_back(lock)
        assert words.limit == expected * _bias.FIRST_CREDIT


def check_that_nobody_is_biased(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    lock = shlock.Lock()
    want_it(lock)
    for _ in range(3):
        with lock:
            pass
    assert word_of(lock) == 0
    assert lock._words.limit == _bias.NEVER
    assert cli.main(["ps"]) == 0
    assert f"No lock is biased to a process: {reason}" in capsys.readouterr().out


def test_without_membarrier_nobody_is_biased(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_bias, "IS_WEAK", True)
    monkeypatch.setattr(_bias, "_registered", [])
    monkeypatch.setattr(_sys.System, "register_membarrier", lambda system: False)
    check_that_nobody_is_biased("the system call membarrier is missing", capsys)


def test_where_the_c_library_has_no_doors_nobody_is_biased(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_bias, "has_doors", lambda: False)
    check_that_nobody_is_biased("the C library's semaphores are other words", capsys)


def test_who_may_not_call_membarrier_revokes_the_slow_way_and_forbids_the_bias() -> None:
    lock = bias(shlock.Lock())

    def revoke() -> tuple[bool, int | None]:
        _bias.IS_WEAK = True  # type: ignore[misc]
        _sys._membarrier = lambda command: -1  # type: ignore[assignment]
        return take_and_give_back(lock)

    assert Child(revoke).result() == (True, None)
    want_it(lock)
    for _ in range(3):
        with lock:
            pass
    assert word_of(lock) == 0


def test_so_many_processes_as_there_are_slots_have_had_it(domain: str) -> None:
    lock, page = shlock.Lock(), Page()

    def claim(number: int) -> bool:
        eventually(lambda: page[READY] == number)
        for _ in range(2):
            want_it(lock)
            with lock:
                pass
        done = lock._words.door is not None
        page[READY] = number + 1
        eventually(lambda: page[OVER])
        return done

    page[READY] = 0
    children = [Child(claim, number) for number in range(at.BIAS_SLOTS[at.LOCK] + 1)]
    eventually(lambda: page[READY] == at.BIAS_SLOTS[at.LOCK] + 1)
    page[OVER] = 1
    assert [child.result() for child in children] == [True] * at.BIAS_SLOTS[at.LOCK] + [False]
    for child in children:
        child.wait()
    bias(lock)  # they are dead: their slots are free again


def test_an_object_that_is_dropped_leaves_its_slot_to_the_next(domain: str) -> None:
    keep = shlock.Lock("b", domain=domain)  # keeps the arena
    for _ in range(2 * at.BIAS_SLOTS[at.LOCK]):
        bias(shlock.Lock("a", domain=domain))
        gc.collect()
    assert not keep.locked()


# -- death ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("label", LABELS[:3])
def test_a_revocation_goes_on_when_who_began_it_is_killed(label: str, is_inside: bool, lock: Any) -> None:
    bias(lock)
    if is_inside:
        lock.acquire()

    def revoke() -> None:
        step = DieAtLabel(label, 1)
        watch_steps(step, lock)
        lock.acquire(timeout=PATIENCE)

    if label == LABELS[2] and not is_inside:  # then it takes the lock: there is no such step
        assert Child(lock.acquire).result()
    else:
        assert Child(revoke).wait() == -signal.SIGKILL
    if is_inside:
        assert Child(lambda: lock.acquire(timeout=0.05)).result() is False
        lock.release()
    assert Child(take_and_give_back, lock).result()[0]
    assert take_and_give_back(lock)[0]
    assert word_of(lock) in (0, at.PARKED)


def test_who_sleeps_in_the_middle_of_a_revocation_does_no_harm_to_a_later_bias(lock: Any) -> None:
    """The same slot is being revoked again when it wakes up, with the owner inside this time: only the generation differs."""
    page = Page()
    bias(lock)

    def sleep_in_the_middle() -> bool:
        shut = _bias._shut

        def shut_and_sleep(words: Any, slot: int) -> int:
            seen = shut(words, slot)
            if not page[READY]:
                page[READY] = 1
                eventually(lambda: page[OVER])
            return seen

        _bias._shut = shut_and_sleep
        got: bool = lock.acquire(False)
        return got

    def begin_a_revocation() -> None:
        watch_steps(DieAtLabel(LABELS[0], 1), lock)
        lock.acquire()

    sleeper = Child(sleep_in_the_middle)
    eventually(lambda: page[READY])
    slot = lock._words.slot
    bias(lock)
    assert lock._words.slot == slot
    lock.acquire()
    assert Child(begin_a_revocation).wait() == -signal.SIGKILL
    assert word_of(lock) & at.REVOKED == at.REVOKING
    page[OVER] = 1
    assert sleeper.result() is False
    assert lock.owner.pid == os.getpid()
    lock.release()
    assert not lock.locked()


def test_a_process_that_is_killed_when_it_is_about_to_be_granted_the_bias_is_abandoned(lock: Any) -> None:
    def die() -> None:
        watch_steps(DieAtLabel(LABELS[3], 1), lock)
        bias(lock)

    dead = Child(die)
    assert dead.wait() == -signal.SIGKILL
    assert take_and_give_back(lock) == (True, dead.pid)
    assert bias(lock)


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_process_that_is_killed_when_it_gives_its_bias_back_leaves_the_lock_to_the_next(is_inside: bool, lock: Any) -> None:
    """With a hold that was revoked, it dies as if directly before R1."""

    def die() -> None:
        bias(lock)
        if is_inside:
            lock.acquire()
        _bias.revoke(lock._words, word_of(lock))
        watch_steps(DieAtLabel(LABELS[4], 1), lock)
        if is_inside:
            lock.release()
        else:
            lock.acquire()

    dead = Child(die)
    assert dead.wait() == -signal.SIGKILL
    assert take_and_give_back(lock) == (True, dead.pid if is_inside else None)
    bias(lock)


def die_at(place: int, operation: Callable[[], Any]) -> bool:
    """Kill this process at the n-th bytecode of the package in an operation; False if it has less."""
    left = place

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith("_biased_path.py"):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        operation()
    finally:
        sys.settrace(None)
    return False


@pytest.mark.patience(120)
def test_the_next_one_goes_on_whatever_bytecode_of_the_biased_path_its_owner_was_killed_at(lock: Any) -> None:
    page = Page()

    def use(place: int) -> bool:
        bias(lock)

        def operation() -> None:
            lock.acquire()
            page[INSIDE] = 1
            lock.release()
            page[OVER] = 1

        return die_at(place, operation)

    for place in range(1, 1000):
        page[INSIDE] = page[OVER] = 0
        child = Child(use, place)
        status = child.wait()
        got, told = take_and_give_back(lock)
        assert got, f"killed at bytecode {place}"
        if status != -signal.SIGKILL:
            assert told is None
            break
        assert told in (None, child.pid)
        if page[OVER]:
            assert told is None, f"killed at bytecode {place}, after the release"
        assert word_of(lock) in (0, at.PARKED)
    assert place > 30


def test_who_dies_inside_by_the_biased_path_is_told(lock: Any) -> None:
    def die() -> None:
        bias(lock)
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    dead = Child(die)
    assert dead.wait() == -signal.SIGKILL
    assert lock.owner.pid == dead.pid
    assert not lock.owner.alive
    with pytest.warns(shlock.AbandonedWarning, match=str(dead.pid)), lock:
        assert lock.abandoned.pid == dead.pid


# -- interruptions and forks ----------------------------------------------------------------------------------------------


class AcquireByTheDoor(Trial):
    """B1."""

    def __init__(self, kind: str) -> None:
        lock = KINDS[kind]()
        kept = lock.acquire
        self.lock = bias(lock)
        self.acquire = self.which(kept)
        self.got = False

    def which(self, kept: Any) -> Any:
        return self.lock.acquire

    def operate(self) -> None:
        self.got = self.acquire()

    def finish(self, outcome: Interruption) -> None:
        assert self.got or outcome.raised
        assert self.lock._words.inside.cell_contents == self.got
        if self.got:
            assert is_biased(self.lock)
            self.lock.release()
        assert not self.lock.locked()
        assert InThread(lambda: take_and_give_back(self.lock)).result() == (True, None)


class AcquireAsKeptSinceBefore(AcquireByTheDoor):
    """By the function that the lock had before it was biased."""

    def which(self, kept: Any) -> Any:
        return kept


class ReleaseByTheDoor(Trial):
    """B2 to B4."""

    def __init__(self, kind: str) -> None:
        lock = KINDS[kind]()
        kept = lock.release
        self.lock = bias(lock)
        self.release = self.which(kept)
        self.lock.acquire()

    def which(self, kept: Any) -> Any:
        return self.lock.release

    def operate(self) -> None:
        self.release()

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and self.lock.locked():
            self.lock.release()
        assert not self.lock.locked()
        assert is_biased(self.lock)
        assert not self.lock._words.inside.cell_contents
        assert InThread(lambda: take_and_give_back(self.lock)).result() == (True, None)


class ReleaseAsKeptSinceBefore(ReleaseByTheDoor):
    """By the function that the lock had before it was biased."""

    def which(self, kept: Any) -> Any:
        return kept


class AcquireWhatWasRevoked(Trial):
    """B3 and B6, and then the ordinary way."""

    def __init__(self, kind: str) -> None:
        self.lock = bias(KINDS[kind]())
        _bias.revoke(self.lock._words, word_of(self.lock))
        self.got = False

    def operate(self) -> None:
        self.got = self.lock.acquire()

    def finish(self, outcome: Interruption) -> None:
        assert self.got or outcome.raised
        if self.got:
            self.lock.release()
        assert InThread(lambda: take_and_give_back(self.lock)).result() == (True, None)
        assert not self.lock.locked()
        bias(self.lock)


class ReleaseWhatWasRevoked(Trial):
    """B5 and B6, with somebody asleep who does not poll."""

    def __init__(self, kind: str) -> None:
        self.lock = bias(KINDS[kind]())
        self.lock.acquire()
        self.waiter = InThread(lambda: take_and_give_back(self.lock))
        eventually(lambda: word_of(self.lock) & at.PARKED)  # it has napped for a turn, and revoked the bias

    def operate(self) -> None:
        self.lock.release()

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and self.lock.locked() and self.waiter.is_parked_at(self.lock):
            self.lock.release()
        assert self.waiter.result() == (True, None)
        assert not self.lock.locked()
        bias(self.lock)


class Grant(Trial):
    """R1'."""

    def __init__(self, kind: str) -> None:
        self.lock = KINDS[kind]()
        self.lock.acquire()
        want_it(self.lock)

    def operate(self) -> None:
        self.lock.release()

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and self.lock.locked():
            self.lock.release()
        assert not self.lock.locked()
        assert InThread(lambda: take_and_give_back(self.lock)).result() == (True, None)
        bias(self.lock)


def test_what_can_never_be_finished_is_given_up(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises at each attempt is no signal handler: it comes out, instead of being tried for ever."""

    def fail(words: Any) -> None:
        raise MemoryError

    bias(lock)
    lock.acquire()
    _bias.revoke(lock._words, word_of(lock))
    for path in (_biased_path, _fast_path):
        monkeypatch.setattr(path, "finish", fail)
    with pytest.raises(MemoryError):
        lock.release()
    other = type(lock)()
    want_it(other)
    with other:
        pass
    assert is_biased(other)
    _bias.revoke(other._words, word_of(other))
    with pytest.raises(MemoryError):
        other.acquire()


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 10_000.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trial", [AcquireWhatWasRevoked, ReleaseWhatWasRevoked, Grant])
def test_an_interruption_anywhere_leaves_it_consistent(trial: Callable[[str], Trial], kind: str, no_polling: None) -> None:
    interrupt_everywhere(lambda: trial(kind), 5)


BY_THE_DOOR = [AcquireByTheDoor, AcquireAsKeptSinceBefore, ReleaseByTheDoor, ReleaseAsKeptSinceBefore]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trial", BY_THE_DOOR)
def test_an_interruption_anywhere_on_the_way_by_the_door_leaves_it_consistent(
    trial: Callable[[str], Trial], kind: str, no_polling: None
) -> None:
    interrupt_everywhere(lambda: trial(kind), 1)


def test_a_fork_anywhere_in_what_follows_a_revocation_leaves_both_sides_right(lock: Any) -> None:
    got: list[bool] = []

    def prepare() -> None:
        got.clear()
        bias(lock)
        _bias.revoke(lock._words, word_of(lock))

    def operate() -> None:
        got.append(lock.acquire())

    def in_child() -> None:
        assert got == [True]
        assert lock.owner.pid == os.getpid()
        lock.release()

    def in_parent() -> None:
        assert got == [True]
        lock.release()

    ForkEverywhere().run(prepare, operate, in_child, in_parent, 5)
    assert not lock.locked()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_anywhere_in_a_release_that_grants_the_bias_leaves_it_to_the_parent(kind: str) -> None:
    """The child's copy of the release does nothing, and says nothing."""
    locks: list[Any] = []
    parent = os.getpid()

    def prepare() -> None:
        locks[:] = [KINDS[kind]()]
        locks[0].acquire()
        want_it(locks[0])

    def operate() -> None:
        try:
            locks[0].release()
        except (AssertionError, ValueError):
            assert os.getpid() != parent, "only a child that had not begun yet may be told that it holds nothing"

    def in_child() -> None:
        lock = locks[0]
        assert lock._words.door is None
        for _ in range(2):
            assert take_and_give_back(lock) == (True, None)
            want_it(lock)  # and gets it the second time, if the parent does not come just then

    def in_parent() -> None:  # the child may have come before R1', as a waiter: then there is no bias
        assert not locks[0]._words.inside.cell_contents
        assert take_and_give_back(locks[0]) == (True, None)

    ForkEverywhere().run(prepare, operate, in_child, in_parent, 5)


class LateChildren(ForkEverywhere):
    """The child goes on only when the parent has finished its own copy, and what comes after it."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page = page

    def _fork(self) -> None:
        super()._fork()
        if self.is_child():
            eventually(lambda: self.page[READY])


@pytest.mark.parametrize("is_revoked", [False, True])
def test_a_child_that_was_forked_in_a_release_and_goes_on_late_writes_nothing_in_its_parents_name(is_revoked: bool) -> None:
    """By then its parent has been granted the bias, and is inside: its H, its slot and its generation are as they were.

    is_revoked  what is forked is not the release that grants the bias, but the release of what was revoked
    """
    page, parent = Page(), os.getpid()
    locks: list[Any] = []

    def seen() -> list[int]:
        words = locks[0]._words
        return words.view[words.block.start : words.block.start + at.BLOCK_CONFIRMED].tolist()

    def prepare() -> None:
        page[READY] = 0
        lock = shlock.Lock()
        locks[:] = [lock]
        if is_revoked:
            bias(lock)
        lock.acquire()
        if is_revoked:
            _bias.revoke(lock._words, word_of(lock))
        else:
            want_it(lock)

    def operate() -> None:
        try:
            locks[0].release()
        except ValueError:
            assert os.getpid() != parent, "only a child that had not begun yet may be told that it holds nothing"

    def in_parent() -> None:
        lock = bias(locks[0])
        lock.acquire()
        before = seen()
        page[READY] = 1
        eventually(lambda: children.pid is None or not is_running(children.pid))
        assert seen() == before
        assert is_biased(lock)
        lock.release()

    children = LateChildren(page)
    children.run(prepare, operate, lambda: None, in_parent, 5)


def is_running(pid: int) -> bool:
    """Whether a child of this process has not ended yet."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def test_a_child_that_is_forked_inside_is_not_the_owner(lock: Any) -> None:
    bias(lock)
    with lock:
        pid = os.fork()
        if not pid:
            try:
                assert lock._words.door is None
                assert not lock._semlock._is_mine()
                assert lock.owner.pid == os.getppid()
                assert lock.acquire(False) is False
                lock.__exit__(None, None, None)  # its parent's with: nothing is released
                os._exit(0 if lock.owner.pid == os.getppid() else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert lock.owner.pid == os.getpid()
    assert not lock.locked()


# -- exclusion ------------------------------------------------------------------------------------------------------------


def use(lock: Any, page: Page, limit: int, rounds: int) -> None:
    """Take and release; whoever meets somebody inside says so."""
    _bias._chosen = "always" if limit == 0 else "never"  # type: ignore[misc]
    lock._words.limit = lock._words.credit.cell_contents = limit
    me = os.getpid() << 20 | threading.get_ident() & 0xFFFFF
    for _ in range(rounds):
        with lock:
            if page[INSIDE]:
                page[BROKEN] = 1
            page[INSIDE] = me
            page[COUNT] += 1
            if page[INSIDE] != me:
                page[BROKEN] = 1
            page[INSIDE] = 0


@pytest.mark.parametrize("threads", [1, 2])
def test_processes_and_threads_that_are_biased_whenever_possible_exclude_each_other(lock: Any, threads: int) -> None:
    page, rounds = Page(), 3000

    def work() -> None:
        workers = [InThread(lambda: use(lock, page, 0, rounds)) for _ in range(threads)]
        for worker in workers:
            worker.result()

    children = [Child(work) for _ in range(2)]
    for child in children:
        child.result()
    assert page[BROKEN] == 0
    assert page[COUNT] == 2 * threads * rounds


def own(lock: Any, page: Page) -> None:
    _bias._chosen = "always"  # type: ignore[misc]
    lock._words.limit = lock._words.credit.cell_contents = 0
    while not page[OVER]:
        with lock:
            page[INSIDE] += 1
            if page[TOLD]:
                page[BROKEN] += 1
            page[INSIDE] -= 1


def revoke_again_and_again(lock: Any, page: Page) -> int:
    end = time.monotonic() + 3.0
    rounds = 0
    while time.monotonic() < end and not page[BROKEN]:
        if not is_biased(lock):
            continue
        lock.acquire()
        page[TOLD] = 1
        if page[INSIDE]:
            page[BROKEN] += 1
        page[TOLD] = 0
        lock.release()
        rounds += 1
    page[OVER] = 1
    return rounds


def test_a_process_that_revokes_all_the_time_never_meets_the_owner_inside() -> None:
    lock, page = shlock.Lock(), Page()
    owner = Child(own, lock, page)
    rounds = Child(revoke_again_and_again, lock, page).result()
    owner.result()
    assert rounds > 10
    assert page[BROKEN] == 0
