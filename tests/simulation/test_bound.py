"""No policy beats the clairvoyant bound, and the bound is reached where theory says so."""

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import PLAIN, build
from troubles import chance, faults

from pipesim.acceptance_trace import FORMAT, AcceptanceTrace
from pipesim.metrics import compute_metrics
from pipesim.scenario import Link, Scenario
from pipesim.scenario_file import build_scenario
from pipesim.scheduling.tree import Candidate
from pipesim.simulation.acceptance import RecordedTruth
from pipesim.simulation.bound import _Wire, clairvoyant_bound
from pipesim.simulation.links import HEADER_BYTES
from pipesim.simulation.pipeline import simulate
from pipesim.trace import Trace

DEVICES = (None, None, "a", "b")
NO_LINKS = "cluster.links={}"
SHAPE = {"name": "toy", "layers": 12, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 64, "vocabulary": 50}
CERTAIN = "acceptance={kind: iid, rate: 1, confidence_right: 1, confidence_spread: 0}"


def emission_times(trace: Trace) -> list[float]:
    return [emission.time_s for emission in trace.emissions for _ in emission.tokens]


def assert_bounded(trace: Trace, times: Sequence[float]) -> None:
    seen = emission_times(trace)
    early = [i for i, (at, bound) in enumerate(zip(seen, times, strict=True)) if at < bound]
    assert not early, f"token {early[0]} came at {seen[early[0]]} s, the bound says {times[early[0]]} s"


def recorded(text: list[int], candidates: list[Sequence[Candidate]], stop: int = 0) -> RecordedTruth:
    return RecordedTruth(
        AcceptanceTrace(
            format=FORMAT,
            prompt_tokens=(1, 2, 3),
            tokens=tuple(text),
            stop_tokens=(stop,),
            candidates=tuple(map(tuple, candidates)),
        )
    )


milliseconds = st.one_of(st.just(0.0), st.floats(0.001, 30))
bandwidths = st.sampled_from([None, 0.001, 0.05, 1.0, 100.0])
own_links = st.fixed_dictionaries({}, optional={"latency_ms": milliseconds, "bandwidth_gbps": bandwidths})


roofline_costs = st.fixed_dictionaries(
    {
        "kind": st.just("roofline"),
        "memory_bandwidth_gbytes_s": st.floats(0.001, 10),
        "peak_tflops": st.sampled_from([1e-5, 1e-3, 1.0]),
        "overhead_ms": milliseconds,
    },
)


@st.composite
def fitted_costs(draw: st.DrawFn) -> dict[str, Any]:
    shared = {
        "per": draw(st.sampled_from(["stage", "layer"])),
        "kv_us_per_kilocell": draw(st.sampled_from([0, 0, 100, 50_000])),
        "prefill_per_token_ms": draw(st.one_of(st.none(), milliseconds)),
    }
    if draw(st.booleans()):
        rows_ms = draw(st.dictionaries(st.integers(1, 20), st.floats(0.01, 20), min_size=1, max_size=4))
        return {"kind": "table", "rows_ms": rows_ms, **shared}  # measured times may well fall with more rows
    return {"kind": "linear", "constant_ms": draw(st.floats(0.01, 20)), "per_token_ms": draw(milliseconds), **shared}


rates = st.sampled_from([0, 0.5, 0.9, 1])
acceptances = st.one_of(
    st.fixed_dictionaries({"kind": st.just("iid"), "rate": rates}),
    st.fixed_dictionaries({"kind": st.just("per_depth"), "rates": st.lists(rates, min_size=1, max_size=4)}),
    st.fixed_dictionaries({"kind": st.just("markov"), "good_rate": rates, "bad_rate": rates}),
)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    bar = st.floats(0, 1)
    size, branches = st.integers(1, 8), st.integers(1, 4)
    match draw(st.sampled_from(["autoregressive", "speculative", "pipeinfer"])):
        case "speculative":
            own = {"max_nodes": size, "branches": branches, "cutoff": bar, "split": bar}
            return {"name": "speculative", **draw(st.fixed_dictionaries(own))}
        case "pipeinfer":
            bars = {**dict.fromkeys(("p_accept", "p_split", "p_recovery"), bar), "p_decay": st.sampled_from([0, 0.2])}
            switches = dict.fromkeys(
                ("asynchronous", "continuous", "multibuffering", "cancellation", "always_canonical", "calibrated"),
                st.booleans(),
            )
            own = {"micro_batch": size, "branches": branches, "partitions": st.integers(1, 8)}
            return {"name": "pipeinfer", **draw(st.fixed_dictionaries({**own, **bars, **switches}))}
        case plain:
            return {"name": plain}


@st.composite
def scenarios(draw: st.DrawFn, troubled: bool = False) -> Scenario:
    """Clusters of all sorts: slow and fast drafters, links and heads, shared devices, falling tables.

    ``troubled``: links vary, by chance and over time, devices have network interfaces, and things go wrong.
    """
    device = st.sampled_from(DEVICES)
    stages = [
        {
            "cost": draw(st.one_of(fitted_costs(), fitted_costs(), roofline_costs)),
            "device": draw(device),
            "repeat": draw(st.integers(1, 3)),
        }
        for _ in range(draw(st.integers(1, 3)))
    ]
    cluster: dict[str, Any] = {
        "stages": stages,
        "drafter": {
            "level_ms": draw(milliseconds),
            "prefill_per_token_ms": draw(milliseconds),
            "device": draw(device),
        },
        "head": {"overhead_ms": draw(milliseconds), "device": draw(device)},
        "links": {
            "latency_ms": draw(milliseconds),
            "bandwidth_gbps": draw(bandwidths),
            "hops": [{"hop": draw(st.integers(0, len(stages))), **draw(own_links)}],
            "draft": draw(own_links),
            "control": draw(own_links),
            **(draw(chance) if troubled else {}),
        },
        "prefill_chunk": draw(st.integers(1, 16)),
        "prefill_window": draw(st.integers(1, 4)),
    }
    users = {cluster["drafter"]["device"], cluster["head"]["device"], *(stage["device"] for stage in stages)}
    nics = bandwidths if troubled else st.none()
    cluster["devices"] = [
        {"name": name, "cores": draw(st.integers(1, 3)), "nic_gbps": draw(nics)} for name in sorted(users - {None})
    ]
    pipeline = sum(stage["repeat"] for stage in stages)
    wrong = draw(st.lists(faults(pipeline, until_ms=1500), max_size=4)) if troubled else []
    return build_scenario(
        {
            **PLAIN,
            "model": {**SHAPE, "hidden": draw(st.sampled_from([4, 4096]))},
            "cluster": cluster,
            "workload": {"prompt_tokens": draw(st.integers(1, 40)), "max_new_tokens": draw(st.integers(1, 30))},
            "policy": draw(policies()),
            "acceptance": {**draw(acceptances), "runner_up": draw(st.sampled_from([0, 0.5, 1]))},
            "faults": wrong,
            "seed": draw(st.integers(0, 99)),
        }
    )


@settings(deadline=None, max_examples=200)
@given(scenarios() | scenarios(troubled=True))
def test_no_policy_shows_any_token_earlier(scenario: Scenario) -> None:
    bound = clairvoyant_bound(scenario)
    trace = simulate(scenario)
    assert_bounded(trace, bound.emissions_s)
    metrics = compute_metrics(trace)
    assert metrics.e2e_s is not None
    assert 0 < bound.fraction(metrics.e2e_s) <= 1
    if metrics.tokens_per_second is not None and bound.tokens_per_second is not None:
        assert metrics.tokens_per_second <= bound.tokens_per_second * (1 + 1e-9)


COURSE = "{points: [{at_ms: 100, latency_ms: 0.1, bandwidth_gbps: 3}, {at_ms: 300, latency_ms: 2}], shape: ramps}"
CRASH = "{kind: crash, stage: 1, start_ms: 90, detect_ms: 0, restart_ms: 0}"


@pytest.mark.parametrize(
    "change",
    [
        f"cluster.links.profile={COURSE}",
        f"cluster.links.draft.profile={COURSE}",
        "cluster.links.preset=wifi",
        f"faults=[{CRASH}, {{kind: slow-stage, stage: 0, start_ms: 200, duration_ms: 50, factor: 2}}]",
        "faults=[{kind: bandwidth, cap_gbps: 0.01, start_ms: 50, duration_ms: 50}]",
    ],
)
@pytest.mark.parametrize("policy", ["autoregressive", "speculative", "pipeinfer"])
def test_no_policy_is_earlier_where_links_vary_or_things_go_wrong(change: str, policy: str) -> None:
    scenario = build(change, f"policy.name={policy}")
    assert_bounded(simulate(scenario), clairvoyant_bound(scenario).emissions_s)


@settings(deadline=None, max_examples=60)
@given(scenarios(), st.data())
def test_no_policy_is_earlier_whatever_the_recorded_truth(scenario: Scenario, data: st.DataObject) -> None:
    """A truth of bursts, with one candidate, two or none, that may end the text with a stop token."""
    count = scenario.workload.max_new_tokens
    text = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    ranked: list[Sequence[Candidate]] = []
    for token in text:
        others = [(41, 0.9), (token, 0.9)], [(token, 0.9), (41, 0.9)], [(token, 0.5)], [(41, 0.9)], []
        ranked.append(data.draw(st.sampled_from(others)))
    truth = recorded(text, ranked, stop=data.draw(st.integers(1, 40)))
    trace = simulate(scenario, truth=truth)
    assert_bounded(trace, clairvoyant_bound(scenario, truth).emissions_s)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["cluster.head.overhead_ms=0.7", "cluster.prefill_chunk=3", "cluster.prefill_window=2"],
        ["cluster.stages.0.cost={kind: linear, constant_ms: 3, per_token_ms: 1, kv_us_per_kilocell: 9000}"],
        ["cluster.stages.0.cost={kind: table, rows_ms: {1: 4, 8: 5}}", "cluster.links.bandwidth_gbps=0.01"],
        ["cluster.stages.0.repeat=1", NO_LINKS],
        [
            f"model={json.dumps(SHAPE)}",
            "cluster.stages.0.cost={kind: roofline, memory_bandwidth_gbytes_s: 0.01, peak_tflops: 1}",
        ],
    ],
)
def test_plain_decoding_beside_a_useless_drafter_is_the_bound_exactly(sets: list[str]) -> None:
    useless = ["acceptance.rate=0", "acceptance.runner_up=0", "policy.name=autoregressive"]
    scenario = build(*sets, *useless)
    assert clairvoyant_bound(scenario).emissions_s == tuple(emission_times(simulate(scenario)))


def test_the_first_token_is_exact_for_every_policy() -> None:
    for policy in ("{name: pipeinfer}", "{name: speculative}", "{name: autoregressive}"):
        scenario = build(f"policy={policy}", "cluster.prefill_chunk=3", "cluster.prefill_window=1")
        assert clairvoyant_bound(scenario).emissions_s[0] == simulate(scenario).emissions[0].time_s


def test_a_certain_drafter_that_is_slower_than_the_stages_is_the_bound() -> None:
    """Drafting is all that can be waited for: one level a token."""
    sets = [CERTAIN, NO_LINKS, "cluster.drafter.level_ms=15", "workload.max_new_tokens=400"]
    scenario = build(*sets, "policy={name: pipeinfer, micro_batch: 1, partitions: 16}")
    bound, metrics = clairvoyant_bound(scenario), compute_metrics(simulate(scenario))
    assert bound.tokens_per_second == pytest.approx(1 / 15e-3, rel=0.02)
    assert metrics.e2e_s is not None
    assert bound.fraction(metrics.e2e_s) > 0.97


def test_certain_drafts_where_batches_save_nothing_are_bound_by_the_slowest_stage() -> None:
    sets = [CERTAIN, NO_LINKS, "cluster.drafter.level_ms=1", "workload.max_new_tokens=400"]
    stages = ", ".join(f"{{cost: {{kind: linear, constant_ms: 0.01, per_token_ms: {ms}}}}}" for ms in (7, 12, 9))
    scenario = build(*sets, f"cluster.stages=[{stages}]", "policy={name: pipeinfer, micro_batch: 2}")
    bound, metrics = clairvoyant_bound(scenario), compute_metrics(simulate(scenario))
    assert bound.tokens_per_second == pytest.approx(1 / 12e-3, rel=0.02)
    assert metrics.e2e_s is not None
    assert bound.fraction(metrics.e2e_s) > 0.97


def test_certain_drafts_over_a_slow_link_are_bound_by_its_bytes() -> None:
    sets = [CERTAIN, "cluster.drafter.level_ms=0", "workload.max_new_tokens=400", "model.hidden=4096"]
    scenario = build(*sets, "cluster.links={latency_ms: 1, bandwidth_gbps: 0.01}", "cluster.links.draft.latency_ms=0")
    row_s = (4096 * 4 + 12) * 8 / 0.01e9
    assert clairvoyant_bound(scenario).tokens_per_second == pytest.approx(1 / row_s, rel=0.02)


def test_stages_that_share_a_core_share_its_time() -> None:
    """Three stages of 11 ms a row, of which 9 ms are the row's own, on one core and on two."""
    sets = [CERTAIN, NO_LINKS, "cluster.drafter.level_ms=0", "workload.max_new_tokens=400"]
    sets.append("cluster.stages=[{repeat: 3, device: box, cost: {kind: linear, constant_ms: 2, per_token_ms: 9}}]")
    for cores in (1, 2):
        scenario = build(*sets, f"cluster.devices=[{{name: box, cores: {cores}}}]")
        assert clairvoyant_bound(scenario).tokens_per_second == pytest.approx(cores / 27e-3, rel=0.03)


def test_a_miss_costs_a_whole_traversal_and_the_policy_plays_no_part() -> None:
    """Right, right, wrong, ...: what lies between two misses goes through the pipeline together."""
    sets = [NO_LINKS, "cluster.drafter.level_ms=2", "workload={prompt_tokens: 3, max_new_tokens: 61}"]
    sets.append("cluster.stages.0.cost={kind: linear, constant_ms: 10}")
    ranked = [[(7 if index % 3 else 8, 0.9)] for index in range(61)]
    truth = recorded([7] * 61, ranked)
    bounds = {
        clairvoyant_bound(build(*sets, f"policy.name={policy}"), truth)
        for policy in ("pipeinfer", "autoregressive", "speculative")
    }
    (bound,) = bounds
    assert bound.tokens_per_second == pytest.approx(3 / (30e-3 + 2 * 2e-3), rel=0.02)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("cluster.drafter.level_ms=20", "slower drafts"),
        ("cluster.drafter.prefill_per_token_ms=30", "a drafter that reads the prompt slowly"),
        ("cluster.links.draft.latency_ms=40", "a drafter far away"),
        ("cluster.head.overhead_ms=5", "a slow head"),
        ("cluster.links.latency_ms=5", "far stages"),
        ("cluster.stages.0.cost.per_token_ms=20", "dear rows"),
        ("acceptance.rate=0.4", "worse drafts"),
        ("acceptance.runner_up=0", "runners-up that are never right"),
    ],
)
def test_everything_that_slows_a_clairvoyant_scheduler_is_in_the_bound(change: str, what: str) -> None:
    assert clairvoyant_bound(build(change)).e2e_s > clairvoyant_bound(build()).e2e_s * 1.001, what


def test_a_single_token_has_a_bound_but_no_speed() -> None:
    bound = clairvoyant_bound(build("workload.max_new_tokens=1"))
    assert bound.tokens_per_second is None
    assert len(bound.emissions_s) == 1


def test_it_costs_a_fraction_of_the_simulation() -> None:
    scenario = build("cluster.stages.0.repeat=8", "workload.max_new_tokens=500")
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        simulate(scenario)
        middle = time.perf_counter()
        clairvoyant_bound(scenario)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    assert min(ratios) < 0.2


def test_text_that_must_come_near_before_it_can_be_drafted_costs_time() -> None:
    """Rates that fall with depth lie between the first one everywhere and the last one everywhere."""
    falling, near, far = (
        clairvoyant_bound(build(f"acceptance={{kind: per_depth, rates: {rates}}}", "workload.max_new_tokens=200")).e2e_s
        for rates in ("[0.9, 0.9, 0.3]", "[0.9]", "[0.3]")
    )
    assert near * 1.1 < falling < far / 1.1


def test_a_drafter_that_pays_for_each_branch_is_at_its_cheapest_in_the_bound() -> None:
    shape = '{"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 64, "vocabulary": 50}'
    cost = "{kind: roofline, memory_bandwidth_gbytes_s: 10, peak_tflops: 1.0e-4}"
    drafter = f"cluster.drafter={{model: {shape}, cost: {cost}}}"
    wide, narrow = (build(drafter, f"policy={{name: pipeinfer, branches: {count}}}") for count in (8, 1))
    assert wide.drafter().level_ms > 1.5 * narrow.drafter().level_ms
    assert clairvoyant_bound(wide) == clairvoyant_bound(narrow)


def test_a_draft_that_is_waited_for_is_the_bound_exactly() -> None:
    """Wrong, right: the second token leaves as soon as its draft is there, alone, on links that are free again.

    The request for it carries the prompt, too: three tokens of 4 bytes that the bound supposes to be there already.
    """
    truth = recorded([7, 7, 7], [[(8, 0.9)], [(7, 0.9)], [(8, 0.9)]])
    sets = ["workload={prompt_tokens: 3, max_new_tokens: 3}", "cluster.links.bandwidth_gbps=0.001"]
    drafter = ["cluster.links.draft={latency_ms: 3, bandwidth_gbps: 0.001}", "cluster.drafter.level_ms=11"]
    scenario = build(*sets, *drafter, "policy={name: pipeinfer, micro_batch: 1}", "cluster.head.overhead_ms=0.3")
    first, second, third = clairvoyant_bound(scenario, truth).emissions_s
    assert emission_times(simulate(scenario, truth=truth)) == [
        first,
        second,
        pytest.approx(third + 12 * 8e-6, abs=1e-9),
    ]


def test_a_slow_draft_link_is_not_beaten_by_drafts_of_one_token() -> None:
    count = 60
    truth = recorded([7] * count, [[(7 if index % 2 else 8, 0.9)] for index in range(count)])
    sets = [f"workload={{prompt_tokens: 3, max_new_tokens: {count}}}", "policy={name: pipeinfer, micro_batch: 1}"]
    sets += ["cluster.links.draft={latency_ms: 0, bandwidth_gbps: 0.00002}", "cluster.drafter.level_ms=0"]
    sets += ["cluster.stages.0.cost.constant_ms=100"]
    scenario = build(*sets)
    bound, trace = clairvoyant_bound(scenario, truth), simulate(scenario, truth=truth)
    assert_bounded(trace, bound.emissions_s)
    assert bound.fraction(emission_times(trace)[-1]) > 0.8


@pytest.mark.parametrize(
    "cost",
    [
        # reading the context costs most, and a run's rows share it: what counts is their mean context
        "{kind: roofline, memory_bandwidth_gbytes_s: 0.001, peak_tflops: 1000}",
        "{kind: table, rows_ms: {1: 10, 7: 10, 8: 2}}",
    ],
)
def test_runs_that_are_cheaper_than_a_lone_row_are_not_beaten(cost: str) -> None:
    model = json.dumps({**SHAPE, "hidden": 64, "heads": 64, "kv_heads": 64, "intermediate": 1, "kv_bytes": 1000})
    sets = [NO_LINKS, "cluster.drafter.level_ms=0", "policy={name: speculative, max_nodes: 7, split: 1}"]
    workload = "workload={prompt_tokens: 3, max_new_tokens: 9}"
    scenario = build(f"model={model}", f"cluster.stages.0.cost={cost}", workload, *sets)
    truth = recorded([7] * 9, [[(8, 0.9)], *[[(7, 0.9)]] * 8])
    trace = simulate(scenario, truth=truth)
    assert len(trace.emissions) == 2, "the first token, and a run with all others"
    assert_bounded(trace, clairvoyant_bound(scenario, truth).emissions_s)


DEAR_CONTEXT = json.dumps({**SHAPE, "hidden": 64, "heads": 64, "kv_heads": 64, "intermediate": 1, "kv_bytes": 1000})
NARROW_LINKS = "cluster.links={bandwidth_gbps: 0.001}"


@pytest.mark.parametrize(
    ("token", "sets"),
    [
        # reading the context costs most: all rows, prefilled anew together, read less of it than the newest alone
        (
            20,
            [
                f"model={DEAR_CONTEXT}",
                NO_LINKS,
                "cluster.stages.0.cost={kind: roofline, memory_bandwidth_gbytes_s: 0.001, peak_tflops: 1000}",
            ],
        ),
        # bytes cost most: a row that is prefilled anew has no KV operation before it
        (
            0,
            [
                "model.hidden=1",
                NARROW_LINKS,
                "cluster.prefill_chunk=1",
                "cluster.stages.0={repeat: 12, cost: {kind: linear, constant_ms: 0.001}}",
            ],
        ),
    ],
)
def test_a_crash_may_shorten_the_next_step_and_does_not_beat_the_bound(token: int, sets: list[str]) -> None:
    sets = [*sets, "workload={prompt_tokens: 1, max_new_tokens: 30}", "policy.name=autoregressive"]
    sets += ["acceptance.rate=0", "acceptance.runner_up=0"]
    whole = emission_times(simulate(build(*sets)))
    crash = f"{{kind: crash, stage: 0, start_ms: {whole[token] * 1e3}, detect_ms: 0.00001, restart_ms: 0}}"
    scenario = build(*sets, f"faults=[{crash}]")
    trace = simulate(scenario)
    assert emission_times(trace)[token + 1] < whole[token + 1]
    assert_bounded(trace, clairvoyant_bound(scenario).emissions_s)


@given(st.floats(1e-6, 1e5), st.integers(1, 20_000), st.integers(1, 5000))
def test_shares_of_rows_never_exceed_their_message(gbps: float, row_bytes: int, rows: int) -> None:
    wire = _Wire.of(Link(bandwidth_gbps=gbps), row_bytes)
    assert rows * wire.share(0) <= wire.occupied(HEADER_BYTES + rows * row_bytes)
