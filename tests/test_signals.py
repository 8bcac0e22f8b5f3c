"""Signals at any moment: whatever a handler raises, nothing is leaked and nobody's wake-up is lost.

The first half interrupts each operation at *every* place where CPython can run a signal handler in it (`schedules.Interrupt`),
one run for each.  Others that wait do so without polling, so a lost wake-up is a hang.  The second half sends real signals.

The documented limit: what is raised at the very entry of release() or `__exit__`, before it has done anything, leaves the
lock held, as in multiprocessing, whose `__exit__` is a Python function, too.
"""

from __future__ import annotations

import gc
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from schedules import Interrupt, Interrupted, Interruption, is_at_entry, is_in_package
from support import PATIENCE, Child, Page, eventually, is_biased_always

import shlock
from shlock import _anonymous, _atomic, _owned, _parking, _sys

NO_POLLING = 10_000.0


@pytest.fixture(autouse=True)
def _mask_is_as_before() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    after = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert after == before, f"signals were left blocked: {after - before}"


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", NO_POLLING)


class InThread:
    """A function that runs in a thread; `result` joins it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def is_parked_at(self, primitive: Any) -> bool:
        return any(waiter.thread_id == self._thread.native_id for waiter in primitive.waiters)

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert self.is_over(), "a waiter was never woken"
        if self._error is not None:
            raise self._error
        return self._value


class Trial:
    """One run of one operation, and what must be so afterwards."""

    def operate(self) -> None:
        raise NotImplementedError

    def finish(self, outcome: Interruption) -> None:
        raise NotImplementedError

    def close(self) -> None:
        _sys.crash_points.clear()


def interrupt_everywhere(make: Callable[[], Trial], least: int) -> None:
    """Run a new trial for every place where a handler can run in it, and say how many those were."""
    interrupt = Interrupt()

    def run(action: Callable[[Trial], Any]) -> Any:
        trial = make()
        try:
            return action(trial)
        finally:
            trial.close()

    def dry(trial: Trial) -> list[int]:
        positions = interrupt.positions(trial.operate)
        trial.finish(Interruption())
        return positions

    def one(trial: Trial, position: int) -> Interruption:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        outcome = Interruption("before the operation raised something else")
        try:
            outcome = interrupt.run(trial.operate, position)
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask, "signals were left blocked"
            trial.finish(outcome)
        except BaseException as error:
            error.add_note(f"bytecode {position}, interrupted in {outcome.where}")
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return outcome

    run(dry)  # what is made once is made
    positions = run(dry)
    outcomes = [run(lambda trial, position=position: one(trial, position)) for position in positions]
    raised = [outcome.where for outcome in outcomes if outcome.raised]
    print(f"interrupted at {len(raised)} of {len(positions)} bytecodes, {len(set(raised))} different ones")
    if is_biased_always():  # there is next to nothing to interrupt
        least = 0
    assert len(raised) >= least, f"only {len(raised)} of {len(positions)} places were reached"


# -- nobody else there ----------------------------------------------------------------------------------------------------

FREE: dict[str, Callable[[], Any]] = {
    "Lock": shlock.Lock,
    "RLock": shlock.RLock,
    "Semaphore": shlock.Semaphore,
    "BoundedSemaphore": shlock.BoundedSemaphore,
    "owned Semaphore": lambda: shlock.Semaphore(1, owned=True),
}


@pytest.fixture(params=FREE)
def lock(request: pytest.FixtureRequest) -> Any:
    return FREE[request.param]()


def assert_free(lock: Any) -> None:
    assert not lock.locked(), f"{lock!r} is still held"
    assert lock.waiters == ()
    assert lock.acquire(False), f"{lock!r} cannot be taken"
    lock.release()


class TakeFree(Trial):
    def __init__(self, lock: Any, *arguments: Any) -> None:
        self.lock, self.arguments = lock, arguments
        self.got = False

    def operate(self) -> None:
        self.got = self.lock.acquire(*self.arguments)

    def finish(self, outcome: Interruption) -> None:
        assert self.got is not outcome.raised
        assert self.lock.locked() is self.got, f"{self.lock!r} after acquire() {'returned' if self.got else 'raised'}"
        if self.got:
            self.lock.release()
        assert_free(self.lock)


@pytest.mark.parametrize("arguments", [(), (False,), (True, 5.0)], ids=str)
def test_acquire_of_a_free_lock_that_is_interrupted_holds_nothing(lock: Any, arguments: tuple[Any, ...]) -> None:
    interrupt_everywhere(lambda: TakeFree(lock, *arguments), 2)


class ReleaseFree(Trial):
    def __init__(self, lock: Any) -> None:
        self.lock = lock
        assert lock.acquire()

    def operate(self) -> None:
        self.lock.release()

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and outcome.raised:
            assert self.lock.locked()
            self.lock.release()
        assert_free(self.lock)


def test_release_that_is_interrupted_has_released(lock: Any) -> None:
    interrupt_everywhere(lambda: ReleaseFree(lock), 1)


class NoOperands(Trial):
    """As another trial, while other threads have the operands of all locks, and with the pool of operands empty."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        for words in _owned._all_words:
            words.may_take.cell_contents = words.may_release.cell_contents = False
        _atomic._spare.clear()

    def operate(self) -> None:
        self.trial.operate()

    def finish(self, outcome: Interruption) -> None:
        self.trial.finish(outcome)


def test_acquire_that_is_interrupted_with_no_operands_left_holds_nothing(lock: Any) -> None:
    interrupt_everywhere(lambda: NoOperands(TakeFree(lock)), 2)


def test_release_that_is_interrupted_with_no_operands_left_has_released(lock: Any) -> None:
    interrupt_everywhere(lambda: NoOperands(ReleaseFree(lock)), 3)


@pytest.mark.parametrize("kind", [shlock.Lock, shlock.RLock])
def test_a_leased_lock_that_is_interrupted_is_held_or_not_as_a_plain_one(kind: type[shlock.Lock]) -> None:
    lock = kind(lease=600)
    for arguments in ((), (False,), (True, 5.0)):
        interrupt_everywhere(lambda arguments=arguments: TakeFree(lock, *arguments), 2)
    interrupt_everywhere(lambda: ReleaseFree(lock), 2)


class With(Trial):
    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.inside = False

    def operate(self) -> None:
        with self.lock:
            self.inside = True

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and self.inside:
            assert self.lock.locked()
            self.lock.release()
        assert_free(self.lock)


def test_with_that_is_interrupted_holds_nothing_afterwards(lock: Any) -> None:
    interrupt_everywhere(lambda: With(lock), 3)


class TakeAgain(Trial):
    """The second acquire and the first release of an RLock."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.taken = self.given = 0
        assert lock.acquire()

    def operate(self) -> None:
        self.lock.acquire()
        self.taken = 1
        self.lock.release()
        self.given = 1

    def finish(self, outcome: Interruption) -> None:
        depth = self.lock._semlock._count()
        assert depth == 1 or (depth == 2 and self.taken and outcome.at_entry), f"it is held {depth} times"
        for _ in range(depth):
            self.lock.release()
        assert_free(self.lock)


def test_rlock_taken_again_that_is_interrupted_is_held_once() -> None:
    lock = shlock.RLock()
    interrupt_everywhere(lambda: TakeAgain(lock), 0)


# -- with others ----------------------------------------------------------------------------------------------------------


class Contended(Trial):
    """An acquire that parks.  When it is at `label` another thread parks behind it, and then the owner releases."""

    def __init__(self, lock: Any, label: str, timeout: float | None = None) -> None:
        self.lock, self.label, self.timeout = lock, label, timeout
        self.got: bool | None = None
        self.go, self.gone, self.ready = threading.Event(), threading.Event(), threading.Event()
        self.is_parked = False
        self.second: InThread | None = None
        self.main = threading.get_ident()
        self.owner = InThread(self._own)
        assert self.ready.wait(PATIENCE)
        _sys.crash_points[:] = [self._at]

    def _own(self) -> None:
        assert self.lock.acquire()
        self.ready.set()
        assert self.go.wait(PATIENCE)
        if self.is_parked:
            self.second = second = InThread(self._take_and_give)
            eventually(lambda: second.is_parked_at(self.lock), "the second one is parked")
        self.lock.release()
        self.gone.set()

    def _take_and_give(self) -> None:
        assert self.lock.acquire()
        self.lock.release()

    def _at(self, label: str) -> None:
        if label == self.label and threading.get_ident() == self.main and not self.go.is_set():
            self.is_parked = True
            self.go.set()
            assert self.gone.wait(PATIENCE)

    def operate(self) -> None:
        self.got = self.lock.acquire(True, self.timeout)

    def finish(self, outcome: Interruption) -> None:
        self.go.set()
        self.owner.result()
        if self.got:
            assert self.lock.locked()
            self.lock.release()
        elif not outcome.raised:
            assert self.timeout is not None
        if self.second is not None:
            self.second.result()
        assert_free(self.lock)


def test_acquire_that_parks_and_is_interrupted_holds_nothing_and_wakes_the_next(lock: Any, no_polling: None) -> None:
    interrupt_everywhere(lambda: Contended(lock, "A6 before sleeping"), 20)


def test_acquire_that_gives_up_and_is_interrupted_holds_nothing_and_wakes_the_next(lock: Any, no_polling: None) -> None:
    """The owner releases when the deadline has passed, and wakes the one that is giving up."""
    interrupt_everywhere(lambda: Contended(lock, "A8 before S is IDLE", 0.001), 20)


class ReleaseToWaiter(Trial):
    def __init__(self, lock: Any) -> None:
        self.lock = lock
        assert lock.acquire()
        self.waiter = InThread(self._take_and_give)
        eventually(lambda: lock.waiters, "the other is parked")

    def _take_and_give(self) -> None:
        assert self.lock.acquire()
        self.lock.release()

    def operate(self) -> None:
        self.lock.release()

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and outcome.raised:
            assert self.lock.locked()
            self.lock.release()
        self.waiter.result()
        assert_free(self.lock)


def test_release_that_is_interrupted_wakes_the_waiter(lock: Any, no_polling: None) -> None:
    interrupt_everywhere(lambda: ReleaseToWaiter(lock), 5)


class WaitForEvent(Trial):
    def __init__(self) -> None:
        self.event = shlock.Event()
        self.returned = False
        self.main = threading.get_ident()
        self.second: InThread | None = None
        _sys.crash_points[:] = [self._at]

    def _at(self, label: str) -> None:
        if label == "A6 before sleeping" and threading.get_ident() == self.main and self.second is None:
            self.second = InThread(self.event.wait)
            InThread(self._set).result()

    def _set(self) -> None:
        eventually(lambda: self.second is not None and self.second.is_parked_at(self.event))
        self.event.set()

    def operate(self) -> None:
        self.returned = self.event.wait()

    def finish(self, outcome: Interruption) -> None:
        assert self.returned is not outcome.raised
        if self.second is not None:
            assert self.second.result() is True
        assert self.event.waiters == ()


def test_event_wait_that_is_interrupted_leaves_no_spot_and_lets_others_go_on(no_polling: None) -> None:
    interrupt_everywhere(WaitForEvent, 20)


def test_a_spot_that_an_interruption_lost_is_not_given_back_twice(no_polling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finalizer runs some time later, when the traceback goes; somebody else may wait there by then."""
    monkeypatch.setattr(_anonymous, "_own", None)
    event = shlock.Event()
    init = _parking.Spot.__init__

    def interrupted(spot: Any, *arguments: Any) -> None:
        init(spot, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_parking.Spot, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt) as lost:
            event.wait()
    waiter = InThread(event.wait)
    eventually(lambda: waiter.is_parked_at(event))
    del lost
    gc.collect()
    event.set()
    assert waiter.result() is True
    assert event.waiters == ()


class SetEvent(Trial):
    def __init__(self) -> None:
        self.event = shlock.Event()
        self.waiters = [InThread(self.event.wait) for _ in range(2)]
        eventually(lambda: len(self.event.waiters) == 2)

    def operate(self) -> None:
        self.event.set()

    def finish(self, outcome: Interruption) -> None:
        if not self.event.is_set():
            assert outcome.raised
            self.event.set()
        for waiter in self.waiters:
            assert waiter.result() is True


def test_event_set_that_is_interrupted_has_woken_everybody_or_nobody(no_polling: None) -> None:
    interrupt_everywhere(SetEvent, 5)


class WaitForCondition(Trial):
    """A wait that is notified; another thread that waits behind it is not, unless the first one didn't take it."""

    def __init__(self, lock: Any) -> None:
        self.condition = shlock.Condition(lock)
        self.returned = False
        self.main = threading.get_ident()
        self.second: InThread | None = None
        _sys.crash_points[:] = [self._at]

    def _at(self, label: str) -> None:
        if label == "A6 before sleeping" and threading.get_ident() == self.main and self.second is None:
            self.second = InThread(self._wait)
            InThread(self._notify).result()

    def _wait(self) -> bool:
        with self.condition:
            return self.condition.wait()

    def _notify(self) -> None:
        eventually(lambda: self.second is not None and self.second.is_parked_at(self.condition))
        with self.condition:
            self.condition.notify()

    def operate(self) -> None:
        with self.condition:
            self.returned = self.condition.wait()

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and self.condition.locked():
            self.condition.release()
        assert self.returned or outcome.raised
        if self.second is not None:
            if self.returned:
                InThread(self._notify_again).result()
            assert self.second.result() is True
        assert not self.condition.locked()
        assert self.condition.waiters == ()

    def _notify_again(self) -> None:
        with self.condition:
            self.condition.notify()


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_condition_wait_that_is_interrupted_holds_its_lock_and_passes_the_notification_on(kind: str, no_polling: None) -> None:
    interrupt_everywhere(lambda: WaitForCondition(FREE[kind]()), 30)


class Notify(Trial):
    def __init__(self) -> None:
        self.condition = shlock.Condition()
        self.waiters = [InThread(self._wait) for _ in range(2)]
        eventually(lambda: len(self.condition.waiters) == 2)

    def _wait(self) -> bool:
        with self.condition:
            return self.condition.wait()

    def operate(self) -> None:
        with self.condition:
            self.condition.notify_all()

    def finish(self, outcome: Interruption) -> None:
        if outcome.at_entry and self.condition.locked():
            self.condition.release()
        if outcome.raised:
            with self.condition:  # the ones that are left
                self.condition.notify_all()
        for waiter in self.waiters:
            assert waiter.result() is True
        assert not self.condition.locked()


def test_condition_notify_that_is_interrupted_can_be_repeated(no_polling: None) -> None:
    interrupt_everywhere(Notify, 10)


class LastAtBarrier(Trial):
    """The other one waits already."""

    def __init__(self) -> None:
        self.barrier = shlock.Barrier(2)
        self.other = InThread(self._wait)
        eventually(lambda: self.barrier.n_waiting == 1 and self.barrier.waiters)

    def _wait(self) -> str:
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            return "broken"
        return "through"

    def operate(self) -> None:
        self.barrier.wait()

    def finish(self, outcome: Interruption) -> None:
        eventually(lambda: self.other.is_over() or self.barrier.n_waiting == 1, "the other is through or waits alone")
        if not self.other.is_over() and self.barrier.n_waiting == 1:
            assert outcome.raised
            self.barrier.wait()
        assert self.other.result() in (("through", "broken") if outcome.raised else ("through",))
        assert self.barrier.waiters == ()


def test_barrier_wait_of_the_last_one_that_is_interrupted_leaves_nobody_asleep(no_polling: None) -> None:
    interrupt_everywhere(LastAtBarrier, 10)


class FirstAtBarrier(Trial):
    """The other one comes while this one is about to sleep."""

    def __init__(self) -> None:
        self.barrier = shlock.Barrier(2)
        self.main = threading.get_ident()
        self.other: InThread | None = None
        self.returned = False
        _sys.crash_points[:] = [self._at]

    def _at(self, label: str) -> None:
        if label == "A6 before sleeping" and threading.get_ident() == self.main and self.other is None:
            self.other = InThread(self.barrier.wait)
            self.other.result()

    def operate(self) -> None:
        self.barrier.wait()
        self.returned = True

    def finish(self, outcome: Interruption) -> None:
        _sys.crash_points.clear()  # interrupted before A6, it has not brought the other one yet, and nobody else may come below
        assert self.returned is not outcome.raised
        assert self.barrier.n_waiting == 0
        assert self.barrier.waiters == ()
        if not self.barrier.broken:
            second = InThread(self.barrier.wait)
            self.barrier.wait()
            second.result()


def test_barrier_wait_of_the_first_one_that_is_interrupted_is_not_counted_any_more(no_polling: None) -> None:
    interrupt_everywhere(FirstAtBarrier, 20)


# -- real signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def handling() -> Iterator[Callable[..., Any]]:
    """signal.signal, undone at the end."""
    before: list[tuple[int, Any]] = []

    def handle(number: int, handler: Any) -> None:
        before.append((number, signal.signal(number, handler)))

    yield handle
    for number, handler in reversed(before):
        signal.signal(number, handler)


def raise_interrupted(number: int, frame: Any) -> None:
    raise Interrupted


def _held(lock: Any) -> Callable[[], Any]:
    InThread(lock.acquire).result()
    return lock.acquire


def _condition_wait() -> tuple[Any, Callable[[], Any]]:
    condition = shlock.Condition()

    def wait() -> Any:
        with condition:
            return condition.wait()

    return condition, wait


def _blocking(kind: str) -> tuple[Any, Callable[[], Any]]:
    """A primitive, and a call on it that blocks for ever."""
    if kind in FREE:
        lock = FREE[kind]()
        return lock, _held(lock)
    if kind == "Condition":
        return _condition_wait()
    made: Any = shlock.Event() if kind == "Event" else shlock.Barrier(2)
    return made, made.wait


BLOCKING = [*FREE, "Condition", "Event", "Barrier"]


def send_when_blocked(primitive: Any, number: int) -> InThread:
    """Send a signal to the main thread once it is parked."""
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        eventually(lambda: primitive.waiters, "the main thread is parked")
        signal.pthread_kill(main, number)

    return InThread(send)


@pytest.mark.parametrize("kind", BLOCKING)
def test_what_a_handler_raises_comes_out_of_a_blocked_call_as_it_is(kind: str, handling: Callable[..., Any]) -> None:
    """posix_ipc alone would replace it by an error of its own."""
    handling(signal.SIGALRM, raise_interrupted)
    primitive, call = _blocking(kind)
    sender = send_when_blocked(primitive, signal.SIGALRM)
    with pytest.raises(Interrupted) as caught:
        call()
    sender.result()
    assert caught.value.__context__ is None
    assert primitive.waiters == ()


@pytest.mark.parametrize("kind", BLOCKING)
def test_ctrl_c_comes_out_of_a_blocked_call_as_keyboardinterrupt(kind: str, handling: Callable[..., Any]) -> None:
    handling(signal.SIGINT, signal.default_int_handler)
    primitive, call = _blocking(kind)
    sender = send_when_blocked(primitive, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        call()
    sender.result()
    assert primitive.waiters == ()
    if kind in FREE and kind != "RLock":  # that one belongs to a thread that has ended
        primitive.release()
        assert_free(primitive)


@pytest.mark.parametrize("kind", BLOCKING)
def test_a_handler_that_returns_resumes_the_wait_and_the_timeout_stays_right(kind: str, handling: Callable[..., Any]) -> None:
    seen: list[int] = []
    handling(signal.SIGUSR1, lambda number, frame: seen.append(number))
    primitive, call = _blocking(kind)
    main = threading.main_thread().ident
    assert main is not None
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            before = len(seen)
            signal.pthread_kill(main, signal.SIGUSR1)
            eventually(lambda: len(seen) > before or over.is_set())

    sender = InThread(send)
    start = time.monotonic()
    try:
        if kind in FREE:
            assert primitive.acquire(True, 0.3) is False
        elif kind == "Condition":
            with primitive:
                assert primitive.wait(0.3) is False
        elif kind == "Event":
            assert primitive.wait(0.3) is False
        else:
            with pytest.raises(threading.BrokenBarrierError):
                primitive.wait(0.3)
        elapsed = time.monotonic() - start
    finally:
        over.set()
        sender.result()
    assert elapsed >= 0.3
    assert len(seen) >= 3, "signals were handled while it waited, and not only afterwards"


def test_signals_to_a_thread_that_is_not_the_main_one_resume_its_wait(handling: Callable[..., Any]) -> None:
    seen: list[int] = []
    handling(signal.SIGUSR1, lambda number, frame: seen.append(number))
    lock = shlock.Lock()
    lock.acquire()
    waiting: list[float] = []
    idents: list[int] = []
    may_end = threading.Event()  # a signal to a thread that has ended would be the end of the process

    def wait() -> bool:
        idents.append(threading.get_ident())
        start = time.monotonic()
        got = lock.acquire(True, 0.3)
        waiting.append(time.monotonic() - start)
        assert may_end.wait(PATIENCE)
        return got

    waiter = InThread(wait)
    eventually(lambda: lock.waiters)
    while not waiting:
        signal.pthread_kill(idents[0], signal.SIGUSR1) if lock.waiters else time.sleep(0)
    may_end.set()
    assert waiter.result() is False
    assert waiting[0] >= 0.3
    assert len(seen) >= 3


def test_a_signal_that_the_program_had_blocked_stays_blocked(handling: Callable[..., Any]) -> None:
    handling(signal.SIGUSR1, raise_interrupted)
    lock = shlock.Lock()
    lock.acquire()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        assert lock.acquire(True, 0.05) is False
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.sigpending() == {signal.SIGUSR1}
    finally:
        handling(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# -- a storm --------------------------------------------------------------------------------------------------------------


def _storm(lock: Any, page: Page, seconds: float, seed: int) -> tuple[int, int]:
    """Take and release while a timer interrupts every half millisecond; how often inside, how often interrupted."""
    chance = random.Random(seed)
    armed = False
    rounds = interruptions = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal armed, interruptions
        # Not in a frame of this handler: a second signal may come before it has decided about the first.
        if armed and is_in_package(frame) and not is_at_entry(frame) and chance.random() < 0.5:
            armed = False
            interruptions += 1
            raise Interrupted

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        got = False
        armed = True
        try:
            got = lock.acquire()
            armed = False  # no signal is looked at between the return and here
        except Interrupted:
            assert not got
            continue
        assert page[1] == 0, "two are inside"
        page[1] = os.getpid()
        page[0] = page[0] + 1
        assert page[1] == os.getpid(), "two are inside"
        page[1] = 0
        rounds += 1
        armed = True
        try:
            lock.release()
            armed = False
        except Interrupted:
            pass  # it has released nevertheless
    signal.setitimer(signal.ITIMER_REAL, 0)
    return rounds, interruptions


@pytest.mark.parametrize("kind", FREE)
def test_a_storm_of_raising_handlers_keeps_the_counters_exact(kind: str) -> None:
    """Two processes with a timer of 0.5 ms each, interrupted anywhere in acquire and release."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    lock, page = FREE[kind](), Page()
    children = [Child(_storm, lock, page, 2.0, seed + number) for number in range(2)]
    results = [child.result() for child in children]
    print(f"rounds and interruptions: {results}")
    assert page[0] == sum(rounds for rounds, _ in results)
    assert all(rounds and interruptions for rounds, interruptions in results)
    assert_free(lock)
