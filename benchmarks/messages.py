"""Messages from one process to another: per second and MB/s, through pipes, channels and queues, single and in batches.

A producer and a consumer are forked for every cell and round.  All carry the same bytes objects, four different ones of each
size in turn.  A run is timed from just before the first message is sent until the last one has been received; what the clock
needs to be read is paid once per run, not per message.  Runs grow until they are long enough to tell the rate; those warm up
caches, page tables and the receiver's memory, and only the one after them counts.

Of every run the consumer checks the number of messages, the length of all and the checksum of the last; in the first run, the
checksum of every one (of batches: of the last of each).  Where the producer writes only the two ends of a message, checksums
are of those.  A contestant that delivers anything else gets no figures.

Everybody runs with the defaults of its library, but for the size of a buffer where one has to be chosen: a Channel's holds
four messages, faster_fifo's two batches, and neither less than a megabyte.

memcpy is one process that assigns each object to a slice of the same bytearray: what one copy costs, without any passing on.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, repeat
from typing import Any

from .crew import FORK, Board, CellFailed, Crew, describe
from .distance import distance, distance_notes, two_cores
from .peers import Scratch, missing, version_of
from .report import NO_FIGURE, Findings, Table, failure_notes, missing_notes, number, quartiles, ratio
from .rounds import Series, turns

KIB, MIB = 1 << 10, 1 << 20
SIZES, SIZES_QUICK = (64, KIB, 64 * KIB, MIB, 16 * MIB), (KIB, 64 * KIB, MIB)
ROUNDS, ROUNDS_QUICK = 5, 3
WINDOW_NS, WINDOW_NS_QUICK = 100_000_000, 50_000_000
WARM_UP_NS = 20_000_000
DIFFERENT = 4  # messages of each size
BATCH, MOST_BYTES_OF_BATCH = 64, 16 * MIB
LEAST_BUFFER = MIB
MOST_BYTES_WAITING = 512 * MIB  # in the queues that have no limit: a run of theirs is no longer than this
ENDS = 8  # bytes at the beginning and at the end
WATCHDOG_S = 10.0

PIPE = "multiprocessing.Pipe"
OUR_PIPE = "shlock.Pipe"
OUR_PIPE_MANY = "shlock.Pipe, batches"
ONE_COPY = "shlock.Channel, one copy"  # send_bytes, and read where it lies
FILLED = "shlock.Channel, filled in place"  # reserve, one assignment to the view, and read where it lies
NO_COPY = "shlock.Channel, no copy"
SIMPLE_QUEUE = "multiprocessing.SimpleQueue"
QUEUE = "multiprocessing.Queue"
OUR_QUEUE = "shlock.Queue"
OUR_QUEUE_MANY = "shlock.Queue, batches"
FASTER = "faster_fifo.Queue"
FASTER_MANY = "faster_fifo.Queue, batches"
MEMCPY = "memcpy in one process"
BASES = (PIPE, QUEUE, FASTER, FASTER_MANY, MEMCPY)  # of which the others' ratios are in the JSON

_RUN, _TURNS = 2, 3  # words of the board: the number of the present run, and how long it is
_READY, _END_NS = 0, 1  # of a worker's row
_PRODUCER, _CONSUMER = 0, 1  # workers


@dataclass(frozen=True)
class Arrival:
    """What a run brought: when the last message was there, the bytes of all, and the checksum of the last."""

    end_ns: int
    length: int
    checksum: int


@dataclass(frozen=True)
class Route:
    """How one contestant gets messages across; made in the parent, used in its children.

    send      sends so many turns; None if the receiver needs nobody
    receive   takes so many messages
    checksum  of a message, as ``receive`` makes it
    """

    send: Callable[[int], None] | None
    receive: Callable[[int], Arrival]
    checksum: Callable[[Any], int] = zlib.crc32
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Contestant:
    """A `Route` by name, and what must be there for it."""

    name: str
    open: Callable[[list[bytes]], Route]
    module: str = ""
    attribute: str = ""
    in_batches: bool = False
    has_no_limit: bool = False  # the producer may be a whole run ahead

    def messages_of_a_turn(self, size: int) -> int:
        return min(BATCH, MOST_BYTES_OF_BATCH // size) if self.in_batches else 1


def _checksum_of_ends(message: Any) -> int:
    return zlib.crc32(message[-ENDS:], zlib.crc32(message[:ENDS]))


# -- the loops that are timed ---------------------------------------------------------------------------------------------


def _sender(put: Callable[[Any], object], turns_of: list[Any]) -> Callable[[int], None]:
    """``turns_of``: what is put in each turn, from the first again after the last."""

    def send(count: int) -> None:
        for turn in islice(cycle(turns_of), count):
            put(turn)

    return send


def _receiver(get: Callable[[], Any]) -> Callable[[int], Arrival]:
    def receive(count: int) -> Arrival:
        length = 0
        for _ in repeat(None, count - 1):
            length += len(get())
        last = get()
        return Arrival(time.perf_counter_ns(), length + len(last), zlib.crc32(last))

    return receive


def _batches(messages: list[bytes], count: int) -> list[list[bytes]]:
    """The messages over and over, so many in each list."""
    endless = cycle(messages)
    return [list(islice(endless, count)) for _ in messages]


def _receiver_of_batches(get_many: Callable[[int], list[Any]], most: int) -> Callable[[int], Arrival]:
    def receive(count: int) -> Arrival:
        length = 0
        while count > 0:
            found = get_many(min(most, count))
            length += sum(map(len, found))
            count -= len(found)
        return Arrival(time.perf_counter_ns(), length, zlib.crc32(found[-1]))

    return receive


def _fill(channel: Any, messages: list[bytes], count: int) -> None:
    """Copied once, into the shared memory, by who has the view of it."""
    size = len(messages[0])
    for message in islice(cycle(messages), count):
        with channel.reserve(size) as view:
            view[:] = message


def _send_ends(channel: Any, messages: list[bytes], count: int) -> None:
    """Not copied: only the ends are written, for something that makes its messages in place."""
    size = len(messages[0])
    ends = [(message[:ENDS], message[-ENDS:]) for message in messages]
    for first, last in islice(cycle(ends), count):
        with channel.reserve(size) as view:
            view[:ENDS] = first
            view[-ENDS:] = last


def _receive_in_place(channel: Any, checksum: Callable[[Any], int], count: int) -> Arrival:
    """Read where they lie: the length, and the first and the last byte."""
    length = 0
    for _ in repeat(None, count - 1):
        with channel.peek() as view:
            length += len(view)
            view[0], view[-1]  # They must come from the producer's core.
    with channel.peek() as view:
        return Arrival(time.perf_counter_ns(), length + len(view), checksum(view))


def _copy(messages: list[bytes], count: int) -> Arrival:
    size = len(messages[0])
    with memoryview(bytearray(size)) as target:
        for message in islice(cycle(messages), count):
            target[:] = message
        return Arrival(time.perf_counter_ns(), size * count, zlib.crc32(target))


# -- contestants ----------------------------------------------------------------------------------------------------------


def _pipe(make: Callable[[], tuple[Any, Any]], messages: list[bytes]) -> Route:
    reader, writer = make()

    def close() -> None:
        reader.close()
        writer.close()

    return Route(_sender(writer.send_bytes, messages), _receiver(reader.recv_bytes), close=close)


def _stock_pipe(messages: list[bytes]) -> Route:
    return _pipe(partial(FORK.Pipe, duplex=False), messages)


def _our_pipe(messages: list[bytes]) -> Route:
    return _pipe(partial(importlib.import_module("shlock.channel").Pipe, duplex=False), messages)


def _our_pipe_in_batches(messages: list[bytes]) -> Route:
    reader, writer = importlib.import_module("shlock.channel").Pipe(duplex=False)
    batches = _batches(messages, BY_NAME[OUR_PIPE_MANY].messages_of_a_turn(len(messages[0])))

    def close() -> None:
        reader.close()
        writer.close()

    return Route(_sender(writer.send_many, batches), _receiver_of_batches(reader.recv_many, len(batches[0])), close=close)


def _channel(messages: list[bytes], way: str) -> Route:
    channel = importlib.import_module("shlock.channel").Channel(size=max(LEAST_BUFFER, 4 * len(messages[0])), privileged=True)
    other = channel.other_end()
    checksum: Callable[[Any], int] = zlib.crc32
    if way == ONE_COPY:
        send = _sender(channel.send_bytes, messages)
    elif way == FILLED:
        send = partial(_fill, channel, messages)
    else:
        send, checksum = partial(_send_ends, channel, messages), _checksum_of_ends

    def close() -> None:
        other.close()
        channel.close()

    return Route(send, partial(_receive_in_place, other, checksum), checksum, close)


def _queue(make: Callable[[], Any], messages: list[bytes]) -> Route:
    queue = make()
    return Route(_sender(queue.put, messages), _receiver(queue.get), close=queue.close)


def _our_queue() -> Any:
    """What a program gets that asks shlock's context for a Queue."""
    return importlib.import_module("shlock").get_context("fork").Queue()


def _our_queue_in_batches(messages: list[bytes]) -> Route:
    queue = _our_queue()
    batches = _batches(messages, BY_NAME[OUR_QUEUE_MANY].messages_of_a_turn(len(messages[0])))
    return Route(_sender(queue.put_many, batches), _receiver_of_batches(queue.get_many, len(batches[0])), close=queue.close)


def _faster(most_bytes: int) -> Any:
    # Beside each message stands its length, and the pickle around it.
    return importlib.import_module("faster_fifo").Queue(max_size_bytes=max(LEAST_BUFFER, 2 * most_bytes))


def _faster_single(messages: list[bytes]) -> Route:
    return _queue(partial(_faster, len(messages[0]) + KIB), messages)


def _faster_in_batches(messages: list[bytes]) -> Route:
    count = BY_NAME[FASTER_MANY].messages_of_a_turn(len(messages[0]))
    queue = _faster(count * (len(messages[0]) + KIB))
    receive = _receiver_of_batches(lambda most: queue.get_many(max_messages_to_get=most), count)
    return Route(_sender(queue.put_many, _batches(messages, count)), receive, close=queue.close)


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant(PIPE, _stock_pipe),
    Contestant(OUR_PIPE, _our_pipe, "shlock.channel", "Pipe"),
    Contestant(OUR_PIPE_MANY, _our_pipe_in_batches, "shlock.channel", "Pipe", in_batches=True),
    *(Contestant(way, partial(_channel, way=way), "shlock.channel", "Channel") for way in (ONE_COPY, FILLED, NO_COPY)),
    Contestant(SIMPLE_QUEUE, partial(_queue, FORK.SimpleQueue)),
    Contestant(QUEUE, partial(_queue, FORK.Queue), has_no_limit=True),
    Contestant(OUR_QUEUE, partial(_queue, _our_queue), "shlock.queue", "Queue", has_no_limit=True),
    Contestant(OUR_QUEUE_MANY, _our_queue_in_batches, "shlock.queue", "Queue", in_batches=True, has_no_limit=True),
    Contestant(FASTER, _faster_single, "faster_fifo", "Queue"),
    Contestant(FASTER_MANY, _faster_in_batches, "faster_fifo", "Queue", in_batches=True),
    Contestant(MEMCPY, lambda messages: Route(None, partial(_copy, messages))),
)
BY_NAME = {one.name: one for one in CONTESTANTS}


# -- two processes --------------------------------------------------------------------------------------------------------


def _runs(words: memoryview) -> Iterator[tuple[int, int]]:
    """The number and the length of each run, as soon as the parent orders it."""
    run = 0
    while True:
        while words[_RUN] == run:
            time.sleep(0.0002)
        run = words[_RUN]
        yield run, words[_TURNS]


def _prepare(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    gc.disable()


def _produce(send: Callable[[int], None], board: Board, core: int | None) -> None:
    _prepare(core)
    words, ready = board.words, board.row(_CONSUMER) + _READY
    for run, count in _runs(words):
        while words[ready] != run:
            time.sleep(0.0001)
        words[Board.START] = time.perf_counter_ns()
        send(count)


def _consume(route: Route, messages: list[bytes], batch: int, board: Board, core: int | None) -> None:
    _prepare(core)
    words, row, size = board.words, board.row(_CONSUMER), len(messages[0])
    checksums = [route.checksum(message) for message in messages]

    def take(before: int, count: int) -> int:
        got = route.receive(count)
        if got.length != count * size:
            raise CellFailed(f"{got.length} bytes arrived of {count} messages of {size}")
        if got.checksum != checksums[(before + count - 1) % DIFFERENT]:
            raise CellFailed(f"message {before + count} arrived with another content")
        return got.end_ns

    for run, count in _runs(words):
        if route.send is None:
            words[Board.START] = time.perf_counter_ns()
        words[row + _READY] = run
        if run == 1 and route.send is not None:
            for index in range(count):
                end = take(index * batch, batch)
        else:
            end = take(0, count * batch)
        words[row + _END_NS] = end


def measure(contestant: Contestant, messages: list[bytes], cores: tuple[int, int] | None, window_ns: int) -> float:
    """Messages per second in one run of about ``window_ns``; CellFailed if it hangs, crashes, or brings something else."""
    batch = contestant.messages_of_a_turn(len(messages[0]))
    most = MOST_BYTES_WAITING // (batch * len(messages[0])) if contestant.has_no_limit else 1 << 40
    try:
        route = contestant.open(messages)
    except Exception as error:
        raise CellFailed(describe(error)) from error
    board = Board(2)
    end = board.row(_CONSUMER) + _END_NS

    def run(count: int) -> int:
        board.words[end] = 0
        board.words[_TURNS] = count
        board.words[_RUN] += 1
        board.await_all([end], WATCHDOG_S, crew)
        return max(1, board.words[end] - board.words[Board.START])

    try:
        with Crew() as crew:
            crew.start(_consume, route, messages, batch, board, cores and cores[1])
            if route.send is not None:
                crew.start(_produce, route.send, board, cores and cores[0])
            count = 1 if contestant.in_batches else DIFFERENT
            run(count)
            taken = run(count)
            while taken < WARM_UP_NS // 2 and count < most:
                count = min(most, count * min(8, WARM_UP_NS // taken + 1))
                taken = run(count)
            count = max(1, min(most, count * window_ns // taken))
            return count * batch / run(count) * 1e9
    finally:
        board.close()
        route.close()


# -- the group ------------------------------------------------------------------------------------------------------------

UNPINNED, PINNED = "unpinned", "pinned"
Cells = dict[tuple[int, str], dict[str, Series]]
Distances = dict[tuple[int, str], list[float]]  # before and after the rounds of each cell


def run(quick: bool, scratch: Scratch) -> Findings:
    """Measure; some 15 s when quick (three sizes, unpinned), else 3 minutes; longer where others use the machine."""
    absent = {one.name: reason for one in CONTESTANTS if (reason := missing(one.module, one.attribute))}
    names = [one.name for one in CONTESTANTS if one.name not in absent]
    cores, remark = two_cores()
    places: dict[str, tuple[int, int] | None] = {UNPINNED: None}
    if quick:
        remark = None
    elif cores:
        places[PINNED] = cores
    cells: Cells = {}
    distances: Distances = {}
    for size in SIZES_QUICK if quick else SIZES:
        messages = [random.Random(number).randbytes(size) for number in range(DIFFERENT)]
        for place, pair in places.items():
            series = cells[size, place] = {name: Series() for name in names}
            found = distances[size, place] = distance(cores)
            for index, name in turns(names, ROUNDS_QUICK if quick else ROUNDS):
                one = series[name]
                if one.failure:
                    continue
                try:
                    window_ns = WINDOW_NS_QUICK if quick else WINDOW_NS
                    one.values[index] = measure(BY_NAME[name], messages, pair, window_ns)
                except CellFailed as failure:
                    one.failure = str(failure)
            found += distance(cores)
    return _findings(names, cells, distances, list(places), absent, [remark] if remark else [])


def size_text(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB" if size >= KIB else f"{size} B"


def _findings(
    names: list[str], cells: Cells, distances: Distances, places: list[str], absent: dict[str, str], remarks: list[str]
) -> Findings:
    sizes = list(dict.fromkeys(size for size, _ in cells))
    overview = [[name, *(ratio(_over_pipe(cells[size, UNPINNED], name)) for size in sizes)] for name in names]
    failures = {
        f"{name}, {size_text(size)}, {place}": one.failure
        for (size, place), series in cells.items()
        for name, one in series.items()
    }
    notes = [
        "messages per second over multiprocessing.Pipe's in the same rounds, unpinned; larger is better",
        f"batches are of {BATCH} messages, and of {MOST_BYTES_OF_BATCH // MIB} MiB at most",
        *distance_notes(ns for found in distances.values() for ns in found),
        *remarks,
        *failure_notes(failures),
        *missing_notes(absent),
    ]
    tables = [Table(f"Messages: rate as a multiple of {PIPE}'s", ["", *map(size_text, sizes)], overview, notes)]
    head = ["", "messages/s", "p25..p75", "MB/s", "ratio"]
    if PINNED in places:
        head += ["pinned: messages/s", "MB/s", "ratio"]
    for size in sizes:
        rows = [
            [name, *(cell for place in places for cell in _detail(cells[size, place], name, size, place))] for name in names
        ]
        tables.append(Table(f"Messages of {size_text(size)}", head, rows, [f"ratio: to {PIPE} in the same rounds"]))
    data: dict[str, object] = {
        f"{size_text(size)}, {place}": {
            name: one.as_json()
            | {"ratio": (found := _over_pipe(series, name)) and found.median}
            | {"ratios": _ratios(series, one), "bytes_per_second": (rate := one.spread()) and rate.median * size}
            for name, one in series.items()
        }
        for (size, place), series in cells.items()
    }
    versions = {one.module: version_of(one.module) for one in CONTESTANTS if one.module and "." not in one.module}
    apart = {f"{size_text(size)}, {place}": found for (size, place), found in distances.items()}
    facts = {"unit": "messages per second", "sizes": sizes, "versions": versions, "missing": absent, "ns there and back": apart}
    return Findings(tables, {**facts, "cells": data})


def _over_pipe(series: dict[str, Series], name: str) -> Any:
    return series[name].ratio_to(series[PIPE])


def _ratios(series: dict[str, Series], one: Series) -> dict[str, float]:
    """Medians of the ratios within the same rounds."""
    return {base: found.median for base in BASES if base in series and (found := one.ratio_to(series[base]))}


def _detail(series: dict[str, Series], name: str, size: int, place: str) -> list[str]:
    summary = series[name].spread()
    if summary is None:
        return ["failed", *[NO_FIGURE] * (3 if place == UNPINNED else 2)]
    spread = [quartiles(summary)] if place == UNPINNED else []
    return [number(summary.median), *spread, number(summary.median * size / 1e6), ratio(_over_pipe(series, name))]
