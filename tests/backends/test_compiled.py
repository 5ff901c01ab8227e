"""``execution.kernels: compile``: exact like the others, refused where it is not, and never chosen unasked."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pipelines import LAYERS, running, tiny_plan
from test_exact import micro_batches, one_row_at_a_time, text
from tiny_models import FAMILY_CONFIGS, tiny_source

from backends.models.devices import Device, open_device
from backends.models.exact import Tiling, choose_tiling
from backends.models.loading import ModelSource
from backends.models.stage_model import StageModel
from backends.models.torch_engine import TorchEngine
from backends.reference import generate_in_one_process
from pipesim.errors import BadInputError
from pipesim.scenario.workload import Execution

CUDA = "cuda:0"
BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16]


@pytest.fixture(autouse=True)
def two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes seconds to compile."""
    monkeypatch.setattr(
        "backends.models.torch_engine.choose_tiling",
        lambda *arguments: Tiling((4, 6, 8), choose_tiling(*arguments).kernel),
    )


def check_exactness(source: ModelSource, dtype: torch.dtype, device: Device) -> None:
    """Bit for bit the same logits alone, in micro-batches, trees and several tiles, in one stage and in two."""
    whole = StageModel(source, 0, 4, dtype, device=device, kernels="compile")
    halves = [StageModel(source, *layers, dtype, device=device, kernels="compile") for layers in ((0, 1), (1, 4))]
    assert isinstance(whole.engine, TorchEngine)
    assert whole.arithmetic.startswith("torch.compile ")
    for prompt, sizes, siblings, stages in [
        (1, [1, 2, 3], 1, [whole]),
        (63, [4, 5], 3, [whole]),
        (130, [11, 9], 5, halves),
        (600, [7, 1, 20], 3, halves),
    ]:
        tokens = text(prompt + sum(sizes), 160)
        alone = one_row_at_a_time([whole], tokens[:prompt], tokens[prompt:])
        assert torch.equal(alone, micro_batches(stages, tokens[:prompt], tokens[prompt:], sizes, siblings, 3))
    plain = StageModel(source, 0, 4, dtype, device=device, kernels="torch")
    expected = one_row_at_a_time([plain], tokens[:600], tokens[600:])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(alone, expected, rtol=0.02, atol=tolerance)
    texts = [generate_in_one_process(model, [3, 1, 4], 40) for model in (whole, plain)]
    assert texts[0] == texts[1] or dtype != torch.float32


def test_a_compiled_layer_is_exact(tiny: ModelSource) -> None:
    """In bfloat16, which torch.compile would not round to between layers."""
    check_exactness(tiny, BF16, Device())


@pytest.mark.slow
@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", dtype) for dtype in DTYPES] + [(name, BF16) for name in ("gemma3", "qwen2-windows", "qwen3")],
)
def test_compiled_layers_of_other_families_and_dtypes_are_exact(
    tmp_path: Path, family: str, dtype: torch.dtype, fixed_shapes: bool
) -> None:
    check_exactness(tiny_source(tmp_path / family, **FAMILY_CONFIGS[family]), dtype, Device(fixed_shapes=fixed_shapes))


@pytest.mark.slow
def test_a_compiled_pipeline_gives_the_text_of_plain_decoding(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "model", num_hidden_layers=LAYERS)
    whole = StageModel(source, 0, LAYERS, kernels="compile")
    plan = tiny_plan(source.path, 2, "planted", kernels="compile", startup_timeout_s=280.0)
    expected = generate_in_one_process(whole, [3, 1, 4, 1, 5], 60)
    with running(plan) as pipeline:
        for policy in ("autoregressive", "pipeinfer"):
            assert pipeline.generate(policy, [3, 1, 4, 1, 5], 60, known=expected) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_layer_is_exact_on_a_cuda_device(tiny: ModelSource, dtype: torch.dtype) -> None:
    check_exactness(tiny, dtype, open_device(CUDA, "float32"))


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_is_exact_compiled(smollm2: ModelSource, dtype: torch.dtype) -> None:
    thin = StageModel(smollm2, 0, 30, dtype, skipped=range(2, 30), kernels="compile")
    for length, sizes, siblings in [(63, [4, 5], 3), (130, [8, 1, 9], 0), (60, [6, 7], 5)]:
        tokens = text(length + sum(sizes), smollm2.config.vocabulary)
        alone = one_row_at_a_time([thin], tokens[:length], tokens[length:])
        assert torch.equal(alone, micro_batches([thin], tokens[:length], tokens[length:], sizes, siblings, 7))


def test_a_compiled_layer_that_is_not_exact_is_refused(tiny: ModelSource) -> None:
    """As if what was compiled let a row's neighbours have a say."""

    def leaky(half: Any, **_: object) -> Any:
        return half if half.__name__ == "project" else lambda rows, *others: half(rows, *others) + rows.sum()

    with (
        mock.patch.object(torch, "compile", leaky),
        pytest.raises(BadInputError, match=r"execution\.kernels compile: .*not exact here, .*: use auto or torch"),
    ):
        StageModel(tiny, 0, 4, kernels="compile")


def test_without_a_compiler_it_is_refused(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "nobody compiled it before", hidden_size=48, head_dim=8)
    without = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(without),  # type: ignore[attr-defined]
        pytest.raises(
            BadInputError, match=r"execution\.kernels compile: torch\.compile fails here, use auto or torch: "
        ),
    ):
        StageModel(source, 0, 4, kernels="compile")


def test_quantized_weights_are_not_compiled(tiny: ModelSource) -> None:
    with pytest.raises(BadInputError, match="quantized needs native kernels"):
        StageModel(tiny, 0, 4, "quantized", kernels="compile")


def test_there_is_time_to_compile_unless_somebody_says_otherwise() -> None:
    assert Execution().startup_limit_s == 120
    assert Execution(kernels="compile").startup_limit_s == 1200
    assert Execution(kernels="compile", startup_timeout_s=5).startup_limit_s == 5
