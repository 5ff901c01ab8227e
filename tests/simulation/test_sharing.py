"""Machines whose cores are shared fairly: paces, boundaries, and that text and bound know nothing of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import flood
from scenario_builder import build

from pipesim.metrics import compute_metrics
from pipesim.simulation.bound import clairvoyant_bound
from pipesim.simulation.devices import Clock
from pipesim.simulation.pipeline import simulate
from pipesim.simulation.sharing import FairDevice

BOX = "cluster.devices=[{name: box, cores: %s, sharing: fair, contention: %s}]"
ALL = ["cluster.stages.0.device=box", "cluster.drafter.device=box", "cluster.head.device=box"]


def ends(cores: int, contention: float, works: list[int], demands: tuple[float, ...] = ()) -> list[int]:
    """When jobs end that all begin at once; they ask for all that a one-row run does where ``demands`` says nothing."""
    clock, found = Clock(), dict[int, int]()
    device = FairDevice(clock, "box", cores, contention)
    for index, work in enumerate(works):
        demand = demands[index] if demands else 1.0
        device.start(work, lambda call: found.__setitem__(call.value, clock.now), index, demand)
    clock.run_calls()
    return [found[index] for index in range(len(works))]


def test_jobs_share_the_cores_equally_and_speed_up_as_others_end() -> None:
    assert ends(1, 0.0, [1000, 1000]) == [2000, 2000]
    assert ends(2, 0.0, [1000, 3000, 3000]) == [1500, 3500, 3500]  # 2/3 each until 1500, then a core each
    assert ends(2, 0.5, [1000, 2000]) == [1500, 2500], "two at work are 1.5 times as slow, the last one is alone"
    assert ends(4, 0.5, [1000]) == [1000]


def test_jobs_disturb_each_other_by_what_they_read() -> None:
    assert ends(2, 0.5, [1000, 2000], (1.0, 0.5)) == [1250, 2250], "1 + 0.5 * 1 * 0.5, both ways"
    assert ends(2, 0.5, [1000, 2000], (0.5, 0.5)) == [1125, 2125]
    assert ends(2, 0.5, [1000, 2000], (0.0, 1.0)) == [1000, 2000], "a message reads nothing"
    assert ends(3, 0.5, [1000, 1000, 1000]) == [2000] * 3, "two others at work"
    assert ends(2, 0.5, [1000, 1000, 1000]) == [2250] * 3, "one of two others at work, each for two thirds of the time"


@pytest.mark.parametrize(
    ("cost", "rows", "work_ms", "demand"),
    [
        ("{kind: linear, constant_ms: 9, per_token_ms: 1}", 1, 10, 1.0),
        ("{kind: linear, constant_ms: 9, per_token_ms: 1}", 11, 20, 0.5),
        ("{kind: table, rows_ms: {1: 8, 4: 16}, kv_us_per_kilocell: 50000}", 4, 20, 9 / 20),  # of 20 cells each
        ("{kind: table, rows_ms: {1: 8, 4: 4}}", 4, 4, 1.0),  # nobody asks for more than a one-row run
    ],
)
def test_two_stages_at_work_disturb_each_other_by_how_fast_they_read(
    cost: str, rows: int, work_ms: float, demand: float
) -> None:
    stages = f"cluster.stages=[{{repeat: 2, device: box, void_ms: 3, cost: {cost}}}]"
    sets = ["cluster.links={latency_ms: 0}", stages, BOX % (2, 0.6)]
    filling, both_at_work = 2, 4
    taken = work_ms * (filling + both_at_work * (1 + 0.6 * demand**2))
    assert flood(build(*sets), rows, 5, cores=2) == pytest.approx(1e-3 * taken, rel=1e-6)
    assert flood(build(*sets), rows, 5, cores=2, void=True) == pytest.approx(3e-3 * 6), "a dead run reads no weights"


def test_a_stage_that_a_fault_slows_down_reads_more_slowly() -> None:
    cost = "{kind: linear, constant_ms: 9, per_token_ms: 1}"
    sets = [
        "cluster.links={latency_ms: 0}",
        f"cluster.stages=[{{repeat: 2, device: box, cost: {cost}}}]",
        BOX % (2, 0.6),
    ]
    faults = (
        f"{{kind: slow-stage, stage: {stage}, start_ms: 0, duration_ms: 1000000, factor: 2}}" for stage in range(2)
    )
    slowed = build(*sets, f"faults=[{', '.join(faults)}]")
    assert flood(slowed, 1, 5, cores=2) == pytest.approx(flood(build(*sets), 11, 5, cores=2), rel=1e-6), "20 ms each"


def test_a_draft_beside_a_run_disturbs_it_as_a_run_of_one_row() -> None:
    stages = "cluster.stages=[{device: box, cost: {kind: linear, constant_ms: 100}}]"
    trace = simulate(build(stages, *ALL, BOX % (8, 0.5), "cluster.links={latency_ms: 0}", "cluster.drafter.level_ms=7"))
    beside = [
        draft
        for draft in trace.drafts
        if any(span.start_s <= draft.start_s and draft.end_s <= span.end_s for span in trace.spans)
    ]
    assert beside
    assert {round(1e3 * (draft.end_s - draft.start_s) / 7 / 1.5, 6) for draft in beside} <= {1, 2, 3, 4}, "levels"


@given(
    st.integers(1, 4),
    st.floats(0, 5),
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_contention_only_ever_delays(cores: int, contention: float, jobs: list[tuple[int, float]]) -> None:
    works, demands = [work for work, _ in jobs], tuple(demand for _, demand in jobs)
    calm, disturbed = ends(cores, 0.0, works), ends(cores, contention, works, demands)
    assert all(late >= early - len(jobs) for early, late in zip(calm, disturbed, strict=True))
    assert max(disturbed) <= max(calm) * (1 + contention * (cores - 1)) + len(jobs)


@given(st.integers(1, 4), st.lists(st.integers(1, 10**9), min_size=1, max_size=6))
def test_no_work_is_lost_or_won(cores: int, works: list[int]) -> None:
    found = ends(cores, 0.0, works)
    assert max(found) >= max(max(works), sum(works) // cores) - len(works)
    assert max(found) <= sum(works) + len(works)
    assert sorted(found) == [end for _, end in sorted(zip(works, found, strict=True))], "the least work ends first"


def test_a_job_is_cut_at_the_next_boundary() -> None:
    clock, found = Clock(), list[int]()
    device = FairDevice(clock, "box", 1, 0.0)
    job = device.start(900, lambda _: found.append(clock.now))
    clock.at(301, lambda _: device.shorten(job, 3))
    clock.run_calls()
    assert found == [600]


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_a_lone_stage_takes_no_notice_of_how_its_machine_is_shared(cores: int) -> None:
    plain = ["policy.name=autoregressive", f"cluster.devices=[{{name: box, cores: {cores}}}]", *ALL]
    queued, fair = simulate(build(*plain)), simulate(build(*plain, "cluster.devices.0.sharing=fair"))
    assert [one.time_s for one in queued.emissions][1:] == pytest.approx([one.time_s for one in fair.emissions][1:])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["autoregressive", "speculative", "pipeinfer"]),
    st.integers(1, 3),
    st.sampled_from([0, 0.4]),
    st.floats(0, 1),
    st.sampled_from([(), ("faults=[{kind: crash, stage: 1, start_ms: 300, detect_ms: 50, restart_ms: 200}]",)]),
)
def test_text_and_bound_hold_on_shared_machines(
    policy: str, cores: int, contention: float, rate: float, faults: tuple[str, ...]
) -> None:
    sets = [f"policy.name={policy}", f"acceptance.rate={rate}", BOX % (cores, contention), *ALL, *faults]
    scenario = build(*sets)
    trace = simulate(scenario)
    assert trace.tokens == simulate(build(f"acceptance.rate={rate}", "policy.name=autoregressive")).tokens
    metrics = compute_metrics(trace)
    assert metrics.e2e_s is not None
    assert metrics.e2e_s >= clairvoyant_bound(scenario).e2e_s - 1e-9
    assert simulate(scenario) == trace


def test_messages_within_a_shared_machine_are_work_of_its_cores() -> None:
    """On a machine with nothing else to do a link takes its latency; beside busy cores it takes longer."""
    alone = ["policy.name=autoregressive", BOX % (2, 0), *ALL, "cluster.links={latency_ms: 4}"]
    elsewhere = [*alone[:1], "cluster.links={latency_ms: 4}"]
    one, other = (compute_metrics(simulate(build(*sets))).itl_s for sets in (alone, elsewhere))
    assert one
    assert other
    assert one.p50 == pytest.approx(other.p50, rel=1e-6), "one run at a time has the machine to itself"
    crowded = ["acceptance.rate=1", BOX % (1, 0), *ALL]
    costly, free = (
        compute_metrics(simulate(build(*crowded, f"cluster.links={{latency_ms: {ms}}}"))).e2e_s for ms in (4, 0)
    )
    queued = ["acceptance.rate=1", "cluster.devices=[{name: box, cores: 1}]", *ALL]
    apart, none = (
        compute_metrics(simulate(build(*queued, f"cluster.links={{latency_ms: {ms}}}"))).e2e_s for ms in (4, 0)
    )
    assert costly
    assert free
    assert apart
    assert none
    assert costly - free > 1.5 * (apart - none), "latency that needs a core is dearer than latency that does not"
