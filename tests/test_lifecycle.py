"""Locks come and go: nothing grows, nothing is used again that somebody still knows, and the end is silent."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, Child, Page, eventually, mapped_segments, open_files, program_environment, run

import shlock
from shlock import _anonymous

#: A million takes 20 s and more; SHLOCK_TEST_ROUNDS=1000000 does it.  What would grow by a word a lock shows at 100,000.
ROUNDS = int(os.environ.get("SHLOCK_TEST_ROUNDS", "100000"))

#: Bytes by which a process may grow in ROUNDS rounds: less than a word for each.
MOST_GROWTH = 2_000_000

MAKERS: dict[str, Callable[[], Any]] = {
    "Lock": shlock.Lock,
    "RLock": shlock.RLock,
    "Semaphore": lambda: shlock.Semaphore(1),
    "owned Semaphore": lambda: shlock.Semaphore(1, owned=True),
    "owned Semaphore with many words": lambda: shlock.Semaphore(40, owned=True),
    "BoundedSemaphore": lambda: shlock.BoundedSemaphore(1),
    "Condition": shlock.Condition,
    "Event": shlock.Event,
    "Barrier": lambda: shlock.Barrier(2),
}


def resources() -> tuple[int, int, int]:
    """Bytes of memory, open files, mapped segments of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), open_files(), mapped_segments()


def growth(work: Callable[[int], object], rounds: int) -> tuple[int, int, int]:
    """By how much a fresh process grows while it works, after a tenth of the rounds to warm up."""

    def body() -> tuple[int, int, int]:
        work(rounds // 10)
        before = resources()
        work(rounds)
        after = resources()
        return tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[return-value]

    return Child(body).result(8 * PATIENCE)


def assert_no_growth(work: Callable[[int], object], rounds: int) -> None:
    memory, files, segments = growth(work, rounds)
    assert memory < MOST_GROWTH, f"{memory} bytes more"
    assert files <= 0
    assert segments <= 0


@pytest.mark.patience(300)
@pytest.mark.parametrize("what", MAKERS)
def test_primitives_made_and_dropped_grow_nothing(what: str) -> None:
    make = MAKERS[what]

    def work(rounds: int) -> None:
        for _ in range(rounds):
            make()

    assert_no_growth(work, ROUNDS if what == "Lock" else ROUNDS // 10)


def test_primitives_used_and_dropped_grow_nothing() -> None:
    def work(rounds: int) -> None:
        for _ in range(rounds):
            lock, semaphore = shlock.Lock(), shlock.Semaphore(2, owned=True)
            with lock, semaphore:
                lock.acquire(timeout=0)

    assert_no_growth(work, ROUNDS // 10)


def test_primitives_waited_for_and_dropped_grow_nothing() -> None:
    def work(rounds: int) -> None:
        for _ in range(rounds):
            lock, event, condition = shlock.Lock(), shlock.Event(), shlock.Condition()
            lock.acquire()
            assert not lock.acquire(timeout=1e-9)
            assert not event.wait(1e-9)
            with condition:
                assert not condition.wait(1e-9)

    assert_no_growth(work, ROUNDS // 100)


def test_many_primitives_at_once_are_given_back() -> None:
    def work(rounds: int) -> None:
        for _ in range(rounds):
            kept = [shlock.Lock() for _ in range(2000)]
            assert len({(lock._block.arena.identity, lock._block.index) for lock in kept}) == 2000
            kept.clear()

    assert_no_growth(work, 50)


def test_primitives_shared_with_children_and_dropped_grow_nothing() -> None:
    """Their blocks are not used again one by one; their segments go when all of them have gone."""

    def work(rounds: int) -> None:
        for _ in range(rounds):
            locks = [shlock.Lock() for _ in range(50)]
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
            del locks

    memory, files, segments = growth(work, 600)
    assert memory < 4 * MOST_GROWTH
    assert files <= 2
    assert segments <= 2


def test_a_named_lock_opened_again_and_again_grows_nothing(domain: str) -> None:
    def work(rounds: int) -> None:
        for _ in range(rounds):
            with shlock.Lock("x", domain=domain):
                pass

    assert_no_growth(work, ROUNDS // 5)


def test_named_locks_of_many_names_opened_again_and_again_grow_nothing(domain: str) -> None:
    def work(rounds: int) -> None:
        for number in range(rounds):
            shlock.Lock(f"name {number % 100}", domain=domain)

    assert_no_growth(work, ROUNDS // 10)


def test_threads_that_come_and_go_grow_nothing() -> None:
    def work(rounds: int) -> None:
        lock = shlock.Lock()
        for _ in range(rounds):
            with lock:
                thread = threading.Thread(target=lock.acquire, kwargs={"timeout": 1e-9})
                thread.start()
                thread.join()

    assert_no_growth(work, 1000)


@pytest.mark.parametrize("what", ["Lock", "owned Semaphore"])
def test_a_dropped_primitive_lets_its_memory_go(what: str) -> None:
    """Also one that was waited for last: nothing in a pool refers to it."""

    def body() -> bool:
        _anonymous._own = None
        primitive = MAKERS[what]()
        primitive.acquire()
        assert not primitive.acquire(timeout=0.001)
        primitive.release()
        segments = resources()[2]
        _anonymous._own = None
        del primitive
        return resources()[2] < segments

    assert Child(body).result()


# -- shared with a child --------------------------------------------------------------------------------------------------


def excludes(primitive: Any) -> bool:
    """Whether it is taken, as one sees who tries."""
    return not primitive.acquire(block=False)


@pytest.mark.parametrize("what", ["Lock", "RLock", "Semaphore", "owned Semaphore", "BoundedSemaphore"])
def test_a_lock_shared_with_a_child_is_not_used_again_while_the_child_lives(what: str) -> None:
    """The parent drops it and makes a thousand others: between the child and its own child it still excludes."""
    page = Page(3)
    primitive = MAKERS[what]()
    used = (primitive._block.arena.identity, primitive._block.index)

    def child() -> bool:
        primitive.acquire()
        grandchild = Child(lambda: (eventually(lambda: page[0]), excludes(primitive))[1])
        page[1] = 1
        return grandchild.result()

    process = Child(child)
    eventually(lambda: page[1])
    del primitive
    child = None  # type: ignore[assignment]
    gc.collect()
    others = [MAKERS[what]() for _ in range(1000)]
    assert used not in {(other._block.arena.identity, other._block.index) for other in others}
    for other in others:
        assert other.acquire(block=False)
        other.release()
    page[0] = 1
    assert process.result() is True


def test_a_barrier_shared_with_a_child_is_not_used_again_while_the_child_lives() -> None:
    page = Page(2)
    barrier = shlock.Barrier(2)
    used = (barrier._block.arena.identity, barrier._block.index)

    def child() -> list[int]:
        grandchild = Child(lambda: barrier.wait(PATIENCE))
        eventually(lambda: barrier.n_waiting == 1)
        page[1] = 1
        eventually(lambda: page[0])
        return sorted([barrier.wait(PATIENCE), grandchild.result()])

    process = Child(child)
    eventually(lambda: page[1])
    del barrier
    child = None  # type: ignore[assignment]
    gc.collect()
    others = [shlock.Barrier(2) for _ in range(1000)]
    assert used not in {(other._block.arena.identity, other._block.index) for other in others}
    page[0] = 1
    assert process.result() == [0, 1]


@pytest.mark.parametrize("what", [what for what in MAKERS if what != "Condition"])
def test_a_lock_that_no_child_knows_is_used_again(what: str) -> None:
    """All of its blocks."""

    def blocks(primitive: Any) -> set[tuple[int, int]]:
        block = primitive._block
        return {(block.arena.identity, index) for index in (block.index, *block.extensions)}

    def body() -> bool:
        kept = shlock.Lock()  # has the first block, which never extends another one
        primitive = MAKERS[what]()
        used = blocks(primitive)
        del primitive
        return blocks(MAKERS[what]()) == used and not kept.locked()

    assert Child(body).result()


def test_a_lock_that_is_used_again_is_as_new() -> None:
    def body() -> bool:
        for make in MAKERS.values():
            for previous in MAKERS.values():
                old = previous()
                if hasattr(old, "acquire"):
                    old.acquire()
                if hasattr(old, "set"):
                    old.set()
                if hasattr(old, "abort"):
                    old.abort()
                del old
                new = make()
                assert not getattr(new, "broken", False)
                assert not (new.is_set() if hasattr(new, "is_set") else False)
                if hasattr(new, "acquire"):
                    assert new.acquire(block=False), f"{previous} and then {make}"
                    new.release()
        return True

    assert Child(body).result()


SPAWNED = """
import multiprocessing, sys
import shlock

def use(lock, semaphore, barrier, condition, event, queue):
    queue.put("there")
    event.wait()
    with lock, semaphore, condition:
        pass
    barrier.wait()
    queue.put("done")

def start(ctx, queue):
    lock, semaphore, barrier = ctx.Lock(), ctx.Semaphore(1, owned=True), ctx.Barrier(2)
    condition, event = ctx.Condition(), ctx.Event()
    children = [ctx.Process(target=use, args=(lock, semaphore, barrier, condition, event, queue)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        assert queue.get() == "there"
    event.set()
    return children  # and everything else goes

if __name__ == "__main__":
    ctx = shlock.get_context(sys.argv[1])
    queue = ctx.SimpleQueue()
    children = start(ctx, queue)
    others = [ctx.Lock() for _ in range(1000)]
    for lock in others:
        lock.acquire()
    for child in children:
        assert queue.get() == "done"
        child.join()
        assert child.exitcode == 0
    print("good")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_use_primitives_of_which_the_parent_has_no_copy_any_more(method: str, tmp_path: Path) -> None:
    assert run_file(SPAWNED, tmp_path, method) == "good\n"


def run_file(source: str, folder: Path, *arguments: str, status: int = 0) -> str:
    path = folder / "program.py"
    path.write_text(source)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), *arguments],
        capture_output=True,
        text=True,
        env=program_environment(),
        timeout=2 * PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, "")
    return done.stdout


# -- the end --------------------------------------------------------------------------------------------------------------

ENDINGS = """
import os, sys, threading
import shlock

kept = []

def work(ctx_method, how):
    ctx = shlock.get_context(ctx_method)
    lock, rlock, semaphore = ctx.Lock(), ctx.RLock(), ctx.Semaphore(2, owned=True)
    condition, event, barrier, queue = ctx.Condition(), ctx.Event(), ctx.Barrier(2), ctx.SimpleQueue()
    kept.extend([lock, rlock, semaphore, condition, event, barrier, queue, shlock.Lock("x", domain=sys.argv[3])])
    lock.acquire()
    lock.acquire(timeout=0.01)
    event.wait(0.01)
    with condition:
        condition.wait(0.01)
    if how == "a thread waits":
        threading.Thread(target=lock.acquire, daemon=True).start()
        while not lock.waiters:
            pass
    if how == "a cycle":
        lock.__dict__["me"] = lock

def child(method, how):
    work(method, how)

if __name__ == "__main__":
    method, how = sys.argv[1:3]
    work(method, how)
    ctx = shlock.get_context(method)
    process = ctx.Process(target=child, args=(method, how))
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode
    if how == "sys.exit":
        sys.exit(3)
"""


@pytest.mark.parametrize("how", ["return", "sys.exit", "a thread waits", "a cycle"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_end_of_the_interpreter_is_silent(method: str, how: str, domain: str, tmp_path: Path) -> None:
    assert run_file(ENDINGS, tmp_path, method, how, domain, status=3 if how == "sys.exit" else 0) == ""


def test_a_pool_ends_silently_and_leaves_nothing(tmp_path: Path) -> None:
    source = """
import os, sys
import shlock

def square(number):
    return number * number

if __name__ == "__main__":
    ctx = shlock.get_context(sys.argv[1])
    with ctx.Pool(2) as pool:
        assert pool.map(square, range(50)) == [n * n for n in range(50)]
    print("good")
"""
    for method in ("fork", "spawn", "forkserver"):
        assert run_file(source, tmp_path, method) == "good\n"


def test_importing_opens_no_segment_and_starts_no_process() -> None:
    source = """
        import os
        import shlock
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            assert not file.read()
        assert not [n for n in os.listdir("/proc/self/fd") if "shm" in os.path.realpath(f"/proc/self/fd/{n}")]
    """
    assert run(source) == ""
