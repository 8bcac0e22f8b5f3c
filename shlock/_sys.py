"""Every call to the operating system that the protocol depends on, in one table that tests may replace.

``SYSTEM`` is the only instance in use; tests put another ``System`` in its place to stop the clock, to hide a process
or to fail a call.  Crash points are here too: ``crash_points`` is empty in use, and a test puts one callable into it
which is called with the label of each step of the protocol just before that step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import select
import signal
import struct
import time
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["SYSTEM", "Account", "System", "crash_points"]

#: Empty, or one callable that takes the label of the step which comes next.  The code asks ``if crash_points:``.
crash_points: list[Callable[[str], None]] = []

SHM_FOLDER: Final = "/dev/shm"
SUPERVISOR_NICE: Final = -10
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of fallocate
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


@functools.cache
def _initial_semaphore() -> bytes:
    """The bytes of a sem_t of value 0 that processes share, with room to spare."""
    memory = ctypes.create_string_buffer(128)
    if _libc().sem_init(memory, 1, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memory.raw


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_MEMBARRIER: Final = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine)  # the number of the system call
_GLOBAL, _GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 1, 2, 4


def _membarrier(command: int) -> int:
    if _MEMBARRIER is None:
        return -1
    status: int = _libc().syscall(_MEMBARRIER, command, 0, 0)
    return status


def _read_of_process(pid: int, name: str) -> bytes | None:
    """The beginning of a file that the kernel keeps of a process; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None


def _number_in(limits: list[bytes], hard: bool) -> int:
    """The soft or hard limit of a line of /proc/PID/limits; 0 if it is not there."""
    text = limits[hard] if len(limits) == 2 else b"0"
    return int(text) if text.isdigit() else 1 << 32


#: Bytes of memory that are taken in one go by who has other things to look after.
AT_ONCE: Final = 1 << 24


class Account(NamedTuple):
    """The users of a process, and its effective group."""

    real: int
    effective: int
    saved: int
    group: int


class System:
    """Processes, clocks, files and locks of files, as the kernel gives them."""

    #: Seconds on a clock that only advances; the same in every process of this machine.
    monotonic: Callable[[], float] = staticmethod(time.monotonic)
    monotonic_ns: Callable[[], int] = staticmethod(time.monotonic_ns)
    #: How long this process has had a processor.
    processor_ns: Callable[[], int] = staticmethod(time.process_time_ns)
    yield_processor: Callable[[], None] = staticmethod(os.sched_yield)
    #: Seconds since the epoch.
    time_ns: Callable[[], int] = staticmethod(time.time_ns)

    #: Sleep some seconds: between attempts to lock a file, never for a lock of ours (that is ``_parking``).
    nap: Callable[[float], None] = staticmethod(time.sleep)

    def getpid(self) -> int:
        return os.getpid()

    def usable_cores(self) -> int:
        """How many processors this process may run on."""
        return len(os.sched_getaffinity(0))

    def birth(self, pid: int) -> int | None:
        """Start time of a process in clock ticks since boot; None if there is no such process."""
        text = _read_of_process(pid, "stat")
        if text is None:
            return None
        # Field 2 is the command in parentheses and may itself hold anything: count from the last parenthesis.
        return int(text[text.rindex(b")") + 2 :].split()[19])

    def account_of(self, pid: int) -> Account | None:
        """Whose a process is; None if there is no such process."""
        text = _read_of_process(pid, "status")
        if text is None:
            return None
        real, effective, saved = map(int, text.split(b"\nUid:")[1].split()[:3])
        return Account(real, effective, saved, int(text.split(b"\nGid:")[1].split()[1]))

    def pidfd_open(self, pid: int) -> int | None:
        """A descriptor of the process, readable once all its threads are gone; None if there is no such process."""
        try:
            return os.pidfd_open(pid)
        except (ProcessLookupError, OverflowError):
            return None
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # the number of a thread that leads no process; newer: ENOENT
                return None
            raise

    def is_readable(self, descriptor: int) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def boot_id(self) -> bytes:
        """The 16 bytes that name this boot of the machine."""
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))

    def pid_namespace(self) -> int:
        """Inode of the namespace in which this process's pid has its meaning."""
        return os.stat("/proc/self/ns/pid").st_ino

    def send_signal(self, pidfd: int, number: int) -> bool:
        """Send a signal to the process of a pidfd; False if it is gone."""
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def register_membarrier(self) -> bool:
        """Let other processes order this one's memory accesses with ``membarrier``; False where the kernel can't."""
        return _membarrier(_REGISTER_GLOBAL_EXPEDITED) == 0

    def membarrier(self, *, registered: bool = True) -> bool:
        """A full fence in every running thread of every registered process (about a us), or of all processes (some ms).

        False if it had to be the slow way.
        """
        if registered and _membarrier(_GLOBAL_EXPEDITED) == 0:
            return True
        if _membarrier(_GLOBAL) != 0:
            self.nap(0.05)  # every processor has taken an interrupt by then
        return False

    def raise_priority(self) -> None:
        """Be scheduled before ordinary processes, as far as this process may."""
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, SUPERVISOR_NICE)

    def scheduling(self, thread: int) -> tuple[int, int, int]:
        """How a thread is scheduled: policy and its flag, real-time priority, nice value.  ProcessLookupError."""
        policy, priority = os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
        return policy, priority, os.getpriority(os.PRIO_PROCESS, thread)

    def set_scheduling(self, thread: int, policy: int, priority: int, nice: int) -> None:
        """Have a thread scheduled so; in two steps.  PermissionError, ProcessLookupError: after either."""
        if (os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority) != (policy, priority):
            os.sched_setscheduler(thread, policy, os.sched_param(priority))
        if os.getpriority(os.PRIO_PROCESS, thread) != nice:
            os.setpriority(os.PRIO_PROCESS, thread, nice)

    def thread_birth(self, pid: int, thread: int) -> int | None:
        """Start time of a thread of a process in clock ticks since boot; None if the process has no such thread."""
        text = _read_of_process(pid, f"task/{thread}/stat")
        return None if text is None else int(text[text.rindex(b")") + 2 :].split()[19])

    def has_capability(self, number: int) -> bool:
        """Whether this process has a capability in force."""
        text = _read_of_process(self.getpid(), "status") or b""
        return bool(int(text.split(b"\nCapEff:")[1].split()[0], 16) >> number & 1)

    def priority_limits(self, pid: int, *, hard: bool) -> tuple[int, int]:
        """How far a process may be raised without privilege: the highest real-time priority, and the lowest nice value.

        ``hard``: how far it could see to that itself.  prlimit would need more privilege where it is another user's.
        """
        text = _read_of_process(pid, "limits") or b""
        highest, nice = (
            _number_in(text.partition(name)[2].split()[:2], hard) for name in (b"Max realtime priority", b"Max nice priority")
        )
        return min(99, highest), max(-20, 20 - nice)

    def timer(self) -> int:
        """A descriptor that is readable when the time of ``set_timer`` has come, to the microsecond."""
        descriptor: int = _libc().timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return descriptor

    def set_timer(self, descriptor: int, when_ns: int) -> None:
        """Make a timer readable at a monotonic time; it is not readable any more until then."""
        value = struct.pack("4q", 0, 0, *divmod(max(1, when_ns), 1_000_000_000))
        if _libc().timerfd_settime(descriptor, 1, value, None) != 0:  # TFD_TIMER_ABSTIME
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def geteuid(self) -> int:
        return os.geteuid()

    def create_nameless(self, size: int, reserve: int) -> int:
        """A descriptor of a new shared memory file without a name, the memory of its first bytes reserved.

        ENOSPC comes here, as OSError, and not as SIGBUS at the first touch of a page.  The kernel frees the memory
        when the last process that has it open or mapped is gone, however that process ended.
        """
        descriptor = os.open(SHM_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
            self.reserve(descriptor, 0, reserve)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def reserve(self, descriptor: int, first: int, length: int) -> None:
        """Take the memory for some bytes of a shared memory file.  OSError (ENOSPC) if it can't be had."""
        os.posix_fallocate(descriptor, first, length)

    def give_back(self, descriptor: int, first: int, length: int) -> None:
        """Let go of the memory of some bytes of a shared memory file, as far as the kernel can."""
        _libc().fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_long(first), ctypes.c_long(length))

    def available_memory(self) -> int:
        """Bytes that can be had without taking them from anybody, as the kernel estimates; of the whole machine."""
        with open("/proc/meminfo", "rb") as file:
            facts = dict(line.split(b":", 1) for line in file)
        return int(facts[b"MemAvailable"].split()[0]) * 1024

    def create_sealable(self, label: str, size: int, meanwhile: Callable[[], None]) -> int:
        """A descriptor of a new memory file that has no path and can be sealed, its pages reserved.  OSError (ENOSPC).

        No limit of /dev/shm is one for such files: where memory is short, the kernel would rather kill somebody.  So more than
        half of what is available is refused.  ``meanwhile`` is called after each 16 MiB.
        """
        descriptor = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if size > AT_ONCE and size > self.available_memory() // 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for first in range(0, size, AT_ONCE):
                self.reserve(descriptor, first, min(AT_ONCE, size - first))
                meanwhile()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def publish_name(self, descriptor: int, name: str) -> bool:
        """Give a nameless shared memory file its name, in one step; False if the name is taken."""
        try:
            # Only with a folder's descriptor (which an absolute path ignores) does os.link follow links on Linux.
            os.link(f"/proc/self/fd/{descriptor}", f"{SHM_FOLDER}/{name}", src_dir_fd=descriptor, follow_symlinks=True)
        except FileExistsError:
            return False
        return True

    def create_semaphore(self, name: str) -> None:
        """Make the file of a POSIX semaphore of value 0, in one step; nothing if it exists.

        ``sem_open`` would leave a temporary file behind if the process were killed inside it.  The content is what
        ``sem_init`` writes for a semaphore that processes share; ``sem_open`` then finds an existing semaphore.
        """
        descriptor = os.open(SHM_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, _initial_semaphore())
            self.publish_name(descriptor, f"sem.{name.lstrip('/')}")
        finally:
            os.close(descriptor)

    def open_segment(self, path: str, *, read_only: bool = False) -> int:
        """A descriptor of a file; of a fifo in its place, too, without waiting for anybody."""
        access = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def open_segment_again(self, descriptor: int) -> int:
        """A further open file description of the same file."""
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)

    def set_cloexec(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)

    def lock_byte(self, descriptor: int, byte: int, *, shared: bool, block: bool = False) -> bool:
        """Lock one byte of a file for this open file description; False if somebody else has it.

        Children of a fork share the description and so the lock; the kernel drops it when the last of them is gone.
        """
        kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
        command = fcntl.F_OFD_SETLKW if block else fcntl.F_OFD_SETLK
        try:
            fcntl.fcntl(descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock_byte(self, descriptor: int, byte: int) -> None:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))

    def is_byte_locked(self, descriptor: int, byte: int) -> bool:
        """Whether another open file description holds a lock on that byte."""
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


SYSTEM = System()
