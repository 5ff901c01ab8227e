"""Profiles and roofline costs as keys of a scenario."""

import pytest
from observing import ACCEPTANCE, observe
from scenario_builder import build

from pipesim.comparison import calibrated
from pipesim.errors import BadInputError
from pipesim.executors import Observed
from pipesim.hardware.costs import Machine, ModelPart, Roofline
from pipesim.hardware.devices import DEVICES
from pipesim.hardware.models import MODELS
from pipesim.scenario import RooflineCost, json_schema
from pipesim.scenario_file import build_scenario
from pipesim.scheduling.runs import RunKind

LLAMA = "model={profile: llama-2-7b, quantization: q4_k_m}"
H100 = "cluster.stages.0.cost={kind: roofline, profile: h100-sxm}"
TINY = "{profile: tinyllama-1.1b, quantization: q4_0}"


def test_a_profile_brings_all_sizes() -> None:
    model = build("model={profile: llama-2-70b}").model
    assert (model.name, model.layers, model.hidden, model.vocabulary) == ("llama-2-70b", 80, 8192, 32000)
    assert model.shape() == MODELS["llama-2-70b"].shape
    assert model.activation_bytes == 2


def test_what_stands_beside_a_profile_counts() -> None:
    keys = "name: mine, layers: 40, vocabulary: 32002, activation_bytes: 4, quantization: q8_0"
    model = build(f"model={{profile: llama-2-70b, {keys}}}").model
    assert (model.name, model.layers, model.vocabulary, model.activation_bytes) == ("mine", 40, 32002, 4)
    assert model.shape().layer_parameters == MODELS["llama-2-70b"].shape.layer_parameters


def test_float32_weights_bring_float32_activations() -> None:
    assert build("model={profile: smollm2-135m, quantization: fp32}").model.activation_bytes == 4


def test_a_scenario_with_profiles_survives_being_written_and_read() -> None:
    scenario = build(LLAMA, H100, f"cluster.drafter={{model: {TINY}, cost: {{kind: roofline, profile: m2-ultra}}}}")
    assert build_scenario(scenario.model_dump()) == scenario


def test_measured_costs_take_the_place_of_modelled_ones() -> None:
    scenario = build(LLAMA, H100, f"cluster.drafter={{model: {TINY}, cost: {{kind: roofline, profile: m2-ultra}}}}")
    seen = observe(build("cluster.drafter={level_ms: 3, prefill_per_token_ms: 0.4}"))
    measured = calibrated(scenario, Observed(seen, 4, (False,) * 3, None, ACCEPTANCE))
    assert measured.drafter().level_ms == pytest.approx(3.0)
    assert measured.drafter().prefill_per_token_ms == pytest.approx(0.4)
    assert [plan.layers for plan in measured.stages()] == [plan.layers for plan in scenario.stages()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model={profile: lama-2-70b}"],
            "model: profile = 'lama-2-70b': there is no such profile, known are llama-2-70b",
        ),
        (["model={profile: llama-2-7b, hidden: 64}"], "model: hidden = 64: profile llama-2-7b has 4096: leave out one"),
        (["model={profile: llama-2-7b, kv_heads: 4}"], "model: kv_heads = 4: profile llama-2-7b has 32"),
        (["model.heads=7"], "model: heads = 7: hidden = 64 does not divide into them"),
        (["model.heads=8", "model.kv_heads=3"], "model: kv_heads = 3: heads = 8 does not divide into them"),
        (["model.quantization=q9"], "model.quantization = 'q9'"),
        ([H100], "model.heads: missing, cluster.stages.0.cost.kind = roofline needs it"),
        (
            [LLAMA, H100, "cluster.stages.0.cost.profile=h200"],
            "cost: profile = 'h200': there is no such profile, known are h100",
        ),
        (
            ["cluster.stages.0.cost={kind: roofline, peak_tflops: 1}"],
            "memory_bandwidth_gbytes_s: missing, add it or name a",
        ),
        (["cluster.stages.0.cost={kind: roofline, memory_bandwidth_gbytes_s: 1}"], "cost: peak_tflops: missing"),
        (
            [LLAMA, H100, "cluster.stages.0.cost.tensor_parallel=2"],
            "cost: all_reduce: missing, tensor_parallel devices",
        ),
        (
            [LLAMA, H100, "cluster.stages.0.cost.all_reduce={profile: nvlink-4}"],
            "cost: all_reduce: one device has nobody",
        ),
        ([LLAMA, H100, "cluster.stages.0.cost.all_reduce={latency_us: 1}"], "all_reduce: bandwidth_gbytes_s: missing"),
        (
            [LLAMA, H100, "cluster.stages.0.cost.all_reduce={profile: nvlink}"],
            "all_reduce: profile = 'nvlink': there is no such profile, known are nvlink-",
        ),
        (
            [
                LLAMA,
                H100,
                "cluster.stages.0.cost.tensor_parallel=5",
                "cluster.stages.0.cost.all_reduce={profile: nvlink-4}",
            ],
            "cluster.stages.0.cost.tensor_parallel = 5: model has 32 heads, which do not divide among so many devices",
        ),
        (["cluster.stages.0.cost.tensor_parallel=2"], "cost.tensor_parallel = 2: there is no such key"),
        (
            [LLAMA, H100, "cluster.stages.0.cost.compute=int8", "cluster.stages.0.cost.peak_tflops=9"],
            "cost: compute: peak_tflops says how fast the arithmetic is",
        ),
        (["cluster.drafter={}"], "cluster.drafter: level_ms: missing, give level_ms or both model and cost"),
        ([f"cluster.drafter={{model: {TINY}}}"], "cluster.drafter: cost: missing"),
        ([f"cluster.drafter.model={TINY}"], "cluster.drafter: level_ms = 2.0: follows from model and cost"),
        (
            [
                f"cluster.drafter={{model: {TINY}, cost: {{kind: roofline, profile: m2-ultra}}}}",
                "cluster.drafter.prefill_per_token_ms=1",
            ],
            "cluster.drafter: prefill_per_token_ms = 1.0: follows from model and cost",
        ),
        (
            ["cluster.drafter={model: {layers: 1, hidden: 8}, cost: {kind: roofline, profile: m2-ultra}}"],
            "cluster.drafter.model.heads: missing, cluster.drafter.cost.kind = roofline needs it",
        ),
    ],
)
def test_what_contradicts_or_lacks_something_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        build(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value), "one problem, one line"


def test_a_roofline_cost_reaches_the_stages_as_described() -> None:
    """Two stages on four H100 each: what the first one holds and runs on."""
    stage = "{repeat: 2, cost: {kind: roofline, profile: h100-sxm, bandwidth_efficiency: 0.5, overhead_ms: 1}}"
    plan, _ = build(
        LLAMA,
        "model.activation_bytes=4",
        f"cluster.stages=[{stage}]",
        "cluster.stages.0.cost.tensor_parallel=4",
        "cluster.stages.0.cost.all_reduce={profile: nvlink-4, latency_us: 5}",
    ).stages()
    part = ModelPart(MODELS["llama-2-7b"].shape, 16, True, False, 4.83 / 8, activation_bytes=4)
    machine = Machine(0.5 * 3350e9, 0.7 * 989.4e12, 1e-3, 4, 450e9, 5e-6)
    for kind in RunKind:
        expected = Roofline(part, machine).seconds(kind, 5, 100)
        assert plan.cost_model().seconds(kind, 5, 100) == pytest.approx(expected)


def test_arithmetic_is_float32_for_float32_weights_and_otherwise_bfloat16_unless_said() -> None:
    cost = RooflineCost(kind="roofline", profile="a100-sxm-80gb", compute_efficiency=1)
    peaks = DEVICES["a100-sxm-80gb"].peak_tflops
    assert cost.machine("fp32").flops == peaks["float32"] * 1e12
    assert cost.machine("q4_k_m").flops == peaks["bfloat16"] * 1e12
    assert cost.model_copy(update={"compute": "int8"}).machine("q4_k_m").flops == peaks["int8"] * 1e12


def test_a_draft_model_s_level_is_one_run_of_it() -> None:
    sets = [f"cluster.drafter={{model: {TINY}, cost: {{kind: roofline, profile: dual-xeon-2017}}}}"]
    plan = build(*sets).drafter()
    part = ModelPart(MODELS["tinyllama-1.1b"].shape, 22, True, True, 4.5 / 8)
    device = DEVICES["dual-xeon-2017"]
    cost = Roofline(part, Machine(0.7e9 * device.memory_bandwidth_gbytes_s, 0.7e12 * device.peak("bfloat16")))
    assert plan.level_ms == pytest.approx(1e3 * cost.seconds(RunKind.CANONICAL, 1, 8 + 40 / 2))
    assert plan.prefill_per_token_ms == pytest.approx(1e3 * cost.seconds(RunKind.PREFILL, 8, 4.5) / 8)
    wider = build(*sets, "policy.branches=32").drafter()
    assert wider.level_ms > 2 * plan.level_ms, "bound by compute: all branches of a level count"


def test_a_float32_draft_model_exchanges_float32_activations() -> None:
    model = build("cluster.drafter={model: {profile: tinyllama-1.1b}, cost: {kind: roofline, profile: h100-sxm}}")
    section = model.cluster.drafter.model
    assert section is not None
    exact = section.model_copy(update={"quantization": "fp32"})
    assert [one.part(22, True, True).activation_bytes for one in (section, exact)] == [2, 4]


def test_the_schema_knows_the_profiles_and_needs_no_sizes_beside_them() -> None:
    definitions = json_schema()["$defs"]
    assert set(definitions["Model"]["properties"]["profile"]["enum"]) == {*MODELS, None}
    assert set(definitions["RooflineCost"]["properties"]["profile"]["enum"]) == {*DEVICES, None}
    assert definitions["Model"]["anyOf"] == [{"required": ["layers", "hidden", "name"]}, {"required": ["profile"]}]
    assert "required" not in definitions["Model"]
