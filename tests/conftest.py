"""For all tests: a watchdog around each, a domain for those that want one, and the check that nothing is left behind.

What is left behind is what this run made: domains that carry the run's token, and new files in /dev/shm that no living
process uses.  Other runs on the same machine are none of its business.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import secrets
import signal
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from cpython_support import PATIENCE, _descendants, watchdog
from support import TOKEN

from shlock import _layout as at
from shlock import _names, snapshot

SETTLING = 20.0
"""Seconds in which the janitors of anonymous arenas have removed the semaphores of the last processes."""

#: multiprocessing's own processes, which stay for the next test, and our janitors, which outlive what they wait for.
_SERVANTS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "_janitor.py")

_before = pytest.StashKey[set[str]]()
_left = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"patience(seconds): how long the test may take; {PATIENCE:.0f} by default")
    os.environ.setdefault(TOKEN, secrets.token_hex(4))
    config.stash[_before] = _files()
    config.stash[_left] = []


# -- a watchdog -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Abort the test, with tracebacks, if it hangs."""
    if isinstance(request.instance, unittest.TestCase):  # those of CPython bring their own
        yield
        return
    marker = request.node.get_closest_marker("patience")
    with watchdog(marker.args[0] if marker else PATIENCE):
        yield
        support.end_children()


# -- a domain -------------------------------------------------------------------------------------------------------------

_numbers = itertools.count()


@pytest.fixture
def domain() -> Iterator[str]:
    """A domain that nobody else uses, removed afterwards; the supervisor that was started for it ends with the test."""
    name = f"{support.own_prefix()}{next(_numbers)}"
    yield name
    support.end_children()
    pid = support.supervisor_of(name)
    if pid is not None:
        support.end_process(pid, signal.SIGTERM)
    support.clean(name)


# -- nothing left behind --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_this_process_is_left() -> Iterator[None]:
    """At the end this process has no children, and its domains are gone."""
    yield
    gc.collect()
    assert not _settled(_children), f"child processes are left: {_children()}"
    assert not support.own_files(), f"segments are left: {support.own_files()}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In the process that started all others, after their end: nothing of this run is in /dev/shm."""
    if hasattr(session.config, "workerinput"):
        return
    left = _settled(lambda: _left_behind(session.config.stash[_before]))
    session.config.stash[_left] = left
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[_left]:
        terminalreporter.section("left behind in /dev/shm", red=True, bold=True)
        for name in config.stash[_left]:
            terminalreporter.line(name)


def _settled(left: Any) -> list[str]:
    """What is left, once nothing is or a bound has passed."""
    give_up = time.monotonic() + SETTLING
    while (names := left()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return list(names)


def _children() -> list[str]:
    found = []
    for pid in _descendants():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if command and not any(servant in command for servant in _SERVANTS):  # a zombie has none
                found.append(f"{pid} {command}")
    return found


def _domains(prefix: str) -> list[str]:
    return [name for name in _files() if (_names.domain_of(name) or "").startswith(prefix)]


def _files() -> set[str]:
    """The names in /dev/shm that shlock or multiprocessing.shared_memory may have made."""
    return {name for name in os.listdir(support.SHM) if name.startswith(("shlock-", "sem.shlock-", "psm_"))}


def _left_behind(before: set[str]) -> list[str]:
    """New files that nobody alive uses, and everything that carries this run's token."""
    left = _domains(f"test {os.environ[TOKEN]} ")
    new = _files() - before
    if not new:
        return left
    identities = _living_identities()
    for name in new:
        path = support.SHM / name
        if name.startswith("sem."):
            identity = re.fullmatch(r"sem\.shlock-([0-9a-f]{16})-\d+", name)
            if identity and int(identity[1], 16) not in identities and path.exists():
                left.append(name)
        elif name not in left and path.exists() and not _is_mapped(path):
            left.append(name)
    return sorted(left)


def _living_identities() -> set[int]:
    """Of the arenas that are there: those that a living process has open, and domains."""
    identities = set()
    for seen in snapshot.domains():
        path = seen.segment if seen.segment.startswith("/") else support.SHM / seen.segment
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # somebody may have put a fifo there
            try:
                word = os.pread(descriptor, at.WORD, at.WORD * at.HEADER_IDENTITY)
            finally:
                os.close(descriptor)
            identities.add(int.from_bytes(word, "little"))
    return identities


def _is_mapped(path: Path) -> bool:
    """Whether a living process has a file of /dev/shm mapped."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{path}\n" in Path(f"/proc/{pid}/maps").read_text():
                return True
    return False
