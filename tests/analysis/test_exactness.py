"""A part of the exactness campaign, and whether it can fail. The whole: ``python -m analysis.exactness``."""

from pathlib import Path

import pytest

from analysis.exactness.campaign import EQUAL, Outcome, run_campaign
from analysis.exactness.combinations import ARITHMETICS, DRAFTERS, PER_PIPELINE, STAGES, draw_combination, draw_setup
from analysis.exactness.mutations import DEFECTS
from analysis.exactness.page import frame, page
from backends.models.random_models import FAMILY_CONFIGS
from pipesim.sweep.journal import Journal

PIPELINES = (0, 14, 18, 22, 23, 24)
EACH = 7
NUMBERS = [pipeline * PER_PIPELINE + number for pipeline in PIPELINES for number in range(2, 2 + EACH)]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return run_campaign(NUMBERS, Journal(), lambda _: None, jobs=2)


def test_the_part_that_is_run_here_has_something_of_everything() -> None:
    setups = [draw_setup(pipeline) for pipeline in PIPELINES]
    assert {setup.family for setup in setups} == set(FAMILY_CONFIGS)
    assert {setup.drafter for setup in setups} == set(DRAFTERS)
    assert {(setup.dtype, setup.kernels) for setup in setups} == set(ARITHMETICS)
    assert {len(setup.layers) for setup in setups} >= {STAGES[0], STAGES[-1]}


@pytest.mark.timeout(240)
def test_every_text_is_plain_decodings_and_every_log_replays(outcomes: list[Outcome]) -> None:
    assert [one for one in outcomes if one["verdict"] != EQUAL] == []
    assert [one["number"] for one in outcomes] == NUMBERS


def test_texts_are_no_monotony_and_speculation_was_at_work(outcomes: list[Outcome]) -> None:
    table = frame(outcomes)
    assert table["tokens"].sum() > 500
    assert table["distinct"].sum() > 0.3 * table["tokens"].sum()
    assert table["accepted"].sum() > 100
    assert table["verified"].sum() > 1.2 * table["accepted"].sum(), "rejected drafts matter as much"
    assert table["forks"].sum() > 50
    assert sum(one["fates"].get("cancelled", 0) for one in outcomes) > 40, "170 to 490 so far, as drafts are in time"
    assert table["void_spans"].sum() > 0, "a stage passes on what was called off before its turn"
    assert any(one["killed"] for one in outcomes), "a lost stage changes nothing"
    assert {"length", "stop string"} <= set(table["end"])


def test_a_combination_is_a_function_of_its_number() -> None:
    assert [draw_combination(number) for number in range(50)] == [draw_combination(number) for number in range(50)]
    assert len({repr(draw_combination(number)) for number in range(50)}) == 50


@pytest.mark.parametrize(
    ("name", "numbers", "verdict"),
    [
        ("wrong position", (0, 1, 4), "another text"),
        ("no verification", (283, 284, 287, 288), "another text"),
        ("stale cells", (347, 216), "cells are held at the end"),
    ],
)
def test_the_campaign_finds_a_defect(name: str, numbers: tuple[int, ...], verdict: str) -> None:
    """Each of these found it whenever it was tried; that half of them do leaves room for other timing."""
    found = run_campaign(numbers, Journal(), lambda _: None, with_defect=name)
    assert sum(verdict in one["verdict"] for one in found) >= len(numbers) / 2


def test_what_is_in_the_journal_is_not_run_again_and_the_page_tells_all(
    outcomes: list[Outcome], tmp_path: Path
) -> None:
    with Journal.opened(tmp_path / "journal.jsonl") as journal:
        first = run_campaign(NUMBERS[:1], journal, lambda _: None)
    told: list[str] = []
    with Journal.opened(tmp_path / "journal.jsonl") as journal:
        assert run_campaign(NUMBERS[:1], journal, told.append) == first
    assert not told
    broken = [{**outcomes[0], "verdict": "another text from token 3 on"}, *outcomes[1:]]
    found = {name: [broken[0] if name == "stale cells" else outcomes[1]] for name in DEFECTS}
    text = page(broken, found, "c0ffee")
    assert f"| {NUMBERS[0]} | another text from token 3 on |" in text
    assert "c0ffee" in text
    assert "smollm2" not in text
    assert "Not found, which is a gap of the campaign: wrong position, leaked cell" in " ".join(text.split())
    assert "stale cells." not in text
