"""The demo's shared table, and how it survives a writer that is killed half-way.

A lock that outlives its holder frees the lock, not the data: the heir may find an update half done. So every update of
the table notes first what it is about to change (an undo journal), and an heir that is told ``lock.abandoned`` calls
``Table.recover()``, which puts the noted values back. Copy this pattern when you guard data of your own.

Everything is a 64-bit word in one ``multiprocessing.shared_memory`` segment. A word is stored in a single move, and a
process killed at any instant has done exactly the stores before that instant, so "killed after store number k" for
every k is all that can happen; the tests go through each k.

An update, as ``Table._update`` does it:

    killed after                an heir finds         and
    U1 old values noted         JOURNAL = 0           does nothing: no word has changed yet
    U2 JOURNAL := n             all n old values      puts them back; they are still there anyway
    U3 1..n words changed       all n old values      puts them back: the update never happened
    U4 JOURNAL := 0             JOURNAL = 0           does nothing: the update is complete

The heir may be killed as well. Its stores are R1 (old values put back) and R2 (JOURNAL := 0, HOLDER := 0); until R2 the
old values are still noted, so the next heir does it all again, with the same outcome.

Invariants, whenever nobody is inside the critical section and no recovery is due:

    T1  JOURNAL = 0 and HOLDER = 0
    T2  COUNT, BYTES and SUM are those of the entries that were committed
    T3  no entry was committed more than once
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory

__all__ = ["Phase", "Result", "Table", "Word"]

_WORD_BYTES = 8
_MASK = 2**64 - 1
_DIGEST_WORDS = 4
"""A SHA-256 digest is 32 bytes."""


class Phase(enum.IntEnum):
    """Where a process is. Each writes its own, without the lock, so that the others know where it was killed."""

    STARTING = 0
    TAKING = 1
    """Takes an item from the queue, waits for one, or has just acknowledged one."""
    HASHING = 2
    ENTERING = 3
    """Waits for the lock, or has just got it."""
    ENTERED = 4
    RECOVERING = 5
    JOURNALLING = 6
    WRITING = 7
    LEAVING = 8
    """About to release the lock, or has just released it."""
    GATHERING = 9
    """Writes to the Block."""
    DONE = 10
    READING = 11
    """The reader, always."""

    @property
    def inside(self) -> bool:
        """Whether a worker in this phase certainly holds the lock."""
        return Phase.ENTERED <= self <= Phase.WRITING

    @property
    def maybe_inside(self) -> bool:
        """Whether a worker in this phase may hold the lock: the phase and the lock cannot change in one step."""
        return self in (Phase.ENTERING, Phase.LEAVING)

    @property
    def has_item(self) -> bool:
        """Whether a worker in this phase has certainly taken an item that it did not acknowledge yet."""
        return Phase.HASHING <= self <= Phase.GATHERING


class Word(enum.IntEnum):
    """Index of each single word at the front of the table; the journal, the slots and the entries follow."""

    JOURNAL = 0
    """How many (index, old value) pairs in the journal are valid; 0: no update is under way."""
    HOLDER = 1
    """Number of the worker inside, 0 when nobody is: shows whether the lock ever lets two in or hides a death."""

    COUNT = 2
    """Entries committed. With BYTES and SUM: the running totals."""
    BYTES = 3
    SUM = 4
    """First of four: each quarter of the digests, added modulo 2**64, which does not depend on the order."""

    SECTIONS = 8
    """Critical sections entered. From here on: statistics, in which a kill may lose one step and does no harm."""
    TOLD = 9
    """Heirs that were told."""
    ROLLED_BACK = 10
    """Half-done updates that an heir rolled back."""
    GIVEN_AGAIN = 11
    """Items that were delivered again, since the worker that had taken them died, and came as far as here."""
    THERE_ALREADY = 12
    """Those of them whose result was there already: the dead worker had only not acknowledged them yet."""
    UNTOLD = 13
    """Sections entered with HOLDER set and nobody told: two inside, or a death that the lock hid. Must stay 0."""
    OVERLAPS = 14
    """Sections left with another's number in HOLDER: two were inside. Must stay 0."""
    WAITS = 15
    """Acquires that took longer than ``LONG_WAIT_NS``."""
    LONGEST_WAIT_NS = 16
    HUNG = 17
    """Workers that chaos stopped inside and left there."""
    REMOVED = 18
    """Heirs that were told that the holder before them was removed at its deadline."""


LONG_WAIT_NS = 1_000_000
"""An acquire that takes longer than this is counted as a wait (ns)."""

_JOURNAL_AT = len(Word) + _DIGEST_WORDS - 1
_JOURNAL_PAIRS = 13
"""Room for the largest update: a commit changes thirteen words."""

_PHASES_AT = _JOURNAL_AT + 2 * _JOURNAL_PAIRS

_ENTRY_WORDS = 3 + _DIGEST_WORDS
_WHO, _SIZE, _COMMITS, _DIGEST = range(4)
"""An entry is one file: who committed it, its size in bytes, how often it was committed, its digest."""


@dataclass(frozen=True)
class Result:
    """What the table says about one file."""

    who: int
    size: int
    commits: int
    digest: bytes


class Table:
    """One entry a file, running totals, an undo journal, and the phase of each process, in shared memory.

    Made by the parent before it forks the workers, which inherit the mapping. The methods under "inside the critical
    section" need the lock, ``set_phase``, ``phase`` and ``statistic`` do not. The parent calls ``close()`` at the end,
    which also removes the segment.
    """

    def __init__(self, files: int, slots: int) -> None:
        """``slots``: a slot is the place of one process, and of its replacement after it."""
        self.files = files
        self._entries_at = _PHASES_AT + slots
        size = (self._entries_at + files * _ENTRY_WORDS) * _WORD_BYTES
        self._segment = SharedMemory(create=True, size=size)
        assert self._segment.buf is not None  # as it would be after close()
        self._words = self._segment.buf[:size].cast("Q")

    def close(self) -> None:
        """Unmap and remove the segment. The table cannot be used afterwards."""
        self._words.release()
        self._segment.close()
        self._segment.unlink()

    # -- without the lock

    def set_phase(self, slot: int, phase: Phase) -> None:
        """Say where the process of this slot is. Only that one does (and the parent, while there is none)."""
        self._words[_PHASES_AT + slot] = phase

    def phase(self, slot: int) -> Phase:
        """Where the process of this slot is, or was when it was killed."""
        return Phase(self._words[_PHASES_AT + slot])

    def statistic(self, word: Word) -> int:
        """One of the single words, as it is just now."""
        return self._words[word]

    # -- inside the critical section

    def count_hung(self) -> None:
        """Called by chaos, before it leaves a worker stopped; nobody else writes that word."""
        self._store(Word.HUNG, self._words[Word.HUNG] + 1)

    def enter(self, slot: int, number: int, *, told: bool, waited_ns: int, removed: bool = False) -> None:
        """Begin a critical section: recover the table if the lock said that its last holder died."""
        self._store(Word.SECTIONS, self._words[Word.SECTIONS] + 1)
        if told:
            self._store(Word.TOLD, self._words[Word.TOLD] + 1)
            if removed:
                self._store(Word.REMOVED, self._words[Word.REMOVED] + 1)
            self.set_phase(slot, Phase.RECOVERING)
            self.recover()
            self.set_phase(slot, Phase.ENTERED)
        elif self._words[Word.HOLDER]:
            self._store(Word.UNTOLD, self._words[Word.UNTOLD] + 1)
        self._store(Word.HOLDER, number)
        if waited_ns > LONG_WAIT_NS:
            self._store(Word.WAITS, self._words[Word.WAITS] + 1)
            self._store(Word.LONGEST_WAIT_NS, max(waited_ns, self._words[Word.LONGEST_WAIT_NS]))

    def leave(self, number: int) -> None:
        """End a critical section; the release follows."""
        if self._words[Word.HOLDER] != number:
            self._store(Word.OVERLAPS, self._words[Word.OVERLAPS] + 1)
        self._store(Word.HOLDER, 0)

    def recover(self) -> bool:
        """Roll back what the dead holder left half-done; returns whether it did. May itself be killed and repeated."""
        noted = self._words[Word.JOURNAL]
        for pair in range(noted):
            index, old = self._words[_JOURNAL_AT + 2 * pair], self._words[_JOURNAL_AT + 2 * pair + 1]
            self._store(index, old)
        if noted:
            self._store(Word.ROLLED_BACK, self._words[Word.ROLLED_BACK] + 1)
            self._store(Word.JOURNAL, 0)
        self._store(Word.HOLDER, 0)
        return noted > 0

    def commit(self, slot: int, number: int, index: int, size: int, digest: bytes, *, deliveries: int = 1) -> None:
        """Enter a file's result and add it to the totals: thirteen words, all or none.

        Nothing, if it is there already: the queue delivers an item again if its worker dies between this and the
        acknowledgement.
        """
        words = self._words
        entry = self._entry_at(index)
        if deliveries > 1:
            self._store(Word.GIVEN_AGAIN, words[Word.GIVEN_AGAIN] + 1)
        if words[entry + _COMMITS]:
            self._store(Word.THERE_ALREADY, words[Word.THERE_ALREADY] + 1)
            return
        changes: dict[int, int] = {entry + _COMMITS: words[entry + _COMMITS] + 1}
        changes[Word.COUNT] = words[Word.COUNT] + 1
        changes[entry + _WHO] = number
        changes[entry + _SIZE] = size
        changes[Word.BYTES] = words[Word.BYTES] + size
        for i, quarter in enumerate(_quarters(digest)):
            changes[entry + _DIGEST + i] = quarter
            changes[Word.SUM + i] = (words[Word.SUM + i] + quarter) & _MASK
        self._update(slot, changes)

    def _update(self, slot: int, changes: Mapping[int, int]) -> None:
        """Change these words so that an heir can take the change back: U1 to U4 above."""
        assert len(changes) <= _JOURNAL_PAIRS
        self.set_phase(slot, Phase.JOURNALLING)
        for pair, index in enumerate(changes):
            self._store(_JOURNAL_AT + 2 * pair, index)
            self._store(_JOURNAL_AT + 2 * pair + 1, self._words[index])
        self._store(Word.JOURNAL, len(changes))
        self.set_phase(slot, Phase.WRITING)
        for index, value in changes.items():
            self._store(index, value)
        self._store(Word.JOURNAL, 0)

    def _store(self, index: int, value: int) -> None:
        """Every store that a kill can separate from the next goes through here, which is where the tests kill."""
        self._words[index] = value

    # -- when all is over

    def result(self, index: int) -> Result:
        """What the table holds for one file."""
        entry = self._entry_at(index)
        digest = b"".join(self._words[entry + _DIGEST + i].to_bytes(8, "big") for i in range(_DIGEST_WORDS))
        return Result(self._words[entry + _WHO], self._words[entry + _SIZE], self._words[entry + _COMMITS], digest)

    def violations(self) -> list[str]:
        """Which of T1 to T3 do not hold, and what the lock let happen, in words; empty if all is well."""
        words = self._words
        results = [self.result(i) for i in range(self.files)]
        done = [r for r in results if r.commits]
        found = []
        if words[Word.JOURNAL] or words[Word.HOLDER]:
            found.append(f"T1: an update was left half-done by worker number {words[Word.HOLDER]}")
        totals = [words[Word.COUNT], words[Word.BYTES], *(words[Word.SUM + i] for i in range(_DIGEST_WORDS))]
        sums = [sum(column) & _MASK for column in zip(*(_quarters(r.digest) for r in done), strict=True)]
        expected = [len(done), sum(r.size for r in done), *(sums or [0] * _DIGEST_WORDS)]
        if totals != expected:
            found.append(f"T2: the totals are {totals}, those of the entries are {expected}")
        if twice := [i for i, r in enumerate(results) if r.commits > 1]:
            found.append(f"T3: counted more than once: {len(twice)} files, the first is number {twice[0]}")
        if untold := words[Word.UNTOLD]:
            found.append(f"the lock was handed on {untold} times from inside the critical section and nobody was told")
        if overlaps := words[Word.OVERLAPS]:
            found.append(f"two workers were inside the critical section {overlaps} times")
        return found

    def _entry_at(self, index: int) -> int:
        return self._entries_at + index * _ENTRY_WORDS


def _quarters(digest: bytes) -> list[int]:
    return [int.from_bytes(digest[i : i + 8], "big") for i in range(0, 8 * _DIGEST_WORDS, 8)]
