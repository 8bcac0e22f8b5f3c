"""Removes the semaphores of an arena without a name once the last process that uses it is gone, however that ended.

A segment without a name is freed by the kernel.  ``posix_ipc`` semaphores have names and stay behind.  So the first process
of an arena that has to block starts this small program, which waits for the segment's "in use" byte: the kernel gives it
away when the last descriptor of the segment is closed.  Programs whose locks are never contended never start it.

Run as a program: ``python -I -S _janitor.py DESCRIPTOR PREFIX``.  It imports nothing of shlock.
"""

import fcntl
import os
import signal
import struct
import sys

FOLDER = "/dev/shm"


def main(descriptor: int, prefix: str) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    # A description of our own: the inherited one holds the very lock that is waited for.
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, own)
    os.closerange(own + 1, max(descriptor, null, own) + 1)
    fcntl.fcntl(own, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    for name in os.listdir(FOLDER):
        if name.startswith(prefix):
            os.unlink(f"{FOLDER}/{name}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
