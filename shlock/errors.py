"""The exceptions and the warning of shlock.

Every error names the object, the fact, the evidence and the next step; the parts are attributes, and all of them
pickle.  Contention is not an error: a lock that is busy makes ``acquire`` return False.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "Abandoned",
    "AbandonedError",
    "AbandonedWarning",
    "ContractDenied",
    "DeadlockError",
    "DeadlockMember",
    "LeaseExpired",
    "PickleRefused",
    "SegmentError",
    "SupervisorError",
]


@dataclass(frozen=True)
class Abandoned:
    """What is known of an owner that died while it held a lock.

    pid        process number of the dead owner
    name       what it was, as far as it was recorded: process name and program, else None
    found_at   when its death was found, in seconds since the epoch
    reason     why it lost the lock: ``"owner died"``, or what it was killed for by a supervisor (``"lease overrun"``,
               ``"lease revoked"``, ``"killed by command"``)
    """

    pid: int
    name: str | None
    found_at: float
    reason: str = "owner died"

    def __str__(self) -> str:
        who = f"pid {self.pid}" + (f" ({self.name})" if self.name else "")
        return f"owner {who} died holding it, found {max(0.0, time.time() - self.found_at):.1f} s ago ({self.reason})"

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


class AbandonedWarning(RuntimeWarning):
    """The previous owner died while it held the lock: what the lock guards may be half-written."""


class AbandonedError(RuntimeError):
    """The lock is poisoned: an owner died, and nobody has repaired what the lock guards.

    Attributes: ``lock`` (text that names the lock), ``abandoned`` (an :class:`Abandoned`).
    """

    def __init__(self, lock: str, abandoned: Abandoned) -> None:
        super().__init__(lock, abandoned)
        self.lock = lock
        self.abandoned = abandoned

    def __str__(self) -> str:
        return (
            f"{self.lock}: {self.abandoned}; what it guards may be half-written. "
            "Put that in order inside a 'with' of its repair()."
        )


@dataclass(frozen=True)
class DeadlockMember:
    """One thread of a deadlock: it holds ``lock``, and waits for the lock of the next member, the last one for the first's.

    pid, thread_id  its process, and its native thread number
    name            what that process is, as far as it was recorded: process name and program, else None
    lock            the name of the lock, or words for one that has none
    domain          of the name, or None
    """

    pid: int
    thread_id: int
    name: str | None
    lock: str
    domain: str | None

    def __str__(self) -> str:
        who = f"pid {self.pid}" if self.thread_id == self.pid else f"thread {self.thread_id} of pid {self.pid}"
        return f"{who} ({self.name})" if self.name else who

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


#: Members of a deadlock that are described.
MOST_SHOWN = 16


def describe_deadlock(cycle: tuple[DeadlockMember, ...]) -> str:
    """Who holds what and waits for what, in words; of a long cycle only the beginning."""
    with_domain = len({member.domain for member in cycle}) > 1

    def lock(member: DeadlockMember) -> str:
        if member.domain is None:
            return f"a {member.lock}"
        return repr(member.lock) + (f" of domain {member.domain!r}" if with_domain else "")

    if len(cycle) == 1:
        return f"{cycle[0]} holds {lock(cycle[0])} and waits for it"
    parts = [
        f"{member} holds {lock(member)} and waits for {lock(wanted)}"
        for member, wanted in zip(cycle[:MOST_SHOWN], (*cycle[1:], cycle[0]), strict=False)
    ]
    if len(cycle) > MOST_SHOWN:
        parts.append(f"and so on, {len(cycle)} in all")
    return "; ".join(parts)


class DeadlockError(RuntimeError):
    """Waiting would never end: this thread holds a lock for which, directly or through others, the owner of this one waits.

    It was raised because of ``on_deadlock="raise"``, in one of the threads concerned; the others go on when that one has
    released what it holds.  Attributes: ``lock`` (text that names the lock that was waited for), ``cycle`` (a tuple of
    :class:`DeadlockMember`, beginning with this thread).
    """

    def __init__(self, lock: str, cycle: tuple[DeadlockMember, ...]) -> None:
        super().__init__(lock, cycle)
        self.lock = lock
        self.cycle = cycle

    def __str__(self) -> str:
        if len(self.cycle) == 1:
            advice = "Take it once, or use an RLock."
        else:
            advice = "Release what this thread holds and begin again; let everybody take these locks in the same order."
        return f"{self.lock}: deadlock: {describe_deadlock(self.cycle)}. {advice}"


class ContractDenied(PermissionError):
    """The supervisor's policy does not allow what was asked for.

    Attributes: ``lock`` (text that names it), ``reason`` (the fact and the limit), ``rule`` (which rule of the policy says so).
    """

    def __init__(self, lock: str, reason: str, rule: str) -> None:
        super().__init__(lock, reason, rule)
        self.lock = lock
        self.reason = reason
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.lock}: {self.reason} ({self.rule}). Ask for what the policy allows, or have the policy changed."


class PickleRefused(PermissionError):
    """A message of a domain of the machine would have to be unpickled, which is to run a program of whoever sent it.

    queue    the channel or queue, as in "Queue 'jobs'"
    message  its bytes, not unpickled: it is taken
    """

    def __init__(self, queue: str, message: bytes) -> None:
        super().__init__(queue, message)
        self.queue = queue
        self.message = message

    def __str__(self) -> str:
        return (
            f"{self.queue}: the message, of {len(self.message)} bytes, is a pickle that another user may have made; to "
            "unpickle it would let him run anything here. Have bytes sent, or open it with unpickle=True if you trust all who "
            "may open it."
        )


class LeaseExpired(TimeoutError):
    """The holder is asked to leave: its lease is over, or was revoked.  After its grace it is killed.

    Attributes: ``lock`` (text that names it), ``token`` (of the hold that is over), ``late`` (seconds since its deadline).
    """

    def __init__(self, lock: str, token: int, late: float) -> None:
        super().__init__(lock, token, late)
        self.lock = lock
        self.token = token
        self.late = late

    def __str__(self) -> str:
        return f"{self.lock}: the lease of token {self.token} is over by {self.late * 1000:.1f} ms. Release it at once."


class SupervisorError(ConnectionError):
    """There is no supervisor to ask, and none could be started.  Attributes: ``domain``, ``fact``, ``advice``."""

    def __init__(self, domain: str, fact: str, advice: str) -> None:
        super().__init__(domain, fact, advice)
        self.domain = domain
        self.fact = fact
        self.advice = advice

    def __str__(self) -> str:
        return f"supervisor of domain {self.domain!r}: {self.fact}. {self.advice}"


class SegmentError(OSError):
    """A shared memory segment cannot be used: foreign, damaged, full, or of another boot, namespace, user or kind.

    Attributes: ``segment`` (its name), ``fact`` (what is wrong), ``advice`` (what to do).  Nothing was overwritten.
    """

    def __init__(self, segment: str, fact: str, advice: str) -> None:
        super().__init__(segment, fact, advice)
        self.segment = segment
        self.fact = fact
        self.advice = advice

    def __str__(self) -> str:
        return f"segment {self.segment}: {self.fact}. {self.advice}"
