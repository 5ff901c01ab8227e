from pathlib import Path

import pytest

from pipesim.hardware.devices import DEVICES, INTERCONNECTS
from pipesim.hardware.models import BITS_PER_WEIGHT, MODELS
from pipesim.hardware.tables import profile_tables

DOCS = Path(__file__).parents[2] / "docs" / "hardware.md"


@pytest.mark.parametrize("name", MODELS)
def test_parameters_counted_from_the_shape_are_those_that_are_published(name: str) -> None:
    model = MODELS[name]
    assert model.shape.parameters == pytest.approx(model.published, rel=0.001)


def test_where_an_exact_number_is_published_the_count_is_exact() -> None:
    exact = [model for model in MODELS.values() if model.published % 1e6]
    assert len(exact) >= 8
    assert all(model.shape.parameters == model.published for model in exact)


@pytest.mark.parametrize(
    ("model", "quantization", "gigabytes"),
    [
        # sizes of published GGUF files, 10^9 bytes
        ("llama-2-13b", "q3_k_m", 6.34),
        ("llama-2-13b", "q4_k_m", 7.87),
        ("llama-2-13b", "q5_k_m", 9.23),
        ("llama-2-70b", "q3_k_m", 33.19),
        ("llama-2-70b", "q4_k_m", 41.42),
        ("llama-3.1-70b", "q4_k_m", 42.52),
        ("llama-3.1-70b", "q6_k", 57.89),
        ("llama-3.1-70b", "q8_0", 74.98),
    ],
)
def test_bits_per_weight_give_the_sizes_of_published_files(model: str, quantization: str, gigabytes: float) -> None:
    counted = MODELS[model].shape.parameters * BITS_PER_WEIGHT[quantization] / 8e9
    assert counted == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(
    ("name", "block_bytes", "weights"), [("q8_0", 34, 32), ("q6_k", 210, 256), ("q4_1", 20, 32), ("q4_0", 18, 32)]
)
def test_block_formats_follow_from_their_layout(name: str, block_bytes: int, weights: int) -> None:
    assert BITS_PER_WEIGHT[name] == 8 * block_bytes / weights


def test_every_figure_names_its_source() -> None:
    for profile in (*DEVICES.values(), *INTERCONNECTS.values(), *MODELS.values()):
        assert len(profile.source) > 10, profile.name


def test_a_narrower_format_is_never_slower_and_falls_back_to_a_wider_one() -> None:
    for device in DEVICES.values():
        assert device.peak("float32") <= device.peak("bfloat16") <= device.peak("int8"), device.name
    old = DEVICES["dual-xeon-2017"]
    assert old.peak("int8") == old.peak("float32"), "no unit of its own for either"


def test_a_die_is_half_of_its_module() -> None:
    whole, die = DEVICES["mi250x"], DEVICES["mi250x-gcd"]
    assert 2 * die.memory_bandwidth_gbytes_s == whole.memory_bandwidth_gbytes_s
    assert 2 * die.memory_gib == whole.memory_gib
    assert {key: 2 * peak for key, peak in die.peak_tflops.items()} == dict(whole.peak_tflops)


def test_derived_figures_of_the_xeon_nodes() -> None:
    old, new = DEVICES["dual-xeon-2017"], DEVICES["dual-xeon-2023"]
    assert old.memory_bandwidth_gbytes_s == pytest.approx(2 * 6 * 2.666 * 8, rel=1e-3)
    assert old.peak("float32") == pytest.approx(2 * 18 * 2.3e9 * 2 * 16 * 2 / 1e12, rel=1e-3)
    assert new.memory_bandwidth_gbytes_s == pytest.approx(2 * 8 * 4.8 * 8)
    assert new.peak("float32") == pytest.approx(2 * 56 * 2.0e9 * 64 / 1e12, rel=3e-3)
    assert new.peak("bfloat16") == pytest.approx(2 * 56 * 2.0e9 * 1024 / 1e12, rel=3e-3)


def test_the_documentation_shows_these_tables() -> None:
    """If not: replace everything under its last heading by what `pipesim profiles` prints."""
    assert DOCS.read_text(encoding="utf-8").endswith(profile_tables())
