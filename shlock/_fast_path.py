"""acquire() and release() as they are all but always: nobody is in the way, and one attempt is enough.

``_owned`` has the protocol, ``_bias`` that of a lock which is reserved for this process.  Here are their first steps (A1, R1,
R1'), without a call that need not be made; what is left to do then, ``OwnedWords`` does.

A compare-exchange that fails writes what it saw into its *expected* operand, so nobody else may use that one meanwhile.  Each
process has one for A1 and one for R1 of each lock, and for each a flag whether it is free: testing and clearing the flag are
bytecodes between which the interpreter does not switch threads.  Who finds it taken goes the slow way; so does everybody where
there is no interpreter lock.

    # interrupted or forked                      the operand says             outcome
    # before the exchange                        as before                    nothing has been done
    # after it, its result not yet looked at     as before: it was made       acquire: released again; release: done
    #                                            another word: it failed      nothing has been done
    # the same, in a forked child                the parent's exchange        it starts as itself, with operands of its own

The interpreter looks at signals, switches threads and forks only where a call returns, a function starts, or a loop jumps back.
What has been done is therefore noted without a call, directly before or after.
"""

from __future__ import annotations

import contextlib
from _thread import get_ident
from collections.abc import Callable
from typing import Any, Final

from . import _layout as at
from . import _process
from ._atomic import ZERO, Operand, borrow_operand, give_back, raw_compare_exchange
from ._bias import NEVER, drop, finish, grant, undo
from ._biased_path import NOT_OWNED, NUMBERS, Path, make_biased_path, over
from ._owned import OwnedWords
from ._parking import deadline_after
from ._process import Forked, identity_pointer

__all__ = ["Path", "make_fast_path", "over"]

#: Of OwnedWords: what all its functions share, as cells.
_SHARED: Final = ("go_in", "go_out", "inside", "has_door", "holder", "credit", "may_take", "may_release")


def make_fast_path(words: OwnedWords, *, recursive: bool, raises: bool = False) -> tuple[Path, Callable[[], Path]]:
    """The functions of one object of a lock of a single word; and what gives those that go by the door (``_biased_path``).

    Uncontended acquire and release are one compare-exchange each.
    """
    word = words.places[0][1]
    (zero, zero_cell), (mine, mine_cell) = words.zero, words.mine
    # These become the cells of the words, see below.  Closure variables are what a function reads fastest; but each of them
    # costs something at every call, so what is the same for all locks is global.
    inside = holder = credit = 0
    has_door = False
    go_in: Any = None
    go_out: Any = None
    may_take = may_release = True
    is_counted = words.limit != NEVER  # or a subtraction at each release would be for nothing

    def acquire(block: bool = True, timeout: float | None = None) -> bool:
        nonlocal inside, holder, may_take
        if has_door:  # this function has been kept since before the bias.  It must not hold on to the other path: no cycles
            if timeout is not None and (timeout.__class__ not in NUMBERS or timeout != timeout):
                deadline_after(timeout)
                timeout = float(timeout)
            try:
                if go_in(False) and has_door:  # B1
                    inside += 1
                    return True
            except BaseException:
                tries = 0
                while tries < _process.MOST_INTERRUPTIONS:
                    try:
                        undo(words)
                        break
                    except BaseException:
                        tries += 1
                raise
            with contextlib.suppress(Forked):  # it starts as itself
                finish(words)  # B6, if it is SHUT
            if has_door:
                return words.acquire(block, timeout, raises=raises)
        thread = get_ident()
        if recursive and thread == holder:
            words.depth += 1
            return True
        if may_take and (timeout is None or (timeout.__class__ in NUMBERS and timeout == timeout)):
            process = _process.current
            may_take = False
            try:
                if raw_compare_exchange(word, zero, identity_pointer) and process is _process.current:  # A1
                    holder = thread
                    may_take = True
                    return True
            except BaseException:
                if process is _process.current:
                    is_taken = not zero_cell[0]
                    zero_cell[0] = 0
                    may_take = True
                    if is_taken:
                        words.release()
                raise
            if process is _process.current:
                zero_cell[0] = 0
                may_take = True
        return words.acquire(block, timeout, raises=raises)

    def make_release(leaving: bool) -> Callable[..., None]:
        def release(kind: object = None, value: object = None, traceback: object = None) -> None:
            """Finish first: what a signal handler raises meanwhile comes out when nothing is left half-done."""
            nonlocal inside, holder, credit, may_release
            if kind is not None and not leaving:
                raise TypeError("release() takes no arguments")
            interruption: BaseException | None = None
            tries = 0
            if inside and words.lowest.cell_contents[0] != words.mark.cell_contents:
                w = words.view[words.places[0][0]]
                if w not in (words.biased, words.biased ^ at.REVOKED) and (
                    w & at.OWNER != _process.current.word or not w & at.BIASED
                ):
                    drop(words)
            if inside:  # likewise; no call may come before B2, or a handler that raises in it would undo the release
                inside -= 1  # B2
                try:
                    go_out()  # B3
                    if words.lowest.cell_contents[0] == words.mark.cell_contents:  # B4
                        return
                except BaseException as raised:
                    trace = raised.__traceback__
                    if raised.__class__ is AssertionError and trace is not None and trace.tb_next is None:
                        # The door of an RLock says so itself, and no signal handler: another thread is in.
                        inside += 1
                        raise AssertionError(NOT_OWNED) from None
                    interruption = raised
                while tries < _process.MOST_INTERRUPTIONS:
                    try:
                        finish(words)  # B5, B6
                        break
                    except Forked:
                        break
                    except BaseException as raised:
                        interruption = raised
                        tries += 1
                if interruption is not None:
                    raise interruption
                return
            if recursive:
                while True:
                    try:
                        thread = get_ident()
                        break
                    except BaseException as raised:
                        interruption = raised
                if thread != holder:
                    if leaving and (words.is_inherited or words.is_of_ancestor()):
                        return
                    raise AssertionError(NOT_OWNED)
                if words.depth > 1:
                    words.depth -= 1
                    if interruption is not None:
                        raise interruption
                    return
            process = _process.current
            is_first = may_release and credit
            if is_first:
                if is_counted:
                    credit -= 1
                holder = 0
                may_release = False
                try:
                    if raw_compare_exchange(word, mine, ZERO):  # R1
                        if process is _process.current:
                            may_release = True
                        if interruption is None:
                            return
                except BaseException as raised:
                    interruption = raised
                is_made = mine_cell[0] == process.word
                if process is _process.current:
                    mine_cell[0] = process.word
                    may_release = True
                if is_made or process is not _process.current:  # a forked child is in the middle of its parent's release
                    if interruption is not None:
                        raise interruption
                    return
            error: Exception | None = None
            back: Operand | None = None
            granting: Operand | None = None
            while True:
                try:
                    if not is_first:
                        is_first = True
                        if not credit:
                            credit = words.limit
                            granting = borrow_operand()
                            if grant(words, granting) or process is not _process.current:  # R1'
                                break
                    if back is None:
                        back = borrow_operand()
                    if process is not _process.current:
                        break  # the operand may be a child's, which would release what its parent holds
                    error = words.release_word(back, None, leaving)
                    break
                except Forked:
                    break  # we are a child that was forked meanwhile: the release is its parent's
                except BaseException as raised:
                    tries += 1
                    if process is not _process.current or tries > _process.MOST_INTERRUPTIONS:
                        raise
                    interruption = raised
                    if granting is not None and granting.succeeded():
                        break  # R1' was made
            if interruption is not None:
                raise interruption
            if error is not None:
                raise error
            if back is not None:
                give_back(back)

        return release

    door_path: Path | None = None

    def by_door() -> Path:
        """Made when it is first needed: most locks never are biased."""
        nonlocal door_path
        if door_path is None:
            door_path = make_biased_path(words, ordinary)
        return door_path

    shared = {name: getattr(words, name) for name in _SHARED}
    ordinary = Path(over(acquire, shared), over(make_release(False), shared), over(make_release(True), shared))
    return ordinary, by_door
