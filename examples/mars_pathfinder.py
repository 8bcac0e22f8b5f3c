"""Mars Pathfinder, July 1997: low holds the lock, medium hogs the processor, high waits; and the spacecraft resets itself.

All three run on one core under SCHED_FIFO, which needs root: once without medium, once with it, and once with it and priority
inheritance, as the engineers switched it on from Earth.  Prints a timeline of each, and plots them where matplotlib is.

    python mars_pathfinder.py [PICTURE.png]
"""

import mmap
import os
import sys
import time

import shlock
from shlock import snapshot

DOMAIN = "mars-pathfinder"
CORE = max(os.sched_getaffinity(0))
LOW, MEDIUM, HIGH = 10, 20, 30  # priorities of SCHED_FIFO
HOLDS, HOGS = 0.05, 1.5  # seconds of the processor that low needs inside, and that medium takes
ROUNDS = 3
WIDTH = 60

#: Moments, in nanoseconds, that the processes note for each other.
HELD, READY, WAITS, GOT, LEFT, BEGAN, ENDED, MOMENTS = range(8)
page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")


def now():
    return time.monotonic_ns()


def work(seconds):
    """Take so much time of the processor, however long that lasts."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def until(*moments):
    while not all(page[moment] for moment in moments):
        time.sleep(0.0005)


def run_as(priority, inherit, role):
    """Fork a process that opens the lock, goes to the core, takes its priority, and plays its role."""
    pid = os.fork()
    if pid == 0:
        lock = shlock.Lock("bus", domain=DOMAIN, on_abandoned="ignore", lease=30.0, inherit=inherit)
        os.sched_setaffinity(0, {CORE})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        role(lock)
        os._exit(0)
    return pid


def low(lock):
    with lock:
        page[HELD] = now()
        until(WAITS)
        work(HOLDS)
        page[LEFT] = now()


def high(lock):
    until(HELD, READY)
    page[WAITS] = now()
    with lock:
        page[GOT] = now()


def medium(lock):
    page[READY] = now()
    until(WAITS)
    page[BEGAN] = now()
    work(HOGS)
    page[ENDED] = now()


def play(with_medium, inherit):
    """One round; the moments in it, in milliseconds from when high began to wait."""
    for moment in range(MOMENTS):
        page[moment] = 0
    page[READY] = not with_medium
    roles = [(LOW, low), (HIGH, high)] + [(MEDIUM, medium)] * with_medium
    for pid in [run_as(priority, inherit, role) for priority, role in roles]:
        os.waitpid(pid, 0)
    return {moment: (page[moment] - page[WAITS]) / 1e6 for moment in range(MOMENTS) if page[moment]}


def timeline(title, moments):
    def bar(first, last, sign):
        first, last = (min(WIDTH, max(0, round(moments[moment] / HOGS / 1100 * WIDTH))) for moment in (first, last))
        return (" " * first + sign * max(1, last - first)).ljust(WIDTH)

    print(f"\n{title}: high waits {moments[GOT]:.0f} ms")
    print(f"  high    waits |{bar(WAITS, GOT, '.')}|")
    if BEGAN in moments:
        print(f"  medium   hogs |{bar(BEGAN, ENDED, '#')}|")
    print(f"  low     holds |{bar(HELD, LEFT, '=')}|")


def plot(path, stories):
    try:
        import matplotlib
    except ImportError:
        print("\nno picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(stories), 1, sharex=True, figsize=(8, 6), layout="constrained")
    for axis, (title, moments) in zip(axes, stories, strict=True):
        bars = [("low", HELD, LEFT, "holds the lock"), ("medium", BEGAN, ENDED, "hogs the core"), ("high", WAITS, GOT, "waits")]
        for (name, first, last, what), color in zip(bars, ("tab:blue", "tab:gray", "tab:red"), strict=True):
            if first in moments:
                axis.barh(name, moments[last] - moments[first], left=moments[first], color=color, label=what)
        axis.set_title(f"{title}: high waits {moments[GOT]:.0f} ms")
        axis.legend(loc="lower right")
    axes[-1].set_xlabel("ms since high began to wait")
    figure.savefig(path)
    print(f"\npicture: {path}")


def main():
    try:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, *before)
    except PermissionError:
        sys.exit("this needs SCHED_FIFO: run it as root")
    shown = (
        ("without medium", False, True),
        ("with medium, without inheritance", True, False),
        ("with medium and inheritance", True, True),
    )
    stories = []
    with shlock.Supervisor(DOMAIN):
        play(False, True)  # loads what is loaded once
        for title, with_medium, inherit in shown:
            rounds = sorted((play(with_medium, inherit) for _ in range(ROUNDS)), key=lambda moments: moments[GOT])
            stories.append((title, rounds[ROUNDS // 2]))
            timeline(*stories[-1])
    snapshot.clean(DOMAIN)
    alone, inverted, inherited = (moments[GOT] for _, moments in stories)
    print(
        f"\nhigh waits {inverted / alone:.1f} times as long as without medium; with inheritance {inherited / alone:.2f} times"
    )
    if len(sys.argv) > 1:
        plot(sys.argv[1], stories)


if __name__ == "__main__":
    main()
