"""acquire() and release() as they are all but always: nobody is in the way, and one attempt is enough.

``_owned`` has the protocol, ``_bias`` that of a lock which is reserved for this process.  Here are their first steps (A1, R1,
B0 to B5), without a call that need not be made; what is left to do then, ``OwnedWords`` does.

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

from _thread import get_ident
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, Final

from . import _process
from ._atomic import ZERO, Operand, borrow_operand, give_back, raw_compare_exchange
from ._bias import LEAVING, NEVER, grant, leave
from ._owned import OwnedWords
from ._process import Forked, identity_pointer

__all__ = ["make_fast_path", "over"]

NUMBERS: Final = (float, int)  # what a timeout is; anything else is looked at more closely
#: Of OwnedWords: what all its functions share, as cells.
_SHARED: Final = ("seat", "holder", "credit", "held", "lowest", "mark", "may_take", "may_release")


def make_fast_path(
    words: OwnedWords, *, recursive: bool, raises: bool = False
) -> tuple[Callable[..., bool], Callable[[], None], Callable[..., None]]:
    """acquire, release and ``__exit__`` for a single word.

    Uncontended they are a few plain loads and stores where the lock is biased to this process, and else one compare-exchange
    each.
    """
    word = words.places[0][1]
    (zero, zero_cell), (mine, mine_cell) = words.zero, words.mine
    # These become the cells of the words, see below.  Closure variables are what a function reads fastest; but each of them
    # costs something at every call, so what is the same for all locks is global.
    seat = holder = credit = mark = 0
    held: Any = None
    lowest: Any = None
    may_take = may_release = True
    is_counted = words.limit != NEVER  # or a subtraction at each release would be for nothing

    def acquire(block: bool = True, timeout: float | None = None) -> bool:
        nonlocal seat, holder, may_take
        thread = get_ident()
        is_plain = timeout is None or (timeout.__class__ in NUMBERS and timeout == timeout)
        if not seat and is_plain:
            seat = thread  # B0
            held[0] = 1  # B1
            if lowest[0] == mark:  # B2
                return True
            held[0] = 0  # B3
            seat = LEAVING
            stopped: BaseException | None = None
            tries = 0
            while seat == LEAVING and tries < _process.MOST_INTERRUPTIONS:
                try:
                    leave(words)  # B6
                except Forked:
                    pass  # it starts as itself
                except BaseException as error:  # finish first: a word that is REVOKED and ours would never be released
                    stopped = error
                    tries += 1
            if stopped is not None:
                raise stopped
        if recursive and thread in (holder, seat):
            words.depth += 1
            return True
        if is_plain and may_take:
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
            nonlocal seat, holder, credit, may_release
            if kind is not None and not leaving:
                raise TypeError("release() takes no arguments")
            interruption: BaseException | None = None
            if recursive:
                while True:
                    try:
                        thread = get_ident()
                        break
                    except BaseException as raised:
                        interruption = raised
                if thread not in (holder, seat):
                    if leaving and (words.is_inherited or words.is_of_ancestor()):
                        return
                    raise AssertionError("attempt to release recursive lock not owned by thread")
                if words.depth > 1:
                    words.depth -= 1
                    if interruption is not None:
                        raise interruption
                    return
            if seat > 0:
                held[0] = 0  # B4
                if lowest[0] == mark:  # B5
                    seat = 0
                else:
                    seat = LEAVING
                    tries = 0
                    while seat == LEAVING and tries < _process.MOST_INTERRUPTIONS:
                        try:
                            leave(words)  # B6
                        except Forked:
                            pass
                        except BaseException as raised:
                            interruption = raised
                            tries += 1
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
            tries = 0
            while True:
                try:
                    if not is_first:
                        is_first = True
                        if not credit:
                            credit = words.limit
                            if grant(words) or process is not _process.current:  # R1'
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
                    granting = words.granting
                    if granting is not None and granting.succeeded():
                        granting.tried = None
                        break  # R1' was made
            if interruption is not None:
                raise interruption
            if error is not None:
                raise error
            if back is not None:
                give_back(back)

        return release

    shared = {name: getattr(words, name) for name in _SHARED}
    return over(acquire, shared), over(make_release(False), shared), over(make_release(True), shared)


def over(function: Callable[..., Any], cells: dict[str, CellType]) -> Callable[..., Any]:
    """The same function with these cells in the place of its closure variables of those names."""
    assert isinstance(function, FunctionType) and function.__closure__ is not None
    names = function.__code__.co_freevars
    closure = tuple(cells.get(name, cell) for name, cell in zip(names, function.__closure__, strict=True))
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
