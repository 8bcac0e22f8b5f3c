"""Domains of the machine: a supervisor that is root, clients of several users who don't trust each other, and attacks.

Needs root, who becomes unprivileged users in forked children.  What such a child imports must be loaded before: Python may be
installed where those users can't read it.
"""

from __future__ import annotations

import contextlib
import ctypes
import encodings.ascii
import encodings.idna  # noqa: F401 - see above
import errno
import faulthandler
import fcntl
import gc
import itertools
import math
import mmap
import os
import pickle
import re
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.internal.conjecture.optimiser  # noqa: F401 - see above
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Child, Page, end_children, eventually, is_sleeping

import shlock
import shlock._explain
from shlock import _arena, _client, _ledger, _machine, _messages, _parking, _process, _sys, cli, snapshot
from shlock import _layout as at
from shlock.errors import ContractDenied, SupervisorError
from shlock.supervisor import Policy, Supervisor, SupervisorEvent, parse, server
from shlock.supervisor.server import Server
from shlock.supervisor.watch import Client

ALICE, BOB, CAROL, MALLORY = 61001, 61002, 61003, 61004
"""Users with no other processes.  Carol may only read; nobody allows Mallory anything."""

SHORT, LONG = 0.2, 60.0


def _why_not() -> str | None:
    """Why these tests can't run here, or None."""
    if os.geteuid() != 0:
        return "only root can supervise other users"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            become(ALICE)
            status = 0
        finally:
            os._exit(status)
    return None if os.waitpid(pid, 0)[1] == 0 else "this root cannot become other users"


def become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


_reason = _why_not()
pytestmark = pytest.mark.skipif(_reason is not None, reason=_reason or "")

POLICY = parse(
    f"""
[[rule]]
users = ["@self"]
names = ["*"]
operations = ["acquire", "read"]
longest_lease = 3600.0

[[rule]]
users = [{ALICE}, {BOB}]
names = ["shared*"]
operations = ["acquire", "read"]
longest_lease = {LONG}
longest_grace = {LONG}
most_contracts = 8

[[rule]]
users = [{ALICE}]
names = ["alice*"]
operations = ["acquire"]
longest_lease = {LONG}

[[rule]]
users = [{CAROL}]
names = ["shared*"]
operations = ["read"]
longest_lease = {LONG}
""",
    "policy.toml",
)

# Words of the page.
READY, GO, PID, WORD, TOKEN, DONE, SPARE = range(7)

_numbers = itertools.count()
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def domain() -> Iterator[str]:
    """One that nobody else uses; nothing of it is left."""
    name = f"/test {os.getpid()} {next(_numbers)}"
    yield name
    assert not os.path.exists(_machine.socket_path(name))
    assert not os.path.exists(_machine._lock_path(name))


@pytest.fixture
def supervisor(request: pytest.FixtureRequest, domain: str) -> Iterator[Supervisor]:
    """One with the policy of the file that asks for it."""
    with Supervisor(domain, request.module.POLICY) as supervisor:
        yield supervisor
        end_children()


@pytest.fixture
def page() -> Page:
    return Page()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def as_user(user: int, function: Callable[..., Any], *arguments: Any) -> Child:
    """A child that is that user and nothing else."""
    _arena._this_machine()

    def become_and_run() -> Any:
        become(user)
        return function(*arguments)

    return Child(become_and_run)


def lock_of(domain: str, name: str = "shared", lease: float = LONG, **options: Any) -> shlock.Lock:
    options.setdefault("on_abandoned", "ignore")
    return shlock.Lock(name, domain=domain, lease=lease, **options)


def hold(domain: str, page: Page, lease: float = LONG, name: str = "shared") -> None:
    """Take the lock and keep it."""
    with lock_of(domain, name, lease) as held:
        page[TOKEN], page[PID], page[WORD] = held.token, os.getpid(), _process.current.word
        page[READY] = 1
        while True:
            signal.pause()


def get_in(domain: str, name: str = "shared") -> tuple[str | None, int]:
    """Wait for the lock; why the one before lost it, and our token."""
    lock = lock_of(domain, name)
    with lock as lease:
        return lock.abandoned.reason if lock.abandoned else None, lease.token


def be_a_client(domain: str, page: Page, lease: float = LONG) -> None:
    """Have a contract, and do nothing with it."""
    lock = lock_of(domain, lease=lease)
    page[WORD], page[PID] = _process.current.word, os.getpid()
    page[READY] = 1
    while lock is not None:
        signal.pause()


def kinds(supervisor: Supervisor) -> list[str]:
    return [event.event for event in supervisor.events()]


def reasons(supervisor: Supervisor, kind: str) -> str:
    return "; ".join(str(event) for event in supervisor.events() if event.event == kind)


# -- two users, one lock --------------------------------------------------------------------------------------------------


def test_users_exclude_each_other_and_wake_each_other_without_polling(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_parking, "POLL_INTERVAL", 600.0)
    page, rounds = Page(), 300

    def count() -> None:
        lock = lock_of(domain)
        page[READY] += 0
        for _ in range(rounds):
            with lock:
                before = page[SPARE]
                os.sched_yield()
                page[SPARE] = before + 1

    children = [as_user(user, count) for user in (ALICE, BOB, ALICE, BOB)]
    for child in children:
        child.result()
    assert page[SPARE] == rounds * len(children)


def test_an_overrunning_user_is_killed_and_the_other_one_is_told(domain: str, supervisor: Supervisor, page: Page) -> None:
    holder = as_user(ALICE, hold, domain, page, SHORT)
    eventually(lambda: page[READY])
    heir = as_user(BOB, get_in, domain)
    reason, token = heir.result()
    assert reason == "lease overrun"
    assert token == page[TOKEN] + 1
    assert holder.wait() == -signal.SIGKILL
    assert "killed" in kinds(supervisor)


def test_a_killed_user_is_noticed_by_his_pidfd(domain: str, supervisor: Supervisor, page: Page) -> None:
    holder = as_user(ALICE, hold, domain, page)
    eventually(lambda: page[READY])
    holder.kill()
    assert as_user(BOB, get_in, domain).result()[0] == "owner died"


def test_names_do_not_share_a_segment(domain: str, supervisor: Supervisor) -> None:
    """Who may lock one name cannot write where another one lies."""

    def segments() -> tuple[int, int]:
        first, second = lock_of(domain, "shared 1"), lock_of(domain, "shared 2")
        return first._block.arena.identity, second._block.arena.identity

    first, second = as_user(ALICE, segments).result()
    assert first != second


def test_a_lock_of_the_machine_goes_to_forked_and_spawned_children(domain: str, supervisor: Supervisor) -> None:
    def use() -> int:
        lock = lock_of(domain)
        again = pickle.loads(pickle.dumps(lock))
        assert again._block.arena is lock._block.arena
        with lock as lease:
            assert again.locked()
            token = lease.token

        def in_child() -> int:
            with lock as lease:
                return lease.token

        assert Child(in_child).result() == token + 1
        return os.geteuid()

    assert as_user(ALICE, use).result() == ALICE


def test_only_locks_with_a_lease_can_be_there(domain: str, supervisor: Supervisor) -> None:
    with pytest.raises(ValueError, match="is of the machine: only Lock, RLock, Block, Channel and Queue can be opened there"):
        shlock.Lock("shared", domain=domain)
    with pytest.raises(ValueError, match="is of the machine"):
        shlock.Event("shared", domain=domain)
    with shlock.RLock("shared r", domain=domain, lease=LONG) as lease:
        assert lease.token


def test_a_name_is_one_kind_of_lock(domain: str, supervisor: Supervisor) -> None:
    lock = lock_of(domain)
    with pytest.raises(shlock.SegmentError, match=r"an RLock .*is wanted"):
        shlock.RLock("shared", domain=domain, lease=LONG)
    assert not lock.locked()


def test_without_a_supervisor_it_says_how_to_start_one(domain: str) -> None:
    with pytest.raises(SupervisorError, match=f"none is running.*shlock supervise --domain {domain}"):
        lock_of(domain)


def test_only_root_sees_the_domains_of_the_machine(
    domain: str, supervisor: Supervisor, page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = as_user(ALICE, hold, domain, page)
    eventually(lambda: page[READY])

    def look(*arguments: str) -> int:
        return cli.main([*arguments, "--domain", domain])

    for arguments in (("ps",), ("why", "shared")):
        assert look(*arguments) == 0  # first: what it imports may lie where only root can read
        assert as_user(ALICE, look, *arguments).result() == 1
    assert "only root" not in capsys.readouterr().err
    holder.kill()


def test_only_root_can_supervise_the_machine(domain: str) -> None:
    def try_it() -> str:
        with pytest.raises(SupervisorError, match="only root") as error:
            Supervisor(domain).__enter__()
        return str(error.value)

    assert as_user(ALICE, try_it).result()


def test_a_domain_of_the_machine_has_one_supervisor(domain: str, supervisor: Supervisor) -> None:
    with pytest.raises(SupervisorError, match="is it already"):
        Supervisor(domain).__enter__()
    assert as_user(ALICE, get_in, domain).result() == (None, as_user(BOB, get_in, domain).result()[1] - 1)


def test_ps_and_why_show_the_locks_of_the_machine_to_root(
    domain: str, supervisor: Supervisor, page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = as_user(ALICE, hold, domain, page)
    eventually(lambda: page[READY])
    waiter = as_user(BOB, get_in, domain)
    eventually(lambda: is_sleeping(waiter.pid) and _waiters(domain))
    assert cli.main(["ps", "--domain", domain]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "shared" in line)
    assert str(holder.pid) in line and str(waiter.pid) in line, line
    assert cli.main(["why", "--domain", domain, "shared"]) == 0
    assert str(holder.pid) in capsys.readouterr().out
    holder.kill()
    waiter.result()


def _waiters(domain: str) -> int:
    return sum(len(p.waiters) for d in snapshot.domains() if d.domain == domain for p in d.primitives)


# -- what a client is given -----------------------------------------------------------------------------------------------


def test_segments_are_roots_and_cannot_be_shrunk_reopened_or_opened_up(domain: str, supervisor: Supervisor) -> None:
    def attack(operations: list[str]) -> tuple[int, int, int]:
        lock = lock_of(domain, operations=operations)
        fd = lock._block.arena.segment.fd
        facts = os.fstat(fd)
        for size in (0, 4096, 1 << 20):
            with pytest.raises(PermissionError if operations == ["acquire"] else OSError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.fchmod(fd, 0o666)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        return facts.st_uid, facts.st_mode & 0o777, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE

    assert as_user(ALICE, attack, ["acquire"]).result() == (0, 0o600, os.O_RDWR)
    assert as_user(ALICE, attack, ["read"]).result() == (0, 0o600, os.O_RDONLY)


def test_the_mmu_stops_a_write_through_a_contract_for_reading(domain: str, supervisor: Supervisor, page: Page) -> None:
    owner = as_user(ALICE, hold, domain, page)
    eventually(lambda: page[READY])

    def read() -> tuple[int, str]:
        lock = lock_of(domain, operations=["read"])
        assert lock.locked()
        for refused in (lock.acquire, lock.release, lock.__enter__, lambda: lock.repair().__enter__()):
            with pytest.raises(ContractDenied, match="does not allow to acquire it, only read"):
                refused()
        with pytest.raises(TypeError, match="read-only"):
            lock._block.arena.words.store(lock._block.word, 0)
        fd = lock._block.arena.segment.fd
        with pytest.raises(PermissionError):
            mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        assert lock.owner is not None
        return lock.owner.pid, repr(lock.contract and lock.contract.operations)

    assert as_user(CAROL, read).result() == (owner.pid, "frozenset({'read'})")

    def write() -> None:
        lock = lock_of(domain, operations=["read"])
        wanted = re.compile(rf"([0-9a-f]+)-\S+ r--s .*/memfd:{re.escape(_machine._prefix(domain))}")  # we are a fork of root
        address = next(int(found[1], 16) for line in _machine._mappings("self") if (found := wanted.match(line)))
        assert ctypes.string_at(address, 8) == at.MAGIC.to_bytes(8, "little")
        assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        page[SPARE] = lock is not None
        faulthandler.disable()
        ctypes.memset(address, 0, 8)
        page[SPARE] = 2

    child = as_user(CAROL, write)
    assert child.wait() == -signal.SIGSEGV
    assert page[SPARE] == 1
    owner.kill()
    assert as_user(BOB, get_in, domain).result()[0] == "owner died"


# -- attacks --------------------------------------------------------------------------------------------------------------


def test_a_user_without_permission_is_denied_and_does_not_learn_whether_the_name_exists(
    domain: str, supervisor: Supervisor, page: Page
) -> None:
    def refused(name: str) -> str:
        with pytest.raises(ContractDenied) as error:
            lock_of(domain, name)
        return str(error.value).replace(name, "NAME")

    assert as_user(ALICE, get_in, domain, "alice 1").result()
    existing, missing = (as_user(BOB, refused, name).result() for name in ("alice 1", "alice 2"))
    assert existing == missing
    assert as_user(MALLORY, refused, "shared").result() == existing
    assert kinds(supervisor).count("denied") == 3

    def too_much(**options: Any) -> str:
        with pytest.raises(ContractDenied) as error:
            lock_of(domain, **options)
        return error.value.reason

    assert "lease" in as_user(ALICE, lambda: too_much(lease=LONG + 1)).result()
    assert "rank" in as_user(ALICE, lambda: too_much(rank=1)).result()
    assert "acquire" in as_user(CAROL, lambda: too_much(operations=["acquire"])).result()


@pytest.mark.parametrize(
    "forged", ["a process without a contract", "process 1", "another birth", "a client that is not inside"]
)
def test_a_forged_owner_word_harms_nobody_and_does_not_close_the_lock(
    forged: str, domain: str, supervisor: Supervisor, page: Page
) -> None:
    if forged == "a client that is not inside":
        victim = as_user(BOB, be_a_client, domain, page, SHORT)
        eventually(lambda: page[READY])
    else:
        victim = as_user(BOB, _wait_forever, page)
        eventually(lambda: page[READY])
        birth = _sys.SYSTEM.birth
        if forged == "process 1":
            page[WORD] = _process.make_word(1, birth(1) or 0)
        elif forged == "another birth":
            page[WORD] = _process.make_word(victim.pid, (birth(victim.pid) or 0) + 1)

    def attack() -> None:
        lock = lock_of(domain, lease=SHORT)
        arena, word = lock._block.arena, lock._block.word
        arena.words.store(word, page[WORD])
        page[GO] = 1
        while lock is not None:
            signal.pause()

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[GO])
    reason, _ = as_user(BOB, get_in, domain).result()
    assert victim.is_alive()
    assert attacker.is_alive()
    if forged != "another birth":  # a waiter that polls may be faster there: that owner is dead
        assert reason is None
        assert "taken away" in kinds(supervisor)
    assert "killed" not in kinds(supervisor)


def _wait_forever(page: Page) -> None:
    page[WORD] = _process.current.word
    page[READY] = 1
    while True:
        signal.pause()


def test_a_forged_deadline_only_concerns_who_wrote_it(domain: str, supervisor: Supervisor, page: Page) -> None:
    victim = as_user(BOB, be_a_client, domain, page)
    eventually(lambda: page[READY])

    def attack() -> None:
        lock = lock_of(domain, lease=SHORT)
        with lock:
            grant = lock._words.grant
            grant.moments[grant.began] = 1e300  # a lease for ever
            grant.ledger.view[2] = page[WORD]  # and it is the victim's
            with pytest.raises(PermissionError):
                os.listdir(f"/proc/{victim.pid}/fd")  # whose own one is out of reach
            page[GO] = 1
            while True:
                signal.pause()

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[GO])
    reason, _ = as_user(BOB, get_in, domain).result()
    assert reason == "lease overrun"
    assert attacker.wait() == -signal.SIGKILL
    assert victim.is_alive()


def test_who_claims_never_to_be_inside_loses_the_lock_and_not_its_life(domain: str, supervisor: Supervisor, page: Page) -> None:
    def attack() -> None:
        lock = lock_of(domain, lease=SHORT)
        lock.acquire()
        grant = lock._words.grant
        grant.moments[grant.began] = 0.0
        page[GO] = 1
        while True:
            signal.pause()

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[GO])
    assert as_user(BOB, get_in, domain).result()[0] is None
    assert attacker.is_alive()
    assert "stalled at the door" in reasons(supervisor, "taken away")


def test_who_may_not_acquire_gets_no_descriptor_for_writing_however_he_asks(domain: str, supervisor: Supervisor) -> None:
    def ask(operations: list[str]) -> tuple[dict[str, Any], list[int]]:
        with talk(domain) as say:
            received: list[int] = []
            message = {"op": "attach", "name": "shared", "kind": at.LOCK, "policy": 0, "operations": operations}
            answer = say({**message, "lease": 10**9, "grace": 0, "rank": 0}, received=received)
            return answer, [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in received]

    assert as_user(ALICE, ask, ["acquire"]).result() == ({"ok": True}, [os.O_RDWR])
    for user, operations in ((CAROL, ["acquire"]), (CAROL, ["read", "acquire"]), (MALLORY, ["read"]), (MALLORY, ["acquire"])):
        answer, modes = as_user(user, ask, operations).result()
        assert not answer["ok"]
        assert modes == []
    assert as_user(CAROL, ask, ["read"]).result() == ({"ok": True}, [os.O_RDONLY])


def test_a_descriptor_that_was_given_away_is_no_contract(
    domain: str, supervisor: Supervisor, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Carol may read.  Alice gives her the descriptor for writing: Carol's requests are decided as ever."""
    ours, theirs = pair

    def give() -> None:
        lock = lock_of(domain)
        socket.send_fds(ours, [b"x"], [lock._block.arena.segment.fd])
        ours.recv(1)

    giver = as_user(ALICE, give)

    def replay() -> list[dict[str, Any]]:
        _, [fd], _, _ = socket.recv_fds(theirs, 1, 1)
        arena = _machine.arena_over(fd, domain)
        answers = []
        with talk(domain) as say:
            answers.append(say({"op": "arena", "identity": arena.identity}, fd))
            for operations in (["acquire"], ["read"]):
                answers.append(say(opening(arena.identity, operations)))
            answers.append(say({"op": "arena", "identity": arena.identity + 1}, fd))
        theirs.send(b"x")
        return answers

    shown, acquire, read, other = as_user(CAROL, replay).result()
    giver.result()
    assert shown == {"ok": True}
    assert not acquire.get("ok") and "acquire" in acquire["reason"]
    assert read.get("ok")
    assert "another arena" in other["error"]
    assert "denied" in kinds(supervisor)


def test_a_contract_that_the_policy_took_back_is_not_had_again_by_replaying_it(domain: str, page: Page) -> None:
    with Supervisor(domain, POLICY) as supervisor:

        def replay() -> list[Any]:
            with talk(domain) as say:
                arena = given_by(say, domain)
                first = say({"op": "arena", "identity": arena.identity}, arena.segment.fd)
                opened = say(opening(arena.identity, ["acquire"]))
                page[READY] = 1
                eventually(lambda: page[GO])
                return [first, opened, *(say(opening(arena.identity, ["acquire"])) for _ in range(3))]

        child = as_user(ALICE, replay)
        eventually(lambda: page[READY])
        assert supervisor._server is not None
        supervisor._server.policy = Policy()
        page[GO] = 1
        first, opened, *again = child.result()
        assert first.get("ok") and opened.get("ok")
        assert [answer.get("ok") for answer in again] == [False] * 3


@contextlib.contextmanager
def talk(domain: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """A connection that has said hello, and a function that says something over it.  Of a process the last one counts."""
    with _client.connect(domain, 0.0, start=False) as connection:

        def say(message: dict[str, Any], *descriptors: int, received: list[int] | None = None) -> dict[str, Any]:
            return _messages.exchange(connection, message, descriptors, received)

        assert say({"op": "hello", "version": 1}, _ledger.Ledger.create().fd).get("ok")
        yield say


def given_by(say: Callable[..., dict[str, Any]], domain: str) -> _arena.Arena:
    """The arena of a name, asked for by hand."""
    received: list[int] = []
    message = {"op": "attach", "name": "shared", "kind": at.LOCK, "policy": 1, "operations": ["acquire"]}
    assert say({**message, "lease": 10**9, "grace": 0, "rank": 0}, received=received).get("ok")
    return _machine.arena_over(received.pop(), domain)


def opening(identity: int, operations: list[str]) -> dict[str, Any]:
    return {
        "op": "open", "slot": 9, "arena": identity, "block": 0, "operations": operations,
        "lease": 10**9, "grace": 0, "rank": 0, "raise": False,
    }  # fmt: skip


def test_a_segment_of_the_attackers_own_is_not_believed(domain: str, supervisor: Supervisor) -> None:
    def attack() -> list[str]:
        errors = []
        with talk(domain) as say:
            genuine = given_by(say, domain)
            for name, mode, seals in itertools.product(("shared", "shared 2"), (0o600, 0o777), (_machine.SEALS, 0)):
                label = _machine.label(domain, _machine.Made(name, 1, ALICE, at.LOCK))
                fd = os.memfd_create(label, os.MFD_ALLOW_SEALING)
                os.write(fd, bytes(genuine.segment.memory))
                os.fchmod(fd, mode)
                if seals:
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
                errors.append(say({"op": "arena", "identity": os.fstat(fd).st_ino}, fd)["error"])
        return errors

    errors = as_user(ALICE, attack).result()
    assert len(errors) == 8
    assert all("no supervisor" in error for error in errors), errors


def test_process_1_and_the_supervisor_itself_may_never_be_killed(domain: str, supervisor: Supervisor) -> None:
    ledger = _ledger.Ledger.create()
    for word in (_process.make_word(1, 7), _process.current.word):
        client = Client(word, os.pidfd_open(1), ledger, 0)
        assert not client.may_be_killed
        os.close(client.pidfd)
    ledger.close()


def test_no_memory_for_a_segment_is_told_and_the_others_are_served(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def try_it() -> str:
        with pytest.raises(SupervisorError) as error:
            lock_of(domain, "shared new")
        return error.value.fact

    assert as_user(ALICE, get_in, domain).result()
    monkeypatch.setattr(_sys.System, "create_sealable", full)
    assert as_user(ALICE, try_it).result() == "there is no memory for one more segment: No space left on device"
    assert as_user(BOB, get_in, domain).result()
    monkeypatch.undo()
    assert as_user(ALICE, get_in, domain, "shared new").result()


def test_users_may_not_ask_for_what_only_root_may(domain: str, supervisor: Supervisor) -> None:
    def ask() -> list[str]:
        with talk(domain) as say:
            return [say({"op": operation, "name": "shared", "from": 0, "after": 0})["error"] for operation in server._FOR_ROOT]

    errors = as_user(ALICE, ask).result()
    assert all("only root" in error for error in errors), errors


def test_nobody_else_can_take_the_supervisors_address(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def squat() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, pytest.raises(OSError):
            listener.bind(_machine.socket_path(domain))

    with Supervisor(domain, POLICY):
        as_user(MALLORY, squat).result()

    # And if somebody could: a client does not trust him.
    folder = tempfile.mkdtemp(dir="/run")  # a short one, as the kernel wants for sockets
    os.chmod(folder, 0o755)
    monkeypatch.setattr(_machine, "FOLDER", folder)
    page = Page()

    def pretend() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(_machine.socket_path(domain))
            os.chown(_machine.socket_path(domain), MALLORY, MALLORY)
            become(MALLORY)
            listener.listen()
            page[READY] = 1
            while True:
                signal.pause()

    pretender = Child(pretend)
    eventually(lambda: page[READY])
    with pytest.raises(SupervisorError, match=f"user {MALLORY} has taken its address"):
        lock_of(domain)
    pretender.kill()
    os.unlink(_machine.socket_path(domain))
    os.rmdir(folder)


def test_a_folder_that_others_can_write_to_is_refused(domain: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_machine, "FOLDER", os.fspath(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(PermissionError, match="folder of root's"):
        Supervisor(domain).__enter__()


def test_one_users_connections_do_not_keep_others_out(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, page: Page
) -> None:
    monkeypatch.setattr(server, "MOST_OF_ONE_USER", 5)

    def crowd() -> int:
        connections = []
        for _ in range(20):
            connection = _client.connect(domain, 0.0, start=False)
            connection.settimeout(0.0)
            connections.append(connection)
        eventually(lambda: sum(1 for connection in connections if _client._has_ended(connection)) >= 15)
        page[READY] = 1
        eventually(lambda: page[GO])
        return sum(1 for connection in connections if not _client._has_ended(connection))

    crowded = as_user(MALLORY, crowd)
    eventually(lambda: page[READY])
    assert as_user(ALICE, get_in, domain).result()
    page[GO] = 1
    assert crowded.result() == 5
    assert "has 5 connections already" in reasons(supervisor, "refused")


def test_who_sends_garbage_again_and_again_loses_his_connection(domain: str, supervisor: Supervisor) -> None:
    def send() -> int:
        with _client.connect(domain, 0.0, start=False) as connection:
            for count in range(1, 1000):
                try:
                    _messages.exchange(connection, {"op": "nonsense"})
                except OSError:
                    return count
        return 0

    assert as_user(MALLORY, send).result() == server.MOST_REFUSALS + 1


def test_a_user_has_so_many_names_and_makes_room_by_leaving_some(domain: str, supervisor: Supervisor) -> None:
    def make_many() -> str:
        kept = [lock_of(domain, f"shared {number}") for number in range(8)]
        with pytest.raises(ContractDenied) as error:
            lock_of(domain, "shared too many")
        kept.clear()
        for number in range(20):  # one after the other is no problem
            with lock_of(domain, f"shared later {number}"):
                pass
        return error.value.reason

    assert "8" in as_user(ALICE, make_many).result()
    assert supervisor._server is not None
    assert supervisor._server.names.count(ALICE) == 8
    assert as_user(BOB, get_in, domain, "shared of bob").result()


@pytest.mark.parametrize("on_terminate", ["flag", "raise"])
@pytest.mark.parametrize("name", ["shared", "shared\n1"])
def test_a_process_that_became_another_users_is_spared_and_its_lock_passed_on(
    name: str, on_terminate: str, domain: str, supervisor: Supervisor, page: Page
) -> None:
    """Who starts a program with another user's rights in its place cannot have that one killed, nor sent a signal."""

    def hold_and_exec() -> None:
        os.setgroups([])
        os.setresuid(ALICE, ALICE, 0)  # so that it can become another one
        lock = lock_of(domain, name, SHORT, grace=SHORT, on_terminate=on_terminate)
        lock.acquire()
        page[READY] = 1
        os.setresuid(0, 0, 0)
        os.setresuid(BOB, BOB, BOB)
        os.execv("/bin/sleep", ["sleep", "600"])

    holder = Child(hold_and_exec)
    eventually(lambda: page[READY])
    assert as_user(ALICE, get_in, domain, name).result()[0] == "owner died"
    assert holder.is_alive()
    assert "another user's program" in reasons(supervisor, "spared")


@pytest.mark.parametrize("name", ["shared", "shared\n1"])
def test_who_changes_its_user_and_stays_inside_is_killed(name: str, domain: str, supervisor: Supervisor, page: Page) -> None:
    def hold_as_another() -> None:
        os.setgroups([])
        os.setresuid(ALICE, ALICE, 0)
        with lock_of(domain, name, SHORT):
            page[READY] = 1
            os.setresuid(0, 0, 0)
            os.setresuid(BOB, BOB, BOB)
            while True:
                signal.pause()

    holder = Child(hold_as_another)
    eventually(lambda: page[READY])
    assert as_user(ALICE, get_in, domain, name).result()[0] == "lease overrun"
    assert holder.wait() == -signal.SIGKILL


# -- supervisors come and go ----------------------------------------------------------------------------------------------


def serve(domain: str, page: Page, policy: Policy = POLICY) -> None:
    service = Server(domain, policy)
    page[DONE] += 1
    service.run()


def test_the_next_supervisor_adopts_locks_and_holders_of_all_users(domain: str, page: Page) -> None:
    first = Child(serve, domain, page)
    eventually(lambda: page[DONE] == 1)
    holder = as_user(ALICE, hold, domain, page, SHORT * 5)
    eventually(lambda: page[READY])
    holder.signal(signal.SIGSTOP)  # so that it cannot present its contract
    first.kill()
    with Supervisor(domain, POLICY) as supervisor:
        assert "adopted" in kinds(supervisor)
        reason, token = as_user(BOB, get_in, domain).result()
        assert reason == "lease overrun"
        assert token == page[TOKEN] + 1
        assert holder.wait() == -signal.SIGKILL


def test_clients_go_on_with_the_same_lock_after_a_supervisor_was_killed(domain: str, page: Page) -> None:
    first = Child(serve, domain, page)
    eventually(lambda: page[DONE] == 1)

    def go_on() -> tuple[int, int]:
        lock = lock_of(domain)
        with lock as lease:
            before = lease.token
        page[READY] = 1
        eventually(lambda: page[GO])
        with lock as lease:
            return before, lease.token

    client = as_user(ALICE, go_on)
    eventually(lambda: page[READY])
    first.kill()
    with Supervisor(domain, POLICY) as supervisor:
        _, token = as_user(BOB, get_in, domain).result()  # the same lock: the segment was found again
        eventually(
            lambda: any(contract.pid == client.pid for contract in supervisor.contracts()), "its contract is there again"
        )
        page[GO] = 1
        before, after = client.result()
        assert before + 1 == token == after - 1


def test_tokens_grow_although_everything_was_gone(domain: str) -> None:
    with Supervisor(domain, POLICY):
        _, first = as_user(ALICE, get_in, domain).result()

    def is_gone() -> bool:
        gc.collect()
        found = list(_machine.segments_of(domain))
        for fd in found:
            os.close(fd)
        return not found

    eventually(is_gone, "the threads that close connections let go of the segment")
    with Supervisor(domain, POLICY):
        _, second = as_user(ALICE, get_in, domain).result()
    assert second > first


def test_a_ledger_that_was_slipped_to_a_process_is_not_believed_of_it(
    domain: str, page: Page, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Mallory's allies may put anything into a process that accepts descriptors."""
    first = Child(serve, domain, page)
    eventually(lambda: page[DONE] == 1)
    ours, theirs = pair

    def be_victim() -> None:
        page[WORD], page[PID] = _process.current.word, os.getpid()
        page[READY] = 1
        descriptors = socket.recv_fds(theirs, 1, 1)
        page[READY] = 2
        while descriptors:
            signal.pause()

    victim = as_user(BOB, be_victim)
    eventually(lambda: page[READY] == 1)

    def attack() -> None:
        lock = lock_of(domain, lease=SHORT)
        arena = lock._block.arena
        forged = _ledger.Ledger.create()
        for place, value in (
            (2, page[WORD]), (_ledger.BEGAN, 5), (_ledger.LEASE, 10**6), (_ledger.ARENA, arena.identity), (_ledger.BLOCK, 0)
        ):  # fmt: skip
            forged.view[place] = value
        socket.send_fds(ours, [b"x"], [forged.fd])
        eventually(lambda: page[READY] == 2)
        arena.words.store(lock._block.word, page[WORD])
        page[GO] = 1
        while lock is not None:
            signal.pause()

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[GO])
    first.kill()
    with Supervisor(domain, POLICY) as supervisor:
        assert as_user(ALICE, get_in, domain).result()[0] is None
        assert victim.is_alive() and attacker.is_alive()
        assert "killed" not in kinds(supervisor)


@pytest.mark.parametrize("began", [1e300, math.inf, math.nan, 1e-300])
def test_terms_in_a_ledger_are_adopted_only_as_far_as_the_policy_allows(began: float, domain: str, page: Page) -> None:
    first = Child(serve, domain, page)
    eventually(lambda: page[DONE] == 1)

    def attack() -> None:
        lock = lock_of(domain, lease=LONG)
        lock.acquire()
        ledger = lock._words.grant.ledger
        ledger.view[_ledger.LEASE] = ledger.view[_ledger.GRACE] = 1 << 60
        ledger.moments[_ledger.BEGAN] = began
        page[READY] = 1
        while True:
            signal.pause()

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[READY])
    first.kill()
    strict = parse(f'[[rule]]\nusers = [{ALICE}, {BOB}]\nnames = ["*"]\noperations = ["acquire"]\nlongest_lease = {SHORT}', "p")
    with Supervisor(domain, strict):
        lock = as_user(BOB, lambda: shlock.Lock("shared", domain=domain, lease=SHORT, on_abandoned="ignore").acquire())
        assert lock.result() is True
        assert attacker.wait() == -signal.SIGKILL


# -- what a reader of the code might try -----------------------------------------------------------------------------------


def test_one_process_has_one_contract_for_a_lock_in_whichever_slots(domain: str, supervisor: Supervisor) -> None:
    def attack() -> list[bool]:
        with talk(domain) as say:
            identity = given_by(say, domain).identity
            for slot in (1, 2, 3):
                assert say({**opening(identity, ["acquire"]), "slot": slot}).get("ok")
            return [bool(say({"op": "close", "slot": slot}).get("ok")) for slot in (3, 2, 1)]

    assert as_user(ALICE, attack).result() == [True] * 3
    assert as_user(BOB, get_in, domain).result()


def test_who_says_hello_twice_has_only_the_last_connection(domain: str, supervisor: Supervisor) -> None:
    def attack() -> int:
        with talk(domain) as first, talk(domain) as second:
            assert second({"op": "who"}).get("ok")
            try:
                first({"op": "open", **opening(1, ["acquire"])})
            except OSError:
                return 1
        return 0

    assert as_user(ALICE, attack).result() == 1
    assert as_user(BOB, get_in, domain).result()


def test_who_overwrites_spots_all_the_time_holds_nobody_up_for_long(domain: str, supervisor: Supervisor, page: Page) -> None:
    def attack() -> None:
        lock = lock_of(domain)
        view, layout = lock._block.arena.words.view, lock._block.arena.layout
        first, last = layout.spot(at.SPOT_STATE, 0), layout.spot(at.SPOT_STATE, 8)
        view[at.HEADER_SPOTS_USED] = 8
        number = 0
        page[READY] = 1
        while not page[GO]:
            number += at.SEQUENCE_ONE
            for place in range(first, last):
                view[place] = number & at.SEQUENCE | at.WAITING

    attacker = as_user(ALICE, attack)
    eventually(lambda: page[READY])
    for _ in range(3):
        holder = as_user(BOB, be_killed_inside, domain)
        assert holder.wait() == -signal.SIGKILL
        assert as_user(BOB, get_in, domain).result()
    page[GO] = 1
    attacker.result()


def be_killed_inside(domain: str) -> None:
    with lock_of(domain):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_user_overwrites_is_put_right_for_the_next_one(domain: str, supervisor: Supervisor) -> None:
    def attack() -> None:
        view = lock_of(domain)._block.arena.words.view
        for place in range(at.HEADER_SPOTS_USED):
            view[place] = 0xDEAD
        block = at.Layout(_machine.SPOTS, _machine.PROCESSES, 1, 0).block(0)
        view[block + at.BLOCK_KIND] = 0xFFFF
        view[block + at.BLOCK_TOKEN] = at.WORD_MASK

    as_user(ALICE, attack).result()
    assert as_user(BOB, get_in, domain).result() == (None, 0)


def test_a_name_is_made_for_who_may_acquire_it(domain: str, supervisor: Supervisor) -> None:
    def look() -> str:
        with pytest.raises(SupervisorError) as error:
            shlock.RLock("shared", domain=domain, lease=LONG, on_abandoned="poison", operations=["read"])
        return error.value.fact

    assert "is not there yet" in as_user(CAROL, look).result()
    assert as_user(ALICE, get_in, domain).result()


def test_a_child_cannot_speak_for_what_its_parent_has_become(domain: str, supervisor: Supervisor, page: Page) -> None:
    """Its parent connected, and now runs another user's program, which is a client."""

    def connect_and_become_bob() -> None:
        os.setgroups([])
        os.setresuid(ALICE, ALICE, 0)
        connection = _client.connect(domain, 0.0, start=False)

        def speak() -> str:
            eventually(lambda: page[READY])
            ledger = _ledger.Ledger.create()
            return str(_messages.exchange(connection, {"op": "hello", "version": 1}, (ledger.fd,)).get("error"))

        child = Child(speak)
        os.setresuid(0, 0, 0)
        os.setresuid(BOB, BOB, BOB)
        with lock_of(domain):
            page[READY] = 1
            assert f"is of user {BOB} by now" in child.result()

    Child(connect_and_become_bob).result()


def test_descriptors_that_are_slow_to_close_hold_nobody_up(
    domain: str, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, page: Page
) -> None:
    is_memory = server._is_memory

    def look_when_we_have_the_last_one(descriptor: int) -> bool:
        eventually(lambda: page[GO])
        return is_memory(descriptor)

    monkeypatch.setattr(server, "_is_memory", look_when_we_have_the_last_one)

    def attack() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            with socket.create_connection(listener.getsockname()) as sender, listener.accept()[0]:
                sender.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sender.send(bytes(1 << 16))
                sender.setblocking(True)
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
                with _client.connect(domain, 0.0, start=False) as connection:
                    _messages.send(connection, {"op": "who"}, (sender.fileno(),))
                    sender.close()
                    page[GO] = 1
                    for _ in range(2):
                        answer = _messages.decode(_messages.receive(connection)[0])
                        _messages.send(connection, {"op": "who"})
                    return int(answer["pid"])

    assert as_user(MALLORY, attack).result() == os.getpid()
    assert as_user(ALICE, get_in, domain).result()


# -- fuzz -----------------------------------------------------------------------------------------------------------------

_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=3),
    st.sampled_from([["acquire"], ["read"], ["write"], "shared", "shared 1", 1, 2, at.GUARDED, 10**9]),
)
_operations = ["attach", "open", "arena", "hello", "close", "who", "contracts", "events", "kill", "revoke", "?"]
_keys = [
    "name",
    "kind",
    "policy",
    "operations",
    "lease",
    "grace",
    "rank",
    "slot",
    "arena",
    "block",
    "identity",
    "raise",
    "size",
    "copies",
]
_requests = st.fixed_dictionaries({"op": st.sampled_from(_operations)}, optional=dict.fromkeys(_keys, _values))


@pytest.mark.patience(120)
def test_whatever_a_user_sends_the_supervisor_serves_the_others(domain: str, supervisor: Supervisor, page: Page) -> None:
    victim = as_user(BOB, hold, domain, page)
    eventually(lambda: page[READY])

    def attack() -> int:
        sent = 0

        @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(_requests, min_size=1, max_size=8), st.booleans())
        def send(requests: list[dict[str, Any]], with_descriptor: bool) -> None:
            nonlocal sent
            with contextlib.suppress(OSError, _messages.MessageError), talk(domain) as say:
                null = os.open("/dev/null", os.O_RDWR)
                try:
                    for request in requests:
                        say(request, *((null,) if with_descriptor else ()))
                        sent += 1
                finally:
                    os.close(null)

        send()
        return sent

    assert as_user(ALICE, attack).result(90) > 100
    assert victim.is_alive()
    assert as_user(ALICE, get_in, domain, "shared 7").result()
    assert supervisor.contracts()
    assert "killed" not in kinds(supervisor)
    assert all(isinstance(event, SupervisorEvent) for event in supervisor.events())
