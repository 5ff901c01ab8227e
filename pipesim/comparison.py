"""Predicted against measured: a scenario with measured costs, simulated, beside the same scenario run for real."""

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from pipesim.acceptance_trace import AcceptanceTrace
from pipesim.calibration import fit_costs, make_profile
from pipesim.errors import InvariantError
from pipesim.executors import Observed
from pipesim.metrics import compute_metrics
from pipesim.scenario import Calibration, Scenario
from pipesim.scenario_file import apply_settings, build_scenario
from pipesim.simulation.acceptance import RecordedTruth
from pipesim.simulation.pipeline import simulate
from pipesim.trace import Trace

DRAWS = 20
"""Simulations behind the interval of a prediction."""
WITHIN = 0.10
"""A prediction this near is called near; further off it deviates."""
NOISY = 0.20
"""Real runs that spread over more than this share of their median cannot confirm a prediction."""


class Verdict(StrEnum):
    """What a comparison says of one metric, see :func:`judge`."""

    AGREES = "agrees"
    WITHIN = "within"
    DEVIATES = "deviates"
    NOISY = "too noisy"
    ABSENT = "-"


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One metric.

    Attributes:
        predicted: the median of all simulations.
        interval: from the 2.5th to the 97.5th percentile of simulations whose costs were drawn within their own
            confidence limits, each with its own seed of the network's chance.
        measured: the median of the real runs.
        spread: their lowest and highest value.
        error: ``(predicted - measured) / measured``, None where that does not exist.
        verdict: see :func:`judge`.
    """

    predicted: float | None
    interval: tuple[float, float] | None
    measured: float | None
    spread: tuple[float, float] | None
    error: float | None
    verdict: Verdict


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """``trace``: with the costs as they were fitted; ``others``: with costs drawn within their confidence limits."""

    trace: Trace
    others: tuple[Trace, ...]


def measured_profile(scenario: Scenario, observed: Observed) -> dict[str, Any]:
    """The scenario's profile: costs that were measured on its own pipeline in the place of all that it says of them."""
    fit = fit_costs(observed.costs, observed.shared_by_all)
    return make_profile(scenario, fit, observed.here, observed.cores, observed.rounds, observed.acceptance)


def calibrated(scenario: Scenario, observed: Observed) -> Scenario:
    """The same as a scenario."""
    return build_scenario(measured_profile(scenario, observed), "the measured scenario")


def predict(scenario: Scenario, acceptance: AcceptanceTrace) -> Prediction:
    """Simulates a scenario with measured costs, and what the drafter makes of the text.

    Costs are drawn independently of each other: where a machine is slow as a whole, the interval is too narrow.
    """
    truth = RecordedTruth(acceptance)
    evidence = scenario.calibration
    intervals = evidence.intervals if isinstance(evidence, Calibration) else {}
    others = []
    emulated = scenario.execution.emulate  # real links then meet the very chance of the seed
    for draw in range(DRAWS if intervals or (scenario.links_draw() and not emulated) else 0):
        raw = _editable(scenario.model_dump())
        random_ = random.Random(f"{scenario.seed} {draw}")
        settings = [(key, _drawn(raw, key, limits, random_)) for key, limits in intervals.items()]
        seed = scenario.seed if emulated else (scenario.seed + draw) % 2**64
        apply_settings(raw, [*settings, ("seed", seed)])
        others.append(simulate(build_scenario(raw, "a draw"), truth=truth))
    return Prediction(simulate(scenario, truth=truth), tuple(others))


def _editable(value: Any) -> Any:
    """Plain values that can be set by dotted path."""
    if isinstance(value, dict):
        return {key: _editable(one) for key, one in value.items()}
    return [_editable(one) for one in value] if isinstance(value, list | tuple) else value


def _drawn(raw: Any, key: str, limits: tuple[float, float], random_: random.Random) -> float:
    """A value from a normal distribution around the fitted one whose 95 % are as wide as ``limits``."""
    here = raw
    for name in key.split("."):
        here = here[name] if name in here else here[int(name)]
    fitted = float(here)
    value = random_.gauss(fitted, (limits[1] - limits[0]) / (2 * 1.96))
    return max(value, min(fitted, limits[0]), 1e-3 * fitted)


def compare(predicted: Prediction, measured: Sequence[Trace], tokens: Sequence[int]) -> dict[str, Figure]:
    """Every figure of both worlds by its dotted name.

    Raises:
        InvariantError: a real run's text is not ``tokens``, those of plain decoding (I3).
    """
    for number, trace in enumerate(measured, start=1):
        if trace.tokens != tuple(tokens):
            at = next((i for i, pair in enumerate(zip(trace.tokens, tokens, strict=False)) if pair[0] != pair[1]), None)
            where = f"from token {at}" if at is not None else f"in length: {len(trace.tokens)} and {len(tokens)}"
            raise InvariantError(f"run {number}: its text differs from plain decoding's {where} (I3)")
    simulated = [flat_metrics(trace) for trace in (predicted.trace, *predicted.others)]
    real = [flat_metrics(trace) for trace in measured]
    return {
        name: make_figure([one.get(name) for one in simulated], [run.get(name) for run in real])
        for name in simulated[0]
    }


def make_figure(simulated: Sequence[float | None], measured: Sequence[float | None]) -> Figure:
    """One metric from its values in all simulations, the one with the fitted costs first, and in all real runs."""
    drawn = sorted(value for value in simulated if value is not None)
    known = [value for value in measured if value is not None]
    predicted = statistics.median(drawn) if drawn else None
    interval = None
    if len(drawn) > 1:
        cut = len(drawn) // 40  # of either end
        interval = drawn[cut], drawn[-1 - cut]
    median = statistics.median(known) if known else None
    spread = (min(known), max(known)) if known else None
    error = (predicted - median) / median if predicted is not None and median else None
    return Figure(predicted, interval, median, spread, error, judge(predicted, interval, median, spread, len(known)))


def spread_share(spread: tuple[float, float], measured: float) -> float:
    """From the lowest to the highest run, as a share of their median ``measured``, which is not 0."""
    return (spread[1] - spread[0]) / abs(measured)


def judge(
    predicted: float | None,
    interval: tuple[float, float] | None,
    measured: float | None,
    spread: tuple[float, float] | None,
    runs: int,
) -> Verdict:
    """What real runs say of a prediction.

    ``agrees``: its interval meets their range, so that they cannot tell the two apart. That needs several runs, and
    says little if they spread widely: above ``NOISY`` they are ``too noisy`` instead. Otherwise ``within``: the
    prediction is at most ``WITHIN`` off their median; ``deviates``: it is further off.
    """
    if predicted is None or measured is None or spread is None:
        return Verdict.ABSENT
    low, high = interval or (predicted, predicted)
    meets = low <= spread[1] and spread[0] <= high
    if meets and runs > 1:
        wide = measured and spread_share(spread, measured) > NOISY
        return Verdict.NOISY if wide else Verdict.AGREES
    if predicted == measured:
        return Verdict.AGREES
    return Verdict.WITHIN if measured and abs(predicted / measured - 1) <= WITHIN else Verdict.DEVIATES


def flat_metrics(trace: Trace) -> dict[str, float | None]:
    """All figures of a generation by their dotted names."""
    return _flat(compute_metrics(trace).as_dict())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Nested figures by dotted names; entries of lists by their index."""
    found: dict[str, float | None] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
