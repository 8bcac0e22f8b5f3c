"""Pipe: the interface of multiprocessing's, and an end that is known when its processes are gone, however they went."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import select
import signal
import warnings
from multiprocessing import connection as mp_connection
from typing import Any

import pytest
from support import PATIENCE, Child, DieAtLabel, eventually, mapped_segments, open_files, run, watch_steps
from test_signals import InThread

import shlock
from shlock import Connection, Pipe, _parking, _sys

pytestmark = pytest.mark.patience(60)


def fill(connection: Connection) -> int:
    """Send until there is no more room; how many."""
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            connection.send_bytes(bytes(50_000), timeout=0)
            count += 1
    return count


def memory_of(connection: Connection) -> int:
    """Bytes that it has taken of /dev/shm."""
    return os.fstat(connection._memory.arena.segment.fd).st_blocks * 512


# -- the interface --------------------------------------------------------------------------------------------------------


def test_it_has_all_that_multiprocessings_connections_have() -> None:
    ours, stock = Pipe()[0], multiprocessing.Pipe()[0]
    assert {name for name in dir(stock) if not name.startswith("_")} <= set(dir(ours))
    assert shlock.get_context("spawn").Pipe(False)[0].writable is False


def test_both_ends_send_and_receive() -> None:
    one, two = Pipe()
    for source, target in ((one, two), (two, one)):
        for message in (None, b"", "text", list(range(1000)), bytes(3_000_000)):
            source.send(message)
            assert target.poll()
            assert target.recv() == message
        source.send_bytes(b"abc", 1)
        assert target.recv_bytes() == b"bc"
    assert repr(one) == "<Connection (duplex)>"


def test_of_a_simplex_pipe_the_first_end_only_receives() -> None:
    reader, writer = Pipe(duplex=False)
    assert (reader.readable, reader.writable, writer.readable, writer.writable) == (True, False, False, True)
    assert (repr(reader), repr(writer)) == ("<Connection (read-only)>", "<Connection (write-only)>")
    writer.send(1)
    assert reader.recv() == 1
    for use in (lambda: reader.send(1), lambda: reader.send_bytes(b""), lambda: reader.reserve(1).__enter__()):
        with pytest.raises(OSError, match="connection is read-only"):
            use()
    for use in (writer.recv, writer.recv_bytes, writer.poll, lambda: writer.peek().__enter__()):
        with pytest.raises(OSError, match="connection is write-only"):
            use()


def test_it_has_no_file_descriptor_and_says_so() -> None:
    one, _two = Pipe()
    with pytest.raises(io.UnsupportedOperation, match="poll"):
        one.fileno()
    with pytest.raises((OSError, ValueError)):
        mp_connection.wait([one], 0)
    with pytest.raises((OSError, ValueError)):
        select.select([one], [], [], 0)


def test_a_closed_end_raises_oserror_and_can_be_closed_again() -> None:
    one, two = Pipe()
    with one as same:
        assert same is one
    one.close()
    assert one.closed
    assert repr(one) == "<Connection (closed)>"
    for use in (
        one.recv,
        one.recv_bytes,
        one.poll,
        lambda: one.send(lambda: 0),
        lambda: one.send_bytes(b""),
        lambda: one.recv_bytes_into(bytearray(5)),
        lambda: one.reserve(1).__enter__(),
        lambda: one.peek().__enter__(),
    ):
        with pytest.raises(OSError, match="handle is closed"):
            use()
    assert not two.closed


@pytest.mark.parametrize("send", ["send", "send_bytes"])
def test_who_has_taken_the_message_may_close_before_the_call_that_sent_it_has_ended(send: str) -> None:
    reader, writer = Pipe(False)

    def step(label: str) -> None:
        if label == "C31 TAIL stored":
            _sys.crash_points.clear()
            assert (reader.recv() if send == "send" else reader.recv_bytes()) == b"x"
            reader.close()

    _sys.crash_points[:] = [step]
    try:
        getattr(writer, send)(b"x")
    finally:
        _sys.crash_points.clear()
    with pytest.raises(BrokenPipeError):
        getattr(writer, send)(b"y")
    writer.close()


def test_a_message_that_is_too_long_closes_what_it_can_not_go_on_with_as_in_multiprocessing() -> None:
    for make in (Pipe, multiprocessing.Pipe):
        for duplex in (True, False):
            reader, writer = make(duplex)
            writer.send_bytes(b"12345")
            with pytest.raises(OSError):
                reader.recv_bytes(4)
            assert reader.readable is False or reader.closed
            assert reader.closed == (not duplex)
            if duplex:
                reader.send_bytes(b"still")
                assert writer.recv_bytes() == b"still"


def test_it_takes_memory_as_it_needs_it_and_gives_most_of_it_back() -> None:
    one, two = Pipe()
    before = memory_of(one)
    assert before < 2_000_000
    big = bytes(200_000_000)
    one.send_bytes(big)
    assert memory_of(one) > 200_000_000
    assert two.recv_bytes() == big
    assert memory_of(one) < 100_000_000
    with pytest.raises(ValueError, match="a message of 4000000000 bytes"):
        one.reserve(4_000_000_000).__enter__()


def test_a_full_pipe_makes_its_writer_wait_and_drops_nothing() -> None:
    one, two = Pipe()
    sent = fill(one)
    assert 500_000 < sent * 50_000 < 8_000_000
    last = b"last" * 12_500
    thread = InThread(lambda: one.send_bytes(last))
    eventually(lambda: any(_parking_of(one)))
    for _ in range(sent):
        assert len(two.recv_bytes()) == 50_000
    assert two.recv_bytes(timeout=PATIENCE) == last
    thread.result()


def _parking_of(connection: Connection) -> list[int]:
    out = connection._out
    return [waiter[0] for waiter in out.parking.waiting(out.writable_block.index)]


def waits_for_message(connection: Connection) -> bool:
    source = connection._in
    return any(True for _ in source.parking.waiting(source.readable_block.index))


# -- the other end is gone ------------------------------------------------------------------------------------------------


def test_who_reads_gets_all_messages_and_then_eof_when_the_writer_has_closed() -> None:
    reader, writer = Pipe(duplex=False)
    for number in range(3):
        writer.send(number)
    writer.close()
    assert [reader.recv() for _ in range(3)] == [0, 1, 2]
    assert reader.poll()
    for use in (reader.recv, reader.recv_bytes, lambda: reader.recv_many(2), lambda: reader.recv(timeout=5)):
        with pytest.raises(EOFError):
            use()
    with pytest.raises(EOFError), reader.peek():
        pass


def test_who_writes_gets_brokenpipeerror_when_the_reader_has_closed() -> None:
    reader, writer = Pipe(duplex=False)
    writer.send(0)
    reader.close()
    for use in (
        lambda: writer.send(1),
        lambda: writer.send_bytes(b"", timeout=1),
        lambda: writer.send_many([b"x"]),
        lambda: writer.send(bytearray(100_000)),
    ):
        with pytest.raises(BrokenPipeError):
            use()
    with pytest.raises(BrokenPipeError), writer.reserve(5):
        pass
    with pytest.raises(BrokenPipeError), writer.reserve(5):
        pass


@pytest.mark.parametrize("is_waiting", [False, True])
@pytest.mark.parametrize("end", ["killed", "exits", "returns"])
def test_eof_when_the_writer(end: str, is_waiting: bool) -> None:
    """... is killed, exits without closing, or ends with its end open."""
    reader, writer = Pipe(duplex=False)
    ready, go = os.pipe()

    def write() -> None:
        reader.close()
        writer.send("whole")
        if is_waiting:
            os.read(ready, 1)
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif end == "exits":
            os._exit(3)

    child = Child(write)
    writer.close()
    assert reader.recv(timeout=PATIENCE) == "whole"
    threads = [InThread(reader.recv), InThread(lambda: reader.poll(None))] if is_waiting else []
    if is_waiting:
        eventually(lambda: sum(1 for _ in reader._in.parking.waiting(reader._in.readable_block.index)) == 2)
        os.write(go, b"x")
    child.wait()
    if is_waiting:
        with pytest.raises(EOFError):
            threads[0].result()
        assert threads[1].result() is True
    with pytest.raises(EOFError):
        reader.recv(timeout=PATIENCE)
    os.close(ready)
    os.close(go)


def test_a_writer_that_waits_at_a_full_pipe_gets_brokenpipeerror_when_the_reader_is_killed() -> None:
    reader, writer = Pipe(duplex=False)
    child = Child(signal.pause)
    reader.close()
    fill(writer)
    threads = [
        InThread(lambda: writer.send_bytes(b"")),
        InThread(lambda: writer.send_bytes(bytes(50_000), timeout=PATIENCE)),
        InThread(lambda: writer.reserve(50_000).__enter__()),
    ]
    eventually(lambda: len(_parking_of(writer)) == 3 or any(thread.is_over() for thread in threads))
    child.kill()
    for thread in threads[1:]:
        with pytest.raises(BrokenPipeError):
            thread.result()
    with contextlib.suppress(BrokenPipeError):
        threads[0].result()


def test_a_writer_finds_a_killed_reader_after_a_few_chunks_at_the_latest() -> None:
    reader, writer = Pipe(duplex=False)
    child = Child(signal.pause)
    reader.close()
    child.kill()
    with pytest.raises(BrokenPipeError):
        for _ in range(1000):
            writer.send_bytes(bytes(10_000))


def test_closing_wakes_who_waits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 1e6)
    monkeypatch.setattr(_parking, "LONGEST_POLL_INTERVAL", 1e6)
    reader, writer = Pipe(duplex=False)
    threads = [InThread(reader.recv) for _ in range(3)]
    eventually(lambda: all(thread.is_over() or waits_for_message(reader) for thread in threads))
    eventually(lambda: sum(1 for _ in reader._in.parking.waiting(reader._in.readable_block.index)) == 3)
    writer.close()
    for thread in threads:
        with pytest.raises(EOFError):
            thread.result()
    reader, writer = Pipe(duplex=False)
    fill(writer)
    blocked = [InThread(lambda: writer.send_bytes(bytes(50_000))) for _ in range(3)]
    eventually(lambda: len(_parking_of(writer)) == 3)
    reader.close()
    for thread in blocked:
        with pytest.raises(BrokenPipeError):
            thread.result()


def test_an_end_is_open_as_long_as_any_process_has_it_open() -> None:
    reader, writer = Pipe(duplex=False)
    ready, go = os.pipe()

    def hold() -> None:
        os.read(ready, 1)
        writer.send("from the child")

    child = Child(hold)
    writer.close()
    assert not reader.poll(0.03)
    with pytest.raises(TimeoutError):
        reader.recv(timeout=0.03)
    os.write(go, b"x")
    assert reader.recv(timeout=PATIENCE) == "from the child"
    child.result()
    with pytest.raises(EOFError):
        reader.recv(timeout=PATIENCE)
    os.close(ready)
    os.close(go)


def test_both_ends_inherited_by_a_child_keep_each_other_open_as_those_of_a_pipe_do() -> None:
    reader, writer = Pipe(duplex=False)

    def talk_to_itself() -> list[Any]:
        writer.send("to myself")
        got = [reader.recv()]
        writer.close()
        got.append(reader.poll(0.03))  # the parent has it open
        return got

    assert Child(talk_to_itself).result() == ["to myself", False]
    writer.close()
    with pytest.raises(EOFError):
        reader.recv()


def test_an_end_that_is_dropped_is_closed() -> None:
    gc.collect()
    reader, writer = Pipe(duplex=False)
    descriptors = len(os.listdir("/proc/self/fd"))
    del writer
    gc.collect()
    with pytest.raises(EOFError):
        reader.recv()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_pipes_leave_no_descriptor_and_no_memory() -> None:
    def use() -> None:
        for _ in range(50):
            one, two = Pipe()
            one.send(1)
            two.recv()
            one.close()
            two.close()
        gc.collect()

    use()
    files, segments = open_files(), mapped_segments()
    use()
    assert open_files() <= files
    assert mapped_segments() <= segments


def test_who_is_killed_while_it_closes_leaves_an_end_that_is_found_closed() -> None:
    """C36: the end is closed, and nobody was told."""
    reader, writer = Pipe(duplex=False)
    receiving = InThread(reader.recv)

    def close() -> None:
        watch_steps(DieAtLabel("C36 end closed, not said", 1))
        writer.close()

    child = Child(close)
    eventually(lambda: waits_for_message(reader))
    writer_token, writer._token = writer._token, -1  # gone from this process without a word
    os.close(writer_token)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(EOFError):
        receiving.result()
    reader, writer = Pipe(duplex=False)
    child = Child(lambda: (watch_steps(DieAtLabel("C36 end closed, not said", 1)), reader.close()))
    token, reader._token = reader._token, -1
    os.close(token)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(BrokenPipeError):
        for _ in range(1000):
            writer.send_bytes(bytes(10_000))


# -- other processes ------------------------------------------------------------------------------------------------------


def echo(connection: Any, other: Any) -> None:
    if other is not None:
        other.close()  # a forked child has inherited it, and would keep it open
    with contextlib.suppress(EOFError):
        while True:
            message = connection.recv()
            connection.send((os.getpid(), message))
            if message == "die":
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.patience(120)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_a_connection_travels_to_a_process_that_is_started_by(method: str, end: str) -> None:
    context = shlock.get_context(method)
    here, there = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=echo, args=(there, here if method == "fork" else None))
        process.start()
    there.close()
    for message in ("text", bytes(500_000), list(range(1000))):
        here.send(message)
        assert here.recv(timeout=PATIENCE) == (process.pid, message)
    if end == "closed":
        here.close()
    else:
        here.send("die")
        assert here.recv(timeout=PATIENCE) == (process.pid, "die")
        with pytest.raises(EOFError):
            here.recv(timeout=PATIENCE)
    process.join(PATIENCE)
    assert process.exitcode == (0 if end == "closed" else -signal.SIGKILL)


def test_a_connection_can_be_pickled_only_while_a_process_is_spawned() -> None:
    one, two = Pipe()
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(one)
    with pytest.raises(RuntimeError, match="inheritance"):
        two.send(one)
    assert not one.poll()
    one.close()
    with pytest.raises(OSError, match="handle is closed"):
        pickle.dumps(one)


def test_threads_share_an_end() -> None:
    one, two = Pipe()
    got: list[int] = []

    def receive() -> None:
        while (number := two.recv()) is not None:
            got.append(number)

    receivers = [InThread(receive) for _ in range(3)]
    senders = [InThread(lambda first=first: [one.send(first + number) for number in range(500)]) for first in (0, 500, 1000)]
    for thread in senders:
        thread.result()
    for _ in receivers:
        one.send(None)
    for thread in receivers:
        thread.result()
    assert sorted(got) == list(range(1500))


def test_closing_while_another_thread_receives_ends_nobody_elses_call(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Pipe()
    thread = InThread(two.recv)
    eventually(lambda: waits_for_message(two))
    two.close()
    one_error: list[BaseException] = []
    try:
        thread.result()
    except (OSError, EOFError) as error:
        one_error.append(error)
    assert one_error
    with pytest.raises(BrokenPipeError):
        one.send(1)


def test_the_end_of_the_interpreter_is_silent_with_open_ends() -> None:
    run("""
        import shlock
        a, b = shlock.Pipe()
        a.send(bytes(100_000))
        c = shlock.Channel(size=1000)
        reservation = c.reserve(5)
        view = reservation.__enter__()
        peek = b.peek()
        seen = peek.__enter__()
    """)
