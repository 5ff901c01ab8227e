"""Runs the points of a sweep and makes a table of what came out."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipesim.errors import BadInputError
from pipesim.scenario import Scenario
from pipesim.scenario_file import apply_settings, build_scenario, locate_files
from pipesim.sweep.engines import find_engine
from pipesim.sweep.journal import Figures, Journal
from pipesim.sweep.points import Point, fingerprint

if TYPE_CHECKING:
    import pandas as pd

Measure = Callable[[Scenario], Mapping[str, Any]]
"""What a point's row tells: figures, nested or not. A function of a module, so that other processes can find it."""


def simulated_metrics(scenario: Scenario) -> dict[str, Any]:
    """The metrics of one simulated generation. Raises PipesimError if it does not bring all its tokens."""
    from pipesim.simulation.pipeline import evaluate

    return evaluate(scenario).as_dict()


def run_points(
    base: Mapping[str, Any],
    points: Sequence[Point],
    *,
    repeats: int = 1,
    jobs: int | None = None,
    engine: str = "local",
    journal: Path | None = None,
    folder: Path | None = None,
    measure: Measure = simulated_metrics,
    progress: Callable[[int, int], None] | None = None,
) -> "pd.DataFrame":
    """Simulates ``base`` with the keys of each point set, under ``repeats`` seeds each.

    Results do not depend on engine, number of jobs, order of completion or interruptions.

    Args:
        base: a scenario as plain values, e.g. from :func:`pipesim.scenario_file.read_scenario`.
        points: which keys have which values; ``policy.name`` takes the settings that ``policies`` has for it.
        repeats: seeds per point: the scenario's seed and those that follow it.
        jobs: processes at once; None: one per core.
        engine: ``local`` or ``ray``.
        journal: file that remembers finished points; they are not run again as long as the resolved scenario and the
            code stay the same (:func:`pipesim.sweep.points.fingerprint`). Failed ones are.
        folder: where files are looked for that the scenario names; None: the working directory.
        measure: the figures of one scenario; the metrics by default.
        progress: called with the numbers of rows that are there and that there will be.

    Returns:
        One row per point and seed, in order. Columns: every varied key (sections by their parts; lists and mixtures of
        types as JSON text), ``policy``, ``seed``, the figures by dotted names, ``error`` (None: it went well).

    Raises:
        BadInputError: no point is a valid scenario, or the journal is no journal.
        PipesimError: the journal cannot be written, or the engine is not there.
    """
    import pandas as pd

    jobs_of = find_engine(engine)
    rows = [row for point in points for row in _rows(base, point, repeats, folder, measure)]
    broken = [row.error for row in rows if row.error]
    if broken and len(broken) == len(rows):
        raise BadInputError(f"no point of the sweep is a valid scenario; the first one:\n{broken[0]}")
    with Journal.opened(journal) as book:
        open_rows = {row.key: row for row in rows if row.scenario and row.key not in book.finished}
        todo = list(open_rows.values())
        told = [len(rows) - len(todo), len(rows)]
        if progress:
            progress(*told)
        errors: dict[str, str] = {}
        task = _Task(measure)
        for index, figures, error in jobs_of(task, [row.scenario for row in todo], jobs) if todo else ():
            if error is None:
                book.add(todo[index].key, figures)
            else:
                errors[todo[index].key] = error
            told[0] += 1
            if progress:
                progress(*told)
    lines = [row.line(book.finished.get(row.key), errors.get(row.key)) for row in rows]
    return pd.DataFrame(_in_columns(lines, points)).astype({"error": "string"})


@dataclass(frozen=True, slots=True)
class _Task:
    """What a worker does with a scenario."""

    measure: Measure

    def __call__(self, scenario: Scenario) -> Figures:
        figures = flatten(dict(self.measure(scenario)))
        return json.loads(json.dumps(figures))  # type: ignore[no-any-return]  # as they will come back from a journal


@dataclass(frozen=True, slots=True)
class _Row:
    """One point under one seed; without a scenario where the point is not a valid one."""

    settings: dict[str, Any]
    seed: int | None
    scenario: Scenario | None
    key: str
    error: str | None = None

    def line(self, figures: Figures | None, error: str | None) -> dict[str, Any]:
        policy = self.scenario.policy.name if self.scenario else None
        known = {**self.settings, "policy": policy, "seed": self.seed}
        return {**known, **(figures or {}), "error": self.error or error}


def _rows(base: Mapping[str, Any], point: Point, repeats: int, folder: Path | None, measure: Measure) -> list[_Row]:
    settings = {path: value for key, one in point.items() for path, value in _columns(key, one).items()}
    raw = copy.deepcopy(dict(base))
    try:
        apply_settings(raw, list(copy.deepcopy(dict(point)).items()))
        locate_files(raw, folder or Path())
        seeded = build_scenario(raw).with_seeds(repeats)
    except BadInputError as problem:
        seed = raw.get("seed", 0)
        first = seed if type(seed) is int else None
        seeds = [None if first is None else first + number for number in range(repeats)]
        return [_Row(settings, one, None, "", str(problem)) for one in seeds]
    return [_Row(settings, one.seed, one, fingerprint(one, measure)) for one in seeded]


def _columns(key: str, value: Any) -> dict[str, Any]:
    """A varied key as columns: sections by their parts, everything else as one."""
    if isinstance(value, dict) and value:
        return {path: leaf for part, one in value.items() for path, leaf in _columns(f"{key}.{part}", one).items()}
    return {key: value}


def _in_columns(lines: list[dict[str, Any]], points: Sequence[Point]) -> dict[str, list[Any]]:
    """Columns in a fixed order: what was varied, policy and seed, the figures, the error."""
    varied = {path for point in points for key, one in point.items() for path in _columns(key, one)}
    names = dict.fromkeys(name for line in lines for name in line)
    parents = {name.rpartition(".")[0] for name in names}  # a group of figures that a row has not is no column
    ordered = [name for name in names if name in varied]
    ordered += [name for name in ("policy", "seed") if name not in varied]
    ordered += [name for name in names if name not in {*ordered, *parents, "error"}]
    columns = {name: [line.get(name) for line in lines] for name in ordered}
    errors = [line["error"] for line in lines]
    return {name: _of_one_type(values) if name in varied else _known(values) for name, values in columns.items()} | {
        "error": errors
    }


def _known(figures: list[Any]) -> list[Any]:
    """A figure that no row has is a column of numbers all the same."""
    return figures if any(figure is not None for figure in figures) else [math.nan] * len(figures)


def _of_one_type(values: list[Any]) -> list[Any]:
    types = {type(value) for value in values if value is not None}
    if types <= {int, float} or types in ({str}, {bool}):
        return values
    return [None if value is None else json.dumps(value) for value in values]


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping from dotted paths to what stands there: ``{"itl_s.p95": 0.1, ...}``."""
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)  # type: ignore[assignment]
    else:
        return {name: value}
    dot = f"{name}." if name else ""
    return {path: leaf for key, entry in entries for path, leaf in flatten(entry, f"{dot}{key}").items()}
