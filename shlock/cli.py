"""The ``shlock`` command: ``ps`` shows who holds and who waits, ``why`` explains it, ``clean`` removes the unused.

``supervise`` is the supervisor as a service; ``events``, ``revoke`` and ``kill`` ask the one that runs; ``demo`` kills workers.
``ps`` reads snapshots, takes no lock and asks nobody, so it answers while everything else is stuck. Tables are plain text; on a
terminal they are drawn with ``rich`` if that is installed (the extra ``cli``). Exit status: 0 all is well, 1 a problem,
2 wrong usage, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._explain import Enforcer
    from .snapshot import DomainSnapshot, LeaseSnapshot, PrimitiveSnapshot, ReaderSnapshot

__all__ = ["main"]

_COLUMNS = ("DOMAIN", "NAME", "KIND", "STATE", "OWNER", "AGE", "WAITERS")
_LEASED_COLUMNS = (*_COLUMNS[:-1], "REMAINING", "TOKEN", _COLUMNS[-1])
"""If any lock is leased."""

_PATIENCE = 1.0
"""Seconds that ``why`` waits for the supervisor."""

_STYLES = {
    "free": "dim",
    "held": "green",
    "inherited": "yellow",
    "held by a dead process": "red",
    "poisoned": "red",
    "damaged": "red",
}
"""How rich draws the lines of primitives in these states."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own) and return its exit status."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        status = command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as in ``shlock ps | head -1``. Python would flush stdout once more at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        return _complain(str(error))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shlock",
        description="Locks that outlive their holder: see who holds and who waits, and why; supervise; watch workers die.",
        epilog="Exit status: 0 all is well, 1 a problem, 2 wrong usage, 128 + n ended by signal n.",
    )
    parser.add_argument("--version", action="version", version=f"shlock {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str, more: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}")
        sub.set_defaults(command=function)
        return sub

    ps = command(
        "ps",
        _ps,
        "show every lock of yours: state, owner, and who waits for how long",
        "Takes no lock itself and works while everything is stuck. An age with > is a lower bound. Locks without a name "
        "belong to (anonymous, pid P + N): process P and N others have them open.",
    )
    clean = command(
        "clean",
        _clean,
        "remove what no living process uses",
        "Nothing that a living process has open is touched.",
    )
    for sub in (ps, clean):
        sub.add_argument("--domain", metavar="D", help="only this domain (default: all, the anonymous ones as well)")
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")

    why = command(
        "why",
        _why,
        "explain who holds a lock, since when, until when and why, and who waits",
        "Works without the supervisor, too; exit status 1 if nothing has that name.",
    )
    supervise = command(
        "supervise",
        _supervise,
        "run the supervisor of a domain in the foreground",
        "It grants contracts by its policy, and ends holds whose lease is over. SIGTERM and Ctrl-C end it with exit status 0: "
        "the next one adopts what it watched. SIGHUP reads the policy file again; one with errors changes nothing. Speaks "
        "systemd's notify protocol.",
    )
    supervise.add_argument("--policy", metavar="FILE", help="who may do what (default: this user everything)")
    supervise.add_argument("--print-policy", action="store_true", help="print the policy, checked, and end")
    supervise.add_argument("-v", "--verbose", action="store_true", help="log every contract that is granted, too")
    events = command(
        "events", _events, "show what the supervisor of a domain did: grants, refusals, ends of leases", "Oldest first."
    )
    events.add_argument("--follow", action="store_true", help="go on as they happen, also with the next supervisor")
    events.add_argument("--json", action="store_true", help="print a JSON object a line")
    revoke = command(
        "revoke",
        _end_hold,
        "end the present hold of a lock: its holder is asked to leave, and killed after its grace",
        "Of an RWLock that is read, this concerns everybody who reads. Exit status 1 if nobody holds it under a contract.",
    )
    kill = command(
        "kill",
        _end_hold,
        "kill the present holder of a lock at once",
        "The next one gets the lock when that process is gone, and is told. Of an RWLock that is read, everybody who reads is "
        "killed, and nobody is told. Exit status 1 if nobody holds it under a contract.",
    )
    for sub in (why, supervise, events, revoke, kill):
        sub.add_argument("--domain", metavar="D", default="default", help="default: %(default)s")
    for sub in (why, revoke, kill):
        sub.add_argument("name", metavar="NAME", help="of the lock")
    revoke.set_defaults(operation="revoke")
    kill.set_defaults(operation="kill")

    demo = command(
        "demo",
        _demo,
        "kill workers inside their critical section, many times a second, and lose nothing",
        "Worker processes take the files of a folder from a Queue, hash what another process reads and sends them through a "
        "Channel, put the results into a Block and add them to a shared table under one lock, while a chaos process kills "
        "them. At the end all results are compared with a sequential run: exit status 0 (PASS) if nothing is lost and "
        "nothing counted twice, else 1 (FAIL). With --lock multiprocessing the run hangs at the first worker killed inside; "
        "that is given up after --timeout seconds, with exit status 1 as well.",
    )
    demo.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="default: Python's standard library")
    demo.add_argument("--lock", choices=["shlock", "multiprocessing"], default="shlock", help="default: %(default)s")
    demo.add_argument("--workers", type=_count, default=4, metavar="N", help="worker processes (default: %(default)s)")
    demo.add_argument(
        "--kills-per-second",
        type=_positive,
        default=20.0,
        metavar="K",
        help="mean rate of kills (default: %(default)g)",
    )
    demo.add_argument("--seed", type=int, metavar="N", help="for choosing whom to kill and when (default: a random one)")
    demo.add_argument("--no-chaos", action="store_true", help="kill nobody")
    demo.add_argument("--no-hangs", action="store_true", help="leave nobody stopped inside")
    demo.add_argument(
        "--seconds",
        type=_not_negative,
        default=20.0,
        metavar="S",
        help="go over the folder again until this much time has passed; 0: only once (default: %(default)g)",
    )
    demo.add_argument(
        "--timeout",
        type=_positive,
        default=5.0,
        metavar="S",
        help="give up when nothing has moved for so many seconds (default: %(default)g)",
    )
    return parser


def _ps(arguments: argparse.Namespace) -> int:
    from . import snapshot
    from ._bias import why_not
    from .errors import describe_deadlock

    if arguments.domain is not None and (status := _is_closed(arguments.domain)):
        return status
    domains = [d for d in snapshot.domains() if arguments.domain in (None, d.domain)]
    if arguments.json:
        print(json.dumps({"domains": [d.as_dict() for d in domains]}, indent=2))
        return 0
    if domains:
        leased = any(primitive.lease is not None for domain in domains for primitive in domain.primitives)
        columns = _LEASED_COLUMNS if leased else _COLUMNS
        _print_table([row for domain in domains for row in _rows(domain, time.time(), leased)], columns)
        for cycle in {frozenset(p.deadlock): p.deadlock for d in domains for p in d.primitives if p.deadlock}.values():
            print(f"\nDeadlock: {_printable(describe_deadlock(cycle))}.")
        if unused := sorted({_printable(d.domain) for d in domains if d.domain is not None and not d.in_use}):
            print(f"\nNo living process uses {', '.join(unused)}: shlock clean removes that.")
        if (reason := why_not()) is not None:
            print(f"\nNo lock is biased to a process: {reason}.")
    elif arguments.domain is not None:
        print(f"nothing in domain {_printable(arguments.domain)!r}")
    else:
        print("no locks: no process of yours uses shlock now, and none has left anything behind")
    return 0


def _is_closed(domain: str) -> int:
    """Say so, and an exit status, if we can't look into a domain; 0 if we can."""
    from ._machine import ROOT, is_of_machine

    if is_of_machine(domain) and os.geteuid() != ROOT:
        return _complain(_printable(f"domain {domain!r} is of the machine: only root can look into it"))
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from . import snapshot

    removed = snapshot.clean(arguments.domain)
    if arguments.json:
        print(json.dumps({"removed": removed}, indent=2))
        return 0
    for item in removed:
        print(f"removed {_printable(item)}")
    if not removed:
        print("nothing to remove: whatever is there is used by a living process")
    return 0


def _why(arguments: argparse.Namespace) -> int:
    from . import snapshot
    from ._explain import explain

    name, domain = arguments.name, arguments.domain
    if status := _is_closed(domain):
        return status
    domains = snapshot.domains()
    for found in (primitive for d in domains if d.domain == domain for primitive in d.primitives):
        if found.name == name:
            print("\n".join(explain(found, domain, _enforcer(domain, found), time.time())))
            return 0
    elsewhere = sorted({d.domain for d in domains if d.domain and any(p.name == name for p in d.primitives)})
    hint = f"; there is one in domain {', '.join(map(repr, elsewhere))}: use --domain" if elsewhere else ""
    if problems := [d.problem for d in domains if d.domain == domain and d.problem]:
        hint += f". A part of the domain can't be read: {problems[0]}"
    return _complain(_printable(f"nothing is called {name!r} in domain {domain!r}{hint}"))


def _enforcer(domain: str, primitive: PrimitiveSnapshot) -> Enforcer:
    """What the supervisor of the domain says of the holder; not much, if it is hung or there is none."""
    from ._client import ask, supervisor_pid
    from ._explain import Enforcer
    from .errors import SupervisorError

    if primitive.lease is None or (primitive.owner is None and not primitive.readers):
        return Enforcer()
    pid = supervisor_pid(domain)
    try:
        answer = ask(domain, {"op": "contracts", "from": 0, "name": primitive.name}, timeout=_PATIENCE)
    except SupervisorError:
        return Enforcer(pid)
    for contract in answer["contracts"]:
        if primitive.owner is not None and contract.get("pid") == primitive.owner.pid:
            return Enforcer(pid, True, str(contract.get("rule")), contract.get("lifted"))
    return Enforcer(pid, True)


def _supervise(arguments: argparse.Namespace) -> int:
    import logging

    from .supervisor import PolicyError, load_policy, policy, service

    try:
        if arguments.print_policy:
            text = policy.DEFAULT_TEXT
            if arguments.policy is not None:
                load_policy(arguments.policy)
                text = Path(arguments.policy).read_text("utf-8")
            print(text, end="")
            return 0
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("shlock")
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
        service.serve(arguments.domain, arguments.policy, os.environ)
    except PolicyError as error:
        return _complain(str(error))
    return 0


def _events(arguments: argparse.Namespace) -> int:
    from ._client import events
    from .supervisor import SupervisorEvent

    for facts in events(arguments.domain, follow=arguments.follow):
        if arguments.json:
            print(json.dumps(facts), flush=arguments.follow)
            continue
        event = SupervisorEvent.from_dict(facts)
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        print(f"{clock}.{int(event.time % 1 * 1000):03}  {_printable(str(event))}", flush=arguments.follow)
    return 0


def _end_hold(arguments: argparse.Namespace) -> int:
    from ._client import ask

    answer = ask(arguments.domain, {"op": arguments.operation, "name": arguments.name})
    name, pids = _printable(repr(arguments.name)), answer["holders"]
    if not pids:
        return _complain(f"nobody holds {name} under a contract in domain {_printable(repr(arguments.domain))}")
    for pid in pids:
        if arguments.operation == "kill":
            print(f"killed pid {pid}, which held {name}")
        else:
            print(f"pid {pid} is asked to leave {name}, and killed after its grace")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    settings = demo.Settings(
        folder=demo.standard_library() if arguments.folder is None else arguments.folder,
        lock=arguments.lock,
        workers=arguments.workers,
        chaos=not arguments.no_chaos,
        hangs=not arguments.no_hangs,
        kills_per_second=arguments.kills_per_second,
        seed=random.randrange(10**6) if arguments.seed is None else arguments.seed,
        seconds=arguments.seconds,
        timeout=arguments.timeout,
    )
    try:
        outcome = demo.run(settings)
    except demo.DemoError as error:
        return _complain(str(error))
    except demo.SignalledError as error:
        _complain(str(error))
        return 128 + error.signum
    print(demo.report(outcome))
    return 1 if outcome.problems else 0


def _rows(domain: DomainSnapshot, now: float, leased: bool) -> Iterator[tuple[str, ...]]:
    """The cells of a domain's primitives, or one line saying why there are none. ``now`` is as from time.time()."""
    if domain.domain is not None:
        title = _printable(domain.domain)
    elif domain.processes:
        first, *others = domain.processes
        title = f"(anonymous, pid {first}{f' + {len(others)}' if others else ''})"
    else:
        title = "(anonymous)"
    for primitive in domain.primitives:
        yield title, *_cells(primitive, now, leased)
    if domain.problem or not domain.primitives:
        yield title, "-", "-", _printable(domain.problem or "empty"), *[""] * (5 if leased else 3)


def _cells(primitive: PrimitiveSnapshot, now: float, leased: bool) -> tuple[str, ...]:
    """One primitive's cells; the last one has a line for each waiter."""
    owner = ""
    if primitive.owner is not None:
        owner = _process(primitive.owner.pid, primitive.owner.name) + ("" if primitive.owner.alive else ", dead")
    elif primitive.abandoned is not None:
        dead = primitive.abandoned
        owner = f"{_process(dead.pid, dead.name)}, found dead {_duration(max(0.0, now - dead.found_at))} ago"
    age = ""
    if primitive.held_for is not None:
        age = (">" if primitive.held_for_is_lower_bound else "") + _duration(primitive.held_for)
    waiters = "\n".join(f"{_process(w.pid, w.name)} {_duration(w.waiting_for)}" for w in primitive.waiters)
    name = "-" if primitive.name is None else _printable(primitive.name)
    return (
        name,
        primitive.kind,
        primitive.state,
        owner,
        age,
        *(_lease_cells(primitive.lease, primitive.readers) if leased else ()),
        waiters,
    )


def _lease_cells(lease: LeaseSnapshot | None, readers: Sequence[ReaderSnapshot] = ()) -> tuple[str, str]:
    """REMAINING and TOKEN; of an RWLock that is read, of the reader whose lease ends first."""
    if lease is None:
        return "", ""
    left = readers[0].remaining if readers else lease.remaining
    remaining = ""
    if left is not None:
        remaining = _duration(left) if left >= 0 else f"over by {_duration(-left)}"
    return remaining, str(lease.token or "")


def _process(pid: int, name: str | None) -> str:
    return f"{pid} ({_printable(name)})" if name else str(pid)


def _duration(seconds: float) -> str:
    """A time to read at a glance: 12 ms, 3.2 s, 4 min 5 s, 2 h 3 min, 5 d 1 h."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _printable(text: str) -> str:
    """The text with all that could move a terminal's cursor or break a table as escapes: names are other people's."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _print_table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...]) -> None:
    if not (sys.stdout.isatty() and _print_rich_table(rows, columns)):
        print("\n".join(_plain_table(rows, columns)))


def _plain_table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...]) -> Iterable[str]:
    """The lines of a table; a cell of several lines makes several."""
    lines = [columns]
    for row in rows:
        lines += zip_longest(*(cell.split("\n") for cell in row), fillvalue="") if "\n" in row[-1] else [row]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(map(str.ljust, line, widths)).rstrip()


def _print_rich_table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...] = _COLUMNS) -> bool:
    """Draw the table with rich, if that is installed; returns whether it is."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, header_style="bold")
    for title in columns:
        table.add_column(title, overflow="fold")  # on a narrow terminal: more lines, nothing cut off
    for row in rows:
        table.add_row(*(Text(cell, _STYLES.get(row[3], "")) for cell in row))
    Console().print(table)
    return True


def _complain(text: str) -> int:
    print(f"shlock: {text}", file=sys.stderr)
    return 1


def _version() -> str:
    try:
        return importlib.metadata.version("shlock")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _positive(text: str) -> float:
    number = _not_negative(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not (number >= 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return number
