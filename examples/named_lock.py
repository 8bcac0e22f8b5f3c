"""Two programs that have nothing in common but the name of a lock.

Start it in two terminals, and kill -9 the one that holds the lock: the other goes on at once and says so. See who holds
and who waits with ``shlock ps``. Started with ``--both`` it does all that by itself. The name stays until
``shlock clean --domain named-lock-example``.
"""

import signal
import subprocess
import sys
import warnings

import shlock


def take_the_lock():
    lock = shlock.Lock("user:42", domain="named-lock-example")
    if not lock.acquire(block=False):
        print("waiting for", lock.owner, flush=True)
        lock.acquire()
    if lock.abandoned:
        print("the last holder died, its work may be half done:", lock.abandoned, flush=True)
    return lock


if __name__ == "__main__":
    warnings.simplefilter("ignore", shlock.AbandonedWarning)  # take_the_lock looks for itself
    if sys.argv[1:] == ["--both"]:
        command = [sys.executable, __file__]
        first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print("first: ", first.stdout.readline(), end="")
        second = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        print("second:", second.stdout.readline(), end="")
        first.send_signal(signal.SIGKILL)
        for line in second.stdout:
            print("second:", line, end="")
        first.wait()
        second.wait()
    else:
        lock = take_the_lock()
        print("I hold it. Press Return to release it, or kill me.", flush=True)
        sys.stdin.readline()
        lock.release()
