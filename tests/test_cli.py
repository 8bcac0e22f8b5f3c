"""The ``shlock`` command: what it prints, in text and in JSON, and its exit status."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import shlock
from shlock import cli, snapshot

WATCHDOG = 60.0
"""Seconds after which something that should have happened is taken for hung."""

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def domain(request: pytest.FixtureRequest) -> Iterator[str]:
    """A domain of this test's own, of which nothing may be left after ``clean``."""
    name = f"test-cli-{os.getpid()}-{request.node.name[-40:]}"
    yield name
    snapshot.clean(name)
    assert [d for d in snapshot.domains() if d.domain == name] == []


def hold(domain: str, name: str, holding: Event | None = None) -> None:
    lock = shlock.Lock(name, domain=domain)
    lock.acquire()
    if holding is not None:
        holding.set()
    signal.pause()


@pytest.fixture
def start() -> Iterator[Callable[..., SpawnProcess]]:
    """Starts processes that are killed in the end."""
    started: list[SpawnProcess] = []

    def start(*arguments: object, name: str) -> SpawnProcess:
        process = SPAWN.Process(target=hold, args=arguments, name=name, daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
        process.close()


def held(start: Callable[..., SpawnProcess], domain: str) -> SpawnProcess:
    """A process that holds ``user:42``."""
    holding = SPAWN.Event()
    holder = start(domain, "user:42", holding, name="the-holder")
    assert holding.wait(WATCHDOG)
    return holder


def held_with_a_waiter(start: Callable[..., SpawnProcess], domain: str) -> tuple[SpawnProcess, SpawnProcess]:
    """A process that holds ``user:42`` and another that waits for it."""
    holder = held(start, domain)
    waiter = start(domain, "user:42", name="the-waiter")
    give_up = time.monotonic() + WATCHDOG
    while not any(p.waiters for d in snapshot.domains() if d.domain == domain for p in d.primitives):
        assert time.monotonic() < give_up, "nobody waits"
        time.sleep(0.01)
    return holder, waiter


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shlock", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WATCHDOG, check=False)


def test_ps_shows_owner_age_and_who_waits_for_how_long(
    domain: str, start: Callable[..., SpawnProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    holder, waiter = held_with_a_waiter(start, domain)
    assert cli.main(["ps", "--domain", domain]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["DOMAIN", "NAME", "KIND", "STATE", "OWNER", "AGE", "WAITERS"]
    [line] = lines
    assert line.split()[:5] == [domain, "user:42", "Lock", "held", str(holder.pid)]
    assert "the-holder" in line
    owner, _, waiting = line.partition(str(waiter.pid))
    assert "the-waiter" in waiting
    assert waiting.split()[-1] in ("ms", "s")
    assert owner.split()[-1] in ("ms", "s")


def test_ps_json_has_the_whole_snapshot(
    domain: str, start: Callable[..., SpawnProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    holder, waiter = held_with_a_waiter(start, domain)
    assert cli.main(["ps", "--json", "--domain", domain]) == 0
    [shown] = json.loads(capsys.readouterr().out)["domains"]
    assert shown["domain"] == domain
    assert {holder.pid, waiter.pid} <= set(shown["processes"])
    [primitive] = shown["primitives"]
    assert (primitive["name"], primitive["kind"], primitive["state"]) == ("user:42", "Lock", "held")
    assert primitive["owner"]["pid"] == holder.pid
    assert primitive["held_for"] >= 0
    assert [w["pid"] for w in primitive["waiters"]] == [waiter.pid]
    assert primitive["waiters"][0]["waiting_for"] >= 0


def test_ps_without_a_domain_shows_this_one_too(
    domain: str, start: Callable[..., SpawnProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    held(start, domain)
    assert cli.main(["ps"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == [domain, "user:42"]]


def test_ps_shows_a_dead_owner_whom_nobody_has_missed_yet(
    domain: str, start: Callable[..., SpawnProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    holder = held(start, domain)
    holder.kill()
    holder.join()
    assert cli.main(["ps", "--domain", domain]) == 0
    assert str(holder.pid) in capsys.readouterr().out


def test_ps_of_a_domain_that_is_not_there_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ps", "--domain", "no such domain"]) == 0
    assert capsys.readouterr().out == "nothing in domain 'no such domain'\n"
    assert cli.main(["ps", "--json", "--domain", "no such domain"]) == 0
    assert json.loads(capsys.readouterr().out) == {"domains": []}


def test_nothing_at_all_is_said_in_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "domains", list)
    monkeypatch.setattr(snapshot, "clean", lambda domain=None: [])
    assert cli.main(["ps"]) == 0
    assert capsys.readouterr().out.startswith("no locks: ")
    assert cli.main(["clean"]) == 0
    assert capsys.readouterr().out.startswith("nothing to remove: ")


def test_clean_leaves_what_is_used_and_removes_it_afterwards(
    domain: str, start: Callable[..., SpawnProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    holder, waiter = held_with_a_waiter(start, domain)
    assert cli.main(["clean", "--domain", domain]) == 0
    assert capsys.readouterr().out.startswith("nothing to remove")
    [found] = [d for d in snapshot.domains() if d.domain == domain]
    for process in (waiter, holder):
        process.kill()
        process.join()
    assert cli.main(["clean", "--json", "--domain", domain]) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert any(found.segment in item for item in removed)
    assert [d for d in snapshot.domains() if d.domain == domain] == []
    assert not [path for path in Path("/dev/shm").iterdir() if found.segment in path.name]


def waiting(pid: int, seconds: float) -> snapshot.Waiter:
    return snapshot.Waiter(pid=pid, thread_id=pid, name=None, waiting_for=seconds)


def primitive(**changes: object) -> snapshot.PrimitiveSnapshot:
    fields = {
        "name": "a",
        "kind": "Lock",
        "state": "free",
        "owner": None,
        "held_for": None,
        "held_for_is_lower_bound": False,
        "waiters": (),
        "abandoned": None,
    }
    return snapshot.PrimitiveSnapshot(**{**fields, **changes})  # type: ignore[arg-type]


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[str]:
    found = snapshot.DomainSnapshot(domain=None, segment="s", in_use=True, processes=(), primitives=(primitive(**changes),))
    monkeypatch.setattr(snapshot, "domains", lambda: [found])
    assert cli.main(["ps"]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_domain_that_cannot_be_read_or_is_empty_or_unused_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        snapshot.DomainSnapshot("foreign", "s", in_use=True, processes=(), primitives=(), problem="not a segment"),
        snapshot.DomainSnapshot("old", "t", in_use=False, processes=(), primitives=()),
        snapshot.DomainSnapshot(None, "u", in_use=True, processes=(7, 8, 9), primitives=(primitive(),)),
    ]
    monkeypatch.setattr(snapshot, "domains", lambda: found)
    assert cli.main(["ps"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "foreign - - not a segment",
        "old - - empty",
        "(anonymous, pid 7 + 2) a Lock free",
        "",
        "No living process uses old: shlock clean removes that.",
    ]


def test_every_waiter_has_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(capsys, monkeypatch, waiters=(waiting(11, 0.5), waiting(12, 75)))
    assert lines[0].index("WAITERS") == lines[1].index("11 500 ms") == lines[2].index("12 1 min 15 s")
    assert lines[1].startswith("(anonymous)  a ")


def test_a_lower_bound_and_a_dead_owner_are_marked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    owner = snapshot.Owner(pid=5, name="w", alive=False, since=None)
    lines = shown(capsys, monkeypatch, owner=owner, state="held", held_for=2.0, held_for_is_lower_bound=True)
    assert lines[1].split(maxsplit=4)[4] == "5 (w), dead  >2.0 s"


def test_the_dead_owner_of_an_abandoned_lock_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = snapshot.Abandoned(pid=5, name="w", found_at=time.time() - 7200, reason="owner died")
    lines = shown(capsys, monkeypatch, state="abandoned", abandoned=dead)
    assert lines[1].split(maxsplit=4)[4] == "5 (w), found dead 2 h 0 min ago"


def test_a_name_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(capsys, monkeypatch, name="a\x1b[2J\nb\udcff\u202e")
    assert len(lines) == 2
    assert r"a\x1b[2J\nb\udcff\u202e" in lines[1]


def test_the_table_for_a_terminal_shows_the_same_and_needs_no_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("d", "n", "Lock", "held", "1 ([red]w)", ">1.0 s", "2 1 ms\n3 2 ms")]
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert not cli._print_rich_table(rows)
    monkeypatch.undo()
    if cli._print_rich_table(rows):
        drawn = capsys.readouterr().out
        assert all(part in drawn for cell in rows[0] for part in cell.split("\n"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86399, "23 h 59 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_a_duration_is_read_at_a_glance(seconds: float, text: str) -> None:
    assert cli._duration(seconds) == text


def test_a_system_error_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(domain: str | None = None) -> list[str]:
        raise PermissionError(13, "Permission denied", "/dev/shm/x")

    monkeypatch.setattr(snapshot, "clean", fail)
    assert cli.main(["clean"]) == 1
    assert capsys.readouterr().err == "shlock: [Errno 13] Permission denied: '/dev/shm/x'\n"


@pytest.mark.parametrize("command", ["ps", "clean", "demo"])
def test_each_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: shlock {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pss"],
        ["ps", "--colour"],
        ["demo", "--workers", "0"],
        ["demo", "--workers", "two"],
        ["demo", "--kills-per-second", "0"],
        ["demo", "--kills-per-second", "nan"],
        ["demo", "--timeout", "inf"],
        ["demo", "--seconds", "-1"],
        ["demo", "--lock", "threading"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: shlock")


def test_a_demo_passes_with_status_0_and_a_missing_folder_is_status_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    done = run("demo", str(tmp_path), "--no-chaos", "--seconds", "0")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "PASS")
    done = run("demo", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"shlock: {tmp_path / 'nowhere'}: there is no such folder\n"


def test_a_demo_that_hangs_fails_with_status_1(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / str(number)).write_text("content")
    chaos = ["--kills-per-second", "100", "--seconds", "60", "--timeout", "1", "--seed", "7"]
    done = run("demo", str(tmp_path), "--lock", "multiprocessing", *chaos)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "FAIL")
    assert "(seed 7)" in done.stdout
    assert "hung: nothing has moved for 1 s" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "shlock", "ps", "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=WATCHDOG, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
