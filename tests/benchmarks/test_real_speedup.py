"""What speculation is worth for real: SmolLM2-135M in two one-thread stages on two cores, n-gram drafter, wall clock.

``pytest --runslow tests/benchmarks/test_real_speedup.py`` takes two minutes; ``python -m analysis.speed`` writes the
figures down. Plain decoding, with which all is compared, runs on the same pipeline in turns with the others.
"""

import asyncio
import os

import pandas as pd
import pytest

from analysis.prompts import PROMPTS
from analysis.speed import gain, measure
from backends.models.finding import DEFAULT_MODEL, find_model
from pipesim.errors import BadInputError

pytestmark = [pytest.mark.slow, pytest.mark.model]
STAGES = 2


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    """All policies on all prompts; ``measure`` raises if two texts differ."""
    if (os.cpu_count() or 1) < STAGES:
        pytest.skip("SKIPPED: two stages need two cores")
    try:
        find_model(DEFAULT_MODEL)
    except BadInputError as error:
        pytest.skip(f"SKIPPED: {error}")
    found, _ = asyncio.run(measure("bfloat16", [STAGES], repeats=3))
    return found


def named(repeats: bool) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("prompt", [prompt.name for prompt in PROMPTS if prompt.repeats is repeats])


@named(repeats=True)
def test_an_answer_that_repeats_text_comes_half_as_fast_again(results: pd.DataFrame, prompt: str) -> None:
    assert gain(results, prompt, "pipeinfer", STAGES) >= 1.5


@named(repeats=False)
def test_useless_drafts_cost_next_to_nothing(results: pd.DataFrame, prompt: str) -> None:
    assert gain(results, prompt, "pipeinfer", STAGES) >= 0.95
