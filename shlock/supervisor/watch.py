"""What the supervisor does to locks and their holders: look, terminate, kill, take away, pass on.

    # K   W names P, and P's ledger says that it is inside
    #     K1 deadline, revoked, or preempted: TERMINATE := deadline; a signal too if the contract says so
    #     K2 deadline + grace: membarrier, look again: the ledger, W, the ledger; changed: nothing
    #     K3 SENTENCE := P | reason     K4 SIGKILL through the pidfd     K5 the pidfd is readable     K6 pass on
    # T   W names P, and P's ledger has not said for a lease that it is inside: P stalls after E1, or after X1
    #     T1 CAS(W: w -> w|TAKEN), then DOUBT := 1    T2 membarrier
    #     T3 still not inside: CAS(w -> DIED of w, or 0 after LEFT), wake one.  inside: CAS(w -> w without TAKEN), K applies
    # D   P's pidfd is readable.  W names P: note who died, CAS(w -> DIED); reap its spots; wake one
    #
    # B   W is biased to P (``_bias``): it names P while P's H is INSIDE, and nobody otherwise.  K needs no more than that.
    #     Before T1 and D's exchange: V0 to V2, W is P|REVOKED, or 0.  Before T2, W being REVOKED: CAS(H: OUTSIDE -> SHUT), or
    #     P's threads could go in by the door.  It is INSIDE: P does not stall, T3 is CAS(w -> w without TAKEN).  But where the
    #     token is what it was, and BEGAN still 0 after T2, nobody has been inside: another process wrote H, and T goes on
    #
    # The same for a record C of a reader (``_leased_readers``), which in line keeps nobody out, and of which nobody is told:
    # K without a sentence; T3 and D: CAS(c -> 0), and wake the writer that waits for readers, or who waits for a record
    #
    # S1  never two inside: W leaves P by P's own exchange, by T3, whose TAKEN P's E3 sees, or after P's pidfd read dead
    # S2  nobody is killed whose hold ended in time: K2's membarrier brings out every X1 that was made before
    # S9  P is killed through the pidfd that was opened when it got its contract, only if its own ledger says it is inside
    # S10 a waiter that polls may be faster in D: both make an exchange from the dead owner's word, and one wins
    # S11 in a domain of the machine: a word that names nobody with a contract is forged, and is taken back at the next look
    # S12 a reader dies for its own process's deadline: of its threads that read, each has a slot and a record
    #
    # killed after   what stands there            repaired by
    # S-K3           a sentence, P lives          the next supervisor: K again; or P leaves, and the sentence means nothing
    # S-K4           P dies                       the waiters' poll, or the next supervisor's D
    # C72, C73       REVOKING, or P|REVOKED       who wants the lock next, or P; the next supervisor: B, and T after a lease
    # S-T1           P|TAKEN, DOUBT or not        P's own E3 or X2, or the next supervisor: DOUBT, T2, T3 at once
    # S-D            DIED, or C 0; nobody woken   a waiter's poll

E0 to X3 are the holder's steps (``contract.py``).  Words in segments are claims: what is read here is bounded, and decides
about a lock, never alone about a process.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Final

from .. import _bias, _ledger, _machine, _process
from .. import _layout as at
from .._arena import Arena
from .._deadlock import Graph, Place, all_alive, cycles_among, has_edge, same_waits
from .._handover import pass_on, settle
from .._names import name_at
from .._parking import parking_of
from .._readers import keys_of, runs
from .._sys import SYSTEM, crash_points
from ..contract import EXPIRY_SIGNAL
from ..errors import SegmentError, describe_deadlock
from .leases import LEFT, NEVER, Terms, Verdict, Watched, deadline_of

__all__ = ["Client", "Supervised", "Watch"]

log = logging.getLogger("shlock.supervisor")

#: Nanoseconds from the beginning in which a holder may turn up to whom an earlier supervisor gave its contract.
ADOPTION_TIME: Final = 10_000_000_000
#: Exchanges with a word that somebody may be changing all the time.  What is not done then is done at the next look.
MOST_TRIES: Final = 1000

#: Nanoseconds from one look for deadlocks to the next: always, and while a holder waits for another lock.
DEADLOCK_INTERVAL: Final = 1_000_000_000
WHILE_HOLDERS_WAIT: Final = 50_000_000
TOLD: Final = -1

Emit = Callable[..., None]
#: What an adopted contract may be, and its precedence, from user, group, arena, control block, the terms in the ledger, and the
#: rank there.
TermsFor = Callable[[int, int, Arena, int, Terms, int], tuple[Terms, int] | None]


class Client:
    """A process that has contracts: its identity, its pidfd, its ledger."""

    def __init__(self, word: int, pidfd: int, ledger: _ledger.Ledger, user: int) -> None:
        self.word = word
        self.pid = _process.pid_of(word)
        self.pidfd = pidfd
        self.ledger = ledger
        self.user = user
        self.contracts: dict[int, Supervised] = {}  # by slot
        self.sentenced = False

    @property
    def may_be_killed(self) -> bool:
        return self.pid != 1 and self.word != _process.current.word

    def close(self) -> None:
        SYSTEM.close(self.pidfd)
        self.ledger.close()


class Supervised:
    """One contract: whose, for which lock, and what has been seen of it."""

    __slots__ = (
        "added",
        "arena",
        "block",
        "cells",
        "client",
        "granted_at",
        "inherits",
        "may_preempt",
        "may_write",
        "name",
        "place",
        "precedence",
        "raises",
        "rank",
        "readers",
        "rule",
        "slot",
        "start",
        "view",
        "watched",
    )

    def __init__(
        self, client: Client, slot: int, arena: Arena, block: int, terms: Terms, *,
        name: str | None, rank: int, raises: bool, rule: str, precedence: int, adopted_at: int, inherits: bool = False,
    ) -> None:  # fmt: skip
        self.client = client
        self.slot = slot
        self.arena = arena
        self.block = block
        self.name = name
        self.rank = rank
        self.precedence = precedence  # class and rank as one number
        self.raises = raises
        self.rule = rule
        self.inherits = inherits
        self.may_preempt = self.may_write = False  # until the process itself presents the contract to this supervisor
        self.start = arena.layout.block(block)
        self.place = self.start + at.BLOCK_WORD
        self.view = arena.words.view
        self.watched = Watched(terms, adopted_at)
        self.granted_at, self.added = SYSTEM.time_ns(), SYSTEM.monotonic_ns()
        self.cells: list[int] = []  # of an RWLock: where its records are
        if self.view[self.start + at.BLOCK_KIND] & at.KIND == at.RWLOCK:
            with contextlib.suppress(SegmentError):
                self.cells = arena.cells_of(block)
        self.readers: dict[int, Reader] = {}  # of the records in which the process was seen

    def reader(self, place: int) -> Reader:
        """What was seen of one record."""
        found = self.readers.get(place)
        if found is None:
            found = self.readers[place] = Reader(self, place)
        return found

    def holds(self) -> list[Supervised]:
        """Whatever keeps others out now: this contract, if its process has W, and the records in which it reads."""
        word = self.client.word
        reading = [self.reader(place) for place in self.cells if self.view[place] & at.OWNER == word]
        return [hold for hold in (self, *reading) if hold.owns()]

    def is_at_the_door(self) -> bool:
        """Of a writer: it waits for the readers."""
        return bool(self.cells and self.view[self.start + at.BLOCK_GATE] & at.DRAINING)

    @property
    def text(self) -> str:
        return repr(self.name) if self.name is not None else f"block {self.block} of arena {self.arena.identity:016x}"

    def owns(self) -> bool:
        return owner_at(self.arena, self.block) == self.client.word

    def make_ordinary(self) -> int:
        """B: revoke the bias, if there is one; the word then.  It names a slot still if somebody writes it all the time."""
        return make_ordinary(self.arena, self.block)

    def shut(self) -> bool:
        """B: after T1, before T2.  False if a thread is in by the door."""
        kind_word = self.arena.kind_word(self.block)
        return _bias.shut_for(_bias.slots_at(self.arena.words, self.start, kind_word), self.client.word)

    @property
    def deadline(self) -> int:
        return deadline_of(self.began, self.watched.terms.lease)

    @property
    def began(self) -> float:
        """The hold, as its process claims it: of which ``deadline`` tells the end."""
        return self.client.ledger.moments[_ledger.BEGAN + self.slot]

    @property
    def thread(self) -> int:
        """Of its process, which holds the lock or is on its way in; 0 = none, or it does not inherit."""
        return self.client.ledger.view[_ledger.THREAD + self.slot] & (1 << at.PID_BITS) - 1

    @property
    def token(self) -> int:
        return self.view[self.start + at.BLOCK_TOKEN]

    @property
    def count(self) -> int:
        """Another number at each hold."""
        return self.token

    def doubt(self) -> None:
        """After T1: its process shall look at W before it goes in."""
        self.client.ledger.view[_ledger.DOUBT + self.slot] = 1

    is_told = True  # its death inside is told to the next one

    def release(self, w: int, keep: int) -> bool:
        """Pass on what it has, from the word ``w``; whether that was still so."""
        return pass_on(parking_of(self.arena), self.block, w, keep=keep, alive=True)

    def wake(self) -> None:
        """After that."""
        parking = parking_of(self.arena)
        if self.cells:
            parking.unpark_many(keys_of(self.arena, self.block)[0])
        settle(parking, self.block)


class Reader(Supervised):
    """One record of an RWLock, in which a process reads under its contract."""

    __slots__ = ()
    is_told = False

    def __init__(self, contract: Supervised, place: int) -> None:
        super().__init__(
            contract.client, -1, contract.arena, contract.block, contract.watched.terms, name=contract.name, rank=contract.rank,
            raises=contract.raises, rule=contract.rule, precedence=contract.precedence, adopted_at=contract.watched.adopted_at,
            inherits=contract.inherits,
        )  # fmt: skip
        self.place = place

    def is_at_the_door(self) -> bool:
        return False

    def doubt(self) -> None:
        """A reader always looks at C."""

    def make_ordinary(self) -> int:
        """A record is never biased."""
        return self.view[self.place]

    def shut(self) -> bool:
        """Likewise."""
        return True

    def owns(self) -> bool:
        c = self.view[self.place]
        return c & at.OWNER == self.client.word and not c & at.IN_LINE

    @property
    def began(self) -> float:
        """0 also if its process has no slot for this record, which would be its own fault."""
        self._find_slot()
        return super().began if self.slot >= 0 else 0.0

    @property
    def thread(self) -> int:
        self._find_slot()
        return super().thread if self.slot >= 0 else 0

    def _find_slot(self) -> None:
        ledger, arena, slot = self.client.ledger, self.arena.identity, self.slot
        if slot < 0 or (ledger.view[_ledger.RECORD + slot], ledger.view[_ledger.ARENA + slot]) != (self.place, arena):
            self.slot = _ledger.reader_slots_of(ledger, arena).get(self.place, -1)

    @property
    def count(self) -> int:
        return self.client.ledger.view[_ledger.HOLDS + self.slot] if self.slot >= 0 else 0

    def release(self, w: int, keep: int) -> bool:
        return self.arena.words.compare_exchange(self.place, w, 0)

    def wake(self) -> None:
        """As a reader that leaves: L2."""
        parking, gate = parking_of(self.arena), self.start + at.BLOCK_GATE
        line, draining = keys_of(self.arena, self.block)
        if self.view[gate] & at.DRAINING:
            parking.unpark_one(draining)
        for _ in range(MOST_TRIES):
            g = self.view[gate]
            if not g & at.CROWDED:
                break
            if self.arena.words.compare_exchange(gate, g, g & ~at.CROWDED):
                parking.unpark_many(line)
                break


class Places:
    """The contracts for the locks of one arena, found by the words of the locks: only what is held costs time."""

    __slots__ = ("arena", "holders", "last", "records", "step", "strangers", "view", "words")

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.strangers: list[int] = []  # control blocks whose words named nobody with a contract, at the last look
        self.view = arena.words.view
        self.words = arena.layout.block(0) + at.BLOCK_WORD  # W of the first control block
        self.step = arena.layout.block(1) - arena.layout.block(0)
        self.last = 0  # index of the last control block under contract
        self.holders: dict[int, dict[int, Supervised]] = {}  # by index of the control block, and by identity word
        self.records: dict[int, list[tuple[int, int]]] = {}  # of RWLocks: runs of places, by index of the control block

    def add(self, contract: Supervised) -> None:
        self.holders.setdefault(contract.block, {})[contract.client.word] = contract
        self.last = max(self.last, contract.block)
        if contract.cells:
            self.records[contract.block] = list(runs(contract.cells))

    def remove(self, contract: Supervised) -> None:
        holders = self.holders.get(contract.block, {})
        if holders.get(contract.client.word) is contract:
            del holders[contract.client.word]
            if not holders:
                del self.holders[contract.block]
                self.records.pop(contract.block, None)

    def held(self) -> Iterator[Supervised]:
        """The contracts whose locks name their owners now."""
        self.strangers.clear()
        words = self.view[self.words : self.words + self.last * self.step + 1 : self.step].tolist()
        for index in [index for index, word in enumerate(words) if word]:
            holders = self.holders.get(index)
            if holders is not None:
                owner = owner_at(self.arena, index)
                contract = holders.get(owner)
                if contract is not None:
                    yield contract
                elif owner:
                    self.strangers.append(index)

    def reading(self) -> Iterator[Reader]:
        """The records that name somebody with a contract who reads now."""
        for block, parts in self.records.items():
            holders = self.holders[block]
            for first, last in parts:
                for place, c in enumerate(self.view[first:last].tolist(), first):
                    if c and not c & at.IN_LINE and (contract := holders.get(c & at.OWNER)) is not None:
                        yield contract.reader(place)


class Watch:
    """All contracts of one supervisor."""

    def __init__(self, emit: Emit, terms_for: TermsFor, adopt_all: Callable[[Arena], None]) -> None:
        self.clients: dict[int, Client] = {}  # by identity word
        self._begun = SYSTEM.monotonic_ns()
        self._terms_for = terms_for
        self._adopt_all = adopt_all
        self._places: dict[int, Places] = {}  # by identity of the arena
        self._leases: collections.Counter[int] = collections.Counter()  # that were granted
        self._seen: set[Supervised] = set()  # of which the last look saw a hold, or the beginning or the end of one
        self._deadlocks: dict[object, int] = {}  # when each was first seen, or TOLD
        self._emit = emit
        self.due = NEVER  # when to look again, in monotonic nanoseconds
        self._before = 0  # when the last look began

    # -- contracts ----------------------------------------------------------------------------------------------------

    def add(self, contract: Supervised) -> None:
        """Watch one more contract, instead of an earlier one in the same slot."""
        self.remove(contract.client, contract.slot)
        places = self._places.get(contract.arena.identity)
        earlier = None if places is None else places.holders.get(contract.block, {}).get(contract.client.word)
        if earlier is not None:  # one process has one contract for a lock
            self.remove(earlier.client, earlier.slot)
        contract.client.contracts[contract.slot] = contract
        places = self._places.get(contract.arena.identity)
        if places is None:
            places = self._places[contract.arena.identity] = Places(contract.arena)
        places.add(contract)
        self._leases[contract.watched.terms.lease] += 1
        self.due = min(self.due, SYSTEM.monotonic_ns() + min(contract.watched.terms.lease, DEADLOCK_INTERVAL))

    def remove(self, client: Client, slot: int) -> None:
        """Watch a contract no more; nothing if there is none."""
        contract = client.contracts.pop(slot, None)
        if contract is None:
            return
        self._seen.difference_update((contract, *contract.readers.values()))
        places = self._places[contract.arena.identity]
        places.remove(contract)
        if not places.holders:
            del self._places[contract.arena.identity]
        lease = contract.watched.terms.lease
        self._leases[lease] -= 1
        if not self._leases[lease]:
            del self._leases[lease]

    def uses(self, arena: Arena) -> bool:
        """Whether there is a contract for a lock of this arena."""
        return arena.identity in self._places

    def count(self, user: int) -> int:
        return sum(len(client.contracts) for client in self.clients.values() if client.user == user)

    def holder_of(self, contract: Supervised) -> Supervised | None:
        """The contract of who has the lock of this one, or for whom it is reserved; None if nobody with a contract has it."""
        arena, w = contract.arena, contract.view[contract.place]
        if at.is_reservation(w):
            spot = at.reserved_spot(w)
            owner = arena.words.load(arena.layout.spot(at.SPOT_CLAIM, spot)) if 0 <= spot < arena.layout.spots else 0
        else:
            owner = owner_at(arena, contract.block)
        return self._places[arena.identity].holders.get(contract.block, {}).get(owner & at.OWNER)

    def readers_of(self, contract: Supervised) -> list[Supervised]:
        """Who reads now, of those with a contract for the RWLock of this one."""
        contracts = self._places[contract.arena.identity].holders.get(contract.block, {}).values()
        return [hold for one in contracts for hold in one.holds() if not hold.is_told]

    def all(self) -> list[Supervised]:
        return [contract for client in self.clients.values() for contract in client.contracts.values()]

    # -- looking ------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Do what is due, and note when to look again."""
        now = SYSTEM.monotonic_ns()
        due = now + min(self._leases) if self._leases else NEVER
        held = [contract for places in self._places.values() for contract in places.held()]
        holds = [*held, *(reader for places in self._places.values() for reader in places.reading())]
        for places in [places for places in self._places.values() if places.strangers and places.arena.only_name is not None]:
            try:
                self._expel(places)
            except Exception:
                log.exception("looking at %r", places.arena.only_name)
        for contract in self._seen.difference(holds):
            contract.watched.look(0, owns=False, deadline=0, token=0)
        for contract in holds:
            if contract.client.sentenced:
                continue
            try:
                due = min(due, self._look_at(contract))
            except Exception:  # one damaged segment, or no descriptor left, must not keep the others' locks
                log.exception("looking at %s", contract.text)
        self._seen = {contract for contract in holds if contract.watched.is_seen}
        try:
            if self._leases:
                due = min(due, self._look_for_deadlocks(held))
        except Exception:
            log.exception("looking for deadlocks")
        self.due, self._before = due, now

    def _look_at(self, contract: Supervised) -> int:
        """Do what is due with one hold; when to look again."""
        deadline, token = contract.deadline, contract.count
        # The clock after the deadline: L2 counts from when it was seen, and must not count from before it was written.
        before = self._before if self._before > contract.added else 0
        verdict, again = contract.watched.look(
            SYSTEM.monotonic_ns(), owns=True, deadline=deadline, token=token, before=before
        )  # fmt: skip
        if verdict is not Verdict.NOTHING:
            self._act(contract, verdict)
        return again

    def _look_for_deadlocks(self, held: list[Supervised]) -> int:
        """Tell of the deadlocks that these holds are part of, each once; when to look again.

        One that leaves the arenas of our clients' contracts is not seen.
        """
        now = SYSTEM.monotonic_ns()
        suspects = {(one.arena.identity, one.block): one for one in held if has_edge(one.view, one.start)}
        seen, self._deadlocks = self._deadlocks, {}
        if not suspects:
            return now + DEADLOCK_INTERVAL
        graph = Graph(places.arena for places in self._places.values())
        waiting = [place for place in suspects if graph.follow(place) is not None]
        told: set[Place] = set()
        for cycle in cycles_among(waiting, graph.follow):
            waits = same_waits(cycle)
            first = self._deadlocks[waits] = seen.get(waits, now)
            if first != TOLD and now - first >= WHILE_HOLDERS_WAIT and all_alive(cycle):
                self._deadlocks[waits] = TOLD
                contract = next(suspects[edge.lock] for edge in cycle if edge.lock in suspects)
                self._emit("deadlock", contract=contract, reason=describe_deadlock(graph.members(cycle)))
            if self._deadlocks[waits] == TOLD:
                told |= {edge.lock for edge in cycle}
        return now + (DEADLOCK_INTERVAL if told.issuperset(waiting) else WHILE_HOLDERS_WAIT)

    def _expel(self, places: Places) -> None:
        """S11: a word of the machine that names nobody with a contract is forged, unless an earlier supervisor granted one."""
        arena, blocks = places.arena, list(places.strangers)
        if SYSTEM.monotonic_ns() < self._begun + ADOPTION_TIME:
            self._adopt_all(arena)
        for block in blocks:
            if owner_at(arena, block) in (0, *places.holders.get(block, ())):
                continue
            w = make_ordinary(arena, block)
            owner = at.process_in(w)
            if not owner or owner in places.holders.get(block, ()):
                continue
            if pass_on(parking_of(arena), block, w, alive=True):
                settle(parking_of(arena), block)
                self._emit(
                    "taken away", lock=arena.only_name, block=block, pid=_process.pid_of(owner),
                    reason="the lock's word was forged: this process has no contract for it",
                )  # fmt: skip

    def _act(self, contract: Supervised, verdict: Verdict) -> None:
        if verdict is Verdict.TERMINATE:
            reason = contract.watched.reason
            self.terminate(contract, "lease over" if reason == at.LEASE_OVERRUN else at.REASONS[reason])
        elif verdict is Verdict.KILL:
            self._kill_if_still_due(contract, contract.watched.reason)
        elif verdict is Verdict.TAKE_AWAY:
            self.take_away(contract)

    def preempt(self, by: Supervised, *, reads: bool = False) -> None:
        """A thread waits that may throw out who has lower precedence: end the present holds of those.

        reads  it waits to read: readers are not in its way

        All precedences are those that were granted; what stands in shared memory says only who the holders are.  A writer that
        is at the door is none: it lets better ones go first by itself.
        """
        places = self._places.get(by.arena.identity)
        if places is None or not by.may_preempt:
            return
        holds = [
            hold
            for contract in places.holders.get(by.block, {}).values()
            if contract.precedence < by.precedence
            for hold in contract.holds()
            if hold.is_told or (by.may_write and not reads)
        ]
        if not holds:
            return
        self.look()  # so that the holds have been seen
        for hold in holds:
            if not hold.is_at_the_door():
                hold.watched.end(SYSTEM.monotonic_ns(), at.PREEMPTED)
                self.due = 0

    def terminate(self, contract: Supervised, reason: str) -> None:
        """K1: ask the holder to leave."""
        client, began = contract.client, contract.began
        if began <= 0:
            return
        if crash_points:
            crash_points[0]("S-K1 before the terminate call")
        client.ledger.moments[_ledger.TERMINATE + contract.slot] = began
        if contract.raises and client.may_be_killed and not self._has_become_another(contract):
            SYSTEM.send_signal(client.pidfd, EXPIRY_SIGNAL)
        if crash_points:
            crash_points[0]("S-K1 terminate call made")
        self._emit("terminate", contract=contract, token=contract.token, reason=reason)

    def _kill_if_still_due(self, contract: Supervised, reason: int) -> None:
        deadline = contract.watched.deadline
        SYSTEM.membarrier()  # K2: after the clock was read, and before the ledger and W are read again, in this order
        # And the ledger once more: who goes out by its door before X1 may be in again by the time W is read.
        if contract.deadline == deadline and contract.owns() and contract.deadline == deadline:
            self.kill(contract, reason)

    def kill(self, contract: Supervised, reason: int) -> bool:
        """K3, K4: end the holder.  False if it must not or cannot be."""
        client = contract.client
        if self._has_become_another(contract):
            self._emit("spared", contract=contract, token=contract.token, reason="it is another user's program by now")
            self._pass_on(contract)
            return False
        if not client.may_be_killed:
            client.sentenced = True
            self._emit("spared", contract=contract, token=contract.token, reason="it is the supervisor's own process")
            return False
        if crash_points:
            crash_points[0]("S-K3 before the sentence")
        if contract.is_told:
            contract.view[contract.start + at.BLOCK_SENTENCE] = client.word | reason
        if crash_points:
            crash_points[0]("S-K3 sentence written")
        client.sentenced = True
        sent = SYSTEM.send_signal(client.pidfd, signal.SIGKILL)
        if crash_points:
            crash_points[0]("S-K4 killed")
        self._emit("killed", contract=contract, token=contract.token, reason=at.REASONS[reason])
        return sent

    @staticmethod
    def _has_become_another(contract: Supervised) -> bool:
        """Whether the process runs a program of another user since it got its contract, and so is not inside any more.

        Who starts a program with another user's rights in its place could else have it killed.  The segment is not in its
        memory any more.  In the instant before this is so, the user may kill it himself.
        """
        client, name, domain = contract.client, contract.arena.only_name, contract.arena.domain
        if name is None or domain is None or client.user == _machine.ROOT:
            return False
        account = SYSTEM.account_of(client.pid)
        if account is None or client.user in (account.real, account.saved):  # whom he may kill himself
            return False
        return not _machine.has_mapped(client.pid, domain, contract.arena.identity)

    def take_away(self, contract: Supervised) -> None:
        """T: from a process that stalls before it is inside, or after it was."""
        contract.make_ordinary()
        if crash_points:
            crash_points[0]("S-T1 before TAKEN")
        for _ in range(MOST_TRIES):
            w = contract.view[contract.place]
            if contract.is_told and at.names_slot(w):
                return  # it has been released, and biased again
            if not contract.owns() or w & at.TAKEN or contract.arena.words.compare_exchange(contract.place, w, w | at.TAKEN):
                break
        if crash_points:
            crash_points[0]("S-T1 TAKEN")
        self.settle(contract, contract.watched.unchanged)

    def settle(self, contract: Supervised, token: int | None = None) -> None:
        """T2, T3: who gets a lock with TAKEN.  ``token``: what it was all the time in which the process seemed to stall."""
        contract.doubt()
        is_shut = not contract.view[contract.place] & at.REVOKED or contract.shut()
        if crash_points:
            crash_points[0]("S-T1 DOUBT")
        SYSTEM.membarrier()
        # A thread that was in by the door may be out again, and the door open.  If none has been, somebody else has written H.
        if not is_shut and token == contract.token and contract.deadline <= LEFT:
            is_shut = True
        words, place = contract.arena.words, contract.place
        for _ in range(MOST_TRIES):
            w = contract.view[place]
            if w & at.OWNER != contract.client.word or not w & at.TAKEN:
                return  # it has reclaimed or released it, or died and has an heir
            deadline = contract.deadline
            if deadline > LEFT or not is_shut:
                after = w & ~at.TAKEN
            else:
                after = w & at.DIED if deadline != LEFT or self._is_poison(contract) else 0
                if contract.release(w, after):
                    break
                continue
            if words.compare_exchange(place, w, after):
                break
        else:
            return
        if crash_points:
            crash_points[0]("S-T3 settled, nobody woken")
        if not after & at.OWNER:
            contract.wake()
            self._emit("taken away", contract=contract, token=contract.token, reason="stalled at the door")

    @staticmethod
    def _is_poison(contract: Supervised) -> bool:
        kind_word = contract.view[contract.start + at.BLOCK_KIND]
        return (kind_word & at.POLICY) >> at.POLICY_SHIFT == at.POLICIES.index("poison")

    # -- the dead -----------------------------------------------------------------------------------------------------

    def bury(self, client: Client) -> None:
        """D, K6: the pidfd of a client is readable: pass on what it held, and forget it."""
        for contract in client.contracts.values():
            try:
                if contract.owns():
                    self._pass_on(contract)
                for place in contract.cells:
                    if contract.view[place] & at.OWNER == client.word:
                        self._pass_on(contract.reader(place))
            except Exception:  # one damaged segment must not keep the others' locks
                log.exception("passing on %s", contract.text)
        for arena in {id(contract.arena): contract.arena for contract in client.contracts.values()}.values():
            parking_of(arena).reap_all_of(client.word)
        if self.clients.get(client.word) is client:
            del self.clients[client.word]
        self.forget(client)

    def forget(self, client: Client) -> None:
        """Let go of a client and its contracts."""
        for slot in list(client.contracts):
            self.remove(client, slot)
        client.close()

    def _pass_on(self, contract: Supervised) -> None:
        view, start, word = contract.view, contract.start, contract.client.word
        held = False
        if crash_points:
            crash_points[0]("S-D before it is passed on")
        for _ in range(MOST_TRIES):
            w = contract.make_ordinary()
            if w & at.OWNER != word:
                break
            if contract.is_told:
                view[start + at.BLOCK_DEAD] = word
                view[start + at.BLOCK_FOUND] = SYSTEM.time_ns()
            if contract.release(w, at.DIED):
                held = contract.is_told
                break
        if crash_points:
            crash_points[0]("S-D passed on, nobody woken")
        contract.wake()
        if held:
            self._emit("abandoned", contract=contract, token=contract.token, reason=contract.arena.reason(start, word))

    # -- adoption -----------------------------------------------------------------------------------------------------

    def adopt(self, arena: Arena, owner: int) -> Client | None:
        """The client behind an owner word, and its contracts in this arena, from its ledger; None if it is dead or has none."""
        if owner == _process.current.word:
            return self.clients.get(owner)
        client = self.clients.get(owner)
        pid = _process.pid_of(owner)
        account = SYSTEM.account_of(pid)
        if account is None:
            return None
        if client is None:
            pidfd = SYSTEM.pidfd_open(pid)
            if pidfd is None:
                return None
            # S9: a ledger is believed about who has made it only.
            by_user = account.effective if arena.only_name is not None else None
            ledger = _ledger.ledger_of(pid, owner, arena.identity, user=by_user) if _process.is_alive(owner) else None
            if ledger is None:
                SYSTEM.close(pidfd)
                return None
            client = self.clients[owner] = Client(owner, pidfd, ledger, account.effective)
        view, now = client.ledger.view, SYSTEM.monotonic_ns()
        known = {contract.block for contract in client.contracts.values() if contract.arena is arena}
        slots: dict[int, int] = {}  # by control block; the one of which it says that it is inside
        for slot, identity in enumerate(view[_ledger.ARENA : _ledger.ARENA + _ledger.SLOTS].tolist()):
            block = view[_ledger.BLOCK + slot]
            if (
                identity == arena.identity
                and not view[_ledger.RECORD + slot]
                and slot not in client.contracts
                and block not in known
                and (block not in slots or client.ledger.moments[_ledger.BEGAN + slot] > 0)
            ):
                slots[block] = slot
        for slot in slots.values():
            block, lease, grace, rank = (
                view[field + slot] for field in (_ledger.BLOCK, _ledger.LEASE, _ledger.GRACE, _ledger.RANK)
            )
            found = None
            if block < arena.layout.blocks and 0 < lease < NEVER and grace < NEVER:
                found = self._terms_for(account.effective, account.group, arena, block, Terms(lease, grace), rank & 0xFFFFFFFF)
            if found is not None:
                terms, precedence = found
                self.add(
                    Supervised(
                        client, slot, arena, block, terms, name=name_of(arena, block), rank=rank & 0xFFFFFFFF,
                        raises=bool(rank & _ledger.RAISES), rule="adopted", precedence=precedence, adopted_at=now,
                        inherits=bool(rank & _ledger.INHERITS),
                    )
                )  # fmt: skip
        return client


def owner_at(arena: Arena, block: int) -> int:
    """The identity word of who has the lock of a control block, by W or by its door; 0: nobody."""
    start = arena.layout.block(block)
    w = arena.words.view[start + at.BLOCK_WORD]
    if at.names_slot(w):
        w = _bias.ordinary(arena.words.view, start, w)
    return at.process_in(w)


def make_ordinary(arena: Arena, block: int) -> int:
    """V0 to V2, if W is biased, and what it is then."""
    start = arena.layout.block(block)
    for _ in range(MOST_TRIES):
        w = arena.words.view[start + at.BLOCK_WORD]
        if not at.names_slot(w):
            break
        _bias.make_ordinary(_bias.slots_at(arena.words, start, arena.kind_word(block)), w)
    return w


def name_of(arena: Arena, block: int) -> str | None:
    name = name_at(arena, block)
    return None if name is None else name.decode("utf-8", "replace")
