"""What the tests that kill processes have in common: pages of shared words, forked children, and the ways to die.

Nothing here sleeps to let something happen: ``eventually`` looks until what it needs is so, and gives up only after
``PATIENCE`` seconds, which nothing but a hang takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import shlock
from shlock import _arena, _atomic, _client, _fast_path, _names, _parking, _sys, snapshot

TOKEN = "SHLOCK_TEST_RUN"
"""Environment variable with the token of this run; the workers of pytest-xdist inherit it."""

PATIENCE = 30.0
"""Seconds to wait for what must happen; only a hang takes this long."""

SHM = Path("/dev/shm")

T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str = "", patience: float = PATIENCE) -> T:
    """The first true value of the condition."""
    give_up = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {patience:.0f} s: {what or condition}")
        time.sleep(0.0005)
    return value


class Page:
    """64-bit words that this process shares with the children that it forks from now on."""

    def __init__(self, size: int = 64) -> None:
        self._mapping = mmap.mmap(-1, size * 8)
        self._words = memoryview(self._mapping).cast("Q")

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value

    def __len__(self) -> int:
        return len(self._words)


# -- children -------------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class ChildFailed(AssertionError):
    """A child raised, or ended in a way that was not expected."""


class Child:
    """A forked process that runs one function.  It dies with its parent."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reader, writer = os.pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: this process may have threads
            self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(71)
                os.close(self._reader)
                answer = _answer(function, arguments)
                os.write(writer, answer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        os.set_blocking(self._reader, False)
        self._pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None
        _children.append(self)

    def is_alive(self) -> bool:
        if self._status is not None:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for its end; its exit status, negative for a signal.  A child that hangs is aborted with a traceback."""
        if self._status is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            hangs = not poll.poll(patience * 1000)
            if hangs:
                os.kill(self.pid, signal.SIGCONT)
                os.kill(self.pid, signal.SIGABRT)  # faulthandler, which pytest enables, shows where it was
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
            self._text = b""
            with contextlib.suppress(BlockingIOError):
                while part := os.read(self._reader, 1 << 16):
                    self._text += part
            os.close(self._reader)
            if hangs:
                raise ChildFailed(f"process {self.pid} hung for {patience:.0f} s")
        return self._status

    def result(self, patience: float = PATIENCE) -> Any:
        """What the function returned, after a normal end."""
        status = self.wait(patience)
        if status != 0:
            raise ChildFailed(f"process {self.pid} ended with {status}")
        is_good, value = pickle.loads(self._text)
        if not is_good:
            raise ChildFailed(f"in process {self.pid}:\n{value}")
        return value

    def signal(self, number: int) -> None:
        if self._status is None:
            os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP; returns when it has stopped."""
        self.signal(signal.SIGSTOP)
        eventually(lambda: _state(self.pid) in "TZ", "the process stops")

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.signal(signal.SIGKILL)
        self.wait()


_children: list[Child] = []


def end_children() -> None:
    """Kill and wait for whatever children of this module are left: for the end of a test."""
    while _children:
        _children.pop().kill()


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, function(*arguments)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _state(pid: int) -> str:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2]


def is_sleeping(pid: int) -> bool:
    """Whether the main thread of a process waits for something in the kernel."""
    return _state(pid) == "S"


# -- programs that are no children of a fork ------------------------------------------------------------------------------


def program(source: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start Python on a piece of source, with pipes for everything."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source), *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, **{**pipes, "env": program_environment(), **options})


def run(source: str, *arguments: object, status: int = 0, **options: Any) -> str:
    """Run Python on a piece of source; its output.  It must end with that status, and silently."""
    process = program(source, *arguments, **options)
    try:
        out, err = process.communicate(timeout=2 * PATIENCE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        out, err = process.communicate()
        raise AssertionError(f"hung; it wrote:\n{out}\n{err}") from None
    assert process.returncode == status, f"ended with {process.returncode}:\n{out}\n{err}"
    assert not err, err
    return out


def is_biased_always() -> bool:
    """Whether this run has every lock biased as soon as that is possible."""
    return os.environ.get("SHLOCK_BIAS") == "always"


def program_environment() -> dict[str, str]:
    """This environment, in which the same shlock and these tests are found, and hangs show where they are."""
    path = [str(Path(shlock.__file__).parents[1]), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONFAULTHANDLER": "1"}


# -- what is left behind --------------------------------------------------------------------------------------------------


def forget(domain: str) -> None:
    """Make this process let go of a domain, as its end would."""
    _names._domains.pop(domain, None)
    gc.collect()


def own_prefix() -> str:
    """What the names of the domains begin with that this process's tests make, of all that run at a time."""
    return f"test {os.environ[TOKEN]} {os.environ.get('PYTEST_XDIST_WORKER', 'only')} "


def own_files() -> list[str]:
    """The segments of those that are in /dev/shm."""
    return sorted(name for name in os.listdir(SHM) if (_names.domain_of(name) or "").startswith(own_prefix()))


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def mapped_segments() -> int:
    """How many segments it has mapped, those without a name as well."""
    return Path("/proc/self/maps").read_text().count(f"{SHM}/")


def files_of(domain: str) -> list[str]:
    """The segments of a domain that are in /dev/shm."""
    first = _names.segment_name(domain)
    return sorted(name for name in os.listdir(SHM) if name.split("+")[0] == first)


def clean(domain: str) -> None:
    """Remove a domain that only this process may still use.

    A thread may have gone on with the contracts of a domain whose supervisor has just ended, and started the next one.  That
    takes as long as an interpreter needs to start, and a second more: on a busy machine several seconds.
    """
    forget(domain)

    def is_gone() -> bool:
        gc.collect()
        snapshot.clean(domain)
        return not any(name.split("+")[0].split("=")[0] == _names.segment_name(domain) for name in os.listdir(SHM))

    try:
        eventually(is_gone, f"domain {domain} is removed")
    except AssertionError as error:
        raise AssertionError(f"{error}; used by {users_of(domain)}") from None


def supervisor_of(domain: str) -> int | None:
    """The process number of a domain's supervisor, as the kernel says.

    A process that is just being started has a copy of all descriptors for a moment: one of a supervisor of this program, which
    has ended, would make the kernel name this program.
    """
    with contextlib.suppress(OSError):
        pid = _client.supervisor_pid(domain)
        return None if pid == os.getpid() and not _is_supervised_here(domain) else pid
    return None


def _is_supervised_here(domain: str) -> bool:
    return any(one.domain == domain for one in shlock.supervisor._running)


def end_process(pid: int, number: int) -> None:
    """Send a signal to a process that is no child of ours, and wait for its end."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        eventually(lambda: _sys.SYSTEM.is_readable(pidfd), f"the end of process {pid}")
    finally:
        os.close(pidfd)


def users_of(domain: str) -> list[str]:
    """The processes that have a segment of a domain open: pid, threads, command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            files = [os.readlink(link) for link in (folder / "fd").iterdir()]
            if any(Path(file).name in files_of(domain) for file in files):
                threads = [thread.name for thread in threading.enumerate()] if folder.name == str(os.getpid()) else []
                found.append(f"{folder.name} {threads} {(folder / 'cmdline').read_bytes()!r}")
    return found


def semaphores_of(identity: int) -> list[str]:
    """The semaphores of an arena that are in /dev/shm."""
    return [name for name in os.listdir(SHM) if name.startswith(f"sem.shlock-{identity:016x}-")]


# -- ways to die ----------------------------------------------------------------------------------------------------------


class Step:
    """Called at each step of what a process does; does nothing."""

    def __init__(self) -> None:
        self.before_death: Callable[[], None] = lambda: None
        self.passed: list[str] = []  # labels of crash points

    def label(self, label: str) -> None:
        """A crash point is reached."""
        self.passed.append(label)

    def operation(self, what: str) -> None:
        """Directly before or after one operation on shared memory, or a system call that others notice."""

    @property
    def wants_operations(self) -> bool:
        return False

    def die(self) -> None:
        self.before_death()
        os.kill(os.getpid(), signal.SIGKILL)


class DieAtLabel(Step):
    """SIGKILL when a crash point is reached for the k-th time."""

    def __init__(self, label: str, times: int) -> None:
        super().__init__()
        self.wanted = label
        self.left = times

    def label(self, label: str) -> None:
        super().label(label)
        if label == self.wanted:
            self.left -= 1
            if not self.left:
                self.die()


class DieAtOperation(Step):
    """SIGKILL at the n-th operation, counting before and after each."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    @property
    def wants_operations(self) -> bool:
        return True

    def operation(self, what: str) -> None:
        self.left -= 1
        if not self.left:
            self.die()


_SYSTEM_CALLS = ("create_semaphore", "create_nameless", "publish_name", "lock_byte", "unlock_byte", "open_segment")


def watch_steps(step: Step, *primitives: Any) -> None:
    """From now on, in this process and for good, call ``step`` at every step.  For a forked child.

    The functions that a Lock bound when it was made are bound anew.
    """
    _sys.crash_points[:] = [step.label]
    if not step.wants_operations:
        return

    def watched(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step.operation(f"before {what}")
            result = function(*arguments, **options)
            step.operation(f"after {what}")
            return result

        return call

    for owner, name in (
        (_atomic.Operand, "compare_exchange"),
        (_atomic.Operand, "exchange"),
        (_atomic.Words, "store"),
        (_arena.Arena, "clear_block"),
        (_parking.Parking, "_post"),
        (_fast_path, "raw_compare_exchange"),
        *((_sys.System, name) for name in _SYSTEM_CALLS),
    ):
        setattr(owner, name, watched(getattr(owner, name), name))
    for primitive in primitives:
        words = getattr(primitive, "_words", None)
        if words is not None and not isinstance(words.view, _WatchedView):
            words.view = _WatchedView(words.view, step)
        if isinstance(primitive, shlock.Condition):
            primitive._restore(primitive._lock)
        else:
            primitive._bind(primitive._block)


class _WatchedView:
    """A memoryview of words whose stores are steps."""

    def __init__(self, view: memoryview, step: Step) -> None:
        self._view = view
        self._step = step

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]

    def tobytes(self) -> bytes:
        return self._view.tobytes()

    def __setitem__(self, index: Any, value: Any) -> None:
        self._step.operation("before store")
        self._view[index] = value
        self._step.operation("after store")


@contextlib.contextmanager
def no_steps() -> Iterator[None]:
    """Without crash points inside."""
    kept = _sys.crash_points[:]
    _sys.crash_points.clear()
    try:
        yield
    finally:
        _sys.crash_points[:] = kept
