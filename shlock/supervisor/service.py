"""``shlock supervise``: the supervisor as a service, in the foreground.

    SIGTERM, SIGINT  end, with status 0: holders keep their locks, the next supervisor adopts them
    SIGHUP           read the policy file again; one that cannot be used changes nothing.  It decides on what is asked from
                     now on: contracts that were granted stay

Under systemd it speaks the notify protocol (``NOTIFY_SOCKET``), and pings the watchdog from the loop that does the work: a loop
that hangs is noticed, and restarted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Mapping
from typing import Final

from .._sys import SYSTEM
from . import load_policy
from .policy import PolicyError
from .server import Server, open_server, raise_limits

__all__ = ["Notifier", "serve"]

log = logging.getLogger("shlock.supervisor")

MICROSECONDS: Final = 1_000_000


class Notifier:
    """Tells systemd how it goes, if systemd asked for that.  Never blocks, never fails: systemd acts on what is missing."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        if address.startswith(("/", "@")):
            self._address = f"\0{address[1:]}" if address[0] == "@" else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        #: Nanoseconds within which systemd wants to hear of us; None: it does not.
        self.watchdog: int | None = None
        if self._socket is not None and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self.watchdog = int(environment.get("WATCHDOG_USEC", "")) * 1000 or None

    def tell(self, *lines: str) -> bool:
        """Send some lines as one message; whether that went."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.debug("systemd was not told %s: %s", lines, error)
            return False
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Service:
    """One run of ``shlock supervise``."""

    def __init__(self, server: Server, policy_path: str | None, notifier: Notifier) -> None:
        self._server = server
        self._policy_path = policy_path
        self._notifier = notifier
        self._contracts = -1  # that systemd was told of
        self._pinged = 0
        # A turn that comes just before a ping is due sleeps for half an interval more: so half of the half.
        self._interval = None if notifier.watchdog is None else notifier.watchdog // 4

    def run(self) -> None:
        """Serve until a signal says stop."""
        server, tell = self._server, self._notifier.tell
        handlers = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGHUP: lambda number, frame: server.soon(self.reload),
        }
        earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            tell("READY=1", f"MAINPID={os.getpid()}", self._status())
            server.run(self._turn, None if self._interval is None else self._interval / 1e9)
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self._notifier.tell("STOPPING=1")
        self._server.stop()

    def reload(self) -> None:
        """Read the policy file again; the present policy stays if it can't be used."""
        tell, server = self._notifier.tell, self._server
        tell("RELOADING=1", f"MONOTONIC_USEC={SYSTEM.monotonic_ns() // 1000}")
        if self._policy_path is None:
            server.emit("policy loaded", reason="the default one, as there is no file")
        else:
            try:
                server.policy = load_policy(self._policy_path)
            except (PolicyError, OSError) as error:
                server.emit("policy refused", reason=f"{error}. The earlier policy stays in force")
            else:
                server.emit("policy loaded", reason=f"{self._policy_path}, {len(server.policy.rules)} rules")
        tell("READY=1", self._status())

    def _status(self) -> str:
        contracts = self._contracts = len(self._server.watch.all())
        return f"STATUS=Domain {self._server.domain}: {contracts} contracts of {len(self._server.watch.clients)} processes"

    def _turn(self) -> None:
        """After each turn of the loop."""
        now = SYSTEM.monotonic_ns()
        if self._interval is not None and now - self._pinged >= self._interval and self._notifier.tell("WATCHDOG=1"):
            self._pinged = now
        if sum(len(client.contracts) for client in self._server.watch.clients.values()) != self._contracts:
            self._notifier.tell(self._status())


def serve(domain: str, policy_path: str | None, environment: Mapping[str, str]) -> None:
    """Run the supervisor of a domain until a signal ends it.  SupervisorError if there is one; PolicyError; OSError."""
    policy = None if policy_path is None else load_policy(policy_path)
    raise_limits()
    server = open_server(domain, policy)
    notifier = Notifier(environment)
    try:
        Service(server, policy_path, notifier).run()
    finally:
        notifier.close()
