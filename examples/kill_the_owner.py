"""Take the lock in a child, kill the child, go on in the parent, and be told."""

import multiprocessing
import signal
import warnings

import shlock


def hold_for_ever(lock, connection):
    lock.acquire()
    connection.send("I hold it")
    signal.pause()


if __name__ == "__main__":
    lock = shlock.Lock()  # with multiprocessing.Lock() the last block would wait for ever
    here, there = multiprocessing.Pipe()
    child = multiprocessing.Process(target=hold_for_ever, args=(lock, there))
    child.start()
    print("child:", here.recv())
    child.kill()  # SIGKILL

    warnings.simplefilter("ignore", shlock.AbandonedWarning)  # we look for ourselves
    with lock:
        print("parent: I hold it, and I was told:", lock.abandoned)
    child.join()
