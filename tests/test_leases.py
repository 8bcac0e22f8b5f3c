"""When the supervisor asks, kills and takes away, with a clock that the tests turn: the pure half of enforcement.

A state machine lets a holder do what it likes, forgeries included, looks whenever it likes, and compares every verdict with
what the rules L1 to L3 say.  A simulation of several holders then looks at the promised times only, and finds each overrun
at the very nanosecond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shlock._layout import LEASE_OVERRUN, LEASE_REVOKED
from shlock.supervisor.leases import LEFT, NEVER, Terms, Verdict, Watched, deadline_of

LEASE, GRACE = 1000, 300
BEGINNING = 10_000
"""When the contract was granted, or adopted."""

leases = st.integers(1, 2000)
graces = st.one_of(st.just(0), st.integers(0, 2000))


def watched(lease: int = LEASE, grace: int = GRACE) -> Watched:
    return Watched(Terms(lease, grace), BEGINNING)


def inside(contract: Watched, now: int, deadline: int, token: int = 1) -> tuple[Verdict, int]:
    return contract.look(now, owns=True, deadline=deadline, token=token)


def outside(contract: Watched, now: int) -> tuple[Verdict, int]:
    return contract.look(now, owns=False, deadline=0, token=1)


@given(st.floats(), st.integers(1, NEVER - 1))
def test_whatever_a_client_writes_is_a_deadline_or_none(began: float, lease: int) -> None:
    deadline = deadline_of(began, lease)
    assert deadline in (0, LEFT) if began <= 0 else deadline > LEFT or lease == 1
    Watched(Terms(lease, 0), BEGINNING).look(BEGINNING, owns=True, deadline=deadline, token=1)


def test_a_hold_ends_a_lease_after_it_began() -> None:
    assert deadline_of(0.0, LEASE) == 0
    assert deadline_of(-1.0, LEASE) == LEFT
    assert deadline_of(2.5, LEASE) == 2_500_000_000 + LEASE
    assert deadline_of(math.nan, LEASE) == deadline_of(math.inf, LEASE) == NEVER


# -- one hold, step by step -----------------------------------------------------------------------------------------------


def test_a_hold_is_let_alone_then_asked_once_then_killed() -> None:
    contract, deadline = watched(), BEGINNING + 10 + LEASE
    assert inside(contract, BEGINNING + 10, deadline) == (Verdict.NOTHING, deadline)
    assert inside(contract, deadline - 1, deadline) == (Verdict.NOTHING, deadline)
    assert inside(contract, deadline, deadline) == (Verdict.TERMINATE, deadline + GRACE)
    assert inside(contract, deadline + 1, deadline) == (Verdict.NOTHING, deadline + GRACE)
    assert inside(contract, deadline + GRACE - 1, deadline) == (Verdict.NOTHING, deadline + GRACE)
    assert inside(contract, deadline + GRACE, deadline) == (Verdict.KILL, NEVER)


def test_without_grace_the_kill_comes_at_the_deadline() -> None:
    contract, deadline = watched(grace=0), BEGINNING + LEASE
    assert inside(contract, deadline - 1, deadline)[0] is Verdict.NOTHING
    assert inside(contract, deadline, deadline)[0] is Verdict.KILL


def test_a_look_that_comes_late_kills_at_once() -> None:
    contract, deadline = watched(), BEGINNING + LEASE
    inside(contract, BEGINNING, deadline)
    assert inside(contract, deadline + GRACE + 5, deadline)[0] is Verdict.KILL


def test_every_hold_is_asked_anew() -> None:
    contract = watched()
    for number in range(1, 4):
        deadline = BEGINNING + number * 5 * LEASE
        assert inside(contract, deadline - LEASE, deadline)[0] is Verdict.NOTHING
        assert inside(contract, deadline, deadline)[0] is Verdict.TERMINATE
        assert inside(contract, deadline + 1, deadline)[0] is Verdict.NOTHING


def test_nobody_is_asked_or_killed_who_is_outside() -> None:
    contract, deadline = watched(), BEGINNING + LEASE
    inside(contract, BEGINNING, deadline)
    assert contract.is_seen
    assert contract.look(deadline + GRACE, owns=False, deadline=deadline, token=1) == (Verdict.NOTHING, NEVER)
    assert not contract.is_seen


def test_a_deadline_that_is_too_far_away_counts_from_when_it_was_first_seen() -> None:
    contract = watched()
    for now in (BEGINNING, BEGINNING + LEASE - 1):
        assert inside(contract, now, NEVER) == (Verdict.NOTHING, BEGINNING + LEASE)
    assert inside(contract, BEGINNING + LEASE, NEVER)[0] is Verdict.TERMINATE
    assert inside(contract, BEGINNING + LEASE + GRACE, NEVER)[0] is Verdict.KILL


@pytest.mark.parametrize("earlier", [0, 1, LEASE, BEGINNING - 2])
def test_time_without_a_supervisor_does_not_count(earlier: int) -> None:
    contract, deadline = watched(), BEGINNING - earlier
    assert inside(contract, BEGINNING, deadline) == (Verdict.NOTHING, BEGINNING + LEASE)
    assert inside(contract, BEGINNING + LEASE - 1, deadline)[0] is Verdict.NOTHING
    assert inside(contract, BEGINNING + LEASE, deadline)[0] is Verdict.TERMINATE
    assert inside(contract, BEGINNING + LEASE + GRACE, deadline)[0] is Verdict.KILL


def test_a_deadline_ahead_of_the_adoption_stays_what_it_is() -> None:
    contract = watched()
    assert inside(contract, BEGINNING, BEGINNING + 1) == (Verdict.NOTHING, BEGINNING + 1)
    assert inside(contract, BEGINNING + 1, BEGINNING + 1)[0] is Verdict.TERMINATE


@pytest.mark.parametrize("mark", [0, LEFT])
def test_who_stalls_at_the_door_loses_the_lock_after_a_lease(mark: int) -> None:
    contract, since = watched(), BEGINNING + 7
    assert inside(contract, since, mark) == (Verdict.NOTHING, since + LEASE)
    assert contract.is_seen
    assert inside(contract, since + LEASE - 1, mark) == (Verdict.NOTHING, since + LEASE)
    assert inside(contract, since + LEASE, mark) == (Verdict.TAKE_AWAY, NEVER)


@pytest.mark.parametrize(("before", "after"), [((0, 1), (LEFT, 1)), ((LEFT, 1), (0, 1)), ((0, 1), (0, 2))])
def test_another_hold_at_the_door_has_a_lease_of_its_own(before: tuple[int, int], after: tuple[int, int]) -> None:
    contract = watched()
    inside(contract, BEGINNING, *before)
    now = BEGINNING + LEASE
    assert inside(contract, now, *after) == (Verdict.NOTHING, now + LEASE)
    assert inside(contract, now + LEASE, *after)[0] is Verdict.TAKE_AWAY


def test_who_was_inside_or_away_in_between_has_a_lease_of_its_own_at_the_door() -> None:
    for meanwhile in (lambda c, now: inside(c, now, now + LEASE), outside):
        contract = watched()
        inside(contract, BEGINNING, 0)
        meanwhile(contract, BEGINNING + 1)
        assert inside(contract, BEGINNING + LEASE, 0) == (Verdict.NOTHING, BEGINNING + 2 * LEASE)


def test_a_revoked_hold_is_asked_at_once_and_has_its_grace() -> None:
    contract, deadline = watched(), BEGINNING + LEASE
    inside(contract, BEGINNING, deadline)
    contract.end(BEGINNING + 5, LEASE_REVOKED)
    assert contract.reason == LEASE_REVOKED
    assert inside(contract, BEGINNING + 5, deadline) == (Verdict.TERMINATE, BEGINNING + 5 + GRACE)
    assert inside(contract, BEGINNING + 5 + GRACE - 1, deadline)[0] is Verdict.NOTHING
    assert inside(contract, BEGINNING + 5 + GRACE, deadline)[0] is Verdict.KILL
    assert contract.reason == LEASE_REVOKED


def test_a_revocation_is_of_one_hold_and_never_prolongs_it() -> None:
    contract, deadline = watched(), BEGINNING + LEASE
    contract.end(BEGINNING, LEASE_REVOKED)
    assert contract.reason == LEASE_OVERRUN, "there was no hold"
    inside(contract, BEGINNING, deadline)
    assert inside(contract, deadline, deadline)[0] is Verdict.TERMINATE
    contract.end(deadline + 10, LEASE_REVOKED)
    assert contract.reason == LEASE_OVERRUN, "time had ended it already"
    assert inside(contract, deadline + GRACE, deadline)[0] is Verdict.KILL
    later = deadline + 10 * LEASE
    inside(contract, later - 10, later)
    contract.end(later - 10, LEASE_REVOKED)
    inside(contract, later - 9, later + 1)
    assert contract.reason == LEASE_OVERRUN, "that was the hold before"
    assert inside(contract, later, later + 1) == (Verdict.NOTHING, later + 1)


# -- any order of anything ------------------------------------------------------------------------------------------------


@dataclass
class Hold:
    """What the looks saw of one hold: the state machine's own account."""

    deadline: int
    ends: int
    revoked: bool = False
    asked: bool = False


class Enforcement(RuleBasedStateMachine):
    """One contract, a holder that does and claims anything, and looks at any time."""

    @initialize(lease=leases, grace=graces)
    def grant(self, lease: int, grace: int) -> None:
        self.lease, self.grace, self.now = lease, grace, BEGINNING
        self.contract = watched(lease, grace)
        self.owns, self.deadline, self.token = False, 0, 0
        self.hold: Hold | None = None
        self.stalls_since: int | None = None
        self.stalls_with = (0, 0)

    # The world.

    @rule(time=st.one_of(st.integers(0, 50), st.integers(0, 3000)))
    def time_passes(self, time: int) -> None:
        self.now += time

    @precondition(lambda self: self.hold is not None)
    @rule(off=st.integers(-1, 1), with_grace=st.booleans())
    def time_passes_until_it_matters(self, off: int, with_grace: bool) -> None:
        assert self.hold is not None
        self.now = max(self.now, self.hold.ends + off + with_grace * self.grace)

    @precondition(lambda self: self.stalls_since is not None)
    @rule(off=st.integers(-1, 1))
    def time_passes_at_the_door(self, off: int) -> None:
        assert self.stalls_since is not None
        self.now = max(self.now, self.stalls_since + self.lease + off)

    @rule()
    def get_the_lock(self) -> None:
        self.owns, self.deadline = True, 0

    @rule()
    def write_the_deadline(self) -> None:
        self.deadline = self.now + self.lease
        self.token += 1

    @rule(deadline=st.one_of(st.integers(2, 3 * BEGINNING), st.integers(NEVER, (1 << 64) - 1)))
    def forge_a_deadline(self, deadline: int) -> None:
        self.deadline = deadline

    @rule()
    def leave(self) -> None:
        self.deadline = LEFT

    @rule()
    def release(self) -> None:
        self.owns = False

    @rule(token=st.integers(0, 3))
    def forge_a_token(self, token: int) -> None:
        self.token = token

    # The supervisor.

    @rule()
    def revoke(self) -> None:
        self.contract.end(self.now, LEASE_REVOKED)
        if self.hold is not None and self.now < self.hold.ends:
            self.hold.ends, self.hold.revoked, self.hold.asked = self.now, True, False

    @rule()
    def look(self) -> None:
        verdict, again = self.contract.look(self.now, owns=self.owns, deadline=self.deadline, token=self.token)
        event(verdict.name)
        assert (verdict, again) == self.expected()
        assert again > self.now, "it would look for ever"

    def expected(self) -> tuple[Verdict, int]:
        now = self.now
        if not self.owns:
            self.hold = self.stalls_since = None
            return Verdict.NOTHING, NEVER
        if self.deadline <= LEFT:
            self.hold = None
            if self.stalls_since is None or self.stalls_with != (self.deadline, self.token):
                self.stalls_since, self.stalls_with = now, (self.deadline, self.token)
            if now - self.stalls_since >= self.lease:
                return Verdict.TAKE_AWAY, NEVER
            return Verdict.NOTHING, self.stalls_since + self.lease
        self.stalls_since = None
        if self.hold is None or self.hold.deadline != self.deadline:
            if self.deadline <= BEGINNING:  # L3
                self.hold = Hold(self.deadline, BEGINNING + self.lease)
            else:  # L2
                self.hold = Hold(self.deadline, min(self.deadline, now + self.lease))
        if now < self.hold.ends:
            return Verdict.NOTHING, self.hold.ends
        if now >= self.hold.ends + self.grace:
            return Verdict.KILL, NEVER
        verdict = Verdict.NOTHING if self.hold.asked else Verdict.TERMINATE
        self.hold.asked = True
        return verdict, self.hold.ends + self.grace

    @invariant()
    def knows_what_it_saw(self) -> None:
        if hasattr(self, "contract"):
            assert self.contract.is_seen == (self.hold is not None or self.stalls_since is not None)
            assert (self.contract.reason == LEASE_REVOKED) or self.hold is None or not self.hold.revoked


TestEnforcement = Enforcement.TestCase
TestEnforcement.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


# -- looking at the promised times only -----------------------------------------------------------------------------------


@dataclass
class Holder:
    """One process: when it gets its lock, stamps its deadline, leaves (X1) and releases, again and again."""

    contract: Watched
    holds: list[tuple[int, int, int, int]]
    overruns: int = 0

    def at(self, now: int) -> tuple[bool, int, int]:
        """What a look sees: the owner, the deadline, the token."""
        for token, (got, stamped, left, released) in enumerate(self.holds, 1):
            if got <= now < released:
                if now < stamped:
                    return True, 0, token - 1
                return True, stamped + self.contract.terms.lease if now < left else LEFT, token
        return False, 0, len(self.holds)


@st.composite
def holders(draw: st.DrawFn) -> Holder:
    contract = watched(draw(st.integers(20, 200)), draw(st.sampled_from([0, 1, 30, 400])))
    lease, now, holds = contract.terms.lease, BEGINNING, []
    near_lease = st.integers(lease - 2, lease + 2)
    for _ in range(draw(st.integers(1, 6))):
        got = now + draw(st.integers(1, 300))
        stamped = got + draw(st.one_of(st.just(0), st.integers(0, 5)))
        left = stamped + draw(st.one_of(st.integers(1, 2 * lease), near_lease, st.just(5 * lease + contract.terms.grace)))
        now = released = left + draw(st.one_of(st.just(0), st.integers(0, 5), near_lease))
        holds.append((got, stamped, left, released))
    return Holder(contract, holds)


@settings(deadline=None, max_examples=200)
@given(everybody=st.lists(holders(), min_size=1, max_size=4))
def test_looks_at_the_promised_times_find_every_overrun_when_it_happens(everybody: list[Holder]) -> None:
    shortest = min(holder.contract.terms.lease for holder in everybody)
    end = max(hold[-1] for holder in everybody for hold in holder.holds) + 1
    found: dict[tuple[int, int], list[tuple[Verdict, int]]] = {}
    now = BEGINNING
    while now < end:
        due = now + shortest
        for number, holder in enumerate(everybody):
            owns, deadline, token = holder.at(now)
            verdict, again = holder.contract.look(now, owns=owns, deadline=deadline, token=token)
            due = min(due, again)
            if verdict is not Verdict.NOTHING:
                found.setdefault((number, token), []).append((verdict, now))
        assert due > now
        now = due
    for number, holder in enumerate(everybody):
        lease, grace = holder.contract.terms.lease, holder.contract.terms.grace
        for token, (_, stamped, left, released) in enumerate(holder.holds, 1):
            deadline = stamped + lease
            seen = found.pop((number, token), [])
            asked = [time for verdict, time in seen if verdict is Verdict.TERMINATE]
            killed = [time for verdict, time in seen if verdict is Verdict.KILL]
            taken = [time for verdict, time in seen if verdict is Verdict.TAKE_AWAY]
            assert asked == ([deadline] if left > deadline and grace else [])
            assert killed[:1] == ([deadline + grace] if left > deadline + grace else [])
            assert all(time >= left + lease for time in taken)
            if released > left + lease + shortest:
                assert taken, "it stalled at the door, and kept the lock"
                assert taken[0] <= left + lease + shortest
    assert not found
