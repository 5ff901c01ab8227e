"""Layers per stage."""

import dataclasses
from pathlib import Path

import pytest

from backends.job import prepare
from backends.models.config import FAMILIES, LayerKind, ModelConfig
from backends.placement import split_layers
from pipesim.errors import BadInputError
from pipesim.scenario_file import load_scenario

DEMO = Path(__file__).parents[2] / "scenarios" / "demo.yaml"

CONFIG = ModelConfig(
    family=FAMILIES["llama"],
    kinds=(LayerKind(1e5),) * 30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocabulary=49152,
    query_scale=0.125,
    norm_eps=1e-5,
    tied=True,
    max_context=8192,
    eos_ids=(2,),
)


@pytest.mark.parametrize("stages", range(1, 31))
def test_every_layer_has_one_stage_and_every_stage_a_layer(stages: int) -> None:
    layers = split_layers(CONFIG, stages)
    assert (len(layers), sum(layers)) == (stages, 30)
    assert min(layers) >= 1
    assert max(layers[:-1], default=0) - min(layers[:-1], default=0) <= 1


def test_the_lm_head_weighs_as_much_as_eight_layers_of_smollm2() -> None:
    assert split_layers(CONFIG, 2) == (19, 11)
    assert split_layers(CONFIG, 4) == (10, 9, 9, 2)


def test_without_a_head_to_speak_of_the_split_is_even() -> None:
    assert split_layers(dataclasses.replace(CONFIG, vocabulary=1), 3) == (10, 10, 10)


@pytest.mark.parametrize("stages", [0, 31])
def test_more_stages_than_layers_are_bad_input(stages: int) -> None:
    with pytest.raises(BadInputError, match=f"--stages {stages}: the model has 30 layers"):
        split_layers(CONFIG, stages)


@pytest.mark.model
def test_layers_auto_reaches_real_stages() -> None:
    """The same placement as in simulation, from the costs that the scenario gives for a layer and the LM head."""
    cost = "{kind: table, per: layer, rows_ms: {1: 1.4}, lm_head_ms: 8}"
    sets = [
        "model={profile: smollm2-135m, quantization: fp32}",
        f"cluster.stages=[{{repeat: 4, layers: auto, device: laptop, cost: {cost}}}]",
    ]
    scenario = load_scenario(DEMO, sets)
    parts = prepare(scenario).cluster().stages
    assert (
        [part.last_layer - part.first_layer for part in parts]
        == [plan.layers for plan in scenario.stages()]
        == [9, 9, 9, 3]
    )
