"""The pictures of the benchmarks, from made-up figures: who is in them, and what they do without somebody."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib, of the extra 'benchmarks'")

from benchmarks import messages, plots
from benchmarks.peers import BASELINE, OURS
from benchmarks.recovery import FLOOR, WAITERS

PNG = b"\x89PNG\r\n\x1a\n"
NEVER = "filelock.FileLock"  # here


def made_up() -> dict[str, Any]:
    def cell(median: float, ratio: float | None) -> dict[str, Any]:
        return {"median": median, "ratio": ratio}

    waits = {
        f"{name}, {count} waiters": {"median_ns": 5e6, "first_ns": [4e6, 5e6, 9e6]} for name in (OURS,) for count in WAITERS
    }
    waits |= {f"{NEVER}, {count} waiters": {"median_ns": None, "first_ns": []} for count in WAITERS}
    sizes = [64, 1024]
    return {
        "uncontended": {
            "with": {OURS: cell(260.0, 1.1), BASELINE: cell(230.0, 1.0)},
            "acquire/release": {BASELINE: cell(100.0, 1.0)},  # ours is missing
        },
        "contended": {
            "cells": {
                f"{count} processes, {section} us": {OURS: cell(1e5, 1.2), BASELINE: cell(9e4, 1.0)}
                for count in (1, 2)
                for section in (0, 10)
            }
        },
        "recovery": {**waits, FLOOR: {"first_ns": [3e6]}},
        "messages": {
            "sizes": sizes,
            "cells": {
                f"{messages.size_text(size)}, {messages.UNPINNED}": {
                    messages.OUR_PIPE: cell(1e5, 1.0),
                    messages.PIPE: cell(9e4, 1.0),
                }
                for size in sizes
            },
        },
    }


def texts_of(figure: Any) -> str:
    import matplotlib.text

    figure.canvas.draw_idle()
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", plots.PLOTS)
def test_every_picture_is_drawn_and_names_who_is_in_it(name: str, tmp_path: Path) -> None:
    group, plot = plots.PLOTS[name]
    data = made_up()
    paths = list(plots.draw({group: data[group]}, tmp_path / "new"))
    assert [path.name for path in paths] == [f"{name}.png"]
    assert paths[0].read_bytes().startswith(PNG)
    text = texts_of(plot(data[group]))
    assert (messages.OUR_PIPE if name == "messages" else OURS) in text


def test_who_never_recovers_is_said_so() -> None:
    assert "never" in texts_of(plots.recovery(made_up()["recovery"]))


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    assert list(plots.draw({"lifecycle": {}}, tmp_path)) == []


def test_a_library_has_one_colour_and_shlock_its_own() -> None:
    ours = {plots.colour(name) for name in (OURS, "shlock.RLock", messages.OUR_QUEUE, messages.NO_COPY)}
    assert len(ours) == 1
    others = [plots.colour(name) for name in (BASELINE, "filelock.FileLock", "fasteners.InterProcessLock", "a new one")]
    assert len({*others, *ours}) == len(others) + 1
    assert plots.colour(messages.QUEUE) == plots.colour(BASELINE)


def test_pictures_are_drawn_again_from_the_figures_of_an_earlier_run(tmp_path: Path) -> None:
    document = tmp_path / "results.json"
    document.write_text(json.dumps({"groups": made_up()}))
    command = [sys.executable, "-m", "benchmarks", "--plots-from", str(document), "--output", str(tmp_path / "plots")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}.png" for name in plots.PLOTS}
