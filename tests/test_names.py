"""Primitives by name: unrelated processes find the same one, created once, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
from typing import Any

import pytest
from support import Child, Page, clean, eventually, files_of, forget, own_files, program, run

import shlock
from shlock import _names, _sys, snapshot

# -- one name, one primitive ----------------------------------------------------------------------------------------------


def test_unrelated_processes_exclude_each_other_by_name(domain: str) -> None:
    """Each adds to a number in a file, reading and writing it in two steps: none is lost."""
    source = """
        import sys, shlock
        domain, path = sys.argv[1:]
        for _ in range(200):
            with shlock.Lock("counter", domain=domain):
                with open(path) as file: number = int(file.read() or 0)
                with open(path, "w") as file: file.write(str(number + 1))
    """
    path = f"/dev/shm/test-counter-{os.getpid()}"
    with open(path, "w"):
        pass
    try:
        processes = [program(source, domain, path) for _ in range(3)]
        for process in processes:
            out, err = process.communicate(timeout=100)
            assert (process.returncode, out, err) == (0, "", "")
        with open(path) as file:
            assert int(file.read()) == 600
    finally:
        os.unlink(path)


def test_a_name_outlives_the_process_that_created_it(domain: str) -> None:
    run("import sys, shlock; shlock.Semaphore(3, 'permits', domain=sys.argv[1]).acquire()", domain)
    assert shlock.Semaphore(3, "permits", domain=domain).get_value() == 2


def test_what_one_process_does_an_unrelated_one_sees(domain: str) -> None:
    source = """
        import sys, shlock
        domain = sys.argv[1]
        lock, event = shlock.Lock("lock", domain=domain), shlock.Event("event", domain=domain)
        print(lock.acquire(False), lock.owner.pid, event.is_set(), flush=True)
        event.wait()
        print("woken", flush=True)
        sys.stdin.readline()
    """
    lock, event = shlock.Lock("lock", domain=domain), shlock.Event("event", domain=domain)
    with lock:
        process = program(source, domain)
        assert process.stdout.readline() == f"False {os.getpid()} False\n"
        eventually(lambda: [waiter.pid for waiter in event.waiters] == [process.pid])
        event.set()
        assert process.stdout.readline() == "woken\n"
    assert process.communicate("go\n") == ("", "")
    assert process.returncode == 0


def test_the_heir_in_an_unrelated_process_is_told(domain: str) -> None:
    run("import os, sys, shlock; shlock.Lock('a', domain=sys.argv[1]).acquire(); os._exit(9)", domain, status=9)
    lock = shlock.Lock("a", domain=domain)
    with pytest.warns(shlock.AbandonedWarning, match="Lock 'a': owner pid"):
        assert lock.acquire(timeout=30)
    assert lock.abandoned is not None
    assert lock.abandoned.name == "MainProcess (-c)"
    lock.release()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_create_the_same_names_at_once_get_the_same_primitives(processes: int, domain: str) -> None:
    """All acquire each of 300 semaphores of many permits once; every acquire counts down the same number."""
    names = [f"name {number}" for number in range(300)]
    page = Page(1)

    def create(seed: int) -> list[tuple[int, int]]:
        order = names[:]
        random.Random(seed).shuffle(order)
        eventually(lambda: page[0])
        places = {}
        for name in order:
            semaphore = shlock.Semaphore(100, name, domain=domain)
            semaphore.acquire()
            places[name] = (semaphore._block.arena.identity, semaphore._block.index)
        return [places[name] for name in names]

    children = [Child(create, seed) for seed in range(processes)]
    page[0] = 1
    found = [child.result() for child in children]
    assert all(places == found[0] for places in found)
    assert len(set(found[0])) == len(names), "two names share a primitive"
    for name in names:
        assert shlock.Semaphore(100, name, domain=domain).get_value() == 100 - processes


def test_thousands_of_names_in_one_domain_grow_over_several_segments(domain: str) -> None:
    source = """
        import sys, shlock
        domain, first, last = sys.argv[1], *map(int, sys.argv[2:])
        for number in range(first, last):
            shlock.Semaphore(number % 7 + 2, f"user:{number}", domain=domain).acquire()
    """
    parts = ((0, 2000), (500, 2500))
    processes = [program(source, domain, *part) for part in parts]
    for process in processes:
        assert process.communicate(timeout=100) == ("", "")
        assert process.returncode == 0
    assert len(files_of(domain)) >= 2
    seen = {}
    for number in range(2500):
        semaphore = shlock.Semaphore(number % 7 + 2, f"user:{number}", domain=domain)
        taken = number % 7 + 2 - semaphore.get_value()
        assert taken == sum(first <= number < last for first, last in parts)
        seen[semaphore._block.arena.segment.name, semaphore._block.index] = number
    assert len(seen) == 2500


def test_a_name_found_in_the_first_segment_stays_there_when_the_domain_grows(domain: str) -> None:
    first = shlock.Lock("first", domain=domain)
    first.acquire()
    for number in range(1500):
        shlock.Lock(f"name {number}", domain=domain)
    assert len(files_of(domain)) > 1
    source = "import sys, shlock; print(shlock.Lock('first', domain=sys.argv[1]).acquire(False))"
    assert run(source, domain) == "False\n"
    first.release()
    assert run(source, domain) == "True\n"


def test_processes_killed_at_random_instants_while_they_create_names_block_nobody(domain: str) -> None:
    def create_for_ever(seed: int) -> None:
        numbers = random.Random(seed)
        while True:
            shlock.Lock(f"name {numbers.randrange(1000)}", domain=domain)

    for seed in range(30):
        page = Page(1)

        def create(seed: int, page: Page = page) -> None:
            page[0] = 1
            create_for_ever(seed)

        children = [Child(create, seed * 2 + number) for number in range(2)]
        eventually(lambda page=page: page[0])
        eventually(lambda: files_of(domain))
        before = shlock.Lock(f"before the kill {seed}", domain=domain)
        for child in children:
            child.kill()
        after = shlock.Lock(f"after the kill {seed}", domain=domain)
        assert before.acquire(block=False)
        assert after.acquire(block=False)
    # All names that are there now are one primitive each, for everybody.
    places = [(shlock.Lock(f"name {n}", domain=domain), n) for n in range(1000)]
    assert len({(lock._block.arena.identity, lock._block.index) for lock, _ in places}) == 1000


def test_a_process_stopped_while_it_creates_a_name_gives_an_error_and_no_hang(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_names, "CREATION_TIMEOUT", 0.2)
    page = Page(1)

    def create() -> None:
        lock = shlock.Lock("first", domain=domain)
        with _names.creating(lock._block.arena):
            page[0] = 1
            signal.pause()

    child = Child(create)
    eventually(lambda: page[0])
    with pytest.raises(shlock.SegmentError, match="does not go on"):
        shlock.Lock("second", domain=domain)
    shlock.Lock("first", domain=domain)  # a name that is there needs no lock
    child.kill()
    shlock.Lock("second", domain=domain)


# -- what does not fit ----------------------------------------------------------------------------------------------------

MAKERS: dict[str, Any] = {
    "a Lock": lambda **o: shlock.Lock("x", **o),
    "an RLock": lambda **o: shlock.RLock("x", **o),
    "a Semaphore of 2": lambda **o: shlock.Semaphore(2, "x", **o),
    "a Semaphore of 3": lambda **o: shlock.Semaphore(3, "x", **o),
    "a Semaphore of 2, owned": lambda **o: shlock.Semaphore(2, "x", owned=True, **o),
    "a BoundedSemaphore of 2": lambda **o: shlock.BoundedSemaphore(2, "x", **o),
    "a Condition": lambda **o: shlock.Condition(None, "x", **o),
    "an Event": lambda **o: shlock.Event("x", **o),
    "a Barrier of 2 parties": lambda **o: shlock.Barrier(2, name="x", **o),
    "a Barrier of 3 parties": lambda **o: shlock.Barrier(3, name="x", **o),
    "a Lock with on_abandoned='poison'": lambda **o: shlock.Lock("x", on_abandoned="poison", **o),
    "a Lock with on_abandoned='ignore'": lambda **o: shlock.Lock("x", on_abandoned="ignore", **o),
}


@pytest.mark.parametrize("there", MAKERS)
def test_another_kind_value_or_policy_than_what_is_there_is_an_error_that_names_both(there: str, domain: str) -> None:
    MAKERS[there](domain=domain)
    for wanted, make in MAKERS.items():
        if wanted == there or (wanted == "a Lock" and there.startswith("a Lock")):
            make(domain=domain)
            continue
        with pytest.raises(shlock.SegmentError) as error:
            make(domain=domain)
        assert f"'x' is {there} there, and {wanted}" in error.value.fact
        assert error.value.advice


def test_who_gives_no_policy_takes_the_lock_as_it_is(domain: str) -> None:
    shlock.Lock("x", domain=domain, on_abandoned="poison")
    run("import os, sys, shlock; shlock.Lock('x', domain=sys.argv[1]).acquire(); os._exit(0)", domain)
    lock = shlock.Lock("x", domain=domain)
    with pytest.raises(shlock.AbandonedError):
        lock.acquire(timeout=30)


def test_the_same_name_in_two_domains_is_two_locks(domain: str) -> None:
    other = f"{domain} other"

    def attempt() -> tuple[bool, bool]:
        return tuple(shlock.Lock("x", domain=which).acquire(block=False) for which in (other, domain))

    with shlock.Lock("x", domain=domain):
        assert Child(attempt).result() == (True, False)
    clean(other)


@pytest.mark.parametrize("suffix", ["/../x", "a/b", "+1", "%2F", "\n", "~", " ", ".", "ä" * 60, "x" * 120])
def test_any_text_is_a_domain_of_its_own(domain: str, suffix: str) -> None:
    other = domain + suffix
    try:
        lock = shlock.Lock("x", domain=other)
        assert lock.domain == other
        assert lock.acquire()
        assert shlock.Lock("x", domain=domain).acquire(block=False)
        assert run("import sys, shlock; print(shlock.Lock('x', domain=sys.argv[1]).acquire(False))", other) == "False\n"
        assert [d.domain for d in snapshot.domains() if d.segment in files_of(other)] == [other]
    finally:
        lock = None
        clean(other)


def test_long_domains_that_begin_alike_are_two(domain: str) -> None:
    one, other = (f"{domain}{'ä' * 60}{number}" for number in (1, 2))
    try:
        with shlock.Lock("x", domain=one):
            assert shlock.Lock("x", domain=other).acquire(block=False)
    finally:
        clean(one)
        clean(other)


BAD_NAMES: list[tuple[Any, type[Exception]]] = [
    ("", ValueError),
    ("x" * 201, ValueError),
    ("ä" * 101, ValueError),
    ("a\0b", ValueError),
    ("\0", ValueError),
    ("\ud800", ValueError),
    (b"bytes", TypeError),
    (7, TypeError),
    (("a",), TypeError),
]


@pytest.mark.parametrize(("name", "error"), BAD_NAMES, ids=lambda value: ascii(value)[:12])
@pytest.mark.parametrize("what", ["name", "domain"])
def test_a_bad_name_is_refused_before_anything_is_made(what: str, name: Any, error: type[Exception], domain: str) -> None:
    before = own_files()
    arguments: dict[str, Any] = {"name": name, "domain": domain} if what == "name" else {"name": "x", "domain": name}
    makers: list[Any] = [
        shlock.Lock,
        shlock.RLock,
        lambda **o: shlock.Semaphore(1, **o),
        lambda **o: shlock.BoundedSemaphore(1, **o),
        shlock.Condition,
        shlock.Event,
        lambda **o: shlock.Barrier(2, **o),
    ]
    for make in makers:
        with pytest.raises(error, match=what):
            make(**arguments)
    assert own_files() == before


@pytest.mark.parametrize("name", ["x", "x" * 200, "ä" * 100, " ", "/", "..", "\n", "\N{SNOWMAN}", "a b"], ids=ascii)
def test_any_text_of_1_to_200_bytes_is_a_name(name: str, domain: str) -> None:
    lock = shlock.Lock(name, domain=domain)
    assert lock.name == name
    lock.acquire()
    assert run("import sys, shlock; print(shlock.Lock(sys.argv[1], domain=sys.argv[2]).locked())", name, domain) == "True\n"


# -- every kind by name ---------------------------------------------------------------------------------------------------


def test_a_condition_by_name_brings_its_lock(domain: str) -> None:
    source = """
        import sys, shlock
        condition = shlock.Condition(None, "c", domain=sys.argv[1])
        with condition:
            print(condition.wait(30))
    """
    condition = shlock.Condition(None, "c", domain=domain)
    process = program(source, domain)
    eventually(lambda: condition.waiters)
    with condition:
        condition.notify()
        assert process.poll() is None
    assert process.communicate(timeout=60) == ("True\n", "")


def test_a_condition_by_name_may_have_its_lock_s_name_beside_it(domain: str) -> None:
    """The lock that it makes for itself takes no name that a user could give."""
    shlock.Condition(None, "c", domain=domain)
    shlock.Lock("c lock", domain=domain)
    shlock.Lock("clock", domain=domain)
    with pytest.raises(shlock.SegmentError):
        shlock.Lock("c", domain=domain)


def test_a_barrier_by_name_lets_all_through_together(domain: str) -> None:
    source = """
        import sys, shlock
        barrier = shlock.Barrier(3, name="b", domain=sys.argv[1])
        for _ in range(5):
            print(barrier.wait(60))
    """
    processes = [program(source, domain) for _ in range(3)]
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, err) == (0, "")
        answers.append([int(line) for line in out.split()])
    assert [sorted(answer) for answer in zip(*answers, strict=True)] == [[0, 1, 2]] * 5


def test_an_owned_semaphore_by_name_gives_the_permits_of_the_dead_to_others(domain: str) -> None:
    source = """
        import os, sys, shlock
        semaphore = shlock.Semaphore(20, "s", owned=True, domain=sys.argv[1])
        for _ in range(12):
            semaphore.acquire()
        os._exit(0)
    """
    run(source, domain)
    semaphore = shlock.Semaphore(20, "s", owned=True, domain=domain)
    with pytest.warns(shlock.AbandonedWarning) as warned:
        for _ in range(20):
            assert semaphore.acquire(timeout=30)
    assert len(warned) == 12
    for _ in range(20):
        semaphore.release()
    assert semaphore.get_value() == 20


def test_further_names_take_none_of_the_blocks_in_which_permits_are(domain: str) -> None:
    semaphores = [shlock.Semaphore(60, f"s {number}", owned=True, domain=domain) for number in range(3)]
    for semaphore in semaphores:
        for _ in range(60):
            semaphore.acquire()
    for number in range(600):
        shlock.Lock(f"name {number}", domain=domain)
    assert [semaphore.get_value() for semaphore in semaphores] == [0, 0, 0]


@pytest.mark.parametrize("what", MAKERS)
def test_a_primitive_with_a_name_can_be_pickled_at_any_time(what: str, domain: str) -> None:
    original = MAKERS[what](domain=domain)
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is type(original)
    assert (copy.name, copy.domain) == ("x", domain)
    assert copy._block.arena.identity == original._block.arena.identity
    assert copy._block.index == original._block.index
    source = """
        import sys, pickle
        print(repr(pickle.loads(bytes.fromhex(sys.argv[1])).name))
    """
    assert run(source, pickle.dumps(original).hex()) == "'x'\n"


def test_a_pickled_name_that_is_gone_is_an_error_that_says_so(domain: str) -> None:
    text = run("import sys, pickle, shlock; print(pickle.dumps(shlock.Lock('x', domain=sys.argv[1])).hex())", domain)
    assert snapshot.clean(domain)
    with pytest.raises(shlock.SegmentError, match="no 'x'"):
        pickle.loads(bytes.fromhex(text))


def test_a_domain_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="domain"):
        shlock.Lock(domain="x")


# -- cleaning and looking -------------------------------------------------------------------------------------------------


def test_clean_removes_what_nobody_uses_and_only_that(domain: str) -> None:
    other = f"{domain} other"
    page = Page(1)

    def use() -> None:
        lock = shlock.Lock("x", domain=domain)
        lock.acquire()
        page[0] = 1
        signal.pause()

    child = Child(use)
    eventually(lambda: page[0])
    run("import sys, shlock; shlock.Lock('x', domain=sys.argv[1])", other)
    assert snapshot.clean(domain) == []
    assert snapshot.clean(other) == [_names.segment_name(other)]
    assert files_of(domain)
    assert not files_of(other)
    child.kill()
    assert snapshot.clean(domain) == [_names.segment_name(domain)]
    assert not files_of(domain)


def test_clean_removes_all_segments_and_semaphores_of_a_domain(domain: str) -> None:
    def use() -> int:
        for number in range(1500):
            lock = shlock.Lock(f"name {number}", domain=domain)
        lock.acquire()
        assert not lock.acquire(timeout=0.01)  # sleeps, and so needs a semaphore
        return lock._block.arena.identity

    identity = Child(use).result()
    semaphores = {name for name in os.listdir("/dev/shm") if name.startswith(f"sem.shlock-{identity:016x}")}
    assert semaphores
    assert len(files_of(domain)) == 2
    assert set(snapshot.clean(domain)) == {_names.segment_name(domain), _names.segment_name(domain, 1), *semaphores}


def test_who_creates_a_name_while_its_domain_is_being_removed_gets_a_new_one(domain: str) -> None:
    page = Page(2)

    def create() -> int:
        made = 0
        while not page[0]:
            lock = shlock.Lock("x", domain=domain)
            assert lock.acquire(block=False)
            lock.release()
            made += 1
            page[1] = made
            del lock
            forget(domain)
        return made

    child = Child(create)
    removed = 0
    while removed < 20:
        removed += len(snapshot.clean(domain))
    eventually(lambda: page[1])
    page[0] = 1
    assert child.result() > 0


def test_a_segment_that_is_removed_between_being_opened_and_being_locked_is_not_used(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("import sys, shlock; shlock.Lock('x', domain=sys.argv[1])", domain)
    lock_byte = _sys.SYSTEM.lock_byte

    def too_late(*arguments: Any, **options: Any) -> bool:
        monkeypatch.undo()
        assert snapshot.clean(domain)
        return lock_byte(*arguments, **options)

    monkeypatch.setattr(_sys.SYSTEM, "lock_byte", too_late)
    lock = shlock.Lock("x", domain=domain)
    assert os.fstat(lock._block.arena.segment.fd).st_nlink == 1


def test_a_snapshot_shows_every_kind_while_all_of_it_is_stuck(domain: str) -> None:
    source = """
        import sys, threading, shlock
        d = sys.argv[1]
        lock, rlock, event = shlock.Lock("lock", domain=d), shlock.RLock("rlock", domain=d), shlock.Event("event", domain=d)
        semaphore, bounded = shlock.Semaphore(1, "semaphore", domain=d), shlock.BoundedSemaphore(2, "bounded", domain=d)
        owned = shlock.Semaphore(2, "owned", owned=True, domain=d)
        barrier = shlock.Barrier(3, name="barrier", domain=d)
        condition = shlock.Condition(None, "condition", domain=d)
        for p in (lock, rlock, semaphore, bounded, owned):
            p.acquire()
        def wait_for(p):
            if p is condition:
                with p:
                    p.wait()
            else:
                (p.acquire if hasattr(p, "acquire") else p.wait)()
        for p in (lock, rlock, semaphore, barrier, condition, event):
            threading.Thread(target=wait_for, args=(p,), daemon=True).start()
        print("ready", flush=True)
        threading.Event().wait()
    """
    process = program(source, domain)
    try:
        assert process.stdout.readline() == "ready\n"
        waited_for = {"lock", "rlock", "semaphore", "barrier", "condition", "event"}

        def look() -> dict[str | None, snapshot.PrimitiveSnapshot]:
            (seen,) = [d for d in snapshot.domains() if d.domain == domain]
            assert seen.problem is None
            assert seen.in_use
            assert seen.processes == (process.pid,)
            return {primitive.name: primitive for primitive in seen.primitives}

        eventually(lambda: {name for name, primitive in look().items() if primitive.waiters} == waited_for)
        process.send_signal(signal.SIGSTOP)  # nobody can answer any more
        seen = look()
        states = {name: (primitive.kind, primitive.state) for name, primitive in seen.items()}
        assert states == {
            "lock": ("Lock", "held"),
            "rlock": ("RLock", "held"),
            "event": ("Event", "unset"),
            "semaphore": ("Semaphore", "value 0"),
            "bounded": ("BoundedSemaphore", "value 1 of 2"),
            "owned": ("Semaphore", "value 1 of 2"),
            "barrier": ("Barrier", "1 of 3 waiting"),
            "condition": ("Condition", "waiting"),
            "condition (its lock)": ("RLock", "free"),
        }
        for name in waited_for:
            (waiter,) = seen[name].waiters
            assert waiter.pid == process.pid
            assert waiter.thread_id != process.pid
            assert waiter.waiting_for >= 0
        for name in ("lock", "rlock", "owned"):
            assert seen[name].owner is not None
            assert (seen[name].owner.pid, seen[name].owner.alive) == (process.pid, True)
        json.dumps([d.as_dict() for d in snapshot.domains() if d.domain == domain])
    finally:
        process.kill()
        process.communicate()
    (lock,) = [p for d in snapshot.domains() if d.domain == domain for p in d.primitives if p.name == "lock"]
    assert lock.state == "held by a dead process"
    assert lock.waiters == ()
