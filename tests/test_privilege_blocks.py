"""Blocks in domains of the machine: what readers cannot do, what writers cannot do to others, and whose memory it is.

Needs root, as ``test_privilege`` does, from which the users and the ways to be them are.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import itertools
import mmap
import os
import pickle
import random
import re
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import test_privilege
from support import Child, DieAtLabel, Page, eventually, watch_steps
from test_privilege import (
    ALICE,
    BOB,
    CAROL,
    DONE,
    GO,
    LONG,
    MALLORY,
    READY,
    SHORT,
    SPARE,
    as_user,
    kinds,
    libc,
    pytestmark,
    reasons,
    serve,
    talk,
)  # fmt: skip

import shlock
from shlock import _layout as at
from shlock import _machine, _process, _sys, cli
from shlock._semaphore import SegmentSemaphore
from shlock.errors import ContractDenied, SegmentError
from shlock.supervisor import Supervisor, parse

__all__ = ["pytestmark"]

LABELS = ("M-1 segment made, not sealed", "M-2 sealed, not answered")
EVE = 61005
"""May acquire, and neither read nor write."""

SIZE = 3 * mmap.PAGESIZE // 2
MOST = 1 << 20  # bytes of one user

POLICY = parse(
    f"""
[[rule]]
users = ["@self"]
names = ["*"]
operations = ["acquire", "read", "write"]
longest_lease = 3600.0
most_bytes = 1073741824

[[rule]]
users = [{ALICE}, {BOB}]
names = ["shared*"]
operations = ["acquire", "read", "write"]
longest_lease = {LONG}
longest_grace = {LONG}
most_contracts = 20
most_bytes = {MOST}

[[rule]]
users = [{CAROL}]
names = ["shared*"]
operations = ["read"]
longest_lease = {LONG}

[[rule]]
users = [{EVE}]
names = ["shared*"]
operations = ["acquire", "preempt"]
longest_lease = {LONG}
""",
    "policy.toml",
)

# Fixtures.
domain, supervisor, page = test_privilege.domain, test_privilege.supervisor, test_privilege.page


def block_of(domain: str, name: str = "shared", size: int | None = SIZE, lease: float = LONG, **options: Any) -> shlock.Block:
    return shlock.Block(name, size=size, domain=domain, lease=lease, **options)


def reader_of(domain: str, name: str = "shared", **options: Any) -> shlock.Block:
    return block_of(domain, name, None, operations=["read"], **options)


def put(block: shlock.Block, data: bytes) -> int:
    with block.write() as view:
        view[: len(data)] = data
    return block.version


def content(block: shlock.Block, length: int = 5) -> bytes:
    with block.read() as view:
        return bytes(view[:length])


def write(domain: str, data: bytes, name: str = "shared", size: int = SIZE) -> int:
    """Of a process's whole life."""
    return put(block_of(domain, name, size), data)


def read(domain: str, name: str = "shared") -> tuple[bytes, int]:
    block = reader_of(domain, name)
    return content(block), block.version


# -- several users, one block ---------------------------------------------------------------------------------------------


def test_users_write_and_read_one_block(domain: str, supervisor: Supervisor) -> None:
    assert as_user(ALICE, write, domain, b"alice").result() == 1
    assert as_user(BOB, lambda: (content(block_of(domain)), write(domain, b"bob  "))).result() == (b"alice", 2)
    assert as_user(CAROL, read, domain).result() == (b"bob  ", 2)

    def edit() -> int:
        block = block_of(domain, size=None)
        with block.edit() as view:
            view[0] += 1
        return block.size

    assert as_user(ALICE, edit).result() == SIZE
    assert as_user(CAROL, read, domain).result() == (b"cob  ", 3)


def test_changes_of_one_user_wake_another_one(domain: str, supervisor: Supervisor, page: Page) -> None:
    as_user(ALICE, write, domain, b"first").result()

    def follow(operations: list[str], word: int) -> tuple[int | None, bytes]:
        block = block_of(domain, size=None, operations=operations)
        page[word] = 1
        return block.wait_for_change(1, timeout=LONG), content(block)

    followers = [as_user(BOB, follow, ["read", "write"], READY), as_user(CAROL, follow, ["read"], GO)]
    eventually(lambda: page[READY] and page[GO])
    as_user(ALICE, write, domain, b"after").result()
    assert [follower.result() for follower in followers] == [(2, b"after")] * 2


def test_a_block_of_the_machine_goes_to_forked_and_pickled_copies(domain: str, supervisor: Supervisor) -> None:
    def use() -> tuple[int, bytes]:
        block = block_of(domain)
        again = pickle.loads(pickle.dumps(block))
        assert again._block.arena is block._block.arena
        put(again, b"again")
        Child(lambda: put(block, b"child")).result()
        return block.version, content(block)

    assert as_user(ALICE, use).result() == (2, b"child")


def test_names_may_have_as_many_bytes_as_anywhere(domain: str, supervisor: Supervisor) -> None:
    name = "shared" + "é" * 97
    assert len(name.encode()) == at.MAX_NAME
    assert as_user(ALICE, write, domain, b"x", name).result() == 1
    assert as_user(CAROL, read, domain, name).result() == (b"x\0\0\0\0", 1)


def test_only_blocks_with_a_lease_can_be_there(domain: str, supervisor: Supervisor) -> None:
    with pytest.raises(ValueError, match="is of the machine: only Lock, RLock, Block, Channel and Queue can be opened there"):
        shlock.Block("shared", size=SIZE, domain=domain)


def test_ps_shows_blocks_of_the_machine(domain: str, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> None:
    block = block_of(domain)
    put(block, b"x")
    assert cli.main(["ps", "--domain", domain]) == 0
    assert re.search(r"shared +Block +version 1 ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("other", "there"),
    [
        (lambda domain: block_of(domain, size=SIZE + 1), f"a Block of {SIZE} bytes there, and a Block of {SIZE + 1} bytes"),
        (lambda domain: shlock.Lock("shared", domain=domain, lease=LONG), f"a Block of {SIZE} bytes there, and a Lock is"),
        (lambda domain: block_of(domain, "shared lock"), f"a Lock there, and a Block of {SIZE} bytes is"),
        (lambda domain: block_of(domain, buffers=2), "has 3 buffers there, and 2 are wanted"),
    ],
)
def test_another_size_or_kind_is_refused_and_both_are_named(
    other: Callable[[str], Any], there: str, domain: str, supervisor: Supervisor
) -> None:
    def make() -> None:
        write(domain, b"whole")
        assert shlock.Lock("shared lock", domain=domain, lease=LONG).acquire()

    as_user(ALICE, make).result()

    def try_it() -> str:
        with pytest.raises(SegmentError) as error:
            other(domain)
        return str(error.value)

    assert there in as_user(BOB, try_it).result()
    assert as_user(CAROL, read, domain).result() == (b"whole", 1)


def test_a_size_is_needed_only_by_who_makes_it(domain: str, supervisor: Supervisor) -> None:
    def look(**options: Any) -> str:
        with pytest.raises(OSError) as error:
            block_of(domain, size=None, **options)
        return f"{type(error.value).__name__}: {error.value}"

    assert "SegmentError: segment of the machine: there is no 'shared'" in as_user(BOB, look).result()
    assert "made for who may write it" in as_user(CAROL, lambda: look(operations=["read"])).result()
    as_user(ALICE, write, domain, b"x").result()
    assert as_user(BOB, lambda: block_of(domain, size=None).size).result() == SIZE


# -- what a client is given -----------------------------------------------------------------------------------------------


def test_from_a_descriptor_for_reading_nothing_can_be_written(domain: str, supervisor: Supervisor, page: Page) -> None:
    as_user(ALICE, write, domain, b"whole").result()

    def attack() -> tuple[int, int, int]:
        block = reader_of(domain)
        for use in (block.write, block.edit, block.repair):
            with pytest.raises(ContractDenied, match="does not allow to write, only read"), use():
                pass
        with pytest.raises(ValueError, match="One process has one contract"):
            block_of(domain)
        arena = block._block.arena
        with pytest.raises(TypeError, match="read-only"):
            arena.words.store(block._block.word, _process.current.word)
        fd, tables = arena.segment.fd, arena.layout.tables
        for attempt in (
            lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY),
            lambda: os.pwrite(fd, b"x", tables),
            lambda: os.ftruncate(fd, 0),
            lambda: os.posix_fallocate(fd, 0, 1 << 30),
            lambda: os.fchmod(fd, 0o666),
        ):
            with pytest.raises(OSError):
                attempt()
        facts = os.fstat(fd)
        return facts.st_uid, facts.st_mode & 0o777, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE

    assert as_user(CAROL, attack).result() == (0, 0o600, os.O_RDONLY)

    def store() -> None:
        block = reader_of(domain)
        assert content(block) == b"whole"
        inode = str(os.fstat(block._block.arena.segment.fd).st_ino)
        first = block._block.arena.layout.tables
        lines = [fields for line in _machine._mappings("self") if len(fields := line.split()) > 5 and fields[4] == inode]
        # We are a fork of the supervisor's process, which maps the tables, and only these, for writing.
        address = next(int(f[0].split("-")[0], 16) for f in lines if int(f[2], 16) == first)
        assert {f[1] for f in lines if int(f[2], 16) == first} == {"r--s"}
        assert ctypes.string_at(address, 5) == b"\0" * 5  # copy 0; the first version is in another one
        assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        page[SPARE] = 1
        faulthandler.disable()
        ctypes.memset(address, 1, 1)
        page[SPARE] = 2

    assert as_user(CAROL, store).wait() == -signal.SIGSEGV
    assert page[SPARE] == 1
    assert as_user(BOB, lambda: (content(block_of(domain)), write(domain, b"other"))).result() == (b"whole", 2)


def attach(domain: str, kind: int, operations: list[str], **more: Any) -> tuple[dict[str, Any], list[int]]:
    """What is answered to one request made by hand, and the modes of the descriptors that came beside."""
    with talk(domain) as say:
        received: list[int] = []
        message = {"op": "attach", "name": "shared", "kind": kind, "policy": 0, "operations": operations}
        answer = say({**message, "lease": 10**9, "grace": 0, "rank": 0, **more}, received=received)
        return answer, [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in received]


@pytest.mark.parametrize("user", [ALICE, CAROL, EVE, MALLORY])
def test_only_who_may_write_gets_a_descriptor_for_writing_however_he_asks(
    user: int, domain: str, supervisor: Supervisor
) -> None:
    """EVE may acquire locks: neither that, nor calling the block a lock, gives her anything of it."""
    as_user(BOB, write, domain, b"whole").result()

    def attack() -> set[tuple[tuple[str, ...], int]]:
        wishes = [list(some) for n in (1, 2, 3) for some in itertools.combinations(("acquire", "preempt", "read", "write"), n)]
        got = set()
        for kind in range(at.EXTENSION + 1):
            for operations in wishes:
                for more in ({}, {"size": SIZE, "copies": 3}, {"size": 1, "copies": 1}):
                    answer, modes = attach(domain, kind, operations, **more)
                    assert bool(modes) == bool(answer.get("ok"))
                    got |= {(tuple(operations), mode) for mode in modes}
                    assert not modes or kind == at.GUARDED
        return got

    got = as_user(user, attack).result()
    for operations, mode in got:
        assert user in (ALICE, CAROL)
        assert (mode == os.O_RDWR) == ("write" in operations)
    assert bool(got) == (user in (ALICE, CAROL))
    assert {mode for _, mode in got} == {ALICE: {os.O_RDONLY, os.O_RDWR}, CAROL: {os.O_RDONLY}}.get(user, set())


def test_there_is_one_contract_for_a_block_and_it_is_for_its_lock(domain: str, supervisor: Supervisor) -> None:
    def attack() -> tuple[str, bool]:
        with talk(domain) as say:
            received: list[int] = []
            message = {"op": "attach", "name": "shared", "kind": at.GUARDED, "policy": 0, "size": 1, "copies": 1}
            terms = {"operations": ["write"], "lease": 10**9, "grace": 0, "rank": 0}
            assert say({**message, **terms}, received=received).get("ok")
            identity = os.fstat(received[0]).st_ino
            opening = {"op": "open", "slot": 1, "arena": identity, "raise": False, **terms}
            return str(say({**opening, "block": 1}).get("error")), bool(say({**opening, "block": 0}).get("ok"))

    error, ok = as_user(ALICE, attack).result()
    assert "block 1 of 'shared' is no lock" in error
    assert ok


# -- who dies, and who overruns -------------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_leaves_the_last_content_to_other_users(domain: str, supervisor: Supervisor) -> None:
    as_user(ALICE, write, domain, b"whole").result()

    def die() -> None:
        with block_of(domain).write() as view:
            view[:] = b"x" * SIZE
            os.kill(os.getpid(), signal.SIGKILL)

    def go_on() -> tuple[bytes, Any, int]:
        block = block_of(domain)
        with block.write(timeout=LONG) as view:
            seen = bytes(view[:5])
        return seen, block.abandoned, block.version

    assert as_user(ALICE, die).wait() == -signal.SIGKILL
    assert as_user(CAROL, read, domain).result() == (b"whole", 1)
    assert as_user(BOB, go_on).result() == (b"whole", None, 2)


@pytest.mark.parametrize("how", ["killed", "overrun"])
def test_heirs_and_readers_of_other_users_are_told_of_an_editor_that_died(
    how: str, domain: str, supervisor: Supervisor
) -> None:
    as_user(BOB, write, domain, b"whole").result()

    def edit() -> None:
        with block_of(domain, lease=SHORT if how == "overrun" else LONG).edit() as view:
            view[:4] = b"half"
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                signal.pause()

    editor = as_user(ALICE, edit)
    assert editor.wait() == -signal.SIGKILL
    reason = "lease overrun" if how == "overrun" else "owner died"

    def look(block: shlock.Block) -> tuple[bytes, int]:
        with pytest.warns(shlock.AbandonedWarning):
            seen = content(block)
        assert block.abandoned is not None
        return seen, block.abandoned.pid

    def inherit() -> tuple[bytes, int, str]:
        block = block_of(domain)
        with pytest.warns(shlock.AbandonedWarning), block.edit(timeout=LONG) as view:
            assert block.abandoned is not None
            return bytes(view[:5]), block.abandoned.pid, block.abandoned.reason

    assert as_user(CAROL, lambda: look(reader_of(domain))).result() == (b"halfe", editor.pid)
    assert as_user(BOB, inherit).result() == (b"halfe", editor.pid, reason)
    assert as_user(CAROL, read, domain).result() == (b"halfe", 2)


def test_who_overruns_while_it_writes_is_killed_and_the_write_undone(domain: str, supervisor: Supervisor, page: Page) -> None:
    as_user(BOB, write, domain, b"whole").result()

    def overrun() -> None:
        with block_of(domain, lease=SHORT).write() as view:
            view[:] = b"x" * SIZE
            page[READY] = 1
            while True:
                signal.pause()

    for _ in range(3):
        page[READY] = 0
        hog = as_user(ALICE, overrun)
        eventually(lambda: page[READY])
        assert as_user(CAROL, read, domain).result() == (b"whole", 1)  # waits for nobody
        assert hog.wait() == -signal.SIGKILL
    assert as_user(BOB, write, domain, b"after").result() == 2
    assert kinds(supervisor).count("killed") == 3


def test_a_reader_that_stands_still_holds_no_writer_up(domain: str, supervisor: Supervisor, page: Page) -> None:
    as_user(ALICE, write, domain, b"first").result()

    def stand() -> bytes:
        with reader_of(domain).read() as view:
            page[READY] = 1
            eventually(lambda: page[GO])
            return bytes(view[:5])

    reader = as_user(CAROL, stand)
    eventually(lambda: page[READY])
    reader.stop()
    for number in range(10):
        assert as_user(BOB, write, domain, b"later").result() == 2 + number
    reader.go_on()
    page[GO] = 1
    assert reader.result() == b"first"


# -- supervisors come and go ----------------------------------------------------------------------------------------------


def test_the_next_supervisor_adopts_blocks_and_who_writes_them(domain: str, page: Page) -> None:
    first = Child(serve, domain, page, POLICY)
    eventually(lambda: page[DONE] == 1)

    def stay() -> None:
        block = block_of(domain, lease=5 * SHORT)
        put(block, b"whole")
        with block.write() as view:
            view[:] = b"x" * SIZE
            page[READY] = 1
            while True:
                signal.pause()

    holder = as_user(ALICE, stay)
    eventually(lambda: page[READY])
    holder.stop()  # so that it cannot present its contract
    first.kill()
    with Supervisor(domain, POLICY) as supervisor:
        assert "adopted" in kinds(supervisor)
        assert supervisor._server is not None
        assert supervisor._server.names.size(ALICE) > 3 * SIZE  # it counts, also now
        assert as_user(CAROL, read, domain).result() == (b"whole", 1)
        assert as_user(BOB, write, domain, b"after").result() == 2
        assert holder.wait() == -signal.SIGKILL


def test_who_may_only_read_goes_on_with_the_next_supervisor(domain: str, page: Page) -> None:
    first = Child(serve, domain, page, POLICY)
    eventually(lambda: page[DONE] == 1)
    as_user(ALICE, write, domain, b"first").result()

    def follow() -> list[bytes]:
        block = reader_of(domain)
        seen = [content(block)]
        page[READY] = 1
        eventually(lambda: page[GO])
        return [*seen, content(block)]

    reader = as_user(CAROL, follow)
    eventually(lambda: page[READY])
    first.kill()
    with Supervisor(domain, POLICY) as supervisor:
        eventually(lambda: any(one.pid == reader.pid for one in supervisor.contracts()), "its contract is there again")
        assert as_user(BOB, write, domain, b"later").result() == 2  # the same segment
        page[GO] = 1
        assert reader.result() == [b"first", b"later"]


@pytest.mark.parametrize("label", LABELS)
def test_a_supervisor_killed_while_it_makes_a_segment_leaves_nothing(label: str, domain: str, page: Page) -> None:
    def serve_and_die() -> None:
        watch_steps(DieAtLabel(label, 1))
        serve(domain, page, POLICY)

    first = Child(serve_and_die)
    eventually(lambda: page[DONE] == 1)

    def wait_for_answer() -> None:
        with pytest.raises(ConnectionError):  # its first supervisor is gone: another client, who had one before, would wait
            write(domain, b"never")

    as_user(ALICE, wait_for_answer).result()
    assert first.wait() == -signal.SIGKILL
    assert not list(_machine.segments_of(domain))
    with Supervisor(domain, POLICY):
        assert as_user(ALICE, write, domain, b"whole").result() == 1
        assert as_user(CAROL, read, domain).result() == (b"whole", 1)


# -- whose memory it is ---------------------------------------------------------------------------------------------------


def test_a_user_has_so_many_bytes_and_makes_room_by_leaving_some(domain: str, supervisor: Supervisor) -> None:
    most = MOST // 3

    def fill() -> str:
        kept = [block_of(domain, f"shared {number}", most // 4, buffers=1) for number in range(8)]
        with pytest.raises(ContractDenied, match=r"of which \d+ are in use") as error:
            for number in range(8, 20):
                kept.append(block_of(domain, f"shared {number}", most // 4, buffers=1))
        kept.clear()
        for number in range(20, 40):  # one after the other is no problem
            with block_of(domain, f"shared {number}", most, buffers=1).edit() as view:
                view[0] = 1
        return error.value.reason

    assert f"the {MOST} that the user may have" in as_user(ALICE, fill).result()
    assert "the user may have" in reasons(supervisor, "denied")
    assert as_user(BOB, write, domain, b"x", "shared of bob", most // 4).result() == 1
    assert supervisor._server is not None
    assert supervisor._server.names.size(ALICE) <= MOST
    assert supervisor._server.names.count(BOB) == 1


@pytest.mark.parametrize("where", ["a descriptor", "a mapping", "a message under way"])
def test_memory_that_somebody_kept_still_counts(where: str, domain: str, supervisor: Supervisor) -> None:
    """The attacker gives every contract back, and keeps the memory: more than his share, one after the other."""
    size = MOST // 5

    def hoard() -> int:
        kept: list[Any] = []
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for number in range(20):
            try:
                block = block_of(domain, f"shared {number}", size, buffers=1)
            except ContractDenied:
                return number
            fd = block._block.arena.segment.fd
            if where == "a mapping":
                kept.append(block._block.arena.segment._mmap)  # closes no more
                kept.append(mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ))
            elif where == "a descriptor":
                kept.append(os.dup(fd))
            else:
                socket.send_fds(pair[0], [b"x"], [fd])
            del block
        return 20

    assert 1 <= as_user(ALICE, hoard).result() <= 5
    assert as_user(ALICE, write, domain, b"x", "shared now", size).result() == 1  # his end lets go of all


def test_no_memory_is_an_error_for_who_asks_and_an_event(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def try_it(**options: Any) -> tuple[str, int]:
        with pytest.raises(OSError) as error:
            block_of(domain, "shared new", **options)
        return type(error.value).__name__, error.value.errno or 0

    as_user(ALICE, write, domain, b"whole").result()
    reserve = _sys.System.reserve

    def full(self: _sys.System, descriptor: int, first: int, length: int) -> None:
        reserve(self, descriptor, first, min(length, 4096))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_sys.System, "reserve", full)
    assert as_user(ALICE, try_it).result() == ("OSError", errno.ENOSPC)
    monkeypatch.undo()
    assert "no memory for one more segment: No space left" in reasons(supervisor, "refused")
    assert as_user(BOB, write, domain, b"after").result() == 2
    # Root may have more than there is, by its policy: then it is refused before any of it is taken.
    monkeypatch.setattr(_sys.System, "available_memory", lambda self: 1 << 20)
    monkeypatch.setattr(_sys, "AT_ONCE", 1 << 18)
    with pytest.raises(OSError, match="no memory for one more segment"):
        block_of(domain, "shared new", 1 << 20)
    for size in (1 << 41, sys.maxsize):
        with pytest.raises(OSError, match="no memory for"):
            block_of(domain, "shared new", size)


def test_while_memory_is_taken_the_supervisor_looks_at_its_clock(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sys, "AT_ONCE", 1 << 16)
    looks = []
    made = _machine.Made("shared", 1, 0, at.GUARDED, 0, 1 << 20, 3)
    arena = _machine.make_arena(domain, made, 1, 0, lambda: looks.append(1))
    assert len(looks) == -(-arena.layout.size // (1 << 16))
    assert os.fstat(arena.segment.fd).st_blocks * 512 == arena.layout.size  # all of it is there
    assert _machine.made_of(arena.segment.fd, domain) == made
    assert not _machine.has_others(arena.segment.fd)
    other = _machine.open_again(arena.segment.fd, read_only=True)
    assert _machine.has_others(arena.segment.fd)
    os.close(other)
    arena.segment.close()


# -- what a writer may overwrite ------------------------------------------------------------------------------------------


def test_a_header_that_lies_about_sizes_shortens_nobodys_tables(domain: str, page: Page) -> None:
    """Neither of who comes next, nor of the next supervisor: it would write behind the end of its mapping."""
    first = Child(serve, domain, page, POLICY)
    eventually(lambda: page[DONE] == 1)

    def lie() -> None:
        lock = shlock.Lock("shared lock", domain=domain, lease=5 * SHORT, on_abandoned="ignore")
        block = block_of(domain)
        put(block, b"whole")
        lock.acquire()
        lock._block.arena.words.store(lock._block.start + at.BLOCK_KIND, at.FREE_BLOCK)
        for arena in (lock._block.arena, block._block.arena):
            words = arena.words
            words.store(at.HEADER_DATA, (arena.segment.size - 4096) // 4096 * 4096)
            words.store(at.HEADER_BLOCKS, 1 << 40)
            words.store(at.HEADER_SPOTS, 1 << 40)
        words.store(block._block.start + at.BLOCK_PARAMETER, 1 << 40)
        page[READY] = 1
        while True:
            signal.pause()

    liar = as_user(ALICE, lie)
    eventually(lambda: page[READY])
    liar.stop()
    first.kill()
    with Supervisor(domain, POLICY) as supervisor:
        assert "adopted" in kinds(supervisor)  # its holder, although it says that it is no lock
        assert supervisor._server is not None
        assert supervisor._server.names.count(ALICE) == 2  # found again, not made anew

        def use() -> tuple[int, int, bytes]:
            lock = shlock.Lock("shared lock", domain=domain, lease=LONG, on_abandoned="ignore")
            block = block_of(domain, size=None)
            with lock:
                seen = content(block)
                return len(lock._block.arena.segment.memory), put(block, b"after"), seen

        tables = _machine.Made("", 1, 0, at.LOCK).layout().tables
        assert as_user(BOB, use).result() == (tables, 2, b"whole")
        assert liar.wait() == -signal.SIGKILL


@pytest.mark.patience(120)
def test_whatever_a_writer_overwrites_the_supervisor_serves_the_others(domain: str, supervisor: Supervisor, page: Page) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")

    def bystander() -> None:
        with block_of(domain, "shared other", 100).edit():
            page[READY] = 1
            while not page[GO]:
                signal.sigtimedwait([], 0.01)

    victim = as_user(BOB, bystander)
    eventually(lambda: page[READY])

    def attack() -> None:
        draw = random.Random(seed)
        block = block_of(domain)
        arena = block._block.arena
        view = arena.words.view
        values = (0, at.WORD_MASK, at.UNFINISHED, _process.current.word, _process.make_word(victim.pid, 7), 1 << 40)
        page[SPARE] = 1
        while not page[DONE]:
            place = arena.layout.block(0) + draw.randrange(2 * at.BLOCK_WORDS)
            if draw.random() < 0.5:
                place = draw.randrange(len(view))
            view[place] = draw.choice(values) if draw.random() < 0.8 else draw.randrange(1 << 64)

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[SPARE])

    def suffer(operations: list[str]) -> str:
        """Anything may be read, and any of our own errors be raised; nothing crashes, and nothing lasts."""
        try:
            block = block_of(domain, size=None, operations=operations)
            with block.read(timeout=0.05) as view:
                assert len(view) == SIZE
            if "write" in operations:
                with block.write(timeout=0.05):
                    pass
        except (OSError, ValueError, RuntimeError, shlock.AbandonedWarning) as error:
            return type(error).__name__
        return "fine"

    for _ in range(20):
        assert as_user(BOB, suffer, ["read", "write"]).result()
        assert as_user(CAROL, suffer, ["read"]).result()
    page[DONE] = 1
    attacker.result()
    assert victim.is_alive()
    assert supervisor.contracts()
    assert as_user(ALICE, write, domain, b"x", "shared third").result() == 1
    page[GO] = 1
    victim.result()
    assert "killed" not in kinds(supervisor)


@pytest.mark.parametrize("garbage", [1, 2, 0x40, 0x100, 1 << 31, (1 << 32) - 1, (1 << 64) - 1, 0x40 << 32 | 0x40])
def test_a_semaphore_that_somebody_overwrote_ends_nobody(garbage: int, domain: str) -> None:
    """The supervisor posts it, too.  The C library's own would abort, or wait for ever."""
    arena = _machine.make_arena(domain, _machine.Made("shared", 1, 0, at.LOCK), 1, 0)
    first = arena.layout.semaphore(0)
    semaphore = SegmentSemaphore(arena.words, first)

    def use() -> bool:
        for place in range(at.SEMAPHORE_WORDS):
            arena.words.store(first + place, garbage)
        semaphore.release()
        semaphore.acquire(0.01)
        for place in range(at.SEMAPHORE_WORDS):
            arena.words.store(first + place, garbage)
        semaphore.acquire(0.01)
        arena.words.store(first, 0)
        semaphore.acquire(0.01)
        semaphore.release()
        return semaphore._take() and not semaphore._take()

    assert Child(use).result(5.0) is True
    arena.segment.close()


def test_without_a_contract_nobody_learns_of_a_block(domain: str, supervisor: Supervisor) -> None:
    as_user(ALICE, write, domain, b"whole").result()

    def refused(name: str, **options: Any) -> str:
        with pytest.raises(ContractDenied) as error:
            block_of(domain, name, **options)
        return str(error.value).replace(name, "NAME")

    wishes = itertools.product(("shared", "shared 2"), (SIZE, 1, None))
    answers = {as_user(MALLORY, lambda n=name, s=size: refused(n, size=s)).result() for name, size in wishes}
    assert len(answers) == 1
