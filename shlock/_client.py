"""A process's connection to the supervisor of a domain: asking for contracts, and presenting them again to the next one.

One connection for each domain and process.  A thread waits for its end: when the supervisor dies, it connects to the next one,
or starts it, and presents every contract again.  Between two supervisors locks go on working; only enforcement pauses.

Who finds no supervisor starts one.  Of many who do so at the same time, the kernel lets one bind an address that stands for "is
starting it"; the others go on trying to connect.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import logging
import os
import select
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import spawn, util
from typing import Any, Final

from . import _layout as at
from . import _ledger, _machine, _messages, _names, _process
from ._arena import Arena, Block, Declaration, Rights
from ._log import log
from ._owned import OwnedWords, describe
from ._sys import SYSTEM
from .contract import CLASSES, FREE, Contract, Grant, Terms, precedence_of, prepare_to_raise, raise_for
from .errors import ContractDenied, SegmentError, SupervisorError

__all__ = ["Connection", "ask", "connect", "connection_to", "events", "obtain", "renew", "supervisor_pid"]

START_TIMEOUT: Final = 20.0  # seconds until a supervisor must have answered
START_AGAIN: Final = 1.0  # seconds until one more is started
RETRY: Final = 0.005  # seconds
RETRY_ROOT: Final = 0.02  # seconds between looks for a supervisor that we can't start ourselves
FOLLOW_RETRY: Final = 0.1  # seconds between looks for a supervisor whose events to follow
ANSWER_TIMEOUT: Final = 20.0  # seconds
#: Errors that mean: this supervisor is gone.
GONE: Final = (ConnectionError, BrokenPipeError, TimeoutError)

_connections: dict[str, Connection] = {}
#: Arenas of the machine that this process has: by domain and name.
_attached: weakref.WeakValueDictionary[tuple[str, str], Arena] = weakref.WeakValueDictionary()
_connecting = threading.Lock()
#: "domain": that in which threads of this process are lifted.  Set by one call, which another thread cannot divide.
_inherits_in: dict[str, str] = {}


class _Bell:
    """A connection once more, to say something without waiting.  Closed when the last thread that rings lets go of it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection.dup()

    def ring(self, data: bytes) -> bool:
        try:
            self._socket.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:  # nobody listens, or he does not keep up
            return False
        return True

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self._socket.close()


class Connection:
    """The connection of this process to the supervisor of one domain."""

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.is_of_machine = _machine.is_of_machine(domain)
        self.ledger = _ledger.Ledger.create()
        self.grants: weakref.WeakValueDictionary[int, Grant] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._free: list[int] = []
        self._numbers = itertools.count()
        self._readers: dict[int, set[int]] = {}  # slots of readers, by that of their contract
        self._arenas: set[int] = set()  # which the present supervisor has
        self._watcher: threading.Thread | None = None
        self._connected = False  # at some time
        #: Slots whose locks are gone.  A finalizer may run anywhere, also in the middle of an exchange: it only notes them.
        self._closing: collections.deque[int] = collections.deque()
        self.bell: _Bell | None = None  # of the present supervisor
        SYSTEM.register_membarrier()

    # -- contracts ----------------------------------------------------------------------------------------------------

    def open(self, words: OwnedWords, terms: Terms) -> Grant:
        """Ask for a contract.  Blocks for an answer; ContractDenied, SupervisorError."""
        with self._lock:
            self._close_unused()
            grant = Grant(self, words, terms, self.ledger, self.take_slot())
            try:
                self._write(grant)
                self._present(grant)
            except BaseException:
                self._return_slot(grant.number)
                raise
            if grant.refusal is not None:
                self._return_slot(grant.number)
                raise grant.refusal
            self.grants[grant.number] = grant
            weakref.finalize(words, self._closing.append, grant.number).atexit = False
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="shlock supervisor watch", daemon=True)
                self._watcher.start()
        if terms.on_terminate == "raise":
            raise_for(grant)
        return grant

    def attach(self, name: str, declaration: Declaration, terms: Terms) -> Arena:
        """The arena of a name of the machine, from the supervisor.  Blocks for an answer; ContractDenied, SupervisorError."""
        descriptors: list[int] = []
        message = {
            "op": "attach",
            "name": name,
            "kind": declaration.kind,
            "policy": declaration.policy or 0,
            "operations": list(terms.operations),
            "lease": terms.lease,
            "grace": terms.grace,
            "rank": terms.rank,
        }
        if declaration.kind == at.GUARDED:
            message |= {"size": declaration.parameter, "copies": declaration.copies}
        elif declaration.kind in _machine.CARRYING:
            most_items, most_deliveries = declaration.limits
            message |= {"size": declaration.parameter, "most_items": most_items, "most_deliveries": most_deliveries}
        with self._lock:
            self._close_unused()
            answer = self._call(message, received=descriptors)
            if answer.get("full"):  # of what we have dropped, or still have mapped because nobody has looked for cycles
                gc.collect()
                self._close_unused()
                answer = self._call(message, received=descriptors)
            if not answer.get("ok"):
                raise self._not_given(name, declaration, answer)
            try:
                arena = _machine.arena_over(descriptors.pop(0), self.domain)
                while descriptors:
                    _machine.part_over(descriptors.pop(), arena)
            finally:
                for descriptor in descriptors:
                    SYSTEM.close(descriptor)
            arena.rights = Rights(frozenset(terms.operations), str(answer.get("rule")))
            self._arenas.add(arena.identity)
        return arena

    def _not_given(self, name: str, wanted: Declaration, answer: dict[str, Any]) -> OSError:
        """Why we did not get a segment."""
        if answer.get("missing"):
            fact = f"there is no {name!r} in domain {self.domain!r}"
            return SegmentError("of the machine", fact, "Give a size, and it is created.")
        if "errno" in answer:
            return OSError(int(answer["errno"]), f"{at.KIND_NAMES[wanted.kind]} {name!r}: {answer.get('reason')}")
        if "kind" in answer:
            kind, size, policy = (int(answer[key]) for key in ("kind", "size", "policy"))
            return _names.different("of the machine", name, Declaration(kind, parameter=size, policy=policy), wanted)
        lock = f"{at.KIND_NAMES[wanted.kind]} {name!r}"
        return ContractDenied(lock, str(answer.get("reason")), str(answer.get("rule")))

    def _close_unused(self) -> None:
        """Give the contracts back whose locks are gone."""
        while self._closing:
            number = self._closing.popleft()
            self._arenas.discard(self.ledger.view[_ledger.ARENA + number])  # the supervisor may let go of it
            if self._socket is not None:
                with contextlib.suppress(*GONE, SupervisorError):
                    self._exchange(self._socket, {"op": "close", "slot": number})
            self._return_slot(number)

    def take_slot(self) -> int:
        """A slot that is free.  Takes no lock."""
        with contextlib.suppress(IndexError):
            return self._free.pop()
        number = next(self._numbers)
        if number >= _ledger.SLOTS:
            raise ValueError(f"this process has {_ledger.SLOTS} contracts already, which is the most that one can have")
        return number

    def _return_slot(self, number: int) -> None:
        for slot in (*self._readers.pop(number, ()), number):
            # RECORD last: a reader's slot is never to be taken for that of a contract.
            for field in (_ledger.BEGAN, _ledger.ARENA, _ledger.THREAD, _ledger.RECORD):
                self.ledger.view[field + slot] = 0
            self._free.append(slot)

    def give_up_slot(self, number: int) -> None:
        """One that was taken and never used."""
        self._free.append(number)

    def use_for_reader(self, number: int, grant: Grant, block: Block, place: int) -> None:
        """Make a slot that of a record under a contract.  No supervisor is asked, so one can read while none runs."""
        self._readers.setdefault(grant.number, set()).add(number)
        self._fill(number, grant.terms, block, place)

    def _write(self, grant: Grant) -> None:
        words = grant.words
        assert words is not None
        self._fill(grant.number, grant.terms, words.block, 0)

    def _fill(self, number: int, terms: Terms, block: Block, record: int) -> None:
        for field, value in (
            (_ledger.BEGAN, 0),
            (_ledger.TERMINATE, 0),
            (_ledger.DOUBT, 0),
            (_ledger.LEASE, terms.lease),
            (_ledger.GRACE, terms.grace),
            (_ledger.BLOCK, block.index),
            (_ledger.RANK, _rank_word(terms, self._may_inherit(terms))),
            (_ledger.THREAD, 0),
            (_ledger.RECORD, record),
            (_ledger.ARENA, block.arena.identity),
        ):
            self.ledger.view[field + number] = value

    def _present(self, grant: Grant) -> None:
        terms, words = grant.terms, grant.words
        if words is None:
            return  # its lock has just gone
        block = words.block
        answer = self._call(
            {
                "op": "open",
                "slot": grant.number,
                "name": block.name,
                "arena": block.arena.identity,
                "block": block.index,
                "operations": list(terms.operations),
                "lease": terms.lease,
                "grace": terms.grace,
                "rank": terms.rank,
                "raise": terms.on_terminate == "raise",
                "inherit": self._may_inherit(terms),
            },
            block,
        )
        inherits = self._may_inherit(terms) and bool(answer.get("inherits"))
        if answer.get("ok"):
            grant.contract = Contract(
                frozenset(terms.operations),
                terms.lease / 1e9,
                terms.grace / 1e9,
                terms.rank,
                terms.on_terminate,
                str(answer["rule"]),
                class_ if (class_ := answer.get("precedence")) in CLASSES else "user",
                inherits,
                self._why_not(answer) if terms.inherit and not inherits else None,
            )
            grant.precedence = precedence_of(grant.contract.precedence, terms.rank)
            if grant.precedence and block.arena.words.is_writable:
                block.mark_ranked()
            grant.rings = grant.contract.inherits
            grant.refusal = None
        else:
            grant.refusal = ContractDenied(describe(block), str(answer.get("reason")), str(answer.get("rule")))
            log.info("denied: %s", str(grant.refusal))  # not the error itself: its traceback holds the lock
            grant.close_seat()

    def _may_inherit(self, terms: Terms) -> bool:
        """Whether threads can be lifted under a contract: in the first domain of this process that is asked for it."""
        return terms.inherit and _inherits_in.setdefault("domain", self.domain) == self.domain

    def _why_not(self, answer: dict[str, Any]) -> str:
        domain = _inherits_in["domain"]
        if domain != self.domain:
            return f"threads of this process are lifted in domain {domain!r}, and can be in one domain only"
        return str(answer.get("no_inheritance", "the supervisor is of an older version"))

    # -- the wire -----------------------------------------------------------------------------------------------------

    def _call(self, message: dict[str, Any], block: Block | None = None, received: list[int] | None = None) -> dict[str, Any]:
        """Ask and wait for the answer; connect first, and again, while supervisors come and go.

        Where no supervisor has been yet, and none can be started, it is an error at once.
        """
        deadline = SYSTEM.monotonic() + (START_TIMEOUT if self._connected or not self.is_of_machine else 0.0)
        while True:
            connection = self._socket
            try:
                if connection is None:
                    connection = self._connect(deadline)
                if block is not None and block.arena.identity not in self._arenas:
                    self._show(connection, block.arena)
                return self._exchange(connection, message, received=received)
            except SupervisorError:
                raise
            except GONE as error:  # also in the middle of our hello, if it was just about to end
                log.debug("the supervisor of domain %r has gone: %s", self.domain, str(error))  # its traceback holds the lock
                if connection is not None:
                    self._disconnect(connection)
                if SYSTEM.monotonic() > deadline:
                    raise

    def ring(self, message: dict[str, Any]) -> bool:
        """Say something that needs no answer; whether it was said.  Does not block and does not raise.

        It takes no lock: another thread may be waiting for its answer.  A message is one packet, and nothing comes back.
        """
        bell = self.bell
        return bell is not None and bell.ring(_messages.encode(message))

    def _show(self, connection: socket.socket, arena: Arena) -> None:
        """Give the supervisor a descriptor of the segment: one through which it may write, also where we do not.

        Of the machine it is any: what it opens, its supervisor opens by itself, and from ours we could not get more.
        """
        fd = arena.segment.fd
        is_writable = arena.words.is_writable or self.is_of_machine
        if not is_writable:
            fd = SYSTEM.open_segment_again(fd)
        try:
            self._exchange(connection, {"op": "arena", "identity": arena.identity}, (fd,))
        finally:
            if not is_writable:
                SYSTEM.close(fd)
        self._arenas.add(arena.identity)

    def _exchange(
        self,
        connection: socket.socket,
        message: dict[str, Any],
        descriptors: tuple[int, ...] = (),
        received: list[int] | None = None,
    ) -> dict[str, Any]:
        return _unless_error(self.domain, _messages.exchange(connection, message, descriptors, received))

    def _connect(self, deadline: float) -> socket.socket:
        connection = connect(self.domain, deadline)
        try:
            self._exchange(connection, {"op": "hello", "version": 1}, (self.ledger.fd,))
        except BaseException:
            connection.close()
            raise
        is_first, self._connected = not self._connected, True
        log.log(
            logging.DEBUG if is_first else logging.INFO,
            "%s the supervisor of domain %r, pid %d",
            "connected to" if is_first else "connected again to",
            self.domain,
            _messages.peer(connection)[0],
        )
        self._socket = connection
        self.bell = _Bell(connection)
        self._arenas.clear()
        for grant in list(self.grants.values()):
            try:
                self._present(grant)
            except SupervisorError as error:  # of this one; the next acquire asks again
                log.warning("%s: %s", grant.text, str(error))
                grant.close_seat()
        return connection

    def _disconnect(self, connection: socket.socket) -> None:
        if self._socket is connection:
            self._socket = self.bell = None
        connection.close()

    def _watch(self) -> None:
        """Wait for the end of the connection; then present everything to the next supervisor."""
        while True:
            connection = self._socket
            if connection is not None:
                with contextlib.suppress(OSError, ValueError):  # somebody closed it, having noticed first
                    _has_ended(connection, within=1000)
            with self._lock:
                self._close_unused()
                if connection is not None and self._socket is connection:
                    if not _has_ended(connection):
                        continue
                    self._disconnect(connection)
                # Also a process that has no contract any more, but a thread that is to be put back, presents itself.
                is_to_be_heard = bool(self.grants) or (self._socket is None and self.ledger.has_lifts())
                if is_to_be_heard and self._socket is None:
                    with contextlib.suppress(*GONE, SupervisorError):
                        self._connect(SYSTEM.monotonic() + (0.0 if self.is_of_machine else START_TIMEOUT))
                if not self.grants and (self._socket is not None or not self.ledger.has_lifts()):  # or not any more
                    if self._socket is not None:
                        self._disconnect(self._socket)  # nobody is kept alive for us
                    self._watcher = None
                    return
                if self._socket is not None:
                    continue
            SYSTEM.nap(RETRY_ROOT if self.is_of_machine else RETRY)

    def forget(self) -> None:
        """In a forked child: all of it is the parent's."""
        for grant in list(self.grants.values()):
            grant.seat.cell_contents = FREE
            grant.close_seat()
        if self._socket is not None:
            self._socket.close()
        self.bell = None
        self.ledger.close()


def _rank_word(terms: Terms, inherits: bool) -> int:
    raises = _ledger.RAISES if terms.on_terminate == "raise" else 0
    return terms.rank | raises | (_ledger.INHERITS if inherits else 0)


def _has_ended(connection: socket.socket, within: int = 0) -> bool:
    """Whether the other end has gone, or goes within so many milliseconds."""
    waiting = select.poll()
    waiting.register(connection, select.POLLRDHUP)
    return bool(waiting.poll(within))


def _forget_all() -> None:
    global _connecting
    _connecting = threading.Lock()
    while _connections:
        _connections.popitem()[1].forget()
    _inherits_in.clear()


_process.refresh_in_child.append(_forget_all)


def connection_to(domain: str) -> Connection:
    """The connection of this process for a domain.  Nothing is sent yet."""
    with _connecting:
        connection = _connections.get(domain)
        if connection is None:
            connection = _connections[domain] = Connection(domain)
        return connection


def obtain(words: OwnedWords, domain: str, terms: Terms) -> Grant:
    """A contract for a lock."""
    if terms.on_terminate == "raise":
        prepare_to_raise()
    return connection_to(domain).open(words, terms)


def attach(domain: str, name: str, declaration: Declaration, terms: Terms) -> Block:
    """The control block of a name of the machine; this process has one arena for a name."""
    arena = _attached.get((domain, name))
    wants_to_write = not _machine.WRITING[declaration.kind].isdisjoint(terms.operations)
    if arena is not None and arena.words.is_writable != wants_to_write:
        raise _names.other_rights(name, is_writable=not wants_to_write)
    if arena is not None and arena.parts and (rights := arena.rights.operations) != frozenset(terms.operations):
        raise ValueError(
            f"this process has {name!r} open to {' and '.join(sorted(rights))}. One process has one contract for it: ask for "
            "the same operations, or drop the other object first."
        )
    if arena is None:
        arena = connection_to(domain).attach(name, declaration, terms)
        arena = _attached.setdefault((domain, name), arena)
    return _names.checked(arena, 0, name, declaration)


def renew(words: OwnedWords) -> Grant:
    """A new contract on the old terms: in a forked child, or after a policy took the old one back."""
    old: Grant = words.grant
    grant = obtain(words, old.connection.domain, old.terms)
    grant.use()
    return grant


# -- connecting and starting ----------------------------------------------------------------------------------------------


def connect(domain: str, deadline: float, *, start: bool = True) -> socket.socket:
    """A socket connected to the supervisor of a domain, which is started if there is none (and ``start``).  SupervisorError."""
    address = _messages.address(SYSTEM.geteuid(), domain)
    is_of_machine = _machine.is_of_machine(domain)
    starting: socket.socket | None = None
    start_again = 0.0
    try:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.settimeout(ANSWER_TIMEOUT)
                connection.connect(address)
                _, uid, _ = _messages.peer(connection)
                if uid != _machine.ROOT and (is_of_machine or uid != SYSTEM.geteuid()):
                    raise SupervisorError(
                        domain,
                        f"user {uid} has taken its address",
                        "It is none of ours: ask that user's administrator to end it.",
                    )
                _messages.set_patience(connection, ANSWER_TIMEOUT)
                return connection
            except BaseException as error:
                connection.close()
                if isinstance(error, SupervisorError) or not isinstance(error, (*GONE, BlockingIOError, FileNotFoundError)):
                    raise
            if is_of_machine:
                if not start or SYSTEM.monotonic() >= deadline:
                    raise SupervisorError(
                        domain, "none is running", f"Have root start one: 'shlock supervise --domain {domain}'."
                    )
                SYSTEM.nap(RETRY_ROOT)
                continue
            if not start:
                raise SupervisorError(domain, "none is running", "Open a leased lock, or run 'shlock supervise'.")
            if SYSTEM.monotonic() > deadline:
                raise SupervisorError(
                    domain, f"none has answered for {START_TIMEOUT:.0f} s", "Run 'shlock supervise' and see what it says."
                )
            if starting is not None and SYSTEM.monotonic() > start_again:
                starting.close()  # the one that we started has died, or is slow: anybody may start one more
                starting = None
            if starting is None:
                starting = _claim_start(address)
                if starting is not None:
                    log.debug("starting a supervisor for domain %r", domain)
                    _start(domain)
                    start_again = SYSTEM.monotonic() + START_AGAIN
            SYSTEM.nap(RETRY)
    finally:
        if starting is not None:
            starting.close()


def _claim_start(address: str) -> socket.socket | None:
    """The right to start the supervisor, as long as the socket is open; None if somebody else has it."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        claim.bind(f"{address}/starting")
    except OSError:
        claim.close()
        return None
    return claim


def _start(domain: str) -> None:
    """Start the supervisor of a domain in the background: no child of ours once this returns.

    A process group of its own, but no session: schedulers that share the processors among sessions let one wait for seconds
    that has woken up among many busy ones.
    """
    executable = os.fsdecode(spawn.get_executable() or sys.executable)
    program = (
        f"import os, sys\nif os.fork(): os._exit(0)\nos.setpgid(0, 0); sys.path[:] = {sys.path!r}\n"
        f"from shlock.supervisor.server import run_embedded\nrun_embedded({domain!r})"
    )
    pid = util.spawnv_passfds(os.fsencode(executable), [executable, "-c", program], [])
    with contextlib.suppress(ChildProcessError):  # somebody reaps all children
        os.waitpid(pid, 0)


def supervisor_pid(domain: str) -> int | None:
    """Who is the supervisor of a domain, as the kernel says; None if none is running.  Needs no answer of it."""
    try:
        with connect(domain, 0.0, start=False) as connection:
            return _messages.peer(connection)[0]
    except SupervisorError:
        return None


def ask(domain: str, message: dict[str, Any], *, timeout: float = ANSWER_TIMEOUT) -> dict[str, Any]:
    """Ask the running supervisor of a domain something that needs no contract.

    SupervisorError if none is running, or it does not answer within ``timeout`` seconds.
    """
    connection = connect(domain, 0.0, start=False)
    with connection:
        pid = _messages.peer(connection)[0]
        _messages.set_patience(connection, timeout)
        try:
            answer = _messages.exchange(connection, message)
        except TimeoutError:
            raise SupervisorError(domain, f"pid {pid} has not answered for {timeout:g} s", "See what it does.") from None
        except ConnectionResetError:
            raise SupervisorError(domain, "it ended the connection", "Try again.") from None
    return _unless_error(domain, answer)


def _unless_error(domain: str, answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("error"):
        raise SupervisorError(domain, str(answer["error"]), "See 'shlock events'.")
    return answer


def events(domain: str, *, follow: bool) -> Iterator[dict[str, Any]]:
    """The events of the supervisor of a domain.  SupervisorError if none is running.

    follow  go on as they happen, and with the next supervisor when this one ends; blocks while nothing happens, also while
            none is running.  Following does not keep a supervisor alive that has nothing else to do.
    """
    pid, after = 0, 0
    while True:
        try:
            connection = connect(domain, 0.0, start=False)
        except SupervisorError:
            if not follow:
                raise
            SYSTEM.nap(FOLLOW_RETRY)
            continue
        with connection:
            if follow:
                _messages.set_patience(connection, None)
            if (now := _messages.peer(connection)[0]) != pid:  # another one, which counts from 1
                pid, after = now, 0
            while found := _events_after(connection, after, follow):
                yield from found
                after = found[-1]["number"]
        if not follow:
            return


def _events_after(connection: socket.socket, number: int, wait: bool) -> list[dict[str, Any]]:
    """Nothing at the end of the connection, or if there are no more and we don't wait."""
    try:
        answer = _messages.exchange(connection, {"op": "events", "after": number, "wait": wait})
    except GONE:
        return []
    found: list[dict[str, Any]] = answer.get("events", [])
    return found
