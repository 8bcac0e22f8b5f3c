"""Priority inheritance: who holds what a thread with a better scheduling priority waits for is lifted to it, and put back.

Only among contracts that inherit, on both sides.  Whoever waits says so in the WAITS of its own ledger and rings at the
supervisor's socket; THREAD, in the ledger of the process that W names, says which thread has the lock.  While somebody waits,
whoever has the lock, or is lifted, the supervisor also looks every 10 ms: that is what a lost message costs, a holder that
changes without one, and a waiter whose priority is changed while it waits.

    # a thread                  scheduled as              the supervisor has    entered by           leaves to
    # OWN       not lifted      its own priority          nothing               -                    LIFTED
    # LIFTED    lifted          GIVEN, its best waiter's  a record in LIFTS     a better one waits   LIFTED, OWN
    #
    # A look lifts, lowers and restores until everybody has what the waiters of that moment give it.  So it does not matter in
    # which order a holder releases, waiters come, get in, give up and die, and messages arrive.

    # N1  a thread has the best of its own priority and those of all that wait for it, also through others
    # N2  what is restored is what was there: OWN is written before the first lift, and is never taken from a lifted thread
    # N3  what the program changes itself while it is lifted is its OWN from then on: it is kept, and what is restored
    # N4  only threads of a client's own process are lifted, or count as waiting: /proc/PID/task of the process of its pidfd
    # N5  what an earlier supervisor's record says never raises a thread: a ledger is a claim
    # N6  W and THREAD are two words: who is lifted had the seat before and after W named its process, or it is nobody
    #
    # killed after               record   scheduled as   done by the next supervisor
    # S-I1 before the record     none     OWN            -
    # S-I2 record written        NEXT     OWN            restores, which changes nothing; or lifts
    # S-I3 lifted                NEXT     NEXT           restores OWN, or goes on lifting
    # S-I4 GIVEN written         GIVEN    GIVEN          the same
    # S-I5 changed to another    both     NEXT           the same: GIVEN and NEXT are both ours
    # S-I6 restored              both     OWN            as S-I2

The next supervisor finds the records when a client says hello, which everybody does who has a contract or a record, or when it
adopts a holder that is stuck.  Until there is one, a lifted thread stays lifted, and from then on while contracts are presented
one after the other.  Who dies needs nothing: its record goes with
its ledger.  All of this is a model, too: ``tests/model/inheritance.pml``.

Of an RWLock W's owner is lifted as that of a Lock, for who waits to write and for who waits to read (WAIT_READS).  If that one
is at the door itself, each reader is lifted for it, by THREAD of the slot of its record.

A lift is two system calls, and the program may change one of two things, so the policy with its real-time priority and the nice
value are compared apart.  A program that sets exactly what it was given can't be told from us.

While a thread is lifted, its children are not: SCHED_RESET_ON_FORK is set (with CAP_SYS_NICE, without which it could not be
taken away again).  The kernel starts them as SCHED_OTHER, at nice 0 if the parent had real time or a negative nice value.  Nice
values count only among the threads of one session where the kernel groups them (sched_autogroup_enabled).  The kernel has no
pidfd for priorities, and no compare-exchange: between the look at /proc and the call, a thread could end and its number come
round again, and what its program sets in that moment is lost.

A thread may be lifted by one supervisor only: another one would take what this one has set for its own.  So a process inherits
in one domain.

The supervisor must run before those whom it serves: from the first contract that inherits, its thread has SCHED_FIFO itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeVar

from .. import _layout as at
from .. import _ledger, _machine
from .._sys import SYSTEM, crash_points
from .leases import NEVER
from .watch import Client, Supervised, Watch

__all__ = ["Inheritance", "Priority", "inherited"]

log = logging.getLogger("shlock.supervisor")

INTERVAL: Final = 10_000_000  # nanoseconds between looks while somebody waits or is lifted
#: Nanoseconds in which a client that has said hello to the next supervisor presents its contracts, and who waits for it does.
PRESENTATION: Final = 100_000_000
SUPERVISOR_PRIORITY: Final = 98  # of SCHED_FIFO; 99 is for what keeps the kernel going
CAP_SYS_NICE: Final = 23
DEADLINE: Final = 6  # SCHED_DEADLINE, which the os module does not name
NAMES: Final = {
    os.SCHED_FIFO: "SCHED_FIFO",
    os.SCHED_RR: "SCHED_RR",
    os.SCHED_BATCH: "SCHED_BATCH",
    os.SCHED_IDLE: "SCHED_IDLE",
}
REAL_TIME: Final = (os.SCHED_FIFO, os.SCHED_RR)
ORDINARY: Final = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)

T = TypeVar("T", bound=Hashable)


# -- who gets what: pure ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Priority:
    """How the kernel schedules a thread.

    policy    SCHED_*, with SCHED_RESET_ON_FORK
    realtime  1 to 99 under SCHED_FIFO and SCHED_RR, else 0
    nice      -20 to 19; kept under SCHED_FIFO and SCHED_RR, where it does not count
    """

    policy: int
    realtime: int
    nice: int

    @property
    def kind(self) -> int:
        """The policy without its flag."""
        return self.policy & ~os.SCHED_RESET_ON_FORK

    @property
    def rank(self) -> tuple[int, int]:
        """Who runs first: the larger one."""
        if self.kind == DEADLINE:
            return 3, 0
        if self.kind in REAL_TIME:
            return 2, self.realtime
        return (0, 0) if self.kind == os.SCHED_IDLE else (1, -self.nice)

    @property
    def can_be_lifted(self) -> bool:
        """Whether we could put it back."""
        return self.kind in REAL_TIME or self.kind in ORDINARY

    def lifted_to(self, other: Priority, *, reset_on_fork: bool) -> Priority:
        """This priority, made as good as a better one.  Of SCHED_DEADLINE, which can't be given away, the best below it.

        No nice value gets worse by it, so that N5 does not keep us from restoring what was there: under SCHED_IDLE it does not
        count, and who is lifted from there with a better one than its waiter's is as good as that.
        """
        flag = os.SCHED_RESET_ON_FORK if reset_on_fork else self.policy & os.SCHED_RESET_ON_FORK
        if other.kind in REAL_TIME or other.kind == DEADLINE:
            realtime = 99 if other.kind == DEADLINE else other.realtime
            kind = self.kind if self.kind in REAL_TIME else os.SCHED_RR if other.kind == os.SCHED_RR else os.SCHED_FIFO
            return Priority(kind | flag, realtime, self.nice)
        kind = os.SCHED_OTHER if self.kind == os.SCHED_IDLE else self.kind
        return Priority(kind | flag, 0, min(self.nice, other.nice))

    def to_word(self) -> int:
        return 1 << 63 | self.policy << 16 | self.realtime << 8 | self.nice + 20

    @classmethod
    def from_word(cls, word: int) -> Priority | None:
        """None for what is no priority that a thread can be given."""
        found = cls(word >> 16 & 0x7FFFFFFF, word >> 8 & 0xFF, (word & 0xFF) - 20)
        limits = (1, 99) if found.kind in REAL_TIME else (0, 0)
        is_good = found.can_be_lifted and limits[0] <= found.realtime <= limits[1] and found.nice <= 19
        return found if word >> 63 and is_good else None

    def __str__(self) -> str:
        name = NAMES.get(self.kind)
        if self.kind in REAL_TIME:
            return f"{name} {self.realtime}"
        nice = f"nice {self.nice}"
        return nice if self.kind == os.SCHED_OTHER else f"{name or f'policy {self.kind}'}, {nice}"


def inherited(own: Mapping[T, Priority], waits: Iterable[tuple[T, T]]) -> dict[T, T]:
    """N1: for each thread that is to be lifted, the thread whose priority it gets.

    own    what each thread has by itself; who is not in it is gone, and passes nothing on
    waits  pairs of threads: the first one waits for the second one.  They may form circles, as deadlocks do
    """
    ahead: dict[T, list[T]] = {}
    for waiter, holder in waits:
        if waiter in own and holder in own:
            ahead.setdefault(waiter, []).append(holder)
    source: dict[T, T] = {}
    for waiter in sorted(ahead, key=lambda thread: own[thread].rank, reverse=True):  # the first to reach a thread is the best
        reached = [waiter]
        while reached:
            for holder in ahead.get(reached.pop(), ()):
                if holder not in source and own[holder].rank < own[waiter].rank:
                    source[holder] = waiter
                    reached.append(holder)
    return source


# -- and seeing to it -------------------------------------------------------------------------------------------------------

Thread = tuple[int, int]  # identity word of the client, number of the thread


@dataclass(slots=True)
class Lift:
    """One thread that is lifted: LIFTS has the same."""

    client: Client
    thread: int
    birth: int
    place: int  # of the record, in words of the ledger
    own: Priority
    given: tuple[Priority, ...]  # what we may have set: two while it is being changed
    kept_until: int = 0  # monotonic nanoseconds: till then it stays, though nobody is known to wait

    @property
    def scheduled_as(self) -> Priority:
        return self.given[-1]


class Inheritance:
    """All that one supervisor has lifted."""

    def __init__(self, watch: Watch, emit: Callable[..., None]) -> None:
        self.due = NEVER  # when to look again, in monotonic nanoseconds
        self.lifts: dict[Thread, Lift] = {}
        self._watch = watch
        self._emit = emit
        self._is_privileged = SYSTEM.has_capability(CAP_SYS_NICE)
        self._is_prepared = False
        self._refused: set[Thread] = set()  # whom the kernel did not let us lift, of those that are waited for

    def _prepare(self) -> None:
        """Once, in the thread that looks: be scheduled before those whom it serves, as far as it may."""
        if self._is_prepared:
            return
        self._is_prepared = True
        try:
            SYSTEM.set_scheduling(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, SUPERVISOR_PRIORITY, SYSTEM.scheduling(0)[2])
        except OSError:
            self._is_privileged = False  # a capability that the kernel does not honour: of another user namespace

    def why_not(self, pid: int) -> str | None:
        """Why contracts of a process can't inherit; None if they can.  Called by the thread that looks."""
        self._prepare()
        if self._is_privileged:
            return None
        realtime, nice = SYSTEM.priority_limits(pid, hard=False)
        if realtime > 0 or nice < 19:
            return None
        return (
            f"the supervisor, pid {os.getpid()}, may not raise priorities: it has no CAP_SYS_NICE, and RLIMIT_RTPRIO and "
            f"RLIMIT_NICE of pid {pid} allow nothing"
        )

    def look_soon(self) -> None:
        self.due = 0

    def look(self) -> None:
        """Lift, lower and restore, until everybody has what is due to it."""
        waits, somebody_waits = self._waits()
        if waits:
            self._prepare()
        own: dict[Thread, Priority] = {}
        for thread in {thread for pair in waits for thread in pair} | set(self.lifts):
            found = self._own(thread)
            if found is not None:
                own[thread] = found
        sources = inherited(own, waits)
        for thread, lift in list(self.lifts.items()):
            if thread not in own:
                self._clear(lift)  # the thread has ended
            elif thread not in sources and lift.kept_until <= SYSTEM.monotonic_ns():
                self._restore(thread, lift)
        self._refused.intersection_update(sources)
        for thread, source in sources.items():
            if own[thread].can_be_lifted:
                self._lift(thread, own, source)
        self.due = SYSTEM.monotonic_ns() + INTERVAL if somebody_waits or self.lifts else NEVER

    def adopt(self, client: Client, before: Mapping[Thread, Lift] = MappingProxyType({})) -> None:
        """Take over what an earlier supervisor has lifted in the process of a new client.

        before  of the same process, as far as we knew it: what its ledger does not say any more is restored
        """
        view = client.ledger.view
        for index in range(_ledger.MOST_LIFTS):
            place = _ledger.LIFTS + index * _ledger.LIFT_WORDS
            thread = view[place + _ledger.LIFT_THREAD]
            if not thread:
                continue
            birth = view[place + _ledger.LIFT_BIRTH]
            own, given, following = (
                Priority.from_word(view[place + word]) for word in (_ledger.LIFT_OWN, _ledger.LIFT_GIVEN, _ledger.LIFT_NEXT)
            )
            ours = tuple(priority for priority in (given, following) if priority is not None)
            key = client.word, thread
            if (
                own is None
                or not ours
                or thread >= 1 << at.PID_BITS
                or key in self.lifts
                or self._birth(client, thread) != birth
            ):
                view[place + _ledger.LIFT_THREAD] = 0
                continue
            kept_until = SYSTEM.monotonic_ns() + PRESENTATION
            self.lifts[key] = Lift(client, thread, birth, place, self._believable(client, own, thread), ours, kept_until)
        for key, lift in before.items():
            if key not in self.lifts:
                self.lifts[key] = lift
                self._restore(key, lift)
        self.look_soon()

    def let_go(self, client: Client) -> dict[Thread, Lift]:
        """What is lifted in the process of a client that is to be forgotten, to be left to the one that follows it."""
        return {thread: self.lifts.pop(thread) for thread, lift in list(self.lifts.items()) if lift.client is client}

    def forget(self, client: Client) -> None:
        """Restore what is lifted in the process of a client that is to be forgotten."""
        for thread, lift in [(thread, lift) for thread, lift in self.lifts.items() if lift.client is client]:
            if self._own(thread) is None:
                self._clear(lift)
            else:
                self._restore(thread, lift)
        self.look_soon()

    def restore_all(self) -> None:
        for client in {id(lift.client): lift.client for lift in self.lifts.values()}.values():
            self.forget(client)

    def lift_of(self, contract: Supervised) -> Lift | None:
        """That of the thread which has the seat of a contract, or of a record."""
        return self.lifts.get((contract.client.word, contract.thread))

    # -- what is so ---------------------------------------------------------------------------------------------------

    def _waits(self) -> tuple[list[tuple[Thread, Thread]], bool]:
        """Who waits for whom, as far as contracts that inherit say so; and whether anybody waits, if only for who does not."""
        found = []
        somebody_waits = False
        for client in self._watch.clients.values():
            if not any(contract.inherits for contract in client.contracts.values()):
                continue
            words = client.ledger.view[_ledger.WAITS : _ledger.WAITS + _ledger.MOST_WAITS].tolist()
            for word in filter(None, words):
                contract = client.contracts.get((word >> _ledger.WAIT_SLOT_SHIFT) - 1)
                thread = word & (1 << at.PID_BITS) - 1
                if contract is None or not contract.inherits:
                    continue
                somebody_waits = True
                found += [((client.word, thread), ahead) for ahead in self._ahead_of(contract, thread, word)]
        return found, somebody_waits

    def _ahead_of(self, contract: Supervised, thread: int, word: int) -> list[Thread]:
        """For whom a thread waits, as far as those inherit; ``word``: of WAITS."""
        seated = contract.thread
        if not word & _ledger.WAIT_READS and seated not in (0, thread):  # another thread of its process has the seat
            return [(contract.client.word, seated)]
        holder = self._watch.holder_of(contract)
        if holder is contract and seated == thread:  # a writer that waits for the readers, all of them
            return [
                reader for hold in self._watch.readers_of(contract) if (reader := self._thread_of(hold, hold.owns)) is not None
            ]
        if holder is None:
            return []
        found = self._thread_of(holder, lambda: self._watch.holder_of(contract) is holder)
        return [] if found is None else [found]

    @staticmethod
    def _thread_of(hold: Supervised, holds: Callable[[], bool]) -> Thread | None:
        """N6: which thread has a hold, if that one inherits."""
        thread = hold.thread if hold.inherits else 0
        if not thread or not holds() or hold.thread != thread:
            return None  # it is leaving, or somebody else came: the next look sees to it
        return hold.client.word, thread

    @staticmethod
    def _birth(client: Client, thread: int) -> int | None:
        """N4: start time of a thread of a client's own process; None if it has no such thread."""
        birth = SYSTEM.thread_birth(client.pid, thread)
        return None if SYSTEM.is_readable(client.pidfd) else birth  # in this order: until here the number was the client's

    def _own(self, thread: Thread) -> Priority | None:
        """What a thread has by itself; None if it has ended, or is none of its process."""
        lift = self.lifts.get(thread)
        client = self._watch.clients.get(thread[0]) if lift is None else lift.client
        if client is None:
            return None
        birth = self._birth(client, thread[1])
        if birth is None or (lift is not None and lift.birth != birth):
            return None
        now = self._scheduling(thread[1])
        if now is None or lift is None:
            return now
        ours = lift.given
        if all((now.policy, now.realtime) != (given.policy, given.realtime) for given in ours):  # N3
            lift.own = replace(lift.own, policy=now.policy, realtime=now.realtime)
        if all(now.nice != given.nice for given in ours):
            lift.own = replace(lift.own, nice=now.nice)
        return lift.own

    @staticmethod
    def _scheduling(thread: int) -> Priority | None:
        try:
            return Priority(*SYSTEM.scheduling(thread))
        except OSError:
            return None

    def _believable(self, client: Client, own: Priority, thread: int) -> Priority:
        """N5: what a ledger says of the priority that a thread had before it was lifted, as far as it may be so.

        Not better than what it has now.  Where its user is another one, also not better than what its limits allow: else it
        could make a lift its own.
        """
        now = self._scheduling(thread)
        if now is None:
            return own
        if own.rank > now.rank:
            own = now
        own = replace(own, nice=max(own.nice, now.nice))
        if client.user not in (SYSTEM.geteuid(), _machine.ROOT):
            realtime, nice = SYSTEM.priority_limits(client.pid, hard=True)
            if own.kind in REAL_TIME and own.realtime > realtime:
                own = replace(own, realtime=realtime) if realtime else Priority(os.SCHED_OTHER, 0, own.nice)
            own = replace(own, nice=max(own.nice, min(nice, 0)))
        return own

    # -- changing it --------------------------------------------------------------------------------------------------

    def _lift(self, thread: Thread, own: Mapping[Thread, Priority], source: Thread) -> None:
        lift = self.lifts.get(thread)
        reset = self._is_privileged
        wanted = own[thread].lifted_to(own[source], reset_on_fork=reset)
        if lift is not None and lift.given == (wanted,) and self._scheduling(thread[1]) == wanted:
            return
        is_new = lift is None
        if lift is None:
            lift = self._record(thread, own[thread], wanted)
            if lift is None:
                return
        else:
            self._note(lift, wanted)
        try:
            SYSTEM.set_scheduling(thread[1], wanted.policy, wanted.realtime, wanted.nice)
        except OSError as error:
            self._own(thread)
            self._restore(thread, lift, silently=is_new)
            if thread not in self._refused:
                self._refused.add(thread)
                self._tell("not lifted", thread, f"thread {thread[1]} to {wanted}: {error.strerror}")
            return
        if crash_points and is_new:
            crash_points[0]("S-I3 lifted")
        if crash_points and not is_new:
            crash_points[0]("S-I5 changed to another")
        is_other = is_new or lift.given[0] != wanted
        lift.given = (wanted,)
        view = lift.client.ledger.view
        view[lift.place + _ledger.LIFT_GIVEN] = wanted.to_word()
        view[lift.place + _ledger.LIFT_NEXT] = 0
        if crash_points:
            crash_points[0]("S-I4 GIVEN written")
        if is_other:
            waiter = self._watch.clients[source[0]].pid
            self._tell(
                "lifted", thread, f"thread {thread[1]} from {lift.own} to {wanted}, for thread {source[1]} of pid {waiter}"
            )

    def _record(self, thread: Thread, own: Priority, wanted: Priority) -> Lift | None:
        """N2.  None if there is no room."""
        client = self._watch.clients[thread[0]]
        birth = self._birth(client, thread[1])
        used = {lift.place for lift in self.lifts.values() if lift.client is client}
        places = (_ledger.LIFTS + index * _ledger.LIFT_WORDS for index in range(_ledger.MOST_LIFTS))
        place = next((place for place in places if place not in used), None)
        if birth is None or place is None:
            return None
        if crash_points:
            crash_points[0]("S-I1 before the record")
        view = client.ledger.view
        for word, value in (
            (_ledger.LIFT_BIRTH, birth),
            (_ledger.LIFT_OWN, own.to_word()),
            (_ledger.LIFT_GIVEN, 0),
            (_ledger.LIFT_NEXT, wanted.to_word()),
            (_ledger.LIFT_THREAD, thread[1]),  # last: from here on there is a record
        ):
            view[place + word] = value
        if crash_points:
            crash_points[0]("S-I2 record written")
        lift = self.lifts[thread] = Lift(client, thread[1], birth, place, own, (wanted,))
        return lift

    @staticmethod
    def _note(lift: Lift, wanted: Priority) -> None:
        """Before a lifted thread is given something else: OWN as we know it by now, and NEXT."""
        view = lift.client.ledger.view
        view[lift.place + _ledger.LIFT_OWN] = lift.own.to_word()
        view[lift.place + _ledger.LIFT_NEXT] = wanted.to_word()
        lift.given = (lift.scheduled_as, wanted)

    def _restore(self, thread: Thread, lift: Lift, *, silently: bool = False) -> None:
        own = lift.own
        self._note(lift, own)
        try:
            SYSTEM.set_scheduling(thread[1], own.policy, own.realtime, own.nice)
        except ProcessLookupError:
            silently = True
        except OSError as error:
            self._tell("not restored", thread, f"thread {thread[1]} to {own}: {error.strerror}")
            silently = True
        if crash_points:
            crash_points[0]("S-I6 restored")
        self._clear(lift)
        if not silently:
            self._tell("restored", thread, f"thread {thread[1]} to {own}")

    def _clear(self, lift: Lift) -> None:
        lift.client.ledger.view[lift.place + _ledger.LIFT_THREAD] = 0
        self.lifts.pop((lift.client.word, lift.thread), None)

    def _tell(self, kind: str, thread: Thread, reason: str) -> None:
        client = self._watch.clients.get(thread[0])
        contracts = () if client is None else client.contracts.values()
        holds = (hold for contract in contracts if contract.inherits for hold in (contract, *contract.readers.values()))
        held = next((hold for hold in holds if hold.thread == thread[1]), None)
        if held is not None:
            self._emit(kind, contract=held, reason=reason)
        else:
            self._emit(kind, pid=None if client is None else client.pid, reason=reason)
