"""The simulated truth: rates, bursts and depths as asked for, the same for every policy; recorded files."""

import itertools
import json
import tracemalloc
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scenario_builder import build

from pipesim.acceptance_trace import FORMAT, AcceptanceTrace, read_acceptance_trace, write_acceptance_trace
from pipesim.errors import BadInputError
from pipesim.scenario import Acceptance, MarkovAcceptance
from pipesim.scheduling.commands import FinishReason
from pipesim.simulation.acceptance import DrawnTruth, RecordedTruth, Truth, make_truth
from pipesim.simulation.pipeline import simulate
from pipesim.trace import Trace

MANY = 20_000
KINDS: list[dict[str, Any]] = [
    {"kind": "iid", "rate": 0.7},
    {"kind": "per_depth", "rates": [0.9, 0.6, 0.3]},
    {"kind": "markov", "good_rate": 0.9, "bad_rate": 0.2, "good_tokens": 12, "bad_tokens": 6},
]
each_kind = pytest.mark.parametrize("settings", KINDS, ids=lambda settings: settings["kind"])


def truth(seed: int = 1, vocabulary: int = 1000, **settings: Any) -> DrawnTruth:
    model = TypeAdapter[Any](Acceptance).validate_python(settings or {"kind": "iid", "rate": 0.7})
    return DrawnTruth(model, seed, prompt_tokens=4, vocabulary=vocabulary)


def iid(rate: float = 0.7, **settings: Any) -> DrawnTruth:
    return truth(kind="iid", rate=rate, **settings)


def drafts(world: DrawnTruth, depth: int = 1, many: int = MANY) -> list[tuple[int, list[tuple[int, float]]]]:
    """(right token, candidates) of many positions along the text, each drafted at ``depth``."""
    found, previous = [], world.prompt[-1]
    for position in range(4, 4 + many):
        right = world.next(position, previous)
        found.append((right, list(world.candidates(position, previous, depth))))
        previous = right
    return found


def hits(world: DrawnTruth, depth: int = 1, many: int = MANY) -> list[bool]:
    return [right == candidates[0][0] for right, candidates in drafts(world, depth, many)]


def binomial(rate: float, many: float) -> Any:
    """Within four standard errors of ``rate``: of a fixed seed that fails at most once in 16,000 times by chance."""
    return pytest.approx(rate, abs=4 * sqrt(rate * (1 - rate) / many) + 1e-12)


# what the kinds share


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_the_first_candidate_is_right_as_often_as_the_rate_says(rate: float) -> None:
    assert fmean(hits(iid(rate))) == binomial(rate, MANY)


def test_misses_are_independent_of_the_position_before() -> None:
    after_a_miss = [now for before, now in pairwise(hits(iid(0.7))) if not before]
    assert fmean(after_a_miss) == binomial(0.7, len(after_a_miss))


@each_kind
def test_the_second_is_right_only_where_the_first_is_wrong(settings: dict[str, Any]) -> None:
    found = drafts(truth(**settings, runner_up=0.25), depth=2)
    missed = [(right, candidates) for right, candidates in found if candidates[0][0] != right]
    assert fmean(candidates[1][0] == right for right, candidates in missed) == binomial(0.25, len(missed))
    assert all(candidates[1][0] != right for right, candidates in found if candidates[0][0] == right)


@each_kind
def test_confidence_tells_right_from_wrong_and_stays_a_probability(settings: dict[str, Any]) -> None:
    found = drafts(truth(**settings, confidence_right=0.9, confidence_wrong=0.4, confidence_spread=0.2))
    right = [candidates[0][1] for token, candidates in found if candidates[0][0] == token]
    wrong = [candidates[0][1] for token, candidates in found if candidates[0][0] != token]
    assert fmean(wrong) == pytest.approx(0.4, abs=0.02)
    assert fmean(right) == pytest.approx(0.9 - 0.05 / 4, abs=0.01), "a quarter is clipped at 1, by 0.05 on average"
    for _, ((_, first), (_, second)) in found:
        assert 0 <= second <= first <= 1
        assert first + second <= 1


def test_a_second_candidate_that_is_right_gets_the_upper_half_of_the_confidence_that_is_left() -> None:
    found = drafts(iid(confidence_right=0.6, confidence_wrong=0.6, confidence_spread=0.0))
    right = [second for token, (_, (candidate, second)) in found if candidate == token]
    wrong = [second for token, (_, (candidate, second)) in found if candidate != token]
    assert min(right) >= 0.2 > max(wrong)
    assert fmean(right) == pytest.approx(0.3, abs=0.01)
    assert fmean(wrong) == pytest.approx(0.1, abs=0.01)


@given(
    st.integers(0, 2**40), st.integers(0, 10**5), st.integers(0, 2**31), st.integers(1, 40), st.integers(3, 50000),
    st.sampled_from(KINDS),
)  # fmt: skip
def test_the_two_candidates_differ_and_lie_in_the_vocabulary(
    seed: int, position: int, previous: int, depth: int, size: int, settings: dict[str, Any]
) -> None:
    world = truth(seed, size, **settings)
    (first, _), (second, _) = world.candidates(position, previous, depth)
    assert first != second
    assert {first, second, world.next(position, previous)} <= set(range(size))


@each_kind
@given(data=st.data())
def test_luck_depends_on_seed_and_position_not_on_what_was_asked_before(
    settings: dict[str, Any], data: st.DataObject
) -> None:
    asked = data.draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5)), max_size=30))
    world = truth(**settings)
    for position, depth in asked:
        assert world.candidates(position, 7, depth) == truth(**settings).candidates(position, 7, depth)


@each_kind
def test_another_seed_is_another_truth(settings: dict[str, Any]) -> None:
    assert hits(truth(1, **settings), many=100) != hits(truth(2, **settings), many=100)
    assert truth(-1, **settings).prompt != truth(1, **settings).prompt


class Spy:
    """A truth that notes what it was asked and what it answered."""

    stop_tokens: tuple[int, ...] = ()

    def __init__(self, world: Truth) -> None:
        self.world, self.prompt = world, world.prompt
        self.next = world.next
        self.seen: dict[tuple[int, int, int], Any] = {}

    def candidates(self, position: int, previous: int, depth: int) -> Any:
        return self.seen.setdefault((position, previous, depth), self.world.candidates(position, previous, depth))


@each_kind
def test_every_policy_meets_the_same_text_and_the_same_luck(settings: dict[str, Any]) -> None:
    spies, texts = [], set()
    for name in ("speculative", "pipeinfer"):
        scenario = build(f"acceptance={json.dumps(settings)}", f"policy.name={name}")
        spies.append(Spy(make_truth(scenario)))
        texts.add(simulate(scenario, truth=spies[-1]).tokens)
    assert len(texts) == 1
    one, other = (spy.seen for spy in spies)
    assert len(one.keys() & other.keys()) > 20
    assert all(one[key] == other[key] for key in one.keys() & other.keys())


@each_kind
def test_memory_stays_flat_in_tokens(settings: dict[str, Any]) -> None:
    world = truth(**settings)
    tracemalloc.start()
    try:
        for position in range(2_000):
            world.candidates(position, 0, 1)
        before, _ = tracemalloc.get_traced_memory()
        for position in range(2_000, 10_000):
            world.candidates(position, 0, 1)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < 1.1 * before


# per depth


def test_each_depth_has_its_own_rate_and_the_last_one_repeats() -> None:
    world = truth(kind="per_depth", rates=[0.9, 0.6, 0.3])
    for depth, rate in [(1, 0.9), (2, 0.6), (3, 0.3), (4, 0.3), (100, 0.3)]:
        assert fmean(hits(world, depth)) == binomial(rate, MANY)


def test_what_is_right_at_one_depth_is_right_at_every_depth_with_a_higher_rate() -> None:
    world = truth(kind="per_depth", rates=[0.9, 0.6, 0.3])
    near, middle, far = (hits(world, depth, many=500) for depth in (1, 2, 3))
    assert all(farther <= nearer for one in zip(far, middle, near, strict=True) for farther, nearer in pairwise(one))


def test_depth_counts_what_is_in_flight_too() -> None:
    """Drafts of one token each, one behind the other: only those right after the committed text have the first rate."""
    scenario = build("acceptance={kind: per_depth, rates: [1, 0]}", "policy={name: pipeinfer, micro_batch: 1}")
    trace = simulate(scenario, truth=(spy := Spy(make_truth(scenario))))
    assert {depth for _, _, depth in spy.seen} >= {1, 2, 3}
    assert 0 < trace.drafted_accepted < trace.drafted_verified


def test_one_rate_for_all_depths_is_the_iid_truth() -> None:
    assert drafts(truth(kind="per_depth", rates=[0.7]), depth=5, many=500) == drafts(iid(0.7), many=500)


# bursts


def bursts(states: list[bool], state: bool) -> list[int]:
    """Lengths of the stretches of ``state``, without the first and the last stretch, which the ends cut off."""
    lengths = [(key, len(list(stretch))) for key, stretch in itertools.groupby(states)][1:-1]
    return [length for key, length in lengths if key is state]


@pytest.mark.parametrize(("good", "bad"), [(20, 10), (4, 30), (2, 2), (1.5, 3)])
def test_stretches_are_geometric_with_the_mean_lengths_asked_for(good: float, bad: float) -> None:
    """With rates 1 and 0 the hits are the states themselves."""
    seen = hits(truth(kind="markov", good_rate=1, bad_rate=0, good_tokens=good, bad_tokens=bad))
    for state, mean in ((True, good), (False, bad)):
        lengths = bursts(seen, state)
        error = 4 * sqrt(mean * (mean - 1) / len(lengths))  # a geometric length with mean m has variance m (m - 1)
        assert fmean(lengths) == pytest.approx(mean, abs=error)
        assert fmean(length == 1 for length in lengths) == binomial(1 / mean, len(lengths))


def test_the_stationary_rate_is_met() -> None:
    settings = {"kind": "markov", "good_rate": 0.9, "bad_rate": 0.2, "good_tokens": 12, "bad_tokens": 6}
    section = MarkovAcceptance.model_validate(settings)
    assert section.good_share == pytest.approx(2 / 3)
    assert section.rate == pytest.approx((2 * 0.9 + 0.2) / 3)
    # neighbours are correlated: with lag-1 factor 1 - 1/12 - 1/6 = 3/4 a mean has up to (1 + 3/4) / (1 - 3/4) times the
    # variance of independent draws
    assert fmean(hits(truth(**settings))) == binomial(section.rate, MANY / 7)


def test_within_a_stretch_hits_are_as_frequent_as_its_rate_says() -> None:
    shape = {"kind": "markov", "good_tokens": 12, "bad_tokens": 6}
    good = hits(truth(**shape, good_rate=1, bad_rate=0))
    seen = hits(truth(**shape, good_rate=0.9, bad_rate=0.2))
    for state, rate in ((True, 0.9), (False, 0.2)):
        inside = [hit for hit, at in zip(seen, good, strict=True) if at is state]
        assert fmean(inside) == binomial(rate, len(inside))


def test_equal_rates_are_the_iid_truth() -> None:
    assert drafts(truth(kind="markov", good_rate=0.7, bad_rate=0.7), many=500) == drafts(iid(0.7), many=500)


def test_stretches_shorter_than_by_chance_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"acceptance: stretches of good_tokens = 1\.5"):
        build("acceptance={kind: markov, good_rate: 1, bad_rate: 0, good_tokens: 1.5, bad_tokens: 2}")


def test_rates_are_probabilities_and_at_least_one() -> None:
    refused = {"[]": "at least 1 item", "[0.5, 1.5]": r"acceptance\.rates\.1 = 1\.5", "['1']": "number"}
    for rates, complaint in refused.items():
        with pytest.raises(BadInputError, match=complaint):
            build(f"acceptance={{kind: per_depth, rates: {rates}}}")


# recorded


def write_trace(path: Path, **changes: Any) -> Path:
    tokens = list(range(100, 140))
    candidates = [[[token if token % 3 else 1, 0.9], [2, 0.05]] for token in tokens]
    content = {"format": FORMAT, "prompt_tokens": [5, 6], "tokens": tokens, "candidates": candidates, **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def recording(**changes: Any) -> AcceptanceTrace:
    content = {"prompt_tokens": (1,), "tokens": (5, 6, 7), "candidates": (((5, 0.9),), ((6, 0.9),), ((7, 0.9),))}
    return AcceptanceTrace.model_validate({"format": FORMAT, **content, **changes})


@pytest.fixture
def recorded(tmp_path: Path) -> list[str]:
    path = write_trace(tmp_path / "trace.json")
    return [f"acceptance={{kind: trace, file: {path}}}", "workload={max_new_tokens: 40}"]


def test_a_recorded_trace_gives_its_text_under_every_policy(recorded: list[str]) -> None:
    for name in ("autoregressive", "speculative", "pipeinfer"):
        trace = simulate(build(*recorded, f"policy.name={name}"))
        assert trace.tokens == tuple(range(100, 140))
        assert trace.prompt_tokens == 2


def test_the_recorded_prompt_is_as_long_as_a_given_one_for_memory_context_and_drafter(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.json", prompt_tokens=list(range(300)))
    sets = [
        "model={profile: llama-2-7b}",
        "cluster.stages.0.cost={kind: roofline, profile: h100-sxm}",
        "cluster.drafter={model: {profile: tinyllama-1.1b}, cost: {kind: roofline, profile: rtx-4090}}",
        f"acceptance={{kind: trace, file: {path}}}",
    ]
    short, recorded, given = (
        build(*sets, f"workload={{max_new_tokens: 40, {prompt}}}")
        for prompt in ("prompt_tokens: 2", "prompt: hi", "prompt_tokens: 300")
    )
    assert recorded.stage_summaries() == given.stage_summaries() != short.stage_summaries()
    assert recorded.drafter() == given.drafter() != short.drafter()
    assert recorded.kv_cells() == given.kv_cells() == short.kv_cells() + 298


def test_a_scenario_may_name_a_trace_that_a_real_run_is_about_to_record() -> None:
    assert build("acceptance={kind: trace, file: nowhere.json}", "workload={max_new_tokens: 4, prompt: some text}")


def test_a_text_that_a_stop_string_ended_ends_in_simulation(tmp_path: Path) -> None:
    def run(policy: str, **changes: Any) -> Trace:
        path = write_trace(tmp_path / "trace.json", **changes)
        limit = 90 if changes else 40
        sets = [f"acceptance={{kind: trace, file: {path}}}", f"workload={{max_new_tokens: {limit}}}"]
        return simulate(build(*sets, f"policy.name={policy}"))

    plain = run("autoregressive")
    for name in ("autoregressive", "speculative", "pipeinfer"):
        trace = run(name, stop_string=True, stop_tokens=[7])
        assert trace.tokens[:-1] == plain.tokens[:-1], "the last one stands for the string"
        assert len(trace.tokens) == 40
        assert trace.finish_reason is FinishReason.STOP


def test_recorded_candidates_decide_what_is_accepted(recorded: list[str]) -> None:
    trace = simulate(build(*recorded, "policy={name: speculative, max_nodes: 1}"))
    world = make_truth(build(*recorded))
    assert list(world.candidates(2 + 2, 101, 1)) == [(1, 0.9), (2, 0.05)]
    assert 0 < trace.drafted_accepted < trace.drafted_verified


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokens": "text"}, "tokens = 'text': Input should be a valid array"),
        ({"tokens": [1, -2], "candidates": [[], []]}, r"tokens\.1 = -2"),
        ({"candidates": []}, "0 lists of candidates for 40 tokens"),
        ({"candidates": [[[1, 1.5]]] * 40}, r"candidates\.0\.0\.1 = 1\.5"),
        ({"candidates": [[[1, 0.5], [1, 0.2]]] * 40}, "name a token twice"),
        ({"detours": [[3, 9, [[1, 0.5], [1, 0.2]]]]}, "name a token twice"),
        ({"prompt_tokens": []}, "prompt_tokens"),
        ({"prompt_tokens": None}, "prompt_tokens: Field required"),
        ({"format": None}, "format: Field required"),
        ({"format": "pipesim-acceptance-2"}, "format = 'pipesim-acceptance-2': Input should be 'pipesim-acceptance-1'"),
        ({"more": 1}, "more = 1: Extra inputs"),
    ],
)
def test_a_malformed_trace_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    path = write_trace(tmp_path / "trace.json", **changes)
    with pytest.raises(BadInputError, match=complaint) as caught:
        make_truth(build(f"acceptance={{kind: trace, file: {path}}}"))
    assert str(path) in str(caught.value)


def test_a_trace_that_does_not_fit_the_workload_is_refused(recorded: list[str]) -> None:
    with pytest.raises(BadInputError, match="max_new_tokens = 41"):
        make_truth(build(*recorded, "workload.max_new_tokens=41"))
    with pytest.raises(BadInputError, match="prompt_tokens = 3"):
        make_truth(build(*recorded, "workload.prompt_tokens=3"))
    with pytest.raises(BadInputError, match="cannot be read"):
        make_truth(build("acceptance={kind: trace, file: nowhere.json}"))


def test_a_simulation_needs_an_acceptance_section() -> None:
    with pytest.raises(BadInputError, match="acceptance"):
        simulate(build("acceptance=null"))


def test_off_the_recorded_text_the_drafter_goes_on_as_its_detours_say() -> None:
    plain = RecordedTruth(recording())
    assert plain.candidates(2, 99, 1) == ((6, 0.9),), "without detours as on the text"
    world = RecordedTruth(recording(detours=((2, 99, ((8, 0.5),)),)))
    assert world.candidates(2, 5, 1) == ((6, 0.9),)
    assert world.candidates(2, 99, 1) == ((8, 0.5),)
    assert world.candidates(3, 98, 2) == (), "a way that was never recorded ends"


def test_a_text_that_a_stop_token_ended_ends_there_in_simulation_too(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.json", stop_tokens=[139])
    for name in ("autoregressive", "speculative", "pipeinfer"):
        sets = [f"acceptance={{kind: trace, file: {path}}}", "workload={max_new_tokens: 90}", f"policy.name={name}"]
        trace = simulate(build(*sets))
        assert trace.tokens == tuple(range(100, 140))
        assert (trace.finish_reason, trace.complete) == ("stop", True)


@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    token, confidence = st.integers(0, 2**31), st.floats(0, 1)
    ranked = st.lists(st.tuples(token, confidence), max_size=4, unique_by=lambda one: one[0]).map(tuple)
    tokens = tuple(data.draw(st.lists(token, max_size=5)))
    trace = recording(
        tokens=tokens,
        candidates=tuple(data.draw(ranked) for _ in tokens),
        detours=data.draw(st.none() | st.lists(st.tuples(st.integers(1, 9), token, ranked), max_size=3).map(tuple)),
        sampling=data.draw(st.none() | st.just({"temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 3})),
        model=data.draw(st.none() | st.text()),
        stop_tokens=data.draw(st.just(()) | st.just((2,))),
    )
    path = tmp_path_factory.getbasetemp() / "written.json"
    with path.open("w", encoding="utf-8") as stream:
        write_acceptance_trace(trace, stream)
    assert read_acceptance_trace(path) == trace
