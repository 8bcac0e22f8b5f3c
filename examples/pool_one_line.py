"""A program with a multiprocessing Pool, and one line changed: a worker killed inside the lock no longer hangs it.

Change the line back, and it never ends. As it is, it prints the sum, and the worker that had the lock next says who died
holding it (an AbandonedWarning). Nothing is to be repaired here: an addition cannot be half done.
"""

import os
import signal
from multiprocessing import Event, Pool, Value

from shlock import Lock  # was: from multiprocessing import Lock


def start(shared_lock, shared_total, shared_inside):
    global lock, total, inside
    lock, total, inside = shared_lock, shared_total, shared_inside


def add(number):
    with lock:
        total.value += number


def die(number):
    with lock:
        inside.set()
        os.kill(os.getpid(), signal.SIGKILL)  # as the OOM killer would do it


if __name__ == "__main__":
    lock, total, inside = Lock(), Value("q", 0, lock=False), Event()
    with Pool(4, initializer=start, initargs=(lock, total, inside)) as pool:
        pool.apply_async(die, (0,))  # its worker ends holding the lock; the Pool starts another worker
        inside.wait()
        pool.map(add, range(1000))
    print("sum:", total.value)
