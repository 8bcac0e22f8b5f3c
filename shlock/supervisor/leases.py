"""What is due for a leased hold, and when to look again.  Pure: time and what was seen are passed in.

    # seen of one contract            verdict
    # not the owner                   NOTHING
    # owner, deadline ahead           NOTHING
    # owner, deadline passed          TERMINATE, once for each hold
    # owner, deadline + grace passed  KILL
    # owner, no deadline              NOTHING; TAKE_AWAY when that has been so, unchanged, for a lease

    # L1  no hold can end between two looks that are at most the shortest lease apart, without the second one seeing it
    # L2  a deadline counts from when it was first seen: no claim in memory gives a holder more than its lease from then on
    # L3  time without a supervisor does not count: a deadline from before the adoption means a whole lease from there on
    # L4  a hold that the look before has not seen began after that look.  One that seems to be older belongs to who was stopped
    #     between reading the clock and getting in: it has a whole lease from when it is seen

Times are monotonic nanoseconds.  A holder writes its deadline after it got the lock and clears it before it releases, so
"owner, no deadline" is a moment of a few instructions; one that lasts is a holder that was stopped there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

__all__ = ["NEVER", "Terms", "Verdict", "Watched", "deadline_of"]

NEVER: Final = 1 << 62
OVERRUN: Final = 1  # the reason of a sentence
LEFT: Final = 1  # instead of a deadline: not inside any more
LATEST: Final = 1e9  # seconds since the machine was started


def deadline_of(began: float, lease: int) -> int:
    """When a hold ends that began at a time in seconds; 0 or LEFT if it is none.  Any garbage is a time."""
    if began <= 0:
        return LEFT if began else 0
    return int(began * 1e9) + lease if began < LATEST else NEVER


class Verdict(enum.Enum):
    """What the supervisor has to do about one contract."""

    NOTHING = enum.auto()
    TERMINATE = enum.auto()
    KILL = enum.auto()
    TAKE_AWAY = enum.auto()


@dataclass(frozen=True, slots=True)
class Terms:
    """Of a contract: lease and grace in nanoseconds."""

    lease: int
    grace: int


class Watched:
    """One contract over time."""

    __slots__ = ("_deadline", "_ends", "_terminated", "_unstamped", "_unstamped_since", "adopted_at", "reason", "terms")

    def __init__(self, terms: Terms, adopted_at: int) -> None:
        self.terms = terms
        self.adopted_at = adopted_at
        self._deadline = 0  # as the holder claims it; 0 = none seen
        self._ends = NEVER  # when that hold really ends
        self._terminated = False
        self.reason = OVERRUN  # why the present hold ends: by time, or by decision
        self._unstamped_since = NEVER
        self._unstamped = (0, -1)  # what the ledger said then

    def look(self, now: int, *, owns: bool, deadline: int, token: int, before: int = 0) -> tuple[Verdict, int]:
        """What is due, and at what time to look again at the latest because of this contract (NEVER if it can wait).

        owns      the lock's word names this process
        deadline  of the process's own ledger: of its present hold, or 0 or LEFT if it says that it is not inside
        token     a number that grows with every hold
        before    when the look before this one began, if it was one at this contract
        """
        if not owns:
            self._deadline, self._unstamped_since = 0, NEVER
            return Verdict.NOTHING, NEVER
        if deadline <= LEFT:
            self._deadline = 0
            if self._unstamped_since == NEVER or (deadline, token) != self._unstamped:
                self._unstamped_since, self._unstamped = now, (deadline, token)
            due = self._unstamped_since + self.terms.lease
            return (Verdict.TAKE_AWAY, NEVER) if now >= due else (Verdict.NOTHING, due)
        self._unstamped_since = NEVER
        if deadline != self._deadline:
            self._deadline, self._terminated, self.reason = deadline, False, OVERRUN
            self._ends = min(deadline, now + self.terms.lease)  # L2
            if deadline < before + self.terms.lease:
                self._ends = now + self.terms.lease  # L4
            if deadline <= self.adopted_at:
                self._ends = self.adopted_at + self.terms.lease  # L3
        if now >= self._ends + self.terms.grace:
            return Verdict.KILL, NEVER
        if now < self._ends:
            return Verdict.NOTHING, self._ends
        if self._terminated:
            return Verdict.NOTHING, self._ends + self.terms.grace
        self._terminated = True
        return Verdict.TERMINATE, self._ends + self.terms.grace

    @property
    def deadline(self) -> int:
        """Of the hold that the last look saw, as its holder claims it; 0 = it saw none."""
        return self._deadline

    @property
    def unchanged(self) -> int:
        """The token, as it has been since the holder seems to stall."""
        return self._unstamped[1]

    @property
    def is_seen(self) -> bool:
        """Whether the last look saw a hold, or the beginning or the end of one."""
        return bool(self._deadline) or self._unstamped_since != NEVER

    def end(self, now: int, reason: int) -> None:
        """End the present hold, if there is one, now: its grace begins.  ``reason`` as in a sentence."""
        if self._deadline and self._ends > now:
            self._ends = now
            self.reason = reason
            self._terminated = False
