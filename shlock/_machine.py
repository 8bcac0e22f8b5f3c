"""Domains of the machine: locks, blocks, channels and queues that several users share, in segments that only root can make.

The name of such a domain begins with "/".  Its supervisor is root (``shlock supervise --domain /NAME``), and everything in it
is opened under a contract: what a client gets is a descriptor, for reading only where its contract allows no more.

A segment is root's, of mode 0600, sealed against truncation, and of one name only: who may lock one name must not be able to
write where another one lies.  It has no path, and lives as long as anybody has it open.  What the kernel says of it - owner,
mode, seals, the label that it was made with - proves to the next supervisor, and to clients, that a supervisor made it, for
which name and which user, and what it is.  What stands inside is written by its users, and proves nothing.

A channel or a queue has further files beside its segment, its *parts*: one for the messages of each direction, without tables.
In the segment itself is what both sides of a ring have to write: the words, the tables of chunks, the items that are taken.

    M1  who has a writable descriptor had a contract for that very name that lets him write - "acquire" for a lock, "write" for
        a Block, "send" for the messages of a channel or a queue, that or "receive" for its tables - or was given it by who
        had.  Nobody is given a descriptor of something else than what he asked for
    M2  nobody but root can make a file that passes ``made_of``; nobody at all can shrink or grow one
    M3  from a descriptor for reading no writable one can be had: the mode is root's, 0600
    M4  how large the tables and the data are, and where they lie, is computed from the label, never from what stands inside:
        whatever its users write, nobody maps less or reads farther than there is
    M5  all memory of a segment is taken when it is made: a client meets no full memory later (but see below)
    M6  memory counts against the user for whom it was made until nobody but the supervisor has it open or mapped, as the
        kernel says (``has_others``), whatever contracts were given back; all files of an object as long as one of them does
    M7  what the privileged end of a channel sends, nobody else can write: the descriptor for writing is for the class "kernel"
    M8  every place that is read in shared memory is checked against what the label says before it is used, every loop over what
        is there has a bound that it does not say, and what is under a lock is short: who is held up inside would be killed

    # who              may write                          and so can                             but not
    # root             header, kinds, labels              -                                      -
    # may acquire or   tables and data of that name       break this name for all that use it:   see or change any other name,
    #   write                                             let two in, tear contents, punch holes  shrink or outgrow the segment,
    #                                                     (who then touches them pays for them)   have anybody killed
    # may only read    nothing: the MMU stops it          read all of it, the lock's word too    write, hold up writers, own it
    # may send         tables, messages of his direction  lose, repeat, forge and read messages  write or read those of the
    #                                                     of his direction, garble both          other direction (see M7)
    # may receive      tables                             read all messages of that direction,   write a message of a channel,
    #                                                     lose and repeat them, garble both;     or read one of the other
    #                                                     make up items that were taken          direction
    # no contract      nothing                            -                                      learn whether the name exists

x86-64 and Arm have no pages that can be written and not read: that "write" without "read" does not read is checked by the
client's own code alone, and keeps no secret.  So it is with "send": who may send can read what waits in his own direction.

Two users of a channel or a queue can so send each other any garbage, in any order, hold each other up while they go on, and
make calls raise SegmentError.  They can't make the other one read or write outside of the ring, go round in it for ever, or be
killed.  What is read in place (``peek``) may change while it is read.  And to unpickle an object is to run a program of its
sender's: so what is pickled is refused there, unless the receiver has said ``unpickle=True``, that he trusts all who may open
the name, for whatever.  (Who may only receive can move HEAD to where something else that was sent looks like a message.)

    killed after                      what is left                               outcome
    M-1 the segment made, not sealed  nobody else has it                         the kernel frees it
    M-2 sealed, not answered          the same, if its supervisor was killed;    freed; or the name is there, in its first state
                                      the client: a name that nobody uses
    M-3 all who may receive killed,   who may only send has no descriptor of     the next supervisor makes the missing files
        and the supervisor            what they would receive: it is gone        anew, with an empty ring

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
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from . import _layout as at
from ._arena import Arena, Declaration, Extent, Part, check_place, write_header
from ._geometry import (
    CONSUMERS,
    CONTROLS,
    FIRST_SLOT,
    ITEMS,
    LETTERS,
    MOST_BYTES,
    PRODUCERS,
    SLOTS_OF_MACHINE,
    Geometry,
    channel_controls,
    channel_rings,
    prepare,
    queue_controls,
    queue_rings,
    slot_size,
)
from ._memory import Memory
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
    "close",
    "complete",
    "descriptors",
    "domain_and_made",
    "give_up",
    "has_mapped",
    "has_others",
    "is_of_machine",
    "is_unfinished",
    "is_writable",
    "label",
    "made_of",
    "make_arena",
    "open_again",
    "part_over",
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
MOST_CONTENT: Final = (1 << 40) - 1  # bytes of a block
USUAL_QUEUE: Final = 1 << 18  # bytes of a queue that is made for somebody who names no size
_RINGS: Final = frozenset({"send", "receive"})
#: What can be there: the operations of a contract whose holder gets a descriptor for writing, and those of which he needs one.
WRITING: Final = {
    at.LOCK: frozenset({"acquire"}), at.RLOCK: frozenset({"acquire"}), at.GUARDED: frozenset({"write"}),
    at.CHANNEL: _RINGS, at.QUEUE: _RINGS,
}  # fmt: skip
CARRYING: Final = frozenset({at.CHANNEL, at.QUEUE})  # messages
OPERATIONS: Final = {at.GUARDED: frozenset({"read", "write"}), at.CHANNEL: _RINGS, at.QUEUE: _RINGS}


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


#: In a label: serial number, user, kind, policy, number of copies, part, and size, as two numbers.  It has at most 249 bytes.
_FACTS: Final = struct.Struct(">QIBBBBBI")
_FACTS_TEXT: Final = 28  # characters


class Made(NamedTuple):
    """What a supervisor made a segment for.

    serial  grows; all files of one object have the same
    user    for whom: against him its memory counts
    kind, policy, size, copies   of the one object in it; copies of a block
    part    which of its files: 0 is the segment
    """

    name: str
    serial: int
    user: int
    kind: int
    policy: int = 0
    size: int = 0
    copies: int = 0
    part: int = 0

    def layout(self) -> at.Layout:
        """Where everything in the segment lies, whatever the header says."""
        blocks = len(self.controls())
        data = at.pages(self.size) * self.copies if self.kind == at.GUARDED else self._length(0)
        return at.Layout(SPOTS, PROCESSES, blocks, 0, semaphores=True, data=data)

    def controls(self, lease: int = 1, grace: int = 0) -> tuple[Declaration, ...]:
        """What the control blocks are at first."""
        if self.kind == at.CHANNEL:
            return channel_controls(self.size, lease, grace)
        if self.kind == at.QUEUE:
            return queue_controls(self.size, lease, grace, SLOTS_OF_MACHINE)
        lock = Declaration(self.kind, policy=self.policy, parameter=self.size, lease=lease, grace=grace)
        return (lock, Declaration(at.EXTENSION)) if self.kind == at.GUARDED else (lock,)

    def rings(self) -> dict[int, Geometry]:
        """By their first control blocks."""
        if self.kind == at.CHANNEL:
            return dict(zip((1, 1 + CONTROLS), channel_rings(self.size), strict=True))
        if self.kind == at.QUEUE:
            return dict(zip((ITEMS, LETTERS), queue_rings(self.size, is_of_machine=True), strict=True))
        return {}

    def extents(self) -> tuple[Extent, ...]:
        """In which of its files the data of a channel or a queue is.  Messages of each direction have one of their own."""
        found: list[Extent] = []
        first = 0
        used = {0: 0, 1: 0, 2: 0}
        for part, length in self._pieces():
            found.append(Extent(first, first + length, part, used[part]))
            first, used[part] = first + length, used[part] + length
        return tuple(found)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        rings = self.rings().values()
        if self.kind == at.CHANNEL:
            for part, ring in enumerate(rings, 1):
                yield from ((0, ring.table), (part, ring.content))
        elif self.kind == at.QUEUE:
            items, letters = rings
            yield from ((0, items.table), (1, items.content), (0, letters.size + SLOTS_OF_MACHINE * slot_size(items)))

    def _length(self, part: int) -> int:
        return sum(length for which, length in self._pieces() if which == part)

    def parts(self) -> dict[int, int]:
        """Bytes of its files beside the segment."""
        return {part: self._length(part) for part in sorted({part for part, _ in self._pieces()} - {0})}

    def total(self) -> int:
        """Bytes of all its files."""
        return self.layout().size + sum(self.parts().values())

    def rights(self, operations: Collection[str], class_: str) -> dict[int, bool]:
        """The parts that belong to a contract, and whether for writing."""
        found = {}
        for part in self.parts():
            is_ours = self.kind == at.QUEUE or class_ == "kernel"  # else the other end of a channel writes part 1
            may_write = "send" in operations and (is_ours or part == 2)
            if may_write or ("receive" in operations and (is_ours or part == 1)):
                found[part] = may_write
        return found

    def needs(self, block: int) -> tuple[str, str] | None:
        """Operation and class that a contract for the lock of a control block needs; None if there is no such lock."""
        if self.kind == at.CHANNEL and block:
            ring, which = divmod(block - 1, CONTROLS)
            operation = {PRODUCERS: "send", CONSUMERS: "receive"}.get(which)
            return None if operation is None else (operation, "kernel" if (which == PRODUCERS) == (ring == 0) else "user")
        if self.kind == at.QUEUE:
            if block == ITEMS + PRODUCERS:
                return "send", "user"
            is_lock = block in (ITEMS + CONSUMERS, LETTERS + PRODUCERS, LETTERS + CONSUMERS)  # whoever takes buries
            return ("receive", "user") if is_lock or FIRST_SLOT <= block < FIRST_SLOT + SLOTS_OF_MACHINE else None
        if block or self.kind == at.CHANNEL:
            return None
        return ("write" if self.kind == at.GUARDED else "acquire"), "user"


def label(domain: str, made: Made) -> str:
    """What the kernel remembers of a file from its making on."""
    high, low = divmod(made.size, 1 << 32)
    facts = _FACTS.pack(made.serial, made.user, made.kind, made.policy, made.copies, made.part, high, low)
    return f"{_prefix(domain)}{base64.urlsafe_b64encode(facts).decode()}-{made.name}"


def _prefix(domain: str) -> str:
    digest = hashlib.blake2b(domain.encode(), digest_size=6).digest()
    return f"shlock-{base64.urlsafe_b64encode(digest).decode()}-"


def make_arena(
    domain: str,
    made: Made,
    lease: int,
    grace: int,
    meanwhile: Callable[[], None] = lambda: None,
    limits: tuple[int, int] = (0, 0),
) -> Arena:
    """New files for one name.  OSError if the memory can't be had.  Root only.

    meanwhile  is called now and then while the memory is taken, which is some ms for each 16 MiB
    limits     of a queue: BLOCK_MOST_ITEMS and BLOCK_MOST_DELIVERIES
    """
    arena = complete(domain, made, {}, lease, grace, meanwhile)
    if made.kind == at.QUEUE:
        start = arena.layout.block(0)
        for place, value in zip((at.BLOCK_MOST_ITEMS, at.BLOCK_MOST_DELIVERIES), limits, strict=True):
            arena.words.store(start + place, value)
    return arena


def complete(
    domain: str,
    made: Made,
    files: Mapping[int, int],
    lease: int = 1,
    grace: int = 0,
    meanwhile: Callable[[], None] = lambda: None,
) -> Arena:
    """The arena of a name of which there are these files, by part: the others are made anew.  Takes the descriptors over.

    What was in those is nobody's any more (M-3): the rings of which something is missing are empty then.
    """
    kept = {part: Part(fd) for part, fd in files.items()}
    for part, size in {0: made.layout().size, **made.parts()}.items():
        if part not in files:
            kept[part] = Part(_make_file(domain, made._replace(part=part), size, meanwhile))
    descriptor = kept.pop(0)
    if 0 in files:
        fd, descriptor.fd = descriptor.fd, -1
        arena = arena_over(fd, domain)
    else:
        segment = Segment(descriptor.fd, tables=made.layout().tables)
        descriptor.fd = -1
        write_header(segment, made.layout(), domain)
        arena = _over(segment, domain, made)
        for index, declaration in enumerate(made.controls(lease, grace)):
            arena.declare(index, declaration, ())
            if declaration.lease:
                arena.words.store(arena.layout.block(index) + at.BLOCK_TOKEN, SYSTEM.time_ns() // 1000)
    arena.parts = kept
    memory = Memory(arena)
    for part, (first, ring) in enumerate(made.rings().items(), 1):
        if 0 not in files or part in kept.keys() - files.keys():
            for control in (first + PRODUCERS, first + CONSUMERS):
                for place in range(at.BLOCK_PLACE, at.BLOCK_WORDS):
                    arena.words.store(arena.layout.block(control) + place, 0)
            prepare(memory, ring)
    if crash_points:
        crash_points[0]("M-2 sealed, not answered")
    return arena


def _make_file(domain: str, made: Made, size: int, meanwhile: Callable[[], None]) -> int:
    """A memory file of root's, that nobody can make shorter or longer.  OSError if the memory can't be had."""
    first = SYSTEM.create_sealable(label(domain, made), size, meanwhile)
    try:
        fd = open_again(first, read_only=False)  # the kernel does not count the first one among those for writing: has_others
    finally:
        SYSTEM.close(first)
    try:
        os.fchmod(fd, MODE)
        if crash_points:
            crash_points[0]("M-1 segment made, not sealed")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        SYSTEM.close(fd)
        raise
    return fd


def restore(arena: Arena) -> None:
    """Write again what its users must not change: another one of them may have."""
    made, layout, words = arena.made, arena.layout, arena.words
    assert isinstance(made, Made)
    write_header(arena.segment, layout, arena.domain)
    for index, declaration in enumerate(made.controls()):
        start = layout.block(index)
        # Not RANKED, which whoever has precedence sets.
        words.store(start + at.BLOCK_KIND, declaration.kind_word() | words.load(start + at.BLOCK_KIND) & at.RANKED)
        words.store(start + at.BLOCK_PARAMETER, declaration.parameter)


def is_unfinished(arena: Arena) -> bool:
    """Whether somebody is inside, or died there, or messages wait: anybody who may write there can make it say so."""
    assert isinstance(arena.made, Made)
    load, block = arena.words.load, arena.layout.block
    rings = arena.made.rings()
    return any(
        load(block(first + PRODUCERS) + at.BLOCK_PLACE) != load(block(first + CONSUMERS) + at.BLOCK_PLACE) for first in rings
    ) or any(load(block(index) + at.BLOCK_WORD) for index in range(arena.layout.blocks) if arena.made.needs(index))


def close(arena: Arena) -> None:
    """Let go of all files of an object."""
    arena.segment.close()
    for part in arena.parts.values():
        part.close()


def descriptors(arena: Arena) -> list[int]:
    """Those of all files of an object that this process has."""
    return [arena.segment.fd, *(part.fd for part in arena.parts.values())]


def made_of(fd: int, domain: str) -> Made:
    """What a supervisor of this domain made a segment for, as the kernel says.  SegmentError if none has made it."""
    prefix = f"/memfd:{_prefix(domain)}"
    text = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    if _is_sealed(fd) and text.startswith(prefix):
        facts, name = text[len(prefix) : len(prefix) + _FACTS_TEXT], text[len(prefix) + _FACTS_TEXT + 1 :]
        with contextlib.suppress(ValueError, struct.error):  # of another version of shlock
            serial, user, kind, policy, copies, part, high, low = _FACTS.unpack(base64.urlsafe_b64decode(facts))
            made = Made(name, serial, user, kind, policy, high << 32 | low, copies, part)
            if _is_possible(made):
                return made
    raise SegmentError("of the machine", f"no supervisor of domain {domain!r} has made it", "Open the lock by its name.")


def _is_possible(made: Made) -> bool:
    if made.kind == at.GUARDED:
        return bool(made.size and 0 < made.copies <= at.MOST_COPIES and not made.part)
    if made.kind in (at.CHANNEL, at.QUEUE):
        return 0 < made.size <= MOST_BYTES and (not made.part or made.part in made.parts())
    return made.kind in WRITING and not made.part


def domain_and_made(fd: int) -> tuple[str, Made] | None:
    """Of a segment of any domain; None if it is none.  The domain is as it says inside, if that fits its label."""
    if not _is_sealed(fd):
        return None
    try:
        domain = Arena.over(Segment(os.dup(fd), read_only=True), user=ROOT).domain or ""
        made = made_of(fd, domain)
        return None if made.part else (domain, made)
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
        if made.part:
            raise SegmentError(made.name, "it is a part of something, and no segment", "Open it by its name.")
        layout = made.layout()
        read_only = not is_writable(fd)
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


def part_over(fd: int, arena: Arena) -> None:
    """Take over a descriptor of one more file of an object.  SegmentError, and it is closed, if it is of something else."""
    part = Part(fd)
    made, whole = made_of(fd, arena.domain or ""), arena.made
    assert isinstance(whole, Made)
    if made._replace(part=0) != whole or os.fstat(fd).st_size != whole.parts().get(made.part):
        raise SegmentError(whole.name, f"{made.name!r} came with it, of which it is no part", "End the processes that use it.")
    arena.parts[made.part] = part


def is_writable(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _over(segment: Segment, domain: str, made: Made) -> Arena:
    """Name, number and kind are as the kernel has them, whatever stands inside."""
    arena = Arena(segment, made.layout(), domain)
    arena.domain, arena.only_name, arena.made, arena.extents = domain, made.name, made, made.extents()
    arena.declared, arena.identity = made.controls(), os.fstat(segment.fd).st_ino
    return arena
