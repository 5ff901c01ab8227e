import pytest
from scenario_builder import build

from analysis.tuning import SEEDS, Search, pipeinfer_space, speculative_space, tune
from pipesim.scheduling.policy import make_policy

SPECULATIVE = {"name": "speculative"}


def test_the_search_finds_what_is_plain() -> None:
    certain = build("acceptance.rate=1", "cluster.drafter.level_ms=0", "workload.max_new_tokens=12")
    assert tune(certain.model_dump_json(), SPECULATIVE)["settings"]["max_nodes"] >= 8
    hopeless = build("acceptance={kind: iid, rate: 0, runner_up: 0}", "cluster.drafter.level_ms=9")
    assert tune(hopeless.model_dump_json(), SPECULATIVE)["settings"]["max_nodes"] == 1


def test_no_neighbour_of_the_best_is_faster() -> None:
    scenario = build("workload.max_new_tokens=24")
    best = tune(scenario.model_dump_json(), {"name": "pipeinfer"})["place"]
    search = Search(pipeinfer_space({"name": "pipeinfer"}, 3), scenario)
    for name in search.space.axes:
        for step in (-1, 1):
            other = search.space.along(best, name, step)
            assert other is None or not search.better(other, best, SEEDS[1])


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
