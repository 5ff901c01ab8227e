"""Quantities over time: a link's latency and bandwidth, what faults add to them, the pace of a stage.

Times are whole nanoseconds. A course is piecewise constant or linear, so that what flows through it is known exactly.
"""

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from pipesim.errors import BadInputError
from pipesim.scenario import Link, LinkPlan, Profile, ProfilePoint
from pipesim.scenario.network import course_problems

NS_PER_MS = 1_000_000


class Piece(NamedTuple):
    """What holds from a moment until ``end``: ``value`` at that moment, changing by ``slope`` per nanosecond."""

    value: float
    slope: float
    end: float


class Course:
    """A quantity over time.

    Args:
        before: its value before the first time.
        times: rising, in nanoseconds. With a period the first one is 0 and all are below the period.
        values: one for each time.
        ramps: whether the values are joined by straight lines, or each holds until the next time.
        period: nanoseconds after which the course begins anew; None: the last value holds on.
    """

    def __init__(
        self,
        before: float,
        times: Sequence[int] = (),
        values: Sequence[float] = (),
        ramps: bool = False,
        period: int | None = None,
    ) -> None:
        self._period = period
        ends: list[float] = [*times, math.inf if period is None else period]
        after = [*values[1:], values[0 if period else -1]] if values else []
        self._starts = [0, *times]
        self._pieces = [Piece(before, 0.0, ends[0])]
        for start, end, value, goal in zip(times, ends[1:], values, after, strict=True):
            self._pieces.append(Piece(value, (goal - value) / (end - start) if ramps else 0.0, end))

    def piece(self, time: int) -> Piece:
        """What holds at ``time`` and until when: the next time at which value or slope may change."""
        origin = time // self._period * self._period if self._period else 0
        index = bisect_right(self._starts, time - origin) - 1
        value, slope, end = self._pieces[index]
        return Piece(value + slope * (time - origin - self._starts[index]), slope, origin + end)

    def at(self, time: int) -> float:
        """The value at ``time``."""
        return self.piece(time).value

    def extremes(self) -> tuple[float, float]:
        """Its lowest and its highest value; what would hold before time 0 does not count."""
        values = [piece.value for piece in self._pieces]
        reached = values[1:] if len(values) > 1 and not self._starts[1] else values
        return min(reached), max(reached)


def at_best(plan: LinkPlan) -> Link:
    """The link with its lowest latency and its highest bandwidth of all times, always there: nothing is ever faster."""
    link = plan.link
    if link.profile is None:
        return link
    latency, _ = latency_course(plan).extremes()
    _, gbps = bandwidth_course(plan).extremes()
    return Link(latency / NS_PER_MS, None if gbps == math.inf else gbps)


def active_ns(start_ms: float, duration_ms: float) -> tuple[int, int]:
    """When a fault begins and when it is over."""
    return round(start_ms * NS_PER_MS), round((start_ms + duration_ms) * NS_PER_MS)


def overlay(effects: Iterable[tuple[int, int, float]], combine: Callable[[list[float]], float]) -> Course | None:
    """What faults that come and go amount to over time, computed anew for every moment from those active then.

    Args:
        effects: start, end (not included) and strength of each fault.
        combine: what the strengths of the active ones amount to; given in rising order, so that the order in which
            faults are listed cannot matter, and empty where there are none.

    Returns:
        The course, or None without any effect.
    """
    known = sorted(effects, key=lambda effect: effect[2])
    times = sorted({time for start, end, _ in known for time in (start, end)})
    values = [combine([strength for start, end, strength in known if start <= time < end]) for time in times]
    return Course(combine([]), times, values) if known else None


def transfer_end(start: int, size_bytes: int, rate: Callable[[int], Piece]) -> int:
    """When ``size_bytes`` are through that begin at ``start``.

    Integrates ``rate``, in 10^9 bits per second, over time, exactly but for rounding to a whole nanosecond. A rate of 0
    must come to an end.
    """
    left: float = size_bytes
    while True:
        gbps, slope, end = rate(start)
        if slope:
            reach = gbps * gbps + 16.0 * slope * left  # of gbps * t + slope * t^2 / 2 = 8 * left
            needed = 16.0 * left / (gbps + math.sqrt(reach)) if reach >= 0 else math.inf
        else:
            needed = left * (8.0 / gbps) if gbps else math.inf
        if start + needed <= end:
            return start + round(needed)
        span = int(end) - start
        left = max(0.0, left - (gbps + slope * span / 2) * span / 8.0)
        start = int(end)


def work_end(start: int, work: float, pace: Course) -> float:
    """When ``work`` nanoseconds of work are done that begin at ``start``, where ``pace`` says how slow things are."""
    now = start
    while True:
        factor, _, end = pace.piece(now)
        if now + work * factor <= end:
            return now + work * factor
        work -= (end - now) / factor
        now = int(end)


def latency_course(plan: LinkPlan) -> Course:
    """Propagation time over time, in nanoseconds. Raises BadInputError for a file that is no course."""
    return _course(plan, plan.link.latency_ms * NS_PER_MS, "latency_ms", NS_PER_MS)


def bandwidth_course(plan: LinkPlan) -> Course:
    """Bandwidth over time, in 10^9 bits per second, infinite without limit. Raises as ``latency_course``."""
    gbps = plan.link.bandwidth_gbps
    return _course(plan, math.inf if gbps is None else gbps, "bandwidth_gbps", 1)


def _course(plan: LinkPlan, own: float, name: str, unit: int) -> Course:
    profile = plan.link.profile
    if profile is None:
        return Course(own)
    try:
        return _profile_course(profile, _version(profile.file), own, name, unit)
    except BadInputError as problem:
        raise BadInputError(f"the profile of the link {plan.name!r}: {problem}") from None


def _version(file: Path | None) -> tuple[int, int] | None:
    """Differs where the file has changed."""
    if file is None or not file.exists():
        return None
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=32)  # many links share a profile, whose file may be long
def _profile_course(profile: Profile, _: object, own: float, name: str, unit: int) -> Course:
    points: Sequence[ProfilePoint] = profile.points or ()
    if profile.file is not None:
        points = _read(profile.file)
        for problem in course_problems(str(profile.file), points, profile.period_ms):
            raise BadInputError(problem)
    given = [(round(point.at_ms * NS_PER_MS), getattr(point, name)) for point in points]
    given = [(time, value * unit) for time, value in given if value is not None]
    if not given:
        return Course(own)
    period = None if profile.period_ms is None else round(profile.period_ms * NS_PER_MS)
    times, values = zip(*given, strict=True)
    return Course(own, times, values, profile.shape == "ramps", period)


def _read(path: Path) -> list[ProfilePoint]:
    """The rows of a CSV file as points. Raises BadInputError that names the row."""
    columns = set(ProfilePoint.model_fields)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True, strict=True)
            header = reader.fieldnames or []
            if "at_ms" not in header or len(header) < 2 or not columns.issuperset(header):
                raise BadInputError(
                    f"{path} has the columns {', '.join(header) or 'none'}: "
                    "at_ms and latency_ms, bandwidth_gbps or both are expected"
                )
            return [_point(row, f"{path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise BadInputError(f"{path} cannot be read as CSV ({problem})") from None


def _point(row: dict[str, str | None], where: str) -> ProfilePoint:
    try:
        return ProfilePoint(**{name: float(cell) for name, cell in row.items() if cell})
    except (ValidationError, ValueError, TypeError, AttributeError):
        raise BadInputError(f"{where}: {row} has a cell that is no number within its bounds, or too many") from None
