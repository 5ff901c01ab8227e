"""Settings and registry of policies."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from world import World, plain_text

from pipesim.errors import BadInputError
from pipesim.scheduling.generation import Generation, SpeculationLimits
from pipesim.scheduling.policy import Policy, make_policy, policy_names, policy_settings, register


@pytest.mark.parametrize("name", ["autoregressive", "speculative", "pipeinfer"])
def test_built_in_policies_are_known_by_name(name: str) -> None:
    assert name in policy_names()
    assert make_policy(name, policy_settings(make_policy(name))) == make_policy(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pipinfer", {}, "policy.name: there is no policy 'pipinfer'; did you mean 'pipeinfer'"),
        ("pipeinfer", {"micro_bach": 3}, "policy.micro_bach: .* did you mean 'micro_batch'"),
        ("pipeinfer", {"micro_batch": 0}, "policy.micro_batch: 0 is out of range, use a value at least 1"),
        ("pipeinfer", {"p_accept": 1.5}, "policy.p_accept: 1.5 is out of range, use a value between 0.0 and 1.0"),
        ("pipeinfer", {"continuous": 1}, "policy.continuous: 1 is not of type bool"),
        ("pipeinfer", {"p_accept": float("nan")}, "policy.p_accept: nan is out of range"),
        ("autoregressive", {"depth": 1}, "policy.depth: autoregressive has no such setting; known: none"),
        ("speculative", {"max_nodes": 2.5}, "policy.max_nodes: 2.5 is not of type int"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        make_policy(name, settings)


def test_a_setting_of_a_type_that_no_scenario_can_give_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="setting depths is a list"):

        @register("listing")
        @dataclass(frozen=True)
        class Listing(Policy):
            depths: list[int]

            def decide(self, generation: Generation) -> None:
                pass


@pytest.mark.parametrize("limits", [(-1, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_limits_that_cannot_be_are_refused(limits: tuple[int, int, int]) -> None:
    with pytest.raises(BadInputError, match="a policy's limits"):
        SpeculationLimits(*limits)


def test_the_recipe_in_contributing_works_as_it_stands() -> None:
    recipe = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = recipe.split("```python\n")[1].split("```")[0]
    module = types.ModuleType("patient")
    sys.modules["patient"] = module  # dataclasses look their module up
    exec(code, module.__dict__)
    world = World(make_policy("patient", {"depth": 3}), [1, 2], 30)
    assert world.run_to_the_end(errors=[0, 0, 1]) == plain_text([1, 2], 30)
    assert world.scheduler.statistics.drafted_accepted > 0
    with pytest.raises(BadInputError, match=r"policy.depth: 0 is out of range"):
        make_policy("patient", {"depth": 0})


def test_a_new_policy_is_one_class_registered_by_name() -> None:
    @register("stuttering")
    @dataclass(frozen=True)
    class Stuttering(Policy):
        def decide(self, generation: Generation) -> None:
            if generation.root.run is None:
                generation.submit_canonical()

    world = World(make_policy("stuttering"), [1, 2], 5)
    assert world.run_to_the_end() == plain_text([1, 2], 5)
