"""``shlock why``: in sentences, who has a primitive, why, until when, and who waits for it.

All but the rule of the policy is read from shared memory, so it answers while the supervisor is hung or gone, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from .cli import _duration, _printable
from .errors import describe_deadlock
from .snapshot import LeaseSnapshot, PrimitiveSnapshot, ReaderSnapshot

__all__ = ["Enforcer", "explain"]


@dataclass(frozen=True)
class Enforcer:
    """What is known of the domain's supervisor.

    pid      None: none is running
    answers  within a moment
    rule     which rule of its policy allowed the holder's contract, if it said so
    lifted   from which scheduling priority to which it has lifted the holder, if it has
    """

    pid: int | None = None
    answers: bool = False
    rule: str | None = None
    lifted: str | None = None


def explain(primitive: PrimitiveSnapshot, domain: str, enforcer: Enforcer, now: float) -> Iterator[str]:
    """The sentences, each a line.  ``now`` is as from time.time()."""
    name = _printable(repr(primitive.name))
    yield f"{name} in domain {_printable(repr(domain))} is a {primitive.kind}: {primitive.state}."
    yield from _who(primitive, now)
    for reader in primitive.readers:
        yield f"{_process(reader.pid, reader.name)} reads it{_reading(reader, primitive.lease)}."
    if primitive.lease is not None:
        is_held = primitive.owner is not None and primitive.owner.alive
        yield from _lease(primitive.lease, enforcer, is_held=is_held)
        if is_held or primitive.readers:
            yield from _enforcement(enforcer)
    waiters = [f"{_process(w.pid, w.name)} for {_duration(w.waiting_for)}" for w in primitive.waiters]
    if len(waiters) > 1:
        yield f"{len(waiters)} threads wait, the longest-waiting first: {', '.join(waiters)}."
    else:
        yield f"{waiters[0].replace(' for ', ' waits for ')}." if waiters else "Nobody waits."
    if primitive.deadlock is not None:
        yield f"Deadlock: {_printable(describe_deadlock(primitive.deadlock))}."
        yield 'It lasts until one of them is killed or gives up waiting: by a timeout, or by on_deadlock="raise".'


def _who(primitive: PrimitiveSnapshot, now: float) -> Iterator[str]:
    owner, dead = primitive.owner, primitive.abandoned
    if owner is not None and not owner.alive:
        yield f"{_process(owner.pid, owner.name)} died holding it. The next one that asks gets it, and is told."
    elif owner is not None:
        who = f"{_process(owner.pid, owner.name)} holds it"
        if primitive.held_for is None:
            yield f"{who}. Since when is not recorded: an acquire that nobody disputes reads no clock."
        elif primitive.held_for_is_lower_bound:
            yield f"{who}, for {_duration(primitive.held_for)} or more: it got in when nobody waited yet, and read no clock."
        else:
            yield f"{who} since {_clock(now - primitive.held_for, now)}, for {_duration(primitive.held_for)}."
    elif primitive.state == "free":
        yield "Nobody holds it."
    if dead is not None:
        ago = _duration(max(0.0, now - dead.found_at))
        found = f"{_process(dead.pid, dead.name)} died holding it ({dead.reason}), found {ago} ago"
        if primitive.state == "poisoned":
            yield (
                f"{found}, and nobody has repaired what it guards: every acquire raises AbandonedError until somebody does, "
                "in 'with lock.repair() as abandoned:'."
            )
        else:
            yield f"Before, {found}; what it guards may be half-written until the heir releases it."


def _lease(lease: LeaseSnapshot, enforcer: Enforcer, *, is_held: bool) -> Iterator[str]:
    terms = f"lease {lease.lease:g} s, grace {lease.grace:g} s"
    if not is_held:
        yield f"It is leased; created with {terms}. {f'The last token is {lease.token}.' if lease.token else 'No token yet.'}"
        return
    if lease.site is not None:
        yield f"It took it at {_printable(lease.site)}."
    rank = "" if lease.rank is None else f", rank {lease.rank}"
    rule = "" if enforcer.rule is None else f", by {_printable(enforcer.rule)}"
    yield f"Its contract: {terms}{rank}{rule}. Token {lease.token}."
    if lease.remaining is None:
        yield "Its ledger does not say that it is inside, or can't be read: who stalls at the door loses it after a lease."
    elif lease.terminate_requested:
        when = "its lease was revoked" if lease.remaining > 0 else f"its lease is over by {_duration(-lease.remaining)}"
        yield f"It has been asked to leave, as {when}; it is killed {_duration(lease.grace)} after that call."
    elif lease.remaining > 0:
        then = f"asked to leave, and killed {_duration(lease.grace)} later" if lease.grace else "killed"
        yield f"Its lease ends in {_duration(lease.remaining)}; if it is inside then, it is {then}."
    else:
        yield f"Its lease is over by {_duration(-lease.remaining)}."
    if enforcer.lifted is not None:
        yield f"It is lifted {_printable(enforcer.lifted)}, because a thread waits that is scheduled so (priority inheritance)."


def _reading(reader: ReaderSnapshot, lease: LeaseSnapshot | None) -> str:
    """Since where, and until when."""
    site = "" if reader.site is None else f" at {_printable(reader.site)}"
    if lease is None:
        return site
    if reader.remaining is None:
        return f"{site}; its ledger does not say that it is inside, or can't be read"
    asked = ", and it has been asked to leave" if reader.terminate_requested else ""
    if reader.remaining > 0:
        return f"{site}; its lease ends in {_duration(reader.remaining)}{asked}"
    return f"{site}; its lease is over by {_duration(-reader.remaining)}{asked}"


def _enforcement(enforcer: Enforcer) -> Iterator[str]:
    if enforcer.pid is None:
        yield "No supervisor runs in this domain: deadlines are not enforced until one does."
    elif not enforcer.answers:
        yield f"The supervisor, pid {enforcer.pid}, does not answer: deadlines are not enforced while it is stuck."


def _process(pid: int, name: str | None) -> str:
    return f"pid {pid} ({_printable(name)})" if name else f"pid {pid}"


def _clock(moment: float, now: float) -> str:
    return time.strftime("%H:%M:%S" if now - moment < 43200 else "%Y-%m-%d %H:%M:%S", time.localtime(moment))
