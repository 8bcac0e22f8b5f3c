"""What a supervisor tells about itself: contracts and events, as values."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

__all__ = ["ContractReport", "SupervisorEvent"]

#: How loudly an event is logged; others at INFO.
LEVELS: Final = {
    "granted": logging.DEBUG,
    "terminate": logging.WARNING,
    "killed": logging.WARNING,
    "spared": logging.WARNING,
    "taken away": logging.WARNING,
    "abandoned": logging.WARNING,
    "deadlock": logging.WARNING,
    "denied": logging.WARNING,
    "refused": logging.WARNING,
    "not lifted": logging.WARNING,
    "not restored": logging.WARNING,
    "policy refused": logging.ERROR,
}


def level_of(event: str) -> int:
    """Of logging, for a kind of event."""
    return LEVELS.get(event, logging.INFO)


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What comes over the wire as a dictionary."""

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Self:
        """From what the supervisor says on the wire.  Unknown keys are of a newer one, and left out."""
        known: dict[str, Any] = {field.name: facts.get(field.name) for field in fields(cls)}
        return cls(**known)

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that json can write."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ContractReport(_Report):
    """One contract, and what its holder did with it at that moment.

    lock, block    the name of the lock (None: it has none), and the index of its control block
    pid, user      whose contract it is
    lease, grace   seconds
    rank           precedence among the waiters of one class, and ``precedence``, which class that is: "user" or "kernel"
    rule           which rule of the policy allowed it; "adopted" until its process has presented it to this supervisor
    holds          whether the process is inside; only then ``token``, ``remaining`` (seconds; negative when the lease is
                   over) and ``site`` (file:line, if the process records that) are not None
    readers        how many threads of the process read, of an RWLock; the above are then those of the first whose lease ends
    inherits       priority inheritance
    lifted         from which scheduling priority to which its holder is lifted just now, or None
    """

    lock: str | None
    block: int
    pid: int
    user: int
    lease: float
    grace: float
    rank: int
    precedence: str
    rule: str
    holds: bool
    token: int | None
    remaining: float | None
    site: str | None
    readers: int = 0
    inherits: bool = False
    lifted: str | None = None


@dataclass(frozen=True, kw_only=True)
class SupervisorEvent(_Report):
    """Something that a supervisor did or noticed.

    number   counts from 1 in each supervisor
    time     seconds since the epoch
    event    "started", "granted", "denied", "terminate", "killed", "spared", "taken away", "abandoned", "deadlock", "adopted",
             "refused", "lifted", "not lifted", "restored", "not restored", "policy loaded", "policy refused", "stopped"
    reason   why, in words; the other fields are None where they don't apply
    """

    number: int
    time: float
    event: str
    lock: str | None = None
    block: int | None = None
    pid: int | None = None
    token: int | None = None
    lease: float | None = None
    reason: str | None = None
    rule: str | None = None

    @property
    def level(self) -> int:
        """Of logging."""
        return level_of(self.event)

    def __str__(self) -> str:
        words = [self.event]
        if self.lock is not None:
            words.append(repr(self.lock))
        elif self.block is not None:
            words.append(f"block {self.block}")
        if self.pid is not None:
            words.append(f"pid {self.pid}")
        if self.token is not None:
            words.append(f"token {self.token}")
        if self.lease is not None:
            words.append(f"lease {self.lease:g} s")
        text = " ".join(words)
        if self.reason:
            text += f": {self.reason}"
        return text + (f" ({self.rule})" if self.rule else "")
