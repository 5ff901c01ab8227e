"""The page of real speeds says what was measured."""

import pandas as pd

from analysis.prompts import PROMPTS
from analysis.speed import PLAIN, POLICIES, gain, page


def measured() -> pd.DataFrame:
    """Three repeats on two pipelines: plain decoding at 10 tokens/s, the others twice and 1.5 times as fast."""
    rows = [
        (prompt.name, policy, stages, times * speed)
        for stages in (1, 2)
        for prompt in PROMPTS
        for policy, times in zip(POLICIES, (1.0, 2.0, 1.5), strict=True)
        for speed in (11.0, 9.0, 10.0)
    ]
    return pd.DataFrame(rows, columns=["prompt", "policy", "stages", "tokens_per_second"])


def test_a_gain_is_a_ratio_of_medians_on_the_same_stages() -> None:
    results = measured()
    results.loc[(results["stages"] == 1) & (results["policy"] == PLAIN), "tokens_per_second"] *= 2
    assert gain(results, "story", "pipeinfer", stages=2) == 1.5
    assert gain(results, "story", "pipeinfer", stages=1) == 0.75


def test_the_page_has_a_row_for_each_prompt_and_policy() -> None:
    text = page(measured(), [0.5, 0.6, 0.7], "bfloat16")
    assert "| story | pipeinfer | 15.0 (13.5 .. 16.5), **1.50x** | 15.0 (13.5 .. 16.5), **1.50x** |" in text
    assert f"| letter | {PLAIN} | 10.0 (9.0 .. 11.0) | 10.0 (9.0 .. 11.0) |" in text
    assert text.count("**2.00x**") == 2 * len(PROMPTS)
    assert "median of 3 runs" in text
    repeating, useless = text.split("Answers of which the drafter knows nothing")
    assert all((prompt.name in repeating) is prompt.repeats for prompt in PROMPTS)
    assert all((prompt.name in useless) is not prompt.repeats for prompt in PROMPTS)


def test_prompts_of_both_kinds_have_names_of_their_own() -> None:
    assert len({prompt.name for prompt in PROMPTS}) == len(PROMPTS)
    assert {prompt.repeats for prompt in PROMPTS} == {True, False}
