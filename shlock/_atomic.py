"""Single 64-bit words in shared memory: load, store, exchange, compare-exchange.  Nothing else reads or writes them.

The hardware instructions are those that the ``atomics`` package finds for this machine.  Its public classes check and
wrap so much that one compare-exchange costs 22 us; here its functions are called straight through their pointers, in
the form without memory-order arguments, which is sequentially consistent and the cheapest to call.

Loads and stores go through a memoryview with format "Q": one aligned 8-byte move each.  On no processor is such a
store ordered before a later load of another word; what needs that order uses an exchange.

There is one exception.  The C library's ``sem_trywait`` and ``sem_post`` are compare-exchanges, too, of a word's lower half:
from 1 to 0 and back.  The interpreter's own extension module calls them in 40 ns, where a call through a pointer takes 260;
so where one and the same process takes and gives back a word that names nobody, a `Door` on it is the cheapest there is.

Two rules that look like details and are not:

- A compare-exchange that fails writes the value it saw into its *expected* operand.  An operand that two threads
  share is a stolen lock, so every attempt has an operand of its own: taken from a list, pushed back when restored.
- A signal handler may raise after the C call has returned and before its result is assigned.  The operand remembers
  what happened (``succeeded``).  Between ``self.tried = ...`` and the C call the interpreter looks at no signal: it
  does so only when a call returns, when a function starts and when it jumps back.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from typing import Any, Final

from atomics._impl.patomic import Patomic

try:
    from _multiprocessing import SemLock  # type: ignore[import-not-found]
except ImportError:  # an interpreter that was built without semaphores
    SemLock = None

from . import _process
from ._layout import INSIDE, OUTSIDE, SHUT, WORD

__all__ = [
    "IS_WEAK", "ZERO", "Door", "Operand", "Pointer", "Words", "borrow_operand", "fence", "give_back", "has_doors", "make_door",
    "new_cell", "pointer", "raw_compare_exchange",
]  # fmt: skip

#: What ctypes passes fastest: an argument that is wrapped once and used again for every call.
Pointer = Any

_SEQUENTIALLY_CONSISTENT: Final = 5  # patomic_seq_cst, memory_order_seq_cst


def _load_functions() -> tuple[Any, Any]:
    """The compare-exchange and exchange of this machine, called with the interpreter lock held."""
    create = Patomic._get_lib().patomic_create
    create.restype = Patomic._PatomicExplicit  # the same structure; only the signatures differ
    create.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_uint, ctypes.c_int]
    functions = create(WORD, _SEQUENTIALLY_CONSISTENT, 0, 0).ops.xchg_ops

    def address(function: Any) -> int:
        value = ctypes.cast(function, ctypes.c_void_p).value
        if not value:
            raise ImportError("shlock needs 64-bit compare-exchange, which the package atomics does not offer here")
        return value

    compare_exchange = ctypes.PYFUNCTYPE(ctypes.c_int)(address(functions.fp_cmpxchg_strong))
    exchange = ctypes.PYFUNCTYPE(None)(address(functions.fp_exchange))
    return compare_exchange, exchange


def pointer(address: int) -> Pointer:
    """An address, wrapped as a call argument."""
    return ctypes.c_void_p.from_param(address)


def new_cell(value: int) -> tuple[Pointer, memoryview]:
    """A word of this process's own memory: as a call argument, and to look at and change."""
    cell = ctypes.c_uint64(value)
    return pointer(ctypes.addressof(cell)), memoryview(cell).cast("B").cast("Q")


raw_compare_exchange, _raw_exchange = _load_functions()

_zero = new_cell(0)  # keeps the memory
ZERO: Final = _zero[0]

#: Whether this processor may let a store pass an earlier store, or a load an earlier load.  x86-64 keeps both in order: there
#: only a store and a later load need a fence in between.
IS_WEAK: Final = os.uname().machine != "x86_64"


class Operand:
    """The two cells that one thread lends to a compare-exchange or an exchange.

    It belongs to the process that made it: after a fork the child's copy refuses to work (:class:`_process.Forked`), so
    that a child which goes on in the middle of its parent's acquire cannot write as its parent.  The check stands
    directly before the call, where no signal handler, and so no fork, can come in between.
    """

    __slots__ = ("_cells", "_desired", "_desired_pointer", "_expected", "_expected_pointer", "process", "tried")

    def __init__(self) -> None:
        self._cells = (ctypes.c_uint64 * 2)()
        base = ctypes.addressof(self._cells)
        cells = memoryview(self._cells).cast("B").cast("Q")
        self._expected = cells[0:1]
        self._desired = cells[1:2]
        self._expected_pointer = pointer(base)
        self._desired_pointer = pointer(base + WORD)
        self.process = _process.current
        self.tried: int | None = None

    def compare_exchange(self, word: Pointer, expected: int, desired: int) -> bool:
        """Write ``desired`` into the word if it holds ``expected``; whether it did.  A full fence either way."""
        self.tried = None
        self._expected[0] = expected
        self._desired[0] = desired
        if self.process is not _process.current:
            raise _process.Forked
        self.tried = expected
        return bool(raw_compare_exchange(word, self._expected_pointer, self._desired_pointer))

    def seen(self) -> int:
        """What the word held when the latest exchange was carried out."""
        return self._expected[0]

    def succeeded(self) -> bool:
        """Whether the latest compare-exchange of this operand was carried out and took effect."""
        return self.tried is not None and self._expected[0] == self.tried

    def exchange(self, word: Pointer, desired: int) -> int:
        """Write ``desired`` into the word and return what was there.  A full fence."""
        self._desired[0] = desired
        if self.process is not _process.current:
            raise _process.Forked
        _raw_exchange(word, self._desired_pointer, self._expected_pointer)
        return self._expected[0]


_spare: list[Operand] = []


def borrow_operand() -> Operand:
    """An operand that nobody else uses.  What is not given back is lost, and no harm done."""
    try:
        operand = _spare.pop()
    except IndexError:
        operand = Operand()
    if operand.process is not _process.current:  # a child gave back what it had copied from its parent
        operand = Operand()
    operand.tried = None
    return operand


give_back: Callable[[Operand], None] = _spare.append
_process.refresh_in_child.append(_spare.clear)


def fence() -> None:
    """Order everything before it before everything after it: an exchange, on a word that nobody looks at.

    Two of them, where the exchange may be a load-acquire and a store-release: what comes after may slip in between those two,
    and so pass what came before; but no load-acquire passes an earlier store-release.
    """
    operand = borrow_operand()
    _raw_exchange(operand._expected_pointer, operand._desired_pointer, operand._desired_pointer)
    if IS_WEAK:
        _raw_exchange(operand._expected_pointer, operand._desired_pointer, operand._desired_pointer)
    give_back(operand)


#: What multiprocessing's locks are made of: it knows which thread of this process is in, and how often.
Door = Any


def make_door(address: int, *, recursive: bool) -> Door:
    """A word of shared memory as one process's door, OUTSIDE or INSIDE; ``acquire(False)`` and ``release()`` change it.

    Each is a full fence where IS_WEAK is false; else they are an acquire and a release.  It must not outlive the mapping.
    """
    kind = _RECURSIVE_MUTEX if recursive else _SEMAPHORE
    return SemLock._rebuild(address, kind, 1, None)


_RECURSIVE_MUTEX: Final = 0
_SEMAPHORE: Final = 1


@functools.cache
def has_doors() -> bool:
    """Whether the C library's semaphore is the word that `Door` takes it for."""
    if SemLock is None:
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as whole, whole.cast("Q") as view:
        anchor = ctypes.c_char.from_buffer(memory)
        door = make_door(ctypes.addressof(anchor), recursive=False)
        view[0], seen = SHUT, []
        seen.append((door.acquire(False), view[0]))
        view[0] = OUTSIDE
        for _ in range(2):
            seen.append((door.acquire(False), view[0]))
        door.release()
        seen.append((True, view[0]))
        del door, anchor
    return seen == [(False, SHUT), (True, INSIDE), (False, INSIDE), (True, OUTSIDE)]


class Words:
    """The words of one mapping.  Indices are words; ``pointers`` are call arguments for the functions above.

    A read-only mapping can be loaded from; everything else needs a writable one.
    """

    __slots__ = ("address", "view")

    def __init__(self, buffer: memoryview) -> None:
        whole = len(buffer) // WORD * WORD
        self.view = buffer[:whole].cast("B").cast("Q")
        self.address = 0
        if not buffer.readonly:
            anchor = ctypes.c_char.from_buffer(buffer)
            self.address = ctypes.addressof(anchor)
            del anchor

    @property
    def is_writable(self) -> bool:
        return bool(self.address)

    def pointer(self, index: int) -> Pointer:
        if not self.address or not 0 <= index < len(self.view):
            raise IndexError(f"no writable word {index}")
        return pointer(self.address + index * WORD)

    def load(self, index: int) -> int:
        return self.view[index]

    def store(self, index: int, value: int) -> None:
        """A plain store: not ordered before later loads of other words."""
        self.view[index] = value

    def compare_exchange(self, index: int, expected: int, desired: int) -> bool:
        operand = borrow_operand()
        done = operand.compare_exchange(self.pointer(index), expected, desired)
        give_back(operand)
        return done

    def raise_to(self, index: int, value: int) -> None:
        """Make the word at least ``value``."""
        for _ in range(1000):  # somebody may overwrite it all the time
            if (seen := self.view[index]) >= value or self.compare_exchange(index, seen, value):
                break

    def release(self) -> None:
        self.view.release()
