"""Settings and registry of policies."""

from dataclasses import dataclass

import pytest
from world import World, plain_text

from pipesim.errors import BadInputError
from pipesim.scheduling.generation import Generation
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
        ("pipeinfer", {"continuous": 1}, "policy.continuous: 1 is not a bool"),
        ("speculative", {"max_nodes": 2.5}, "policy.max_nodes: 2.5 is not a int"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        make_policy(name, settings)


def test_a_new_policy_is_one_class_registered_by_name() -> None:
    @register("stuttering")
    @dataclass(frozen=True)
    class Stuttering(Policy):
        def decide(self, generation: Generation) -> None:
            if generation.root.run is None:
                generation.submit_canonical()

    world = World(make_policy("stuttering"), [1, 2], 5)
    assert world.run_to_the_end() == plain_text([1, 2], 5)
