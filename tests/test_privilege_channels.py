"""Channels and queues in domains of the machine: who may send what to whom, and what users can't do to each other by it.

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
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_channel_precedence
import test_privilege
from support import Child, DieAtLabel, Page, eventually, is_sleeping, watch_steps
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
    WORD,
    kinds,
    libc,
    pytestmark,
    reasons,
    serve,
    talk,
)
from test_privilege import as_user as fork_as_user

import shlock
from shlock import _client, _geometry, _machine, _parking, _pickling, _process, _ring, _sys, cli
from shlock import _layout as at
from shlock._memory import Memory
from shlock.errors import ContractDenied, PickleRefused, SegmentError
from shlock.supervisor import Supervisor, parse

__all__ = ["pytestmark"]

DAVE, ERIN = 61006, 61007
"""Dave may only send, Erin only receive.  Carol may do neither, but lock and read."""

SIZE = 10_000
MOST = 8 << 20  # bytes of one user
PATIENT = 10.0  # seconds for what comes at once

POLICY = parse(
    f"""
[[rule]]
users = ["@self"]
names = ["*"]
operations = ["acquire", "read", "write", "send", "receive"]
longest_lease = 3600.0
class = "kernel"
most_bytes = 1073741824

[[rule]]
users = [{ALICE}, {BOB}]
names = ["shared*"]
operations = ["send", "receive", "acquire"]
longest_lease = {LONG}
longest_grace = {LONG}
highest_rank = 100
most_contracts = 100
most_bytes = {MOST}

[[rule]]
users = [{DAVE}]
names = ["shared*"]
operations = ["send"]
longest_lease = {LONG}

[[rule]]
users = [{ERIN}]
names = ["shared*"]
operations = ["receive"]
longest_lease = {LONG}

[[rule]]
users = [{CAROL}]
names = ["shared*"]
operations = ["acquire", "read"]
longest_lease = {LONG}
""",
    "policy.toml",
)

# Fixtures.
domain, supervisor, page = test_privilege.domain, test_privilege.supervisor, test_privilege.page


def channel_of(
    domain: str, name: str = "shared", size: int | None = SIZE, lease: float = LONG, **options: Any
) -> shlock.Channel:
    return shlock.Channel(name, size=size, domain=domain, lease=lease, **options)


def queue_of(domain: str, name: str = "shared queue", cls: Any = shlock.Queue, lease: float = LONG, **options: Any) -> Any:
    return cls(name=name, domain=domain, lease=lease, **options)


def send(domain: str, message: bytes, **options: Any) -> None:
    """Of a process's whole life."""
    channel_of(domain, operations=["send"], **options).send_bytes(message, timeout=PATIENT)


def receive(domain: str, **options: Any) -> bytes:
    return channel_of(domain, operations=["receive"], **options).recv_bytes(timeout=PATIENT)


def as_user(user: int, function: Callable[..., Any], *arguments: Any) -> Child:
    """A child that is that user and has nothing of what its parent has open: neither segments nor what is allowed there."""

    def begin_anew() -> Any:
        _client._attached.clear()
        return function(*arguments)

    return fork_as_user(user, begin_anew)


def refused(function: Callable[[], Any]) -> str:
    with pytest.raises(ContractDenied) as error:
        function()
    return str(error.value)


# -- two ends, several users ----------------------------------------------------------------------------------------------


def test_users_and_the_kernel_send_each_other_messages(domain: str, supervisor: Supervisor) -> None:
    kernel = channel_of(domain, privileged=True)
    assert [contract.precedence for contract in kernel.contracts] == ["kernel", "kernel"]

    def ask(who: bytes) -> tuple[bytes, list[str], int]:
        channel = channel_of(domain, size=None)
        channel.send_bytes(who)
        with channel.reserve(SIZE) as view:
            view[:] = who[:1] * SIZE
        return channel.recv_bytes(timeout=PATIENT), [one.precedence for one in channel.contracts], channel.size

    for user, who in ((ALICE, b"alice"), (BOB, b"bob")):
        child = as_user(user, ask, who)
        assert kernel.recv_bytes(timeout=PATIENT) == who
        with kernel.peek(timeout=PATIENT) as view:
            assert bytes(view) == who[:1] * SIZE
        kernel.send_bytes(b"for " + who)
        assert child.result() == (b"for " + who, ["user", "user"], SIZE)


def test_a_message_wakes_another_user_without_polling(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 600.0)
    kernel = channel_of(domain, privileged=True)

    def echo() -> None:
        channel = channel_of(domain)
        while True:
            channel.send_bytes(channel.recv_bytes())

    children = [as_user(user, echo) for user in (ALICE, BOB)]
    for number in range(200):  # in all: one of them may get more of these than the other
        kernel.send_bytes(b"%d" % number)
        assert kernel.recv_bytes() == b"%d" % number
    for child in children:
        child.kill()


def test_the_privileged_end_is_for_the_class_kernel(domain: str, supervisor: Supervisor) -> None:
    channel_of(domain)

    def try_it(**options: Any) -> str:
        channel_of(domain)  # having a contract for the other end does not help
        return refused(lambda: channel_of(domain, privileged=True, **options))

    text = as_user(ALICE, try_it).result()
    assert "Channel 'shared': the privileged end of a channel is for the class \"kernel\"" in text
    assert "rule 2 (line 10)" in text
    assert "class" in as_user(ALICE, lambda: refused(lambda: channel_of(domain, "shared new", privileged=True))).result()
    assert "the privileged end" in reasons(supervisor, "denied")


def test_who_may_not_send_or_receive_is_told_the_rule_at_once(domain: str, supervisor: Supervisor) -> None:
    channel_of(domain), queue_of(domain)

    def open_all() -> list[str]:
        return [refused(lambda: channel_of(domain)), refused(lambda: queue_of(domain))]

    for user, rule in ((DAVE, "rule 3"), (ERIN, "rule 4"), (CAROL, "rule 5")):
        for text in as_user(user, open_all).result():
            assert rule in text

    def use_as_dave() -> list[str]:
        channel, queue = channel_of(domain, operations=["send"]), queue_of(domain, operations=["send"])
        channel.send_bytes(b"from dave")
        queue.put(b"from dave")
        assert (queue.qsize(), len(channel.contracts), len(queue.contracts)) == (1, 1, 1)
        empty = queue_of(domain, "shared empty", operations=["send"])
        uses = (
            empty.take(timeout=PATIENT).__enter__,
            channel.recv_bytes,
            channel.recv,
            channel.peek().__enter__,
            queue.get,
            queue.take().__enter__,
            queue.get_nowait,
        )
        return [
            refused(use)
            for use in (*uses, queue.dead_letters.get, lambda: queue.get_many(2), lambda: queue.take(False).__enter__())
        ]

    def use_as_erin() -> list[str]:
        channel, queue = channel_of(domain, operations=["receive"]), queue_of(domain, operations=["receive"])
        assert queue.get() == b"from dave"
        uses = (lambda: channel.send_bytes(b"x"), lambda: channel.send(b"x"), channel.reserve(1).__enter__)
        return [
            refused(use)
            for use in (*uses, lambda: queue.put(b"x"), lambda: queue.put(b"x", False), lambda: queue.put_many([b"x"]))
        ]

    for user, use, needs, rule in ((DAVE, use_as_dave, "receive", "rule 3"), (ERIN, use_as_erin, "send", "rule 4")):
        for text in as_user(user, use).result():
            assert f"does not allow to {needs}, only" in text and rule in text, text
    assert channel_of(domain, privileged=True).recv_bytes(timeout=PATIENT) == b"from dave"


def test_channels_and_queues_go_to_forked_and_pickled_copies(domain: str, supervisor: Supervisor) -> None:
    def use() -> Any:
        channel, queue = channel_of(domain), queue_of(domain, unpickle=True)
        other, again = pickle.loads(pickle.dumps((channel, queue)))
        assert other._memory.arena is channel._memory.arena
        again.put(["an", "object"])
        assert queue.get() == ["an", "object"]
        Child(lambda: (channel.send_bytes(b"child"), queue.put(b"child"))).result()
        other.send_bytes(b"again")
        return queue.get()

    assert as_user(ALICE, use).result() == b"child"
    kernel = channel_of(domain, privileged=True)
    assert kernel.recv_many(5) == [b"child", b"again"]


def test_they_need_a_lease_there(domain: str, supervisor: Supervisor) -> None:
    for cls in (shlock.Channel, shlock.Queue, shlock.JoinableQueue):
        with pytest.raises(ValueError, match=r"is of the machine: .* Channel and Queue can be opened there, with "):
            cls(name="shared", domain=domain)


def test_names_may_have_as_many_bytes_as_anywhere(domain: str, supervisor: Supervisor) -> None:
    name = "shared" + "é" * 97
    assert len(name.encode()) == at.MAX_NAME
    as_user(ALICE, lambda: send(domain, b"x", name=name)).result()
    assert channel_of(domain, name, None, privileged=True).recv_bytes(timeout=PATIENT) == b"x"


@pytest.mark.parametrize(
    ("other", "there"),
    [
        (lambda domain: channel_of(domain, size=1), f"a Channel of {SIZE} bytes there, and a Channel of 1 bytes"),
        (lambda domain: queue_of(domain, "shared"), f"a Channel of {SIZE} bytes there, and a Queue is wanted"),
        (lambda domain: shlock.Lock("shared", domain=domain, lease=LONG), f"a Channel of {SIZE} bytes there, and a Lock is"),
        (lambda domain: channel_of(domain, "shared queue", None), "a Queue of 20000 bytes there, and a Channel is wanted"),
        (lambda domain: queue_of(domain, size=1), "a Queue of 20000 bytes there, and a Queue of 1 bytes is wanted"),
        (lambda domain: queue_of(domain, maxsize=4), "has maxsize=3 there, and maxsize=4 is wanted"),
        (lambda domain: queue_of(domain, cls=shlock.JoinableQueue), "is a Queue there, and a JoinableQueue is wanted"),
    ],
)  # fmt: skip
def test_another_size_or_kind_is_refused_and_both_are_named(
    other: Callable[[str], Any], there: str, domain: str, supervisor: Supervisor
) -> None:
    channel, queue = channel_of(domain), queue_of(domain, size=20_000, maxsize=3)

    def try_it() -> str:
        with pytest.raises(SegmentError) as error:
            other(domain)
        return str(error.value)

    assert there in as_user(BOB, try_it).result()
    assert queue.empty() and not channel.poll()


def test_a_size_is_needed_only_by_who_makes_a_channel(domain: str, supervisor: Supervisor) -> None:
    def look() -> str:
        with pytest.raises(SegmentError) as error:
            channel_of(domain, size=None)
        return str(error.value)

    assert "there is no 'shared' in domain" in as_user(BOB, look).result()
    assert as_user(ALICE, lambda: channel_of(domain).size).result() == SIZE
    assert as_user(BOB, lambda: channel_of(domain, size=None).size).result() == SIZE


def test_without_a_contract_nobody_learns_of_them(domain: str, supervisor: Supervisor) -> None:
    channel_of(domain)

    def try_it(name: str, size: int | None) -> str:
        return refused(lambda: channel_of(domain, name, size)).replace(name, "NAME")

    wishes = itertools.product(("shared", "shared 2"), (SIZE, 1, None))
    assert len({as_user(MALLORY, try_it, *wish).result() for wish in wishes}) == 1


def test_ps_shows_each_once_and_what_waits_there(
    domain: str, supervisor: Supervisor, page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel, queue = channel_of(domain, privileged=True), queue_of(domain)
    kernel.send_many([b"x"] * 3)
    queue.put_many([b"x"] * 2)

    def wait() -> None:
        channel_of(domain, operations=["send"]).send_bytes(b"x")
        with queue_of(domain).take():
            page[READY] = os.getpid()
            channel_of(domain, "shared wait").recv_bytes()

    waiter = as_user(ALICE, wait)
    eventually(lambda: page[READY] and is_sleeping(waiter.pid))
    assert cli.main(["ps", "--domain", domain]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " shared" in line]
    assert len(lines) == 3, lines
    assert re.search(r"shared +Channel +3 to user, 1 to privileged", lines[0])
    assert re.search(r"shared queue +Queue +1 item, 1 taken", lines[1])
    assert re.search(r"shared wait +Channel +0 to user, 0 to privileged", lines[2])
    assert str(waiter.pid) in lines[2]
    assert cli.main(["why", "--domain", domain, "shared wait"]) == 0
    assert f"pid {waiter.pid}" in capsys.readouterr().out
    waiter.kill()


# -- what a client is given -----------------------------------------------------------------------------------------------


def parts_of(answer: dict[str, Any], files: list[int], domain: str) -> dict[int, int]:
    """Access modes of the descriptors that came, by part."""
    assert bool(files) == bool(answer.get("ok"))
    return {_machine.made_of(fd, domain).part: fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in files}


@pytest.mark.parametrize("kind", [at.CHANNEL, at.QUEUE])
@pytest.mark.parametrize("user", [0, ALICE, DAVE, ERIN, CAROL, MALLORY])
def test_who_may_send_gets_what_he_writes_and_who_may_receive_what_he_reads_however_he_asks(
    user: int, kind: int, domain: str, supervisor: Supervisor
) -> None:
    name = "shared" if kind == at.CHANNEL else "shared queue"
    (channel_of if kind == at.CHANNEL else queue_of)(domain)

    def attack() -> dict[tuple[str, ...], dict[int, int]]:
        got = {}
        wishes = [
            some for n in (1, 2, 3) for some in itertools.combinations(("acquire", "read", "receive", "send", "write"), n)
        ]
        for operations, asked in itertools.product(wishes, range(at.EXTENSION + 1)):
            with talk(domain) as say:
                files: list[int] = []
                message = {"op": "attach", "name": name, "kind": asked, "policy": 0, "operations": list(operations)}
                found = parts_of(say({**message, "lease": 10**9, "grace": 0, "rank": 0}, received=files), files, domain)
                assert not found or asked == kind
                if found:
                    got[operations] = found
                for fd in files:
                    os.close(fd)
        return got

    got = as_user(user, attack).result()
    allowed = {0: {"send", "receive"}, ALICE: {"send", "receive"}, DAVE: {"send"}, ERIN: {"receive"}}.get(user, set())
    assert bool(got) == bool(allowed)
    for operations, modes in got.items():
        assert set(operations) & {"send", "receive"} <= allowed
        expected = {0: os.O_RDWR}
        sends, receives = "send" in operations, "receive" in operations
        for part, is_ours_to_write, is_ours_to_read in (
            ((1, True, True),) if kind == at.QUEUE else ((1, user == 0, True), (2, True, user == 0))
        ):
            if sends and is_ours_to_write:
                expected[part] = os.O_RDWR
            elif receives and is_ours_to_read:
                expected[part] = os.O_RDONLY
        assert modes == expected, operations


def test_what_the_kernel_sends_no_user_can_write(domain: str, supervisor: Supervisor, page: Page) -> None:
    kernel = channel_of(domain, privileged=True)
    kernel.send_bytes(b"whole")

    def attack() -> None:
        channel = channel_of(domain)
        fd = channel._memory.arena.parts[1].fd
        for attempt in (
            lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
            lambda: os.pwrite(fd, b"x", 8),
            lambda: os.ftruncate(fd, 0),
            lambda: os.posix_fallocate(fd, 0, 1 << 30),
            lambda: os.fchmod(fd, 0o666),
        ):
            with pytest.raises(OSError):
                attempt()
        with channel.peek(timeout=PATIENT) as view:
            assert view.readonly and bytes(view) == b"whole"
            inode = str(os.fstat(fd).st_ino)
            fields = [line.split() for line in _machine._mappings("self")]
            ours = [f for f in fields if len(f) > 5 and f[4] == inode and "s" in f[1] and "w" not in f[1]]
            address = int(ours[0][0].split("-")[0], 16)
            assert ctypes.string_at(address + 8, 5) == b"whole"
            assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
            page[SPARE] = 1
            faulthandler.disable()
            ctypes.memset(address + 8, 1, 1)
            page[SPARE] = 2

    assert as_user(ALICE, attack).wait() == -signal.SIGSEGV
    assert page[SPARE] == 1
    assert as_user(BOB, receive, domain).result() == b"whole"  # given back by the one that died


def test_a_contract_for_an_end_is_for_who_may_use_it(domain: str, supervisor: Supervisor) -> None:
    """Whoever has one is believed to be inside when a lock's word says so."""
    channel_of(domain), queue_of(domain)

    def attack(operations: list[str]) -> tuple[set[int], set[int]]:
        found = []
        for name, kind, blocks in (("shared", at.CHANNEL, 9), ("shared queue", at.QUEUE, _geometry.FIRST_SLOT + 17)):
            got = set()
            for block in range(blocks):
                with talk(domain) as say:
                    files: list[int] = []
                    terms = {"operations": operations, "lease": 10**9, "grace": 0, "rank": 0}
                    assert say({"op": "attach", "name": name, "kind": kind, "policy": 0, **terms}, received=files).get("ok")
                    identity = next(os.fstat(fd).st_ino for fd in files if not _machine.made_of(fd, domain).part)
                    if say({"op": "open", "slot": 1, "arena": identity, "block": block, "raise": False, **terms}).get("ok"):
                        got.add(block)
                    for fd in files:
                        os.close(fd)
            found.append(got)
        return found[0], found[1]

    slots = set(range(_geometry.FIRST_SLOT, _geometry.FIRST_SLOT + _geometry.SLOTS_OF_MACHINE))
    assert as_user(DAVE, attack, ["send"]).result() == ({5}, {1})
    assert as_user(ERIN, attack, ["receive"]).result() == ({2}, {2, 5, 6} | slots)
    assert as_user(ALICE, attack, ["receive", "send"]).result() == ({2, 5}, {1, 2, 5, 6} | slots)


# -- who dies, and who overruns -------------------------------------------------------------------------------------------


def test_who_overruns_while_sending_is_killed_and_nothing_was_sent(domain: str, supervisor: Supervisor, page: Page) -> None:
    kernel = channel_of(domain, privileged=True)

    def overrun() -> None:
        with channel_of(domain, lease=SHORT).reserve(100) as view:
            view[:] = b"x" * 100
            page[READY] = 1
            while True:
                signal.pause()

    hog = as_user(ALICE, overrun)
    eventually(lambda: page[READY])
    sender = as_user(BOB, send, domain, b"after")
    assert hog.wait() == -signal.SIGKILL
    sender.result()
    assert kernel.recv_bytes(timeout=PATIENT) == b"after"
    assert not kernel.poll()
    assert "lease overrun" in reasons(supervisor, "killed")


def test_who_overruns_while_reading_in_place_gives_the_message_back(domain: str, supervisor: Supervisor) -> None:
    kernel = channel_of(domain, privileged=True)
    kernel.send_bytes(b"once")

    def overrun() -> None:
        with channel_of(domain, lease=SHORT).peek():
            while True:
                signal.pause()

    assert as_user(ALICE, overrun).wait() == -signal.SIGKILL
    assert as_user(BOB, receive, domain).result() == b"once"


@pytest.mark.parametrize("label", ["C30 bytes written", "C31 TAIL stored", "C32 chunks taken, link written"])
def test_a_user_killed_while_sending_leaves_all_of_a_message_or_nothing(
    label: str, domain: str, supervisor: Supervisor
) -> None:
    kernel = channel_of(domain, privileged=True)

    def die() -> None:
        channel = channel_of(domain)
        watch_steps(DieAtLabel(label, 1))
        channel.send_bytes(b"x" * SIZE)
        channel.send_bytes(b"y" * SIZE)

    assert as_user(ALICE, die).wait() == -signal.SIGKILL
    as_user(BOB, send, domain, b"after").result()
    messages = kernel.recv_many(10)
    assert messages == ([b"x" * SIZE] if label.startswith("C31") else []) + [b"after"]


@pytest.mark.parametrize("label", ["C33 bytes read", "C34 HEAD stored", "C35 HEAD stored, chunks USED"])
def test_a_user_killed_while_receiving_gives_a_message_back_or_had_it(label: str, domain: str, supervisor: Supervisor) -> None:
    kernel = channel_of(domain, privileged=True)
    for number in range(3):
        kernel.send_bytes(b"%d" % number * (SIZE // 4))

    def die() -> None:
        channel = channel_of(domain)
        watch_steps(DieAtLabel(label, 1))
        for _ in range(3):
            channel.recv_bytes()

    assert as_user(ALICE, die).wait() == -signal.SIGKILL

    def rest() -> list[bytes]:
        channel = channel_of(domain)
        found = []
        while channel.qsize():
            found += channel.recv_many(5)
        return [message[:1] for message in found]

    left = as_user(BOB, rest).result()
    assert left == [b"0", b"1", b"2"][3 - len(left) :]
    assert len(left) == (3 if label.startswith("C33") else 2) or label.startswith("C35")
    for _ in range(20):  # no chunk is lost
        kernel.send_bytes(b"z" * SIZE, timeout=PATIENT)
        assert as_user(BOB, receive, domain).result() == b"z" * SIZE


def test_items_of_a_dead_user_come_back_to_another_one(domain: str, supervisor: Supervisor) -> None:
    queue = queue_of(domain, max_deliveries=2)
    queue.put(b"work")

    def die() -> None:
        with queue_of(domain).take():
            os.kill(os.getpid(), signal.SIGKILL)

    def look() -> tuple[bytes, int]:
        with (taken := queue_of(domain).take(timeout=PATIENT)) as item:
            return item, taken.deliveries

    assert as_user(ALICE, die).wait() == -signal.SIGKILL
    assert as_user(BOB, die).wait() == -signal.SIGKILL
    with pytest.raises(shlock.queue.Empty):
        queue.take(timeout=0.05).__enter__()
    assert as_user(ERIN, lambda: queue_of(domain, operations=["receive"]).dead_letters.get(timeout=PATIENT)).result() == b"work"
    queue.put(b"more")
    assert as_user(BOB, look).result() == (b"more", 1)
    assert queue.empty()


def test_a_joinable_queue_of_several_users_ends_when_all_is_done(domain: str, supervisor: Supervisor) -> None:
    queue = queue_of(domain, cls=shlock.JoinableQueue, maxsize=2)

    def work() -> int:
        mine = queue_of(domain, cls=shlock.JoinableQueue, operations=["receive"])
        for _ in range(10):
            with mine.take(timeout=PATIENT):
                pass
        return 10

    workers = [as_user(user, work) for user in (ALICE, ERIN)]
    for number in range(20):
        queue.put(b"%d" % number, timeout=PATIENT)
    joiner = Child(queue.join)
    assert [worker.result() for worker in workers] == [10, 10]
    joiner.result()


def test_a_queue_of_the_machine_has_a_fixed_size(domain: str, supervisor: Supervisor) -> None:
    def fill() -> int:
        queue = queue_of(domain)
        for number in itertools.count():
            try:
                queue.put(b"x" * 1000, False)
            except shlock.queue.Full:
                return number
        raise AssertionError

    assert 250 <= as_user(ALICE, fill).result() <= 600
    assert len(queue_of(domain).get_many(5000)) <= _ring.MOST_OF_MACHINE


# -- pickles --------------------------------------------------------------------------------------------------------------


class Trap:
    """Who unpickles it runs what its sender wants."""

    def __init__(self, padding: bytes = b"") -> None:
        self.padding = padding

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return spring, (pickle.PickleBuffer(self.padding) if self.padding else None,)


_page = Page()


def spring(_: Any) -> str:
    _page[SPARE] = 1
    return "sprung"


@pytest.fixture
def trapped() -> Iterator[None]:
    _page[SPARE] = 0
    yield


@pytest.mark.parametrize("padding", [b"", b"p" * 5000], ids=["in one piece", "with buffers"])
def test_a_pickle_of_another_user_is_not_run(padding: bytes, domain: str, supervisor: Supervisor, trapped: None) -> None:
    kernel, queue = channel_of(domain, size=10 * SIZE, privileged=True), queue_of(domain, max_deliveries=1)

    def attack() -> None:
        trap = Trap(padding)
        channel, mine = channel_of(domain, size=None), queue_of(domain)
        for _ in range(4):
            channel.send(trap)
        channel.send_bytes(pickle.dumps(Trap()))
        for _ in range(4):
            mine.put(trap)
        mine.put(b"harmless")

    as_user(ALICE, attack).result()
    receive_bytes = (kernel.recv_bytes, lambda: kernel.recv_many(1)) if padding else ()
    uses: list[Callable[[], Any]] = [kernel.recv, lambda: kernel.recv(timeout=PATIENT), *receive_bytes]
    for use in uses:
        with pytest.raises(PickleRefused, match=r"Channel 'shared': the message, of \d+ bytes, is a pickle"):
            use()
    for _ in range(4 - len(uses)):
        assert isinstance(kernel.recv_bytes(), bytes)  # as it is
    with pytest.raises(PickleRefused):
        kernel.recv()  # bytes that were sent as bytes, and to be unpickled
    with pytest.raises(PickleRefused, match="Queue 'shared queue'") as error:
        queue.get()
    assert error.value.message
    with pytest.raises(PickleRefused):
        queue.get(timeout=PATIENT)
    with pytest.raises(PickleRefused), queue.take():
        pass
    with pytest.raises(PickleRefused) as error:
        queue.get_many(5)
    assert error.value.got  # type: ignore[attr-defined]
    assert not _page[SPARE]


def test_dead_letters_are_no_way_round(domain: str, supervisor: Supervisor, trapped: None) -> None:
    queue = queue_of(domain, max_deliveries=1)
    as_user(ALICE, lambda: queue_of(domain).put(Trap())).result()
    with pytest.raises(PickleRefused), queue.take():
        pass
    with pytest.raises(shlock.queue.Empty):
        queue.take(False).__enter__()
    with pytest.raises(PickleRefused):
        queue.dead_letters.get()
    assert not _page[SPARE]


def test_no_tag_that_somebody_makes_up_is_unpickled(domain: str, supervisor: Supervisor, trapped: None) -> None:
    kernel = channel_of(domain, privileged=True)

    def attack() -> int:
        channel, body = channel_of(domain), pickle.dumps(Trap())
        for tag in range(256):
            while not channel._out.put(body, tag):
                channel._out.wait_for_room(len(body), None)
        return len(body)

    attacker = as_user(ALICE, attack)
    for tag in range(256):
        if tag % 2:
            if tag in (_pickling.PICKLE, _pickling.BYTES):
                kernel.recv_bytes(timeout=PATIENT)
                continue
            with pytest.raises(PickleRefused):
                kernel.recv_bytes(timeout=PATIENT)
        elif tag == _pickling.OBJECT_IS_BYTES:
            assert isinstance(kernel.recv(timeout=PATIENT), bytes)
        else:
            with pytest.raises(PickleRefused):
                kernel.recv(timeout=PATIENT)
    attacker.result()
    assert not _page[SPARE]


def test_who_trusts_the_others_says_so(domain: str, supervisor: Supervisor, trapped: None) -> None:
    kernel = channel_of(domain, privileged=True, unpickle=True)
    queue = queue_of(domain, unpickle=True)

    def put() -> None:
        channel_of(domain).send({"an": "object"})
        queue_of(domain).put(Trap())

    as_user(ALICE, put).result()
    assert kernel.recv(timeout=PATIENT) == {"an": "object"}
    assert queue.get(timeout=PATIENT) == "sprung"
    assert _page[SPARE] == 1
    assert kernel.other_end()._unpickle


# -- who goes first -------------------------------------------------------------------------------------------------------


@test_channel_precedence.each_way
def test_the_class_kernel_goes_before_users_at_the_same_end_whatever_their_rank(
    domain: str, supervisor: Supervisor, page: Page, way: test_channel_precedence.Way
) -> None:
    def open_it(rank: int) -> shlock.Channel:
        return channel_of(domain, rank=rank)

    who = [(ALICE, 0), (BOB, 100), (ALICE, 5), (0, 0), (0, 0)]  # user and rank
    children = [
        as_user(user, test_channel_precedence.come, open_it, page, way, number, rank) for number, (user, rank) in enumerate(who)
    ]
    arrivals = [[0, 4, 1, 2, 3]]
    found = Child(test_channel_precedence.hold_and_call, open_it, page, way, arrivals).result()
    had = dict(enumerate(child.result() for child in children))
    assert (found[0] if way in test_channel_precedence.SENDING else test_channel_precedence.went(had)) == [4, 3, 1, 2, 0]


# -- supervisors come and go ----------------------------------------------------------------------------------------------


def test_the_next_supervisor_finds_messages_and_who_sends(domain: str, page: Page) -> None:
    first = Child(serve, domain, page, POLICY)
    eventually(lambda: page[DONE] == 1)

    def stay() -> None:
        channel = channel_of(domain, lease=5 * SHORT, operations=["send"])
        queue = queue_of(domain, operations=["send"])
        channel.send_bytes(b"before")
        queue.put(b"item")
        with channel.reserve(10) as view:
            view[:] = b"x" * 10
            page[READY] = 1
            while True:
                signal.pause()

    holder = as_user(DAVE, stay)
    eventually(lambda: page[READY])
    holder.stop()  # so that it cannot present its contract
    first.kill()
    with Supervisor(domain, POLICY) as supervisor:
        assert "adopted" in kinds(supervisor)
        assert supervisor._server is not None
        made = [_machine.Made("", 1, 0, kind, size=size).total() for kind, size in ((at.CHANNEL, SIZE), (at.QUEUE, 1 << 18))]
        assert supervisor._server.names.size(DAVE) == sum(made)  # of all files
        as_user(BOB, send, domain, b"after").result()
        assert holder.wait() == -signal.SIGKILL
        kernel = channel_of(domain, size=None, privileged=True)
        assert [kernel.recv_bytes(timeout=PATIENT) for _ in range(2)] == [b"before", b"after"]
        assert queue_of(domain).get(timeout=PATIENT) == b"item"
        assert not kernel.poll()
        del kernel


@pytest.mark.parametrize("what", ["message", "item"])
def test_the_next_supervisor_kills_who_reads_or_works_for_too_long_and_others_get_it(
    domain: str, page: Page, what: str
) -> None:
    first = Child(serve, domain, page, POLICY)
    eventually(lambda: page[DONE] == 1)

    def keep() -> None:
        kernel, queue = channel_of(domain, privileged=True), queue_of(domain)
        kernel.send_bytes(b"message")
        queue.put_many([b"first", b"item"])
        page[SPARE] = 1
        while kernel and queue:
            signal.pause()

    def stay() -> None:
        channel, queue = (open_it(domain, lease=SHORT, operations=["receive"]) for open_it in (channel_of, queue_of))
        with queue.take() as item:  # the first time it needs one more contract
            assert item == b"first"
        block = channel.peek() if what == "message" else queue.take()
        page[WORD] = 1
        eventually(lambda: page[GO])
        with block:
            page[READY] = 1
            while True:
                signal.pause()

    keeper = Child(keep)
    eventually(lambda: page[SPARE])
    holder = as_user(ERIN, stay)
    eventually(lambda: page[WORD])
    first.stop()  # so that what comes now is the matter of the next one
    page[GO] = 1
    eventually(lambda: page[READY])
    holder.stop()  # so that it cannot present its contract
    first.kill()

    def look() -> tuple[bytes, int]:
        if what == "message":
            return receive(domain), 2
        with (taken := queue_of(domain).take(timeout=PATIENT)) as item:
            return item, taken.deliveries

    with Supervisor(domain, POLICY) as supervisor:
        assert "adopted" in kinds(supervisor)
        assert as_user(BOB, look).result() == (what.encode(), 2)
        assert holder.wait() == -signal.SIGKILL
        assert "lease overrun" in reasons(supervisor, "killed")
        keeper.kill()


def test_what_nobody_living_may_receive_is_made_anew(domain: str, page: Page) -> None:
    """M-3: Dave has no descriptor of what the kernel sends."""
    first = Child(serve, domain, page, POLICY)
    eventually(lambda: page[DONE] == 1)

    def be_kernel() -> None:
        kernel = channel_of(domain, privileged=True)
        for _ in range(5):
            kernel.send_bytes(b"lost" * 400)
        page[READY] = 1
        while kernel:
            signal.pause()

    kernel_end = Child(be_kernel)
    eventually(lambda: page[READY])

    def be_dave() -> None:
        channel = channel_of(domain, size=None, operations=["send"])
        channel.send_bytes(b"one")
        page[GO] = 1
        eventually(lambda: page[SPARE])
        channel.send_bytes(b"two")

    dave = as_user(DAVE, be_dave)
    eventually(lambda: page[GO])
    dave.stop()
    kernel_end.kill()
    kernel_end.wait()
    first.kill()
    first.wait()
    with Supervisor(domain, POLICY):
        kernel = channel_of(domain, size=None, privileged=True)
        assert kernel.recv_bytes(timeout=PATIENT) == b"one"
        reader = as_user(ERIN, lambda: receive(domain, size=None))
        kernel.send_bytes(b"new")
        assert reader.result() == b"new"  # and nothing of what was lost
        for _ in range(20):
            kernel.send_bytes(b"z" * SIZE, timeout=PATIENT)
            assert as_user(ERIN, lambda: receive(domain, size=None)).result() == b"z" * SIZE
        page[SPARE] = 1
        dave.go_on()
        dave.result()
        assert kernel.recv_bytes(timeout=PATIENT) == b"two"  # the same segment
        del kernel


@pytest.mark.parametrize(
    ("label", "count"), [*(("M-1 segment made, not sealed", count) for count in (1, 2, 3)), ("M-2 sealed, not answered", 1)]
)
def test_a_supervisor_killed_while_it_makes_a_channel_leaves_nothing(label: str, count: int, domain: str, page: Page) -> None:
    def serve_and_die() -> None:
        watch_steps(DieAtLabel(label, count))
        serve(domain, page, POLICY)

    first = Child(serve_and_die)
    eventually(lambda: page[DONE] == 1)

    def wait_for_answer() -> None:
        with pytest.raises(ConnectionError):
            channel_of(domain)

    as_user(ALICE, wait_for_answer).result()
    assert first.wait() == -signal.SIGKILL
    assert not list(_machine.segments_of(domain))
    with Supervisor(domain, POLICY):
        as_user(ALICE, send, domain, b"whole").result()
        kernel = channel_of(domain, privileged=True)
        assert kernel.recv_bytes(timeout=PATIENT) == b"whole"
        del kernel


# -- whose memory it is ---------------------------------------------------------------------------------------------------


def test_a_user_has_so_many_bytes_for_all_files_of_them(domain: str, supervisor: Supervisor) -> None:
    total = _machine.Made("", 1, 0, at.CHANNEL, size=MOST // 20).total()

    def fill() -> tuple[int, str]:
        kept = []
        for number in itertools.count():
            try:
                kept.append(channel_of(domain, f"shared {number}", MOST // 20))
            except ContractDenied as error:
                return len(kept), error.reason
        raise AssertionError

    number, reason = as_user(ALICE, fill).result()
    assert number == MOST // total
    assert f"more than the {MOST} that the user may have" in reason
    assert as_user(ALICE, fill).result()[0] == number  # those that nobody uses make room


def test_no_memory_is_an_error_for_who_asks_and_an_event(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sys.System, "available_memory", lambda self: 1 << 20)
    monkeypatch.setattr(_sys, "AT_ONCE", 1 << 18)
    for make in (lambda: channel_of(domain, size=1 << 20), lambda: queue_of(domain, size=1 << 20)):
        with pytest.raises(OSError, match="no memory for one more segment") as error:
            make()
        assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert "no memory for one more segment" in reasons(supervisor, "refused")
    for size in (1 << 34, 1 << 60):
        with pytest.raises(OSError, match=f"no memory for {size} bytes"):
            channel_of(domain, size=size)
    as_user(ALICE, send, domain, b"after").result()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_memory_of_which_somebody_kept_a_part_still_counts(part: int, domain: str, supervisor: Supervisor) -> None:
    def hoard() -> int:
        kept: list[int] = []
        for number in range(20):
            try:
                channel = channel_of(domain, f"shared {number}", MOST // 20)
            except ContractDenied:
                return number
            kept.append(os.dup(_machine.descriptors(channel._memory.arena)[part]))
            del channel
        return 20

    assert 1 <= as_user(ALICE, hoard).result() <= 10
    as_user(ALICE, lambda: send(domain, b"x", name="shared now")).result()  # his end lets go of all


# -- what somebody may overwrite ------------------------------------------------------------------------------------------


def ring_of(end: Any) -> memoryview:
    """The words of its chunks, to be written."""
    end.map_up_to(end.geometry.content)
    return memoryview(end.mapping).cast("Q")


def test_messages_that_go_round_in_a_circle_are_damage_and_hold_nobody_up(domain: str, supervisor: Supervisor) -> None:
    """Without a bound, the reader would take the same bytes again and again, up to the number it asked for."""
    kernel = channel_of(domain, privileged=True, lease=LONG)

    def attack() -> None:
        out = channel_of(domain)._out
        words, step = ring_of(out), out.geometry.chunk // 8
        for chunk, following in ((0, 1), (1, 0)):
            words[chunk * step] = out.room - 8
            words[(chunk + 1) * step - 2] = _ring.LINK | following * step
        out.view[out.head] = 0
        out.view[out.tail] = 1 << 63

    as_user(ALICE, attack).result()
    with pytest.raises(SegmentError, match="go round in a circle"):
        kernel.recv_many(1 << 20)


def test_an_intent_that_somebody_made_up_costs_nobody_his_lease(domain: str, supervisor: Supervisor) -> None:
    """Whoever counted all of it under the lock would overrun, and be killed for what another one wrote."""
    first = channel_of(domain, size=1 << 25)  # of root's, who may have so much
    del first

    def attack() -> None:
        channel = channel_of(domain, size=None)
        out, control = channel._out, channel._memory.control(5 + _geometry.CONSUMERS)
        words, step = ring_of(out), out.geometry.chunk // 8
        for chunk in range(2, out.geometry.chunks - 1):  # full of empty messages
            words[(chunk + 1) * step - 1] = _ring.LINK | (chunk + 1) * step
        for chunk in (0, 1):
            words[chunk * step] = 8
        words[2] = _ring.LINK | step
        out.table[1] = _geometry.USED
        out.view[out.tail] = 2 << _ring.COUNT_SHIFT | step + 2
        out.view[control.start + at.BLOCK_INTENT + 1] = 0
        out.view[control.start + at.BLOCK_INTENT] = 5_000_000 << _ring.MESSAGES_SHIFT | 2 * step + 1

    as_user(ALICE, attack).result()

    def suffer() -> str:
        kernel = channel_of(domain, size=None, privileged=True, lease=SHORT)
        assert kernel.recv_bytes(timeout=PATIENT) == bytes(8)
        with pytest.raises(SegmentError) as error:
            kernel.recv_bytes(timeout=PATIENT)
        return str(error.value)

    assert "what a dead consumer had begun was overwritten" in as_user(0, suffer).result()
    assert "killed" not in kinds(supervisor)


def test_a_time_limit_holds_although_somebody_goes_on_changing_words(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words can say at each look that there is room, or a message, and at each attempt that there is none."""

    def suffer() -> None:
        monkeypatch.setattr(_ring, "OVERTIME", 0.05)
        monkeypatch.setattr(_ring.Producer, "has_room", lambda self, length: True)
        monkeypatch.setattr(_ring.Consumer, "is_empty", lambda self: False)
        monkeypatch.setattr(_ring.Consumer, "begin", lambda self, view: None)
        channel, queue = channel_of(domain), queue_of(domain, size=SIZE)
        for use in (
            lambda: channel.recv_bytes(timeout=0.05),
            lambda: channel.recv_many(2, timeout=0.05),
            lambda: queue.get(timeout=0.05),
            lambda: [channel.send_bytes(b"x" * 1000, timeout=0.05) for _ in range(100)],
            lambda: channel.send_many([b"x" * 1000], timeout=0.05),
            lambda: channel.reserve(1000, timeout=0.05).__enter__(),
            lambda: [queue.put(b"x" * 1000, timeout=0.05) for _ in range(100)],
        ):
            with pytest.raises((TimeoutError, shlock.queue.Empty, shlock.queue.Full)):
                use()
        with pytest.raises(SegmentError, match="TAIL was moved while nobody put anything"):
            queue.take(timeout=0.05).__enter__()

    as_user(BOB, suffer).result()


@pytest.mark.parametrize("kind", [at.CHANNEL, at.QUEUE])
def test_what_it_is_and_how_large_is_as_its_label_says(kind: int, domain: str) -> None:
    arena = _machine.make_arena(domain, _machine.Made("shared", 1, 0, kind, size=SIZE), 1, 0)
    words, start = arena.words, arena.layout.block(0)
    for place in range(at.HEADER_WORDS):
        words.store(place, 1 << 40)
    for index in range(arena.layout.blocks):
        words.store(arena.layout.block(index) + at.BLOCK_KIND, at.BARRIER)
        words.store(arena.layout.block(index) + at.BLOCK_PARAMETER, 1 << 40)
    block = Memory(arena).control(0)
    assert (block.kind, block.parameter, words.load(start + at.BLOCK_PARAMETER)) == (kind, SIZE, 1 << 40)
    _machine.restore(arena)
    kinds_there = [words.load(arena.layout.block(index) + at.BLOCK_KIND) & at.KIND for index in range(arena.layout.blocks)]
    assert kinds_there == [kind] * arena.layout.blocks
    again = _machine.arena_over(_machine.open_again(arena.segment.fd, read_only=False), domain)
    assert (again.declared, again.layout) == (arena.declared, arena.layout)
    again.segment.close()
    _machine.close(arena)


@pytest.mark.patience(120)
@pytest.mark.parametrize("kind", ["channel", "queue"])
def test_whatever_a_user_overwrites_the_others_are_not_killed_and_the_supervisor_serves(
    kind: str, domain: str, supervisor: Supervisor, page: Page
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    open_it = channel_of if kind == "channel" else queue_of
    first = open_it(domain)
    del first

    def bystander() -> None:
        mine = open_it(domain, lease=SHORT)  # with contracts for it, and never inside
        with channel_of(domain, "shared other").reserve(10):
            page[WORD] = _process.current.word
            page[READY] = mine is not None
            while not page[GO]:
                signal.sigtimedwait([], 0.01)

    victim = as_user(BOB, bystander)
    eventually(lambda: page[READY])

    def attack() -> None:
        draw = random.Random(seed)
        mine = open_it(domain)
        arena = mine._memory.arena
        view, out = arena.words.view, mine._out
        data = ring_of(out)
        tables = [memoryview(mine._memory.map(0, out.geometry.table))]
        first, last = arena.layout.block(0), arena.layout.block(arena.layout.blocks)
        small = (0, 1, 2, 7, 8, 511, 512, 1 << 32, 1 << 33 | 5, _ring.LINK, _ring.LINK | 512, 1 << 40, 3 << 40 | 100)
        values = (*small, at.WORD_MASK, _process.current.word, page[WORD], _process.make_word(victim.pid, 7))
        page[SPARE] = 1
        while not page[DONE]:
            value = draw.choice(values) if draw.random() < 0.8 else draw.randrange(1 << 64)
            where = draw.random()
            if where < 0.6:
                view[draw.randrange(first, last)] = value
            elif where < 0.7:
                view[draw.randrange(len(view))] = value
            elif where < 0.8:
                tables[0][draw.randrange(out.geometry.chunks)] = draw.randrange(256)
            else:
                data[draw.randrange(len(data))] = value

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[SPARE])

    def inside(block: Any) -> bytes:
        with block as content:
            return bytes(content)

    def suffer(number: int) -> int:
        """Anything may be read, and any of our own errors be raised; nothing crashes."""
        draw = random.Random(seed + number)
        fine = 0
        for _ in range(100):
            try:
                mine = open_it(domain, lease=5.0)
                if kind == "channel":
                    uses = [
                        lambda: mine.send_bytes(b"x" * draw.randrange(SIZE), timeout=0.01),
                        lambda: mine.send_many([b"y" * 10] * 20, timeout=0.01),
                        lambda: mine.recv_bytes(timeout=0.01),
                        lambda: mine.recv_many(10_000, timeout=0.01),
                        lambda: inside(mine.peek(timeout=0.01)),
                    ]
                else:
                    uses = [
                        lambda: mine.put(b"x" * draw.randrange(SIZE), timeout=0.01),
                        lambda: mine.put_many([b"y" * 10] * 20, timeout=0.01),
                        lambda: mine.get(timeout=0.01),
                        lambda: mine.get_many(10_000, timeout=0.01),
                        lambda: inside(mine.take(timeout=0.01)),
                    ]
                draw.choice(uses)()
                fine += 1
            except (OSError, ValueError, RuntimeError, shlock.queue.Empty, shlock.queue.Full, shlock.AbandonedWarning):
                pass
        return fine

    sufferers = [as_user(user, suffer, number) for number, user in enumerate((BOB, BOB, ALICE))]
    for sufferer in sufferers:
        sufferer.result(60.0)
    page[DONE] = 1
    attacker.result()
    assert victim.is_alive()
    assert supervisor.contracts()
    as_user(ALICE, lambda: send(domain, b"x", name="shared third")).result()
    page[GO] = 1
    victim.result()
    assert "killed" not in kinds(supervisor)
