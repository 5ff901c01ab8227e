"""Markdown of generated pages."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipesim.statistics import Interval, mean_interval


def fill(text: str) -> str:
    """A paragraph in lines of 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def plus_minus(values: Iterable[float], digits: int) -> str:
    """Mean and half the width of its 95 % confidence interval."""
    mean = mean_interval(list(values))
    return f"{mean.estimate:.{digits}f} ± {mean.half_width:.{digits}f}"


def between(interval: Interval, digits: int = 2) -> str:
    """An estimate and, where it is known, its 95 % confidence interval: ``1.62 [1.55, 1.70]``."""
    if math.isnan(interval.low):
        return f"{interval.estimate:.{digits}f}"
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(titles)} |", f"|---{'|---:' * (len(titles) - 1)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def settings_text(settings: Mapping[str, Any]) -> str:
    """A policy's settings without its name."""
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name")


def settings_list(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What :func:`analysis.tuning.tune` found for each row; says where a search ended at the end of a ladder."""
    lines = []
    for name, row in rows.items():
        if chosen := settings_text(row["settings"]):
            tried = f" ({row['tried']} settings tried)" if row["tried"] else ""
            ends = f"; **at the end of what was searched**: {', '.join(row['ends'])}" if row["ends"] else ""
            lines.append(f"* {name}: {chosen}{tried}{ends}")
    return "\n".join(lines)
