"""Two ways to put something between two steps of the real code: schedules and interrupts.

*Schedules.*  A `World` has a few processes that are none: each is a copy of the package of its own, with an identity
of its own, and all of them map the same arena.  Their threads are real, but one runs at a time: before each operation on
a shared word that the protocol depends on (and before a post, and when it goes to sleep) a thread asks which one is next.
`explore` runs a scenario again and again, depth first, until every schedule within the bound was run.

A schedule is a list of decisions.  Where the running thread could go on, switching to another one is a *preemption*, and
their number is bounded; where it cannot (asleep, finished, killed), all others are tried.  Further decisions: the running
process is killed here, the sleep of a thread is over (its poll interval or its deadline), a signal handler raises in it.

*Threads of one process.*  The interpreter switches threads when a function starts and when a call has returned: after an
operation, before what has come of it is noted.  There only other threads of that process are asked, since nobody else sees a
difference.

*Biased locks.*  A `_Door` is in the place of the C library's: its compare-exchanges of H are steps, and so is the look at the
lowest byte of W.  The interpreter doesn't switch threads between the look for the door and B1, nor from B2 to B3, so other
threads of that process must wait.  In a world with buffers the processor is a weak one.  What B3 writes stays in a store
buffer, where only its process sees it, for as long as it may: until that process makes a locked operation, sleeps or ends, or
anybody calls membarrier.  In a world without buffers it is out at once, and nobody calls membarrier.

What is not modelled: other stores that pass loads (every other operation takes effect at once), times between steps, and the
traceback of what a door raises.

*Interrupts.*  `Interrupt` makes a signal pending just before any chosen bytecode, by a trace function that is no Python
code.  CPython then delivers it where it would deliver it: it looks at signals only when a function starts, a call of
a C function returns, or a jump goes back.  So every place where a handler can run is reached, and no other.
"""

from __future__ import annotations
import __future__

import contextlib
import ctypes
import dis
import gc
import importlib
import inspect
import os
import signal
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import shlock

PACKAGE: Final = str(Path(shlock.__file__).parent)

Modules = dict[str, Any]


class Killed(BaseException):
    """Ends a thread whose schedule is over; whatever it still does has no effect on shared words."""


class Interrupted(BaseException):
    """What a signal handler raises."""


class ScheduleFailure(AssertionError):
    """A schedule after which a property does not hold."""


# -- schedules ------------------------------------------------------------------------------------------------------------

LONGEST_NAP = 0.001  # seconds; other sleeps are longer
READY, ASLEEP, DONE, DEAD = "ready", "asleep", "done", "dead"


class _Thread:
    """A real thread that runs one body for each schedule, and only while it has the baton."""

    def __init__(self, scheduler: Scheduler, number: int) -> None:
        self.scheduler = scheduler
        self.number = number
        self.baton = threading.Lock()
        self.baton.acquire()
        self.ended = threading.Lock()
        self.ended.acquire()
        self.prepare(lambda: None, 0, False)
        self.real = threading.Thread(target=self._run, daemon=True)
        self.real.start()

    def prepare(self, body: Callable[[], None], process: int, can_be_late: bool) -> None:
        self.body = body
        self.process = process
        self.can_be_late = can_be_late  # asleep, it wakes up at its deadline (or to poll)
        self.is_napping = False  # asleep, it wakes up by itself
        self.state = READY
        self.spot: int | None = None
        self.seconds = 0.0
        self.clock = 0.0
        self.raising: BaseException | None = None
        self.keeps_others_out = False  # it is about to do what no other thread of its process can come before
        self.is_among_its_own = False  # only another thread of its process can come before what it does next

    def _run(self) -> None:
        self.baton.acquire()
        while self.scheduler.open:
            scheduler = self.scheduler
            try:
                if scheduler.dooming:
                    raise Killed
                self.body()
            except Killed:
                pass
            except BaseException as error:
                scheduler.fail(f"thread {self.number}: {type(error).__name__}: {error}", error)
            if not scheduler.dooming:
                scheduler.on_pause(self.process)
                self.state = DONE
                scheduler.steps.append((self.number, "ended", ""))
                scheduler.hand_over(self)
            self.ended.release()
            self.baton.acquire()


@dataclass(frozen=True)
class Bound:
    """What a schedule may hold, at most."""

    preemptions: int
    kills: int = 0
    interruptions: int = 0
    polls: bool = False  # else nobody wakes up but by a token or at its deadline

    def __str__(self) -> str:
        parts = [f"{self.preemptions} preemptions"]
        parts += [f"{self.kills} kills"] if self.kills else []
        parts += [f"{self.interruptions} interruptions"] if self.interruptions else []
        return ", ".join(parts) + (", polling" if self.polls else ", no polling")


@dataclass
class _Choice:
    taken: int
    count: int


class Scheduler:
    """Runs the threads of one schedule, one at a time, and writes down which decisions there were."""

    MOST_STEPS = 4000
    MOST_POLLS_IN_VAIN = 60

    def __init__(self) -> None:
        self.open = True
        self.dooming = False
        self.by_ident: dict[int, _Thread] = {}
        self.pool: list[_Thread] = []
        self.threads: list[_Thread] = []
        self.over = threading.Lock()
        self.over.acquire()
        self.steps: list[tuple[int, str, Any]] = []
        self.tokens: dict[int, int] = {}
        self.ticks = 0
        self.on_pause: Callable[[int], None] = lambda process: None  # a thread of that process ends or goes to sleep

    def close(self) -> None:
        self.open = False
        for thread in self.pool:
            thread.baton.release()
            thread.real.join()

    # What the controlling thread calls.

    def run(
        self, bodies: Sequence[tuple[Callable[[], None], int, bool]], bound: Bound, choices: list[int],
        on_kill: Callable[[int], None], at_end: Callable[[], None],
    ) -> list[_Choice]:  # fmt: skip
        while len(self.pool) < len(bodies):
            thread = _Thread(self, len(self.pool))
            self.pool.append(thread)
            assert thread.real.ident is not None
            self.by_ident[thread.real.ident] = thread
        self.threads = self.pool[: len(bodies)]
        for thread, prepared in zip(self.threads, bodies, strict=True):
            thread.prepare(*prepared)
        self.bound, self.choices, self.made = bound, choices, []
        self.on_kill = on_kill
        self.preemptions = self.kills = self.interruptions = self.polls_in_vain = self.ticks = 0
        self.steps, self.tokens = [], {}
        self.failure: str | None = None
        self.cause: BaseException | None = None
        first = self._next(None)
        assert first is not None
        first.baton.release()
        self.over.acquire()
        stuck = [thread for thread in self.threads if thread.state in (READY, ASLEEP)]
        if self.failure is None and stuck:
            self.failure = f"nobody can go on, but {', '.join(f'{t.number} is {t.state}' for t in stuck)}"
        if self.failure is None:
            try:
                at_end()
            except AssertionError as error:
                self.failure, self.cause = f"at the end: {error}", error
        self.dooming = True
        try:
            for thread in self.threads:
                if thread.state is not DONE:
                    thread.baton.release()
                thread.ended.acquire()
        finally:
            self.dooming = False
        return self.made

    # What the running thread calls.

    def step(self, what: str, where: Any, *, alone: bool = False) -> None:
        """A thread is about to do something that others can see.  ``alone``: no other thread of its process can come before."""
        thread = self.by_ident.get(threading.get_ident())
        if thread is None:
            return
        if self.dooming:
            raise Killed
        thread.keeps_others_out = alone
        self.hand_over(thread)
        thread.keeps_others_out = False
        self.steps.append((thread.number, what, where))

    def can_switch(self) -> None:
        """A function starts or a call has returned: others of the thread's process may come in."""
        thread = self.by_ident.get(threading.get_ident())
        if thread is None or self.dooming:
            return
        if any(other.process == thread.process and other.state is not DONE for other in self.threads if other is not thread):
            thread.is_among_its_own = True
            self.hand_over(thread)
            thread.is_among_its_own = False

    def quiet(self) -> None:
        """A thread is about to do something that nobody's decision depends on."""
        if self.dooming and threading.get_ident() in self.by_ident:
            raise Killed

    def sleep(self, spot: int, seconds: float) -> None:
        thread = self.by_ident[threading.get_ident()]
        if self.dooming:
            raise Killed
        self.on_pause(thread.process)
        self.steps.append((thread.number, "sleeps", f"spot {spot}"))
        thread.state, thread.spot, thread.seconds = ASLEEP, spot, seconds
        thread.is_napping = seconds <= LONGEST_NAP
        self.hand_over(thread)
        error, thread.raising = thread.raising, None
        if error is not None:
            raise error

    def post(self, spot: int) -> None:
        self.step("posts", f"spot {spot}")
        self.tokens[spot] = self.tokens.get(spot, 0) + 1

    def clock(self) -> float:
        thread = self.by_ident.get(threading.get_ident())
        return 0.0 if thread is None else thread.clock

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    def fail(self, text: str, cause: BaseException | None = None) -> None:
        if self.failure is None and not self.dooming:
            self.failure, self.cause = text, cause

    def hand_over(self, thread: _Thread) -> None:
        """Decide who is next and, if it is another one, wait for the baton."""
        following = self._next(thread)
        if following is thread:
            return
        if following is None:
            self.over.release()
        else:
            following.baton.release()
        if thread.state is DONE:
            return  # its next body waits for the baton
        thread.baton.acquire()
        if self.dooming:
            raise Killed

    def _next(self, current: _Thread | None) -> _Thread | None:
        while True:
            if self.failure is not None or len(self.steps) > self.MOST_STEPS:
                self.fail("too many steps")
                return None
            options = self._options(current)
            if not options:
                return None
            option = self._choose(len(options))
            action, thread, cost = options[option]
            self.preemptions += cost
            if action == "kill":
                self.kills += 1
                self.steps.append((thread.number, "KILLED", ""))
                for other in self.threads:
                    if other.process == thread.process and other.state is not DONE:
                        other.state = DEAD
                self.on_kill(thread.process)
                continue
            if thread.state is ASLEEP:
                spot = thread.spot
                assert spot is not None
                if action == "time over":
                    thread.clock += thread.seconds
                    self.steps.append((thread.number, "time over", ""))
                elif action == "interrupt":
                    self.interruptions += 1
                    thread.raising = Interrupted()
                    self.steps.append((thread.number, "INTERRUPTED", ""))
                else:
                    self.tokens[spot] -= 1
                    self.polls_in_vain = 0
                thread.state = READY
            return thread

    def _options(self, current: _Thread | None) -> list[tuple[str, _Thread, int]]:
        bound = self.bound
        options: list[tuple[str, _Thread, int]] = []
        goes_on = current is not None and current.state is READY
        if goes_on:
            assert current is not None
            options.append(("run", current, 0))
        price = 1 if goes_on else 0
        busy = {thread.process: thread for thread in self.threads if thread.keeps_others_out and thread.state is READY}
        may_run = [thread for thread in self.threads if busy.get(thread.process, thread) is thread]
        if goes_on and current is not None and current.is_among_its_own:
            may_run = [thread for thread in may_run if thread.process == current.process]
        asleep = [thread for thread in may_run if thread.state is ASLEEP]
        if self.preemptions + price <= bound.preemptions:
            for thread in may_run:
                if thread is not current and thread.state is READY:
                    options.append(("run", thread, price))
            options += [("run", thread, price) for thread in asleep if self.tokens.get(thread.spot or 0)]
        nobody = not options
        for thread in sorted(asleep, key=lambda thread: not thread.is_napping):
            if not (thread.can_be_late or bound.polls or thread.is_napping):
                continue
            if nobody:
                options.append(("time over", thread, 0))
            elif self.preemptions + (late := 1 if bound.polls and not thread.is_napping else price) <= bound.preemptions:
                options.append(("time over", thread, late))
        if nobody and options:
            self.polls_in_vain += 1
            if self.polls_in_vain > self.MOST_POLLS_IN_VAIN:
                self.fail("everybody polls for ever")
                return []
            if bound.polls:
                del options[1:]  # nobody else can do anything: who looks first makes no difference but for the order
        can_be_killed = current is not None and current.state in (READY, ASLEEP) and not current.is_among_its_own
        if current is not None and can_be_killed and self.kills < bound.kills:
            options.append(("kill", current, 0))
        if self.interruptions < bound.interruptions:
            options += [("interrupt", thread, price) for thread in asleep if self.preemptions + price <= bound.preemptions]
        return options

    def _choose(self, count: int) -> int:
        position = len(self.made)
        taken = self.choices[position] if position < len(self.choices) else 0
        if taken >= count:
            self.fail(f"decision {position} has {count} options and had more before: the code is not deterministic")
            taken = 0
        self.made.append(_Choice(taken, count))
        return taken


class _View:
    """The words of one process: a memoryview whose accesses are steps."""

    def __init__(self, words: memoryview, scheduler: Scheduler, names: dict[int, str], buffer: dict[int, int]) -> None:
        self.words = words
        self.buffer = buffer  # words as only this process sees them
        self.scheduler = scheduler
        self.names = names

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Taken([self[i] for i in range(*index.indices(len(self.words)))])
        if index in self.names:
            self.scheduler.step("loads", self.names[index])
        else:
            self.scheduler.quiet()
        word: int = self.buffer[index] if index in self.buffer else self.words[index]
        return word

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(index, slice) and index in self.names:
            self.scheduler.step("stores", self.names[index])
        else:
            self.scheduler.quiet()
        self.words[index] = value


class _Bytes:
    """The bytes of one process's mapping; one that stands alone in a slice is the lowest one of a W."""

    def __init__(self, memory: memoryview, process: Process) -> None:
        self.memory = memory
        self.process = process

    def __getitem__(self, where: slice) -> Any:
        view = self.memory[where]
        return _Byte(where.start, self.process) if len(view) == 1 else view

    def __setitem__(self, where: slice, value: Any) -> None:
        self.memory[where] = value


class _Byte:
    """The lowest byte of W, of one process."""

    def __init__(self, place: int, process: Process) -> None:
        self.place = place
        self.process = process
        self.name = process.world.names.get(place // 8, f"byte {place}")

    def __getitem__(self, index: int) -> int:
        self.process.world.scheduler.step("loads the lowest byte of", self.name)
        return self.process.memory[self.place]


class _Door:
    """A `SemLock` on an H of one process, as far as shlock uses it."""

    def __init__(self, place: int, process: Process, recursive: bool) -> None:
        self.place = place
        self.process = process
        self.recursive = recursive
        self.thread = self.count = 0
        self.name = process.world.names[place]

    def _is_mine(self) -> bool:
        return self.count > 0 and self.thread == threading.get_ident()

    def _count(self) -> int:
        return self.count

    def acquire(self, block: bool) -> bool:
        assert not block
        if self.recursive and self._is_mine():
            self.count += 1
            return True
        at, words, scheduler = self.process.world.at, self.process.words, self.process.world.scheduler
        scheduler.step("tries", self.name, alone=True)
        self.process.drain()
        is_in: bool = words[self.place] == at.OUTSIDE
        if is_in:
            words[self.place] = at.INSIDE
            self.thread = threading.get_ident()
            self.count += 1
        scheduler.can_switch()
        return is_in

    def release(self) -> None:
        at, world = self.process.world.at, self.process.world
        if self.recursive:
            assert self._is_mine(), "attempt to release recursive lock not owned by thread"
            if self.count > 1:
                self.count -= 1
                return
        world.scheduler.step("posts", self.name, alone=True)
        self.process.drain()
        assert self.process.words[self.place] == at.INSIDE, f"{self.name} is not INSIDE, and is posted"
        self.process.buffer[self.place] = at.OUTSIDE
        if not world.has_buffers:
            self.process.drain()
        self.count -= 1


class _Taken(list[int]):
    def tolist(self) -> list[int]:
        return list(self)


class _NoSemaphore:
    def __init__(self, name: str) -> None:
        pass


def _load_package() -> Modules:
    """A second, third, ... copy of the package."""

    def take_out() -> Modules:
        names = [name for name in sys.modules if name == "shlock" or name.startswith("shlock.")]
        return {name: sys.modules.pop(name) for name in names}

    first = take_out()
    try:
        importlib.import_module("shlock")
        return {name.removeprefix("shlock").removeprefix("."): module for name, module in take_out().items()}
    finally:
        sys.modules.update(first)


class Process:
    """A process that is none: a copy of the package with an identity of its own."""

    def __init__(self, number: int, world: World) -> None:
        self.number = number
        self.world = world
        self.modules = modules = _load_package()
        scheduler, process, owned = world.scheduler, modules["_process"], modules["_owned"]
        self.word = process.make_word(100_000 + number, 1_000 + number)
        process.current = process.ProcessIdentity(100_000 + number, self.word)
        process.identity_cell.value = self.word
        process.is_alive = world.is_alive
        process.MOST_INTERRUPTIONS = 1  # who is killed need not be as stubborn as one who is interrupted
        modules["_biased_path"].ATTEMPTS = range(1)
        modules["_arena"].SPOTS = 6
        system = modules["_sys"].SYSTEM
        system.monotonic, system.monotonic_ns = scheduler.clock, scheduler.tick
        system.create_semaphore = lambda name: None
        system.usable_cores = lambda: 1
        owned._cores = (float("inf"), 1)  # one look before going to sleep
        owned.LONGEST_INSISTENCE = 0
        owned.warnings = types.SimpleNamespace(warn=lambda warning, stacklevel: world.tell(number))
        parking = modules["_parking"]
        parking.posix_ipc = types.SimpleNamespace(
            Semaphore=_NoSemaphore, BusyError=OSError, SignalError=OSError, ExistentialError=OSError
        )
        parking.MOST_NAPS = 2  # one nap; then it marks the word, and waits again
        parking.Parking._sleep = lambda self, spot, seconds: scheduler.sleep(spot.index, seconds)
        parking.Parking._post = lambda self, index: scheduler.post(index)
        parking.Parking._start_janitor = lambda self: None
        del parking.Spot.__del__
        atomic = modules["_atomic"]
        place_of: dict[Any, int] = {}
        make_pointer = atomic.Words.pointer

        def pointer(words: Any, index: int) -> Any:
            made = make_pointer(words, index)
            place_of[made] = index
            return made

        atomic.Words.pointer = pointer
        names = world.names
        self.buffer: dict[int, int] = {}  # what it has posted, and nobody else sees
        system.register_membarrier = lambda: True
        system.membarrier = world.membarrier
        bias = modules["_bias"]
        bias.has_doors, bias.IS_WEAK, bias.make_door = lambda: True, world.has_buffers, self.make_door

        def stepping(real: Callable[..., Any], what: str) -> Callable[..., Any]:
            def call(word: Any, first: Any, second: Any) -> Any:
                place = place_of[word]
                if place in names:
                    scheduler.step(what, names[place])
                else:
                    scheduler.quiet()
                self.drain()
                result = real(word, first, second)
                if place in names:
                    scheduler.can_switch()
                return result

            return call

        compare_exchange = stepping(atomic.raw_compare_exchange, "compare-exchanges")
        atomic.raw_compare_exchange = modules["_fast_path"].raw_compare_exchange = compare_exchange
        atomic._raw_exchange = stepping(atomic._raw_exchange, "exchanges")
        if number == 0:
            self.arena = modules["_arena"].Arena.create(16)
        else:
            fd = os.dup(world.processes[0].arena.segment.fd)
            self.arena = modules["_arena"].Arena.over(modules["_segment"].Segment(fd))
        self.memory, self.words = self.arena.segment.memory, self.arena.words.view
        bytes_of_it = _Bytes(self.memory, self)
        type(self.arena.segment).memory = property(lambda segment: bytes_of_it)
        self.arena.words.view = _View(self.words, scheduler, names, self.buffer)
        self.blocks: list[Any] = []

    def make_door(self, address: int, *, recursive: bool) -> _Door:
        return _Door((address - self.arena.words.address) // self.modules["_layout"].WORD, self, recursive)

    def drain(self) -> None:
        """What it has posted gets visible to all."""
        for place, value in self.buffer.items():
            self.words[place] = value
        self.buffer.clear()

    def reset(self) -> None:
        """As it was before its first schedule."""
        self.buffer.clear()
        self.modules["_bias"]._claims.clear()
        owned, parking = self.modules["_owned"], self.modules["_parking"]
        owned._in_child()
        self.arena.parking = None
        for block in self.blocks:
            block.local = None
        place = parking.parking_of(self.arena)
        for _ in range(self.world.spots_each):
            place.pool.append(place._claim())

    def primitive(self, kind: str, block: int, state: Any = None) -> Any:
        """The Lock, Event, ... in that block, as this process sees it."""
        cls = getattr(self.modules["synchronize"], kind)
        made = cls.__new__(cls)
        made._bind(self.blocks[block])
        made._restore(state)
        return made


class World:
    """Some processes, the blocks that they share, and what happened to them in the present schedule."""

    def __init__(
        self, processes: int, *kinds: str, parameter: int = 0, first_word: int = 0, spots_each: int = 1,
        has_buffers: bool = False,
    ) -> None:  # fmt: skip
        self.scheduler = Scheduler()
        self.names: dict[int, str] = {}  # words whose accesses are steps
        self.told: list[int] = []
        self.inside: set[int] = set()
        self.dead: set[int] = set()
        self.died_inside: list[bool] = []
        self.told_after_death = 0
        self.may_have_died_inside = False  # on its way in or out by the biased path: nobody can tell
        self.spots_each = spots_each
        self.has_buffers = has_buffers
        self.scheduler.on_pause = lambda number: self.processes[number].drain()
        self.processes: list[Process] = []
        for number in range(processes):
            self.processes.append(Process(number, self))
        first = self.processes[0]
        at, arena = first.modules["_layout"], first.arena
        self.memory = arena.words.view.words
        self.layout = arena.layout
        self.at = at
        self.starts: list[tuple[int, int]] = []
        for number, kind in enumerate(kinds):
            code = at.KIND_NAMES.index(kind)
            cells = parameter if code == at.BARRIER else 0
            declaration = first.modules["_arena"].Declaration(code, first_word, parameter, cells)
            index = arena.take_block() or arena.take_block()
            arena.declare(index, declaration, [])
            self.starts.append((self.layout.block(index), first_word))
            name = kind if kinds.count(kind) == 1 else f"{kind} {number}"
            self.names[self.layout.block(index) + at.BLOCK_WORD] = name
            if code in (at.LOCK, at.RLOCK):
                claims, holds = at.bias_words(code)
                for slot in range(at.bias_slots(code)):
                    self.names[self.layout.block(index) + holds + slot] = f"H {slot} of {name}"
                    self.names[self.layout.block(index) + claims + slot] = f"slot {slot} of {name}"
            for cell in range(cells):
                self.names[self.layout.block(index) + at.BLOCK_CELLS + cell] = f"party {cell}"
            for process in self.processes:
                block = process.arena.block(index)
                block.exported = True
                process.blocks.append(block)
        for spot in range(self.layout.spots):
            self.names[self.layout.spot(at.SPOT_STATE, spot)] = f"S {spot}"

    def close(self) -> None:
        self.scheduler.close()

    def membarrier(self) -> bool:
        assert self.has_buffers, "membarrier is called where a release is a full fence"
        self.scheduler.step("calls", "membarrier")
        for process in self.processes:
            process.drain()
        return True

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def is_alive(self, word: int) -> bool:
        return all(word & self.at.OWNER != self.processes[number].word for number in self.dead)

    def reset(self) -> None:
        self.told, self.inside, self.dead, self.died_inside, self.told_after_death = [], set(), set(), [], 0
        self.may_have_died_inside = False
        for start, first_word in self.starts:
            for place in (self.at.BLOCK_DEAD, self.at.BLOCK_FOUND, self.at.BLOCK_SINCE):
                self.memory[start + place] = 0
            for cell in range(self.at.BLOCK_CELL_COUNT):
                self.memory[start + self.at.BLOCK_CELLS + cell] = 0
            self.memory[start] = first_word
        spots = self.layout.spot(self.at.SPOT_STATE, 0)
        for place in range(spots, spots + self.at.SPOT_ARRAYS * self.layout.spots):
            self.memory[place] = 0
        for process in self.processes:
            process.reset()

    def kill(self, process: int) -> None:
        """The scheduler killed that process."""
        self.processes[process].drain()
        self.dead.add(process)
        self.inside.discard(process)
        inside = self.ordinary() & self.at.OWNER == self.processes[process].word
        if not inside and self.is_being_revoked_from(process):  # who revokes may have looked at its H while it was inside
            self.may_have_died_inside = True
            self.told_after_death = 0
            return
        self.died_inside.append(inside)
        if inside:
            self.told_after_death = 0

    def tell(self, process: int) -> None:
        """That process, as an heir, was told that somebody died inside."""
        self.told.append(process)
        self.told_after_death += 1

    def word(self, block: int = 0) -> int:
        """W of a block, seen without a step."""
        return self.memory[self.starts[block][0]]

    def ordinary(self, block: int = 0) -> int:
        """The ordinary word that says the same as W."""
        arena = self.processes[0].arena
        start = arena.layout.block(self.processes[0].blocks[block].index)
        word: int = self.processes[0].modules["_bias"].ordinary(self.memory, start, self.word(block))
        return word

    def is_being_revoked_from(self, process: int) -> bool:
        """Whether somebody has begun to revoke that process's bias, and not yet decided whether it is inside."""
        w, at = self.word(), self.at
        if w & at.REVOKED != at.REVOKING:
            return False
        return self.memory[self.starts[0][0] + at.BLOCK_BIASES + at.slot_in(w)] == self.processes[process].word

    def visit(self, who: int) -> None:
        """What the lock guards: one at a time."""
        others = self.inside - {who}
        assert not others, f"{who} is inside together with {others}"
        self.inside.add(who)
        self.scheduler.step("is", "inside")
        assert self.inside == {who}, f"{self.inside} are inside together"
        self.inside.discard(who)

    def spots_in_use(self) -> list[int]:
        """Spots of the living that are not IDLE."""
        at = self.at
        return [
            spot
            for spot in range(self.layout.spots)
            if self.memory[self.layout.spot(at.SPOT_STATE, spot)] & at.STATE
            and self.is_alive(self.memory[self.layout.spot(at.SPOT_CLAIM, spot)])
        ]


@dataclass
class Scenario:
    """What is run under every schedule: `start` makes everything new and returns the threads."""

    world: World
    start: Callable[[], list[tuple[Callable[[], None], int, bool]]]
    at_end: Callable[[], None] = field(default=lambda: None)


def explore(scenario: Scenario, bound: Bound, most: int = 1_000_000) -> int:
    """Run every schedule within the bound; how many there were.  ScheduleFailure with its steps if one fails."""
    world = scenario.world
    choices: list[int] = []
    count = 0
    while True:
        world.reset()
        made = world.scheduler.run(scenario.start(), bound, choices, world.kill, scenario.at_end)
        count += 1
        if world.scheduler.failure is not None:
            steps = "\n".join(f"    {number}  {what} {where}" for number, what, where in world.scheduler.steps[-200:])
            raise ScheduleFailure(
                f"schedule {count} (decisions {[choice.taken for choice in made]}): {world.scheduler.failure}\n{steps}"
            ) from world.scheduler.cause
        assert count <= most, f"more than {most} schedules"
        while made and made[-1].taken + 1 >= made[-1].count:
            made.pop()
        if not made:
            return count
        choices = [choice.taken for choice in made]
        choices[-1] += 1


@contextlib.contextmanager
def mutated(world: World, where: str, old: str, new: str) -> Iterator[None]:
    """All processes of the world run `where` (module.function or module.Class.method) with `old` replaced by `new`."""
    module_name, *path = where.split(".")
    undo = []
    for process in world.processes:
        holder: Any = process.modules[module_name]
        for name in path[:-1]:
            holder = getattr(holder, name)
        name = path[-1]
        real = getattr(holder, name)
        source = textwrap.dedent(inspect.getsource(real))
        assert source.count(old) == 1, f"{where} has {source.count(old)} times {old!r}"
        code = compile(source.replace(old, new), real.__code__.co_filename, "exec", __future__.annotations.compiler_flag, True)
        made: dict[str, Any] = {}
        exec(code, real.__globals__, made)
        holders = [holder] if len(path) > 1 else [m for m in process.modules.values() if getattr(m, name, None) is real]
        for one in holders:
            setattr(one, name, made[name])
            undo.append((one, name, real))
    try:
        yield
    finally:
        for holder, name, real in undo:
            setattr(holder, name, real)


# -- interrupts -----------------------------------------------------------------------------------------------------------

#: A trace function that makes SIGINT pending and is no Python code, so that the signal isn't noticed in the function itself.
_make_pending = ctypes.PYFUNCTYPE(None, ctypes.py_object, ctypes.py_object, ctypes.py_object)(
    ("PyErr_SetInterrupt", ctypes.pythonapi)
)


def _looks_at_signals(code: types.CodeType, offset: int) -> bool:
    """Whether the instruction there ends with a look at pending signals (CPython 3.11 to 3.13)."""
    name = dis.opname[code.co_code[offset]]
    return name.startswith(("CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD"))


def is_in_package(frame: types.FrameType | None) -> bool:
    """Whether a frame runs code of the package."""
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)


def is_at_entry(frame: types.FrameType) -> bool:
    """Whether a handler that runs in this frame comes at the very start of a function of the package.

    A function that only calls another one (an `__exit__` that is no more than a release) has done nothing either.
    """
    if dis.opname[frame.f_code.co_code[frame.f_lasti]] != "RESUME":
        return False
    outer = frame.f_back
    while outer is not None and is_in_package(outer):
        if outer.f_code.co_name not in ("__exit__", "__enter__", "release_own", "leave_own"):
            return False
        outer = outer.f_back
    return True


@dataclass
class Interruption:
    """What one run with a signal came to."""

    where: str = "nowhere"  # the function and instruction at which the handler ran
    raised: bool = False  # what the handler raised came out of the operation
    at_entry: bool = False  # it ran before the operation had done anything


class Interrupt:
    """Runs an operation once for every place where a signal can be handled in the package's code that it runs.

    `operation` is called by `run(position)`; just there, SIGINT becomes pending, and CPython handles it as soon as
    it looks.  `act` is the handler: by default it raises Interrupted.
    """

    def __init__(self, act: Callable[[], None] | None = None) -> None:
        self.act = act or self._raise

    @staticmethod
    def _raise() -> None:
        raise Interrupted

    def positions(self, operation: Callable[[], object]) -> list[int]:
        """The bytecodes just before those that look at signals, in the order in which one run executes them."""
        found: list[int] = []
        last: dict[Any, int] = {}
        count = 0

        def local(frame: Any, event: str, argument: object) -> Any:
            nonlocal count
            if event == "opcode":
                count += 1
                if frame in last and _looks_at_signals(frame.f_code, frame.f_lasti):
                    found.append(last[frame])
                last[frame] = count
            return local

        self._trace(operation, local)
        return sorted(found)

    def run(self, operation: Callable[[], object], position: int) -> Interruption:
        outcome = Interruption()
        count = 0
        fired = False

        def local(frame: Any, event: str, argument: object) -> Any:
            nonlocal count
            if event == "opcode":
                count += 1
                if count == position:
                    return _make_pending  # at the next event in this frame
            return local

        def handler(number: int, frame: Any) -> None:
            nonlocal fired
            sys.settrace(None)
            if fired:
                return
            fired = True
            if is_in_package(frame):
                instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]]
                outcome.at_entry = is_at_entry(frame)
                outcome.where = f"{frame.f_code.co_qualname}+{frame.f_lasti} ({instruction})"
                self.act()

        before = signal.signal(signal.SIGINT, handler)
        try:
            self._trace(operation, local)
        except Interrupted:
            outcome.raised = True
        finally:
            signal.signal(signal.SIGINT, before)
        return outcome

    @staticmethod
    def _trace(operation: Callable[[], object], local: Callable[..., Any]) -> None:
        def called(frame: Any, event: str, argument: object) -> Any:
            if frame.f_code.co_filename.startswith(PACKAGE):
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
                return local
            return None

        before = sys.gettrace()
        collects = gc.isenabled()
        gc.disable()  # a finalizer of something else is no part of the operation
        sys.settrace(called)
        try:
            operation()
        finally:
            sys.settrace(before)
            if collects:
                gc.enable()
