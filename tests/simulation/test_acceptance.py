import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenario_builder import build

from pipesim.errors import BadInputError
from pipesim.scenario import IidAcceptance
from pipesim.simulation.acceptance import IidTruth, RecordedTruth, make_truth
from pipesim.simulation.pipeline import simulate

MANY = 4000


def truth(seed: int = 1, **settings: Any) -> IidTruth:
    return IidTruth(IidAcceptance(**{"kind": "iid", "rate": 0.7, **settings}), seed, prompt_tokens=4, vocabulary=1000)


def drafts(world: IidTruth) -> list[tuple[int, list[tuple[int, float]]]]:
    """(right token, candidates) of many positions along the text."""
    found, previous = [], world.prompt[-1]
    for position in range(4, MANY):
        right = world.next(position, previous)
        found.append((right, list(world.candidates(position, previous))))
        previous = right
    return found


def test_the_first_candidate_is_right_as_often_as_the_rate_says() -> None:
    for rate in (0.0, 0.3, 0.7, 1.0):
        hits = fmean(right == candidates[0][0] for right, candidates in drafts(truth(rate=rate)))
        assert hits == pytest.approx(rate, abs=0.025)


def test_the_second_is_right_only_where_the_first_is_wrong() -> None:
    found = drafts(truth(rate=0.6, runner_up=0.25))
    missed = [(right, candidates) for right, candidates in found if candidates[0][0] != right]
    assert fmean(candidates[1][0] == right for right, candidates in missed) == pytest.approx(0.25, abs=0.04)
    assert all(candidates[1][0] != right for right, candidates in found if candidates[0][0] == right)


def test_misses_are_independent_of_the_position_before() -> None:
    hits = [right == candidates[0][0] for right, candidates in drafts(truth())]
    after_a_miss = [now for before, now in itertools.pairwise(hits) if not before]
    assert fmean(after_a_miss) == pytest.approx(0.7, abs=0.04)


def test_confidence_tells_right_from_wrong_and_stays_a_probability() -> None:
    found = drafts(truth(confidence_right=0.9, confidence_wrong=0.4, confidence_spread=0.2))
    right = [candidates[0][1] for token, candidates in found if candidates[0][0] == token]
    wrong = [candidates[0][1] for token, candidates in found if candidates[0][0] != token]
    assert fmean(wrong) == pytest.approx(0.4, abs=0.02)
    assert 0.85 < fmean(right) <= 0.9, "clipped at 1"
    for _, ((_, first), (_, second)) in found:
        assert 0 <= second <= first <= 1
        assert first + second <= 1


def test_a_second_candidate_that_is_right_gets_the_upper_half_of_the_confidence_that_is_left() -> None:
    found = drafts(truth(confidence_right=0.6, confidence_wrong=0.6, confidence_spread=0.0))
    right = [second for token, (_, (candidate, second)) in found if candidate == token]
    wrong = [second for token, (_, (candidate, second)) in found if candidate != token]
    assert min(right) >= 0.2 > max(wrong)
    assert fmean(right) == pytest.approx(0.3, abs=0.01)
    assert fmean(wrong) == pytest.approx(0.1, abs=0.01)


@given(st.integers(0, 2**40), st.integers(0, 10**5), st.integers(0, 2**31), st.integers(3, 50000))
def test_the_two_candidates_differ_and_lie_in_the_vocabulary(
    seed: int, position: int, previous: int, size: int
) -> None:
    world = IidTruth(IidAcceptance(kind="iid", rate=0.5), seed, prompt_tokens=1, vocabulary=size)
    (first, _), (second, _) = world.candidates(position, previous)
    assert first != second
    assert {first, second, world.next(position, previous)} <= set(range(size))


def test_luck_depends_on_seed_and_position_not_on_what_was_asked_before() -> None:
    forwards, backwards = truth(), truth()
    asked = [forwards.candidates(position, 7) for position in range(50)]
    assert asked == [backwards.candidates(position, 7) for position in reversed(range(50))][::-1]
    assert asked != [truth(seed=2).candidates(position, 7) for position in range(50)]
    assert truth(seed=-1).prompt != truth(seed=1).prompt


def write_trace(path: Path, **changes: Any) -> Path:
    tokens = list(range(100, 140))
    candidates = [[[token if token % 3 else 1, 0.9], [2, 0.05]] for token in tokens]
    path.write_text(json.dumps({"prompt_tokens": [5, 6], "tokens": tokens, "candidates": candidates, **changes}))
    return path


@pytest.fixture
def recorded(tmp_path: Path) -> list[str]:
    path = write_trace(tmp_path / "trace.json")
    return [f"acceptance={{kind: trace, file: {path}}}", "workload={max_new_tokens: 40}"]


def test_a_recorded_trace_gives_its_text_under_every_policy(recorded: list[str]) -> None:
    for name in ("autoregressive", "speculative", "pipeinfer"):
        trace = simulate(build(*recorded, f"policy.name={name}"))
        assert trace.tokens == tuple(range(100, 140))
        assert trace.prompt_tokens == 2


def test_recorded_candidates_decide_what_is_accepted(recorded: list[str]) -> None:
    trace = simulate(build(*recorded, "policy={name: speculative, max_nodes: 1}"))
    world = make_truth(build(*recorded))
    assert list(world.candidates(2 + 2, 101)) == [(1, 0.9), (2, 0.05)]
    assert 0 < trace.drafted_accepted < trace.drafted_verified


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokens": "text"}, "list"),
        ({"tokens": [1, -2], "candidates": [[], []]}, "-2"),
        ({"candidates": []}, "0 lists"),
        ({"candidates": [[[1, 1.5]]] * 40}, "confidence"),
        ({"prompt_tokens": []}, "prompt"),
        ({"more": 1}, "exactly the keys"),
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
    candidates = [[(5, 0.9)], [(6, 0.9)], [(7, 0.9)]]
    plain = RecordedTruth([1], [5, 6, 7], candidates)
    assert plain.candidates(2, 99) == [(6, 0.9)], "without detours as on the text"
    world = RecordedTruth([1], [5, 6, 7], candidates, detours=[(2, 99, ((8, 0.5),))])
    assert world.candidates(2, 5) == [(6, 0.9)]
    assert world.candidates(2, 99) == ((8, 0.5),)
    assert world.candidates(3, 98) == (), "a way that was never recorded ends"
