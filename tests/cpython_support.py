"""CPython's own tests of multiprocessing, run on another context; and the watchdog of the tests that could hang.

Promises nothing beyond the classes in `CLASSES`, in their "processes" flavour: threads and managers are not ours.

How the substitution works. CPython keeps its tests in `test._test_multiprocessing` and lets a module per start method
make test cases of them. They reach the primitives in three ways, and all three must lead to the context under test:

    self.Lock(), cls.Process()  attributes of `ProcessesMixin`             replaced, on a private copy of the mixin
    multiprocessing.Queue()     the global name, inside the tests' module  a `_Substitute`, in a private copy of the module
    sharedctypes.Value()        the real module's default context          set to our context while the tests run

The private copy is made by running CPython's code inside the test module itself: a spawned child imports that module by
its ordinary name, so it finds every function and class that was pickled, and finds it substituted in the same way.

A `_Tripwire` in place of `_multiprocessing.SemLock` fails whatever still makes one of stock's semaphores.

With SHLOCK_TEST_CONTEXTS=stock in the environment the same harness runs the same tests on multiprocessing's own
contexts: whatever passes there must pass without it.
"""

import _multiprocessing  # type: ignore[import-not-found]
import contextlib
import faulthandler
import functools
import gc
import importlib.util
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.synchronize
import os
import signal
import sys
import threading
import types
import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import Any, ClassVar

CLASSES = (
    "_TestLock", "_TestSemaphore", "_TestCondition", "_TestEvent", "_TestBarrier",
    "_TestQueue", "TestSimpleQueue", "_TestConnection", "_TestPoll",
    "_TestValue", "_TestArray", "_TestSharedCTypes",
    "_TestPool", "_TestPoolWorkerErrors", "_TestPoolWorkerLifetime",
    "_TestProcess", "TestInitializers",
)  # fmt: skip

#: What concerns stock's way of doing it as such, and why.
LEFT_OUT = {
    ("_TestQueue", "test_queue_feeder_donot_stop_onexc"): "there is no feeder thread: put() itself raises what is wrong",
    ("TestSimpleQueue", "test_closed"): "it looks at the two ends of a pipe, which is not there",
    # A connection through shared memory has no file descriptor that bytes, or other descriptors, could be sent through.
    ("_TestConnection", "test_fd_transfer"): "send_handle() sends a descriptor through the connection's socket",
    ("_TestConnection", "test_large_fd_transfer"): "as test_fd_transfer",
    ("_TestConnection", "test_missing_fd_transfer"): "it writes to the connection's descriptor",
}

STOCK = os.environ.get("SHLOCK_TEST_CONTEXTS", "shlock") == "stock"

PATIENCE = 240.0
"""Seconds that one test may take. The slowest takes about 5 on an idle machine, and 10 times that on a busy one."""


def context(method: str) -> BaseContext:
    """Return the context under test for a start method."""
    if STOCK:
        return multiprocessing.get_context(method)
    import shlock

    ours: BaseContext = shlock.get_context(method)
    return ours


# The watchdog


def _descendants() -> list[int]:
    """Return the pids of this process's children, their children and so on."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as stat:
                # The name, in parentheses, may itself hold blanks and parentheses.
                parent = int(stat.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found = children.get(os.getpid(), [])
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, []))
    return found


def _give_up() -> None:
    # SIGABRT and not SIGKILL: faulthandler, which pytest enables on the real standard error, then shows where every
    # thread was. Forked children have inherited it.
    # The resource tracker is left alone: it cleans up after us.
    for pid in set(_descendants()) - {multiprocessing.resource_tracker._resource_tracker._pid}:  # type: ignore[attr-defined]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
    os.abort()


class _QuietTimer(threading.Timer):
    """A timer whose thread takes no signals: one that arrives there does not interrupt what the main thread waits for."""

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        super().run()


@contextlib.contextmanager
def watchdog(seconds: float = PATIENCE) -> Iterator[None]:
    """Abort this process and its descendants, with tracebacks, if the block takes longer than `seconds`."""
    if not faulthandler.is_enabled():
        faulthandler.enable()
    timer = _QuietTimer(seconds, _give_up)
    timer.daemon = True
    timer.start()
    # The timer needs the interpreter's lock. This one does not, should something hang while holding that.
    faulthandler.dump_traceback_later(seconds + 20, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        timer.join()  # or it would be reported as a dangling thread


# The substitution


class _Substitute(types.ModuleType):
    """`multiprocessing` as CPython's tests see it: a context's public names, and the real module's everything else."""

    def __init__(self, ctx: BaseContext) -> None:
        super().__init__("multiprocessing")
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx if name in multiprocessing.__all__ else multiprocessing, name)


class StockSemaphoreError(AssertionError):
    """One of multiprocessing's own semaphores was made where only shlock's should be."""


_SemLock: Any = _multiprocessing.SemLock


class _Tripwire(_multiprocessing.SemLock):  # type: ignore[misc]
    """Stands in for the C type under every stock primitive, and refuses to be made."""

    made: ClassVar[int] = 0

    def __new__(cls, *args: object) -> "_Tripwire":
        # Counted as well as raised: a thread's exception might go unseen.
        _Tripwire.made += 1
        raise StockSemaphoreError

    @classmethod
    def _rebuild(cls, handle: int, kind: int, maxvalue: int, name: str | None) -> Any:
        # A stock one has a name. What has none is a word of shlock's own: see its `_atomic.make_door`.
        return cls() if name is not None else _SemLock._rebuild(handle, kind, maxvalue, name)


class _Installation:
    """The substitution's global half: the real module's default context, and the tripwire."""

    def __init__(self, ctx: BaseContext) -> None:
        self._ctx = ctx
        self._default: Any = multiprocessing.context._default_context
        self._undo = contextlib.ExitStack()

    def install(self) -> None:
        self._set(self._default, "_actual_context", self._ctx)
        # With this every child sets its default context, whatever it was in its parent.
        self._set(multiprocessing.context, "_force_start_method", self._force_start_method)
        if not STOCK:
            self._set(_multiprocessing, "SemLock", _Tripwire)

    def remove(self) -> None:
        self._undo.close()

    def _force_start_method(self, method: str) -> None:
        assert method == self._ctx.get_start_method()
        self._default._actual_context = self._ctx

    def _set(self, target: object, name: str, value: object) -> None:
        self._undo.callback(setattr, target, name, getattr(target, name))
        setattr(target, name, value)


class _Watched(unittest.TestCase):
    """Puts the watchdog around every test and class fixture, and makes a warning about a dead owner an error."""

    def run(self, result: Any = None) -> Any:
        with watchdog(), warnings.catch_warnings():
            if not STOCK:
                import shlock

                warnings.simplefilter("error", shlock.AbandonedWarning)
            return super().run(result)

    @classmethod
    def setUpClass(cls) -> None:
        with watchdog():
            super().setUpClass()

    @classmethod
    def tearDownClass(cls) -> None:
        with watchdog():
            super().tearDownClass()


def _imports_ours(function: Callable[..., object], method: str) -> types.FunctionType:
    """Return a copy of a test function whose inner script takes Pool from the context under test."""
    assert isinstance(function, types.FunctionType)
    old = "from multiprocessing import Pool"
    # The script runs isolated, without PYTHONPATH.
    new = f"import sys; sys.path[:] = {sys.path!r}; import cpython_support; Pool = cpython_support.context({method!r}).Pool"
    consts = function.__code__.co_consts
    assert sum(isinstance(const, str) and old in const for const in consts) == 1
    changed = tuple(const.replace(old, new) if isinstance(const, str) else const for const in consts)
    return types.FunctionType(
        function.__code__.replace(co_consts=changed), function.__globals__, function.__name__, function.__defaults__
    )


def _without_fileno(function: Callable[..., object]) -> Callable[..., object]:
    """The test without its one line about fileno(), which a connection through shared memory does not have."""

    @functools.wraps(function)
    def test(self: Any) -> None:
        with unittest.mock.patch("shlock.Connection.fileno", lambda connection: 0):
            function(self)

    return test


def _origins(case: Any) -> dict[str, str]:
    """Return, for each way a test reaches a primitive, the module that defines what it gets."""
    inside = case.multiprocessing
    queue = case.Queue()
    joinable = inside.JoinableQueue()
    simple = inside.SimpleQueue()
    shared = case.sharedctypes_value("i")
    try:
        reached = {
            **{name: getattr(case, name)() for name in _PLAIN},
            **{"multiprocessing." + name: getattr(inside, name)() for name in _PLAIN},
            "Barrier": case.Barrier(2),
            "multiprocessing.Barrier": inside.Barrier(2),
            "Condition._lock": case.Condition()._lock,
            "Queue": queue,
            "JoinableQueue": joinable,
            "SimpleQueue": simple,
            "Pipe": case.Pipe()[0],
            "Value": case.Value("i").get_lock(),
            "Array": case.Array("i", 2).get_lock(),
            "sharedctypes.Value": shared.get_lock(),
            "default Queue._rlock": multiprocessing.Queue()._rlock,  # type: ignore[attr-defined]
        }
        return {how: type(primitive).__module__ for how, primitive in reached.items()}
    finally:
        simple.close()
        queue.close()
        joinable.close()


_PLAIN = ("Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition", "Event")


class _TestSubstitution:
    """What makes the other classes worth anything: they really test the context under test, in children, too."""

    @classmethod
    def _send_origins(cls, connection: Any) -> None:
        connection.send(_origins(cls))

    def _check(self: Any, origins: dict[str, str]) -> None:
        for how, module in origins.items():
            ours = module.split(".")[0] == "shlock"
            stock = module in ("multiprocessing.synchronize", "multiprocessing.queues", "multiprocessing.connection")
            self.assertTrue(stock if STOCK else ours, f"{how} is from {module}")

    def test_every_way_to_a_primitive_leads_to_the_context_under_test(self: Any) -> None:
        self._check(_origins(self))

    def test_every_way_to_a_primitive_leads_there_in_a_child(self: Any) -> None:
        reader, writer = self.Pipe(duplex=False)
        with reader:
            process = self.Process(target=self._send_origins, args=(writer,))
            process.start()
            writer.close()
            self._check(reader.recv())
            process.join()
        self.assertEqual(process.exitcode, 0)

    def test_a_pools_queues_use_the_context_under_test(self: Any) -> None:
        with self.multiprocessing.Pool(1) as pool:
            self._check(
                {
                    "Pool._inqueue": type(pool._inqueue._rlock).__module__,
                    "Pool._outqueue": type(pool._outqueue._wlock).__module__,
                }
            )
        pool.join()

    @unittest.skipIf(STOCK, "stock is what is being tested")
    def test_the_tripwire_catches_a_stock_lock(self: Any) -> None:
        before = _Tripwire.made
        with self.assertRaises(StockSemaphoreError):
            multiprocessing.synchronize.Lock(ctx=multiprocessing.get_context("fork"))
        self.assertEqual(_Tripwire.made, before + 1)
        _Tripwire.made = before


def load(namespace: dict[str, Any], method: str) -> None:
    """Make `namespace`, a test module's globals, a private copy of CPython's test module, on `context(method)`.

    Leaves only the test cases made from `CLASSES` in it, named as CPython names them, and setUpModule and tearDownModule.
    Raises unittest.SkipTest where the interpreter comes without its tests.
    """
    try:
        spec = importlib.util.find_spec("test._test_multiprocessing")
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise unittest.SkipTest("this interpreter comes without test._test_multiprocessing")
    # The loader's get_code() takes the cached bytecode: each spawned child comes through here.
    exec(spec.loader.get_code(spec.name), namespace)  # type: ignore[union-attr]

    ctx = context(method)
    substitute = _Substitute(ctx)
    namespace["multiprocessing"] = substitute
    mixin = namespace["ProcessesMixin"]
    for name in vars(mixin).keys() & set(multiprocessing.__all__):
        setattr(mixin, name, staticmethod(getattr(ctx, name)))
    _TestSubstitutionHere = type(
        "_TestSubstitution",
        (_TestSubstitution,),
        {"multiprocessing": substitute, "sharedctypes_value": staticmethod(namespace["Value"])},
    )
    lifetime = namespace["_TestPoolWorkerLifetime"]
    script_test = "test_worker_finalization_via_atexit_handler_of_multiprocessing"
    setattr(lifetime, script_test, _imports_ours(getattr(lifetime, script_test), method))
    if not STOCK:
        connection = namespace["_TestConnection"]
        connection.test_connection = _without_fileno(connection.test_connection)

    if not STOCK:
        for (name, test), reason in LEFT_OUT.items():
            setattr(namespace[name], test, unittest.skip(reason)(getattr(namespace[name], test)))
    bases = {name: namespace[name] for name in CLASSES} | {"_TestSubstitution": _TestSubstitutionHere}
    for name, value in list(namespace.items()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            del namespace[name]
    for name, base in bases.items():
        parents: tuple[type, ...] = (_Watched, base)
        if not issubclass(base, unittest.TestCase):
            name = "WithProcesses" + name.removeprefix("_")
            parents = (_Watched, base, mixin, unittest.TestCase)
        namespace[name] = type(name, parents, {"__module__": namespace["__name__"], "__qualname__": name})

    installation = _Installation(ctx)
    interrupt: list[Any] = []

    def setUpModule() -> None:
        installation.install()
        # `test_wait_result` sends SIGINT to this process and expects KeyboardInterrupt.
        interrupt.append(signal.signal(signal.SIGINT, signal.default_int_handler))
        # As CPython does: otherwise each of the 200 children of one test imports all of this anew.
        multiprocessing.set_forkserver_preload(["test._test_multiprocessing", *([] if STOCK else ["shlock"])])

    def tearDownModule() -> None:
        multiprocessing.set_forkserver_preload(["__main__"])
        signal.signal(signal.SIGINT, interrupt.pop())
        installation.remove()
        with watchdog():
            gc.collect()  # Pools are reference cycles.
            left = multiprocessing.active_children()
            if not left:
                # It waits for the children that it knows, so not before there are none.
                multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
        assert not left, f"left behind: {left}"
        assert not _Tripwire.made, "stock semaphores were made, unseen"

    # A spawned child has a default context of its own. While it unpickles what to do, it does not know its parent yet.
    inheriting = getattr(multiprocessing.current_process(), "_inheriting", False)
    if inheriting or multiprocessing.parent_process() is not None:
        installation.install()
    else:
        namespace["setUpModule"] = setUpModule
        namespace["tearDownModule"] = tearDownModule
