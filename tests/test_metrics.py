from typing import Any

import pytest
from scenario_builder import build

from pipesim.metrics import RunCounts, compute_metrics, percentile
from pipesim.scheduling.commands import FinishReason, Outcome
from pipesim.scheduling.runs import RunKind
from pipesim.simulation.pipeline import simulate
from pipesim.trace import DraftSpan, Emission, RunRecord, StageSpan, Trace


def trace(**parts: Any) -> Trace:
    plain: dict[str, Any] = {
        "policy": "p",
        "seed": 0,
        "stages": ("stage 0", "stage 1"),
        "prompt_tokens": 2,
        "finish_reason": FinishReason.LENGTH,
        "finished_s": None,
        "drained_s": None,
        "link_bytes": {},
        "drafted_verified": 0,
        "drafted_accepted": 0,
        "spans": (),
        "drafts": (),
        "runs": (),
        "emissions": (),
    }
    return Trace(**{**plain, **parts})


def emissions(*at: tuple[float, int]) -> tuple[Emission, ...]:
    return tuple(Emission(time, 0, (1,) * count) for time, count in at)


def test_speed_counts_gaps_not_tokens_and_leaves_the_prompt_out() -> None:
    metrics = compute_metrics(trace(emissions=emissions((2.0, 1), (3.0, 2), (4.0, 1))))
    assert metrics.ttft_s == 2.0
    assert metrics.e2e_s == 4.0
    assert metrics.tokens_per_second == pytest.approx(3 / 2.0)


def test_tokens_that_come_together_have_a_gap_of_zero() -> None:
    itl = compute_metrics(trace(emissions=emissions((1.0, 1), (2.0, 3), (4.0, 1)))).itl_s
    assert itl is not None
    assert itl.mean == pytest.approx(3 / 4)
    assert itl.p50 == pytest.approx(0.5)  # gaps 0, 0, 1, 2
    assert itl.p99 == pytest.approx(1.97)


@pytest.mark.parametrize("shown", [(), ((1.5, 1),)])
def test_no_token_or_a_single_one_has_no_speed_and_is_no_crash(shown: tuple[tuple[float, int], ...]) -> None:
    metrics = compute_metrics(trace(emissions=emissions(*shown)))
    assert metrics.tokens_per_second is None
    assert metrics.itl_s is None
    assert metrics.acceptance_rate is None
    assert metrics.wasted_compute_fraction is None
    assert metrics.ttft_s == (1.5 if shown else None)
    assert metrics.as_dict()["itl_s"] is None


def test_all_tokens_at_once_have_no_speed() -> None:
    assert compute_metrics(trace(emissions=emissions((1.0, 5)))).tokens_per_second is None


def test_utilization_ends_with_the_users_last_token() -> None:
    spans = (StageSpan(0, 0, 0.0, 1.0, False), StageSpan(1, 0, 1.0, 4.0, False), StageSpan(0, 1, 3.5, 9.0, True))
    metrics = compute_metrics(trace(spans=spans, finished_s=4.0, emissions=emissions((4.0, 1))))
    assert metrics.stage_utilization == pytest.approx((1.5 / 4, 3 / 4))
    assert metrics.bubble_fraction == pytest.approx(1 - 4.5 / 8)


def test_waste_is_booked_under_its_cause() -> None:
    fates = [
        (Outcome.ACCEPTED, 4, 1),  # three rows of four are no text
        (Outcome.ACCEPTED, 2, 2),
        (Outcome.ACCEPTED, 1, 0),  # redundant
        (Outcome.REJECTED, 1, 0),
        (Outcome.CANCELLED, 1, 0),
        (Outcome.DRAINED, 1, 0),
        (None, 1, 0),  # not known, and not guessed
    ]
    runs = tuple(
        RunRecord(i, RunKind.CANONICAL, rows, 0.0, 1.0, outcome, useful)
        for i, (outcome, rows, useful) in enumerate(fates)
    )
    spans = tuple(StageSpan(0, i, float(i), i + 1.0, False) for i in range(len(fates)))
    metrics = compute_metrics(trace(runs=runs, spans=spans))
    share = 1 / 7
    waste = metrics.wasted_compute_fraction
    assert waste is not None
    assert waste.total == pytest.approx(4.75 * share)
    assert waste.rejected_rows == pytest.approx(0.75 * share)
    assert waste.redundant_runs == waste.rejected_runs == waste.cancelled == waste.drained == pytest.approx(share)
    assert metrics.runs == RunCounts(7, 3, 1, 1, 1)


def test_a_prefill_that_repeats_known_text_is_neither_redundant_nor_waste() -> None:
    run = RunRecord(0, RunKind.PREFILL, 8, 0.0, 1.0, Outcome.ACCEPTED, 0)
    assert not run.redundant
    waste = compute_metrics(trace(runs=(run,), spans=(StageSpan(0, 0, 0.0, 1.0, False),))).wasted_compute_fraction
    assert waste is not None
    assert waste.total == 0


def test_drafts_links_and_acceptance_are_summed() -> None:
    drafts = (DraftSpan(0, 0, 1, 3), DraftSpan(1, 1, 2, 0))
    metrics = compute_metrics(trace(drafts=drafts, link_bytes={"a": 5, "b": 7}, drafted_verified=4, drafted_accepted=3))
    assert (metrics.draft_tokens, metrics.link_bytes, metrics.acceptance_rate) == (3, 12, 0.75)


def test_percentiles_interpolate_between_the_closest_ranks() -> None:
    assert [percentile([0.0, 10.0, 20.0], p) for p in (0, 25, 50, 95, 100)] == pytest.approx([0, 5, 10, 19, 20])
    assert percentile([4.0], 99) == 4.0


def test_measured_acceptance_is_the_rate_of_the_scenario() -> None:
    sets = ["workload.max_new_tokens=4000", "policy={name: speculative, max_nodes: 3, split: 1}"]
    metrics = compute_metrics(simulate(build(*sets, "acceptance.rate=0.6")))
    assert metrics.acceptance_rate == pytest.approx(0.6, abs=0.02)


def test_all_runs_have_one_outcome() -> None:
    runs = compute_metrics(simulate(build())).runs
    assert runs.submitted == runs.accepted + runs.rejected + runs.cancelled + runs.drained
