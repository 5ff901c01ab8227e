"""The roofline of a run, in closed forms and limits, and beside figures that others measured."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipesim.hardware.costs import Machine, ModelPart, Roofline, micro_batch_slope
from pipesim.hardware.devices import DEVICES
from pipesim.hardware.models import BITS_PER_WEIGHT, MODELS, ModelShape
from pipesim.scheduling.runs import RunKind

DECODE, PREFILL = RunKind.CANONICAL, RunKind.PREFILL
SHAPE = ModelShape(layers=10, hidden=64, heads=8, kv_heads=2, intermediate=128, vocabulary=1000)
WEIGHTS = 2 * 64 * 10 * 8 + 3 * 64 * 128
"""Of a layer's matrices: query and output (64 x 64 each), keys and values (64 x 16 each), MLP."""
MIDDLE = ModelPart(SHAPE, layers=3, embeds=False, predicts=False, weight_bytes=2.0)
SLOW_MEMORY = Machine(bandwidth=1e6, flops=1e15)
SLOW_UNITS = Machine(bandwidth=1e15, flops=1e6)


def seconds(part: ModelPart, machine: Machine, rows: int = 1, context: float = 0, kind: RunKind = DECODE) -> float:
    return Roofline(part, machine).seconds(kind, rows, context)


def test_a_layers_matrices_are_counted_right() -> None:
    assert SHAPE.layer_parameters == WEIGHTS + 2 * 64


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_bound_by_bandwidth_a_run_takes_the_time_to_read_the_weights_once_whatever_its_rows(rows: int) -> None:
    assert seconds(MIDDLE, SLOW_MEMORY, rows) == pytest.approx(3 * WEIGHTS * 2 / 1e6)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_bound_by_compute_a_run_takes_two_operations_per_weight_and_row(rows: int) -> None:
    assert seconds(MIDDLE, SLOW_UNITS, rows) == pytest.approx(3 * 2 * WEIGHTS * rows / 1e6)


def test_the_context_is_read_once_and_computed_for_each_row() -> None:
    reading = seconds(MIDDLE, SLOW_MEMORY, 4, context=500) - seconds(MIDDLE, SLOW_MEMORY, 4)
    assert reading == pytest.approx(3 * 500 * (2 * 2 * 8) * 2 / 1e6)
    computing = seconds(MIDDLE, SLOW_UNITS, 4, context=500) - seconds(MIDDLE, SLOW_UNITS, 4)
    assert computing == pytest.approx(3 * 4 * 500 * 4 * 64 / 1e6)


def test_the_last_stage_computes_the_lm_head_of_a_prompt_for_one_row_only() -> None:
    last = replace(MIDDLE, predicts=True)
    assert seconds(last, SLOW_MEMORY, 9) - seconds(MIDDLE, SLOW_MEMORY, 9) == pytest.approx(1000 * 64 * 2 / 1e6)
    assert seconds(last, SLOW_UNITS, 9) - seconds(MIDDLE, SLOW_UNITS, 9) == pytest.approx(9 * 2 * 64000 / 1e6)
    prompt = seconds(last, SLOW_UNITS, 9, kind=PREFILL) - seconds(MIDDLE, SLOW_UNITS, 9, kind=PREFILL)
    assert prompt == pytest.approx(2 * 64000 / 1e6)


def test_the_first_stage_reads_one_row_of_the_embedding_per_token() -> None:
    first = replace(MIDDLE, embeds=True)
    assert seconds(first, SLOW_MEMORY, 9) - seconds(MIDDLE, SLOW_MEMORY, 9) == pytest.approx(9 * 64 * 2 / 1e6)


def test_overhead_comes_on_top_of_every_run() -> None:
    assert seconds(MIDDLE, replace(SLOW_MEMORY, overhead=3.0), 7) == pytest.approx(seconds(MIDDLE, SLOW_MEMORY, 7) + 3)


def test_tensor_parallel_devices_divide_the_work_and_pay_two_all_reduces_per_layer() -> None:
    last = replace(MIDDLE, predicts=True)
    for machine in (SLOW_MEMORY, SLOW_UNITS):
        two = seconds(last, replace(machine, devices=2), 5, context=300)
        assert two == pytest.approx(seconds(last, machine, 5, context=300) / 2)
        linked = seconds(last, replace(machine, devices=2, link_bandwidth=1e4, link_latency=0.5), 5, context=300)
        ring = 2 * 1 / 2 * (5 * 64 * 2) / 1e4 + 2 * 1 * 0.5
        assert linked - two == pytest.approx(3 * 2 * ring)


@pytest.mark.parametrize(("kv_heads", "devices", "held"), [(2, 1, 2), (2, 2, 1), (2, 8, 1), (8, 4, 2), (8, 3, 3)])
def test_a_kv_head_cannot_be_divided(kv_heads: int, devices: int, held: int) -> None:
    """The device with most heads reads, and holds, whole ones."""
    part, machine = replace(MIDDLE, shape=replace(SHAPE, kv_heads=kv_heads)), replace(SLOW_MEMORY, devices=devices)
    cell = 3 * held * 2 * 8 * 2
    assert seconds(part, machine, context=1e6) - seconds(part, machine) == pytest.approx(1e6 * cell / 1e6)
    assert part.memory_bytes(1000, devices) - part.memory_bytes(0, devices) == pytest.approx(1000 * cell)


machines = st.builds(
    Machine,
    bandwidth=st.floats(1e3, 1e12),
    flops=st.floats(1e3, 1e15),
    overhead=st.floats(0, 1),
    devices=st.sampled_from([1, 2, 4, 8]),
    link_bandwidth=st.floats(1e3, 1e12),
    link_latency=st.floats(0, 1e-3),
)


@given(machines, st.integers(1, 64), st.floats(0, 1e5), st.booleans(), st.booleans())
def test_more_work_never_takes_less_time_and_a_better_machine_never_more(
    machine: Machine, rows: int, context: float, embeds: bool, predicts: bool
) -> None:
    part = replace(MIDDLE, embeds=embeds, predicts=predicts)
    time = seconds(part, machine, rows, context) * (1 - 1e-12)
    assert seconds(part, machine, rows + 1, context) >= time
    assert seconds(part, machine, rows, context + 1) >= time
    assert seconds(replace(part, layers=4), machine, rows, context) >= time
    assert seconds(replace(part, weight_bytes=4.0), machine, rows, context) >= time
    for better in (
        replace(machine, bandwidth=2 * machine.bandwidth),
        replace(machine, flops=2 * machine.flops),
        replace(machine, link_bandwidth=2 * machine.link_bandwidth),
        replace(machine, link_latency=machine.link_latency / 2),
    ):
        assert seconds(part, better, rows, context) * (1 - 1e-12) <= time / (1 - 1e-12)


@given(machines, st.integers(2, 64), st.floats(0, 1e5))
def test_the_slope_lies_between_free_rows_and_rows_at_full_price(machine: Machine, rows: int, context: float) -> None:
    assert -1e-9 <= micro_batch_slope(Roofline(MIDDLE, machine), rows, context) <= 1 + 1e-9


def test_the_slope_is_0_where_bandwidth_is_the_limit_and_1_where_compute_is() -> None:
    assert micro_batch_slope(Roofline(MIDDLE, SLOW_MEMORY), 4, 100) == pytest.approx(0)
    assert micro_batch_slope(Roofline(MIDDLE, SLOW_UNITS), 4, 100) == pytest.approx(1)


def test_the_slope_between_the_limits_is_the_part_beyond_the_ridge() -> None:
    """Weights that take as long to read as 3 rows take to compute: 4 rows cost 4/3 of one."""
    machine = Machine(bandwidth=1e6, flops=3e6)
    assert micro_batch_slope(Roofline(MIDDLE, machine), 4, 0) == pytest.approx((4 / 3 - 1) / 3)


def speed(model: str, quantization: str, device: str, rows: int = 1, kind: RunKind = DECODE) -> float:
    """Tokens per second of a whole model on one device, with the default efficiencies of scenarios."""
    shape, profile = MODELS[model].shape, DEVICES[device]
    part = ModelPart(shape, shape.layers, True, True, BITS_PER_WEIGHT[quantization] / 8)
    machine = Machine(0.7e9 * profile.memory_bandwidth_gbytes_s, 0.7e12 * profile.peak("bfloat16"))
    return rows / seconds(part, machine, rows, rows / 2 if kind is PREFILL else 64, kind)


@pytest.mark.parametrize(
    ("measured", "model", "quantization", "device", "rows", "kind"),
    [
        # llama.cpp pull request 4766, January 2024: Llama 7B, "tg 128" and "pp 512"
        (61.03, "llama-2-7b", "fp16", "rtx-4090", 1, DECODE),
        (98.13, "llama-2-7b", "q8_0", "rtx-4090", 1, DECODE),
        (11048, "llama-2-7b", "fp16", "rtx-4090", 512, PREFILL),
        # llama.cpp pull request 3084, September 2023: Llama 7B, "pp 512"
        (1265, "llama-2-7b", "fp16", "m2-ultra", 512, PREFILL),
    ],
)
def test_default_efficiencies_come_within_a_quarter_of_public_measurements(
    measured: float, model: str, quantization: str, device: str, rows: int, kind: RunKind
) -> None:
    assert speed(model, quantization, device, rows, kind) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("device", "least", "most"), [("dual-xeon-2017", 2, 6.2), ("dual-xeon-2023", 6, 15)])
def test_llama_70b_on_the_cpu_nodes_is_bound_by_their_memory(device: str, least: float, most: float) -> None:
    """``most``: the peak bandwidth divided by the 41 GB of the weights."""
    found = speed("llama-2-70b", "q4_k_m", device)
    peak = DEVICES[device].memory_bandwidth_gbytes_s / 41.4
    assert peak == pytest.approx(most, rel=0.02)
    assert least < found < most
    assert found == pytest.approx(0.7 * peak, rel=0.03)
