"""What stands in the segments of this user (root: and of the machine), decoded without taking a lock, though all be stuck.

Segments are mapped read-only.  Named domains are found by their file names; anonymous arenas, whose segments have no name,
through the descriptors of this user's processes, and so are the ledgers of who holds a leased lock: no supervisor is asked.
Each word is read once and whole, but not all at the same instant: what is
shown together may never have been true together.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from . import _bias, _ledger, _machine, _names, _process
from . import _layout as at
from ._arena import Arena
from ._content import Content
from ._counting import BarrierWord
from ._deadlock import Place, deadlocks_in, has_edge
from ._geometry import CONSUMERS, CONTROLS, COUNT_SHIFT, FIRST_SLOT, PLACE, PRODUCERS
from ._memory import Memory
from ._readers import keys_of
from ._segment import BYTE_IN_USE, PREFIX, Segment
from ._sys import SHM_FOLDER, SYSTEM
from ._taken import FILLED
from .errors import Abandoned, DeadlockMember, SegmentError
from .synchronize import Owner, Waiter

__all__ = ["Abandoned", "DomainSnapshot", "LeaseSnapshot", "Owner", "PrimitiveSnapshot", "Waiter", "clean", "domains"]

_NAMELESS: Final = f"{SHM_FOLDER}/#"  # what /proc shows for a file that never had a name


@dataclass(frozen=True)
class LeaseSnapshot:
    """What a lock is leased for.

    lease, grace  seconds: of the holder's contract, or if nobody holds it, or its ledger can't be read, as it was created
    rank          of the holder, or None
    token         fencing token of the present hold, or of the last one; 0 if there was none
    remaining     seconds until the holder's lease ends, negative afterwards; None without a hold or without a ledger to be read
    terminate_requested   the holder is asked to leave
    site          file:line where the holder took it, if it records that
    """

    lease: float
    grace: float
    rank: int | None
    token: int
    remaining: float | None
    terminate_requested: bool
    site: str | None


@dataclass(frozen=True)
class ReaderSnapshot:
    """One that reads under an RWLock.

    pid, name     which process; it is there once for each thread of it that reads
    remaining     seconds until its lease ends, negative afterwards; None without a lease, or without a ledger to be read
    terminate_requested   it is asked to leave
    site          file:line where it went in, if it records that
    """

    pid: int
    name: str | None
    remaining: float | None
    terminate_requested: bool
    site: str | None


@dataclass(frozen=True)
class PrimitiveSnapshot:
    """One primitive.

    state      "free", "held", "being handed over" (to a waiter that is waking up), "held by a dead process", "inherited" (its
               heir holds it), "poisoned", "value 3", "set", "unset", "2 of 4 waiting", "broken", "waiting" or "idle" (a
               Condition), "damaged"; of a Block "version 12", "being written", "being edited", "abandoned" (its editor died)
               or, under that policy, "poisoned"; of an RWLock "3 readers" or "being written"; of a Channel "2 to user, 0 to
               privileged", of a Queue "3 items, 1 taken, 2 dead letters"
    owner      who holds it; of an owned Semaphore one of the holders
    held_for   seconds, or None; with ``held_for_is_lower_bound`` it is at least that: the owner got in when nobody waited,
               reading no clock, and the oldest waiter has waited so long
    lease      None if it is not leased
    deadlock   the cycle of threads that wait for one another to which its owner belongs, beginning with that owner; else None
    readers    of an RWLock: who reads and lives, the one whose lease ends first in front
    """

    name: str | None
    kind: str
    state: str
    owner: Owner | None
    held_for: float | None
    held_for_is_lower_bound: bool
    waiters: tuple[Waiter, ...]
    abandoned: Abandoned | None
    lease: LeaseSnapshot | None = None
    deadlock: tuple[DeadlockMember, ...] | None = None
    readers: tuple[ReaderSnapshot, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


@dataclass(frozen=True)
class DomainSnapshot:
    """One segment of a domain, or one arena without a name (``domain`` is None).

    segment    its file name, or the path through which it was found
    in_use     whether a living process has it open
    processes  the living processes that are recorded in it
    problem    why it can't be read, or None
    """

    domain: str | None
    segment: str
    in_use: bool
    processes: tuple[int, ...]
    primitives: tuple[PrimitiveSnapshot, ...]
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


#: Of what was decoded, the primitives whose owner waits or has waited, and where they are.  Only these arenas stay open.
_Decoded = list[tuple[Arena, int, PrimitiveSnapshot]]


def domains() -> list[DomainSnapshot]:
    """Every segment of this user: named domains first, for root those of the machine, then arenas without a name."""
    decoded: _Decoded = []
    named = [_of_file(name, decoded) for name in _segment_files()]
    of_machine = _of_machine(decoded) if SYSTEM.geteuid() == _machine.ROOT else []
    found = [*(snapshot for snapshot in named if snapshot is not None), *of_machine, *_nameless(decoded)]
    return _with_deadlocks(found, decoded)


def _with_deadlocks(found: list[DomainSnapshot], decoded: _Decoded) -> list[DomainSnapshot]:
    """The same, with the deadlocks filled in: they may go through any number of segments."""
    cycles: dict[Place, tuple[DeadlockMember, ...]] = {}
    for cycle, members in deadlocks_in(arena for arena, _, _ in decoded):
        cycles |= {edge.lock: (*members[first:], *members[:first]) for first, edge in enumerate(cycle)}
    if not cycles:
        return found
    by_primitive = {id(primitive): cycles.get((arena.identity, index)) for arena, index, primitive in decoded}
    return [
        replace(one, primitives=tuple(replace(p, deadlock=by_primitive.get(id(p))) for p in one.primitives)) for one in found
    ]


def clean(domain: str | None = None) -> list[str]:
    """Remove the segments and semaphores that no living process uses; the file names of what was removed.

    domain  only this one; None means all of this user.  What is in use stays, however long its processes have been idle.
    """
    removed: list[str] = []
    for first in (name for name in _segment_files() if "+" not in name):
        if domain is not None and first.split("=")[0] != _names.segment_name(domain):
            continue
        descriptor = _open(f"{SHM_FOLDER}/{first}")
        if descriptor is None:
            continue
        try:
            # Whoever uses a domain has its first segment open.  From here to the unlink nobody can attach; who tries
            # sees a file without links, and makes a new one.
            if os.fstat(descriptor).st_uid == SYSTEM.geteuid() and SYSTEM.lock_byte(descriptor, BYTE_IN_USE, shared=False):
                for name in reversed(_segment_files()):
                    if name.split("+")[0] == first:
                        removed += _remove_segment(name)
        finally:
            os.close(descriptor)
    if domain is None:
        removed += _remove_orphaned_semaphores()
    return removed


# -- finding segments -----------------------------------------------------------------------------------------------------


def _segment_files() -> list[str]:
    return sorted(name for name in os.listdir(SHM_FOLDER) if _names.domain_of(name) is not None)


def _open(path: str) -> int | None:
    try:
        return SYSTEM.open_segment(path)
    except OSError:
        return None


def _of_file(name: str, decoded: _Decoded) -> DomainSnapshot | None:
    try:
        descriptor = SYSTEM.open_segment(f"{SHM_FOLDER}/{name}", read_only=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        return DomainSnapshot(_names.domain_of(name), name, False, (), (), error.strerror)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return DomainSnapshot(_names.domain_of(name), name, False, (), (), "it is no regular file")
    return _decode(descriptor, name, decoded)


def _of_machine(decoded: _Decoded) -> list[DomainSnapshot]:
    """The domains of the machine, each with all its names, through the descriptors of the processes that have them open."""
    processes: dict[str, set[int]] = {}
    primitives: dict[str, list[PrimitiveSnapshot]] = {}
    for fd in _machine.segments_of(None):
        found = _machine.domain_and_made(fd)
        if found is None:
            os.close(fd)
            continue
        domain, _ = found
        with contextlib.suppress(SegmentError):
            arena = _machine.arena_over(fd, domain)
            living = (_process.pid_of(word) for word in arena.processes() if _process.is_alive(word))
            processes.setdefault(domain, set()).update(living)
            primitives.setdefault(domain, []).extend(_primitives(arena, decoded))
    return [
        DomainSnapshot(
            domain,
            "of the machine",
            True,
            tuple(sorted(processes[domain])),
            tuple(sorted(found, key=lambda one: one.name or "")),
        )
        for domain, found in sorted(primitives.items())
    ]


def _nameless(decoded: _Decoded) -> Iterator[DomainSnapshot]:
    """Arenas without a name, each once, through the descriptors of the processes that have them open."""
    seen: set[tuple[int, int]] = set()
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):  # gone, or somebody else's
            for entry in os.listdir(folder):
                path = f"{folder}/{entry}"
                with contextlib.suppress(OSError):
                    if not os.readlink(path).startswith(_NAMELESS):
                        continue
                    facts = os.stat(path)
                    if facts.st_nlink or (facts.st_dev, facts.st_ino) in seen or facts.st_uid != SYSTEM.geteuid():
                        continue
                    seen.add((facts.st_dev, facts.st_ino))
                    if _is_ours(path):
                        yield _decode(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, decoded)


def _is_ours(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(at.WORD) == at.MAGIC.to_bytes(at.WORD, "little")


# -- decoding -------------------------------------------------------------------------------------------------------------


def _decode(descriptor: int, name: str, decoded: _Decoded) -> DomainSnapshot:
    in_use = SYSTEM.is_byte_locked(descriptor, BYTE_IN_USE)
    domain = _names.domain_of(name)
    try:
        segment = Segment(descriptor, name, read_only=True)
    except (OSError, ValueError) as error:
        os.close(descriptor)
        return DomainSnapshot(domain, name, in_use, (), (), str(error))
    try:
        arena = Arena.over(segment)
    except SegmentError as error:
        return DomainSnapshot(domain, name, in_use, (), (), f"{error.fact}. {error.advice}")
    processes = tuple(sorted(_process.pid_of(word) for word in arena.processes() if _process.is_alive(word)))
    return DomainSnapshot(arena.domain, name, in_use, processes, tuple(_primitives(arena, decoded)))


def _primitives(arena: Arena, decoded: _Decoded) -> Iterator[PrimitiveSnapshot]:
    waiters = _waiters(arena)
    ledgers = _Ledgers(arena)
    is_named = arena.domain is not None
    used = arena.layout.blocks if is_named else min(arena.words.load(at.HEADER_BLOCKS_USED), arena.layout.blocks)
    if arena.layout.data:
        used = min(used, 1)  # it is one object, and its first block says what
    for index in range(used):
        name = _names.name_at(arena, index)
        kind = arena.words.load(arena.layout.block(index) + at.BLOCK_KIND) & at.KIND
        if not at.FREE_BLOCK < kind < at.EXTENSION or (is_named and name is None):
            continue
        try:
            found = _primitive(arena, index, kind, name, _waiting(arena, index, kind, waiters), ledgers)
        except SegmentError:
            text = None if name is None else _names.text_of(name)
            found = PrimitiveSnapshot(text, at.KIND_NAMES[kind], "damaged", None, None, False, (), None)
        if has_edge(arena.words.view, arena.layout.block(index)):
            decoded.append((arena, index, found))
        yield found
    ledgers.close()


def _waiting(arena: Arena, index: int, kind: int, waiters: dict[int, tuple[Waiter, ...]]) -> tuple[Waiter, ...]:
    """Who waits for a block, under whatever key."""
    keys: Iterable[int] = (index, *keys_of(arena, index)) if kind == at.RWLOCK else (index,)
    if kind in (at.CHANNEL, at.QUEUE):
        keys = range(arena.layout.blocks)
    found = [waiter for key in keys for waiter in waiters.get(key, ())]
    return tuple(sorted(found, key=lambda waiter: -waiter.waiting_for))


def _waiters(arena: Arena) -> dict[int, tuple[Waiter, ...]]:
    """The blocked threads of each block, the longest-waiting first."""
    now = time.monotonic_ns()
    by_block: dict[int, list[tuple[int, Waiter]]] = {}
    load, spot = arena.words.load, arena.layout.spot
    for index in range(min(load(at.HEADER_SPOTS_USED), arena.layout.spots)):
        state = load(spot(at.SPOT_STATE, index))
        claim = load(spot(at.SPOT_CLAIM, index))
        if state & at.STATE == at.IDLE or not _process.is_alive(claim):
            continue
        since = load(spot(at.SPOT_SINCE, index))
        waiter = Waiter(
            _process.pid_of(claim),
            load(spot(at.SPOT_THREAD, index)) & 0xFFFFFFFF,
            arena.process_name(claim),
            max(0, now - since) / 1e9,
        )
        by_block.setdefault((state & at.KEY) >> at.KEY_SHIFT, []).append((since, waiter))
    return {block: tuple(waiter for _, waiter in sorted(found, key=lambda pair: pair[0])) for block, found in by_block.items()}


class _Ledgers:
    """The ledgers of the processes that hold leased locks of one arena, each looked for once."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._found: dict[int, tuple[_ledger.Ledger, dict[int, int], dict[int, int]] | None] = {}

    def of(self, owner: int, *, block: int = -1, record: int = -1) -> tuple[_ledger.Ledger, int] | None:
        """The ledger of a process and its slot for a lock, or for the record of a reader; None if they can't be found."""
        if owner not in self._found:
            arena = self._arena.identity
            ledger = _ledger.ledger_of(_process.pid_of(owner), owner, arena, read_only=True)
            self._found[owner] = (
                None if ledger is None else (ledger, _ledger.slots_of(ledger, arena), _ledger.reader_slots_of(ledger, arena))
            )
        found = self._found[owner]
        if found is None:
            return None
        ledger, slots, reader_slots = found
        slot = reader_slots.get(record) if block < 0 else slots.get(block)
        return None if slot is None else (ledger, slot)

    def close(self) -> None:
        for found in self._found.values():
            if found is not None:
                found[0].close()


def _primitive(
    arena: Arena, index: int, kind: int, name: bytes | None, waiters: tuple[Waiter, ...], ledgers: _Ledgers
) -> PrimitiveSnapshot:
    start, load = arena.layout.block(index), arena.words.load
    word, kind_word = load(start + at.BLOCK_WORD), load(start + at.BLOCK_KIND)
    owner: Owner | None = None
    held_for: float | None = None
    is_lower_bound = False
    abandoned: Abandoned | None = None
    lease: LeaseSnapshot | None = None
    readers: tuple[ReaderSnapshot, ...] = ()
    if kind in (at.LOCK, at.RLOCK, at.GUARDED, at.RWLOCK) or kind_word & at.OWNED:
        cells = arena.cells_of(index) if kind_word & at.OWNED else [start + at.BLOCK_WORD]
        words = [load(cell) for cell in cells]
        if not kind_word & at.OWNED:
            words = [_bias.ordinary(arena.words.view, start, words[0])]
        held = [w for w in words if at.process_in(w)]
        if any(w & at.DIED for w in words):
            abandoned = arena.abandoned(start)
        if held:
            since = load(start + at.BLOCK_SINCE)
            alive = _process.is_alive(held[0])
            owner = Owner(_process.pid_of(held[0]), arena.process_name(held[0]), alive, since / 1e9 if since else None)
            held_for = max(0, time.monotonic_ns() - since) / 1e9 if since else None
            if held_for is None and waiters:
                held_for, is_lower_bound = waiters[0].waiting_for, True
        if kind_word & at.LEASED:
            lease = _lease(arena, index, held[0] & at.OWNER if owner is not None and owner.alive else 0, ledgers)
            if lease.remaining is not None:
                held_for, is_lower_bound = max(0.0, lease.lease - lease.remaining), False
        state = _state_of_owned(words, held, owner, bool(kind_word & at.OWNED))
        if kind == at.RWLOCK:
            is_outside = load(start + at.BLOCK_GATE) & (at.DRAINING | at.SUSPECT) == at.DRAINING
            abandoned = None if is_outside else abandoned
            readers = _readers(arena, index, ledgers)
            state = _state_of_rwlock(state, [load(cell) for cell in arena.cells_of(index)], is_outside)
        if kind == at.GUARDED:
            content = Content(Memory(arena))
            state, abandoned = content.state(owner is not None, owner is None or owner.alive), content.abandoned()
    elif kind in (at.SEMAPHORE, at.BOUNDED_SEMAPHORE):
        state = f"value {word >> at.COUNT_SHIFT}"
        if kind == at.BOUNDED_SEMAPHORE:
            state += f" of {load(start + at.BLOCK_PARAMETER)}"
    elif kind in (at.CHANNEL, at.QUEUE):
        state = _state_of_rings(arena, kind)
    elif kind == at.EVENT:
        state = "set" if word & at.SET else "unset"
    elif kind == at.CONDITION:
        state = "waiting" if waiters else "idle"
    else:
        arrived = word >> at.COUNT_SHIFT & (1 << BarrierWord.COUNT_BITS) - 1
        state = "broken" if word & at.BROKEN else f"{arrived} of {load(start + at.BLOCK_PARAMETER)} waiting"
    text = None if name is None else _names.text_of(name)
    return PrimitiveSnapshot(
        text, at.KIND_NAMES[kind], state, owner, held_for, is_lower_bound, waiters, abandoned, lease, readers=readers
    )


def _lease(arena: Arena, index: int, owner: int, ledgers: _Ledgers) -> LeaseSnapshot:
    """Of a leased lock.  ``owner`` is who holds it, if it lives, else 0."""
    start, load = arena.layout.block(index), arena.words.load
    lease, grace, token = (load(start + place) for place in (at.BLOCK_LEASE, at.BLOCK_GRACE, at.BLOCK_TOKEN))
    rank: int | None = None
    remaining: float | None = None
    asked, site = False, None
    if owner and (found := ledgers.of(owner, block=index)) is not None:
        ledger, slot = found
        lease, grace, rank = (ledger.view[field + slot] for field in (_ledger.LEASE, _ledger.GRACE, _ledger.RANK))
        rank &= _ledger.RAISES - 1
        remaining, asked, site = _hold(ledger, slot)
    return LeaseSnapshot(lease / 1e9, grace / 1e9, rank, token, remaining, asked, site)


def _readers(arena: Arena, index: int, ledgers: _Ledgers) -> tuple[ReaderSnapshot, ...]:
    load, found = arena.words.load, []
    is_leased = load(arena.layout.block(index) + at.BLOCK_KIND) & at.LEASED
    for record in arena.cells_of(index):
        c = load(record)
        if c & at.OWNER and not c & at.IN_LINE and _process.is_alive(c):
            slot = ledgers.of(c & at.OWNER, record=record) if is_leased else None
            hold = (None, False, None) if slot is None else _hold(*slot)
            found.append(ReaderSnapshot(_process.pid_of(c), arena.process_name(c & at.OWNER), *hold))
    return tuple(sorted(found, key=lambda reader: math.inf if reader.remaining is None else reader.remaining))


def _hold(ledger: _ledger.Ledger, slot: int) -> tuple[float | None, bool, str | None]:
    """What a ledger says of the present hold: the time that is left, whether its holder is asked to leave, where it began."""
    began = ledger.moments[_ledger.BEGAN + slot]
    if began <= 0:
        return None, False, None
    asked = ledger.moments[_ledger.TERMINATE + slot] == began
    return began + ledger.view[_ledger.LEASE + slot] / 1e9 - time.monotonic(), asked, ledger.site(slot)


def _state_of_owned(words: list[int], held: list[int], owner: Owner | None, many: bool) -> str:
    if any(w & at.DIED and not w & at.OWNER for w in words):
        return "poisoned"
    if many:
        return f"value {len(words) - len(held)} of {len(words)}"
    if owner is None:
        return "being handed over" if words[0] & at.OWNER else "free"
    if not owner.alive:
        return "held by a dead process"
    return "inherited" if held[0] & at.DIED else "held"


def _state_of_rings(arena: Arena, kind: int) -> str:
    """How much waits in a channel or a queue.  SegmentError if it has no rings."""
    if arena.layout.blocks < 1 + 2 * CONTROLS:
        raise arena.damaged("it has no rings")
    counts = []
    for first in (1, 1 + CONTROLS):
        head, tail = (
            arena.words.load(arena.layout.block(first + which) + at.BLOCK_PLACE) >> COUNT_SHIFT
            for which in (CONSUMERS, PRODUCERS)
        )
        counts.append(tail - head & PLACE)
    if kind == at.CHANNEL:
        return f"{counts[0]} to user, {counts[1]} to privileged"
    slots = map(arena.layout.block, range(FIRST_SLOT, arena.layout.blocks - 1))
    taken = sum(arena.words.load(slot + at.BLOCK_STATE) & FILLED for slot in slots)
    parts = [f"{counts[0]} item{'' if counts[0] == 1 else 's'}"]
    parts += [f"{count} {what}" for count, what in ((taken, "taken"), (counts[1], "dead letters")) if count]
    return ", ".join(parts)


def _state_of_rwlock(state: str, records: list[int], is_outside: bool) -> str:
    """What its readers make of the state of its writers."""
    reading = [c for c in records if c and not c & at.IN_LINE]
    living = sum(map(_process.is_alive, reading))
    if living:
        return f"{living} reader{'s' if living > 1 else ''}"
    if reading or state == "held by a dead process":
        return "held by a dead process"
    if state == "poisoned":
        return "free" if is_outside else state
    return "being written" if state in ("held", "inherited") else state


# -- removing -------------------------------------------------------------------------------------------------------------


def _remove_segment(name: str) -> list[str]:
    """Remove a segment and its semaphores; what was removed."""
    identity = _identity_of(f"{SHM_FOLDER}/{name}")
    if identity is None or not _unlink(name):
        return []
    return [name, *_remove_semaphores(identity)]


def _identity_of(path: str) -> int | None:
    """The number in the header of a segment; None if it can't be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return int.from_bytes(os.pread(descriptor, at.WORD, at.HEADER_IDENTITY * at.WORD), "little")
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _remove_semaphores(identity: int) -> list[str]:
    prefix = f"sem.{PREFIX}-{identity:016x}-"
    names = [name for name in os.listdir(SHM_FOLDER) if name.startswith(prefix)]
    return [name for name in names if _unlink(name)]


def _remove_orphaned_semaphores() -> list[str]:
    """Semaphores whose arena is gone: left behind only if an arena's janitor was killed, too.

    The semaphores are listed first: an arena that is made while we look for the living has none among them.  And the living
    are looked for twice: an arena may be missed whose process forked and ended meanwhile, for the child was not listed yet.
    """
    orphans: dict[str, int] = {}
    for name in os.listdir(SHM_FOLDER):
        parts = name.split("-")
        if parts[0] == f"sem.{PREFIX}" and len(parts) == 3:
            with contextlib.suppress(OSError, ValueError):
                if os.stat(f"{SHM_FOLDER}/{name}").st_uid == SYSTEM.geteuid():
                    orphans[name] = int(parts[1], 16)
    for _ in range(2):
        if orphans:
            living = set(_living_arenas())
            orphans = {name: identity for name, identity in orphans.items() if identity not in living}
    return [name for name in orphans if _unlink(name)]


def _living_arenas() -> Iterator[int | None]:
    for snapshot in domains():
        yield _identity_of(snapshot.segment if snapshot.segment.startswith("/") else f"{SHM_FOLDER}/{snapshot.segment}")


def _unlink(name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{SHM_FOLDER}/{name}")
        return True
    return False
