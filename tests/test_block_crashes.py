"""A process that uses a Block is killed at every step; the content is the last committed one, and everybody else goes on.

Every version of a content is one byte, repeated.  So a torn one is seen at once, and whose it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import PATIENCE, Child, DieAtLabel, Page, eventually, is_sleeping

import shlock
from shlock import _sys

SIZE = 20_000
ROUNDS = 3
FIRST, VICTIMS, HEIRS = 1, 0xEE, 10  # bytes; each heir has one of his own
OTHERS = (0, 1, 3)

INSIDE, COMMITTED, RELEASED = "C22 inside, nothing marked", "C26 committed, lock held", "C27 lock released, nobody woken"
MARKED, COUNTED = "C29 marked as edited", "C29 version counted, still marked"

WRITING = (INSIDE, "C23 copy marked", "C24 content in place", "C25 copy complete, not current", COMMITTED, RELEASED)
EDITING = (INSIDE, "C28 editor named", MARKED, COUNTED, COMMITTED, RELEASED)
CREATING = ("C20 segment made, not published", "C21 segment published")

#: At which of the source's labels a process is killed here.
LABELS = {*WRITING, *EDITING, *CREATING}

Use = Callable[[shlock.Block], Any]


def write(block: shlock.Block) -> Any:
    return block.write(timeout=PATIENCE)


def write_fresh(block: shlock.Block) -> Any:
    return block.write(fresh=True, timeout=PATIENCE)


def edit(block: shlock.Block) -> Any:
    return block.edit(timeout=PATIENCE)


def repair(block: shlock.Block) -> Any:
    return block.repair(timeout=PATIENCE)


def fill(view: memoryview, byte: int) -> None:
    view[:] = bytes([byte]) * len(view)


def only_byte(content: bytes) -> int:
    assert content == content[:1] * SIZE, "torn"
    return content[0]


@contextlib.contextmanager
def told_of() -> Iterator[list[int]]:
    """The processes of whose death somebody was told inside."""
    pids: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield pids
    for warning in caught:
        assert issubclass(warning.category, shlock.AbandonedWarning), warning
        pids.append(int(str(warning.message).split("owner pid ")[1].split()[0]))


def new_block(**options: Any) -> shlock.Block:
    """One that was written once."""
    block = shlock.Block(size=SIZE, **options)
    with block.edit() as view:
        fill(view, FIRST)
    return block


def die_at(label: str, block: shlock.Block, use: Use) -> None:
    _sys.crash_points[:] = [DieAtLabel(label, 1).label]
    with use(block) as view:
        fill(view, VICTIMS)


def go_on(block: shlock.Block, use: Use, byte: int) -> list[int]:
    """What an heir does: some rounds; of whose death he was told when he came in."""
    heard: list[int] = []
    for _ in range(ROUNDS):
        with told_of() as pids, use(block) as view:
            only_byte(bytes(view))
            fill(view, byte)
        heard += pids
        with told_of(), block.read(timeout=PATIENCE) as view:  # readers are told as long as nobody has committed
            only_byte(bytes(view))
    return heard


def wait_for(block: shlock.Block, version: int) -> int:
    """What a watcher does."""
    while (seen := block.version) < version:
        assert block.wait_for_change(seen, PATIENCE), "nobody told of a change"
    return block.version


def kill_among(label: str, others: int, block: shlock.Block, victims: Use, heirs: Use) -> tuple[Child, list[int]]:
    """The victim comes in together with heirs, and dies; the victim, and of whose death heirs were told."""
    committed = int(label in (COMMITTED, RELEASED) or label == COUNTED)
    last = block.version + committed + others * ROUNDS
    watchers = [Child(wait_for, block, last) for _ in range(others)]
    gate = block.write()
    gate.__enter__()
    children = [Child(go_on, block, heirs, HEIRS + number) for number in range(others)]
    victim = Child(die_at, label, block, victims)
    eventually(lambda: len(block.waiters) == others + 1, "all of them wait")
    gate.__exit__(KeyError, KeyError(), None)  # publishes nothing
    assert victim.wait() == -signal.SIGKILL
    told = [pid for child in children for pid in child.result()]
    for watcher in watchers:
        watcher.result()
    assert block.version == last
    return victim, told


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("heirs", [write, edit])
@pytest.mark.parametrize("victims", [write, write_fresh])
@pytest.mark.parametrize("label", WRITING)
def test_the_last_committed_content_is_there_when_a_writer_is_killed_at(
    label: str, victims: Use, heirs: Use, others: int
) -> None:
    block = new_block()
    victim, told = kill_among(label, others, block, victims, heirs)
    assert told == [], "a dead writer has left nothing to be told of"
    with told_of() as pids, block.read(timeout=PATIENCE) as view:
        last = only_byte(bytes(view))
    possible = {VICTIMS if label in (COMMITTED, RELEASED) else FIRST} if not others else set(range(HEIRS, HEIRS + others))
    assert last in possible | ({VICTIMS} if others and label in (COMMITTED, RELEASED) else set())
    assert go_on(block, write, 99) == pids == []
    assert block.abandoned is None
    assert block.owner is None


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize(("heirs", "copies"), [(write, 3), (edit, 3), (edit, 1)])
@pytest.mark.parametrize("label", EDITING)
def test_whoever_comes_next_is_told_when_an_editor_is_killed_in_place_at(
    label: str, copies: int, heirs: Use, others: int
) -> None:
    block = new_block(buffers=copies)
    is_told = label in (MARKED, COUNTED)
    watcher = Child(wait_for, block, 1 + others * ROUNDS)
    gate = block.edit()
    assert gate.__enter__()[0] == FIRST
    children = [Child(go_on, block, heirs, HEIRS + number) for number in range(others)]
    victim = Child(die_at, label, block, edit)
    eventually(lambda: len(block.waiters) == others + 1, "all of them wait")
    gate.__exit__(None, None, None)
    assert victim.wait() == -signal.SIGKILL
    told = [pid for child in children for pid in child.result()]
    watcher.result()
    if not told and is_told and others:
        told = go_on(block, heirs, 50)  # the victim came last
    elif not others and is_told:
        assert block.abandoned is not None
        assert block.abandoned.pid == victim.pid
        with told_of() as pids, block.read() as view:
            assert view[0] in (FIRST, VICTIMS)
        assert pids == [victim.pid]
        told = go_on(block, heirs, 50)
    assert told == ([victim.pid] if is_told else []), "one who came next is told, once"
    assert block.abandoned is None
    assert go_on(block, edit, 99) == []


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("label", EDITING)
def test_a_poisoned_block_stays_poisoned_when_its_repairer_is_killed_before_he_has_committed_at(
    label: str, others: int
) -> None:
    block = new_block(on_abandoned="poison")
    editor = Child(die_at, MARKED, block, edit)
    assert editor.wait() == -signal.SIGKILL

    def try_all() -> int:
        """How often it was refused."""
        refusals = 0
        for use in (write, edit, lambda b: b.read()):
            try:
                with use(block) as view:
                    only_byte(bytes(view))
            except shlock.AbandonedError as error:
                assert error.abandoned.pid in (editor.pid, repairer_pid[0])
                refusals += 1
        return refusals

    repairer_pid = Page(1)
    children = [Child(try_all) for _ in range(others)]
    assert [child.result() for child in children] == [3] * others
    repairer = Child(die_at, label, block, repair)
    assert repairer.wait() == -signal.SIGKILL
    repairer_pid[0] = repairer.pid
    is_repaired = label in (COMMITTED, RELEASED)
    children = [Child(try_all) for _ in range(others)]
    assert [child.result() for child in children] == [0 if is_repaired else 3] * others
    if not is_repaired:
        assert block.abandoned is not None
        with pytest.raises(shlock.AbandonedError, match="Block"), block.write():
            pass
        with block.repair(timeout=PATIENCE) as view:
            assert block.abandoned.pid in (editor.pid, repairer.pid)
            fill(view, 7)
    assert try_all() == 0
    assert block.abandoned is None


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("use", [write, edit])
@pytest.mark.parametrize("label", [COMMITTED, RELEASED])
def test_who_waits_for_a_version_finds_it_when_its_writer_died_before_he_told_anybody(
    label: str, use: Use, others: int
) -> None:
    block = new_block()
    watchers = [Child(block.wait_for_change, 1, PATIENCE) for _ in range(others)]
    for watcher in watchers:
        eventually(lambda watcher=watcher: is_sleeping(watcher.pid))
    victim = Child(die_at, label, block, use)
    assert victim.wait() == -signal.SIGKILL
    assert [watcher.result() for watcher in watchers] == [2] * others
    assert block.wait_for_change(1, 0) == 2


@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("policy", ["warn", "ignore", "poison"])
def test_readers_that_wait_for_an_editor_go_on_when_he_is_killed(policy: Any, others: int) -> None:
    block = new_block(on_abandoned=policy)
    page = Page(1)

    def stay() -> None:
        with block.edit() as view:
            view[: SIZE // 2] = bytes([VICTIMS]) * (SIZE // 2)
            page[0] = 1
            signal.pause()

    def read() -> tuple[int, int] | int:
        with told_of() as pids:
            try:
                with block.read(timeout=PATIENCE) as view:
                    ends = view[0], view[-1]
            except shlock.AbandonedError as error:
                return error.abandoned.pid
        assert pids == ([editor.pid] if policy == "warn" else [])
        return ends

    editor = Child(stay)
    eventually(lambda: page[0])
    readers = [Child(read) for _ in range(others)]
    for reader in readers:
        eventually(lambda reader=reader: is_sleeping(reader.pid))
    assert all(reader.is_alive() for reader in readers)
    editor.kill()
    expected = editor.pid if policy == "poison" else (VICTIMS, FIRST)
    assert [reader.result() for reader in readers] == [expected] * others


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("label", CREATING)
def test_a_name_is_there_or_not_when_its_creator_is_killed_at(label: str, others: int, domain: str) -> None:
    page = Page(1)

    def create() -> int:
        block = shlock.Block("b", size=SIZE, domain=domain)
        with block.write(timeout=PATIENCE) as view:
            fill(view, only_byte(bytes(view)) + 1)
        return os.getpid()

    def create_and_die() -> None:
        death = DieAtLabel(label, 1)

        def at_point(seen: str) -> None:
            page[0] |= seen == label
            death.label(seen)

        _sys.crash_points[:] = [at_point]
        create()

    def create_beside() -> int:
        eventually(lambda: page[0])  # sooner, and it may have published the name before the victim
        return create()

    children = [Child(create_beside) for _ in range(others)]
    victim = Child(create_and_die)
    assert victim.wait() == -signal.SIGKILL
    for child in children:
        child.result()
    if not others and label == CREATING[0]:
        with pytest.raises(shlock.SegmentError, match="there is no 'b'"):
            shlock.Block("b", domain=domain)
    block = shlock.Block("b", size=SIZE, domain=domain)
    assert block.version == others
    with block.read() as view:
        assert only_byte(bytes(view)) == others


@pytest.mark.parametrize("copies", [2, 3])
def test_readers_never_see_a_torn_content_while_writers_are_killed_again_and_again(copies: int) -> None:
    block = new_block(buffers=copies)
    page = Page(2)

    def write_on() -> None:
        byte = block.version % 200
        while True:
            byte = (byte + 1) % 200
            with block.write(fresh=bool(byte & 1)) as view:
                fill(view, byte)

    def read_on() -> int:
        count = version = 0
        while not page[0]:
            reading = block.read(timeout=PATIENCE)
            with reading as view:
                only_byte(bytes(view))
            assert reading.version >= version, "a version came back"
            version = reading.version
            count += 1
        return count

    readers = [Child(read_on) for _ in range(2)]
    for _ in range(60):
        before = block.version
        writer = Child(write_on)
        eventually(lambda: block.version > before + 3)
        writer.kill()
        with block.read(timeout=PATIENCE) as view:
            only_byte(bytes(view))
    page[0] = 1
    assert all(reader.result() > 60 for reader in readers)
    assert block.abandoned is None
