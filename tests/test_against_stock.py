"""Claims that hold for multiprocessing's primitives and for shlock's alike: each test runs on both.

These are what CPython's own tests miss. `ctx` is a context whose start method does not matter to the test, `spanning`
one of each start method that can matter: the test starts processes with it.

Nothing here sleeps to let something happen. A test waits until what it needs is so; where nothing may happen, it looks
again and again for `QUIET` seconds.
"""

import contextlib
import copy
import functools
import multiprocessing
import multiprocessing.pool
import multiprocessing.queues
import multiprocessing.sharedctypes
import pickle
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import SEM_VALUE_MAX  # type: ignore[attr-defined]
from typing import Any

import pytest
from cpython_support import watchdog

import shlock

Context = Any  # BaseContext does not declare Process, which every context has.

FAMILIES: dict[str, Callable[[str], Context]] = {
    "stock": multiprocessing.get_context,
    "shlock": shlock.get_context,
}

PATIENCE = 60.0
"""Seconds to wait for what must happen; only a hang takes this long."""

QUIET = 0.2
"""Seconds to watch for what must not happen."""

SHORT = 0.1
"""A timeout that is meant to pass."""

EARLY = 0.002
"""Stock's timeouts run on the wall clock in whole microseconds, and are measured here on the monotonic one."""


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    with watchdog():
        yield
        assert multiprocessing.active_children() == [], "a test left a process behind"


@pytest.fixture(params=FAMILIES)
def ctx(request: pytest.FixtureRequest) -> Context:
    return FAMILIES[request.param]("fork")


@pytest.fixture(params=[(family, method) for family in FAMILIES for method in ("fork", "spawn")], ids="-".join)
def spanning(request: pytest.FixtureRequest) -> Context:
    family, method = request.param
    return FAMILIES[family](method)


@pytest.fixture
def ours() -> Context:
    return shlock.get_context("fork")


def eventually(condition: Callable[[], object]) -> None:
    """Return as soon as the condition is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def stays(condition: Callable[[], object]) -> None:
    """Return after the condition has been true for QUIET seconds."""
    deadline = time.monotonic() + QUIET
    while time.monotonic() < deadline:
        assert condition()
        time.sleep(0.001)


@contextlib.contextmanager
def takes_at_least(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start >= seconds - EARLY


class InThread:
    """Runs a function in a thread; `result()` joins it and returns or raises what it did."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        # Signals are for the main thread: some tests want them to interrupt it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._outcome = function(*args)
        except BaseException as error:
            self._error = error

    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the thread hangs"
        if self._error is not None:
            raise self._error
        return self._outcome


def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    return InThread(function, *args).result()


class InProcess:
    """Runs an importable function in a process of a context; `result()` joins it and returns or raises what it did."""

    def __init__(self, context: Context, function: Callable[..., Any], *args: Any) -> None:
        self._reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=_report, args=(writer, function, args))
        self.process.start()
        writer.close()

    def result(self) -> Any:
        with self._reader:
            assert self._reader.poll(PATIENCE), "the process hangs"
            outcome, error = self._reader.recv()
        self.process.join(PATIENCE)
        assert self.process.exitcode == 0
        if error is not None:
            raise error
        return outcome


def _report(writer: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        outcome: tuple[Any, Exception | None] = function(*args), None
    except Exception as error:
        outcome = None, error
    writer.send(outcome)
    writer.close()


def in_process(context: Context, function: Callable[..., Any], *args: Any) -> Any:
    return InProcess(context, function, *args).result()


@contextlib.contextmanager
def held_by_thread(lock: Any) -> Iterator[None]:
    """Have another thread hold the lock while the block runs."""
    taken, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            assert enough.wait(PATIENCE)

    holder = InThread(hold)
    assert taken.wait(PATIENCE)
    try:
        yield
    finally:
        enough.set()
        holder.result()


@contextlib.contextmanager
def held_by_process(context: Context, lock: Any) -> Iterator[None]:
    """Have another process hold the lock while the block runs."""
    here, there = context.Pipe()
    holder = InProcess(context, _hold, lock, there)
    there.close()
    with here:
        assert here.recv() == "taken"
        try:
            yield
        finally:
            here.send("enough")
            holder.result()


def _hold(lock: Any, connection: Any) -> None:
    with lock:
        connection.send("taken")
        connection.recv()


def _acquire(lock: Any, *args: Any) -> Any:
    return lock.acquire(*args)


def _release(lock: Any) -> Any:
    return lock.release()


# Lock


def test_lock_acquire_says_whether_it_got_the_lock_and_release_says_nothing(ctx: Context) -> None:
    lock = ctx.Lock()
    assert lock.acquire() is True
    assert lock.acquire(False) is False
    assert lock.release() is None


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"])
def test_enter_is_true_and_exit_is_none_and_lets_exceptions_through(ctx: Context, kind: str) -> None:
    primitive = getattr(ctx, kind)()
    with primitive as entered:
        assert entered is True
    assert primitive.__enter__() is True
    assert primitive.__exit__(None, None, None) is None
    with pytest.raises(KeyError, match="through"), primitive:
        raise KeyError("through")
    assert primitive.acquire(False) is True
    primitive.release()


def test_releasing_a_free_lock_is_a_value_error_and_leaves_it_usable(ctx: Context) -> None:
    lock = ctx.Lock()
    for _ in range(2):
        with pytest.raises(ValueError, match="released too many times"):
            lock.release()
        assert lock.acquire(False) is True
        assert lock.acquire(False) is False
        lock.release()


def test_a_lock_can_be_released_by_another_thread(ctx: Context) -> None:
    lock = ctx.Lock()
    lock.acquire()
    in_thread(lock.release)
    assert lock.acquire(False) is True
    lock.release()


def test_a_lock_can_be_released_by_another_process(spanning: Context) -> None:
    lock = spanning.Lock()
    lock.acquire()
    in_process(spanning, _release, lock)
    assert lock.acquire(False) is True
    lock.release()


def test_a_lock_taken_in_another_process_can_be_released_here(spanning: Context) -> None:
    lock = spanning.Lock()
    here, there = spanning.Pipe()
    child = InProcess(spanning, _take_and_wait, lock, there)
    there.close()
    with here:
        assert here.recv() is True
        assert lock.acquire(False) is False
        lock.release()
        assert lock.acquire(False) is True
        lock.release()
        here.send("done")
        child.result()


def _take_and_wait(lock: Any, connection: Any) -> None:
    connection.send(lock.acquire())
    connection.recv()


def test_a_release_in_another_process_wakes_who_waits_here(spanning: Context) -> None:
    lock = spanning.Lock()
    lock.acquire()
    waiter = InThread(lock.acquire, True, PATIENCE)
    in_process(spanning, _release, lock)
    assert waiter.result() is True
    lock.release()


def test_a_lock_held_here_is_busy_in_another_process_until_released(spanning: Context) -> None:
    lock = spanning.Lock()
    with lock:
        assert in_process(spanning, _acquire, lock, False) is False
        assert in_process(spanning, _acquire, lock, True, SHORT) is False
    with held_by_process(spanning, lock):
        assert lock.acquire(False) is False
    assert lock.acquire(False) is True
    lock.release()


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_one_lock_in_two_processes_is_one_lock(spanning: Context, kind: str) -> None:
    rounds = 2000
    lock = getattr(spanning, kind)()
    counter = spanning.RawArray("l", 2)
    gates = [spanning.Pipe(duplex=False) for _ in range(2)]
    children = [InProcess(spanning, _count, lock, counter, rounds, gate) for gate, _ in gates]
    for _, gun in gates:
        gun.send("go")
    for child in children:
        child.result()
    assert counter[0] == 2 * rounds
    for gate, gun in gates:
        gate.close()
        gun.close()


def _count(lock: Any, counter: Any, rounds: int, gate: Any) -> None:
    """Increment counter[0] so that it goes wrong without exclusion; counter[1] is the number of those inside."""
    gate.recv()
    for _ in range(rounds):
        with lock:
            counter[1] += 1
            seen = counter[0]
            assert counter[1] == 1
            counter[0] = seen + 1
            counter[1] -= 1


# Timeouts and arguments


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_a_timed_acquire_of_a_held_lock_takes_its_time_and_fails(ctx: Context, kind: str) -> None:
    lock = getattr(ctx, kind)()
    with held_by_thread(lock):
        with takes_at_least(SHORT):
            assert lock.acquire(True, SHORT) is False
        with takes_at_least(SHORT):
            assert lock.acquire(timeout=SHORT) is False
    assert lock.acquire(timeout=SHORT) is True
    lock.release()


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_a_timed_acquire_of_a_lock_of_another_process_takes_its_time_and_fails(spanning: Context, kind: str) -> None:
    lock = getattr(spanning, kind)()
    with held_by_process(spanning, lock), takes_at_least(SHORT):
        assert lock.acquire(timeout=SHORT) is False


@pytest.mark.parametrize("kind", ["Semaphore", "BoundedSemaphore"])
def test_a_timed_acquire_of_an_empty_semaphore_takes_its_time_and_fails(ctx: Context, kind: str) -> None:
    semaphore = getattr(ctx, kind)(0)
    with takes_at_least(SHORT):
        assert semaphore.acquire(True, SHORT) is False
    assert semaphore.get_value() == 0


def test_a_timed_acquire_gets_a_lock_that_is_released_in_time(ctx: Context) -> None:
    lock = ctx.Lock()
    lock.acquire()
    waiter = InThread(lock.acquire, True, PATIENCE)
    lock.release()
    assert waiter.result() is True
    lock.release()


def busy(ctx: Context, kind: str) -> contextlib.AbstractContextManager[Any]:
    """A primitive of the kind that cannot be acquired here within the block."""
    if kind == "Lock":
        lock = ctx.Lock()
        lock.acquire()
        return contextlib.nullcontext(lock)
    if kind in ("RLock", "Condition"):
        return _held_elsewhere(getattr(ctx, kind)())
    return contextlib.nullcontext(getattr(ctx, kind)(0))


@contextlib.contextmanager
def _held_elsewhere(lock: Any) -> Iterator[Any]:
    with held_by_thread(lock):
        yield lock


KINDS = ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"]


Spelling = tuple[tuple[Any, ...], dict[str, Any]]

AT_ONCE: list[Spelling] = [
    ((False,), {}),
    ((0,), {}),
    ((), {"block": False}),
    ((False, None), {}),
    # Not blocking, whatever the timeout says.
    ((False, 1000), {}),
    ((False, 1000.0), {}),
    ((), {"block": False, "timeout": 1000}),
    ((), {"timeout": 1000, "block": False}),
    ((False,), {"timeout": -1}),
    # Over at once.
    ((True, 0), {}),
    ((True, 0.0), {}),
    ((), {"timeout": 0}),
    # A negative timeout is over, too; it does not mean for ever.
    ((True, -1), {}),
    ((True, -0.5), {}),
    ((), {"timeout": -1}),
    ((), {"timeout": -1e9}),
]

WAITING: list[Spelling] = [
    ((), {}),
    ((True,), {}),
    ((1,), {}),
    ((True, None), {}),
    ((True, 5), {}),
    ((True, 1e9), {}),
    ((), {"block": True}),
    ((), {"timeout": None}),
    ((), {"block": True, "timeout": 5.0}),
]

WRONG: list[Spelling] = [
    ((True, "soon"), {}),
    ((True, [1]), {}),
    ((), {"blocking": False}),
    ((), {"wait": 1}),
    ((True, None, None), {}),
    ((True,), {"block": True}),
]


@pytest.mark.parametrize("kind", KINDS)
def test_acquire_that_does_not_wait_fails_at_once_however_spelled(ctx: Context, kind: str) -> None:
    with busy(ctx, kind) as primitive:
        for args, kwargs in AT_ONCE:
            assert primitive.acquire(*args, **kwargs) is False, (args, kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_acquire_of_a_free_primitive_succeeds_however_spelled(ctx: Context, kind: str) -> None:
    primitive = getattr(ctx, kind)()
    for args, kwargs in AT_ONCE + WAITING:
        assert primitive.acquire(*args, **kwargs) is True, (args, kwargs)
        primitive.release()


@pytest.mark.parametrize("kind", KINDS)
def test_acquire_with_wrong_arguments_is_a_type_error_and_takes_nothing(ctx: Context, kind: str) -> None:
    primitive = getattr(ctx, kind)()
    for args, kwargs in WRONG:
        with pytest.raises(TypeError):
            primitive.acquire(*args, **kwargs)
        assert in_thread(_take_and_give_back, primitive) is True, (args, kwargs)


def _take_and_give_back(primitive: Any) -> bool:
    taken: bool = primitive.acquire(False)
    if taken:
        primitive.release()
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_release_takes_no_arguments(ctx: Context, kind: str) -> None:
    primitive = getattr(ctx, kind)()
    with primitive, pytest.raises(TypeError):
        primitive.release(1)


# RLock


def test_an_rlock_is_free_after_as_many_releases_as_acquires(ctx: Context) -> None:
    lock = ctx.RLock()
    for _ in range(3):
        assert lock.acquire() is True
    for _ in range(3):
        assert in_thread(lock.acquire, False) is False
        assert lock.release() is None
    assert in_thread(_take_and_give_back, lock) is True


def test_an_rlock_is_free_elsewhere_after_as_many_releases_as_acquires(spanning: Context) -> None:
    lock = spanning.RLock()
    with lock:
        with lock:
            pass
        assert in_process(spanning, _acquire, lock, False) is False
    assert in_process(spanning, _take_and_give_back, lock) is True


def test_an_owned_rlock_is_acquired_again_however_spelled(ctx: Context) -> None:
    lock = ctx.RLock()
    lock.acquire()
    assert lock.acquire(False) is True
    assert lock.acquire(True, 0) is True
    assert lock.acquire(timeout=-1) is True
    for _ in range(4):
        lock.release()
    with pytest.raises(AssertionError):
        lock.release()


def test_an_rlock_released_by_a_thread_that_does_not_own_it_is_an_assertion_error(ctx: Context) -> None:
    lock = ctx.RLock()
    with pytest.raises(AssertionError, match="not owned by thread"):
        lock.release()
    with lock:
        with pytest.raises(AssertionError, match="not owned by thread"):
            in_thread(lock.release)
        assert in_thread(lock.acquire, False) is False
    with pytest.raises(AssertionError, match="not owned by thread"):
        lock.release()
    with held_by_thread(lock), pytest.raises(AssertionError, match="not owned by thread"):
        lock.release()
    assert lock.acquire(False) is True
    lock.release()


def test_an_rlock_released_by_a_process_that_does_not_own_it_is_an_assertion_error(spanning: Context) -> None:
    lock = spanning.RLock()
    with lock:
        with pytest.raises(AssertionError, match="not owned by thread"):
            in_process(spanning, _release, lock)
        assert in_process(spanning, _acquire, lock, False) is False
    with held_by_process(spanning, lock), pytest.raises(AssertionError, match="not owned by thread"):
        lock.release()


def test_a_forked_child_does_not_own_the_rlock_its_parent_holds(ctx: Context) -> None:
    lock = ctx.RLock()
    with lock, lock:
        assert in_process(ctx, _acquire, lock, False) is False
        with pytest.raises(AssertionError):
            in_process(ctx, _release, lock)
    assert in_process(ctx, _take_and_give_back, lock) is True


def test_a_forked_child_can_release_the_lock_its_parent_holds(ctx: Context) -> None:
    lock = ctx.Lock()
    lock.acquire()
    assert in_process(ctx, _acquire, lock, False) is False
    in_process(ctx, _release, lock)
    assert lock.acquire(False) is True
    lock.release()


# Semaphore, BoundedSemaphore


@pytest.mark.parametrize("value", [1, 3])
def test_a_bounded_semaphore_released_over_its_bound_is_a_value_error(ctx: Context, value: int) -> None:
    semaphore = ctx.BoundedSemaphore(value)
    with pytest.raises(ValueError, match="released too many times"):
        semaphore.release()
    assert semaphore.get_value() == value
    for _ in range(value):
        assert semaphore.acquire(False) is True
    assert semaphore.acquire(False) is False
    for _ in range(value):
        semaphore.release()
    with pytest.raises(ValueError, match="released too many times"):
        semaphore.release()
    assert semaphore.get_value() == value


def test_a_bounded_semaphores_bound_holds_across_processes(spanning: Context) -> None:
    semaphore = spanning.BoundedSemaphore(2)
    semaphore.acquire()
    in_process(spanning, _release, semaphore)
    with pytest.raises(ValueError, match="released too many times"):
        in_process(spanning, _release, semaphore)
    assert semaphore.get_value() == 2


def test_a_bounded_semaphore_of_zero_can_never_be_released(ctx: Context) -> None:
    semaphore = ctx.BoundedSemaphore(0)
    assert semaphore.acquire(False) is False
    with pytest.raises(ValueError, match="released too many times"):
        semaphore.release()


def test_semaphores_begin_with_one_and_take_the_value_by_position_or_name(ctx: Context) -> None:
    assert ctx.Semaphore().get_value() == 1
    assert ctx.BoundedSemaphore().get_value() == 1
    assert ctx.Semaphore(4).get_value() == 4
    assert ctx.Semaphore(value=4).get_value() == 4
    assert ctx.BoundedSemaphore(value=4).get_value() == 4
    assert ctx.Semaphore(0).get_value() == 0


def test_get_value_follows_every_acquire_and_release(ctx: Context) -> None:
    semaphore = ctx.Semaphore(1)
    semaphore.release()
    assert semaphore.get_value() == 2
    semaphore.acquire()
    semaphore.acquire()
    assert semaphore.get_value() == 0
    assert semaphore.acquire(False) is False
    assert semaphore.get_value() == 0


def test_a_semaphore_is_a_signal_from_one_process_to_another(spanning: Context) -> None:
    signals, answers = spanning.Semaphore(0), spanning.Semaphore(0)
    child = InProcess(spanning, _answer_each, signals, answers, 3)
    for _ in range(3):
        signals.release()
        assert answers.acquire(True, PATIENCE) is True
    child.result()
    assert (signals.get_value(), answers.get_value()) == (0, 0)


def _answer_each(signals: Any, answers: Any, rounds: int) -> None:
    for _ in range(rounds):
        assert signals.acquire(True, PATIENCE)
        answers.release()


def test_a_semaphore_wakes_as_many_as_it_is_released(ctx: Context) -> None:
    semaphore, woken = ctx.Semaphore(0), ctx.Semaphore(0)

    def wait() -> None:
        assert semaphore.acquire(True, PATIENCE)
        woken.release()

    waiters = [InThread(wait) for _ in range(4)]
    semaphore.release()
    semaphore.release()
    eventually(lambda: woken.get_value() == 2)
    stays(lambda: woken.get_value() == 2)
    semaphore.release()
    semaphore.release()
    for waiter in waiters:
        waiter.result()
    assert (semaphore.get_value(), woken.get_value()) == (0, 4)


def test_a_semaphore_at_its_maximum_cannot_be_released(ctx: Context) -> None:
    semaphore = ctx.Semaphore(SEM_VALUE_MAX)
    assert semaphore.get_value() == SEM_VALUE_MAX
    with pytest.raises(ValueError, match="released too many times"):
        semaphore.release()
    assert semaphore.get_value() == SEM_VALUE_MAX
    assert semaphore.acquire(False) is True
    assert semaphore.get_value() == SEM_VALUE_MAX - 1


IMPOSSIBLE: list[tuple[Any, type[Exception]]] = [
    (-1, OSError),
    (-SEM_VALUE_MAX, OSError),
    (SEM_VALUE_MAX + 1, OverflowError),
    (2**63, OverflowError),
    (-(2**63), OverflowError),
    (1.5, TypeError),
    ("1", TypeError),
    (None, TypeError),
]


@pytest.mark.parametrize("kind", ["Semaphore", "BoundedSemaphore"])
def test_a_semaphore_of_an_impossible_value_is_refused(ctx: Context, kind: str) -> None:
    for value, error in IMPOSSIBLE:
        with pytest.raises(error):
            getattr(ctx, kind)(value)


# Condition


def test_a_condition_used_without_its_lock_is_an_assertion_error(ctx: Context) -> None:
    for condition in (ctx.Condition(), ctx.Condition(ctx.Lock()), ctx.Condition(ctx.RLock())):
        with pytest.raises(AssertionError, match=r"must acquire\(\) condition before using wait\(\)"):
            condition.wait()
        with pytest.raises(AssertionError, match=r"must acquire\(\) condition before using wait\(\)"):
            condition.wait(SHORT)
        with pytest.raises(AssertionError, match=r"must acquire\(\) condition before using wait\(\)"):
            condition.wait_for(lambda: False)
        with pytest.raises(AssertionError, match="lock is not owned"):
            condition.notify()
        with pytest.raises(AssertionError, match="lock is not owned"):
            condition.notify(0)
        with pytest.raises(AssertionError, match="lock is not owned"):
            condition.notify_all()


def test_a_condition_whose_lock_another_thread_holds_is_an_assertion_error(ctx: Context) -> None:
    condition = ctx.Condition()
    with held_by_thread(condition):
        with pytest.raises(AssertionError):
            condition.wait(SHORT)
        with pytest.raises(AssertionError):
            condition.notify()
        with pytest.raises(AssertionError):
            condition.notify_all()
        with pytest.raises(AssertionError):
            condition.release()


def test_a_condition_whose_lock_another_process_holds_is_an_assertion_error(spanning: Context) -> None:
    condition = spanning.Condition()
    with held_by_process(spanning, condition):
        with pytest.raises(AssertionError):
            condition.wait(SHORT)
        with pytest.raises(AssertionError):
            condition.notify()


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_a_condition_uses_the_lock_it_is_given(spanning: Context, kind: str) -> None:
    lock = getattr(spanning, kind)()
    condition, other = spanning.Condition(lock), spanning.Condition(lock=lock)
    with condition:
        assert in_process(spanning, _acquire, lock, False) is False
        assert in_process(spanning, _acquire, condition, False) is False
        assert in_process(spanning, _acquire, other, False) is False
    with lock:
        assert in_process(spanning, _acquire, condition, False) is False
    lock.acquire()
    condition.notify()  # is an error unless the lock is seen as held
    condition.release()
    assert in_process(spanning, _take_and_give_back, lock) is True


def test_a_condition_makes_an_rlock_unless_given_one(ctx: Context) -> None:
    condition = ctx.Condition()
    with condition:
        assert condition.acquire(False) is True
        condition.release()
        assert in_thread(condition.acquire, False) is False


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_a_timed_wait_without_notify_takes_its_time_returns_false_and_has_the_lock(ctx: Context, kind: str) -> None:
    condition = ctx.Condition(getattr(ctx, kind)())
    with condition:
        with takes_at_least(SHORT):
            assert condition.wait(SHORT) is False
        with takes_at_least(SHORT):
            assert condition.wait(timeout=SHORT) is False
        assert condition.wait(0) is False
        assert condition.wait(-1) is False
        assert in_thread(condition.acquire, False) is False
    assert condition.acquire(False) is True
    condition.release()


class Waiters:
    """Threads that wait on a condition; counts how many are in `wait()` and how many came back."""

    def __init__(self, condition: Any, count: int) -> None:
        self._condition = condition
        self.inside = self.woken = 0
        self._threads = [InThread(self._wait) for _ in range(count)]
        eventually(lambda: self._count("inside") == count)

    def _count(self, name: str) -> int:
        # Who counted itself in and has let go of the lock again is in wait().
        with self._condition:
            return int(getattr(self, name))

    def _wait(self) -> bool:
        with self._condition:
            self.inside += 1
            result: bool = self._condition.wait(PATIENCE)
            self.woken += 1
            return result

    def woken_are(self, count: int) -> None:
        eventually(lambda: self._count("woken") >= count)
        stays(lambda: self._count("woken") == count)

    def results(self) -> list[bool]:
        return [thread.result() for thread in self._threads]


def test_notify_wakes_exactly_as_many_as_it_is_told(ctx: Context) -> None:
    condition = ctx.Condition()
    waiters = Waiters(condition, 6)
    with condition:
        condition.notify(0)
        assert condition.notify() is None
    waiters.woken_are(1)
    with condition:
        condition.notify(2)
    waiters.woken_are(3)
    with condition:
        condition.notify(n=1)
        condition.notify(n=1)
    waiters.woken_are(5)
    with condition:
        condition.notify(100)
    assert waiters.results() == [True] * 6


def test_notify_all_wakes_all(ctx: Context) -> None:
    condition = ctx.Condition(ctx.Lock())
    waiters = Waiters(condition, 5)
    with condition:
        assert condition.notify_all() is None
    assert waiters.results() == [True] * 5


def test_a_notify_that_nobody_waits_for_is_forgotten(ctx: Context) -> None:
    condition = ctx.Condition()
    with condition:
        condition.notify()
        condition.notify(5)
        condition.notify_all()
        assert condition.wait(SHORT) is False


def test_a_notify_is_not_spent_on_a_waiter_that_timed_out(ctx: Context) -> None:
    condition = ctx.Condition()
    with condition:
        for _ in range(3):
            assert condition.wait(0.001) is False
    waiters = Waiters(condition, 2)
    with condition:
        condition.notify()
    waiters.woken_are(1)
    with condition:
        condition.notify()
    assert waiters.results() == [True] * 2


def test_a_woken_waiter_returns_only_with_the_lock(ctx: Context) -> None:
    condition = ctx.Condition()
    waiters = Waiters(condition, 1)
    with condition:
        condition.notify()
        stays(lambda: waiters.woken == 0)
    assert waiters.results() == [True]


def test_a_process_notifies_another(spanning: Context) -> None:
    condition = spanning.Condition()
    turn = spanning.RawValue("i", 0)
    with condition:
        child = InProcess(spanning, _take_turns, condition, turn)
        for expected in (1, 3, 5):
            while turn.value != expected:
                assert condition.wait(PATIENCE) is True
            turn.value += 1
            condition.notify()
    child.result()


def _take_turns(condition: Any, turn: Any) -> None:
    for expected in (0, 2, 4):
        with condition:
            assert condition.wait_for(lambda: turn.value == expected, PATIENCE)
            turn.value += 1
            condition.notify()


def test_wait_lets_go_of_every_level_of_an_rlock_and_takes_them_back(ctx: Context) -> None:
    condition = ctx.Condition()
    entered = threading.Event()

    def wait() -> None:
        with condition, condition:
            entered.set()
            assert condition.wait(PATIENCE) is True
            assert in_thread(condition.acquire, False) is False
        with pytest.raises(AssertionError):
            condition.release()

    waiter = InThread(wait)
    assert entered.wait(PATIENCE)
    assert condition.acquire(True, PATIENCE) is True
    condition.notify()
    condition.release()
    waiter.result()
    assert in_thread(_take_and_give_back, condition) is True


def test_a_timed_out_wait_takes_back_every_level_of_an_rlock(ctx: Context) -> None:
    condition = ctx.Condition()
    with condition:
        with condition:
            assert condition.wait(0.01) is False
        assert in_thread(condition.acquire, False) is False
    assert in_thread(_take_and_give_back, condition) is True
    with pytest.raises(AssertionError):
        condition.release()


def test_wait_for_returns_the_predicates_value_without_waiting_when_it_is_true(ctx: Context) -> None:
    condition = ctx.Condition()
    assert condition.wait_for(lambda: "yes") == "yes"  # not even the lock is needed
    with condition:
        assert condition.wait_for(lambda: [7]) == [7]
        assert condition.wait_for(lambda: 7, timeout=0) == 7
        assert condition.wait_for(predicate=lambda: 7, timeout=-1) == 7


def test_wait_for_returns_the_predicates_last_value_when_its_time_is_over(ctx: Context) -> None:
    condition = ctx.Condition()
    calls: list[int] = []

    def predicate() -> list[int]:
        calls.append(1)
        return []

    with condition:
        with takes_at_least(SHORT):
            assert condition.wait_for(predicate, SHORT) == []
        assert len(calls) >= 2
        assert condition.wait_for(lambda: 0, timeout=0) == 0
        assert condition.wait_for(lambda: None, timeout=-1) is None


def test_wait_for_asks_again_after_each_notify_and_only_then(ctx: Context) -> None:
    condition = ctx.Condition()
    asked: list[int] = []
    answers = iter([0, 0, 5])

    def predicate() -> int:
        asked.append(1)
        return next(answers)

    def wait() -> Any:
        with condition:
            return condition.wait_for(predicate, PATIENCE)

    def asked_so_often(count: int) -> bool:
        with condition:
            return len(asked) == count

    waiter = InThread(wait)
    eventually(lambda: asked_so_often(1))
    with condition:
        condition.notify()
    eventually(lambda: asked_so_often(2))
    stays(lambda: asked_so_often(2))
    with condition:
        condition.notify()
    assert waiter.result() == 5


# Event


def test_event_wait_says_whether_it_is_set(ctx: Context) -> None:
    event = ctx.Event()
    assert event.is_set() is False
    assert event.wait(0) is False
    assert event.wait(timeout=-1) is False
    with takes_at_least(SHORT):
        assert event.wait(SHORT) is False
    assert event.set() is None
    event.set()
    assert event.is_set() is True
    assert event.wait() is True
    assert event.wait(0) is True
    assert event.wait(-1) is True
    assert event.clear() is None
    event.clear()
    assert event.is_set() is False
    assert event.wait(0) is False


def test_setting_an_event_wakes_every_waiter_in_every_process(spanning: Context) -> None:
    event, ready = spanning.Event(), spanning.Semaphore(0)
    children = [InProcess(spanning, _wait_for_event, event, ready) for _ in range(2)]
    threads = [InThread(_wait_for_event, event, ready) for _ in range(2)]
    for _ in range(4):
        assert ready.acquire(True, PATIENCE)
    event.set()
    assert [child.result() for child in children] == [True] * 2
    assert [thread.result() for thread in threads] == [True] * 2


def _wait_for_event(event: Any, ready: Any) -> Any:
    ready.release()
    return event.wait(PATIENCE)


def test_an_event_set_in_another_process_is_set_here(spanning: Context) -> None:
    event = spanning.Event()
    in_process(spanning, _call, event, "set")
    assert event.is_set() is True
    in_process(spanning, _call, event, "clear")
    assert event.is_set() is False


def _call(target: Any, method: str, *args: Any) -> Any:
    return getattr(target, method)(*args)


# Barrier


def _pass(barrier: Any, *args: Any) -> Any:
    return barrier.wait(*args)


def test_a_barrier_gives_every_party_an_index_of_its_own(spanning: Context) -> None:
    barrier = spanning.Barrier(3, timeout=PATIENCE)
    assert (barrier.parties, barrier.n_waiting, barrier.broken) == (3, 0, False)
    for _ in range(2):
        parties: list[InProcess | InThread] = [InProcess(spanning, _pass, barrier), InThread(_pass, barrier)]
        indices = [barrier.wait(), *(party.result() for party in parties)]
        assert sorted(indices) == [0, 1, 2]
    assert (barrier.n_waiting, barrier.broken) == (0, False)


def test_a_barriers_action_runs_once_each_time_before_anybody_goes_on(ctx: Context) -> None:
    ran: list[int] = []
    barrier = ctx.Barrier(3, action=functools.partial(ran.append, 1), timeout=PATIENCE)

    def party() -> int:
        barrier.wait()
        return len(ran)

    for times in (1, 2):
        parties = [InThread(party), InThread(party)]
        assert [party(), *(thread.result() for thread in parties)] == [times] * 3


def test_a_barrier_whose_action_fails_is_broken(ctx: Context) -> None:
    def fail() -> None:
        raise KeyError("action")

    barrier = ctx.Barrier(2, fail, PATIENCE)
    waiting = InThread(_pass, barrier)
    eventually(lambda: barrier.n_waiting == 1)
    with pytest.raises(KeyError, match="action"):
        barrier.wait()
    with pytest.raises(threading.BrokenBarrierError):
        waiting.result()
    assert barrier.broken is True


def test_aborting_a_barrier_breaks_it_for_those_who_wait_and_those_who_come(spanning: Context) -> None:
    barrier = spanning.Barrier(3, timeout=PATIENCE)
    waiting: list[InProcess | InThread] = [InProcess(spanning, _pass, barrier), InThread(_pass, barrier)]
    eventually(lambda: barrier.n_waiting == 2)
    assert barrier.abort() is None
    for party in waiting:
        with pytest.raises(threading.BrokenBarrierError):
            party.result()
    assert (barrier.broken, barrier.n_waiting) == (True, 0)
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait()
    with pytest.raises(threading.BrokenBarrierError):
        in_process(spanning, _pass, barrier)
    barrier.reset()
    assert barrier.broken is False
    assert barrier.n_waiting == 0


def test_resetting_a_barrier_breaks_it_only_for_those_who_wait(spanning: Context) -> None:
    barrier = spanning.Barrier(2, timeout=PATIENCE)
    waiting = InProcess(spanning, _pass, barrier)
    eventually(lambda: barrier.n_waiting == 1)
    assert barrier.reset() is None
    with pytest.raises(threading.BrokenBarrierError):
        waiting.result()
    assert barrier.broken is False
    other = InProcess(spanning, _pass, barrier)
    assert sorted([barrier.wait(), other.result()]) == [0, 1]


def test_a_party_that_ends_normally_does_not_break_a_barrier(spanning: Context) -> None:
    barrier = spanning.Barrier(2, timeout=PATIENCE)
    for _ in range(2):
        party = InProcess(spanning, _pass, barrier)
        assert sorted([barrier.wait(), party.result()]) == [0, 1]
        # That party's process is gone, and who waits now has time to notice.
        waiting = InThread(barrier.wait)
        eventually(lambda: barrier.n_waiting == 1 or barrier.broken)
        stays(lambda: not barrier.broken)
        assert sorted([barrier.wait(), waiting.result()]) == [0, 1]


@pytest.mark.parametrize("spelling", ["argument", "default", "argument over default"])
def test_a_barrier_that_waits_in_vain_takes_its_time_and_is_broken(ctx: Context, spelling: str) -> None:
    default = {"argument": None, "default": SHORT, "argument over default": PATIENCE}[spelling]
    barrier = ctx.Barrier(2, timeout=default)
    with takes_at_least(SHORT), pytest.raises(threading.BrokenBarrierError):
        barrier.wait(*() if spelling == "default" else (SHORT,))
    assert barrier.broken is True
    assert barrier.n_waiting == 0


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_barrier_without_time_to_wait_is_broken_at_once(ctx: Context, timeout: float) -> None:
    barrier = ctx.Barrier(2)
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait(timeout)
    assert barrier.broken is True


def test_a_barrier_of_one_lets_everybody_pass(ctx: Context) -> None:
    barrier = ctx.Barrier(1)
    assert [barrier.wait() for _ in range(3)] == [0, 0, 0]
    assert barrier.wait(timeout=0) == 0


# Queues


def test_a_full_queue_refuses_after_its_timeout(ctx: Context) -> None:
    items = ctx.Queue(2)
    items.put(1)
    items.put(2)
    assert items.full() is True
    assert items.qsize() == 2
    with pytest.raises(queue.Full):
        items.put_nowait(3)
    with pytest.raises(queue.Full):
        items.put(3, False)
    with takes_at_least(SHORT), pytest.raises(queue.Full):
        items.put(3, True, SHORT)
    with takes_at_least(SHORT), pytest.raises(queue.Full):
        items.put(3, timeout=SHORT)
    assert items.get(timeout=PATIENCE) == 1
    assert items.full() is False
    items.put(3, timeout=0)
    assert [items.get(timeout=PATIENCE), items.get(timeout=PATIENCE)] == [2, 3]
    items.close()
    items.join_thread()


def test_an_empty_queue_gives_up_after_its_timeout(ctx: Context) -> None:
    items = ctx.Queue()
    assert items.empty() is True
    with pytest.raises(queue.Empty):
        items.get_nowait()
    with takes_at_least(SHORT), pytest.raises(queue.Empty):
        items.get(True, SHORT)
    with pytest.raises(queue.Empty):
        items.get(timeout=-1)
    consumers = items._rlock if hasattr(items, "_rlock") else items._in.lock
    with held_by_thread(consumers), takes_at_least(SHORT), pytest.raises(queue.Empty):
        items.get(timeout=SHORT)
    items.close()
    items.join_thread()


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_a_queue_carries_everything_in_order_to_another_process_and_back(spanning: Context, kind: str) -> None:
    there, back = getattr(spanning, kind)(), getattr(spanning, kind)()
    child = InProcess(spanning, _echo, there, back)
    for number in range(100):
        there.put(number)
    there.put(None)
    assert [back.get() for _ in range(100)] == list(range(100))
    child.result()
    for one in (there, back):
        one.close()
    if kind != "SimpleQueue":
        there.join_thread()


def _echo(there: Any, back: Any) -> None:
    for item in iter(there.get, None):
        back.put(item)


def test_a_joinable_queue_is_joined_when_every_task_is_done_and_not_before(spanning: Context) -> None:
    tasks = spanning.JoinableQueue()
    tasks.join()
    go = spanning.Event()
    for number in range(3):
        tasks.put(number)
    joined = InThread(tasks.join)
    child = InProcess(spanning, _do_tasks, tasks, go, 3)
    stays(joined.running)
    go.set()
    child.result()
    joined.result()
    with pytest.raises(ValueError, match="too many times"):
        tasks.task_done()
    tasks.close()
    tasks.join_thread()


def _do_tasks(tasks: Any, go: Any, count: int) -> None:
    assert go.wait(PATIENCE)
    for _ in range(count):
        tasks.get(timeout=PATIENCE)
        tasks.task_done()


# Pool, executor, Value, Array, Manager


_lock: Any = None
_counter: Any = None


def _initialize(lock: Any, counter: Any) -> None:
    global _lock, _counter
    _lock, _counter = lock, counter


def _increment(_: int) -> None:
    with _lock:
        _counter.value += 1


def test_a_pools_workers_share_the_lock_they_are_initialised_with(spanning: Context) -> None:
    lock, counter = spanning.Lock(), spanning.RawValue("l", 0)
    with spanning.Pool(2, _initialize, (lock, counter)) as pool:
        pool.map(_increment, range(1000), chunksize=50)
        pool.close()
        pool.join()
    assert counter.value == 1000


def test_an_executors_workers_share_the_lock_they_are_initialised_with(spanning: Context) -> None:
    lock, counter = spanning.Lock(), spanning.RawValue("l", 0)
    with ProcessPoolExecutor(2, spanning, _initialize, (lock, counter)) as executor:
        list(executor.map(_increment, range(200), chunksize=10))
    assert counter.value == 200


def test_a_lock_cannot_be_sent_to_a_pool_as_an_argument(spanning: Context) -> None:
    with spanning.Pool(1) as pool:
        with pytest.raises(RuntimeError, match="only be shared between processes through inheritance"):
            pool.apply(_acquire, (spanning.Lock(),))
        assert pool.apply(abs, (-1,)) == 1
    pool.join()


def test_a_lock_cannot_be_put_in_a_queue(ctx: Context) -> None:
    items = ctx.SimpleQueue()
    with pytest.raises(RuntimeError, match="only be shared between processes through inheritance"):
        items.put(ctx.Lock())
    items.close()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pool_terminated_in_the_middle_says_nothing_and_ends(family: str, method: str) -> None:
    # Terminating takes a lock for ever, and kills workers that hold it or wait for it.
    script = textwrap.dedent(f"""\
        import sys
        sys.path[:] = {sys.path!r}
        import {"multiprocessing" if family == "stock" else "shlock"} as source
        if __name__ == "__main__":
            ctx = source.get_context({method!r})
            for _ in range(3):
                pool = ctx.Pool(3)
                assert pool.map(abs, range(-9, 0)) == list(range(9, 0, -1))
                pool.map_async(abs, range(100_000), chunksize=1)
                pool.terminate()
                pool.join()
            with ctx.Pool(2) as forgotten:
                forgotten.map_async(abs, range(100_000), chunksize=1)
            last = ctx.Pool(2)
            last.map(abs, range(10))
            last.close()
            last.join()
        """)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, timeout=3 * PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_value_and_an_array_are_counted_up_exactly_under_their_lock(spanning: Context) -> None:
    value, array = spanning.Value("l", 0), spanning.Array("l", 2)
    children = [InProcess(spanning, _count_up, value, array, 300) for _ in range(2)]
    for child in children:
        child.result()
    assert value.value == 600
    assert array[:] == [600, 600]


def _count_up(value: Any, array: Any, rounds: int) -> None:
    for _ in range(rounds):
        with value.get_lock():
            value.value += 1
        with array:
            for index in range(len(array)):
                array[index] += 1


def test_a_value_uses_the_lock_it_is_given(ctx: Context) -> None:
    lock = ctx.RLock()
    value, array = ctx.Value("i", 5, lock=lock), ctx.Array("i", 2, lock=lock)
    assert value.get_lock() is lock
    assert array.get_lock() is lock
    with held_by_thread(lock):
        assert value.acquire(False) is False
    raw = multiprocessing.sharedctypes.synchronized(ctx.RawValue("i", 1), lock, ctx)
    assert raw.get_lock() is lock


def test_a_managers_proxies_work_beside_the_primitives(ctx: Context) -> None:
    with ctx.Manager() as manager:
        lock, items = manager.Lock(), manager.list()
        with lock, ctx.Lock():
            items.append(1)
        assert list(items) == [1]


# Pickling, identity, repr


PICKLED: dict[str, Callable[[Context], Any]] = {
    "Lock": lambda ctx: ctx.Lock(),
    "RLock": lambda ctx: ctx.RLock(),
    "Semaphore": lambda ctx: ctx.Semaphore(2),
    "BoundedSemaphore": lambda ctx: ctx.BoundedSemaphore(2),
    "Condition": lambda ctx: ctx.Condition(),
    "Condition of a Lock": lambda ctx: ctx.Condition(ctx.Lock()),
    "Event": lambda ctx: ctx.Event(),
    "Barrier": lambda ctx: ctx.Barrier(2),
    "Queue": lambda ctx: ctx.Queue(),
    "JoinableQueue": lambda ctx: ctx.JoinableQueue(),
    "SimpleQueue": lambda ctx: ctx.SimpleQueue(),
    "Value": lambda ctx: ctx.Value("i"),
    "Array": lambda ctx: ctx.Array("i", 2),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_nothing_is_pickled_but_while_spawning(ctx: Context, kind: str) -> None:
    shared = PICKLED[kind](ctx)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(RuntimeError, match="only be shared between processes through inheritance"):
            pickle.dumps(shared, protocol)


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition", "Value", "Array"])
def test_nothing_is_copied(ctx: Context, kind: str) -> None:
    with pytest.raises(RuntimeError, match="only be shared between processes through inheritance"):
        copy.copy(PICKLED[kind](ctx))


def test_an_object_holding_primitives_arrives_whole_in_a_process(spanning: Context) -> None:
    lock, semaphore = spanning.RLock(), spanning.Semaphore(3)
    parts = {
        "lock": lock,
        "again": lock,
        "condition": spanning.Condition(lock),
        "semaphore": semaphore,
        "bounded": spanning.BoundedSemaphore(2),
        "event": spanning.Event(),
        "barrier": spanning.Barrier(1),
    }
    parts["event"].set()
    with lock:
        found = in_process(spanning, _look, parts)
    assert found == {
        "lock": False,
        "condition": False,
        "semaphore": 3,
        "bounded": 2,
        "event": True,
        "barrier": (1, 0),
        "same": True,
    }


def _look(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "lock": parts["lock"].acquire(False),
        "condition": parts["condition"].acquire(False),
        "semaphore": parts["semaphore"].get_value(),
        "bounded": parts["bounded"].get_value(),
        "event": parts["event"].is_set(),
        "barrier": (parts["barrier"].parties, parts["barrier"].wait()),
        "same": parts["lock"] is parts["again"],
    }


def test_a_grandchild_gets_the_very_lock_of_its_grandparent(spanning: Context) -> None:
    lock = spanning.Lock()
    with lock:
        assert in_process(spanning, in_process, spanning, _take_and_give_back, lock) is False
    assert in_process(spanning, in_process, spanning, _take_and_give_back, lock) is True


def test_a_context_can_be_sent_to_a_process(spanning: Context) -> None:
    assert in_process(spanning, _call, spanning, "get_start_method") == spanning.get_start_method()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lock_made_for_spawning_can_be_inherited_by_forking(family: str) -> None:
    lock = FAMILIES[family]("spawn").Lock()
    fork = FAMILIES[family]("fork")
    with lock:
        assert in_process(fork, _acquire, lock, False) is False
    assert in_process(fork, _take_and_give_back, lock) is True


@pytest.mark.parametrize("kind", [*KINDS, "Event"])
def test_primitives_are_hashable_equal_only_to_themselves_and_weakly_referable(ctx: Context, kind: str) -> None:
    one: Any = getattr(ctx, kind)()
    other: Any = getattr(ctx, kind)()
    assert one == one
    assert one != other
    assert {one, other, one} == {one, other}
    reference = weakref.ref(one)
    one.extra = "attributes can be added"
    del one
    assert reference() is None, "it is freed at once, without the garbage collector"


def test_bound_methods_of_a_primitive_may_be_kept(ctx: Context) -> None:
    lock = ctx.Lock()
    acquire, release = lock.acquire, lock.release
    assert acquire(False) is True
    assert lock.acquire(False) is False
    release()
    condition = ctx.Condition(lock)
    with condition:
        assert acquire(False) is False


def test_the_repr_of_a_lock_names_its_owner(ctx: Context) -> None:
    lock = ctx.Lock()
    me = multiprocessing.current_process().name
    assert repr(lock).startswith("<Lock(owner=None")
    with lock:
        assert repr(lock).startswith(f"<Lock(owner={me}")
    assert repr(lock).startswith("<Lock(owner=None")


def test_the_repr_of_an_rlock_names_its_owner_and_depth(ctx: Context) -> None:
    lock = ctx.RLock()
    me = multiprocessing.current_process().name
    assert repr(lock).startswith("<RLock(None, 0")
    with lock, lock:
        assert repr(lock).startswith(f"<RLock({me}, 2")
    assert repr(lock).startswith("<RLock(None, 0")


def test_the_reprs_of_semaphores_show_their_values(ctx: Context) -> None:
    assert repr(ctx.Semaphore(3)).startswith("<Semaphore(value=3")
    bounded = ctx.BoundedSemaphore(3)
    bounded.acquire()
    assert repr(bounded).startswith("<BoundedSemaphore(value=2, maxvalue=3")


def test_the_reprs_of_condition_event_and_barrier_begin_with_their_names(ctx: Context) -> None:
    assert repr(ctx.Condition()).startswith("<Condition(<RLock(None, 0")
    event = ctx.Event()
    assert repr(event).endswith(" unset>")
    event.set()
    assert repr(event).startswith("<Event at 0x")
    assert repr(event).endswith(" set>")
    assert "Barrier" in repr(ctx.Barrier(2))


# Signals


class InterruptedByTestError(Exception):
    """Raised by a signal handler."""


@contextlib.contextmanager
def alarms(handle: Callable[[types.FrameType | None], object]) -> Iterator[list[int]]:
    """Have SIGALRM handled every 10 ms by this thread; gives a list that grows with each."""
    handled: list[int] = []

    def handler(_: int, frame: types.FrameType | None) -> None:
        handled.append(1)
        handle(frame)

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        yield handled
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Interrupt the block, once it waits, by one exception from a signal handler."""
    places: list[Any] = []
    raised: list[bool] = []

    def interrupt(frame: types.FrameType | None) -> None:
        # It waits when several signals found it at the same place. Before that, stock would lose its place: an exception
        # between the steps of its Condition.wait leaves the lock free. Who waits in several places waits for 1 s at most.
        places.append(frame and (id(frame), frame.f_lasti))
        if len(places) >= 5 and (len(set(places[-4:])) == 1 or len(places) >= 100) and not raised:
            raised.append(True)
            raise InterruptedByTestError

    # A thread that takes signals when the main thread does not.
    enough = threading.Event()
    bystander = threading.Thread(target=enough.wait, daemon=True)
    bystander.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with pytest.raises(InterruptedByTestError), alarms(interrupt):
            yield
    finally:
        after = signal.pthread_sigmask(signal.SIG_SETMASK, before)
        enough.set()
        bystander.join()
    assert after == before, "signals were left blocked"


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore"])
def test_signals_neither_end_nor_shorten_nor_restart_a_timed_acquire(ctx: Context, kind: str) -> None:
    with busy(ctx, kind) as primitive, alarms(lambda _: None) as handled, takes_at_least(2 * SHORT):
        assert primitive.acquire(True, 2 * SHORT) is False
    assert len(handled) >= 3


def test_signals_do_not_end_a_condition_wait(ctx: Context) -> None:
    condition = ctx.Condition()
    with condition, alarms(lambda _: None) as handled, takes_at_least(2 * SHORT):
        assert condition.wait(2 * SHORT) is False
    assert len(handled) >= 3


@pytest.mark.parametrize("timeout", [None, PATIENCE])
@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore"])
def test_an_exception_from_a_signal_handler_ends_an_acquire_and_takes_nothing(
    ctx: Context, kind: str, timeout: float | None
) -> None:
    with busy(ctx, kind) as primitive:
        with interrupted():
            primitive.acquire(True, timeout)
        assert primitive.acquire(False) is False
        if kind != "RLock":
            primitive.release()
    assert primitive.acquire(False) is True
    primitive.release()


def test_an_exception_from_a_signal_handler_ends_a_wait_with_the_lock_taken_back(ctx: Context) -> None:
    condition = ctx.Condition()
    with condition:
        with interrupted():
            condition.wait(PATIENCE)
        assert in_thread(condition.acquire, False) is False
    waiters = Waiters(condition, 1)
    with condition:
        condition.notify()
    assert waiters.results() == [True]


def test_an_exception_from_a_signal_handler_ends_an_event_wait_and_the_event_still_works(ctx: Context) -> None:
    event = ctx.Event()
    with interrupted():
        event.wait(PATIENCE)
    assert event.is_set() is False
    waiter = InThread(event.wait, PATIENCE)
    event.set()
    assert waiter.result() is True


# The context


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_says_its_start_method_and_is_its_own_context(family: str, method: str) -> None:
    context = FAMILIES[family](method)
    assert context.get_start_method() == method
    assert context.get_context() is context
    assert FAMILIES[family](method) is context
    assert isinstance(context, multiprocessing.context.BaseContext)
    with pytest.raises(ValueError, match="cannot find context"):
        FAMILIES[family]("telepathy")


def test_a_contexts_other_contexts_are_of_its_family(ours: Context) -> None:
    assert ours.get_context("spawn") is shlock.get_context("spawn")


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_queues_are_of_the_classes_of_that_name(ctx: Context, kind: str) -> None:
    made = getattr(ctx, kind)()
    assert isinstance(made, getattr(shlock if type(ctx).__module__.startswith("shlock") else multiprocessing.queues, kind))
    made.close()


# Where shlock differs, on purpose


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_locked_says_whether_anybody_holds_the_lock(ours: Context, kind: str) -> None:
    lock = getattr(ours, kind)()
    assert lock.locked() is False
    with lock:
        assert lock.locked() is True
        assert in_process(ours, _call, lock, "locked") is True
    assert lock.locked() is False
    with held_by_process(ours, lock):
        assert lock.locked() is True
    assert lock.locked() is False


@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_that_is_not_a_number_is_a_value_error_and_takes_nothing(ours: Context, kind: str) -> None:
    primitive = getattr(ours, kind)()
    with pytest.raises(ValueError, match=r"(?i)nan|not a number"):
        primitive.acquire(True, float("nan"))
    assert primitive.acquire(False) is True
    primitive.release()


def test_a_wait_for_not_a_number_is_a_value_error(ours: Context) -> None:
    condition = ours.Condition()
    with condition:
        with pytest.raises(ValueError, match=r"(?i)nan|not a number"):
            condition.wait(float("nan"))
        assert in_thread(condition.acquire, False) is False
    with pytest.raises(ValueError, match=r"(?i)nan|not a number"):
        ours.Event().wait(float("nan"))
