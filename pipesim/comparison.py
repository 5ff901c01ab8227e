"""Predicted against measured: a scenario simulated with probed costs, beside the same scenario run for real."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipesim.errors import InvariantError
from pipesim.executors import Probe
from pipesim.metrics import compute_metrics
from pipesim.scenario import Scenario
from pipesim.scenario_file import build_scenario
from pipesim.simulation.acceptance import RecordedTruth
from pipesim.simulation.pipeline import simulate
from pipesim.trace import Trace


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One metric. ``measured`` is the median of the real runs, ``spread`` their lowest and highest value.

    ``error`` is ``(predicted - measured) / measured``, None where that does not exist.
    """

    predicted: float | None
    measured: float | None
    spread: tuple[float, float] | None
    error: float | None


def predict(scenario: Scenario, probe: Probe) -> Trace:
    """Simulates the scenario with the probe's costs and acceptance; the devices stay as the scenario has them."""
    return simulate(with_probed_costs(scenario, probe), truth=RecordedTruth(probe.acceptance))


def with_probed_costs(scenario: Scenario, probe: Probe) -> Scenario:
    """The scenario with the probe's costs in the place of its own."""
    raw = scenario.model_dump()
    cluster = raw["cluster"]
    cluster["stages"] = [
        {
            "layers": plan.layers,
            "device": plan.device,
            "cost": {"kind": "table", "rows_ms": dict(rows_ms), "prefill_per_token_ms": prefill},
        }
        for plan, rows_ms, prefill in zip(scenario.stages(), probe.rows_ms, probe.prefill_row_ms, strict=True)
    ]
    cluster["head"]["overhead_ms"] = probe.head_ms
    cluster["drafter"] = {
        "device": scenario.cluster.drafter.device,
        "level_ms": probe.level_ms,
        "prefill_per_token_ms": probe.draft_prefill_row_ms,
    }
    cluster["links"] = {"latency_ms": probe.link_ms}  # and nothing else, as the real run has it
    cluster["devices"] = [{**device, "nic_gbps": None} for device in cluster["devices"]]
    raw["faults"] = []
    return build_scenario(raw, "the scenario with probed costs")


def compare(predicted: Trace, measured: Sequence[Trace], tokens: Sequence[int]) -> dict[str, Figure]:
    """Every figure of both worlds by its dotted name.

    Raises:
        InvariantError: a real run's text is not ``tokens``, those of plain decoding (I3).
    """
    for number, trace in enumerate(measured, start=1):
        if trace.tokens != tuple(tokens):
            at = next((i for i, pair in enumerate(zip(trace.tokens, tokens, strict=False)) if pair[0] != pair[1]), None)
            where = f"from token {at}" if at is not None else f"in length: {len(trace.tokens)} and {len(tokens)}"
            raise InvariantError(f"run {number}: its text differs from plain decoding's {where} (I3)")
    simulated = _flat(compute_metrics(predicted).as_dict())
    real = [_flat(compute_metrics(trace).as_dict()) for trace in measured]
    return {name: _figure(simulated.get(name), [run.get(name) for run in real]) for name in simulated}


def _figure(predicted: float | None, measured: Sequence[float | None]) -> Figure:
    known = [value for value in measured if value is not None]
    if not known:
        return Figure(predicted, None, None, None)
    median = statistics.median(known)
    error = (predicted - median) / median if predicted is not None and median else None
    return Figure(predicted, median, (min(known), max(known)), error)


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
