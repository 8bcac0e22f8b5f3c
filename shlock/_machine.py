"""Domains of the machine: locks and blocks that processes of several users share, in segments that only root can make.

The name of such a domain begins with "/".  Its supervisor is root (``shlock supervise --domain /NAME``), and everything in it
is opened under a contract: what a client gets is a descriptor, for reading only where its contract allows no more.

A segment is root's, of mode 0600, sealed against truncation, and of one name only: who may lock one name must not be able to
write where another one lies.  It has no path, and lives as long as anybody has it open.  What the kernel says of it - owner,
mode, seals, the label that it was made with - proves to the next supervisor, and to clients, that a supervisor made it, for
which name and which user, and what it is.  What stands inside is written by its users, and proves nothing.

    M1  who has a writable descriptor had a contract for that very name that lets him write - "acquire" for a lock, "write" for
        a Block - or was given it by who had.  Nobody is given a descriptor of something else than what he asked for
    M2  nobody but root can make a file that passes ``made_of``; nobody at all can shrink or grow one
    M3  from a descriptor for reading no writable one can be had: the mode is root's, 0600
    M4  how large the tables and the data are, and where they lie, is computed from the label, never from what stands inside:
        whatever its users write, nobody maps less or reads farther than there is
    M5  all memory of a segment is taken when it is made: a client meets no full memory later (but see below)
    M6  memory counts against the user for whom it was made until nobody but the supervisor has it open or mapped, as the
        kernel says (``has_others``), whatever contracts were given back

    # who              may write                          and so can                             but not
    # root             header, kinds, labels              -                                      -
    # may acquire or   tables and data of that name       break this name for all that use it:   see or change any other name,
    #   write                                             let two in, tear contents, punch holes  shrink or outgrow the segment,
    #                                                     (who then touches them pays for them)   have anybody killed
    # may only read    nothing: the MMU stops it          read all of it, the lock's word too    write, hold up writers, own it
    # no contract      nothing                            -                                      learn whether the name exists

x86-64 and Arm have no pages that can be written and not read: that "write" without "read" does not read is checked by the
client's own code alone, and keeps no secret.

    killed after                      what is left                               outcome
    M-1 the segment made, not sealed  nobody else has it                         the kernel frees it
    M-2 sealed, not answered          the same, if its supervisor was killed;    freed; or the name is there, in its first state
                                      the client: a name that nobody uses

Fencing tokens start from the clock, so that they grow although a segment is gone once nobody uses it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from . import _layout as at
from ._arena import Arena, Declaration, check_place, write_header
from ._segment import Segment
from ._sys import SYSTEM, crash_points
from .errors import SegmentError

__all__ = [
    "OPERATIONS",
    "WRITING",
    "Made",
    "arena_over",
    "bind",
    "claim",
    "domain_and_made",
    "give_up",
    "has_mapped",
    "has_others",
    "is_of_machine",
    "label",
    "made_of",
    "make_arena",
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
MOST_BYTES: Final = (1 << 40) - 1  # of the content of a block
#: What can be there: the operation of a contract whose holder gets a descriptor for writing, and those of which he needs one.
WRITING: Final = {at.LOCK: "acquire", at.RLOCK: "acquire", at.GUARDED: "write"}
OPERATIONS: Final = {at.GUARDED: frozenset({"read", "write"})}


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


#: In a label: serial number, user, kind, policy, number of copies, and size, as two numbers.  The whole has at most 249 bytes.
_FACTS: Final = struct.Struct(">QIBBBBI")
_FACTS_TEXT: Final = 27  # characters


class Made(NamedTuple):
    """What a supervisor made a segment for.

    serial  grows
    user    for whom: against him its memory counts
    kind, policy, size, copies   of the one object in it; the last two of a block
    """

    name: str
    serial: int
    user: int
    kind: int
    policy: int = 0
    size: int = 0
    copies: int = 0

    def layout(self) -> at.Layout:
        """Where everything lies, whatever the header says."""
        is_block = self.kind == at.GUARDED
        data = at.pages(self.size) * self.copies
        return at.Layout(SPOTS, PROCESSES, 2 if is_block else 1, 0, semaphores=True, data=data if is_block else 0)

    def declaration(self, lease: int = 1, grace: int = 0) -> Declaration:
        return Declaration(self.kind, policy=self.policy, parameter=self.size, lease=lease, grace=grace)

    def has_lock(self, block: int) -> bool:
        """Whether there can be a contract for a control block."""
        return block == 0


def label(domain: str, made: Made) -> str:
    """What the kernel remembers of a segment from its making on."""
    high, low = divmod(made.size, 1 << 32)
    facts = _FACTS.pack(made.serial, made.user, made.kind, made.policy, made.copies, high, low)
    return f"{_prefix(domain)}{base64.urlsafe_b64encode(facts).decode().rstrip('=')}-{made.name}"


def _prefix(domain: str) -> str:
    digest = hashlib.blake2b(domain.encode(), digest_size=6).digest()
    return f"shlock-{base64.urlsafe_b64encode(digest).decode()}-"


def make_arena(domain: str, made: Made, lease: int, grace: int, meanwhile: Callable[[], None] = lambda: None) -> Arena:
    """A new segment for one name.  OSError if the memory can't be had.  Root only.

    ``meanwhile`` is called now and then while the memory is taken, which is some ms for each 16 MiB.
    """
    layout = made.layout()
    first = SYSTEM.create_sealable(label(domain, made), layout.size, meanwhile)
    try:
        fd = open_again(first, read_only=False)  # the kernel does not count the first one among those for writing: has_others
    finally:
        SYSTEM.close(first)
    try:
        os.fchmod(fd, MODE)
        segment = Segment(fd, tables=layout.tables)
    except BaseException:
        SYSTEM.close(fd)
        raise
    write_header(segment, layout, domain)
    arena = _over(segment, domain, made)
    arena.declare(0, made.declaration(lease, grace), ())
    if made.kind == at.GUARDED:  # the first state of its content is all zeros
        arena.declare(1, Declaration(at.EXTENSION), ())
    arena.words.store(arena.layout.block(0) + at.BLOCK_TOKEN, SYSTEM.time_ns() // 1000)
    if crash_points:
        crash_points[0]("M-1 segment made, not sealed")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    if crash_points:
        crash_points[0]("M-2 sealed, not answered")
    return arena


def restore(arena: Arena) -> None:
    """Write again what its users must not change: another one of them may have."""
    made, layout, words = arena.made, arena.layout, arena.words
    assert isinstance(made, Made)
    write_header(arena.segment, layout, arena.domain)
    start = layout.block(0)
    # Not RANKED, which whoever has precedence sets.
    words.store(start + at.BLOCK_KIND, made.declaration().kind_word() | words.load(start + at.BLOCK_KIND) & at.RANKED)
    words.store(start + at.BLOCK_PARAMETER, made.size)
    if made.kind == at.GUARDED:
        words.store(layout.block(1) + at.BLOCK_KIND, at.EXTENSION)


def made_of(fd: int, domain: str) -> Made:
    """What a supervisor of this domain made a segment for, as the kernel says.  SegmentError if none has made it."""
    prefix = f"/memfd:{_prefix(domain)}"
    text = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    if _is_sealed(fd) and text.startswith(prefix):
        facts, name = text[len(prefix) : len(prefix) + _FACTS_TEXT], text[len(prefix) + _FACTS_TEXT + 1 :]
        with contextlib.suppress(ValueError, struct.error):  # of another version of shlock
            serial, user, kind, policy, copies, high, low = _FACTS.unpack(base64.urlsafe_b64decode(facts + "="))
            made = Made(name, serial, user, kind, policy, high << 32 | low, copies)
            if kind in WRITING and (kind != at.GUARDED or (made.size and 0 < copies <= at.MOST_COPIES)):
                return made
    raise SegmentError("of the machine", f"no supervisor of domain {domain!r} has made it", "Open the lock by its name.")


def domain_and_made(fd: int) -> tuple[str, Made] | None:
    """Of a segment of any domain; None if it is none.  The domain is as it says inside, if that fits its label."""
    if not _is_sealed(fd):
        return None
    try:
        domain = Arena.over(Segment(os.dup(fd), read_only=True), user=ROOT).domain or ""
        return domain, made_of(fd, domain)
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


def has_others(fd: int) -> bool:
    """Whether anybody has the segment open, or mapped, beside the open file description of this descriptor.  Root only.

    It is in the kernel's word for it: a lease for writing is granted on a file that nobody else has open, not even in a
    message that is under way.  No look through all processes would find that one.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:  # also where the kernel knows no leases: then it is not known, and its memory counts
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


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


def arena_over(fd: int, domain: str) -> Arena:
    """The arena in a segment that the supervisor gave out, or that it finds again.  Takes the descriptor over; SegmentError."""
    try:
        made = made_of(fd, domain)
        layout = made.layout()
        read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if os.fstat(fd).st_size != layout.size:
            raise SegmentError(made.name, "another version of shlock has made it", "End the processes that use it.")
        segment = Segment(fd, read_only=read_only, tables=layout.tables)
    except BaseException:
        SYSTEM.close(fd)
        raise
    try:
        check_place(segment, ROOT)
    except BaseException:
        segment.close()
        raise
    return _over(segment, domain, made)


def _over(segment: Segment, domain: str, made: Made) -> Arena:
    """Name, number and kind are as the kernel has them, whatever stands inside."""
    arena = Arena(segment, made.layout(), domain)
    arena.domain, arena.only_name, arena.made = domain, made.name, made
    arena.identity = os.fstat(segment.fd).st_ino
    return arena
