"""Which process owns a word: pid and birth in 59 bits, checked by anyone without a registry.

    bits 5-26 pid | bits 27-63 birth (start time in clock ticks since boot, field 22 of /proc/PID/stat)

A process is alive if ``pidfd_open`` finds its pid, the descriptor isn't readable (readable means that every thread is
gone; a zombie is dead) and its birth is the one in the word (a pid may be in use again).

The identity of this process is one shared cell, which every lock uses as the "desired" operand of its acquire.  A
forked child refreshes that cell before any user code runs there.  ``current`` is an object that a fork replaces: code
that must notice that it woke up in a child compares it with the one it started with.

    P1  the cell never names another process than the one that can read it: refreshed in the child before user code
    P2  a process is called dead only if the kernel says so for this pid and birth; a doubt means alive
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

from ._layout import BIRTH_BITS, BIRTH_SHIFT, FLAGS, OWNER, PID_BITS, PID_SHIFT
from ._sys import SYSTEM

__all__ = [
    "Forked",
    "ProcessIdentity",
    "ancestors",
    "before_fork",
    "current",
    "is_alive",
    "pid_of",
    "refresh_in_child",
]

#: How often something is interrupted by signal handlers that raise before it gives up finishing.
MOST_INTERRUPTIONS = 100
_PID_MASK = (1 << PID_BITS) - 1
_BIRTH_MASK = (1 << BIRTH_BITS) - 1


class Forked(BaseException):
    """Raised inside shlock only: the code that runs now is a child's copy of what its parent was doing."""


@dataclass(frozen=True, eq=False)
class ProcessIdentity:
    """This process, from its start or from the fork that made it."""

    pid: int
    word: int  # flags clear


def make_word(pid: int, birth: int) -> int:
    return (pid & _PID_MASK) << PID_SHIFT | (birth & _BIRTH_MASK) << BIRTH_SHIFT


def pid_of(word: int) -> int:
    return word >> PID_SHIFT & _PID_MASK


def birth_of(word: int) -> int:
    return word >> BIRTH_SHIFT


def _identify() -> ProcessIdentity:
    pid = SYSTEM.getpid()
    birth = SYSTEM.birth(pid)
    if birth is None:
        raise ImportError("shlock needs /proc: the start time of this process cannot be read there")
    return ProcessIdentity(pid, make_word(pid, birth))


#: Replaced by a fork, in the child.  Compare with ``is``.
current: ProcessIdentity = _identify()

#: Identity words of the processes that this one was forked from, in this program.
ancestors: set[int] = set()

#: The cell that holds ``current.word``; its address never changes.
identity_cell = ctypes.c_uint64(current.word)
identity_pointer = ctypes.c_void_p.from_param(ctypes.addressof(identity_cell))

#: What other modules do in a child, in this order, after the identity is right.
refresh_in_child: list[Callable[[], None]] = []
#: What they do in the parent before and after a fork.
before_fork: list[Callable[[], None]] = []


def is_alive(word: int) -> bool:
    """Whether the process that an owner word names is still there.  A few system calls; never blocks.

    Nothing is kept between calls: a descriptor that threads shared could be closed, and its number in use again for
    something else, while one of them asks.
    """
    owner = word & OWNER
    if owner == current.word:
        return True
    pid = pid_of(owner)
    descriptor = SYSTEM.pidfd_open(pid) if pid else None
    if descriptor is None:
        return False
    try:
        # Read after the open: from then on the pid cannot change hands.
        birth = SYSTEM.birth(pid)
        return birth is not None and birth & _BIRTH_MASK == birth_of(owner) and not SYSTEM.is_readable(descriptor)
    finally:
        SYSTEM.close(descriptor)


def to_the_end(action: Callable[[], object]) -> None:
    """Do what must not be left half-done, although signal handlers raise meanwhile; then raise what the last of them raised.

    The action is called again after each interruption, so it has to know, or not to mind, what it has done already.
    """
    interruption: BaseException | None = None
    tries = 0
    while True:
        try:
            action()
            break
        except Forked:
            raise
        except BaseException as error:
            tries += 1
            if tries > MOST_INTERRUPTIONS:  # it isn't a signal handler, then
                raise
            interruption = error
    if interruption is not None:
        raise interruption


def _before() -> None:
    for action in before_fork:
        action()


def _in_child() -> None:
    global current
    ancestors.add(current.word)
    current = _identify()
    identity_cell.value = current.word  # P1
    for action in refresh_in_child:
        action()


os.register_at_fork(before=_before, after_in_parent=_before, after_in_child=_in_child)

assert not current.word & FLAGS
