"""A token's logits are bit for bit the same, whichever run computes it: the promise behind equal text."""

import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILY_CONFIGS, Chain, prefill_runs, tiny_source

from backends.models.attention import attend, plan_tiles
from backends.models.exact import (
    BLOCK,
    LARGEST_TILE,
    Tiling,
    cancelling_pair,
    choose_tiling,
    model_products,
    probe_result,
    telling_values,
)
from backends.models.loading import ModelSource
from backends.models.rowwise import gated
from backends.models.stage_model import StageModel
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import END, Run, RunKind, SequenceCopy, SequenceRemove

EVERYONE, PATH, SIBLING, JUNK = 0b1111, 0b0010, 0b0100, 0b1000
CELLS = 720


def text(length: int, vocabulary: int, seed: int = 1) -> list[int]:
    return [random.Random(f"{seed}:{i}").randrange(vocabulary) for i in range(length)]


def one_row_at_a_time(stages: Sequence[StageModel], prompt: list[int], path: list[int]) -> torch.Tensor:
    """Autoregressive decoding of known text: logits ``[1 + len(path), vocabulary]`` after the prompt."""
    chain = Chain(stages, CELLS)
    rows = [chain.logits(run) for run in prefill_runs(prompt, EVERYONE)]
    for i, token in enumerate(path):
        position = len(prompt) + i
        rows.append(chain.logits(Run(1000 + i, 0, RunKind.CANONICAL, (token,), (position,), (EVERYONE,))))
    chain.close()
    return torch.cat(rows)


def scatter_cells(chain: Chain, seed: int) -> None:
    """Takes cells for nobody's text and frees a part of them, so that the session's cells lie in holes."""
    draw = random.Random(seed)
    junk = 60
    chain.skip(Run(900, 0, RunKind.SPECULATIVE, (0,) * junk, tuple(range(2000, 2000 + junk)), (JUNK,) * junk))
    holes = tuple(SequenceRemove(JUNK, 2000 + i, 2001 + i) for i in range(junk - 1) if draw.random() < 0.5)
    chain.skip(Run(901, 0, RunKind.SPECULATIVE, (0,), (2999,), (JUNK,), kv_operations=holes))
    everything = (SequenceRemove(JUNK, 2000, END),) if draw.random() < 0.5 else ()
    chain.skip(Run(902, 0, RunKind.SPECULATIVE, (0,), (2998,), (JUNK,), kv_operations=everything))


def micro_batches(
    stages: Sequence[StageModel], prompt: list[int], path: list[int], sizes: list[int], siblings: int, seed: int
) -> torch.Tensor:
    """The same text in micro-batches of ``sizes``, beside rows of a wrong branch, in scattered cells."""
    chain = Chain(stages, CELLS)
    scatter_cells(chain, seed)
    # Committed text would be everyone's; junk holds one sequence far away, which hides nothing and shares no position.
    rows = [chain.logits(run) for run in prefill_runs(prompt, EVERYONE)]
    done, draw = 0, random.Random(seed)
    for batch, size in enumerate(sizes):
        start = len(prompt) + done
        tokens = path[done : done + size]
        table = [(token, start + i, PATH) for i, token in enumerate(tokens)]
        wrong = [(draw.randrange(stages[0].config.vocabulary), start + i, SIBLING) for i in range(siblings)]
        while wrong:  # slip the wrong branch in between, its own order kept
            at = draw.randrange(len(table) + 1)
            table[at:at] = [wrong.pop()]
        table = sorted(table, key=lambda row: row[2]) if draw.random() < 0.5 else _parents_first(table)
        run = Run(2000 + batch, 0, RunKind.SPECULATIVE, *(tuple(column) for column in zip(*table, strict=True)))
        logits = chain.logits(run)
        rows.append(logits[[i for i, row in enumerate(table) if row[2] == PATH]])
        commit = (SequenceRemove(EVERYONE & ~PATH, start, 1500), SequenceCopy(1, EVERYONE, start, 1500))
        chain.skip(Run(3000 + batch, 0, RunKind.CANONICAL, (0,), (1900 + batch,), (JUNK,), kv_operations=commit))
        done += size
    chain.close()
    return torch.cat(rows)


def _parents_first(table: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return sorted(table, key=lambda row: row[1])


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    return draw(st.lists(st.integers(1, 11), min_size=1, max_size=4))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny_source(folder / name, **changes) for name, changes in FAMILY_CONFIGS.items()}


KERNELS = ("native", "torch")


@pytest.fixture(scope="module")
def wholes(sources: dict[str, ModelSource]) -> dict[tuple[str, str], StageModel]:
    """Models by family and kernels; both are PyTorch's where there is no compiler."""
    return {
        (name, kernels): StageModel(source, 0, 4, kernels="torch" if kernels == "torch" else "auto")
        for name, source in sources.items()
        for kernels in KERNELS
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(list(FAMILY_CONFIGS)),
    kernels=st.sampled_from(KERNELS),
    prompt=st.integers(1, 200),
    sizes=cuts(),
    siblings=st.integers(0, 5),
    seed=st.integers(0, 10),
)
@example(family="llama", kernels="native", prompt=63, sizes=[1, 1, 2], siblings=0, seed=0)
@example(family="llama", kernels="torch", prompt=64, sizes=[3, 5], siblings=2, seed=1)
@example(family="llama", kernels="native", prompt=127, sizes=[2, 8], siblings=5, seed=2)
@example(family="llama", kernels="torch", prompt=60, sizes=[8, 9], siblings=4, seed=3)
@example(family="llama", kernels="native", prompt=600, sizes=[7, 1], siblings=3, seed=4)
@example(family="gemma3", kernels="torch", prompt=63, sizes=[1, 1, 2], siblings=0, seed=0)
@example(family="gemma3", kernels="native", prompt=122, sizes=[7, 9], siblings=4, seed=3)
@example(family="gemma3", kernels="torch", prompt=600, sizes=[7, 1], siblings=3, seed=4)
@example(family="mistral", kernels="native", prompt=130, sizes=[11, 9], siblings=5, seed=5)
@example(family="qwen2-windows", kernels="torch", prompt=60, sizes=[11, 3], siblings=5, seed=6)
@example(family="qwen3", kernels="native", prompt=127, sizes=[2, 8], siblings=5, seed=2)
def test_logits_do_not_depend_on_micro_batches_siblings_or_cells(
    wholes: dict[tuple[str, str], StageModel],
    family: str,
    kernels: str,
    prompt: int,
    sizes: list[int],
    siblings: int,
    seed: int,
) -> None:
    whole = wholes[family, kernels]
    tokens = text(prompt + sum(sizes), 160)
    alone = one_row_at_a_time([whole], tokens[:prompt], tokens[prompt:])
    together = micro_batches([whole], tokens[:prompt], tokens[prompt:], sizes, siblings, seed)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("splits", [(0, 4), (0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_logits_do_not_depend_on_the_stage_split(
    sources: dict[str, ModelSource], wholes: dict[tuple[str, str], StageModel], family: str, splits: tuple[int, ...]
) -> None:
    """Both kernels, turn about."""
    kernels = KERNELS[len(splits) % 2]
    whole = wholes[family, kernels]
    asked = "torch" if kernels == "torch" else "auto"
    stages = [StageModel(sources[family], *layers, kernels=asked) for layers in itertools.pairwise(splits)]
    tokens = text(150, 160)
    assert [stage.is_first for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [stage.is_last for stage in stages] == [False] * (len(stages) - 1) + [True]
    alone = one_row_at_a_time([whole], tokens[:130], tokens[130:])
    assert torch.equal(alone, micro_batches(stages, tokens[:130], tokens[130:], [4, 8, 8], 3, 5))


def recovered(stages: Sequence[StageModel], prompt: list[int], path: list[int], lost_after: int) -> torch.Tensor:
    """A pipeline that is lost after ``lost_after`` tokens: what is known fills empty cells, text as decode rows."""
    first = Chain(stages, CELLS)
    rows = [first.logits(run) for run in prefill_runs(prompt, EVERYONE)]
    for i, token in enumerate(path[:lost_after]):
        rows.append(first.logits(Run(1000 + i, 0, RunKind.CANONICAL, (token,), (len(prompt) + i,), (EVERYONE,))))
    first.close()
    second = Chain(stages, CELLS)
    for run in prefill_runs(prompt, EVERYONE):
        second.logits(dataclasses.replace(run, first_output_row=run.rows))
    for start in range(0, lost_after, 64):
        tokens = tuple(path[start : min(start + 64, lost_after)])
        at = tuple(range(len(prompt) + start, len(prompt) + start + len(tokens)))
        second.logits(Run(2000 + start, 1, RunKind.CANONICAL, tokens, at, (EVERYONE,) * len(tokens)))
    for i, token in enumerate(path[lost_after:], lost_after):
        rows.append(second.logits(Run(3000 + i, 1, RunKind.CANONICAL, (token,), (len(prompt) + i,), (EVERYONE,))))
    second.close()
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_logits_depend_on_no_run_no_split_and_no_recovery_in_any_dtype(
    sources: dict[str, ModelSource], family: str, dtype: torch.dtype
) -> None:
    whole = StageModel(sources[family], 0, 4, dtype)
    stages = [StageModel(sources[family], first, last, dtype) for first, last in [(0, 1), (1, 3), (3, 4)]]
    tokens = text(70 + 90, 160)
    alone = one_row_at_a_time([whole], tokens[:70], tokens[70:])
    assert len(alone.unique(dim=0)) == len(alone), "rows that are all alike prove nothing"
    assert torch.equal(alone, micro_batches(stages, tokens[:70], tokens[70:], [1, 9, 16, 5, 32, 27], 3, 5))
    for lost_after in (17, 70):
        assert torch.equal(alone, recovered(stages, tokens[:70], tokens[70:], lost_after))


@pytest.mark.parametrize("length", [1, 62, 63, 64, 65, 127, 128, 129, 191, 256, 600])
@pytest.mark.parametrize(("family", "kernels"), [("llama", "torch"), ("gemma3", "native"), ("gemma3", "torch")])
def test_every_row_count_agrees_at_every_kv_size(
    wholes: dict[tuple[str, str], StageModel], family: str, kernels: str, length: int
) -> None:
    whole = wholes[family, kernels]
    tokens = text(length + 9, 160)
    alone = one_row_at_a_time([whole], tokens[:length], tokens[length:])
    for size in range(1, 10):
        sizes = [size] * (9 // size) + ([9 % size] if 9 % size else [])
        assert torch.equal(alone, micro_batches([whole], tokens[:length], tokens[length:], sizes, size % 3, size))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_logits_do_not_depend_on_how_three_threads_share_the_rows(tmp_path: Path, kernels: str) -> None:
    """11 rows and 4 of a wrong branch have more values between them than one thread takes, and no whole number each."""
    try:
        whole = StageModel(tiny_source(tmp_path / "wide", intermediate_size=5504), 0, 4, threads=3, kernels=kernels)
        tokens = text(300 + 18, 160)
        alone = one_row_at_a_time([whole], tokens[:300], tokens[300:])
        assert torch.equal(alone, micro_batches([whole], tokens[:300], tokens[300:], [11, 2, 5], 4, 7))
    finally:
        torch.set_num_threads(1)


@pytest.mark.model
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_matrix_shapes_are_exact_too(smollm2: ModelSource, dtype: torch.dtype, kernels: str) -> None:
    thin = StageModel(smollm2, 0, 30, dtype, skipped=range(2, 30), kernels=kernels)
    for length, sizes, siblings in [(5, [1, 2, 3], 1), (63, [4, 5], 3), (130, [8, 1, 9], 0), (60, [6, 7], 5)]:
        tokens = text(length + sum(sizes), smollm2.config.vocabulary)
        alone = one_row_at_a_time([thin], tokens[:length], tokens[length:])
        assert torch.equal(alone, micro_batches([thin], tokens[:length], tokens[length:], sizes, siblings, 7))


@pytest.mark.model
def test_all_layers_of_smollm2_over_three_stages_are_exact(smollm2: ModelSource, smollm2_model: StageModel) -> None:
    stages = [StageModel(smollm2, *layers) for layers in [(0, 11), (11, 19), (19, 30)]]
    tokens = text(125 + 13, smollm2.config.vocabulary)
    alone = one_row_at_a_time([smollm2_model], tokens[:125], tokens[125:])
    assert torch.equal(alone, micro_batches(stages, tokens[:125], tokens[125:], [5, 8], 2, 3))


def in_blocks(cells: torch.Tensor) -> torch.Tensor:
    """``[kv_heads, cells, head_dim]`` as a layer's cache holds them."""
    return cells.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()


def test_attention_ignores_what_a_row_does_not_see() -> None:
    generator = torch.Generator().manual_seed(0)
    table = CellTable(200, 2)
    table.allocate(range(70), [0b11] * 70)
    run = Run(1, 0, RunKind.SPECULATIVE, (1,) * 4, (70, 71, 70, 71), (1, 1, 2, 2))
    cells = table.admit(run)
    keys, values = torch.randn(2, 2, 256, 16, generator=generator)
    queries = torch.randn(4, 2, 2, 16, generator=generator)
    tile = plan_tiles(table, run, 0, 4, 4, [0], 2)[0]
    before = attend(queries, in_blocks(keys), in_blocks(values), tile)
    hidden_from_first_two = [*cells[2:], *range(74, 200)]
    keys[:, hidden_from_first_two] *= -3
    values[:, hidden_from_first_two] += 100
    after = attend(queries, in_blocks(keys), in_blocks(values), tile)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2:], after[2:])


def test_attention_equals_softmax_over_the_visible_cells() -> None:
    generator = torch.Generator().manual_seed(1)
    table = CellTable(300, 1)
    run = Run(1, 0, RunKind.PREFILL, (1,) * 150, tuple(range(150)), (1,) * 150)
    cells = table.admit(run)
    keys, values = torch.randn(2, 3, 320, 8, generator=generator)
    queries = torch.randn(150, 3, 2, 8, generator=generator)
    tile = plan_tiles(table, run, 0, 150, 150, [0], 3)[0]
    got = attend(queries, in_blocks(keys), in_blocks(values), tile).view(150, 3, 2, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.permute(1, 2, 0, 3), keys[:, None, cells], values[:, None, cells], is_causal=True, scale=1.0
    ).permute(2, 0, 1, 3)
    torch.testing.assert_close(got, expected)


def test_a_row_s_history_is_the_text_of_its_own_branch(wholes: dict[tuple[str, str], StageModel]) -> None:
    model = wholes["llama", "native"]
    prompt = text(70, 160)
    tree = [(11, 70, 0b0110), (12, 71, PATH), (13, 71, SIBLING), (14, 72, SIBLING), (15, 72, PATH)]
    chain = Chain([model], CELLS)
    for run in prefill_runs(prompt, EVERYONE):
        chain.logits(run)
    scatter_cells(chain, 1)
    run = Run(2000, 0, RunKind.SPECULATIVE, *(tuple(column) for column in zip(*tree, strict=True)), first_output_row=1)
    model.admit(0, run)
    found = [history.tolist()[70:] for history in model._session(0).histories(run)]
    assert found == [[11, 12], [11, 13], [11, 13, 14], [11, 12, 15]]
    assert all(history.tolist()[:70] == prompt for history in model._session(0).histories(run))
    chain.close()


@pytest.mark.parametrize("window", [1, 5, 63, 64, 65, 128, 500])
def test_a_window_hides_what_lies_behind_it_and_nothing_else(window: int) -> None:
    generator = torch.Generator().manual_seed(2)
    table = CellTable(300, 2)
    table.allocate(range(200), [0b11] * 200)
    run = Run(1, 0, RunKind.SPECULATIVE, (1,) * 5, (200, 201, 202, 200, 201), (1, 1, 1, 2, 2))
    branches = [[*range(200), *cells] for cells in ((200, 201, 202), (203, 204))]
    assert table.admit(run) == [200, 201, 202, 203, 204]
    keys, values = torch.randn(2, 2, 320, 8, generator=generator)
    queries = torch.randn(5, 2, 3, 8, generator=generator)
    tile = plan_tiles(table, run, 0, 5, 8, [window, 0], 2)[window]
    got = attend(torch.cat((queries, queries[:3])), in_blocks(keys), in_blocks(values), tile).view(8, 2, 3, 8)
    assert got.isfinite().all()
    for row, (position, sequences) in enumerate(zip(run.positions, run.sequences, strict=True)):
        cells = branches[sequences - 1][max(0, position + 1 - window) : position + 1]
        scores = torch.einsum("hgd,hcd->hgc", queries[row], keys[:, cells])
        expected = torch.einsum("hgc,hcd->hgd", scores.softmax(-1), values[:, cells])
        torch.testing.assert_close(got[row], expected)


def test_far_blocks_cost_nothing_behind_a_window() -> None:
    table = CellTable(800, 1)
    table.allocate(range(700), [1] * 700)
    run = Run(1, 0, RunKind.CANONICAL, (1,), (700,), (1,))
    table.admit(run)
    tiles = plan_tiles(table, run, 0, 1, 4, [0, 64, 130], 2)
    assert {window: tile.units for window, tile in tiles.items()} == {0: 11, 64: 2, 130: 3}


@given(rows=st.integers(1, 40), sizes=st.sets(st.integers(1, 8), min_size=1))
def test_tiles_cover_all_rows_with_allowed_sizes_and_the_least_padding(rows: int, sizes: set[int]) -> None:
    padded, bounds = Tiling(tuple(sorted(sizes))).split(rows)
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == padded >= rows
    assert {stop - start for start, stop in bounds} <= sizes
    assert padded - rows < max(sizes)


def test_the_check_finds_a_product_that_depends_on_row_count_place_or_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    probe, weight = cancelling_pair(40, 64, torch.float32, generator)
    noise = torch.randn(8, 64, generator=generator)

    def by_place(rows: torch.Tensor) -> torch.Tensor:
        return rows @ weight.T + torch.arange(len(rows)).unsqueeze(1)

    def by_neighbours(rows: torch.Tensor) -> torch.Tensor:
        return rows @ weight.T + rows.abs().max()

    assert probe_result(by_place, probe, noise, 4) is None
    assert probe_result(by_neighbours, probe, noise, 4) is None
    assert probe_result(by_place, probe, noise, 1) is not None


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_telling_values_show_which_ones_are_computed_alone(activation: str) -> None:
    def function(values: torch.Tensor) -> torch.Tensor:
        return gated(torch.cat((values, torch.ones_like(values))), activation)

    telling = telling_values(function, torch.Generator().manual_seed(0))
    together = function(telling.repeat(64)[:1024])
    alone = torch.cat([function(value) for value in telling.repeat(64)[:1024].split(1)])
    assert len(telling) == 2048 or not torch.eq(together, alone).any()


def test_a_cancelling_pair_tells_two_orders_of_summation_apart() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        row, weight = cancelling_pair(64, 576, dtype, torch.Generator().manual_seed(0))
        assert float(weight.double().mv(row.double()).abs().max()) < 1e-12
        products = (weight.float() * row.float()).numpy()
        forward, backward = (
            np.cumsum(order, axis=1, dtype=np.float32)[:, -1] for order in (products, products[:, ::-1])
        )
        assert (forward != backward).mean() > 0.9


@pytest.mark.model
def test_the_start_up_check_of_smollm2_is_quick_and_right(smollm2: ModelSource) -> None:
    torch.nn.functional.linear(torch.zeros(2, 8), torch.zeros(8, 8))
    began = time.perf_counter()
    tiling = choose_tiling(smollm2.config, torch.float32)
    assert time.perf_counter() - began < 3.0  # half a second on an idle machine
    generator = torch.Generator().manual_seed(99)
    for product, probe in model_products(smollm2.config, torch.float32, tiling.kernel, generator):
        rows = torch.randn(LARGEST_TILE, len(probe), generator=generator)
        reference = {size: product(rows[:size]) for size in tiling.sizes}
        for size in tiling.sizes:
            assert torch.equal(reference[size], reference[tiling.sizes[-1]][:size])
