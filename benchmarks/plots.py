"""Pictures of what the groups found, from the data that ``--json`` writes: nothing is measured here.

Every library has one colour in all of them, and shlock always the same; they are those of Okabe and Ito, which colour-blind
readers can tell apart.  Variants of one library differ in the line.  Needs matplotlib, which is imported only when something
is drawn.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import messages
from .messages import size_text
from .peers import BASELINE, LOCKS, OURS
from .recovery import BOUND_S, FLOOR, WAITERS
from .rounds import percentile

DPI = 100
WIDTH = 8.0  # inches: 800 pixels
GREY = "#666666"

#: By the beginning of a contestant's name; the longest one that fits.
COLOURS = {
    "shlock": "#0072B2",
    "multiprocessing": "#222222",
    "Manager": "#999999",
    "robust mutex": "#E69F00",
    "posix_ipc": "#56B4E9",
    "filelock": "#D55E00",
    "fasteners": "#009E73",
    "shmlock": "#CC79A7",
    "faster_fifo": "#D55E00",  # in other pictures than filelock
}
MARKERS = {OURS: "o", BASELINE: "s"}
OTHER_MARKERS = "^vD<>P"
#: Line and marker of what carries messages; the others are solid.
STYLES = {
    messages.OUR_PIPE_MANY: ("--", "o"),
    messages.ONE_COPY: (":", "D"),
    messages.FILLED: (":", "s"),
    messages.NO_COPY: (":", "^"),
    messages.OUR_QUEUE: ("-", "v"),
    messages.OUR_QUEUE_MANY: ("--", "v"),
    messages.SIMPLE_QUEUE: ("--", "s"),
    messages.QUEUE: ("-", "v"),
    messages.FASTER: ("-", "v"),
    messages.FASTER_MANY: ("--", "v"),
    messages.MEMCPY: (":", ""),
}


def why_not() -> str | None:
    """Why nothing can be drawn, or None."""
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        return "matplotlib is not installed"
    except Exception as error:
        return f"matplotlib cannot be imported: {error}"
    return None


def colour(name: str) -> str:
    """Of a contestant."""
    fitting = [beginning for beginning in COLOURS if name.startswith(beginning)]
    return COLOURS[max(fitting, key=len)] if fitting else GREY


def _marker(name: str) -> str:
    names = [peer.name for peer in LOCKS if peer.name not in MARKERS]
    return MARKERS.get(name) or OTHER_MARKERS[names.index(name) if name in names else -1]


def _figure(title: str, height: float, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=10)
    return figure, axes


def _text(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _plain_numbers(axis: Any) -> None:
    """10 and not a power of ten, as far as there is room for it."""
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axis.set_minor_formatter(lambda value, _: "")


def uncontended(data: dict[str, Any]) -> Any:
    """Bars: what a lock costs that nobody else wants, as a multiple of multiprocessing.Lock's."""
    usages = [usage for usage in ("with", "acquire/release") if usage in data]
    names = [name for name, cell in data[usages[0]].items() if cell.get("ratio")]
    names.sort(key=lambda name: -data[usages[0]][name]["ratio"])
    figure, axes = _figure(
        "Uncontended: time relative to multiprocessing.Lock", 1.2 + 0.32 * len(names), len(usages), sharey=True
    )
    for axis, usage in zip(axes, usages, strict=True):
        ratios = [data[usage].get(name, {}).get("ratio") or math.nan for name in names]
        axis.barh(names, ratios, color=[colour(name) for name in names], height=0.7)
        for place, ratio in enumerate(ratios):
            if ratio == ratio:
                axis.annotate(_text(ratio), (max(ratio, 1), place), (3, 0), textcoords="offset points", va="center", fontsize=9)
        axis.axvline(1, color=GREY, linewidth=1)
        axis.set_xscale("log")
        axis.margins(x=0.2)
        _plain_numbers(axis.xaxis)
        base = data[usage].get(BASELINE, {}).get("median")
        axis.set_title("with lock:" if usage == "with" else "acquire() and release()", fontsize=10)
        axis.set_xlabel(f"times (log), 1 = {base:,.0f} ns" if base else "times (log)")
    return figure


def contended(data: dict[str, Any]) -> Any:
    """Lines: throughput relative to multiprocessing.Lock, by the number of processes; one panel for each section."""
    cells = {
        (processes, section): cell
        for place, cell in data["cells"].items()
        for processes, section in [tuple(int(part.split()[0]) for part in place.split(", "))]
    }
    sections = sorted({section for _, section in cells})
    counts = sorted({count for count, _ in cells})
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell if name != BASELINE))
    title = "Contended: throughput relative to multiprocessing.Lock, larger is better"
    figure, axes = _figure(title, 4.2, len(sections), sharey=True)
    for axis, section in zip(axes, sections, strict=True):
        for name in sorted(names, key=lambda name: name == OURS):  # shlock on top
            points = [(x, r) for x in counts if (r := cells.get((x, section), {}).get(name, {}).get("ratio"))]
            width = 2.2 if name == OURS else 1.2
            axis.plot(*_columns(points), color=colour(name), marker=_marker(name), markersize=5, linewidth=width, label=name)
        axis.axhline(1, color=colour(BASELINE), linewidth=1)
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_xlabel("processes")
        axis.set_title(f"section of {section} µs", fontsize=10)
    _plain_numbers(axes[0].yaxis)
    axes[0].set_ylabel("times as many passages (log)")
    _legend(figure, axes)
    return figure


def recovery(data: dict[str, Any]) -> Any:
    """Points and lines to the longest: from the owner's SIGKILL to a waiter inside, in ms."""
    cells = {
        (name, count): cell
        for count in WAITERS
        for place, cell in data.items()
        if (name := place.removesuffix(f", {count} waiters")) != place
    }
    names = list(dict.fromkeys(name for name, _ in cells))
    medians = {name: cells.get((name, WAITERS[0]), {}).get("median_ns") or math.inf for name in names}
    names.sort(key=lambda name: (-medians[name], name == BASELINE))
    figure, (axis,) = _figure("Recovery: from the owner's SIGKILL to a waiter inside", 1.4 + 0.42 * len(names))
    never = BOUND_S * 1e3
    for place, name in enumerate(names):
        for shift, count in zip((0.14, -0.14), WAITERS, strict=True):
            times = [ns / 1e6 for ns in cells.get((name, count), {}).get("first_ns", [])]
            if times:
                middle, y = percentile(times, 50), place + shift
                axis.hlines(y, min(times), max(times), color=colour(name), linewidth=1.5)
                face = colour(name) if count == WAITERS[0] else "white"
                axis.plot(middle, y, marker="o", markersize=7, color=colour(name), markerfacecolor=face, linestyle="")
        if not any(cells.get((name, count), {}).get("first_ns") for count in WAITERS):
            axis.annotate("never", (never, place), color=colour(name), ha="right", va="center", fontsize=10)
    floor = data.get(FLOOR, {}).get("first_ns")
    if floor:
        least = percentile(floor, 50) / 1e6
        axis.axvline(least, color=GREY, linewidth=1, linestyle=":")
        note = "to take a process apart"
        axis.annotate(note, (least, len(names) - 0.45), (3, 0), textcoords="offset points", fontsize=9, color=GREY)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.2)
    axis.set_xscale("log")
    axis.set_xlim(right=never * 1.2)
    _plain_numbers(axis.xaxis)
    axis.set_xlabel(f"ms (log); median, shortest and longest; filled: {WAITERS[0]} waiter, hollow: {WAITERS[1]}")
    return figure


def messages_per_second(data: dict[str, Any]) -> Any:
    """Lines: messages per second by size, unpinned."""
    sizes = data["sizes"]
    cells = {size: data["cells"][f"{size_text(size)}, {messages.UNPINNED}"] for size in sizes}
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    figure, (axis,) = _figure("Messages from one process to another", 5.2)
    for name in names:
        points = [(size, rate) for size in sizes if (rate := cells[size].get(name, {}).get("median"))]
        line, marker = STYLES.get(name, ("-", "o"))
        width = 2 if name.startswith("shlock") else 1.3
        axis.plot(*_columns(points), line, color=colour(name), marker=marker or None, markersize=5, linewidth=width, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [size_text(size) for size in sizes])
    axis.set_yscale("log")
    _plain_numbers(axis.yaxis)
    axis.set_xlabel("size of a message (log)")
    axis.set_ylabel("messages per second (log)")
    _legend(figure, [axis])
    return figure


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _legend(figure: Any, axes: list[Any]) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10, frameon=False)


#: By file name: the group whose data are drawn, and how.
PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "uncontended": ("uncontended", uncontended),
    "contended": ("contended", contended),
    "recovery": ("recovery", recovery),
    "messages": ("messages", messages_per_second),
}


def draw(groups: dict[str, Any], folder: Path) -> Iterable[Path]:
    """Draw what there are data for, into files of that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (group, plot) in PLOTS.items():
        if group in groups:
            path = folder / f"{name}.png"
            plot(groups[group]).savefig(path, metadata={"Software": None})
            yield path
