"""What the demo says at the end."""

from __future__ import annotations

from .folder import LARGEST_FILE
from .job import Outcome
from .table import Phase, Word

__all__ = ["report"]

_SHOWN_PROBLEMS = 10


def report(outcome: Outcome) -> str:
    """The final report in a few lines; the last one is PASS or FAIL."""
    settings, listing, statistics = outcome.settings, outcome.listing, outcome.statistics
    killing = f"{settings.kills_per_second:g} kills a second (seed {settings.seed})" if settings.chaos else "no kills"
    lines = [
        f"{settings.folder}: {len(listing.files):,} files, {listing.size / 1e6:,.1f} MB",
        f"{settings.lock}.Lock, {settings.workers} workers, {killing}",
        f"passes      {outcome.passes:,} in {outcome.seconds:.1f} s, {statistics[Word.SECTIONS]:,} critical sections",
    ]
    if settings.chaos:
        inside = {phase: count for phase, count in sorted(outcome.kills_by_phase.items()) if phase.inside}
        where = ", ".join(f"{count} {phase.name.lower()}" for phase, count in inside.items())
        lines.append(
            f"kills       {len(outcome.deaths):,}, {outcome.kills_inside:,} of them inside the critical section"
            + (f" ({where})" if where else "")
        )
        kills = outcome.kills_by_phase
        lines.append(
            f"            {kills[Phase.ENTERING]:,} more while waiting for the lock or just taking it,"
            f" {kills[Phase.HASHING]:,} while receiving a file,"
        )
        gathering, reading = kills[Phase.GATHERING], kills[Phase.READING]
        lines.append(f"            {gathering:,} while writing to the Block, {reading:,} of the reader")
        lines.append(
            f"queue       {outcome.kills_with_item:,} workers died with an item, {statistics[Word.GIVEN_AGAIN]:,} items were"
            f" delivered again, {statistics[Word.THERE_ALREADY]:,} of them counted already"
        )
    if settings.lock == "shlock":
        lines.append(
            f"recoveries  {statistics[Word.TOLD]:,} heirs told, {statistics[Word.ROLLED_BACK]:,} half-done updates rolled back"
        )
    if settings.lock == "shlock" and settings.chaos and settings.hangs:
        lines.append(
            f"hung        {statistics[Word.HUNG]:,} stopped inside the critical section,"
            f" {statistics[Word.REMOVED]:,} removed at their deadline ({settings.lease:g} s)"
        )
    longest_ms = statistics[Word.LONGEST_WAIT_NS] / 1e6
    lines.append(f"waits       {statistics[Word.WAITS]:,} of more than 1 ms, longest {longest_ms:.1f} ms")
    if listing.left_out:
        lines.append(f"left out    {listing.left_out:,} files of more than {LARGEST_FILE:,} bytes")
    if outcome.changed:
        lines.append(f"changed     {outcome.changed:,} files were written by others meanwhile and are not compared")
    lines += [f"problem     {text}" for text in outcome.problems[:_SHOWN_PROBLEMS]]
    if more := outcome.problems[_SHOWN_PROBLEMS:]:
        lines.append(f"            and {len(more):,} more")
    if outcome.problems:
        lines.append("FAIL")
    else:
        lines.append(f"SHA-256     {outcome.checksum}")
        lines.append("compared with a sequential run, names, sizes and digests: nothing lost, nothing counted twice")
        lines.append("PASS")
    return "\n".join(lines)
