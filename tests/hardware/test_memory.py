"""What does not fit into a device's memory is an error that says by how much."""

import re

import pytest
from scenario_builder import build

from pipesim.errors import BadInputError
from pipesim.hardware.costs import ModelPart
from pipesim.hardware.models import MODELS
from pipesim.scenario import StagePlan

GIB = 2**30
LLAMA_7B = "model={profile: llama-2-7b, quantization: fp16}"
COST = "{kind: roofline, profile: rtx-4090}"


def problem(*overrides: str) -> str:
    with pytest.raises(BadInputError) as caught:
        build(*overrides)
    return str(caught.value)


def needed(plan: StagePlan, kv_cells: int) -> float:
    load = plan.load(kv_cells)
    assert load is not None
    return load.needed


def test_weights_and_kv_cells_of_a_whole_model() -> None:
    """The memory that a one-stage Llama-2-7B needs: its file, and 512 KiB for each token."""
    (plan,) = build(LLAMA_7B, f"cluster.stages=[{{cost: {COST}}}]").stages()
    assert needed(plan, 0) == pytest.approx(2 * 6_738_415_616, rel=1e-4)
    assert needed(plan, 4096) - needed(plan, 0) == 4096 * 512 * 1024


def test_all_stages_together_hold_the_whole_model_once() -> None:
    plans = build(LLAMA_7B, f"cluster.stages=[{{repeat: 5, cost: {COST}}}]").stages()
    assert sum(needed(plan, 0) for plan in plans) == pytest.approx(2 * 6_738_415_616)


def test_a_tied_lm_head_is_a_copy_unless_it_lies_beside_the_embedding() -> None:
    shape = MODELS["llama-3.2-1b"].shape
    whole = ModelPart(shape, 16, True, True, 2.0).weights()
    halves = ModelPart(shape, 8, True, False, 2.0).weights() + ModelPart(shape, 8, False, True, 2.0).weights()
    assert whole == 2 * shape.parameters
    assert halves - whole == 2 * shape.embedding_parameters
    sizes = "hidden: 64, layers: 4, heads: 4, intermediate: 128"
    untied, tied = (
        build(f"model={{name: m, {sizes}, tied: {tied}}}", f"cluster.stages=[{{cost: {COST}}}]").stages()[0]
        for tied in ("false", "true")
    )
    assert needed(untied, 9) - needed(tied, 9) == 2 * 64 * 32000


def test_the_message_names_stage_need_room_and_what_is_missing() -> None:
    told = problem("model={profile: llama-2-70b, quantization: q4_k_m}", f"cluster.stages=[{{cost: {COST}}}]")
    found = re.search(
        r"stage 0 \(80 layers\): .* need ([\d.]+) GiB .* ([\d.]+) GiB are available, ([\d.]+) GiB too few", told
    )
    assert found
    need, available, missing = map(float, found.groups())
    assert need == pytest.approx(41.6e9 / GIB, rel=0.02)
    assert available == 24
    assert missing == pytest.approx(need - available, abs=0.011)


def test_every_stage_that_does_not_fit_is_told() -> None:
    told = problem("model={profile: llama-2-70b, quantization: fp16}", f"cluster.stages=[{{repeat: 4, cost: {COST}}}]")
    assert [line.split(" (")[0] for line in told.splitlines()] == [
        f"scenario: cluster: stage {stage}" for stage in range(4)
    ]


def test_stages_on_one_device_share_its_memory() -> None:
    stages = f"cluster.stages=[{{repeat: 2, device: box, cost: {COST}}}]"
    sets = ["model={profile: llama-2-13b, quantization: q8_0}", "cluster.devices=[{name: box}]", stages]
    assert build(*sets)
    sets[0] = "model={profile: llama-2-13b, quantization: fp16}"
    told = problem(*sets)
    assert "stage 0 (20 layers), stage 1 (20 layers) on 'box': weights" in told


def test_tensor_parallel_devices_hold_a_part_each() -> None:
    parallel = "{kind: roofline, profile: h100-sxm, tensor_parallel: 2, all_reduce: {profile: nvlink-4}}"
    one = "{kind: roofline, profile: h100-sxm}"
    model = "model={profile: llama-2-70b, quantization: fp16}"
    assert "stage 0" in problem(model, f"cluster.stages=[{{cost: {one}}}]")
    (plan,) = build(model, f"cluster.stages=[{{cost: {parallel}}}]").stages()
    assert needed(plan, 0) == pytest.approx(68_976_648_192, rel=1e-4)


def test_kv_cells_count() -> None:
    sets = [LLAMA_7B, f"cluster.stages=[{{cost: {COST}}}]"]
    assert build(*sets, "cluster.kv_cells=20000")
    assert "GiB too few" in problem(*sets, "cluster.kv_cells=24000")


def test_memory_can_be_given_and_without_it_there_is_no_limit() -> None:
    sets = [LLAMA_7B, f"cluster.stages=[{{cost: {COST}}}]"]
    assert "8.00 GiB are available" in problem(*sets, "cluster.stages.0.cost.memory_gib=8")
    own = "{kind: roofline, memory_bandwidth_gbytes_s: 1, peak_tflops: 1}"
    assert build("model={profile: falcon-180b, quantization: fp32}", f"cluster.stages=[{{cost: {own}}}]")


def test_a_draft_model_holds_the_whole_text_and_divides_among_its_devices() -> None:
    def need(cost: str, tokens: int) -> float:
        drafter = f"cluster.drafter={{model: {{profile: llama-2-7b, quantization: fp16}}, cost: {cost}}}"
        told = problem(drafter, f"workload={{prompt_tokens: 1, max_new_tokens: {tokens}}}")
        return float(re.findall(r"the draft model: .* need ([\d.]+) GiB", told)[0])

    one = "{kind: roofline, profile: rtx-4090, memory_gib: 1}"
    two = f"{one[:-1]}, tensor_parallel: 2, all_reduce: {{profile: pcie-4-x16}}}}"
    assert need(one, 4095) == pytest.approx(2 * 6_738_415_616 / GIB + 2, abs=0.01), "4096 cells of 512 KiB"
    assert need(two, 4095) == pytest.approx(need(one, 4095) / 2, abs=0.01)


def test_the_draft_model_must_fit_too() -> None:
    model, cost = "{profile: falcon-40b, quantization: q8_0}", "{kind: roofline, profile: rtx-4090, memory_gib: 24}"
    told = problem(f"cluster.drafter={{model: {model}, cost: {cost}}}")
    assert "the draft model: weights and KV cells need 41.4" in told


def test_auto_says_how_many_layers_found_room() -> None:
    told = problem(
        "model={profile: llama-2-70b, quantization: q4_k_m}", f"cluster.stages=[{{layers: auto, cost: {COST}}}]"
    )
    assert re.search(r"layers: auto finds memory for 4\d of 80 layers", told)
