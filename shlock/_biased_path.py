"""acquire() and release() of a lock that is biased to this process: in and out by the door, B1 to B4 of ``_bias``.

The objects of a lock have these functions in the place of those of ``_fast_path`` from R1' to B6.  Who has kept one of the
others takes the same steps there, and who has kept one of these goes back when there is no door any more: each is always right.

The interpreter looks at signals, switches threads and forks when a call has returned.  So ``inside`` is changed without a call,
after B1 and before B3; if a handler raises in between, the door's own count says whether its call was made.  A child that is
forked there finds ``has_door`` false: it was its parent that got in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any, Final, NamedTuple

from . import _layout as at
from . import _process
from ._bias import NEVER_OPEN, drop, finish, undo
from ._owned import OwnedWords
from ._process import Forked

__all__ = ["CELLS", "NOT_OWNED", "NUMBERS", "Path", "make_biased_path", "over"]

NUMBERS: Final = (float, int)  # what a timeout is; anything else is looked at more closely
NOT_OWNED: Final = "attempt to release recursive lock not owned by thread"
ATTEMPTS: Final = range(_process.MOST_INTERRUPTIONS)
#: Of OwnedWords: what all its functions share.
CELLS: Final = ("go_in", "go_out", "inside", "has_door", "lowest", "mark")


class Path(NamedTuple):
    """The functions of an object of a lock; ``leave`` is its ``__exit__``."""

    acquire: Callable[..., bool]
    release: Callable[[], None]
    leave: Callable[..., None]


class _Rest(NamedTuple):
    """What is left to do where the door is not enough."""

    words: OwnedWords
    acquire: Callable[..., bool]
    release: Callable[[], None]


def make_biased_path(words: OwnedWords, ordinary: Path) -> Path:
    """The functions of one object of a lock.  ``ordinary``: those of ``_fast_path``, which take all steps, these as well."""
    # These become the cells of the words.  Each costs something at every call, so what is seldom needed is in one object.
    go_in: Any = NEVER_OPEN
    go_out: Any = None
    lowest: Any = None
    inside = mark = 0
    has_door = False
    rest = _Rest(words, ordinary.acquire, ordinary.leave)

    def acquire(block: bool = True, timeout: float | None = None) -> bool:
        nonlocal inside
        if timeout is None or (timeout.__class__ in NUMBERS and timeout == timeout):
            try:
                if go_in(False) and has_door:  # B1
                    inside += 1
                    return True
            except BaseException:
                for _ in ATTEMPTS:
                    try:
                        undo(rest.words)
                        break
                    except Forked:
                        break
                    except BaseException:
                        pass  # what was raised first is what comes out
                raise
        return rest.acquire(block, timeout)

    def leave(kind: object = None, value: object = None, traceback: object = None) -> None:
        """Finish first: what a signal handler raises meanwhile comes out when nothing is left half-done.

        These steps stand in ``_fast_path`` once more: a call of it could be interrupted, or forked, before it begins.
        """
        nonlocal inside
        if inside:
            if lowest[0] != mark:
                w = rest.words.view[rest.words.places[0][0]]
                if w not in (rest.words.biased, rest.words.biased ^ at.REVOKED) and (
                    w & at.OWNER != _process.current.word or not w & at.BIASED
                ):
                    drop(rest.words)
                    rest.release()
                    return
            inside -= 1  # B2
            try:
                go_out()  # B3
                if lowest[0] == mark:  # B4
                    return
                interruption = None
            except BaseException as raised:
                trace = raised.__traceback__
                if raised.__class__ is AssertionError and trace is not None and trace.tb_next is None:
                    # The door of an RLock says so itself, and no signal handler: another thread is in.
                    inside += 1
                    raise AssertionError(NOT_OWNED) from None
                interruption = raised
            for _ in ATTEMPTS:
                try:
                    finish(rest.words)  # B5, B6
                    break
                except Forked:
                    break
                except BaseException as raised:
                    interruption = raised
            if interruption is not None:
                raise interruption
        else:  # it is an ordinary hold: interrupted before it began, the release is made nevertheless
            depth, interruption = rest.words.depth, None
            while True:
                try:
                    rest.release()
                    break
                except BaseException as raised:
                    interruption = raised
                    if not rest.words.is_mine() or rest.words.depth != depth:
                        raise
            if interruption is not None:
                raise interruption

    cells = {name: getattr(words, name) for name in CELLS}
    release_cells = {**cells, "rest": CellType(rest._replace(release=ordinary.release))}
    release = over(leave, release_cells, _without_arguments(leave.__code__))
    return Path(over(acquire, cells), release, over(leave, cells))


@functools.cache
def _without_arguments(code: CodeType) -> CodeType:
    """The same, to be called without any: what were arguments, which it does not read, are variables then."""
    return code.replace(co_argcount=0, co_name="release")


def over(function: Callable[..., Any], cells: dict[str, CellType], code: CodeType | None = None) -> Callable[..., Any]:
    """The same function with these cells in the place of its closure variables of those names; or that code with them."""
    assert isinstance(function, FunctionType) and function.__closure__ is not None
    names, defaults = function.__code__.co_freevars, function.__defaults__
    closure = tuple(cells.get(name, cell) for name, cell in zip(names, function.__closure__, strict=True))
    if code is not None:
        return FunctionType(code, function.__globals__, code.co_name, (), closure)
    return FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
