"""Lossy activations: each row by itself, as wide as said, and one text whatever the policy and whatever is lost."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipelines import LAYERS, RunningPipeline, running, tiny_plan
from tiny_models import save_gguf, save_tiny

from backends import frames
from backends.compression import to_activation, to_hidden
from backends.frames import Compression, FrameError, OpenFrame, RunFrame, Session, decode, encode
from backends.models.devices import DTYPES, QUANTIZED
from backends.models.loading import open_model
from backends.models.native.self_check import kernels_refusal
from backends.models.stage_model import StageModel
from backends.reference import SplitModel, generate_in_one_process
from backends.sampling import Sampling
from backends.stage_worker import StageWorker
from pipesim import scenario
from pipesim.scenario import ACTIVATION_BYTES
from pipesim.scheduling.runs import Run, RunKind

LOSSY: tuple[Compression, ...] = ("fp8", "int8")
SESSION = Session(b"t" * frames.TOKEN_BYTES, 1, 0)
PROMPT = [5, 9, 5, 9, 17, 5, 9, 5, 33, 80] * 13
NEW_TOKENS = 24

rows_of_values = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


def there_and_back(hidden: torch.Tensor, form: Compression) -> torch.Tensor:
    """Over the wire."""
    rows = len(hidden)
    run = Run(3, 0, RunKind.SPECULATIVE, (1,) * rows, tuple(range(rows)), (1,) * rows)
    frame = decode(encode(RunFrame(SESSION, run, to_activation(hidden, form))))
    assert isinstance(frame, RunFrame)
    assert frame.activation
    return to_hidden(frame.activation)


@given(rows_of_values, st.sampled_from([torch.float32, torch.bfloat16]))
def test_plain_activations_arrive_bit_for_bit(values: list[list[float]], dtype: torch.dtype) -> None:
    hidden = torch.tensor(values).to(dtype)
    assert torch.equal(there_and_back(hidden, "none"), hidden)


@pytest.mark.parametrize("form", LOSSY)
@given(values=rows_of_values)
def test_an_element_is_off_by_half_a_step_at_most(form: Compression, values: list[list[float]]) -> None:
    hidden = torch.tensor(values)
    found, largest = there_and_back(hidden, form).double(), hidden.double().abs().amax(1, keepdim=True)
    step = largest / {"fp8": 448 * 2**9, "int8": 127}[form]  # fp8: of the smallest, subnormal elements
    limit = torch.maximum(step / 2, hidden.double().abs() * (2**-4 if form == "fp8" else 0))
    assert ((found - hidden.double()).abs() <= limit * 1.0001 + 1e-42).all()


@pytest.mark.parametrize("form", LOSSY)
@given(values=rows_of_values, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_is_compressed_by_itself(form: Compression, values: list[list[float]], dtype: torch.dtype) -> None:
    hidden = torch.tensor(values).to(dtype)
    together = there_and_back(hidden, form)
    assert together.dtype == dtype
    for row, alone in enumerate(hidden.split(1)):
        assert torch.equal(there_and_back(alone, form)[0], together[row])


@pytest.mark.parametrize("form", LOSSY)
def test_a_wide_row_beside_others_has_the_same_bytes(form: Compression) -> None:
    hidden = torch.randn(70, 601, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 4, 70)[:, None]
    hidden[3] = 0
    whole, alone = to_activation(hidden, form), [to_activation(row, form) for row in hidden.split(1)]
    assert bytes(whole.data) == b"".join(bytes(row.data[:4]) for row in alone) + b"".join(
        bytes(row.data[4:]) for row in alone
    )
    assert not to_hidden(alone[3]).any()


@pytest.mark.parametrize("form", LOSSY)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_has_no_scale_is_not_sent(form: Compression, value: float) -> None:
    with pytest.raises(FrameError, match="not finite"):
        to_activation(torch.tensor([[1.0, 2.0], [3.0, value]]), form)


def test_simulator_and_wire_count_the_same_bytes(tmp_path: Path) -> None:
    assert frames.SCALE_BYTES == scenario.SCALE_BYTES
    hidden = torch.ones(3, 64)
    assert len(to_activation(hidden, "fp8").data) == len(to_activation(hidden, "int8").data) == 3 * (64 + 4)
    file = save_gguf(save_tiny(tmp_path / "tiny"), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    known = {name: dtype for name, dtype in DTYPES.items() if name != QUANTIZED or not kernels_refusal()}
    sizes = {
        name: StageModel(open_model(file), 0, 1, dtype).engine.hidden_dtype.itemsize for name, dtype in known.items()
    }
    assert sizes == {name: ACTIVATION_BYTES[name] for name in known}
    assert set(DTYPES) == set(ACTIVATION_BYTES)


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("eight-layers"), num_hidden_layers=LAYERS)


def split(model: Path, stages: int, form: Compression) -> SplitModel:
    parts, first = [], 0
    for layers in (part.last_layer - part.first_layer for part in tiny_plan(model, stages).stages):
        parts.append(StageModel(open_model(model), first, first + layers))
        first += layers
    return SplitModel(parts, form)


def text(model: Path, stages: int, form: Compression) -> list[int]:
    return generate_in_one_process(split(model, stages, form), PROMPT, NEW_TOKENS)


@pytest.fixture(scope="module", params=LOSSY)
def compressed(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[RunningPipeline, list[int]]]:
    """A pipeline of three stages, and its text."""
    with running(tiny_plan(model, 3, compression=request.param)) as pipeline:
        yield pipeline, text(model, 3, request.param)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("autoregressive", {}),
        ("speculative", {"max_nodes": 5, "branches": 2}),
        ("pipeinfer", {"micro_batch": 3, "branches": 2, "p_split": 0.1}),
    ],
)
def test_every_policy_gives_the_compressed_stages_text(
    compressed: tuple[RunningPipeline, list[int]], policy: str, settings: dict[str, float]
) -> None:
    pipeline, expected = compressed
    assert pipeline.generate(policy, PROMPT, NEW_TOKENS, settings) == expected


@pytest.mark.parametrize("moment", [2, 15], ids=["mid-prefill", "mid-text"])
def test_a_lost_stage_changes_nothing(compressed: tuple[RunningPipeline, list[int]], moment: int) -> None:
    pipeline, expected = compressed
    strikes: dict[int, Callable[[], None]] = {moment: lambda: _kill(pipeline)}
    settings = {"micro_batch": 3, "branches": 2, "p_split": 0.1}
    assert pipeline.generate("pipeinfer", PROMPT, NEW_TOKENS, settings, strikes=strikes) == expected


def _kill(pipeline: RunningPipeline) -> None:
    process = pipeline.pipeline.stages[1].process
    assert process
    os.kill(process.pid, signal.SIGKILL)


def test_compression_really_goes_on_between_stages(model: Path) -> None:
    """Its logits are near the plain ones, not equal; uncompressed stages are the whole model."""
    whole = StageModel(open_model(model), 0, LAYERS)
    assert text(model, 3, "none") == generate_in_one_process(whole, PROMPT, NEW_TOKENS)
    run = Run(0, 0, RunKind.PREFILL, tuple(PROMPT[:60]), tuple(range(60)), (1,) * 60)
    states = {}
    for form in ("none", *LOSSY):
        line = split(model, 3, form)
        line.open_session(0, 64, 1, Sampling())
        cells = line.admit(0, run)
        hidden = None
        for stage in line.stages[:-1]:
            output = stage.forward(0, run, hidden, cells)
            assert isinstance(output, torch.Tensor)
            hidden = to_hidden(to_activation(output, form))
        states[form] = line.stages[-1].logits(0, run, hidden, cells)
    for form in LOSSY:
        off = (states[form] - states["none"]).norm() / states["none"].norm()
        assert 0 < off < 0.1, form


@pytest.mark.parametrize(("sent", "told"), [("none", "fp8"), ("fp8", "none"), ("int8", "fp8")])
def test_a_stage_takes_only_the_compression_that_it_was_told(model: Path, sent: Compression, told: Compression) -> None:
    worker = StageWorker(1, StageModel(open_model(model), 1, LAYERS), lambda: None, compression=told)
    worker.handle(OpenFrame(SESSION, 64, 1, Sampling()), 0)
    run = Run(0, 0, RunKind.PREFILL, (1,), (0,), (1,))
    with pytest.raises(FrameError, match=f"activation_compression is {sent} .* told {told}"):
        worker.handle(RunFrame(SESSION, run, to_activation(torch.ones(1, 64), sent)), 0)
