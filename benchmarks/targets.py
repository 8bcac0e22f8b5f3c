"""What shlock promises of its figures, and whether this run keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import messages, revocation, scale
from .frames import COPYING, READING
from .messages import size_text
from .peers import BASELINE, OURS
from .recovery import WAITERS
from .report import NO_FIGURE, Table, number
from .supervised import OPEN_LOCKS

WITH_RATIO = 1.0
CALLS_RATIO = 2.5
UNBIASED_RATIO = 2.8
REVOCATION_US = 60.0
EXCHANGE_RATIO = 1.1
CONTENDED_RATIO = 1.0
CONTENDED_FROM_US = 2
RECOVERY_MEDIAN_MS = 15.0
LIFECYCLE_RATIO = 1.0
FAIRNESS_FACTOR = 2.0
LONGEST_WAIT = 0.5
KEPT_BY_BOUND = 0.9
LEASED_RATIO = 1.5
FLOOR_FACTOR = 2.0
IDLE_PER_CENT = 0.5
GRANTS_PER_SECOND = 1000
FRAMES_RATIO = 0.9
ENFORCED_WITHIN_MS = 100
SCALE_RATIO = 2.0
SCALE_BYTES = 256
SCALE_PS_S = 1.0
MESSAGES = (  # bytes of a message, who, over whom, at least so many times as many messages per second
    (messages.KIB, messages.OUR_PIPE, messages.PIPE, 2.5),
    (messages.KIB, messages.OUR_QUEUE, messages.QUEUE, 4.0),
    (messages.KIB, messages.OUR_QUEUE_MANY, messages.QUEUE, 15.0),
    (64 * messages.KIB, messages.OUR_PIPE, messages.PIPE, 5.0),
    (messages.MIB, messages.ONE_COPY, messages.MEMCPY, 0.8),
    (messages.MIB, messages.NO_COPY, messages.MEMCPY, 1.0),
)
FASTER_FIFO = ((messages.OUR_QUEUE, messages.FASTER), (messages.OUR_QUEUE_MANY, messages.FASTER_MANY))


def _uncontended(data: dict[str, Any]) -> list[tuple[str, float, bool]]:
    rows = []
    for lock, usage, most in (
        *((lock, "with", WITH_RATIO) for lock in (OURS, "shlock.RLock")),
        *((lock, "acquire/release", CALLS_RATIO) for lock in (OURS, "shlock.RLock")),
        (f"{OURS}, never biased", "with", UNBIASED_RATIO),
    ):
        found = data[usage][lock]["ratio"]
        rows.append((f"{lock}, {usage}: at most {most} times {BASELINE}'s", found, found <= most))
    return rows


def _revocation(data: dict[str, Any]) -> list[tuple[str, float, bool]]:
    us, worst = data[revocation.BIASED]["median"] / 1e3, data[revocation.ADAPTIVE]["ratio"]
    return [
        (f"a bias is revoked in less than {REVOCATION_US:g} us", us, us < REVOCATION_US),
        (
            f"the worst exchange costs at most {EXCHANGE_RATIO} times that of a lock that is never biased",
            worst,
            worst <= EXCHANGE_RATIO,
        ),
    ]


def _contended(data: dict[str, Any]) -> tuple[str, float, bool]:
    """The worst cell with several processes and a long enough section."""
    found = []
    for place, cell in data["cells"].items():
        processes, section = (int(part.split()[0]) for part in place.split(", "))
        if processes > 1 and section >= CONTENDED_FROM_US:
            found.append((cell[OURS]["ratio"], place))
    worst, place = min(found)
    text = f"contended, section of {CONTENDED_FROM_US} us or more: throughput at least {CONTENDED_RATIO} times"
    return f"{text} (worst cell: {place})", worst, worst >= CONTENDED_RATIO


def _recovery(data: dict[str, Any]) -> tuple[str, float, bool]:
    worst = max(data[f"{OURS}, {count} waiters"]["median_ns"] for count in WAITERS) / 1e6
    return f"recovery without supervisor: median under {RECOVERY_MEDIAN_MS:g} ms", worst, worst < RECOVERY_MEDIAN_MS


def _lifecycle(data: dict[str, Any]) -> tuple[str, float, bool]:
    found = data["drop"][OURS]["ratio"]
    return f"make and drop at most {LIFECYCLE_RATIO} times {BASELINE}'s", found, found <= LIFECYCLE_RATIO


def _fairness(data: dict[str, Any]) -> list[tuple[str, float, bool]]:
    found = []
    for section, locks in data["sections"].items():
        shares = locks[OURS]["shares"]
        worst = max(shares[-1], 1 / shares[0] if shares[0] else float("inf"))
        waits = locks[OURS]["longest_wait_ns"] / locks[BASELINE]["longest_wait_ns"]
        kept = locks["kept by the bound"]
        where = f"section of {section}"
        found += [
            (f"{where}: no share further than a factor of {FAIRNESS_FACTOR} from the mean", worst, worst <= FAIRNESS_FACTOR),
            (f"{where}: the longest wait at most {LONGEST_WAIT} times {BASELINE}'s", waits, waits <= LONGEST_WAIT),
            (f"{where}: at least {KEPT_BY_BOUND} of the rate without a bound on waiting", kept, kept >= KEPT_BY_BOUND),
        ]
    return found


def _supervised(data: dict[str, Any]) -> list[tuple[str, float, bool]]:
    cost, idle = data["cost"]["acquire/release"], data["idle"]
    few, many = (idle[str(count)]["share"] * 100 for count in OPEN_LOCKS)
    overrun, death = (data["after"][name]["times_floor"] for name in ("overrun", "death"))
    enforced = max(data["restart"]["then enforced"]["first_ns"]) / 1e6
    return [
        *(
            (
                f"leased acquire/release at most {LEASED_RATIO} times that of a lock that is {which}",
                ratio,
                ratio <= LEASED_RATIO,
            )
            for which, ratio in cost["ratios"].items()
        ),
        (f"overrun: heir inside within {FLOOR_FACTOR} times the floor", overrun, overrun <= FLOOR_FACTOR),
        (f"death, supervised: heir inside within {FLOOR_FACTOR} times the floor", death, death <= FLOOR_FACTOR),
        (f"next supervisor: enforces within {ENFORCED_WITHIN_MS} ms (longest)", enforced, enforced <= ENFORCED_WITHIN_MS),
        (f"idle with {OPEN_LOCKS[0]:,} leased locks: below {IDLE_PER_CENT} % of a core", few, few < IDLE_PER_CENT),
        (f"idle with {OPEN_LOCKS[1]:,}: linear or better, % of a core", many, many < IDLE_PER_CENT * 10),
        *(
            (f"at least {GRANTS_PER_SECOND:,} contracts per second, {asking} asking", *_grants(found))
            for asking, found in data["grants"].items()
        ),
    ]


def _grants(found: dict[str, Any]) -> tuple[float, bool]:
    rate = found["median"] or 0.0
    return rate, rate >= GRANTS_PER_SECOND


def _messages(data: dict[str, Any]) -> list[tuple[str, float | None, bool]]:
    """Unpinned.  faster_fifo is a target only where it took part; of ourselves who is missing has not kept it."""
    found = []
    for size, ours, other, least in MESSAGES:
        measured = _ratio_of_messages(data["cells"], size, ours, other)
        kept = measured is not None and measured >= least
        found.append((f"messages of {size_text(size)}: {ours} at least {least:g} times {other}", measured, kept))
    for ours, other in FASTER_FIFO:
        if other in data["missing"]:
            continue
        ratios = {size: _ratio_of_messages(data["cells"], size, ours, other) for size in data["sizes"]}
        known = {ratio: size for size, ratio in ratios.items() if ratio is not None}
        worst = min(known, default=None)
        where = f" (worst: {size_text(known[worst])})" if worst is not None else ""
        kept = worst is not None and worst > 1 and len(known) == len(ratios)
        found.append((f"messages: {ours} faster than {other} at every size{where}", worst, kept))
    return found


def _ratio_of_messages(cells: dict[str, Any], size: int, ours: str, other: str) -> float | None:
    found: float | None = cells[f"{size_text(size)}, {messages.UNPINNED}"].get(ours, {"ratios": {}})["ratios"].get(other)
    return found


def _scale(data: dict[str, Any]) -> list[tuple[str, float, bool]]:
    flat = {place: cell["ratio"] for place, cell in data["cells"].items() if not place.startswith("ps")}
    worst = max(flat, key=flat.__getitem__)
    ps = data["cells"][f"ps, {scale.LARGE}"]["median"] / 1e9
    text = (
        f"{data['names']:,} locks, {data['processes']:,} processes and waiters: an operation costs at most {SCALE_RATIO} times"
    )
    return [
        (f"{text} (worst: {worst})", flat[worst], flat[worst] <= SCALE_RATIO),
        (f"less than {SCALE_BYTES} bytes for each lock", data["bytes_per_lock"], data["bytes_per_lock"] < SCALE_BYTES),
        (f"shlock ps in less than {SCALE_PS_S:g} s", ps, ps < SCALE_PS_S),
    ]


def _frames(data: dict[str, Any]) -> tuple[str, float, bool]:
    found = data[READING]["ratio"]
    text = f"a writer beside {READING} keeps at least {FRAMES_RATIO} times its rate beside {COPYING}"
    return text, found, found >= FRAMES_RATIO


_CHECKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "uncontended": _uncontended,
    "revocation": _revocation,
    "contended": _contended,
    "recovery": _recovery,
    "lifecycle": _lifecycle,
    "fairness": _fairness,
    "supervised": _supervised,
    "messages": _messages,
    "frames": _frames,
    "scale": _scale,
}


def table(groups: dict[str, dict[str, object]]) -> Table:
    """One row per target whose group has run."""
    rows = []
    for group, data in groups.items():
        try:
            found = _CHECKS[group](data)
        except (KeyError, TypeError, ValueError):
            rows.append([f"{group}: no figure for {OURS}", NO_FIGURE, "no"])
            continue
        for text, measured, kept in found if isinstance(found, list) else [found]:
            rows.append([text, NO_FIGURE if measured is None else number(measured), "yes" if kept else "no"])
    return Table("Targets", ["target", "measured", "kept"], rows)
