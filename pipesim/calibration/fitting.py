"""Cost coefficients from measurements: linear least squares without negative coefficients, never in log space.

Fitted are medians of equal measurements over rounds, since on a shared machine some rounds have somebody else's work in
them; relative errors count, so that a one-row run weighs as much as a prefill run. Intervals are 95 % percentile
bootstrap intervals over rounds.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipesim.calibration.observations import DraftSample, FloodSample, HeadSample, Observations, RunSample
from pipesim.errors import BadInputError
from pipesim.scheduling.runs import RunKind
from pipesim.simulation.devices import Call, Clock
from pipesim.simulation.sharing import FairDevice
from pipesim.simulation.times import demand

_RESAMPLES = 200
_BANDWIDTH_BYTES = 8192  # messages must differ by so much for their time to tell a bandwidth
_LEAST_MS = 1e-4

Sample = TypeVar("Sample", RunSample, DraftSample)


@dataclass(frozen=True, slots=True)
class Fit:
    """Values by their dotted key in a scenario.

    Attributes:
        values: what the measurements say.
        intervals: 95 % confidence limits of those that were fitted.
        residuals: for each fit, the root mean square of its relative errors.
    """

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    residuals: Mapping[str, float]


class _Found:
    """Fits as they are found."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        self.residuals: dict[str, float] = {}

    def fit(
        self,
        name: str,
        columns: Mapping[str, Callable[[Sample], float]],
        samples: Sequence[Sample],
        equals: Callable[[Sample], Hashable],
        time: Callable[[Sample], float],
        scale: float = 1e3,
    ) -> None:
        """Fits ``time = sum of column * coefficient`` to the medians of samples for which ``equals`` is the same.

        Notes the coefficients, in ms, under their keys.
        """
        groups: dict[Hashable, list[Sample]] = defaultdict(list)
        for one in samples:
            groups[equals(one)].append(one)
        design = np.array([[column(group[0]) for column in columns.values()] for group in groups.values()])

        from scipy.optimize import nnls  # SciPy takes longer to import than the command line that finds us

        def solve(groups: Iterable[Sequence[float]]) -> NDArray[np.float64]:
            goal = np.array([statistics.median(group) for group in groups])
            weights = 1.0 / np.maximum(goal, 1e-9)
            return nnls(design * weights[:, None], goal * weights)[0]  # type: ignore[no-any-return]

        found = solve([time(one) for one in group] for group in groups.values())
        fitted = design @ found
        errors = [
            value / max(1e-9, time(one)) - 1
            for value, group in zip(fitted, groups.values(), strict=True)
            for one in group
        ]
        self.residuals[name] = float(np.sqrt(np.mean(np.square(errors))))
        by_round: list[dict[int, list[float]]] = []
        for group in groups.values():
            by_round.append({})
            for one in group:
                by_round[-1].setdefault(one.round, []).append(time(one))
        drawn = np.array([solve(chosen) for chosen in _resampled(by_round)])
        for index, key in enumerate(columns):
            self.note(key, float(found[index]), drawn[:, index] if len(drawn) else drawn, scale)

    def note(self, key: str, value: float, drawn: NDArray[np.float64], scale: float = 1e3) -> None:
        """One coefficient, and what resampling made of it."""
        self.values[key] = value * scale
        if len(drawn) > 1:
            low, high = np.quantile(drawn, (0.025, 0.975)) * scale
            self.intervals[key] = (float(low), float(high))


def _resampled(by_round: Sequence[Mapping[int, Sequence[float]]]) -> Iterator[list[list[float]]]:
    """The groups again and again, of rounds drawn with replacement; never, of a single round."""
    numbers = sorted({number for group in by_round for number in group})
    random = np.random.default_rng(0)
    for _ in range(_RESAMPLES if len(numbers) > 1 else 0):
        chosen = random.choice(numbers, len(numbers)).tolist()
        yield [
            [value for number in chosen for value in group.get(number, ())] or list(chain(*group.values()))
            for group in by_round
        ]


def fit_costs(seen: Observations, cores: int | None) -> Fit:
    """Everything that a scenario's ``cluster`` section has a place for.

    Args:
        seen: the measurements; at least one run of one row, and one prefill run.
        cores: of the machine that all stages share; None where they do not.

    Raises:
        BadInputError: a kind of run is missing.
    """
    found = _Found()
    live = [one for one in seen.runs if not one.void]
    if {one.kind for one in live} < {RunKind.PREFILL, RunKind.SPECULATIVE}:
        raise BadInputError("calibration: measure prefill runs as well as others")
    stages = range(len(live[0].stages_s))
    for stage in stages:
        _fit_stage(found, stage, live, [one for one in seen.runs if one.void])
    for hop in range(len(stages) + 1):
        _fit_hop(found, hop, live)
    found.values["cluster.links.control.latency_ms"] = found.values["cluster.links.hops.0.latency_ms"]
    _fit_head(found, seen.head)
    _fit_drafter(found, seen.drafts)
    if cores is not None and seen.floods:
        _fit_contention(found, seen.floods, len(stages), cores)
    return Fit(found.values, found.intervals, found.residuals)


def _fit_stage(found: _Found, stage: int, live: Sequence[RunSample], void: Sequence[RunSample]) -> None:
    place = f"cluster.stages.{stage}"

    def time(one: RunSample) -> float:
        return one.stages_s[stage]

    def equals(one: RunSample) -> Hashable:
        return one.kind, one.rows, one.context

    def with_rows(kind: RunKind, rows: int) -> Callable[[RunSample], float]:
        return lambda one: float(one.kind is kind and one.rows == rows)

    columns: dict[str, Callable[[RunSample], float]] = {}
    for kind, key in ((RunKind.SPECULATIVE, "rows_ms"), (RunKind.PREFILL, "prefill_rows_ms")):
        for rows in sorted({one.rows for one in live if one.kind is kind}):
            columns[f"{place}.cost.{key}.{rows}"] = with_rows(kind, rows)
    columns[f"{place}.cost.kv_us_per_kilocell"] = lambda one: one.rows * one.context * 1e-3 * 1e-3
    found.fit(f"stage {stage}", columns, live, equals, time)
    for key in columns:
        if "rows_ms" in key:
            found.values[key] = max(_LEAST_MS, found.values[key])
    if void:
        found.fit(f"stage {stage}, void frames", {f"{place}.void_ms": lambda _: 1.0}, void, equals, time)


def _fit_hop(found: _Found, hop: int, live: Sequence[RunSample]) -> None:
    place = f"cluster.links.hops.{hop}"
    sizes = [one.hops[hop][0] for one in live]
    samples = live
    columns: dict[str, Callable[[RunSample], float]] = {f"{place}.latency_ms": lambda _: 1.0}
    told = max(sizes) - min(sizes) >= _BANDWIDTH_BYTES
    if told:
        columns[f"{place}.ms_per_byte"] = lambda one: float(one.hops[hop][0])
    found.fit(f"link {hop}", columns, samples, lambda one: one.hops[hop][0], lambda one: max(0.0, one.hops[hop][1]))
    if told:
        per_byte, limits = found.values.pop(f"{place}.ms_per_byte"), found.intervals.pop(f"{place}.ms_per_byte", None)
        if per_byte * max(sizes) > _LEAST_MS:
            found.values[f"{place}.bandwidth_gbps"] = 8e-6 / per_byte
            if limits and limits[0] > 0:
                found.intervals[f"{place}.bandwidth_gbps"] = (8e-6 / limits[1], 8e-6 / limits[0])


def _fit_head(found: _Found, samples: Sequence[HeadSample]) -> None:
    """Means: an event that takes long holds up the run behind it."""
    for drafted, key in ((False, "overhead_ms"), (True, "draft_overhead_ms")):
        times = np.array([one.seconds for one in samples if one.drafted is drafted])
        if len(times):
            drawn = np.random.default_rng(0).choice(times, (_RESAMPLES, len(times))).mean(axis=1)
            found.note(f"cluster.head.{key}", float(times.mean()), drawn)
            kind = "draft" if drafted else "result"
            found.residuals[f"head, {kind} events"] = float(times.std() / max(times.mean(), 1e-9))


def _fit_drafter(found: _Found, samples: Sequence[DraftSample]) -> None:
    if not samples:
        found.values["cluster.drafter.level_ms"] = 0.0
        return

    def equals(one: DraftSample) -> Hashable:
        return one.levels, one.context, one.prefilled

    columns: dict[str, Callable[[DraftSample], float]] = {
        "cluster.drafter.request_ms": lambda _: 1.0,
        "cluster.drafter.level_ms": lambda one: float(one.levels),
        "cluster.drafter.kv_us_per_kilocell": lambda one: one.levels * one.context * 1e-6,
        "cluster.drafter.prefill_per_token_ms": lambda one: float(one.prefilled),
    }
    found.fit("drafter", columns, samples, equals, lambda one: one.seconds)
    way = {"cluster.links.draft.latency_ms": lambda _: 2.0}
    found.fit("draft links", way, samples, lambda _: None, lambda one: max(0.0, one.way_s))


def _fit_contention(found: _Found, floods: Sequence[FloodSample], stages: int, cores: int) -> None:
    """The contention with which a model of the floods takes, on the whole, as long as they did."""
    values = found.values
    latencies = [round(1e6 * values[f"cluster.links.hops.{hop}.latency_ms"]) for hop in range(stages + 1)]

    def works(rows: int, context: float) -> list[float]:
        return [
            1e6 * values[f"cluster.stages.{stage}.cost.rows_ms.{rows}"]
            + values[f"cluster.stages.{stage}.cost.kv_us_per_kilocell"] * rows * context
            for stage in range(stages)
        ]

    kinds = sorted({(one.rows, one.context, one.runs) for one in floods})
    models = {(rows, context, runs): (works(rows, context), works(1, context), runs) for rows, context, runs in kinds}

    def best(samples: Sequence[FloodSample]) -> float:
        measured = {
            kind: statistics.median(one.seconds for one in samples if (one.rows, one.context, one.runs) == kind)
            for kind in kinds
        }

        from scipy.optimize import minimize_scalar

        def error(contention: float) -> float:
            return sum(
                (flood_seconds(*models[kind], latencies, cores, contention) / measured[kind] - 1.0) ** 2
                for kind in kinds
            )

        return float(minimize_scalar(error, bounds=(0.0, 4.0), method="bounded", options={"xatol": 1e-3}).x)

    key = "cluster.devices.0.contention"
    found.values[key] = value = best(floods)
    rounds = sorted({one.round for one in floods})
    if len(rounds) > 1:
        alone = [best([one for one in floods if one.round == number]) for number in rounds]
        spread = 1.96 * statistics.stdev(alone) / len(alone) ** 0.5
        found.intervals[key] = (max(0.0, value - spread), value + spread)
    errors = [
        flood_seconds(*models[(one.rows, one.context, one.runs)], latencies, cores, value) / one.seconds - 1.0
        for one in floods
    ]
    found.residuals["floods"] = float(np.sqrt(np.mean(np.square(errors))))


def flood_seconds(
    works: Sequence[float],
    one_row: Sequence[float],
    runs: int,
    latencies: Sequence[int],
    cores: int,
    contention: float,
) -> float:
    """How long a flood takes in the simulation's model of a shared machine.

    Args:
        works: nanoseconds of a run at each stage, alone.
        one_row: the same, of a run of one row.
        runs: how many are submitted at once.
        latencies: of the links around the stages, in nanoseconds; the messages' bytes are left out.
        cores: of the machine.
        contention: see ``Device.contention``.
    """
    clock = Clock()
    device = FairDevice(clock, "shared", cores, contention)
    waiting = [0] * len(works)
    busy = [False] * len(works)
    home: list[int] = []

    def arrive(call: Call) -> None:
        stage: int = call.value
        if stage == len(works):
            home.append(clock.now)
            return
        waiting[stage] += 1
        if not busy[stage]:
            begin(stage)

    def begin(stage: int) -> None:
        busy[stage] = True
        waiting[stage] -= 1
        device.start(works[stage], leave, stage, demand(works[stage], one_row[stage]))

    def leave(call: Call) -> None:
        stage: int = call.value
        busy[stage] = False
        device.start(latencies[stage + 1], arrive, stage + 1)
        if waiting[stage]:
            begin(stage)

    for _ in range(runs):
        device.start(latencies[0], arrive, 0)
    clock.run_calls()
    return home[-1] / 1e9
