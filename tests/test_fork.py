"""A fork at any moment leaves both sides right.

The first half forks at *every* place where CPython can run a signal handler in an operation (`schedules.Interrupt`): the
child then goes on in the middle of what its parent was doing.  It must not own what its parent owns, must not write as its
parent, and must be able to finish as itself.  The parent must not notice.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from schedules import Interrupt
from support import PATIENCE, Child, Page, eventually, is_biased_always

import shlock
from shlock import _names, _sys

MADE: dict[str, Callable[[], Any]] = {
    "Lock": shlock.Lock,
    "RLock": shlock.RLock,
    "owned Semaphore": lambda: shlock.Semaphore(1, owned=True),
}


@pytest.fixture(params=MADE)
def lock(request: pytest.FixtureRequest) -> Any:
    return MADE[request.param]()


def owner_pid(lock: Any) -> int | None:
    owner = lock.owner
    return None if owner is None else owner.pid


def wait_for(pid: int) -> None:
    """A child ends normally."""
    descriptor = os.pidfd_open(pid)
    try:
        if not _readable(descriptor, PATIENCE):
            os.kill(pid, signal.SIGABRT)
            os.waitpid(pid, 0)
            raise AssertionError("the child hangs")
    finally:
        os.close(descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed"


def _readable(descriptor: int, seconds: float) -> bool:
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class ForkEverywhere:
    """Runs an operation once for every place in it where a handler can run, and forks there."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.parent = os.getpid()
        self.interrupt = Interrupt(self._fork)

    def _fork(self) -> None:
        self.pid = os.fork()

    def is_child(self) -> bool:
        return os.getpid() != self.parent

    def run(
        self, prepare: Callable[[], None], operate: Callable[[], object],
        in_child: Callable[[], None], in_parent: Callable[[], None], least: int,
    ) -> None:  # fmt: skip
        """`in_child` runs in the child once it has finished its copy of the operation, `in_parent` in the parent."""
        prepare()
        positions = self.interrupt.positions(operate)
        in_parent()
        forks = 0
        for position in positions:
            prepare()
            self.pid = None
            where = "before the fork"
            try:
                where = self.interrupt.run(operate, position).where
                if self.is_child():
                    in_child()
                    os._exit(0)
            except BaseException:
                if self.is_child():
                    import traceback

                    traceback.print_exc()
                raise
            finally:
                if self.is_child():
                    os._exit(1)
            try:
                in_parent()
                if self.pid is not None:
                    forks += 1
                    wait_for(self.pid)
            except BaseException as error:
                error.add_note(f"forked in {where}")
                raise
        print(f"forked at {forks} of {len(positions)} bytecodes")
        assert forks >= (0 if is_biased_always() else least)


def test_a_fork_anywhere_in_acquire_of_a_free_lock_gives_it_to_one_process(lock: Any) -> None:
    """The child's acquire goes on as its own: it waits until its parent has released."""
    got: list[bool] = []

    def prepare() -> None:
        got.clear()

    def operate() -> None:
        got.append(lock.acquire())

    def in_child() -> None:
        assert got == [True]
        assert owner_pid(lock) == os.getpid(), "it returned, and somebody else holds the lock"
        lock.release()

    def in_parent() -> None:
        assert got == [True]
        assert owner_pid(lock) == os.getpid()
        lock.release()

    ForkEverywhere().run(prepare, operate, in_child, in_parent, 2)
    assert not lock.locked()


def test_a_fork_anywhere_in_acquire_of_a_held_lock_lets_both_sides_finish(lock: Any) -> None:
    """The owner, a thread of the parent, releases while the main thread is about to sleep."""
    got: list[bool] = []
    go, ready = threading.Event(), threading.Event()
    owner: list[threading.Thread] = []
    pid = os.getpid()

    def own() -> None:
        assert lock.acquire()
        ready.set()
        assert go.wait(PATIENCE)
        lock.release()

    def at(label: str) -> None:
        if label == "A6 before sleeping" and os.getpid() == pid and threading.current_thread() is threading.main_thread():
            go.set()

    def prepare() -> None:
        got.clear()
        go.clear()
        ready.clear()
        owner[:] = [threading.Thread(target=own)]
        owner[0].start()
        assert ready.wait(PATIENCE)
        _sys.crash_points[:] = [at]

    def operate() -> None:
        got.append(lock.acquire())

    def in_child() -> None:
        assert got == [True]
        assert owner_pid(lock) == os.getpid()
        lock.release()

    def in_parent() -> None:
        _sys.crash_points.clear()
        assert got == [True]
        owner[0].join(PATIENCE)
        assert owner_pid(lock) == os.getpid()
        lock.release()

    try:
        ForkEverywhere().run(prepare, operate, in_child, in_parent, 10)
    finally:
        _sys.crash_points.clear()
    eventually(lambda: not lock.waiters)
    assert not lock.locked()


def release_in(parent: int, lock: Any) -> None:
    """Release what that process holds: a child that is forked meanwhile may be told that it holds nothing."""
    try:
        lock.release()
    except (AssertionError, ValueError):
        assert os.getpid() != parent, "only a child that had not begun yet may be told that it holds nothing"


def test_a_fork_anywhere_in_release_releases_once(lock: Any) -> None:
    """The release is the parent's.  The child's copy of it does nothing; afterwards the child can take the lock."""
    parent = os.getpid()

    def prepare() -> None:
        assert lock.acquire()

    def in_child() -> None:
        assert owner_pid(lock) != os.getpid()
        assert lock.acquire()
        assert owner_pid(lock) == os.getpid()
        lock.release()

    def in_parent() -> None:
        eventually(lambda: owner_pid(lock) != os.getpid())

    ForkEverywhere().run(prepare, lambda: release_in(parent, lock), in_child, in_parent, 1)
    assert not lock.locked()


def test_a_fork_anywhere_in_release_with_a_waiter_releases_once(lock: Any) -> None:
    """The waiter, a thread of the parent, comes in; the child's copy of the release does nothing and says nothing."""
    parent, page = os.getpid(), Page()
    waiting: list[threading.Thread] = []

    class LateChildren(ForkEverywhere):
        """A child that has not begun yet would release its parent's lock, as anybody may."""

        def _fork(self) -> None:
            super()._fork()
            if self.is_child():
                eventually(lambda: page[0])

    def wait() -> None:
        with lock:
            pass

    def prepare() -> None:
        page[0] = 0
        assert lock.acquire()
        waiting[:] = [threading.Thread(target=wait)]
        waiting[0].start()
        eventually(lambda: lock.waiters)

    def in_child() -> None:
        assert owner_pid(lock) != os.getpid()
        assert lock.acquire()
        lock.release()

    def in_parent() -> None:
        waiting[0].join(PATIENCE)
        assert not waiting[0].is_alive()
        page[0] = 1

    LateChildren().run(prepare, lambda: release_in(parent, lock), in_child, in_parent, 5)
    eventually(lambda: not lock.locked())


def test_a_fork_anywhere_in_a_with_statement_is_left_by_its_owner_only(lock: Any) -> None:
    def prepare() -> None:
        pass

    inside: list[int] = []

    def operate() -> None:
        with lock:
            inside.append(os.getpid())

    def in_child() -> None:
        assert owner_pid(lock) != os.getpid()
        with lock:
            assert owner_pid(lock) == os.getpid()

    def in_parent() -> None:
        assert owner_pid(lock) != os.getpid()

    ForkEverywhere().run(prepare, operate, in_child, in_parent, 3)
    assert not lock.locked()


# -- a fork inside ----------------------------------------------------------------------------------------------------------


def fork_and(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_a_child_that_leaves_its_parents_with_releases_nothing(kind: str) -> None:
    lock = MADE[kind]()
    parent = os.getpid()
    pid = 0
    try:
        with lock:
            pid = os.fork()
            held_by = owner_pid(lock)
            if pid:
                # Until the child is gone, the lock is ours.
                wait_for(pid)
                assert owner_pid(lock) == parent
        if os.getpid() != parent:
            os._exit(0 if held_by == parent and owner_pid(lock) == parent else 1)
    finally:
        if os.getpid() != parent:
            os._exit(2)
    assert not lock.locked()


def test_a_child_that_leaves_its_parents_with_after_the_parent_releases_nothing(lock: Any) -> None:
    """By then nobody holds it, or a third process: neither is an error of the child, and neither is disturbed."""
    parent, page = os.getpid(), Page()
    for third in (False, True):
        page[0] = 0
        pid = 0
        try:
            with lock:
                pid = os.fork()
                if pid == 0:
                    eventually(lambda: page[0])
            if os.getpid() != parent:
                os._exit(0 if owner_pid(lock) == (parent if third else None) else 3)
        except BaseException:
            if os.getpid() == parent:
                raise
            import traceback

            traceback.print_exc()
        finally:
            if os.getpid() != parent:
                os._exit(2)
        if third:
            lock.acquire()
        page[0] = 1
        wait_for(pid)
        if third:
            assert owner_pid(lock) == parent
            lock.release()
        assert not lock.locked()


def test_an_rlock_is_not_owned_by_the_child_of_its_owner() -> None:
    lock = shlock.RLock()

    def look() -> None:
        assert not lock._semlock._is_mine()
        assert lock.acquire(False) is False
        with pytest.raises(AssertionError):
            lock.release()

    with lock:
        wait_for(fork_and(look))
        assert lock._semlock._is_mine()
    assert not lock.locked()


def test_a_child_forked_while_another_thread_holds_is_not_the_owner() -> None:
    lock = shlock.Lock()
    holds, go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            holds.set()
            assert go.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(PATIENCE)

    page = Page()

    def look() -> None:
        assert lock.acquire(False) is False
        page[0] = 1
        assert lock.acquire()
        lock.release()

    pid = fork_and(look)
    eventually(lambda: page[0])
    go.set()
    holder.join(PATIENCE)
    wait_for(pid)
    assert not lock.locked()


def test_a_child_forked_while_another_thread_waits_does_not_wait_with_it() -> None:
    lock = shlock.Lock()
    assert lock.acquire()
    waiter = threading.Thread(target=lambda: lock.acquire() and lock.release())
    waiter.start()
    eventually(lambda: lock.waiters)

    page = Page()

    def look() -> None:
        assert [one.pid for one in lock.waiters] == [os.getppid()]
        assert lock.acquire(True, 0.01) is False
        page[0] = 1
        assert lock.acquire()
        lock.release()

    pid = fork_and(look)
    eventually(lambda: page[0])
    lock.release()
    waiter.join(PATIENCE)
    wait_for(pid)
    assert not lock.locked()
    assert lock.waiters == ()


def test_children_forked_while_another_thread_creates_names_can_create_them_too(domain: str) -> None:
    stop = threading.Event()
    made: list[int] = []

    def create() -> None:
        while not stop.is_set():
            with shlock.Lock(f"name {len(made)}", domain=domain):
                made.append(len(made))

    creator = threading.Thread(target=create)
    creator.start()

    def create_too(number: int) -> None:
        for turn in range(3):
            with shlock.Lock(f"name {number} {turn}", domain=domain):
                pass

    try:
        for number in range(20):
            before = len(made)
            wait_for(fork_and(lambda number=number: create_too(number)))  # type: ignore[misc]
            eventually(lambda before=before: len(made) > before)  # type: ignore[misc]
    finally:
        stop.set()
        creator.join(PATIENCE)


def test_names_can_be_created_after_a_creator_was_killed_though_its_child_lives(domain: str) -> None:
    """The child was forked while its parent held the creation lock, and has dropped its copy."""
    page = Page()

    def create() -> None:
        with _names.creating(shlock.Lock("first", domain=domain)._block.arena):
            page[0] = fork_and(lambda: (signal.pause(), None)[1])
            signal.pause()

    creator = Child(create)
    try:
        eventually(lambda: page[0])
        creator.kill()
        with shlock.Lock("second", domain=domain):
            pass
    finally:
        if page[0]:
            os.kill(page[0], signal.SIGKILL)


def test_the_death_of_a_child_that_was_forked_inside_frees_nothing() -> None:
    lock = shlock.Lock()
    with lock:
        child = Child(signal.pause)
        child.kill()
        assert owner_pid(lock) == os.getpid()
        other = Child(lock.acquire, True, 0.05)
        assert other.result() is False
    assert not lock.locked()


def test_a_waiter_becomes_heir_of_a_killed_owner_though_its_child_lives() -> None:
    """The child keeps the mapping and the descriptors of the owner.  It is not the owner."""
    lock, page = shlock.Lock(on_abandoned="ignore"), Page()

    def own() -> None:
        with lock:
            page[0] = fork_and(lambda: (signal.pause(), None)[1])  # lives on, in its parent's with
            signal.pause()

    owner = Child(own)
    try:
        eventually(lambda: page[0])
        heir = Child(lambda: (lock.acquire(), lock.abandoned is not None and lock.abandoned.pid)[1])
        eventually(lambda: lock.waiters)
        owner.kill()
        assert heir.result() == owner.pid
    finally:
        if page[0]:
            os.kill(page[0], signal.SIGKILL)


def test_two_hundred_children_use_one_lock() -> None:
    lock, page = shlock.Lock(), Page()

    def work() -> None:
        for _ in range(20):
            with lock:
                page[0] = page[0] + 1

    for _ in range(10):
        pids = [fork_and(work) for _ in range(20)]
        for pid in pids:
            wait_for(pid)
    assert page[0] == 200 * 20
    assert not lock.locked()
    assert lock.waiters == ()


@pytest.mark.parametrize("permits", [1, 2])
def test_a_permit_of_an_owned_semaphore_is_given_back_by_its_owner_only(permits: int) -> None:
    semaphore = shlock.Semaphore(permits, owned=True)
    semaphore.acquire()

    def release() -> None:
        with pytest.raises(ValueError, match="released too many times"):
            semaphore.release()

    wait_for(fork_and(release))
    assert semaphore.get_value() == permits - 1
    semaphore.release()
