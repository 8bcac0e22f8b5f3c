"""What is around the supervisor's loop: the class, the service, and the commands that ask it or do without it."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, Child, Page, clean, end_children, eventually, forget, program_environment, run

import shlock
from shlock import _client, _messages, cli, snapshot
from shlock.supervisor import ContractReport, Policy, PolicyError, Supervisor, SupervisorEvent, load_policy, parse, server
from shlock.supervisor.service import Notifier

LONG = 600.0
"""A lease that no test waits for."""

GRACE = 60.0
"""The longest that the default policy allows."""

POLICY = """\
[[rule]]
users = ["@self"]
names = ["{names}"]
operations = ["acquire"]
longest_lease = 3600.0
longest_grace = 3600.0
highest_rank = 9
"""


@pytest.fixture(autouse=True)
def no_supervisor_is_left(domain: str) -> Iterator[None]:
    """Embedded ones end by themselves, and services are ended by ``serve``."""
    yield
    end_children()
    connection = _client._connections.pop(domain, None)
    forget(domain)  # the locks of this process
    if connection is not None:
        with connection._lock:
            connection._close_unused()
            assert not connection.grants, "a lock is still there"
            if connection._socket is not None:
                connection._disconnect(connection._socket)
    address = _messages.address(os.geteuid(), domain).replace("\0", "@")
    eventually(lambda: f" {address}\n" not in Path("/proc/net/unix").read_text(), "the domain's supervisor ends")


def hold(domain: str, name: str = "n", *, page: Page | None = None, **terms: Any) -> None:
    """Take a lock, and stay inside until killed."""
    lock = shlock.Lock(name, domain=domain, **terms)
    lock.acquire()
    if page is not None:
        page[0] = 1
    signal.pause()


def holder(domain: str, **terms: Any) -> Child:
    """A process that is inside."""
    page = Page()
    child = Child(lambda: hold(domain, page=page, **terms))
    eventually(lambda: page[0] or not child.is_alive(), "it holds")
    assert page[0], child.result()
    return child


def polite_holder(domain: str, **terms: Any) -> Child:
    """A process that is inside until it is asked to leave; its result is whether the lease said so, and the time since."""
    page = Page()

    def stay() -> float:
        lock = shlock.Lock("n", domain=domain, **terms)
        with lock as lease:
            page[0] = 1
            eventually(lambda: lease.terminate_requested, "it is asked to leave")
            return float(lease.remaining())

    child = Child(stay)
    eventually(lambda: page[0] or not child.is_alive(), "it holds")
    assert page[0], child.result()
    return child


def event_names(events: list[SupervisorEvent]) -> list[str]:
    return [event.event for event in events]


# -- the class ------------------------------------------------------------------------------------------------------------


def test_a_supervisor_in_this_program_serves_its_domain_and_no_embedded_one_starts(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        assert _client.supervisor_pid(domain) == os.getpid()
        child = holder(domain, lease=LONG, grace=2.0, rank=3, record_site=True)
        [contract] = [contract for contract in supervisor.contracts() if contract.holds]
        assert (contract.lock, contract.pid, contract.lease, contract.grace, contract.rank) == ("n", child.pid, LONG, 2.0, 3)
        assert contract.token == 1
        assert contract.remaining is not None and 0 < contract.remaining <= LONG
        assert contract.site is not None and "test_supervise.py" in contract.site
        assert contract.rule.startswith("rule 1")
        with pytest.raises(AttributeError):
            contract.pid = 1  # type: ignore[misc]
        assert event_names(supervisor.events()) == ["started", "granted"]
        assert supervisor.events(after=1)[0].event == "granted"
    assert _client.supervisor_pid(domain) is None


def test_a_second_supervisor_is_refused_and_told_who_it_is(domain: str) -> None:
    child = Child(lambda: supervise_until_killed(domain))
    eventually(lambda: _client.supervisor_pid(domain) == child.pid, "it supervises")
    with pytest.raises(shlock.SupervisorError, match=rf"another one \(pid {child.pid}\) is it already"), Supervisor(domain):
        pass
    child.kill()
    with Supervisor(domain) as first:
        with (
            pytest.raises(shlock.SupervisorError, match=rf"this process \(pid {os.getpid()}\) is it already"),
            Supervisor(domain),
        ):
            pass
        assert first.contracts() == []


def supervise_until_killed(domain: str) -> None:
    with Supervisor(domain):
        signal.pause()


def test_a_revoked_holder_is_asked_to_leave_now_and_may_go_within_its_grace(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        child = polite_holder(domain, lease=LONG, grace=GRACE)
        assert supervisor.revoke("n") == [child.pid]
        assert child.result() > 0  # long before its lease would have ended
        [event] = [event for event in supervisor.events() if event.event == "terminate"]
        assert (event.lock, event.pid, event.reason) == ("n", child.pid, "lease revoked")
        assert supervisor.revoke("n") == []
        assert "killed" not in event_names(supervisor.events())


@pytest.mark.filterwarnings("ignore::shlock.AbandonedWarning")
def test_a_revoked_holder_that_stays_is_killed_after_its_grace_and_not_before(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        child = holder(domain, lease=LONG, grace=0.3)
        began = time.monotonic()
        supervisor.revoke("n")
        assert child.wait() == -signal.SIGKILL
        assert time.monotonic() - began >= 0.3
        lock = shlock.Lock("n", domain=domain)
        with lock:
            assert lock.abandoned is not None
            assert (lock.abandoned.pid, lock.abandoned.reason) == (child.pid, "lease revoked")


@pytest.mark.filterwarnings("ignore::shlock.AbandonedWarning")
def test_a_holder_is_killed_at_once_and_its_heir_is_told_why(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        child = holder(domain, lease=LONG, grace=GRACE)
        assert supervisor.kill("n") == [child.pid]
        assert child.wait() == -signal.SIGKILL
        lock = shlock.Lock("n", domain=domain)
        with lock:
            assert lock.abandoned is not None
            assert lock.abandoned.reason == "killed by command"
        assert supervisor.kill("n") == []


def test_the_program_that_runs_the_supervisor_is_not_killed_by_it(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        lock = shlock.Lock("n", domain=domain, lease=LONG)
        with lock:
            assert supervisor.kill("n") == []
            assert event_names(supervisor.events())[-1] == "spared"
        del lock


def test_a_policy_may_be_a_file_or_an_object_and_a_malformed_file_is_refused(domain: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.format(names="allowed"))
    for policy in (file, str(file), load_policy(file)):
        with Supervisor(domain, policy) as supervisor:
            assert Child(lambda: shlock.Lock("allowed", domain=domain, lease=1.0).contract.rule).result() == "rule 1 (line 1)"
            refusal = Child(lambda: refused(domain, "other")).result()
            assert "no rule allows it" in refusal
            assert "denied" in event_names(supervisor.events())
    file.write_text("[[rule]]\nuser = 1\n")
    with pytest.raises(PolicyError, match=re.escape(f"{file}, line 2, key 'user'")):
        Supervisor(domain, file)
    file.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="is not in UTF-8"):
        Supervisor(domain, file)


def test_a_client_whose_connection_and_process_end_in_one_turn_does_not_stop_the_supervisor(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        server = supervisor._server
        assert server is not None
        entered, go_on = threading.Event(), threading.Event()

        def stand_still() -> None:
            entered.set()
            go_on.wait(PATIENCE)

        page = Page()

        def connect_only() -> None:
            with contextlib.suppress(shlock.ContractDenied):
                shlock.Lock("n" * 3, domain=domain, lease=2 * 3600.0)
            page[0] = 1
            signal.pause()

        child = Child(connect_only)
        eventually(lambda: page[0], "it has said hello")
        server.soon(stand_still)
        assert entered.wait(PATIENCE)
        child.kill()
        go_on.set()
        assert supervisor.contracts() == []
        eventually(lambda: not server.watch.clients, "it is forgotten")
        assert "stopped" not in event_names(supervisor.events())


def refused(domain: str, name: str) -> str:
    try:
        shlock.Lock(name, domain=domain, lease=1.0)
    except shlock.ContractDenied as error:
        return str(error)
    raise AssertionError("granted")


def test_outside_its_with_a_supervisor_answers_nothing(domain: str) -> None:
    supervisor = Supervisor(domain)
    with pytest.raises(shlock.SupervisorError, match="it does not run"):
        supervisor.contracts()
    with supervisor:
        assert supervisor.contracts() == []
    with pytest.raises(shlock.SupervisorError, match="it does not run"):
        supervisor.revoke("n")


def test_a_forked_child_does_not_keep_the_supervisor_of_its_parent(domain: str) -> None:
    page = Page()

    def child() -> str:
        try:
            supervisor.contracts()
        except shlock.SupervisorError as error:
            page[0] = 1
            eventually(lambda: page[1], "the parent has ended it")
            return str(error)
        return "it answered"

    with Supervisor(domain) as supervisor:
        forked = Child(child)
        eventually(lambda: page[0], "the child runs")
    assert forked.is_alive()
    assert _client.supervisor_pid(domain) is None
    with Supervisor(domain):
        page[1] = 1
        assert "it does not run" in forked.result()


def test_a_supervisor_whose_loop_has_ended_says_so_instead_of_hanging(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        server = supervisor._server
        assert server is not None
        server.stop()
        eventually(lambda: server._ended, "it ends")
        with pytest.raises(shlock.SupervisorError, match="it has ended"):
            supervisor.contracts()


def test_importing_shlock_imports_no_supervisor_and_no_client_until_they_are_used() -> None:
    found = run(
        """
        import sys, shlock
        def loaded(): return sorted(n for n in sys.modules if n.startswith(("shlock.supervisor", "shlock._client", "tomllib")))
        print(loaded())
        with shlock.Lock():
            print(loaded())
        print(shlock.Supervisor.__name__, "shlock.supervisor.server" in sys.modules)
        for name in shlock.__all__: getattr(shlock, name)
        """
    )
    assert found.splitlines() == ["[]", "[]", "Supervisor True"]


def test_answers_with_long_names_fit_into_messages(domain: str) -> None:
    names = [chr(0x20AC) * 60 + str(number) for number in range(60)]  # three bytes each; six in JSON
    with Supervisor(domain) as supervisor:
        locks = [shlock.Lock(name, domain=domain, lease=LONG) for name in names]
        seen = [event.get("lock") for event in _client.events(domain, follow=False)]
        assert [name for name in seen if name] == names
        found: list[str] = []
        while len(found) < len(names):
            answer = _client.ask(domain, {"op": "contracts", "from": len(found)})
            assert answer["all"] == len(names)
            found += [contract["lock"] for contract in answer["contracts"]]
        assert sorted(found) == sorted(names)
        assert len(supervisor.contracts()) == len(locks)
        del locks


# -- events ---------------------------------------------------------------------------------------------------------------


def test_reports_are_values_and_read_as_sentences() -> None:
    event = SupervisorEvent.from_dict(
        {"number": 3, "time": 1.0, "event": "killed", "lock": "n", "pid": 5, "token": 7, "reason": "lease overrun", "new": 1}
    )
    assert str(event) == "killed 'n' pid 5 token 7: lease overrun"
    assert event.level == logging.WARNING
    assert event.as_dict()["block"] is None
    granted = SupervisorEvent(number=1, time=1.0, event="granted", block=4, pid=5, lease=0.5, rule="rule 1")
    assert (str(granted), granted.level) == ("granted block 4 pid 5 lease 0.5 s (rule 1)", logging.DEBUG)
    contract = {
        "lock": "n",
        "block": 1,
        "pid": 2,
        "user": 0,
        "lease": 1.0,
        "grace": 0.0,
        "rank": 0,
        "precedence": "user",
        "rule": "r",
        "holds": False,
        "readers": 0,
        "inherits": True,
    }
    missing = {"token": None, "remaining": None, "site": None, "lifted": None}
    assert ContractReport.from_dict(contract).as_dict() == {**contract, **missing}


def test_events_are_shown_as_lines_and_as_json(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Supervisor(domain):
        Child(lambda: shlock.Lock("n", domain=domain, lease=LONG).name).result()
        assert cli.main(["events", "--domain", domain]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  granted 'n' pid \d+ lease 600 s: rule 1 .*", lines[1])
        assert cli.main(["events", "--json", "--domain", domain]) == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(event["number"], event["event"]) for event in shown[:2]] == [(1, "started"), (2, "granted")]


@pytest.mark.parametrize("command", [["events"], ["revoke", "n"], ["kill", "n"]])
def test_without_a_supervisor_the_commands_say_so(command: list[str], domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--domain", domain]) == 1
    assert "none is running" in capsys.readouterr().err


def test_following_events_goes_on_with_the_next_supervisor_and_keeps_none_alive(domain: str) -> None:
    with command("events", "--follow", "--json", "--domain", domain) as follower:
        assert follower.stdout is not None
        shown: list[dict[str, Any]] = []

        def read_until(event: str) -> dict[str, Any]:
            assert follower.stdout is not None
            while True:
                shown.append(json.loads(follower.stdout.readline()))
                if shown[-1]["event"] == event:
                    return shown[-1]

        pids = []
        for _ in range(2):
            Child(lambda: shlock.Lock("n", domain=domain, lease=LONG).name).result()
            pids.append(read_until("started")["pid"])
            read_until("granted")
            assert read_until("stopped")["reason"] == "nobody uses it"  # though somebody follows
        assert pids[0] != pids[1]
        assert [event["number"] for event in shown if event["event"] == "started"] == [1, 1]


# -- commands that end holds ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::shlock.AbandonedWarning")
def test_the_commands_revoke_and_kill_end_the_hold_of_an_embedded_supervisors_client(
    domain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child = polite_holder(domain, lease=LONG, grace=GRACE)
    assert cli.main(["revoke", "n", "--domain", domain]) == 0
    assert capsys.readouterr().out == f"pid {child.pid} is asked to leave 'n', and killed after its grace\n"
    assert child.result() > 0
    child = holder(domain, lease=LONG, grace=GRACE)
    assert cli.main(["kill", "n", "--domain", domain]) == 0
    assert capsys.readouterr().out == f"killed pid {child.pid}, which held 'n'\n"
    assert child.wait() == -signal.SIGKILL
    assert cli.main(["kill", "n", "--domain", domain]) == 1
    assert capsys.readouterr().err == f"shlock: nobody holds 'n' under a contract in domain '{domain}'\n"


# -- ps -------------------------------------------------------------------------------------------------------------------


def only(domain: str) -> snapshot.PrimitiveSnapshot:
    [primitive] = [primitive for d in snapshot.domains() if d.domain == domain for primitive in d.primitives]
    return primitive


def test_ps_shows_remaining_time_and_token_while_the_supervisor_is_stopped(
    domain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child = holder(domain, lease=LONG, grace=2.0, rank=4, record_site=True)
    supervisor = _client.supervisor_pid(domain)
    assert supervisor is not None
    with stopped(supervisor):
        assert cli.main(["ps", "--domain", domain]) == 0
        header, line = capsys.readouterr().out.splitlines()
        assert header.split()[-3:] == ["REMAINING", "TOKEN", "WAITERS"]
        cells = line[header.index("REMAINING") :].split()
        assert cells == ["9", "min", cells[2], "s", "1"] or cells == ["10", "min", "0", "s", "1"]
        assert cli.main(["ps", "--json", "--domain", domain]) == 0
        [shown] = json.loads(capsys.readouterr().out)["domains"][0]["primitives"]
        lease = shown["lease"]
        assert (lease["lease"], lease["grace"], lease["rank"], lease["token"]) == (LONG, 2.0, 4, 1)
        assert lease["remaining"] + shown["held_for"] == pytest.approx(LONG)
        assert "test_supervise.py:" in lease["site"]
        assert not lease["terminate_requested"]
    child.kill()


def test_a_leased_lock_that_is_free_has_its_last_token_and_no_remaining_time(domain: str) -> None:
    def take_twice() -> None:
        lock = shlock.Lock("n", domain=domain, lease=2.0, grace=1.0)
        for _ in range(2):
            with lock:
                pass

    Child(take_twice).result()
    assert only(domain).lease == snapshot.LeaseSnapshot(2.0, 1.0, None, 2, None, False, None)


def test_a_process_with_contracts_in_two_domains_is_found_in_both(domain: str) -> None:
    """A process has a ledger for each domain; that of the right one is read, and adopted by the next supervisor."""
    page = Page()
    other = f"{domain} other"

    def hold_both() -> None:
        locks = [shlock.Lock("n", domain=d, lease=LONG, grace=GRACE) for d in (other, domain)]
        for lock in locks:
            lock.acquire()
        page[0] = 1
        signal.pause()

    with Supervisor(other), Supervisor(domain):
        child = Child(hold_both)
        eventually(lambda: page[0], "it holds both")
        for d in (domain, other):
            lease = only(d).lease
            assert lease is not None and lease.remaining is not None, d
        child.stop()  # so that it does not come by itself
    with Supervisor(domain) as first, Supervisor(other) as second:
        assert [contract.pid for contract in first.contracts() if contract.holds] == [child.pid]
        assert [contract.pid for contract in second.contracts() if contract.holds] == [child.pid]
        child.kill()
    clean(other)


def test_ps_has_no_columns_for_leases_where_there_are_none(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    lock = shlock.Lock("n", domain=domain)
    assert cli.main(["ps", "--domain", domain]) == 0
    assert "TOKEN" not in capsys.readouterr().out
    assert lock.contract is None


def test_an_overrun_reads_as_such() -> None:
    assert cli._lease_cells(snapshot.LeaseSnapshot(1.0, 0.0, 0, 7, -2.5, True, None)) == ("over by 2.5 s", "7")
    assert cli._lease_cells(snapshot.LeaseSnapshot(1.0, 0.0, None, 0, None, False, None)) == ("", "")
    assert cli._lease_cells(None) == ("", "")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process stands still meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt", "it stops")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# -- why ------------------------------------------------------------------------------------------------------------------


def why(domain: str, capsys: pytest.CaptureFixture[str], name: str = "n") -> list[str]:
    assert cli.main(["why", name, "--domain", domain]) == 0
    return capsys.readouterr().out.splitlines()


def test_why_explains_a_leased_hold(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    child = holder(domain, lease=LONG, grace=2.0, rank=3, record_site=True)
    waiter = Child(lambda: hold(domain))
    eventually(lambda: only(domain).waiters, "somebody waits")
    lines = why(domain, capsys)
    assert lines[0] == f"'n' in domain '{domain}' is a Lock: held."
    assert re.fullmatch(rf"pid {child.pid} \(.+\) holds it since \d\d:\d\d:\d\d, for [\d.]+ m?s\.", lines[1])
    line = hold.__code__.co_firstlineno + 3
    assert lines[2] == f"It took it at {__file__}:{line}."
    assert re.fullmatch(r"Its contract: lease 600 s, grace 2 s, rank 3, by rule 1 \(line \d+\)\. Token 1\.", lines[3])
    assert re.fullmatch(
        r"Its lease ends in \d+ min \d+ s; if it is inside then, it is asked to leave, and killed 2.0 s later\.", lines[4]
    )
    assert re.fullmatch(rf"pid {waiter.pid} \(.+\) waits for [\d.]+ m?s\.", lines[5])
    assert len(lines) == 6
    waiter.kill()
    child.kill()


def test_why_works_with_a_hung_supervisor_and_without_one(
    domain: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_PATIENCE", 0.05)
    child = holder(domain, lease=LONG, grace=2.0)
    supervisor = _client.supervisor_pid(domain)
    assert supervisor is not None
    with stopped(supervisor):
        assert why(domain, capsys)[-2].startswith(f"The supervisor, pid {supervisor}, does not answer")
    child.stop()  # so that it starts no other
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: _client.supervisor_pid(domain) is None, "it is gone")
    assert why(domain, capsys)[-2] == "No supervisor runs in this domain: deadlines are not enforced until one does."
    child.kill()


def test_why_says_that_the_holder_has_been_asked_to_leave(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Supervisor(domain) as supervisor:
        child = holder(domain, lease=LONG, grace=GRACE)
        supervisor.revoke("n")
        eventually(lambda: (lease := only(domain).lease) and lease.terminate_requested, "it is asked")
        assert "It has been asked to leave, as its lease was revoked; it is killed 1 min 0 s after that call." in why(
            domain, capsys
        )
        child.kill()


@pytest.mark.filterwarnings("ignore::shlock.AbandonedWarning")
def test_why_explains_plain_poisoned_inherited_and_free_locks(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    lock = shlock.Lock("n", domain=domain)
    assert why(domain, capsys) == [f"'n' in domain '{domain}' is a Lock: free.", "Nobody holds it.", "Nobody waits."]
    child = holder(domain)
    assert "Since when is not recorded" in why(domain, capsys)[1]
    waiters = [Child(lambda: hold(domain)) for _ in range(2)]
    eventually(lambda: len(only(domain).waiters) == 2, "both wait")
    lines = why(domain, capsys)
    assert "or more" in lines[1]
    assert lines[2].startswith("2 threads wait, the longest-waiting first: pid ")
    for waiter in waiters:
        waiter.kill()
    child.kill()
    assert f"pid {child.pid}" in why(domain, capsys)[1] and "died holding it" in why(domain, capsys)[1]
    with lock:
        lines = why(domain, capsys)
        assert lines[2].startswith(f"Before, pid {child.pid}") and "(owner died)" in lines[2]
    shlock.Lock("poisoned", domain=domain, on_abandoned="poison")
    dead = holder(domain, name="poisoned")
    dead.kill()
    with pytest.raises(shlock.AbandonedError):
        shlock.Lock("poisoned", domain=domain).acquire()
    lines = why(domain, capsys, "poisoned")
    assert lines[0].endswith("is a Lock: poisoned.")
    assert f"pid {dead.pid}" in lines[1] and "until somebody does, in 'with lock.repair()" in lines[1]


def test_why_of_an_unknown_name_is_status_1_and_knows_other_domains(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    lock = shlock.Lock("n", domain=domain)
    assert cli.main(["why", "m", "--domain", domain]) == 1
    assert capsys.readouterr().err == f"shlock: nothing is called 'm' in domain '{domain}'\n"
    assert cli.main(["why", "n", "--domain", "no such domain"]) == 1
    hint = capsys.readouterr().err
    assert "; there is one in domain " in hint and f"'{domain}'" in hint and hint.endswith(": use --domain\n")
    assert lock.name == "n"


# -- the service ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """``shlock`` with these arguments, killed in the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shlock", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**program_environment(), **environment},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def serve(domain: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """``shlock supervise``, once it answers."""
    with command("supervise", "--domain", domain, *arguments, **environment) as process:
        eventually(lambda: process.poll() is not None or _client.supervisor_pid(domain) == process.pid, "it supervises")
        assert process.poll() is None, process.communicate()
        eventually(lambda: _catches(process.pid, signal.SIGHUP), "it handles signals")
        yield process


def _catches(pid: int, number: int) -> bool:
    [mask] = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> number - 1 & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_leaves_cleanly_and_the_next_one_adopts_its_holders(domain: str, number: signal.Signals) -> None:
    with serve(domain) as first:
        child = holder(domain, lease=LONG, grace=GRACE)
        child.stop()  # it cannot come to the next one by itself
        first.send_signal(number)
        _, log = first.communicate(timeout=PATIENCE)
        assert first.returncode == 0, log
        assert "INFO stopped" in log
        assert "Traceback" not in log
    with serve(domain):
        answer = _client.ask(domain, {"op": "contracts", "from": 0})
        assert [(c["pid"], c["holds"], c["rule"]) for c in answer["contracts"]] == [(child.pid, True, "adopted")]
        child.kill()


def test_a_second_service_ends_with_status_1_and_names_the_first(domain: str) -> None:
    with serve(domain) as first, command("supervise", "--domain", domain) as second:
        out, error = second.communicate(timeout=PATIENCE)
        assert (second.returncode, out) == (1, "")
        assert error.startswith(f"shlock: supervisor of domain '{domain}': another one (pid {first.pid}) is it already.")


def test_a_service_reloads_its_policy_and_keeps_the_old_one_if_the_file_is_malformed(domain: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.format(names="old"))
    with serve(domain, "--policy", str(file)) as process:

        def events_after_reload() -> dict[str, Any]:
            before = sum(1 for _ in _client.events(domain, follow=False))
            process.send_signal(signal.SIGHUP)
            return eventually(
                lambda: (
                    [e for e in _client.events(domain, follow=False) if e["event"].startswith("policy")][-1:]
                    and next((e for e in _client.events(domain, follow=False) if e["number"] > before), None)
                ),
                "it says what it did",
            )

        def may(name: str) -> bool:
            return Child(lambda: granted(domain, name)).result()

        assert (may("old"), may("new")) == (True, False)
        file.write_text(POLICY.format(names="new").replace("highest_rank = 9", 'highest_rank = "nine"'))
        refusal = events_after_reload()
        assert refusal["event"] == "policy refused"
        assert f"{file}, line 7, key 'highest_rank'" in refusal["reason"]
        assert (may("old"), may("new")) == (True, False)
        file.unlink()
        assert events_after_reload()["event"] == "policy refused"
        file.write_text(POLICY.format(names="new"))
        assert events_after_reload()["event"] == "policy loaded"
        assert (may("old"), may("new")) == (False, True)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert re.search(rf"^[\d: ,-]+ ERROR policy refused: {re.escape(str(file))}, line 7, key 'highest_rank'", log, re.M)


def granted(domain: str, name: str) -> bool:
    try:
        shlock.Lock(name, domain=domain, lease=1.0)
    except shlock.ContractDenied:
        return False
    return True


def test_a_service_does_not_start_with_a_malformed_policy(
    domain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\nnames = 3\n")
    for arguments in (["supervise"], ["supervise", "--print-policy"]):
        assert cli.main([*arguments, "--domain", domain, "--policy", str(file)]) == 1
        assert capsys.readouterr().err.startswith(f"shlock: {file}, line 2, key 'names'")
    assert cli.main(["supervise", "--domain", domain, "--policy", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_print_policy_prints_what_would_be_in_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["supervise", "--print-policy"]) == 0
    assert parse(capsys.readouterr().out, "printed").rules
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.format(names="mine"))
    assert cli.main(["supervise", "--print-policy", "--policy", str(file)]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_verbose_logs_grants_and_otherwise_they_are_quiet(domain: str) -> None:
    for arguments, is_logged in (([], False), (["-v"], True)):
        with serve(domain, *arguments) as process:
            Child(lambda: granted(domain, "n")).result()
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=PATIENCE)
        assert ("DEBUG granted 'n'" in log) is is_logged
        assert "INFO started" in log


# -- systemd --------------------------------------------------------------------------------------------------------------


class Systemd:
    """The receiving end of the notify protocol."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(PATIENCE)

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def until(self, key: str) -> dict[str, str]:
        while key not in (message := self.next()):
            pass
        return message

    def drain(self) -> int:
        """Read what is there; how many messages."""
        found = 0
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(4096):
                found += 1
        self._socket.settimeout(PATIENCE)
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_how_it_goes(domain: str, tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@shlock test {os.getpid()} {domain}"
    systemd = Systemd(address)
    try:
        with serve(domain, NOTIFY_SOCKET=address) as process:
            ready = systemd.next()
            assert ready == {
                "READY": "1",
                "MAINPID": str(process.pid),
                "STATUS": f"Domain {domain}: 0 contracts of 0 processes",
            }
            child = holder(domain, lease=LONG)
            assert systemd.next() == {"STATUS": f"Domain {domain}: 1 contracts of 1 processes"}
            before = time.monotonic_ns() // 1000
            process.send_signal(signal.SIGHUP)
            reloading = systemd.until("RELOADING")
            assert reloading["RELOADING"] == "1"
            assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
            assert systemd.next()["READY"] == "1"
            child.kill()
            process.send_signal(signal.SIGTERM)
            assert systemd.until("STOPPING") == {"STOPPING": "1"}
            assert process.wait(PATIENCE) == 0
    finally:
        systemd.close()


def test_the_watchdog_is_pinged_by_the_loop_and_not_while_that_stands_still(domain: str, tmp_path: Path) -> None:
    systemd = Systemd(str(tmp_path / "notify"))
    half = 0.2
    try:
        with serve(domain, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC=str(int(2 * half * 1e6))) as process:
            systemd.until("WATCHDOG")
            began, turns, pings = time.monotonic(), 0, 0
            while pings < 5:  # and not at every turn
                _client.ask(domain, {"op": "contracts", "from": 0})
                turns += 1
                pings += systemd.drain()
            assert turns > 2 * pings
            assert time.monotonic() - began >= 4 * half / 2
            with stopped(process.pid):
                systemd.drain()
                with pytest.raises(TimeoutError):
                    systemd._socket.settimeout(3 * half)
                    systemd.next()
            systemd._socket.settimeout(PATIENCE)
            systemd.until("WATCHDOG")
    finally:
        systemd.close()


def test_the_watchdog_of_another_process_and_no_systemd_at_all_mean_silence(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    for environment, interval in (
        ({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getpid())}, 10**6),
        ({"WATCHDOG_USEC": "soon"}, None),
    ):
        notifier = Notifier({"NOTIFY_SOCKET": address, **environment})
        assert notifier.watchdog == interval
        notifier.close()
    for environment in ({}, {"NOTIFY_SOCKET": "vsock:1"}, {"NOTIFY_SOCKET": address}):  # the last one: nobody listens
        notifier = Notifier(environment)
        assert not notifier.tell("READY=1")
        notifier.close()


def test_the_unit_file_names_what_there_is() -> None:
    unit = (Path(__file__).parents[1] / "examples" / "shlock-supervise.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    program, name, *arguments = settings["ExecStart"].split()
    assert (program, name) == ("/usr/bin/env", "shlock")
    cli._parser().parse_args(arguments)
    assert (settings["Type"], settings["ExecReload"]) == ("notify", "/bin/kill -HUP $MAINPID")
    assert int(settings["WatchdogSec"]) > 0


# -- the client's side ----------------------------------------------------------------------------------------------------


def test_the_library_is_silent_unless_asked_and_then_logs_connects_and_denials(
    domain: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("shlock").handlers)
    nothing = Policy()
    with caplog.at_level(logging.DEBUG, "shlock"):
        with Supervisor(domain, nothing), pytest.raises(shlock.ContractDenied):
            shlock.Lock("n", domain=domain, lease=LONG)
        with Supervisor(domain):
            lock = shlock.Lock("n", domain=domain, lease=LONG)
            assert lock.contract is not None
            del lock
    texts = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "shlock"]
    assert ("DEBUG", f"connected to the supervisor of domain {domain!r}, pid {os.getpid()}") in texts
    assert ("INFO", f"connected again to the supervisor of domain {domain!r}, pid {os.getpid()}") in texts
    assert any(level == "INFO" and text.startswith("denied: Lock 'n'") for level, text in texts)


def test_a_client_that_meets_a_supervisor_at_its_end_turns_to_the_next_one(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is made, and reset before the answer to its hello."""
    ends = [True]
    exchange = _client.Connection._exchange

    def end_at_hello(
        self: Any, connection: socket.socket, message: dict[str, Any], *rest: Any, **options: Any
    ) -> dict[str, Any]:
        if message["op"] == "hello" and ends:
            ends.pop()
            raise ConnectionResetError("the supervisor has gone")
        return exchange(self, connection, message, *rest, **options)

    monkeypatch.setattr(_client.Connection, "_exchange", end_at_hello)
    with Supervisor(domain):
        assert shlock.Lock("n", domain=domain, lease=LONG).contract is not None
    assert not ends


def test_what_the_supervisor_refuses_is_raised_at_once_and_not_tried_again(domain: str) -> None:
    with Supervisor(domain) as supervisor:
        lock = shlock.Lock("n", domain=domain, lease=LONG)
        connection = _client.connection_to(domain)
        with pytest.raises(shlock.SupervisorError, match="no such operation"):
            connection._call({"op": "nonsense"})
        assert event_names(supervisor.events()).count("refused") == 1
        del lock


def test_a_supervisor_that_does_not_answer_is_named(domain: str) -> None:
    silence = pytest.raises(shlock.SupervisorError, match=r"pid \d+ has not answered for 0\.05 s")
    began = time.monotonic()
    with serve(domain) as process, stopped(process.pid), silence:
        _client.ask(domain, {"op": "contracts", "from": 0}, timeout=0.05)
    assert time.monotonic() - began < _client.ANSWER_TIMEOUT


def test_an_embedded_supervisor_is_scheduled_with_its_clients_and_before_them(domain: str) -> None:
    """In a session of its own it can wait for a processor for seconds; in the group of its clients Ctrl-C would end it."""

    def look() -> tuple[int, int, int, int]:
        lock = shlock.Lock("n", domain=domain, lease=LONG)
        pid = _client.supervisor_pid(domain) or 0
        assert lock.contract is not None
        return pid, os.getpgid(pid), os.getsid(pid), os.getpriority(os.PRIO_PROCESS, pid)

    pid, group, session, nice = Child(look).result()
    assert group == pid
    assert session == os.getsid(0)

    def as_it_may() -> int:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        return os.getpriority(os.PRIO_PROCESS, 0)

    assert nice == Child(as_it_may).result()


def test_who_talks_without_end_has_one_message_heard_at_a_turn(domain: str) -> None:
    served = server.Server(domain)
    try:
        with _client.connect(domain, 0.0, start=False) as connection:
            for _ in range(3):
                _messages.send(connection, {"op": "who"})
            served._accept()
            (session,) = served._sessions.values()
            connection.setblocking(False)
            answers = 0
            for turn in range(1, 4):
                served._hear(session)
                with contextlib.suppress(BlockingIOError):
                    while connection.recv(_messages.MOST_BYTES):
                        answers += 1
                assert answers == turn
    finally:
        served._close_all()


def test_a_supervisor_that_comes_up_when_nobody_needs_it_any_more_ends(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client starts the next one for a lock that is gone by the time it answers."""
    comes, go_on, connect = threading.Event(), threading.Event(), _client.connect

    def connect_late(*arguments: Any, **options: Any) -> socket.socket:
        connection = connect(*arguments, **options)
        comes.set()
        assert go_on.wait(PATIENCE)
        return connection

    with Supervisor(domain):
        lock = shlock.Lock("n", domain=domain, lease=LONG)
        watcher = _client._connections[domain]._watcher
        assert watcher is not None
        monkeypatch.setattr(_client, "connect", connect_late)
    assert comes.wait(PATIENCE)
    del lock
    gc.collect()
    go_on.set()
    watcher.join(PATIENCE)
    assert not watcher.is_alive(), "it keeps the supervisor alive for nobody"
    assert _client._connections[domain]._socket is None
