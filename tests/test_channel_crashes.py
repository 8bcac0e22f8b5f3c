"""Producers and consumers of a channel are killed at every step: nothing torn, nothing lost, nothing twice, all others finish.

Every message has a number and a checksum.  What the victim has sent or taken is what TAIL and HEAD say, which nobody else moved
in its direction; what the others must see follows from that.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import random
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support import PATIENCE, Child, DieAtLabel, DieAtOperation, Page, Step, _WatchedView, end_children, eventually, watch_steps
from test_channel import Big, assert_usable, locks_of

from shlock import Channel, Pipe, _parking, _ring, _sys

pytestmark = pytest.mark.patience(120)
SIZE = 20_000
OTHERS = (0, 1, 3)
MOST_STEPS = 400

# -- messages -------------------------------------------------------------------------------------------------------------

HEAD = struct.Struct("<4sIII")  # mark, number, length of the rest, checksum


def message(number: int, length: int) -> bytes:
    rest = random.Random(number).randbytes(max(0, length - HEAD.size))
    return HEAD.pack(b"MSG!", number, len(rest), zlib.crc32(rest, number)) + rest


def number_of(data: Any) -> int:
    """The number of a message.  AssertionError if it is torn."""
    if bytes(data[:4]) != b"MSG!":
        data = pickle.loads(data)
    mark, number, length, checksum = HEAD.unpack_from(data)
    assert mark == b"MSG!"
    assert length == len(data) - HEAD.size, "torn: a part is missing"
    assert zlib.crc32(data[HEAD.size :], number) == checksum, "torn: the bytes are others"
    return int(number)


def receive(channel: Any) -> int:
    return number_of(channel.recv_bytes(timeout=PATIENCE))


def drain(channel: Any) -> list[int]:
    found = []
    while channel.qsize() if isinstance(channel, Channel) else not channel._in.is_empty():
        found.append(receive(channel))
    return found


def sent(channel: Any) -> int:
    """How many messages have been sent from this end, ever."""
    return int(channel._out.view[channel._out.tail] >> _ring.COUNT_SHIFT)


def taken(channel: Any) -> int:
    """How many messages have been taken at this end, ever."""
    return int(channel._in.view[channel._in.head] >> _ring.COUNT_SHIFT)


# -- what a victim does ---------------------------------------------------------------------------------------------------

SMALL, LARGE, MANY = 500, 9000, 12


def reserve(channel: Any, numbers: list[int]) -> None:
    data = message(numbers[0], LARGE)
    with channel.reserve(LARGE) as view:
        view[:] = data


def reserve_too_much(channel: Any, numbers: list[int]) -> None:
    data = message(numbers[0], SMALL)
    reservation = channel.reserve(LARGE)
    with reservation as view:
        view[:SMALL] = data
        reservation.truncate(SMALL)


def reserve_and_keep(channel: Any, numbers: list[int]) -> None:
    data = message(numbers[0], SMALL)
    with channel.reserve(SMALL) as view:
        view[:] = data
        kept.append(view[1:])


kept: list[Any] = []

SENDS: dict[str, tuple[Callable[[Any, list[int]], Any], int]] = {
    "send_bytes": (lambda channel, numbers: channel.send_bytes(message(numbers[0], SMALL)), 1),
    "send_bytes, large": (lambda channel, numbers: channel.send_bytes(message(numbers[0], LARGE)), 1),
    "send": (lambda channel, numbers: channel.send(Big(bytearray(message(numbers[0], LARGE)))), 1),
    "send with a timeout": (lambda channel, numbers: channel.send_bytes(message(numbers[0], LARGE), timeout=PATIENCE), 1),
    "send_many": (lambda channel, numbers: channel.send_many([message(number, 900) for number in numbers]), MANY),
    "reserve": (reserve, 1),
    "reserve too much": (reserve_too_much, 1),
    "reserve and keep": (reserve_and_keep, 1),
}


def peek(channel: Any) -> None:
    with channel.peek() as view:
        number_of(view)


TAKES: dict[str, Callable[[Any], Any]] = {
    "recv_bytes": lambda channel: channel.recv_bytes(),
    "recv_bytes with a timeout": lambda channel: channel.recv_bytes(timeout=PATIENCE),
    "recv_many": lambda channel: channel.recv_many(MANY),
    "peek": peek,
}

WRITE, STORED, CHUNKS = "C30 bytes written", "C31 TAIL stored", "C32 chunks taken, link written"
READ, MOVED = "C33 bytes read", "C34 HEAD stored"
LEAVING = ("C35 HEAD stored, chunks USED", "C35 chunks LEFT, INTENT closed")
CLOSED = "C36 end closed, not said"  # see test_pipe

#: Of each operation: crash points that the victim reaches in an empty ring, and those of one that takes from a full one.
SEND_LABELS = {name: (WRITE, STORED, *([CHUNKS] if name not in ("send_bytes", "reserve and keep") else [])) for name in SENDS}
TAKE_LABELS = dict.fromkeys(TAKES, (READ, MOVED, *LEAVING))
LABELS = {WRITE, STORED, CHUNKS, READ, MOVED, *LEAVING, CLOSED}
IS_DONE = {STORED, MOVED, *LEAVING}

# -- the stage ------------------------------------------------------------------------------------------------------------

READY, GO, AWAKE = range(3)


@dataclass
class Outcome:
    killed: bool
    passed: list[str]


class Stage:
    """A channel, a victim with a way to die, and others."""

    def __init__(self, step: Step, others: int, make: Callable[[], tuple[Any, Any]]) -> None:
        self.step = step
        self.others = others
        self.near, self.far = make()
        self.page = Page()

    def start(self, channel: Any, operation: Callable[[Any], Any]) -> Child:
        page, step = self.page, self.step

        class Progress(type(step)):  # type: ignore[misc]
            def label(self, label: str) -> None:
                page[AWAKE] += label == "A6 awake"
                super().label(label)

        def body() -> list[str]:
            page[READY] = 1
            eventually(lambda: page[GO])
            step.__class__ = Progress
            watch_steps(step, *locks_of(channel))
            if step.wants_operations:
                for end in (channel._out, channel._in):
                    end.view, end.table = _WatchedView(end.view, step), _WatchedView(end.table, step)
            operation(channel)
            return step.passed

        self.victim = Child(body)
        eventually(lambda: page[READY])
        return self.victim

    def go(self) -> None:
        self.page[GO] = 1

    def until_over_or_asleep(self) -> None:
        eventually(lambda: not self.victim.is_alive() or self.page[AWAKE] >= 2)

    def end(self) -> Outcome:
        killed = self.victim.wait() == -signal.SIGKILL
        return Outcome(killed, [] if killed else self.victim.result())

    def parked(self, children: list[Child], end: Any, block: Any) -> None:
        pids = {child.pid for child in children}

        def all_wait() -> bool:
            for child in children:
                assert child.is_alive(), f"it did not wait, but ended with {child.result()}"
            return pids <= {_sys_pid(claim) for claim, _, _ in end.parking.waiting(block.index)}

        eventually(all_wait, "all of them are parked")

    def check_usable(self) -> None:
        """Nothing is held, nothing is lost: the longest message goes through, both ways, more than once."""
        for one, two in ((self.near, self.far), (self.far, self.near)):
            for number in range(4):
                data = message(number, min(one._out.longest, 1_000_000))
                one.send_bytes(data, timeout=PATIENCE)
                assert receive(two) == number
            table = one._out.table.tobytes()
            assert table.count(_ring.USED) <= 2 + one._out.geometry.longest // one._out.chunk * one._out.geometry.is_lazy
            assert _ring.LEFT not in table
        if isinstance(self.near, Channel):
            assert_usable(self.near, self.far)


def _sys_pid(claim: int) -> int:
    from shlock import _process

    return _process.pid_of(claim)


def channels() -> tuple[Channel, Channel]:
    channel = Channel(size=SIZE)
    return channel, channel.other_end()


def fill(channel: Any, length: int = 700) -> int:
    """Send numbered messages until there is no room for one more of that length; how many."""
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            channel.send_bytes(message(count, length), timeout=0)
            count += 1
    return count


# -- scenarios ------------------------------------------------------------------------------------------------------------


def send_to_waiting_consumers(stage: Stage, name: str) -> Outcome:
    """The others wait for messages; the victim sends some."""
    operation, count = SENDS[name]
    numbers = list(range(1000, 1000 + count))
    consumers = [Child(receive, stage.far) for _ in range(stage.others)]
    stage.parked(consumers, stage.far._in, stage.far._in.readable_block)
    stage.start(stage.near, lambda channel: operation(channel, numbers))
    stage.go()
    outcome = stage.end()
    of_victim = numbers[: sent(stage.near)]
    assert outcome.killed or of_victim == numbers
    fillers = list(range(2000, 2000 + stage.others))
    for number in fillers:
        stage.near.send_bytes(message(number, SMALL), timeout=PATIENCE)
    got = [child.result() for child in consumers] + drain(stage.far)
    assert sorted(got) == sorted(of_victim + fillers)
    stage.sent_by_victim = len(of_victim)  # type: ignore[attr-defined]
    return outcome


def send_into_a_full_one(stage: Stage, name: str) -> Outcome:
    """The others wait for room, and so does the victim, behind or before them."""
    operation, count = SENDS[name]
    numbers = list(range(1000, 1000 + count))
    filled = fill(stage.near)
    of_others = list(range(2000, 2000 + stage.others))
    producers = [Child(stage.near.send_bytes, message(number, 700 + 3000 * (number % 2))) for number in of_others]
    stage.parked(producers, stage.near._out, stage.near._out.writable_block)
    stage.start(stage.near, lambda channel: operation(channel, numbers))
    stage.go()
    stage.until_over_or_asleep()
    got: list[int] = []
    give_up = time.monotonic() + PATIENCE
    while stage.victim.is_alive() or any(child.is_alive() for child in producers):
        assert time.monotonic() < give_up, "somebody hangs"
        got += drain(stage.far)
        time.sleep(0.0005)
    for child in producers:
        child.result()
    outcome = stage.end()
    got += drain(stage.far)
    of_victim = numbers[: sent(stage.near) - filled - stage.others]
    assert outcome.killed or of_victim == numbers
    assert got[:filled] == list(range(filled)), "in order"
    assert sorted(got[filled:]) == sorted(of_victim + of_others)
    return outcome


def take_from_a_full_one(stage: Stage, name: str) -> Outcome:
    """The others wait for room, which the victim makes."""
    filled = fill(stage.near)
    of_others = list(range(2000, 2000 + stage.others))
    producers = [Child(stage.near.send_bytes, message(number, 700 + 3000 * (number % 2))) for number in of_others]
    stage.parked(producers, stage.near._out, stage.near._out.writable_block)

    def take_some(channel: Any) -> None:
        for _ in range(2 if name == "recv_many" else 9):  # not all: it would wait for more
            TAKES[name](channel)

    stage.start(stage.far, take_some)
    stage.go()
    outcome = stage.end()
    by_victim = taken(stage.far)
    got: list[int] = []
    give_up = time.monotonic() + PATIENCE
    while any(child.is_alive() for child in producers):
        assert time.monotonic() < give_up, "somebody hangs"
        got += drain(stage.far)
        time.sleep(0.0005)
    for child in producers:
        child.result()
    got += drain(stage.far)
    left = list(range(min(by_victim, filled), filled))
    assert got[: len(left)] == left, "what it had not taken is there, in order"
    assert len(got) == filled + stage.others - by_victim
    assert set(got[len(left) :]) <= set(of_others)
    assert len(set(got)) == len(got)
    return outcome


def take_among_waiting_consumers(stage: Stage, name: str) -> Outcome:
    """The others wait for messages, and so does the victim."""
    consumers = [Child(receive, stage.far) for _ in range(stage.others)]
    stage.parked(consumers, stage.far._in, stage.far._in.readable_block)
    stage.start(stage.far, TAKES[name])
    stage.go()
    stage.until_over_or_asleep()
    numbers = list(range(stage.others + MANY + 3))  # the victim may be the first, and take many
    for number in numbers:
        stage.near.send_bytes(message(number, SMALL), timeout=PATIENCE)
    got = [child.result() for child in consumers]
    outcome = stage.end()
    by_victim = taken(stage.far) - len(got)
    got += drain(stage.far)
    assert len(set(got)) == len(got) == len(numbers) - by_victim
    assert set(got) <= set(numbers)
    assert by_victim <= MANY if name == "recv_many" else by_victim <= 1
    return outcome


Scenario = Callable[[Stage, str], Outcome]
SCENARIOS: list[tuple[Scenario, dict[str, tuple[str, ...]]]] = [
    (send_to_waiting_consumers, SEND_LABELS),
    (send_into_a_full_one, SEND_LABELS),
    (take_from_a_full_one, TAKE_LABELS),
    (take_among_waiting_consumers, dict.fromkeys(TAKES, (READ, MOVED))),
]


def cases() -> Iterator[Any]:
    for scenario, labels in SCENARIOS:
        for name, those in labels.items():
            for others in OTHERS:
                yield pytest.param(scenario, name, those, others, id=f"{scenario.__name__}-{name}-{others}")


@pytest.mark.parametrize(("scenario", "name", "labels", "others"), list(cases()))
def test_everybody_goes_on_when_a_process_is_killed_at(
    scenario: Scenario, name: str, labels: tuple[str, ...], others: int
) -> None:
    for label in labels:
        for times in (1, 2):
            for _ in range(5):  # whether a waiter takes a way or another is a matter of time
                stage = Stage(DieAtLabel(label, times), others, channels)
                outcome = scenario(stage, name)
                stage.check_usable()
                end_children()
                if outcome.killed or times > 1:
                    break
            else:
                pytest.fail(f"nobody ever came to {label!r}; it passed {outcome.passed}")


def test_what_is_visible_after_a_death_is_what_the_table_of_crash_points_says() -> None:
    for name, labels in SEND_LABELS.items():
        for label in labels:
            stage = Stage(DieAtLabel(label, 1), 0, channels)
            send_to_waiting_consumers(stage, name)
            if name != "send_many":
                assert stage.sent_by_victim == (label in IS_DONE), (name, label)  # type: ignore[attr-defined]
    for name, labels in TAKE_LABELS.items():
        for label in labels[:2]:
            stage = Stage(DieAtLabel(label, 1), 0, channels)
            fill(stage.near)
            stage.start(stage.far, TAKES[name])
            stage.go()
            assert stage.end().killed
            assert bool(taken(stage.far)) == (label in IS_DONE), (name, label)


STEPPED = [
    (send_to_waiting_consumers, "send_bytes"),
    (send_to_waiting_consumers, "send_bytes, large"),
    (send_to_waiting_consumers, "reserve too much"),
    (send_into_a_full_one, "send_bytes, large"),
    (send_into_a_full_one, "reserve"),
    (take_from_a_full_one, "recv_many"),
    (take_from_a_full_one, "peek"),
    (take_among_waiting_consumers, "recv_bytes"),
    (take_among_waiting_consumers, "peek"),
]


@pytest.mark.patience(400)
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize(("scenario", "name"), STEPPED, ids=lambda value: getattr(value, "__name__", value))
def test_everybody_goes_on_when_a_process_is_killed_before_or_after_any_store(
    scenario: Scenario, name: str, others: int
) -> None:
    for number in range(1, MOST_STEPS):
        stage = Stage(DieAtOperation(number), others, channels)
        try:
            outcome = scenario(stage, name)
            stage.check_usable()
        except BaseException as error:
            error.add_note(f"killed at step {number}")
            raise
        end_children()
        if not outcome.killed:
            break
    else:
        pytest.fail(f"the operation takes more than {MOST_STEPS} steps")
    assert number > 5, "there was nothing to be killed at"


def pipes() -> tuple[Any, Any]:
    return Pipe()


@pytest.mark.parametrize("label", [WRITE, STORED, CHUNKS, READ, MOVED, *LEAVING])
def test_a_pipe_whose_memory_comes_and_goes_survives_a_death_at(label: str) -> None:
    for times in (1, 2, 3):
        near, far = Pipe()
        stage = Stage(DieAtLabel(label, times), 0, lambda near=near, far=far: (near, far))
        lengths = [600_000, 100, 70_000_000, 5, 530_000, 800_000]

        def use(connection: Any, near: Any = near, far: Any = far, lengths: list[int] = lengths) -> None:
            for number, length in enumerate(lengths):
                near.send_bytes(message(number, length))
                assert receive(far) == number

        stage.start(near, use)
        stage.go()
        outcome = stage.end()
        assert outcome.killed
        rest = drain(far)
        assert rest in ([], [sent(near) - 1])
        assert taken(far) == sent(near)
        stage.check_usable()


# -- deaths while others wait, whose chunks they need ----------------------------------------------------------------------


def test_a_producer_that_waits_gets_the_chunks_that_a_dead_consumer_had_half_given_back() -> None:
    """The ring is empty, and there is no other consumer that would give them back."""
    near, far = channels()
    longest = near._out.longest
    for label in LEAVING:
        near.send_bytes(message(1, longest))
        victim = Child(lambda label=label: (watch_steps(DieAtLabel(label, 1)), far.recv_bytes()))
        waiting = [Child(near.send_bytes, message(number, longest)) for number in (2, 3)]
        assert victim.wait() == -signal.SIGKILL
        assert sorted(receive(far) for _ in range(2)) == [2, 3]
        for child in waiting:
            child.result()


def test_a_producer_that_waits_gets_the_chunks_of_a_message_that_was_never_sent() -> None:
    near, far = channels()
    longest = near._out.longest
    ready = Page()

    def die_late() -> None:
        def step(label: str) -> None:
            if label == CHUNKS:
                ready[0] = 1
                eventually(lambda: ready[1])
                os.kill(os.getpid(), signal.SIGKILL)

        _sys.crash_points[:] = [step]
        near.send_bytes(message(1, longest))

    victim = Child(die_late)
    eventually(lambda: ready[0])
    waiting = Child(near.send_bytes, message(2, longest))
    eventually(lambda: near._out.lock.waiters, "it waits for the lock")
    ready[1] = 1
    assert victim.wait() == -signal.SIGKILL
    waiting.result()
    assert receive(far) == 2


# -- a storm --------------------------------------------------------------------------------------------------------------

PRODUCERS, CONSUMERS = 3, 3
STOP, ODD, KILLS = range(3)
SLOT = 8  # words of a producer: number of its latest message that it began, and that it finished
POSITIONS = 1 << 20


def produce(channel: Channel, page: Page, seat: int) -> None:
    """Send messages whose number says who, and how many it had sent before."""
    rng = random.Random(os.getpid())
    began, done = SLOT + 2 * seat, SLOT + 2 * seat + 1
    while not page[STOP]:
        page[began] = number = page[began] + 1
        data = message(seat << 24 | number, rng.choice([20, 200, 3000, 9000]))
        way = rng.randrange(3)
        if way == 0:
            channel.send_bytes(data)
        elif way == 1:
            channel.send(Big(bytearray(data)))
        else:
            with channel.reserve(len(data)) as view:
                view[:] = data
        page[done] = number


def note(channel: Channel, page: Page, journal: memoryview, data: Any) -> None:
    """Write into the journal which message is the next one, before HEAD moves past it.  Whoever dies then notes the same."""
    data = bytes(data)
    data = data[data.index(b"MSG!") :]  # in a pickle, or behind one
    data = data[: HEAD.size + HEAD.unpack_from(data)[2]]
    number = number_of(data) + 1
    position = taken(channel)
    if journal[position] not in (0, number):
        page[ODD] += 1
    journal[position] = number


def consume(channel: Channel, page: Page, journal: memoryview, seat: int) -> None:
    def step(label: str) -> None:
        if label == READ:
            frame = sys._getframe(1)
            if frame.f_code.co_name in ("get", "get_anyhow"):
                note(channel, page, journal, frame.f_locals["body"])

    if seat % 2:
        _sys.crash_points[:] = [step]
    while True:
        try:
            if seat % 2:
                channel.recv_bytes(timeout=0.05)
            else:
                with channel.peek(timeout=0.05) as view:
                    note(channel, page, journal, view)
        except TimeoutError:
            if page[STOP] == 2 and not channel.qsize():
                return


@pytest.mark.parametrize("kills", [80, pytest.param(500, marks=[pytest.mark.storm, pytest.mark.patience(600)])])
def test_the_books_balance_after_a_storm_of_kills(kills: int) -> None:
    kills = int(os.environ.get("SHLOCK_STORM_KILLS", kills))
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    near, far = channels()
    page = Page(SLOT + 2 * PRODUCERS)
    journal = memoryview(mmap.mmap(-1, 8 * POSITIONS)).cast("Q")
    roles: list[tuple[Any, ...]] = [(produce, near, page, seat) for seat in range(PRODUCERS)]
    roles += [(consume, far, page, journal, seat) for seat in range(CONSUMERS)]
    children = [Child(*role) for role in roles]
    killed = [0, 0]
    while sum(killed) < kills:
        time.sleep(rng.expovariate(1 / 0.004))
        seat = rng.randrange(len(roles))
        assert children[seat].is_alive(), children[seat].result()
        children[seat].kill()
        killed[seat >= PRODUCERS] += 1
        before = sent(near)
        children[seat] = Child(*roles[seat])
        if sum(killed) % 20 == 0:
            eventually(lambda before=before: sent(near) > before, "messages go on")
        assert sent(near) < POSITIONS - 1000, "the journal is full"
    page[STOP] = 1
    for child in children[:PRODUCERS]:
        child.result()
    page[STOP] = 2
    for child in children[PRODUCERS:]:
        child.result()
    total = sent(near)
    print(f"{total} messages; killed: {killed[0]} producers, {killed[1]} consumers")
    assert taken(far) == total, "all that was sent was taken"
    assert page[ODD] == 0, "a message changed its place"
    numbers = [word - 1 for word in journal[:total].tolist()]
    assert min(numbers) >= 0, "a message was taken and not seen"
    assert not any(journal[total : total + 1000].tolist())
    assert len(set(numbers)) == total, "a message came twice"
    for seat in range(PRODUCERS):
        mine = [number & (1 << 24) - 1 for number in numbers if number >> 24 == seat]
        assert mine == sorted(mine), "those of one producer are in order"
        began, done = page[SLOT + 2 * seat], page[SLOT + 2 * seat + 1]
        assert done <= began
        # All but those whose producer was killed while it sent them; and each of these is there, or never was.
        assert len(mine) >= began - killed[0]
        assert done in mine
    stage = Stage(Step(), 0, lambda: (near, far))
    stage.check_usable()


def test_who_waits_is_woken_by_a_poll_at_the_latest_when_the_waker_died() -> None:
    """C31: the message is there, and nobody was told."""
    near, far = channels()
    consumer = Child(receive, far)
    eventually(lambda: any(far._in.parking.waiting(far._in.readable_block.index)))
    begun = time.monotonic()
    victim = Child(lambda: (watch_steps(DieAtLabel(STORED, 1)), near.send_bytes(message(7, SMALL))))
    assert victim.wait() == -signal.SIGKILL
    assert consumer.result() == 7
    assert time.monotonic() - begun < 100 * _parking.POLL_INTERVAL + PATIENCE / 2
