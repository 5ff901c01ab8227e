"""The KV cell table: metadata only, the same answer everywhere."""

import pytest

from pipesim.errors import InvariantError, KvCapacityError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import END, SequenceCopy, SequenceRemove


@pytest.fixture
def table() -> CellTable:
    """Positions 0 and 1 are everyone's; sequences 1 and 2 disagree about position 2."""
    table = CellTable(cells=8, sequences=4)
    table.allocate([0, 1], [table.everyone] * 2)
    table.allocate([2, 2], [0b0010, 0b0100])
    return table


def test_cells_are_handed_out_lowest_first_and_come_back(table: CellTable) -> None:
    table.apply(SequenceRemove(0b0010, 2, END))
    assert table.free == 5
    assert table.allocate([3], [0b0100]) == [2]


def test_a_row_sees_one_cell_of_its_own_sequences_at_each_position(table: CellTable) -> None:
    assert table.visible(2, 0b0010) == [0, 1, 2]
    assert table.visible(2, 0b0100) == [0, 1, 3]
    assert table.visible(2, 0b0100, start=2) == [3]


def test_two_visible_cells_at_one_position_are_an_error(table: CellTable) -> None:
    with pytest.raises(InvariantError, match="sees 2 cells at position 2"):
        table.visible(2, 0b0110)


def test_a_missing_cell_is_an_error(table: CellTable) -> None:
    with pytest.raises(InvariantError, match="sees 0 cells at position 3"):
        table.visible(3, 0b0010)


def test_a_copy_shares_cells_without_taking_new_ones(table: CellTable) -> None:
    table.apply(SequenceCopy(source=1, targets=0b1000, start=2, stop=3))
    assert table.allocated == 4
    assert table.visible(2, 0b1000) == [0, 1, 2]
    table.apply(SequenceRemove(0b0010, 2, END))
    assert table.visible(2, 0b1000) == [0, 1, 2], "the cell lives while anyone holds it"


def test_the_shared_prefix_grows_with_promotion_and_shrinks_with_removal(table: CellTable) -> None:
    assert table.shared_prefix().tolist() == [0, 1]
    table.apply(SequenceRemove(table.everyone & ~0b0100, 2, 3))
    table.apply(SequenceCopy(2, table.everyone, 2, 3))
    assert table.shared_prefix().tolist() == [0, 1, 3]
    table.apply(SequenceRemove(0b0001, 1, 2))
    assert table.shared_prefix().tolist() == [0]


def test_too_many_rows_are_refused_whole(table: CellTable) -> None:
    with pytest.raises(KvCapacityError, match="5 KV cells needed, 4 of 8 free"):
        table.allocate([3, 4, 5, 6, 7], [1] * 5)
    assert table.free == 4


@pytest.mark.parametrize("sequences", [0, 1 << 4])
def test_a_row_needs_known_sequences(table: CellTable, sequences: int) -> None:
    with pytest.raises(InvariantError, match="empty or has unknown ids"):
        table.allocate([3], [sequences])


def test_releasing_all_frees_every_cell(table: CellTable) -> None:
    table.release_all()
    table.check()
    assert table.free == table.total
    assert table.shared_prefix().tolist() == []
