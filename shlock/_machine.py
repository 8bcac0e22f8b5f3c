"""Domains of the machine: locks that processes of several users share, in segments that only root can make.

The name of such a domain begins with "/".  Its supervisor is root (``shlock supervise --domain /NAME``), and everything in it
is opened under a contract: what a client gets is a descriptor, for reading only where its contract allows no more.

A segment is root's, of mode 0600, sealed against truncation, and of one name only: who may lock one name must not be able to
write where another one lies.  It has no path, and lives as long as anybody has it open.  What the kernel says of it - owner,
mode, seals, the label that it was made with - proves to the next supervisor that the one before made it, and for which name.
What stands inside is written by its users, and proves nothing.

    M1  who has a writable descriptor had a contract with "acquire" for that very name, or was given it by who had
    M2  nobody but root can make a file that passes ``name_of_segment``; nobody at all can shrink one
    M3  from a descriptor for reading no writable one can be had: the mode is root's, 0600

Fencing tokens start from the clock, so that they grow although a segment is gone once nobody uses it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from . import _layout as at
from ._arena import Arena, Declaration, check_place, write_header
from ._segment import Segment
from ._sys import SYSTEM
from .errors import SegmentError

__all__ = [
    "arena_over",
    "bind",
    "claim",
    "domain_and_name",
    "give_up",
    "has_mapped",
    "is_of_machine",
    "label",
    "make_arena",
    "name_of_segment",
    "open_again",
    "restore",
    "segments_of",
    "socket_path",
]

ROOT: Final = 0
SPOTS: Final = 256  # threads that can be blocked on one lock at the same time
PROCESSES: Final = 32  # names of processes that are remembered
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MODE: Final = 0o600
FOLDER: Final = "/run/shlock"


def is_of_machine(domain: str | None) -> bool:
    """Whether a domain is shared by several users."""
    return domain is not None and domain.startswith("/")


def _digest(domain: str) -> str:
    return hashlib.blake2b(domain.encode(), digest_size=16).hexdigest()


# -- where its supervisor is found ------------------------------------------------------------------------------------------


def socket_path(domain: str) -> str:
    """The address of the supervisor.  In root's own folder: an abstract one could be taken by anybody."""
    return f"{FOLDER}/{_digest(domain)}.socket"


def _lock_path(domain: str) -> str:
    return f"{FOLDER}/{_digest(domain)}.lock"


def claim(domain: str) -> int:
    """Be the supervisor of a domain as long as the descriptor is open.  OSError: EADDRINUSE if there is one."""
    while True:
        os.makedirs(FOLDER, 0o755, exist_ok=True)
        facts = os.lstat(FOLDER)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != ROOT or facts.st_mode & 0o022:
            raise PermissionError(errno.EPERM, f"{FOLDER} must be a folder of root's that nobody else can write to")
        try:
            fd = os.open(_lock_path(domain), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
        except FileNotFoundError:
            continue  # the last one has just removed the folder
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise OSError(errno.EADDRINUSE, f"domain {domain!r} has a supervisor") from None
        if os.fstat(fd).st_nlink:
            with contextlib.suppress(FileNotFoundError):  # left by one that was killed
                os.unlink(socket_path(domain))
            return fd
        os.close(fd)  # the one before us removed it when it ended


def bind(listener: socket.socket, path: str) -> None:
    """Bind a socket so that everybody may connect from the first instant on that it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.new")
    listener.bind(f"{path}.new")
    os.chmod(f"{path}.new", 0o666)
    os.rename(f"{path}.new", path)


def give_up(domain: str, fd: int) -> None:
    """Be the supervisor no more, and leave no file behind."""
    for path in (f"{socket_path(domain)}.new", socket_path(domain), _lock_path(domain)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    os.close(fd)
    with contextlib.suppress(OSError):  # other domains have files there
        os.rmdir(FOLDER)


# -- segments ---------------------------------------------------------------------------------------------------------------


LAYOUT: Final = at.Layout(SPOTS, PROCESSES, 1, 0, semaphores=True)  # of every segment, whatever its header says


def label(domain: str, serial: int, name: str) -> str:
    """What the kernel remembers of a segment from its making on: domain, name, and a number that grows."""
    return f"{_prefix(domain)}{serial:016x}-{name}"


def _prefix(domain: str) -> str:
    return f"shlock-{_digest(domain)}-"


def make_arena(domain: str, name: str, declaration: Declaration) -> Arena:
    """A new segment for one name.  OSError if the memory can't be had.  Root only."""
    fd = SYSTEM.create_sealable(label(domain, SYSTEM.time_ns(), name), LAYOUT.size)
    try:
        os.fchmod(fd, MODE)
        segment = Segment(fd)
    except BaseException:
        SYSTEM.close(fd)
        raise
    write_header(segment, LAYOUT, domain)
    arena = _named(Arena(segment, LAYOUT, domain), domain, name)
    arena.declare(0, declaration, ())
    arena.kind_word = declaration.kind_word()
    arena.words.store(arena.layout.block(0) + at.BLOCK_TOKEN, SYSTEM.time_ns() // 1000)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return arena


def restore(arena: Arena) -> None:
    """Write again what its users must not change: another one of them may have."""
    write_header(arena.segment, LAYOUT, arena.domain)
    if arena.kind_word:
        arena.words.store(LAYOUT.block(0) + at.BLOCK_KIND, arena.kind_word)


def name_of_segment(fd: int, domain: str) -> tuple[str, int]:
    """The name for which a supervisor of this domain made a segment, and its serial number.  SegmentError if none has."""
    made = f"/memfd:{_prefix(domain)}"
    text = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    if not _is_sealed(fd) or not text.startswith(made):
        raise SegmentError("of the machine", f"no supervisor of domain {domain!r} has made it", "Open the lock by its name.")
    serial, _, name = text.removeprefix(made).partition("-")
    return name, int(serial, 16)


def domain_and_name(fd: int) -> tuple[str, str] | None:
    """Of a segment of any domain; None if it is none.  The domain is as it says inside, if that fits its label."""
    if not _is_sealed(fd):
        return None
    try:
        domain = Arena.over(Segment(os.dup(fd), read_only=True), user=ROOT).domain or ""
        return domain, name_of_segment(fd, domain)[0]
    except (OSError, ValueError):  # SegmentError among them
        return None


def _is_sealed(fd: int) -> bool:
    """Whether root made it, and for good."""
    try:  # first: of a file that somebody else serves even fstat may block
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    facts = os.fstat(fd)
    return facts.st_uid == ROOT and stat.S_IMODE(facts.st_mode) == MODE and seals & SEALS == SEALS


def open_again(fd: int, *, read_only: bool) -> int:
    """A descriptor of its own of the same segment, for a client.  Root only."""
    return os.open(f"/proc/self/fd/{fd}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)


def segments_of(domain: str | None) -> Iterator[int]:
    """Descriptors, for reading, of the segments of a domain (None: of all) that any process has open or mapped.  Root only.

    Processes are looked through twice: one that forked and ended meanwhile may have been missed.
    """
    made = f"/memfd:{_prefix(domain) if domain is not None else 'shlock-'}"
    seen: set[int] = set()
    for _ in range(2):
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            for path in _open_files(pid, made):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a fifo of anybody's
                except OSError:
                    continue
                if not _is_sealed(fd) or (number := os.fstat(fd).st_ino) in seen:
                    os.close(fd)
                    continue
                seen.add(number)
                yield fd


def _open_files(pid: str, made: str) -> Iterator[str]:
    with contextlib.suppress(OSError):  # it has gone
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}").startswith(made):
                    yield f"/proc/{pid}/fd/{number}"
        for line in _mappings(pid):
            if made in line:
                yield f"/proc/{pid}/map_files/{line.split()[0]}"


def _mappings(pid: int | str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/maps").read_bytes().decode("utf-8", "replace").split("\n")
    except OSError:
        return []


def has_mapped(pid: int, domain: str, identity: int) -> bool:
    """Whether a process has a segment in its memory.  Root only."""
    made = f"/memfd:{_prefix(domain)}"
    lines = (line.split(maxsplit=5) for line in _mappings(pid))
    return any(len(line) == 6 and line[4] == str(identity) and line[5].startswith(made) for line in lines)


def arena_over(fd: int, domain: str, name: str) -> Arena:
    """The arena in a segment that the supervisor gave out, or that it finds again.  Takes the descriptor over; SegmentError."""
    try:
        read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        segment = Segment(fd, read_only=read_only)
    except BaseException:
        SYSTEM.close(fd)
        raise
    try:
        check_place(segment, ROOT)
        if segment.size != LAYOUT.size:
            raise SegmentError(name, "another version of shlock has made it", "End the processes that use it.")
    except BaseException:
        segment.close()
        raise
    return _named(Arena(segment, LAYOUT, domain), domain, name)


def _named(arena: Arena, domain: str, name: str) -> Arena:
    """Name and number are as the kernel has them, whatever stands inside."""
    arena.domain, arena.only_name, arena.identity = domain, name, os.fstat(arena.segment.fd).st_ino
    return arena
