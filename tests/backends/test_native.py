"""The native kernels: right, exact however many rows there are, true to a file's own quantization, and optional."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from test_exact import micro_batches, one_row_at_a_time, text
from tiny_models import FAMILY_CONFIGS, save_gguf, save_tiny, tiny_source

from backends.cluster import ClusterPlan, running_pipeline, stage_parts
from backends.models.blocks import LAYOUTS, Blocks, read_blocks, stack
from backends.models.finding import GEMMA
from backends.models.loading import ModelSource, open_model
from backends.models.native import library, self_check
from backends.models.native.engine import NativeEngine
from backends.models.native.weights import Arena, PackedMatrix
from backends.models.stage_model import StageModel
from backends.models.torch_engine import TorchEngine
from pipesim.errors import BadInputError, StageFailedError

needs_kernels = pytest.mark.skipif(
    bool(self_check.kernels_refusal()), reason=f"SKIPPED: {self_check.kernels_refusal()}"
)


def random_blocks(layout: str, outputs: int, inputs: int, seed: int = 0) -> tuple[Blocks, np.ndarray]:
    """Any bytes are a tensor, if only its scales are finite; and what the ``gguf`` package says that it is."""
    kind = GGMLQuantizationType[layout]
    values, size = GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    raw = draw.integers(0, 256, (outputs, inputs // values, size), dtype=np.uint8)
    if layout == "Q8_0":
        raw[raw == 128] = 127
    for at in {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(layout, (0, 2)):
        halves = draw.normal(size=(outputs, inputs // values, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = halves.view(np.uint8)
    flat = raw.reshape(outputs, -1)
    blocks = read_blocks(flat, kind)
    assert blocks is not None
    return blocks, dequantize(flat, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_what_the_file_says_to_the_last_bit(layout: str) -> None:
    blocks, expected = random_blocks(layout, 6, 512)
    assert np.array_equal(blocks.values(), expected)
    assert blocks.codes.min() >= (0 if blocks.bits == 4 else -128)
    assert blocks.codes.max() <= (15 if blocks.bits == 4 else 127)


@pytest.mark.parametrize("one", LAYOUTS)
@pytest.mark.parametrize("other", ["Q4_0", "Q4_1", "Q5_1", "Q6_K"])
def test_matrices_of_unlike_quantization_are_fused_exactly(one: str, other: str) -> None:
    parts = [random_blocks(layout, 3, 512, seed)[0] for seed, layout in enumerate((one, other))]
    assert np.array_equal(stack(parts).values(), np.concatenate([part.values() for part in parts]))


def weights() -> Iterator[tuple[str, torch.Tensor | Blocks]]:
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((1, 2), (70, 96), (130, 576)):
        weight = torch.randn(outputs, inputs, generator=generator)
        yield f"float32-{outputs}x{inputs}", weight
        yield f"bfloat16-{outputs}x{inputs}", weight.bfloat16()
    for layout in LAYOUTS:
        yield layout, random_blocks(layout, 130, 768)[0]
    yield "fused", stack([random_blocks(layout, 40, 256)[0] for layout in ("Q4_K", "Q6_K", "Q8_0")])


@needs_kernels
@pytest.mark.parametrize(("name", "weight"), list(weights()), ids=[name for name, _ in weights()])
def test_a_product_is_right_and_the_same_for_every_row_count(name: str, weight: torch.Tensor | Blocks) -> None:
    matrix = PackedMatrix(weight, Arena())
    rows = torch.randn(33, matrix.inputs, generator=torch.Generator().manual_seed(1))
    together = matrix.product(rows)
    for count in range(1, 33):
        assert torch.equal(matrix.product(rows[:count]), together[:count])
        assert torch.equal(matrix.product(rows[-count:]), together[-count:])
    assert torch.equal(matrix.product(rows, threads=3), together)
    values = torch.from_numpy(weight.values()) if isinstance(weight, Blocks) else weight.float()
    seen = rows if name.startswith("float32") else rows.bfloat16()
    size = seen.double().abs() @ values.double().abs().T
    assert ((together - seen.double() @ values.double().T).abs() <= 2e-6 * size).all()


@needs_kernels
def test_the_code_that_has_no_place_is_refused() -> None:
    codes = np.full((2, 32), -128, np.int8)
    with pytest.raises(BadInputError, match="-128"):
        PackedMatrix(Blocks(codes, np.ones((2, 1), np.float16), None, 8), Arena())


@pytest.fixture(scope="module", params=["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp(request.param)
    family = {"Q4_0": "llama", "Q4_1": "qwen2", "Q5_0": "gemma3", "Q8_0": "qwen3"}[request.param]
    path = save_tiny(folder / "model", **FAMILY_CONFIGS[family])
    return open_model(save_gguf(path, folder / "model.gguf", gguf.GGMLQuantizationType[request.param]))


@needs_kernels
def test_quantized_logits_are_those_of_the_dequantized_model(quantized: ModelSource) -> None:
    """Up to the rounding of activations and hidden states to bfloat16."""
    tokens = text(100, 160)
    exact, close = (
        one_row_at_a_time([StageModel(quantized, 0, 4, dtype)], tokens[:90], tokens[90:])
        for dtype in (torch.float32, "quantized")
    )
    assert (close - exact).abs().max() < 0.08 * exact.std()
    assert (close - exact).square().mean().sqrt() < 0.02 * exact.std()


@needs_kernels
def test_quantized_logits_do_not_depend_on_runs_and_splits(quantized: ModelSource) -> None:
    tokens = text(150, 160)
    alone = one_row_at_a_time([StageModel(quantized, 0, 4, "quantized")], tokens[:130], tokens[130:])
    stages = [StageModel(quantized, first, last, "quantized") for first, last in ((0, 1), (1, 4))]
    assert torch.equal(alone, micro_batches(stages, tokens[:130], tokens[130:], [4, 11, 5], 3, 5))


@needs_kernels
@pytest.mark.model
def test_quantized_smollm2_takes_the_memory_of_its_file(smollm2: ModelSource) -> None:
    half, blocks = (StageModel(smollm2, 0, 2, dtype).engine for dtype in (torch.bfloat16, "quantized"))
    assert isinstance(half, NativeEngine)
    assert isinstance(blocks, NativeEngine)
    layers, table = (half.parameters - 49152 * 576) // 2, 49152 * 576
    assert half.weight_bytes == pytest.approx(2 * half.parameters, rel=0.01)
    # Q4_1 takes 5 bits for a weight, the embedding's Q8_0 takes 8.5
    assert blocks.weight_bytes == pytest.approx(2 * layers * 5 / 8 + table * 8.5 / 8, rel=0.01)


@needs_kernels
@pytest.mark.model
def test_quantized_smollm2_is_near_its_float32_self_and_exact(smollm2: ModelSource, smollm2_model: StageModel) -> None:
    tokens = text(85, smollm2.config.vocabulary)
    model = StageModel(smollm2, 0, 30, "quantized")
    expected = one_row_at_a_time([smollm2_model], tokens[:70], tokens[70:])
    alone = one_row_at_a_time([model], tokens[:70], tokens[70:])
    divergence = torch.nn.functional.kl_div(alone.log_softmax(-1), expected.softmax(-1), reduction="batchmean")
    assert divergence < 5e-3
    assert torch.equal(alone, micro_batches([model], tokens[:70], tokens[70:], [9, 6], 2, 3))


@needs_kernels
@pytest.mark.slow
@pytest.mark.model
def test_quantized_gemma_of_four_quantizations_is_near_its_float32_self(gemma: ModelSource) -> None:
    assert GEMMA in str(gemma.path)
    tokens = text(40, gemma.config.vocabulary)
    expected, close = (
        one_row_at_a_time([StageModel(gemma, 0, 18, dtype)], tokens[:32], tokens[32:])
        for dtype in (torch.float32, "quantized")
    )
    assert torch.nn.functional.kl_div(close.log_softmax(-1), expected.softmax(-1), reduction="batchmean") < 2e-2


def test_quantized_needs_a_file_that_is(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "plain")
    with pytest.raises(BadInputError, match=r"no quantized blocks|cannot be had here"):
        StageModel(source, 0, 4, "quantized")


# -- which engine serves -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is compiled yet, and nobody has looked for a compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (library.load, self_check.kernels_refusal):
        cached.cache_clear()
    yield monkeypatch
    for cached in (library.load, self_check.kernels_refusal):
        cached.cache_clear()


@pytest.mark.parametrize(("compiler", "why"), [("no-such-compiler", "not installed"), ("false", "cannot compile")])
def test_without_a_compiler_torch_serves_and_what_needs_kernels_is_refused(
    tiny: ModelSource, fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str, why: str
) -> None:
    fresh_choice.setenv("CXX", compiler)
    model = StageModel(tiny, 0, 4)
    assert isinstance(model.engine, TorchEngine)
    assert model.arithmetic.startswith("torch ")
    assert why in caplog.text
    with pytest.raises(BadInputError, match=rf"execution.kernels native cannot be had here: .*{why}"):
        StageModel(tiny, 0, 4, kernels="native")
    with pytest.raises(BadInputError, match=rf"execution.dtype quantized cannot be had here: .*{why}"):
        StageModel(tiny, 0, 4, "quantized")


@pytest.fixture
def compiled(fresh_choice: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a compiler, which takes a moment to copy what was compiled before, notes each time that it is called."""
    fresh_choice.delenv("XDG_CACHE_HOME")
    made = library.load()._name
    library.load.cache_clear()
    fresh_choice.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    script.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exit
echo >> {calls}
while [ "$1" != -o ]; do shift; done
sleep 0.3
cp {made} "$2"
""")
    script.chmod(0o700)
    fresh_choice.setenv("CXX", str(script))
    return calls


@needs_kernels
def test_kernels_that_compute_wrong_are_not_used(
    tiny: ModelSource, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedMatrix, "product", lambda self, rows, threads=1: rows[:, :1] * len(rows))
    assert "self-check" in self_check.kernels_refusal()
    assert isinstance(StageModel(tiny, 0, 4).engine, TorchEngine)


@needs_kernels
def test_stages_that_start_together_compile_once_and_damaged_kernels_anew(compiled: Path, tmp_path: Path) -> None:
    load = [sys.executable, "-c", "from backends.models.native import library; library.load()"]
    starting = [subprocess.Popen(load) for _ in range(3)]
    assert [process.wait() for process in starting] == [0, 0, 0]
    assert len(compiled.read_text()) == 1
    (kept,) = (tmp_path / "cache" / "pipesim").glob("*.so")
    kept.write_bytes(b"no library")
    library.load()
    assert len(compiled.read_text()) == 2


@needs_kernels
def test_the_head_compiles_before_its_stages_start_and_takes_none_of_their_time(
    tiny: ModelSource, compiled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def start(startup_timeout_s: float) -> None:
        plan = ClusterPlan(str(tiny.path), stage_parts([2, 2]), kernels="native", startup_timeout_s=startup_timeout_s)
        async with running_pipeline(plan) as pipeline:
            assert all(stage.arithmetic.startswith("native") for stage in pipeline.stages)

    with pytest.raises(StageFailedError, match="startup_timeout_s"):
        asyncio.run(start(0.05))  # the compiler takes longer
    assert len(list((tmp_path / "cache" / "pipesim").glob("*.so"))) == 1
    asyncio.run(start(60))
    assert len(compiled.read_text()) == 1
    assert capfd.readouterr().err.count("compiling the CPU kernels") == 1


@needs_kernels
def test_without_a_place_to_keep_kernels_torch_serves(tiny: ModelSource, compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert "cannot be kept in" in self_check.kernels_refusal()
    assert isinstance(StageModel(tiny, 0, 4).engine, TorchEngine)
    assert not compiled.exists()


@needs_kernels
def test_the_setting_decides(tiny: ModelSource) -> None:
    assert isinstance(StageModel(tiny, 0, 4, kernels="native").engine, NativeEngine)
    assert isinstance(StageModel(tiny, 0, 4, kernels="auto").engine, NativeEngine)
    assert isinstance(StageModel(tiny, 0, 4, kernels="torch").engine, TorchEngine)
    with pytest.raises(BadInputError, match="quantized needs native kernels"):
        StageModel(tiny, 0, 4, "quantized", kernels="torch")
    with pytest.raises(BadInputError, match="none of auto, native, torch"):
        StageModel(tiny, 0, 4, kernels="other")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_lie_in_private_memory_which_alone_gets_huge_pages() -> None:
    kept = Arena().keep(np.ones(5, np.float32))
    address = kept.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access = line.split()[:2]
        first, end = (int(bound, 16) for bound in span.split("-"))
        if first <= address < end:
            assert access == "rw-p"
            return
    raise AssertionError("the weights lie nowhere")
