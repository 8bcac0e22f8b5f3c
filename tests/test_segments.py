"""Segments that cannot be used are refused, with a text that says why and what to do, and stay as they were.

And segments without a name leave nothing in /dev/shm, however their processes end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, SHM, Child, Page, eventually, forget, program_environment, run, semaphores_of

import shlock
from shlock import _layout as at
from shlock import _names, _segment, _sys, snapshot
from shlock._arena import Arena
from shlock._parking import parking_of

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner of a file or make a namespace")


@pytest.fixture
def segment(domain: str) -> Iterator[Path]:
    """The file of a domain's first segment, marked as in use: else the ``clean`` of another test might remove it.

    This process does not know the domain.
    """
    path = SHM / _names.segment_name(domain)

    def keep() -> int | None:
        run("import sys, shlock; shlock.Lock('x', domain=sys.argv[1])", domain)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR)
            if _sys.SYSTEM.lock_byte(descriptor, _segment.BYTE_IN_USE, shared=True) and os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)
        return None

    descriptor = eventually(keep, "the segment is there")
    yield path
    os.close(descriptor)


@contextlib.contextmanager
def refused(domain: str, fact: str, advice: str = "") -> Iterator[None]:
    """Inside, something is wrong with the domain: it says what, and nothing of it is changed by the attempt to use it."""
    yield
    path = SHM / _names.segment_name(domain)
    before, facts = content(path), path.lstat()
    for make in (shlock.Lock, shlock.Event, lambda *a, **o: shlock.Semaphore(1, *a, **o)):
        with pytest.raises(shlock.SegmentError) as error:
            make("x", domain=domain)
        assert error.value.segment == path.name
        assert fact in error.value.fact
        assert advice in error.value.advice
        assert error.value.advice.strip()
        assert path.name in str(error.value)
    assert content(path) == before
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_uid) == (facts.st_ino, facts.st_mode, facts.st_uid)
    # What only looks says the same, and removes nothing that is not ours to judge.
    seen = [d for d in snapshot.domains() if d.segment == path.name]
    assert seen
    assert all(d.problem and fact in d.problem for d in seen)
    assert path.lstat().st_ino == facts.st_ino
    forget(domain)


def content(path: Path) -> bytes:
    return path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b""


def write_word(path: Path, index: int, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(index * at.WORD)
        file.write(value.to_bytes(at.WORD, "little"))


# -- what may be wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4095])
def test_a_segment_shorter_than_a_header_is_refused(size: int, domain: str, segment: Path) -> None:
    with refused(domain, "", "emove"):
        os.truncate(segment, size)


@pytest.mark.parametrize("missing", [1, 4096, 100_000])
def test_a_truncated_segment_is_refused(missing: int, domain: str, segment: Path) -> None:
    with refused(domain, "truncated or damaged", "by hand"):
        os.truncate(segment, segment.stat().st_size - missing)


def test_a_segment_that_is_too_long_is_refused(domain: str, segment: Path) -> None:
    with refused(domain, "truncated or damaged", "by hand"):
        os.truncate(segment, segment.stat().st_size + 8)


@pytest.mark.parametrize("content", [b"hello", bytes(100_000), os.urandom(100_000)], ids=["short", "zero", "random"])
def test_a_foreign_file_is_refused(content: bytes, domain: str) -> None:
    with refused(domain, "", "emove"):
        (SHM / _names.segment_name(domain)).write_bytes(content)
    (SHM / _names.segment_name(domain)).unlink()


def test_a_segment_not_made_by_shlock_is_called_that(domain: str, segment: Path) -> None:
    with refused(domain, "not made by shlock", "by hand"):
        write_word(segment, at.HEADER_MAGIC, at.MAGIC ^ 1)


@pytest.mark.parametrize("version", [0, at.VERSION + 1, 2**64 - 1])
def test_another_layout_version_is_refused(version: int, domain: str, segment: Path) -> None:
    with refused(domain, f"layout version {version}, this shlock knows {at.VERSION}", "shlock clean"):
        write_word(segment, at.HEADER_VERSION, version)


@pytest.mark.parametrize("word", [at.HEADER_BOOT, at.HEADER_BOOT + 1])
def test_a_segment_from_another_boot_is_refused(word: int, domain: str, segment: Path) -> None:
    with refused(domain, "another boot", "by hand"):
        write_word(segment, word, uuid.uuid4().int & at.WORD_MASK)


def test_a_segment_from_another_pid_namespace_is_refused(domain: str, segment: Path) -> None:
    with refused(domain, "belongs to pid namespace 4026531000", "container"):
        write_word(segment, at.HEADER_NAMESPACE, 4026531000)


@needs_root
def test_a_process_in_another_pid_namespace_is_refused(domain: str, segment: Path) -> None:
    source = (
        "import sys, shlock\n"
        "try:\n    shlock.Lock('x', domain=sys.argv[1])\n"
        "except shlock.SegmentError as error:\n    print(error.fact)\n"
    )
    before = segment.read_bytes()
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", source]
    done = subprocess.run(
        [*command, domain], capture_output=True, text=True, env=program_environment(), timeout=PATIENCE, check=False
    )
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no pid namespaces here: {done.stderr.strip()}")
    assert f"belongs to pid namespace {_sys.SYSTEM.pid_namespace()}" in done.stdout, done.stderr
    assert segment.read_bytes() == before


@needs_root
def test_a_segment_of_another_user_is_refused(domain: str, segment: Path) -> None:
    with refused(domain, "belongs to user 12345", "another domain"):
        os.chown(segment, 12345, 12345)
    os.chown(segment, 0, 0)


@needs_root
def test_a_segment_that_this_user_may_not_even_open_is_refused(domain: str) -> None:
    """A process of another user, to whom somebody has given a file in the place of its own."""
    name = _names.segment_name(domain).replace(f"-{os.geteuid()}-", "-12345-")
    path = SHM / name
    path.touch(mode=0o600)
    try:

        def attempt() -> tuple[str, str]:
            os.setresuid(12345, 12345, 12345)
            try:
                shlock.Lock("x", domain=domain)
            except shlock.SegmentError as error:
                return error.fact, error.advice
            return "", ""

        fact, advice = Child(attempt).result()
        assert fact == "it belongs to user 0"
        assert "another domain" in advice
        assert path.read_bytes() == b""
    finally:
        path.unlink()


def test_a_header_of_another_user_is_refused(domain: str, segment: Path) -> None:
    with refused(domain, "belongs to user", "another domain"):
        write_word(segment, at.HEADER_USER, os.geteuid() + 1)


@pytest.mark.parametrize("word", [at.HEADER_SPOTS, at.HEADER_PROCESSES, at.HEADER_BLOCKS, at.HEADER_TEXT])
@pytest.mark.parametrize("value", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_capacities_that_do_not_fit_the_file_are_refused(word: int, value: int, domain: str, segment: Path) -> None:
    with refused(domain, "damaged", "by hand"):
        write_word(segment, word, value)


@pytest.mark.parametrize("word", [at.HEADER_SPOTS, at.HEADER_PROCESSES, at.HEADER_BLOCKS])
def test_a_capacity_of_zero_is_refused_also_where_the_sum_fits_the_file(word: int, domain: str, segment: Path) -> None:
    """What one table lacks, the text has: the size is right."""
    header = memoryview(segment.read_bytes()).cast("Q")
    sizes = {
        at.HEADER_SPOTS: at.SPOT_ARRAYS,
        at.HEADER_PROCESSES: at.PROCESS_WORDS,
        at.HEADER_BLOCKS: at.BLOCK_WORDS + at.NAME_WORDS,
    }
    with refused(domain, "damaged", "by hand"):
        write_word(segment, word, 0)
        write_word(segment, at.HEADER_TEXT, header[at.HEADER_TEXT] + header[word] * sizes[word] * at.WORD)


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_symlink(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def put_dangling_symlink(path: Path) -> None:
    path.symlink_to(SHM / f"test-target-{os.getpid()}")


def put_folder(path: Path) -> None:
    path.mkdir()


def put_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize("put", [put_fifo, put_symlink, put_dangling_symlink, put_folder, put_socket])
def test_something_that_is_no_file_in_a_segment_s_place_is_refused(put: Callable[[Path], None], domain: str) -> None:
    path = SHM / _names.segment_name(domain)
    try:
        with refused(domain, "", "/dev/shm"):
            put(path)
        assert not (SHM / f"test-target-{os.getpid()}").exists()
    finally:
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_something_wrong_with_a_further_segment_is_refused_too(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_names, "FIRST_BLOCKS", 2)

    def fill() -> None:
        for number in range(20):
            shlock.Lock(f"name {number}", domain=domain)

    Child(fill).result()
    path = SHM / _names.segment_name(domain, 1)
    os.truncate(path, 100)
    with pytest.raises(shlock.SegmentError, match="truncated") as error:
        shlock.Lock("y", domain=domain)
    assert error.value.segment == path.name
    assert path.stat().st_size == 100


def test_a_segment_that_is_never_quite_removed_gives_an_error_and_no_hang(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_segment, "REMOVAL_TIMEOUT", 0.2)
    run("import sys, shlock; shlock.Lock('x', domain=sys.argv[1])", domain)
    descriptor = os.open(SHM / _names.segment_name(domain), os.O_RDWR)
    try:
        assert _sys.SYSTEM.lock_byte(descriptor, _segment.BYTE_IN_USE, shared=False)
        with pytest.raises(shlock.SegmentError, match="does not go on"):
            shlock.Lock("x", domain=domain)
    finally:
        os.close(descriptor)


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_no_memory_is_an_oserror_and_leaves_nothing(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    monkeypatch.setattr("shlock._anonymous._own", None)
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        shlock.Lock()
    with pytest.raises(OSError, match="No space left"):
        shlock.Lock("x", domain=domain)
    assert not (SHM / _names.segment_name(domain)).exists()
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)


@needs_root
@pytest.mark.parametrize("pages_free", [0, 3, 40])
def test_a_full_dev_shm_is_an_oserror_when_a_segment_is_made_and_no_sigbus_later(pages_free: int, domain: str) -> None:
    source = (
        "import os, sys, shlock\n"
        "size = os.statvfs('/dev/shm').f_bavail * 4096 - int(sys.argv[1]) * 4096\n"
        "with open('/dev/shm/filler', 'wb') as file:\n"
        "    os.posix_fallocate(file.fileno(), 0, size)\n"
        "made, errors = [], 0\n"
        "for name in [None, *map(str, range(3000))]:\n"
        "    try:\n"
        "        made.append(shlock.Lock(name))\n"
        "        with made[-1]: made[-1].acquire(timeout=0.001) if len(made) % 100 == 0 else None\n"
        "    except OSError as error:\n"
        "        assert error.errno == 28, error\n"
        "        errors += 1\n"
        "for lock in made:\n"
        "    with lock: pass\n"
        "print(len(made), errors)\n"
    )
    script = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, source, str(pages_free)],
        capture_output=True,
        text=True,
        env=program_environment(),
        timeout=3 * PATIENCE,
        check=False,
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    made, errors = map(int, done.stdout.split())
    assert errors > 0
    assert made + errors == 3001


# -- nothing left behind --------------------------------------------------------------------------------------------------

FAMILY = """
import multiprocessing, os, signal, sys, time
import shlock

def wait(lock, queue, barrier):
    queue.put((os.getpid(), lock._block.arena.identity))
    with lock:
        barrier.wait()

if __name__ == "__main__":
    ctx = shlock.get_context(sys.argv[1])
    lock, queue, barrier = ctx.Lock(), ctx.SimpleQueue(), ctx.Barrier(3)
    lock.acquire()
    children = [ctx.Process(target=wait, args=(lock, queue, barrier)) for _ in range(3)]
    for child in children:
        child.start()
    found = [queue.get() for _ in children]
    while len(lock.waiters) < 3:
        time.sleep(0.01)
    print(os.getpid(), *(pid for pid, _ in found), *{identity for _, identity in found}, flush=True)
    signal.pause()
"""


@pytest.fixture
def family(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[list[int], int]]:
    """A program whose three children wait for its anonymous lock: the pids, the parent's first, and the arena."""
    path = tmp_path / "family.py"
    path.write_text(FAMILY)
    process = subprocess.Popen(
        [sys.executable, str(path), request.param], stdout=subprocess.PIPE, text=True, env=program_environment()
    )
    try:
        *pids, identity = map(int, process.stdout.readline().split())
        assert len(pids) == 4
        yield pids, identity
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("family", ["fork", "spawn", "forkserver"], indirect=True)
@pytest.mark.parametrize("order", ["parent first", "children first", "at once"])
def test_nothing_is_left_after_sigkill_of_all_processes_of_an_anonymous_lock(family: tuple[list[int], int], order: str) -> None:
    pids, identity = family
    parent, *children = pids
    assert semaphores_of(identity)
    for pid in {"parent first": pids, "children first": [*children, parent], "at once": pids}[order]:
        os.kill(pid, signal.SIGKILL)
        if order != "at once":
            eventually(lambda pid=pid: not is_there(pid))
            if pid != {"parent first": children[-1], "children first": parent}[order]:
                assert semaphores_of(identity), "removed under the living"
    eventually(lambda: not semaphores_of(identity), "the janitor removes the semaphores")


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("family", ["fork"], indirect=True)
def test_semaphores_whose_janitor_was_killed_too_are_removed_by_clean(family: tuple[list[int], int]) -> None:
    pids, identity = family
    for janitor in janitors_of(identity):
        os.kill(janitor, signal.SIGKILL)
        eventually(lambda janitor=janitor: not is_there(janitor))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_there, pids)))
    assert semaphores_of(identity)
    removed: list[str] = []

    def clean_all() -> bool:
        removed.extend(snapshot.clean())
        return not semaphores_of(identity)

    eventually(clean_all)
    assert any(f"{identity:016x}" in name for name in removed)


def janitors_of(identity: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                if f"sem.shlock-{identity:016x}-".encode() in command:
                    found.append(int(entry))
    assert found
    return found


def test_clean_leaves_the_semaphores_of_an_arena_that_is_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    look = snapshot.domains

    def look_and_make() -> list[Any]:
        found = look()
        arena = Arena.create(4)
        made.append((arena, parking_of(arena)._take()))
        return found

    orphan = SHM / f"sem.shlock-{uuid.uuid4().hex[:16]}-0"
    orphan.touch()  # or there would be nothing to look for
    monkeypatch.setattr(snapshot, "domains", look_and_make)
    snapshot.clean()
    monkeypatch.undo()
    assert not orphan.exists()
    assert made
    assert all(semaphores_of(arena.identity) for arena, _ in made)
    identities = [arena.identity for arena, _ in made]
    made.clear()
    eventually(lambda: not any(map(semaphores_of, identities)), "the janitors remove the semaphores")


@pytest.mark.parametrize("family", ["fork"], indirect=True)
def test_clean_leaves_the_semaphores_of_the_living(family: tuple[list[int], int]) -> None:
    _, identity = family
    before = semaphores_of(identity)
    snapshot.clean()
    assert semaphores_of(identity) == before


def test_a_janitor_is_started_even_if_the_process_that_was_starting_it_is_killed() -> None:
    page = Page(2)

    def user() -> None:
        lock = shlock.Lock()
        lock.acquire()
        page[1] = lock._block.arena.identity

        def dies() -> None:
            from shlock import _parking

            _parking.start_janitor = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            lock.acquire()

        first = os.fork()
        if not first:
            dies()
        os.waitpid(first, 0)
        lock.acquire(timeout=0.01)
        page[0] = 1
        signal.pause()

    child = Child(user)
    eventually(lambda: page[0])
    assert semaphores_of(page[1])
    child.kill()
    eventually(lambda: not semaphores_of(page[1]))


def test_two_processes_that_start_to_wait_at_once_leave_nothing_if_the_one_that_starts_the_janitor_dies() -> None:
    page = Page(3)

    def user() -> None:
        from shlock import _parking

        lock = shlock.Lock()
        lock.acquire()
        page[1] = lock._block.arena.identity
        start = _parking.start_janitor

        def never(*_: Any) -> int:
            page[2] = os.getpid()
            signal.pause()
            raise AssertionError

        starter = os.fork()
        if not starter:
            _parking.start_janitor = never
            lock.acquire()
        eventually(lambda: page[2])
        assert _parking.start_janitor is start
        lock.acquire(timeout=0.01)  # while the other is just starting it
        os.kill(starter, signal.SIGKILL)
        os.waitpid(starter, 0)
        page[0] = 1
        signal.pause()

    child = Child(user)
    eventually(lambda: page[0])
    assert semaphores_of(page[1])
    child.kill()
    eventually(lambda: not semaphores_of(page[1]))


def test_an_anonymous_lock_that_is_never_contended_makes_no_file_and_starts_no_process() -> None:
    def user() -> tuple[set[str], list[str]]:
        before = set(os.listdir(SHM))
        lock, semaphore, event = shlock.Lock(), shlock.Semaphore(2), shlock.Event()
        identity = lock._block.arena.identity
        for _ in range(100):
            with lock, semaphore:
                event.set()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return {name for name in set(os.listdir(SHM)) - before if f"{identity:016x}" in name}, children

    assert Child(user).result() == (set(), [])
