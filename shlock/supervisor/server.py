"""The supervisor's process: one loop over a socket, a timer, and the pidfds of its clients.

It sleeps until somebody says something, a client dies, or the next look is due: at the earliest deadline seen, or one shortest
lease after the last look, but no later than after a second, for the sake of deadlocks.  So an idle one costs next to nothing,
and no overrun ends unseen.

Nothing that a client sends is believed but what it wishes: who it is, the kernel says (``SO_PEERCRED``), and its pidfd is
opened then and there.  A client that sends garbage, too much or too slowly loses its connection, and nobody else notices.

    # killed after                      what is left                      repaired by
    # S-G1 contract decided, not added  the client waits for an answer    its connection ends: it asks the next supervisor
    # S-G2 added, not answered          the same                          the same; the slot in its ledger is its own
    # S-A  address bound, not adopted   holders without a watcher         the next supervisor binds the address, and adopts
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import logging
import os
import resource
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from .. import _layout as at
from .. import _ledger, _machine, _messages, _names, _process
from .._arena import Arena
from .._client import supervisor_pid
from .._geometry import MOST_BYTES
from .._machine import Made
from .._memory import file_name
from .._segment import Segment
from .._sys import SHM_FOLDER, SYSTEM, crash_points
from ..contract import CLASSES, HIGHEST_NUMBER, LONGEST_SECONDS, precedence_of
from ..errors import SegmentError, SupervisorError
from .inheritance import Inheritance
from .leases import LEFT, NEVER, Terms
from .names import Names, made_for
from .policy import Decision, Policy, Request, default
from .report import SupervisorEvent, level_of
from .watch import Client, Supervised, Watch, name_of, owner_at

__all__ = ["Server", "open_server", "run_embedded"]

log = logging.getLogger("shlock.supervisor")

LINGER: Final = 1.0  # seconds that an embedded supervisor stays after its last client
MOST_CONNECTIONS: Final = 4096
MOST_OF_ONE_USER: Final = 512  # connections, of one user among several
MOST_ARENAS: Final = 4096  # that one user's connections use at a time
MOST_LINGERING: Final = 32  # descriptors of one user that are slow to close
MOST_REFUSALS: Final = 20  # of one connection; then it is ended
MOST_AT_A_TURN: Final = 32  # new connections
MOST_EVENTS: Final = 10_000
BUDGET: Final = _messages.MOST_BYTES - 256  # bytes of a list in an answer
BIND_TIMEOUT: Final = 2.0  # seconds for another supervisor to say who it is, or to go
BACKLOG: Final = 1024
PAUSE: Final = 1_000_000_000  # nanoseconds


class _Refused(Exception):
    """What is wrong with a message, in words for its sender."""


class Session:
    """One connection, and what is known of who is at its other end."""

    def __init__(self, connection: socket.socket, pid: int, user: int, group: int, pidfd: int, word: int) -> None:
        self.socket = connection
        self.pid = pid
        self.user = user
        self.group = group
        self.pidfd = pidfd
        self.word = word
        self.client: Client | None = None
        self.arenas: dict[int, Arena] = {}
        self.refusals = 0
        self.follows: int | None = None  # waits for the event after this one

    @functools.cached_property
    def accounts(self) -> _Accounts:
        return _accounts(self.user, self.group)


class Server:
    """The supervisor of one domain.  OSError (EADDRINUSE) if there is one; SupervisorError if this user can't be it."""

    def __init__(self, domain: str, policy: Policy | None = None, *, linger: float | None = None) -> None:
        self.domain = domain
        self.policy = policy if policy is not None else default()
        self.linger = linger
        self.is_of_machine = _machine.is_of_machine(domain)
        if self.is_of_machine and SYSTEM.geteuid() != _machine.ROOT:
            raise SupervisorError(
                domain, "only root can supervise a domain of the machine", "A domain of your own has no '/' at its beginning."
            )
        self.watch = Watch(self.emit, self._adopted_terms, self._adopt)
        self.inheritance = Inheritance(self.watch, self.emit)
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=MOST_EVENTS)
        self._event_number = 0
        self._sessions: dict[socket.socket, Session] = {}
        self._arenas: dict[int, Arena] = {}  # not those of the machine
        self.names = Names(domain, self._is_used)
        self._connections_of: collections.Counter[int] = collections.Counter()  # users
        self._lingering: collections.Counter[int] = collections.Counter()  # by user: descriptors that are slow to close
        self._claim = _machine.claim(domain) if self.is_of_machine else -1
        self._selector = selectors.EpollSelector()
        self._timer = SYSTEM.timer()
        self._timer_is_set_to = NEVER
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stop = False
        self._paused_until = 0  # monotonic ns; 0: connections are accepted
        self._ended = False
        self._requests: collections.deque[Callable[[], None]] = collections.deque()
        self._idle_since = SYSTEM.monotonic_ns()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            address = _messages.address(SYSTEM.geteuid(), domain)
            if self.is_of_machine:
                _machine.bind(self._listener, address)
            else:
                self._listener.bind(address)
            if crash_points:
                crash_points[0]("S-A address bound")
            self._adopt_domain()
            self._listener.listen(BACKLOG)
        except BaseException:
            self._close_all()
            raise
        self._listener.setblocking(False)
        for descriptor, handler in ((self._listener, self._accept), (self._timer, self._tick), (self._wake, self._drain)):
            self._selector.register(descriptor, selectors.EVENT_READ, handler)
        self.emit("started", pid=os.getpid(), reason=f"domain {domain}")

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, on_turn: Callable[[], None] | None = None, longest_sleep: float | None = None) -> None:
        """Serve until ``stop``, or, with ``linger``, until nobody has used it for so long."""
        try:
            while not self._stop:
                self._look_if_due()
                due = min(self.watch.due, self.inheritance.due)
                if self._paused_until:
                    if SYSTEM.monotonic_ns() >= self._paused_until:
                        self._accept_again()
                    else:
                        due = min(due, self._paused_until)
                if self.linger is not None:
                    if self._is_idle():
                        gone = self._idle_since + int(self.linger * 1e9)
                        if SYSTEM.monotonic_ns() >= gone:
                            break
                        due = min(due, gone)
                    else:
                        self._idle_since = SYSTEM.monotonic_ns()
                if due != self._timer_is_set_to and due != NEVER:
                    self._timer_is_set_to = due
                    SYSTEM.set_timer(self._timer, due)
                for key, _ in self._selector.select(longest_sleep):
                    self._handle(key.data)
                    self._look_if_due()  # however much there is to be heard
                while self._requests:
                    self._requests.popleft()()
                if on_turn is not None:
                    on_turn()
        finally:
            self.emit("stopped", pid=os.getpid(), reason="asked to" if self._stop else "nobody uses it")
            self._close_all()

    def _look_if_due(self) -> None:
        now = SYSTEM.monotonic_ns()
        if now >= self.watch.due:
            self.watch.look()
        if now >= self.inheritance.due:
            self.inheritance.look()

    def _handle(self, handler: Callable[[], None]) -> None:
        """Whatever goes wrong with one client is not the others' matter."""
        try:
            handler()
        except Exception:
            log.exception("serving a client")
            if isinstance(handler, functools.partial) and isinstance(handler.args[0], Session):
                self._drop(handler.args[0])

    def stop(self) -> None:
        """End ``run``.  From any thread, and from signal handlers."""
        self._stop = True
        self._wake_up()

    def soon(self, function: Callable[[], None]) -> None:
        """Have the loop's thread call something, which must not raise.  From any thread, and from signal handlers."""
        self._requests.append(function)
        self._wake_up()

    def _wake_up(self) -> None:
        if not self._ended:
            with contextlib.suppress(OSError):  # full: it will wake up anyway
                os.write(self._woken, b"w")

    def call(self, function: Callable[[], Any]) -> Any:
        """Have the loop's thread call something, and wait for its result.  From other threads.  SupervisorError if it ends."""
        done = threading.Event()
        result: list[Any] = []

        def request() -> None:
            try:
                result.append((function(), None))
            except Exception as error:
                result.append((None, error))
            done.set()

        self.soon(request)
        while not done.wait(0.1):
            if self._ended and not done.is_set():
                raise SupervisorError(self.domain, "it has ended", "Start another one.")
        value, error = result[0]
        if error is not None:
            raise error
        return value

    def _is_idle(self) -> bool:
        """Nobody needs it: who only follows its events is no reason to stay."""
        return all(session.follows is not None for session in self._sessions.values()) and not any(
            contract.holds() for contract in self.watch.all()
        )

    def _tick(self) -> None:
        self._timer_is_set_to = NEVER
        with contextlib.suppress(BlockingIOError):
            os.read(self._timer, 8)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def forget(self) -> None:
        """In a forked child: let go of everything, so that the parent's end is its end.  Touches nothing that is shared."""
        self._ended = True
        self._listener.close()
        for session in self._sessions.values():
            session.socket.close()
            if session.client is None:
                SYSTEM.close(session.pidfd)
        for client in self.watch.clients.values():
            client.close()
        for descriptor in (self._selector.fileno(), self._timer, self._wake, self._woken, self._claim):
            if descriptor >= 0:
                os.close(descriptor)

    def _close_all(self) -> None:
        self._ended = True
        self._listener.close()
        self.inheritance.restore_all()
        for session in list(self._sessions.values()):
            self._drop(session)
        for client in list(self.watch.clients.values()):
            client.close()
        self.watch.clients.clear()
        self._selector.close()
        for descriptor in (self._timer, self._wake, self._woken):
            os.close(descriptor)
        for arena in self._arenas.values():
            arena.segment.close()
        self._arenas.clear()
        self.names.close()
        if self._claim >= 0:
            _machine.give_up(self.domain, self._claim)

    # -- events -------------------------------------------------------------------------------------------------------

    def emit(self, kind: str, *, contract: Supervised | None = None, **facts: Any) -> None:
        """Note an event: for ``shlock events``, and for logging."""
        self._event_number += 1
        event: dict[str, Any] = {"number": self._event_number, "time": SYSTEM.time_ns() / 1e9, "event": kind}
        if contract is not None:
            event |= {"lock": contract.name, "block": contract.block, "pid": contract.client.pid}
        event |= facts
        self.events.append(event)
        level = level_of(kind)
        if log.isEnabledFor(level):
            log.log(level, "%s", SupervisorEvent.from_dict(event))
        for session in [session for session in self._sessions.values() if session.follows is not None]:
            self._answer(session, self._events_after(session.follows or 0))
            session.follows = None

    def _events_after(self, number: int) -> dict[str, Any]:
        """The next events, as many as fit into one message."""
        return {"ok": True, "events": _fitting([event for event in self.events if event["number"] > number])}

    # -- connections --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(MOST_AT_A_TURN):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._pause(error)
                return
            try:
                session = self._admit(connection)
            except ProcessLookupError:
                connection.close()
                continue
            except OSError as error:
                connection.close()
                self._pause(error)
                return
            if session is None:
                connection.close()
                continue
            connection.setblocking(False)
            self._sessions[connection] = session
            self._connections_of[session.user] += 1
            self._selector.register(connection, selectors.EVENT_READ, functools.partial(self._hear, session))

    def _admit(self, connection: socket.socket) -> Session | None:
        """Who it is, as the kernel says.  None: we don't serve it."""
        pid, user, group = _messages.peer(connection)
        if user not in (0, SYSTEM.geteuid()) and not self.is_of_machine:
            self.emit("refused", pid=pid, reason=f"user {user} is not the one that this supervisor serves")
            return None
        if len(self._sessions) >= MOST_CONNECTIONS:
            self.emit("refused", pid=pid, reason=f"{MOST_CONNECTIONS} connections are open")
            return None
        if user != SYSTEM.geteuid() and self._connections_of[user] >= MOST_OF_ONE_USER:
            self.emit("refused", pid=pid, reason=f"user {user} has {MOST_OF_ONE_USER} connections already")
            return None
        if self._lingering[user] >= MOST_LINGERING:
            self.emit("refused", pid=pid, reason=f"user {user} has sent descriptors that cannot be closed")
            return None
        pidfd = _messages.peer_pidfd(connection)
        if pidfd is None:
            pidfd = SYSTEM.pidfd_open(pid) if pid else None
        if pidfd is None:
            return None
        session = None
        try:
            birth = SYSTEM.birth(pid)
            if birth is not None and not SYSTEM.is_readable(pidfd):
                session = Session(connection, pid, user, group, pidfd, _process.make_word(pid, birth))
        finally:
            if session is None:
                SYSTEM.close(pidfd)
        return session

    def _pause(self, error: OSError) -> None:
        """No descriptors left, most likely: accept nobody until a connection has ended, or for a while."""
        log.warning("nobody is accepted for a while: %s", error)
        self._selector.unregister(self._listener)
        self._paused_until = SYSTEM.monotonic_ns() + PAUSE

    def _accept_again(self) -> None:
        if self._paused_until:
            self._paused_until = 0
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _drop(self, session: Session) -> None:
        """End a connection.  Its client stays watched as long as its process lives: it may hold something."""
        if self._sessions.pop(session.socket, None) is None:
            return
        self._connections_of[session.user] -= 1
        self._selector.unregister(session.socket)
        self._close_apart(session, session.socket.detach())
        self._accept_again()
        client = session.client
        if client is None:
            SYSTEM.close(session.pidfd)
        elif not client.contracts and self.watch.clients.get(client.word) is client:
            self._forget(client)
        self._release(session.arenas.values())

    def _forget(self, client: Client) -> None:
        self._selector.unregister(client.pidfd)
        self.inheritance.forget(client)
        del self.watch.clients[client.word]
        self.watch.forget(client)

    def _hear(self, session: Session) -> None:
        """One message: then the others have a turn."""
        if session.socket not in self._sessions:
            return  # dropped since it was found readable
        try:
            data, descriptors = _messages.receive(session.socket, functools.partial(self._close_received, session))
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self.emit("refused", pid=session.pid, reason=str(error))
            self._drop(session)
            return
        try:
            if not data:
                self._drop(session)
                return
            answer = self._serve(session, _messages.decode(data), descriptors)
            if answer is not None:
                self._answer(session, answer)
        except _Refused as error:
            self.emit("refused", pid=session.pid, reason=str(error))
            self._answer(session, {"error": str(error)})
            session.refusals += 1
            if session.refusals >= MOST_REFUSALS:
                self._drop(session)
        except (_messages.MessageError, OSError, ValueError) as error:
            self.emit("refused", pid=session.pid, reason=str(error))
            self._drop(session)
        finally:
            for descriptor in descriptors:
                self._close_received(session, descriptor)

    def _close_received(self, session: Session, descriptor: int) -> None:
        if _is_memory(descriptor):
            SYSTEM.close(descriptor)
        else:
            self._close_apart(session, descriptor)

    def _close_apart(self, session: Session, descriptor: int) -> None:
        """Close what another user has sent, or the connection over which he may have, in a thread: that may block.

        The last close of a network socket that lingers does, or of a file on a file system that somebody serves.
        """
        if session.user == SYSTEM.geteuid():
            SYSTEM.close(descriptor)
            return
        self._lingering[session.user] += 1

        def close() -> None:
            try:
                os.close(descriptor)
            finally:
                self.soon(closed)

        def closed() -> None:
            self._lingering[session.user] -= 1
            if not self._lingering[session.user]:
                del self._lingering[session.user]

        threading.Thread(target=close, name="shlock close", daemon=True).start()

    def _answer(self, session: Session, answer: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        try:
            _messages.send(session.socket, answer, descriptors)
        except (OSError, _messages.MessageError):  # it does not read, or has gone
            self._drop(session)

    # -- what clients may say -------------------------------------------------------------------------------------------

    def _serve(self, session: Session, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any] | None:
        operation = message.get("op")
        if operation in _FOR_ROOT and self.is_of_machine and session.user != _machine.ROOT:
            raise _Refused(f"in a domain of the machine only root may ask for {operation}")
        if operation == "hello":
            return self._hello(session, message, descriptors)
        if operation == "arena":
            return self._show_arena(session, message, descriptors)
        if operation == "attach":
            return self._attach(session, message)
        if operation == "open":
            return self._open(session, message)
        if operation == "close":
            client = _client_of(session)
            slot = _number(message, "slot", _ledger.SLOTS - 1)
            contract = client.contracts.get(slot)
            if contract is not None and not contract.holds():
                self.watch.remove(client, slot)
                session.arenas.pop(contract.arena.identity, None)
                self._release([contract.arena])
            return {"ok": True}
        if operation in ("waiting", "settled", "preempt"):  # without an answer
            self._hear_doorbell(session, message)
            return None
        if operation == "who":
            return {"ok": True, "pid": os.getpid(), "domain": self.domain}
        if operation == "contracts":
            name = message.get("name")
            if not isinstance(name, str | None):
                raise _Refused("name must be the name of a lock")
            return self._contracts_from(_number(message, "from", 1 << 40), name)
        if operation == "events":
            after = _number(message, "after", 1 << 60)
            answer = self._events_after(after)
            if message.get("wait") and not answer["events"]:
                session.follows = after
                return None
            return answer
        if operation in ("revoke", "kill"):
            name = message.get("name")
            if not isinstance(name, str):
                raise _Refused(f"{operation} needs the name of a lock")
            return {"ok": True, "holders": self.end_hold(name, at_once=operation == "kill")}
        raise _Refused("no such operation")

    def _hear_doorbell(self, session: Session, message: dict[str, Any]) -> None:
        """A thread of a client waits for a lock, or does so no more: what that changes is due now."""
        contract = _client_of(session).contracts.get(_number(message, "slot", _ledger.SLOTS - 1))
        if contract is not None and message["op"] == "preempt":
            self.watch.preempt(contract, reads=message.get("reads") is True)
        elif contract is not None and contract.inherits:
            self.inheritance.look_soon()

    def _hello(self, session: Session, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if message.get("version") != 1:
            raise _Refused("another version of shlock: end its processes first")
        if session.client is not None or len(descriptors) != 1:
            raise _Refused("hello comes once, with one ledger")
        self._check_account(session)
        try:
            ledger = _ledger.Ledger.over(os.dup(descriptors[0]))
        except (OSError, ValueError) as error:
            raise _Refused(str(error)) from None
        earlier = self.watch.clients.get(session.word)
        lifts = {}
        if earlier is not None:  # the same process again, or one that we adopted
            lifts = self.inheritance.let_go(earlier)
            self._forget(earlier)
            for other in [other for other in self._sessions.values() if other.client is earlier]:
                self._drop(other)
        client = session.client = Client(session.word, session.pidfd, ledger, session.user)
        self.watch.clients[client.word] = client
        self._selector.register(client.pidfd, selectors.EVENT_READ, lambda: self._bury(client))
        self.inheritance.adopt(client, lifts)
        return {"ok": True, "pid": os.getpid()}

    def _check_account(self, session: Session) -> None:
        """That the process which connected has not become another user's since: a child may have the connection."""
        account = SYSTEM.account_of(session.pid) if self.is_of_machine else None
        if account is not None and account.effective != session.user:
            raise _Refused(f"pid {session.pid} is of user {account.effective} by now, and was of user {session.user}")

    def _bury(self, client: Client) -> None:
        if self.watch.clients.get(client.word) is not client:
            return  # forgotten since this event was seen: its connection and its process ended in one turn
        self._selector.unregister(client.pidfd)
        arenas = [contract.arena for contract in client.contracts.values()]
        self.inheritance.forget(client)
        self.watch.bury(client)
        self._release(arenas)
        for session in [session for session in self._sessions.values() if session.client is client]:
            self._drop(session)

    def _show_arena(self, session: Session, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        _client_of(session)
        identity = _number(message, "identity", at.WORD_MASK)
        if len(descriptors) != 1:
            raise _Refused("an arena comes as one descriptor")
        if self.is_of_machine:
            if self._given(session.user) >= MOST_ARENAS:
                raise _Refused(f"user {session.user} uses {MOST_ARENAS} arenas already")
            try:
                session.arenas[identity] = self.names.recognise(descriptors[0], identity, self._adopt)
            except (OSError, ValueError) as error:  # SegmentError among them
                raise _Refused(f"this is no arena: {error}") from None
            return {"ok": True}
        arena = self._arenas.get(identity)
        if arena is None:
            segment = None
            copy = os.dup(descriptors[0])
            try:
                segment = Segment(copy)
                arena = Arena.over(segment)
            except (OSError, ValueError, SegmentError) as error:
                if segment is None:
                    SYSTEM.close(copy)
                else:
                    segment.close()
                raise _Refused(f"this is no arena: {error}") from None
            if arena.identity != identity:
                arena.segment.close()
                raise _Refused("this is another arena than it is said to be")
            self._arenas[identity] = arena
            self._adopt(arena)
        session.arenas[identity] = arena
        return {"ok": True}

    def _open(self, session: Session, message: dict[str, Any]) -> dict[str, Any]:
        client = _client_of(session)
        self._check_account(session)
        slot = _number(message, "slot", _ledger.SLOTS - 1)
        arena = session.arenas.get(_number(message, "arena", at.WORD_MASK))
        if arena is None:
            raise _Refused("this arena was not shown")
        block = _number(message, "block", arena.layout.blocks - 1)
        name = name_of(arena, block)
        held = self.watch.count(session.user) - (slot in client.contracts)
        wishes = _wishes(message)
        needs = _check_block(arena.made, block, wishes) if isinstance(arena.made, Made) else None
        decision = self._decide(session.pid, session.user, session.accounts, name, wishes, held)
        if decision.allowed and needs is not None and CLASSES.index(decision.precedence) < CLASSES.index(needs):
            reason = f'the privileged end of a channel is for the class "{needs}", and the rule gives "{decision.precedence}"'
            decision = dataclasses.replace(decision, allowed=False, reason=reason)
        if not decision.allowed:
            self.emit("denied", pid=session.pid, lock=name, block=block, reason=decision.reason, rule=decision.decider)
            return {"ok": False, "reason": decision.reason, "rule": decision.rule}
        lease, grace, rank = wishes.lease, wishes.grace, wishes.rank
        wants_inheritance = message.get("inherit") is True
        no_inheritance = self.inheritance.why_not(session.pid) if wants_inheritance else None
        if crash_points:
            crash_points[0]("S-G1 decided, not added")
        contract = Supervised(
            client, slot, arena, block, Terms(lease, grace), name=name, rank=rank, raises=bool(message.get("raise")),
            rule=decision.rule, precedence=precedence_of(decision.precedence, rank), adopted_at=SYSTEM.monotonic_ns(),
            inherits=wants_inheritance and no_inheritance is None,
        )  # fmt: skip
        contract.may_preempt, contract.may_write = (what in wishes.operations for what in ("preempt", "write"))
        self.watch.add(contract)
        self._settle(contract)  # another supervisor was at T1
        if crash_points:
            crash_points[0]("S-G2 added, not answered")
        self.emit("granted", contract=contract, lease=lease / 1e9, reason=decision.rule)
        answer = {"ok": True, "rule": decision.rule, "precedence": decision.precedence, "inherits": contract.inherits}
        if contract.inherits:
            self.inheritance.look_soon()  # it may be waiting already
        return answer if no_inheritance is None else {**answer, "no_inheritance": no_inheritance}

    def _decide(self, pid: int, user: int, accounts: _Accounts, name: str | None, wishes: _Wishes, held: int) -> Decision:
        """What the policy says of a user's wishes.  What it allows to the supervisor's own program, it allows to the kernel."""
        user_names, group_ids, group_names = accounts
        request = Request(
            user_id=user, user_names=user_names, group_ids=group_ids, group_names=group_names,
            is_self=user == SYSTEM.geteuid(), domain=self.domain, name=name,
            operations=wishes.operations, lease=wishes.lease / 1e9, grace=wishes.grace / 1e9, rank=wishes.rank,
        )  # fmt: skip
        try:
            decision = self.policy.decide(request, contracts_held=held)
            return dataclasses.replace(decision, precedence="kernel") if pid == os.getpid() else decision
        except (TypeError, ValueError) as error:
            raise _Refused(str(error)) from None

    def _contracts_from(self, first: int, name: str | None) -> dict[str, Any]:
        everything = [contract for contract in self.contracts() if name in (None, contract["lock"])]
        return {"ok": True, "contracts": _fitting(everything[first:]), "all": len(everything)}

    # -- names of the machine -------------------------------------------------------------------------------------------

    def _attach(self, session: Session, message: dict[str, Any]) -> dict[str, Any] | None:
        """Give out the segment of a name, made if there is none, to who may have a contract for it."""
        _client_of(session)
        if not self.is_of_machine:
            raise _Refused("in a domain of one user its processes make the segments")
        kind, policy = _number(message, "kind", at.EXTENSION), _number(message, "policy", len(at.POLICIES) - 1)
        size, copies = (_number({"size": 0, "copies": 1, **message}, key, most) for key, most in _SIZES)
        limits = [_number({"most_items": 0, "most_deliveries": 0, **message}, key, most) for key, most in _LIMITS]
        wishes = _wishes(message)
        try:
            name = _names.check_name(message.get("name"))
        except (TypeError, ValueError) as error:
            raise _Refused(str(error)) from None
        if kind not in _machine.WRITING:
            raise _Refused("a name of the machine is a Lock, an RLock, a Block, a Channel or a Queue")
        if kind in _machine.CARRYING and size > MOST_BYTES:
            raise _Refused(f"size of a {at.KIND_NAMES[kind]} must be at most {MOST_BYTES}")
        if wishes.operations.isdisjoint(_machine.OPERATIONS.get(kind, wishes.operations)):
            raise _Refused(f"operations of a {at.KIND_NAMES[kind]} are {', '.join(sorted(_machine.OPERATIONS[kind]))}")
        # Whoever is given segments without opening them holds as many contracts.
        held = max(self._given(session.user), self.watch.count(session.user))
        decision = self._decide(session.pid, session.user, session.accounts, name, wishes, held)
        if not decision.allowed:
            return self._deny(session, name, decision)
        # From here on he may know whether it is there.
        arena, may_write = self.names.get(name), not _machine.WRITING[kind].isdisjoint(wishes.operations)
        if arena is None:
            if not may_write:
                raise _Refused(f"{name!r} is not there yet: it is made for who may {', '.join(_machine.WRITING[kind])} it")
            if kind == at.QUEUE:
                size = size or _machine.USUAL_QUEUE
            if kind in _machine.OPERATIONS and not (size and copies):
                return {"ok": False, "missing": True}
            made = Made(name, SYSTEM.time_ns(), session.user, kind)
            if kind == at.GUARDED:
                made = made._replace(policy=policy, size=size, copies=copies)
            elif kind in _machine.CARRYING:
                made = made._replace(size=size)
            else:
                made = made._replace(policy=policy)
            bound, most = decision.most_contracts, decision.most_bytes
            if reason := self.names.why_no_room(session.user, made.total(), bound, most):
                return {**self._deny(session, name, dataclasses.replace(decision, reason=reason)), "full": True}
            try:
                arena = self.names.make(made, wishes.lease, wishes.grace, self._look_if_due, (limits[0], limits[1]))
            except OSError as error:
                text = f"there is no memory for one more segment: {error.strerror}"
                if kind not in _machine.OPERATIONS:
                    raise _Refused(text) from None
                self.emit("refused", pid=session.pid, lock=name, reason=text)
                return {"ok": False, "errno": errno.ENOSPC, "reason": text}
        made = made_for(arena)  # nobody is given a descriptor of something else than he asked for
        if made.kind != kind or (size and made.size != size):
            return {"ok": False, "kind": made.kind, "size": made.size, "policy": made.policy}
        session.arenas[arena.identity] = arena
        _machine.restore(arena)
        rights = made.rights(wishes.operations, decision.precedence)
        files = {arena.segment.fd: may_write, **{arena.parts[part].fd: may for part, may in rights.items()}}
        given = []
        try:
            for fd, may in files.items():
                given.append(_machine.open_again(fd, read_only=not may))
            answer = {"ok": True, "rule": decision.rule} if kind in _machine.CARRYING else {"ok": True}
            self._answer(session, answer, tuple(given))
        finally:
            for fd in given:
                SYSTEM.close(fd)
        return None

    def _deny(self, session: Session, name: str, decision: Decision) -> dict[str, Any]:
        self.emit("denied", pid=session.pid, lock=name, reason=decision.reason, rule=decision.decider)
        return {"ok": False, "reason": decision.reason, "rule": decision.rule}

    def _given(self, user: int) -> int:
        """How many arenas the connections of a user have been given, or have shown."""
        return sum(len(session.arenas) for session in self._sessions.values() if session.user == user)

    def _is_used(self, arena: Arena) -> bool:
        return self.watch.uses(arena) or any(arena.identity in session.arenas for session in self._sessions.values())

    def _release(self, arenas: Iterable[Arena]) -> None:
        """Let go of the arenas that nobody uses any more: all but the segments of the domain's own chain."""
        if self.is_of_machine:
            self.names.release(arenas)
            return
        for arena in list(arenas):
            is_of_chain = arena.domain is not None and arena.only_name is None
            if not is_of_chain and self._arenas.get(arena.identity) is arena and not self._is_used(arena):
                del self._arenas[arena.identity]
                arena.segment.close()

    # -- for the program around it --------------------------------------------------------------------------------------

    def contracts(self) -> list[dict[str, Any]]:
        """Every contract, and what its holder does with it now.  Times in seconds."""
        now = SYSTEM.monotonic_ns()
        found = []
        for contract in self.watch.all():
            holds = [hold for hold in contract.holds() if hold.deadline > LEFT]
            first = min(holds, key=lambda hold: hold.deadline, default=None)
            terms = contract.watched.terms
            lifts = (self.inheritance.lift_of(hold) for hold in contract.holds()) if contract.inherits else ()
            lift = next(filter(None, lifts), None)
            found.append(
                {
                    "lock": contract.name,
                    "block": contract.block,
                    "pid": contract.client.pid,
                    "user": contract.client.user,
                    "lease": terms.lease / 1e9,
                    "grace": terms.grace / 1e9,
                    "rank": contract.rank,
                    "precedence": CLASSES[contract.precedence >> 32],
                    "rule": contract.rule,
                    "holds": first is not None,
                    "token": None if first is None else first.token,
                    "remaining": None if first is None else (first.deadline - now) / 1e9,
                    "site": None if first is None else first.client.ledger.site(first.slot),
                    "readers": len([hold for hold in holds if hold is not contract]),
                    "inherits": contract.inherits,
                    "lifted": None if lift is None else f"from {lift.own} to {lift.scheduled_as}",
                }
            )
        return found

    def end_hold(self, name: str, *, at_once: bool) -> list[int]:
        """End the present hold of a lock: its holder is asked to leave and has its grace, or dies at once.  Who that is.

        Of an RWLock that is read, the hold of everybody who reads.
        """
        holders: dict[int, None] = {}
        for hold in [hold for contract in self.watch.all() if contract.name == name for hold in contract.holds()]:
            if hold.deadline <= LEFT or hold.is_at_the_door():
                continue
            if at_once:
                if hold.client.pid not in holders and self.watch.kill(hold, at.KILLED):
                    holders[hold.client.pid] = None
            else:
                self.watch.look()  # so that the hold has been seen
                hold.watched.end(SYSTEM.monotonic_ns(), at.LEASE_REVOKED)
                self.watch.due = 0
                holders[hold.client.pid] = None
        return list(holders)

    # -- adoption -----------------------------------------------------------------------------------------------------

    def _adopt_domain(self) -> None:
        """Take over what stands in the segments of the domain."""
        for arena in self.names.find() if self.is_of_machine else _named_arenas(self.domain):
            if not self.is_of_machine and self._arenas.setdefault(arena.identity, arena) is not arena:
                arena.segment.close()  # somebody has copied the file: nobody uses that memory
                continue
            self._adopt(arena)

    def _adopted_terms(
        self, user: int, group: int, arena: Arena, block: int, terms: Terms, rank: int
    ) -> tuple[Terms, int] | None:
        """Terms and precedence from the ledger of a client of an earlier supervisor, as far as the policy allows them."""
        longest, rank = int(LONGEST_SECONDS * 1e9), min(rank, HIGHEST_NUMBER)
        needs = arena.made.needs(block) if isinstance(arena.made, Made) else ("acquire", "user")
        if needs is None:
            return None
        operation, class_ = needs
        wishes = _Wishes(frozenset({operation}), min(terms.lease, longest), min(terms.grace, longest), rank)
        try:
            accounts = _accounts(user, group)
            decision = self._decide(0, user, accounts, name_of(arena, block), wishes, self.watch.count(user))
        except _Refused:
            return None if self.is_of_machine else (terms, rank)
        precedence = precedence_of(decision.precedence, min(rank, decision.highest_rank))
        if not self.is_of_machine:  # what it was granted stays
            return terms, precedence
        if decision.hidden or operation not in decision.operations:
            return None
        if CLASSES.index(decision.precedence) < CLASSES.index(class_):
            return None
        lease, grace = int(decision.longest_lease * 1e9), int(decision.longest_grace * 1e9)
        return Terms(min(wishes.lease, lease), min(wishes.grace, grace)), precedence

    def _adopt(self, arena: Arena) -> None:
        """Take over the holders in an arena: one that is stopped, or inside a C call, will not come to us by itself."""
        for owner in sorted(_leased_owners(arena)):
            is_new = owner not in self.watch.clients
            client = self.watch.adopt(arena, owner)
            if client is None:
                continue
            if is_new:
                self._selector.register(client.pidfd, selectors.EVENT_READ, lambda client=client: self._bury(client))
                self.emit("adopted", pid=client.pid, reason=f"{len(client.contracts)} contracts in its ledger")
                self.inheritance.adopt(client)
            for contract in client.contracts.values():
                self._settle(contract)

    def _settle(self, contract: Supervised) -> None:
        """T2, T3 for what an earlier supervisor had marked."""
        for hold in contract.holds():
            if hold.view[hold.place] & at.TAKEN:
                self.watch.settle(hold)


def _named_arenas(domain: str) -> Iterator[Arena]:
    """The segments of a domain, and those of its buffers.

    Not what has another name than it was made with.  Somebody may have copied a file: the copy has the identity of the segment
    that the clients use, and whoever watched it instead would never see a hold.
    """
    first = _names.segment_name(domain)
    chain = (_names.segment_name(domain, position) for position in itertools.count())
    buffers = (name for name in sorted(os.listdir(SHM_FOLDER)) if name.startswith(f"{first}="))
    for names, is_chain in ((chain, True), (buffers, False)):
        for name in names:
            try:
                segment = Segment.attach(name)
                if segment is not None:
                    arena = Arena.over(segment)
                    own_file = None if arena.only_name is None else file_name(domain, arena.only_name)
                    if own_file == (None if is_chain else name):
                        yield arena
                        continue
                    segment.close()
                    log.warning("a segment of domain %r is not adopted: %s was made with another name", domain, name)
            except (OSError, SegmentError) as error:
                log.warning("a segment of domain %r cannot be adopted: %s", domain, error)
            if is_chain:
                break


def _leased_owners(arena: Arena) -> set[int]:
    """The owner words of the leased locks of an arena, and of the records of those that are read."""
    layout, load = arena.layout, arena.words.load
    owners = set()
    for index in range(layout.blocks):
        start = layout.block(index)
        kind_word = load(start + at.BLOCK_KIND)
        if kind_word & at.LEASED:
            owners.add(owner_at(arena, index))
            if kind_word & at.KIND == at.RWLOCK:
                with contextlib.suppress(SegmentError):
                    owners |= {load(place) & at.OWNER for place in arena.cells_of(index)}
    return owners - {0}


def _fitting(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of them, as many as fit into one message."""
    left = BUDGET
    for count, item in enumerate(items):
        left -= len(json.dumps(item)) + 1
        if left < 0:
            return items[:count]
    return items


def _client_of(session: Session) -> Client:
    if session.client is None:
        raise _Refused("hello comes first")
    return session.client


_SIZES: Final = (("size", _machine.MOST_CONTENT), ("copies", at.MOST_COPIES))
_LIMITS: Final = (("most_items", (1 << 33) - 1), ("most_deliveries", 0xFFFF))
_FOR_ROOT: Final = ("contracts", "events", "revoke", "kill")


class _Wishes(NamedTuple):
    """What a contract is asked for, in nanoseconds."""

    operations: frozenset[str]
    lease: int
    grace: int
    rank: int


def _wishes(message: dict[str, Any]) -> _Wishes:
    operations = message.get("operations")
    if not isinstance(operations, list) or not all(isinstance(operation, str) for operation in operations):
        raise _Refused("operations must be a list of names")
    lease, grace = _number(message, "lease", NEVER), _number(message, "grace", NEVER)
    return _Wishes(frozenset(operations), lease, grace, _number(message, "rank", HIGHEST_NUMBER))


def _check_block(made: Made, block: int, wishes: _Wishes) -> str | None:
    """The class that a contract for this control block needs.  _Refused if there can be none, or none that is good for it."""
    needs = made.needs(block)
    if needs is None:
        raise _Refused(f"block {block} of {made.name!r} is no lock")
    operation, class_ = needs
    if made.kind in _machine.CARRYING and operation not in wishes.operations:
        raise _Refused(f"block {block} of {made.name!r} is for who may {operation}")
    return class_


def _is_memory(descriptor: int) -> bool:
    """Whether it is a memory file, which closes at once."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _number(message: dict[str, Any], key: str, most: int) -> int:
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise _Refused(f"{key} must be a whole number from 0 to {most}")
    return value


_Accounts = tuple[frozenset[str], frozenset[int], frozenset[str]]


def _accounts(user: int, group: int) -> _Accounts:
    """Names of a user, numbers and names of his groups, as the system's tables have them."""
    import grp
    import pwd

    try:
        name = pwd.getpwuid(user).pw_name
        groups = frozenset(os.getgrouplist(name, group))
    except KeyError:
        return frozenset(), frozenset({group}), frozenset()
    names = set()
    for number in groups:
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    return frozenset({name}), groups, frozenset(names)


# -- ways to run it -------------------------------------------------------------------------------------------------------


def open_server(domain: str, policy: Policy | None = None) -> Server:
    """The supervisor of a domain, not running yet.  SupervisorError says who is it already."""
    give_up = SYSTEM.monotonic() + BIND_TIMEOUT
    while True:
        try:
            return Server(domain, policy)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        holder = supervisor_pid(domain)
        if holder is not None or SYSTEM.monotonic() > give_up:
            who = "another process" if holder is None else "this process" if holder == os.getpid() else "another one"
            raise SupervisorError(
                domain,
                who + ("" if holder is None else f" (pid {holder})") + " is it already",
                "A domain has one supervisor: end that one first, or let it be.",
            )
        SYSTEM.nap(0.005)


def raise_limits() -> None:
    """For a process that is a supervisor only: be in time, and have descriptors, of which a client takes three or more."""
    SYSTEM.raise_priority()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run_embedded(domain: str) -> None:
    """The supervisor that the first leased lock of a domain starts: until its last client is gone.  Nothing if there is one."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    logging.lastResort = None
    raise_limits()
    try:
        server = Server(domain, linger=LINGER)
    except OSError:
        return
    signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
    server.run()
