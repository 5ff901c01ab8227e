from pathlib import Path
from typing import Any

import pytest
from scenario_builder import build

from analysis.tuning import GAIN, SEEDS, Search, pipeinfer_space, speculative_space, tune
from pipesim.scenario_file import load_scenario, read_scenario
from pipesim.scheduling.policy import make_policy

SPECULATIVE = {"name": "speculative"}


def test_the_search_finds_what_is_plain() -> None:
    certain = build("acceptance.rate=1", "cluster.drafter.level_ms=0", "workload.max_new_tokens=60")
    assert tune(certain.model_dump_json(), SPECULATIVE)["settings"]["max_nodes"] >= 24, "beyond the coarse grid"
    hopeless = build("acceptance={kind: iid, rate: 0, runner_up: 0}", "cluster.drafter.level_ms=9")
    assert tune(hopeless.model_dump_json(), SPECULATIVE)["settings"]["max_nodes"] == 1


def test_no_neighbour_of_the_best_is_faster() -> None:
    scenario = build("workload.max_new_tokens=24")
    best = tune(scenario.model_dump_json(), {"name": "pipeinfer"})["place"]
    search = Search(pipeinfer_space({"name": "pipeinfer"}, 3), scenario)
    for name in search.space.axes:
        for step in (-1, 1):
            other = search.space.along(best, name, step)
            assert other is None or search.speed(other, SEEDS[1]) <= GAIN * search.speed(best, SEEDS[1])


def test_the_end_of_a_ladder_is_reported_unless_it_is_a_natural_one() -> None:
    space = speculative_space(SPECULATIVE)
    ends = {name: axis.ladder[-1] for name, axis in space.axes.items()}
    assert set(space.ends(ends)) == set(space.axes) - {"split"}, "no runner-up has more than half of the confidence"
    assert not space.ends({name: axis.ladder[0] for name, axis in space.axes.items()})


def test_equal_settings_are_spelled_in_one_way() -> None:
    space = pipeinfer_space({"name": "pipeinfer"}, 8)
    place = {"micro_batch": 1, "branches": 4, "p_accept": 0.0, "p_split": 0.2, "partitions": 8}
    assert space.settings(place) == {
        "name": "pipeinfer", "micro_batch": 1, "branches": 1, "p_accept": 0.0, "partitions": 8
    }  # fmt: skip


@pytest.mark.parametrize("fixed", [{}, {"multibuffering": False}])
def test_fixed_settings_stay(fixed: dict[str, bool]) -> None:
    space = pipeinfer_space({"name": "pipeinfer", **fixed}, 8)
    for place in space.coarse():
        settings = space.settings(place)
        make_policy(settings.pop("name"), settings)
        assert settings.items() >= fixed.items()


def test_seeds_of_tuning_are_not_those_of_results() -> None:
    used = [seed for seeds in SEEDS for seed in seeds]
    assert len(set(used)) == len(used)
    assert min(used) > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gbps", "expected"),
    [
        (1, {"speculative": {}, "pipeinfer": {}}),
        (0.01, {"speculative": {"max_nodes": 6, "cutoff": 0.65},
                "pipeinfer": {"micro_batch": 1, "p_accept": 0.6, "partitions": 12, "branches": 1}}),
    ],
)  # fmt: skip
def test_the_degrading_network_has_the_settings_that_are_found(
    gbps: float, expected: dict[str, dict[str, Any]]
) -> None:
    """The file's own on the healthy network, those of docs/studies/network-degradation-settings.md on the slow one."""
    path = Path("scenarios/network-degradation.yaml")
    scenario = load_scenario(path, [f"cluster.links.bandwidth_gbps={gbps}"]).model_dump_json()
    for name, own in expected.items():
        stands = {"name": name, **read_scenario(path)["policies"][name], **own}
        assert tune(scenario, {"name": name})["settings"].items() <= stands.items()
