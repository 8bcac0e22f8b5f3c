"""The demo's chaos process: kills workers and the reader at random moments, half of the time in the critical section.

It kills through pidfds, which its parent opened right after starting each process and which never mean another one,
so a pid that is used again is no danger. It knows where a worker is from the phase words in the table.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import time
from multiprocessing.context import ForkContext

from .table import Phase, Table
from .workers import die_with

__all__ = ["Chaos"]

_MESSAGE = struct.Struct("II")
"""What the parent says about a new process, beside the pidfd: its slot and its pid."""

_AIMED_SHARE = 0.5
"""Share of the kills that are aimed into the critical section."""

_HUNG_SHARE = 0.1
"""Share of the aimed ones that are not killed but left stopped: that is for the supervisor to deal with."""

_AIM_SECONDS = 0.1
"""How long to try to hit a worker inside (seconds); after that, any worker will do."""

_READER_SHARE = 0.1
"""Share of the kills that are not aimed which are of the reader: all workers wait until the next one is there."""


class Chaos:
    """The parent's handle on the chaos process: start it, tell it about each new process, stop it."""

    def __init__(self, context: ForkContext, table: Table, kills_per_second: float, seed: int, *, hangs: bool = False) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = context.Process(
            target=_run, args=(theirs, table, kills_per_second, seed, hangs, os.getpid()), name="chaos", daemon=True
        )
        try:
            self._process.start()
        except BaseException:
            self._ours.close()
            raise
        finally:
            theirs.close()

    @property
    def sentinel(self) -> int:
        """Readable when the process has ended, which it never does by itself."""
        return self._process.sentinel

    def target(self, slot: int, pid: int) -> None:
        """Hand over a process just started by the caller and not yet waited for: only then ``pid`` is surely it."""
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(self._ours, [_MESSAGE.pack(slot, pid)], [pidfd])
        finally:
            os.close(pidfd)

    def stop(self) -> None:
        """End the process, and the killing with it."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._ours.close()


def _run(workers: socket.socket, table: Table, kills_per_second: float, seed: int, hangs: bool, parent: int) -> None:
    """Kill at the given mean rate, at the intervals of a Poisson process, until killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent)
    rng = random.Random(seed)
    targets: dict[int, _Target] = {}
    due = time.monotonic()
    while True:
        due += rng.expovariate(kills_per_second)
        _learn(workers, targets, due)
        slot = None
        if rng.random() < _AIMED_SHARE:
            slot = _kill_inside(table, targets, rng, _HUNG_SHARE if hangs else 0.0)
        if slot is None:
            slot = _kill_any(table, targets, rng)
        if slot is not None:
            targets.pop(slot).close()


def _learn(workers: socket.socket, targets: dict[int, _Target], until: float) -> None:
    """Take in new processes till the moment ``until``, a monotonic time in seconds."""
    while select.select([workers], [], [], max(0.0, until - time.monotonic()))[0]:
        message, received, _, _ = socket.recv_fds(workers, _MESSAGE.size, 1)
        slot, pid = _MESSAGE.unpack(message)
        if slot in targets:  # it was killed by somebody else
            targets[slot].close()
        targets[slot] = _Target(pid, received[0])


def _kill_inside(table: Table, workers: dict[int, _Target], rng: random.Random, hung_share: float) -> int | None:
    """Kill a worker inside its critical section, or leave it hung there; its slot, or None if that did not succeed soon.

    A signal takes longer to arrive than a critical section to pass. So we stop a worker that we see inside, look where it
    has come to a stop, and let it go on if that is not inside.
    """
    give_up = time.monotonic() + _AIM_SECONDS
    while time.monotonic() < give_up:
        phases = {slot: table.phase(slot) for slot in workers}
        inside = [slot for slot, phase in phases.items() if phase.inside]
        if not inside:
            os.sched_yield()
            continue
        slot = rng.choice(inside)
        target = workers[slot]
        target.send(signal.SIGSTOP)
        if target.wait_until_stopped(give_up) and table.phase(slot).inside:
            if rng.random() < hung_share:
                table.count_hung()
            else:
                target.send(signal.SIGKILL)
            return slot
        target.send(signal.SIGCONT)
    return None


def _kill_any(table: Table, workers: dict[int, _Target], rng: random.Random) -> int | None:
    """Kill a worker that still works, or the reader, wherever it is, and return its slot; None if there is none."""
    phases = {slot: table.phase(slot) for slot in workers}
    working = [slot for slot, phase in phases.items() if phase not in (Phase.DONE, Phase.READING)]
    readers = [slot for slot, phase in phases.items() if phase is Phase.READING]
    if not working:
        return None
    slot = rng.choice(readers if readers and rng.random() < _READER_SHARE else working)
    workers[slot].send(signal.SIGKILL)
    return slot


class _Target:
    """A process as chaos knows it. Signals go through the pidfd only; the pid serves for looking at its state."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self._pid = pid
        self._pidfd = pidfd

    def send(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            signal.pidfd_send_signal(self._pidfd, signum)

    def wait_until_stopped(self, deadline: float) -> bool:
        """Whether the process has come to a stop before ``deadline`` (monotonic seconds) and is not dead."""
        while time.monotonic() < deadline:
            try:
                with open(f"/proc/{self._pid}/stat", "rb") as file:
                    state = file.read().rpartition(b")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                return False
            if state in (b"T", b"Z", b"X"):
                return state == b"T"
        return False

    def close(self) -> None:
        os.close(self._pidfd)
