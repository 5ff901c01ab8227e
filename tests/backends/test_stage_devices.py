"""Devices: the same tests in fixed shapes on the CPU, and on a CUDA device where there is one."""

import random
from collections.abc import Callable

import pytest
import torch
from test_exact import micro_batches, one_row_at_a_time, text
from tiny_models import FAMILY_CONFIGS, Chain, prefill_runs, tiny_source

from backends.models.devices import CPU, Device, open_device
from backends.models.exact import Tiling, largest
from backends.models.loading import ModelSource
from backends.models.stage_model import StageModel
from backends.models.steps import StepShape, agreeing_steps
from backends.models.torch_engine import TorchEngine
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from pipesim.errors import BadInputError
from pipesim.scheduling.runs import Run, RunKind

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = torch.bfloat16
CUDA = "cuda:0"
devices = pytest.mark.parametrize("device_name", ["fixed shapes", pytest.param(CUDA, marks=pytest.mark.gpu)])


@pytest.fixture
def device(device_name: str) -> Device:
    return open_device(CUDA, "float32") if device_name == CUDA else Device(fixed_shapes=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny_source(folder / name, **changes) for name, changes in FAMILY_CONFIGS.items()}


@devices
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", dtype) for dtype in DTYPES] + [(family, BF16) for family in FAMILY_CONFIGS][1:]
)
def test_logits_do_not_depend_on_micro_batches_siblings_cells_or_split(
    sources: dict[str, ModelSource], family: str, dtype: torch.dtype, device: Device
) -> None:
    whole = StageModel(sources[family], 0, 4, dtype, device=device)
    halves = [StageModel(sources[family], *layers, dtype, device=device) for layers in ((0, 1), (1, 4))]
    for prompt, sizes, siblings, stages in [
        (1, [1, 2, 3], 1, [whole]),
        (63, [4, 5], 3, [whole]),
        (130, [11, 9], 5, halves),
        (600, [7, 1, 20], 3, [whole]),
    ]:
        tokens = text(prompt + sum(sizes), 160)
        alone = one_row_at_a_time([whole], tokens[:prompt], tokens[prompt:])
        assert alone.device == CPU
        assert torch.equal(alone, micro_batches(stages, tokens[:prompt], tokens[prompt:], sizes, siblings, 3))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_fixed_shapes_change_no_bit(sources: dict[str, ModelSource], family: str) -> None:
    plain, fixed = (
        StageModel(sources[family], 0, 4, device=Device(fixed_shapes=which), kernels="torch") for which in (False, True)
    )
    for prompt, sizes, siblings in [(5, [3, 40], 2), (63, [1, 17], 4), (600, [9, 30], 3)]:
        tokens = text(prompt + sum(sizes), 160)
        found = [micro_batches([one], tokens[:prompt], tokens[prompt:], sizes, siblings, 5) for one in (plain, fixed)]
        assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_cuda_device_computes_what_the_cpu_does(
    sources: dict[str, ModelSource], family: str, dtype: torch.dtype
) -> None:
    tokens = text(200, 160)
    found = [
        one_row_at_a_time([StageModel(sources[family], 0, 4, dtype, device=device)], tokens[:130], tokens[130:])
        for device in (Device(), open_device(CUDA, "float32"))
    ]
    tolerance = 1e-3 if dtype is torch.float32 else 0.3
    torch.testing.assert_close(*found, rtol=0.05, atol=tolerance)


@devices
def test_rows_of_several_tiles_find_their_ancestors_in_any_order(tiny: ModelSource, device: Device) -> None:
    tokens = text(30 + 40, 160)
    model, found = StageModel(tiny, 0, 4, device=device), []
    for order in (list(range(40)), random.Random(0).sample(range(40), 40)):
        chain = Chain([model], 200)
        for run in prefill_runs(tokens[:30], 0b1111):
            chain.logits(run)
        columns = [tokens[30 + at] for at in order], [30 + at for at in order], [1] * 40
        logits = chain.logits(Run(100, 0, RunKind.SPECULATIVE, *map(tuple, columns)))
        found.append(logits[[order.index(at) for at in range(40)]])
        chain.close()
    assert torch.equal(*found)


@devices
def test_steps_are_recorded_once_and_serve_the_next_session(
    tiny: ModelSource, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StageModel(tiny, 0, 4, device=device)
    recorded: list[StepShape] = []
    record = device.record

    def counting(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        recorded.append(step.__self__.shape)  # type: ignore[attr-defined]
        return record(step)

    monkeypatch.setattr(device, "record", counting)
    texts = [generate_in_one_process(model, [3, 1, 4], 40) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]
    assert isinstance(model.engine, TorchEngine)
    assert recorded == [StepShape(64, 1), StepShape(model.engine.tiling.sizes[0], 1)]


@devices
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, seed=5), Sampling(0.7, 20, 0.9, 3), Sampling(repetition_penalty=1.4)]
)
def test_given_logits_give_the_same_token_on_every_device(
    tiny: ModelSource, device: Device, sampling: Sampling
) -> None:
    model, tokens = StageModel(tiny, 0, 4, device=device), text(50, 160)
    predicted = []
    for session, forward in enumerate([model.forward, model.logits]):
        model.open_session(session, 80, 1, sampling)
        run = Run(1, 0, RunKind.PREFILL, tuple(tokens), tuple(range(50)), (1,) * 50, 40)
        predicted.append(forward(session, run, None, model.admit(session, run)))
    ids, logits = predicted
    assert isinstance(logits, torch.Tensor)
    histories = [tokens[: 41 + at] for at in range(10)]
    assert ids == [sampling.pick(row.numpy(), len(had), had) for row, had in zip(logits, histories, strict=True)]


@pytest.mark.parametrize("place", ["cpu", pytest.param(CUDA, marks=pytest.mark.gpu)])
def test_the_lowest_id_wins_a_tie_wherever_the_argmax_is_taken(place: str) -> None:
    logits = torch.tensor([[1.0, 7.0, 7.0, 2.0], [3.0, 3.0, 3.0, 3.0], [0.0, -1.0, 0.0, -1.0]]).repeat(1, 3000)
    assert logits.to(place).argmax(-1).tolist() == [Sampling().pick(row.numpy(), 5) for row in logits] == [1, 0, 0]


@devices
def test_a_run_in_fixed_shapes_stops_between_tiles(tiny: ModelSource, device: Device) -> None:
    model = StageModel(tiny, 0, 4, device=device)
    model.open_session(7, 200, 1, Sampling())
    run = Run(1, 0, RunKind.SPECULATIVE, (1,) * 40, tuple(range(40)), (1,) * 40)
    cells = model.admit(7, run)
    assert isinstance(model.engine, TorchEngine)
    for patience in range(len(model.engine.tiling.split(40)[1]) + 1):
        answers = iter([False] * patience + [True])
        assert model.forward(7, run, None, cells, lambda answers=answers: next(answers)) is None
        assert next(answers, None) is None, "should_stop was not asked before every tile"


def test_a_layer_that_a_row_s_neighbours_change_is_refused(tiny: ModelSource) -> None:
    def leaky(hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden + hidden.sum()

    with pytest.raises(BadInputError, match=r"no number of rows .* use another dtype or device"):
        agreeing_steps(Tiling((4, 8)), tiny.config, torch.float32, Device(fixed_shapes=True), leaky)


def test_a_layer_that_depends_on_the_tile_s_size_narrows_the_tiling(tiny: ModelSource) -> None:
    def larger(hidden: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden + (len(hidden) > 6)

    tiling = agreeing_steps(Tiling((2, 4, 6, 8, 16)), tiny.config, torch.float32, Device(fixed_shapes=True), larger)
    assert tiling.sizes == (2, 4, 6)


def test_a_dtype_in_which_nothing_repeats_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"execution\.dtype: no number of rows"):
        largest([])


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("cuda", "float32", r"device 'cuda' is not known: use cpu or cuda:0"),
        ("cuda:99", "float32", r"no device 'cuda:99' on this machine, .*use"),
        ("cpu", "float8", r"dtype 'float8' is none of float32, bfloat16, float16"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(name: str, dtype: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        open_device(name, dtype)


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda place: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda place: "T4")
    with pytest.raises(BadInputError, match=r"bfloat16: cuda:0 \(T4\) does not compute in it, use float16"):
        open_device(CUDA, "bfloat16")


@pytest.mark.model
@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2_is_exact_in_fixed_shapes_in_every_dtype(smollm2: ModelSource, dtype: torch.dtype) -> None:
    thin = StageModel(smollm2, 0, 30, dtype, skipped=range(2, 30), device=Device(fixed_shapes=True))
    for length, sizes, siblings in [(63, [4, 5], 3), (130, [8, 1, 9], 0)]:
        tokens = text(length + sum(sizes), smollm2.config.vocabulary)
        alone = one_row_at_a_time([thin], tokens[:length], tokens[length:])
        assert torch.equal(alone, micro_batches([thin], tokens[:length], tokens[length:], sizes, siblings, 7))


@pytest.mark.gpu
@pytest.mark.model
@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2_is_exact_on_a_cuda_device(smollm2: ModelSource, dtype: torch.dtype) -> None:
    device = open_device(CUDA, "float32")
    whole = StageModel(smollm2, 0, 30, dtype, device=device)
    stages = [StageModel(smollm2, *layers, dtype, device=device) for layers in [(0, 11), (11, 30)]]
    for length, sizes, siblings in [(63, [4, 5], 3), (130, [8, 1, 9, 30], 0), (600, [16, 7], 5)]:
        tokens = text(length + sum(sizes), smollm2.config.vocabulary)
        alone = one_row_at_a_time([whole], tokens[:length], tokens[length:])
        assert torch.equal(alone, micro_batches(stages, tokens[:length], tokens[length:], sizes, siblings, 7))
