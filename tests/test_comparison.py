"""What a comparison says, and what a prediction takes from measurements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observing import ACCEPTANCE, observe
from scenario_builder import build

from pipesim.comparison import WITHIN, Verdict, calibrated, compare, make_figure, predict
from pipesim.errors import InvariantError
from pipesim.executors import Observed
from pipesim.scenario import Calibration
from pipesim.simulation.pipeline import simulate

TRUE = build(
    "cluster.stages=[{repeat: 2, void_ms: 0.1, cost: {kind: linear, constant_ms: 9, per_token_ms: 1}}]",
    "cluster.links={latency_ms: 0.3}",
    "cluster.head.overhead_ms=0.2",
    "cluster.drafter.level_ms=1",
)
SEEN = Observed(observe(TRUE), 4, (False, False), None, ACCEPTANCE)
SHARED = build(
    "cluster.devices=[{name: box, cores: 2, sharing: fair, contention: 0.6}]",
    "cluster.stages=[{repeat: 2, device: box, void_ms: 0.1, cost: {kind: linear, constant_ms: 9, per_token_ms: 1}}]",
    "cluster.links={latency_ms: 0.3}",
    "cluster.head={device: box, overhead_ms: 0.2}",
    "cluster.drafter={device: box, level_ms: 3}",
)


def test_what_no_real_run_has_is_left_out_of_its_prediction() -> None:
    scenario = build(
        "cluster.stages=[{repeat: 2, device: box, cost: {kind: linear, constant_ms: 1}}]",
        "cluster.devices=[{name: box, nic_gbps: 1}]",
        "cluster.links={preset: wan, jitter_ms: 3}",
        "faults=[{kind: slow-stage, stage: 1, start_ms: 300, duration_ms: 50, factor: 2}]",
    )
    measured = calibrated(scenario, SEEN)
    assert not measured.faults
    assert not measured.cluster.devices
    assert {(link.bandwidth_gbps, link.jitter_ms) for link in measured.hops()[::2]} == {(None, 0)}


@pytest.mark.parametrize("shared", [False, True])
def test_a_prediction_from_measurements_of_a_simulated_pipeline_is_that_simulation_again(shared: bool) -> None:
    """Costs that are measured exactly are found again, and give the same times."""
    true = SHARED if shared else TRUE
    measured = calibrated(true, Observed(observe(SHARED), 4, (True, True), 2, ACCEPTANCE) if shared else SEEN)
    again, truth = predict(measured, ACCEPTANCE), predict(true, ACCEPTANCE)
    for one, other in zip(again.trace.emissions, truth.trace.emissions, strict=True):
        assert one.time_s == pytest.approx(other.time_s, rel=2e-3)


def test_floods_tell_contention_only_where_all_stages_share_the_machine() -> None:
    measured = calibrated(SHARED, Observed(observe(SHARED), 4, (True, False), 2, ACCEPTANCE))
    (device,) = measured.cluster.devices
    assert (device.contention, device.sharing) == (0.0, "fair")


def test_the_interval_follows_from_the_confidence_limits_of_the_costs() -> None:
    measured = calibrated(TRUE, SEEN)
    assert isinstance(measured.calibration, Calibration)
    key = "cluster.stages.0.cost.rows_ms.1"
    for half, widths in ((0.0, (0.0, 1e-9)), (2.0, (0.02, 1.0))):
        evidence = measured.calibration.model_copy(update={"intervals": {key: (10 - half, 10 + half)}})
        plain = build("policy.name=autoregressive").policy
        prediction = predict(measured.model_copy(update={"calibration": evidence, "policy": plain}), ACCEPTANCE)
        figure = compare(prediction, [prediction.trace], ACCEPTANCE.tokens)["tokens_per_second"]
        assert figure.interval
        assert figure.predicted
        assert widths[0] <= (figure.interval[1] - figure.interval[0]) / figure.predicted <= widths[1]


def test_a_network_of_chance_is_predicted_over_its_seeds() -> None:
    prediction = predict(build("cluster.links.jitter_ms=5"), ACCEPTANCE)
    assert len({one.emissions[-1].time_s for one in prediction.others}) > 1
    assert not predict(build(), ACCEPTANCE).others, "nothing is drawn where nothing is random"
    emulated = predict(build("cluster.links.jitter_ms=5", "execution.emulate=true"), ACCEPTANCE)
    assert not emulated.others, "real links draw with the same seed"
    assert emulated.trace.emissions == prediction.trace.emissions


def test_another_text_than_plain_decoding_s_is_an_error() -> None:
    prediction = predict(TRUE, ACCEPTANCE)
    with pytest.raises(InvariantError, match="run 1: its text differs"):
        compare(prediction, [simulate(build("seed=77"))], ACCEPTANCE.tokens)


@pytest.mark.parametrize(
    ("predicted", "measured", "verdict"),
    [
        ([10.1], [10.0, 10.2], Verdict.AGREES),
        ([10.5], [10.0, 10.2], Verdict.WITHIN),
        ([12.0], [10.0, 10.2], Verdict.DEVIATES),
        ([12.0, 10.1, 12.5], [10.0, 10.2], Verdict.AGREES),
        ([10.0], [8.0, 12.0], Verdict.NOISY),
        ([10.0], [10.1], Verdict.WITHIN),
        ([0.0], [0.0, 0.0], Verdict.AGREES),
        ([1.0], [0.0, 0.0], Verdict.DEVIATES),
        ([None], [1.0], Verdict.ABSENT),
        ([1.0], [None], Verdict.ABSENT),
    ],
)
def test_verdicts(predicted: list[float | None], measured: list[float | None], verdict: Verdict) -> None:
    assert make_figure(predicted, measured).verdict is verdict


values = st.floats(0.1, 100)


@given(values, st.lists(values, min_size=1, max_size=5))
def test_no_verdict_hides_an_error_above_the_stated_bound(predicted: float, measured: list[float]) -> None:
    figure = make_figure([predicted], measured)
    assert figure.error is not None
    assert figure.spread
    if figure.verdict is Verdict.WITHIN:
        assert abs(figure.error) <= WITHIN + 1e-9
    if figure.verdict is Verdict.AGREES:
        assert figure.spread[0] <= predicted <= figure.spread[1]
        assert abs(figure.error) <= 0.25, "ranges that are wide confirm nothing"
