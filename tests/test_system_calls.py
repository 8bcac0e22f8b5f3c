"""Uncontended primitives make no system call: seen by strace on a running process.

The traced program encloses each loop in two calls that nothing else makes; whatever strace writes between them was made by
the loop.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import PATIENCE, program_environment

PAIRS = 100_000

#: What each loop does ``PAIRS`` times with its primitive ``p``.
LOOPS = {
    "Lock, acquire and release": ("shlock.Lock()", "acquire(); release()"),
    "Lock, with": ("shlock.Lock()", "with p: pass"),
    "named Lock, with": ("shlock.Lock('a', domain=DOMAIN)", "with p: pass"),
    "RLock, acquire and release": ("shlock.RLock()", "acquire(); release()"),
    "RLock, with in with": ("shlock.RLock()", "with p:\n        with p: pass"),
    "Semaphore, acquire and release": ("shlock.Semaphore(2)", "acquire(); release()"),
    "Semaphore, with": ("shlock.Semaphore(2)", "with p: pass"),
    "BoundedSemaphore, with": ("shlock.BoundedSemaphore(2)", "with p: pass"),
    "owned Semaphore, acquire and release": ("shlock.Semaphore(2, owned=True)", "acquire(); release()"),
    "owned Semaphore, with": ("shlock.Semaphore(2, owned=True)", "with p: pass"),
    "RWLock, read": ("shlock.RWLock()", "with p.read(): pass"),
    "named RWLock, read in read": ("shlock.RWLock('a', domain=DOMAIN)", "with p.read():\n        with p.read(): pass"),
    "RWLock, write": ("shlock.RWLock()", "with p.write(): pass"),
    "Lock that is busy, tried": ("held(shlock.Lock())", "acquire(False)"),
    "Event that is set, waited for": ("raised(shlock.Event())", "p.wait()"),
}

#: Of a leased lock, with tokens and deadlines; the supervisor that it starts, and the thread that waits for its end, make
#: their own.
LEASED = {
    "leased Lock, acquire and release": ("leased(shlock.Lock)", "acquire(); release()"),
    "leased Lock, with": ("leased(shlock.Lock)", "with p as lease: lease.token, lease.terminate_requested"),
    "leased RLock, with in with": ("leased(shlock.RLock)", "with p:\n        with p: pass"),
    "leased RWLock, read": ("leased(shlock.RWLock)", "with p.read() as lease: lease.token, lease.terminate_requested"),
}

#: Loops that cannot do without, and how often: they show that the others would be caught.  With a waiter it takes many
#: pairs, because a chosen one naps through most of its owner's turn.  A time of waiting that is short for who is traced
#: would be over before the sleep.
CONTENDED = {
    "Lock with a waiter": ("with_waiter(shlock.Lock())", "p.release(); p.acquire()", PAIRS),
    "Lock that is busy, waited for": ("held(shlock.Lock())", "acquire(True, 0.02)", 20),
}

PROGRAM = """
import os, sys, threading, time
import shlock

DOMAIN, PAIRS = sys.argv[1], int(sys.argv[2])

def held(lock):
    lock.acquire()
    return lock

def raised(event):
    event.set()
    return event

def with_waiter(lock):
    held(lock)
    def use():
        with lock:
            pass
    def crowd():
        while True:
            use()
    threading.Thread(target=crowd, daemon=True).start()
    while not lock.waiters:
        time.sleep(0.001)
    return lock

def leased(kind):
    from shlock import _client
    has_ended = _client._has_ended
    # Its thread wakes up once a second, and the interpreter hands over to it.
    _client._has_ended = lambda connection, within=0: has_ended(connection, within * 1000)
    return kind("leased", domain=DOMAIN, lease=600)

def mark(text):
    os.access("/shlock-mark/" + text, os.F_OK)

def loop(p, times):
    acquire, release = getattr(p, "acquire", None), getattr(p, "release", None)
    for _ in range(times):
        {body}

p = {primitive}
loop(p, 1000)  # warm up
print("warm", flush=True)
sys.stdin.readline()
mark("begin")
loop(p, PAIRS)
mark("end")
os._exit(0)
"""


@functools.cache
def tracing_works() -> str | None:
    """None, or why strace cannot trace here."""
    strace = shutil.which("strace")
    assert strace is not None, "strace is missing: install it (Debian: apt-get install strace)"
    probe = subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    return None if probe.returncode == 0 else f"ptrace is forbidden here: {probe.stderr.strip()[:100]}"


def calls_of_loop(
    primitive: str, body: str, pairs: int, domain: str, folder: Path, only_main_thread: bool = False
) -> list[str]:
    """The system calls of a running process between the two marks, of all its threads and children."""
    if reason := tracing_works():
        pytest.skip(reason)
    trace = folder / "trace"
    source = PROGRAM.replace("{primitive}", primitive).replace("{body}", textwrap.indent(body, " " * 8).lstrip())
    # strace is the parent, for there a process may trace its children without privilege.
    command = ["strace", "-f", "-qq", "-o", str(trace), sys.executable, "-c", source, domain, str(pairs)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=program_environment()
    )
    out, err = process.communicate("go\n", timeout=3 * PATIENCE)
    assert process.returncode == 0, err
    assert out == "warm\n"
    lines = trace.read_text().splitlines()
    begin, end = (next(i for i, line in enumerate(lines) if f"/shlock-mark/{mark}" in line) for mark in ("begin", "end"))
    thread = lines[begin].split()[0] if only_main_thread else ""
    return [
        line
        for line in lines[begin + 1 : end]
        if line.startswith(thread) and not re.search(r"<\.\.\. (access|faccessat2?) resumed", line)
    ]


@pytest.mark.parametrize("what", LOOPS)
def test_no_system_call_in_100_000_uncontended(what: str, domain: str, tmp_path: Path) -> None:
    calls = calls_of_loop(*LOOPS[what], PAIRS, domain, tmp_path)
    assert calls == [], f"{len(calls)} system calls"


@pytest.mark.parametrize("what", LEASED)
def test_no_system_call_in_100_000_pairs_under_a_lease(what: str, domain: str, tmp_path: Path) -> None:
    calls = calls_of_loop(*LEASED[what], PAIRS, domain, tmp_path, only_main_thread=True)
    assert calls == [], f"{len(calls)} system calls"


@pytest.mark.parametrize("what", CONTENDED)
def test_the_trace_shows_the_system_calls_of_a_contended(what: str, domain: str, tmp_path: Path) -> None:
    primitive, body, pairs = CONTENDED[what]
    calls = calls_of_loop(primitive, body, pairs, domain, tmp_path)
    assert any("futex" in line for line in calls), f"{len(calls)} system calls, but none that sleeps or wakes"
