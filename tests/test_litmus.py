"""A litmus test of the biased path: without its membarrier the real code, on a real processor, lets two processes in at once.

The owner stores H (B1) and loads W (B2); a revoker exchanges W (V0) and loads H (V2).  Both get in if H is still in the store
buffer of the owner's processor when the revoker looks.  From V0 to V2 Python takes half a us, a store a tenth of that; so left
to itself this happens next to never, and a test that waits for it proves nothing.

Here the store buffer is slow.  The owner's H and W are read and written by a few lines of C in the place of two memoryviews.
Before H they store into lines that they have just flushed out of all caches.  A store buffer is emptied in order, so H waits
for main memory, several times over, while the load of W goes ahead; just as it may by the rules of x86-64 with any store.
Everything else is the code as it is: the bytecodes of acquire() and release(), the words in shared memory, the system call.

Each round both sides try once, at about the same time, and tell each other in shared words whether they are inside.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import Child, Page

import shlock
from shlock import _bias, _sys
from shlock import _layout as at

ROUNDS = 5_000
MOST_ROUNDS = 400_000
ENOUGH = 10  # rounds with both inside
MOST_LINES = 16
LONGEST_DELAY = 300  # turns of an empty loop: the revoker's, which has a longer way than the owner's
TRYING, TRIED, OVER, GOES_ON = range(0, 32, 8)  # words of each side, on cache lines of their own
SIDE = 32

SLOW_BYTES = """
    #include <immintrin.h>

    extern void *PyLong_FromLong(long);
    volatile unsigned char *h, *w;   /* H, and the lowest byte of W */
    int lines;
    static _Alignas(64) volatile char line[16][64];

    int store(void *self, const void *index, const void *value)
    {
        const int is_in = value == PyLong_FromLong(1);   /* there is one object of each small number */
        for (int n = 0; is_in && n < lines; n++) {
            line[n][0] = 1;
            _mm_clflushopt((void *)line[n]);
            line[n][0] = 2;
        }
        *h = is_in;
        return 0;
    }

    void *load(void *self, const void *index)
    {
        return PyLong_FromLong(*w);
    }
"""


class _Slot(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("function", ctypes.c_void_p))


class _Spec(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("size", ctypes.c_int),
        ("item_size", ctypes.c_int),
        ("flags", ctypes.c_uint),
        ("slots", ctypes.POINTER(_Slot)),
    )


ASS_SUBSCRIPT, SUBSCRIPT = 3, 5  # numbers of the stable ABI


class SlowBytes:
    """What stands in the place of H and W for the owner: ``bytes[0] = h`` stores H, slowly, and ``bytes[0]`` loads W."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "slow.c", folder / "slow.so"
        source.write_text(SLOW_BYTES)
        subprocess.run(["cc", "-O1", "-mclflushopt", "-shared", "-fPIC", "-o", library, source], check=True)
        self.library = ctypes.CDLL(str(library))
        functions = [(ASS_SUBSCRIPT, self.library.store), (SUBSCRIPT, self.library.load)]
        addresses = [(number, ctypes.cast(function, ctypes.c_void_p).value) for number, function in functions]
        slots = (_Slot * 3)(*(_Slot(*slot) for slot in addresses), _Slot(0, None))
        make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p)(("PyType_FromSpec", ctypes.pythonapi))
        self.spec = _Spec(b"litmus.SlowBytes", object.__basicsize__, 0, 0, slots)
        self.bytes = make(ctypes.addressof(self.spec))()

    def replace_those_of(self, words: Any) -> None:
        """Of a lock that has just been biased to this process."""
        memory, block = words.block.arena.words.address, words.block.start
        h, w = block + at.BLOCK_HOLDS, words.places[0][0]
        ctypes.c_void_p.in_dll(self.library, "h").value = memory + at.WORD * h + at.byte_of(words.slot)
        ctypes.c_void_p.in_dll(self.library, "w").value = memory + at.WORD * w + at.byte_of(0)
        words.held.cell_contents = words.lowest.cell_contents = self.bytes

    def slow_down(self, lines: int) -> None:
        ctypes.c_int.in_dll(self.library, "lines").value = lines


def compete(number: int, lock: Any, page: Page, processor: int, slow: SlowBytes, most_rounds: int, enough: int) -> list[int]:
    """One of the two sides, 0 the owner, 1 the revoker: rounds, how often this side was inside, and how often both were."""
    os.sched_setaffinity(0, {processor})
    words, mine, other = lock._words, SIDE * number, SIDE * (1 - number)
    is_owner = number == 0
    _bias._chosen = "always" if is_owner else "never"  # type: ignore[misc]
    words.limit = words.credit.cell_contents = 0 if is_owner else _bias.NEVER
    delays = [range(n) for n in range(LONGEST_DELAY)]
    no_delay = delays[0]
    inside = both = rounds = 0
    while rounds < most_rounds and both < enough:
        rounds += 1
        while is_owner and words.seat.cell_contents != 0:
            lock.acquire()
            lock.release()
        if is_owner and words.held.cell_contents is not slow.bytes:
            slow.replace_those_of(words)
        slow.slow_down(rounds % MOST_LINES)
        delay = no_delay if is_owner else delays[7 * rounds % LONGEST_DELAY]
        page[TRYING + mine] = rounds
        while page[TRYING + other] < rounds:
            pass
        for _ in delay:
            pass
        got = lock.acquire(False)
        page[TRIED + mine] = 2 * rounds + got
        while (tried := page[TRIED + other]) < 2 * rounds:
            pass
        inside += got
        both += got and tried & 1
        page[OVER + mine] = rounds
        while page[OVER + other] < rounds:
            pass
        if got:
            lock.release()
        page[GOES_ON + mine] = rounds
        while page[GOES_ON + other] < rounds:
            pass
    return [rounds, inside, both]


@pytest.fixture
def slow(tmp_path: Path) -> SlowBytes:
    if " clflushopt " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor cannot flush a line without waiting for it")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    return SlowBytes(tmp_path)


def run_both(slow: SlowBytes, most_rounds: int, enough: int) -> tuple[int, int, int, int]:
    """Rounds, how often the owner and the revoker were inside, and how often both were."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        pytest.skip("there is one processor only")
    lock, page = shlock.Lock(), Page(2 * SIDE)
    sides = [Child(compete, number, lock, page, processors[number], slow, most_rounds, enough) for number in (0, 1)]
    (rounds, owner, both), (_, revoker, both_again) = (side.result(170.0) for side in sides)
    print(f"{rounds} rounds: the owner was inside {owner} times, the revoker {revoker} times, both {both} times")
    assert both == both_again
    return rounds, owner, revoker, both


@pytest.mark.patience(180)
def test_with_the_membarrier_exactly_one_gets_in_however_slow_the_store_buffer_is(slow: SlowBytes) -> None:
    rounds, owner, revoker, both = run_both(slow, ROUNDS, 1)
    assert both == 0
    assert owner + revoker == rounds == ROUNDS


@pytest.mark.patience(180)
def test_without_the_membarrier_both_get_in(slow: SlowBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sys.SYSTEM, "membarrier", lambda *, registered=True: True)
    assert run_both(slow, MOST_ROUNDS, ENOUGH)[3] == ENOUGH
