"""Block: contents that are whole or not there, views that end, readers that need no lock, and everything that may be wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_damage
from support import (
    PATIENCE,
    Child,
    Page,
    end_process,
    eventually,
    is_sleeping,
    mapped_segments,
    own_files,
    supervisor_of,
)
from test_enforcement import spin
from test_signals import Interruption, Trial, interrupt_everywhere
from test_system_calls import calls_of_loop

import shlock
from shlock import _content, _memory, _names, _sys, snapshot
from shlock import _layout as at

SIZE = 10_000
LONG, SHORT = 60.0, 0.05

needs_numpy = pytest.mark.skipif(
    not any((Path(folder) / "numpy").is_dir() for folder in os.sys.path),  # type: ignore[attr-defined]
    reason="numpy is not installed",
)


@pytest.fixture
def domain(domain: str) -> Iterator[str]:
    """As everywhere; its supervisor ends with the test, and the files of its blocks go."""
    yield domain
    pid = supervisor_of(domain)
    if pid is not None:
        end_process(pid, signal.SIGTERM)

    def is_clean() -> bool:
        gc.collect()
        snapshot.clean(domain)
        return not [name for name in os.listdir("/dev/shm") if name.startswith(f"{_names.segment_name(domain)}=")]

    eventually(is_clean, "its blocks are gone", 10)


@pytest.fixture
def block() -> shlock.Block:
    return shlock.Block(size=SIZE)


def content(block: shlock.Block) -> bytes:
    with block.read(timeout=PATIENCE) as view:
        return bytes(view)


def put(block: shlock.Block, data: bytes, **options: Any) -> None:
    with block.write(timeout=PATIENCE, **options) as view:
        view[: len(data)] = data


def editor(block: shlock.Block, page: Page, *, die: bool = False) -> None:
    """Edit until the page says that it is over, or die."""
    with block.edit() as view:
        view[:4] = b"edit"
        page[0] = 1
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        eventually(lambda: page[1])


def with_dead_editor(**options: Any) -> tuple[shlock.Block, int]:
    """A block whose editor died, and the editor's pid."""
    block, page = shlock.Block(size=SIZE, **options), Page(2)
    child = Child(lambda: editor(block, page, die=True))
    assert child.wait() == -signal.SIGKILL
    return block, child.pid


# -- write, read, edit ----------------------------------------------------------------------------------------------------


def test_a_new_block_is_full_of_zeros_and_has_version_0(block: shlock.Block) -> None:
    assert content(block) == bytes(SIZE)
    assert block.version == 0
    assert (block.size, block.buffers, block.name, block.domain, block.owner, block.abandoned) == (
        SIZE,
        3,
        None,
        None,
        None,
        None,
    )
    assert block.contract is block.lease is None
    assert block.waiters == ()


def test_a_write_is_private_until_its_end_and_published_then(block: shlock.Block) -> None:
    put(block, b"old")
    with block.write() as view:
        assert bytes(view[:3]) == b"old"
        view[:3] = b"new"
        assert content(block)[:3] == b"old"
        assert Child(content, block).result()[:3] == b"old"
        assert block.version == 1
    assert content(block)[:3] == b"new"
    assert Child(content, block).result()[:3] == b"new"
    assert block.version == 2


def test_an_exception_leaves_the_last_committed_content(block: shlock.Block) -> None:
    put(block, b"old")
    for _ in range(5):
        with pytest.raises(KeyError), block.write() as view:
            view[:3] = b"new"
            raise KeyError
        assert content(block)[:3] == b"old"
    assert block.version == 1
    assert block.owner is None


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_many_writes_follow_one_another(copies: int) -> None:
    block = shlock.Block(size=SIZE, buffers=copies)
    for number in range(1, 30):
        with block.write() as view:
            assert view[0] == number - 1, "not what was committed last"
            view[:] = bytes([number]) * SIZE
        assert content(block) == bytes([number]) * SIZE
        assert block.version == number


def test_a_fresh_write_shows_no_particular_content_and_publishes_what_was_written(block: shlock.Block) -> None:
    put(block, b"a" * SIZE)
    put(block, b"b" * SIZE, fresh=True)
    assert content(block) == b"b" * SIZE


def test_a_block_with_one_buffer_has_no_write(domain: str) -> None:
    block = shlock.Block(size=SIZE, buffers=1)
    with pytest.raises(ValueError, match="needs a second buffer"):
        block.write()
    with block.edit() as view:
        view[:3] = b"new"
    assert content(block)[:3] == b"new"
    assert block.version == 1


def test_an_edit_changes_the_content_in_place(block: shlock.Block) -> None:
    put(block, b"old")
    with block.edit() as view:
        assert bytes(view[:3]) == b"old"
        view[:1] = b"b"
    assert content(block)[:3] == b"bld"
    assert block.version == 2


def test_an_exception_leaves_what_was_edited_so_far_as_a_new_version(block: shlock.Block) -> None:
    with pytest.raises(KeyError), block.edit() as view:
        view[:3] = b"new"
        raise KeyError
    assert content(block)[:3] == b"new"
    assert block.version == 1
    assert block.abandoned is None


def test_a_reader_waits_for_nobody_who_writes(block: shlock.Block) -> None:
    with block.write() as view:
        view[:3] = b"new"
        assert Child(content, block).result() == bytes(SIZE)
        with block.read(timeout=0) as old:  # this very thread neither
            assert bytes(old) == bytes(SIZE)


def test_a_reader_waits_until_an_edit_is_over(block: shlock.Block) -> None:
    page = Page(2)
    child = Child(lambda: editor(block, page))
    eventually(lambda: page[0])
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=f"pid {child.pid} is still editing it"), block.read(timeout=SHORT):
        pass
    assert time.monotonic() - begin >= SHORT
    reader = Child(content, block)
    eventually(lambda: is_sleeping(reader.pid))
    assert reader.is_alive()
    page[1] = 1
    assert reader.result()[:4] == b"edit"
    child.result()


def test_a_snapshot_stays_as_it_is_and_knows_its_version(block: shlock.Block) -> None:
    put(block, b"old")
    reading = block.read()
    with reading as view:
        put(block, b"new")
        assert bytes(view[:3]) == b"old"
        assert view.readonly
        assert reading.version == 1
    assert content(block)[:3] == b"new"


def test_only_one_is_inside(block: shlock.Block) -> None:
    page = Page(2)

    def count() -> None:
        for number in range(300):
            with block.write() if number & 1 else block.edit() as view:
                (value,) = struct.unpack_from("Q", view)
                if page[0]:
                    page[1] += 1
                page[0] = 1
                struct.pack_into("Q", view, 0, value + 1)
                page[0] = 0

    children = [Child(count) for _ in range(3)]
    for child in children:
        child.result()
    assert page[1] == 0
    assert struct.unpack_from("Q", content(block)) == (900,)
    assert block.version == 900


def test_who_is_inside_and_wants_in_again_gets_a_clear_error(block: shlock.Block) -> None:
    for outer in (block.write, block.edit, block.repair):
        with outer():
            for inner in (block.write, block.edit, block.repair):
                with pytest.raises(RuntimeError, match="inside already"), inner():
                    pass
    with block.edit(), pytest.raises(RuntimeError, match="this thread is editing it"), block.read():
        pass
    assert block.owner is None


@pytest.mark.parametrize("kind", ["write", "edit", "repair"])
def test_a_timeout_that_passes_raises(kind: str, block: shlock.Block) -> None:
    page = Page(2)
    child = Child(lambda: editor(block, page))
    eventually(lambda: page[0])
    for timeout in (0, -1, SHORT):
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match="held by another"), getattr(block, kind)(timeout=timeout):
            pass
        assert time.monotonic() - begin >= timeout
    page[1] = 1
    child.result()


@pytest.mark.parametrize("kind", ["write", "edit", "repair", "read"])
def test_nan_is_no_timeout(kind: str, block: shlock.Block) -> None:
    with pytest.raises(ValueError, match="NaN"), getattr(block, kind)(timeout=math.nan):
        pass
    with pytest.raises(ValueError, match="NaN"):
        block.wait_for_change(timeout=math.nan)
    assert block.owner is None


# -- views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["write", "edit"])
def test_any_consumer_of_buffers_works_on_a_view(kind: str, block: shlock.Block) -> None:
    with getattr(block, kind)() as view:
        assert (view.format, view.ndim, view.nbytes, view.c_contiguous, view.readonly) == ("B", 1, SIZE, True, False)
        struct.pack_into("<Qd", view, 8, 7, 0.5)
        with view.cast("I") as words:
            words[1] = 99
        with open("/dev/zero", "rb") as zeros:
            assert zeros.readinto(view[100:200]) == 100
    with block.read() as view:
        assert struct.unpack_from("<Qd", view, 8) == (7, 0.5)
        assert view.cast("I")[1] == 99
        assert bytes(view) == bytearray(view) == view.tobytes()


@needs_numpy
@pytest.mark.parametrize("kind", ["write", "edit"])
def test_numpy_works_on_a_view(kind: str, block: shlock.Block) -> None:
    import numpy

    with getattr(block, kind)() as view:
        array = numpy.frombuffer(view, dtype="f8")
        array[:] = numpy.arange(SIZE // 8)
    array[:] = 0  # cut off by now
    with block.read() as view:
        seen = numpy.frombuffer(view, dtype="f8")
        assert seen.sum() == sum(range(SIZE // 8))
    put(block, bytes(SIZE))
    assert seen.sum() == sum(range(SIZE // 8)), "a kept array of a snapshot shows what it showed"
    with pytest.raises(ValueError):
        seen[0] = 1


@pytest.mark.parametrize("kind", ["write", "edit", "repair", "read"])
def test_a_view_that_is_kept_is_dead(kind: str, block: shlock.Block) -> None:
    with getattr(block, kind)() as view:
        pass
    for use in (lambda: view[0], lambda: bytes(view), lambda: view.cast("I"), lambda: view.__setitem__(0, 1)):
        with pytest.raises(ValueError, match="released"):
            use()


@pytest.mark.parametrize("kind", ["write", "edit"])
def test_what_was_made_of_a_view_and_kept_shows_what_it_showed_and_writes_to_nobody(kind: str, block: shlock.Block) -> None:
    with getattr(block, kind)() as view:
        view[:4] = b"mine"
        kept, cast = view[:4], view[4:8].cast("I")
    for number in range(5):  # through every copy
        kept[0] = cast[0] = number
        put(block, bytes([number + 100]) * SIZE)
        assert bytes(kept[1:]) == b"ine"
        assert content(block) == bytes([number + 100]) * SIZE
    kept.release(), cast.release()


def test_an_exception_kills_the_view_too(block: shlock.Block) -> None:
    with contextlib.suppress(KeyError), block.write() as view:
        kept = view[:4]
        raise KeyError
    with pytest.raises(ValueError, match="released"):
        view[0]
    kept[0] = 1
    put(block, b"abcd")
    put(block, b"efgh")
    assert content(block)[:4] == b"efgh"
    assert kept[0] == 1


def test_a_forked_child_has_neither_the_view_nor_the_lock_of_its_parent(block: shlock.Block) -> None:
    for use in (block.write, block.edit):
        put(block, b"old")
        before = block.version
        with use() as view:
            kept = view[:3]

            def in_child(kept: memoryview = kept) -> str:
                kept[:] = b"bad"  # private here
                try:
                    view[0]
                except ValueError as error:
                    return str(error)
                return "alive"

            assert "released" in Child(in_child).result()
            in_child.__defaults__ = ()
            pid = os.fork()
            if pid == 0:
                break
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert block.owner is not None, "the child released it"
            assert block.version == before
            view[:3] = b"new"
            del kept
        assert content(block)[:3] == b"new"
        assert block.version == before + 1
    else:
        return
    # The child, after it has left its parent's with: it goes on as itself.
    status = 1
    with contextlib.suppress(BaseException):
        assert block.version == before
        with pytest.raises(TimeoutError), block.write(timeout=0):
            pass
        status = 0
    os._exit(status)


# -- versions -------------------------------------------------------------------------------------------------------------


def test_waiting_for_a_change_ends_with_the_new_version_or_with_the_time(block: shlock.Block) -> None:
    begin = time.monotonic()
    assert block.wait_for_change(timeout=SHORT) is None
    assert time.monotonic() - begin >= SHORT
    assert block.wait_for_change(0, 0) is None
    put(block, b"new")
    assert block.wait_for_change(0) == 1
    assert block.wait_for_change(version=7, timeout=0) == 1
    assert block.wait_for_change(1, -1) is None


@pytest.mark.parametrize("kind", ["write", "edit"])
def test_whoever_waits_for_a_change_is_woken(kind: str, block: shlock.Block, monkeypatch: pytest.MonkeyPatch) -> None:
    from shlock import _parking

    monkeypatch.setattr(_parking, "POLL_INTERVAL", 10_000.0)  # nobody finds out by himself
    rounds = 200

    def follow() -> int:
        version = 0
        while version < rounds:
            found = block.wait_for_change(version)  # with a timeout, it would see the change at the end of that
            assert found is not None
            assert found > version
            version = found
        return version

    def in_a_thread() -> int:
        """The main thread would look every 20 ms, for signals."""
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(follow()))
        thread.start()
        thread.join()
        return found[0]

    children = [Child(in_a_thread) for _ in range(3)]
    for number in range(rounds):
        with getattr(block, kind)() as view:
            view[0] = number & 255
        if number % 7 == 0:
            time.sleep(0.001)
    assert [child.result() for child in children] == [rounds] * 3


def test_threads_of_one_process_wait_and_write(block: shlock.Block) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(block.wait_for_change(0, PATIENCE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    put(block, b"new")
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [1, 1, 1]


# -- dead editors ---------------------------------------------------------------------------------------------------------


def test_after_a_dead_editor_everybody_is_warned_until_somebody_has_committed() -> None:
    block, pid = with_dead_editor()
    assert block.abandoned is not None
    assert block.abandoned.pid == pid
    for _ in range(2):
        with pytest.warns(shlock.AbandonedWarning, match=f"pid {pid}") as caught, block.read() as view:
            assert bytes(view[:4]) == b"edit"
        assert caught[0].filename == __file__
    with pytest.raises(KeyError), pytest.warns(shlock.AbandonedWarning), block.write():
        raise KeyError
    assert block.abandoned is not None, "nothing was committed"
    with pytest.warns(shlock.AbandonedWarning, match=f"pid {pid}"), block.edit() as view:
        assert block.abandoned.pid == pid
        assert bytes(view[:4]) == b"edit"
    assert block.abandoned is None
    assert content(block)[:4] == b"edit"


def test_a_write_puts_in_order_what_a_dead_editor_left() -> None:
    block, pid = with_dead_editor(on_abandoned="ignore")
    assert block.abandoned is not None
    put(block, b"whole")
    assert block.abandoned is None
    assert content(block)[:5] == b"whole"


def test_a_poisoned_block_is_for_nobody_until_it_is_repaired() -> None:
    block, pid = with_dead_editor(on_abandoned="poison")
    for use in (block.read, block.write, block.edit):
        with pytest.raises(shlock.AbandonedError, match=rf"^Block .*pid {pid}.*repair\(\)") as error, use():
            pass
        assert error.value.abandoned.pid == pid
    with pytest.raises(KeyError), block.repair() as view:
        view[:4] = b"more"
        assert block.abandoned.pid == pid
        raise KeyError
    assert block.abandoned is not None
    assert block.abandoned.pid == pid, "a repair that failed is no death"
    with pytest.raises(shlock.AbandonedError), block.read():
        pass
    with block.repair() as view:
        assert bytes(view[:4]) == b"more"
        view[:4] = b"good"
    assert block.abandoned is None
    assert content(block)[:4] == b"good"
    assert block.owner is None


def test_a_warning_that_is_an_error_leaves_everything_as_it_was() -> None:
    block, pid = with_dead_editor()
    for use in (block.read, block.write, block.edit):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(shlock.AbandonedWarning), use():
                pass
        assert block.owner is None or not block.owner.alive
        assert block.abandoned is not None
    with block.repair():
        pass
    assert block.abandoned is None


def test_nobody_is_told_of_a_living_editor_who_edits_again_while_a_reader_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two stores that end an edit, a copy is unfinished under its new number; as it is in the next edit."""
    block, page = shlock.Block(size=SIZE), Page(2)

    def edit_twice() -> None:
        with block.edit():
            pass
        editor(block, page)

    child = Child(edit_twice)
    eventually(lambda: page[0])
    # The reader saw the end of the first edit, and its editor outside.
    monkeypatch.setattr(_content.Content, "editor_who_lives", lambda self: 0)
    with mmap.mmap(-1, SIZE * 3) as mapping:
        assert block._content._read_unfinished(mapping, 1, 0, at.UNFINISHED | 1, None) is None
    page[1] = 1
    child.result()


# -- how it travels -------------------------------------------------------------------------------------------------------


def add_one(block: shlock.Block, connection: Any) -> None:
    with block.write() as view:
        view[0] += 1
    with block.edit() as view:
        view[0] += 1
    with block.read() as view:
        connection.send((view[0], block.wait_for_change(0, 1), block.size, block.buffers))


@pytest.mark.patience(120)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("kind", ["named", "anonymous"])
def test_a_block_travels_to_a_process_that_is_started_by(method: str, kind: str, domain: str) -> None:
    context = multiprocessing.get_context(method)
    block = shlock.Block("b", size=SIZE, domain=domain) if kind == "named" else shlock.Block(size=SIZE)
    here, there = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=add_one, args=(block, there))
        process.start()
    assert here.poll(PATIENCE)
    assert here.recv() == (2, 2, SIZE, 3)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert content(block)[0] == 2


def test_a_block_with_a_name_can_be_pickled_and_one_without_cannot(domain: str) -> None:
    named = shlock.Block("b", size=SIZE, domain=domain)
    copy = pickle.loads(pickle.dumps(named))
    put(copy, b"copy")
    assert content(named)[:4] == b"copy"
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(shlock.Block(size=SIZE))


def test_the_same_name_is_the_same_block(domain: str) -> None:
    one = shlock.Block("b", size=SIZE, domain=domain)
    put(one, b"data")
    for attach in (lambda: shlock.Block("b", domain=domain), lambda: shlock.Block("b", size=SIZE, buffers=3, domain=domain)):
        other = attach()
        assert content(other)[:4] == b"data"
        assert (other.name, other.domain, other.size) == ("b", domain, SIZE)
        assert Child(lambda attach=attach: content(attach())).result()[:4] == b"data"


def test_all_who_create_a_name_at_once_get_one_block(domain: str) -> None:
    def create() -> None:
        block = shlock.Block("b", size=8, domain=domain)
        for _ in range(20):
            with block.write() as view:
                view[0] += 1

    children = [Child(create) for _ in range(5)]
    for child in children:
        child.result()
    assert content(shlock.Block("b", domain=domain))[0] == 100


# -- what may be wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "error", "text"),
    [
        (0, ValueError, "at least 1, not 0"),
        (-1, ValueError, "at least 1, not -1"),
        (1.0, TypeError, "not float"),
        (True, TypeError, "not bool"),
        ("1", TypeError, "not str"),
    ],
)
def test_a_size_must_be_a_positive_int(size: Any, error: type[Exception], text: str, domain: str) -> None:
    for name in ({}, {"name": "b", "domain": domain}):
        with pytest.raises(error, match=f"^size must be .*{text}"):
            shlock.Block(size=size, **name)
    with pytest.raises(ValueError, match="buffers must be at most"):
        shlock.Block(size=1, buffers=5)


@pytest.mark.parametrize("size", [1 << 44, 1 << 60, 1 << 62, 1 << 63, 1 << 200])
def test_a_size_for_which_there_is_no_memory_is_an_oserror_at_creation(size: int, domain: str) -> None:
    before = own_files(), mapped_segments()
    for name in ({}, {"name": "b", "domain": domain}):
        with pytest.raises(OSError) as error:
            shlock.Block(size=size, **name)
        assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert (own_files(), mapped_segments()) == before


def test_all_memory_is_taken_at_creation(block: shlock.Block) -> None:
    facts = os.fstat(block._block.arena.segment.fd)
    assert facts.st_blocks * 512 >= facts.st_size


@pytest.mark.parametrize("size", [1, 7, 4095, 4096, 4097, 100_000])
def test_a_content_is_just_as_long_as_its_size(size: int) -> None:
    block = shlock.Block(size=size)
    for number in range(1, 5):
        with block.write() as view:
            assert len(view) == size
            view[:] = bytes([number]) * size
            with pytest.raises(IndexError):
                view[size] = 1
        assert content(block) == bytes([number]) * size


@pytest.mark.parametrize(
    ("wanted", "facts"),
    [
        ({"size": 5}, (f"a Block of {SIZE} bytes there", "a Block of 5 bytes is wanted")),
        ({"size": SIZE, "buffers": 2}, ("has 3 buffers there", "2 are wanted")),
        ({"size": SIZE, "on_abandoned": "poison"}, ("a Block of", "on_abandoned='poison' is wanted")),
        ({"size": SIZE, "lease": 1.0}, ("without a lease there",)),
    ],
)
def test_attaching_to_something_else_names_both(wanted: dict[str, Any], facts: tuple[str, ...], domain: str) -> None:
    block = shlock.Block("b", size=SIZE, domain=domain)

    def attach() -> str:
        with pytest.raises(shlock.SegmentError) as error:
            shlock.Block("b", domain=domain, **wanted)
        return str(error.value)

    for text in (attach(), Child(attach).result()):
        assert all(fact in text for fact in facts), text
    assert content(block) == bytes(SIZE)


def test_a_block_that_is_not_there_is_not_made_without_a_size(domain: str) -> None:
    with pytest.raises(shlock.SegmentError, match=r"there is no 'b' in domain .* Give a size"):
        shlock.Block("b", domain=domain)
    with pytest.raises(ValueError, match="needs size="):
        shlock.Block()
    with pytest.raises(ValueError, match="and there is none"):
        shlock.Block(size=1, domain=domain)


def test_in_a_domain_of_the_machine_a_block_needs_a_lease() -> None:
    with pytest.raises(ValueError, match="is of the machine: only Lock, RLock, Block, Channel and Queue can be opened there"):
        shlock.Block("b", size=1, domain="/machine")


@pytest.mark.parametrize("option", [{"grace": 1.0}, {"rank": 1}, {"operations": ("read",)}, {"record_site": True}])
def test_what_belongs_to_a_contract_needs_a_lease(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs lease="):
        shlock.Block(size=1, **option)


def test_a_block_that_is_closed_says_so(domain: str) -> None:
    block = shlock.Block("b", size=SIZE, domain=domain)
    other = shlock.Block("b", domain=domain)
    with block.write() as view:
        block.close()
        view[:4] = b"data"
    block.close()
    assert repr(block) == "<Block(closed)>"
    for use in (
        block.read, block.write, block.edit, block.repair, block.wait_for_change, lambda: block.version, lambda: block.name,
        lambda: block.size, lambda: block.owner, lambda: block.abandoned, lambda: block.waiters, lambda: pickle.dumps(block),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            use()
    assert not hasattr(other, "no such thing")
    assert content(other)[:4] == b"data"


def test_a_block_that_is_dropped_lets_its_memory_go(block: shlock.Block) -> None:
    with block.write() as view:
        view[0] = 1
    content(block)
    fd = block._block.arena.segment.fd
    inode = os.fstat(fd).st_ino
    block.close()
    gc.collect()
    with contextlib.suppress(OSError):
        assert os.fstat(fd).st_ino != inode
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if f" {inode} " in line]


def test_repr_says_what_is_so(block: shlock.Block, domain: str) -> None:
    assert repr(block) == f"<Block(size={SIZE}, version=0, owner=None)>"
    named = shlock.Block("b", size=8, domain=domain)
    with named.write():
        assert repr(named) == "<Block(size=8, version=0, owner=MainProcess, name='b')>"
    dead, pid = with_dead_editor()
    assert repr(dead).endswith(f"owner=pid {pid} {named._block.arena.process_name(pid) or ''}".rstrip() + ")>") or (
        f"abandoned by pid {pid}" in repr(dead)
    )


def damage(seed: int, domain: str | None) -> int:
    """Random words in both control blocks: how many bounded calls raised an Exception."""
    numbers = random.Random(seed)
    block = shlock.Block("b", size=SIZE, domain=domain) if domain else shlock.Block(size=SIZE)
    put(block, b"data")
    words = block._block.arena.words
    first = block._block.start
    raised = 0

    def use(hold: Any) -> None:
        with hold as view:
            assert len(view) == SIZE
            bytes(view)
            if not view.readonly:
                view[:] = bytes(SIZE)

    for _ in range(150):
        good = words.view[first : first + 2 * at.BLOCK_WORDS].tobytes()
        for index in numbers.sample(range(2 * at.BLOCK_WORDS), numbers.choice((1, 1, 2, 5, 32))):
            words.store(first + index, test_damage.a_word(numbers))
        for call in (
            lambda: use(block.read(timeout=test_damage.SHORT)),
            lambda: use(block.read()),
            lambda: use(block.write(timeout=test_damage.SHORT)),
            lambda: use(block.edit(timeout=test_damage.SHORT)),
            lambda: use(block.repair(timeout=test_damage.SHORT)),
            lambda: use(block.read(timeout=test_damage.SHORT)),
            lambda: block.version,
            lambda: block.abandoned,
            lambda: block.owner,
            lambda: block.wait_for_change(timeout=test_damage.SHORT),
            lambda: repr(block),
            lambda: shlock.Block("b", domain=domain) if domain else None,
            lambda: list(snapshot._primitives(block._block.arena)),
        ):
            raised += bool(test_damage.survives(call))
        words.view[first : first + 2 * at.BLOCK_WORDS] = memoryview(good).cast("Q")
    put(block, b"whole")
    assert content(block)[:5] == b"whole"
    return raised


@pytest.mark.patience(300)
@pytest.mark.parametrize("kind", ["named", "anonymous"])
def test_every_bounded_call_survives_random_words_in_the_control_blocks(kind: str, domain: str) -> None:
    print(f"SHLOCK_TEST_SEED={test_damage.SEED}")
    raised = Child(damage, test_damage.SEED, domain if kind == "named" else None).result(6 * PATIENCE)
    assert raised > 10


@pytest.mark.parametrize("word", [at.HEADER_DATA, at.HEADER_SIZE, at.HEADER_BLOCKS])
@pytest.mark.parametrize("value", [0, 1, 4096, 1 << 40, at.WORD_MASK])
def test_a_damaged_header_is_refused(word: int, value: int, domain: str) -> None:
    block = shlock.Block("b", size=SIZE, domain=domain)
    view = block._block.arena.words.view
    good, view[word] = view[word], value

    def attach() -> str:
        _memory._named.clear()  # as a process that never had it
        try:
            shlock.Block("b", domain=domain)
        except shlock.SegmentError as error:
            return str(error)
        return ""

    text = Child(attach).result()
    view[word] = good
    assert "damaged" in text or "no second control block" in text or word == at.HEADER_SIZE  # which is only shown
    assert content(block) == bytes(SIZE)


@pytest.mark.parametrize("size", [0, 1, SIZE - 4096, SIZE + 4096, 1 << 40, at.WORD_MASK])
def test_a_damaged_size_is_refused(size: int, domain: str) -> None:
    block = shlock.Block("b", size=SIZE, domain=domain)
    block._block.arena.words.view[block._block.start + at.BLOCK_PARAMETER] = size

    def attach() -> str:
        with pytest.raises(shlock.SegmentError) as error:
            shlock.Block("b", domain=domain)
        return error.value.fact

    assert "no copies of" in Child(attach).result()
    assert content(block) == bytes(SIZE), "who has it open goes on"


def test_words_that_do_not_fit_together_are_called_damaged(block: shlock.Block) -> None:
    made = block._content
    made.view[made.versions[0]] = 5
    for use in (block.read, block.write, block.edit):
        with pytest.raises(shlock.SegmentError, match="copy 0 should hold version 0, and says 5"), use():
            pass
    with block.repair() as view:
        view[:4] = b"good"
    assert content(block)[:4] == b"good"


def test_a_reader_that_is_overtaken_all_the_time_gives_up_with_a_clear_error(block: shlock.Block) -> None:
    made = block._content

    class Overtaking:
        """The words; whenever somebody looks at the number of a copy, so many versions are published that it is another one."""

        def __getitem__(self, index: int) -> int:
            if index in made.versions:
                for _ in range(made.copies):
                    number, copy = (real[made.current] >> 2) + 1, ((real[made.current] & 3) + 1) % made.copies
                    real[made.versions[copy]], real[made.current] = number, number << 2 | copy
            value: int = real[index]
            return value

    real, made.view = made.view, Overtaking()  # type: ignore[assignment]
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="writers were faster"), block.read(timeout=SHORT):
        pass
    assert time.monotonic() - begin >= SHORT


class Slow:
    """A mapping of the copies; in the middle of the first look at it, something happens."""

    def __init__(self, mapping: mmap.mmap, happens: Any) -> None:
        self.mapping = mapping
        self.happens = [happens]

    def __getitem__(self, part: slice) -> bytes:
        middle = (part.start + part.stop) // 2
        first = self.mapping[part.start : middle]
        if self.happens:
            self.happens.pop()()
        return first + self.mapping[middle : part.stop]


@pytest.mark.parametrize("kind", ["write", "edit"])
def test_a_reader_whose_copy_is_overwritten_meanwhile_begins_anew(kind: str) -> None:
    block = shlock.Block(size=SIZE, buffers=2)
    put(block, b"1" * SIZE)
    content(block)
    holds = []

    def happens() -> None:
        """A whole version, and half of the next one into the copy that is being read; or an edit in place."""
        if kind == "write":
            put(block, b"2" * SIZE)
            holds.append(block.write())
            holds[0].__enter__()[:] = b"3" * SIZE
        else:
            with block.edit() as view:
                view[:] = b"2" * SIZE

    made = block._content
    made._reading = Slow(made._reading, happens)  # type: ignore[arg-type, assignment]
    assert content(block) == b"2" * SIZE
    for hold in holds:
        hold.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["write", "edit"])
def test_nobody_of_the_writers_process_can_change_anything_once_the_commit_has_begun(kind: str, block: shlock.Block) -> None:
    seen = []

    def look(label: str) -> None:
        if label.startswith(("C24", "C25", "C26", "C29 version")):
            kept[:] = b"late"
            with pytest.raises(ValueError, match="released"):
                view[0]
            seen.append(label)

    with getattr(block, kind)() as view:
        view[:4] = b"good"
        kept = view[:4]
        _sys.crash_points[:] = [look]
    _sys.crash_points.clear()
    assert len(seen) >= 2
    assert content(block)[:4] == b"good"


# -- leases ---------------------------------------------------------------------------------------------------------------


def mappings(block: shlock.Block) -> set[str]:
    """The rights of this process's mappings of a block's segment."""
    inode = os.fstat(block._block.arena.segment.fd).st_ino
    return {fields[1] for line in Path("/proc/self/maps").read_text().splitlines() if (fields := line.split())[4] == str(inode)}


def test_a_holder_that_overruns_while_it_writes_is_killed_and_its_write_undone(domain: str) -> None:
    def create() -> None:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG)
        put(block, b"whole")

    def overrun() -> None:
        block = shlock.Block("b", domain=domain, lease=SHORT)
        with block.write() as view:
            assert block.lease is not None
            view[:] = b"x" * SIZE
            spin()

    def look() -> tuple[bytes, int, Any]:
        block = shlock.Block("b", domain=domain)
        with block.write(timeout=PATIENCE) as view:
            seen = bytes(view)
            assert block.abandoned is None
        return seen, block.version, block.abandoned

    Child(create).result()
    for _ in range(3):
        assert Child(overrun).wait() == -signal.SIGKILL
    seen, version, abandoned = Child(look).result()
    assert seen[:5] == b"whole"
    assert seen[5:] == bytes(SIZE - 5)
    assert version == 2
    assert abandoned is None


def test_a_holder_that_overruns_while_it_edits_is_killed_and_the_heir_told(domain: str) -> None:
    def overrun() -> None:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=SHORT)
        with block.edit() as view:
            view[:4] = b"half"
            spin()

    def inherit() -> tuple[int, str]:
        block = shlock.Block("b", domain=domain)
        with pytest.warns(shlock.AbandonedWarning), block.edit(timeout=PATIENCE) as view:
            assert bytes(view[:4]) == b"half"
            abandoned = block.abandoned
        assert abandoned is not None
        return abandoned.pid, abandoned.reason

    hog = Child(overrun)
    assert hog.wait() == -signal.SIGKILL
    assert Child(inherit).result() == (hog.pid, "lease overrun")


def test_a_contract_for_reading_maps_everything_read_only_and_can_only_read(domain: str) -> None:
    def create() -> set[str]:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG)
        put(block, b"data")
        with block.read():
            return mappings(block)

    def read() -> set[str]:
        block = shlock.Block("b", domain=domain, lease=LONG, operations=("read",))
        assert content(block)[:4] == b"data"
        assert block.contract is not None
        assert block.contract.operations == {"read"}
        for use in (block.write, block.edit, block.repair):
            with pytest.raises(shlock.ContractDenied, match="does not allow to write, only read"), use():
                pass
        for word in range(block._block.arena.layout.tables // at.WORD):
            with pytest.raises(TypeError):
                block._block.arena.words.view[word] = 0
            if word > 600:
                break
        with pytest.raises(PermissionError):
            mmap.mmap(block._block.arena.segment.fd, 4096)
        assert block.wait_for_change(timeout=SHORT) is None
        assert block.version == 1
        repr(block), block.waiters, block.owner, block.abandoned
        return mappings(block)

    assert "rw-s" in Child(create).result()
    assert Child(read).result() == {"r--s"}


def test_who_may_only_read_sees_every_change_and_waits_for_editors(domain: str) -> None:
    page = Page(3)

    def create() -> None:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG)
        page[2] = 1
        editor(block, page)
        eventually(lambda: page[2] == 2)
        put(block, b"last")

    def follow() -> list[bytes]:
        block = shlock.Block("b", domain=domain, lease=LONG, operations=("read",))
        with pytest.raises(TimeoutError, match="still editing"), block.read(timeout=SHORT):
            pass
        page[1] = 1
        seen = [content(block)[:4]]
        version = block.version
        page[2] = 2
        assert block.wait_for_change(version, PATIENCE) == 2
        return [*seen, content(block)[:4]]

    writer = Child(create)
    eventually(lambda: page[0])
    assert Child(follow).result() == [b"edit", b"last"]
    writer.result()


def test_a_reader_without_a_writers_rights_may_come_first(domain: str) -> None:
    """It creates the block, which the supervisor hears of through it."""

    def read() -> set[str]:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG, operations=("read",))
        assert content(block) == bytes(SIZE)
        return mappings(block)

    assert Child(read).result() == {"r--s"}
    Child(lambda: put(shlock.Block("b", domain=domain), b"data")).result()


def test_a_contract_for_writing_only_does_not_read(domain: str) -> None:
    def body() -> None:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG, operations=("write",))
        put(block, b"data")
        with pytest.raises(shlock.ContractDenied, match="does not allow to read, only write"):
            block.read()

    Child(body).result()


def test_one_process_has_one_contract_for_a_block(domain: str) -> None:
    def body() -> None:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG)
        with pytest.raises(ValueError, match="One process has one contract"):
            shlock.Block("b", domain=domain, lease=LONG, operations=("read",))
        with pytest.raises(ValueError, match="One process has one contract"):
            shlock.Block("b", domain=domain, lease=2 * LONG)
        assert content(shlock.Block("b", domain=domain)) == content(block)
        block.close()

    Child(body).result()
    with pytest.raises(ValueError, match="needs a name"):
        shlock.Block(size=SIZE, lease=LONG, operations=("read",))


@pytest.mark.parametrize("kind", ["write", "edit"])
@pytest.mark.parametrize("what", ["token", "owner"])
def test_a_write_through_a_stale_lease_is_refused(kind: str, what: str, domain: str) -> None:
    def body() -> tuple[str, int, bytes]:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG, on_abandoned="ignore")
        put(block, b"good")
        words, start = block._block.arena.words, block._block.start
        hold = getattr(block, kind)()
        hold.__enter__()[:4] = b"late"
        # As if the lock had been passed on: to somebody who has gone again, or who is inside.
        place = start + (at.BLOCK_TOKEN if what == "token" else at.BLOCK_WORD)
        words.store(place, words.load(place) + 1 if what == "token" else 1 << at.PID_SHIFT)
        with pytest.raises(shlock.LeaseExpired) as error:
            hold.__exit__(None, None, None)
        return str(error.value), block.version, content(block)[:4]

    text, version, seen = Child(body).result()
    assert "Block 'b': the lease of token 2 is over" in text
    assert version == 1
    if kind == "write":
        assert seen == b"good"


def test_a_lease_is_there_while_inside_and_records_the_line(domain: str) -> None:
    page = Page(2)

    def hold() -> None:
        block = shlock.Block("b", size=SIZE, domain=domain, lease=LONG, record_site=True)
        with block.write():
            assert block.lease is not None
            assert 0 < block.lease.remaining() <= LONG
            page[0] = 1
            eventually(lambda: page[1])
        assert block.lease is None

    child = Child(hold)
    eventually(lambda: page[0])
    [shown] = [one for domain_ in snapshot.domains() if domain_.domain == domain for one in domain_.primitives]
    assert shown.lease is not None
    assert "test_block.py:" in str(shown.lease.site)
    assert shown.state == "being written"
    assert shown.owner is not None
    assert shown.owner.pid == child.pid
    page[1] = 1
    child.result()


def test_an_anonymous_leased_block_works_in_a_forked_child() -> None:
    def body() -> bytes:
        block = shlock.Block(size=SIZE, lease=LONG)
        Child(put, block, b"data").result()
        with block.write():
            assert block.lease is not None
        return content(block)[:4]

    assert Child(body).result() == b"data"


# -- what others see ------------------------------------------------------------------------------------------------------


def test_ps_says_what_is_being_done_to_a_block(domain: str) -> None:
    block = shlock.Block("b", size=SIZE, domain=domain)

    def state() -> str:
        [shown] = [one for found in snapshot.domains() if found.domain == domain for one in found.primitives]
        assert (shown.name, shown.kind) == ("b", "Block")
        if shown.state.startswith("being"):
            assert shown.owner is not None
            assert shown.owner.pid == os.getpid()
        if shown.state == "abandoned":
            assert shown.abandoned is not None
            assert shown.abandoned.pid == child.pid
        return shown.state

    assert state() == "version 0"
    with block.write():
        assert state() == "being written"
    with block.edit():
        assert state() == "being edited"
    assert state() == "version 2"
    page = Page(2)
    child = Child(lambda: editor(block, page, die=True))
    child.wait()
    assert state() == "abandoned"
    with block.repair():
        pass
    assert state() == "version 3"


# -- costs and signals ----------------------------------------------------------------------------------------------------


@pytest.mark.patience(180)
@pytest.mark.parametrize(
    "what",
    [
        "with p.write() as view: view[0] = 1",
        "with p.write(fresh=True) as view: view[0] = 1",
        "with p.edit() as view: view[0] = 1",
        "with p.read() as view: view[0]",
        "p.version; p.wait_for_change(-1)",
    ],
)
def test_no_system_call_in_20_000_uncontended(what: str, domain: str, tmp_path: Path) -> None:
    calls = calls_of_loop("shlock.Block(size=4096)", what, 20_000, domain, tmp_path)
    assert calls == [], f"{len(calls)} system calls"


class Use(Trial):
    """One whole ``with``."""

    def __init__(self, block: shlock.Block, kind: str) -> None:
        self.block, self.kind = block, kind
        self.before = block.version
        self.inside = self.over = False

    def operate(self) -> None:
        with getattr(self.block, self.kind)() as view:
            self.inside = True
            if self.kind != "read":
                view[:] = bytes([(self.before + 1) % 256]) * self.block.size
        self.over = True

    def finish(self, outcome: Interruption) -> None:
        block = self.block
        if outcome.at_entry and outcome.where.startswith("Hold.__exit__"):  # the documented limit
            assert block.owner is not None
            block._lock.release()
            with block.repair() as view:
                view[:] = bytes([block.version % 256 + 1 & 255]) * block.size
            return
        assert block.owner is None, "it is still held"
        assert block.abandoned is None
        assert block.version in ((self.before + 1,) if self.over and self.kind != "read" else (self.before, self.before + 1))
        # An edit that was interrupted before anybody got its view counts, and has changed nothing.
        number = self.before if self.kind in ("edit", "repair") and not self.inside else block.version
        assert content(block) == bytes([number % 256]) * block.size
        with block.write(timeout=0) as view:
            view[:] = bytes([(block.version + 1) % 256]) * block.size


@pytest.mark.patience(180)
@pytest.mark.parametrize("kind", ["write", "edit", "repair", "read"])
def test_a_signal_at_any_moment_leaves_a_whole_content_and_a_free_lock(kind: str) -> None:
    block = shlock.Block(size=64, on_abandoned="ignore")
    interrupt_everywhere(lambda: Use(block, kind), 3)
    assert not _sys.crash_points
