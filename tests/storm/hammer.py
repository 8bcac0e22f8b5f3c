"""What one worker of pytest-xdist does in the storm; ``tests/test_storm.py`` starts it, in two sizes.

Several processes of every worker take named locks at random.  Under each lock stands a word that says who is inside: it must
be 0, or the pid of a dead process if an heir was just told (of that one, or of an heir that died before it wrote).  The
worker kills its processes at random and replaces them.
One test kills the very worker that runs it, inside the lock.
"""

import mmap
import os
import random
import signal
import time
import warnings
from multiprocessing import get_context

import pytest

import shlock

DOMAIN = os.environ["SHLOCK_STORM_DOMAIN"]
PAGE = os.environ["SHLOCK_STORM_PAGE"]
SECONDS = float(os.environ["SHLOCK_STORM_SECONDS"])
SEED = int(os.environ["SHLOCK_STORM_SEED"])
LOCKS = 3
#: Words of the page: who is inside each lock, then how often each was taken, then deaths that heirs were told of.
INSIDE, PASSAGES, TOLD, VIOLATIONS = 0, LOCKS, 2 * LOCKS, 3 * LOCKS


def words():
    with open(PAGE, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 4096)).cast("Q")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or before it was read
        return False


def pass_through(lock, number, page, timeout=None):
    """Once in and out, watching for somebody else inside.  False if the timeout passed first."""
    if not lock.acquire(timeout=timeout):
        return False
    try:
        seen, abandoned = page[INSIDE + number], lock.abandoned
        if abandoned is not None:
            page[TOLD + number] += 1
        if seen and (abandoned is None or is_running(seen)):
            page[VIOLATIONS] += 1
        page[INSIDE + number] = os.getpid()
        page[PASSAGES + number] += 1
        if page[INSIDE + number] != os.getpid():
            page[VIOLATIONS] += 1
        page[INSIDE + number] = 0
    finally:
        lock.release()
    return True


def hammer(seed):
    warnings.simplefilter("ignore", shlock.AbandonedWarning)
    chance, page = random.Random(seed), words()
    locks = [shlock.Lock(f"storm:{number}", domain=DOMAIN) for number in range(LOCKS)]
    while True:
        number = chance.randrange(LOCKS)
        pass_through(locks[number], number, page, chance.random() * 0.003 if chance.random() < 0.2 else None)


@pytest.mark.parametrize("worker", range(int(os.environ["SHLOCK_STORM_WORKERS"])))
def test_processes_of_this_worker_are_killed_at_random_while_they_share_locks_with_the_others(worker):
    chance = random.Random(f"{SEED} {worker}")
    context = get_context("fork")

    def start():
        process = context.Process(target=hammer, args=(chance.random(),))
        process.start()
        return process

    processes = [start() for _ in range(2)]
    kills = 0
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            victim = chance.randrange(len(processes))
            processes[victim].join(chance.random() * 0.05)  # lets it work for a while
            assert processes[victim].is_alive(), f"a process ended by itself: {processes[victim].exitcode}"
            processes[victim].kill()
            processes[victim].join()
            kills += 1
            processes[victim] = start()
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    assert kills > SECONDS


def test_this_worker_is_killed_inside():
    lock = shlock.Lock("storm:0", domain=DOMAIN)
    warnings.simplefilter("ignore", shlock.AbandonedWarning)
    with lock:
        words()[INSIDE] = os.getpid()
        os.kill(os.getpid(), signal.SIGKILL)


def test_everybody_alive_still_gets_every_lock():
    page = words()
    warnings.simplefilter("ignore", shlock.AbandonedWarning)
    for number in range(LOCKS):
        lock = shlock.Lock(f"storm:{number}", domain=DOMAIN)
        assert pass_through(lock, number, page, timeout=60), f"{lock!r} was not to be had for a minute"
