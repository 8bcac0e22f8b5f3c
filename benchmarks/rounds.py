"""Interleaved rounds and what is computed from them.

A shared machine changes its speed from second to second, so contestants never run one after the other to the end:
each round measures every contestant once, the order rotates from round to round, and a ratio is the median of the
ratios within each round. Medians come with the first and the third quartile.

pyperf measures one benchmark to its end in processes of its own and cannot alternate between several; it is
therefore not used here. The timing loops are those of timeit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` values, in their unit."""

    median: float
    p25: float
    p75: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Summarise at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    p25, median, p75 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, p25, p75, len(values))


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` per cent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@dataclass
class Series:
    """What one contestant measured, by round; or why it stopped."""

    values: dict[int, float] = field(default_factory=dict)
    failure: str | None = None

    def spread(self) -> Spread | None:
        return spread(list(self.values.values())) if self.values and not self.failure else None

    def ratio_to(self, base: Series) -> Spread | None:
        """Ratios to `base` within the same rounds."""
        if self.failure or base.failure:
            return None
        ratios = [value / base.values[index] for index, value in self.values.items() if base.values.get(index)]
        return spread(ratios) if ratios else None

    def as_json(self) -> dict[str, object]:
        summary = self.spread()
        return {
            "rounds": list(self.values.values()),
            "median": summary and summary.median,
            "p25": summary and summary.p25,
            "p75": summary and summary.p75,
            "failure": self.failure,
        }


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Each name once per round, starting one further in each round."""
    for index in range(rounds):
        first = index % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            yield index, name
