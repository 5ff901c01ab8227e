"""``layers: auto``."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenario_builder import build

from pipesim.errors import BadInputError
from pipesim.hardware.placement import place_layers
from pipesim.metrics import compute_metrics
from pipesim.scheduling.runs import RunKind
from pipesim.simulation.pipeline import simulate

SLOW = "{kind: roofline, profile: dual-xeon-2023}"
PER_LAYER = "cost: {kind: linear, per: layer, constant_ms: "


def affine(constant: float, per_layer: float, layers: int) -> float:
    return constant + per_layer * layers


costs = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=4)


@given(costs, st.integers(0, 7), st.data())
def test_no_other_placement_has_a_faster_slowest_stage(
    stages: list[tuple[int, int]], extra: int, data: st.DataObject
) -> None:
    layers = len(stages) + extra
    room = data.draw(st.lists(st.integers(1, 8), min_size=len(stages), max_size=len(stages)))
    times = [partial(affine, *stage) for stage in stages]
    placed = place_layers(layers, times, lambda stage, now: now[stage] < room[stage])
    every = [option for option in product(*(range(1, most + 1) for most in room)) if sum(option) == layers]
    if not every:
        assert sum(placed) < layers
        assert placed == tuple(room), "it stops only when all memory is full"
        return
    assert placed in every

    def slowest(option: tuple[int, ...]) -> float:
        return max(time(number) for time, number in zip(times, option, strict=True))

    assert slowest(placed) == min(map(slowest, every))


@given(costs.filter(lambda stages: len(stages) > 1), st.integers(0, 7), st.integers(2, 9))
def test_it_is_exact_where_two_stages_share_memory(stages: list[tuple[int, int]], extra: int, room: int) -> None:
    layers = len(stages) + extra
    times = [partial(affine, *stage) for stage in stages]
    placed = place_layers(layers, times, lambda stage, now: stage > 1 or now[0] + now[1] < room)
    options = product(*(range(1, layers + 1) for _ in stages))
    every = [option for option in options if sum(option) == layers and option[0] + option[1] <= room]
    if every:
        slowest = [max(time(number) for time, number in zip(times, option, strict=True)) for option in every]
        assert max(time(number) for time, number in zip(times, placed, strict=True)) == min(slowest)
    else:
        assert sum(placed) < layers


def test_every_stage_gets_a_layer_even_if_there_are_fewer() -> None:
    assert place_layers(1, [partial(affine, 0, 1)] * 3) == (1, 1, 1)


def test_faster_stages_get_more_layers() -> None:
    stages = f"[{{layers: auto, {PER_LAYER}1}}}}, {{layers: auto, {PER_LAYER}2}}}}]"
    assert [plan.layers for plan in build(f"cluster.stages={stages}").stages()] == [8, 4]


def test_the_lm_head_takes_layers_from_the_last_stage() -> None:
    cost = "{kind: linear, per: layer, constant_ms: 1, lm_head_ms: 4}"
    plans = build(f"cluster.stages=[{{repeat: 4, layers: auto, cost: {cost}}}]").stages()
    assert [plan.layers for plan in plans] == [4, 4, 3, 1]


def test_a_head_on_the_same_device_takes_layers_from_that_stage() -> None:
    cost = "{kind: linear, per: layer, constant_ms: 1}"
    stages = f"[{{layers: auto, device: box, cost: {cost}}}, {{layers: auto, cost: {cost}}}]"
    sets = [f"cluster.stages={stages}", "cluster.devices=[{name: box}]", "cluster.head={device: box, overhead_ms: 4}"]
    assert [plan.layers for plan in build(*sets).stages()] == [4, 8]


def test_given_numbers_stay_and_the_rest_is_placed_around_them() -> None:
    stages = f"[{{layers: 5, {PER_LAYER}9}}}}, {{layers: auto, {PER_LAYER}1}}}}, {{layers: auto, {PER_LAYER}1}}}}]"
    plans = build(f"cluster.stages={stages}").stages()
    assert [plan.layers for plan in plans] == [5, 4, 3]
    assert [plan.first_layer for plan in plans] == [0, 5, 9]


@pytest.mark.parametrize("device", ["null", "box"])
def test_memory_limits_what_a_fast_stage_gets(device: str) -> None:
    """A GPU whose memory holds 34 of 80 layers, beside a slow node; alone, or with others on it."""
    fast = "{kind: roofline, profile: h100-sxm, memory_gib: 17}"
    sets = [
        "model={profile: llama-2-70b, quantization: q4_k_m}",
        f"cluster.stages=[{{layers: auto, device: {device}, cost: {fast}}}, {{layers: auto, cost: {SLOW}}}]",
    ]
    if device == "box":
        sets += ["cluster.devices=[{name: box}]", "cluster.drafter.device=box"]
    scenario = build(*sets)
    first, last = scenario.stages()
    assert first.layers + last.layers == 80
    held, more = (replace(first, layers=first.layers + extra).load(scenario.kv_cells()) for extra in (0, 1))
    assert held is not None
    assert more is not None
    assert held.needed <= 17 * 2**30 < more.needed


def test_a_draft_model_on_the_same_device_takes_memory_from_the_stage() -> None:
    fast = "{kind: roofline, profile: rtx-4090}"
    sets = [
        "model={profile: llama-2-70b, quantization: q4_k_m}",
        f"cluster.stages=[{{layers: auto, device: box, cost: {fast}}}, {{layers: auto, cost: {SLOW}}}]",
        "cluster.devices=[{name: box}]",
    ]
    alone, _ = build(*sets).stages()
    beside, _ = build(*sets, f"cluster.drafter={{device: box, model: {{profile: llama-2-7b}}, cost: {fast}}}").stages()
    layer = 24 * 2**30 / alone.layers
    assert alone.layers - beside.layers == pytest.approx(2 * 6.74e9 / layer, abs=1.2)


@given(st.lists(st.sampled_from(["h100-sxm", "rtx-4090", "dual-xeon-2017", "m2-ultra"]), min_size=2, max_size=5))
def test_any_mix_of_devices_is_balanced_to_within_a_layer(devices: list[str]) -> None:
    """Where memory is no limit, no stage could give a layer to another one and both be faster than the slowest now."""
    cost = "{{kind: roofline, profile: {}, memory_gib: 1000}}"
    stages = ", ".join(f"{{layers: auto, cost: {cost.format(device)}}}" for device in devices)
    plans = build("model={profile: llama-3.1-70b, quantization: q4_k_m}", f"cluster.stages=[{stages}]").stages()
    assert sum(plan.layers for plan in plans) == 80
    times = [plan.cost_model().seconds(RunKind.CANONICAL, 1, 28) for plan in plans]
    slowest = max(range(len(plans)), key=times.__getitem__)
    if plans[slowest].layers == 1:
        return
    for plan, time in zip(plans, times, strict=True):
        assert time + time / plan.layers >= times[slowest] * (1 - 1e-9) or plan.last


def test_auto_needs_the_time_of_a_layer() -> None:
    with pytest.raises(BadInputError, match=r"cluster\.stages\.0\.cost\.per = 'stage': layers: auto needs"):
        build("cluster.stages.0.layers=auto")


def test_auto_and_left_out_do_not_mix() -> None:
    with pytest.raises(BadInputError, match="auto in some stages and left out in others"):
        build(f"cluster.stages=[{{{PER_LAYER}9}}}}, {{layers: auto, {PER_LAYER}1}}}}]")


@pytest.mark.parametrize("policy", ["pipeinfer", "autoregressive"])
def test_on_unequal_devices_auto_is_faster_than_an_even_spread(policy: str) -> None:
    devices = ("h100-sxm", "dual-xeon-2017", "rtx-4090", "dual-xeon-2023")
    speeds = []
    for layers in ("null", "auto"):
        stages = ", ".join(f"{{layers: {layers}, cost: {{kind: roofline, profile: {device}}}}}" for device in devices)
        model = "model={profile: llama-2-70b, quantization: q4_k_m}"
        scenario = build(model, f"cluster.stages=[{stages}]", f"policy.name={policy}", "acceptance.rate=0.9")
        speeds.append(compute_metrics(simulate(scenario)).tokens_per_second or 0)
    even, auto = speeds
    assert auto > 2 * even
