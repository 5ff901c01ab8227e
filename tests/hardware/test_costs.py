import pytest

from pipesim.scenario import LinearCost, StagePlan, TableCost
from pipesim.scheduling.runs import Run, RunKind
from pipesim.simulation.stage import Frame

DECODE, PREFILL = RunKind.CANONICAL, RunKind.PREFILL


def seconds(cost: LinearCost | TableCost, rows: int, kv_length: int = 0, kind: RunKind = DECODE) -> float:
    return StagePlan("s", 0, 5, None, cost).cost_model().seconds(kind, rows, kv_length)


def test_linear() -> None:
    cost = LinearCost(kind="linear", constant_ms=10, per_token_ms=2, kv_us_per_kilocell=500)
    assert seconds(cost, 3) == pytest.approx(0.016)
    assert seconds(cost, 3, kv_length=2000) == pytest.approx(0.016 + 3 * 2 * 500e-6)


def test_per_layer_costs_are_multiplied_by_the_layers() -> None:
    assert seconds(LinearCost(kind="linear", constant_ms=1, per_token_ms=1, per="layer"), 1) == pytest.approx(5 * 0.002)
    assert seconds(TableCost(kind="table", rows_ms={1: 2}, per="layer"), 1) == pytest.approx(5 * 0.002)


@pytest.mark.parametrize(
    ("rows", "expected_ms"), [(1, 10), (2, 12), (3, 14), (4, 16), (6, 26), (8, 36), (10, 46), (16, 76)]
)
def test_a_table_is_linear_between_and_beyond_its_entries(rows: int, expected_ms: float) -> None:
    cost = TableCost(kind="table", rows_ms={1: 10, 4: 16, 8: 36})
    assert seconds(cost, rows) == pytest.approx(expected_ms * 1e-3)


def test_a_table_never_falls_beyond_its_last_entry_and_is_constant_before_its_first() -> None:
    cost = TableCost(kind="table", rows_ms={2: 10, 4: 9.5})
    assert seconds(cost, 100) == pytest.approx(9.5e-3)
    assert seconds(cost, 1) == pytest.approx(10e-3)


def test_a_table_may_have_one_entry() -> None:
    assert seconds(TableCost(kind="table", rows_ms={4: 9}), 64) == pytest.approx(9e-3)


def test_prompt_rows_have_their_own_price_but_never_less_than_one_row_costs() -> None:
    linear = LinearCost(kind="linear", constant_ms=10, per_token_ms=2, prefill_per_token_ms=0.5)
    table = TableCost(kind="table", rows_ms={1: 12, 4: 18}, prefill_per_token_ms=0.5)
    for cost in (linear, table):
        assert seconds(cost, 64, kind=PREFILL) == pytest.approx(32e-3)
        assert seconds(cost, 4, kind=PREFILL) == pytest.approx(12e-3)
        assert seconds(cost, 4) == pytest.approx(18e-3)


def test_without_a_price_prompt_rows_cost_what_others_cost() -> None:
    cost = LinearCost(kind="linear", constant_ms=10, per_token_ms=2)
    assert seconds(cost, 7, kind=PREFILL) == seconds(cost, 7)


def test_prompt_rows_attend_to_half_the_prompt_on_average() -> None:
    """A row at position p attends to p + 1 cells: rows 4 .. 7 to 6.5 on average."""
    frame = Frame(Run(0, 0, PREFILL, (1,) * 4, (4, 5, 6, 7), (1,) * 4), row_bytes=4)
    assert frame.context == 6.5


def test_a_table_survives_the_way_through_json() -> None:
    cost = TableCost(kind="table", rows_ms={1: 10, 4: 16})
    assert TableCost.model_validate_json(cost.model_dump_json()) == cost
