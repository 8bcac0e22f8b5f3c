"""Check the protocol models beside this file with SPIN, exhaustively.

    python tests/model/run.py [--quick | --deep] [--jobs N] [--list] [NAME...]

Every configuration below says what SPIN must find: that a model holds, or that a mutation of it is refuted, and by which
check.  A search that did not visit every state (depth or memory exhausted) counts as a failure, because it shows
nothing.  Needs ``spin`` and a C compiler.  Exit status: 0 as expected, 1 a mismatch, 2 something is missing.

NAME is a configuration or a prefix of one; naming a deep one runs it without ``--deep``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
MEMORY_LIMIT_MB = 3000
Size = Literal["quick", "default", "deep"]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One search: a model, its parameters, and what must come out."""

    name: str
    model: str
    defines: Mapping[str, int | str]
    refuted_by: str | None = None
    """None: every property holds.  Otherwise a part of SPIN's message about the property that is broken."""
    size: Size = "default"
    depth: int = 3_000_000
    """Length of the longest path; the search stack for it takes about 60 bytes a step."""
    progress: bool = False
    """Search for cycles without progress instead of dead ends and broken asserts."""

    @property
    def expected(self) -> str:
        return "holds" if self.refuted_by is None else f"refuted by {self.refuted_by}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What SPIN found, and what that took."""

    found: str
    as_expected: bool
    states: int = 0
    seconds: float = 0.0
    memory_mb: float = 0.0


def holds(
    name: str,
    model: str = "lock",
    /,
    *,
    size: Size = "default",
    depth: int = 3_000_000,
    progress: bool = False,
    **defines: int | str,
) -> Configuration:
    return Configuration(name, model, defines, None, size, depth, progress)


def refuted(
    name: str, by: str, model: str = "lock", /, *, size: Size = "default", depth: int = 3_000_000, **defines: int | str
) -> Configuration:
    return Configuration(name, model, defines, by, size, depth)


DEADLOCK = "invalid end state"

# Unbounded rounds, three threads: one stale token and no sequence numbers keep the search small.  Fewer tokens and
# fewer sequence numbers make the protocol weaker, not stronger: they only take away empty wake-ups and failed exchanges.
SMALL = dict(TOKENS=1, SEQUENCES=1, SCAN_AT_ONCE=1)
TWO_LEAVE = dict(THREADS=2, WITHDRAW=1, TOKENS=1, SEQUENCES=1)
FOREIGN = dict(THREADS=2, FOREIGN=1, TOKENS=1, SEQUENCES=1)
CRASH = dict(THREADS=2, CRASHES=1, POLL=1)
LOST = dict(THREADS=3, CRASHES=1, POLL=2, **SMALL)
ONLY_S1 = dict(CHECK_S4=0, CHECK_S5=0, CHECK_S6=0, CHECK_S7=0)
NEWCOMER = dict(THREADS=4, SPOTS=3, NEWCOMERS=1, CRASHES=1, POLL=1, TOKENS=1, ROUNDS=1, SCAN_AT_ONCE=1)
SMALL_NEWCOMER = dict(THREADS=3, SPOTS=2, NEWCOMERS=1, CRASHES=1, POLL=1, TOKENS=1, ROUNDS=1)
TWO_NEWCOMERS = dict(THREADS=4, SPOTS=2, NEWCOMERS=2, CRASHES=1, POLL=1, TOKENS=1, ROUNDS=1)

# Readers and writers with ranks: a digit for each writer, then for each reader.
RANKED = dict(WRITERS=2, READERS=1, RANKS=121, ROUNDS=1)
RANKED_PAIR = dict(WRITERS=1, READERS=1, RANKS=21)
DEAD_CHOSEN = dict(**RANKED, CRASHES=1, DEATHS=2)
THREE_RANKED = dict(WRITERS=3, READERS=1, RANKS=1231, ROUNDS=1)

HAND_OVER = dict(THREADS=2, HANDOVER=1, TOKENS=1, SEQUENCES=2, SCAN_AT_ONCE=1)

CONFIGURATIONS: tuple[Configuration, ...] = (
    # No deaths, no polling: tokens alone.
    holds("lock-2", THREADS=2, size="quick"),
    holds("lock-2-always-skip", THREADS=2, SKIP=2, size="quick"),
    holds("lock-2-two-locks", THREADS=2, LOCKS=2, TOKENS=1),
    holds("lock-2-leave", **TWO_LEAVE, size="quick"),
    holds("lock-2-store-buffer", THREADS=2, STORE_BUFFER=1, size="quick"),
    holds("lock-2-store-buffer-no-naps", THREADS=2, NAPS=0, STORE_BUFFER=1, size="quick"),
    holds("lock-2-foreign-release", **FOREIGN, size="quick"),
    holds("lock-2-foreign-release-leave", **FOREIGN, WITHDRAW=1),
    holds("lock-3-no-naps", THREADS=3, NAPS=0, **SMALL),
    holds("lock-2-progress", THREADS=2, ROUNDS=2, progress=True),
    holds("lock-3", THREADS=3, TOKENS=1, SEQUENCES=1),
    holds("lock-3-always-skip", THREADS=3, SKIP=2, **SMALL),
    holds("lock-3-never-skip", THREADS=3, SKIP=0, **SMALL),
    holds("lock-3-store-buffer", THREADS=3, STORE_BUFFER=1, **SMALL),
    holds("lock-3-two-locks", THREADS=3, LOCKS=2, **SMALL),
    holds("lock-3-leave", THREADS=3, WITHDRAW=1, ROUNDS=1, **SMALL),
    holds("lock-4", THREADS=4, ROUNDS=1, **SMALL),
    # Deaths; waiters poll.
    holds("lock-2-crash", **CRASH, size="quick"),
    holds("lock-2-crash-leave", **CRASH, WITHDRAW=1),
    holds("lock-2-two-crashes", THREADS=2, CRASHES=2, POLL=1),
    holds("lock-2-crash-two-locks", **CRASH, LOCKS=2, TOKENS=1, SEQUENCES=1),
    holds("lock-2-crash-try", **CRASH, TRIERS=1),
    holds("lock-3-crash", THREADS=3, CRASHES=1, POLL=1, **SMALL),
    holds("lock-3-two-crashes", THREADS=3, CRASHES=2, POLL=1, **SMALL),
    holds("lock-3-crash-store-buffer", THREADS=3, CRASHES=1, POLL=1, STORE_BUFFER=1, ROUNDS=1, **SMALL),
    holds("lock-3-crash-new-claimant", **SMALL_NEWCOMER),
    holds("lock-3-crash-new-claimant-leave", **SMALL_NEWCOMER, WITHDRAW=1),
    holds("lock-4-crash-new-claimant", **NEWCOMER, size="deep"),
    holds("lock-4-crash-two-new-claimants", **TWO_NEWCOMERS),
    # One death costs two wake-ups at most; tokens alone do the rest.
    holds("lock-3-crash-costs-two-polls", **LOST, POLLS=2),
    refuted("lock-3-crash-costs-one-poll", "polls<=1", **LOST, POLLS=1),
    holds("lock-4-leave", THREADS=4, WITHDRAW=1, ROUNDS=1, **SMALL, size="deep", depth=20_000_000),
    holds("lock-4-crash", THREADS=4, CRASHES=1, POLL=1, ROUNDS=1, **SMALL, size="deep"),
    holds("lock-4-two-crashes", THREADS=4, CRASHES=2, POLL=1, ROUNDS=1, **SMALL, size="deep"),
    holds("lock-4-two-locks", THREADS=4, LOCKS=2, ROUNDS=1, **SMALL, size="deep"),
    holds("lock-3-crash-leave", THREADS=3, CRASHES=1, POLL=1, WITHDRAW=1, ROUNDS=1, **SMALL, size="deep"),
    # The one mutation that is harmless: whoever leaves a spot passes on what it may have got by mistake.
    holds("lock-4-notify-blind", THREADS=4, LOCKS=2, SKIP=0, ROUNDS=1, **SMALL, MUTATION="NOTIFY_BLIND", size="deep"),
    # Mutations.
    refuted("no-A5-plain-look", "I1", THREADS=2, NAPS=0, STORE_BUFFER=1, MUTATION="A5_PLAIN_LOOK", size="quick"),
    refuted("no-A5-plain-look-hangs", DEADLOCK, THREADS=2, NAPS=0, STORE_BUFFER=1, CHECK_I1=0, MUTATION="A5_PLAIN_LOOK"),
    refuted("no-nap-unchosen", "I1", THREADS=2, MUTATION="NAP_UNCHOSEN", size="quick"),
    refuted("no-nap-unchosen-hangs", DEADLOCK, THREADS=2, CHECK_I1=0, MUTATION="NAP_UNCHOSEN"),
    refuted("no-nap-takes-bare", "I1", THREADS=3, **SMALL, MUTATION="NAP_TAKES_BARE"),
    refuted("no-A4-plain-store", "I1", THREADS=2, STORE_BUFFER=1, MUTATION="A4_PLAIN_STORE"),
    refuted("no-A5-gives-way-to-nobody", "I1", THREADS=2, MUTATION="GIVES_WAY_TO_NOBODY", size="quick"),
    refuted("no-A5-gives-way-to-nobody-hangs", DEADLOCK, THREADS=2, CHECK_I1=0, MUTATION="GIVES_WAY_TO_NOBODY"),
    refuted("no-A5-gives-way-for-ever", "polls<=8", **LOST, POLLS=8, MUTATION="GIVES_WAY_FOR_EVER"),
    refuted("no-A5-relies-on-nobody", "I1", THREADS=2, MUTATION="A5_RELIES_ON_NOBODY", size="quick"),
    refuted("no-A5-relies-on-any-key", "I1", THREADS=3, LOCKS=2, **SMALL, MUTATION="A5_RELIES_ON_ANY_KEY"),
    refuted("no-take-without-parked", "I1", THREADS=3, **SMALL, MUTATION="TAKE_WITHOUT_PARKED"),
    refuted("no-take-without-parked-hangs", DEADLOCK, THREADS=3, CHECK_I1=0, **SMALL, MUTATION="TAKE_WITHOUT_PARKED"),
    refuted("no-take-with-seen-parked", "I1", THREADS=3, **SMALL, MUTATION="TAKE_WITH_SEEN_PARKED"),
    refuted("no-A8-leaves-others-alone", "I1", THREADS=3, WITHDRAW=1, ROUNDS=1, **SMALL, MUTATION="A8_LEAVES_OTHERS_ALONE"),
    refuted("no-A8-keeps-wakeup", "I1", **TWO_LEAVE, MUTATION="A8_KEEPS_WAKEUP", size="quick"),
    refuted("no-A8-keeps-wakeup-hangs", DEADLOCK, **TWO_LEAVE, CHECK_I1=0, MUTATION="A8_KEEPS_WAKEUP"),
    refuted("no-A8-only-notified", "I1", **TWO_LEAVE, MUTATION="A8_ONLY_NOTIFIED"),
    refuted("no-A8-trusts-word", "duty", **FOREIGN, WITHDRAW=1, MUTATION="A8_TRUSTS_WORD"),
    refuted("no-A8-looks-first", "I4", **TWO_LEAVE, MUTATION="A8_LOOKS_FIRST"),
    refuted("no-unpark-any-key", "I1", THREADS=3, LOCKS=2, **SMALL, MUTATION="UNPARK_ANY_KEY"),
    refuted("no-heir-drops-died", "I3", **CRASH, WITHDRAW=1, MUTATION="HEIR_DROPS_DIED", size="quick"),
    refuted("no-R2-keeps-died", "I3", **CRASH, MUTATION="R2_KEEPS_DIED"),
    refuted("no-R3-skipped", "I1", **TWO_LEAVE, MUTATION="R3_SKIPPED"),
    refuted("no-R3-post-lost", DEADLOCK, **TWO_LEAVE, CHECK_I1=0, MUTATION="R3_POST_LOST"),
    refuted("no-R3-plain-clear", "assertion", THREADS=2, MUTATION="R3_PLAIN_CLEAR"),
    refuted("no-R3-before-R2", "I1", THREADS=2, MUTATION="R3_BEFORE_R2"),
    refuted("no-reap-living", "I5", THREADS=3, CRASHES=1, POLL=1, **SMALL, MUTATION="REAP_LIVING"),
    refuted("no-reap-claim-first", "I5", **NEWCOMER, MUTATION="REAP_CLAIM_FIRST"),
    refuted("no-reap-store", "I5", **NEWCOMER, MUTATION="REAP_STORE"),
    refuted("no-never-reap", "polls<=4", **LOST, POLLS=4, MUTATION="NO_REAP"),
    refuted("no-claim-after-idle", "I5", **TWO_NEWCOMERS, MUTATION="CLAIM_AFTER_IDLE"),
    refuted("no-claim-left-dirty", "I4", **SMALL_NEWCOMER, WITHDRAW=1, MUTATION="CLAIM_LEFT_DIRTY"),
    refuted("no-poll-not-told", "I3", **CRASH, MUTATION="POLL_NOT_TOLD", size="quick"),
    refuted("no-poll-takes-stale", "told", THREADS=3, CRASHES=1, POLL=1, **SMALL, MUTATION="POLL_TAKES_STALE"),
    refuted("no-poll-stays-notified", "polls<=8", **LOST, POLLS=8, MUTATION="POLL_STAYS_NOTIFIED"),
    refuted("no-stay-notified", "", THREADS=2, MUTATION="STAY_NOTIFIED", size="quick"),
    refuted("no-sleep-then-publish", "I1", THREADS=2, MUTATION="SLEEP_THEN_PUBLISH", size="quick"),
    # Handing over.
    holds("handover-2", **HAND_OVER, size="quick"),
    holds("handover-2-leave", **HAND_OVER, WITHDRAW=1),
    holds("handover-2-store-buffer", **HAND_OVER, STORE_BUFFER=1),
    holds("handover-2-two-locks", **HAND_OVER, LOCKS=2),
    holds("handover-2-crash", **HAND_OVER, CRASHES=1, POLL=1, size="quick"),
    holds("handover-2-crash-leave", **HAND_OVER, CRASHES=1, POLL=1, WITHDRAW=1),
    holds("handover-2-two-crashes", **HAND_OVER, CRASHES=2, POLL=1),
    holds("handover-2-crash-try", **HAND_OVER, CRASHES=1, POLL=1, TRIERS=1),
    holds("handover-3", THREADS=3, HANDOVER=1, **SMALL),
    holds("handover-3-leave", THREADS=3, HANDOVER=1, WITHDRAW=1, ROUNDS=1, **SMALL, size="deep"),
    holds("handover-3-crash", THREADS=3, HANDOVER=1, CRASHES=1, POLL=1, ROUNDS=1, **SMALL),
    holds("handover-3-crash-new-claimant", HANDOVER=1, SCAN_AT_ONCE=1, **SMALL_NEWCOMER),
    refuted("no-F3-unchecked", "(7|32)", **HAND_OVER, WITHDRAW=1, MUTATION="F3_UNCHECKED"),
    refuted(
        "no-A8-keeps-reservation",
        "(7|32)",
        THREADS=3,
        HANDOVER=1,
        WITHDRAW=1,
        ROUNDS=1,
        **SMALL,
        MUTATION="A8_KEEPS_RESERVATION",
    ),
    refuted("no-poll-keeps-reservation", DEADLOCK, **HAND_OVER, CRASHES=1, POLL=1, MUTATION="POLL_KEEPS_RESERVATION"),
    refuted("no-poll-trusts-spot", DEADLOCK, **HAND_OVER, CRASHES=1, POLL=1, MUTATION="POLL_TRUSTS_SPOT"),
    refuted("no-F3-not-again", "I1", **HAND_OVER, WITHDRAW=1, MUTATION="F3_NOT_AGAIN"),
    # Precedence.
    holds("precedence-2-leave", **HAND_OVER, PRECEDENCE=1, WITHDRAW=1),
    holds("precedence-2-crash", **HAND_OVER, PRECEDENCE=1, CRASHES=1, POLL=1, size="quick"),
    holds("precedence-2-crash-try", **HAND_OVER, PRECEDENCE=1, CRASHES=1, POLL=1, TRIERS=1, size="quick"),
    holds("precedence-3", THREADS=3, HANDOVER=1, PRECEDENCE=1, **SMALL),
    holds("precedence-3-crash", THREADS=3, HANDOVER=1, PRECEDENCE=1, CRASHES=1, POLL=1, ROUNDS=1, **SMALL),
    holds("precedence-3-leave", THREADS=3, HANDOVER=1, PRECEDENCE=1, WITHDRAW=1, ROUNDS=1, **SMALL),
    refuted(
        "precedence-no-F0-keeps-name",
        "I1",
        THREADS=3,
        HANDOVER=1,
        PRECEDENCE=1,
        WITHDRAW=1,
        ROUNDS=1,
        **SMALL,
        MUTATION="F0_KEEPS_NAME",
    ),
    refuted(
        "precedence-no-takes-any-reservation",
        "granted",
        THREADS=3,
        HANDOVER=1,
        PRECEDENCE=1,
        **SMALL,
        MUTATION="TAKES_ANY_RESERVATION",
    ),
    refuted("precedence-no-F0-keeps-parked", "I1", THREADS=3, HANDOVER=1, PRECEDENCE=1, **SMALL, MUTATION="F0_KEEPS_PARKED"),
    # The biased path.
    holds("bias-2", "bias", ROUNDS=3, SLOTS=2, size="quick"),
    holds("bias-2-crash", "bias", ROUNDS=3, SLOTS=2, CRASHES=1, size="quick"),
    holds("bias-2-weak-crash", "bias", ROUNDS=3, SLOTS=2, CRASHES=1, WEAK=1),
    holds("bias-2-siblings-crash", "bias", ROUNDS=3, SLOTS=2, SIBLINGS=1, CRASHES=1, size="quick"),
    holds("bias-2-siblings-weak-crash", "bias", ROUNDS=3, SLOTS=2, SIBLINGS=1, CRASHES=1, WEAK=1),
    holds("bias-3", "bias", THREADS=3),
    holds("bias-3-crash", "bias", THREADS=3, ROUNDS=1, SLOTS=2, CRASHES=1),
    holds("bias-3-siblings", "bias", THREADS=3, SIBLINGS=1),
    holds("bias-3-siblings-weak-crash", "bias", THREADS=3, ROUNDS=1, SLOTS=2, SIBLINGS=1, CRASHES=1, WEAK=1),
    holds("bias-3-all-siblings", "bias", THREADS=3, ROUNDS=1, SLOTS=2, SIBLINGS=2, CRASHES=1, size="quick"),
    holds("bias-3-two-slots", "bias", THREADS=3, SLOTS=2, size="deep"),
    holds("bias-3-crash-two-rounds", "bias", THREADS=3, CRASHES=1, size="deep"),
    holds("bias-3-weak", "bias", THREADS=3, SLOTS=2, WEAK=1, size="deep"),
    holds("bias-3-siblings-two-slots", "bias", THREADS=3, SLOTS=2, SIBLINGS=1, size="deep"),
    holds("bias-3-siblings-crash", "bias", THREADS=3, SIBLINGS=1, CRASHES=1, size="deep"),
    holds("bias-3-siblings-weak", "bias", THREADS=3, SLOTS=2, SIBLINGS=1, WEAK=1, size="deep"),
    holds("bias-3-all-siblings-two-rounds", "bias", THREADS=3, SLOTS=2, SIBLINGS=2, size="deep"),
    # Harmless: only others have no turn.
    holds("bias-2-keeps-claim", "bias", ROUNDS=3, MUTATION="KEEPS_CLAIM"),
    refuted("bias-no-membarrier", DEADLOCK, "bias", WEAK=1, MUTATION="NO_MEMBARRIER", size="quick"),
    refuted("bias-no-B3-relaxed", "count", "bias", WEAK=1, MUTATION="B3_RELAXED", size="quick"),
    refuted("bias-no-look-first", DEADLOCK, "bias", MUTATION="LOOK_FIRST", size="quick"),
    refuted("bias-no-B4", DEADLOCK, "bias", MUTATION="B4_SKIPPED", size="quick"),
    refuted("bias-no-B5-stores", "within==1", "bias", THREADS=3, SIBLINGS=1, MUTATION="B5_STORES"),
    refuted("bias-no-releases-without-shut", "within==1", "bias", SIBLINGS=1, MUTATION="RELEASES_WITHOUT_SHUT", size="quick"),
    refuted("bias-no-B6-leaves-it", DEADLOCK, "bias", MUTATION="B6_LEAVES_IT", size="quick"),
    refuted("bias-no-two-leavers", "within==1", "bias", THREADS=3, SIBLINGS=1, MUTATION="TWO_LEAVERS"),
    refuted("bias-no-generation", "within==1", "bias", THREADS=3, MUTATION="NO_GENERATION"),
    refuted("bias-no-first-revokes", DEADLOCK, "bias", THREADS=3, ROUNDS=1, CRASHES=1, MUTATION="FIRST_REVOKES", size="quick"),
    refuted("bias-no-shut-not-atomic", "within==1", "bias", MUTATION="SHUT_NOT_ATOMIC", size="quick"),
    refuted("bias-no-shut-looks-inside", DEADLOCK, "bias", MUTATION="SHUT_LOOKS_INSIDE", size="quick"),
    refuted("bias-no-V2-as-held", "who==p", "bias", SIBLINGS=1, MUTATION="V2_AS_HELD", size="quick"),
    refuted("bias-no-dead-is-free", "told", "bias", CRASHES=1, MUTATION="DEAD_IS_FREE", size="quick"),
    refuted("bias-no-slot-shared", "within==1", "bias", MUTATION="SLOT_SHARED", size="quick"),
    refuted("bias-no-H-not-opened", DEADLOCK, "bias", CRASHES=1, MUTATION="H_NOT_OPENED", size="quick"),
    refuted("bias-no-grant-with-door", "within==1", "bias", THREADS=3, SLOTS=2, SIBLINGS=1, MUTATION="GRANT_WITH_DOOR"),
    refuted("bias-no-grant-with-leaver", "within==1", "bias", THREADS=3, SLOTS=2, SIBLINGS=2, MUTATION="GRANT_WITH_LEAVER"),
    refuted("bias-no-grants-at-once", DEADLOCK, "bias", ROUNDS=3, SLOTS=2, SIBLINGS=1, MUTATION="GRANTS_AT_ONCE", size="quick"),
    # Semaphore.
    holds("semaphore-3", "semaphore_event", THREADS=3, PERMITS=1, size="quick"),
    holds("semaphore-3-two-permits", "semaphore_event", THREADS=3, PERMITS=2),
    holds("semaphore-3-skip", "semaphore_event", THREADS=3, PERMITS=2, SKIP=1),
    holds("semaphore-3-leave", "semaphore_event", THREADS=3, PERMITS=2, WITHDRAW=1),
    holds("semaphore-3-crash", "semaphore_event", THREADS=3, PERMITS=2, CRASHES=1, POLL=1),
    holds("semaphore-4-leave", "semaphore_event", THREADS=4, PERMITS=1, ROUNDS=1, WITHDRAW=1, size="deep"),
    holds("semaphore-4-two-permits", "semaphore_event", THREADS=4, PERMITS=2, ROUNDS=1, size="deep"),
    refuted(
        "semaphore-no-A7-keeps-wakeup", "I1", "semaphore_event", THREADS=3, PERMITS=2, MUTATION="A7_KEEPS_WAKEUP", size="quick"
    ),
    refuted("semaphore-no-A7-looks-first", "I1", "semaphore_event", THREADS=3, PERMITS=2, MUTATION="A7_LOOKS_FIRST"),
    refuted("semaphore-no-A8-keeps-wakeup", "I1", "semaphore_event", THREADS=3, WITHDRAW=1, MUTATION="A8_KEEPS_WAKEUP"),
    refuted("semaphore-no-A8-skips-parked", "I1", "semaphore_event", THREADS=3, WITHDRAW=1, MUTATION="A8_SKIPS_PARKED"),
    # Event.
    holds("event-3", "semaphore_event", EVENT=1, THREADS=3, size="quick"),
    holds("event-3-leave", "semaphore_event", EVENT=1, THREADS=3, WITHDRAW=1),
    holds("event-3-crash", "semaphore_event", EVENT=1, THREADS=3, CRASHES=1, POLL=1, ROUNDS=2),
    refuted("event-no-generation", "I1", "semaphore_event", EVENT=1, THREADS=3, MUTATION="NO_GENERATION", size="quick"),
    refuted("event-no-set-stores", "I1", "semaphore_event", EVENT=1, THREADS=3, MUTATION="SET_STORES"),
    refuted("event-no-unpark-only-one", "I1", "semaphore_event", EVENT=1, THREADS=3, MUTATION="UNPARK_ONLY_ONE"),
    refuted(
        "event-no-poll-looks-at-S-only",
        DEADLOCK,
        "semaphore_event",
        EVENT=1,
        THREADS=3,
        CRASHES=1,
        POLL=1,
        ROUNDS=2,
        MUTATION="POLL_LOOKS_AT_S_ONLY",
    ),
    # Condition.
    holds("condition-3", "condition", CONSUMERS=3, ITEMS=2, size="quick"),
    holds("condition-3-leave", "condition", CONSUMERS=3, ITEMS=2, WITHDRAW=2),
    holds("condition-3-crash", "condition", CONSUMERS=3, ITEMS=2, CRASHES=1, POLL=1),
    holds("condition-3-two-crashes", "condition", CONSUMERS=3, ITEMS=2, CRASHES=2, POLL=1),
    holds("condition-3-crash-leave", "condition", CONSUMERS=3, ITEMS=1, CRASHES=1, WITHDRAW=1, POLL=1),
    refuted("condition-no-publish-after-release", DEADLOCK, "condition", MUTATION="PUBLISH_AFTER_RELEASE", size="quick"),
    refuted("condition-no-N6-keeps", DEADLOCK, "condition", WITHDRAW=1, MUTATION="N6_KEEPS"),
    refuted("condition-no-N6-looks-first", DEADLOCK, "condition", WITHDRAW=1, MUTATION="N6_LOOKS_FIRST"),
    refuted("condition-no-idle-before-lock", DEADLOCK, "condition", CRASHES=1, POLL=1, MUTATION="IDLE_BEFORE_LOCK"),
    refuted(
        "condition-no-N6-idle-first",
        DEADLOCK,
        "condition",
        CONSUMERS=2,
        CRASHES=1,
        WITHDRAW=1,
        POLL=1,
        MUTATION="N6_IDLE_FIRST",
    ),
    refuted("condition-no-reap", DEADLOCK, "condition", CRASHES=1, POLL=1, MUTATION="NO_REAP"),
    refuted("condition-no-reap-first", DEADLOCK, "condition", CONSUMERS=3, CRASHES=2, POLL=1, MUTATION="REAP_FIRST"),
    refuted("condition-no-poll-ignores-S", DEADLOCK, "condition", CRASHES=1, WITHDRAW=1, POLL=1, MUTATION="POLL_IGNORES_S"),
    refuted("condition-no-notify-skips", DEADLOCK, "condition", ITEMS=2, MUTATION="NOTIFY_SKIPS"),
    # Leases and the supervisor.
    # A lock that is biased.
    holds("leased-door", "leased_door", ROUNDS=1, size="quick"),
    holds("leased-door-two-rounds", "leased_door", size="deep"),
    holds("leased-door-no-takeover", "leased_door", ROUNDS=1, MUTATION="NO_TAKEOVER"),
    refuted("leased-door-no-E2-after-B1", "last", "leased_door", ROUNDS=1, MUTATION="E2_AFTER_B1", size="quick"),
    refuted("leased-door-no-X1-before-B3", "last", "leased_door", ROUNDS=1, MUTATION="X1_BEFORE_B3", size="quick"),
    refuted("leased-door-no-shut", "within==1", "leased_door", ROUNDS=1, MUTATION="NO_SHUT", size="quick"),
    refuted("leased-door-no-K2-one-look", "left_in_time", "leased_door", ROUNDS=1, MUTATION="K2_ONE_LOOK", size="quick"),
    refuted("leased-door-no-seat-checked", "last", "leased_door", ROUNDS=1, MUTATION="SEAT_NOT_CHECKED", size="quick"),
    refuted("leased-door-no-takeover-inside", "last", "leased_door", ROUNDS=1, MUTATION="TAKES_OVER_INSIDE", size="quick"),
    refuted("leased-door-no-inside-is-taken", "within==1", "leased_door", MUTATION="INSIDE_IS_TAKEN", size="quick"),
    refuted("leased-door-no-T3-look", "within==1", "leased_door", ROUNDS=1, MUTATION="T3_TAKES_ANYHOW", size="quick"),
    # Holds by W.
    holds("enforcement-2", "enforcement", size="quick"),
    holds("enforcement-2-two-rounds", "enforcement", ROUNDS=2, STALLS=0),
    holds("enforcement-2-store-buffer", "enforcement", STORE_BUFFER=1, size="quick"),
    holds("enforcement-2-crash", "enforcement", CRASHES=1, STORE_BUFFER=1),
    holds("enforcement-2-supervisor-dies", "enforcement", SUPERVISOR_DEATHS=1),
    holds("enforcement-2-supervisor-dies-for-good", "enforcement", SUPERVISOR_DEATHS=1, SUCCESSOR=0, CRASHES=1),
    holds("enforcement-2-supervisor-dies-progress", "enforcement", SUPERVISOR_DEATHS=1, progress=True),
    holds("enforcement-2-stall-two-rounds", "enforcement", ROUNDS=2, size="deep"),
    holds("enforcement-2-supervisor-dies-store-buffer", "enforcement", SUPERVISOR_DEATHS=1, STORE_BUFFER=1, size="deep"),
    holds("enforcement-2-two-supervisors-die-crash", "enforcement", SUPERVISOR_DEATHS=2, CRASHES=1, size="deep"),
    holds("enforcement-3-siblings", "enforcement", THREADS=3, SIBLINGS=1, STALLS=0, size="deep"),
    # The first draft: W names the supervisor while it decides.  It needs a living one for good.
    holds("enforcement-2-by-name", "enforcement", BY_NAME=1, size="deep"),
    holds("enforcement-2-by-name-supervisor-dies", "enforcement", BY_NAME=1, SUPERVISOR_DEATHS=1, size="deep"),
    refuted(
        "enforcement-no-by-name-alone", "S3", "enforcement", BY_NAME=1, STALLS=0, SUPERVISOR_DEATHS=1, SUCCESSOR=0, size="quick"
    ),
    refuted("enforcement-no-T0", "S1", "enforcement", BY_NAME=1, SUPERVISOR_DEATHS=1, **ONLY_S1, MUTATION="NO_T0", size="deep"),
    refuted(
        "enforcement-no-poll-takes-supervisors",
        "S1",
        "enforcement",
        BY_NAME=1,
        SUPERVISOR_DEATHS=1,
        **ONLY_S1,
        MUTATION="POLL_TAKES_SUPERVISORS",
        size="deep",
    ),
    refuted("enforcement-no-E3", "S1", "enforcement", CHECK_S6=0, MUTATION="E3_SKIPPED", size="quick"),
    refuted("enforcement-no-E3-ignores-taken", "S1", "enforcement", **ONLY_S1, MUTATION="E3_IGNORES_TAKEN", size="deep"),
    refuted("enforcement-no-E3-yields", "S3", "enforcement", SUPERVISOR_DEATHS=1, SUCCESSOR=0, MUTATION="E3_YIELDS"),
    refuted("enforcement-no-K2-second-look", "S2", "enforcement", STORE_BUFFER=1, MUTATION="K2_NO_SECOND_LOOK", size="quick"),
    refuted("enforcement-no-K2-membarrier", "S2", "enforcement", STORE_BUFFER=1, MUTATION="K2_NO_MEMBARRIER"),
    refuted("enforcement-no-K2-clock-last", "S2", "enforcement", MUTATION="K2_CLOCK_LAST", size="deep"),
    refuted(
        "enforcement-no-T2-membarrier",
        "S1",
        "enforcement",
        STORE_BUFFER=1,
        **ONLY_S1,
        MUTATION="T2_NO_MEMBARRIER",
        size="quick",
    ),
    refuted("enforcement-no-K5", "S6", "enforcement", MUTATION="PASS_ON_EARLY"),
    refuted("enforcement-no-K5-unchecked", "S1", "enforcement", **ONLY_S1, MUTATION="PASS_ON_EARLY", size="deep"),
    refuted("enforcement-no-T1-frees", "S1", "enforcement", MUTATION="T1_FREES"),
    refuted("enforcement-no-T3-never-gives-back", "S1", "enforcement", **ONLY_S1, MUTATION="T3_NEVER_GIVES_BACK", size="deep"),
    refuted("enforcement-no-T3-stores", "S1", "enforcement", **ONLY_S1, MUTATION="T3_STORES", size="deep"),
    refuted("enforcement-no-T3-drops-died", "S5", "enforcement", MUTATION="T3_DROPS_DIED"),
    refuted("enforcement-no-T3-tells", "S5", "enforcement", MUTATION="T3_TELLS", size="deep"),
    refuted("enforcement-no-T-at-once", "S7", "enforcement", MUTATION="T_AT_ONCE", size="deep"),
    refuted("enforcement-no-T-without-token", "S7", "enforcement", ROUNDS=2, MUTATION="T_WITHOUT_TOKEN"),
    refuted("enforcement-no-X1-after-X2", "S2", "enforcement", MUTATION="X1_AFTER_X2"),
    refuted("enforcement-no-X1-writes-0", "S7", "enforcement", ROUNDS=2, MUTATION="X1_WRITES_0", size="deep"),
    refuted(
        "enforcement-no-X1-writes-0-told-twice", "S5", "enforcement", ROUNDS=2, CRASHES=1, CHECK_S7=0, MUTATION="X1_WRITES_0"
    ),
    refuted("enforcement-no-E0", "S7", "enforcement", ROUNDS=2, MUTATION="NO_E0", size="deep"),
    refuted("enforcement-no-X2-any-owner", "S1", "enforcement", ROUNDS=2, **ONLY_S1, MUTATION="X2_ANY_OWNER"),
    refuted("enforcement-no-token-before-E3", "S4", "enforcement", MUTATION="TOKEN_BEFORE_E3"),
    refuted("enforcement-no-seat", "S1", "enforcement", THREADS=3, SIBLINGS=1, STALLS=0, **ONLY_S1, MUTATION="NO_SEAT"),
    refuted("enforcement-no-respite", "S8", "enforcement", SUPERVISOR_DEATHS=1, MUTATION="NO_RESPITE"),
    refuted("enforcement-no-taken-left-alone", "S3", "enforcement", SUPERVISOR_DEATHS=1, MUTATION="TAKEN_LEFT_ALONE"),
    refuted("enforcement-no-doubt", "S1", "enforcement", CHECK_S6=0, MUTATION="DOUBT_NEVER", size="quick"),
    refuted("enforcement-no-doubt-before-T1", "S1", "enforcement", ROUNDS=2, **ONLY_S1, MUTATION="DOUBT_BEFORE_T1"),
    refuted("enforcement-no-doubt-after-T2", "S1", "enforcement", STORE_BUFFER=1, **ONLY_S1, MUTATION="DOUBT_AFTER_T2"),
    refuted("enforcement-no-doubt-adopted", "S1", "enforcement", SUPERVISOR_DEATHS=1, CHECK_S6=0, MUTATION="ADOPTED_AT_T2"),
    # Contents of blocks.
    holds("block-2-copies", "block", COPIES=2, READS=1, size="quick"),
    holds("block-2-copies-two-reads", "block", COPIES=2),
    holds("block-3-copies", "block", COPIES=3, READS=1),
    holds("block-2-copies-two-readers", "block", COPIES=2, READERS=2, READS=1, ROUNDS=1),
    holds("block-3-copies-two-readers", "block", COPIES=3, READERS=2, READS=1, ROUNDS=1),
    holds("block-2-copies-crash", "block", COPIES=2, CRASHES=1, EXCEPTIONS=1, READS=1),
    holds("block-3-copies-two-crashes", "block", COPIES=3, CRASHES=2, READS=1, ROUNDS_2=1),
    holds("block-1-copy-edit-crash", "block", COPIES=1, EDITS=2, CRASHES=1, EXCEPTIONS=1, READS=1, ROUNDS_2=1),
    holds("block-2-copies-edit-crash", "block", COPIES=2, EDITS=1, CRASHES=1, READS=1, ROUNDS=1, size="quick"),
    holds("block-2-copies-edit-crash-three-rounds", "block", COPIES=2, EDITS=1, CRASHES=1, READS=1, ROUNDS_2=1, size="deep"),
    holds("block-2-copies-edit-two-crashes", "block", COPIES=2, EDITS=1, CRASHES=2, READS=1, ROUNDS=1),
    holds("block-2-copies-store-buffer", "block", COPIES=2, EDITS=1, BUFFER=1, CRASHES=1, READS=1, ROUNDS=1),
    holds("block-2-copies-weak-stores", "block", COPIES=2, EDITS=1, BUFFER=2, CRASHES=1, READS=1, ROUNDS=1),
    holds("block-2-copies-lock-lost", "block", COPIES=2, LOSE=1, READS=1),
    holds("block-2-copies-watched", "block", COPIES=2, READERS=0, WATCHERS=1, BUFFER=1, ROUNDS=1, EDITS=1),
    holds("block-2-copies-watched-crash", "block", COPIES=2, READERS=0, WATCHERS=1, BUFFER=1, CRASHES=1, ROUNDS=1),
    # Harmless: the last look sees whatever the first one would.
    holds("block-no-first-look", "block", COPIES=2, EDITS=1, CRASHES=1, READS=1, ROUNDS=1, MUTATION="NO_FIRST_LOOK"),
    refuted("block-no-mark", "committed", "block", COPIES=2, MUTATION="NO_MARK", size="quick"),
    refuted("block-no-mark-3-copies", "committed", "block", COPIES=3, MUTATION="NO_MARK"),
    refuted("block-no-mark-after", "committed", "block", COPIES=2, MUTATION="MARK_AFTER"),
    refuted("block-no-current-first", "dead", "block", COPIES=2, MUTATION="CURRENT_FIRST", size="quick"),
    refuted("block-no-recheck", "committed", "block", COPIES=2, MUTATION="NO_RECHECK", size="quick"),
    refuted("block-no-recheck-3-copies", "committed", "block", COPIES=3, MUTATION="NO_RECHECK"),
    refuted("block-no-spare-current", "dead", "block", COPIES=2, MUTATION="SPARE_CURRENT"),
    refuted("block-no-edit-unmarked", "committed", "block", COPIES=1, EDITS=2, MUTATION="EDIT_UNMARKED"),
    refuted("block-no-edit-unmarked-heir", "found", "block", COPIES=2, EDITS=1, CRASHES=1, READERS=0, MUTATION="EDIT_UNMARKED"),
    refuted("block-no-editor-late", "dead", "block", COPIES=2, EDITS=1, MUTATION="EDITOR_LATE"),
    refuted("block-no-editor-ignored", "dead", "block", COPIES=2, EDITS=1, MUTATION="EDITOR_IGNORED"),
    refuted("block-no-last-look", "dead", "block", COPIES=2, EDITS=1, READS=1, MUTATION="NO_LAST_LOOK"),
    refuted(
        "block-no-last-look-backwards",
        "dead",
        "block",
        COPIES=1,
        EDITS=2,
        CRASHES=1,
        EXCEPTIONS=1,
        READS=1,
        ROUNDS_2=1,
        MUTATION="LAST_LOOK_BACKWARDS",
    ),
    refuted("block-no-bare-mark", "dead", "block", COPIES=1, EDITS=2, READS=1, MUTATION="BARE_MARK"),
    refuted("block-no-seal-first", "assertion", "block", COPIES=2, EDITS=1, CRASHES=1, MUTATION="SEAL_FIRST"),
    refuted("block-no-W3", "number", "block", COPIES=2, LOSE=1, MUTATION="NO_W3", size="quick"),
    refuted("block-no-V3", "seen_by_watcher", "block", COPIES=2, READERS=0, WATCHERS=1, MUTATION="NO_V3", size="quick"),
    refuted(
        "block-no-wake-first", "seen_by_watcher", "block", COPIES=2, READERS=0, WATCHERS=1, BUFFER=1, MUTATION="WAKE_FIRST"
    ),
    refuted("block-no-fences", "assertion", "block", COPIES=2, BUFFER=2, FENCES=0, READS=1),
    refuted("block-no-fences-of-readers", "committed", "block", COPIES=2, LOADS=2, READS=1),
    # Rings of messages: chunks, and what is read at HEAD.
    holds("ring-data", "ring", DATA=1, CONSUMERS=1, size="quick"),
    holds("ring-data-crash", "ring", DATA=1, CONSUMERS=1, CRASHES=1, size="quick"),
    holds("ring-data-two-consumers-crash", "ring", DATA=1, CRASHES=1),
    holds("ring-data-two-producers-crash", "ring", DATA=1, PRODUCERS=2, CONSUMERS=1, CRASHES=1),
    holds("ring-data-two-chunks-two-crashes", "ring", DATA=1, PRODUCERS=2, CHUNKS=2, CRASHES=2),
    holds("ring-data-ahead", "ring", DATA=1, AHEAD=1, CONSUMERS=1, size="quick"),
    holds("ring-data-ahead-two-consumers", "ring", DATA=1, AHEAD=1, size="quick"),
    holds("ring-data-ahead-crash", "ring", DATA=1, AHEAD=1, CONSUMERS=1, CRASHES=1, size="quick"),
    holds("ring-data-ahead-two-consumers-crash", "ring", DATA=1, AHEAD=1, CRASHES=1, size="deep"),
    refuted("ring-no-ahead-unchecked", "copy", "ring", DATA=1, AHEAD=1, MUTATION="AHEAD_UNCHECKED", size="quick"),
    refuted("ring-no-ahead-early", "copy", "ring", DATA=1, AHEAD=1, CONSUMERS=1, MUTATION="AHEAD_EARLY", size="quick"),
    refuted("ring-no-ahead-beyond", "copy", "ring", DATA=1, AHEAD=1, CONSUMERS=1, MUTATION="AHEAD_BEYOND", size="quick"),
    refuted("ring-no-TAIL-first", "bytes", "ring", DATA=1, CONSUMERS=1, MUTATION="TAIL_FIRST", size="quick"),
    refuted("ring-no-HEAD-first", "bytes", "ring", DATA=1, MUTATION="HEAD_FIRST", size="quick"),
    refuted("ring-no-free-before-HEAD", "bytes", "ring", DATA=1, CRASHES=1, MUTATION="FREE_BEFORE_HEAD"),
    refuted("ring-no-free-before-closed", "bytes", "ring", DATA=1, CRASHES=1, MUTATION="FREE_BEFORE_CLOSED"),
    refuted(
        "ring-no-undo", "R", "ring", DATA=1, PRODUCERS=2, CONSUMERS=1, CHUNKS=2, CRASHES=1, MUTATION="NO_UNDO", size="quick"
    ),
    refuted("ring-no-finish", "R", "ring", DATA=1, CHUNKS=2, CRASHES=1, MUTATION="NO_FINISH", size="quick"),
    refuted("ring-no-finish-always", "bytes", "ring", DATA=1, CRASHES=1, MUTATION="FINISH_ALWAYS"),
    refuted("ring-no-finish-unlocked", "bytes", "ring", DATA=1, CRASHES=1, MUTATION="FINISH_UNLOCKED"),
    refuted("ring-no-sweep", "R", "ring", DATA=1, CHUNKS=2, CRASHES=1, MUTATION="NO_SWEEP", size="quick"),
    refuted("ring-no-look-for-stuck", "R", "ring", DATA=1, CHUNKS=2, CRASHES=1, MUTATION="NEVER_STUCK", size="quick"),
    # Who waits at a ring; without deaths nobody polls.
    holds("ring-two-consumers", "ring", size="quick"),
    holds("ring-two-consumers-leave", "ring", WITHDRAW=1),
    holds("ring-two-consumers-leave-poll", "ring", ROOMS=1, WITHDRAW=1, POLLERS=1),
    holds("ring-both-sides", "ring", BOTH=1, CONSUMERS=1, WITHDRAW=1, POLLERS=1, size="quick"),
    holds("ring-both-sides-crash", "ring", BOTH=1, CONSUMERS=1, WITHDRAW=1, CRASHES=1, POLL=1, size="quick"),
    holds("ring-both-sides-two-consumers", "ring", BOTH=1, size="deep"),
    holds("ring-two-consumers-crash", "ring", CRASHES=1, POLL=1),
    holds("ring-two-consumers-crash-leave", "ring", ROOMS=1, CRASHES=1, POLL=1, WITHDRAW=1),
    holds("ring-two-producers-two-consumers", "ring", PRODUCERS=2, ROOMS=1, size="deep"),
    refuted("ring-no-fence", "R", "ring", MUTATION="NO_FENCE", size="quick"),
    refuted("ring-no-look-then-mark", "R", "ring", MUTATION="LOOK_THEN_MARK", size="quick"),
    refuted("ring-no-wake-then-clear", "R", "ring", MUTATION="WAKE_THEN_CLEAR", size="quick"),
    refuted("ring-no-mark-once", "R", "ring", MUTATION="MARK_ONCE", size="quick"),
    refuted("ring-no-in-keeps", "R", "ring", MUTATION="IN_KEEPS", size="quick"),
    refuted("ring-no-in-marks-not", "R", "ring", MUTATION="IN_MARKS_NOT", size="quick"),
    refuted("ring-no-act-keeps", "R", "ring", MUTATION="ACT_KEEPS", size="quick"),
    refuted("ring-no-poller-keeps", "R", "ring", POLLERS=1, MUTATION="POLLER_KEEPS", size="quick"),
    refuted("ring-no-leave-keeps", "R", "ring", WITHDRAW=1, MUTATION="LEAVE_KEEPS", size="quick"),
    refuted("ring-no-leave-marks-not", "R", "ring", WITHDRAW=1, MUTATION="LEAVE_MARKS_NOT"),
    refuted("ring-no-leave-only-notified", "R", "ring", WITHDRAW=1, MUTATION="LEAVE_IF_NOTIFIED"),
    # Many readers or one writer.
    holds("rwlock-one-each", "rwlock", WRITERS=1, READERS=1, size="quick"),
    holds("rwlock-two-readers", "rwlock", WRITERS=1),
    holds("rwlock-two-writers", "rwlock", READERS=1),
    holds("rwlock-two-of-each", "rwlock", ROUNDS=1, size="deep"),
    holds("rwlock-three-readers", "rwlock", WRITERS=1, READERS=3, ROUNDS=1, size="deep"),
    holds("rwlock-two-readers-leave", "rwlock", WRITERS=1, WITHDRAW=3),
    holds("rwlock-two-writers-leave", "rwlock", READERS=1, WITHDRAW=3),
    holds("rwlock-one-each-crash-leave", "rwlock", WRITERS=1, READERS=1, CRASHES=1, WITHDRAW=3, size="quick"),
    holds("rwlock-two-readers-crash", "rwlock", WRITERS=1, CRASHES=1, ROUNDS=1),
    holds("rwlock-two-writers-crash", "rwlock", READERS=1, CRASHES=1, ROUNDS=1),
    holds("rwlock-two-readers-crash-two-rounds", "rwlock", WRITERS=1, CRASHES=1, ROUNDS=2, size="deep"),
    holds("rwlock-two-writers-crash-two-rounds", "rwlock", READERS=1, CRASHES=1, ROUNDS=2, size="deep"),
    holds("rwlock-two-writers-two-crashes", "rwlock", READERS=1, CRASHES=2, ROUNDS=2, size="deep"),
    holds("rwlock-two-of-each-crash", "rwlock", CRASHES=1, ROUNDS=1, size="deep"),
    holds("rwlock-leases", "rwlock", WRITERS=1, READERS=1, LEASES=1, size="quick"),
    holds("rwlock-leases-leave", "rwlock", WRITERS=1, READERS=1, LEASES=1, WITHDRAW=3, size="quick"),
    holds("rwlock-leases-two-readers", "rwlock", WRITERS=1, LEASES=1, ROUNDS=1),
    holds("rwlock-leases-two-writers", "rwlock", READERS=1, LEASES=1, ROUNDS=1),
    holds("rwlock-leases-two-readers-two-rounds", "rwlock", WRITERS=1, LEASES=1, ROUNDS=2, size="deep"),
    refuted(
        "rwlock-leases-no-Q2-believes",
        "writing",
        "rwlock",
        WRITERS=1,
        READERS=1,
        LEASES=1,
        MUTATION="Q2_BELIEVES",
        size="quick",
    ),
    refuted("rwlock-leases-no-E3", "reading", "rwlock", WRITERS=1, READERS=1, LEASES=1, MUTATION="E3_SKIPPED", size="quick"),
    refuted(
        "rwlock-leases-no-T1-frees", "reading", "rwlock", WRITERS=1, READERS=1, LEASES=1, MUTATION="T1_FREES", size="quick"
    ),
    refuted(
        "rwlock-leases-no-T3-look", "reading", "rwlock", WRITERS=1, READERS=1, LEASES=1, MUTATION="T3_NO_LOOK", size="quick"
    ),
    refuted(
        "rwlock-leases-no-T3-wake", DEADLOCK, "rwlock", WRITERS=1, READERS=1, LEASES=1, MUTATION="T3_WAKES_NOBODY", size="quick"
    ),
    refuted(
        "rwlock-leases-no-K-early", "reading", "rwlock", WRITERS=1, READERS=1, LEASES=1, MUTATION="K_CLEARS_EARLY", size="quick"
    ),
    refuted(
        "rwlock-leases-no-D-wake", DEADLOCK, "rwlock", WRITERS=1, READERS=1, LEASES=1, MUTATION="D_WAKES_NOBODY", size="quick"
    ),
    refuted("rwlock-leases-no-T", DEADLOCK, "rwlock", WRITERS=1, READERS=1, LEASES=1, MUTATION="T_NEVER", size="quick"),
    refuted("rwlock-no-Q2", "writing", "rwlock", WRITERS=1, READERS=1, MUTATION="Q2_NO_LOOK", size="quick"),
    refuted("rwlock-no-Q2-wake", DEADLOCK, "rwlock", WRITERS=1, READERS=1, MUTATION="Q2_WAKES_NOBODY", size="quick"),
    refuted("rwlock-no-Q5-looks-again", "passed", "rwlock", READERS=1, MUTATION="Q5_LOOKS_AGAIN", size="quick"),
    refuted("rwlock-no-Q5-parked", DEADLOCK, "rwlock", WRITERS=1, READERS=1, MUTATION="Q5_NO_PARKED", size="quick"),
    refuted("rwlock-no-Q5-looks-first", "writing", "rwlock", WRITERS=1, READERS=1, MUTATION="Q5_LOOKS_FIRST", size="quick"),
    refuted("rwlock-no-Q8-wake", DEADLOCK, "rwlock", READERS=1, WITHDRAW=1, MUTATION="Q8_WAKES_NOBODY", size="quick"),
    refuted("rwlock-no-L2", DEADLOCK, "rwlock", WRITERS=1, READERS=1, MUTATION="L2_WAKES_NOBODY", size="quick"),
    refuted("rwlock-no-W2", "passed", "rwlock", READERS=1, MUTATION="W2_NOBODY", size="quick"),
    refuted("rwlock-no-W2-wake", DEADLOCK, "rwlock", READERS=1, MUTATION="W2_WAKES_NOBODY", size="quick"),
    refuted("rwlock-no-W-scans-first", "writing", "rwlock", WRITERS=1, READERS=1, MUTATION="W_SCANS_FIRST", size="quick"),
    refuted("rwlock-no-W4-late-draining", DEADLOCK, "rwlock", WRITERS=1, READERS=1, MUTATION="W4_LATE_DRAINING", size="quick"),
    refuted("rwlock-no-W5-late", "told", "rwlock", READERS=1, CRASHES=1, MUTATION="W5_LATE"),
    refuted("rwlock-no-suspect", "told", "rwlock", READERS=1, CRASHES=2, ROUNDS=1, MUTATION="NO_SUSPECT"),
    refuted("rwlock-no-W1", "told", "rwlock", READERS=1, CRASHES=1, MUTATION="NO_W1"),
    refuted("rwlock-no-R3-readers", DEADLOCK, "rwlock", WRITERS=1, READERS=1, MUTATION="R3_ONLY_WRITER", size="quick"),
    refuted("rwlock-no-A8-readers", DEADLOCK, "rwlock", WRITERS=1, WITHDRAW=2, MUTATION="A8_ONLY_WRITER", size="quick"),
    refuted("rwlock-no-reap", DEADLOCK, "rwlock", WRITERS=1, READERS=1, CRASHES=1, MUTATION="NO_REAP", size="quick"),
    refuted("rwlock-no-QD", DEADLOCK, "rwlock", WRITERS=1, READERS=1, CRASHES=1, MUTATION="NO_QD", size="quick"),
    # Readers and writers with precedence.
    holds("ranked-pair", "rwlock_precedence", **RANKED_PAIR, size="quick"),
    holds("ranked-better-reader", "rwlock_precedence", WRITERS=1, READERS=1, RANKS=12, size="quick"),
    holds("ranked-pair-crash-leave", "rwlock_precedence", **RANKED_PAIR, CRASHES=1, WITHDRAW=7, size="quick"),
    holds(
        "ranked-better-reader-crash-leave",
        "rwlock_precedence",
        WRITERS=1,
        READERS=1,
        RANKS=12,
        CRASHES=1,
        WITHDRAW=7,
        size="quick",
    ),
    holds("ranked-two-readers", "rwlock_precedence", WRITERS=1, READERS=2, RANKS=213, ROUNDS=1, size="quick"),
    holds("ranked-two-readers-leave", "rwlock_precedence", WRITERS=1, READERS=2, RANKS=213, ROUNDS=1, WITHDRAW=7, size="deep"),
    holds("ranked-two-readers-any-rounds", "rwlock_precedence", WRITERS=1, READERS=2, RANKS=213, size="deep"),
    holds("ranked-two-writers-equal-reader", "rwlock_precedence", WRITERS=2, READERS=1, RANKS=122, ROUNDS=1, size="deep"),
    holds("ranked-two-writers-any-rounds", "rwlock_precedence", WRITERS=2, READERS=1, RANKS=121, size="deep"),
    holds("ranked-two-writers-leave", "rwlock_precedence", **RANKED, WITHDRAW=2, SEQUENCES=2),
    holds(
        "ranked-two-writers-all-leave", "rwlock_precedence", WRITERS=2, READERS=1, RANKS=122, ROUNDS=1, WITHDRAW=7, size="deep"
    ),
    holds("ranked-two-writers-chosen-dies", "rwlock_precedence", **DEAD_CHOSEN),
    holds("ranked-two-writers-crash", "rwlock_precedence", **RANKED, CRASHES=1, size="deep"),
    holds(
        "ranked-two-writers-equal-reader-crash",
        "rwlock_precedence",
        WRITERS=2,
        READERS=1,
        RANKS=122,
        ROUNDS=1,
        CRASHES=1,
        size="deep",
    ),
    holds("ranked-two-writers-stop", "rwlock_precedence", **RANKED, STOPS=1),
    # Harmless: who settles in the end wakes the line.
    holds(
        "ranked-line-not-woken-if-reserved",
        "rwlock_precedence",
        **RANKED,
        WITHDRAW=2,
        MUTATION="R3_NO_LINE_IF_RESERVED",
        size="deep",
    ),
    refuted(
        "ranked-no-takes-any-reservation",
        "overtaken",
        "rwlock_precedence",
        **RANKED,
        MUTATION="TAKES_ANY_RESERVATION",
        size="quick",
    ),
    refuted(
        "ranked-no-R2-leaves-free",
        "overtaken",
        "rwlock_precedence",
        WRITERS=2,
        READERS=1,
        RANKS=121,
        MUTATION="R2_LEAVES_FREE",
        size="quick",
    ),
    refuted("ranked-no-F0-keeps-parked", "overtaken", "rwlock_precedence", **RANKED, MUTATION="F0_KEEPS_PARKED", size="quick"),
    refuted(
        "ranked-no-F1-anybody",
        "overtaken",
        "rwlock_precedence",
        WRITERS=3,
        READERS=1,
        RANKS=3211,
        ROUNDS=1,
        MUTATION="F1_ANYBODY",
        size="quick",
    ),
    refuted("ranked-no-F3", DEADLOCK, "rwlock_precedence", **RANKED, MUTATION="F3_SKIPPED", size="quick"),
    refuted(
        "ranked-no-A8-keeps-reservation",
        DEADLOCK,
        "rwlock_precedence",
        **RANKED,
        WITHDRAW=2,
        MUTATION="A8_KEEPS_RESERVATION",
        size="quick",
    ),
    refuted(
        "ranked-no-poll-keeps-reservation",
        DEADLOCK,
        "rwlock_precedence",
        **DEAD_CHOSEN,
        MUTATION="POLL_KEEPS_RESERVATION",
        size="quick",
    ),
    refuted(
        "ranked-no-QD-keeps-reservation",
        DEADLOCK,
        "rwlock_precedence",
        **DEAD_CHOSEN,
        MUTATION="QD_KEEPS_RESERVATION",
        size="quick",
    ),
    refuted(
        "ranked-no-poll-trusts-spot", DEADLOCK, "rwlock_precedence", **DEAD_CHOSEN, MUTATION="POLL_TRUSTS_SPOT", size="quick"
    ),
    refuted("ranked-no-poll-tells", "told", "rwlock_precedence", **DEAD_CHOSEN, MUTATION="POLL_TELLS", size="quick"),
    refuted(
        "ranked-no-poll-keeps-stopped",
        DEADLOCK,
        "rwlock_precedence",
        **RANKED,
        STOPS=1,
        MUTATION="POLL_KEEPS_STOPPED",
        size="quick",
    ),
    refuted("ranked-no-W2-everybody", "worse", "rwlock_precedence", **RANKED_PAIR, MUTATION="W2_EVERYBODY", size="quick"),
    refuted(
        "ranked-no-W2-only-better",
        "passed",
        "rwlock_precedence",
        WRITERS=2,
        READERS=1,
        RANKS=111,
        ROUNDS=1,
        MUTATION="W2_ONLY_BETTER",
        size="quick",
    ),
    refuted(
        "ranked-no-Q3-before-Q4",
        "passed",
        "rwlock_precedence",
        WRITERS=1,
        READERS=1,
        RANKS=12,
        MUTATION="Q3_BEFORE_Q4",
        size="quick",
    ),
    refuted(
        "ranked-no-W4-gives-way-again",
        "ways",
        "rwlock_precedence",
        **RANKED,
        STOPS=1,
        MUTATION="W4_GIVES_WAY_AGAIN",
        size="quick",
    ),
    refuted("ranked-no-W2-mark", "writing", "rwlock_precedence", **RANKED_PAIR, MUTATION="W2_LEAVES_NO_MARK", size="quick"),
    refuted(
        "ranked-no-Q5-looks-again",
        "passed",
        "rwlock_precedence",
        WRITERS=2,
        READERS=1,
        RANKS=112,
        ROUNDS=1,
        MUTATION="Q5_LOOKS_AGAIN",
        size="quick",
    ),
    refuted("ranked-no-Q5-parked", DEADLOCK, "rwlock_precedence", **RANKED_PAIR, MUTATION="Q5_NO_PARKED", size="quick"),
    refuted("ranked-no-R3-line", DEADLOCK, "rwlock_precedence", **RANKED_PAIR, MUTATION="R3_NO_LINE", size="quick"),
    refuted(
        "ranked-no-settle-line", DEADLOCK, "rwlock_precedence", **RANKED, WITHDRAW=2, MUTATION="SETTLE_NO_LINE", size="quick"
    ),
    refuted(
        "ranked-no-poll-takes-late",
        "overtaken",
        "rwlock_precedence",
        **THREE_RANKED,
        CRASHES=1,
        DEATHS=1,
        MUTATION="POLL_TAKES_LATE",
        size="quick",
    ),
    refuted(
        "ranked-no-A3-takes",
        "overtaken",
        "rwlock_precedence",
        **THREE_RANKED,
        CRASHES=1,
        DEATHS=1,
        MUTATION="A3_TAKES",
        size="quick",
    ),
    # Priority inheritance.
    holds("inheritance", "inheritance", size="quick"),
    holds("inheritance-leave", "inheritance", WITHDRAW=1, ROUNDS=2),
    holds("inheritance-losses", "inheritance", LOSSES=2),
    holds("inheritance-two-waiters", "inheritance", WAITERS=2),
    holds("inheritance-chain", "inheritance", CHAIN=1),
    holds("inheritance-chain-crash", "inheritance", CHAIN=1, CRASHES=1, size="deep"),
    holds("inheritance-crash", "inheritance", CRASHES=1, WITHDRAW=1),
    holds("inheritance-siblings", "inheritance", SIBLINGS=1),
    holds("inheritance-supervisor-dies", "inheritance", SUPERVISOR_DEATHS=1, size="quick"),
    holds("inheritance-supervisor-dies-drops", "inheritance", SUPERVISOR_DEATHS=1, DROPS=1, WITHDRAW=1),
    holds("inheritance-two-waiters-supervisor-dies", "inheritance", WAITERS=2, SUPERVISOR_DEATHS=1, size="deep"),
    holds("inheritance-supervisor-dies-crash", "inheritance", SUPERVISOR_DEATHS=1, CRASHES=1, size="deep"),
    holds("inheritance-chain-supervisor-dies", "inheritance", CHAIN=1, SUPERVISOR_DEATHS=1, size="deep"),
    holds("inheritance-user-between", "inheritance", USER=2, WITHDRAW=1),
    holds("inheritance-user-between-supervisor-dies", "inheritance", USER=2, SUPERVISOR_DEATHS=1, size="deep"),
    holds("inheritance-user-above", "inheritance", USER=4, WITHDRAW=1),
    # Harmless: the timer finds it, a moment later; and a look at which nobody waits leaves nobody lifted.
    holds("inheritance-release-silent", "inheritance", LOSSES=1, MUTATION="RELEASE_SILENT", size="quick"),
    holds("inheritance-timer-while-waited", "inheritance", LOSSES=1, MUTATION="TIMER_WHILE_WAITED", size="quick"),
    # What the kernel leaves open: there is no compare-exchange for priorities.
    refuted("inheritance-no-user-in-between", "N1", "inheritance", USER=2, USER_RACES=1, size="quick"),
    refuted(
        "inheritance-no-lift-then-record", "N1", "inheritance", SUPERVISOR_DEATHS=1, MUTATION="LIFT_THEN_RECORD", size="quick"
    ),
    refuted("inheritance-no-whole-record", "N1", "inheritance", SUPERVISOR_DEATHS=1, MUTATION="RECORD_NOT_WHOLE", size="quick"),
    refuted("inheritance-no-adoption", "N1", "inheritance", SUPERVISOR_DEATHS=1, MUTATION="NO_ADOPTION", size="quick"),
    refuted("inheritance-no-adopts-late", "N1", "inheritance", SUPERVISOR_DEATHS=1, MUTATION="ADOPTS_LATE", size="quick"),
    refuted("inheritance-no-timer", "N1", "inheritance", LOSSES=1, MUTATION="NO_TIMER", size="quick"),
    refuted("inheritance-no-timer-while-held", "N1", "inheritance", WAITERS=2, MUTATION="TIMER_WHILE_HELD", size="quick"),
    refuted("inheritance-no-own-is-what-it-has", "N1", "inheritance", WAITERS=2, MUTATION="OWN_IS_WHAT_IT_HAS", size="quick"),
    refuted("inheritance-no-next", "N1", "inheritance", SUPERVISOR_DEATHS=1, MUTATION="NO_NEXT", size="quick"),
    refuted("inheritance-no-N3", "N1", "inheritance", USER=2, MUTATION="NO_N3", size="quick"),
    refuted("inheritance-no-waits-kept", "N1", "inheritance", WITHDRAW=1, MUTATION="WAITS_KEPT", size="quick"),
    refuted("inheritance-no-chain", "N1", "inheritance", CHAIN=1, MUTATION="NOT_TRANSITIVE", size="quick"),
    refuted("inheritance-no-thread-once", "N6", "inheritance", SIBLINGS=1, MUTATION="THREAD_ONCE", size="quick"),
    refuted(
        "inheritance-no-hello-with-contracts",
        "N1",
        "inheritance",
        SUPERVISOR_DEATHS=1,
        DROPS=1,
        WITHDRAW=1,
        MUTATION="HELLO_WITH_CONTRACTS",
        size="quick",
    ),
    refuted("inheritance-no-rings-once", "N1", "inheritance", LOSSES=1, MUTATION="RINGS_ONCE", size="quick"),
    refuted("inheritance-no-cleared-first", "N1", "inheritance", SUPERVISOR_DEATHS=1, MUTATION="CLEARED_FIRST", size="quick"),
)


class SearchFailed(Exception):
    """SPIN, the compiler or the search itself did not get to the end."""


def check(configuration: Configuration) -> Outcome:
    """Run one configuration in a temporary folder of its own.  Blocks until the search has ended."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="shlock-model-") as folder:
            report = _search(configuration, Path(folder))
        found = _verdict(report)
    except SearchFailed as failure:
        return Outcome(str(failure), False, seconds=time.monotonic() - started)
    if configuration.refuted_by is None:
        as_expected = found == "holds"
    else:
        as_expected = found != "holds" and configuration.refuted_by in found
    return Outcome(
        found,
        as_expected,
        states=int(float(_number(r"([\d.e+]+) states, stored", report))),
        seconds=time.monotonic() - started,
        memory_mb=float(_number(r"([\d.]+)\s+total actual memory usage", report)),
    )


def _search(configuration: Configuration, folder: Path) -> str:
    """Generate, compile and run the search; return what it printed."""
    model = f"{configuration.model}.pml"
    shutil.copy(HERE / model, folder)
    defines = [f"-D{name}={value}" for name, value in configuration.defines.items()]
    _run(["spin", "-a", *defines, model], folder, output="pan.c")
    kind = "-DNP" if configuration.progress else "-DSAFETY"
    # Without partial order reduction: it saves little here, and a model without it is easier to trust.  To optimise takes
    # the compiler half a minute for the large models, which only the largest searches win back.
    effort = "-O1" if configuration.size == "deep" else "-O0"
    options = [effort, "-w", "-DCOLLAPSE", "-DNOREDUCE", "-DNOFAIR", kind, f"-DMEMLIM={MEMORY_LIMIT_MB}"]
    _run(["gcc", *options, "-o", "pan", "pan.c"], folder, output="pan")
    command = ["./pan", f"-m{configuration.depth}", *(["-l"] if configuration.progress else [])]
    return _run(command, folder)


def _run(command: list[str], folder: Path, *, output: str | None = None) -> str:
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if output is not None and not (folder / output).exists():
        raise SearchFailed(f"{command[0]} failed: {' '.join(result.stdout.split())[:300]}")
    return result.stdout


def _verdict(report: str) -> str:
    """'holds', or what SPIN says is broken.  Raises SearchFailed for an incomplete search that found nothing."""
    broken = re.search(r"^pan:\d+: (.+?)(?: \(at depth.*)?$", report, re.MULTILINE)
    if broken:
        return broken[1]
    if "max search depth too small" in report:
        raise SearchFailed("incomplete: the search was cut at its maximal depth")
    if "Search not completed" in report or "errors: 0" not in report:
        raise SearchFailed(f"incomplete: {' '.join(report.split())[:200] or 'no report'}")
    return "holds"


def _number(pattern: str, report: str) -> str:
    match = re.search(pattern, report)
    return match[1] if match else "0"


def _selected(arguments: argparse.Namespace) -> Iterator[Configuration]:
    for configuration in CONFIGURATIONS:
        if arguments.names:
            if any(configuration.name.startswith(name) for name in arguments.names):
                yield configuration
        elif arguments.deep or configuration.size == "quick" or (configuration.size == "default" and not arguments.quick):
            yield configuration


def main(argv: list[str] | None = None) -> int:
    """Run the configurations that the command line selects; return the exit status."""
    parser = argparse.ArgumentParser(description="Check the protocol models with SPIN.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a configuration, or a prefix of several")
    parser.add_argument("--quick", action="store_true", help="only the small ones")
    parser.add_argument("--deep", action="store_true", help="the large ones too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="searches at a time (default: one a processor)")
    parser.add_argument("--list", action="store_true", help="show the configurations and stop")
    arguments = parser.parse_args(argv)
    selected = list(_selected(arguments))
    if not selected:
        parser.error(f"no configuration is called {' or '.join(arguments.names)}")
    if arguments.list:
        for configuration in selected:
            defines = " ".join(f"{name}={value}" for name, value in configuration.defines.items())
            print(
                f"{configuration.name:34} {configuration.size:8} {configuration.expected:34} {configuration.model}.pml {defines}"
            )
        return 0
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        print(f"run.py: not installed: {', '.join(missing)}", file=sys.stderr)
        return 2

    started = time.monotonic()
    mismatches: list[str] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(check, configuration): configuration for configuration in selected}
        for future in as_completed(running):
            configuration, outcome = running[future], future.result()
            verdict = outcome.found if outcome.as_expected else f"{outcome.found}; EXPECTED: {configuration.expected}"
            print(
                f"{'ok  ' if outcome.as_expected else 'FAIL'} {configuration.name:34} {outcome.states:>10,} states "
                f"{outcome.seconds:6.1f} s {outcome.memory_mb:6.0f} MB  {verdict}",
                flush=True,
            )
            if not outcome.as_expected:
                mismatches.append(configuration.name)
    print(f"{len(selected)} configurations, {len(mismatches)} not as expected, {time.monotonic() - started:.0f} s")
    if mismatches:
        print("not as expected:", *mismatches)
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
