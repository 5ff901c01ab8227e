from pathlib import Path

import pytest
from laboratories import InProcess, in_process
from scenario_builder import build

from analysis.laboratory import Laboratory, figures
from pipesim.errors import InvariantError
from pipesim.sweep.journal import Journal

JOBS = [(build("workload.max_new_tokens=6").model_dump_json(), seed) for seed in (1, 2)]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    found = []
    for expected in (2, 0):
        pool = InProcess()
        with Journal.opened(tmp_path / "journal") as journal:
            found.append(Laboratory(pool, journal).map(figures, [*JOBS, JOBS[0]]))
        assert pool.jobs == expected
    assert found[0] == found[1]
    assert found[0][0] == found[0][2] != found[0][1]


def test_variants_that_write_different_texts_are_an_error() -> None:
    variants = {"one": build("model.vocabulary=100"), "other": build("model.vocabulary=200")}
    with pytest.raises(InvariantError, match="other generates another text than one with seed 5"):
        in_process().measure(variants, [5])
