"""One forward pass of SmolLM2-135M as ratios within one process, one thread. The quick form's bounds are loose.

``--runslow`` measures at full size; ``python -m analysis.forward_speed`` writes the figures down.
"""

import pytest
import torch

from analysis.forward_speed import EAGER, EXACT, FASTEST, FLOOR, TORCH, int8_verdict, measure
from backends.models.exact import choose_tiling
from backends.models.finding import DEFAULT_MODEL
from backends.models.loading import ModelSource, open_model
from backends.models.native.self_check import kernels_refusal
from backends.models.products import available_kernels
from pipesim.errors import BadInputError

needs_kernels = pytest.mark.skipif(bool(kernels_refusal()), reason=f"SKIPPED: {kernels_refusal()}")


@pytest.fixture(scope="module")
def source() -> ModelSource:
    try:
        return open_model(DEFAULT_MODEL)
    except BadInputError as error:
        pytest.skip(f"SKIPPED: {error}")


@needs_kernels
@pytest.mark.model
def test_bfloat16_is_faster_than_transformers_and_not_far_from_reading_the_weights(source: ModelSource) -> None:
    found = measure(source, "bfloat16", rows=(1,), rounds=3)
    assert found.ratio(EAGER, EXACT) > 1.4
    assert found.ratio(TORCH, EXACT) > 1.1
    assert found.ratio(EXACT, FLOOR) < 3


def test_int8_with_one_scale_for_all_rows_fails_the_self_check() -> None:
    assert "changes with the rows beside it" in int8_verdict()


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_weights_are_used_where_there_are_any(source: ModelSource, dtype: torch.dtype) -> None:
    """Whether they are exact depends on the machine; where they are not, plain weights must be."""
    tiling = choose_tiling(source.config, dtype)
    assert len(tiling.sizes) > 1
    assert tiling.kernel in available_kernels(dtype)


@needs_kernels
@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "quantized"])
def test_the_forward_pass_at_full_size(source: ModelSource, dtype: str) -> None:
    found = measure(source, dtype)
    if dtype == "quantized":
        assert found.ratio(EXACT, FLOOR) < 4
        return
    if dtype == "bfloat16":
        assert found.ratio(EAGER, EXACT) > 1.4
        assert found.ratio(EXACT, FLOOR) < 1.7
    assert all(found.ratio(EXACT, FASTEST, rows) < 1.2 for rows in (1, 4, 16))
