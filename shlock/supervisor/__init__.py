"""The supervisor: grants contracts on named locks and enforces them.

The first leased lock of a domain starts one in the background, which ends with its last client.  :class:`Supervisor` runs one
inside a program instead, ``shlock supervise`` one as a service.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self, TypeVar

from .. import _process
from ..contract import Lease
from ..errors import SupervisorError
from .policy import Policy, PolicyError, parse
from .report import ContractReport, SupervisorEvent
from .server import Server, open_server

__all__ = ["ContractReport", "Policy", "PolicyError", "Supervisor", "SupervisorEvent", "load_policy"]

T = TypeVar("T")

OWN_LEASE: Final = 3600.0  # seconds

_running: weakref.WeakSet[Supervisor] = weakref.WeakSet()


class Supervisor:
    """The supervisor of a domain, in a thread of this program, for the length of a ``with``.

    It serves the processes of this user.  It never kills the program that it runs in: a lock that this program holds too long
    is noted (event "spared"), and that is all.  A forked child does not have it.

    domain  whose locks it grants and watches
    policy  a Policy, the path of a policy file, or None: this user may do everything, with leases up to an hour

    Raises SupervisorError on entering, naming the process, if the domain has a supervisor; PolicyError for a file that can't be
    used.
    """

    def __init__(self, domain: str = "default", policy: Policy | str | os.PathLike[str] | None = None) -> None:
        self.domain = domain
        self.policy = policy if policy is None or isinstance(policy, Policy) else load_policy(policy)
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._server is not None:
            raise SupervisorError(self.domain, "it runs already", "Leave its 'with' first.")
        self._server = open_server(self.domain, self.policy)
        self._thread = threading.Thread(target=self._server.run, name=f"shlock supervisor of {self.domain}", daemon=True)
        _running.add(self)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        server, thread, self._server, self._thread = self._server, self._thread, None, None
        _running.discard(self)
        if server is not None and thread is not None:
            server.stop()
            thread.join()

    def revoke(self, name: str) -> list[int]:
        """End the present hold of a lock by decision: its holder is asked to leave now, and killed after its grace.

        Of an RWLock that is read, this concerns everybody who reads; a writer that waits for them is let alone.
        Returns the pids that this concerns: none if nobody is inside under a contract.
        """
        return self._call(lambda server: server.end_hold(name, at_once=False))

    def kill(self, name: str) -> list[int]:
        """Kill the present holder of a lock at once.  The next one gets it when that process is gone, and is told.

        Of an RWLock that is read, everybody who reads; of that nobody is told.
        Returns the pids that this concerns: none if nobody is inside under a contract, or only this program is.
        """
        return self._call(lambda server: server.end_hold(name, at_once=True))

    @contextlib.contextmanager
    def acquire(self, name: str, *, preempt: bool = True, timeout: float | None = None) -> Iterator[Lease]:
        """``with supervisor.acquire(name):`` hold a leased Lock as the kernel: this program goes before every other one.

        preempt  the present holder is asked to leave now, and killed after its grace.  False: it has its lease
        timeout  seconds; then TimeoutError

        Blocks.  The lease that it yields is an hour; this program is not killed when that is over.  ContractDenied if the
        policy does not allow this user so much.
        """
        from ..synchronize import Lock  # for the program around it: what supervises needs no lock

        lock = Lock(name, domain=self.domain, lease=OWN_LEASE, operations=("acquire", "preempt"))
        if not lock.acquire(timeout=timeout, preempt=preempt):
            raise TimeoutError(f"Lock {name!r}: not within {timeout} s")
        try:
            lease = lock.lease
            assert lease is not None
            yield lease
        finally:
            lock.release()

    def contracts(self) -> list[ContractReport]:
        """Every contract, and who is inside."""
        return [ContractReport.from_dict(facts) for facts in self._call(lambda server: server.contracts())]

    def events(self, after: int = 0) -> list[SupervisorEvent]:
        """What it did and noticed, the oldest first, from the one behind number ``after``: at most the last 10,000."""
        found = self._call(lambda server: list(server.events))
        return [SupervisorEvent.from_dict(facts) for facts in found if facts["number"] > after]

    def _call(self, function: Callable[[Server], T]) -> T:
        server = self._server
        if server is None:
            raise SupervisorError(self.domain, "it does not run", "Use it inside its 'with'.")
        result: T = server.call(lambda: function(server))
        return result

    def _forget(self) -> None:
        server, self._server, self._thread = self._server, None, None
        if server is not None:
            server.forget()


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in a file.  PolicyError with file, line and key; OSError if it can't be read."""
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PolicyError(os.fspath(path), None, None, f"is not in UTF-8: {error.reason} at byte {error.start}") from None
    return parse(text, os.fspath(path))


def _forget_all() -> None:
    for supervisor in list(_running):
        supervisor._forget()
    _running.clear()


_process.refresh_in_child.append(_forget_all)
