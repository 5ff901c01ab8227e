"""The study of long generations: what it keeps along the way, and its page."""

from pathlib import Path

import pytest

from analysis.long_generation import Measured, Sample, Witness, draw, growth_kib, page
from pipesim.scheduling.events import GenerationStarted, RunReturned
from pipesim.scheduling.policies.autoregressive import Autoregressive
from pipesim.scheduling.scheduler import Scheduler

TOKENS = 3000


@pytest.fixture(scope="module")
def witness() -> Witness:
    """A run a second, half of it on each of two stages; every fifth is passed on by the second one."""
    witness = Witness(Scheduler(Autoregressive()), 0, 2, 2 + TOKENS)
    witness.handle(GenerationStarted((1, 2), TOKENS), 0.0)
    for run in range(TOKENS):
        witness.stage_span(0, run, run, run + 0.25, False)
        witness.stage_span(1, run, run + 0.25, run + 0.5, run % 5 == 0)
        witness.handle(RunReturned(run, (run % 7,)), run + 1.0)
    return witness


def test_some_one_row_runs_are_kept_all_along_the_text(witness: Witness) -> None:
    lengths = [length for length, _ in witness.stage_ms]
    assert {ms for _, ms in witness.stage_ms} == {500.0}
    assert not {2 + run - 1 for run in range(0, TOKENS, 5)} & set(lengths), "what was called off says nothing"
    assert 64 * 30 < len(lengths) <= 64 * 32
    assert min(lengths) < 10
    assert max(lengths) > TOKENS - 30


def test_the_page_tells_growth_and_ratios(witness: Witness, tmp_path: Path) -> None:
    samples = tuple(Sample(at, at, {"head": 100 + at / 1024, "stage 0": 50.0}, at, at // 2) for at in range(1, TOKENS))
    bare = ((1, 250.0), (TOKENS // 2, 500.0), (TOKENS, 1000.0))
    measured = Measured("toy", "float32", witness.summary(), samples, tuple(witness.stage_ms), bare, 1.0)
    assert growth_kib(measured, "head") == pytest.approx(1.0)
    assert growth_kib(measured, "stage 0") == pytest.approx(0.0)
    text = page([measured], "figure.png")
    assert "| toy | float32 | 3000 | 1.0 | 1.0 / 1.0 / 1.0 / 1.0 |" in text
    assert "2.00 / 1.00 / 0.50" in text
    draw([measured], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
