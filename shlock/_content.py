"""The content of a Block: several copies of it, of which one is the last that was committed.

Who writes holds the lock.  ``write`` fills a copy that is not the current one and then makes it the current one by one store;
``edit`` changes the current copy in place.  Who reads holds nothing and stores nothing: it copies the current copy, and looks
afterwards whether anybody has begun to overwrite it meanwhile.

    CURRENT       number of the last committed version, and which copy it is
    VERSIONS[i]   number of the version that copy i holds; while it is overwritten, or edited in place, UNFINISHED and the
                  number of the version that is to be
    EDITOR        who edits the current copy, or was the last to do so
    CHANGES       the first word of the second control block: PARKED if somebody may wait for the next version

    # state      CURRENT  VERSIONS of the current copy  lock                entered by      leaves to
    # COMMITTED  v, i     v                             any                 W4, D4          EDITED (D2), COMMITTED (W4)
    # EDITED     v, i     UNFINISHED                    EDITOR's, who lives D2              COMMITTED (D4), SUSPECT
    # SUSPECT    v, i     UNFINISHED                    any other           EDITOR's death  COMMITTED (W4, D4), EDITED (D2)

    write, under the lock
    W1  i := the copy that is UNFINISHED, or else the oldest, but never the current one.  VERSIONS[i] := UNFINISHED, v + 1
    W2  copy in, the caller's changes, the end of the view: nobody of this process can write there any more
    W3  is the lock still ours, and the lease the one it was?  Else nothing is published.  VERSIONS[i] := v + 1
    W4  CURRENT := v + 1, i                                     the one store that commits
    W5  release the lock.  CHANGES has PARKED: clear it, wake everybody
    edit, under the lock; i is the current copy
    D1  EDITOR := me
    D2  VERSIONS[i] := UNFINISHED, v + 1
    D3  the caller's changes, the end of the view; as W3.  CURRENT := v + 1, i
    D4  VERSIONS[i] := v + 1                                    the one store that commits
    D5  as W5.  A repair that failed: EDITOR := who died before, VERSIONS[i] stays as it is.
    read
    G1  v, i = CURRENT.  VERSIONS[i] = v, else G4
    G2  copy
    G3  VERSIONS[i] = v still: done.  Else G1
    G4  CURRENT has changed: G1.  UNFINISHED and EDITOR inside: wait for CHANGES, G1.  EDITOR not inside: copy; then again
        VERSIONS[i], then CURRENT and EDITOR, as before: SUSPECT, as the policy says.  Else G1
    wait for a version
    V1  publish the spot.  V2  CHANGES := w | PARKED, by an exchange that is always made.  V3  look at CURRENT.  V4  sleep -> V2

    # B1  between two stores of a writer, VERSIONS of the current copy is the number in CURRENT, or UNFINISHED
    # B2  a copy that is not UNFINISHED holds one whole version, and no two versions have the same number in CURRENT
    # B3  UNFINISHED is stored before the first byte is changed, and the number after the last one
    # B4  who waits for a version is woken: either W5 sees PARKED, or V3 sees the new CURRENT

    killed after                          the words say               repaired by        outcome
    C22 inside, nothing marked            COMMITTED                   -                  the last version
    C23 copy marked (W1)                  COMMITTED                   the next W1        the last version
    C24 content in place (W2)             COMMITTED                   the next W1        the last version
    C25 copy complete, not current (W3)   COMMITTED                   the next W1        the last version
    C26 committed, lock held (W4, D4)     COMMITTED                   a waiter's poll    the new version; waiters find it
    C27 lock released, nobody woken (W5)  COMMITTED                   a waiter's poll    the new version; waiters find it
    C28 editor named (D1)                 COMMITTED                   -                  the last version
    C29 marked as edited (D2, D3)         SUSPECT                     repair, edit, write  heirs and readers are told

In every case the lock itself passes to the next one as a Lock does; that it was held when its owner died is told to nobody,
only that the current copy is UNFINISHED.  Under a poisoned content nobody but ``repair`` gets further than C22.

Order.  B3 is an order of stores for the writer and of loads for the reader, which x86-64 keeps by itself; elsewhere there is a
fence at each of these places.  B4 needs a store before a later load: on x86-64 the release of the lock is in between.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from _thread import get_ident
from collections.abc import Callable
from typing import Any, Final

from . import _layout as at
from . import _process
from ._arena import Block
from ._atomic import IS_WEAK, Operand, fence
from ._lending import Lender
from ._memory import Memory
from ._owned import POISON, WARN, OwnedWords, _callers_level, describe
from ._parking import POLL_INTERVAL, Spot, deadline_after, parking_of
from ._process import Forked
from ._sys import SYSTEM, crash_points
from .errors import Abandoned, AbandonedError, AbandonedWarning, LeaseExpired, SegmentError

__all__ = ["Content", "Editing", "Hold", "Writing"]

VERSION_MASK: Final = at.WORD_MASK >> at.COPY_BITS
#: Seconds after which a reader gives up that writers overtake again and again: more copies would give it more time.
LONGEST_CHASE: Final = 10.0
#: Looks at words that do not fit together before they are called damaged.
MOST_LOOKS: Final = 100
SHORTEST_NAP: Final = 0.0002  # seconds; of who may not park, because that would be writing


class Content:
    """The copies and words of one Block, as this process uses them: one for all its objects, and all its threads."""

    def __init__(self, memory: Memory) -> None:
        arena = memory.arena
        if arena.layout.blocks < 2:
            raise arena.damaged("it has no second control block")
        self.memory = memory
        self.block, changes = memory.control(0), memory.control(1)
        self.arena = arena
        self.size = self.block.parameter
        self.stride = at.pages(self.size)
        self.copies = memory.size // self.stride if self.size else 0
        if not 0 < self.copies <= at.MOST_COPIES or self.copies * self.stride != memory.size:
            raise arena.damaged(f"{memory.size} bytes of data are no copies of {self.size} bytes")
        self.policy = min(self.block.policy, POISON)
        self.view = arena.words.view
        self.current = self.block.start + at.CONTENT_CURRENT
        self.editor = self.block.start + at.CONTENT_EDITOR
        self.versions = [changes.start + at.CONTENT_VERSIONS + copy for copy in range(self.copies)]
        self.words: OwnedWords  # of the lock
        self.changes: _Changes | None = _Changes(changes) if arena.words.is_writable else None
        self.told: Abandoned | None = None  # while a thread of this process edits: who died doing so before
        self.lender: Lender | None = None
        self.lent: memoryview | None = None
        self._reading: mmap.mmap | None = None
        _all.add(self)

    # -- what the words say -------------------------------------------------------------------------------------------

    def version(self) -> int:
        """Number of the last committed version."""
        return self.view[self.current] >> at.COPY_BITS

    def place(self) -> tuple[int, int]:
        """CURRENT: number and copy."""
        w = self.view[self.current]
        copy = w & at.MOST_COPIES - 1
        if copy >= self.copies:
            raise self.arena.damaged(f"the current copy is number {copy} of {self.copies}")
        return w >> at.COPY_BITS, copy

    def editor_who_lives(self) -> int:
        """Identity of who edits the current copy now, or 0.  Means something only while the copy is UNFINISHED."""
        editor = self.view[self.editor]
        return editor if self.view[self.block.word] & at.OWNER == editor and editor and _process.is_alive(editor) else 0

    def abandoned(self) -> Abandoned | None:
        """SUSPECT: who died while he edited.  Takes no lock."""
        for _ in range(MOST_LOOKS):
            w, editor = self.view[self.current], self.view[self.editor]
            copy = w & at.MOST_COPIES - 1
            if copy >= self.copies:
                return None
            mark = self.view[self.versions[copy]]
            if not mark & at.UNFINISHED:
                return None
            if self.editor_who_lives():
                return self.told if editor == _process.current.word else None
            if self.is_still_suspect(w, mark, editor):
                return self._abandoned_by(editor)
        return None

    def is_still_suspect(self, current: int, mark: int, editor: int) -> bool:
        """The last look at what was found UNFINISHED while its editor was not inside, in this order.

        He may have been between D4 and D5, and somebody, or he, may be editing again by now: with another mark.
        """
        if IS_WEAK:
            fence()
        if self.view[self.versions[current & at.MOST_COPIES - 1]] != mark:
            return False
        if IS_WEAK:
            fence()
        return self.view[self.current] == current and self.view[self.editor] == editor

    def state(self, is_held: bool, is_alive: bool) -> str:
        """In words, for who looks from outside."""
        if self.abandoned():
            return "poisoned" if self.policy == POISON else "abandoned"
        if not is_alive:
            return "held by a dead process"
        number, copy = self.place()
        if not is_held:
            return f"version {number}"
        return "being edited" if self.view[self.versions[copy]] & at.UNFINISHED else "being written"

    def _abandoned_by(self, editor: int) -> Abandoned:
        start, arena = self.block.start, self.arena
        found = self.view[start + at.BLOCK_FOUND] if self.view[start + at.BLOCK_DEAD] == editor else SYSTEM.time_ns()
        reason = arena.reason(start, editor)
        return Abandoned(_process.pid_of(editor), arena.process_name(editor), found / 1e9, reason)

    def tell(self, abandoned: Abandoned) -> None:
        """Tell of SUSPECT: a warning, nothing, or AbandonedError."""
        if self.policy == POISON:
            raise AbandonedError(describe(self.block), abandoned)
        if self.policy == WARN:
            warnings.warn(AbandonedWarning(f"{describe(self.block)}: {abandoned}"), stacklevel=_callers_level())

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, timeout: float | None) -> tuple[bytes, int]:
        """G1 to G4: the content, and its version.  Blocks only while an editor is at work; TimeoutError."""
        mapping = self._reading
        if mapping is None:
            mapping = self._reading = self.memory.map(0, self.memory.size, writable=False)
        view, size, versions = self.view, self.size, self.versions
        deadline, give_up = deadline_after(timeout), 0.0
        tries = 0
        while True:
            number, copy = self.place()  # G1
            if IS_WEAK:
                fence()
            seen = view[versions[copy]]
            if seen == number:
                if IS_WEAK:
                    fence()
                first = copy * self.stride
                content = mapping[first : first + size]  # G2
                if IS_WEAK:
                    fence()
                if view[versions[copy]] == number:  # G3
                    return content, number
            now = SYSTEM.monotonic()
            give_up = give_up or now + LONGEST_CHASE
            if view[self.current] != number << at.COPY_BITS | copy or seen == number:  # G4
                if now >= give_up or (deadline is not None and now >= deadline):
                    raise TimeoutError(
                        f"{describe(self.block)}: writers were faster for {LONGEST_CHASE if deadline is None else timeout:g} s "
                        f"than {size} bytes can be copied. More buffers= (now {self.copies}, at most {at.MOST_COPIES}) give "
                        "readers more time."
                    )
                SYSTEM.yield_processor()
            elif seen & at.UNFINISHED:
                found = self._read_unfinished(mapping, number, copy, seen, deadline)
                if found is not None:
                    return found, number
                give_up = SYSTEM.monotonic() + LONGEST_CHASE
            else:
                tries += 1
                if tries > MOST_LOOKS:
                    raise self._does_not_fit(number, copy, seen)

    def _does_not_fit(self, number: int, copy: int, seen: int) -> SegmentError:
        return self.arena.damaged(f"copy {copy} should hold version {number}, and says {seen}")

    def _read_unfinished(self, mapping: mmap.mmap, number: int, copy: int, mark: int, deadline: float | None) -> bytes | None:
        """G4, at a copy that is edited in place, or was when its editor died; None: look again."""
        current, editor = number << at.COPY_BITS | copy, self.view[self.editor]
        if self.editor_who_lives():
            if editor == _process.current.word and self.words.holder.cell_contents == get_ident():
                raise RuntimeError(f"{describe(self.block)}: this thread is editing it. The view of edit() shows the content.")

            def is_over() -> bool:
                is_same = self.view[self.current] == current and self.view[self.versions[copy]] == mark
                return not (is_same and self.editor_who_lives())

            if not self.wait(is_over, deadline):
                raise TimeoutError(f"{describe(self.block)}: pid {_process.pid_of(editor)} is still editing it")
            return None
        first = copy * self.stride
        content = mapping[first : first + self.size]
        if not self.is_still_suspect(current, mark, editor):
            return None
        self.tell(self._abandoned_by(editor))
        return content

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, is_over: Callable[[], bool], deadline: float | None) -> bool:
        """V1 to V4: block until something is so that a commit brings about; False at the deadline."""
        nap = SHORTEST_NAP
        while not is_over():
            now = SYSTEM.monotonic()
            if deadline is not None and now >= deadline:
                return False
            if self.changes is not None:
                try:
                    return self.changes.parking.park(_ChangeWaiter(self.changes, is_over), deadline)
                except Forked:
                    continue  # a child that was forked meanwhile waits as itself
            SYSTEM.nap(nap if deadline is None else min(nap, deadline - now))
            nap = min(2 * nap, POLL_INTERVAL)
        return True

    # -- writing, under the lock --------------------------------------------------------------------------------------

    def lend(self, copy: int) -> memoryview:
        assert self.lender is not None
        self.lent = self.lender.lend(copy * self.stride, self.size)
        return self.lent

    def take_back(self) -> None:
        """The end of the view.  May be called again when it was interrupted."""
        if self.lent is not None:
            assert self.lender is not None
            self.lender.end(self.lent)
            self.lent = None

    def copy_in(self, source: int, target: int) -> None:
        assert self.lender is not None
        size, stride = self.size, self.stride
        with memoryview(self.lender.mapping) as whole:
            whole[target * stride : target * stride + size] = whole[source * stride : source * stride + size]

    def spare(self, number: int, current: int) -> int:
        """W1: which copy to overwrite.  One that was never committed is of no use to readers; else the oldest."""
        held = {copy: self.view[word] for copy, word in enumerate(self.versions) if copy != current}
        return min(held, key=lambda copy: held[copy] if held[copy] <= number else -1)

    def map_for_writing(self) -> None:
        if self.lender is None:
            memory = self.memory  # not through self, or it would keep itself alive
            self.lender = Lender(lambda: memory.map(0, memory.size))

    def found(self, number: int, copy: int, *, may_be_damaged: bool = False) -> Abandoned | None:
        """SUSPECT, seen from inside the lock: who left the current copy unfinished."""
        seen = self.view[self.versions[copy]]
        if seen & at.UNFINISHED:
            return self._abandoned_by(self.view[self.editor])
        if seen != number and not may_be_damaged:
            raise self._does_not_fit(number, copy, seen)
        return None

    def wake(self) -> None:
        """W5, after the release."""
        if IS_WEAK:
            fence()
        if self.changes is not None:
            self.changes.wake()

    def in_child(self) -> None:
        """In a forked child: what its parent was writing to is not the child's."""
        self.told = None
        self.take_back()


class Hold:
    """One ``with`` under the lock: what write, edit and repair have in common.

    ``acquire`` and ``leave`` are those of the lock.  What a signal handler raises inside ``__exit__`` comes out when all is
    finished; only what it raises at the very entry leaves the lock held, as that of a Lock.
    """

    __slots__ = (
        "acquire", "before", "committed", "content", "copy", "ended", "error", "following", "is_lent", "leave", "process",
        "timeout", "token",
    )  # fmt: skip

    def __init__(
        self, content: Content, acquire: Callable[..., Any], leave: Callable[..., None], timeout: float | None
    ) -> None:
        self.content = content
        self.acquire = acquire
        self.leave = leave
        self.timeout = timeout
        self.process: _process.ProcessIdentity | None = None
        self.before: int | None = None  # of an editor: EDITOR until then
        self.is_lent = self.ended = self.committed = False
        self.error: Exception | None = None

    def __enter__(self) -> memoryview:
        content = self.content
        words = content.words
        if words.is_mine():
            raise RuntimeError(f"{describe(content.block)}: this thread is inside already, and it is not recursive")
        try:
            if not self.acquire(True, self.timeout):
                raise TimeoutError(f"{describe(content.block)}: it is held by another for {self.timeout:g} s")
            self.process = _process.current
            if words.grant is not None and words.grant.record_site:
                words.grant.note_site(2)
            self.token = content.view[content.block.start + at.BLOCK_TOKEN]
            if crash_points:
                crash_points[0]("C22 inside, nothing marked")
            content.map_for_writing()
            view = self.begin()
            self.is_lent = True
            return view
        except BaseException:
            if words.is_mine():
                self.undo()
                self.ended = True
                self._finish(True)
            raise

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if self.process is not _process.current:
            return  # a child that was forked inside: its parent's view is dead here already
        interruption: BaseException | None = None
        tries = 0
        while True:
            try:
                self._finish(kind is not None)
                break
            except BaseException as error:
                tries += 1
                if tries > _process.MOST_INTERRUPTIONS:  # it isn't a signal handler, then
                    if self.ended:
                        raise
                    self.ended, tries = True, 0
                interruption = error
        if interruption is not None:
            raise interruption
        if self.error is not None:
            raise self.error

    def _finish(self, failed: bool) -> None:
        """What is left to be done; may be called again when it was interrupted."""
        content = self.content
        if not self.ended:
            self.committed = self.end(failed)
            if self.committed and crash_points:
                crash_points[0]("C26 committed, lock held")
            self.ended = True
        content.take_back()
        words = content.words
        if words.is_mine() or words.lease_seat.cell_contents == get_ident():
            self.leave()
        if self.committed:
            if crash_points:
                crash_points[0]("C27 lock released, nobody woken")
            content.wake()

    def begin(self) -> memoryview:
        raise NotImplementedError

    def undo(self) -> None:
        """After an exception in ``begin``, and before anybody has got the view."""

    def end(self, failed: bool) -> bool:
        """Whether something was committed.  May be called again when it was interrupted."""
        raise NotImplementedError

    def is_still_ours(self) -> bool:
        """W3: whether nobody else has got the lock since.  Else ``error`` is set."""
        content = self.content
        owner = content.view[content.block.word] & at.OWNER
        grant = content.words.grant
        if grant is None:
            if owner != _process.current.word:
                self.error = ValueError(
                    f"{describe(content.block)}: it is not this process's any more, but held by pid {_process.pid_of(owner)}"
                )
        elif owner != _process.current.word or content.view[content.block.start + at.BLOCK_TOKEN] != self.token:
            lease = grant.lease
            late = 0.0 if lease is None else max(0.0, -lease.remaining())
            self.error = LeaseExpired(describe(content.block), self.token, late)
        return self.error is None


class Writing(Hold):
    """The ``with`` of write."""

    __slots__ = ("is_fresh",)
    is_fresh: bool

    def begin(self) -> memoryview:
        content = self.content
        number, current = content.place()
        if found := content.found(number, current):
            content.tell(found)
        self.copy, self.following = content.spare(number, current), number + 1 & VERSION_MASK
        content.view[content.versions[self.copy]] = at.UNFINISHED | self.following  # W1
        if IS_WEAK:
            fence()
        if crash_points:
            crash_points[0]("C23 copy marked")
        if not self.is_fresh:
            content.copy_in(current, self.copy)
        return content.lend(self.copy)

    def end(self, failed: bool) -> bool:
        content = self.content
        content.take_back()  # W2
        if failed or not self.is_still_ours():  # W3
            return False
        if crash_points:
            crash_points[0]("C24 content in place")
        if IS_WEAK:
            fence()
        content.view[content.versions[self.copy]] = self.following
        if crash_points:
            crash_points[0]("C25 copy complete, not current")
        if IS_WEAK:
            fence()
        content.view[content.current] = self.following << at.COPY_BITS | self.copy  # W4
        return True


class Editing(Hold):
    """The ``with`` of edit, and of repair."""

    __slots__ = ("is_repair", "was_found")
    is_repair: bool

    def begin(self) -> memoryview:
        content, view = self.content, self.content.view
        number, self.copy = content.place()
        self.following = number + 1 & VERSION_MASK
        self.was_found = content.found(number, self.copy, may_be_damaged=self.is_repair)
        if self.was_found and not self.is_repair:
            content.tell(self.was_found)
        held = content.versions[self.copy]
        self.before = view[content.editor]
        content.told = self.was_found
        view[content.editor] = _process.current.word  # D1
        if IS_WEAK:
            fence()
        if crash_points:
            crash_points[0]("C28 editor named")
        view[held] = at.UNFINISHED | self.following  # D2
        if IS_WEAK:
            fence()
        if crash_points:
            crash_points[0]("C29 marked as edited")
        return content.lend(self.copy)

    def undo(self) -> None:
        """Nothing was changed yet.  The words do not go back to what they were: a reader could take that for never changed."""
        if self.before is not None:
            self.committed = self.end(True)

    def end(self, failed: bool) -> bool:
        content, view = self.content, self.content.view
        content.take_back()
        content.told = None
        if not self.is_still_ours():  # D3
            return False
        if failed and self.was_found and (self.is_repair or not self.is_lent):
            assert self.before is not None
            view[content.editor] = self.before  # D5
            return False
        if IS_WEAK:
            fence()
        view[content.current] = self.following << at.COPY_BITS | self.copy
        if crash_points:
            crash_points[0]("C29 version counted, still marked")
        if IS_WEAK:
            fence()
        view[content.versions[self.copy]] = self.following  # D4
        return True


class _Changes:
    """CHANGES: the word that those park on who wait for the next version."""

    def __init__(self, block: Block) -> None:
        words = block.arena.words
        self.index = block.index
        self.view = words.view
        self.place = block.word
        self.pointer = words.pointer(block.word)
        self.parking = parking_of(block.arena)

    def mark_parked(self, operand: Operand) -> None:
        """V2: set PARKED by an exchange that is always made."""
        while not operand.compare_exchange(self.pointer, w := self.view[self.place], w | at.PARKED):
            pass

    def wake(self) -> None:
        if self.view[self.place] & at.PARKED:
            _process.to_the_end(self._wake)

    def _wake(self) -> None:
        w = self.view[self.place]
        Operand().compare_exchange(self.pointer, w, w & ~at.PARKED)  # failed: somebody else marked it or wakes
        self.parking.unpark_many(self.index)


class _ChangeWaiter:
    """One thread that waits for the next version."""

    precedence = 0

    def __init__(self, changes: _Changes, is_over: Callable[[], bool]) -> None:
        self.changes = changes
        self.index = changes.index
        self.is_over = is_over
        self.mark = Operand()

    def attempt(self, spot: Spot) -> bool:
        spot.renew()
        self.changes.mark_parked(self.mark)
        if IS_WEAK:
            fence()
        return self.is_over()  # V3

    def poll(self, spot: Spot) -> None:
        """Nothing to recover: ``attempt`` looks at everything."""

    def withdraw(self, notified: bool, interrupted: bool) -> None:
        """Everybody is woken at once: nothing to pass on."""

    def pass_on(self) -> None:
        """Everybody is woken at once: nothing to pass on."""


_all: weakref.WeakSet[Content] = weakref.WeakSet()


def _in_child() -> None:
    for content in list(_all):
        content.in_child()


_process.refresh_in_child.append(_in_child)
